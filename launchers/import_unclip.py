"""Import an unCLIP that others published, such as Karlo, with none of its code run."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import import_unclip

if __name__ == "__main__":
    run_launcher(import_unclip)
