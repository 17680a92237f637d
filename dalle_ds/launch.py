"""The `deepspeed` command, with the same arguments and a true exit status: `python -m dalle_ds.launch …`.

On one machine with Linux, its child is a `Launch` (`resilience/launcher.py`). Elsewhere, and over several machines
(`--hostfile`), this is `deepspeed`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from dalle_ds.resilience.launcher import SIGNALS, Launch
from dalle_ds.resilience.processes import LAUNCH


def _start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    if LAUNCH in command[:4]:
        return Launch(command, **options)
    return subprocess.Popen(command, **options)  # over several machines


def main() -> None:
    """Do what `deepspeed` does with the command line."""
    for number in SIGNALS:  # deepspeed takes seconds to import; process 1 of a container ends by no signal of itself
        signal.signal(number, lambda number, _: os._exit(128 + number))
    from deepspeed.launcher import runner

    if sys.platform == "linux":
        runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _start})
    runner.main()


if __name__ == "__main__":
    main()
