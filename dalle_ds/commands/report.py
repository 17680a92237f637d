"""Show a finished dVAE and transformer: OUT/pictures.png and OUT/report.html."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_ds.cli import parse_options
from dalle_ds.evaluation.report import write_report


@dataclass(frozen=True)
class Options:
    """Generate images for captions of the data, and put them with figures and loss curves on one page."""

    data: str
    """Folder that launchers/prepare_data.py made."""
    dvae: str
    """Run directory of the dVAE."""
    transformer: str
    """Run directory of the transformer."""
    out: str
    """Folder for pictures.png and report.html."""
    num: int = 4
    """Samples per caption."""
    seed: int = 0
    """Seed of the samples."""


def main() -> None:
    """Parse, draw, print the figures."""
    options = parse_options(Options)
    figures = write_report(
        options.data, options.dvae, options.transformer, options.out, num=options.num, seed=options.seed
    )
    for name, value in figures.items():
        print(f"{name:24} {value:.3f}")
    print(f"wrote {options.out}/pictures.png and {options.out}/report.html")
