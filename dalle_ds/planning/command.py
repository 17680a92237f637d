"""The command line of `launchers/plan.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any

import tyro

from dalle_ds.cli import parse_options
from dalle_ds.config import load_preset, preset_names
from dalle_ds.config.deepspeed import load_deepspeed_json
from dalle_ds.errors import ConfigError
from dalle_ds.planning.cluster import CLUSTERS, Cluster, named_cluster
from dalle_ds.tasks import Task
from dalle_ds.tasks.stages import STAGES

_USAGE = f"""Plan a run before anything is started: memory, traffic, and time of an update. The model is traced without memory.

Besides the options below, which are those of the training launcher and of the cluster:

--preset NAME: one of {", ".join(preset_names())}

--cluster NAME: one of {", ".join(CLUSTERS)}

--gpus N: how many, instead of one machine's

--stage {"|".join(STAGES)}: which model of the preset; the transformer unless given

--deepspeed_config FILE: DeepSpeed JSON, such as ds_configs/zero3_bf16.json

--search True: plan all layouts, and rank those that fit

--json FILE: write all figures"""


@dataclass(frozen=True)
class PlanCommand:
    """What to plan."""

    task: Task[Any]
    """Of the preset with the command line's changes."""
    cluster: Cluster
    """The named cluster with the command line's changes."""
    deepspeed: dict[str, Any]
    """The DeepSpeed JSON's content; empty without one."""
    device: str
    """"cuda" or "cpu"."""
    search: bool
    """Whether to look for layouts."""
    json: str | None
    """File for the figures."""


def parse_plan_command(arguments: Sequence[str] | None = None) -> PlanCommand:
    """Parse `--preset NAME --cluster NAME [--gpus N] [--deepspeed_config FILE] [--search True] [--section.field value …]`.

    Raises:
        ConfigError: no or an unknown preset or cluster, or a value that cannot work.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "cluster", "gpus", "deepspeed_config", "json"):
        first.add_argument(f"--{name}")
    first.add_argument("--stage", default="transformer")
    first.add_argument("--search", default="False")
    known, rest = first.parse_known_args(arguments)
    is_help = bool({"-h", "--help"} & set(rest))
    for name, choices in (("preset", preset_names()), ("cluster", list(CLUSTERS))):
        if getattr(known, name) is None and not is_help:
            raise ConfigError(f"--{name} is missing: give one of {', '.join(choices)}")
    for name, allowed in (("stage", list(STAGES)), ("search", ["True", "False"])):
        if getattr(known, name) not in allowed:
            raise ConfigError(f"--{name} must be one of {', '.join(allowed)}, found {getattr(known, name)}")
    if known.gpus is not None and (not known.gpus.isdigit() or int(known.gpus) < 1):
        raise ConfigError(f"--gpus must be a whole number of at least 1, found {known.gpus}")
    kind, task = STAGES[known.stage]
    run = load_preset(known.preset, known.stage, kind) if known.preset is not None else kind()
    gpus = None if known.gpus is None else int(known.gpus)
    cluster = named_cluster(known.cluster, gpus) if known.cluster is not None else Cluster()
    options: Any = make_dataclass(
        "Options",
        [
            ("run", Annotated[kind, tyro.conf.arg(name="", help="Options of the run.")]),
            ("cluster", Annotated[Cluster, tyro.conf.arg(help="What is changed of the named cluster.")]),
        ],
    )
    parsed = parse_options(options, rest, options(run, cluster), _USAGE)
    json_config = load_deepspeed_json(known.deepspeed_config) if known.deepspeed_config is not None else {}
    device = "cpu" if known.cluster == "cpu" else "cuda"
    return PlanCommand(
        task.planned(parsed.run), parsed.cluster, json_config, device, known.search == "True", known.json
    )
