"""Bytes by kind: closed forms, and what must not change or must shrink. Real engines are counted in test_plan_check.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dalle_ds.config import PowerSGDConfig, TransformerRun, load_preset
from dalle_ds.planning.layout import Buffers, Layout
from dalle_ds.planning.memory import MOMENTS, Memory, stage_memory
from dalle_ds.planning.model import Stage, stages_of
from dalle_ds.tasks.transformer import TransformerTask

RUN = load_preset("dalle-12b", "transformer", TransformerRun)
COUNT = 12_292_840_960
LEAN = Buffers(reduce=1, prefetch=0, live=0, reuse=0, persistent=0)


def stages(layout: Layout, device: str = "cuda") -> tuple[Stage, ...]:
    train = replace(RUN.train, activation_checkpointing=layout.checkpointing)
    run = replace(RUN, optim=replace(RUN.optim, moments=layout.moments), train=train)
    return stages_of(TransformerTask.planned(run), layout, device)


def memories(layout: Layout, device: str = "cuda") -> list[Memory]:
    return [stage_memory(stage, layout, device) for stage in stages(layout, device)]


def kinds(memory: Memory, moment: str = "between") -> dict[str, int]:
    return {use.kind: use.at(moment) for use in memory.uses if use.at(moment)}


@pytest.mark.parametrize(
    ("layout", "per_parameter"),
    [
        (Layout(zero_stage=0), 12),
        (Layout(zero_stage=0, precision="bf16"), 14),
        (Layout(zero_stage=1, precision="bf16", shards=8), 2 + 4 + 12 / 8),
        (Layout(zero_stage=1, shards=8), 4 + 12 / 8),
        (Layout(zero_stage=2, precision="bf16", shards=8), 2 + 12 / 8),
        (Layout(zero_stage=3, shards=8), 16 / 8),
        (Layout(zero_stage=3, shards=8, precision="fp16"), 16 / 8),
        (Layout(zero_stage=3, shards=8, precision="fp16", moments="16-bit"), 12 / 8),
        (Layout(zero_stage=3, shards=8, precision="bf16"), 18 / 8),
        (Layout(zero_stage=3, precision="bf16", accumulate_bytes=2, master_bytes=2), 8),
    ],
)
def test_bytes_per_parameter_between_updates(layout: Layout, per_parameter: float) -> None:
    """Those of docs/precision.md: weights, fp32 weights, moments and gradients."""
    (memory,) = memories(replace(layout, buffers=LEAN))
    assert memory.at("between") / COUNT == pytest.approx(per_parameter, rel=0.015)


def test_offload_leaves_the_weights_on_the_device() -> None:
    layout = Layout(zero_stage=3, shards=8, precision="bf16", offload_optimizer=True, buffers=LEAN)
    (memory,) = memories(layout)
    assert memory.at("between") / COUNT == pytest.approx(2 / 8, rel=0.01)
    # fp32 weights, two moments, and DeepSpeed's two buffers of gradients.
    assert memory.host / COUNT == pytest.approx((4 + 8 + 8) / 8, rel=0.01)
    (on_cpu,) = memories(layout, "cpu")
    assert on_cpu.host == 0 and on_cpu.at("between") / COUNT == pytest.approx(22 / 8, rel=0.01)


def test_fp32_gradients_of_zero_2_hardly_shrink() -> None:
    """A process keeps whole gradients of all that its partition touches: of 12 d², at least 3 + 4 d²."""
    few = kinds(memories(Layout(zero_stage=2, shards=8, buffers=LEAN))[0], "step")["gradients"]
    many = kinds(memories(Layout(zero_stage=2, shards=64, buffers=LEAN))[0], "step")["gradients"]
    assert 0.57 < few / (4 * COUNT) < 0.61 and 0.57 < many / (4 * COUNT) < 0.61
    compact = kinds(memories(Layout(zero_stage=2, precision="bf16", shards=64, buffers=LEAN))[0], "step")["gradients"]
    assert compact == pytest.approx(4 * COUNT / 64, rel=0.01)


def test_early_stages_hold_activations_of_more_micro_batches() -> None:
    layout = Layout(pipe=4, zero_stage=1, precision="bf16", accumulation=16, checkpointing="none")
    held = [kinds(memory, "backward")["activations"] for memory in memories(layout)]
    assert held == sorted(held, reverse=True)
    planned = stages(layout)
    boundary = 1280 * 3968 * 4
    assert held[0] == 4 * planned[0].update.kept + 4 * boundary
    assert held[2] == 2 * planned[2].update.kept + 2 * 2 * boundary
    few = replace(layout, accumulation=2)
    assert kinds(memories(few)[0], "backward")["activations"] == 2 * planned[0].update.kept + 2 * boundary


def test_powersgd_keeps_errors_of_what_it_compresses() -> None:
    plain = Layout(zero_stage=3, replicas=16, shards=8, precision="fp16")
    packed = replace(plain, powersgd=PowerSGDConfig(enabled=True, storage="1-6-9"))
    wide = replace(plain, powersgd=PowerSGDConfig(enabled=True))
    matrices = 64 * 12 * 3968**2 // 8
    assert "PowerSGD" not in kinds(memories(plain)[0])
    # Q₀: of each of the six matrices of a layer, its longer side times rank 112.
    fixed = 4 * 64 * 6 * 3968 * 112
    assert kinds(memories(packed)[0])["PowerSGD"] == 2 * matrices + fixed
    assert kinds(memories(wide)[0])["PowerSGD"] == 4 * matrices + fixed


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_more_shards_never_hold_more(stage: int, precision: str) -> None:
    layouts = [Layout(zero_stage=stage, precision=precision, shards=2**n) for n in range(1, 7)]  # type: ignore[arg-type]
    peaks = [memories(layout)[0].peak for layout in layouts]
    assert peaks == sorted(peaks, reverse=True)


def test_the_peak_is_the_most_of_all_moments() -> None:
    (memory,) = memories(Layout(zero_stage=2, precision="bf16", shards=8, micro_batch=4, checkpointing="full"))
    assert memory.peak == max(sum(kinds(memory, moment).values()) for moment in MOMENTS)
    assert memory.at(memory.peak_moment) == memory.peak
