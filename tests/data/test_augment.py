"""The paper's augmentations against a transcription of TensorFlow's kernel and the bounds of its listings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dalle_ds.data import augment
from dalle_ds.data.augment import augment_for_dvae, augment_for_transformer, resize_area


def tensorflow_resize_area(image: np.ndarray, size: int) -> np.ndarray:
    """`ResizeAreaOp` of TensorFlow 1 with align_corners, loop by loop, in double precision."""
    length = image.shape[0]
    scale = (length - 1) / (size - 1) if size > 1 else length / size
    result = np.zeros((size, size, 3))
    for y in range(size):
        in_y, in_y1 = y * scale, (y + 1) * scale
        for x in range(size):
            in_x, in_x1 = x * scale, (x + 1) * scale
            total = np.zeros(3)
            for i in range(math.floor(in_y), math.ceil(in_y1)):
                scale_y = _overlap(i, in_y, in_y1, scale)
                for j in range(math.floor(in_x), math.ceil(in_x1)):
                    scale_x = _overlap(j, in_x, in_x1, scale)
                    total += image[min(i, length - 1), min(j, length - 1)] * scale_y * scale_x
            result[y, x] = total * (1.0 / (scale * scale))
    return result


def _overlap(cell: int, start: float, end: float, scale: float) -> float:
    if cell < start:
        return scale if cell + 1 > end else cell + 1 - start
    return end - cell if cell + 1 > end else 1.0


@pytest.mark.parametrize(("length", "size"), [(16, 9), (17, 16), (9, 9), (5, 1), (7, 13), (2, 6), (23, 4), (33, 12)])
def test_resize_area_is_tensorflows(length: int, size: int) -> None:
    image = np.random.default_rng(length).integers(0, 256, (length, length, 3), dtype=np.uint8)
    exact = np.clip(tensorflow_resize_area(image, size), 0, 255)
    ours = resize_area(image, size).astype(float)
    # Rounding may differ only where the exact value is a tie.
    assert np.abs(ours - exact).max() <= 0.5 + 1e-4
    ties = np.abs(exact % 1 - 0.5) < 1e-4
    assert np.array_equal(ours[~ties], np.rint(exact)[~ties])


def test_resize_area_distinguishes_rows_from_columns() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, 4:] = 200
    resized = resize_area(image, 4)
    assert np.array_equal(resized, resized[:1].repeat(4, axis=0))
    assert resized[0, 0, 0] == 0 and resized[0, -1, 0] == 200


def test_one_pixel_is_repeated() -> None:
    pixel = np.full((1, 1, 3), 77, dtype=np.uint8)
    assert np.array_equal(resize_area(pixel, 5), np.full((5, 5, 3), 77))


class _Recorder:
    """A generator that notes the bounds asked for, [low, high), and answers the lowest."""

    def __init__(self, mirror: float = 0.9) -> None:
        self.bounds: list[tuple[int, int]] = []
        self.coins = 0
        self._mirror = mirror

    def integers(self, low: int, high: int | None = None) -> int:
        self.bounds.append((0, low) if high is None else (low, high))
        return self.bounds[-1][0]

    def random(self) -> float:
        self.coins += 1
        return self._mirror


def _picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _as_generator(recorder: _Recorder) -> np.random.Generator:
    return recorder  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        # crop offsets of an s×s square, target size inclusive of both ends (so exclusive of the last + 1), R×R offsets
        (50, 60, [(0, 1), (0, 11), (36, 48 + 1), (0, 36 - 32 + 1), (0, 5)]),  # s=50 > 48 = 12/8 R
        (40, 40, [(0, 1), (0, 1), (36, 40 + 1), (0, 5), (0, 5)]),  # 9/8 R < s < 12/8 R
        (34, 80, [(0, 1), (0, 47), (34, 34 + 1), (0, 3), (0, 3)]),  # R < s < 9/8 R
        (20, 24, [(0, 1), (0, 5), (32, 32 + 1), (0, 1), (0, 1)]),  # s < R: enlarged
    ],
)
def test_bounds_of_listing_1(height: int, width: int, expected: list[tuple[int, int]]) -> None:
    recorder = _Recorder()
    view = augment_for_dvae(_picture(height, width), 32, _as_generator(recorder))
    assert recorder.bounds == expected
    assert recorder.coins == 1
    assert view.shape == (32, 32, 3) and view.dtype == np.uint8


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        # offsets in [⌊3·slack/8⌋, max(⌊3·slack/8⌋+1, ⌊5·slack/8⌋)), target in [R, min(s, 9/8 R)]
        (50, 60, [(0, 1), (30 // 8, 50 // 8), (32, 36 + 1), (0, 1), (0, 1)]),
        (50, 51, [(0, 1), (0, 1), (32, 37), (0, 1), (0, 1)]),
        (134, 34, [(300 // 8, 500 // 8), (0, 1), (32, 34 + 1), (0, 1), (0, 1)]),
        (20, 24, [(0, 1), (12 // 8, 20 // 8), (32, 33), (0, 1), (0, 1)]),
    ],
)
def test_bounds_of_listing_2(height: int, width: int, expected: list[tuple[int, int]]) -> None:
    recorder = _Recorder(mirror=0.0)
    augment_for_transformer(_picture(height, width), 32, _as_generator(recorder))
    assert recorder.bounds == expected
    assert recorder.coins == 0  # never mirrored


@pytest.mark.parametrize("function", [augment_for_dvae, augment_for_transformer])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (8, 8), (31, 33), (32, 32), (100, 70)])
def test_any_size_works_and_depends_on_the_generator_alone(function, size) -> None:
    picture = _picture(*size)
    before = picture.copy()
    views = [function(picture, 32, np.random.default_rng(seed)) for seed in (1, 1)]
    assert views[0].shape == (32, 32, 3)
    assert np.array_equal(views[0], views[1])
    assert np.array_equal(picture, before)


def test_mirroring_is_even_in_listing_1_and_absent_in_listing_2() -> None:
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    picture[:, :16] = 255  # at R×R no crop or scale is left, only mirroring
    rng = np.random.default_rng(0)
    mirrored = [augment_for_dvae(picture, 32, rng)[0, 0, 0] == 0 for _ in range(400)]
    assert 150 < sum(mirrored) < 250
    assert all(augment_for_transformer(picture, 32, rng)[0, 0, 0] == 255 for _ in range(50))


def test_a_mirrored_view_is_the_view_mirrored() -> None:
    picture = _picture(50, 60)
    plain = augment_for_dvae(picture, 32, _as_generator(_Recorder(mirror=0.5)))
    mirrored = augment_for_dvae(picture, 32, _as_generator(_Recorder(mirror=0.49)))
    assert np.array_equal(plain[:, ::-1], mirrored)


def test_crops_of_listing_2_stay_near_the_middle_and_reach_both_ends() -> None:
    marks = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None], (32, 96, 3))
    rng = np.random.default_rng(0)
    lefts = {int(augment_for_transformer(marks, 32, rng)[0, 0, 0]) for _ in range(600)}
    assert lefts == set(range(24, 40))  # slack 64: [24, 40)


def test_useful_short_side_is_the_largest_target() -> None:
    assert augment.useful_short_side(256) == 384
