"""Rows of labelled pictures on one white sheet, for files, previews and the demo page."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dalle_ds.errors import DataError

INK = (40, 40, 40)
FAINT = (110, 110, 110)
Row = tuple[str, Sequence[Image.Image]]


def picture_grid(
    rows: Sequence[Row],
    *,
    cell: int = 128,
    titles: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
    label_width: int = 180,
    font_size: int = 14,
    margin: int = 12,
) -> Image.Image:
    """Draw rows of pictures, each row with its label at the left.

    Args:
        rows: (label, pictures) pairs; rows may differ in length, and labels of any length and script are wrapped.
        cell: side in pixels of the square that each picture gets. Smaller pictures grow by the greatest whole factor
            that fits, pixel by pixel; larger ones shrink.
        titles: one above each column.
        notes: for each row, one under each of its pictures.
        label_width: in pixels, of the label column; it is left out where no row has a label.
        font_size, margin: in pixels.

    Returns:
        RGB picture.

    Raises:
        DataError: no pictures at all.
    """
    columns = max((len(pictures) for _, pictures in rows), default=0)
    if columns == 0:
        raise DataError("a picture grid needs at least one picture")
    font = ImageFont.load_default(font_size)
    line_height = round(font_size * 1.35)
    labels = [_wrap(label, font, label_width) for label, _ in rows]
    heading = [_wrap(title, font, cell) for title in (titles or [])[:columns]]

    left = margin + (label_width + margin if any(labels) else 0)
    top = margin + (max(map(len, heading)) * line_height + margin // 2 if any(heading) else 0)
    below = [[_wrap(note, font, cell) for note in of_row] for of_row in (notes or [[] for _ in rows])]
    feet = [max(map(len, of_row), default=0) * line_height for of_row in below]
    heights = [max(cell, len(lines) * line_height) for lines in labels]
    size = (left + columns * (cell + margin), top + sum(heights) + sum(feet) + margin * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heading):
        _write(pen, lines, (left + column * (cell + margin), margin), font, line_height, FAINT)
    for (_, pictures), lines, height, of_row, foot in zip(rows, labels, heights, below, feet, strict=True):
        _write(pen, lines, (margin, top + (height - len(lines) * line_height) // 2), font, line_height, INK)
        for column, picture in enumerate(pictures):
            fitted = _fit(picture, cell)
            x = left + column * (cell + margin) + (cell - fitted.width) // 2
            sheet.paste(fitted, (x, top + (height - fitted.height) // 2))
        for column, note in enumerate(of_row[: len(pictures)]):
            corner = (left + column * (cell + margin), top + (height + cell) // 2)
            _write(pen, note, corner, font, line_height, FAINT)
        top += height + foot + margin
    return sheet


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """The picture on white, no larger than `cell` × `cell`."""
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    picture = picture.convert("RGB")
    longest = max(picture.size)
    if longest > cell:
        smaller = (max(1, picture.width * cell // longest), max(1, picture.height * cell // longest))
        return picture.resize(smaller, Image.Resampling.LANCZOS)
    factor = cell // longest
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _write(
    pen: ImageDraw.ImageDraw,
    lines: Sequence[str],
    corner: tuple[int, int],
    font: Font,
    line_height: int,
    ink: tuple[int, int, int],
) -> None:
    for index, line in enumerate(lines):
        pen.text((corner[0], corner[1] + index * line_height), line, fill=ink, font=font)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and inside words that are wider than that."""
    lines: list[str] = []
    line = ""
    for word in text.split():
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
