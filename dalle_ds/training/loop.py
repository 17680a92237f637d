"""The training loop: updates, and what is reported, validated, saved and drawn between them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dalle_ds.config import Run
from dalle_ds.errors import DalleError, TrainingError
from dalle_ds.optim import LearningRate, WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Batch, Metrics, Task
from dalle_ds.training.batches import Batches
from dalle_ds.training.checkpoint import newest_checkpoint, save_checkpoint
from dalle_ds.training.deepspeed_config import EngineConfig
from dalle_ds.training.run_directory import RunDirectory
from dalle_ds.training.tracking import Tracker
from dalle_ds.training.weights import MasterWeights

STEPS_BETWEEN_ALARMS = 500
COUNTED = ("skipped", "truncated")
"""Parts of a batch that count events: rows that could not be read, captions that were cut."""


@dataclass(frozen=True)
class Setup:
    """What a run consists of besides its engine."""

    run: Run
    mesh: Mesh
    task: Task[Any]
    config: EngineConfig
    directory: RunDirectory
    batches: Batches


class Loop:
    """One `fit`: what lives from the first update to the last.

    Args:
        state: what a checkpoint keeps besides weights and optimizer; the loop begins at its "step".
    """

    def __init__(
        self,
        setup: Setup,
        engine: Any,
        weights: MasterWeights,
        average: WeightAverage | None,
        learning_rate: LearningRate,
        tracker: Tracker,
        state: dict[str, Any],
    ) -> None:
        self.run, self.mesh, self.task, self.config = setup.run, setup.mesh, setup.task, setup.config
        self.directory, self.batches = setup.directory, setup.batches
        self.state = state
        self.step: int = state["step"]
        self.engine, self.weights, self.average = engine, weights, average
        self.learning_rate, self.tracker = learning_rate, tracker
        self.counts: dict[str, int] = dict(state["counts"])
        self._alarmed = -STEPS_BETWEEN_ALARMS
        # In fp32 without ZeRO, DeepSpeed clips but keeps the norm to itself.
        self._norm_is_ours = self.config.zero_stage == 0 and self.config.precision == "fp32"

    def run_to_end(self) -> None:
        """All remaining updates, with their checkpoints and reports, and the export."""
        run, report = self.run, self.run.report
        batches = self.batches.train(self.step)
        self.engine.train()
        seconds: list[float] = []  # of the updates since the last report, waiting for data included
        while self.step < run.steps:
            began = time.perf_counter()
            metrics = self._update(batches)
            seconds.append(time.perf_counter() - began)
            self.step += 1
            last = self.step == run.steps
            if self.step % report.log_every == 0 or last:
                self.tracker.log(self.step, metrics, sum(seconds) / len(seconds))
                seconds.clear()
            self._raise_alarm(metrics)
            if last or (report.validate_every and self.step % report.validate_every == 0):
                self._validate()
            if self.step % run.save_every == 0 or last:
                self._save()
            if not last and report.preview_every and self.step % report.preview_every == 0:
                self._preview(self._plain_model())
        self._finish()

    def _finish(self) -> None:
        """Export the averaged model and draw the last preview from it."""
        directory = self.directory
        model = self._plain_model()
        if model is not None:
            self.task.export(model, directory.export)
        self._preview(model)
        if model is not None:
            directory.mark_exported(self.step)
            self.tracker.say(f"exported to {directory.export}")
        self.mesh.barrier()

    def _update(self, batches: Iterator[Batch]) -> dict[str, float]:
        step = self.step
        micro_batches = [next(batches) for _ in range(self.config.accumulation)]
        self._set_shares(micro_batches)
        rate = self.learning_rate.at(step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        reported: list[Metrics] = []
        norm: Tensor | None = None
        for batch in micro_batches:
            loss, metrics = self.task.loss(self.engine, batch, step)
            self.engine.backward(loss)
            if self._norm_is_ours and len(reported) == len(micro_batches) - 1:
                norm = get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])
            self.engine.step()
            counts = {name: batch[name].sum().float() for name in COUNTED if name in batch}
            reported.append({"loss": loss.detach(), **metrics, **counts})
        figures = self._counted(self._mean(reported), len(reported))
        figures["lr"] = rate
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        if norm is not None:  # a DeepSpeed JSON may switch its computation off
            figures["grad_norm"] = float(norm)
        self._require_finite(figures)
        if self.average is not None:
            self.average.update(step)
        self.learning_rate.observe(step, figures["loss"])
        return figures

    def _counted(self, figures: dict[str, float], micro_batches: int) -> dict[str, float]:
        """`figures` with means of counts replaced by the run's totals, where there is anything to tell."""
        for name in COUNTED:
            if name in figures:
                new = round(figures[name] * micro_batches * self.mesh.world_size)
                self.counts[name] = self.counts.get(name, 0) + new
        others = {name: value for name, value in figures.items() if name not in COUNTED}
        return others | {f"{name}_total": float(count) for name, count in self.counts.items() if count}

    def _require_finite(self, figures: dict[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if name in figures and not math.isfinite(figures[name]):
                saved = newest_checkpoint(self.directory.checkpoints)
                raise TrainingError(
                    f"the {name} of update {self.step + 1} is {figures[name]}: lower optim.lr or lengthen "
                    f"optim.warmup_steps; the last good checkpoint is {saved if saved is not None else 'none yet'}"
                )

    def _set_shares(self, micro_batches: list[Batch]) -> None:
        """Give each micro-batch its share in the mean over the whole batch; see `Task.loss`."""
        own = torch.stack([self.task.weight_of(batch).float() for batch in micro_batches])
        total = self.mesh.sum(own.sum()).clamp_min(1)
        count = len(micro_batches) * self.mesh.world_size
        for batch, weight in zip(micro_batches, own, strict=True):
            batch["share"] = weight * count / total

    def _mean(self, reported: list[Metrics]) -> dict[str, float]:
        """One number per figure, in one reduction: means of scalars over micro-batches and ranks; vectors are summed and
        given to the task."""
        size = len(reported) * self.mesh.world_size
        own = torch.cat([torch.stack([m[name].float() for m in reported]).sum(0).flatten() for name in reported[0]])
        totals = self.mesh.sum(own).split([value.numel() for value in reported[0].values()])
        summed = dict(zip(reported[0], totals, strict=True))
        scalars = [name for name, value in reported[0].items() if value.ndim == 0]
        figures = {name: float(summed.pop(name)) / size for name in scalars}
        return figures | self.task.digest(summed)

    def _raise_alarm(self, metrics: dict[str, float]) -> None:
        step = self.step
        sentence = self.task.alarm(metrics, step)
        if sentence is not None and step - self._alarmed >= STEPS_BETWEEN_ALARMS:
            self._alarmed = step
            self.tracker.say(f"ALARM at step {step}: {sentence}", style="bold red")

    @contextmanager
    def _averaged(self) -> Iterator[nn.Module]:
        """The engine in evaluation mode with averaged weights, if any are kept. Collective."""
        if self.average is not None:
            self.average.swap()
            self.weights.publish()
        self.engine.eval()
        # No `finally`: after an error on one rank, the others are in another collective than the swap back would be.
        with torch.no_grad():
            yield self.engine
        self.engine.train()
        if self.average is not None:
            self.average.swap()
            self.weights.publish()

    def _validate(self) -> None:
        sums: Metrics = {}
        with self._averaged() as model:
            for batch in self.batches.validation():
                for name, value in self.task.evaluate(model, batch).items():
                    sums[name] = sums[name] + value if name in sums else value
        figures = self.task.summarize({name: self.mesh.sum(value) for name, value in sums.items()})
        self.tracker.log(self.step, {f"validation/{name}": value for name, value in figures.items()})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.tracker.say(f"validation at step {self.step}: {shown}")

    def _save(self) -> None:
        state = {
            **self.state,
            "step": self.step,
            "learning_rate": self.learning_rate.state_dict(),
            "counts": self.counts,
            "wandb_id": self.tracker.run_id,
        }
        keep = self.run.report.keep_checkpoints
        save_checkpoint(self.directory.checkpoints, self.step, self.engine, self.average, state, self.mesh, keep)

    def _plain_model(self) -> nn.Module | None:
        """The model with averaged weights, fp32 on the CPU and outside DeepSpeed, on the main rank; None elsewhere.
        Collective."""
        with self._averaged():
            state = self.weights.consolidate(keep=self.mesh.is_main)
        if state is None:
            return None
        model = self.task.build_model()
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _preview(self, model: nn.Module | None) -> None:
        """Draw with a plain model on the main rank, which it moves; not being able to is no reason to end a run."""
        if model is not None:
            path = self.directory.samples / f"step-{self.step}.png"
            dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
            try:
                with torch.no_grad():
                    picture = self.task.preview(model.to(self.mesh.device, dtype), self.batches.preview())
                picture.save(path)
            except (OSError, torch.OutOfMemoryError, DalleError) as error:
                self.tracker.say(f"the preview {path} could not be made: {error}", style="red")
        self.mesh.barrier()
