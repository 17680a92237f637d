"""Find validation images that are in the training data, and show them: OUT/neighbours.jsonl, pairs.html, overlap.json."""

from __future__ import annotations

from dalle_ds.cli import parse_options
from dalle_ds.evaluation.overlap import OverlapOptions, find_overlap


def main() -> None:
    """Parse, search, say what was found."""
    find_overlap(parse_options(OverlapOptions))
