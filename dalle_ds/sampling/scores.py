"""Files of candidates' scores, so that more can be drawn or kept later without drawing and scoring all again.

    {"kind": "scores of candidates",
     "of": {"transformer": fingerprint, "dvae": …, "tokenizer": …, "clip": …, "seed": 0, "temperature": 1.0, …},
     "prompts": [{"prompt": "a red cat", "kept": [17, 3], "scores": [0.21, …]}]}

`scores[i]` is candidate i's, which depends on what `of` says, i and the prompt only; `kept` has the numbers of the best, best
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import write_json
from dalle_ds.parsing import is_text, parse_json, shown
from dalle_ds.sampling.candidates import Ranking

KIND = "scores of candidates"
_LARGEST = 1e30
"""What no score reaches."""


@dataclass
class Scores:
    """What a file of scores holds, or will hold."""

    path: Path
    of: dict[str, Any]
    """All that a score depends on, besides its candidate's number and prompt."""
    prompts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Prompt → {"kept": numbers, "scores": numbers}."""

    @classmethod
    def open(cls, path: Path, of: Mapping[str, Any]) -> Scores:
        """The scores in a file, none where there is no such file.

        Raises:
            ConfigError: they are those of other models or settings.
            DataError: the file is none of scores, or damaged.
        """
        scores = cls(path, dict(of))
        try:
            content = parse_json(path.read_bytes())
        except FileNotFoundError:
            return scores
        except (OSError, ValueError) as error:
            raise DataError(f"the scores in {path} cannot be read: {error}; name another file with --scores") from error
        if not isinstance(content, dict) or content.get("kind") != KIND or not isinstance(content.get("of"), dict):
            raise DataError(f"{path} exists and holds no scores: name another file with --scores")
        found = content["of"]
        differing = [name for name in sorted({*found, *of}) if found.get(name) != of.get(name)]
        if differing:
            told = "; ".join(f"{name}: {_told(found.get(name))} there, {_told(of.get(name))} now" for name in differing)
            raise ConfigError(
                f"the scores in {path} are of other candidates or of another CLIP ({told}): name another file with --scores"
            )
        entries = content.get("prompts")
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, dict) or not _is_entry(entry):
                raise DataError(f"the scores in {path} are damaged ({shown(entry)}): remove the file, or name another")
            scores.prompts[entry["prompt"]] = {"kept": entry["kept"], "scores": entry["scores"]}
        return scores

    @property
    def known(self) -> dict[str, list[float]]:
        """Prompt → scores of its first candidates."""
        return {prompt: entry["scores"] for prompt, entry in self.prompts.items()}

    def update(self, rankings: Sequence[Ranking], keep: int) -> None:
        """Take over what is new. Scores of more candidates than were asked for this time stay.

        Args:
            keep: how many of each prompt's candidates are kept.
        """
        for ranking in rankings:
            before = self.known.get(ranking.prompt, [])
            scores = [*ranking.scores, *before[len(ranking.scores) :]]
            self.prompts[ranking.prompt] = {"kept": ranking.best(keep), "scores": scores}

    def write(self) -> None:
        """Write the file, whole or not at all."""
        prompts = [{"prompt": prompt, **entry} for prompt, entry in self.prompts.items()]
        write_json(self.path, {"kind": KIND, "of": self.of, "prompts": prompts})


def _is_entry(entry: Mapping[str, Any]) -> bool:
    kept, scores = entry.get("kept"), entry.get("scores")
    if not (is_text(entry.get("prompt")) and isinstance(kept, list) and isinstance(scores, list)):
        return False
    numbers = all(type(score) in (int, float) and abs(score) < _LARGEST for score in scores)  # True is none
    return numbers and all(type(one) is int and 0 <= one < len(scores) for one in kept)


def _told(value: Any) -> str:
    """A value, a fingerprint shortened."""
    return value[:12] if isinstance(value, str) else shown(value)
