"""Reranking (DALL·E §2.6): candidates are drawn and scored chunk after chunk, and only the best pictures stay in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.parsing import shown
from dalle_ds.sampling.codes import Drawn, Progress, draw_batches
from dalle_ds.sampling.draw import Sampling

if TYPE_CHECKING:
    from dalle_ds.models.clip import Clip
    from dalle_ds.sampling.pipeline import TextToImage

DIGITS = 6
"""Decimals of a CLIP score. What lies beyond is rounding, and depends on which pictures are embedded together."""


class Reranker(Protocol):
    """Says how well pictures match a prompt, each picture by itself."""

    def __call__(self, prompt: str, images: list[Image.Image]) -> Sequence[float]:
        """One score per picture, greater is better. Called several times for a prompt of many pictures."""
        ...


class ClipReranker:
    """Scores pictures by the cosine of CLIP's embeddings of picture and prompt.

    Args:
        clip: with its tokenizer.
        batch_size: pictures embedded at once.

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

    @property
    def fingerprint(self) -> str:
        """Of the CLIP."""
        return self.clip.fingerprint

    def __call__(self, prompt: str, images: list[Image.Image]) -> list[float]:
        """Cosines in [−1, 1], rounded to 6 decimals."""
        if self._embedded is None or self._embedded[0] != prompt:
            self._embedded = prompt, self.clip.embed_texts([prompt])[0]
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            cosines = self.clip.embed_images(images[start : start + self.batch_size]) @ self._embedded[1]
            scores += [round(float(cosine), DIGITS) for cosine in cosines]
        return scores


def as_reranker(rerank: Reranker | Clip) -> Reranker:
    """A `ClipReranker` of a `Clip`; anything else as it is."""
    from dalle_ds.models.clip import Clip

    return ClipReranker(rerank) if isinstance(rerank, Clip) else rerank


@dataclass(frozen=True)
class Kept:
    """A candidate that was kept."""

    number: int
    """Which of the prompt's candidates, counted from 0."""
    score: float
    codes: Tensor
    """(W²,) int64."""
    picture: Image.Image


@dataclass
class Ranking:
    """The candidates of one prompt."""

    prompt: str
    scores: list[float] = field(default_factory=list)
    """Of all candidates, by their numbers."""
    kept: list[Kept] = field(default_factory=list)
    """The best, best first; the first drawn of equals."""

    def best(self, keep: int) -> list[int]:
        """Numbers of the `keep` best."""
        return sorted(range(len(self.scores)), key=lambda number: (-self.scores[number], number))[:keep]


def rank_candidates(
    pipe: TextToImage,
    prompts: str | Sequence[str],
    num: int,
    rerank: Reranker | Clip,
    *,
    keep: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    chunk: int | None = None,
    given: Tensor | None = None,
    known: Mapping[str, Sequence[float]] | None = None,
    on_row: Callable[[Progress], None] | None = None,
    on_scores: Callable[[Sequence[Ranking]], None] | None = None,
) -> list[Ranking]:
    """Draw `num` candidates for each prompt, score them, keep the best.

    Memory is bounded by one chunk and `keep` pictures for each prompt, whatever `num` is.

    Args:
        keep: pictures to keep for each prompt; None keeps all, sorted.
        chunk, sampling, seed, given, on_row: as in `draw_candidates`.
        known: scores of a prompt's first candidates, by the same `rerank` under the same settings. They are not drawn and not
            scored again; those of them that are among the best are drawn again, and are the same (on GPUs, where batches are).
        on_scores: called after every chunk with all prompts; what they have of scores so far is complete from number 0 on.

    Returns:
        One for each prompt, in their order.

    Raises:
        ConfigError: keep outside of [1, num]; an argument of `draw_candidates` out of range.
        DataError: a reranker that does not give one number per picture.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    keep = num if keep is None else keep
    if num < 1:
        raise ConfigError(f"num must be at least 1, found {num}")
    if not 1 <= keep <= num:
        raise ConfigError(f"keep must be at least 1 and at most num={num}, found {keep}")
    score = as_reranker(rerank)
    text = pipe.encode(prompts)
    rankings = [Ranking(prompt, list((known or {}).get(prompt, ()))[:num]) for prompt in prompts]

    def draw(wanted: Sequence[tuple[int, int]]) -> Iterable[Drawn]:
        return draw_batches(
            pipe.model, text, wanted, sampling=sampling, seed=seed, batch_size=chunk, on_row=on_row, given=given
        )

    missing = [(row, number) for row, of_row in enumerate(rankings) for number in range(len(of_row.scores), num)]
    for chunk_drawn in draw(missing):
        for ranking, drawn in _by_prompt(chunk_drawn, rankings):
            pictures = pipe.decode(drawn.codes)
            scores = _agreed(pipe, _checked(score(ranking.prompt, pictures), ranking.prompt, len(pictures)))
            ranking.scores += scores
            numbers = [number for _, number in drawn.pictures]
            codes = [one.clone() for one in drawn.codes]  # a view would keep the codes of the whole chunk
            found = [Kept(*each) for each in zip(numbers, scores, codes, pictures, strict=True)]
            ranking.kept = sorted([*ranking.kept, *found], key=lambda one: (-one.score, one.number))[:keep]
        if on_scores is not None:
            on_scores(rankings)

    # Of what was known, only the scores are at hand.
    best = [ranking.best(keep) for ranking in rankings]
    at_hand = [{one.number: one for one in ranking.kept} for ranking in rankings]
    again = [(row, number) for row, numbers in enumerate(best) for number in numbers if number not in at_hand[row]]
    for drawn in draw(again):
        for (row, number), codes, picture in zip(drawn.pictures, drawn.codes, pipe.decode(drawn.codes), strict=True):
            at_hand[row][number] = Kept(number, rankings[row].scores[number], codes.clone(), picture)
    for ranking, numbers, ours in zip(rankings, best, at_hand, strict=True):
        ranking.kept = [ours[number] for number in numbers]
    return rankings


def _by_prompt(drawn: Drawn, rankings: Sequence[Ranking]) -> Iterator[tuple[Ranking, Drawn]]:
    """The parts of a chunk that belong to one prompt each."""
    start = 0
    for row, group in groupby(drawn.pictures, key=lambda picture: picture[0]):
        pictures = tuple(group)
        yield rankings[row], Drawn(pictures, drawn.codes[start : start + len(pictures)])
        start += len(pictures)


def _checked(scores: Sequence[float], prompt: str, count: int) -> list[float]:
    values = [float(value) for value in scores]
    if len(values) != count:
        raise DataError(f"rerank must give one score per picture: found {len(values)} for {count} pictures")
    if any(value != value for value in values):
        raise DataError(f"rerank gave a score that is not a number for the prompt {prompt!r}: {shown(values)}")
    return values


def _agreed(pipe: TextToImage, scores: list[float]) -> list[float]:
    """The same scores on all processes that draw together, or they would go on to draw different pictures."""
    group = pipe.model.tensor
    if group.size == 1:
        return scores
    return group.max_(torch.tensor(scores, dtype=torch.float64, device=pipe.device)).tolist()
