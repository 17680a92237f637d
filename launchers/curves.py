"""Plot how a run is doing, while it goes on or after: loss, gradient norm, learning rate, gradient scales."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import curves

if __name__ == "__main__":
    run_launcher(curves)
