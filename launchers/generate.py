"""Generate images for prompts with a trained transformer, and write them as one labelled PNG."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import generate

if __name__ == "__main__":
    run_launcher(generate)
