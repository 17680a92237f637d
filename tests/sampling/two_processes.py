"""Ranks and completes images in a tensor group of all launched processes; started by test_groups.py.

Arguments: a JSON file with {"export": folder, "clip": folder, "picture": file, "out": folder}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dalle_ds.models.clip import Clip
from dalle_ds.parallel import WHOLE, Mesh, TensorGroup
from dalle_ds.sampling import ClipReranker, SamplingRequest, TextToImage, rank_candidates
from dalle_ds.sampling.completion import open_image, top_rows

PROMPTS = ["a red circle", "a blue square"]


class Unlike(ClipReranker):
    """Scores that differ between processes by more than those of neighbouring candidates."""

    rank = 0

    def __call__(self, prompt: str, images: list[Any]) -> list[float]:
        return [score + (-1) ** (self.rank + number) for number, score in enumerate(super().__call__(prompt, images))]


def results(job: dict[str, str], tensor: TensorGroup = WHOLE) -> dict[str, Any]:
    pipe = TextToImage.from_pretrained(job["export"], tensor=tensor)
    clip = Clip.from_pretrained(job["clip"])
    given = top_rows(pipe.dvae, open_image(job["picture"], 16), 2).expand(2, -1)
    found: dict[str, Any] = {"fingerprints": list(pipe.fingerprints().values())}
    for name, codes in (("whole", None), ("completed", given)):
        rankings = rank_candidates(
            pipe, PROMPTS, SamplingRequest(num=6, seed=1, batch_size=4, given=codes), clip, keep=2
        )
        found[name] = {
            "scores": [ranking.scores for ranking in rankings],
            "kept": [[one.number for one in ranking.kept] for ranking in rankings],
            "codes": [[one.codes.tolist() for one in ranking.kept] for ranking in rankings],
        }
    unlike = Unlike(clip)
    unlike.rank = tensor.rank
    known = {PROMPTS[0]: [9.0, 0.0, 8.0]}  # numbers 0 and 2 are drawn again, by all processes
    agreed = rank_candidates(pipe, PROMPTS, SamplingRequest(num=6, seed=1), unlike, keep=3, known=known)
    found["agreed"] = [[[one.number, one.codes.tolist()] for one in ranking.kept] for ranking in agreed]
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[-1]).read_text())
    tensor = Mesh.tensor_group("cpu")
    assert tensor.size == 2
    (Path(job["out"]) / f"{tensor.rank}.json").write_text(json.dumps(results(job, tensor)))


if __name__ == "__main__":
    main()
