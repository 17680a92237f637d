"""A small corpus and the models around it, made once per test session."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dalle_ds.config import DalleConfig, DiscreteVAEConfig
from dalle_ds.data.prepare import PrepareOptions, prepare
from dalle_ds.models import DiscreteVAE
from dalle_ds.text.tokenizer import Tokenizer

# Launched processes share two cores; more threads only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch has read it already
# Behind a shell's `&`, Ctrl-C is ignored, and by all that is started here, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
EVERYTHING = os.environ.get("TEST_ALL") == "1"
"""Whether this is `make test-all`: whole matrices, where `make test` takes a half that has every value of every axis."""
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle")

TINY_DVAE = DiscreteVAEConfig(
    image_size=16, groups=3, blocks_per_group=1, encoder_width=8, decoder_width=8, decoder_input=8, vocab_size=32
)
TINY_DALLE = DalleConfig(width=32, depth=4, heads=2, text_len=8, grid=4, text_vocab=400, image_vocab=32)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `slow`, unless everything is asked for."""
    for item in items:  # the Makefile looks for them nowhere else
        if item.get_closest_marker("alone") and item.path.parent.name != "resilience":
            raise pytest.UsageError(f"{item.nodeid} is marked alone: move it into tests/resilience")
    slow = [item for item in items if item.get_closest_marker("slow") is not None]
    if slow and not EVERYTHING:
        items[:] = [item for item in items if item not in set(slow)]
        config.hook.pytest_deselected(items=slow)


def thorough(*names: T) -> list[T]:
    """These, in `make test-all`; nothing otherwise."""
    return list(names) if EVERYTHING else []


def free_port() -> int:
    """One that nobody listens on, and that systems hand out to nobody until it is used: below 32,768."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def deepspeed_command(processes: int) -> list[str]:
    """The `deepspeed` launcher on a port of its own, so that runs side by side do not meet."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--num_gpus", str(processes), "--master_port", str(free_port())]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 90 captioned images: coloured shapes of several sizes."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(90):
        colour, shape = COLOURS[number % 6], SHAPES[number // 6 % 3]
        picture = Image.new("RGB", (24, 24), "white")
        size, x, y = (int(value) for value in rng.integers((8, 0, 0), (16, 9, 9)))
        pen = ImageDraw.Draw(picture)
        if shape == "circle":
            pen.ellipse((x, y, x + size, y + size), fill=colour)
        elif shape == "square":
            pen.rectangle((x, y, x + size, y + size), fill=colour)
        else:
            pen.polygon(((x, y + size), (x + size, y + size), (x + size // 2, y)), fill=colour)
        picture.save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"a {colour} {shape} {number}")
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, prepared."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PrepareOptions(corpus="folder", source=str(corpus), validation=0.25), str(out), workers=1, overwrite=False)
    return out


@pytest.fixture(scope="session")
def tokenizer_file(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the corpus, no larger than `TINY_DALLE.text_vocab`."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    captions = (f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)
    Tokenizer.train(captions, path, TINY_DALLE.text_vocab)
    return path


@pytest.fixture(scope="session")
def dvae_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dVAE of `TINY_DVAE`'s shape."""
    folder = tmp_path_factory.mktemp("dvae") / "export"
    torch.manual_seed(0)
    DiscreteVAE(TINY_DVAE).save_pretrained(folder)
    return folder
