"""The one property of all targets: whatever comes in is taken or refused with an error of ours, soon and within memory."""

from __future__ import annotations

import os
import select
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

from dalle_ds.errors import DalleError
from tests.fuzz.limits import limited_memory

COUNTS: dict[str, Counter[str]] = {}
"""Inputs of each target so far, by what became of them."""
SECONDS = 20.0
"""After which an input is taken for one that never ends; most take milliseconds."""


class Hang(BaseException):
    """What was called did not return in time."""


def survives(target: str, call: Callable[[], Any], memory: int = 2**30) -> Any:
    """Call, and let no error pass but a `DalleError`; what is returned then is None."""
    outcomes = COUNTS.setdefault(target, Counter())

    def too_late(number: int, frame: FrameType | None) -> None:
        raise Hang(f"{target} has not returned for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with limited_memory(memory):
            result = call()
    except DalleError as error:
        outcomes["refused"] += 1
        assert 10 < len(str(error)) < 3000, "a sentence"
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    outcomes["taken"] += 1
    return result


def survives_in_child(target: str, call: Callable[[], Any], memory: int = 2**30, *, must_take: bool = False) -> None:
    """`survives` in a process of its own: for parsers that are not written in Python, and could take the process with them."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            COUNTS.clear()
            survives(target, call, memory)
            os.write(writing, "".join(COUNTS[target]).encode())
            status = 0
        except BaseException:
            os.write(writing, traceback.format_exc()[-4000:].encode(errors="backslashreplace"))
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        ended, _, _ = select.select([pipe], [], [], 2 * SECONDS)
        if not ended:  # a parser that does not come back to Python, where `survives` would have stopped it
            os.kill(child, signal.SIGKILL)
        told = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"{target} was ended by signal {os.WTERMSIG(status)}"
    assert os.WEXITSTATUS(status) == 0, told
    COUNTS.setdefault(target, Counter())[told] += 1
    assert told == "taken" or not must_take
