"""Layers dealt out to the stages of a pipeline."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from dalle_ds.config import DalleConfig
from dalle_ds.models import Dalle
from dalle_ds.models.flops import layer_flops, model_flops
from dalle_ds.models.pipeline import pipeline_layers
from dalle_ds.parallel.stages import balanced
from tests.conftest import TINY_DALLE


@pytest.mark.parametrize("seed", range(30))
def test_no_other_way_has_a_cheaper_costliest_stage(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 9)
    stages = rng.randint(1, count)
    costs = [rng.choice([0.0, 1.0, rng.random(), 10 * rng.random()]) for _ in range(count)]

    def costliest(bounds: list[int]) -> float:
        return max(sum(costs[first:last]) for first, last in itertools.pairwise(bounds))

    bounds = balanced(costs, stages)
    assert bounds[0] == 0 and bounds[-1] == count and len(bounds) == stages + 1
    assert all(first < last for first, last in itertools.pairwise(bounds)), "no stage may be empty"
    ways = itertools.combinations(range(1, count), stages - 1)
    assert costliest(bounds) == pytest.approx(min(costliest([0, *way, count]) for way in ways))


def test_layers_are_those_of_the_plain_model() -> None:
    torch.manual_seed(5)
    plain = Dalle(TINY_DALLE).state_dict()
    torch.manual_seed(5)
    layers = {layer.name: layer.build() for layer in pipeline_layers(TINY_DALLE)}
    dealt = {prefix + name: value for prefix, module in layers.items() for name, value in module.state_dict().items()}
    assert list(dealt) == list(plain)
    for name, value in plain.items():
        assert torch.equal(dealt[name], value), name


def test_layers_in_turn_compute_what_the_plain_model_does() -> None:
    torch.manual_seed(5)
    plain = Dalle(TINY_DALLE)
    text = torch.randint(0, TINY_DALLE.text_vocab, (2, TINY_DALLE.text_len))
    codes = torch.randint(0, TINY_DALLE.image_vocab, (2, TINY_DALLE.image_len))
    torch.manual_seed(5)
    values = (text, codes)
    for layer in pipeline_layers(TINY_DALLE):
        values = layer.run(layer.build(), values)
    assert torch.equal(values.loss, plain(text, codes, logits=False).loss)  # type: ignore[attr-defined]


def test_costs_are_those_of_a_forward_pass() -> None:
    """A third of what training counts; attention computes more pairs than masks allow, embeddings are counted here only."""
    config = DalleConfig(width=512, depth=8, heads=8)
    costs, counted = layer_flops(config), model_flops(config)
    assert sum(costs[1:]) == pytest.approx(counted.total / 3, rel=0.05)
    assert costs[-1] == counted.heads / 3


def test_the_heads_take_a_share_of_the_last_stage() -> None:
    """At a small width they cost as much as several blocks."""
    config = DalleConfig(width=512, depth=8, heads=8)
    first, *_, last = itertools.pairwise(balanced(layer_flops(config), 4))
    assert first[1] - first[0] > last[1] - last[0]
