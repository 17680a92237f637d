"""Train the discrete VAE."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import train_dvae

if __name__ == "__main__":
    run_launcher(train_dvae)
