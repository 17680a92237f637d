"""Merge low-rank adapters into the model that they were trained on, one or several at once."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import merge_adapters

if __name__ == "__main__":
    run_launcher(merge_adapters)
