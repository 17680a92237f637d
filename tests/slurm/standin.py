"""Stands for a training process: ends as it is told to, so that what SLURM and our scripts make of it can be seen in seconds.

Arguments: for each start of the job what becomes of its ranks, as "75,137": a status to end with, above 128 by that signal;
`lost` takes the shell that started this process along; `wait` waits for SIGUSR1 or SIGTERM, and ends with 75 seconds later.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from dalle_ds.resilience.signals import ECHO_SECONDS

told: list[float] = []
"""When signals came."""


def main() -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, _: told.append(time.monotonic()))
    rank, start = int(os.environ["RANK"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    print(f"begins: start {start}", *(f"{name}={os.environ[name]}" for name in names), flush=True)
    fate = sys.argv[1 + start].split(",")[rank]
    if fate == "wait":
        while not told:
            time.sleep(0.05)
        time.sleep(ECHO_SECONDS + 2)
        print(f"told {1 + sum(at - told[0] > ECHO_SECONDS for at in told)} times", flush=True)
        fate = "75"
    if fate == "lost":
        os.killpg(0, signal.SIGKILL)
    if int(fate) > 128:
        os.kill(os.getpid(), int(fate) - 128)
    if fate not in ("0", "75"):
        print("error: this went wrong", file=sys.stderr)
    sys.exit(int(fate))


if __name__ == "__main__":
    main()
