"""Trains tiny models under many layouts in one launch; started by test_layouts.py with the deepspeed launcher.

Arguments: a JSON file with a list of {"name", "stage", "run": fields, "deepspeed": JSON}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dalle_ds.cli import run_launcher
from dalle_ds.config import from_dict
from dalle_ds.parallel import Mesh
from dalle_ds.tasks.stages import STAGES
from dalle_ds.training.trainer import Trainer


def main() -> None:
    mesh = Mesh.start("cpu")
    # The launcher appends nothing but puts --local_rank first.
    for job in json.loads(Path(sys.argv[-1]).read_text()):
        kind, task = STAGES[job["stage"]]
        Trainer(task, from_dict(kind, job["run"], job["name"]), job["deepspeed"], mesh).fit()
    mesh.stop()


if __name__ == "__main__":
    run_launcher(main)
