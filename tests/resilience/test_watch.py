"""A process that dies, hangs or fails ends its run, with its rank in the message; one that takes its time does not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from dalle_ds.config import to_dict
from tests.conftest import ROOT, TINY_DALLE, deepspeed_command
from tests.resilience.watch_worker import HANG

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `watch_worker.py` found, by job."""
    folder = tmp_path_factory.mktemp("watch")
    done = subprocess.run(
        [sys.executable, "-m", "tests.resilience.watch_worker", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    for job in found:
        found[job]["logs"] = folder / job / "logs"
    return found


AT_MOST = 20
"""Seconds to the end of all processes. With the timeout of these jobs it is 10 at most, but the machine may be busy."""


def line_of(kind: str, rank: int | str, step: str = "none", status: int = 75, text: str = "") -> str:
    """A pattern for a line of a monitor."""
    return rf"dalle_ds monitor: {kind} rank={rank} host=\S+ step={step} exit={status}: [^\n]*{text}[^\n]*\n"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("job", "statuses", "teller", "line"),
    [
        ("killed-1-of-2", [75, -9], 0, line_of("crash", 1, text="dmesg")),
        ("killed-2-of-4", [75, 75, -9, 75], 0, line_of("crash", 2)),
        ("killed-0-of-2", [-9, 75], 0, line_of("crash", 0)),
        ("killed-with-monitor", [75, -9], 0, line_of("lost", 1)),
        ("killed-with-coordinator", [-9, 75], 1, line_of("lost", 0)),
        ("killed-with-child", [75, -9], 0, line_of("crash", 1)),
        ("killed-while-stuck", [-9, -9], 0, line_of("crash", 1)),
        ("gone-before", [75, 3], 0, line_of("lost", 1, text=r"\d+ s: crashed at the start")),
        ("stopped", [75, -9], 0, line_of("stopped", 1, text="SIGSTOP")),
        ("silent", [75, -9], 0, line_of("lost", 1, text=r"no sign of life for \d+ s")),
        ("silent-coordinator", [-9, 75], 1, line_of("lost", 0, text=r"no sign of life for \d+ s")),
        ("data-error", [1, 1], 0, line_of("error", 1, status=1, text="row 7 is broken: mend it")),
        ("data-error-everywhere", [1, 1], 0, line_of("error", "all", status=1, text="row 7 is broken: mend it")),
        ("interrupted-alone", [75, 75], 0, line_of("interrupted", 1)),
        ("terminated", [75, -15], 0, line_of("crash", 1)),
        ("watched-twice", [1, 1], 0, line_of("error", 1, status=1, text="in the second context")),
        ("alone-killed", [-9], 0, line_of("crash", 0)),
        ("alone-fails", [1], 0, "error: row 7 is broken: mend it\n"),
    ],
)
def test_one_line_has_class_and_rank_and_all_processes_end(
    results: dict[str, Any], job: str, statuses: list[int], teller: int, line: str
) -> None:
    found = results[job]
    assert re.fullmatch(line, found["outputs"][teller]), found["outputs"][teller]
    assert [output for rank, output in enumerate(found["outputs"]) if rank != teller] == [""] * (len(statuses) - 1)
    assert found["statuses"] == statuses
    assert found["seconds"] is not None and found["seconds"] < AT_MOST
    assert found["monitors_seconds"] is not None and found["monitors_seconds"] < AT_MOST


def stack_file(found: dict[str, Any], rank: int) -> str:
    """What a hang has left of a rank."""
    return Path(found["logs"], "stacks", f"rank-{rank}.txt").read_text()


STEP_7 = '7 phase="step"'


@pytest.mark.launch
@pytest.mark.parametrize(
    ("job", "statuses", "place"),
    [
        ("loops", [75, 75], "loop_for_ever"),
        ("sleeps", [75, 75, 75, 75], "<lambda>"),
        ("holds-the-interpreter", [75, -9], "loop_in_c"),
    ],
)
def test_a_hang_ends_all_and_names_who_and_where(
    results: dict[str, Any], job: str, statuses: list[int], place: str
) -> None:
    found = results[job]
    last = len(statuses) - 1
    text = rf"no progress for (\d+) s, in watch_worker.py:\d+ \({place}\); .* {re.escape(str(found['logs']))}/stacks;"
    line = re.fullmatch(line_of("hang", last, STEP_7, text=text), found["outputs"][0])
    assert line is not None, found["outputs"][0]
    assert int(line[1]) >= HANG
    assert found["outputs"][1:] == [""] * last
    assert found["statuses"] == statuses
    assert found["seconds"] < AT_MOST and found["monitors_seconds"] < AT_MOST
    head, first, *_ = stack_file(found, last).splitlines()
    assert re.match(rf'=== \S+ rank={last} pid=\d+ step=7 phase="step"', head)
    assert first.startswith("Thread 0x") and f" in {place}\n" in stack_file(found, last)
    for rank in range(last):
        assert re.search(r"distributed_c10d.py\", line \d+ in barrier\n", stack_file(found, rank))


@pytest.mark.launch
def test_who_has_done_fewer_steps_is_behind_even_where_all_wait(results: dict[str, Any]) -> None:
    found = results["hangs-ahead"]
    assert found["statuses"] == [75, 75] and found["outputs"][1] == ""
    assert re.fullmatch(line_of("hang", 0, STEP_7, text=r"in barrier at mesh.py:\d+ \(barrier\)"), found["outputs"][0])


@pytest.mark.launch
@pytest.mark.parametrize(
    ("job", "statuses", "first", "behind"),
    [("times-out", [75, 75], line_of("disconnected", 0, STEP_7), 1), ("dies-of-waiting", [75, -6], "crash", 0)],
)
def test_where_waiting_for_a_process_ends_first_that_one_is_named_too(
    results: dict[str, Any], job: str, statuses: list[int], first: str, behind: int
) -> None:
    found = results[job]
    if first == "crash":
        first = line_of("crash", 1, STEP_7)
    second = line_of(
        "hang", behind, '7 phase="waiting for data"', text=r"watch_worker.py:\d+ \((?:time_out|die_of_waiting)\)"
    )
    assert re.search(first + second + "$", found["outputs"][0]), found["outputs"][0]
    assert found["outputs"][1] == "" and found["statuses"] == statuses
    assert found["seconds"] < AT_MOST


@pytest.mark.launch
def test_a_process_alone_hangs(results: dict[str, Any]) -> None:
    found = results["alone-loops"]
    assert found["statuses"] == [75] and found["seconds"] < AT_MOST
    assert re.fullmatch(line_of("hang", 0, STEP_7, text=r"watch_worker.py:\d+ \(loop_for_ever\)"), found["outputs"][0])
    assert " in loop_for_ever\n" in stack_file(found, 0)


@pytest.mark.launch
def test_a_process_that_is_stopped_cannot_say_where_it_is_and_that_is_said(results: dict[str, Any]) -> None:
    found = results["alone-stopped"]
    assert found["statuses"] == [-9] and found["monitors_seconds"] < AT_MOST
    assert re.fullmatch(line_of("hang", 0, r'\d phase="[^"]*"', text="no answer: .*SIGSTOP"), found["outputs"][0])
    assert re.match(r"=== .*\nno answer: .*SIGSTOP", stack_file(found, 0))


@pytest.mark.launch
@pytest.mark.parametrize(("job", "step"), [("takes-long", 4), ("told-to-stop-0-first", 3), ("loops", 7)])
def test_heartbeats_say_where_each_process_is(results: dict[str, Any], job: str, step: int) -> None:
    found = results[job]
    assert sorted(path.name for path in (found["logs"] / "heartbeats").iterdir()) == ["rank-0.json", "rank-1.json"]
    for rank in range(2):
        beat = json.loads((found["logs"] / "heartbeats" / f"rank-{rank}.json").read_text())
        assert list(beat) == ["rank", "host", "pid", "step", "phase", "seconds_since_pulse", "resident_bytes", "time"]
        assert (beat["rank"], beat["step"], beat["phase"]) == (rank, step, "step")
        assert 0 <= beat["seconds_since_pulse"] < AT_MOST
        ago = datetime.now(timezone.utc) - datetime.fromisoformat(beat["time"])
        assert 0 <= ago.total_seconds() < 300


@pytest.mark.launch
@pytest.mark.parametrize("job", ["killed-1-of-2", "data-error", "busy"])
def test_a_process_that_gives_no_pulse_leaves_no_files(results: dict[str, Any], job: str) -> None:
    assert not results[job]["logs"].exists()


@pytest.mark.launch
@pytest.mark.parametrize("job", ["told-to-stop-0-first", "told-to-stop-1-first"])
def test_a_run_that_stops_as_it_is_told_is_left_alone(results: dict[str, Any], job: str) -> None:
    """Signals to the monitors too, and processes that are ready at different times."""
    found = results[job]
    assert found["statuses"] == [75, 75] and found["outputs"] == ["", ""]
    assert found["seconds"] < AT_MOST and found["monitors_seconds"] < AT_MOST


@pytest.mark.launch
def test_a_process_alone_does_without_its_monitor(results: dict[str, Any]) -> None:
    found = results["alone-monitor-killed"]
    assert found["statuses"] == [0]
    assert re.fullmatch(r"warning: the monitor of rank 0 .*\n", found["outputs"][0])


@pytest.mark.launch
def test_a_monitor_that_dies_takes_its_process_along(results: dict[str, Any]) -> None:
    found = results["monitor-killed"]
    assert found["statuses"] == [75, 75]
    assert re.fullmatch(line_of("lost", 1), found["outputs"][0])
    assert re.fullmatch(r"error: the monitor of rank 1 .*\n", found["outputs"][1])


@pytest.mark.launch
def test_an_error_of_no_one_in_particular_is_shown_with_its_traceback(results: dict[str, Any]) -> None:
    found = results["unexpected"]
    assert found["statuses"] == [1, 1] and found["outputs"][1] == ""
    line = line_of("error", 1, status=1, text="KeyError: 'row 7'")
    assert re.fullmatch(rf"Traceback \(most recent call last\):\n[^$]*KeyError: 'row 7'\n{line}", found["outputs"][0])


@pytest.mark.launch
def test_a_broken_collective_that_no_crash_explains_is_told_after_the_timeout(results: dict[str, Any]) -> None:
    found = results["cut-off"]
    assert found["statuses"] == [75, 75]
    assert "Traceback" in found["outputs"][0] and found["outputs"][1] == ""
    assert re.search(rf"\n{line_of('disconnected', 0, text='RuntimeError: .*/gloo/')}$", found["outputs"][0])
    assert found["seconds"] < AT_MOST


@pytest.mark.launch
@pytest.mark.parametrize(
    "job",
    ["busy", "first-ends-last", "first-ends-first", "suspended", "stopped-for-a-while", "slow-to-leave", "takes-long"],
)
def test_no_alarm_where_a_process_only_takes_its_time(results: dict[str, Any], job: str) -> None:
    found = results[job]
    assert found["statuses"] == [0, 0]
    assert found["outputs"] == ["", ""]
    assert found["monitors_seconds"] is not None


@pytest.mark.launch
@pytest.mark.parametrize(("job", "status"), [("cancelled", -15), ("interrupted", 75)])
def test_a_run_that_is_ended_as_a_whole_says_nothing(results: dict[str, Any], job: str, status: int) -> None:
    found = results[job]
    assert found["statuses"] == [status] * 2 and found["outputs"] == ["", ""]
    assert found["monitors_seconds"] < AT_MOST


@pytest.mark.launch
def test_an_error_after_the_end_of_rank_0_is_the_process_own(results: dict[str, Any]) -> None:
    found = results["fails-after-the-end"]
    assert found["statuses"] == [0, 1]
    assert found["outputs"] == ["", "error on rank 1: too late\n"]


def stop_loaders(rank: int) -> list[int]:
    """Stop the processes that load a rank's data, as a disk that hangs would, and say which."""
    children = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    loaders = [int(pid) for pid in children if b"resilience.monitor" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert loaders
    for pid in loaders:
        os.kill(pid, signal.SIGSTOP)
    return loaders


@pytest.mark.slow
@pytest.mark.launch
def test_a_training_run_ends_when_one_of_its_processes_gets_no_data(
    tmp_path: Path, data: Path, dvae_export: Path, tokenizer_file: Path
) -> None:
    """Through the launcher and its script, with data loaders' processes."""
    run = tmp_path / "run"
    options = {"data": data, "dvae": dvae_export, "tokenizer": tokenizer_file, "run_dir": run, "steps": 100_000}
    options |= {f"model.{name}": value for name, value in to_dict(TINY_DALLE).items() if isinstance(value, int)}
    options |= {"preset": "toy", "deepspeed_config": ROOT / "ds_configs" / "zero1_fp32.json", "train.batch_size": 8}
    options |= {"loader.workers": 1, "report.log_every": 1, "watch.hang_minutes": 0.2}
    command = [*deepspeed_command(2), str(ROOT / "launchers" / "train_transformer.py")]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    log = tmp_path / "log"
    with log.open("w") as output:
        launcher = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()) and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert launcher.poll() is None and metrics.read_text(), log.read_text()
    ranks = [int(pid) for pid in re.findall(r"process (\d+) spawned", log.read_text())]
    stopped = stop_loaders(ranks[1])
    try:
        assert launcher.wait(timeout=60) != 0
    finally:
        for pid in stopped:  # nobody else can end them
            os.kill(pid, signal.SIGKILL)
    line = line_of("hang", 1, r'\d+ phase="waiting for data"', text=r"stacks of all ranks: \S*/run/logs/stacks")
    assert re.search(line, log.read_text()), log.read_text()
    assert "Traceback" not in log.read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
