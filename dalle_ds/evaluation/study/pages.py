"""A study of human preference between two models' pictures (DALL·E §3.1, App. F; unCLIP §5.2, App. B): pages for voters.

Voters see one picture of each model for a caption, and answer two questions: which is more realistic ("not sure" is an
answer), and, the caption only then shown, which matches it better ("neither"). Order and sides are random, and written down
in `key.json`, which voters do not get; what they get is pages of one file each, which work without a network.
`study_votes` counts the files that the pages save.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_ds.data.corpora.files import is_read
from dalle_ds.data.images import decode_image
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import built_beside, write_json, write_text
from dalle_ds.parsing import is_text, parse_json, shown
from dalle_ds.sampling.command import LIST_NAME
from dalle_ds.sampling.prompts import read_prompts

TEMPLATE = Path(__file__).with_name("study.html")
KEY_NAME = "key.json"
KIND = "key of a study"


@dataclass(frozen=True)
class MakeOptions:
    """Make the pages of a study from two models' pictures."""

    a: str
    """Pictures of model A: a folder that launchers/generate.py made, its pictures.json, or any folder with one picture for
    each caption, in the order of their names."""
    b: str
    """Pictures of model B, likewise."""
    out: str
    """Folder to make: pages/ for the voters, and key.json, which is not for them."""
    captions: str | None = None
    """Text file, one caption on a line; for folders without pictures.json."""
    seed: int = 0
    """Of the order of pairs and of their sides."""
    pairs_per_page: int = 50
    """Pairs in one page, the share of one voter; each page is for 5 voters."""


def make_study(options: MakeOptions) -> dict[str, Any]:
    """Write the pages and the key; returns the key.

    Raises:
        ConfigError: an option out of range; an output folder that exists.
        DataError: pictures or captions that cannot be read, or do not belong together.
    """
    out = Path(options.out)
    if out.exists():
        raise ConfigError(f"out must be a folder that does not exist yet, found {out}: votes belong to one study")
    if options.pairs_per_page < 1:
        raise ConfigError(f"pairs_per_page must be at least 1, found {options.pairs_per_page}")
    captions = None if options.captions is None else read_prompts(options.captions)
    of_a, of_b = pictures_of(options.a, captions), pictures_of(options.b, captions)
    if of_a.keys() != of_b.keys():
        caption = min(of_a.keys() ^ of_b.keys())
        which = "a" if caption in of_a else "b"
        raise DataError(
            f"--a {options.a} and --b {options.b} have pictures of different captions: {caption!r} is in --{which} only"
        )
    key = _key(of_a, of_b, options)
    template = TEMPLATE.read_text(encoding="utf-8")
    with built_beside(out) as partial:
        (partial / "pages").mkdir()
        for page in range(1, key["pages"] + 1):
            pairs = [pair for pair in key["pairs"] if pair["page"] == page]
            content = {"study": key["study"], "page": page, "pairs": [_shown_pair(pair, of_a, of_b) for pair in pairs]}
            write_text(partial / "pages" / f"page-{page:02}.html", template.replace("@STUDY@", for_script(content)))
        write_json(partial / KEY_NAME, key)
    return key


def _key(of_a: Mapping[str, Path], of_b: Mapping[str, Path], options: MakeOptions) -> dict[str, Any]:
    """What is shown where: a function of captions, pictures and seed."""
    chance = random.Random(options.seed)
    order = list(of_a)
    chance.shuffle(order)
    pairs = [
        {
            "id": f"{number:05}",
            "page": number // options.pairs_per_page + 1,
            "caption": caption,
            "a_is": chance.choice(("left", "right")),
            "a": _sha256(of_a[caption]),
            "b": _sha256(of_b[caption]),
        }
        for number, caption in enumerate(order)
    ]
    content: dict[str, Any] = {"a": options.a, "b": options.b, "seed": options.seed, "pairs": pairs}
    return {"kind": KIND, "study": study_name(content), "pages": pairs[-1]["page"], **content}


def study_name(key: Mapping[str, Any]) -> str:
    """A fingerprint of what is shown where, by which votes know their study, and a key whether it is damaged."""
    content = json.dumps([key.get("seed"), key.get("pairs")], sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _shown_pair(pair: Mapping[str, Any], of_a: Mapping[str, Path], of_b: Mapping[str, Path]) -> dict[str, str]:
    """What a page has of a pair: nothing that tells one model from the other but the pictures themselves."""
    a, b = (data_uri(pictures[pair["caption"]]) for pictures in (of_a, of_b))
    left, right = (a, b) if pair["a_is"] == "left" else (b, a)
    return {"id": pair["id"], "caption": pair["caption"], "left": left, "right": right}


def data_uri(path: Path) -> str:
    """A picture as a PNG within a page: its pixels, and nothing else of the file."""
    try:
        pixels = decode_image(path.read_bytes())
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def for_script(content: Any) -> str:
    """JSON that cannot end the element of a page that it stands in, whatever its strings are."""
    text = json.dumps(content)  # ASCII only
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def pictures_of(source: str, captions: Sequence[str] | None) -> dict[str, Path]:
    """Caption → picture.

    Args:
        source: a `pictures.json`, a folder with one, or a folder of pictures, which `captions` then belong to in the order of
            their names, numbers in them counted as such.

    Raises:
        DataError: no such pictures, or not one for each caption.
    """
    path = Path(source)
    listed = path / LIST_NAME if path.is_dir() else path
    if listed.is_file():
        found = _listed(listed)
        missing = [caption for caption in captions or () if caption not in found]
        if missing:
            raise DataError(f"{listed} has no picture of the caption {missing[0]!r}")
        return found if captions is None else {caption: found[caption] for caption in captions}
    if not path.is_dir():
        raise DataError(f"no pictures at {source}: name a folder, or a {LIST_NAME}")
    if captions is None:
        raise DataError(f"{source} has no {LIST_NAME}: say with --captions what its pictures were drawn for")
    files = sorted((file for file in path.iterdir() if is_read(file.name)), key=_natural)
    if len(files) != len(captions):
        raise DataError(f"{source} has {len(files)} pictures for {len(captions)} captions: it needs one for each")
    return dict(zip(captions, files, strict=True))


def _listed(path: Path) -> dict[str, Path]:
    try:
        entries = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{path} must hold a list of {{"caption", "picture"}}, found {shown(entries)}')
    found: dict[str, Path] = {}
    for entry in entries:
        if not (isinstance(entry, dict) and all(is_text(entry.get(name)) for name in ("caption", "picture"))):
            raise DataError(f'{path} must hold a list of {{"caption", "picture"}}, found {shown(entry)} in it')
        # The first of a caption is the best of its candidates.
        found.setdefault(entry["caption"], path.parent / entry["picture"])
    absent = next((picture for picture in found.values() if not picture.is_file()), None)
    if absent is not None:
        raise DataError(f"{path} names {absent}, which is not there")
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts picture-2 before picture-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
