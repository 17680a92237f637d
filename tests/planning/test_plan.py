"""Plans as a whole: time, search, the command line."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dalle_ds.config import ClipRun, DvaeRun, ParallelConfig, PowerSGDConfig, TransformerRun, load_preset
from dalle_ds.errors import ConfigError
from dalle_ds.planning.command import parse_plan_command
from dalle_ds.planning.layout import CLUSTERS, Cluster, named_cluster
from dalle_ds.planning.model import needed_flops
from dalle_ds.planning.plan import Plan, search
from dalle_ds.planning.plan import make_plan as plan_of_task
from dalle_ds.planning.report import fit_sentence
from dalle_ds.tasks.clip import ClipTask
from dalle_ds.tasks.dvae import DvaeTask
from dalle_ds.tasks.transformer import TransformerTask
from tests.conftest import ROOT

RUN = load_preset("dalle-12b", "transformer", TransformerRun)
ZERO_3 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


def make_plan(run: TransformerRun, json_config: dict[str, Any], cluster: Cluster) -> Plan:
    return plan_of_task(TransformerTask.planned(run), json_config, cluster)


def plan(gpus: int = 8, cluster: str = "h100-80gb", micro_batch: int = 1, **parallel: int) -> Plan:
    run = replace(
        RUN,
        parallel=ParallelConfig(**parallel),
        train=replace(RUN.train, micro_batch=micro_batch),  # type: ignore[arg-type]
    )
    stage = 1 if parallel.get("pipe", 1) > 1 else 3
    return make_plan(run, {**ZERO_3, "zero_optimization": {"stage": stage}}, named_cluster(cluster, gpus))


# --- time


def test_compute_follows_operations_and_rates() -> None:
    found = plan()
    # Needed: 6 operations per parameter of the blocks' matrices and token, logits, and attention beside them.
    matrices = 64 * 12 * 3968**2
    needed, executed = needed_flops(found.task), found.stages[0].update.work.flops.total()
    assert needed == pytest.approx(6 * matrices * 1280, rel=0.03)
    # Recomputation repeats all but each block's last product: 7 of 12 d².
    assert executed == pytest.approx(1024 / 8 * 6 * matrices * 1280 * (1 + 7 / 36), rel=0.03)
    assert found.time.computation == pytest.approx(executed / (989e12 * 0.5))
    assert found.mfu == pytest.approx(needed * 1024 / found.time.total / (8 * 989e12))
    assert found.items_per_second == pytest.approx(1024 * 1280 / found.time.total)
    assert found.days == pytest.approx(430_000 * found.time.total / 86_400)


def test_twice_the_gpus_take_half_the_time_to_compute() -> None:
    assert plan(16).time.computation == pytest.approx(plan(8).time.computation / 2)


def test_a_bubble_is_the_paper_formula() -> None:
    """(p − 1) / (m + p − 1) of an update's passes is waiting."""
    found = plan(8, pipe=4)
    passes = found.time.computation + found.time.tensor + found.time.pipe
    waiting = found.time.bubble / (found.time.bubble + passes)
    m = found.layout.accumulation
    assert m == 512 and waiting == pytest.approx(3 / (m + 3))


def test_compression_shortens_what_crosses_between_machines() -> None:
    run = replace(RUN, parallel=ParallelConfig(replicas=128), train=replace(RUN.train, micro_batch=1))
    json_config = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    cluster = named_cluster("v100-16gb", 1024)
    plain = make_plan(run, json_config, cluster)
    packed = replace(run, powersgd=PowerSGDConfig(enabled=True, transport="1-6-9"))
    assert make_plan(packed, json_config, cluster).time.replica < plain.time.replica / 4


def test_links_are_those_of_a_machine_or_of_the_network() -> None:
    cluster = named_cluster("h100-80gb", 64)
    assert cluster.link(1, 8) == 450e9 * 0.8
    assert cluster.link(8, 8) == 50e9 * 0.8  # one process of each machine
    assert cluster.link(1, 64) == 400e9 * 0.8  # all of them share the network of their machine
    assert cluster.link(2, 32) == 200e9 * 0.8


# --- what fits


def test_a_plan_says_what_is_missing() -> None:
    found = plan(1, "h200-141gb")
    assert found.deficit_bytes == found.memory.peak - found.cluster.memory > 0
    assert "It does not fit" in fit_sentence(found) and "offload the optimizer" in fit_sentence(found)
    assert plan(8, "h200-141gb").deficit_bytes == 0


def test_main_memory_may_lack_too() -> None:
    cluster = replace(named_cluster("h200-141gb", 8), host_memory_gb=50.0)
    found = make_plan(replace(RUN, train=replace(RUN.train, micro_batch=1)), ZERO_3, cluster)
    assert found.memory.peak < cluster.memory and found.deficit_bytes > 0
    assert "keep less in main memory" in fit_sentence(found)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"tensor": 3}, "does not divide 8 processes"),
        ({"tensor": 4}, "model.heads=62 cannot be divided among parallel.tensor=4"),
        ({"pipe": 16}, "does not divide 8 processes"),
    ],
)
def test_what_training_refuses_is_refused(parallel: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(8, **parallel)


def test_v100_has_no_bf16_and_a_dvae_no_parts_and_no_fp16() -> None:
    with pytest.raises(ConfigError, match="no units for bf16"):
        plan(8, "v100-16gb")
    dvae = replace(load_preset("toy", "dvae", DvaeRun), parallel=ParallelConfig(tensor=2))
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2"):
        plan_of_task(DvaeTask.planned(dvae), {}, named_cluster("cpu"))
    whole = DvaeTask.planned(replace(dvae, parallel=ParallelConfig()))
    with pytest.raises(ConfigError, match="fp16"):
        plan_of_task(whole, {"fp16": {"enabled": True}}, named_cluster("v100-16gb"))


@pytest.mark.parametrize(
    ("stage", "rank", "words"),
    [(1, None, "powersgd.enabled with ZeRO-1"), (3, 7, "powersgd.rank=7 cannot be shared out to the 4 processes")],
)
def test_compression_that_training_refuses_is_refused(stage: int, rank: int | None, words: str) -> None:
    run = replace(RUN, parallel=ParallelConfig(replicas=2), powersgd=PowerSGDConfig(enabled=True, rank=rank))
    with pytest.raises(ConfigError, match=words):
        make_plan(run, {"zero_optimization": {"stage": stage}}, named_cluster("h100-80gb"))


# --- search


def test_search_ranks_what_fits_and_says_why_others_do_not() -> None:
    cluster = named_cluster("h100-80gb", 16)
    found = search(TransformerTask.planned(RUN), {}, cluster)
    assert found.plans and all(not each.deficit_bytes and each.layout.processes == 16 for each in found.plans)
    times = [each.time.total for each in found.plans]
    assert times == sorted(times)
    assert {each.layout.precision for each in found.plans} == {"bf16"}
    names = {
        (p.layout.replicas, p.layout.pipe, p.layout.tensor, p.layout.sequence, p.layout.zero_stage) for p in found.plans
    }
    assert len(names) == len(found.plans), "one plan for each arrangement"
    too_large = [refusal for refusal in found.refusals if refusal.deficit_bytes]
    assert too_large and [each.deficit_bytes for each in too_large] == sorted(each.deficit_bytes for each in too_large)
    reasons = " ".join(refusal.reason for refusal in found.refusals)
    assert "model.heads=62 cannot be divided among parallel.tensor=4" in reasons and "GB are missing" in reasons
    # Each arrangement is either planned or refused, once.
    refused = [name for refusal in found.refusals for name in refusal.layouts]
    pipes = sum(1 for tensor in (1, 2, 4, 8) for pipe in (2, 4, 8, 16) if tensor * pipe <= 16)
    by_positions = sum(1 for tensor in (2, 4, 8) for pipe in (2, 4, 8, 16) if tensor * pipe <= 16)
    shared = sum(4 * (2 if tensor > 1 else 1) * (16 // tensor).bit_length() for tensor in (1, 2, 4, 8))
    assert len(found.plans) + len(refused) == pipes + by_positions + shared


def test_search_keeps_to_what_is_stated() -> None:
    cluster = named_cluster("v100-16gb", 8)
    run = load_preset("dalle-1b", "transformer", TransformerRun)
    run = replace(run, train=replace(run.train, micro_batch=2))
    found = search(TransformerTask.planned(run), {"zero_optimization": {"stage": 3}}, cluster)
    assert {each.layout.micro_batch for each in found.plans} == {2}
    assert {each.layout.zero_stage for each in found.plans if each.layout.pipe == 1} == {3}
    assert {each.layout.precision for each in found.plans} == {"fp16"}
    assert any("a pipeline adds up gradients" in refusal.reason for refusal in found.refusals)


def test_clip_is_searched_too() -> None:
    run = load_preset("toy", "clip", ClipRun)
    found = search(ClipTask.planned(run), {}, named_cluster("h100-80gb", 4))
    assert {each.layout.tensor * each.layout.pipe for each in found.plans} == {1}
    assert {each.layout.checkpointing for each in found.plans} <= {"none", "full"}
    # Micro-batches other than all rows at once take one more forward pass.
    assert found.plans[0].layout.accumulation == 1


# --- the command line


def launch(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    try:
        runpy.run_path(str(ROOT / "launchers" / "plan.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_launcher_prints_tables_and_writes_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    arguments = ["--preset", "emoji", "--cluster", "h100-80gb", "--gpus", "1", "--train.micro_batch", "8"]
    arguments += ["--deepspeed_config", str(ROOT / "ds_configs/zero1_bf16.json"), "--json", str(out)]
    assert launch(arguments, monkeypatch) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Parameters",
        "Adam's moments",
        "model FLOPs utilization",
        "It fits",
        "Assumed: matrix products reach 50%",
    ):
        assert words in text
    figures = json.loads(out.read_text())
    assert figures["layout"]["micro_batch"] == 8 and figures["memory"]["deficit_bytes"] == 0
    moments = [kind["step"] for kind in figures["memory"]["bytes"].values()]
    assert sum(moments) <= figures["memory"]["peak"] and figures["seconds"]["total"] > 0


def test_the_launcher_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    arguments = ["--preset", "emoji", "--cluster", "cpu", "--search", "True", "--json", str(out)]
    assert launch(arguments, monkeypatch) == 0
    assert "layouts fit; the fastest" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert figures["plans"][0]["cluster"]["gpus"] == 2


def test_every_number_of_a_cluster_can_be_changed() -> None:
    command = parse_plan_command(
        [
            "--preset",
            "toy",
            "--cluster",
            "v100-16gb",
            "--cluster.memory_gb",
            "33",
            "--cluster.bf16_tflops",
            "1",
            "--gpus",
            "4",
        ]
    )
    assert command.cluster == replace(CLUSTERS["v100-16gb"], memory_gb=33.0, bf16_tflops=1.0, gpus=4)
    assert command.device == "cuda" and not command.search and command.deepspeed == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster", "cpu"], "--preset is missing: give one of"),
        (["--preset", "toy"], "--cluster is missing: give one of v100-16gb"),
        (["--preset", "huge", "--cluster", "cpu"], "--preset: invalid choice: 'huge'"),
        (["--preset", "toy", "--cluster", "h200"], "--cluster: invalid choice: 'h200'"),
        (
            ["--preset", "toy", "--cluster", "cpu", "--gpus", "0"],
            "--gpus must be a whole number of at least 1, found 0",
        ),
        (["--preset", "toy", "--cluster", "cpu", "--gpus", "two"], "--gpus: invalid int value: 'two'"),
        (["--preset", "toy", "--cluster", "cpu", "--stage", "nothing"], "--stage: invalid choice: 'nothing'"),
        (["--preset", "toy", "--cluster", "cpu", "--cluster.reserved_gb", "9"], "cluster.reserved_gb=9"),
        (["--preset", "toy", "--cluster", "cpu", "--cluster.overlap", "2"], "cluster.overlap must lie in"),
        (["--preset", "toy", "--cluster", "cpu", "--json", "/nowhere/x.json"], "--json must be a file in a folder"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(arguments, monkeypatch) in (1, 2)
    error = capsys.readouterr().err
    assert words in " ".join(error.replace("│", " ").split()) and "Traceback" not in error


def test_planning_imports_no_deepspeed() -> None:
    program = "import sys, dalle_ds.planning.command; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
