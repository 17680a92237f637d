"""Processes for tests: forked from one that has imported everything, instead of started anew.

Before two ranks of the `deepspeed` launcher do anything, torch and DeepSpeed are imported four times. What the launcher itself
does is tested with the launcher; everything else runs here.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT, free_port

_PRELOAD = [
    "tests.conftest",
    "dalle_ds.training.trainer",
    "dalle_ds.training.loop",
    "dalle_ds.sampling",
    "dalle_ds.data.prepare",
    "matplotlib",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles a function, for which it imports all of torch's compiler
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_PRELOAD)


def run_ranks(
    script: str | Path,
    *arguments: object,
    processes: int = 1,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout: float = 550,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script as `torchrun` (several processes) or `python` (one) would, and wait for it.

    Returns:
        The first exit status that is not 0, or 0; what all ranks wrote. When one rank fails, the others are ended.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; no process is left.
    """
    command = [str(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        ranks = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            ranks.append(_CONTEXT.Process(target=_run, args=(command, environment | own, str(cwd), *map(str, outputs))))
            ranks[-1].start()
        status = _wait(ranks, timeout)
        stdout, stderr = (path.read_text(errors="replace") for path in outputs)
    if status is None:
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    return subprocess.CompletedProcess(command, status, stdout, stderr)


def _wait(ranks: list, timeout: float) -> int | None:
    """The first status that is not 0, or 0; None where time ran out."""
    end, status, ran_out = time.monotonic() + timeout, 0, False
    while any(rank.is_alive() for rank in ranks):
        next((rank for rank in ranks if rank.is_alive()), ranks[0]).join(0.05)
        if status == 0 and (failed := [rank.exitcode for rank in ranks if rank.exitcode]):
            status = failed[0]
            end = min(end, time.monotonic() + 30)  # the others may say why, too
        if time.monotonic() > end:
            ran_out = status == 0
            for rank in ranks:
                rank.kill()
    for rank in ranks:
        rank.join()
    return None if ran_out else next((rank.exitcode for rank in ranks if rank.exitcode), status)


def _run(argv: list[str], environment: dict[str, str], cwd: str, stdout: str, stderr: str) -> None:
    """In the child: be the script."""
    gc.freeze()  # DeepSpeed collects garbage again and again, and would look at all that was imported each time
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = argv
    folder = str(Path(argv[0]).resolve().parent)
    sys.path[:] = [folder, str(ROOT), *(path for path in sys.path if path not in ("", folder, str(ROOT)))]
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
