"""The command line of `launchers/plan.py`: the options of a training launcher, and a cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from dalle_ds.cli import parse_options
from dalle_ds.config import load_preset, preset_names
from dalle_ds.config.deepspeed import load_deepspeed_json
from dalle_ds.errors import ConfigError
from dalle_ds.planning.layout import CLUSTERS, Cluster, named_cluster
from dalle_ds.tasks import Task
from dalle_ds.tasks.stages import SECTIONS, STAGES

_USAGE = f"""Plan a run before anything is started: memory, traffic, and time of an update. The model is traced without memory.

Besides the options below, which are those of the training launcher and of the cluster:

--preset NAME: one of {", ".join(preset_names())}

--cluster NAME: one of {", ".join(CLUSTERS)}

--gpus N: how many, instead of one machine's

--stage {"|".join(SECTIONS)}: which model of the preset; the transformer unless given

--deepspeed_config FILE: DeepSpeed JSON, such as ds_configs/zero3_bf16.json

--search True: plan all layouts, and rank those that fit

--json FILE: write all figures"""


class PlanCommand(NamedTuple):
    """What to plan."""

    task: Task[Any]  # of the preset with the command line's changes
    cluster: Cluster  # the named cluster with the command line's changes
    deepspeed: dict[str, Any]  # the DeepSpeed JSON's content; empty without one
    device: str  # "cuda" or "cpu"
    search: bool  # whether to look for layouts
    json: Path | None  # file for the figures


def parse_plan_command(arguments: Sequence[str] | None = None) -> PlanCommand:
    """Parse `--preset NAME --cluster NAME [--gpus N] [--deepspeed_config FILE] [--search True] [--section.field value …]`.

    Raises:
        ConfigError: no or an unknown preset or cluster, or a value that cannot work.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    is_help = bool({"-h", "--help"} & set(arguments))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", choices=preset_names())
    first.add_argument("--cluster", choices=list(CLUSTERS))
    first.add_argument("--gpus", type=int)
    first.add_argument("--stage", default="transformer", choices=list(SECTIONS))
    first.add_argument("--deepspeed_config")
    first.add_argument("--search", default="False", choices=["True", "False"])
    first.add_argument("--json", type=Path)
    try:
        known, rest = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from error
    for name, choices in (("preset", preset_names()), ("cluster", list(CLUSTERS))):
        if getattr(known, name) is None and not is_help:
            raise ConfigError(f"--{name} is missing: give one of {', '.join(choices)}")
    if known.gpus is not None and known.gpus < 1:
        raise ConfigError(f"--gpus must be a whole number of at least 1, found {known.gpus}")
    if known.json is not None and (known.json.is_dir() or not known.json.parent.is_dir()):
        raise ConfigError(f"--json must be a file in a folder that exists, found {known.json}")
    kind, task = STAGES[SECTIONS[known.stage]]
    run = kind() if known.preset is None else load_preset(known.preset, known.stage, kind)
    cluster = Cluster() if known.cluster is None else named_cluster(known.cluster, known.gpus)
    options: Any = make_dataclass(
        "Options",
        [
            ("run", Annotated[kind, tyro.conf.arg(name="", help="Options of the run.")]),
            ("cluster", Annotated[Cluster, tyro.conf.arg(help="What is changed of the named cluster.")]),
        ],
    )
    parsed = parse_options(options, rest, options(run, cluster), _USAGE)
    if getattr(getattr(parsed.run, "lora", None), "rank", 0):
        raise ConfigError(f"lora.rank={parsed.run.lora.rank}: plans are of models that are trained whole, leave it out")
    json_config = {} if known.deepspeed_config is None else load_deepspeed_json(known.deepspeed_config)
    device = "cpu" if known.cluster == "cpu" else "cuda"
    is_search = known.search == "True"
    return PlanCommand(task.planned(parsed.run), parsed.cluster, json_config, device, is_search, known.json)
