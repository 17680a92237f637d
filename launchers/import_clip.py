"""Import a CLIP that others published: its file or folder becomes an exported model, with none of its code run."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import import_clip

if __name__ == "__main__":
    run_launcher(import_clip)
