"""What is planned of a model is what the model has, holds and computes."""

from __future__ import annotations

import importlib
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dalle_ds.planning
from dalle_ds.config import (
    ClipConfig,
    ClipRun,
    DalleConfig,
    DvaeRun,
    RecomputingTrainConfig,
    Run,
    SharpnessConfig,
    TransformerRun,
    load_preset,
)
from dalle_ds.models import Dalle
from dalle_ds.models.flops import executed_flops
from dalle_ds.models.pipeline import pipeline_layers
from dalle_ds.parallel import TensorGroup
from dalle_ds.parallel.stages import balanced
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.model import Parameter, ParameterSet, Stage, stages_of
from dalle_ds.planning.trace import on_meta, traced
from dalle_ds.precision.choice import DTYPES
from dalle_ds.tasks.clip import ClipTask
from dalle_ds.tasks.dvae import DvaeTask
from dalle_ds.tasks.stages import STAGES
from dalle_ds.tasks.transformer import TransformerTask
from tests.conftest import ROOT, TINY_DALLE, TINY_DVAE

CLIP = ClipConfig(
    embed_dim=16, image_size=16, patch_size=8, vision_width=32, vision_depth=2, vision_heads=2, text_width=32, text_depth=2,
    text_heads=2, text_len=8, text_vocab=32,
)  # fmt: skip
RUNS: dict[str, Run] = {
    "dvae": DvaeRun(model=TINY_DVAE),
    "transformer": TransformerRun(model=TINY_DALLE),
    "clip": ClipRun(model=CLIP),
}
LONG = DalleConfig(width=64, depth=5, heads=2, text_len=64, grid=16, text_vocab=64, image_vocab=32)


def stage_of(layout: Layout, config: DalleConfig = TINY_DALLE, device: str = "cpu") -> Stage:
    train = RecomputingTrainConfig(activation_checkpointing=layout.checkpointing)
    return stages_of(TransformerTask.planned(TransformerRun(model=config, train=train)), layout, device)[0]


def test_the_room_knows_no_models_by_name() -> None:
    for file in Path(dalle_ds.planning.__file__).parent.glob("*.py"):
        assert not re.search(r"(Dvae|Transformer|Clip|Dalle|DiscreteVAE)(Run|Task|Config)\b", file.read_text()), file


# --- parameters


@pytest.mark.parametrize("stage", RUNS)
def test_as_many_as_in_the_model(stage: str) -> None:
    task = STAGES[stage][1].planned(RUNS[stage])
    planned = stages_of(task, Layout(), "cpu")[0].parameters
    real = dict(task.build_model().named_parameters())
    assert {p.name: p.shape for p in planned} == {name: parameter.shape for name, parameter in real.items()}


def test_a_tensor_group_has_pieces() -> None:
    model = Dalle(TINY_DALLE, tensor=TensorGroup(1, 2))
    whole, part = stage_of(Layout()).parameters, stage_of(Layout(tensor=2)).parameters
    assert {p.name: p.shape for p in part} == {n: p.shape for n, p in model.named_parameters()}
    divided = sum(p.numel for p in part if p.is_divided)
    assert 2 * divided + (part.count - divided) == whole.count


def test_the_papers_twelve_billion() -> None:
    config = load_preset("dalle-12b", "transformer", TransformerRun).model
    planned = stage_of(Layout(), config).parameters
    matrices = sum(p.numel for p in planned if p.block is not None and len(p.shape) == 2)
    assert matrices == 64 * 12 * 3968**2
    found, tokens = planned.parts(), 16384 + 8192
    assert found["blocks"] / 1e9 == pytest.approx(12.09, abs=0.01)
    assert found["norm"] + found["text_head"] + found["image_head"] == tokens * (3968 + 1) + 2 * 3968
    assert found["embedding"] == (tokens + 2 * 256 + 2 * 32 + 2) * 3968


def test_dvae_has_the_releases_parameters() -> None:
    task = DvaeTask.planned(load_preset("dalle-12b", "dvae", DvaeRun))
    found = stages_of(task, Layout(), "cpu")[0].parameters.parts()
    assert found == {"encoder": 53_786_240, "decoder": 43_829_766}


@pytest.mark.parametrize("pipe", [2, 3, 4])
def test_stages_hold_what_the_pipeline_deals_out(pipe: int) -> None:
    task = TransformerTask.planned(TransformerRun(model=TINY_DALLE))
    stages = stages_of(task, Layout(pipe=pipe, zero_stage=1), "cpu")
    with torch.device("meta"):
        layers = pipeline_layers(TINY_DALLE)
        bounds = balanced([layer.cost for layer in layers], pipe)
        for stage in stages:
            own = layers[bounds[stage.number] : bounds[stage.number + 1]]
            names = {layer.name + name for layer in own for name, _ in layer.build().named_parameters()}
            assert {parameter.name for parameter in stage.parameters} == names
    assert sum(stage.parameters.count for stage in stages) == stage_of(Layout()).parameters.count


def made_up(sizes: list[list[int]]) -> ParameterSet:
    return ParameterSet(
        tuple(
            Parameter(0, f"{group}.{number}", torch.Size([size]), str(group))
            for group, of_group in enumerate(sizes)
            for number, size in enumerate(of_group)
        )
    )


def test_updated_elements_are_what_zero_cuts() -> None:
    parameters = made_up([[10, 7], [3]])
    assert parameters.updated_by_group(0, 4) == [17, 3]
    assert parameters.updated_by_group(3, 4) == [3 + 2, 1]  # each parameter by itself
    assert parameters.updated_by_group(1, 4) == [6, 2]  # groups of 24 and 8, aligned to two elements a process


def test_touched_counts_every_parameter_that_a_partition_meets() -> None:
    generator = random.Random(0)
    for _ in range(200):
        shards = generator.randint(1, 6)
        sizes = [[generator.randint(1, 40) for _ in range(generator.randint(1, 4))] for _ in range(3)]
        most = 0
        for shard in range(shards):
            found = 0
            for group in sizes:
                owned = 2 * -(-sum(group) // (2 * shards))
                elements = [number for number, size in enumerate(group) for _ in range(size)]
                met = set(elements[shard * owned : (shard + 1) * owned])
                found += sum(group[number] for number in met)
            most = max(most, found)
        assert made_up(sizes).touched(shards) == most


@pytest.mark.parametrize("stage", RUNS)
def test_no_random_numbers_are_drawn(stage: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stages_of(STAGES[stage][1].planned(replace(RUNS[stage], seed=7)), Layout(micro_batch=3), "cpu")
    assert torch.equal(before, torch.get_rng_state())


# --- passes


def test_what_real_models_hold_in_every_precision_and_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    checks = list(importlib.import_module("plan_check").check_activations())
    assert len(checks) == 3 * (3 * 3 + 2 * (1 + 5 * 2))
    for check in checks:
        assert abs(check.error) < 0.03, check


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_layer_by_layer_is_the_whole_model(checkpointing: Any, device: str) -> None:
    """One layer of each kind is traced, and counted as often as there are such."""
    layout = Layout(micro_batch=3, checkpointing=checkpointing)
    planned = stage_of(layout, LONG, device).update
    train = RecomputingTrainConfig(activation_checkpointing=checkpointing)
    task = TransformerTask.planned(TransformerRun(model=LONG, train=train))
    batch = task.batch_spec(3)
    with on_meta(device):
        with torch.device("meta"):
            model = task.build_model()
        values = list(batch.values())
        whole = traced(
            lambda *given: task.loss(model, dict(zip(batch, given, strict=True)), 0)[0],
            values,
            model,
        )
    assert planned.work.flops == whole.work.flops
    assert planned.kept == pytest.approx(whole.kept, rel=1e-3)
    assert planned.forward == pytest.approx(whole.forward, rel=0.03)
    assert planned.backward == pytest.approx(whole.backward, rel=0.03)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(("precision", "device"), [("fp32", "cpu"), ("bf16", "cpu"), ("bf16", "cuda")])
def test_operations_are_those_that_are_counted_from_shapes(checkpointing: Any, precision: Any, device: str) -> None:
    planned = stage_of(Layout(checkpointing=checkpointing, precision=precision), LONG, device).update.work.flops
    counted = executed_flops(LONG, checkpointing, dtype=DTYPES[precision], device=device)
    # FlexAttention's backward pass has two more products than the plain kernel that stands for it.
    assert planned.total() == pytest.approx(counted.total, rel=0.01 if device == "cpu" else 0.05)


@pytest.mark.parametrize("stage", ["dvae", "clip"])
def test_operations_are_those_that_torch_counts(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    task = STAGES[stage][1].planned(RUNS[stage])
    planned = stages_of(task, Layout(micro_batch=2), "cpu")[0].update.work.flops.total()
    batch = importlib.import_module("plan_check").real_batch(task, 2)
    model = task.build_model()
    with FlopCounterMode(display=False) as counter:
        task.loss(model, batch, 0)[0].backward()
    # torch has no formula for its attention on CPUs.
    assert counter.get_total_flops() <= planned <= 1.1 * counter.get_total_flops()


def test_operators_that_come_after_the_tracer_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flop_registry, torch.ops.aten.add, lambda *_, **__: 7)
    with on_meta("cpu"):
        assert traced(lambda x: x + x, [torch.empty(3, device="meta")], torch.nn.Module()).work.flops.total() == 7


def test_a_tensor_group_keeps_its_part_and_with_sequence_its_positions() -> None:
    whole = stage_of(Layout(micro_batch=2), LONG).update
    divided = stage_of(Layout(micro_batch=2, tensor=2), LONG).update
    positions = stage_of(Layout(micro_batch=2, tensor=2, sequence=True), LONG).update
    assert positions.kept < divided.kept < whole.kept
    stream = 2 * LONG.total_len * LONG.width * 4
    # The stream that enters each block and the last normalization, and what normalizations keep beside it.
    assert divided.kept - positions.kept == pytest.approx((2 * LONG.depth + 1) * stream / 2, rel=0.05)
    assert divided.work.flops.total() == pytest.approx(whole.work.flops.total() / 2, rel=0.01)


# --- updates that compare all rows of a batch


def clip_update(layout: Layout, sharpness: SharpnessConfig | None = None) -> Any:
    run = ClipRun(model=CLIP, sharpness=sharpness or SharpnessConfig())
    return stages_of(ClipTask.planned(run), layout, "cpu")[0]


def test_cached_gradients_take_one_more_forward_pass_and_memory_of_a_micro_batch() -> None:
    one, four = clip_update(Layout(micro_batch=4)).update, clip_update(Layout(micro_batch=4, accumulation=4)).update
    assert four.work.flops.total() == pytest.approx(4 * one.work.flops.total() * 4 / 3, rel=0.02)
    assert four.kept < 1.2 * one.kept and (four.forwards, four.backwards) == (8, 4)


def test_more_processes_compare_more_rows() -> None:
    few, many = (
        clip_update(Layout(shards=2, micro_batch=4)).update,
        clip_update(Layout(shards=64, micro_batch=4)).update,
    )
    assert many.kept > few.kept
    rows = {kind.operation: size for kind, size in many.work.exchanged.items() if size > 1000}
    assert rows["all-gather"] == rows["reduce-scatter"] == 2 * 64 * 4 * CLIP.embed_dim * 4


def test_sharpness_holds_a_second_model_and_takes_more_passes() -> None:
    plain = clip_update(Layout(micro_batch=4, accumulation=4))
    sharp = clip_update(Layout(micro_batch=4, accumulation=4), SharpnessConfig(rho=0.1, pairs=4))
    assert sharp.update.always - plain.update.always == 4 * plain.parameters.count
    # Of 4 pieces, in passes: 2 without gradients, and 3 with them for each of 4 groups. Cached gradients: 1 and 1.
    assert sharp.update.work.flops.total() == pytest.approx(
        plain.update.work.flops.total() * (2 + 3 * 3) / (1 + 3), rel=0.02
    )
    assert sharp.update.backwards == 1
