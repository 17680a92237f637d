"""Curves of a run, drawn from its metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dalle_ds.errors import DataError
from dalle_ds.evaluation.curves import NUMERICS, curves_figure, gradient_scales, panels_of, read_metrics
from tests.conftest import ROOT
from tests.processes import run_ranks


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    records = []
    for step in range(1, 31):
        scales = {f"gradient_scale/{block}": 2.0 ** (13 + block + step / 1000) for block in range(12)}
        records.append({"step": step, "loss": 5 / step, "grad_norm": None if step == 4 else 1.0, "lr": 1e-3, **scales})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_scales_are_one_line_per_block_in_the_order_of_depth(run_dir: Path) -> None:
    lines = gradient_scales(read_metrics(run_dir))
    assert list(lines) == [f"block {number}" for number in range(12)]
    assert lines["block 10"][0] == (1, pytest.approx(23.001))
    panels = panels_of(read_metrics(run_dir), NUMERICS)
    assert [len(lines) for lines in panels.values()] == [1, 1, 1, 12]
    drawn = curves_figure(panels).axes[3]
    assert len(drawn.lines) == 12 and drawn.get_legend() is None


def test_a_run_without_scales_has_no_panel_of_them(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert list(panels_of(read_metrics(tmp_path), NUMERICS)) == ["loss"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--run_dir", "RUN", "--out", "curves.png"), 0, "wrote"),
        (("--run_dir", "RUN", "--out", "curves.txt"), 1, "must end in .png, .svg or .pdf"),
        (("--run_dir", "nowhere", "--out", "curves.png"), 1, "nowhere has no metrics.jsonl"),
    ],
)
def test_the_launcher(run_dir: Path, arguments: tuple[str, ...], status: int, words: str) -> None:
    words_given = (word.replace("RUN", str(run_dir)) for word in arguments)
    done = run_ranks(ROOT / "launchers" / "curves.py", *words_given, cwd=run_dir)
    assert done.returncode == status and words in done.stdout + done.stderr
    if status == 0:
        with Image.open(run_dir / "curves.png") as picture:
            assert min(picture.size) > 400


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no metrics"):
        read_metrics(tmp_path)
