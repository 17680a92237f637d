"""How many inputs, which ones, and a count of them at the end."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from tests.fuzz.harness import COUNTS

# The same inputs at every run, unless more than usual are asked for: FUZZ_EXAMPLES=10000 pytest tests/fuzz
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
set_hypothesis_home_dir(".pytest_cache/hypothesis")
settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,  # `harness.survives` has one for what is tested alone
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
settings.load_profile("fuzz")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.section("inputs that were fuzzed")
        for target, outcomes in sorted(COUNTS.items()):
            terminalreporter.line(
                f"{target}: {sum(outcomes.values()):,} ({outcomes['taken']:,} taken, {outcomes['refused']:,} refused)"
            )
        total = sum(sum(outcomes.values()) for outcomes in COUNTS.values())
        terminalreporter.line(f"all: {total:,}")
