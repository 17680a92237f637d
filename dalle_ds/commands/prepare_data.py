"""Prepare a corpus for training, cache image codes of prepared data, or both.

python launchers/prepare_data.py --corpus twemoji --out DIR, or --corpus folder --source PICTURES --out DIR; docs/data.md tells
of other corpora, and of parts that several jobs do.
"""

from rich import print

from dalle_ds.cli import parse_options
from dalle_ds.data.command import Preparation, run


def main() -> None:
    """Parse, prepare, cache."""
    for report in run(parse_options(Preparation)):
        print(report)
