"""Results of other protocols are not compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.curves import best_of_curves
from dalle_ds.evaluation.results import Result, compare, write_page

RESULT = Result(
    protocol={
        "method": 1,
        "set": {"split": "validation", "rows": 100},
        "features": {"sha256": "ab", "blur_radii": [0.0, 1.0]},
        "generation": {"seed": 0, "sampling": {"temperature": 1.0, "guidance": 1.0}},
    },
    models={"transformer": "one"},
    metrics={"best_of_1/fid/blur_0": 30.0, "best_of_8/fid/blur_0": 20.0, "only/here": 1.0},
    version="0.1.0",
)


def changed(**fields: object) -> Result:
    """`RESULT` of another model, with fields of its protocol changed; "__" divides their names."""
    protocol = copy.deepcopy(RESULT.protocol)
    for name, value in fields.items():
        *parents, last = name.split("__")
        place = protocol
        for parent in parents:
            place = place[parent]
        place[last] = value
    return Result(protocol, {"transformer": "two"}, {"best_of_1/fid/blur_0": 25.0, "other": 2.0}, "0.2.0")


def test_two_models_by_one_protocol_are_compared() -> None:
    assert compare(RESULT, changed()) == {"best_of_1/fid/blur_0": (30.0, 25.0)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", 2),
        ("set__split", "train"),
        ("set__rows", 99),
        ("features__sha256", "cd"),
        ("features__blur_radii", [0.0]),
        ("generation__seed", 1),
        ("generation__sampling__guidance", 2.0),
        ("judge", "a field that only one has"),
    ],
)
def test_any_difference_of_protocol_is_refused_by_name(name: str, value: object) -> None:
    dotted = name.replace("__", ".")
    with pytest.raises(ConfigError, match=f"cannot be compared: {dotted}: "):
        compare(RESULT, changed(**{name: value}))
    assert compare(RESULT, changed(**{name: value}), allow=[dotted])


def test_all_differences_are_named_and_a_group_may_be_allowed() -> None:
    other = changed(set__rows=1, generation__seed=1, generation__sampling__guidance=2.0)
    with pytest.raises(ConfigError) as told:
        compare(RESULT, other)
    for name in ("set.rows: 100 and 1", "generation.seed: 0 and 1", "generation.sampling.guidance: 1.0 and 2.0"):
        assert name in str(told.value)
    with pytest.raises(ConfigError) as told:
        compare(RESULT, other, allow=["generation", "set.row"])  # the second is no field's name
    assert "set.rows" in str(told.value) and "generation" not in str(told.value)


def test_results_survive_their_file(tmp_path: Path) -> None:
    RESULT.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == RESULT


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"metrics": {}}', b"\xff"])
def test_other_files_are_no_results(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(DataError, match=r"result\.json"):
        Result.load(tmp_path / "result.json")


def test_figures_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({**vars(RESULT), "metrics": {"fid": "low"}}))
    with pytest.raises(DataError, match=r"metrics\.fid must be a number"):
        Result.load(tmp_path / "result.json")


def test_the_page_has_figures_protocol_and_curves_in_order_of_n(tmp_path: Path) -> None:
    write_page(tmp_path, RESULT, {})
    page = (tmp_path / "evaluation.html").read_text()
    assert "best_of_8/fid/blur_0" in page and "&quot;split&quot;: &quot;validation&quot;" in page and "<svg" in page
    assert best_of_curves({"best_of_1/fid/blur_0": 1.0}) == ""
