"""Runs small jobs whose processes die, hang, fail or just take their time, all side by side; started by test_watch.py.

python -m tests.resilience.watch_worker FOLDER: writes FOLDER/results.json, by job {"outputs", "statuses", "seconds",
"monitors_seconds"}: what each rank and its monitor printed, its exit status (negative for a signal), and how long after
the event all ranks, and all monitors, were gone (null: they had to be killed). FOLDER/JOB/logs is what monitors wrote.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import deepspeed  # noqa: F401  # once, for all processes that are forked below
import torch
import torch.distributed as dist

from dalle_ds.cli import explain, run_launcher
from dalle_ds.config.parallel import WatchConfig
from dalle_ds.errors import EXIT_REQUEUE, DataError
from dalle_ds.parallel import Mesh
from dalle_ds.resilience import watch
from dalle_ds.resilience.watch import Watch

TIMEOUT = 4.0
HANG = 3.0
"""Seconds without a pulse that are a hang in most jobs, of those that give any."""
START_LIMIT = 150.0
"""Seconds in which all jobs have begun, even where the machine has other work."""
LIMIT = 40.0
"""Seconds after which a job's processes are killed."""


@dataclass
class Processes:
    """A job's processes, as those who do something to them see them."""

    ranks: list[int]
    monitors: list[int]

    def send(self, what: int, *pids: int) -> None:
        """A signal to these, or to all."""
        for pid in pids or (*self.monitors, *self.ranks):
            os.kill(pid, what)

    def kill_together(self, rank: int) -> None:
        """A rank and its monitor, so that neither sees the other die."""
        for what in (signal.SIGSTOP, signal.SIGKILL):
            self.send(what, self.monitors[rank], self.ranks[rank])


@dataclass
class Job:
    """What happens to how many processes."""

    ranks: int
    act: Callable[[Processes], None] = lambda _: None
    """Called once all are at work."""
    begin: Callable[[Mesh], None] = lambda _: None
    """Called by each process before it is watched."""
    work: Callable[[Mesh], None] = lambda mesh: meet(mesh, 60)
    end: Callable[[Mesh], None] = lambda _: None
    """Called by each process after it is watched."""
    hang: float | None = HANG
    """Seconds without a pulse that are a hang."""


@dataclass
class Result:
    """How a job ended."""

    outputs: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    seconds: float | None = None
    monitors_seconds: float | None = None


CONNECTION = Path()
"""What /proc calls this process's connection to its monitor."""
PULSE: Callable[..., None] = Watch.pulse
"""The `pulse` of what watches this process."""


def meet(mesh: Mesh, seconds: float) -> None:
    """Collectives all the time."""
    began = time.monotonic()
    while mesh.sum(torch.tensor(float(time.monotonic() - began > seconds)), "world") == 0:
        time.sleep(0.02)


def fail(error: Exception, *ranks: int) -> Callable[[Mesh], None]:
    """A process raises an error while the others are in a collective."""

    def work(mesh: Mesh) -> None:
        meet(mesh, 0.5)
        if mesh.rank in ranks:
            raise error
        mesh.barrier()

    return work


def hold_the_interpreter(seconds: int) -> None:
    """A long call that no thread of the process gets past, though a signal may end it."""
    ctypes.PyDLL(None).sleep(seconds)


def stuck(mesh: Mesh) -> None:
    """Rank 0 in a call that nothing but a kill ends."""
    if mesh.rank == 0:
        mesh.barrier()
        hold_the_interpreter(60)
    mesh.barrier()
    mesh.barrier()


def busy(mesh: Mesh) -> None:
    """Rank 1 in a call that takes longer than the timeout."""
    meet(mesh, 0.5)
    if mesh.rank == 1:
        hold_the_interpreter(int(TIMEOUT) + 3)
    mesh.barrier()


def leave_one_by_one(last: int) -> Callable[[Mesh], None]:
    """The processes are done at different times."""

    def work(mesh: Mesh) -> None:
        meet(mesh, 0.5)
        if mesh.rank == last:
            time.sleep(TIMEOUT + 2)

    return work


def fork(mesh: Mesh) -> None:
    """Rank 1 has a child, as of a data loader, that outlives it."""
    if mesh.rank == 1 and os.fork() == 0:
        # The process that watches rank 1 would take an open connection for its life.
        if CONNECTION in {path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}:
            print("the child holds the connection to the monitor", flush=True)
        time.sleep(8)
        os._exit(0)
    meet(mesh, 60)


def cut_off(mesh: Mesh) -> None:
    """Rank 0 loses its connection to rank 1, which lives and says nothing."""
    meet(mesh, 0.5)
    if mesh.rank == 1:
        dist.destroy_process_group()
        time.sleep(60)
    mesh.barrier()


def twice(mesh: Mesh) -> None:
    """Watched again after that, in the same processes."""
    with Watch(mesh, explain):
        meet(mesh, 0.5)
        if mesh.rank == 1:
            raise DataError("in the second context")
        mesh.barrier()


def fail_after_the_end(mesh: Mesh) -> None:
    """Rank 1 finds an error once rank 0 has done all."""
    meet(mesh, 0.5)
    if mesh.rank == 1:
        time.sleep(1)
        raise DataError("too late")


def gone_before(mesh: Mesh) -> None:
    """Rank 1 dies before anyone watches it."""
    if mesh.rank == 1:
        os._exit(3)


def hang(where: Callable[[], object]) -> Callable[[Mesh], None]:
    """Rank 1 does not get through update 8, while the others wait for it."""

    def work(mesh: Mesh) -> None:
        PULSE(6, "waiting for data")
        meet(mesh, 0.3)
        PULSE(7, "step")
        if mesh.rank == mesh.world_size - 1:
            where()
        mesh.barrier()

    return work


def loop_for_ever() -> None:
    while True:
        pass


def loop_in_c() -> None:
    """A call that no thread of the process gets past, and no signal ends."""
    sum(itertools.repeat(0))


def hang_ahead(mesh: Mesh) -> None:
    """Rank 1 waits for rank 0, which is behind by its step and waits for rank 1 in another group of processes."""
    group = dist.new_group([0, 1])
    PULSE(7, "step")
    if mesh.rank == 1:
        PULSE(8, "step")
        dist.all_reduce(torch.ones(1), group=group)
    mesh.barrier()


def time_out(mesh: Mesh) -> None:
    """Rank 0 waits for rank 1 for no longer than it may."""
    PULSE(7, "step")
    meet(mesh, 0.3)
    if mesh.rank == 1:
        PULSE(7, "waiting for data")
        time.sleep(60)
    mesh.set_timeout(2 / 60)
    mesh.sum(torch.ones(1), "world")


def die_of_waiting(mesh: Mesh) -> None:
    """Rank 1 is ended while it waits for rank 0, as NCCL does."""
    PULSE(7, "step")
    meet(mesh, 0.3)
    if mesh.rank == 0:
        PULSE(7, "waiting for data")
        time.sleep(60)
    time.sleep(5)
    os.abort()


def take_long(mesh: Mesh) -> None:
    """Phases longer than a hang, of which one was announced and the other goes on giving pulses."""
    PULSE(0, "saving", minutes=1)
    time.sleep(HANG + 1.5)
    for step in range(int(HANG) + 2):
        PULSE(step, "step")
        time.sleep(1)


def stop_in_turn(first: int) -> Callable[[Mesh], None]:
    """Told to stop, the processes come to it at different times."""
    told = threading.Event()

    def work(mesh: Mesh) -> None:
        signal.signal(signal.SIGTERM, lambda *_: told.set())
        PULSE(3, "step")
        while not told.is_set():
            time.sleep(0.05)
        time.sleep(0.2 if mesh.rank == first else 1.7)
        sys.exit(EXIT_REQUEUE)

    return work


def tell_all(processes: Processes) -> None:
    """As launchers and SLURM do, who signal all processes of a run, and more than once."""
    for what in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        processes.send(what, *processes.monitors)
    processes.send(signal.SIGTERM, *processes.ranks)


def suspend_all(processes: Processes) -> None:
    processes.send(signal.SIGSTOP)
    time.sleep(TIMEOUT + 3)
    processes.send(signal.SIGCONT)


def stop_for_a_while(processes: Processes) -> None:
    for _ in range(2):
        processes.send(signal.SIGSTOP, processes.ranks[1])
        time.sleep(TIMEOUT * 0.6)
        processes.send(signal.SIGCONT, processes.ranks[1])
        time.sleep(1.5)


JOBS = {
    "killed-1-of-2": Job(2, lambda p: p.send(signal.SIGKILL, p.ranks[1])),
    "killed-2-of-4": Job(4, lambda p: p.send(signal.SIGKILL, p.ranks[2])),
    "killed-0-of-2": Job(2, lambda p: p.send(signal.SIGKILL, p.ranks[0])),
    "killed-with-monitor": Job(2, lambda p: p.kill_together(1)),
    "killed-with-coordinator": Job(2, lambda p: p.kill_together(0)),
    "killed-with-child": Job(2, lambda p: p.send(signal.SIGKILL, p.ranks[1]), work=fork),
    "killed-while-stuck": Job(2, lambda p: p.send(signal.SIGKILL, p.ranks[1]), work=stuck),
    "monitor-killed": Job(2, lambda p: p.send(signal.SIGKILL, p.monitors[1])),
    "gone-before": Job(2, begin=gone_before, work=lambda mesh: mesh.barrier()),
    "stopped": Job(2, lambda p: p.send(signal.SIGSTOP, p.ranks[1])),
    "silent": Job(2, lambda p: p.send(signal.SIGSTOP, p.ranks[1], p.monitors[1])),
    "silent-coordinator": Job(2, lambda p: p.send(signal.SIGSTOP, p.ranks[0], p.monitors[0])),
    "data-error": Job(2, work=fail(DataError("row 7 is broken: mend it"), 1)),
    "data-error-everywhere": Job(2, work=fail(DataError("row 7 is broken: mend it"), 0, 1)),
    "unexpected": Job(2, work=fail(KeyError("row 7"), 1)),
    "cut-off": Job(2, work=cut_off),
    "interrupted": Job(2, lambda p: p.send(signal.SIGINT)),
    "interrupted-alone": Job(2, lambda p: p.send(signal.SIGINT, p.ranks[1])),
    "cancelled": Job(2, lambda p: p.send(signal.SIGTERM)),
    "terminated": Job(2, lambda p: p.send(signal.SIGTERM, p.ranks[1])),
    "busy": Job(2, work=busy),
    "first-ends-last": Job(2, work=leave_one_by_one(0)),
    "first-ends-first": Job(2, work=leave_one_by_one(1)),
    "suspended": Job(2, suspend_all, work=lambda mesh: meet(mesh, TIMEOUT + 5)),
    "stopped-for-a-while": Job(2, stop_for_a_while, work=lambda mesh: meet(mesh, TIMEOUT + 2)),
    "fails-after-the-end": Job(2, work=fail_after_the_end),
    "watched-twice": Job(2, work=lambda mesh: meet(mesh, 0.5), end=twice),
    "loops": Job(2, work=hang(loop_for_ever)),
    "sleeps": Job(4, work=hang(lambda: time.sleep(60))),
    "holds-the-interpreter": Job(2, work=hang(loop_in_c)),
    "hangs-ahead": Job(2, work=hang_ahead),
    "times-out": Job(2, work=time_out, hang=None),
    "dies-of-waiting": Job(2, work=die_of_waiting, hang=None),
    "takes-long": Job(2, work=take_long),
    "told-to-stop-0-first": Job(2, tell_all, work=stop_in_turn(0)),
    "told-to-stop-1-first": Job(2, tell_all, work=stop_in_turn(1)),
    "alone-loops": Job(1, work=hang(loop_for_ever)),
    "alone-stopped": Job(1, lambda p: p.send(signal.SIGSTOP, p.ranks[0]), work=hang(lambda: time.sleep(60))),
    "alone-killed": Job(1, lambda p: p.send(signal.SIGKILL, p.ranks[0])),
    "alone-fails": Job(1, work=fail(DataError("row 7 is broken: mend it"), 0)),
    "alone-monitor-killed": Job(1, lambda p: p.send(signal.SIGKILL, p.monitors[0]), work=lambda mesh: meet(mesh, 2)),
    "slow-to-leave": Job(2, work=lambda mesh: meet(mesh, 0.5), end=lambda _: time.sleep(TIMEOUT + 1)),
}


def free_ports() -> Iterator[int]:
    """Different ones that are not among those which connections take for themselves, of which there are many here."""
    for port in random.sample(range(20_000, 29_000), 9_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def run_rank(job: Job, rank: int, port: int, folder: Path) -> None:
    """Be one of a job's processes."""

    def main() -> None:
        mesh = Mesh.start("cpu", timeout_minutes=1)
        job.begin(mesh)
        config = WatchConfig(hang_minutes=job.hang and job.hang / 60, collective_minutes=3 / 60, heartbeat_seconds=0.5)
        with Watch(mesh, explain, config, folder / "logs") as watched:
            global CONNECTION, PULSE
            PULSE = watched.pulse
            CONNECTION = Path(f"/proc/self/fd/{watched._channel.connection.fileno()}").readlink()
            (folder / f"ready-{rank}").write_text(str(watched.monitor_pid))
            job.work(mesh)
        job.end(mesh)
        mesh.stop()

    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": job.ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    status: int | str | None = 1
    try:
        run_launcher(main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(int(status or 0))


def follow(job: Job, ranks: list[int], folder: Path, result: Result) -> None:
    """Do to a job's processes what is to be done, and see how they end."""
    ready = [folder / f"ready-{rank}" for rank in range(job.ranks)]
    deadline = time.monotonic() + START_LIMIT
    while not all(path.exists() and path.read_text() for path in ready) and time.monotonic() < deadline:
        if _exited(ranks[-1]):
            break
        time.sleep(0.05)
    time.sleep(0.3)
    monitors = [int(path.read_text()) for path in ready if path.exists()]
    began = time.monotonic()
    job.act(Processes(ranks, monitors))
    frozen = job.act in (JOBS["silent"].act, JOBS["silent-coordinator"].act)
    left = dict(enumerate(ranks))
    statuses: dict[int, int] = {}
    while left and time.monotonic() < began + LIMIT:
        for rank, pid in list(left.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[rank] = os.waitstatus_to_exitcode(status)
                del left[rank]
        if frozen and len(left) == 1:  # a machine that has gone does not come back
            for pid in (*left.values(), monitors[next(iter(left))]):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    if not left:
        result.seconds = time.monotonic() - began
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)
    result.statuses = [statuses.get(rank, 999) for rank in range(job.ranks)]
    while any(map(_alive, monitors)) and time.monotonic() < began + LIMIT:
        time.sleep(0.02)
    if not any(map(_alive, monitors)):
        result.monitors_seconds = time.monotonic() - began
    result.outputs = [(folder / f"{rank}.log").read_text() for rank in range(job.ranks)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _exited(pid: int) -> bool:
    return not _alive(pid)


def main(folder: Path) -> None:
    watch.TIMEOUT = TIMEOUT
    jobs: list[tuple[str, list[int]]] = []
    for (name, job), port in zip(JOBS.items(), free_ports(), strict=False):
        (folder / name).mkdir()
        ranks = []
        for rank in range(job.ranks):
            pid = os.fork()
            if pid == 0:
                run_rank(job, rank, port, folder / name)
            ranks.append(pid)
        jobs.append((name, ranks))
    results = {name: Result() for name in JOBS}
    threads = [
        threading.Thread(target=follow, args=(JOBS[name], ranks, folder / name, results[name])) for name, ranks in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (folder / "results.json").write_text(json.dumps({name: asdict(result) for name, result in results.items()}))


if __name__ == "__main__":
    assert not dist.is_initialized()
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
