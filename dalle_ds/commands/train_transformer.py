"""Train the text-image transformer, on cached or live image codes.

deepspeed launchers/train_transformer.py --deepspeed_config FILE --preset NAME --data DIR --dvae DIR \\
    --tokenizer FILE --run_dir DIR
"""

from dalle_ds.config import TransformerRun
from dalle_ds.planning.check import check_plan
from dalle_ds.tasks.transformer import TransformerTask
from dalle_ds.training.launch import train


def main() -> None:
    """Parse, build, run."""
    train(TransformerRun, TransformerTask, "transformer", check_plan)
