"""Captions and pictures that are kept, changed and dropped."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from dalle_ds.data import filters, reasons
from dalle_ds.data.boilerplate import is_boilerplate
from dalle_ds.data.filters import _OFF, FilterOptions, caption_problem, clean_caption, cut_caption, image_problem
from dalle_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \t cat\n\non  a mat ", "a cat on a mat"),
        ("", ""),
        (" \u3000\u00a0 ", ""),
        ("cafe\u0301", "caf\u00e9"),
        ("猫が座る", "猫が座る"),
        ("кот", "кот"),
        ("قطة", "قطة"),
        ("a\x00b\x1fc", "a b c"),
        ("broken \ud83d half", "broken ? half"),
        ("👩\u200d🚀 space", "👩\u200d🚀 space"),
    ],
)
def test_clean_caption(text: str, clean: str) -> None:
    assert clean_caption(text) == clean
    clean_caption(text).encode()


def test_cut_caption_ends_at_a_word() -> None:
    assert cut_caption("one two three", 13) == "one two three"
    assert cut_caption("one two three", 12) == "one two"
    assert cut_caption("one two three", 7) == "one two"
    assert cut_caption("one two three", 6) == "one"
    assert cut_caption("x" * 10_000, 1000) == "x" * 1000
    assert len(cut_caption("word " * 2000, 1000)) <= 1000


@pytest.mark.parametrize(
    "caption",
    [
        "Photographed on 4 March 2012",
        "photographed on March 4, 2012",
        "photographed on March 4th 2012 at 10:32 pm",
        "Photo taken on 2012-03-04",
        "This photo was taken on Sunday, 4 March 2012",
        "taken on 04/03/2012",
        "taken 4.3.12 14:05",
        "Picture from the 4th of March, 2012",
        "uploaded on 04-Mar-2012",
        "2012:03:04 12:13:14",
        "Captured in March 2012",
        "image from 20120304",
        "IMG_20120304_121314.jpg",
        "DSC00123",
        "photographed on Sept. 4, 2012.",
    ],
)
def test_boilerplate(caption: str) -> None:
    assert is_boilerplate(caption)
    assert caption_problem(caption, FilterOptions()) == reasons.BOILERPLATE
    assert caption_problem(caption, FilterOptions(drop_boilerplate=False)) is None


@pytest.mark.parametrize(
    "caption",
    [
        "a photograph of a cat",
        "a march through the city",
        "the 1969 moon landing, photographed on July 20, 1969 by Neil Armstrong with a Hasselblad camera",
        "picture of a house on a hill",
        "two cats and 3 dogs",
        "May the fourth be with you",
        "a clock at 10:32",
        "flag of Madagascar",
        "keycap: 10",
        "",
        "猫",
    ],
)
def test_not_boilerplate(caption: str) -> None:
    assert not is_boilerplate(caption)


def test_caption_length() -> None:
    options = FilterOptions(min_caption_chars=3)
    assert caption_problem("", options) == reasons.EMPTY
    assert caption_problem("ox", options) == reasons.TOO_SHORT
    assert caption_problem("cat", options) is None
    assert caption_problem("猫", FilterOptions()) is None


def test_picture_filters_include_their_bounds() -> None:
    options = FilterOptions(min_side=10, max_megapixels=0.01)
    assert image_problem(10, 20, options) is None
    assert image_problem(20, 10, options) is None
    assert image_problem(10, 21, options) == reasons.ASPECT_RATIO
    assert image_problem(21, 10, options) == reasons.ASPECT_RATIO
    assert image_problem(9, 9, options) == reasons.TOO_SMALL
    assert image_problem(100, 100, options) is None
    assert image_problem(101, 100, options) == reasons.TOO_MANY_PIXELS
    assert image_problem(1000, 1, FilterOptions(max_aspect_ratio=None)) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_caption_chars", 0),
        ("max_caption_chars", 0),
        ("min_side", 0),
        ("max_megapixels", 0),
        ("max_aspect_ratio", 0.5),
        ("min_caption_words", 0),
        ("max_caption_copies", 0),
        ("max_hash_distance", 11),
        ("duplicate_cosine", 1.5),
    ],
)
def test_options_that_cannot_work(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"filters.{field}"):
        FilterOptions(**{field: value})


def test_all_filters_can_be_switched_off_at_once_and_are_told_where_they_are_on() -> None:
    assert FilterOptions(none=True).active == {}
    assert FilterOptions().active == {"drop_boilerplate": True, "max_aspect_ratio": 2.0}
    assert FilterOptions(paper=True).active == {
        **FilterOptions().active,
        "min_caption_words": 3,
        "foreign_margin": 12.0,
    }
    # Every filter that there is can be told, and is off with `none`: what is listed here drops nothing.
    unlisted = {entry.name for entry in dataclasses.fields(FilterOptions)} - set(_OFF)
    assert unlisted == {"none", "max_caption_chars", "max_megapixels", "duplicate_cosine"}
    for field, value in (("min_caption_words", 3), ("paper", True), ("max_aspect_ratio", 3.0)):
        with pytest.raises(ConfigError, match=f"filters.none and filters.{field}"):
            FilterOptions(none=True, **{field: value})  # type: ignore[arg-type]


def test_the_papers_filters_are_off_until_asked_for_and_can_be_changed() -> None:
    assert caption_problem("ein Hund", FilterOptions()) is None
    paper = FilterOptions(paper=True)
    assert (paper.min_caption_words, paper.foreign_margin, paper.max_aspect_ratio) == (3, 12.0, 2.0)
    changed = FilterOptions(paper=True, min_caption_words=1, foreign_margin=0.0)
    assert (changed.min_caption_words, changed.foreign_margin) == (1, 0.0)


@pytest.mark.parametrize(
    ("changes", "caption", "problem"),
    [
        ({"min_caption_words": 3}, "two words", reasons.TOO_FEW_WORDS),
        ({"min_caption_words": 3}, "now three words", None),
    ],
)
def test_switches(changes: dict[str, float], caption: str, problem: str | None) -> None:
    assert caption_problem(caption, FilterOptions(**changes)) == problem
    assert caption_problem(caption, FilterOptions()) is None


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    monkeypatch.setitem(sys.modules, "imagehash", None)
    filters._identifier.cache_clear()
    with pytest.raises(ConfigError, match=r"foreign_margin needs py3langid.*pip install dalle-ds\[filters\]"):
        FilterOptions(foreign_margin=1.0).check_packages()
    with pytest.raises(ConfigError, match=r"max_hash_distance needs imagehash.*pip install dalle-ds\[filters\]"):
        FilterOptions(max_hash_distance=1).check_packages()
