"""Measure trained models, or compare what two evaluations found.

python launchers/evaluate.py --data DIR --dvae DIR --transformer DIR --clip DIR --best_of 1,8,64 --out DIR
python launchers/evaluate.py --real DIR --fake DIR --out DIR
python launchers/evaluate.py compare A/result.json B/result.json

Several processes share the work: deepspeed launchers/evaluate.py with the same options, or torchrun.
"""

from __future__ import annotations

import sys

from dalle_ds.evaluation.evaluate import evaluate_command
from dalle_ds.evaluation.results import compare_command


def main() -> None:
    """Evaluate, or compare."""
    if sys.argv[1:2] == ["compare"]:
        compare_command(sys.argv[2:])
    else:
        evaluate_command(sys.argv[1:])
