"""Gradient caching and SAM on one process, without DeepSpeed, against torch on the whole batch at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import OptimConfig
from dalle_ds.models.contrastive import contrastive_loss
from dalle_ds.optim import AdamW
from dalle_ds.parallel import Mesh
from dalle_ds.parallel.peers import ALONE, Peers
from dalle_ds.tasks.base import Batch, Metrics
from dalle_ds.tasks.whole_batch import Outputs, WholeBatchTask
from dalle_ds.training.passes.caching import CachingPasses
from dalle_ds.training.randomness import seed_update

MESH = Mesh(0, 1, torch.device("cpu"))


class Towers(nn.Module):
    """Two towers, with dropout, whose passes are recorded."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(5, 4), nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.dropout = dropout
        self.seen: list[tuple[bool, Tensor]] = []

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embeddings = F.normalize(F.dropout(self.image(image), self.dropout), dim=1)
        self.seen.append((torch.is_grad_enabled(), embeddings.detach()))
        return embeddings, F.normalize(F.dropout(self.text(text), self.dropout), dim=1), self.scale.exp()


class TowersTask(WholeBatchTask[Any]):
    """The parts of a task that passes use."""

    def __init__(self) -> None:
        pass

    def embed(self, model: nn.Module, batch: Batch) -> Outputs:
        return dict(zip(("image", "text", "scale"), model(batch["image"], batch["text"]), strict=True))

    def loss_of(self, outputs: Outputs, peers: Peers = ALONE) -> tuple[Tensor, Metrics]:
        loss = contrastive_loss(outputs["image"], outputs["text"], outputs["scale"], peers)
        return loss, {"rows": _count(outputs), "sum": outputs["text"].detach().sum(0)}

    build_model = samples = identity = evaluate = summarize = preview = export = flops_per_sample = None  # type: ignore


def _count(outputs: Outputs) -> Tensor:
    return torch.tensor(float(len(outputs["image"])))


TowersTask.__abstractmethods__ = frozenset()


class Engine:
    """What passes use of a DeepSpeed engine; it counts as that does."""

    def __init__(self, module: Towers) -> None:
        self.module, self.backwards, self.steps = module, 0, 0

    def __call__(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        assert not scale_wrt_gas or self.backwards == 0
        self.backwards += 1
        loss.backward()

    def step(self) -> None:
        self.steps += 1


class SteppingEngine(Engine):
    """What SAM uses besides: of stage 0, with an optimizer that steps after every two micro-batches."""

    device, global_steps, global_samples = torch.device("cpu"), 0, 0

    def __init__(self, module: Towers) -> None:
        super().__init__(module)
        group = {"name": "all", "params": list(module.parameters()), "weight_decay": 0.1}
        self.optimizer = self.client_optimizer = AdamW([group], second_moment_clip=None)

    def zero_optimization_stage(self) -> int:
        return 0

    def step(self) -> None:
        if self.backwards % 2 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.global_steps += 1
            self.global_samples += 12

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        self.backwards += 1
        loss.backward()


def batches(count: int, rows: int = 12) -> list[Batch]:
    rng = torch.Generator().manual_seed(5)
    image, text = torch.randn(rows, 5, generator=rng), torch.randn(rows, 3, generator=rng)
    return [{"image": i, "text": t} for i, t in zip(image.chunk(count), text.chunk(count), strict=True)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("count", [2, 3, 12])
def test_a_cached_gradient_is_that_of_the_whole_batch_at_once(count: int) -> None:
    plain, cached = Towers(0.0), Towers(0.0)
    (whole,) = CachingPasses(TowersTask(), Engine(plain), MESH).backward(batches(1), 0)
    engine = Engine(cached)
    reported = CachingPasses(TowersTask(), engine, MESH).backward(batches(count), 0)
    assert len(reported) == engine.backwards == count and engine.steps == count - 1
    for metrics in reported:
        assert float(metrics["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
        assert metrics["rows"] == 12, "the loss is over all rows"
    torch.testing.assert_close(sum(metrics["sum"] for metrics in reported), whole["sum"])
    assert gradients(cached).keys() == gradients(plain).keys()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(cached)[name], gradient, rtol=1e-5, atol=1e-7)
    # A loss of each micro-batch for itself would be another.
    assert abs(float(contrastive_loss(*plain(**batches(count)[0])).detach()) - float(whole["loss"])) > 0.01


def test_both_passes_over_a_micro_batch_draw_the_same_noise() -> None:
    model = Towers(0.5)
    seed_update(0, 0, 0)
    CachingPasses(TowersTask(), Engine(model), MESH).backward(batches(3), 0)
    first, second = model.seen[:3], model.seen[3:]
    assert [graph for graph, _ in first] == [False] * 3 and [graph for graph, _ in second] == [True] * 3
    for (_, before), (_, after) in zip(first, second, strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(first[0][1] == 0, first[1][1] == 0), "micro-batches draw their own"


def test_only_one_micro_batch_has_a_graph_at_a_time() -> None:
    """Which is what it is for: the others' activations are not kept."""
    alive: list[int] = []

    class Watched(Engine):
        held = 0

        def __call__(self, *inputs: Tensor) -> Any:
            outputs = self.module(*inputs)
            if outputs[0].requires_grad:
                Watched.held += 1
                alive.append(Watched.held)
            return outputs

        def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
            super().backward(loss, scale_wrt_gas)
            Watched.held -= 1

    CachingPasses(TowersTask(), Watched(Towers(0.0)), MESH).backward(batches(4), 0)
    assert alive == [1, 1, 1, 1]


def test_both_gradients_of_sam_are_under_the_same_noise() -> None:
    from dalle_ds.training.passes.sharpness import SharpPasses

    engine = SteppingEngine(Towers(0.5))
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    seed_update(0, 0, 0)
    passes = SharpPasses(CachingPasses(TowersTask(), engine, MESH), engine, MESH, rho=0.3)
    passes.backward(batches(2), 0)
    dropped = [embeddings == 0 for _, embeddings in engine.module.seen]
    assert len(dropped) == 8, "two micro-batches, twice with caching, at two places"
    assert all(map(torch.equal, dropped[:4], dropped[4:]))
    assert not torch.equal(engine.module.seen[0][1], engine.module.seen[4][1]), "weights are other ones there"
    assert all(map(torch.equal, before, engine.module.parameters()))


def test_sam_is_the_papers_over_several_updates() -> None:
    """Twenty updates against SAM written out with torch's AdamW (arXiv 2010.01412, Algorithm 1)."""
    from dalle_ds.training.passes.sharpness import SharpPasses
    from dalle_ds.training.update import Updater

    rho, lr = 0.3, 1e-2
    ours, theirs = Towers(0.0), Towers(0.0)
    engine, task = SteppingEngine(ours), TowersTask()
    passes = SharpPasses(CachingPasses(task, engine, MESH), engine, MESH, rho)
    options: dict[str, Any] = {"scales": None, "scaling": None, "average": None, "numerics": None, "replicas": None}
    task.weight_of = lambda batch: torch.ones(())  # type: ignore[method-assign]
    updater = Updater(task, engine, passes, MESH, OptimConfig(clip=None), **options)
    reference = torch.optim.AdamW(theirs.parameters(), lr=lr, weight_decay=0.1)
    (batch,) = batches(1)
    for step in range(20):
        figures = updater.update(batches(2), step, lr).figures
        loss = contrastive_loss(*theirs(**batch))
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters() if p.grad is not None))
        kept = [parameter.detach().clone() for parameter in theirs.parameters()]
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(rho * parameter.grad / norm)
        reference.zero_grad()
        there = contrastive_loss(*theirs(**batch))
        there.backward()
        with torch.no_grad():
            for parameter, value in zip(theirs.parameters(), kept, strict=True):
                parameter.copy_(value)
        reference.step()
        reference.zero_grad()
        assert figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert figures["sharpness"] == pytest.approx(float((there - loss).detach()), rel=1e-2, abs=1e-5)
    assert engine.global_steps == 20 and engine.global_samples == 20 * 12
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
