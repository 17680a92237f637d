"""Prepare a corpus for training, cache image codes or embeddings of prepared data, or several of these."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import prepare_data

if __name__ == "__main__":
    run_launcher(prepare_data)
