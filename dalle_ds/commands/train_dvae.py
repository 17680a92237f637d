"""Train the discrete VAE.

deepspeed launchers/train_dvae.py --deepspeed_config FILE --preset NAME --data DIR --run_dir DIR
"""

from dalle_ds.config import DvaeRun
from dalle_ds.planning.check import check_plan
from dalle_ds.tasks.dvae import DvaeTask
from dalle_ds.training.launch import train


def main() -> None:
    """Parse, build, run."""
    train(DvaeRun, DvaeTask, "dvae", check_plan)
