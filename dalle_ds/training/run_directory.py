"""The folder of a run: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `samples/`, `export/`."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml

from dalle_ds.config import Precision, Run, differences, from_dict, to_dict
from dalle_ds.config.plain import flatten
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.files import write_json, write_text
from dalle_ds.jsonl import LineFile, read_records
from dalle_ds.parsing import parse_json, parse_yaml
from dalle_ds.precision.choice import Choice
from dalle_ds.training.checkpoints.content import load_state
from dalle_ds.training.checkpoints.manifest import CheckpointFolder

RunKind = TypeVar("RunKind", bound=Run)

# Fields that may differ when a run is resumed: they change no weight but for rounding (paths are held against fingerprints
# instead), or are there to be changed by hand.
_FREE = (
    "data",
    "init",
    "dvae",
    "tokenizer",
    "codes",
    "run_dir",
    "steps",
    "save_every",
    "save_minutes",
    "train.micro_batch",
    "train.zero_stage",
    "train.average_device",
    "loader.workers",
    "loader.max_unreadable",
    "optim.halve_at",
    "optim.moments",  # of a checkpoint, which says so where they are others
)
# Settings that every stage once took, and that only some stages use.
_TAKEN_ONCE = ("loader.codes", "loader.caption_dropout", "loader.bpe_dropout", "train.activation_checkpointing")
_FREE_SECTIONS = ("report.", "guard.", "watch.", "parallel.", "powersgd.")
_PRECISION: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
_CONFIG_NAME = "config.yaml"
_IDENTITY_NAME = "identity.json"
_WANDB_NAME = "wandb_id.json"
STEP_NAME = "step.json"


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The stage and the configuration, as plain values, of the run in folder `path`; CheckpointError where there is no run."""
    saved = _read_config_file(path)
    return saved["stage"], saved["run"]


def _read_config_file(path: Path) -> dict[str, Any]:
    file = path / _CONFIG_NAME
    try:
        saved = parse_yaml(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: name another --run_dir") from error
    if not (isinstance(saved, dict) and isinstance(saved.get("stage"), str) and isinstance(saved.get("run"), dict)):
        raise CheckpointError(f"{file} is not a run's configuration: name another --run_dir")
    return saved


def run_of(kind: type[RunKind], saved: dict[str, Any], where: str) -> RunKind:
    """A run's configuration from the plain values that `read_config` returns; ConfigError as from `from_dict`."""
    used = dict(flatten(to_dict(kind())))
    kept = dict(saved)
    for name in _TAKEN_ONCE:
        section, field = name.split(".")
        if name not in used and isinstance(kept.get(section), dict):
            kept[section] = {key: value for key, value in kept[section].items() if key != field}
    return from_dict(kind, _with_pairs(kept), where)


def _with_pairs(saved: dict[str, Any]) -> dict[str, Any]:
    """With `sharpness.pairs` of before there was such a setting, when each replica perturbed the weights by itself."""
    values = dict(flatten(saved))
    replicas, batch = values.get("parallel.replicas"), values.get("train.batch_size")
    if values.get("sharpness.rho") is None or "sharpness.pairs" in values:
        return saved
    if not (isinstance(replicas, int) and isinstance(batch, int) and replicas > 1):
        return saved
    return {**saved, "sharpness": {**saved["sharpness"], "pairs": batch // replicas}}


def kept_precision(path: Path) -> Choice | None:
    """The precision that the run in folder `path` began in, whatever it was chosen by; None where there is no run yet.

    CheckpointError where its configuration cannot be read.
    """
    if not (path / _CONFIG_NAME).exists():
        return None
    saved = _read_config_file(path)
    try:
        kept = saved["precision"]
        return Choice(_PRECISION[kept["chosen"]], str(kept["why"]))
    except (KeyError, TypeError):  # it was stated
        pass
    for checkpoint in reversed(CheckpointFolder(path / "checkpoints").all()):
        with suppress(CheckpointError, KeyError, TypeError):  # a damaged one is dealt with later
            return Choice(_PRECISION[load_state(checkpoint)["layout"]["precision"]], f"that of {checkpoint}")
    return None


class RunDirectory:
    """A run's folder on this process's side; only the main process writes.

    Raises:
        CheckpointError: `path` holds a run of another stage or configuration (with the differences), or something else.
    """

    def __init__(self, path: str | Path, stage: str, run: Run) -> None:
        if not str(path):
            raise ConfigError("--run_dir is missing: name the folder of this run")
        self.path = path = Path(path)
        self.stage, self.run = stage, run
        self.config_file = path / _CONFIG_NAME
        """The configuration that the run was started with."""
        self.metrics_file = path / "metrics.jsonl"
        self.numerics_file = path / "numerics.jsonl"
        """Histograms of gradients."""
        self.starts_file = path / "starts.jsonl"
        """When and where the run was started."""
        self.rollbacks_file = path / "rollbacks.json"
        """When the run went back to a checkpoint, and the data that it left out since."""
        self.checkpoints = CheckpointFolder(path / "checkpoints")
        self.samples = path / "samples"
        """Preview images."""
        self.export = path / "export"
        """The exported model."""
        self.adapter = path / "adapter"
        """What was trained of it with `lora.rank`, as peft saves it."""
        self._lock: IO[str] | None = None
        self._check()

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"--run_dir {self.path} is a file: name a folder")
        if not self.config_file.exists():
            # A name that begins with a dot is a lock, or a file that was being written when a start was killed.
            if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise CheckpointError(
                    f"--run_dir {self.path} is not empty and not a run (it has no config.yaml): name a new folder"
                )
            return
        stage, began_with = read_config(self.path)
        if stage != self.stage:
            raise CheckpointError(
                f"--run_dir {self.path} holds a {stage} run, this is {self.stage}: name another folder"
            )
        old = run_of(type(self.run), began_with, str(self.config_file))
        changed = {
            name: values
            for name, values in differences(old, self.run).items()
            if name not in _FREE and not name.startswith(_FREE_SECTIONS)
        }
        if changed:
            lines = "\n".join(f"  {name}: {was!r} in the run, {now!r} now" for name, (was, now) in changed.items())
            words: list[Any] = []
            for name, (was, _) in changed.items():
                words += [f"--{name}", *(was if isinstance(was, list) else [was])]
            raise CheckpointError(
                f"--run_dir {self.path} was started with another configuration:\n{lines}\nname a new folder, or resume it by "
                f"adding {shlex.join(map(str, words))}"
            )

    def claim(self) -> None:
        """Make the folder and take its lock. Main process only.

        CheckpointError where another process trains in it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
            # A worker that outlives the process for a moment must not hold the lock.
            os.register_at_fork(after_in_child=self.release)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another run is training in {self.path}: wait for it, or name another --run_dir"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise CheckpointError(f"--run_dir {self.path} cannot be written: {error}") from error
            print(f"{self.path} is on a file system without locks: see to it that no other run is training there")

    def write_config(self, identity: Mapping[str, str], precision: Choice | None = None) -> None:
        """Write the configuration and what the run learns from, make the folders and remove what killed runs left unfinished.
        Main process only.

        `identity` are fingerprints, which later starts must find again; `precision` is what "auto" stands for, which they
        keep, and None where it is stated. CheckpointError where something cannot be written.
        """
        try:
            # First: a folder with anything else in it and no configuration is not taken for a run's.
            content: dict[str, Any] = {"stage": self.stage, "run": to_dict(self.run)}
            if precision is not None:
                content["precision"] = {"chosen": precision.precision, "why": precision.why}
            write_text(self.config_file, yaml.safe_dump(content, sort_keys=False))
            write_json(self.path / _IDENTITY_NAME, dict(identity))
            self.samples.mkdir(exist_ok=True)
            self.checkpoints.path.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"--run_dir {self.path} cannot be written: {error}") from error
        self.checkpoints.clear()
        for unfinished in self.path.glob(".*.partial-*"):
            if unfinished.is_file():
                unfinished.unlink(missing_ok=True)

    def identity(self) -> dict[str, str] | None:
        """What `write_config` was given at the run's start; None in a new run. CheckpointError where it cannot be read."""
        return self._read_json(_IDENTITY_NAME, dict)

    def wandb_id(self) -> str | None:
        """The run's name at Weights & Biases, from its first start on."""
        return self._read_json(_WANDB_NAME, str)

    def keep_wandb_id(self, run_id: str | None) -> None:
        """Keep it for the next start, which may come before the first checkpoint; CheckpointError where that fails."""
        if run_id is not None and run_id != self.wandb_id():
            try:
                write_json(self.path / _WANDB_NAME, run_id)
            except OSError as error:
                raise CheckpointError(f"--run_dir {self.path} cannot be written: {error}") from error

    def _read_json(self, name: str, kind: type) -> Any:
        file = self.path / name
        if not file.exists():
            return None
        try:
            content = parse_json(file.read_bytes())
            if not isinstance(content, kind):
                raise ValueError(f"it is no {kind.__name__}")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): restore it, or name a new --run_dir") from error
        return content

    def note_start(self, step: int, processes: str) -> None:
        """Add a line to the list of the run's starts: updates done, and in words how the work is divided.

        Not being able to is no reason not to start.
        """
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        with suppress(OSError):
            lines = LineFile(self.starts_file)
            lines.append({"step": step, "time": now, "host": socket.gethostname(), "processes": processes})
            lines.close()

    def starts(self) -> int:
        """How often the run was started."""
        try:
            return sum(1 for _ in read_records(self.starts_file))
        except OSError:
            return 0

    def exported_step(self) -> int | None:
        """How many updates the exported model has had; None where there is none."""
        try:
            step = parse_json((self.export / STEP_NAME).read_bytes())["step"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None
        return step if isinstance(step, int) else None

    def mark_exported(self, step: int) -> None:
        """Note that the exported model has had `step` updates."""
        write_json(self.export / STEP_NAME, {"step": step})

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def drop_metrics_after(self, step: int, *, unvalidated: bool = False) -> None:
        """Forget the metrics of updates beyond `step`, which the run will do again, and if it is `unvalidated`, of the
        validation at `step`; CheckpointError where a file cannot be written."""

        def stays(record: dict[str, Any]) -> bool:
            again = unvalidated and record["step"] == step and any(name.startswith("validation/") for name in record)
            return record["step"] <= step and not again

        for file in (self.metrics_file, self.numerics_file):
            try:
                if file.exists():
                    kept = "".join(json.dumps(record) + "\n" for record in read_records(file) if stays(record))
                    if kept != file.read_text(errors="replace"):
                        write_text(file, kept)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be written: {error}; free some space and start again") from error
