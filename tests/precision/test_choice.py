"""What `auto` stands for: the faster precision, measured in bounded time, the same on all ranks and for all of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from dalle_ds.config import DiscreteVAEConfig, DvaeRun, TrainConfig
from dalle_ds.config.deepspeed import is_auto, resolve, with_precision
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.planning.layout import named_cluster
from dalle_ds.planning.plan import make_plan
from dalle_ds.precision import choice
from dalle_ds.tasks.dvae import DvaeTask
from dalle_ds.training.checkpoints.content import FORMAT, STATE_NAME
from dalle_ds.training.run_directory import RunDirectory, kept_precision
from dalle_ds.training.trainer import Trainer

CPU = torch.device("cpu")
ALONE = Mesh(0, 1, CPU)
AUTO: dict[str, Any] = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 1}}
RUN = DvaeRun(data="data", run_dir="run", train=TrainConfig(batch_size=4))


def machine(monkeypatch: pytest.MonkeyPatch, **gigaflops: float) -> None:
    """A CPU of these choice."""
    monkeypatch.setattr(choice, "_rate", lambda name: 1e9 * gigaflops[name])


@pytest.mark.parametrize("gigaflops", [0.1, 0.5, 22.0, 400.0, 1e6])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_probe_takes_its_time_and_no_more(gigaflops: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sizes = [0.0], []

    def product(left: torch.Tensor, right: torch.Tensor) -> None:
        sizes.append(left)
        clock[0] += max(1e-5, 2 * left**3 / (gigaflops * 1e9))  # type: ignore[operator]

    def seconds(left: Any, right: Any) -> float:
        began = clock[0]
        product(left, right)
        return clock[0] - began

    monkeypatch.setattr(choice, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(choice, "_matrix", lambda size, *_: size)
    monkeypatch.setattr(choice, "_product_seconds", seconds)
    found = choice.matmul_rate(torch.bfloat16, torch.device(device))
    assert clock[0] <= choice.SECONDS
    assert found == pytest.approx(gigaflops * 1e9, rel=0.05) or gigaflops == 1e6
    assert sizes[0] == choice.SMALLEST and max(sizes) <= choice.LARGEST[device]
    if gigaflops >= 22:
        assert max(sizes) >= 512, "small matrices say little of a fast machine"


def test_a_real_probe_leaves_the_generator_of_training_alone() -> None:
    before = torch.get_rng_state()
    assert choice.matmul_rate(torch.float32, CPU, 0.02) > 1e6
    assert torch.equal(torch.get_rng_state(), before)


def test_the_faster_one_is_chosen_and_both_rates_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, fp32=22.0, bf16=0.9)
    assert choice.choose(CPU).precision == "fp32"
    assert "22 GFLOP/s in fp32" in choice.choose(CPU).why and "0.9 GFLOP/s in bf16" in choice.choose(CPU).why
    machine(monkeypatch, fp32=100.0, bf16=400.0)
    assert choice.choose(CPU).precision == "bf16"


@pytest.mark.parametrize(("has_units", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_is_asked_and_not_measured(has_units: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return has_units

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(choice, "_rate", None)
    assert choice.choose(torch.device("cuda", 0)).precision == precision
    assert asked == [False], "emulated bf16 is none"
    assert choice.slow_warning("bf16", torch.device("cuda", 0)) is None


def test_other_ranks_take_what_the_first_one_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, fp32=1.0, bf16=2.0)
    sent: list[Any] = []

    def broadcast(outcome: list[Any], src: int) -> None:
        assert src == 0
        if not sent:
            sent.extend(outcome)
        outcome[:] = sent

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    assert choice.choose_precision("auto", Mesh(0, 2, CPU)) == "bf16"
    monkeypatch.setattr(choice, "_rate", None)  # rank 1 would have found another answer, or none
    assert choice.choose_precision("auto", Mesh(1, 2, CPU)) == "bf16"


def test_a_slow_precision_that_is_asked_for_is_used_after_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, fp32=22.0, bf16=0.9, fp16=0.5)
    for precision in ("bf16", "fp16"):
        assert choice.choose_precision(precision, ALONE) == precision
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 and lines[0].startswith("warning") and "22 GFLOP/s" in lines[0]
    assert choice.choose_precision("fp32", ALONE) == "fp32"
    machine(monkeypatch, fp32=22.0, bf16=80.0)
    assert choice.choose_precision("bf16", ALONE) == "bf16"
    assert capsys.readouterr().out == ""


def test_auto_in_a_json_is_for_whoever_states_nothing_else() -> None:
    assert is_auto(AUTO, RUN) and is_auto({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, RUN)
    stated = DvaeRun(data="data", run_dir="run", train=TrainConfig(batch_size=4, precision="bf16"))
    assert not is_auto(AUTO, stated) and resolve(AUTO, stated, 1).precision == "bf16"
    for other in ({}, {"bf16": {"enabled": True}}, {**AUTO, "fp16": {"enabled": True}}):
        assert not is_auto(other, RUN)
    with pytest.raises(ConfigError, match=r"bf16\.enabled"):
        resolve(AUTO, RUN, 1)
    for precision in choice.DTYPES:
        config = resolve(with_precision(AUTO, precision), RUN, 1)
        assert config.precision == precision
        assert config.deepspeed["bf16"]["enabled"] == (precision == "bf16")


def test_a_plan_takes_what_the_cluster_is_faster_in() -> None:
    for cluster, precision in (("h100-80gb", "bf16"), ("v100-16gb", "fp32"), ("cpu", "bf16")):
        run = DvaeRun(data="data", run_dir="run", train=TrainConfig(batch_size=64))
        assert make_plan(DvaeTask.planned(run), AUTO, named_cluster(cluster)).layout.precision == precision


def written(folder: Path, chosen: choice.Choice | None) -> None:
    directory = RunDirectory(folder, "dvae", RUN)
    directory.claim()
    directory.write_config({}, chosen)
    directory.release()


def test_a_run_keeps_what_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_precision(tmp_path / "run") is None
    written(tmp_path / "run", choice.Choice("fp32", "22 and 0.9"))
    assert kept_precision(tmp_path / "run") == choice.Choice("fp32", "22 and 0.9")
    content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert content["precision"] == {"chosen": "fp32", "why": "22 and 0.9"}
    written(tmp_path / "run", choice.Choice("fp32", "22 and 0.9"))  # and it is no other configuration


@pytest.mark.parametrize("noted", [None, "bf16", {"chosen": "fp8", "why": ""}, {"chosen": ["bf16"], "why": ""}])
def test_a_run_whose_precision_was_stated_keeps_that_of_its_checkpoints(noted: Any, tmp_path: Path) -> None:
    written(tmp_path, None)
    file = tmp_path / "config.yaml"
    content = yaml.safe_load(file.read_text())
    assert "precision" not in content
    file.write_text(yaml.safe_dump(content if noted is None else {**content, "precision": noted}))
    assert kept_precision(tmp_path) is None, "nothing is learned before a checkpoint"
    for step in (1, 2):
        checkpoint = tmp_path / "checkpoints" / f"step-{step}"
        checkpoint.mkdir()
        state = '{"step": 1, "identity": {}, "learning_rate": {}, "layout": {"precision": "bf16"}, "format": %d}'
        (checkpoint / STATE_NAME).write_text(state % FORMAT if step == 1 else "{")
    kept = kept_precision(tmp_path)
    assert kept is not None and kept.precision == "bf16" and "step-1" in kept.why
    RunDirectory(tmp_path, "dvae", RUN)
    file.write_text("stage: [")
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        kept_precision(tmp_path)


def test_a_trainer_decides_once_and_resumes_in_the_same_on_another_machine(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DiscreteVAEConfig(
        image_size=16, groups=2, blocks_per_group=1, encoder_width=8, decoder_width=8, vocab_size=16
    )
    run = DvaeRun(data=str(data), run_dir=str(tmp_path / "run"), steps=2, model=model, train=TrainConfig(batch_size=4))

    monkeypatch.setattr(Mesh, "divide", lambda mesh, degrees: mesh)  # which needs a process group

    def trainer(json_config: dict[str, Any]) -> Trainer:
        made = Trainer(DvaeTask, run, json_config, ALONE)
        made.directory.release()
        return made

    machine(monkeypatch, fp32=22.0, bf16=0.9)
    assert trainer(AUTO).config.precision == "fp32"
    machine(monkeypatch, fp32=1.0, bf16=400.0)
    resumed = trainer(AUTO)
    assert resumed.config.precision == "fp32"
    assert resumed.choice is not None and "22 GFLOP/s" in resumed.choice.why, "what it was chosen by is kept as well"
    assert yaml.safe_load(resumed.directory.config_file.read_text())["precision"]["chosen"] == "fp32"
    # Once something has been learned in it, another one that is stated is refused.
    monkeypatch.setattr("dalle_ds.training.trainer.choose_checkpoint", lambda *_: tmp_path)
    monkeypatch.setattr("dalle_ds.training.trainer.load_state", lambda _: resumed.state)
    assert trainer({**AUTO, "bf16": {"enabled": False}}).config.precision == "fp32"
    with pytest.raises(CheckpointError, match="run in fp32, this is bf16"):
        trainer({**AUTO, "bf16": {"enabled": True}})


def test_a_choice_is_measured_on_one_thread_and_gives_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    monkeypatch.setattr(choice, "matmul_rate", lambda *_: seen.append(torch.get_num_threads()) or 1e9)
    torch.set_num_threads(2)
    try:
        choice._rate.__wrapped__("bf16")
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
