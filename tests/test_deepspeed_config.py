"""The DeepSpeed JSON against the run: what is filled in, and what is refused with which words."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dalle_ds.config import OptimConfig, ParallelConfig, PowerSGDConfig, Run, TrainConfig
from dalle_ds.config.deepspeed import is_auto, load_deepspeed_json, resolve, with_precision
from dalle_ds.errors import ConfigError
from tests.conftest import ROOT

UNKNOWN_TO_US = {"wall_clock_breakdown": True, "comms_logger": {"enabled": False}, "communication_data_type": "fp32"}


def test_other_keys_go_to_deepspeed_as_they_are() -> None:
    complete = resolve(UNKNOWN_TO_US, run(), 1).deepspeed
    assert {name: complete[name] for name in UNKNOWN_TO_US} == UNKNOWN_TO_US


def run(clip: float | None = 4.0, **train: Any) -> Run:
    return Run(train=TrainConfig(**{"batch_size": 32, **train}), optim=OptimConfig(clip=clip))


def test_what_the_json_leaves_open_comes_from_the_run() -> None:
    config = resolve({"train_batch_size": "auto", "zero_optimization": {"stage": 2}}, run(micro_batch=4), world_size=2)
    assert (config.micro_batch, config.accumulation, config.zero_stage, config.precision) == (4, 4, 2, "fp32")
    complete = config.deepspeed
    assert complete["train_batch_size"] == 32
    assert complete["train_micro_batch_size_per_gpu"] == 4
    assert complete["gradient_accumulation_steps"] == 4
    assert complete["gradient_clipping"] == 0.0, "the trainer clips, not DeepSpeed"


def test_the_callers_json_is_not_changed() -> None:
    given = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    before = json.dumps(given)
    resolve(given, run(), 2)
    assert json.dumps(given) == before


def test_without_a_micro_batch_there_is_no_accumulation() -> None:
    config = resolve({}, run(), world_size=4)
    assert (config.micro_batch, config.accumulation) == (8, 1)


def test_sums_of_bf16_gradients_are_kept_in_fp32() -> None:
    config = resolve({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, run(), 1)
    assert config.precision == "bf16"
    assert config.deepspeed["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("json_config", "fields", "world_size", "words"),
    [
        ({"train_batch_size": 64}, {}, 2, '"train_batch_size": 64.*make it 32'),
        ({"gradient_accumulation_steps": 3}, {"micro_batch": 8}, 2, '"gradient_accumulation_steps": 3.*make it 2'),
        ({"train_micro_batch_size_per_gpu": 4}, {"micro_batch": 8}, 1, "train.micro_batch=8.*: 4"),
        ({}, {}, 3, "train.batch_size=32 cannot be divided among 3 processes"),
        ({}, {"micro_batch": 16}, 4, "train.micro_batch=16 × 4 processes"),
        ({"bf16": {"enabled": True}}, {"precision": "fp32"}, 1, "train.precision=fp32 but.*bf16"),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, 1, "train.precision=bf16 but.*fp32"),
        ({"zero_optimization": {"stage": 1}}, {"zero_stage": 3}, 1, "train.zero_stage=3 but.*says 1"),
        ({"zero_optimization": {"stage": 4}}, {}, 1, "must be 0, 1, 2 or 3, found 4"),
        ({"gradient_clipping": 1.0}, {}, 1, '"gradient_clipping": 1.0.*optim.clip is 4.0'),
        ({"optimizer": {"type": "Adam"}}, {}, 1, '"optimizer".*optim section.*remove it'),
        ({"scheduler": {}}, {}, 1, '"scheduler".*remove it'),
        ({"torch_autocast": {"enabled": True}}, {}, 1, '"torch_autocast".*train.precision.*remove it'),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, {}, 1, 'both "fp16" and "bf16"'),
        ({"fp16": {"enabled": True}}, {"precision": "bf16"}, 1, "train.precision=bf16 but.*fp16"),
        ({"fp16": {"enabled": True, "initial_scale_power": 16}}, {}, 1, '"fp16.initial_scale_power".*scaling section'),
        (
            {"fp16": {"enabled": True}, "communication_data_type": "fp16"},
            {},
            1,
            '"communication_data_type".*leave it out',
        ),
        ({"fp16": {"enabled": True, "loss_scale": 0}}, {}, 1, '"fp16.loss_scale".*remove it'),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            {},
            1,
            '"nvme".*set it to "cpu"',
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, {}, 1, "ratio"),
        ({"zero_optimizations": {"stage": 3}}, {}, 1, 'did you mean "zero_optimization"'),
        ({"bf16": {"enabled": 1}}, {}, 1, "must be true or false, found 1"),
        ({"train_micro_batch_size_per_gpu": "2"}, {}, 1, 'must be a whole number of at least 1 or "auto"'),
        (
            {"bf16": {"enabled": True}},
            {"micro_batch": 8},
            1,
            "bf16 with ZeRO-0 would sum .* of 4 micro-batches in bf16",
        ),
        ({"bf16": True}, {}, 1, '"bf16" in the DeepSpeed JSON must be an object'),
    ],
)
def test_contradictions_are_refused_with_both_sides_named(
    json_config: dict[str, Any], fields: dict[str, Any], world_size: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(json_config, run(**fields), world_size)


def test_every_json_of_a_stage_and_a_precision_works_with_one_and_two_processes() -> None:
    files = sorted((ROOT / "ds_configs").glob("zero*.json"))
    assert len(files) >= 8
    for file in files:
        stage, precision = file.stem.split("_")
        for world_size in (1, 2):
            json_config = load_deepspeed_json(file)
            assert is_auto(json_config, run()) == (precision == "auto")
            for chosen in ("bf16", "fp32") if precision == "auto" else (precision,):
                config = resolve(with_precision(json_config, chosen), run(), world_size)
                assert (f"zero{config.zero_stage}", config.precision) == (stage, chosen)


def test_a_missing_or_broken_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: there is no such file"):
        load_deepspeed_json(tmp_path / "nowhere.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{,}")
    with pytest.raises(ConfigError, match=r"broken\.json is not valid JSON"):
        load_deepspeed_json(broken)
    broken.write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object, found list"):
        load_deepspeed_json(broken)


@pytest.mark.parametrize("section", [{"enabled": True}, {"enabled": True, "loss_scale": 1}])
def test_fp16_is_an_fp32_engine_around_blocks_that_cast(section: dict) -> None:
    config = resolve({"fp16": section, "zero_optimization": {"stage": 3}}, run(), 1)
    assert config.precision == "fp16"
    assert config.deepspeed["fp16"] == {"enabled": False} and config.deepspeed["bf16"] == {"enabled": False}


def test_pipelines_are_refused_what_they_cannot_do() -> None:
    piped = replace(run(), parallel=ParallelConfig(pipe=2))
    assert resolve({}, piped, 2).zero_stage == 1
    assert resolve({"zero_optimization": {"compute_grad_norm": True}}, piped, 2).deepspeed["zero_optimization"] == {
        "stage": 1,
        "compute_grad_norm": False,
    }
    for stage in (0, 2, 3):
        with pytest.raises(ConfigError, match=rf"parallel\.pipe=2 with ZeRO-{stage}.*stage\" to 1"):
            resolve({"zero_optimization": {"stage": stage}}, piped, 2)
    offloaded = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match=r"offload_optimizer.*parallel\.pipe=2"):
        resolve(offloaded, piped, 2)


def test_a_pipeline_gets_several_micro_batches_for_each_stage() -> None:
    piped = replace(run(), train=TrainConfig(batch_size=64), parallel=ParallelConfig(pipe=2))
    config = resolve({}, piped, 4)
    assert (config.micro_batch, config.accumulation) == (4, 8)


def test_batches_are_divided_among_processes_with_data_of_their_own() -> None:
    divided = replace(run(), train=TrainConfig(batch_size=12), parallel=ParallelConfig(replicas=3, tensor=2))
    config = resolve({"zero_optimization": {"stage": 3}}, divided, 12)
    assert (config.micro_batch, config.accumulation) == (2, 1)
    assert config.deepspeed["train_batch_size"] == 4, "DeepSpeed knows of one replica"
    with pytest.raises(ConfigError, match=r"train\.batch_size=10 cannot be divided among 6 data-parallel processes"):
        resolve({}, replace(divided, train=TrainConfig(batch_size=10)), 12)


def test_compression_needs_zero_3_and_a_rank_that_can_be_shared_out() -> None:
    compressed = replace(
        run(),
        train=TrainConfig(batch_size=8),
        parallel=ParallelConfig(replicas=2),
        powersgd=PowerSGDConfig(enabled=True, rank=6),
    )
    resolve({"zero_optimization": {"stage": 3}}, compressed, 4)
    with pytest.raises(ConfigError, match=r"powersgd\.enabled with ZeRO-2.*stage\" to 3"):
        resolve({"zero_optimization": {"stage": 2}}, compressed, 4)
    with pytest.raises(ConfigError, match=r"powersgd\.rank=6 cannot be shared out to the 4 processes"):
        resolve({"zero_optimization": {"stage": 3}}, compressed, 8)
