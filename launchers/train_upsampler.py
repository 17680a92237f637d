"""Train an upsampler of unCLIP: from 64 to 256 pixels, or from 256 to 1024."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import train_upsampler

if __name__ == "__main__":
    run_launcher(train_upsampler)
