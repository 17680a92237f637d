"""The image grid: where pixels land, and that no label breaks it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dalle_ds.errors import DataError
from dalle_ds.sampling import image_grid
from dalle_ds.sampling.grid import LabelFont, _wrap


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_small_pictures_grow_by_whole_factors_in_their_cells() -> None:
    """Without labels the layout is margins and cells only, so each image's pixels can be read back."""
    pictures = [[noise(8, 8, 1), noise(8, 8, 2)], [noise(8, 8, 3)]]
    sheet = np.asarray(image_grid([("", row) for row in pictures], cell=36, margin=10))
    assert sheet.shape == (10 + 2 * 46, 10 + 2 * 46, 3)
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            top, left = 10 + 46 * y + 2, 10 + 46 * x + 2  # a factor of 4 fits: 32 of 36 pixels, in the middle
            grown = np.asarray(picture).repeat(4, axis=0).repeat(4, axis=1)
            assert np.array_equal(sheet[top : top + 32, left : left + 32], grown)
    assert (sheet[:10] == 255).all()
    assert (sheet[56:, 56:] == 255).all()  # the second row has one image only


def test_large_and_oblong_pictures_shrink_to_the_cell() -> None:
    sheet = np.asarray(image_grid([("", [Image.new("RGB", (200, 100), "red")])], cell=50, margin=5))
    reds = np.argwhere((sheet == (255, 0, 0)).all(-1))
    assert reds.min(0).tolist() == [5 + 12, 5]
    assert reds.max(0).tolist() == [5 + 12 + 24, 5 + 49]


def test_transparent_pictures_lie_on_white() -> None:
    sheet = np.asarray(image_grid([("", [Image.new("RGBA", (10, 10), (0, 0, 0, 0))])], cell=10, margin=2))
    assert (sheet == 255).all()


def test_labels_and_titles_are_drawn_outside_the_pictures() -> None:
    rows = [("a red square", [Image.new("RGB", (16, 16), "red")])]
    plain = image_grid([("", rows[0][1])], cell=64)
    labelled = image_grid(rows, cell=64, titles=["first"], label_width=100)
    assert labelled.width == plain.width + 112
    assert labelled.height > plain.height
    pixels = np.asarray(labelled)
    reds = (pixels == (255, 0, 0)).all(-1)
    dark = (pixels < 160).all(-1)
    assert reds.sum() == 64 * 64
    assert dark[:, :112].any()  # the label
    assert dark[: labelled.height - plain.height, 112:].any()  # the title


def test_a_row_grows_with_its_label() -> None:
    picture = [Image.new("RGB", (8, 8), "red")]
    short = image_grid([("word", picture)], cell=32)
    long = image_grid([("word " * 200, picture)], cell=32)
    assert long.width == short.width
    assert long.height > 10 * short.height
    both = np.asarray(image_grid([("word " * 200, picture), ("word", picture)], cell=32))
    rows = np.flatnonzero((both == (255, 0, 0)).all(-1).any(-1))
    middle, last = (
        (long.height - 12) // 2,
        long.height,
    )  # the first image is centred, the second starts below the label
    assert [rows[0], rows[31]] == [middle + 6 - 16, middle + 6 + 15]
    assert [rows[32], rows[63], len(rows)] == [last, last + 31, 64]


def test_wrapped_lines_fit_and_lose_nothing() -> None:
    font = LabelFont(14)
    for text in ("a corgi wearing a red hat " * 5, "x" * 300, "東京タワー" * 30, "short"):
        lines = _wrap(text, font, 120)
        assert all(font.getlength(line) <= 120 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert _wrap("one two", font, 1000) == ["one two"]
    assert _wrap("", font, 100) == []


def label_pixels(label: str) -> np.ndarray:
    """What `image_grid` draws of a label, as dark or not, without white around it."""
    dark = np.asarray(image_grid([(label, [Image.new("RGB", (8, 8), "white")])], cell=8))[:, :190].min(-1) < 128
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@pytest.mark.parametrize(
    "letters", ["ôãéÅçßłğ", "ữệΩђяЖ", "只红鸟鶴髮東", "タワあぱ", "한국고양", "חתול", "قطة", "“’–…→№♥"]
)
def test_every_letter_has_a_shape_of_its_own(letters: str) -> None:
    """What a font lacks is drawn as a box, the same for all: no two letters may look alike."""
    shapes = {(*(pixels := label_pixels(letter)).shape, pixels.tobytes()) for letter in letters}
    assert len(shapes) == len(letters)


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("\U0001f3f4\u200d\ufe0f", "[U+1F3F4]"),
        ("\ud800", "[U+D800]"),
        ("a\x07", "a[U+0007]"),
        ("e\u0301", "é"),
        ("ca\u00adt\ufeff", "cat"),
    ],
)
def test_what_no_font_has_is_shown_as_its_code_point(label: str, shown: str) -> None:
    """Marks and joiners that are invisible by themselves are left out where no font has them."""
    assert np.array_equal(label_pixels(label), label_pixels(shown))


@pytest.mark.parametrize(
    "label", ["кот 猫 قط בית", "🏴‍☠️👩🏽‍🚀", "\x00\x07\n\t line", "\ud800 lone surrogate", "", " ", "e\u0301\u200d"]
)
def test_any_label_can_be_drawn(label: str) -> None:
    image_grid([(label, [noise(8, 8)])], titles=[label])


def test_no_pictures_is_named() -> None:
    for rows in ([], [("label", [])]):
        with pytest.raises(DataError, match="at least one image"):
            image_grid(rows)


def test_notes_stand_under_their_pictures() -> None:
    """Below the cell, within its width, and the next row makes room for the longest."""
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    rows = [("", [red, red]), ("", [blue])]
    plain = np.asarray(image_grid(rows, cell=64, margin=10))
    noted = np.asarray(image_grid(rows, cell=64, margin=10, notes=[["", "many words " * 4], ["one"]]))
    assert noted.shape[1] == plain.shape[1] and noted.shape[0] > plain.shape[0] + 3 * 14
    assert np.array_equal(noted[10:74], plain[10:74])
    top = int(np.argwhere((noted == (0, 0, 255)).all(-1)).min(0)[0])
    assert (noted[74:top, :84] == 255).all()  # the first image has none
    ink = np.argwhere((noted[74:top] < 160).any(-1))
    assert ink[:, 1].min() >= 84 and ink[:, 1].max() < 148
    assert (noted[top + 64 :, 10:74] < 160).any() and (noted[top + 64 :, 84:] == 255).all()
