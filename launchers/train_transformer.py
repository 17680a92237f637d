"""Train the text-image transformer, on cached or live image codes."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import train_transformer

if __name__ == "__main__":
    run_launcher(train_transformer)
