"""Train CLIP, from random weights or from those of another one.

deepspeed launchers/train_clip.py --deepspeed_config FILE --preset NAME --data DIR --tokenizer FILE --run_dir DIR
"""

from dalle_ds.config import ClipRun
from dalle_ds.planning.check import check_plan
from dalle_ds.tasks.clip import ClipTask
from dalle_ds.training.launch import train


def main() -> None:
    """Parse, build, run."""
    train(ClipRun, ClipTask, "clip", check_plan)
