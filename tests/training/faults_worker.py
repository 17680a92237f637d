"""Trains tiny transformers in which numbers go wrong on purpose; started by test_faults.py with the deepspeed launcher.

Arguments: a JSON file with a list of {"name", "run": fields, "deepspeed": JSON, "faults": …}, where faults are

    "gradients": {call of the loss, from 0, as a string: block}  NaN in the gradient of that block's branch, on rank 1
    "losses": [calls]                                            a NaN loss, on rank 1
    "spikes": [calls]                                            a loss a thousand times too great, on both

A run that ends with a `TrainingError` prints its name and the message.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_ds.cli import run_launcher
from dalle_ds.config import TransformerRun, from_dict
from dalle_ds.errors import TrainingError
from dalle_ds.models.dalle import Dalle, MlpBlock
from dalle_ds.parallel import WHOLE, Mesh, TensorGroup
from dalle_ds.tasks import Batch, Metrics
from dalle_ds.tasks.transformer import TransformerTask
from dalle_ds.training.trainer import Trainer


class FaultyTask(TransformerTask):
    """The transformer, with faults at chosen calls of its loss."""

    def __init__(self, run: TransformerRun, faults: dict[str, Any]) -> None:
        super().__init__(run)
        self.faults = faults
        self.call = -1

    def build_model(self, tensor: TensorGroup = WHOLE) -> Dalle:
        model = super().build_model(tensor)
        for number, block in enumerate(model.blocks):
            last = block.down if isinstance(block, MlpBlock) else block.attention.out
            last.register_forward_hook(lambda _module, _inputs, output, number=number: self._poison(output, number))
        return model

    def _poison(self, output: Tensor, number: int) -> None:
        if output.requires_grad and self._now("gradients") == number and dist.get_rank() == 1:
            output.register_hook(lambda gradient: gradient * math.nan)

    def _now(self, kind: str) -> int | None:
        return self.faults.get(kind, {}).get(str(self.call))

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        self.call += 1
        loss, metrics = super().loss(model, batch, step)
        if self.call in self.faults.get("losses", ()) and dist.get_rank() == 1:
            loss = loss * math.nan
        if self.call in self.faults.get("spikes", ()):
            loss = loss * 1000
        return loss, metrics


def main() -> None:
    mesh = Mesh.start("cpu")
    for job in json.loads(Path(sys.argv[-1]).read_text()):
        run = from_dict(TransformerRun, job["run"], job["name"])
        trainer = Trainer(lambda run, job=job: FaultyTask(run, job["faults"]), run, job["deepspeed"], mesh)
        try:
            trainer.fit()
        except TrainingError as error:
            print(f"{job['name']} rank {mesh.rank} TrainingError: {error}", flush=True)
            trainer.directory.release()
        del trainer
    mesh.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_launcher(main)
