"""Gradients of the contrastive loss behind DeepSpeed engines; started by test_contrastive.py.

One process imports everything, which takes longer than all else, and forks those of each launch. The first of so many
processes writes {case: what it found} to `found-N.pt` in the folder that is given.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.cli import run_launcher
from dalle_ds.config import (
    ClipConfig,
    ClipObjective,
    ClipRun,
    OptimConfig,
    ParallelConfig,
    RecomputingTrainConfig,
    SharpnessConfig,
)
from dalle_ds.models.clip import Clip
from dalle_ds.parallel import WHOLE, Mesh, TensorGroup
from dalle_ds.tasks.base import Batch, Task
from dalle_ds.tasks.clip import ClipTask

SHAPE = ClipConfig(
    embed_dim=16,
    image_size=8,
    patch_size=4,
    vision_width=24,
    vision_depth=2,
    vision_heads=2,
    text_width=20,
    text_depth=2,
    text_heads=2,
    text_len=6,
    text_vocab=30,
)
BATCH = 16
RHO = 0.01
TOO_HIGH = math.log(100) + 0.05


@dataclass(frozen=True)
class Case:
    """A layout, and what is asked of it."""

    stage: int
    micro_batches: int = 1
    replicas: int = 1
    local: bool = True
    recompute: str = "none"
    precision: str = "fp32"
    sharp: int = 0
    """Pairs that share a perturbation; 0 makes none."""
    limit: bool = False
    """Whether the scale begins above its limit."""
    broken: bool = False
    """Whether the last process has an image that is not finite."""
    offload: bool = False
    persistent: bool = False
    """Whether ZeRO-3 keeps small parameters whole, as it does unless told otherwise."""


CASES: dict[str, Case] = {  # of two processes
    "zero3": Case(3),
    **{f"zero{stage} cached": Case(stage, 2) for stage in range(4)},
    "zero2 whole cached": Case(2, 2, local=False),
    "zero3 recomputed": Case(3, 2, recompute="full", persistent=True),
    "zero3 bf16": Case(3, 2, precision="bf16"),
    "zero1 at the limit": Case(1, limit=True),
    "zero1 replicas cached": Case(1, 2, replicas=2),
    "zero0 sharp": Case(0, sharp=4),
    "zero1 sharp whole": Case(1, sharp=4, local=False),
    "zero2 sharp cached": Case(2, 2, sharp=4),
    "zero3 sharp cached": Case(3, 2, sharp=8),
    "zero2 sharp offloaded": Case(2, 2, sharp=BATCH, offload=True),
    "zero1 sharp replicas": Case(1, replicas=2, sharp=8),
    "zero3 sharp replicas": Case(3, 2, replicas=2, sharp=4, persistent=True),
    "zero1 sharp broken": Case(1, 2, sharp=4, broken=True),
    "zero3 sharp broken": Case(3, 2, sharp=4, broken=True),
    "zero1 sharp bf16": Case(1, sharp=4, precision="bf16"),
}
OF_BOTH = ("zero0 cached", "zero1 at the limit", "zero2 cached", "zero3 cached")
"""Those that two processes go through, and four as well."""
OF_FOUR = ("zero1 replicas cached", "zero3 sharp replicas", "zero3 sharp broken")
"""Those of four only: what replicas of one shard are, "zero1 sharp replicas" shows."""


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """To the bit. What fills up a shard is not initialized, and may be no number."""
    pairs = zip(some, others, strict=True)
    return all(torch.allclose(one, other.detach(), rtol=0, atol=0, equal_nan=True) for one, other in pairs)


def cases_of(processes: int) -> list[str]:
    """Names of the cases of one launch."""
    return [*OF_BOTH, *OF_FOUR] if processes == 4 else [name for name in CASES if name not in OF_FOUR]


class BareTask(ClipTask):
    """A `ClipTask` without data."""

    def __init__(self, run: ClipRun) -> None:
        Task.__init__(self, run)

    def build_model(self, tensor: TensorGroup = WHOLE) -> Clip:
        return Clip(SHAPE, checkpointing=self.run.train.activation_checkpointing)


def plain_model(case: Case | None = None) -> Clip:
    """Before the first update."""
    torch.manual_seed(0)
    model = Clip(SHAPE, checkpointing=case.recompute if case is not None else "none")  # type: ignore[arg-type]
    if case is not None and case.limit:
        with torch.no_grad():
            model.logit_scale.fill_(TOO_HIGH)
    return model


def rows(first: int, count: int) -> Batch:
    """Rows of the batch that all layouts share."""
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(BATCH, 3, 8, 8, generator=rng)
    text = torch.randint(0, SHAPE.text_vocab - 2, (BATCH, SHAPE.text_len), generator=rng)
    text[:, 0], text[:, 4], text[:, 5] = SHAPE.start, SHAPE.end, -1
    text[::3, 3:] = torch.tensor([SHAPE.end, -1, -1])
    key = torch.arange(BATCH)
    return {
        "image": image[first : first + count],
        "text": text[first : first + count],
        "key": key[first : first + count],
    }


def run_case(processes: Mesh, case: Case) -> dict[str, Any]:
    """What becomes of the batch: loss, named gradients, and whether weights are as they were."""
    from dalle_ds.config.deepspeed import resolve
    from dalle_ds.training.engine import build_engine
    from dalle_ds.training.replicas import ReplicaReduction
    from dalle_ds.training.step import TrainStep
    from dalle_ds.training.strategies import strategy_for
    from dalle_ds.training.zero_state import MasterGradients, MasterWeights

    parallel = ParallelConfig(replicas=case.replicas)
    mesh = processes.divide(parallel)
    own = BATCH // mesh.size("data")
    micro = own // case.micro_batches
    run = ClipRun(
        model=SHAPE,
        parallel=parallel,
        train=RecomputingTrainConfig(batch_size=BATCH, micro_batch=micro, activation_checkpointing=case.recompute),  # type: ignore[arg-type]
        optim=OptimConfig(clip=None, second_moment_clip=None),
        objective=ClipObjective(local_loss=case.local),
        sharpness=SharpnessConfig(rho=RHO, pairs=case.sharp) if case.sharp else SharpnessConfig(),
    )
    zero: dict[str, Any] = {"stage": case.stage}
    if not case.persistent:
        zero["stage3_param_persistence_threshold"] = 0
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = resolve(
        {"zero_optimization": zero, "bf16": {"enabled": case.precision == "bf16"}}, run, processes.world_size
    )
    task = BareTask(run)
    engine = build_engine(lambda: plain_model(case), task.parameter_groups, run.optim, config, mesh)
    strategy = strategy_for(task, engine, mesh)
    weights, gradients = MasterWeights(engine), MasterGradients(engine)
    reduction = None
    if case.replicas > 1:
        reduction = ReplicaReduction(engine, mesh, run.powersgd, 0)
    before = [shard.detach().clone() for shard in weights.shards]
    size, index = mesh.size("data"), mesh.index("data")
    batches = [rows((number * size + index) * micro, micro) for number in range(case.micro_batches)]
    if case.broken and mesh.rank == mesh.world_size - 1:
        batches[-1]["image"][0, 0, 0, 0] = math.inf
    found: dict[str, Any] = {}

    def spied(*arguments: Any) -> None:
        """What the update is about to step with."""
        found["restored"] = same(before, weights.shards)
        kept = [shard.detach().clone() for shard in weights.shards]
        for weight, gradient in zip(*matched(weights, gradients), strict=True):
            weight.copy_(gradient)
        found["gradients"] = weights.consolidate()
        for shard, value in zip(weights.shards, kept, strict=True):
            shard.data.copy_(value)
        return inner(*arguments)

    options: dict[str, Any] = {
        "scales": None,
        "average": None,
        "numerics": None,
        "replicas": reduction,
    }
    train_step = TrainStep(strategy, mesh, run.optim, **options)
    inner = train_step._apply
    train_step._apply = spied  # type: ignore[method-assign, assignment]
    result = train_step.run(batches, 0, 1e-3)
    found |= {"figures": result.metrics, "applied": result.decision.applied}
    found["unchanged"] = same(before, weights.shards)
    found["steps"], found["samples"] = engine.global_steps, engine.global_samples
    after = weights.consolidate()
    # What the module computes with is what the optimizer keeps.
    engine.eval()
    whole = rows(0, BATCH)
    with torch.no_grad():
        found["embeddings"] = engine(whole["image"], whole["text"]).text_embeddings.float()
    found["weights"] = after
    torch.manual_seed(7)
    other = Clip(SHAPE)
    weights.load(other.state_dict())
    loaded = weights.consolidate()
    with torch.no_grad():
        embedded = engine(whole["image"], whole["text"]).text_embeddings.float()
    found["loaded"] = float((embedded - other.eval().embed_texts(whole["text"])).abs().max())
    if loaded is not None:
        found["loaded exactly"] = all(torch.equal(loaded[name], value) for name, value in other.state_dict().items())
    every: list[Any] = [None] * processes.world_size
    dist.all_gather_object(
        every, {name: found[name] for name in ("restored", "unchanged", "applied", "embeddings", "loaded")}
    )
    found["everywhere"] = every
    engine.destroy()
    return found


def matched(weights: Any, gradients: Any) -> tuple[list[Tensor], list[Tensor]]:
    """This process's fp32 weights in pieces, 1-D views, and the gradient of each.

    Of every parameter group, both lie end to end in the same order, however they are cut; only weights have padding.
    """
    pieces: list[Tensor] = []
    theirs: list[Tensor] = []
    shards = list(zip(weights.shards, weights.group_of, strict=True))
    for number, group in enumerate(gradients.groups()):
        waiting = [piece.reshape(-1) for piece in reversed(group)]
        for shard, owner in shards:
            rest = shard.detach().view(-1)[: shard.numel() if owner == number else 0]
            while len(rest) and waiting:
                length = min(len(rest), len(waiting[-1]))
                pieces.append(rest[:length])
                theirs.append(waiting[-1][:length])
                rest, waiting[-1] = rest[length:], waiting[-1][length:]
                if not len(waiting[-1]):
                    waiting.pop()
        assert not waiting, "gradients without weights"
    return pieces, theirs


def peers_sum(processes: Mesh) -> Tensor:
    """Gradients of rows that each process weighs in its own way, under both kinds of gathering."""
    from dalle_ds.parallel.peers import Peers

    peers = Peers(processes.rank, processes.world_size)
    own = torch.full((2, 3), float(processes.rank), requires_grad=True)
    everyone = peers.gather(own)
    weight = float(processes.rank + 1)
    (everyone * weight).sum().backward()
    return torch.cat([everyone.detach().flatten(), own.grad.flatten()])  # type: ignore[union-attr]


def run_rank(rank: int, size: int, port: int, folder: Path) -> None:
    """One process of a launch."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = Mesh.start("cpu")
    found: dict[str, Any] = {name: run_case(processes, CASES[name]) for name in cases_of(size)}
    found["peers"] = peers_sum(processes)
    if processes.is_main:
        torch.save(found, folder / f"found-{size}.pt")
    processes.stop()


def launch(size: int, port: int, folder: Path) -> None:
    """Fork the processes of a launch, and wait for them; where one fails, the others are ended."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, size, port, folder)) for rank in range(size)]
    for process in ranks:
        process.start()
    waiting = list(ranks)
    while waiting:
        multiprocessing.connection.wait([process.sentinel for process in waiting])
        waiting = [process for process in waiting if process.exitcode is None]
        if any(process.exitcode for process in ranks):
            for process in waiting:
                process.kill()
            raise SystemExit(1)


def main() -> None:
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import dalle_ds.training.engine  # noqa: F401 (and DeepSpeed)

    plain_model()  # imports the towers
    folder, *ports = sys.argv[1:]
    for size, port in zip((2, 4), ports, strict=True):
        launch(size, int(port), Path(folder))


if __name__ == "__main__":
    run_launcher(main)
