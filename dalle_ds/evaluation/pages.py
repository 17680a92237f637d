"""HTML pages of one file each, which work without a network: the one writer of all of them."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_ds.files import write_text

TEMPLATES = Path(__file__).with_name("templates")


def write_template(path: Path, template: str, content: Any) -> None:
    """Write a page that a script fills: `template` of `TEMPLATES`, with `content` as JSON in place of @CONTENT@."""
    # Captions come from anywhere. Scripts put them in as text; here, nothing in them may end the element that they are in.
    text = json.dumps(content)  # ASCII only
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    write_text(path, (TEMPLATES / template).read_text(encoding="utf-8").replace("@CONTENT@", text))


def write_document(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write a page of HTML `sections`, one below the other, under a heading."""
    start = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *sections])
    write_text(path, f"{start}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n")


def figures_table(rows: Mapping[str, tuple[str, str]]) -> str:
    """A table: name → (value, meaning)."""
    lines = [
        f"<tr><td>{html.escape(name)}</td><td class=number>{value}</td><td>{html.escape(meaning)}</td></tr>"
        for name, (value, meaning) in rows.items()
    ]
    return "\n".join(["<table>", *lines, "</table>"])


def image_element(content: bytes, alt: str) -> str:
    """A PNG file's content within a page."""
    return f'<p><img alt="{html.escape(alt)}" src="{data_uri(content)}"></p>'


def data_uri(content: bytes, kind: str = "png") -> str:
    """An image file's content as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The content of an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td { border-top: 1px solid #ddd; padding: .25em .8em; }
.number { text-align: right; font-variant-numeric: tabular-nums; } img, svg { max-width: 100%; height: auto; }
pre { background: #f4f4f4; padding: 1em; overflow: auto; font-size: 12px; }
"""
