"""BSRGAN's degradations against their definition: papers.md §15 as latent-diffusion has it, without its defects."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from dalle_ds.diffusion.degradation import (
    FULL,
    HALVE_SHARE,
    JPEG_SHARE,
    LIGHT,
    NOISES,
    BsrSettings,
    Step,
    _apply,
    _convolve,
    _gaussian,
    blur,
    bsr,
    bsr_steps,
    shrink,
)
from dalle_ds.errors import DataError

CHAINS = 4_000


def photo(height: int = 64, width: int = 64) -> np.ndarray:
    """Smooth, with edges."""
    y, x = np.mgrid[:height, :width]
    channels = [128 + 90 * np.sin(x / 9 + k) * np.cos(y / 7) + 30 * ((x + y) // 16 % 2) for k in range(3)]
    return np.stack(channels, axis=2).clip(0, 255).astype(np.uint8)


def chains(settings: BsrSettings, scale: int = 4) -> list[list[Step]]:
    return [bsr_steps(scale, np.random.default_rng(seed), settings) for seed in range(CHAINS)]


def share_is(found: int, of: int, share: float) -> None:
    assert stats.binomtest(found, of, share).pvalue > 1e-4, f"{found} of {of} is not {share:.0%}"


@pytest.mark.parametrize("settings", [FULL, LIGHT])
def test_a_thousand_seeds_give_a_thousand_small_images(settings: BsrSettings) -> None:
    image, seen = photo(64, 48), set()
    kept = image.copy()
    for seed in range(1_000):
        low = bsr(image, 4, np.random.default_rng(seed), settings)
        assert low.shape == (16, 12, 3) and low.dtype == np.uint8
        seen.add(low.tobytes())
    assert len(seen) == 1_000 and np.array_equal(image, kept)
    again = bsr(image, 4, np.random.default_rng(999), settings)
    assert again.tobytes() == low.tobytes()


@pytest.mark.parametrize(("size", "scale"), [((16, 16), 2), ((8, 8), 4), ((256, 256), 4), ((60, 36), 3)])
def test_images_of_any_size_and_scale(size: tuple[int, int], scale: int) -> None:
    for seed in range(100 if size[0] < 100 else 10):
        assert bsr(photo(*size), scale, np.random.default_rng(seed)).shape == (size[0] // scale, size[1] // scale, 3)
    with pytest.raises(DataError, match="times smaller"):
        bsr(photo(size[0] + 1, size[1]), scale, np.random.default_rng(0))


@pytest.mark.parametrize(("settings", "blurs", "resized"), [(FULL, 2, 0.75), (LIGHT, 1, 0.8)])
def test_how_often_each_step_is_drawn(settings: BsrSettings, blurs: int, resized: float) -> None:
    drawn = chains(settings)
    kinds = [[step.kind for step in chain] for chain in drawn]
    assert all(chain[-1] == "jpeg" and chain.count("to_size") == chain.count("noise") == 1 for chain in kinds)
    assert all(chain.count("blur") == blurs for chain in kinds)
    assert all(chain.count("resize") + chain.count("stride") == 1 for chain in kinds)
    share_is(sum("halve" in chain for chain in kinds), CHAINS, HALVE_SHARE)
    assert all("halve" not in chain[1:] for chain in kinds)
    share_is(sum("resize" in chain for chain in kinds), CHAINS, resized)
    share_is(sum(chain.count("jpeg") == 2 for chain in kinds), CHAINS, JPEG_SHARE)
    firsts = [min(chain.index(kind) for kind in ("resize", "stride") if kind in chain) for chain in kinds]
    assert all(first < chain.index("to_size") for first, chain in zip(firsts, kinds, strict=True))
    # Noise is before the first resizing as often as any of the three is first.
    share_is(sum(chain.index("noise") < first for chain, first in zip(kinds, firsts, strict=True)), CHAINS, 1 / 3)
    steps = [step for chain in drawn for step in chain]
    noises = Counter(step.noise for step in steps if step.kind == "noise")
    for name, share in NOISES.items():
        share_is(noises[name], CHAINS, share)
    ways = Counter(step.interpolation for step in steps if step.kind == "to_size")
    for name in ("bilinear", "bicubic", "area"):
        share_is(ways[name], CHAINS, 1 / 3)
    for kind, (low, high) in (("noise", settings.noise_levels), ("jpeg", settings.qualities)):
        levels = Counter(step.level for step in steps if step.kind == kind)
        assert (min(levels), max(levels)) == (low, high)
        assert stats.chisquare(list(levels.values())).pvalue > 1e-4


def test_resizing_and_blurs_are_those_of_the_remaining_scale() -> None:
    """Half done first, sides shrink by up to 4 more times at random, else by up to 8; a stride is what is left."""
    for chain in chains(FULL):
        scale = 2 if chain[0].kind == "halve" else 4
        for step in chain:
            if step.kind == "resize":
                assert 1 <= step.factor <= 2 * scale
            if step.kind == "stride":
                assert step.factor == scale
            if step.kernel is not None:
                size = step.kernel.shape[0]
                assert size % 2 and 7 <= size <= 25 and (step.kind == "blur" or size == 25)
                torch.testing.assert_close(step.kernel.sum(), torch.tensor(1.0))
    sizes = Counter(step.kernel.shape[0] for chain in chains(FULL) for step in chain if step.kind == "blur")
    assert sorted(sizes) == list(range(7, 26, 2)) and stats.chisquare(list(sizes.values())).pvalue > 1e-4


def test_blurs_have_the_variances_that_are_drawn() -> None:
    """Of the full chain at scale 4: half are round with a deviation of up to 2.8, half elliptic with variances of up to 8."""
    rounds, round_count, count = [], 0, 0
    for chain in chains(FULL):
        if chain[0].kind == "halve":
            continue
        for step in chain:
            if step.kind != "blur" or step.kernel.shape[0] < 25:
                continue
            kernel = step.kernel.double().numpy()
            y, x = np.mgrid[:25, :25] - 12
            covariance = [[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)]
            low, high = np.linalg.eigvalsh(covariance)
            assert high <= 8.05
            count += 1
            if high - low < 1e-3 * high + 1e-6:
                round_count += 1
                rounds.append(high**0.5)
    share_is(round_count, count, 0.5)
    large = [deviation for deviation in rounds if deviation > 0.7]  # smaller ones are lost between pixels
    assert stats.kstest(large, stats.uniform(0.7, 2.1).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("noise", "level"), [("grey", 20), ("colour", 20), ("correlated", 20)])
def test_noise_has_its_deviation_and_colours(noise: str, level: int) -> None:
    grey, step = torch.full((3, 200, 200), 0.5), Step("noise", noise=noise, level=level)
    found = _apply(step, grey, (50, 50), np.random.default_rng(0), FULL) - grey
    rows = found.flatten(1)
    if noise == "correlated":
        correlations = torch.corrcoef(rows)
        assert rows.std(dim=1).max() <= 1.05 * 25 / 255 and (correlations - torch.eye(3)).abs().max() > 0.05
        return
    torch.testing.assert_close(rows.std(dim=1), torch.full((3,), level / 255), rtol=0.02, atol=0)
    wanted = torch.ones(3, 3) if noise == "grey" else torch.eye(3)
    torch.testing.assert_close(torch.corrcoef(rows), wanted, atol=0.02, rtol=0)


def test_jpeg_is_pillows_and_values_beyond_are_clipped_before() -> None:
    x = torch.from_numpy(photo()).permute(2, 0, 1).float() / 255
    found = _apply(Step("jpeg", level=40), x * 1.5 - 0.2, (16, 16), np.random.default_rng(0), FULL)
    buffer = io.BytesIO()
    clipped = ((x * 1.5 - 0.2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(clipped).save(buffer, "JPEG", quality=40)
    assert np.array_equal((found * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(Image.open(buffer)))


@pytest.mark.parametrize("size", [3, 7, 25])
def test_convolution_is_scipys(size: int) -> None:
    x = torch.rand(3, 40, 30)
    kernel = _gaussian(size, (3.0, 0.5), angle=0.6, shift=0.7 if size > 3 else 0.0)
    wanted = np.stack([ndimage.correlate(channel.numpy(), kernel.numpy(), mode="mirror") for channel in x])
    torch.testing.assert_close(_convolve(x, kernel), torch.from_numpy(wanted), atol=2e-6, rtol=0)


def test_a_stride_takes_the_middle_of_what_each_pixel_stands_for() -> None:
    """On a ramp, as the mean does: a kernel that were not shifted would be off by 1.5 pixels at scale 4."""
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    rng = np.random.default_rng(0)
    step = next(step for chain in iter(lambda: bsr_steps(4, rng), None) for step in chain if step.kind == "stride"
                and step.factor == 4)  # fmt: skip
    found = _apply(step, ramp, (16, 16), rng, FULL)
    wanted = ramp.unfold(2, 4, 4).mean(-1)[:, ::4]
    torch.testing.assert_close(found[:, 4:-4, 4:-4], wanted[:, 4:-4, 4:-4], atol=1e-3, rtol=0)


def test_shrinking_is_the_mean_and_blur_is_small() -> None:
    image = photo(32, 16)
    assert shrink(image, 4).shape == (8, 4, 3)
    assert abs(float(shrink(image, 4).mean()) - float(image.mean())) < 0.5
    with pytest.raises(DataError, match="times smaller"):
        shrink(image, 5)
    point = np.zeros((9, 9, 3), np.uint8)
    point[4, 4] = 255
    weights = blur(point)[:, :, 0] / 255
    assert np.count_nonzero(weights) == 9
    assert weights[4, 4] / weights[4, 5] == pytest.approx(np.exp(0.5 / 0.36), rel=0.03)
