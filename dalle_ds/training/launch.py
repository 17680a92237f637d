"""From a training launcher's command line to a finished run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dalle_ds.cli import explain, parse_options
from dalle_ds.config import Run, from_dict, load_preset, preset_names
from dalle_ds.config.deepspeed import EngineConfig, load_deepspeed_json
from dalle_ds.errors import ConfigError, Interrupted
from dalle_ds.parallel import Mesh
from dalle_ds.resilience.signals import StopSignals
from dalle_ds.resilience.watch import Watch
from dalle_ds.tasks import Task
from dalle_ds.tasks.initial import initial_settings
from dalle_ds.tasks.stages import SECTIONS

RunConfig = TypeVar("RunConfig", bound=Run)
FINE_TUNING = {"lr": 1e-4, "beta2": 0.99, "weight_decay": 0.0, "clip": 1.0, "schedule": "constant", "warmup_steps": 50}
"""`optim` of a run that begins with a trained model and names no preset."""

_USAGE = """Besides the options below, whose defaults are those of the preset:

--deepspeed_config FILE: DeepSpeed JSON, such as ds_configs/zero3_auto.json (precision, ZeRO stage, offload)

--preset NAME: one of {presets}; not needed with --init, which brings the shape of the model

--device auto|cpu|cuda: where to compute; auto takes GPUs where there are any"""


@dataclass(frozen=True)
class Command(Generic[RunConfig]):
    """A training launcher's command line."""

    run: RunConfig
    """The preset with the command line's changes."""
    deepspeed: dict[str, Any]
    """The DeepSpeed JSON's content."""
    device: str
    """"auto", "cpu" or "cuda"."""


def parse_command(kind: type[RunConfig], stage: str, arguments: Sequence[str] | None = None) -> Command[RunConfig]:
    """Parse `--deepspeed_config FILE --preset NAME [--device D] [--section.field value …]`.

    With --init and no preset, the model's shape is that of the initial model, and the learning rate is one for fine-tuning.
    ConfigError where there is no or an unknown preset, no DeepSpeed JSON, or a value that cannot work.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--deepspeed_config")
    first.add_argument("--preset")
    first.add_argument("--init")
    first.add_argument("--device", default="auto")
    # Users of deepspeed's scripts add it.
    first.add_argument("--deepspeed", action="store_true")
    known, rest = first.parse_known_args(arguments)
    wants_help = bool({"-h", "--help"} & set(rest))
    if known.init is not None:
        rest += ["--init", known.init]
    if known.preset is None and not known.init and not wants_help:
        raise ConfigError(f"--preset is missing: give one of {', '.join(preset_names())}")
    if known.deepspeed_config is None and not wants_help:
        raise ConfigError("--deepspeed_config is missing: give a DeepSpeed JSON, such as ds_configs/zero3_auto.json")
    default = kind()
    if known.preset is not None:
        default = load_preset(known.preset, stage, kind)
    elif known.init:
        settings = initial_settings(kind, SECTIONS[stage], known.init)
        default = from_dict(kind, {**settings, "optim": FINE_TUNING}, known.init)
    if known.deepspeed_config is not None:
        json_config = load_deepspeed_json(known.deepspeed_config)
    run = parse_options(kind, rest, default, f"{kind.__doc__}\n\n{_USAGE.format(presets=', '.join(preset_names()))}")
    for name, given, what in (
        ("data", all(run.corpora), "the folder that launchers/prepare_data.py made"),
        ("run_dir", run.run_dir, "the folder of this run"),
    ):
        if not given:
            raise ConfigError(f"--{name} is missing: name {what}")
    return Command(run, json_config, known.device)


def train(
    kind: type[RunConfig],
    make_task: Callable[[RunConfig], Task[RunConfig]],
    stage: str,
    check_plan: Callable[[Task[Any], EngineConfig, Mesh], None] = lambda *_: None,
) -> None:
    """Run a training launcher: parse the command line, join the other processes, train to the end."""
    command = parse_command(kind, stage)
    run = command.run
    with StopSignals(quiet=os.environ.get("RANK", "0") != "0") as signals:
        mesh = Mesh.start(command.device)
        interrupted: Interrupted | None = None
        with Watch(mesh, explain, run.watch, Path(run.run_dir) / "logs", signals.request) as watch:
            # Imports DeepSpeed, which takes seconds and picks a device: mistakes on the command line are told before.
            from dalle_ds.training.loop import LONG_TIMEOUT
            from dalle_ds.training.trainer import Trainer

            try:
                trainer = Trainer(
                    make_task, run, command.deepspeed, mesh, signals=signals, pulse=watch.pulse, check_plan=check_plan
                )
                trainer.fit()
            except Interrupted as stopped:
                interrupted = stopped
            watch.pulse(run.steps, "leaving", LONG_TIMEOUT)
            with mesh.extended_timeout(LONG_TIMEOUT):
                pass  # its end is a barrier: all are done before anyone leaves the watch
        # Launchers end all processes when one has ended: none does before all have left.
        mesh.barrier()
        mesh.stop()
    if interrupted is not None:
        raise interrupted
