"""Plot how a run is doing, while it goes on or after: loss, gradient norm, learning rate, gradient scales."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dalle_ds.cli import parse_options
from dalle_ds.errors import ConfigError
from dalle_ds.evaluation.curves import NUMERICS, curves_figure, panels_of, read_metrics


@dataclass(frozen=True)
class Options:
    """Draw the curves of a run's metrics.jsonl."""

    run_dir: str
    """Run directory."""
    out: str
    """Image to write; its name ends in .png, .svg or .pdf."""


def main() -> None:
    """Parse, read, draw."""
    options = parse_options(Options)
    if Path(options.out).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--out {options.out} must end in .png, .svg or .pdf")
    figure = curves_figure(panels_of(read_metrics(options.run_dir), NUMERICS), columns=2)
    figure.savefig(options.out, dpi=150)
    print(f"wrote {options.out}")
