"""Files that go with generated images: scores of candidates, lists of images, keys of studies and their votes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from dalle_ds.evaluation.study import CountOptions, MakeOptions, count_study, images_by_caption, make_study, report
from dalle_ds.sampling.candidates import KIND, Scores
from tests.fuzz.harness import survives
from tests.fuzz.strategies import damaged_json
from tests.fuzz.test_models import Exchanged

OF = {"transformer": "0" * 64, "clip": "1" * 64, "seed": 0, "temperature": 1.0, "top_k": None}
SCORES = {
    "kind": KIND,
    "of": OF,
    "prompts": [
        {"prompt": "a red circle", "kept": [1, 0], "scores": [0.25, 0.5]},
        {"prompt": "", "kept": [], "scores": []},
    ],
}
CAPTIONS = ("a red circle", "a blue square", "<b>")


def scores_of(prompts: bytes) -> bytes:
    """A file of which the candidates alone are damaged; else most are refused for what they are of."""
    return json.dumps({**SCORES, "prompts": 0}).encode().replace(b": 0}", b": " + prompts + b"}")


@given(content=damaged_json(SCORES) | damaged_json(SCORES["prompts"]).map(scores_of))
def test_scores(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is taken can be written again, and is then the same."""
    file = tmp_path_factory.getbasetemp() / "fuzzed-scores.json"
    file.write_bytes(content)
    scores = survives("scores", lambda: Scores.open(file, OF))
    if scores is not None:
        for entry in scores.prompts.values():
            assert {*entry["kept"]} <= {*range(len(entry["scores"]))}
        scores.write()
        assert Scores.open(file, OF).prompts == scores.prompts


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two models, a study of them, and the votes of one page, of which files are exchanged."""
    place = tmp_path_factory.mktemp("fuzzed-study")
    for number, model in enumerate("ab"):
        (place / model).mkdir()
        listed = [{"caption": caption, "picture": f"{row}.png", "number": 0} for row, caption in enumerate(CAPTIONS)]
        (place / model / "pictures.json").write_text(json.dumps(listed))
        for row in range(len(CAPTIONS)):
            Image.new("RGB", (2, 2), (number, row, 0)).save(place / model / f"{row}.png")
    key = make_study(MakeOptions(str(place / "a"), str(place / "b"), str(place / "study")))
    answers = [
        {"pair": pair["id"], "question": question, "answer": "left", "seconds": 5.5}
        for pair in key["pairs"]
        for question in ("realism", "caption")
    ]
    votes = {"kind": "votes of a study", "study": key["study"], "page": 1, "voter": "f00", "answers": answers}
    (place / "votes.json").write_text(json.dumps(votes))
    return place


def count(place: Path) -> Any:
    """The whole way: read, counted, written, printed."""
    figures = place / "figures.json"
    found = count_study(CountOptions((str(place / "votes.json"),), str(place / "study"), json=str(figures)))
    Console(file=io.StringIO()).print(report(found))
    json.loads(figures.read_bytes().decode())
    return found


def test_what_is_whole_is_taken(study: Path) -> None:
    assert survives("votes", lambda: count(study))["questions"]["realism"]["pairs"] == len(CAPTIONS)
    assert list(survives("lists of images", lambda: images_by_caption(str(study / "a"), None))) == list(CAPTIONS)


@given(data=st.data())
def test_votes(data: st.DataObject, study: Path) -> None:
    content = data.draw(damaged_json(json.loads((study / "votes.json").read_text())))
    with Exchanged(study / "votes.json", content):
        survives("votes", lambda: count(study))


@given(data=st.data())
def test_keys(data: st.DataObject, study: Path) -> None:
    """What of a key decides on votes is as it was made, or it is refused."""
    whole = json.loads((study / "study" / "key.json").read_text())
    content = data.draw(damaged_json(whole))
    with Exchanged(study / "study" / "key.json", content):
        found = survives("keys of studies", lambda: count(study))
        if found is not None:
            assert json.loads(content)["pairs"] == whole["pairs"]


@given(data=st.data())
def test_lists_of_pictures(data: st.DataObject, study: Path) -> None:
    """And what is taken becomes a study."""
    content = data.draw(damaged_json(json.loads((study / "a" / "pictures.json").read_text())))
    with Exchanged(study / "a" / "pictures.json", content):
        found = survives("lists of images", lambda: images_by_caption(str(study / "a"), None))
        if found is not None:
            out = study / "again"
            survives("lists of images", lambda: make_study(MakeOptions(str(study / "a"), str(study / "a"), str(out))))
            shutil.rmtree(out, ignore_errors=True)
