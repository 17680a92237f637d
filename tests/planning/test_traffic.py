"""Bytes along each axis against closed forms; test_plan_check.py and tests/benchmarks/test_comm.py count collectives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dalle_ds.config import DalleConfig, PowerSGDConfig, RecomputingTrainConfig, TransformerRun, load_preset
from dalle_ds.planning.layout import REPLICA_BUCKET, Buffers, Layout
from dalle_ds.planning.model import Stage, stages_of
from dalle_ds.planning.traffic import Transfer, compression, traffic
from dalle_ds.tasks.transformer import TransformerTask

RUN = load_preset("dalle-12b", "transformer", TransformerRun)
SMALL = DalleConfig(width=64, depth=3, heads=2, text_len=8, grid=4, text_vocab=64, image_vocab=32)
NOTHING_KEPT = Buffers(live=0, reuse=0, persistent=0)


def stages(layout: Layout, config: DalleConfig) -> tuple[Stage, ...]:
    train = RecomputingTrainConfig(activation_checkpointing=layout.checkpointing)
    return stages_of(TransformerTask.planned(TransformerRun(model=config, train=train)), layout, "cuda")


def stage_of(layout: Layout, config: DalleConfig = RUN.model) -> Stage:
    return stages(layout, config)[0]


def sizes(transfers: tuple[Transfer, ...], axis: str) -> dict[str, int]:
    return {f"{t.what}, {t.operation}": t.size for t in transfers if t.axis == axis}


def test_sent_by_each_operation() -> None:
    transfer = Transfer("shard", "", "all-reduce", 4, 1000, 1, True)
    assert transfer.sent == 1500
    assert replace(transfer, operation="all-gather").sent == replace(transfer, operation="reduce-scatter").sent == 750
    assert replace(transfer, operation="send").sent == 1000
    assert replace(transfer, processes=1).sent == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_zero_3_gathers_twice_and_reduces_once_for_every_micro_batch(precision: str) -> None:
    layout = Layout(
        zero_stage=3,
        shards=4,
        precision=precision,  # type: ignore[arg-type]
        accumulation=3,
        buffers=NOTHING_KEPT,
    )
    stage = stage_of(layout, SMALL)
    found = sizes(traffic(stage, layout), "shard")
    matrices = 3 * 12 * 64**2
    rest = stage.parameters.count - matrices
    gathered = {"fp32": 4 * (matrices + rest), "bf16": 2 * (matrices + rest), "fp16": 2 * matrices + 4 * rest}
    assert found["weights, all-gather"] == 3 * 2 * gathered[precision]
    reduced = 2 if precision == "bf16" else 4
    assert found["gradients, reduce-scatter"] == 3 * reduced * stage.parameters.count


def test_what_zero_3_keeps_is_gathered_once() -> None:
    layout = Layout(zero_stage=3, shards=4, buffers=Buffers(live=10**9, reuse=0, persistent=0))
    stage = stage_of(layout, SMALL)
    assert sizes(traffic(stage, layout), "shard")["weights, all-gather"] == 4 * stage.parameters.count
    always = replace(layout, buffers=Buffers(persistent=10**6))
    found = sizes(traffic(stage, always), "shard")
    assert found["small weights, after the step, all-gather"] == 4 * stage.parameters.count
    assert "weights, all-gather" not in found


def test_stages_0_and_1_reduce_once_and_2_after_every_micro_batch() -> None:
    count = stage_of(Layout(shards=2), SMALL).parameters.count
    for stage, times in ((0, 1), (1, 1), (2, 3)):
        layout = Layout(zero_stage=stage, shards=2, accumulation=3)
        found = sizes(traffic(stage_of(layout, SMALL), layout), "shard")
        assert found["gradients, all-reduce"] == 4 * count * times
        assert found.get("updated weights, all-gather", 0) == (4 * count if stage else 0)


@pytest.mark.parametrize(("width", "heads", "rank"), [(1920, 30, 512), (2688, 42, 640), (3968, 62, 896)])
def test_the_papers_compression(width: int, heads: int, rank: int) -> None:
    """DALL·E Tables 1 and 2: factors of (5 d r m + 4 d r) / m² numbers for 12 d² / m; 1 − 5 r / 8 d is left out."""
    config = replace(RUN.model, width=width, heads=heads)
    layout = Layout(
        zero_stage=3, replicas=128, shards=8, precision="fp16", powersgd=PowerSGDConfig(enabled=True, transport="1-6-9")
    )
    stage = stage_of(layout, config)
    assert compression(stage) == pytest.approx(1 - 5 * rank / (8 * width), abs=1e-12)
    numbers = sum(shard.factor_numel for shard in stage.compressed)
    # Of Table 2's last line, the first is P's and the second Q's.
    assert numbers == 64 * ((5 * width * rank * 8 + 4 * width * rank) + (width * rank * 8 + 8 * width * rank)) / 8**2
    assert sizes(traffic(stage, layout), "replica")["factors of gradients, all-reduce"] == 2 * numbers


def test_replicas_exchange_what_a_process_owns() -> None:
    layout = Layout(zero_stage=3, replicas=4, shards=2)
    stage = stage_of(layout, SMALL)
    plain = sizes(traffic(stage, layout), "replica")["gradients, all-reduce"]
    assert plain == pytest.approx(4 * stage.parameters.count / 2, rel=0.01)
    whole = replace(layout, zero_stage=0)
    assert (
        sizes(traffic(stage_of(whole, SMALL), whole), "replica")["gradients, all-reduce"] == 4 * stage.parameters.count
    )


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_tensor_groups_exchange_as_much_with_positions_divided(checkpointing: str) -> None:
    plain = Layout(zero_stage=1, tensor=2, precision="bf16", micro_batch=2, checkpointing=checkpointing)  # type: ignore[arg-type]
    stage = stage_of(plain, SMALL)
    inside = 6 * 2 * (2 * 24) * 64 * 2  # 6 blocks, entry and exit, bf16
    # Beside blocks: embedded tokens, of text and of 15 codes, in bf16; hidden states' gradients, and over the vocabulary the
    # greatest logits, and two sums, in fp32.
    embedded, hidden, sums = 2 * 23 * 64 * 2, 2 * 24 * 64 * 4, 2 * 24 * 3 * 4
    found = sizes(traffic(stage, plain), "tensor")
    assert found == {"activations, all-reduce": inside + embedded + hidden + sums}
    divided = replace(plain, sequence=True)
    found = sizes(traffic(stage_of(divided, SMALL), divided), "tensor")
    again = inside // 2 if checkpointing == "full" else 0  # entries are gathered once more
    stream = 2 * 24 * 64 * 4  # gathered: gradients of embeddings, hidden states; scattered: gradients of these
    assert found["activations, all-gather"] == inside + again + 2 * stream
    assert found["activations, reduce-scatter"] == inside + stream


def test_pipelines_send_the_stream_both_ways() -> None:
    layout = Layout(zero_stage=1, pipe=3, micro_batch=2, accumulation=5)
    stream, tokens = 5 * 2 * 24 * 64 * 4, 5 * 2 * 24 * 8
    sent = [sum(transfer.sent for transfer in traffic(stage, layout)) for stage in stages(layout, SMALL)]
    assert sent == [stream + tokens, 2 * stream + tokens, stream]


def test_bucket_is_that_of_the_reduction() -> None:
    pytest.importorskip("deepspeed")
    from dalle_ds.training.replicas import BUCKET

    assert BUCKET == REPLICA_BUCKET
