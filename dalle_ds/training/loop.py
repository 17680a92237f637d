"""The training loop: updates, and what is reported, validated, saved and previewed between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dalle_ds.config import Run
from dalle_ds.config.deepspeed import EngineConfig
from dalle_ds.data.faults import BadSampleBudget
from dalle_ds.errors import CheckpointError, DalleError, Interrupted, TrainingError
from dalle_ds.parallel import Mesh
from dalle_ds.resilience.rollback import Rollbacks
from dalle_ds.resilience.signals import StopSignals
from dalle_ds.resilience.stragglers import Stragglers
from dalle_ds.tasks import Batch, Metrics, Task
from dalle_ds.training.batches import Batches
from dalle_ds.training.card import write_run_card
from dalle_ds.training.checkpoints.content import TrainState, load_state
from dalle_ds.training.checkpoints.saver import CheckpointScheduler
from dalle_ds.training.exponents import NumericsReport
from dalle_ds.training.randomness import seed_update
from dalle_ds.training.run_directory import RunDirectory
from dalle_ds.training.step import COUNTED, TrainStep
from dalle_ds.training.strategies import strategy_for
from dalle_ds.training.tracking import Tracker

STEPS_BETWEEN_ALARMS = 500
STEPS_BETWEEN_SKIP_ALARMS = 50
MOST_LINES = 20
"""On data that could not be read, at a time."""
LONG_TIMEOUT = 120.0
"""Minutes that validation, previews and writing to slow disks may take while other processes wait, beyond what updates may."""
EVENTS = {
    "skipped": "rows that could not be read",
    "truncated": "captions cut",
    "skipped_updates": "updates left out",
    "failed_saves": "checkpoints that could not be written",
}
"""What a run counts, for the user."""


@dataclass(frozen=True)
class RunContext:
    """What a run consists of besides its engine."""

    run: Run
    mesh: Mesh
    task: Task[Any]
    config: EngineConfig
    directory: RunDirectory
    batches: Batches
    signals: StopSignals
    pulse: Callable[..., None]
    """`Watch.pulse`: is told what this process is about to do."""


class Loop:
    """One `fit`: what lives from the first update to the last, beginning at the "step" of a checkpoint's `state`."""

    def __init__(
        self, context: RunContext, trained: TrainState, tracker: Tracker, state: dict[str, Any], rollbacks: Rollbacks
    ) -> None:
        self.run, self.mesh, self.task, self.config = context.run, context.mesh, context.task, context.config
        self.directory, self.batches, self.signals = context.directory, context.batches, context.signals
        self.trained, self.tracker, self.rollbacks = trained, tracker, rollbacks
        self.engine, self.weights, self.average = trained.engine, trained.tensors.weights, trained.tensors.average
        self._pulse = context.pulse
        self._begin_at(state)
        self._alarmed = -STEPS_BETWEEN_ALARMS
        self._skipped_in_a_row = 0
        self._stopping = False
        self._untold = 0
        self._minutes = 0.0
        """What waiting for data and one update may take, where that is more than usual."""
        self._strategy = strategy_for(self.task, self.engine, self.mesh)
        self._strategy.pulse = lambda: self._pulse(self.step, "step", self._minutes)
        numerics = None
        if every := self.run.report.numerics_every:
            lines = tracker.open(self.directory.numerics_file)
            numerics = NumericsReport(lines, every, self.mesh, trained.scales)
        self._train_step = TrainStep(
            self._strategy,
            self.mesh,
            self.run.optim,
            scales=trained.scales,
            average=self.average,
            numerics=numerics,
            replicas=trained.tensors.replicas,
        )
        folder, long = self.directory.checkpoints, partial(self._long, "saving")
        self._saving = CheckpointScheduler(folder, trained.tensors, self.run, self.mesh, tracker, long)
        self._saving.begin_at(self.step)
        self._saving.failures = self.counts.get("failed_saves", 0)
        self._unreadable = BadSampleBudget(self.run.loader.max_unreadable, self.batches.faults, self.run.data)
        self._stragglers = Stragglers(self.mesh, self.run.watch, lambda line: tracker.say(line, style="yellow"))

    def _begin_at(self, state: dict[str, Any]) -> None:
        self.state = state
        self.step: int = state["step"]
        self.counts: dict[str, int] = dict(state["counts"])

    def run_to_end(self) -> None:
        """All remaining updates, with their checkpoints and reports, and the export.

        Interrupted where the run was told to stop, and has written a checkpoint; DataError where too much of the data cannot
        be read, or it has changed.
        """
        run, report = self.run, self.run.report
        for samples in (self.batches.train_samples, self.batches.validation_samples):
            self._unreadable.check_known(samples.faults, len(samples))
            self._tell([str(fault) for fault in samples.faults])
        self.engine.train()
        if self.state["validation_is_due"]:
            self._validate()
        first = self.step
        # Of the updates since the last report: seconds, and of these waiting for data.
        times: list[tuple[float, float]] = []
        slowest: dict[str, float] = {}
        while self.step < run.steps:
            began = time.perf_counter()
            # The first update starts loaders, compiles, and connects processes.
            self._minutes = LONG_TIMEOUT if self.step == first else 0.0
            pulse = partial(self._pulse, self.step, "waiting for data", self._minutes)
            with self._stragglers.waiting(self.step):
                batches = self.batches.next_update(self.rollbacks.data_step(self.step), self.config.accumulation, pulse)
            waited = time.perf_counter() - began
            self._pulse(self.step, "step", self._minutes)
            metrics, lost = self._update(batches)
            times.append((time.perf_counter() - began, waited))
            self.step += 1
            slowest |= self._stragglers.after(self.step, times[-1][0])
            if self.step == first + 1:
                # Until here, processes load, compile and connect, each at its own pace.
                self.mesh.set_timeout(run.watch.collective_minutes)
            if lost:
                self._roll_back(metrics)
                times.clear()
                self._stop_if_told()
                continue
            last = self.step == run.steps
            if self.step % report.log_every == 0 or last:
                self._tell_unreadable()
                seconds, data_seconds = (sum(column) / len(times) for column in zip(*times, strict=True))
                metrics |= slowest | {"data_seconds": data_seconds}
                self.tracker.log(self.step, metrics, seconds)
                slowest.clear()
                times.clear()
            self._raise_alarm(metrics)
            validates = last or bool(report.validate_every and self.step % report.validate_every == 0)
            if validates and not self._stopping:
                self._validate()
            self._save_if_due(last, validation_is_due=validates and self._stopping)
            self._stop_if_told()
            if not last and report.preview_every and self.step % report.preview_every == 0:
                with self._long("previewing"):
                    model = self._plain_model()
                self._preview(model)
        self._finish()

    @contextmanager
    def _long(self, phase: str) -> Iterator[None]:
        """Something that may take much longer than an update. Collective."""
        self._pulse(self.step, phase, LONG_TIMEOUT)
        with self.mesh.extended_timeout(LONG_TIMEOUT):
            yield

    def _stop_if_told(self) -> None:
        if self._stopping:
            told = self.signals.requested
            raise Interrupted(
                f"{self.directory.path}: stopped after update {self.step}"
                f"{f' by {told}' if told else ', as another process was told to'}; the same command goes on from there"
            )

    def _finish(self) -> None:
        """Export the averaged model and make the last preview with it."""
        directory = self.directory
        with self._long("exporting"):
            model = self._plain_model(is_last=True)
            if model is not None:
                self.task.export(model, directory.export)
                write_run_card(directory.export, self.task, self.step, directory.metrics_file)
        self._preview(model)
        if model is not None:
            directory.mark_exported(self.step)
            counts = {EVENTS[name]: count for name, count in self.counts.items()}
            counts["times back to a checkpoint"] = len(self.rollbacks.events)
            counts["restarts"] = directory.starts() - 1
            told = [f"{count:,} {what}" for what, count in counts.items() if count > 0]
            self.tracker.say(f"exported to {directory.export}")
            self.tracker.say(f"done: {self.step:,} updates, {', '.join(told) or 'without any disturbance'}")
        self.mesh.barrier()

    # --- an update

    def _update(self, micro_batches: list[Batch]) -> tuple[dict[str, float], bool]:
        """Make an update; returns its metrics and whether the run should go back from here."""
        step, learning_rate = self.step, self.trained.learning_rate
        seed_update(self.run.seed, step, self.mesh.index("data"))
        # What the processes tell each other with every update: whether one was told to stop, and how far saving is.
        flags = [int(self.signals.requested is not None), *self._saving.flags()]
        result = self._train_step.run(micro_batches, step, learning_rate.at(step), flags)
        metrics, finite, applied = result.metrics, result.decision.finite, result.decision.applied
        stop, *saving = map(round, result.flags)
        self._stopping |= stop > 0
        self._saving.note(saving)
        if self.average is not None:
            self.average.update(step)
        if finite:
            learning_rate.observe(step, metrics["loss"])
        else:
            self._tell_left_out(metrics)
        lost = self.trained.guard.observe(metrics["loss"], finite, applied)
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        if self._skipped_in_a_row and self._skipped_in_a_row % STEPS_BETWEEN_SKIP_ALARMS == 0:
            self.tracker.alarm(
                f"the last {self._skipped_in_a_row} updates were all skipped; where gradient scales fall (gradient_scale in "
                "the metrics), begin with a lower scaling.initial_log2",
                step + 1,
            )
        skipped = round(metrics.get("skipped", 0))
        self._untold += skipped
        self._unreadable.observe(self.run.train.batch_size + skipped, skipped)  # all processes know the same count
        # In place of an update's counts, the run's totals, where there is anything to tell.
        new = {name: round(metrics.pop(name)) for name in COUNTED if name in metrics}
        for name, count in (new | {"skipped_updates": int(not applied)}).items():
            self.counts[name] = self.counts.get(name, 0) + count
        return metrics | {f"{name}_total": float(count) for name, count in self.counts.items() if count}, lost

    def _tell_left_out(self, metrics: dict[str, float]) -> None:
        line = (
            f"update {self.step + 1} is left out: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}"
        )
        if "powersgd_overflows" in metrics:
            line += "; a factor of PowerSGD left its format: lower powersgd.p_scale_log2 or powersgd.q_scale_log2"
        self.tracker.say(line, style="yellow")

    def _tell_unreadable(self) -> None:
        """A line for each place that could not be read, whichever process found it. Collective if there is any."""
        if self._untold:
            self._untold = 0
            everyone = self.mesh.gather_objects(self.batches.faults.news())
            self._tell(list(dict.fromkeys(line for lines in everyone for line in lines)))

    def _tell(self, lines: list[str]) -> None:
        for line in lines[:MOST_LINES]:
            self.tracker.say(line, style="yellow")
        if len(lines) > MOST_LINES:
            self.tracker.say(f"and {len(lines) - MOST_LINES:,} more", style="yellow")

    def _raise_alarm(self, metrics: dict[str, float]) -> None:
        sentence = self.task.alarm(metrics, self.step)
        if sentence is not None and self.step - self._alarmed >= STEPS_BETWEEN_ALARMS:
            self._alarmed = self.step
            self.tracker.alarm(sentence, self.step)

    def _roll_back(self, metrics: dict[str, float]) -> None:
        """Go back to the newest checkpoint and leave out the data that followed it. Collective.

        TrainingError where there is no checkpoint, or going back has not helped.
        """
        went_wrong = self.step
        what = (
            f"{self.trained.guard.bad_in_a_row} updates in a row went wrong, up to update {went_wrong} with a loss of "
            f"{metrics['loss']:.4g} and a gradient norm of {metrics['grad_norm']:.4g}"
        )
        advice = (
            "look at the data of these updates; resume with a lower rate (--optim.halve_at and the checkpoint's step), or "
            "begin a new run with a lower optim.lr or a longer optim.warmup_steps"
        )
        self._saving.wait()
        with self._long("going back"):
            checkpoint = self.directory.checkpoints.newest_good(self.mesh)
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
        self.mesh.decide(lambda: self.directory.checkpoints.drop_after(state["step"]))
        self.mesh.decide(lambda: self.rollbacks.write(self.directory.rollbacks_file))
        with self._long("going back"):
            self.trained.load(checkpoint, state, self.mesh)
        self._begin_at({**self.state, **state, "layout": self.state["layout"]})
        self._saving.begin_at(self.step)
        self.mesh.decide(lambda: self.directory.drop_metrics_after(self.step))
        self.tracker.reopen()
        self.tracker.say(
            f"WENT BACK to step {self.step}: {what}; the data of the {went_wrong - self.step} updates since are left out",
            style="bold red",
        )

    # --- between updates

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
            yield self._strategy.model
        self.engine.train()
        if average is not None:
            average.swap()
            self.weights.publish()

    def _validate(self) -> None:
        if len(self.batches.validation_samples) == 0:
            return
        sums: Metrics = {}
        skipped = torch.zeros((), dtype=torch.int64, device=self.mesh.device)
        with self._long("validating"), self._averaged() as model:
            for batch in self.batches.validation():
                skipped = skipped + batch["skipped"].sum()
                for name, value in self.task.evaluate(model, batch).items():
                    sums[name] = sums[name] + value if name in sums else value
        metrics = self.task.summarize({name: self.mesh.sum(value) for name, value in sums.items()})
        self.tracker.log(self.step, {f"validation/{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        lost = int(self.mesh.sum(skipped))
        unread = f"; for {lost:,} rows that could not be read, others stood in" if lost else ""
        self.tracker.say(f"validation at step {self.step}: {shown}{unread}")

    def _save_if_due(self, last: bool, validation_is_due: bool) -> None:
        """Save when it is time, but not in the midst of updates that go wrong: there may be a need to go back."""

        def state() -> dict[str, Any]:
            with self._long("looking at the data"):
                self.mesh.decide(self.batches.check_unchanged)
            return {
                **self.state,
                **self.trained.state_dict(),
                "step": self.step,
                "counts": self.counts,
                "validation_is_due": validation_is_due,
            }

        ends, bad = last or self._stopping, self.trained.guard.bad_in_a_row > 0
        saved = self._saving.save_if_due(self.step, state, ends=ends, hold=bad)
        self.counts["failed_saves"] = self._saving.failures
        if saved is None or saved.failure is None:
            return
        if not self._stopping:
            raise CheckpointError(
                f"{saved.failure}; see to the disk and start the run again: it goes on from the last complete checkpoint"
            )
        self.tracker.alarm(f"{saved.failure}; the run goes on from the last complete checkpoint")

    def _plain_model(self, *, is_last: bool = False) -> nn.Module | None:
        """The model with averaged weights, fp32 on the CPU and outside DeepSpeed, on the main rank; None elsewhere.
        Collective. The last one's task measures it first."""
        with self._averaged() as averaged:
            if is_last:
                self.task.measure(averaged, self.batches.train(self.rollbacks.data_step(self.step)), self.mesh)
            state = self.weights.consolidate()
        if state is None:
            return None
        if is_last and self.task.lora is not None:
            self.task.adapter(state).save(self.directory.adapter)
        return self.task.plain_model(state)

    def _preview(self, model: nn.Module | None) -> None:
        """Preview with a plain model on the main rank, which it moves; not being able to is no reason to end a run."""
        with self._long("previewing"):
            if model is not None and len(self.batches.validation_samples) > 0:
                path = self.directory.samples / f"step-{self.step}.png"
                dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
                try:
                    with torch.no_grad():
                        image = self.task.preview(model.to(self.mesh.device, dtype), self.batches.preview())
                    image.save(path)
                except (OSError, torch.OutOfMemoryError, DalleError) as error:
                    self.tracker.say(f"the preview {path} could not be made: {error}", style="red")
