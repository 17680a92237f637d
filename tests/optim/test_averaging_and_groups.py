"""Iterate averaging against torch's own, and which parameters are decayed."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dalle_ds.config import ClipConfig, ClipRun, DvaeRun, OptimConfig
from dalle_ds.errors import ConfigError
from dalle_ds.models import Clip, Dalle, DiscreteVAE
from dalle_ds.optim import AdamW, WeightAverage, decay_groups, resblock_groups
from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Task
from dalle_ds.tasks.clip import ClipTask
from dalle_ds.tasks.dvae import DvaeTask
from tests.conftest import TINY_DALLE, TINY_DVAE


def test_from_some_thousand_updates_on_the_average_is_torchs() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    average = WeightAverage(list(model.parameters()), decay=0.9)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(model)  # torch's first update copies
    for step in range(1000, 1020):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        reference.update_parameters(model)
    for ours, theirs in zip(average.averages, reference.module.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_first_random_weights_are_forgotten_early() -> None:
    shard = torch.full((4,), 100.0)
    average = WeightAverage([shard], decay=0.999)
    shard.zero_()
    for step in range(30):
        average.update(step)
    assert average.averages[0].max() < 1.0  # with a constant 0.999 it would still be 97


def test_swapping_twice_changes_no_bit() -> None:
    torch.manual_seed(0)
    shards = [torch.randn(7), torch.randn(3)]
    average = WeightAverage(shards, decay=0.5)
    for shard in shards:
        shard.mul_(1.1)
    weights, averages = [s.clone() for s in shards], [a.clone() for a in average.averages]
    average.swap()
    assert all(torch.equal(s, a) for s, a in zip(shards, averages, strict=True))
    average.swap()
    assert all(torch.equal(s, w) for s, w in zip(shards, weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(average.averages, averages, strict=True))


def test_the_first_weights_are_taken_in_with_a_decay_of_a_tenth() -> None:
    shard = torch.zeros(3)
    average = WeightAverage([shard], decay=0.99)
    shard.fill_(1.0)
    average.update(0)
    assert average.averages[0].tolist() == pytest.approx([1 - 1 / 10] * 3)
    shard.fill_(2.0)
    average.update(1)
    assert average.averages[0].tolist() == pytest.approx([0.9 + (2 - 0.9) * (1 - 2 / 11)] * 3)


def test_every_25th_weights_are_taken_in_as_every_time_by_an_average_of_those() -> None:
    torch.manual_seed(0)
    shard = torch.zeros(5)
    average, reference = WeightAverage([shard], decay=0.99, every=25), WeightAverage([shard], decay=0.99)
    for step in range(200):
        shard.add_(torch.randn(5))
        average.update(step)
        if step % 25 == 24:
            reference.update(step // 25)
    assert torch.equal(average.averages[0], reference.averages[0])
    assert not torch.equal(average.averages[0], shard)


def test_an_average_on_the_host_is_the_same_however_late_it_is_added() -> None:
    torch.manual_seed(0)
    shards = [torch.randn(1000), torch.randn(3)]
    here, host = WeightAverage(shards, 0.9, every=2), WeightAverage(shards, 0.9, every=2, device="cpu")
    for step in range(21):
        host.before_step()
        for shard in shards:
            shard.add_(torch.randn_like(shard))  # while the last ones may still be being added
        for each in (here, host):
            each.update(step)
    assert all(torch.equal(a, b) for a, b in zip(here.averages, host.averages, strict=True))
    host.swap()
    assert all(torch.equal(s, a) for s, a in zip(shards, here.averages, strict=True))


def test_until_the_first_are_taken_in_there_is_no_average() -> None:
    average = WeightAverage([torch.zeros(2)], 0.99, every=25)
    assert [average.begun(steps) for steps in (0, 24, 25, 26)] == [False, False, True, True]


def names(model: nn.Module, group: dict) -> set[str]:
    wanted = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_weight_matrices_decay_and_gains_biases_and_embeddings_do_not() -> None:
    model = Dalle(TINY_DALLE)
    decayed, plain = decay_groups(model, 0.045)
    assert decayed["weight_decay"] == 0.045 and plain["weight_decay"] == 0.0
    decayed_names, plain_names = names(model, decayed), names(model, plain)
    assert decayed_names | plain_names == {name for name, _ in model.named_parameters()}
    assert not decayed_names & plain_names
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed_names)
    assert not any(name.startswith("embedding.") for name in decayed_names)
    assert all("norm" in name or name.endswith(".bias") or name.startswith("embedding.") for name in plain_names)
    decayed, plain = decay_groups(DiscreteVAE(TINY_DVAE), 1e-4)
    assert {parameter.ndim for parameter in decayed["params"]} == {4}
    assert {parameter.ndim for parameter in plain["params"]} == {1}


def test_each_residual_block_has_its_own_groups_and_only_its_matrices_have_16_bit_moments() -> None:
    model = Dalle(TINY_DALLE)
    groups = resblock_groups(model, list(model.blocks), OptimConfig(moments="16-bit"))
    seen: set[str] = set()
    for group in groups:
        members = names(model, group)
        assert not seen & members
        seen |= members
        inside = {f"blocks.{name.split('.')[1]}" for name in members if name.startswith("blocks.")}
        assert inside == (set() if group["block"] is None else {f"blocks.{group['block']}"})
        is_matrix = all(dict(model.named_parameters())[name].ndim == 2 for name in members)
        assert group["moments"] == ("16-bit" if is_matrix and group["block"] is not None else "fp32")
        embeds = any("embedding" in name for name in members)
        assert group["weight_decay"] == (OptimConfig().weight_decay if is_matrix and not embeds else 0.0)
    assert seen == {name for name, _ in model.named_parameters()}
    assert [group["block"] for group in groups] == [n // 2 for n in range(2 * len(model.blocks))] + [None, None]


def test_16_bit_moments_are_those_of_the_matrices_of_residual_blocks_in_every_task() -> None:
    optim = OptimConfig(moments="16-bit")
    small_clip = ClipConfig(embed_dim=8, image_size=8, patch_size=4, vision_width=16, vision_depth=2, vision_heads=2,
                            text_width=16, text_depth=2, text_heads=2, text_len=6, text_vocab=30)  # fmt: skip
    dvae, clip = DvaeTask(DvaeRun(model=TINY_DVAE, optim=optim)), ClipTask.__new__(ClipTask)
    clip.run = ClipRun(model=small_clip, optim=optim)
    for task, model, inside in (
        (dvae, DiscreteVAE(TINY_DVAE), r"\.block_\d+\..*\.w$"),
        (clip, Clip(small_clip), r"\.layers\.\d+\..*weight$"),
    ):
        groups = task.parameter_groups(model)
        small = [name for group in groups if group.get("moments") == "16-bit" for name in names(model, group)]
        expected = {n for n, p in model.named_parameters() if re.search(inside, n) and p.ndim >= 2}
        assert expected and sorted(small) == sorted(expected)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        optimizer = AdamW(groups, second_moment_clip=None)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
        halves = {n for n, p in model.named_parameters() if optimizer.state[p]["exp_avg"].element_size() == 2}
        assert halves == expected
        task.run = dataclasses.replace(task.run, optim=OptimConfig())
        assert not any(group.get("moments", "fp32") == "16-bit" for group in task.parameter_groups(model))


def test_16_bit_moments_of_a_model_without_residual_blocks_are_refused() -> None:
    class Plain(DvaeTask):
        residual_blocks = Task.residual_blocks

    task = Plain(DvaeRun(optim=OptimConfig(moments="16-bit")))
    with pytest.raises(ConfigError, match=r"optim\.moments=16-bit"):
        task.check_layout(Mesh(0, 1, torch.device("cpu")), 8, "fp32")
