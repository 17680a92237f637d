"""Measure trained models, or compare what two evaluations found."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import evaluate

if __name__ == "__main__":
    run_launcher(evaluate)
