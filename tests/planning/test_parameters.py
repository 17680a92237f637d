"""Parameters are those of the real models, piece by piece and stage by stage."""

from __future__ import annotations

import random

import pytest
import torch

from dalle_ds.config import DalleConfig, DvaeRun, TransformerRun, load_preset
from dalle_ds.models import Dalle, DiscreteVAE
from dalle_ds.models.pipeline import pipeline_layers
from dalle_ds.parallel import TensorGroup
from dalle_ds.parallel.stages import balanced
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.parameters import (
    Parameter,
    ParameterSet,
    dvae_parameters,
    touched,
    transformer_parameters,
    updated_by_group,
)
from dalle_ds.planning.stages import stages_of
from tests.conftest import TINY_DALLE, TINY_DVAE


def roles(parameters: ParameterSet) -> dict[str, int]:
    counts: dict[str, int] = {}
    for parameter in parameters:
        counts[parameter.role] = counts.get(parameter.role, 0) + parameter.numel
    return counts


@pytest.mark.parametrize("tensor", [1, 2])
def test_as_many_as_in_the_model(tensor: int) -> None:
    model = Dalle(TINY_DALLE, tensor=TensorGroup(tensor - 1, tensor))
    planned = transformer_parameters(TINY_DALLE, tensor)
    assert {p.name: p.shape for p in planned} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert planned.count == sum(p.numel() for p in model.parameters())


def test_the_papers_twelve_billion() -> None:
    config = load_preset("dalle-12b", "transformer", TransformerRun).model
    planned = transformer_parameters(config)
    matrices = sum(p.numel for p in planned if p.role == "blocks" and len(p.shape) == 2)
    assert matrices == 64 * 12 * 3968**2
    found = roles(planned)
    assert found["blocks"] / 1e9 == pytest.approx(12.09, abs=0.01)
    tokens = 16384 + 8192
    assert found["heads"] == tokens * (3968 + 1) + 2 * 3968
    assert found["embeddings"] == (tokens + 2 * 256 + 2 * 32 + 2) * 3968


def test_two_parts_have_all_that_is_divided_once_and_the_rest_twice() -> None:
    whole, part = transformer_parameters(TINY_DALLE), transformer_parameters(TINY_DALLE, 2)
    divided = sum(p.numel for p in part if p.is_divided)
    assert 2 * divided + (part.count - divided) == whole.count


def test_dvae_has_the_releases_parameters() -> None:
    released = load_preset("dalle-12b", "dvae", DvaeRun).model
    assert roles(dvae_parameters(released)) == {"encoder": 53_786_240, "decoder": 43_829_766}
    model = DiscreteVAE(TINY_DVAE)
    assert dvae_parameters(TINY_DVAE).count == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("pipe", [2, 3, 4])
def test_stages_hold_what_the_pipeline_deals_out(pipe: int) -> None:
    stages = stages_of(TransformerRun(model=TINY_DALLE), Layout(pipe=pipe, zero_stage=1), "cpu")
    with torch.device("meta"):
        layers = pipeline_layers(TINY_DALLE)
        bounds = balanced([layer.cost for layer in layers], pipe)
        for stage in stages:
            own = layers[bounds[stage.number] : bounds[stage.number + 1]]
            names = {layer.name + name for layer in own for name, _ in layer.build().named_parameters()}
            assert {parameter.name for parameter in stage.parameters} == names
    assert sum(stage.parameters.count for stage in stages) == transformer_parameters(TINY_DALLE).count


def made_up(sizes: list[list[int]]) -> ParameterSet:
    return ParameterSet(
        tuple(
            Parameter(f"{group}.{number}", (size,), "blocks", str(group), group, False, False, 1)
            for group, of_group in enumerate(sizes)
            for number, size in enumerate(of_group)
        )
    )


def test_updated_elements_are_what_zero_cuts() -> None:
    parameters = made_up([[10, 7], [3]])
    assert updated_by_group(parameters, 0, 4) == (17, 3)
    assert updated_by_group(parameters, 3, 4) == (3 + 2, 1)  # each parameter by itself
    assert updated_by_group(parameters, 1, 4) == (6, 2)  # groups of 24 and 8, aligned to two elements a process


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
        assert touched(made_up(sizes), shards) == most


def test_no_random_numbers_are_drawn_nor_memory_taken() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    config = DalleConfig(width=64, depth=2, heads=2, text_len=4, grid=4, text_vocab=32, image_vocab=32)
    transformer_parameters(config)
    assert torch.equal(before, torch.get_rng_state())
