"""Train the detector of duplicates, for launchers/overlap.py.

deepspeed launchers/train_duplicates.py --deepspeed_config FILE --preset NAME --data DIR --run_dir DIR
"""

from dalle_ds.cli import run_launcher
from dalle_ds.config.overlap import DuplicateRun
from dalle_ds.tasks.duplicates import DuplicatesTask
from dalle_ds.training.launch import train


def main() -> None:
    """Parse, build, run."""
    train(DuplicateRun, DuplicatesTask, "duplicates")


if __name__ == "__main__":
    run_launcher(main)
