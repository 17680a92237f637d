"""The command line of `launchers/plan.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from dalle_ds.cli import parse_options
from dalle_ds.config import DvaeRun, Run, TransformerRun, load_preset, preset_names
from dalle_ds.config.deepspeed import load_deepspeed_json
from dalle_ds.errors import ConfigError
from dalle_ds.planning.cluster import CLUSTERS, Cluster, named_cluster

_USAGE = f"""Plan a run: what it takes of memory and network, and how long an update takes, before anything is started.

Besides the options below, which are those of the training launcher and of the cluster:

--preset NAME: one of {", ".join(preset_names())}

--cluster NAME: one of {", ".join(CLUSTERS)}

--gpus N: how many, instead of one machine's

--stage transformer|dvae: which model of the preset

--deepspeed_config FILE: DeepSpeed JSON, such as ds_configs/zero3_bf16.json

--search True: plan all layouts, and rank those that fit

--json FILE: write all figures"""


@dataclass(frozen=True)
class _TransformerOptions:
    run: Annotated[TransformerRun, tyro.conf.arg(name="")] = field(default_factory=TransformerRun)
    """Options of the run."""
    cluster: Cluster = field(default_factory=Cluster)
    """What is changed of the named cluster."""


@dataclass(frozen=True)
class _DvaeOptions:
    run: Annotated[DvaeRun, tyro.conf.arg(name="")] = field(default_factory=DvaeRun)
    """Options of the run."""
    cluster: Cluster = field(default_factory=Cluster)
    """What is changed of the named cluster."""


@dataclass(frozen=True)
class PlanCommand:
    """What to plan."""

    run: Run
    """The preset with the command line's changes."""
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
    first.add_argument("--preset")
    first.add_argument("--cluster")
    first.add_argument("--gpus")
    first.add_argument("--stage", default="transformer")
    first.add_argument("--deepspeed_config")
    first.add_argument("--search", default="False")
    first.add_argument("--json")
    known, rest = first.parse_known_args(arguments)
    is_help = bool({"-h", "--help"} & set(rest))
    for name, choices in (("preset", preset_names()), ("cluster", list(CLUSTERS))):
        if getattr(known, name) is None and not is_help:
            raise ConfigError(f"--{name} is missing: give one of {', '.join(choices)}")
    for name, value, allowed in (
        ("stage", known.stage, ("transformer", "dvae")),
        ("search", known.search, ("True", "False")),
    ):
        if value not in allowed:
            raise ConfigError(f"--{name} must be {' or '.join(allowed)}, found {value}")
    kind, options = (TransformerRun, _TransformerOptions) if known.stage == "transformer" else (DvaeRun, _DvaeOptions)
    run = load_preset(known.preset, known.stage, kind) if known.preset is not None else kind()
    cluster = named_cluster(known.cluster, _count(known.gpus)) if known.cluster is not None else Cluster()
    parsed: Any = parse_options(options, rest, options(run, cluster), _USAGE)  # type: ignore[arg-type]
    json_config = load_deepspeed_json(known.deepspeed_config) if known.deepspeed_config is not None else {}
    device = "cpu" if known.cluster == "cpu" else "cuda"
    return PlanCommand(parsed.run, parsed.cluster, json_config, device, known.search == "True", known.json)


def _count(gpus: str | None) -> int | None:
    if gpus is None:
        return None
    if not gpus.isdigit() or int(gpus) < 1:
        raise ConfigError(f"--gpus must be a whole number of at least 1, found {gpus}")
    return int(gpus)
