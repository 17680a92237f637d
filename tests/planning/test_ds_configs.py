"""ds_configs/README.md: every JSON is accepted for its purpose, fits its machines, and its figures are the plan's."""

from __future__ import annotations

import re
import shlex

import pytest

from dalle_ds.planning.command import parse_plan_command
from dalle_ds.planning.plan import Plan, make_plan
from dalle_ds.planning.report import gigabytes
from tests.conftest import ROOT

FOLDER = ROOT / "ds_configs"
ROWS = [
    [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
    for line in (FOLDER / "README.md").read_text().splitlines()
    if ".json` | `--preset" in line
]


def plan_of(json_name: str, options: str, cluster: str) -> Plan:
    arguments = shlex.split(f"{options} --cluster {cluster}")
    command = parse_plan_command([*arguments, "--deepspeed_config", str(FOLDER / json_name)])
    return make_plan(command.task, command.deepspeed, command.cluster, command.device)


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip("| ") for row in ROWS])
def test_a_purpose_fits_and_its_figures_are_the_plans(row: list[str]) -> None:
    _, json_name, options, cluster, memory, seconds = row
    plan = plan_of(json_name, options, cluster)
    assert plan.deficit_bytes == 0
    assert memory == f"{gigabytes(plan.memory.peak)} of {gigabytes(plan.cluster.memory)}"
    assert seconds.strip(" |") == f"{plan.time.total:.3g}"


def test_every_json_has_a_purpose_or_names_a_stage() -> None:
    planned = {row[1] for row in ROWS}
    others = {path.name for path in FOLDER.glob("*.json")} - planned
    assert len(planned) == 7 and all(re.fullmatch(r"zero[0-3]_(fp32|bf16|fp16|auto)\.json", name) for name in others)


def test_what_the_page_says_of_the_papers_layout() -> None:
    powersgd = "--powersgd.enabled True --powersgd.storage 1-6-9 --powersgd.transport 1-6-9"
    paper = f"--preset dalle-12b --gpus 1024 --parallel.replicas 128 --train.micro_batch 1 {powersgd}"
    plan = plan_of("hierarchical_fp16.json", paper, "v100-16gb")
    assert plan.layout.batch_size == 1024 and plan.layout.shards == 8
    assert gigabytes(plan.memory.peak) == "27.0" and "need 27.0 GB" in (FOLDER / "README.md").read_text()
    assert plan.deficit_bytes > 0
    assert plan_of("hierarchical_fp16.json", paper, "v100-16gb --cluster.memory_gb 34").deficit_bytes == 0
    two_machines = paper.replace("replicas 128", "replicas 64")
    assert plan_of("hierarchical_fp16.json", two_machines, "v100-16gb").deficit_bytes == 0
