"""Train the discrete VAE."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands.train_dvae import main

if __name__ == "__main__":
    run_launcher(main)
