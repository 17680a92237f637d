"""Look at what a run has left behind, and say whether it is sound."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console

from dalle_ds.cli import parse_options, run_launcher


@dataclass(frozen=True)
class Options:
    """Tell what a checkpoint holds, whether it is whole, and where it can be resumed; status 1 where it is broken."""

    what: tyro.conf.Positional[Literal["checkpoint"]]
    """What to look at."""
    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or a run directory, whose newest one is taken."""


def main() -> None:
    """Parse, look, tell."""
    options = parse_options(Options)
    # Imported once the options are read, so that --help and mistakes in them are quick.
    from dalle_ds.training.inspection import inspect

    inspection = inspect(options.path)
    Console().print(inspection.report())
    if inspection.faults:
        sys.exit(1)


if __name__ == "__main__":
    run_launcher(main)
