"""One run of a task: its engine, its data, where it begins and where it ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dalle_ds
from dalle_ds.config import Run
from dalle_ds.config.deepspeed import EngineConfig, is_auto, resolve, with_precision
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.optim import LearningRate, WeightAverage, adapter_groups
from dalle_ds.optim.adamw import rounding_warning
from dalle_ds.parallel import Mesh
from dalle_ds.precision.choice import Choice, choose, slow_warning
from dalle_ds.resilience.rollback import Guard, Rollbacks
from dalle_ds.resilience.signals import StopSignals
from dalle_ds.tasks import Task
from dalle_ds.training.batches import Batches
from dalle_ds.training.checkpoints.content import TrainedTensors, TrainState, load_state
from dalle_ds.training.checkpoints.manifest import choose_checkpoint
from dalle_ds.training.engine import build_engine, build_part, load_frozen, scale_gradients
from dalle_ds.training.loop import LONG_TIMEOUT, Loop, RunContext
from dalle_ds.training.replicas import ReplicaReduction, broadcast_start
from dalle_ds.training.run_directory import RunDirectory, kept_precision
from dalle_ds.training.tracking import Tracker
from dalle_ds.training.zero_state import MasterWeights


class Trainer:
    """Trains a task on a DeepSpeed engine, from the newest complete checkpoint of the run directory on.

    Every rank makes one and calls `fit`. What a step computes does not depend on the number of processes, the micro-batch
    or the ZeRO stage, up to rounding; a resumed run continues bit for bit.

    Args:
        json_config: the DeepSpeed JSON's content.
        signals: says when to stop; None never does.
        pulse: `Watch.pulse`: is told what this process is about to do.
        check_plan: refuses a task that does not fit this engine and mesh, before a model is built.

    Raises:
        ConfigError, CheckpointError, DataError: what the user asked for cannot be done; raised before anything is written.
    """

    def __init__(
        self,
        make_task: Callable[[Any], Task[Any]],
        run: Run,
        json_config: dict[str, Any],
        mesh: Mesh,
        *,
        signals: StopSignals | None = None,
        pulse: Callable[..., None] = lambda *_: None,
        check_plan: Callable[[Task[Any], EngineConfig, Mesh], None] = lambda *_: None,
    ) -> None:
        self.run = run
        self.signals = signals or StopSignals()
        self.pulse = pulse
        self.mesh = mesh = mesh.divide(run.parallel)
        self.choice: Choice | None = None
        if is_auto(json_config, run):
            self.choice = mesh.decide(lambda: kept_precision(Path(run.run_dir)) or choose(mesh.device))
            json_config = with_precision(json_config, self.choice.precision)
        self.config: EngineConfig = resolve(json_config, run, mesh.world_size)
        self.task = make_task(run)
        self.task.check_layout(mesh, self.config.micro_batch, self.config.precision)
        self.task.check_adapters(mesh, self.config.precision)
        # One process looks, since disks may show several ones different things at one time.
        self.directory: RunDirectory = mesh.decide(lambda: RunDirectory(run.run_dir, self.task.name, run))
        self.batches = Batches(self.task, run, self.config.micro_batch, mesh)
        check_plan(self.task, self.config, mesh)
        mesh.decide(self.directory.claim)
        self.checkpoint: Path | None = choose_checkpoint(self.directory.checkpoints, mesh)
        self.state = self._load_state()
        self.step: int = self.state["step"]
        if self.step > run.steps:
            raise ConfigError(
                f"--steps {run.steps} is less than the {self.step} updates that {run.run_dir} has done already"
            )
        mesh.decide(lambda: self.directory.write_config(self.state["identity"], self.choice))

    def _load_state(self) -> dict[str, Any]:
        identity = {**self.task.identity(), "init": self.task.initial_fingerprint if self.run.init else "none"}
        offload = self.config.deepspeed["zero_optimization"].get("offload_optimizer") or {}
        layout = {
            "precision": self.config.precision,
            "processes": self.mesh.world_size,
            **dict(zip(("replicas", "pipe", "shards", "tensor"), self.mesh.sizes, strict=True)),
            "zero_stage": self.config.zero_stage,
            "offload": offload.get("device", "none"),
            "micro_batch": self.config.micro_batch,
            "accumulation": self.config.accumulation,
            "powersgd": self.run.powersgd.enabled,
        }
        fresh: dict[str, Any] = {
            "step": 0,
            "identity": identity,
            "layout": layout,
            "counts": {},
            "validation_is_due": False,
            "version": dalle_ds.__version__,
        }
        began_with = self.mesh.decide(self.directory.identity)
        state = fresh if self.checkpoint is None else load_state(self.checkpoint)
        for known in (began_with or identity, state["identity"]):
            for name, found in identity.items():
                if known.get(name, "none") != found:
                    raise CheckpointError(
                        f"the run in {self.directory.path} began with another {name} ({known.get(name, 'none')[:12]}, now "
                        f"{found[:12]}): resume it with the one it began with, or name a new --run_dir"
                    )
        wrote = state["layout"]
        if wrote["precision"] != layout["precision"]:
            raise CheckpointError(
                f"the checkpoint {self.checkpoint} is of a run in {wrote['precision']}, this is {layout['precision']}: that "
                "changes what is learned, while how the work is divided changes no more than rounding, and is free; give a "
                f"DeepSpeed JSON for {wrote['precision']}, or name a new --run_dir"
            )
        if wrote["powersgd"] and not layout["powersgd"] and self.mesh.is_main:
            print(
                f"{self.checkpoint} has what PowerSGD had yet to pass on of gradients; this run, which does not compress, "
                "leaves it out"
            )
        return {**fresh, **state, "layout": layout, "version": dalle_ds.__version__}

    def fit(self) -> None:
        """Train to `run.steps` updates, then validate, make a preview and export; all of it is skipped where it is done.

        Raises:
            Interrupted: a signal told the run to stop, which it did after writing a checkpoint.
            TrainingError: updates go wrong, and going back to a checkpoint does not help.
            CheckpointError: a checkpoint cannot be read or written.
        """
        if self.mesh.decide(lambda: self.step == self.run.steps == self.directory.exported_step()):
            if self.mesh.is_main:
                print(f"{self.directory.path} is done: all {self.step} updates, exported to {self.directory.export}")
                self.directory.release()
            return
        self.pulse(self.step, "starting", LONG_TIMEOUT)
        # More than the watch has, which tells more of what hangs.
        self.mesh.set_timeout(LONG_TIMEOUT + self.run.watch.collective_minutes)
        torch.manual_seed(self.run.seed)
        trained = self._build()
        if self.checkpoint is not None:
            trained.load(self.checkpoint, self.state, self.mesh)
        unvalidated = self.state["validation_is_due"]
        self.mesh.decide(lambda: self.directory.drop_metrics_after(self.step, unvalidated=unvalidated))
        rollbacks = self.mesh.decide(lambda: Rollbacks.read(self.directory.rollbacks_file))
        with self._tracker() as tracker:
            self.mesh.decide(lambda: self.directory.keep_wandb_id(tracker.run_id))
            if self.mesh.is_main:
                self.directory.note_start(self.step, self.mesh.describe())
            replicas = trained.tensors.replicas
            for line in replicas.describe() if replicas is not None else ():
                tracker.say(line)
            context = RunContext(
                self.run, self.mesh, self.task, self.config, self.directory, self.batches, self.signals, self.pulse
            )
            Loop(context, trained, tracker, self.state, rollbacks).run_to_end()
        self.directory.release()

    def _build(self) -> TrainState:
        """The engine with fresh weights, and all that trains beside it."""
        run, config = self.run, self.config
        task, mesh = self.task, self.mesh
        groups = task.parameter_groups
        if task.lora is not None:
            groups = partial(adapter_groups, weight_decay=run.optim.weight_decay)
        engine = build_engine(lambda: build_part(task, mesh), groups, run.optim, config, mesh, run.seed)
        scales = scale_gradients(task, engine.module, config.precision, mesh)
        weights = MasterWeights(engine)
        initial = task.initial_weights() if self.checkpoint is None or task.lora is not None else None
        if task.lora is not None:
            load_frozen(engine.module, initial or {})
        elif initial is not None:
            weights.load(initial)
        replicas = None
        if mesh.size("replica") > 1:
            replicas = ReplicaReduction(engine, mesh, run.powersgd, run.seed)
            broadcast_start(weights, mesh)
        average = None
        if run.train.average_decay is not None:
            every, device = run.train.average_every, run.train.average_device
            average = WeightAverage(weights.shards, run.train.average_decay, every=every, device=device)
        tensors = TrainedTensors(weights, engine.client_optimizer, average, replicas)
        return TrainState(engine, tensors, LearningRate(run.optim), scales, Guard(run.guard))

    def _tracker(self) -> Tracker:
        run_id = self.directory.wandb_id() if self.mesh.is_main else None
        tracker = Tracker(self.directory.metrics_file, self.task, self.mesh, start_step=self.step, run_id=run_id)
        begun = f"resumed from {self.checkpoint}" if self.checkpoint is not None else "new run"
        tracker.say(
            f"{self.task.name}: {begun} in {self.directory.path}; {len(self.batches.train_samples):,} training and "
            f"{len(self.batches.validation_samples):,} validation rows; {self.mesh.describe()}, "
            f"ZeRO-{self.config.zero_stage}, {self.config.precision}, {self.config.accumulation} × "
            f"{self.config.micro_batch} × {self.mesh.size('data')} = {self.run.train.batch_size} images per update"
        )
        slow = slow_warning(self.config.precision, self.mesh.device) if self.mesh.is_main else None
        precision = [str(self.choice)] if self.choice is not None else []
        precision += [f"warning: {text}" for text in (slow, rounding_warning(self.run.optim)) if text is not None]
        initial = [f"begins with the weights in {self.run.init}"] if self.run.init else []
        for line in [*precision, *self.batches.describe(), *self.task.describe(), *initial]:
            tracker.say(line)
        if len(self.batches.validation_samples) == 0:
            tracker.say(
                f"{' and '.join(self.run.corpora)} has no validation rows: nothing is validated, and no previews are made"
            )
        return tracker
