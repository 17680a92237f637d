"""What a CUDA graph demands of a step, with one for the CPU: recorded operators, called again on the recorded tensors."""

from __future__ import annotations

import contextlib
import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle_ds.config import DalleConfig, PriorConfig
from dalle_ds.models import inference
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.decoding import DecodingWeights, new_cache, prefill
from dalle_ds.models.prior import Caption, DiffusionPrior
from dalle_ds.models.prior_sampling import CachedPrior, DenoisingWeights
from dalle_ds.nn.attention.decoding import KVCache
from dalle_ds.sampling import Sampling, SamplingRequest, sample_codes

CONFIG = DalleConfig(
    width=32, depth=4, heads=4, text_len=6, grid=4, text_vocab=20, image_vocab=16, kernel=3, mask_padding=True
)
TEXT = torch.tensor([[3, 1, 4, -1, -1, -1], [2, 7, 1, 8, 2, 8], [-1] * 6])


class Recording(TorchDispatchMode):
    """Operators with the tensors that they read and the tensors that hold their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        read = {_address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor) and _address(value) not in read]
        self.calls.append((function, args, kwargs or {}, made))
        return result

    def replay(self) -> None:
        for function, args, kwargs, made in self.calls:
            result = function(*args, **kwargs)
            if made:
                for old, new in zip(made, (v for v in tree_leaves(result) if isinstance(v, Tensor)), strict=True):
                    old.copy_(new)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[KVCache | CachedPrior]]:
    """Steps are replayed from now on; the caches that one was recorded for."""
    recorded: list[weakref.ref[KVCache | CachedPrior]] = []

    def capture(graph: Any, compute: Any, inputs: tuple[Tensor, ...]) -> None:
        recorded.append(weakref.ref(compute.keywords["cache"] if isinstance(compute, partial) else compute.__self__))
        compute(*inputs)
        graph.graph = Recording()
        with graph.graph:
            graph.output = compute(*inputs)

    monkeypatch.setattr(inference, "_packed", lambda weight: None)  # its storage cannot be told apart
    monkeypatch.setattr(inference.StepGraph, "_capture", capture)
    monkeypatch.setattr(DecodingWeights, "step", DecodingWeights.step_by_graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return recorded


@pytest.fixture
def model() -> Dalle:
    torch.manual_seed(0)
    model = Dalle(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_pictures_of_replayed_steps(
    model: Dalle, guidance: float, captures: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch after batch with other captions, for which a cache is loaded anew and its graph is used again."""
    options = {"num": 4, "sampling": Sampling(guidance=guidance), "batch_size": 4, "seed": 2}
    found = sample_codes(model, TEXT, SamplingRequest(**options))
    assert len(captures) == (1 if guidance == 1 else 2)  # the empty caption guides itself, as one prompt
    monkeypatch.setattr(DecodingWeights, "step", DecodingWeights.step_of_number)
    assert torch.equal(found, sample_codes(model, TEXT, SamplingRequest(**options)))


@torch.no_grad()
def test_each_step_has_logits_of_its_own(model: Dalle, captures: list) -> None:
    weights, cache = DecodingWeights(model), new_cache(model, 3)
    prefill(model, TEXT, cache)
    first = weights.step(torch.tensor([1, 2, 3]), 0, cache)
    kept = first.clone()
    second = weights.step(torch.tensor([3, 2, 1]), 1, cache)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert len(captures) == 1


@torch.no_grad()
def test_each_cache_has_a_graph_of_its_own(model: Dalle, captures: list) -> None:
    weights = DecodingWeights(model)
    caches = [new_cache(model, 3) for _ in range(2)]
    for cache, text in zip(caches, (TEXT, TEXT.flip(0)), strict=True):
        prefill(model, text, cache)
    codes = torch.tensor([1, 2, 3])
    found = [weights.step(codes, 0, cache) for cache in caches]
    assert len(captures) == 2
    expected = [weights.step_of_number(codes, 0, cache) for cache in caches]
    torch.testing.assert_close(found, expected)
    assert not torch.equal(*found)


def test_a_graph_neither_keeps_its_cache_nor_outlives_it(model: Dalle, captures: list) -> None:
    """Without the help of the garbage collector, which comes when it likes."""
    gc.disable()
    try:
        sample_codes(model, TEXT, SamplingRequest(num=5, batch_size=4))  # batches that share prompts differently
        assert len(captures) > 2
        assert all(cache() is None for cache in captures)
    finally:
        gc.enable()


@torch.no_grad()
def test_a_priors_replayed_steps(captures: list) -> None:
    torch.manual_seed(0)
    prior = DiffusionPrior(PriorConfig(width=32, depth=2, heads=4, text_len=5, embed_dim=6, text_vocab=30)).eval()
    caption, timesteps = Caption(torch.randint(30, (3, 5)), torch.randn(3, 6)), torch.tensor([3, 500, 999])
    cached, replayed = (CachedPrior(DenoisingWeights(prior), caption, 2, timesteps) for _ in range(2))
    replayed._graph = inference.StepGraph(torch.device("cpu"))
    for number in (2, 1, 0):
        noised = torch.randn(3, 2, 6)
        torch.testing.assert_close(replayed(noised, number), cached(noised, number))
    assert len(captures) == 1
    del replayed
    assert captures[0]() is None
