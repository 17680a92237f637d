"""Gradients and weights of two replicas behind DeepSpeed engines; started by test_replicas.py with the deepspeed launcher.

Four processes. Each writes {case: what it found} to `rank-N.pt` in the folder that it is given.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.cli import run_launcher
from dalle_ds.config import (
    DalleConfig,
    OptimConfig,
    ParallelConfig,
    PowerSGDConfig,
    RecomputingTrainConfig,
    TransformerRun,
)
from dalle_ds.errors import ConfigError
from dalle_ds.models import Dalle
from dalle_ds.optim import decay_groups, resblock_groups
from dalle_ds.parallel import Mesh
from tests.conftest import EVERYTHING

SHAPE = DalleConfig(width=32, depth=2, heads=2, text_len=4, grid=2, text_vocab=40, image_vocab=16)
ODD = DalleConfig(width=33, depth=1, heads=3, text_len=4, grid=2, text_vocab=40, image_vocab=16)
BATCH = 8

CASES: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"stage": stage} for stage in range(4)},
    **{f"zero{stage} bf16": {"stage": stage, "precision": "bf16"} for stage in range(4)},
    **{f"zero{stage} offloaded": {"stage": stage, "offload": True} for stage in (2, 3)},
    "zero3 tensor": {"stage": 3, "tensor": 2},
    "full rank": {"stage": 3, "powersgd": PowerSGDConfig(enabled=True, rank=400)},
    "full rank bf16": {"stage": 3, "precision": "bf16", "powersgd": PowerSGDConfig(enabled=True, rank=400)},
    "full rank offloaded": {"stage": 3, "offload": True, "powersgd": PowerSGDConfig(enabled=True, rank=400)},
    "full rank tensor": {"stage": 3, "tensor": 2, "powersgd": PowerSGDConfig(enabled=True, rank=400)},
    "low rank": {"stage": 3, "powersgd": PowerSGDConfig(enabled=True)},
    "low rank tensor": {"stage": 3, "tensor": 2, "powersgd": PowerSGDConfig(enabled=True)},
    "odd rows": {"stage": 3, "shape": ODD, "powersgd": PowerSGDConfig(enabled=True, rank=400)},
}
if not EVERYTHING:
    for name in ("zero1", "zero0 bf16", "zero2 bf16", "zero3 offloaded", "full rank bf16", "low rank tensor"):
        del CASES[name]
STARTS = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
if not EVERYTHING:
    STARTS = [(0, "fp32"), (1, "bf16"), (3, "fp32")]
REFUSED: dict[str, dict[str, Any]] = {
    "stage": {"stage": 2, "powersgd": PowerSGDConfig(enabled=True)},
    "rank": {"stage": 3, "powersgd": PowerSGDConfig(enabled=True, rank=7)},
    "blocks": {"stage": 3, "blocks": False, "powersgd": PowerSGDConfig(enabled=True)},
}


class Replica:
    """One process's engine and what hangs on it."""

    def __init__(
        self,
        processes: Mesh,
        stage: int,
        *,
        precision: str = "fp32",
        offload: bool = False,
        tensor: int = 1,
        shape: DalleConfig = SHAPE,
        powersgd: PowerSGDConfig | None = None,
        blocks: bool = True,
    ) -> None:
        from dalle_ds.config.deepspeed import resolve
        from dalle_ds.training.engine import build_engine
        from dalle_ds.training.replicas import ReplicaReduction
        from dalle_ds.training.zero_state import MasterGradients

        parallel = ParallelConfig(replicas=2, tensor=tensor)
        self.mesh = processes.divide(parallel)
        self.shape = shape
        compression = powersgd or PowerSGDConfig()
        run = TransformerRun(
            model=shape, parallel=parallel, train=RecomputingTrainConfig(batch_size=BATCH), powersgd=compression
        )
        zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        config = resolve({"zero_optimization": zero, "bf16": {"enabled": precision == "bf16"}}, run, 4)
        torch.manual_seed(0)
        optim = OptimConfig()

        def groups(model: Dalle) -> list[dict[str, Any]]:
            return resblock_groups(model, list(model.blocks), optim) if blocks else decay_groups(model, 0.0)

        self.engine = build_engine(lambda: Dalle(shape, tensor=self.mesh.tensor), groups, optim, config, self.mesh)
        self.gradients = MasterGradients(self.engine)
        self.reduction = ReplicaReduction(self.engine, self.mesh, compression, seed=0)

    def backward(self, update: int = 0) -> None:
        """Gradients of rows that each data-parallel process has for itself."""
        rows = torch.Generator().manual_seed(10 * update + self.mesh.index("data"))
        text = torch.randint(0, self.shape.text_vocab, (2, self.shape.text_len), generator=rows)
        codes = torch.randint(0, self.shape.image_vocab, (2, self.shape.image_len), generator=rows)
        self.engine.backward(self.engine(text, codes, logits=False).loss)

    def loss(self) -> float:
        """Of a batch that all processes share."""
        text = torch.arange(self.shape.text_len)[None] % self.shape.text_vocab
        codes = torch.arange(self.shape.image_len)[None] % self.shape.image_vocab
        with torch.no_grad():
            return float(self.engine(text, codes, logits=False).loss)

    def mean(self, value: Tensor) -> Tensor:
        """Of both replicas, in double precision."""
        total = value.double()
        dist.all_reduce(total, group=self.mesh.group("replica"))
        return total / 2


def groups_of(replica: Replica) -> list[Tensor]:
    """One flat gradient per parameter group."""
    return [torch.cat([piece.flatten().double() for piece in group]) for group in replica.gradients.groups()]


def means(processes: Mesh, **options: Any) -> dict[str, Any]:
    """How far the reduced gradients are from the mean, by parameter group, and what was said of them."""
    replica = Replica(processes, **options)
    replica.backward()
    own = groups_of(replica)
    expected = [replica.mean(group) for group in own]
    squares = replica.reduction.reduce()
    reduced = groups_of(replica)
    unlike = any((ours - mean).norm() > 0.1 * mean.norm() for ours, mean in zip(own, expected, strict=True))
    assert unlike, "the replicas have the same gradients"
    bits = torch.cat(reduced).float()
    others = [torch.empty_like(bits) for _ in range(2)]
    dist.all_gather(others, bits, group=replica.mesh.group("replica"))
    errors = replica.reduction.errors()
    found = {
        "names": [group.get("name") for group in replica.engine.client_optimizer.param_groups],
        "distances": [float((a - b).norm() / b.norm()) for a, b in zip(reduced, expected, strict=True)],
        "squares": squares.tolist(),
        "expected squares": [float(group.square().sum()) for group in reduced],
        "alike": torch.equal(others[0], others[1]),
        "errors": {name: (tuple(error.shape), float(error.norm())) for name, error in errors.items()},
        "description": replica.reduction.describe(),
        "place": (replica.mesh.index("replica"), replica.mesh.index("shard"), replica.mesh.index("tensor")),
    }
    replica.engine.destroy()
    return found


def not_finite(processes: Mesh, powersgd: PowerSGDConfig) -> list[list[float]]:
    """Squared norms of three updates, in the second of which one replica's gradient of one block has a NaN."""
    replica = Replica(processes, 3, powersgd=powersgd)
    found = []
    for update in range(3):
        replica.backward(update)
        names = [group["name"] for group in replica.engine.client_optimizer.param_groups]
        broken = names.index("block 1 matrices")
        if update == 1 and replica.mesh.index("replica") == 1:
            replica.gradients.groups()[broken][0][5] = math.nan
        found.append(replica.reduction.reduce().tolist())
        replica.engine.step()
    return found


def from_the_same(processes: Mesh, tensor: int) -> list[float]:
    """Squared norms, by parameter group, of what becomes of gradients that all processes share."""
    replica = Replica(processes, 3, tensor=tensor, powersgd=PowerSGDConfig(enabled=True))
    replica.backward()
    generator = torch.Generator().manual_seed(0)
    for group in replica.gradients.groups():
        for piece in group:
            piece.copy_(torch.randn(piece.shape, generator=generator))
    return replica.reduction.reduce().tolist()


def kept(processes: Mesh) -> dict[str, float]:
    """Whether error buffers are those of what was left out, and can be put back."""
    replica = Replica(processes, 3, powersgd=PowerSGDConfig(enabled=True))
    replica.backward()
    given = torch.cat([replica.mean(group) for group in groups_of(replica)])
    replica.reduction.reduce()
    got = torch.cat(groups_of(replica))
    errors = replica.reduction.errors()
    replica.reduction.load_error_feedback({name: 3 * error for name, error in errors.items()})
    again = replica.reduction.errors()
    return {
        "left": float(given.square().sum() - got.square().sum()),
        "in buffers": float(sum(error.double().square().sum() for error in errors.values())),
        "put back": max(float((again[name] - 3 * errors[name]).abs().max()) for name in errors),
    }


def start(processes: Mesh, stage: int, precision: str) -> tuple[float, float]:
    """Losses before and after the first replica's weights are given to the second, whose were changed."""
    from dalle_ds.training.replicas import broadcast_start
    from dalle_ds.training.zero_state import MasterWeights

    replica = Replica(processes, stage, precision=precision)
    weights = MasterWeights(replica.engine)
    if replica.mesh.index("replica") == 1:
        for shard in weights.shards:
            shard.data.mul_(1.5)
    weights.publish()
    before = replica.loss()
    broadcast_start(weights, replica.mesh)
    return before, replica.loss()


def refusal(processes: Mesh, **options: Any) -> str:
    try:
        Replica(processes, **options)
    except ConfigError as error:
        return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    processes = Mesh.start("cpu")
    found: dict[str, Any] = {name: means(processes, **options) for name, options in CASES.items()}
    found["refused"] = {name: refusal(processes, **options) for name, options in REFUSED.items()}
    found["not finite"] = [not_finite(processes, PowerSGDConfig(enabled=on)) for on in (False, True)]
    found["from the same"] = {f"low rank{name}": from_the_same(processes, t) for name, t in (("", 1), (" tensor", 2))}
    found["kept"] = kept(processes)
    found["start"] = {(s, p): start(processes, s, p) for s, p in STARTS}
    torch.save(found, Path(sys.argv[-1]) / f"rank-{processes.rank}.pt")
    processes.stop()


if __name__ == "__main__":
    run_launcher(main)
