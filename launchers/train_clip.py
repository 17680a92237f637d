"""Train CLIP, from random weights or from those of another one."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import train_clip

if __name__ == "__main__":
    run_launcher(train_clip)
