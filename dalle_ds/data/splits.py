"""Which split a pair belongs to: a pure function of the seed and its group, so that no picture is on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable


def unit_hash(seed: int, *names: str) -> float:
    """A number in [0, 1) that is uniform over names, the same on every machine."""
    text = "\0".join((str(seed), *names))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def compositional_holdout(variants: Iterable[tuple[str, str]], fraction: float, seed: int) -> set[tuple[str, str]]:
    """Chooses combinations of (group, variant) whose parts both remain in training with other partners.

    Args:
        variants: every (group, variant) of the training split, plain ones (variant "") left out.
        fraction: share of them to hold out, in [0, 1); fewer where the parts would not remain.

    Returns:
        The combinations to hold out: for each, another variant of its group and its variant of another group stay.
    """
    combinations = sorted(set(variants), key=lambda pair: unit_hash(seed, "compositional", *pair))
    wanted = int(fraction * len(combinations))
    of_group = Counter(group for group, _ in combinations)
    of_variant = Counter(variant for _, variant in combinations)
    held_out: set[tuple[str, str]] = set()
    for group, variant in combinations:
        if len(held_out) == wanted:
            break
        if of_group[group] > 1 and of_variant[variant] > 1:
            held_out.add((group, variant))
            of_group[group] -= 1
            of_variant[variant] -= 1
    return held_out
