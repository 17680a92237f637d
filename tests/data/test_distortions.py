"""What happens to copies of pictures: random by the generator alone, each distortion what it says, none when it is off."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle_ds.config.overlap import DistortionConfig
from dalle_ds.data import PairDataset
from dalle_ds.data.distortions import compress, crop_and_zoom, distort, jitter, rescale, rotate, stretch
from dalle_ds.data.duplicate_views import DuplicateSamples
from dalle_ds.data.images import Pixels, center_crop_resize
from dalle_ds.data.views import Views
from dalle_ds.errors import ConfigError

OFF = {
    "smallest_crop": 1.0,
    "most_stretch": 1.0,
    "smallest_scale": 1.0,
    "most_degrees": 0.0,
    "lowest_quality": 100,
    "hue": 0.0,
    "saturation": 0.0,
    "value": 0.0,
}


def noise(height: int = 40, width: int = 30, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ramp(height: int = 100, width: int = 200) -> Pixels:
    """Brightness grows by one level for each column."""
    return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3)).copy()


def test_equal_generators_give_equal_bytes_and_the_picture_stays() -> None:
    picture = noise()
    before = picture.copy()
    views = [distort(picture, DistortionConfig(), np.random.default_rng(seed)) for seed in (1, 1, *range(2, 30))]
    assert np.array_equal(views[0], views[1])
    assert len({view.tobytes() for view in views}) == 29
    assert np.array_equal(picture, before)
    assert all(view.dtype == np.uint8 and view.ndim == 3 and view.shape[2] == 3 for view in views)


def test_nothing_happens_when_all_is_off() -> None:
    picture = noise()
    for config in (DistortionConfig(**OFF), DistortionConfig(probability=0)):
        assert all(np.array_equal(distort(picture, config, np.random.default_rng(s)), picture) for s in range(10))


@pytest.mark.parametrize(
    "on", [{name} for name in OFF if name not in ("hue", "saturation", "value")] + [{"hue", "value"}]
)
def test_each_distortion_can_be_on_alone(on: set[str]) -> None:
    picture = noise()
    config = DistortionConfig(probability=1.0, **{name: value for name, value in OFF.items() if name not in on})
    changed = [not np.array_equal(distort(picture, config, np.random.default_rng(seed)), picture) for seed in range(10)]
    assert sum(changed) >= 6  # small angles move no pixel


def test_what_one_distortion_draws_does_not_depend_on_the_others() -> None:
    picture = noise()
    crop, both = OFF | {"smallest_crop": 0.5}, OFF | {"smallest_crop": 0.5, "lowest_quality": 20}
    for seed in range(10):
        cropped = distort(picture, DistortionConfig(probability=1.0, **crop), np.random.default_rng(seed))
        compression = DistortionConfig(probability=1.0, **(OFF | {"lowest_quality": 20}))
        then_compressed = distort(cropped, compression, np.random.default_rng(seed))
        at_once = distort(picture, DistortionConfig(probability=1.0, **both), np.random.default_rng(seed))
        assert np.array_equal(at_once, then_compressed)


def test_a_crop_is_a_part_of_the_picture_enlarged() -> None:
    for seed in range(20):
        view = crop_and_zoom(ramp(), 0.5, np.random.default_rng(seed)).astype(int)
        assert view.shape == (100, 200, 3)
        assert 0.49 <= (view[50, 190, 0] - view[50, 10, 0]) / 180 <= 1.02
    assert np.array_equal(crop_and_zoom(noise(), 1.0, np.random.default_rng(0)), noise())


def test_stretching_changes_the_aspect_within_its_limits_and_not_the_area() -> None:
    aspects = []
    for seed in range(100):
        height, width = stretch(noise(120, 80), 1.5, np.random.default_rng(seed)).shape[:2]
        assert height * width == pytest.approx(120 * 80, rel=0.02)
        aspects.append(width / height / (80 / 120))
    assert 1 / 1.53 < min(aspects) < 0.75 and 1.35 < max(aspects) < 1.53
    assert np.mean(np.log(aspects)) == pytest.approx(0, abs=0.1)


def test_lost_resolution_loses_detail_only() -> None:
    details, plain = noise(64, 64), np.full((64, 64, 3), 77, dtype=np.uint8)
    assert np.array_equal(rescale(plain, 0.2, np.random.default_rng(0)), plain)
    errors = [
        np.abs(rescale(details, 0.2, np.random.default_rng(seed)).astype(int) - details).mean() for seed in range(20)
    ]
    assert np.mean(errors) > 20
    smooth = ramp(64, 64)
    inner = (slice(8, -8), slice(8, -8))
    for seed in range(20):
        assert np.abs(rescale(smooth, 0.4, np.random.default_rng(seed)).astype(int) - smooth)[inner].max() <= 4


def test_rotation_keeps_what_is_round_and_fills_corners() -> None:
    y, x = np.mgrid[-49.5:50, -49.5:50]
    disk = np.where((x**2 + y**2 < 30**2)[..., None], np.uint8(200), np.uint8(40)).repeat(3, axis=2)
    fills = set()
    for seed in range(40):
        turned = rotate(disk, 30.0, np.random.default_rng(seed))
        distance = np.sqrt(x**2 + y**2)
        for where, level in ((distance < 27, 200), ((distance > 33) & (distance < 48), 40)):
            assert (np.abs(turned[where].astype(int) - level) <= 1).all()
        fills.add(int(turned[0, 0, 0]))
    assert {0, 255} <= fills and fills <= {0, 40, 255}
    assert np.array_equal(rotate(noise(), 0.0, np.random.default_rng(0)), noise())


def test_jitter_turns_and_scales_as_hsv_says() -> None:
    """Against Python's own HSV, to the rounding of Pillow's to 8 bits."""
    colours = np.array([[[200, 60, 40], [30, 180, 90], [70, 80, 220], [190, 190, 60]]], dtype=np.uint8)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        turn, saturation, value = rng.uniform((-0.2, 0.6, 0.6), (0.2, 1.4, 1.4))
        found = jitter(colours, 0.2, 0.4, 0.4, np.random.default_rng(seed)).astype(int)
        for colour, result in zip(colours[0], found[0], strict=True):
            h, s, v = colorsys.rgb_to_hsv(*(colour / 255))
            wanted = colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * saturation), min(1, v * value))
            assert np.abs(result - np.array(wanted) * 255).max() <= 9
    kept = jitter(noise(), 0.0, 0.0, 0.0, np.random.default_rng(0)).astype(int)
    assert np.abs(kept - noise()).max() <= 8


def test_hues_turn_round_the_circle() -> None:
    """A turn by a few levels over the end of the circle is one by as many anywhere else."""
    hues = np.stack([np.arange(256), np.full(256, 255), np.full(256, 255)], axis=-1)[None].astype(np.uint8)
    colours = np.asarray(Image.fromarray(hues, "HSV").convert("RGB"))
    before = np.asarray(Image.fromarray(colours).convert("HSV"))[0, :, 0].astype(int)
    for seed in range(40):
        turn = np.random.default_rng(seed).uniform((-0.1, 1, 1), (0.1, 1, 1))[0]
        found = jitter(colours, 0.1, 0.0, 0.0, np.random.default_rng(seed))
        moved = np.floor(before + 256 * turn + 0.5).astype(int) % 256
        wanted = np.stack([moved, np.full(256, 255), np.full(256, 255)], axis=-1)[None].astype(np.uint8)
        assert np.array_equal(found, np.asarray(Image.fromarray(wanted, "HSV").convert("RGB")))


def test_grey_stays_grey_and_black_black() -> None:
    grey = np.repeat(noise()[..., :1], 3, axis=2)
    for seed in range(10):
        moved = jitter(grey, 0.5, 0.5, 0.5, np.random.default_rng(seed))
        assert (moved == moved[..., :1]).all()
        assert (moved[grey == 0] == 0).all()


def test_lower_quality_means_more_error() -> None:
    grey = np.repeat(noise()[..., :1], 3, axis=2)  # of colours, subsampling loses more than low quality

    def error(lowest: int) -> float:
        views = [compress(grey, lowest, np.random.default_rng(seed)).astype(int) for seed in range(20)]
        return float(np.mean([np.abs(view - grey).mean() for view in views]))

    assert error(5) > error(60) > error(95) > 0


@pytest.mark.parametrize("height, width", [(1, 1), (2, 70), (50, 1)])
def test_tiny_pictures_survive(height: int, width: int) -> None:
    for seed in range(20):
        view = distort(noise(height, width), DistortionConfig(probability=1.0), np.random.default_rng(seed))
        assert min(view.shape) >= 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("probability", 1.1),
        ("smallest_crop", 0.0),
        ("most_stretch", 0.9),
        ("most_degrees", -1.0),
        ("lowest_quality", 98),
    ],
)
def test_limits_are_told(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"distortions.{name}"):
        DistortionConfig(**{name: value})


def test_samples_are_a_picture_and_its_copy(data: Path) -> None:
    dataset = PairDataset.open(data, "train")
    samples = DuplicateSamples(dataset, 16, DistortionConfig(probability=1.0))
    one, again, other = (samples.sample(3, np.random.default_rng(seed)) for seed in (5, 5, 6))
    plain = center_crop_resize(dataset.picture(3), 16).transpose(2, 0, 1)
    assert np.array_equal(one["image"], plain) and np.array_equal(other["image"], plain)
    assert one["copy"].shape == (3, 16, 16) and one["copy"].dtype == np.uint8
    assert np.array_equal(one["copy"], again["copy"]) and not np.array_equal(one["copy"], other["copy"])
    both = DuplicateSamples(dataset, 16, DistortionConfig(probability=1.0), both=True).sample(
        3, np.random.default_rng(5)
    )
    assert not np.array_equal(both["image"], plain) and not np.array_equal(both["image"], both["copy"])
    assert np.array_equal(both["copy"], one["copy"])


def test_the_picture_is_seen_as_the_search_embeds_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large it is: not resized twice, as its copy may be."""
    dataset = PairDataset.open(data, "train")
    large = noise(150, 220)
    monkeypatch.setattr(PairDataset, "picture", lambda *_: large)
    drawn = DuplicateSamples(dataset, 16, DistortionConfig()).sample(3, np.random.default_rng(0))
    assert np.array_equal(drawn["image"], Views(dataset, 16, None, 0)[3][0][0].numpy())
    assert drawn["copy"].shape == (3, 16, 16)
