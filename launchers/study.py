"""A study of human preference between two models' images: pages for voters, and the count of what they save."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import study

if __name__ == "__main__":
    run_launcher(study)
