"""Export a model from a checkpoint, as training does at its end: one process, one tensor in memory at a time."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import export

if __name__ == "__main__":
    run_launcher(export)
