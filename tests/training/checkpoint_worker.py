"""Writes checkpoints of engines of every kind, or goes on from them; started by test_checkpoint_layouts.py.

Arguments: "write" or "read", a folder of checkpoints, a JSON file. "write" puts there, for every layout, the losses and the
weights' digest after two more updates; "read" takes from there [[source, layout], …] and puts the same for each of them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dalle_ds.cli import run_launcher
from dalle_ds.config import OptimConfig, RecomputingTrainConfig, TransformerRun
from dalle_ds.models import Dalle
from dalle_ds.optim import WeightAverage, resblock_groups
from dalle_ds.parallel import Mesh
from tests.conftest import EVERYTHING, TINY_DALLE

ROWS = 8
BEFORE, AFTER = (0, 1), (2, 3)
PLAIN = OptimConfig(second_moment_clip=None)
CODES = OptimConfig(moments="16-bit", second_moment_clip=1e-4)
NOISE = OptimConfig(moments="16-bit", stochastic_rounding=True, second_moment_clip=1e-4)


@dataclass(frozen=True)
class Layout:
    """How an engine keeps what it trains."""

    precision: str
    stage: int
    offload: bool = False
    optim: OptimConfig = PLAIN


LAYOUTS = {
    f"{precision}-{stage}{'-offloaded' if offload else ''}": Layout(precision, stage, offload)
    for precision in ("fp32", "bf16")
    for stage in range(4)
    for offload in (False, True)
    if stage > 0 or not offload
}
LAYOUTS |= {f"noise-{stage}": Layout("fp32", stage, optim=NOISE) for stage in range(4)}
LAYOUTS |= {f"codes-{stage}": Layout("fp32", stage, optim=CODES) for stage in (0, 1, 3)}
if not EVERYTHING:
    QUICK = (
        "fp32-0",
        "fp32-1",
        "fp32-2-offloaded",
        "fp32-3",
        "bf16-1",
        "bf16-3-offloaded",
        "noise-1",
        "noise-3",
        "codes-1",
    )
    LAYOUTS = {name: LAYOUTS[name] for name in QUICK}


class Training:
    """An engine, and what else a checkpoint takes from it."""

    def __init__(self, layout: Layout, mesh: Mesh) -> None:
        from dalle_ds.config.deepspeed import resolve
        from dalle_ds.training.checkpoints.content import TrainedTensors
        from dalle_ds.training.engine import build_engine
        from dalle_ds.training.zero_state import MasterWeights

        # Several sub-groups to a parameter group, and every parameter cut.
        zero: dict[str, Any] = {"stage": layout.stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 2_000}
        if layout.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        run = TransformerRun(model=TINY_DALLE, train=RecomputingTrainConfig(batch_size=ROWS), optim=layout.optim)
        config = resolve(
            {"zero_optimization": zero, "bf16": {"enabled": layout.precision == "bf16"}}, run, mesh.world_size
        )
        torch.manual_seed(0)
        groups = partial(self._groups, optim=layout.optim)
        self.mesh = mesh
        self.engine = build_engine(lambda: Dalle(TINY_DALLE), groups, layout.optim, config, mesh)
        self.weights = MasterWeights(self.engine)
        self.average = WeightAverage(self.weights.shards, 0.5)
        self.trained = TrainedTensors(self.weights, self.engine.client_optimizer, self.average)

    @staticmethod
    def _groups(model: Dalle, optim: OptimConfig) -> list[dict[str, Any]]:
        return resblock_groups(model, list(model.blocks), optim)

    def update(self, step: int) -> float:
        """Make an update on data that depend on nothing but its number; returns the loss over all processes."""
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(TINY_DALLE.text_vocab, (ROWS, TINY_DALLE.text_len), generator=generator)
        codes = torch.randint(TINY_DALLE.image_vocab, (ROWS, TINY_DALLE.image_len), generator=generator)
        own = slice(self.mesh.rank, None, self.mesh.world_size)
        loss = self.engine(text[own], codes[own], logits=False).loss
        self.engine.backward(loss)
        optimizer = self.engine.client_optimizer
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        # So that from the third update on, whether a variance may be clipped depends on what was noted in the first two.
        with optimizer.updating(gradient_bound=1.0 if step < 2 else 1e-3):
            self.engine.step()
        self.average.update(step)
        return float(self.mesh.sum(loss, "world") / self.mesh.world_size)

    def go_on(self) -> dict[str, Any]:
        """The updates after the checkpoint."""
        losses = [self.update(step) for step in AFTER]
        found = {"losses": losses, "weights": _digest(self.weights.consolidate())}
        self.average.swap()
        return found | {"average": _digest(self.weights.consolidate())}

    def check(self) -> None:
        """Shards tile the model, and have the values that DeepSpeed tells."""
        from deepspeed.utils import safe_get_full_fp32_param

        from dalle_ds.training.checkpoints.storage import matrix_size

        plain = dict(Dalle(TINY_DALLE).named_parameters())
        everyone: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(everyone, self.weights.param_shards)
        stage = self.engine.zero_optimization_stage()
        seen = {name: torch.zeros(matrix_size(value.shape), dtype=torch.int64) for name, value in plain.items()}
        for shard in everyone[0] if stage == 0 else [shard for own in everyone for shard in own]:
            assert shard.whole == tuple(plain[shard.name].shape)
            for at, _ in shard.slices(torch.empty(shard.length)):
                at.of(seen[shard.name]).add_(1)
        assert all(bool((count == 1).all()) for count in seen.values())
        whole = self.weights.consolidate()
        assert (whole is not None) == self.mesh.is_main
        for name, parameter in self.engine.module.named_parameters():
            if stage > 0:
                expected = safe_get_full_fp32_param(parameter)
                assert whole is None or torch.equal(whole[name].flatten(), expected.flatten())
        for number, shard in enumerate(self.weights.shards):
            group = self.engine.client_optimizer.param_groups[self.weights.group_of[number]]
            state = self.engine.client_optimizer.state[shard]
            assert (state["exp_avg"].dtype == torch.int16) == (group["moments"] == "16-bit")


def _digest(weights: dict[str, torch.Tensor] | None) -> str:
    digest = hashlib.sha256()
    for name, value in sorted((weights or {}).items()):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(folder: Path, mesh: Mesh) -> dict[str, Any]:
    from tests.training.by_hand import save_checkpoint

    found = {}
    for name, layout in LAYOUTS.items():
        training = Training(layout, mesh)
        for step in BEFORE:
            training.update(step)
        training.check()
        state = {"step": 2, "identity": {}, "layout": {}, "learning_rate": None}
        save_checkpoint(folder / name, 2, state, training.trained, mesh, keep=1)
        found[name] = training.go_on()
        # Back again, in an engine that has gone on.
        training.trained.load(folder / name / "step-2", mesh)
        found[f"{name} again"] = training.go_on()
    return found


def read(folder: Path, mesh: Mesh, pairs: list[list[str]]) -> dict[str, Any]:
    found = {}
    for source, name in pairs:
        training = Training(LAYOUTS[name], mesh)
        training.trained.load(folder / source / "step-2", mesh)
        found[f"{source} → {name}"] = training.go_on()
    return found


def main() -> None:
    mode, folder, file = sys.argv[-3], Path(sys.argv[-2]), Path(sys.argv[-1])
    mesh = Mesh.start("cpu")
    found = write(folder, mesh) if mode == "write" else read(folder, mesh, json.loads(file.read_text()))
    mesh.barrier()
    if mesh.is_main:
        file.write_text(json.dumps(found))
    mesh.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_launcher(main)
