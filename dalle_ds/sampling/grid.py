"""Rows of labelled images on one white sheet, for files, previews and the demo page."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dalle_ds.errors import DataError


def to_pil_images(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) floats in [0, 1] → B RGB images."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


INK = (40, 40, 40)
FAINT = (110, 110, 110)
Row = tuple[str, Sequence[Image.Image]]


def image_grid(
    rows: Sequence[Row],
    *,
    cell: int = 128,
    titles: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
    label_width: int = 180,
    font_size: int = 14,
    margin: int = 12,
) -> Image.Image:
    """A sheet of rows of images, each row with its label at the left.

    Args:
        rows: (label, images) pairs; rows may differ in length. Labels of any length are wrapped. A character that no font
            here has stands there as its code point, "[U+1F3F4]".
        cell: side in pixels of the square that each image gets. Smaller images grow by the greatest whole factor
            that fits, pixel by pixel; larger ones shrink.
        titles: one above each column.
        notes: for each row, one under each of its images.
        label_width: in pixels, of the label column; it is left out where no row has a label.
        font_size, margin: in pixels.

    Returns:
        RGB image.

    Raises:
        DataError: no images at all.
    """
    columns = max((len(images) for _, images in rows), default=0)
    if columns == 0:
        raise DataError("an image grid needs at least one image")
    font = LabelFont(font_size)
    labels = [_wrap(label, font, label_width) for label, _ in rows]
    heading = [_wrap(title, font, cell) for title in (titles or [])[:columns]]

    left = margin + (label_width + margin if any(labels) else 0)
    top = margin + (max(map(len, heading)) * font.line_height + margin // 2 if any(heading) else 0)
    below = [[_wrap(note, font, cell) for note in of_row] for of_row in (notes or [[] for _ in rows])]
    feet = [max(map(len, of_row), default=0) * font.line_height for of_row in below]
    heights = [max(cell, len(lines) * font.line_height) for lines in labels]
    size = (left + columns * (cell + margin), top + sum(heights) + sum(feet) + margin * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heading):
        font.write(pen, (left + column * (cell + margin), margin), lines, FAINT)
    for (_, images), lines, height, of_row, foot in zip(rows, labels, heights, below, feet, strict=True):
        font.write(pen, (margin, top + (height - len(lines) * font.line_height) // 2), lines, INK)
        for column, image in enumerate(images):
            fitted = _fit(image, cell)
            x = left + column * (cell + margin) + (cell - fitted.width) // 2
            sheet.paste(fitted, (x, top + (height - fitted.height) // 2))
        for column, note in enumerate(of_row[: len(images)]):
            font.write(pen, (left + column * (cell + margin), top + (height + cell) // 2), note, FAINT)
        top += height + foot + margin
    return sheet


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """The image on white, no larger than `cell` × `cell`."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    longest = max(image.size)
    if longest > cell:
        smaller = (max(1, image.width * cell // longest), max(1, image.height * cell // longest))
        return image.resize(smaller, Image.Resampling.LANCZOS)
    factor = cell // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


class LabelFont:
    """DejaVu Sans, which comes with matplotlib, and for what it lacks the Chinese, Japanese and Korean font in `fonts/`.

    Args:
        size: in pixels.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._ascent = _font(0, size).getmetrics()[0]
        self.line_height = round(size * 1.35)

    def getlength(self, text: str) -> float:
        """Width in pixels of a line of text."""
        return sum(font.getlength(run) for run, font in self._runs(text))

    def write(
        self, pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], ink: tuple[int, int, int]
    ) -> None:
        """Write lines of text, the top left corner of the first at `corner`."""
        for index, line in enumerate(lines):
            x, baseline = float(corner[0]), corner[1] + index * self.line_height + self._ascent
            for run, font in self._runs(line):
                pen.text((x, baseline), run, fill=ink, font=font, anchor="ls")
                x += font.getlength(run)

    def _runs(self, text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """The text in pieces of one font each."""
        return [
            ("".join(characters), _font(number, self._size)) for number, characters in groupby(text, key=_font_number)
        ]


@cache
def _font_file(number: int) -> Path:
    if number:
        return Path(__file__).parent / "fonts" / "cjk.ttf"
    import matplotlib  # most uses of this package do without

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _font(number: int, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(number), size)


@cache
def _characters(number: int) -> frozenset[int]:
    """Code points that a font has an image of."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_file(number))).get_charmap())


def _font_number(character: str) -> int:
    """0 for DejaVu Sans, also for what no font has; 1 for the other font."""
    code = ord(character)
    return int(code not in _characters(0) and code in _characters(1))


def _drawable(text: str) -> str:
    """The text in characters that there are fonts for; what has no shape of its own is left out where it is unknown."""
    shown = []
    for character in unicodedata.normalize("NFC", text):
        if any(ord(character) in _characters(number) for number in (0, 1)):
            shown.append(character)
        elif unicodedata.category(character) not in ("Cf", "Mn"):
            shown.append(f"[U+{ord(character):04X}]")
    return "".join(shown)


def _wrap(text: str, font: LabelFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and inside words that are wider than that."""
    lines: list[str] = []
    line = ""
    for word in _drawable(" ".join(text.split())).split():
        if line and font.getlength(f"{line} {word}") <= width:
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:
            if line and font.getlength(line + character) > width:
                lines.append(line)
                line = ""
            line += character
    return [*lines, line] if line else lines
