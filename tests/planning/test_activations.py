"""What is planned for activations is what autograd keeps."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dalle_ds.config import DalleConfig
from dalle_ds.models import Dalle, DiscreteVAE
from dalle_ds.planning.activations import dvae_activations, transformer_activations
from dalle_ds.planning.layout import Layout
from tests.conftest import ROOT, TINY_DVAE


def test_every_precision_and_policy_within_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    checks = list(importlib.import_module("plan_check").check_activations())
    assert len(checks) == 3 * 3 * 3
    for check in checks:
        assert abs(check.error) < 0.1, check
        if check.what.startswith("kept"):
            assert abs(check.error) < 0.03, check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_recomputation_it_is_what_hooks_on_saved_tensors_see(dtype: torch.dtype) -> None:
    config = DalleConfig(width=128, depth=2, heads=2, text_len=32, grid=8, text_vocab=64, image_vocab=64)
    model = Dalle(config).to(dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    text = torch.zeros(3, config.text_len, dtype=torch.int64)
    codes = torch.zeros(3, config.image_len, dtype=torch.int64)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(text, codes, logits=False)
    precision = "fp32" if dtype == torch.float32 else "bf16"
    layout = Layout(precision=precision, micro_batch=3)  # type: ignore[arg-type]
    plan = transformer_activations(config, layout, range(4), last=True, device="cpu")
    assert plan.kept + plan.loss_kept == pytest.approx(sum(saved.values()), rel=0.03)
    del output


def test_a_tensor_group_keeps_its_part_and_with_sequence_its_positions() -> None:
    config = DalleConfig(width=64, depth=1, heads=2, text_len=8, grid=4, text_vocab=32, image_vocab=32)
    positions, width = 24, 64

    def kept(tensor: int, sequence: bool, blocks: range) -> int:
        layout = Layout(tensor=tensor, sequence=sequence)
        return transformer_activations(config, layout, blocks, last=False, device="cpu").kept

    attention, mlp = range(1), range(1, 2)
    stream, statistics, logarithms = 4 * width, 8, 4 * config.heads
    assert kept(1, False, attention) == positions * (stream + statistics + 5 * 4 * width + logarithms)
    assert kept(2, False, attention) == positions * (
        stream + statistics + 4 * width + (4 * 4 * width + logarithms) // 2
    )
    assert kept(2, True, mlp) == positions * ((stream + statistics) // 2 + 4 * width + 2 * 4 * 4 * width // 2)


def test_dvae_keeps_what_hooks_on_saved_tensors_see() -> None:
    model = DiscreteVAE(TINY_DVAE)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.rand(2, 3, 16, 16)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(images, 1.0, torch.rand(2, 32, 4, 4))
    assert dvae_activations(TINY_DVAE, 2, 4).kept == pytest.approx(sum(saved.values()), rel=0.02)
    del output
