"""The commands of docs/cluster.md, in their order, with an sbatch that only notes what it is asked for: no SLURM is needed."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from dalle_ds.cli import parse_options
from dalle_ds.commands import ExportUnclipOptions
from dalle_ds.config import ClipRun, DecoderRun, DvaeRun, PriorRun, TransformerRun, UpsamplerRun
from dalle_ds.data.command import Preparation
from dalle_ds.doctor.cluster import ClusterOptions
from dalle_ds.evaluation.evaluate import EvaluateOptions
from dalle_ds.training.launch import parse_command
from tests.conftest import ROOT

SBATCH = """#!/bin/bash
[[ $* != *refuse* ]] || exit 1
printf '%s\\0' "$@" >> calls
echo >> calls
echo $((100 + $(wc -l < calls)))
"""
SCONTROL = """#!/bin/bash
exit 1
"""
SCANCEL = """#!/bin/bash
echo "cancelled $*"
"""


class Call:
    """What sbatch was asked for."""

    def __init__(self, arguments: Sequence[str]) -> None:
        (script,) = (place for place, argument in enumerate(arguments) if argument.endswith(".sbatch"))
        self.options = dict(option.removeprefix("--").split("=", 1) for option in arguments[:script] if "=" in option)
        self.stage = Path(arguments[script]).stem
        self.launcher = list(arguments[script + 1 :])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, by links, where sbatch and scontrol are ours."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("slurm", "launchers", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def shell(script: str, place: Path) -> tuple[int, str]:
    """Status of a script, and what it prints."""
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=place, env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def noted(place: Path) -> list[Call]:
    """What sbatch has been asked for so far."""
    return [Call(line.strip("\0").split("\0")) for line in (place / "calls").read_text().splitlines()]


@pytest.fixture(scope="module")
def calls(place: Path) -> list[Call]:
    """Of all the page's commands but the one that installs."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    status, told = shell("".join(blocks).replace("make setup", "true"), place)
    assert status == 0, told
    assert "forgotten" in told  # status.sh, of jobs that SLURM does not know
    return noted(place)


def test_stages_wait_for_each_other(calls: list[Call]) -> None:
    chain = ["tokenizer", "dvae", "codes", "transformer", "evaluate"]
    judged = [*chain[:-1], "clip", "evaluate"]
    unclip = ["tokenizer", "upsampler", "upsampler", "clip", "embeddings", "prior", "decoder", "unclip", "evaluate"]
    assert [call.stage for call in calls] == [
        *("doctor", "prepare_data", "prepare_data"),
        *(*chain, "prepare_data", "prepare_data", *chain, *judged, "transformer", *unclip),
    ]
    waits = {number: call.options.get("dependency") for number, call in enumerate(calls, 101)}
    assert waits == {
        **dict.fromkeys((101, 102, 104, 109, 116, 122, 123)),
        **{
            number: f"afterok:{number - 1}"
            for number in (103, *range(105, 109), *range(110, 116), *range(117, 122), 124, 127, 131)
        },
        # Upsamplers need no embeddings; prior and decoder are side by side; what is made of them waits for all.
        **dict.fromkeys((125, 126), "afterok:123"),
        **dict.fromkeys((128, 129), "afterok:127"),
        130: "afterok:124:125:128:129",
    }


def test_stages_of_an_unclip_find_what_those_before_made(calls: list[Call], place: Path) -> None:
    parts = [call for call in calls if f"{place}/runs/unclip" in " ".join(call.launcher)]
    made = {call.launcher[call.launcher.index("--run_dir") + 1] for call in parts if "--run_dir" in call.launcher}
    assert {Path(folder).name for folder in made} == {"clip", "prior", "decoder", "upsampler_1", "upsampler_2"}
    for call in parts:
        for name in ("--clip", "--prior", "--decoder", "--upsampler", "--cache_embeddings"):
            given = [value for option, value in pairwise(call.launcher) if option == name]
            assert set(given) <= made, (call.stage, name)
    assert [call.launcher[1] for call in parts if call.stage == "upsampler"] == ["64-256", "256-1024"]
    assert call.launcher[call.launcher.index("--unclip") + 1] == f"{place}/runs/unclip/unclip"
    assert "256" in next(call.launcher for call in parts if call.stage == "decoder")
    assert shell("slurm/chain.sh small my_data runs/other --system glide", place)[0] == 2


def test_stages_that_train_get_all_nodes_and_a_warning(calls: list[Call]) -> None:
    for call in calls:
        trains = call.stage in ("dvae", "transformer", "clip", "prior", "decoder", "upsampler")
        everywhere = trains or call.stage in ("doctor", "evaluate", "embeddings")
        assert ("signal" in call.options) == trains
        assert call.options["ntasks-per-node"] == ("8" if everywhere else "1")
        gpus = "8" if everywhere else "1" if call.stage == "codes" else None
        assert call.options.get("gpus-per-node") == gpus
    assert [call.options["nodes"] for call in calls if call.stage == "transformer"] == ["1", "4", "1", "8"]
    assert [call.options["nodes"] for call in calls if call.stage == "evaluate"] == ["1", "4", "1", "1"]
    assert calls[1].options["array"] == "0-15" and "%A_%a" in calls[1].options["output"]


def test_the_papers_presets_are_trained_on_data_with_the_papers_filters(place: Path, tmp_path: Path) -> None:
    (place / "there").mkdir()
    (place / "there" / "info.json").touch()
    prepared = "PREPARE_ARGS='--corpus webdataset --source my_tars {}' AFTER=7 slurm/chain.sh {} {} runs/{}; "
    for preset, data, filtered, jobs, said in (
        ("dalle-3b", "new", True, 7, "--filters.min_side 2"),
        ("dalle-3b", "new", False, 7, "--filters.none True"),
        ("dalle-3b", "new", False, 7, "--filters.paper=False"),
        ("small", "new", False, 7, ""),
        ("dalle-3b", "there", None, 5, ""),
    ):
        before = len(noted(place))
        assert shell(prepared.format(said, preset, data, f"{preset}-{data}"), place)[0] == 0
        new = noted(place)[before:]
        assert len(new) == jobs
        first, second = new[:2]
        assert first.options["dependency"] == "afterok:7"
        assert all(call.options["kill-on-invalid-dep"] == "yes" for call in new)
        if filtered is not None:
            assert [call.stage for call in new[:3]] == ["prepare_data", "prepare_data", "tokenizer"]
            assert second.options["array" if "array" in second.options else "dependency"] == f"afterok:{before + 101}"
            for call in (first, second):
                filters = parse_options(Preparation, call.launcher).filters
                assert (filters.paper, filters.none) == (filtered, said.startswith("--filters.none"))
                assert call.launcher.count("--filters.paper") == filtered
                assert call.options["nodes"] == "1"


JUDGES = (("judged", "clip"), ("unclip", "clip"))


def test_launchers_understand_what_they_are_given(
    calls: list[Call], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    found = []
    for call in calls:
        if call.stage == "dvae":
            found.append(parse_command(DvaeRun, "dvae", call.launcher).run.run_dir)
        elif call.stage == "transformer":
            found.append(parse_command(TransformerRun, "transformer", call.launcher).run.train.batch_size)
        elif call.stage == "clip":
            assert Path(parse_command(ClipRun, "clip", call.launcher).run.run_dir).parts[-2:] in JUDGES
        elif call.stage in ("prior", "decoder"):
            kind = {"prior": PriorRun, "decoder": DecoderRun}[call.stage]
            assert parse_command(kind, call.stage, call.launcher).run.clip.endswith("runs/unclip/clip")
        elif call.stage == "upsampler":
            section = "upsampler_1" if call.launcher[1] == "64-256" else "upsampler_2"
            assert parse_command(UpsamplerRun, section, call.launcher[2:]).run.run_dir.endswith(section)
        elif call.stage == "unclip":
            assert len(parse_options(ExportUnclipOptions, call.launcher).upsampler) == 2
        elif call.stage == "evaluate":
            options = parse_options(EvaluateOptions, call.launcher)
            clip = str(Path(options.out).parent / "clip")
            assert (options.clip, options.numbers) in [(None, [1]), (clip, [1, 8, 64])]
        elif call.stage == "doctor":
            found.append(parse_options(ClusterOptions, call.launcher[1:]).path)
    assert found[0] == "runs"
    assert [Path(str(name)).parts[-2:] for name in (found[1], found[3])] == [("first", "dvae"), ("second", "dvae")]
    assert found[4] == 1024


def test_a_site_may_leave_out_what_the_cluster_decides(place: Path) -> None:
    changes = (
        "s/^TIME_LIMIT=.*/TIME_LIMIT=/; s/^CPUS_PER_PROCESS=.*/CPUS_PER_PROCESS=/; s/^GPUS_PER_NODE=8/GPUS_PER_NODE=0/"
    )
    before = len(noted(place))
    script = f"sed '{changes}' slurm/site.sh > bare.sh; DALLE_SITE=$PWD/bare.sh slurm/submit.sh slurm/dvae.sbatch"
    assert shell(script, place)[0] == 0
    (call,) = noted(place)[before:]
    assert not {"time", "cpus-per-task", "gpus-per-node"} & set(call.options)
    assert call.options["ntasks-per-node"] == "1"


def test_a_folder_in_cdpath_changes_nothing(place: Path) -> None:
    before = len(noted(place))
    (place / "elsewhere" / "runs").mkdir(parents=True)
    assert shell("CDPATH=elsewhere:. slurm/chain.sh small my_data runs", place)[0] == 0
    assert noted(place)[before].launcher[-1] == f"{place}/runs/tokenizer.model"


def test_a_chain_is_queued_whole_or_not_at_all(place: Path) -> None:
    status, told = shell("DVAE_ARGS=--refuse slurm/chain.sh small my_data runs/whole", place)
    assert status != 0
    assert re.search(r"tokenizer +(\d+)\ncancelled \1\n", told)


def test_of_a_chain_that_prepares_its_data_no_job_stays_behind(place: Path) -> None:
    script = "PREPARE_ARGS='--corpus c --source s' DVAE_ARGS=--refuse slurm/chain.sh small unprepared runs/left"
    before = len(noted(place))
    status, told = shell(script, place)
    assert status != 0 and len(noted(place)) == before + 3
    assert f"cancelled {' '.join(str(before + number) for number in (101, 102, 103))}\n" in told


def test_stages_of_one_process_get_one_node(place: Path) -> None:
    before = len(noted(place))
    assert shell("SBATCH_ARGS='--nodes=4 --qos=x' slurm/chain.sh small my_data runs/wide", place)[0] == 0
    new = noted(place)[before:]
    assert [(call.stage, call.options["nodes"]) for call in new] == [
        *(("tokenizer", "1"), ("dvae", "4"), ("codes", "1"), ("transformer", "4"), ("evaluate", "4"))
    ]
    assert {call.options["qos"] for call in new} == {"x"}


def test_a_chain_that_is_given_again_keeps_its_tokenizer(place: Path) -> None:
    (place / "again").mkdir()
    (place / "again" / "tokenizer.model").touch()
    before = len(noted(place))
    assert shell("slurm/chain.sh small my_data again", place)[0] == 0
    new = noted(place)[before:]
    assert [call.stage for call in new] == ["dvae", "codes", "transformer", "evaluate"]
    assert "dependency" not in new[0].options


def test_a_chain_trains_on_several_corpora(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(noted(place))
    assert shell("slurm/chain.sh small my_data,more_data several", place)[0] == 0
    calls = noted(place)[before:]
    assert [call.stage for call in calls] == ["tokenizer", "dvae", "codes", "codes", "transformer", "evaluate"]
    assert [call.launcher[1] for call in calls if call.stage == "codes"] == ["my_data", "more_data"]
    monkeypatch.chdir(place)
    for kind, stage in ((DvaeRun, "dvae"), (TransformerRun, "transformer")):
        (launcher,) = (call.launcher for call in calls if call.stage == stage)
        assert parse_command(kind, stage, launcher).run.data == ("my_data", "more_data")
    assert parse_options(EvaluateOptions, calls[-1].launcher).data == "my_data"
