"""Find validation images that are in the training data, and show them: OUT/neighbours.jsonl, pairs.html, overlap.json."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import overlap

if __name__ == "__main__":
    run_launcher(overlap)
