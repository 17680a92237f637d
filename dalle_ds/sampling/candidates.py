"""Candidates for prompts and the best of them: many more than memory holds at once (DALL·E §2.6 samples 512 for each).

A file of their scores lets more be sampled or kept later without sampling and scoring all again:

    {"kind": "scores of candidates",
     "of": {"transformer": fingerprint, "dvae": …, "tokenizer": …, "clip": …, "seed": 0, "temperature": 1.0, …},
     "prompts": [{"prompt": "a red cat", "kept": [17, 3], "scores": [0.21, …]}]}

`scores[i]` is candidate i's, which depends on what `of` says, i and the prompt only; `kept` has the numbers of the best, best
first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import write_json
from dalle_ds.parsing import is_text, parse_json, shown
from dalle_ds.sampling.codes import SamplingRequest, sample_batches

if TYPE_CHECKING:
    from dalle_ds.models.clip import Clip
    from dalle_ds.sampling.pipeline import TextToImage

KIND = "scores of candidates"
DIGITS = 6
"""Decimals of a CLIP score. What lies beyond is rounding, and depends on which images are embedded together."""
_LARGEST = 1e30
"""What no score reaches."""

Reranker = Callable[[str, list[Image.Image]], Sequence[float]]
"""Says how well images match a prompt, each image by itself: one score per image, greater is better. Called several times for
a prompt of many images."""


class ClipReranker:
    """Scores images by the cosine of CLIP's embeddings of image and prompt.

    Args:
        clip: with its tokenizer.
        batch_size: images embedded at once.

    Raises:
        ConfigError: batch_size below 1, or a CLIP that reads no captions.
    """

    def __init__(self, clip: Clip, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
        if clip.tokenizer is None:
            raise ConfigError("the CLIP that is to rerank has no tokenizer: export it with the one it was trained with")
        self.clip = clip
        self.batch_size = batch_size
        self._embedded: tuple[str, Tensor] | None = None

    def __call__(self, prompt: str, images: list[Image.Image]) -> list[float]:
        """Cosines in [−1, 1], rounded to 6 decimals."""
        if self._embedded is None or self._embedded[0] != prompt:
            self._embedded = prompt, self.clip.embed_texts([prompt], normalize=True)[0]
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            some = self.clip.embed_images(images[start : start + self.batch_size], normalize=True)
            cosines = some @ self._embedded[1]
            scores += [round(float(cosine), DIGITS) for cosine in cosines]
        return scores


@dataclass(frozen=True)
class RankedImage:
    """A candidate that was kept."""

    number: int
    """Which of the prompt's candidates, counted from 0."""
    score: float
    codes: Tensor
    """(W²,) int64."""
    image: Image.Image


@dataclass
class Ranking:
    """The candidates of one prompt."""

    prompt: str
    scores: list[float] = field(default_factory=list)
    """Of all candidates, by their numbers."""
    kept: list[RankedImage] = field(default_factory=list)
    """The best, best first; the first of equals."""

    def best(self, keep: int) -> list[int]:
        """Numbers of the `keep` best."""
        return sorted(range(len(self.scores)), key=lambda number: (-self.scores[number], number))[:keep]


def rank_candidates(
    pipe: TextToImage,
    prompts: str | Sequence[str],
    request: SamplingRequest,
    rerank: Reranker | Clip,
    *,
    keep: int | None = None,
    known: Mapping[str, Sequence[float]] | None = None,
    on_scores: Callable[[Sequence[Ranking]], None] | None = None,
) -> list[Ranking]:
    """Sample `request.num` candidates for each prompt, score them, keep the best.

    Candidate i of a prompt depends on the seed, i and the prompt only: the best of 8 are chosen among the first 8 of the very
    candidates that the best of 64 are chosen among. Memory is bounded by one batch and `keep` images for each prompt.

    Args:
        keep: images to keep for each prompt; None keeps all, sorted.
        known: scores of a prompt's first candidates, by the same `rerank` of the same request. They are not sampled and not
            scored again; those of them that are among the best are sampled again; on GPUs, the same where batches are.
        on_scores: called after every batch with all prompts; what they have of scores so far is complete from number 0 on.

    Returns:
        One for each prompt, in their order.

    Raises:
        ConfigError: keep outside of [1, num].
        DataError: a reranker that does not give one number per image; as `sample_codes`.
    """
    from dalle_ds.models.clip import Clip

    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    num = request.num
    keep = num if keep is None else keep
    if not 1 <= keep <= num:
        raise ConfigError(f"keep must be at least 1 and at most num={num}, found {keep}")
    score = ClipReranker(rerank) if isinstance(rerank, Clip) else rerank
    text = pipe.encode(prompts)
    rankings = [Ranking(prompt, list((known or {}).get(prompt, ()))[:num]) for prompt in prompts]

    missing = [(row, number) for row, of_row in enumerate(rankings) for number in range(len(of_row.scores), num)]
    for batch in sample_batches(pipe.model, text, missing, request):
        start = 0
        for row, group in groupby(batch.images, key=lambda image: image[0]):
            ranking, numbers = rankings[row], [number for _, number in group]
            of_prompt = batch.codes[start : start + len(numbers)]
            start += len(numbers)
            images = pipe.decode(of_prompt)
            scores = _agreed(pipe, checked_scores(score(ranking.prompt, images), ranking.prompt, len(images)))
            ranking.scores += scores
            codes = [one.clone() for one in of_prompt]  # a view would keep the codes of the whole batch
            found = [RankedImage(*each) for each in zip(numbers, scores, codes, images, strict=True)]
            ranking.kept = sorted([*ranking.kept, *found], key=lambda one: (-one.score, one.number))[:keep]
        if on_scores is not None:
            on_scores(rankings)

    # Of what was known, only the scores are at hand.
    best = [ranking.best(keep) for ranking in rankings]
    at_hand = [{one.number: one for one in ranking.kept} for ranking in rankings]
    again = [(row, number) for row, numbers in enumerate(best) for number in numbers if number not in at_hand[row]]
    for batch in sample_batches(pipe.model, text, again, request):
        for (row, number), codes, image in zip(batch.images, batch.codes, pipe.decode(batch.codes), strict=True):
            at_hand[row][number] = RankedImage(number, rankings[row].scores[number], codes.clone(), image)
    for ranking, numbers, ours in zip(rankings, best, at_hand, strict=True):
        ranking.kept = [ours[number] for number in numbers]
    return rankings


def checked_scores(scores: Sequence[float], prompt: str, count: int) -> list[float]:
    """What a reranker gave, one number for each image; DataError otherwise."""
    values = [float(value) for value in scores]
    if len(values) != count:
        raise DataError(f"rerank must give one score per image: found {len(values)} for {count} images")
    if any(value != value for value in values):
        raise DataError(f"rerank gave a score that is not a number for the prompt {prompt!r}: {shown(values)}")
    return values


def _agreed(pipe: TextToImage, scores: list[float]) -> list[float]:
    """The same scores on all processes that sample together, or they would go on to sample different images."""
    group = pipe.model.tensor
    if group.size == 1:
        return scores
    return group.max_(torch.tensor(scores, dtype=torch.float64, device=pipe.device)).tolist()


# --- files of scores


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
