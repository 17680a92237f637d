"""The command line of launchers/evaluate.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from rich.console import Console

from dalle_ds.cli import explain, parse_options
from dalle_ds.config.watch import WatchConfig
from dalle_ds.evaluation.options import CompareOptions, EvaluateOptions
from dalle_ds.evaluation.page import comparison_table, console_table
from dalle_ds.evaluation.results import Result, compare
from dalle_ds.evaluation.run import evaluate
from dalle_ds.memory import keep_freed_memory
from dalle_ds.parallel import Mesh
from dalle_ds.resilience.watch import Watch


def evaluate_command(arguments: Sequence[str]) -> None:
    """Measure, write, print the figures.

    Raises:
        ConfigError, DataError, CheckpointError: as `evaluate`.
    """
    options = parse_options(EvaluateOptions, arguments)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and (options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())):
        keep_freed_memory()
        _report(options, evaluate(options, Mesh(0, 1, torch.device("cpu"))))  # with no process group, at no cost
        return
    mesh = Mesh.start(options.device)
    with nullcontext() if alone else Watch(mesh, explain, WatchConfig()):
        result = evaluate(options, mesh)
        mesh.barrier()
    mesh.stop()
    if mesh.is_main:
        _report(options, result)


def compare_command(arguments: Sequence[str]) -> None:
    """Print the figures of two results side by side.

    Raises:
        ConfigError: their protocols differ.
        DataError: a file is no result.
    """
    options = parse_options(CompareOptions, arguments)
    one, other = (Result.load(path) for path in options.results)
    figures = compare(one, other, options.allow)
    console = Console(width=None if Console().is_terminal else 140)
    for name in sorted({*one.models, *other.models}):
        before, after = one.models.get(name), other.models.get(name)
        console.print(f"{name}: " + ("the same" if before == after else f"{str(before)[:12]} and {str(after)[:12]}"))
    console.print(comparison_table(figures, options.results))


def _report(options: EvaluateOptions, result: Result) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    console.print(console_table(result))
    for note in result.notes:
        console.print(f"note: {note}")
    console.print(f"wrote {options.out}/result.json and {options.out}/evaluation.html")
