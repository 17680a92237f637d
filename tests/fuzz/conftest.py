"""How many inputs, which ones, and a count of them at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from dalle_ds.text.tokenizer import Tokenizer
from tests.conftest import COLOURS, SHAPES, TINY_DALLE
from tests.fuzz.harness import COUNTS

# The same inputs at every run, unless more than usual are asked for: FUZZ_EXAMPLES=10000 pytest tests/fuzz
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
set_hypothesis_home_dir(".pytest_cache/hypothesis")
settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES or 50,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,  # `harness.survives` has one for what is tested alone
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
settings.load_profile("fuzz")


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer no larger than `TINY_DALLE.text_vocab`."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    captions = (f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)
    Tokenizer.train(captions, path, TINY_DALLE.text_vocab)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """A small tokenizer."""
    return Tokenizer.load(tokenizer_file)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.section("inputs that were fuzzed")
        for target, outcomes in sorted(COUNTS.items()):
            terminalreporter.line(
                f"{target}: {sum(outcomes.values()):,} ({outcomes['taken']:,} taken, {outcomes['refused']:,} refused)"
            )
        total = sum(sum(outcomes.values()) for outcomes in COUNTS.values())
        terminalreporter.line(f"all: {total:,}")
