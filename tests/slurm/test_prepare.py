"""A corpus that a job array prepares in shares, and a job that puts them together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.conftest import Desk

pytestmark = [pytest.mark.launch, pytest.mark.slow]


def test_shares_prepared_by_an_array_are_the_corpus_prepared_at_once(desk: Desk, corpus: Path, data: Path) -> None:
    out = desk.folder / "prepared"
    source = ("--corpus", "folder", "--source", corpus, "--out", out, "--validation", "0.25")
    array, merge = desk.call("prepare.sh", 3, *source).split()
    desk.cluster.wait(merge, "COMPLETED", 240)
    shares, found = (json.loads((folder / "info.json").read_text()) for folder in (out, data))
    assert shares["fingerprint"] == found["fingerprint"]
    assert shares["splits"] == found["splits"]
    assert [desk.outcomes(f"{array}_{task}", "prepare_data") for task in range(3)] == [["done"]] * 3
    status = desk.call("status.sh", desk.folder).splitlines()
    assert [line.split()[-1] for line in status] == ["COMPLETED", *["done"] * 3, "COMPLETED", "done"]
