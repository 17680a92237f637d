"""Candidates for prompts, batch after batch: many more than memory holds at once (DALL·E §2.6 draws 512 for each)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dalle import Dalle
from dalle_ds.parsing import shown
from dalle_ds.sampling.codes import Drawn, SamplingRequest, sample_batches
from dalle_ds.sampling.rerank import Reranker, as_reranker

if TYPE_CHECKING:
    from dalle_ds.models.clip import Clip


class Pipeline(Protocol):
    """What candidates are drawn with, such as `TextToImage`."""

    model: Dalle

    @property
    def device(self) -> torch.device:
        """Where codes are drawn."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(B, T) int64, −1 where padded."""
        ...

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Images of codes (B, W²)."""
        ...


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
    """The best, best first; the first drawn of equals."""

    def best(self, keep: int) -> list[int]:
        """Numbers of the `keep` best."""
        return sorted(range(len(self.scores)), key=lambda number: (-self.scores[number], number))[:keep]


def rank_candidates(
    pipe: Pipeline,
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
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    num = request.num
    keep = num if keep is None else keep
    if not 1 <= keep <= num:
        raise ConfigError(f"keep must be at least 1 and at most num={num}, found {keep}")
    score = as_reranker(rerank)
    text = pipe.encode(prompts)
    rankings = [Ranking(prompt, list((known or {}).get(prompt, ()))[:num]) for prompt in prompts]

    def draw(wanted: Sequence[tuple[int, int]]) -> Iterable[Drawn]:
        return sample_batches(pipe.model, text, wanted, request)

    missing = [(row, number) for row, of_row in enumerate(rankings) for number in range(len(of_row.scores), num)]
    for chunk_drawn in draw(missing):
        for ranking, drawn in _by_prompt(chunk_drawn, rankings):
            pictures = pipe.decode(drawn.codes)
            scores = _agreed(pipe, _checked(score(ranking.prompt, pictures), ranking.prompt, len(pictures)))
            ranking.scores += scores
            numbers = [number for _, number in drawn.images]
            codes = [one.clone() for one in drawn.codes]  # a view would keep the codes of the whole chunk
            found = [RankedImage(*each) for each in zip(numbers, scores, codes, pictures, strict=True)]
            ranking.kept = sorted([*ranking.kept, *found], key=lambda one: (-one.score, one.number))[:keep]
        if on_scores is not None:
            on_scores(rankings)

    # Of what was known, only the scores are at hand.
    best = [ranking.best(keep) for ranking in rankings]
    at_hand = [{one.number: one for one in ranking.kept} for ranking in rankings]
    again = [(row, number) for row, numbers in enumerate(best) for number in numbers if number not in at_hand[row]]
    for drawn in draw(again):
        for (row, number), codes, picture in zip(drawn.images, drawn.codes, pipe.decode(drawn.codes), strict=True):
            at_hand[row][number] = RankedImage(number, rankings[row].scores[number], codes.clone(), picture)
    for ranking, numbers, ours in zip(rankings, best, at_hand, strict=True):
        ranking.kept = [ours[number] for number in numbers]
    return rankings


def _by_prompt(drawn: Drawn, rankings: Sequence[Ranking]) -> Iterator[tuple[Ranking, Drawn]]:
    """The parts of a chunk that belong to one prompt each."""
    start = 0
    for row, group in groupby(drawn.images, key=lambda picture: picture[0]):
        pictures = tuple(group)
        yield rankings[row], Drawn(pictures, drawn.codes[start : start + len(pictures)])
        start += len(pictures)


def _checked(scores: Sequence[float], prompt: str, count: int) -> list[float]:
    values = [float(value) for value in scores]
    if len(values) != count:
        raise DataError(f"rerank must give one score per image: found {len(values)} for {count} images")
    if any(value != value for value in values):
        raise DataError(f"rerank gave a score that is not a number for the prompt {prompt!r}: {shown(values)}")
    return values


def _agreed(pipe: Pipeline, scores: list[float]) -> list[float]:
    """The same scores on all processes that draw together, or they would go on to draw different images."""
    group = pipe.model.tensor
    if group.size == 1:
        return scores
    return group.max_(torch.tensor(scores, dtype=torch.float64, device=pipe.device)).tolist()
