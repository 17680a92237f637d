"""Gradient caching and SAM on one process, without DeepSpeed, against torch on the whole batch at once."""

from __future__ import annotations

import itertools
import math
import re
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import DvaeRun, OptimConfig, SharpnessConfig, TrainConfig
from dalle_ds.errors import ConfigError
from dalle_ds.nn.contrastive import contrastive_logits
from dalle_ds.optim import AdamW
from dalle_ds.parallel import Mesh
from dalle_ds.parallel.peers import ALONE, Peers
from dalle_ds.tasks.base import Batch, ContrastiveTask, Metrics, Outputs
from dalle_ds.training.randomness import seed_update
from dalle_ds.training.sharpness import SharpStrategy, _rounded_at_random
from dalle_ds.training.strategies import CachedStrategy

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


class TowersTask(ContrastiveTask[Any]):
    """The parts of a task that passes use."""

    sharpness: SharpnessConfig | None = None  # type: ignore[assignment]

    def __init__(self) -> None:
        pass

    def embed(self, model: nn.Module, batch: Batch) -> Outputs:
        return dict(zip(("image", "text", "scale"), model(batch["image"], batch["text"]), strict=True))

    def loss_of(self, outputs: Outputs, peers: Peers = ALONE) -> tuple[Tensor, Metrics]:
        loss = contrastive_logits(outputs["image"], outputs["text"], outputs["scale"], peers).loss()
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
    """What SAM uses besides: of stage 0, with an optimizer that steps after every backward pass."""

    device, global_steps, micro_batch = torch.device("cpu"), 0, 12

    def __init__(self, module: Towers) -> None:
        super().__init__(module)
        group = {"name": "all", "params": list(module.parameters()), "weight_decay": 0.1}
        self.optimizer = self.client_optimizer = AdamW([group], second_moment_clip=None)

    def zero_optimization_stage(self) -> int:
        return 0

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.micro_batch

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        assert is_boundary

    def _backward_prologue(self) -> None:
        pass

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.global_steps += 1


def sharp_strategy(engine: SteppingEngine, rho: float, pairs: int | None, count: int) -> SharpStrategy:
    """SAM of 12 rows in so many micro-batches."""
    engine.micro_batch = 12 // count
    task = TowersTask()
    task.sharpness = SharpnessConfig(rho=rho, pairs=pairs)
    task.run = DvaeRun(train=TrainConfig(batch_size=12))
    task.build_model = lambda: Towers(engine.module.dropout)  # type: ignore[method-assign]
    task.num_items = lambda batch: torch.ones(())  # type: ignore[method-assign]
    return SharpStrategy(task, engine, MESH)


def batches(count: int, rows: int = 12) -> list[Batch]:
    rng = torch.Generator().manual_seed(5)
    image, text = torch.randn(rows, 5, generator=rng), torch.randn(rows, 3, generator=rng)
    keys = torch.arange(rows)
    parts = zip(image.chunk(count), text.chunk(count), keys.chunk(count), strict=True)
    return [{"image": i, "text": t, "key": k} for i, t, k in parts]


def _inputs(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["image"], batch["text"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("count", [2, 3, 12])
def test_a_cached_gradient_is_that_of_the_whole_batch_at_once(count: int) -> None:
    plain, cached = Towers(0.0), Towers(0.0)
    (whole,) = CachedStrategy(TowersTask(), Engine(plain), MESH).backward(batches(1), 0)
    engine = Engine(cached)
    reported = CachedStrategy(TowersTask(), engine, MESH).backward(batches(count), 0)
    assert len(reported) == engine.backwards == count and engine.steps == count - 1
    for metrics in reported:
        assert float(metrics["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
        assert metrics["rows"] == 12, "the loss is over all rows"
    torch.testing.assert_close(sum(metrics["sum"] for metrics in reported), whole["sum"])
    assert gradients(cached).keys() == gradients(plain).keys()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(cached)[name], gradient, rtol=1e-5, atol=1e-7)
    # A loss of each micro-batch for itself would be another.
    alone = contrastive_logits(*plain(*_inputs(batches(count)[0]))).loss()
    assert abs(float(alone.detach()) - float(whole["loss"])) > 0.01


def test_both_passes_over_a_micro_batch_draw_the_same_noise() -> None:
    model = Towers(0.5)
    seed_update(0, 0, 0)
    CachedStrategy(TowersTask(), Engine(model), MESH).backward(batches(3), 0)
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

    CachedStrategy(TowersTask(), Watched(Towers(0.0)), MESH).backward(batches(4), 0)
    assert alive == [1, 1, 1, 1]


def test_both_gradients_of_sam_are_under_the_same_noise() -> None:
    engine = SteppingEngine(Towers(0.5))
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    seed_update(0, 0, 0)
    strategy = sharp_strategy(engine, 0.3, None, 2)
    strategy.backward(batches(2), 0)
    assert isinstance(strategy._moved, Towers)
    seen = strategy._moved.seen
    dropped = [embeddings == 0 for _, embeddings in seen]
    assert len(dropped) == 8, "two micro-batches, twice with caching, at two places"
    assert all(map(torch.equal, dropped[:4], dropped[4:]))
    assert not torch.equal(seen[0][1], seen[4][1]), "weights are other ones there"
    assert all(map(torch.equal, before, engine.module.parameters()))


def towers_loss(models: list[Towers]) -> Tensor:
    """Symmetric cross-entropy of 12 rows, each group of which has weights and a logit scale of its own."""
    (batch,) = batches(1)
    parts = zip(
        models, batch["image"].double().chunk(len(models)), batch["text"].double().chunk(len(models)), strict=True
    )
    outputs = [model(image, text) for model, image, text in parts]
    image, text = torch.cat([output[0] for output in outputs]), torch.cat([output[1] for output in outputs])
    scale = torch.cat([output[2].expand(12 // len(models)) for output in outputs])[:, None]
    targets = torch.arange(12)
    return (F.cross_entropy(scale * image @ text.T, targets) + F.cross_entropy(scale * text @ image.T, targets)) / 2


def towers_gradients(models: list[Towers]) -> list[dict[str, Tensor]]:
    """Of each group's weights; all rows pull at the logarithm's exp, the scale, of all groups alike."""
    for model in models:
        model.zero_grad()
    towers_loss(models).backward()
    found = [gradients(model) for model in models]
    pull = torch.stack([each["scale"] / m.scale.detach().exp() for each, m in zip(found, models, strict=True)]).mean()
    return [{**each, "scale": pull * m.scale.detach().exp()} for each, m in zip(found, models, strict=True)]


def sharp_reference(model: Towers, rho: float, groups: int) -> dict[str, Tensor]:
    """The definition at the head of `sharpness.py`, in float64 and without engines."""
    moved = [deepcopy(model).double() for _ in range(groups)]
    for copy, ascent in zip(moved, towers_gradients([deepcopy(model).double() for _ in range(groups)]), strict=True):
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in ascent.values()))
        with torch.no_grad():
            for name, parameter in copy.named_parameters():
                parameter.add_(ascent[name], alpha=rho / norm)
    each = towers_gradients(moved)
    return {name: torch.stack([gradient[name] for gradient in each]).sum(0) for name in each[0]}


@pytest.mark.parametrize("pairs", [2, 4, 12, None])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_sam_perturbs_each_group_of_pairs_by_itself_however_the_batch_is_cut(count: int, pairs: int | None) -> None:
    engine = SteppingEngine(Towers(0.0))
    (first, *_) = sharp_strategy(engine, 0.3, pairs, count).backward(batches(count), 0)
    expected = sharp_reference(Towers(0.0), 0.3, 12 // (pairs or 12))
    for name, gradient in gradients(engine.module).items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-6)
    assert float(first["loss"]) == pytest.approx(float(towers_loss([Towers(0.0).double()]).detach()), rel=1e-5)
    # Groups matter: the gradient is another one than that of another number of them.
    other = sharp_reference(Towers(0.0), 0.3, 3 if pairs != 4 else 1)
    assert max(float((expected[name] - other[name]).abs().max()) for name in other) > 1e-3


def test_a_group_that_is_not_finite_makes_the_gradient_so_and_leaves_the_weights() -> None:
    engine, cut = SteppingEngine(Towers(0.0)), batches(3)
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    cut[1]["image"][0, 0] = math.inf
    sharp_strategy(engine, 0.3, 4, 3).backward(cut, 0)
    assert not all(torch.isfinite(gradient).all() for gradient in gradients(engine.module).values())
    assert all(map(torch.equal, before, engine.module.parameters()))


@pytest.mark.parametrize(
    ("pairs", "micro_batch", "processes", "span"),
    [(64, 64, 512, 1), (64, 128, 4, 1), (64, 32, 4, 2), (64, 16, 2, 2), (64, 16, 4, 4), (None, 64, 4, 4)],
)
def test_processes_that_share_a_perturbation(pairs: int | None, micro_batch: int, processes: int, span: int) -> None:
    assert SharpnessConfig(rho=0.1, pairs=pairs).span(32_768, micro_batch, processes) == span


def test_groups_that_do_not_fit_are_refused_with_a_micro_batch_that_does() -> None:
    refused = 0
    for pairs, groups, processes in itertools.product(range(1, 13), range(1, 7), range(1, 13)):
        own, rest = divmod(pairs * groups, processes)
        sharpness = SharpnessConfig(rho=0.1, pairs=pairs)
        for micro_batch in (rows for rows in range(1, own + 1) if rest == own % rows == 0):
            try:
                sharpness.span(pairs * groups, micro_batch, processes)
            except ConfigError as error:
                cure = re.search(rf"sharpness\.pairs={pairs} .*train\.micro_batch to (\d+)$", str(error))
                assert cure is not None and own % int(cure[1]) == 0
                assert sharpness.span(pairs * groups, int(cure[1]), processes)
                refused += 1
    assert refused > 100


def test_a_batch_of_no_whole_number_of_groups_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"batch_size=100 .*sharpness\.pairs=64.*train\.batch_size to a multiple of 64$"
    ):
        SharpnessConfig(rho=0.1, pairs=64).span(100, 50, 1)


def test_pairs_without_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sharpness\.pairs=64.*sharpness\.rho"):
        SharpnessConfig(pairs=64)


def test_noise_goes_by_a_groups_place_in_the_batch_however_it_is_cut() -> None:
    """Of 16 pairs in groups of 4, each process numbers the pieces of its own as the whole batch does."""
    for micro_batch, processes in ((16, 1), (8, 2), (8, 1), (4, 2), (4, 4), (2, 2), (2, 4), (1, 4), (1, 2)):
        rows, size = min(4, micro_batch), 16 // processes
        for rank in range(processes):
            strategy = SharpStrategy.__new__(SharpStrategy)
            strategy._rows, strategy._pairs, strategy._micro_batch = rows, 4, micro_batch
            strategy._peers = Peers(rank, processes)
            order = torch.arange(16).view(-1, processes, micro_batch)[:, rank].reshape(-1)
            found = [strategy._group_in_batch(piece) for piece in range(size // rows)]
            assert found == (order[::rows] // 4).tolist(), (micro_batch, processes, rank)


def test_what_bf16_cannot_hold_of_a_perturbation_is_right_in_the_mean() -> None:
    exact = torch.full((100_000,), 1 + 2**-11)  # a sixteenth of a step above 1
    rounded = _rounded_at_random(exact, torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert float(rounded.mean() - 1) == pytest.approx(2**-11, rel=0.05)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000])
def test_what_is_not_finite_stays_so_in_bf16(bits: int) -> None:
    """The first is the NaN that CUDA makes, which noise carries over to -0; the last two are infinities."""
    exact = torch.full((1000,), bits, dtype=torch.int32).view(torch.float32)
    rounded = _rounded_at_random(exact, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded.float(), exact, equal_nan=True)


def test_sam_is_the_papers_over_several_updates() -> None:
    """Twenty updates against SAM written out with torch's AdamW (arXiv 2010.01412, Algorithm 1)."""
    from dalle_ds.training.step import TrainStep

    rho, lr = 0.3, 1e-2
    ours, theirs = Towers(0.0), Towers(0.0)
    engine = SteppingEngine(ours)
    strategy = sharp_strategy(engine, rho, None, 2)
    options: dict[str, Any] = {"scales": None, "average": None, "numerics": None, "replicas": None}
    train_step = TrainStep(strategy, MESH, OptimConfig(clip=None), **options)
    reference = torch.optim.AdamW(theirs.parameters(), lr=lr, weight_decay=0.1)
    (batch,) = batches(1)
    for step in range(20):
        figures = train_step.run(batches(2), step, lr).metrics
        loss = contrastive_logits(*theirs(*_inputs(batch))).loss()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters() if p.grad is not None))
        kept = [parameter.detach().clone() for parameter in theirs.parameters()]
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(rho * parameter.grad / norm)
        reference.zero_grad()
        there = contrastive_logits(*theirs(*_inputs(batch))).loss()
        there.backward()
        with torch.no_grad():
            for parameter, value in zip(theirs.parameters(), kept, strict=True):
                parameter.copy_(value)
        reference.step()
        reference.zero_grad()
        assert figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert figures["sharpness"] == pytest.approx(float((there - loss).detach()), rel=1e-2, abs=1e-5)
    assert engine.global_steps == 20
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
