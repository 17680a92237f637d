"""Who does what: places of ranks, groups, and layouts that are refused."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from dalle_ds.config import DalleConfig, ParallelConfig, PowerSGDConfig, TransformerRun
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import WHOLE, Mesh
from tests.conftest import TINY_DALLE


def mesh(rank: int, world_size: int, **degrees: Any) -> Mesh:
    """One that does not communicate."""
    return Mesh(rank, world_size, torch.device("cpu"), ParallelConfig(**degrees))


def test_neighbours_share_a_tensor_group_and_machines_a_replica() -> None:
    """16 processes on two machines: replicas are machines, and tensor groups pairs of neighbours."""
    fifth = mesh(5, 16, replicas=2, tensor=2)
    assert fifth.sizes == (2, 1, 4, 2) and fifth.place == (0, 0, 2, 1)
    assert fifth.ranks("tensor") == [4, 5]
    assert fifth.ranks("shard") == [1, 3, 5, 7]
    assert fifth.ranks("replica") == [5, 13]
    assert fifth.ranks("data") == [1, 3, 5, 7, 9, 11, 13, 15]
    assert fifth.index("data") == 2 and mesh(13, 16, replicas=2, tensor=2).index("data") == 6
    assert fifth.ranks("world") == list(range(16))


@pytest.mark.parametrize("degrees", [{"pipe": 2, "tensor": 2}, {"pipe": 4}, {"tensor": 4}, {"pipe": 2}])
def test_ranks_are_arranged_as_deepspeed_pipelines_have_them(degrees: dict[str, int]) -> None:
    one = mesh(0, 8, **degrees)
    topology = PipeModelDataParallelTopology(
        num_pp=one.size("pipe"), num_mp=one.size("tensor"), num_dp=one.size("shard")
    )
    for rank in range(8):
        ours, theirs = mesh(rank, 8, **degrees), topology.get_coord(rank)
        assert (ours.index("pipe"), ours.index("shard"), ours.index("tensor")) == (
            theirs.pipe,
            theirs.data,
            theirs.model,
        )
        names: dict[Any, str] = {"pipe": "pipe", "shard": "data", "tensor": "model"}
        for axis, name in names.items():
            lists = topology.get_axis_comm_lists(name) or [[rank]]
            assert ours.ranks(axis) in lists


def test_every_axis_divides_all_ranks_into_groups_of_its_size() -> None:
    for axis in ("world", "data", "replica", "pipe", "shard", "tensor", "model"):
        groups = {tuple(mesh(rank, 24, replicas=3, tensor=2).ranks(axis)) for rank in range(24)}
        assert sorted(rank for group in groups for rank in group) == list(range(24))
        assert {len(group) for group in groups} == {mesh(0, 24, replicas=3, tensor=2).size(axis)}


def test_it_is_deepspeeds_mpu() -> None:
    fifth = mesh(5, 16, replicas=2, tensor=2)
    assert fifth.get_data_parallel_world_size() == 4 and fifth.get_data_parallel_rank() == 2
    assert fifth.get_model_parallel_world_size() == fifth.get_tensor_model_parallel_world_size() == 2
    assert fifth.get_model_parallel_rank() == fifth.get_tensor_model_parallel_rank() == 1
    assert fifth.get_data_parallel_group_ranks() == [1, 3, 5, 7]


def test_a_process_of_its_own_draws_without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Mesh.tensor_group("cpu") is WHOLE


def test_a_run_in_this_process_is_not_that_of_processes_started_from_it() -> None:
    before = dict(os.environ)
    with pytest.raises(ConfigError, match="device must be"):
        Mesh.start("none")
    mesh = Mesh.start("cpu")
    changed = set(os.environ.items()) - set(before.items())
    mesh.stop()
    assert mesh.world_size == 1
    assert changed <= {("LOCAL_RANK", "0"), ("DS_ACCELERATOR", "cpu")}  # which DeepSpeed reads


def test_it_says_how_processes_are_arranged() -> None:
    assert mesh(0, 1).describe() == "1 × cpu"
    assert mesh(0, 8).describe() == "8 × cpu"
    assert mesh(0, 16, replicas=2, tensor=2).describe() == "16 × cpu (2 replicas × 4 shards × 2 tensor parts)"


@pytest.mark.parametrize(
    ("degrees", "model", "sentence"),
    [
        ({"tensor": 4}, {"heads": 2}, r"model\.heads=2 cannot be divided among parallel\.tensor=4 processes"),
        ({"tensor": 2}, {"text_vocab": 401}, r"model\.text_vocab=401 cannot be divided among parallel\.tensor=2"),
        ({"tensor": 2}, {"image_vocab": 33}, r"model\.image_vocab=33"),
        ({"tensor": 2, "sequence": True}, {"text_len": 7}, r"23 positions .*model\.text_len=7 \+ model\.grid=4²"),
        ({"pipe": 16}, {}, r"parallel\.pipe=16 is more than the model's 8 residual blocks"),
    ],
)
def test_what_does_not_come_out_even_is_refused(degrees: Any, model: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        mesh(0, 16, **degrees).check(dataclasses.replace(TINY_DALLE, **model))


def test_what_comes_out_even_is_not_refused() -> None:
    mesh(0, 16, tensor=2, pipe=8).check(TINY_DALLE)
    mesh(0, 1024, tensor=2, pipe=8).check(DalleConfig())


def test_degrees_must_divide_the_processes() -> None:
    with pytest.raises(
        ConfigError, match=r"parallel\.replicas=2 × parallel\.pipe=1 × parallel\.tensor=3 = 6 does not divide"
    ):
        mesh(0, 8).divide(ParallelConfig(replicas=2, tensor=3))


@pytest.mark.parametrize(
    ("degrees", "sentence"),
    [
        ({"pipe": 2, "replicas": 2}, "set one of them to 1"),
        ({"sequence": True}, r"parallel\.tensor processes, which is 1"),
        ({"tensor": 0}, r"parallel\.tensor must be greater than 0"),
    ],
)
def test_degrees_that_make_no_sense_are_refused(degrees: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ParallelConfig(**degrees)


def test_compression_needs_replicas() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.replicas is 1"):
        TransformerRun(powersgd=PowerSGDConfig(enabled=True))
