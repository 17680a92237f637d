"""A study of human preference between two models' images: pages for voters, and the count of what they save.

python launchers/study.py make --a DIR --b DIR --out STUDY
python launchers/study.py count votes-*.json --study STUDY
"""

from __future__ import annotations

import sys
from typing import Annotated

import tyro
from rich.console import Console

from dalle_ds.cli import parse_options
from dalle_ds.evaluation.study import CountOptions, MakeOptions, count_study, make_study, report


def main() -> None:
    """Parse, then make or count."""
    make = Annotated[MakeOptions, tyro.conf.subcommand("make")]
    count = Annotated[CountOptions, tyro.conf.subcommand("count")]
    options = parse_options(make | count, description=__doc__)  # type: ignore[arg-type]
    if isinstance(options, MakeOptions):
        key = make_study(options)
        print(
            f"wrote {options.out}: {len(key['pairs'])} pairs; give each page in pages/ to 5 voters, and key.json to none"
        )
    else:
        Console(width=None if sys.stdout.isatty() else 127).print(report(count_study(options)))
