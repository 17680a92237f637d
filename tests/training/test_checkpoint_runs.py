"""Runs that are taken up again by other processes, exports from their checkpoints, and what the doctor says of them.

Three launches: one process begins a run; two go on from it in their ways, and begin others; one process goes on from those.
"""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dalle_ds.config import DalleConfig, TransformerRun, to_dict
from dalle_ds.models import Dalle
from dalle_ds.sampling import TextToImage
from dalle_ds.training.checkpoints.storage import Index, LocalShards, TensorSlice, matrix_size
from dalle_ds.training.export import export_checkpoint
from tests.conftest import EVERYTHING, ROOT, TINY_DALLE, TINY_DVAE, thorough
from tests.training.by_hand import write_checkpoint
from tests.training.test_layouts import deepspeed_json, launch, metrics

STEPS, STOPPED = 10, 6
SQUEEZED = {"enabled": True, "rank": 2}


class Runs:
    """Everything that the tests below look at."""

    def __init__(self, folder: Path, data: Path, dvae: Path, tokenizer: Path) -> None:
        self.folder = folder
        self.common = {
            "data": str(data),
            "seed": 3,
            "save_every": 4,
            "optim": {"lr": 1e-2, "warmup_steps": 3, "schedule": "cosine", "decay_steps": STEPS, "clip": 0.5},
            "loader": {"workers": 0},
            "report": {"log_every": 1, "validate_every": 0, "preview_every": 0},
            "train": {"batch_size": 8, "average_decay": 0.9},
        }
        self.transformer = {"model": to_dict(TINY_DALLE), "dvae": str(dvae), "tokenizer": str(tokenizer)}
        self.dvae = {"model": to_dict(TINY_DVAE), "objective": {"temperature_steps": 20, "kl_warmup_steps": 4}}
        replicas: dict[str, Any] = {"parallel": {"replicas": 2}, "powersgd": SQUEEZED}
        launch([self.job("one", 0, steps=STOPPED)], 1, folder)
        from_one = {
            "zero3": self.job("one-zero3", 3),
            "tensor": self.job("one-tensor", 1, parallel={"tensor": 2, "sequence": True}),
            "pipe": self.job("one-pipe", 1, parallel={"pipe": 2}),
            "replicas": self.job("one-replicas", 2, parallel={"replicas": 2}),
            "squeezed": self.job("one-squeezed", 3, **replicas),
        }
        for name in from_one:
            shutil.copytree(folder / "one", folder / f"one-{name}")
        tensor = self.job("tensor-one", 3, steps=STOPPED, parallel={"tensor": 2})
        pipe = self.job("pipe-one", 1, steps=STOPPED, parallel={"pipe": 2})
        to_one = [
            self.job("zero3-one", 3, steps=STOPPED),
            *([tensor, pipe] if EVERYTHING else []),
            self.job("squeezed-one", 3, steps=STOPPED, **replicas),
            self.job("scaled-one", 2, "fp16", steps=STOPPED),
            self.job("dvae-one", 3, steps=STOPPED, stage="dvae"),
            # In the same layout again, error-feedback buffers and all.
            self.job("squeezed-same", 3, steps=STOPPED, save_every=2, **replicas),
        ]
        straight = [
            self.job("straight", 1),
            self.job("dvae-straight", 1, stage="dvae"),
            self.job("squeezed-straight", 3, save_every=2, **replicas),
        ]
        again = self.job("squeezed-same", 3, save_every=2, **replicas)
        launch([*straight, *to_one, *from_one.values(), again], 2, folder)
        shutil.copytree(folder / "zero3-one", folder / "unfinished")
        shutil.copytree(folder / "zero3-one", folder / "bf16")
        back = [self.job(f"{name}-one", 0) for name in ("zero3", "squeezed", *thorough("tensor", "pipe"))]
        back += [self.job("scaled-one", 1, "fp16"), self.job("dvae-one", 2, stage="dvae")]
        self.one = launch(back, 1, folder)

    def job(
        self,
        name: str,
        zero: int,
        precision: str = "fp32",
        *,
        stage: str = "transformer",
        steps: int = STEPS,
        **sections: Any,
    ) -> dict[str, Any]:
        own = self.transformer if stage == "transformer" else self.dvae
        run = {**self.common, **own, **sections, "run_dir": str(self.folder / name), "steps": steps}
        return {"name": name, "stage": stage, "run": run, "deepspeed": deepspeed_json(zero, precision)}

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path, dvae_export: Path, tokenizer_file: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), data, dvae_export, tokenizer_file)


MOVED = ["one-zero3", "one-tensor", "one-pipe", "one-replicas", "zero3-one", "dvae-one"]
MOVED += thorough("tensor-one", "pipe-one")


@pytest.mark.launch
@pytest.mark.parametrize("name", MOVED)
def test_a_run_that_moves_is_the_run_that_stays(runs: Runs, name: str) -> None:
    straight = "dvae-straight" if name.startswith("dvae") else "straight"
    expected, found = metrics(runs[straight]), metrics(runs[name])
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, figures in expected.items():
        assert found[step]["loss"] == pytest.approx(figures["loss"], abs=1e-5), step
        assert found[step]["lr"] == figures["lr"]
    ours = load_file(runs[name] / "export" / "model.safetensors")
    for weight, value in load_file(runs[straight] / "export" / "model.safetensors").items():
        assert (ours[weight] - value).abs().max() < 2e-4, weight


@pytest.mark.launch
def test_gradient_scales_follow_the_number_of_processes(runs: Runs) -> None:
    records = metrics(runs["scaled-one"])
    for block in range(2 * TINY_DALLE.depth):
        scales = [records[step][f"gradient_scale/{block}"] for step in range(1, STEPS + 1)]
        processes = [2 if step <= STOPPED else 1 for step in range(1, STEPS + 1)]
        assert scales == pytest.approx([p * 2**13 * 2 ** (s / 1000) for s, p in enumerate(processes, 1)], rel=1e-9)


@pytest.mark.launch
def test_error_sums_are_kept_dropped_and_begun(runs: Runs) -> None:
    straight = metrics(runs["squeezed-straight"])
    for step, figures in metrics(runs["squeezed-same"]).items():
        # Each replica goes on with an equal part of the sum, whether it has been resumed or not.
        assert (figures["loss"], figures["grad_norm"]) == (straight[step]["loss"], straight[step]["grad_norm"]), step
    index = Index(runs["squeezed-same"] / "checkpoints" / "step-10" / "tensors")
    errors = [name for name in index.tensors if name.startswith("error/")]
    assert len(errors) == 8 * TINY_DALLE.depth // 2
    assert all(bool(index.tensor(name).any()) for name in errors)
    assert "leaves it out" in " ".join(runs.one.split())
    after = [metrics(runs["squeezed-one"])[step]["loss"] for step in (STOPPED + 1, STEPS)]
    assert after[0] == pytest.approx(straight[STOPPED + 1]["loss"], abs=1e-5)
    assert after[1] != pytest.approx(straight[STEPS]["loss"], abs=1e-5)
    begun = metrics(runs["one-squeezed"])
    assert begun[STOPPED + 1]["loss"] == pytest.approx(metrics(runs["straight"])[STOPPED + 1]["loss"], abs=1e-5)
    assert begun[STEPS]["loss"] != pytest.approx(metrics(runs["straight"])[STEPS]["loss"], abs=1e-5)


@pytest.mark.launch
@pytest.mark.parametrize(
    "name",
    ["dvae-straight", "one-tensor", "one-pipe", "scaled-one", *thorough("straight", "squeezed-straight", "pipe-one")],
)
def test_an_export_from_a_checkpoint_is_that_of_training(runs: Runs, name: str, tmp_path: Path) -> None:
    folder, step = export_checkpoint(runs[name], out=tmp_path / "export")
    assert step == STEPS and folder == tmp_path / "export"
    theirs = runs[name] / "export"
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file())
    assert sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) == [
        file for file in files if file.name != "step.json"
    ]
    for file in files:
        if file.name != "step.json":
            assert (folder / file).read_bytes() == (theirs / file).read_bytes(), file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


@pytest.mark.launch
def test_an_export_of_a_run_that_was_stopped_draws(runs: Runs) -> None:
    shutil.rmtree(runs["unfinished"] / "export")
    assert export_checkpoint(runs["unfinished"], step=4) == (runs["unfinished"] / "export", 4)
    (pictures,) = TextToImage.from_pretrained(runs["unfinished"]).generate("a red circle", num=1, seed=1)
    assert pictures[0].size == (16, 16)
    assert json.loads((runs["unfinished"] / "export" / "step.json").read_text()) == {"step": 4}


@pytest.mark.launch
def test_raw_weights_and_other_types_are_exported(runs: Runs, tmp_path: Path) -> None:
    export_checkpoint(runs["straight"], weights="raw", out=tmp_path / "raw")
    export_checkpoint(runs["straight"], weights="raw", dtype="bf16", out=tmp_path / "raw")  # replaces
    export_checkpoint(runs["straight"], weights="average", dtype="fp16", out=tmp_path / "average")
    index = Index(runs["straight"] / "checkpoints" / "step-10" / "tensors")
    raw, average = (load_file(tmp_path / kind / "model.safetensors") for kind in ("raw", "average"))
    for name, value in load_file(runs["straight"] / "export" / "model.safetensors").items():
        weight = index.tensor(f"weight/{name}").view(value.shape)
        assert torch.equal(raw[name], weight.bfloat16()) and torch.equal(average[name], value.half())
    assert not torch.equal(raw["norm.weight"].float(), average["norm.weight"].float())


def call(launcher: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a launcher in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", [launcher, *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        runpy.run_path(str(ROOT / "launchers" / launcher), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.launch
def test_mistakes_in_exporting_are_told(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "notes.tex").write_text("dear to someone")
    moved = tmp_path / "moved"
    shutil.copytree(runs["straight"], moved)
    config = yaml.safe_load((moved / "config.yaml").read_text())
    torch.manual_seed(5)
    other = runs["dvae-straight"] / "export"
    config["run"]["dvae"] = str(other)
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    straight = str(runs["straight"])
    for arguments, words in (
        (["--run_dir", "/nowhere"], "/nowhere/config.yaml cannot be read"),
        (["--run_dir", straight, "--step", "3"], "has no checkpoint of step 3: it has step-8, step-10"),
        (["--run_dir", straight, "--out", str(tmp_path / "thesis")], "is there already, and no exported model"),
        (["--run_dir", str(moved)], f"the dvae at {other} is not the one that the run began with"),
    ):
        assert call("export.py", arguments, monkeypatch) == 1
        assert words in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "thesis" / "notes.tex").is_file()
    assert call("export.py", ["--run_dir", straight, "--out", str(tmp_path / "good")], monkeypatch) == 0
    assert capsys.readouterr().out == f"exported step 10 to {tmp_path / 'good'}\n"


@pytest.mark.launch
def test_the_doctor_finds_a_sound_checkpoint_sound(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("doctor.py", ["checkpoint", str(runs["one-tensor"])], monkeypatch) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    count = sum(value.numel() for value in Dalle(TINY_DALLE).parameters())
    for words in (
        "step-10",
        "2 processes (1 replicas × 1 pipe × 1 shards × 2 tensor), ZeRO-1, offload none",
        f"parameters {count:,} in",
        "moments fp32",
        "complete: every file is as it was written",
        f"weights 61 float32 {count * 4 / 2**20:.1f}",
        f"average of the weights 61 float32 {count * 4 / 2**20:.1f}",
        "data-parallel processes 1, 2, 4, 8",
        "parallel.tensor 1, 2",
        "parallel.pipe 1 to",
    ):
        assert words in text, words
    assert "PowerSGD" not in text
    assert call("doctor.py", ["checkpoint", str(runs["squeezed-same"] / "checkpoints" / "step-10")], monkeypatch) == 0
    assert "PowerSGD's error-feedback buffers" in capsys.readouterr().out


@pytest.mark.launch
def test_the_doctor_names_what_is_broken(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "step-10"
    shutil.copytree(runs["one-zero3"] / "checkpoints" / "step-10", checkpoint)
    file = checkpoint / "tensors" / "rank-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    def told() -> str:
        assert call("doctor.py", ["checkpoint", str(checkpoint)], monkeypatch) == 1
        output = capsys.readouterr()
        return "".join((output.out + output.err).replace("│", " ").split())

    assert "rank-1.safetensorshas" in told() and "whenitwaswritten" in told()
    file.unlink()
    assert "rank-1.safetensorsismissing" in told()
    index = json.loads((checkpoint / "tensors" / "index.json").read_text())
    del index["tensors"]["exp_avg/norm.weight"]
    (checkpoint / "tensors" / "index.json").write_text(json.dumps(index))
    assert "exp_avg/norm.weightismissing" in told()
    (checkpoint / "state.json").unlink()
    assert "state.json,without" in told()
    assert call("doctor.py", ["checkpoint", str(tmp_path / "nothing")], monkeypatch) == 1


@pytest.mark.launch
def test_another_precision_is_refused_with_the_reason(runs: Runs) -> None:
    job = runs.job("bf16", 1, "bf16")
    with pytest.raises(AssertionError, match=r"is of a run in fp32, this is bf16: that changes what is learned"):
        launch([job], 1, runs.folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_large_model_is_exported_one_tensor_at_a_time(
    tmp_path: Path, dvae_export: Path, tokenizer_file: Path
) -> None:
    """130 MiB of weights, of which the largest tensor has 8; the memory that it takes more than for a tiny model."""
    peaks = {}
    for name, shape in (
        ("tiny", TINY_DALLE),
        ("large", DalleConfig(**{**to_dict(TINY_DALLE), "width": 704, "depth": 6})),
    ):
        run = TransformerRun(
            model=shape, dvae=str(dvae_export), tokenizer=str(tokenizer_file), run_dir=str(tmp_path / name)
        )
        _write_run(tmp_path / name, run)
        script = (
            "import sys; from dalle_ds.training.export import export_checkpoint; export_checkpoint(sys.argv[1]); "
            "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / name)], capture_output=True, text=True, cwd=ROOT, check=True
        )
        peaks[name] = int(done.stdout.split()[1]) * 1024
    size = (tmp_path / "large" / "export" / "model.safetensors").stat().st_size
    assert size > 130 * 2**20
    assert peaks["large"] - peaks["tiny"] < 32 * 2**20


def _write_run(folder: Path, run: TransformerRun) -> None:
    """A run directory with a checkpoint of random weights."""
    from dalle_ds.models import DiscreteVAE
    from dalle_ds.text.tokenizer import Tokenizer

    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"stage": "transformer", "run": to_dict(run)}))
    weights = {name: value.detach() for name, value in Dalle(run.model).named_parameters()}
    pieces = {}
    for name, value in weights.items():
        rows, columns = matrix_size(value.shape)
        pieces[f"average/{name}"] = LocalShards(
            (rows, columns), [(TensorSlice(0, 0, rows, columns), value.reshape(rows, columns))]
        )
    identity = {
        "dvae": DiscreteVAE.from_pretrained(run.dvae).fingerprint,
        "tokenizer": Tokenizer.load(run.tokenizer).fingerprint,
    }
    state = {"step": 1, "identity": identity, "layout": {}, "learning_rate": None}
    parameters = {name: {"shape": list(value.shape)} for name, value in weights.items()}
    write_checkpoint(folder / "checkpoints", state, pieces, parameters)
