"""Runs that are told to stop, by real signals: what they leave, what they end with, and where they go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dalle_ds.errors import EXIT_REQUEUE
from dalle_ds.resilience.signals import StopSignals
from tests.conftest import EVERYTHING, ROOT, TINY_DALLE, deepspeed_command

sys.path.append(str(ROOT / "benchmarks"))
from processes import Ranks

STEPS = 40


def arguments(run_dir: Path, data: Path, dvae: Path, tokenizer: Path, *more: str) -> list[str]:
    shape = [
        word
        for name in ("width", "depth", "heads", "text_len", "grid", "text_vocab", "image_vocab")
        for word in (f"--model.{name}", str(getattr(TINY_DALLE, name)))
    ]
    options = f"--preset toy --steps {STEPS} --save_every 1000 --train.batch_size 8 --optim.warmup_steps 3 --seed 3"
    reports = "--report.log_every 1 --report.validate_every 7 --report.preview_every 0 --loader.workers 1"
    return [
        str(ROOT / "launchers" / "train_transformer.py"),
        *("--deepspeed_config", str(ROOT / "ds_configs" / "zero3_bf16.json")),
        *("--data", str(data), "--dvae", str(dvae), "--tokenizer", str(tokenizer), "--run_dir", str(run_dir)),
        *shape,
        *options.split(),
        *reports.split(),
        *more,
    ]


Start = Callable[..., Ranks]


@pytest.fixture
def start(tmp_path: Path, data: Path, dvae_export: Path, tokenizer_file: Path) -> Iterator[Start]:
    started = []

    def begin(name: str, *more: str, count: int = 2, **environment: str) -> Ranks:
        command = arguments(tmp_path / name, data, dvae_export, tokenizer_file, *more)
        started.append(Ranks(command, count, tmp_path / f"{name}.log", environment))
        return started[-1]

    yield begin
    for ranks in started:
        ranks.kill()


def records(run_dir: Path) -> list[dict]:
    """Lines of metrics without what depends on the time."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


def wait_for_step(run_dir: Path, step: int, ranks: Ranks) -> None:
    for _ in range(3000):
        file = run_dir / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            return
        assert ranks.running, ranks.output
        time.sleep(0.02)
    raise AssertionError(ranks.output)


@pytest.mark.launch
def test_signals_of_every_kind_stop_a_run_that_then_ends_as_if_there_had_been_none(
    start: Start, tmp_path: Path
) -> None:
    straight = start("straight")
    assert straight.wait(120) == [0, 0], straight.output
    # Lines of metrics, of all starts together.
    tried = ((signal.SIGUSR1, 1, 12), *(((signal.SIGTERM, 0, 22), (signal.SIGINT, None, 32)) if EVERYTHING else ()))
    for number, rank, lines in tried:
        ranks = start("told")
        wait_for_step(tmp_path / "told", lines, ranks)
        ranks.send(number, rank)
        assert ranks.wait(60) == [EXIT_REQUEUE] * 2, ranks.output
        told = f"by {number.name}" if rank != 1 else "as another process was told to"
        assert "told: stopped after update " in ranks.output and told in ranks.output
        assert "Traceback" not in ranks.output
        newest = (tmp_path / "told" / "checkpoints" / "latest").read_text().strip()
    last = start("told")
    assert last.wait(120) == [0, 0], last.output
    assert f"resumed from {tmp_path / 'told' / 'checkpoints' / newest}" in last.output.replace("\n", "")
    assert records(tmp_path / "told") == records(tmp_path / "straight")
    assert (tmp_path / "told" / "export" / "model.safetensors").read_bytes() == (
        tmp_path / "straight" / "export" / "model.safetensors"
    ).read_bytes()


@pytest.mark.launch
def test_a_second_signal_stops_at_once(start: Start, tmp_path: Path) -> None:
    ranks = start("once", "--report.validate_every", "0")
    wait_for_step(tmp_path / "once", 3, ranks)
    ranks.send(signal.SIGSTOP, 1)  # so that rank 0 waits for it, and cannot finish its update
    time.sleep(0.3)
    ranks.send(signal.SIGTERM, 0)
    ranks.wait_for("SIGTERM: stopping after this update, with a checkpoint; again to stop at once", 10)
    time.sleep(1.2)
    began = time.monotonic()
    ranks.send(signal.SIGTERM, 0)
    assert ranks.processes[0].wait(5) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 1
    assert "SIGTERM: stopped at once" in ranks.output
    assert not list((tmp_path / "once" / "checkpoints").glob("step-*"))


SCRIPT = """
import os, signal, sys, time
from dalle_ds.resilience.signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    until = time.monotonic() + 20
    while time.monotonic() < until and not (sys.argv[1] == "first" and signals.requested):
        time.sleep(0.01)
    print(signals.requested, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""


def tell(*steps: tuple[float, signal.Signals], mode: str = "all") -> tuple[int, str]:
    """Status and output of a process that is sent signals, each after some seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for seconds, number in steps:
        time.sleep(seconds)
        process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=3)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.kill()
        return 0, process.communicate()[0]


def test_a_signal_behind_a_request_is_no_second_one_but_another_is() -> None:
    """A launcher that goes may be followed by what it, or whoever ended it, sends."""
    script = SCRIPT.replace('print("ready"', 'signals.request("loss of the launcher"); print("ready"')
    process = subprocess.Popen([sys.executable, "-c", script, "all"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "loss of the launcher: stopping after this update, with a checkpoint\n"
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        time.sleep(1.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=3)[0] == "SIGTERM: stopped at once\n" and process.returncode == 143


def test_one_signal_is_a_request_and_handlers_are_given_back() -> None:
    status, output = tell((0, signal.SIGUSR1), mode="first")
    assert status == -signal.SIGTERM  # by default again, once the context is left
    assert output.splitlines()[-1] == "SIGUSR1"


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        (((0, signal.SIGTERM), (0.1, signal.SIGTERM)), 0),  # one request that came by two ways
        (((0, signal.SIGTERM), (1.3, signal.SIGTERM)), 143),
        (((0, signal.SIGINT), (1.3, signal.SIGTERM)), 0),  # what the deepspeed launcher makes of Ctrl-C
        (((0, signal.SIGUSR1), (1.3, signal.SIGTERM)), 0),  # what SLURM does at the time limit
        (((0, signal.SIGTERM), (1.3, signal.SIGUSR1)), 0),  # and at a preemption shortly before
        (((0, signal.SIGUSR1), (1.3, signal.SIGTERM), (0.1, signal.SIGINT)), 130),
        (((0, signal.SIGINT), (1.3, signal.SIGINT)), 130),
    ],
)
def test_what_counts_as_a_second_signal(steps: tuple[tuple[float, signal.Signals], ...], status: int) -> None:
    assert tell(*steps)[0] == status


def test_a_forked_process_has_signals_of_its_own() -> None:
    with StopSignals(quiet=True) as signals:
        child = os.fork()
        if child == 0:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.1)
        assert signals.requested is None


def test_signals_can_be_waited_for_again_and_again() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1) * 20:
        with StopSignals(quiet=True) as signals:
            os.kill(os.getpid(), number)
            for _ in range(500):
                if signals.requested:
                    break
                time.sleep(0.002)
            assert signals.requested == number.name


def test_a_second_signal_counts_though_nobody_reads_what_is_printed() -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "all"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(3) == 143


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_launcher_processes_and_workers_leaves_a_checkpoint(
    tmp_path: Path, data: Path, dvae_export: Path, tokenizer_file: Path, number: signal.Signals
) -> None:
    """The deepspeed launcher answers with SIGTERM to all its processes, one tree after the other, and ends with a status of
    its own."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [*deepspeed_command(2), *arguments(run_dir, data, dvae_export, tokenizer_file)]
    with log.open("w") as output:
        launcher = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists() or (run_dir / "metrics.jsonl").read_text().count("\n") < 4:
            assert launcher.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        os.killpg(launcher.pid, number)
        assert launcher.wait(60) != 0
        while "; the same command goes on from there" not in log.read_text():  # its processes outlive it
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert "run: stopped after update" in log.read_text() and "dalle_ds/" not in log.read_text(), log.read_text()
    step = int((run_dir / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert step >= 4 and records(run_dir)[-1]["step"] == step
