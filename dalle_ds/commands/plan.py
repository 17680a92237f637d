"""Plan a run on a cluster: parameters, bytes by kind and moment, traffic by axis, projected time; or rank all layouts.

python launchers/plan.py --preset dalle-12b --cluster h100-80gb --gpus 64 --deepspeed_config ds_configs/zero3_bf16.json
python launchers/plan.py --preset dalle-12b --cluster h100-80gb --gpus 64 --search True
python launchers/plan.py --preset dalle-12b --stage clip --cluster h100-80gb --gpus 256
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from dalle_ds.errors import ConfigError
from dalle_ds.files import write_bytes
from dalle_ds.planning.command import parse_plan_command
from dalle_ds.planning.plan import make_plan
from dalle_ds.planning.report import found_tables, plan_tables
from dalle_ds.planning.search import search


def main() -> None:
    """Parse, plan, print."""
    command = parse_plan_command()
    if command.json is not None and (Path(command.json).is_dir() or not Path(command.json).parent.is_dir()):
        raise ConfigError(f"--json must be a file in a folder that exists, found {command.json}")
    figures: dict[str, Any]
    if command.search:
        found = search(command.task, command.deepspeed, command.cluster, command.device)
        tables, figures = found_tables(found), found.to_dict()
    else:
        plan = make_plan(command.task, command.deepspeed, command.cluster, command.device)
        tables, figures = plan_tables(plan), plan.to_dict()
    Console(width=130).print(tables)
    if command.json is not None:
        write_bytes(Path(command.json), (json.dumps(figures, indent=2) + "\n").encode())
