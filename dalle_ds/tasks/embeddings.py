"""What tasks that compare embeddings share: embeddings of all validation rows, and whether embeddings collapse."""

from __future__ import annotations

from torch import Tensor

from dalle_ds.tasks.base import Batch

COLLAPSED = 0.01
"""Mean of 1 − cosine over pairs of embeddings below which they are all but the same."""


def at_places(rows: Tensor, batch: Batch, count: int) -> Tensor:
    """Embeddings of a validation batch, each at its row's place among zeros: added up, those of all rows.

    Args:
        rows: (B, D).
        batch: its "place", (B,) which row of the validation each is, and "valid", (B,) 0 where it is none.
        count: rows of the validation.

    Returns:
        (count, D).
    """
    whole = rows.new_zeros(count, rows.shape[1])
    return whole.index_add(0, batch["place"], rows * batch["valid"][:, None])


def spread(mean: Tensor) -> float:
    """Mean of 1 − cosine over all pairs of rows of length 1, whose mean is given, (D,)."""
    return 1 - float(mean.square().sum())


def collapse(found: float, what: str = "embeddings") -> str | None:
    """A message where embeddings, called `what`, have no more than this `spread`."""
    if found >= COLLAPSED:
        return None
    return (
        f"{what} are collapsing: on average, 1 − cosine of two of them is {found:.2g}; lower optim.lr, or raise "
        "optim.warmup_steps"
    )
