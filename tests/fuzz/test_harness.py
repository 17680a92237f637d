"""That the harness would notice."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

import pytest

from dalle_ds.errors import ConfigError
from tests.fuzz import harness
from tests.fuzz.harness import Hang, survives, survives_in_child


def mistake() -> None:
    raise ConfigError("a sentence of some length")


@pytest.fixture(autouse=True)
def nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "COUNTS", {})


def test_outcomes_are_counted() -> None:
    assert survives("x", lambda: 3) == 3
    assert survives("x", mistake) is None
    survives_in_child("x", lambda: 3)
    survives_in_child("x", mistake)
    assert harness.COUNTS["x"] == Counter(taken=2, refused=2)


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError):
        survives("x", lambda: {}[1])
    with pytest.raises(AssertionError, match="KeyError"):
        survives_in_child("x", lambda: {}[1])


def test_much_memory_is_an_error() -> None:
    with pytest.raises(MemoryError):
        survives("x", lambda: bytearray(2**38))  # more than is kept of what tests before have freed
    assert len(bytearray(2**28)) == 2**28


def test_hangs_and_crashes_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SECONDS", 0.2)
    with pytest.raises(Hang):
        survives("x", lambda: time.sleep(9))
    with pytest.raises(AssertionError, match="ended by signal 9"):
        survives_in_child("x", lambda: sum(range(10**12)))  # C code that looks at no signal
    with pytest.raises(AssertionError, match="ended by signal 15"):
        survives_in_child("x", lambda: os.kill(os.getpid(), signal.SIGTERM))
