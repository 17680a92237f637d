"""Export a model from a checkpoint, as training does at its end: no DeepSpeed, one process, one tensor in memory at a time."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands.export import main

if __name__ == "__main__":
    run_launcher(main)
