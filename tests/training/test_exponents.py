"""Exponent histograms against Python's own `math.frexp`."""

from __future__ import annotations

import math
from collections import Counter

import torch

from dalle_ds.training.exponents import HIGHEST, LOWEST, exponent_counts, exponent_report


def test_every_element_is_counted_where_pythons_frexp_puts_it() -> None:
    torch.manual_seed(0)
    values = torch.randn(500) * 2.0 ** torch.randint(-70, 20, (500,))
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 2.0, 0.5, 65504.0, 2.0**-24])
    report = exponent_report(exponent_counts([values[:200].view(20, 10), values[200:], special]))
    finite = [v for v in [*values.tolist(), *special.tolist()] if math.isfinite(v) and v != 0]
    expected = Counter(str(min(max(math.frexp(v)[1] - 1, LOWEST), HIGHEST)) for v in finite)
    assert report == {"exponents": dict(expected), "zero": 2, "nonfinite": 3}


def test_nothing_has_no_exponents() -> None:
    assert exponent_report(exponent_counts([])) == {"exponents": {}, "zero": 0, "nonfinite": 0}
