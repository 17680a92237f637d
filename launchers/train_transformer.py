"""Train the text-image transformer, on cached or live image codes."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands.train_transformer import main

if __name__ == "__main__":
    run_launcher(main)
