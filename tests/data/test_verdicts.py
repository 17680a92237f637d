"""Filters of captions against verdicts by hand: `captions_200.jsonl` says of each caption whether it is English, boilerplate,
or of fewer than three words. The verdicts were written before the filters were; null stands where a person cannot tell."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle_ds.data import reasons
from dalle_ds.data.boilerplate import is_boilerplate
from dalle_ds.data.filters import FilterOptions, caption_problem, foreign_margin

ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("captions_200.jsonl").read_text().splitlines()
]
PAPER = FilterOptions(paper=True)


def dropped_by(**changes: Any) -> Callable[[str], bool]:
    """Whether a caption is dropped by one filter alone."""
    options = FilterOptions(**{"drop_boilerplate": False, **changes})
    return lambda caption: caption_problem(caption, options) is not None


@pytest.mark.parametrize(
    ("verdict", "drops_where", "filter", "precision", "recall"),
    [
        ("boilerplate", True, dropped_by(drop_boilerplate=True), 0.98, 0.95),
        ("english", False, dropped_by(foreign_margin=PAPER.foreign_margin), 0.95, 0.95),
        ("short", True, dropped_by(min_caption_words=PAPER.min_caption_words), 1.0, 1.0),
    ],
)
def test_precision_and_recall(
    capsys: pytest.CaptureFixture[str],
    verdict: str,
    drops_where: bool,
    filter: Callable[[str], bool],
    precision: float,
    recall: float,
) -> None:
    judged = [row for row in ROWS if row[verdict] is not None]
    wrong = [row["caption"] for row in judged if filter(row["caption"]) != (row[verdict] == drops_where)]
    wanted = [row for row in judged if row[verdict] == drops_where]
    dropped = [row for row in judged if filter(row["caption"])]
    hits = sum(row[verdict] == drops_where for row in dropped)
    found = hits / len(dropped), hits / len(wanted)
    with capsys.disabled():
        counts = f"{len(wanted)} of {len(judged)} to drop, {len(dropped)} dropped"
        print(f"\n{verdict}: precision {found[0]:.3f}, recall {found[1]:.3f} ({counts}); wrong: {wrong}")
    assert len(wanted) >= 20
    assert found[0] >= precision and found[1] >= recall, wrong


@pytest.mark.parametrize(
    ("name", "recall"),
    [
        ("boilerplate.jsonl", 0.95),  # of three lists that were written one after another, each of which showed gaps
        ("boilerplate_unseen.jsonl", 0.85),  # written before words had kinds, but for the last 64
    ],
)
def test_boilerplate_in_other_formats(name: str, recall: float, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    dropped = [row for row in rows if is_boilerplate(row["caption"])]
    wanted = [row for row in rows if row["boilerplate"]]
    missed = [row["caption"] for row in wanted if row not in dropped]
    with capsys.disabled():
        print(f"\n{name}: recall {1 - len(missed) / len(wanted):.3f}; missed: {missed}")
    assert [row["caption"] for row in dropped if not row["boilerplate"]] == []
    assert len(missed) <= (1 - recall) * len(wanted)


def test_boilerplate_is_judged_in_time_that_grows_with_the_caption() -> None:
    """Ten thousand captions a second; none takes as long as a thousand others, whatever is in it."""
    captions = [row["caption"] for row in ROWS] * 10
    start = time.process_time()
    for caption in captions:
        is_boilerplate(caption)
    assert len(captions) / (time.process_time() - start) > 10_000
    start = time.process_time()
    for piece in ("a", "1", "1 ", "may ", "4 march ", "2012-", "click on ", "1:1", "20", "' 's", "img", "photo of a "):
        is_boilerplate((piece * 1000)[:1000])
    assert time.process_time() - start < 0.5


def test_the_file_is_what_it_says() -> None:
    assert len(ROWS) == len({row["caption"] for row in ROWS}) == 200
    assert sum(row["boilerplate"] for row in ROWS) >= 50
    assert sum(row["english"] is False for row in ROWS) >= 50


def test_more_margin_keeps_more() -> None:
    margins = [foreign_margin(row["caption"]) for row in ROWS if row["english"] is not None]
    kept = [sum(margin <= limit for margin in margins) for limit in (0, 4, 12, 30)]
    assert kept == sorted(kept) and kept[0] < kept[-1]
    assert foreign_margin("猫") == foreign_margin("красное платье") == float("inf")
    assert foreign_margin("Łódź") < float("inf"), "most of it is no ASCII, but all of it Latin"
    assert foreign_margin("the cat sat on the mat with a hat") < 0 < foreign_margin("le chat est assis sur le tapis")


def test_reasons_of_the_papers_filters() -> None:
    assert caption_problem("ein brauner Hund schläft auf dem Teppich", PAPER) == reasons.NOT_ENGLISH
    assert caption_problem("a cat", PAPER) == reasons.TOO_FEW_WORDS
    assert caption_problem("a brown dog sleeps on the carpet", PAPER) is None
