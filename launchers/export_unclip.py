"""Put the stages of an unCLIP, trained one by one, into one folder; or write it for diffusers."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import export_unclip

if __name__ == "__main__":
    run_launcher(export_unclip)
