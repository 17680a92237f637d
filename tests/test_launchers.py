"""A user's mistakes at the launchers: one sentence on standard error, a status that is not 0, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dalle_ds.config import ClipRun, DvaeRun, TransformerRun
from dalle_ds.data import PairDataset
from dalle_ds.data.command import Preparation
from dalle_ds.data.faults import RowError
from dalle_ds.evaluation.evaluate import EvaluateOptions
from dalle_ds.models import Dalle, DiscreteVAE
from dalle_ds.sampling import Sampling, TextToImage
from dalle_ds.sampling.command import GenerateOptions
from dalle_ds.text.tokenizer import Tokenizer
from tests.conftest import ROOT, TINY_DALLE
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, dvae_export: Path, tokenizer_file: Path) -> Path:
    """A random transformer's export."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("transformer") / "export"
    pipeline = TextToImage(
        Dalle(TINY_DALLE).eval(), DiscreteVAE.from_pretrained(dvae_export), Tokenizer.load(tokenizer_file)
    )
    pipeline.save_pretrained(folder)
    return folder


def call(
    launcher: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Run a launcher in this process: exit status and what it wrote to standard error."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [launcher, *arguments])
    try:
        runpy.run_path(str(ROOT / "launchers" / launcher), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().err


DRAW = ["--model", "{export}", "--prompt", "a", "--out"]
JSON = ["--deepspeed_config", "ds_configs/zero1_fp32.json"]


@pytest.mark.parametrize(
    ("launcher", "arguments", "words"),
    [
        ("prepare_data.py", ["--corpus", "folder", "--source", "/nowhere", "--out", "{tmp}/out"], "/nowhere"),
        ("prepare_data.py", ["--out", "{tmp}/out"], "nothing to do: give --corpus"),
        ("prepare_data.py", ["--corpus", "twemoji", "--out", "{tmp}/out", "--validation", "1.5"], "validation must lie in"),
        ("prepare_data.py", ["--out", "{data}", "--cache_codes", "/nowhere"], "no model at /nowhere"),
        ("prepare_data.py", ["--out", "{data}", "--cache_embeddings", "/nowhere"], "no model at /nowhere"),
        ("train_tokenizer.py", ["--data", "/nowhere", "--out", "{tmp}/t.model"], "/nowhere does not exist"),
        ("train_tokenizer.py", ["--data", "{data}", "--out", "{tmp}/t.model", "--preset", "big"], "unknown preset 'big'"),
        ("train_dvae.py", [*JSON, "--preset", "toi"], "unknown preset 'toi'"),
        ("train_dvae.py", ["--preset", "toy", "--deepspeed_config", "/nowhere.json"], "/nowhere.json: there is no such file"),
        ("train_dvae.py", [*JSON, "--preset", "toy", "--data", "d", "--run_dir", "r", "--steps", "0"], "greater than 0"),
        ("generate.py", ["--model", "/nowhere", "--prompt", "a", "--out", "{tmp}/a.png"], "no model at /nowhere"),
        ("generate.py", [*DRAW, "/nowhere/a.png"], "a folder that exists"),
        ("generate.py", [*DRAW, "{tmp}/a.jpg"], "must be a .png file"),
        ("generate.py", [*DRAW, "{tmp}/a.png", "--num", "0"], "num must be at least 1"),
        ("generate.py", [*DRAW, "{tmp}/a.png", "--top_p", "2"], "top_p"),
        ("generate.py", [*DRAW, "{tmp}/a.png", "--temperature", "-1"], "temperature"),
        ("generate.py", ["--model", "{dvae}", "--prompt", "a", "--out", "{tmp}/a.png"], "holds a 'dvae' model"),
        ("report.py", ["--data", "{data}", "--dvae", "/no", "--transformer", "/no", "--out", "{tmp}/out"], "no metrics.jsonl"),
    ],
)  # fmt: skip
def test_one_sentence_and_nothing_left_behind(
    launcher: str,
    arguments: list[str],
    words: str,
    tmp_path: Path,
    data: Path,
    export: Path,
    dvae_export: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"tmp": str(tmp_path), "data": str(data), "export": str(export), "dvae": str(dvae_export)}
    status, error = call(launcher, [part.format(**places) for part in arguments], monkeypatch, capsys)
    assert status in (1, 2)
    assert words in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_gpu_asked_for_and_absent_is_told(
    tmp_path: Path, data: Path, export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    drawing = ["--model", str(export), "--prompt", "a", "--out", str(tmp_path / "a.png"), "--device", "cuda"]
    status, error = call("generate.py", drawing, monkeypatch, capsys)
    assert status == 1 and "finds no GPU" in error
    training = [*JSON, "--preset", "toy", "--data", str(data), "--run_dir", str(tmp_path / "r"), "--device", "cuda"]
    status, error = call("train_dvae.py", training, monkeypatch, capsys)
    assert status == 1 and "needs a GPU of its own, but PyTorch sees 0" in error and "--device cpu" in error
    assert not list(tmp_path.iterdir())


def test_drawing_writes_one_picture_and_warns_of_a_long_prompt(
    tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    arguments = ["--model", str(export), "--prompt", "a red circle " * 9, "--num", "2", "--out", str(out)]
    status, error = call("generate.py", arguments, monkeypatch, capsys)
    assert status == 0 and [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert error.startswith("warning: the prompt is longer than 8 tokens and was cut")


def test_the_deepspeed_command_takes_every_option(
    tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It looks for its own options, abbreviated too, among those behind the script's name; --num could be three of them."""
    from deepspeed.launcher.runner import parse_args

    kinds = (ClipRun, DvaeRun, EvaluateOptions, GenerateOptions, Preparation, Sampling, TransformerRun)
    names = {entry.name for kind in kinds for entry in dataclasses.fields(kind)} - {"num"}
    for name in names:
        assert parse_args(["script.py", f"--{name}", "1"]).user_args == [f"--{name}", "1"]
    out = tmp_path / "drawn"
    arguments = ["--model", str(export), "--prompt", "a", "--num_images_per_prompt", "3", "--out", str(out)]
    passed_on = parse_args(["--num_gpus", "1", "launchers/generate.py", *arguments]).user_args
    assert call("generate.py", ["--local_rank=0", *passed_on], monkeypatch, capsys)[0] == 0
    assert len(list(out.glob("*.png"))) == 3


def test_a_run_that_was_stopped_is_exported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command to type is in the message, but only where there is a checkpoint that it could be given."""
    run = tmp_path / "my run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    drawing = ["--model", str(run), "--prompt", "a", "--out", str(tmp_path / "a.png")]
    command = f"python launchers/export.py --run_dir '{run}'"
    status, error = call("generate.py", drawing, monkeypatch, capsys)
    assert status == 1 and "first checkpoint" in error and command not in error
    (run / "checkpoints" / "step-20").mkdir()
    status, error = call("generate.py", drawing, monkeypatch, capsys)
    assert status == 1 and command in error


@pytest.fixture
def two_broken_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 0 and 5 of every split cannot be read."""
    value = PairDataset._value

    def broken(self: PairDataset, row: int, column: str) -> object:
        if row in (0, 5):
            raise RowError(f"row {row} is damaged", "damaged shard", f"row {row}")
        return value(self, row, column)

    monkeypatch.setattr(PairDataset, "_value", broken)


@pytest.mark.usefixtures("two_broken_rows")
def test_a_tokenizer_is_trained_on_the_captions_that_can_be_read(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokenizer.model"
    rows = len(PairDataset.open(data, "train"))
    monkeypatch.setattr(sys, "argv", ["", "--data", str(data), "--out", str(out)])
    runpy.run_path(str(ROOT / "launchers" / "train_tokenizer.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert (
        out.is_file() and f"in {rows - 2} captions" in said and "2 rows could not be read" in said and "row 0" in said
    )


@pytest.mark.usefixtures("two_broken_rows")
def test_a_report_shows_the_rows_that_can_be_read(
    tmp_path: Path, data: Path, export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("psnr", "perplexity", "codes_used", "image_loss", "code_entropy", "caption_gain", "text_loss")
    for run in ("dvae", "transformer"):
        (tmp_path / run).mkdir()
        record = {"step": 1, **{f"validation/{name}": 1.0 for name in names}}
        (tmp_path / run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    shutil.copytree(export, tmp_path / "transformer" / "export")
    runs = ["--dvae", str(tmp_path / "dvae"), "--transformer", str(tmp_path / "transformer")]
    arguments = ["--data", str(data), *runs, "--out", str(tmp_path / "page"), "--num", "1"]
    status, error = call("report.py", arguments, monkeypatch, capsys)
    # Two of validation, all of which are read for the ranking, and one of the four training rows that are shown.
    assert status == 0 and "3 rows could not be read" in error and "damaged shard" in error
    assert (tmp_path / "page" / "pictures.png").is_file()
    assert "ranking_accuracy_16" in (tmp_path / "page" / "report.html").read_text()


def test_an_export_with_a_foreign_tokenizer_is_refused(
    tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(export, broken)
    Tokenizer.train(["something else entirely"], broken / "tokenizer.model", 300)
    arguments = ["--model", str(broken), "--prompt", "a", "--out", str(tmp_path / "a.png")]
    status, error = call("generate.py", arguments, monkeypatch, capsys)
    assert status == 1 and "is not the one that the transformer was trained with" in error


@pytest.mark.parametrize("launcher", sorted(path.name for path in (ROOT / "launchers").glob("*.py")))
def test_every_launcher_explains_itself(
    launcher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [launcher, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "launchers" / launcher), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    if launcher.startswith("train_") and launcher != "train_tokenizer.py":
        for option in ("--preset NAME", "--deepspeed_config FILE", "--device", "--train.batch_size", "--run_dir"):
            assert option in text
    assert len((ROOT / "launchers" / launcher).read_text().splitlines()) <= 60


@pytest.mark.launch
@pytest.mark.parametrize(
    ("json", "source", "words"),
    [
        ("zero1_fp32.json", "/nowhere", "data folder /nowhere does not exist"),
        ("zero1_fp16.json", "{data}", "fp16 scales the gradients of residual blocks, which a dvae does not offer"),
    ],
)
def test_what_is_found_in_the_process_group_is_told_once(
    json: str, source: str, words: str, tmp_path: Path, data: Path
) -> None:
    """Beyond the command line, and with no run directory left."""
    arguments = [
        "--preset",
        "toy",
        "--deepspeed_config",
        ROOT / "ds_configs" / json,
        "--data",
        source.format(data=data),
    ]
    done = run_ranks("launchers/train_dvae.py", *arguments, "--run_dir", tmp_path / "run")
    assert done.returncode == 1
    assert f"error: {words}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_command_has_them_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also as `deepspeed --module dalle_ds NAME` calls it, which puts an argument of its own first."""
    from dalle_ds.__main__ import main as dalle

    monkeypatch.setattr(sys, "argv", ["dalle"])
    dalle()
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert listed == {path.stem for path in (ROOT / "launchers").glob("*.py")}
    monkeypatch.setattr(sys, "argv", ["dalle", "--local_rank=0", "train-tokenizer", "--help"])
    with pytest.raises(SystemExit) as ended:
        dalle()
    assert ended.value.code == 0 and "--vocab_size" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["dalle", "genrate"])
    with pytest.raises(SystemExit) as ended:
        dalle()
    assert ended.value.code == 1 and "generate" in capsys.readouterr().err
