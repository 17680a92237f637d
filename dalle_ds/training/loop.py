"""The training loop: updates, and what is reported, validated, saved and drawn between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dalle_ds.config import Run
from dalle_ds.errors import DalleError, TrainingError
from dalle_ds.optim import LearningRate, WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.precision import GradientScales
from dalle_ds.tasks import Batch, Metrics, Task
from dalle_ds.training.batches import Batches
from dalle_ds.training.checkpoint import (
    drop_checkpoints_after,
    load_checkpoint,
    load_state,
    newest_good_checkpoint,
    save_checkpoint,
)
from dalle_ds.training.deepspeed_config import EngineConfig
from dalle_ds.training.guard import Guard, Rollbacks
from dalle_ds.training.numerics import NumericsReport
from dalle_ds.training.passes import passes_of
from dalle_ds.training.replicas import ReplicaReduction
from dalle_ds.training.run_directory import RunDirectory
from dalle_ds.training.tracking import Tracker
from dalle_ds.training.update import COUNTED, Updater
from dalle_ds.training.weights import MasterWeights

STEPS_BETWEEN_ALARMS = 500
STEPS_BETWEEN_SKIP_ALARMS = 50


@dataclass(frozen=True)
class Setup:
    """What a run consists of besides its engine."""

    run: Run
    mesh: Mesh
    task: Task[Any]
    config: EngineConfig
    directory: RunDirectory
    batches: Batches


@dataclass(frozen=True)
class Trained:
    """What training changes, besides the weights and moments that the engine holds."""

    engine: Any
    weights: MasterWeights
    average: WeightAverage | None
    learning_rate: LearningRate
    scales: GradientScales | None
    guard: Guard
    replicas: ReplicaReduction | None

    def load(self, checkpoint: Path, state: dict[str, Any], mesh: Mesh) -> None:
        """Put everything back to where a checkpoint was written; `state` is what `load_state` returns of it. Collective."""
        optimizer = self.engine.client_optimizer
        load_checkpoint(checkpoint, self.weights, optimizer, mesh, average=self.average, errors=self.replicas)
        # DeepSpeed's count of updates, by which its profiler and its monitors go.
        self.engine.global_steps = state["step"]
        self.learning_rate.load_state_dict(state["learning_rate"])
        if self.scales is not None and state["scales"] is not None:
            self.scales.load_state_dict(state["scales"])
        self.guard.load_state_dict(state["guard"])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights, moments and average."""
        return {
            "learning_rate": self.learning_rate.state_dict(),
            "scales": None if self.scales is None else self.scales.state_dict(),
            "guard": self.guard.state_dict(),
        }


class Loop:
    """One `fit`: what lives from the first update to the last.

    Args:
        state: what a checkpoint keeps besides weights and optimizer; the loop begins at its "step".
    """

    def __init__(
        self, setup: Setup, trained: Trained, tracker: Tracker, state: dict[str, Any], rollbacks: Rollbacks
    ) -> None:
        self.run, self.mesh, self.task, self.config = setup.run, setup.mesh, setup.task, setup.config
        self.directory, self.batches = setup.directory, setup.batches
        self.trained, self.tracker, self.rollbacks = trained, tracker, rollbacks
        self.engine, self.weights, self.average = trained.engine, trained.weights, trained.average
        self._begin_at(state)
        self._alarmed = -STEPS_BETWEEN_ALARMS
        self._place: int | None = None
        self._skipped_in_a_row = 0
        every = self.run.report.numerics_every
        self._passes = passes_of(self.task, self.engine, self.mesh)
        self._updater = Updater(
            self.task,
            self.engine,
            self._passes,
            self.mesh,
            self.run.optim,
            scales=trained.scales,
            scaling=self.task.scaling,
            average=self.average,
            numerics=NumericsReport(self.directory.numerics_file, every, self.mesh, trained.scales) if every else None,
            replicas=trained.replicas,
        )

    def _begin_at(self, state: dict[str, Any]) -> None:
        self.state = state
        self.step: int = state["step"]
        self.counts: dict[str, int] = dict(state["counts"])
        self._save_is_due = False

    def run_to_end(self) -> None:
        """All remaining updates, with their checkpoints and reports, and the export."""
        run, report = self.run, self.run.report
        self.engine.train()
        seconds: list[float] = []  # of the updates since the last report, waiting for data included
        while self.step < run.steps:
            began = time.perf_counter()
            metrics, lost = self._update()
            seconds.append(time.perf_counter() - began)
            self.step += 1
            if lost:
                self._roll_back(metrics)
                seconds.clear()
                continue
            last = self.step == run.steps
            if self.step % report.log_every == 0 or last:
                self.tracker.log(self.step, metrics, sum(seconds) / len(seconds))
                seconds.clear()
            self._raise_alarm(metrics)
            if last or (report.validate_every and self.step % report.validate_every == 0):
                self._validate()
            self._save_if_due(last)
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

    def _update(self) -> tuple[dict[str, float], bool]:
        """Make an update; returns its figures and whether the run should go back from here."""
        step, learning_rate = self.step, self.trained.learning_rate
        outcome = self._updater.update(self._next_batches(), step, learning_rate.at(step))
        loss = outcome.figures["loss"]
        if self.average is not None:
            self.average.update(step)
        if outcome.finite:
            learning_rate.observe(step, loss)
        else:
            norm = outcome.figures["grad_norm"]
            sentence = f"update {step + 1} is left out: loss {loss:.4g}, gradient norm {norm:.4g}"
            if "powersgd_overflows" in outcome.figures:
                sentence += (
                    "; a factor of PowerSGD left its format: lower powersgd.p_scale_log2 or powersgd.q_scale_log2"
                )
            self.tracker.say(sentence, style="yellow")
        lost = self.trained.guard.observe(loss, outcome.finite, outcome.applied)
        self._skipped_in_a_row = 0 if outcome.applied else self._skipped_in_a_row + 1
        if self._skipped_in_a_row and self._skipped_in_a_row % STEPS_BETWEEN_SKIP_ALARMS == 0:
            self.tracker.say(
                f"ALARM at step {step + 1}: the last {self._skipped_in_a_row} updates were all skipped; where gradient scales "
                "fall (gradient_scale in the metrics), begin with a lower scaling.initial_log2",
                style="bold red",
            )
        return self._counted(outcome.figures, outcome.applied), lost

    def _next_batches(self) -> list[Batch]:
        """The micro-batches of the next update."""
        place = self.rollbacks.place(self.step)
        if place != self._place:
            self._stream = self.batches.train(place)
        self._place = place + 1
        return [next(self._stream) for _ in range(self.config.accumulation)]

    def _counted(self, figures: dict[str, float], applied: bool) -> dict[str, float]:
        """`figures` with counts replaced by the run's totals, where there is anything to tell."""
        new = {name: round(figures.pop(name)) for name in COUNTED if name in figures}
        for name, count in (new | {"skipped_updates": int(not applied)}).items():
            self.counts[name] = self.counts.get(name, 0) + count
        return figures | {f"{name}_total": float(count) for name, count in self.counts.items() if count}

    def _roll_back(self, metrics: dict[str, float]) -> None:
        """Go back to the newest checkpoint and leave out the data that followed it. Collective.

        Raises:
            TrainingError: there is no checkpoint, or going back has not helped.
        """
        went_wrong = self.step
        what = (
            f"{self.trained.guard.bad_in_a_row} updates in a row went wrong, up to update {went_wrong} with a loss of "
        )
        what += f"{metrics['loss']:.4g} and a gradient norm of {metrics['grad_norm']:.4g}"
        advice = (
            "look at the data of these updates; resume with a lower rate (--optim.halve_at and the checkpoint's step), or "
            "begin a new run with a lower optim.lr or a longer optim.warmup_steps"
        )
        checkpoint = self.mesh.decide(lambda: newest_good_checkpoint(self.directory.checkpoints))
        if checkpoint is None:
            raise TrainingError(f"{what}, and there is no checkpoint yet to go back to: {advice}")
        state = load_state(checkpoint)
        tries = self.rollbacks.in_a_row(state["step"])
        if tries >= self.run.guard.rollbacks:
            raise TrainingError(
                f"{what}, and {tries} times of going back to an earlier checkpoint have not helped: {advice}; the last good "
                f"checkpoint is {checkpoint}"
            )
        self.rollbacks = self.rollbacks.after(went_wrong, state["step"])
        self.mesh.decide(lambda: drop_checkpoints_after(self.directory.checkpoints, state["step"]))
        self.mesh.decide(lambda: self.rollbacks.write(self.directory.rollbacks_file))
        self.trained.load(checkpoint, state, self.mesh)
        self._begin_at({**self.state, **state, "layout": self.state["layout"], "wandb_id": self.tracker.run_id})
        self.mesh.decide(lambda: self.tracker.rewind(lambda: self.directory.drop_metrics_after(self.step)))
        self.tracker.say(
            f"WENT BACK to step {self.step}: {what}; the data of the {went_wrong - self.step} updates since are left out",
            style="bold red",
        )

    def _raise_alarm(self, metrics: dict[str, float]) -> None:
        step = self.step
        sentence = self.task.alarm(metrics, step)
        if sentence is not None and step - self._alarmed >= STEPS_BETWEEN_ALARMS:
            self._alarmed = step
            self.tracker.say(f"ALARM at step {step}: {sentence}", style="bold red")

    @contextmanager
    def _averaged(self) -> Iterator[Callable[..., Any]]:
        """The model in evaluation mode with averaged weights, if any are kept. Collective."""
        average = self.average if self.average is not None and self.average.begun(self.step) else None
        if average is not None:
            average.swap()
            self.weights.publish()
        self.engine.eval()
        # No `finally`: after an error on one rank, the others are in another collective than the swap back would be.
        with torch.no_grad():
            yield self._passes.model
        self.engine.train()
        if average is not None:
            average.swap()
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

    def _save_if_due(self, last: bool) -> None:
        """Save when it is time, but not in the midst of updates that go wrong: there may be a need to go back."""
        self._save_is_due |= self.step % self.run.save_every == 0 or last
        if not self._save_is_due or (self.trained.guard.bad_in_a_row and not last):
            return
        self._save_is_due = False
        state = {
            **self.state,
            **self.trained.state_dict(),
            "step": self.step,
            "counts": self.counts,
            "wandb_id": self.tracker.run_id,
        }
        save_checkpoint(
            self.directory.checkpoints,
            self.step,
            state,
            self.weights,
            self.engine.client_optimizer,
            self.mesh,
            keep=self.run.report.keep_checkpoints,
            average=self.average,
            errors=self.trained.replicas,
        )

    def _plain_model(self) -> nn.Module | None:
        """The model with averaged weights, fp32 on the CPU and outside DeepSpeed, on the main rank; None elsewhere.
        Collective."""
        with self._averaged():
            state = self.weights.consolidate()
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
