"""The training loop of every task."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

import dalle_ds
from dalle_ds.config import Run
from dalle_ds.data import BatchLoader, evaluation_batches
from dalle_ds.errors import CheckpointError, TrainingError
from dalle_ds.optim import LearningRate, WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Batch, Metrics, Samples, Task
from dalle_ds.training.checkpoint import load_checkpoint, load_state, newest_checkpoint, save_checkpoint
from dalle_ds.training.deepspeed_config import EngineConfig, resolve
from dalle_ds.training.run_directory import RunDirectory
from dalle_ds.training.tracking import Tracker
from dalle_ds.training.weights import MasterWeights

PREVIEW_ROWS = 16
COUNTED = ("skipped", "truncated")
"""Parts of a batch that count events: rows that could not be read, captions that were cut."""
STEPS_BETWEEN_ALARMS = 500


class Trainer:
    """Trains a task on a DeepSpeed engine, from the newest complete checkpoint of the run directory on.

    Every rank makes one and calls `fit`. What a step computes does not depend on the number of processes, the micro-batch
    or the ZeRO stage, up to rounding; a resumed run continues bit for bit.

    Args:
        make_task: builds the task from its run configuration.
        run: what to train.
        json_config: the DeepSpeed JSON's content.
        mesh: the processes that take part.

    Raises:
        ConfigError, CheckpointError, DataError: what the user asked for cannot be done; raised before anything is written.
    """

    def __init__(
        self, make_task: Callable[[Any], Task[Any]], run: Run, json_config: dict[str, Any], mesh: Mesh
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed calls collectives by names that torch is about to change; nothing that a user could mend.
        warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
        self.run = run
        self.mesh = mesh
        self.config: EngineConfig = resolve(json_config, run, mesh.world_size)
        self.task = make_task(run)
        self.directory = RunDirectory(run.run_dir, self.task.name, run)
        self._checkpoint = newest_checkpoint(self.directory.checkpoints)
        self._state = self._load_state()
        self.step: int = self._state["step"]
        self._train_samples = self.task.samples("train")
        self._validation_samples = self.task.samples("validation")
        mesh.barrier()
        if mesh.is_main:
            self.directory.claim()

    def _load_state(self) -> dict[str, Any]:
        identity = self.task.identity()
        layout = {
            "world_size": self.mesh.world_size,
            "zero_stage": self.config.zero_stage,
            "precision": self.config.precision,
        }
        fresh = {
            "step": 0,
            "identity": identity,
            "layout": layout,
            "learning_rate": None,
            "counts": {},
            "wandb_id": None,
        }
        if self._checkpoint is None:
            return fresh
        state = load_state(self._checkpoint)
        for name, fingerprint in identity.items():
            if state["identity"].get(name) != fingerprint:
                raise CheckpointError(
                    f"the run in {self.directory.path} was trained on another {name} than --{name} names now "
                    f"(fingerprint {state['identity'].get(name, 'none')[:12]}, found {fingerprint[:12]}): "
                    "resume it with the same one, or name a new --run_dir"
                )
        for name, value in layout.items():
            if state["layout"].get(name) != value:
                raise CheckpointError(
                    f"the checkpoint {self._checkpoint} was written with {name}={state['layout'].get(name)}, this is "
                    f"{name}={value}: resume with the same number of processes and DeepSpeed JSON"
                )
        return {**fresh, **state}

    def fit(self) -> None:
        """Train to `run.steps` updates, then validate, draw a preview and export; all of it is skipped where it is done.

        Raises:
            TrainingError: the loss is not finite.
            CheckpointError: a checkpoint cannot be read or written.
        """
        if self.step >= self.run.steps and (self.directory.export / "config.json").is_file():
            if self.mesh.is_main:
                done = f"{self.step} of {self.run.steps} updates"
                print(f"{self.directory.path} is done: {done}, exported to {self.directory.export}")
                self.directory.release()
            return
        engine = self._build_engine()
        weights = MasterWeights(engine)
        decay = self.run.train.average_decay
        average = WeightAverage(weights.shards, decay) if decay is not None else None
        learning_rate = LearningRate(self.run.optim)
        if self._checkpoint is not None:
            load_checkpoint(self._checkpoint, engine, average, self.mesh)
            learning_rate.load_state_dict(self._state["learning_rate"])
        if self.mesh.is_main:
            self.directory.drop_metrics_after(self.step)
        with self._tracker() as tracker:
            _Loop(self, engine, weights, average, learning_rate, tracker).run_to_end()
        if self.mesh.is_main:
            self.directory.release()

    def _build_engine(self) -> Any:
        torch.manual_seed(self.run.seed)
        with deepspeed.zero.Init(config_dict_or_path=self.config.deepspeed, enabled=self.config.zero_stage == 3):
            model = self.task.build_model()
        model.to(self.mesh.device)
        optim = self.run.optim
        optimizer = torch.optim.AdamW(
            self.task.parameter_groups(model), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.config.deepspeed, dist_init_required=False
        )
        if self.config.zero_stage == 0 and self.config.precision == "bf16":
            # DeepSpeed allocates Adam's state by a step on zeros, after which the first update would count as the second.
            engine.optimizer.optimizer.state.clear()
        return engine

    def _tracker(self) -> Tracker:
        tracker = Tracker(
            self.directory.metrics_file,
            self.run,
            self.task.name,
            enabled=self.mesh.is_main,
            start_step=self.step,
            world_size=self.mesh.world_size,
            items=self.task.items_per_sample(),
            flops_per_sample=self.task.flops_per_sample() if self.run.report.peak_tflops else 0.0,
            run_id=self._state["wandb_id"],
        )
        begun = f"resumed from {self._checkpoint}" if self._checkpoint is not None else "new run"
        tracker.say(
            f"{self.task.name}: {begun} in {self.directory.path}; {len(self._train_samples):,} training and "
            f"{len(self._validation_samples):,} validation rows; {self.mesh.world_size} × {self.mesh.device.type}, "
            f"ZeRO-{self.config.zero_stage}, {self.config.precision}, {self.config.accumulation} × "
            f"{self.config.micro_batch} × {self.mesh.world_size} = {self.run.train.batch_size} pictures per update"
        )
        for line in self.task.describe():
            tracker.say(line)
        return tracker

    def checkpoint_state(
        self, learning_rate: LearningRate, counts: dict[str, int], wandb_id: str | None
    ) -> dict[str, Any]:
        """What a checkpoint keeps besides weights and optimizer."""
        return {
            **self._state,
            "step": self.step,
            "learning_rate": learning_rate.state_dict(),
            "counts": counts,
            "wandb_id": wandb_id,
            "version": dalle_ds.__version__,
        }

    def train_batches(self) -> Iterator[Batch]:
        """Micro-batches of this rank from the next update on, endless."""
        return iter(
            BatchLoader(
                self._train_samples,
                seed=self.run.seed,
                batch_size=self.run.train.batch_size,
                micro_batch=self.config.micro_batch,
                rank=self.mesh.rank,
                world_size=self.mesh.world_size,
                start_step=self.step,
                workers=self.run.loader.workers,
            )
        )

    def validation_batches(self, limit: int) -> Iterator[Batch]:
        """This rank's part of the first `limit` batches of validation data."""
        size = self.config.micro_batch * self.mesh.world_size
        for batch in evaluation_batches(
            self._validation_samples, size, rank=self.mesh.rank, world_size=self.mesh.world_size, limit=limit
        ):
            yield self.ready(batch)

    def ready(self, batch: Batch) -> Batch:
        """A batch from the loader, moved to this rank's device and prepared by the task."""
        moved = {name: value.to(self.mesh.device, non_blocking=True) for name, value in batch.items()}
        return self.task.prepare(moved)


class _Loop:
    """One `fit`: what lives from the first update to the last."""

    def __init__(
        self,
        trainer: Trainer,
        engine: Any,
        weights: MasterWeights,
        average: WeightAverage | None,
        learning_rate: LearningRate,
        tracker: Tracker,
    ) -> None:
        self.trainer = trainer
        self.run, self.mesh, self.task = trainer.run, trainer.mesh, trainer.task
        self.engine, self.weights, self.average = engine, weights, average
        self.learning_rate, self.tracker = learning_rate, tracker
        self.counts: dict[str, int] = dict(trainer._state["counts"])
        self._alarmed = -STEPS_BETWEEN_ALARMS

    def run_to_end(self) -> None:
        """All remaining updates, with their checkpoints and reports, and the export."""
        trainer, run, report = self.trainer, self.run, self.run.report
        batches = trainer.train_batches()
        self.engine.train()
        while trainer.step < run.steps:
            began = time.perf_counter()
            metrics = self._update(batches)
            trainer.step += 1
            last = trainer.step == run.steps
            if trainer.step % report.log_every == 0 or last:
                self.tracker.log(trainer.step, metrics, time.perf_counter() - began)
            self._raise_alarm(metrics)
            if last or (report.validate_every and trainer.step % report.validate_every == 0):
                self._validate()
            if trainer.step % run.save_every == 0 or last:
                self._save()
            if last or (report.preview_every and trainer.step % report.preview_every == 0):
                self._preview()
        self._export()

    def _update(self, batches: Iterator[Batch]) -> dict[str, float]:
        trainer, step = self.trainer, self.trainer.step
        micro_batches = [trainer.ready(next(batches)) for _ in range(trainer.config.accumulation)]
        self._set_shares(micro_batches)
        rate = self.learning_rate.at(step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        reported: list[Metrics] = []
        norm: Tensor | None = None
        for batch in micro_batches:
            loss, metrics = self.task.loss(self.engine, batch, step)
            self.engine.backward(loss)
            if len(reported) == len(micro_batches) - 1 and not hasattr(self.engine.optimizer, "_global_grad_norm"):
                # fp32 without ZeRO: DeepSpeed clips, but keeps the norm to itself.
                norm = get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])
            self.engine.step()
            counts = {name: batch[name].sum().float() for name in COUNTED if name in batch}
            reported.append({"loss": loss.detach(), **metrics, **counts})
        figures = self._mean(reported)
        for name in COUNTED:
            if name in figures:
                # Counts are summed over the run, not averaged over the update.
                self.counts[name] = self.counts.get(name, 0) + round(
                    figures.pop(name) * len(reported) * self.mesh.world_size
                )
        if not math.isfinite(figures["loss"]):
            saved = newest_checkpoint(trainer.directory.checkpoints)
            raise TrainingError(
                f"the loss of update {step + 1} is {figures['loss']}: lower optim.lr or lengthen optim.warmup_steps; "
                f"the last good checkpoint is {saved if saved is not None else 'none yet'}"
            )
        if self.average is not None:
            self.average.update(step)
        self.learning_rate.observe(step, figures["loss"])
        figures["lr"] = rate
        figures["grad_norm"] = float(norm if norm is not None else self.engine.get_global_grad_norm())
        figures |= {f"{name}_total": float(count) for name, count in self.counts.items() if count}
        return figures

    def _set_shares(self, micro_batches: list[Batch]) -> None:
        """Give each micro-batch its share in the mean over the whole batch; see `Task.loss`."""
        own = torch.stack([self.task.weight_of(batch).float() for batch in micro_batches])
        total = self.mesh.sum(own.sum()).clamp_min(1)
        count = len(micro_batches) * self.mesh.world_size
        for batch, weight in zip(micro_batches, own, strict=True):
            batch["share"] = weight * count / total

    def _mean(self, reported: list[Metrics]) -> dict[str, float]:
        """Mean over micro-batches and ranks, in one reduction."""
        names = list(reported[0])
        own = torch.stack([torch.stack([metrics[name].float() for name in names]) for metrics in reported]).mean(0)
        values = self.mesh.sum(own) / self.mesh.world_size
        return dict(zip(names, values.tolist(), strict=True))

    def _raise_alarm(self, metrics: dict[str, float]) -> None:
        step = self.trainer.step
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
        try:
            with torch.no_grad():
                yield self.engine
        finally:
            self.engine.train()
            if self.average is not None:
                self.average.swap()
                self.weights.publish()

    def _validate(self) -> None:
        sums: Metrics = {}
        with self._averaged() as model:
            for batch in self.trainer.validation_batches(self.run.report.validation_batches):
                for name, value in self.task.evaluate(model, batch).items():
                    sums[name] = sums[name] + value if name in sums else value
        figures = self.task.summarize({name: self.mesh.sum(value) for name, value in sums.items()})
        self.tracker.log(self.trainer.step, {f"validation/{name}": value for name, value in figures.items()})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.tracker.say(f"validation at step {self.trainer.step}: {shown}")

    def _save(self) -> None:
        trainer = self.trainer
        state = trainer.checkpoint_state(self.learning_rate, self.counts, self.tracker.run_id)
        save_checkpoint(
            trainer.directory.checkpoints,
            trainer.step,
            self.engine,
            self.average,
            state,
            self.mesh,
            self.run.report.keep_checkpoints,
        )

    def _plain_model(self) -> nn.Module | None:
        """A copy of the model with averaged weights, outside DeepSpeed, on the main rank; None elsewhere. Collective."""
        with self._averaged():
            state = self.weights.consolidate(keep=self.mesh.is_main)
        if state is None:
            return None
        model = self.task.build_model()
        model.load_state_dict(state)
        return model.to(self.mesh.device).eval()

    def _preview(self) -> None:
        """Draw from a plain copy of the model: the same pictures under every ZeRO stage and precision."""
        model = self._plain_model()
        rows = min(PREVIEW_ROWS, len(self.trainer._validation_samples))
        if model is not None:
            spread = _Spread(self.trainer._validation_samples, rows)
            batch = next(evaluation_batches(spread, rows, rank=0, world_size=1, limit=1))
            with torch.no_grad():
                picture = self.task.preview(model, self.trainer.ready(batch))
            picture.save(self.trainer.directory.samples / f"step-{self.trainer.step}.png")
        self.mesh.barrier()

    def _export(self) -> None:
        model = self._plain_model()
        if model is not None:
            self.task.export(model, self.trainer.directory.export)
            self.tracker.say(f"exported to {self.trainer.directory.export}")
        self.mesh.barrier()


class _Spread:
    """`count` rows spread evenly over samples: neighbouring rows of a corpus are often of one kind."""

    def __init__(self, samples: Samples, count: int) -> None:
        self._samples = samples
        self._count = count

    def __len__(self) -> int:
        return self._count

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, npt.NDArray | int]:
        return self._samples.sample(row * len(self._samples) // self._count, rng)
