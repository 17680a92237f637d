"""What a run says of itself: `metrics.jsonl`, the progress line, Weights & Biases."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dalle_ds.config import to_dict
from dalle_ds.errors import ConfigError, Interrupted
from dalle_ds.jsonl import LineFile
from dalle_ds.parallel import Mesh
from dalle_ds.tasks import Task

SECONDS_BETWEEN_LINES = 10.0
"""How often a run whose output is no terminal prints a progress line."""


class Tracker:
    """Writes metrics and shows progress; on every rank but the main one it does nothing.

    `metrics_file` gets one JSON object per line: {"step": updates done, name: value …}. `run_id` is that of the run at
    Weights & Biases to continue.
    """

    def __init__(
        self, metrics_file: Path, task: Task[Any], mesh: Mesh, *, start_step: int, run_id: str | None = None
    ) -> None:
        self.run_id = run_id
        self._run, self._report = task.run, task.run.report
        self._enabled, self._world_size = mesh.is_main, mesh.world_size
        self._items = task.items_per_sample()
        self._console = Console(soft_wrap=True)
        self._started = self._printed = time.monotonic()
        self._start_step = start_step
        self._files: list[LineFile] = []
        self._writable = True
        self._wandb: Any = None
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        if not self._enabled:
            return
        self._flops = 0.0 if self._report.peak_tflops is None else task.flops_per_sample()
        self._files.append(LineFile(metrics_file))
        if self._report.wandb != "disabled":
            self._start_wandb(metrics_file.parent, task.name)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn(),
                console=self._console,
            )  # fmt: skip
            self._bar = self._progress.add_task(task.name, total=self._run.steps, completed=start_step, status="")
            self._progress.start()

    def _start_wandb(self, folder: Path, stage: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"report.wandb={self._report.wandb} needs the wandb package: pip install wandb, or set report.wandb disabled"
            ) from error
        self._wandb = wandb.init(
            project=self._report.wandb_project,
            mode=self._report.wandb,
            dir=str(folder),
            id=self.run_id,
            resume="allow",
            job_type=stage,
            config=to_dict(self._run),
            # It would tell the address of the folder's git remote, with a token that stands before its host.
            settings=wandb.Settings(disable_git=True),
        )
        self.run_id = self._wandb.id

    def say(self, line: str, style: str | None = None) -> None:
        """A line for the user, above the progress line."""
        if self._enabled:
            self._console.print(line, style=style, highlight=False)

    def alarm(self, line: str, step: int | None = None) -> None:
        """A line on something that goes wrong, which the user should look at."""
        self.say(f"ALARM{'' if step is None else f' at step {step}'}: {line}", style="bold red")

    def open(self, path: Path) -> LineFile | None:
        """Another file of lines, treated as the one of metrics is; None where nothing is written."""
        if not self._enabled:
            return None
        self._files.append(LineFile(path))
        return self._files[-1]

    def log(self, step: int, metrics: Mapping[str, float], seconds: float | None = None) -> None:
        """Record the metrics of update number `step` (the first is 1).

        With the update's `seconds`, throughput is recorded and the progress line renewed.
        """
        if not self._enabled:
            return
        record: dict[str, float] = {"step": step, **metrics}
        if seconds is not None:
            record |= self._throughput(seconds)
            self._show(step, record)
        file = self._files[0]
        failure = file.append(record)
        if failure is not None and self._writable:
            self.say(f"{file.path} cannot be written: {failure}; its lines are kept until it can", style="bold red")
        self._writable = failure is None
        if self._wandb is not None:
            self._wandb.log(record, step=step)

    def sync(self) -> None:
        """Force all that was recorded to the disk; OSError where that fails. May be called from any thread."""
        for file in self._files:
            file.sync()

    def reopen(self) -> None:
        """Go on behind what took the place of the files."""
        for file in self._files:
            file.reopen()

    def _throughput(self, seconds: float) -> dict[str, float]:
        samples = self._run.train.batch_size / seconds
        # Most memory held so far: by tensors on the GPU, or by the whole process on the CPU.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        metrics = {"seconds": seconds, "samples_per_second": samples, "peak_memory_bytes": float(peak)}
        if self._items[1]:
            metrics[f"{self._items[0]}_per_second"] = samples * self._items[1]
        if self._report.peak_tflops is not None:
            metrics["mfu"] = samples * self._flops / (self._report.peak_tflops * 1e12 * self._world_size)
        return metrics

    def _show(self, step: int, record: Mapping[str, float]) -> None:
        parts = [f"loss {record['loss']:.4f}", f"{record['samples_per_second']:,.0f} samples/s"]
        name = f"{self._items[0]}_per_second"
        if name in record:
            parts.append(f"{record[name]:,.0f} {self._items[0]}/s")
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        parts.append(f"{record['peak_memory_bytes'] / 2**30:.2f} GiB")
        status = ", ".join(parts)
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step, status=f"step {step}/{self._run.steps}, {status}")
            return
        now = time.monotonic()
        if now - self._printed < SECONDS_BETWEEN_LINES and step < self._run.steps:
            return
        self._printed = now
        done = step - self._start_step
        remaining = (now - self._started) / done * (self._run.steps - step)
        self._console.print(f"step {step}/{self._run.steps}, {status}, {remaining:.0f} s left", highlight=False)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the progress line and the files."""
        if self._progress is not None:
            self._progress.stop()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None and not isinstance(error, Interrupted)))
        for file in self._files:
            lost = file.close()
            if lost:
                self.say(f"{file.path} lacks the last {lost} lines, which could not be written", style="bold red")
