"""What docs/architecture.md says of the code."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_is_named_exists(file: str, name: str) -> None:
    nodes: list[ast.stmt] = ast.parse((ROOT / "dalle_ds" / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == part]
        assert found, f"{file} has no {name}"
        nodes = found[0].body


def test_both_journeys_are_short_and_all_rooms_are_told() -> None:
    journeys = re.split(r"^## ", PAGE, flags=re.M)[1:3]
    assert [len(re.findall(r"^\d+\. ", journey, flags=re.M)) for journey in journeys] == [8, 5]
    rooms = {path.name for path in (ROOT / "dalle_ds").iterdir() if list(path.glob("*.py"))}
    told = set(re.findall(r"`(\w+)/`", PAGE.split("## ")[0]))
    assert rooms <= told, f"not told: {sorted(rooms - told)}"
