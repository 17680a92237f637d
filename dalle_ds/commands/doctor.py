"""Look at what a run has left behind, at prepared data, or at what runs would be on, and say whether it is sound."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dalle_ds.cli import own_arguments, parse_options
from dalle_ds.doctor.environment import EnvOptions, describe_environment


@dataclass(frozen=True)
class Checkpoint:
    """Tell what a checkpoint holds, whether it is whole, and where it can be resumed; status 1 where it is broken."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or a run directory, whose newest one is taken."""


def main() -> None:
    """Parse, look, tell."""
    console = Console(width=None if sys.stdout.isatty() else 127)
    if own_arguments() == ["env"]:  # before anything is imported that may be missing
        console.print(describe_environment())
        return
    from dalle_ds.doctor.cluster import ClusterOptions, check_cluster
    from dalle_ds.doctor.data import DataOptions, inspect_data

    checkpoint = Annotated[Checkpoint, tyro.conf.subcommand("checkpoint")]
    cluster = Annotated[ClusterOptions, tyro.conf.subcommand("cluster")]
    data = Annotated[DataOptions, tyro.conf.subcommand("data")]
    env = Annotated[EnvOptions, tyro.conf.subcommand("env")]
    options = parse_options(checkpoint | cluster | data | env, description=__doc__)  # type: ignore[arg-type]
    if isinstance(options, ClusterOptions):
        report, faults = check_cluster(options)
    elif isinstance(options, DataOptions):
        data_inspection = inspect_data(options)
        report, faults = data_inspection.report(), data_inspection.faults
    else:
        # Imported once the options are read, so that --help and mistakes in them are quick.
        from dalle_ds.doctor.checkpoint import check_checkpoint

        report, faults = check_checkpoint(Path(options.path))
    if report is not None:
        console.print(report)
    if faults:
        sys.exit(1)
