"""The 16-bit formats against a slow reference in exact fractions, and against PyTorch's own float16."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_ds.precision.codecs import FLOAT_0_6_10, FLOAT_1_6_9, FloatFormat

FORMATS = pytest.mark.parametrize("form", [FLOAT_1_6_9, FLOAT_0_6_10], ids=lambda form: form.name)
# (sign bits, significand bits, bias), written down again so that the tests do not ask the code what is right.
LAYOUT = {"1-6-9": (1, 9, 59), "0-6-10": (0, 10, 60)}
ALL_CODES = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def reference_value(name: str, code: int) -> float:
    """What a 16-bit pattern (0 to 65,535) stands for, read bit by bit; every value is a float64."""
    signed, significand_bits, bias = LAYOUT[name]
    bits = f"{code:016b}"
    sign = -1 if signed and bits[0] == "1" else 1
    exponent, significand = int(bits[signed : signed + 6], 2), int(bits[signed + 6 :], 2)
    if exponent == 63:
        return math.nan if significand else sign * math.inf
    fraction = Fraction(significand, 2**significand_bits)
    if exponent == 0:
        return math.copysign(float(fraction * Fraction(2) ** (1 - bias)), sign)
    return sign * float((1 + fraction) * Fraction(2) ** (exponent - bias))


def finite_values(name: str) -> list[float]:
    """Every finite value from +0 up, whose place in the list is its code."""
    return [reference_value(name, code) for code in range(63 << LAYOUT[name][1])]


def reference_code(name: str, ladder: list[float], value: float, saturate: bool = True) -> int | None:
    """The code nearest to an fp32 number, by exact comparisons; None stands for every NaN."""
    signed = LAYOUT[name][0]
    if math.isnan(value):
        return None
    size = abs(value)
    if math.isinf(size):
        code = len(ladder)
    else:
        # As if the values went on evenly, to the one that Inf stands in the place of.
        beyond = 2 * ladder[-1] - ladder[-2]
        upper = bisect.bisect_left(ladder, size)
        above = ladder[upper] if upper < len(ladder) else beyond
        if above == size:
            code = upper
        else:
            lower = upper - 1
            doubled, middle = 2 * Fraction(size), Fraction(ladder[lower]) + Fraction(above)
            is_up = doubled > middle or (doubled == middle and upper % 2 == 0)
            code = upper if is_up else lower
        if saturate:
            code = min(code, len(ladder) - 1)
    if math.copysign(1.0, value) < 0:
        if signed:
            return code | 0x8000
        return None
    return code


def assert_codes(form: FloatFormat, values: Tensor, saturate: bool = True) -> None:
    ladder = finite_values(form.name)
    found = form.encode(values, saturate=saturate).to(torch.int32).bitwise_and_(0xFFFF).tolist()
    for value, code in zip(values.tolist(), found, strict=True):
        expected = reference_code(form.name, ladder, value, saturate)
        if expected is None:
            if -form.smallest / 2 <= value <= 0:
                assert code == 0 or (value < 0 and math.isnan(reference_value(form.name, code))), (value, code)
            else:
                assert math.isnan(reference_value(form.name, code)), (value, code)
        else:
            assert code == expected, (value, code, expected)


def test_the_papers_numbers() -> None:
    assert FLOAT_1_6_9.max == (2 - 2**-9) * 8 == pytest.approx(15.984, abs=1e-3)
    assert (FLOAT_1_6_9.tiny, FLOAT_1_6_9.smallest) == (2.0**-58, 2.0**-67)
    assert FLOAT_0_6_10.max == (2 - 2**-10) * 4 == pytest.approx(7.996, abs=1e-3)
    assert (FLOAT_0_6_10.tiny, FLOAT_0_6_10.smallest) == (2.0**-59, 2.0**-69)
    assert FLOAT_0_6_10.max / 2 < 5 < FLOAT_0_6_10.max


@FORMATS
def test_every_pattern_decodes_to_its_value(form: FloatFormat) -> None:
    values = form.decode(ALL_CODES)
    expected = [reference_value(form.name, code & 0xFFFF) for code in ALL_CODES.tolist()]
    # As float64, where 0 and −0, Inf and NaN are told apart.
    np.testing.assert_array_equal(values.double().numpy(), np.array(expected))
    assert torch.equal(torch.signbit(values[~values.isnan()]), torch.signbit(torch.tensor(expected)[~values.isnan()]))


@FORMATS
@pytest.mark.parametrize("rounding", ["nearest", "random"])
@pytest.mark.parametrize("saturate", [True, False])
def test_every_code_comes_back(form: FloatFormat, rounding: str, saturate: bool) -> None:
    values = form.decode(ALL_CODES)
    for seed in range(1 if rounding == "nearest" else 20):
        generator = None if rounding == "nearest" else torch.Generator().manual_seed(seed)
        codes = form.encode(values, generator=generator, saturate=saturate)
        numbers = ~values.isnan()
        assert torch.equal(codes[numbers], ALL_CODES[numbers])
        assert bool(form.decode(codes[~numbers]).isnan().all())


@FORMATS
@pytest.mark.parametrize("saturate", [True, False])
def test_values_ties_and_what_is_next_to_them_go_to_the_nearest_code(form: FloatFormat, saturate: bool) -> None:
    ladder = torch.tensor(finite_values(form.name))
    middles = (ladder[1:] + ladder[:-1]) / 2
    top = torch.tensor([(3 * form.max - ladder[-2].item()) / 2])  # the tie between `max` and what would follow
    edges = torch.cat([ladder, middles, top])
    numbers = torch.cat([edges, edges.nextafter(torch.tensor(math.inf)), edges.nextafter(torch.tensor(-math.inf))])
    assert_codes(form, torch.cat([numbers, -numbers]) if form.signed else numbers, saturate)


@FORMATS
@pytest.mark.parametrize("saturate", [True, False])
def test_any_fp32_number_goes_to_the_nearest_code(form: FloatFormat, saturate: bool) -> None:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 60_000, dtype=np.uint32).view(np.float32)
    subnormal = rng.integers(0, 2**23, 1000, dtype=np.uint32).view(np.float32)
    # Every binade of the format many times over: where something overflows on the way, it may be in one only.
    scale = (2.0 ** rng.uniform(-72, 6, 60_000)).astype(np.float32)
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        3.4028234e38,
        -3.4028234e38,
        1e-45,
        -1e-45,
        16.0,
        8.0,
        5.0,
        -1.0,
    ]
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFC00000, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
    values = [patterns, subnormal, -subnormal, scale, -scale, np.array(special, dtype=np.float32), nans]
    assert_codes(form, torch.from_numpy(np.concatenate(values)), saturate)


@FORMATS
def test_rounding_at_random_picks_one_of_the_two_neighbours(form: FloatFormat) -> None:
    rng = np.random.default_rng(1)
    values = torch.from_numpy((2.0 ** rng.uniform(-72, 3.9 if form.signed else 2.9, 50_000)).astype(np.float32))
    ladder = torch.tensor(finite_values(form.name))
    upper = torch.searchsorted(ladder, values).clamp_(max=len(ladder) - 1)
    codes = form.encode(values, generator=torch.Generator().manual_seed(0)).to(torch.int32).bitwise_and_(0xFFFF)
    exact = ladder[upper] == values
    assert bool(((codes == upper) | ((codes == upper - 1) & ~exact)).all())
    assert 0.45 < (codes == upper).float().mean() < 0.55


@FORMATS
def test_random_rounding_of_what_is_no_number_or_beyond_the_range(form: FloatFormat) -> None:
    values = torch.tensor([math.inf, math.nan, 3.4e38, form.max * 1.01, 0.0]).repeat(1000, 1)
    generator = torch.Generator().manual_seed(0)
    inf, nan, great, little_more, zero = form.decode(form.encode(values, generator=generator)).unbind(1)
    assert bool((inf == math.inf).all() and nan.isnan().all() and (zero == 0).all())
    assert bool((great == form.max).all() and (little_more == form.max).all())
    great = form.decode(form.encode(values[:, 2], generator=generator, saturate=False))
    assert bool((great == math.inf).all())
    negative = form.decode(form.encode(-values[:, :4], generator=generator))
    if form.signed:
        assert torch.equal(negative[:, 0], -inf) and bool((negative[:, 2:] == -form.max).all())
        assert bool(negative[:, 1].isnan().all())
    else:
        assert bool(negative.isnan().all())


@FORMATS
@pytest.mark.parametrize("exponent", [2, 0, -13, -57, -58, -59, -60, -63, -66, -68])
def test_rounding_at_random_has_no_bias(form: FloatFormat, exponent: int) -> None:
    n = 400_000
    generator = torch.Generator().manual_seed(exponent + 100)
    for part in (0.07, 0.5, 0.93):
        # `part` of the way between two neighbours, or between 0 and the smallest value.
        step = max(2.0 ** (exponent - form.significand_bits), form.smallest)
        lower = math.floor(1.3 * 2.0**exponent / step) * step
        value = torch.tensor(lower + part * step)
        rounded = form.decode(form.encode(value.expand(n), generator=generator)).double()
        assert set(rounded.unique().tolist()) == {lower, lower + step}
        share = (value.double().item() - lower) / step
        deviation = math.sqrt(share * (1 - share) / n)
        assert abs(rounded.sub_(lower).div_(step).mean().item() - share) < 4.5 * deviation + 2**-13


@FORMATS
def test_noise_is_the_generators(form: FloatFormat) -> None:
    values = torch.rand(10_001, generator=torch.Generator().manual_seed(5))
    first, again, other = (form.encode(values, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert 0.2 < (first != other).float().mean() < 0.4  # E[2p(1 − p)] = 1/3
    # Neighbours draw for themselves: 2^14 or 2^13 equal values fall evenly on both sides, also in any stretch of four.
    halves = form.encode(torch.full((4096, 4), 1 + 2.0 ** -(form.significand_bits + 1)), generator=torch.Generator())
    ups = (halves == halves.max()).double()
    assert (ups.mean(0) - 0.5).abs().max() < 0.04
    assert (ups.t().corrcoef() - torch.eye(4, dtype=torch.double)).abs().max() < 0.08


@FORMATS
def test_errors_are_within_the_bounds(form: FloatFormat) -> None:
    rng = np.random.default_rng(2)
    size = torch.from_numpy((2.0 ** rng.uniform(-75, 2.99, 200_000)).astype(np.float32))
    values = torch.cat([size, -size]) if form.signed else size
    error = (form.decode(form.encode(values)).double() - values.double()).abs()
    normal = values.abs() >= form.tiny
    bound = {"1-6-9": 2.0**-10, "0-6-10": 2.0**-11}[form.name]
    assert (error[normal] / values[normal].abs()).max() <= bound
    assert error[~normal].max() <= form.smallest / 2
    assert (
        error[normal] / values[normal].abs()
    ).max() > 0.95 * bound  # and no better: nothing was compared with itself


def test_the_same_code_makes_pytorchs_float16() -> None:
    half = FloatFormat("1-5-10", signed=True, exponent_bits=5, significand_bits=10, bias=15)
    rng = np.random.default_rng(3)
    values = torch.from_numpy(rng.standard_normal(300_000).astype(np.float32) * 2.0 ** rng.uniform(-28, 18, 300_000))
    values = torch.cat([values.float(), torch.tensor([65504.0, 65519.9, 65520.0, math.inf, -math.inf, 0.0, -0.0])])
    assert torch.equal(half.encode(values, saturate=False), values.half().view(torch.int16))
    np.testing.assert_array_equal(half.decode(ALL_CODES).numpy(), ALL_CODES.view(torch.float16).float().numpy())


@FORMATS
def test_flushing_subnormals_to_zero_changes_nothing(form: FloatFormat) -> None:
    rng = np.random.default_rng(4)
    values = torch.from_numpy((2.0 ** rng.uniform(-149, 2, 50_000)).astype(np.float32))
    codes, decoded = form.encode(values), form.decode(ALL_CODES)
    randomly = form.encode(values, generator=torch.Generator().manual_seed(0))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        assert torch.equal(form.encode(values), codes)
        assert torch.equal(form.encode(values, generator=torch.Generator().manual_seed(0)), randomly)
        assert torch.equal(form.decode(ALL_CODES).view(torch.int32), decoded.view(torch.int32))
    finally:
        torch.set_flush_denormal(False)


@FORMATS
@pytest.mark.parametrize("seed", [None, 0])
def test_any_shape_and_layout_and_no_input_changes(form: FloatFormat, seed: int | None) -> None:
    def generator() -> torch.Generator | None:
        return None if seed is None else torch.Generator().manual_seed(seed)

    square = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    kept = square.clone()
    for values in (square.t(), square[:, ::3], square[0, 0], square[:0], square[None, :, 0], square[0].expand(5, 8)):
        codes = form.encode(values, generator=generator())
        assert codes.dtype == torch.int16 and codes.shape == values.shape
        assert torch.equal(codes, form.encode(values.contiguous(), generator=generator()))
        assert torch.equal(form.decode(codes), form.decode(codes.contiguous()))
        assert form.decode(codes).shape == values.shape
    assert torch.equal(square, kept)

    codes, all_codes = torch.full((8, 6), 7, dtype=torch.int16), ALL_CODES.clone()
    assert form.encode(square.t(), generator=generator(), out=codes) is codes
    assert torch.equal(codes, form.encode(square.t(), generator=generator()))
    values = torch.empty(2**16)
    assert form.decode(ALL_CODES, out=values) is values
    assert torch.equal(values.view(torch.int32), form.decode(ALL_CODES).view(torch.int32))
    assert torch.equal(all_codes, ALL_CODES)
    parameter = torch.nn.Parameter(square)
    assert not form.decode(form.encode(parameter)).requires_grad


def test_wrong_types_and_formats_are_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        FLOAT_1_6_9.encode(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="int16"):
        FLOAT_1_6_9.decode(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="16"):
        FloatFormat("1-6-10", signed=True, exponent_bits=6, significand_bits=10, bias=31)
    with pytest.raises(ValueError, match="bias"):
        FloatFormat("1-8-7", signed=True, exponent_bits=8, significand_bits=7, bias=127)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@FORMATS
def test_a_gpu_makes_the_same_codes(form: FloatFormat) -> None:
    patterns = np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint32).view(np.float32)
    values = torch.from_numpy(patterns)
    values = values[~values.isnan()]
    assert torch.equal(form.encode(values.cuda()).cpu(), form.encode(values))
    decoded = form.decode(ALL_CODES)
    assert torch.equal(form.decode(ALL_CODES.cuda()).cpu().nan_to_num(nan=1e30), decoded.nan_to_num(nan=1e30))
    nans = torch.full((1000,), math.nan, device="cuda")
    for generator in (None, torch.Generator("cuda").manual_seed(0)):
        assert bool(form.decode(form.encode(nans, generator=generator)).isnan().all())
