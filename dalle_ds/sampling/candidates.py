"""Candidates for prompts, chunk after chunk: many more than memory holds at once (DALL·E §2.6 draws 512 for each)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dalle_ds.errors import ConfigError
from dalle_ds.sampling.codes import Drawn, Progress, draw_batches
from dalle_ds.sampling.draw import Sampling

if TYPE_CHECKING:
    from dalle_ds.sampling.pipeline import TextToImage


def draw_candidates(
    pipe: TextToImage,
    prompts: str | Sequence[str],
    num: int,
    chunk: int | None = None,
    *,
    first: int = 0,
    sampling: Sampling | None = None,
    seed: int = 0,
    given: Tensor | None = None,
    on_row: Callable[[Progress], None] | None = None,
) -> Iterator[Drawn]:
    """Draw candidates `first` … `num` − 1 of every prompt, those of one prompt before those of the next.

    Candidate i of a prompt depends on the seed, i and the prompt only: the best of 8 are chosen among the first 8 of the very
    candidates that the best of 64 are chosen among, and a larger `num` goes on where a smaller one ended.

    Args:
        num: candidates of each prompt, those before `first` included.
        chunk: most candidates drawn at once; None draws as many as fit in memory. Chunks may reach over prompts.
        sampling, seed, on_row: as in `sample_codes`.
        given: (prompts, n) int64, codes that the candidates begin with.

    Yields:
        (prompt, candidate) numbers and codes (n, W²) of each chunk; `pipe.decode(codes)` has the pictures.

    Raises:
        ConfigError: chunk or num below 1, or `first` outside of [0, num].
        DataError: no prompt; a model that yields no numbers.
    """
    if num < 1 or not 0 <= first <= num:
        raise ConfigError(f"num must be at least 1, and first in [0, num], found num={num} and first={first}")
    text = pipe.encode([prompts] if isinstance(prompts, str) else prompts)
    wanted = [(prompt, number) for prompt in range(len(text)) for number in range(first, num)]
    yield from draw_batches(
        pipe.model, text, wanted, sampling=sampling, seed=seed, batch_size=chunk, on_row=on_row, given=given
    )
