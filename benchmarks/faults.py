"""What happens to a run when its processes, its disk, its files or its numbers fail: the toy transformer on 2 processes.

    python benchmarks/faults.py --folder DIR [--only storm damage disk process data numbers] [--kills 100] [--json FILE]

Every fault is a real one: SIGKILL and SIGSTOP to processes, a file system that is full or read-only (a small tmpfs, for which
one must be root), bytes changed in files. A run that was disturbed, and started again where it ended, is held against one
that was not: the same weights to the bit, and the same metrics, each update once. Prints a table of what happened, and how
long it took until it was noticed.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from processes import Ranks
from rich.console import Console
from rich.table import Table

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.errors import EXIT_REQUEUE, ConfigError
from dalle_ds.training.checkpoints.manifest import CheckpointFolder, Manifest, step_of

ROOT = Path(__file__).parent.parent
Part = Literal["storm", "damage", "disk", "process", "data", "numbers"]
PARTS: tuple[Part, ...] = ("damage", "disk", "process", "data", "numbers", "storm")
PATIENCE = 180.0
"""Seconds that anything may take."""
PROCESSES = 2
BEGINS = "images per update"
"""In the line with which a run says where it begins."""


@dataclass(frozen=True)
class Options:
    """Where, and how much of it."""

    folder: str = ""
    """Where corpora and runs go; a few hundred MB. What a former call prepared there is used again."""
    only: tuple[Part, ...] = PARTS
    """What is tried."""
    kills: int = 100
    """How often the run of the storm is killed."""
    steps: int = 1500
    """Updates of the run of the storm."""
    seed: int = 0
    """Of the moments of the kills."""
    json: str | None = None
    """File that gets the table."""


@dataclass(frozen=True)
class Row:
    """What came of one kind of fault."""

    fault: str
    happened: str
    tried: int
    """How often the fault was made."""
    passed: int
    """How often what must be so was so."""
    seconds: float | None = None
    """Until it was noticed, at most."""


@dataclass
class Runs:
    """Makes runs in a folder, all of the same small data and settings."""

    folder: Path
    model: Sequence[str] = ("--preset", "toy", "--train.batch_size", "8", "--loader.workers", "1")
    deepspeed: str = "zero3_bf16.json"
    data: Path = field(init=False)
    dvae: Path = field(init=False)
    tokenizer: Path = field(init=False)

    def __post_init__(self) -> None:
        self.data, self.dvae = self.folder / "data", self.folder / "dvae"
        self.tokenizer = self.folder / "tokenizer.model"

    def prepare(self) -> None:
        """The embedded corpus, a tokenizer, a dVAE of random weights and its codes."""
        if not self.data.exists():
            _call("prepare_data.py", "--corpus", "twemoji", "--out", str(self.data))
        if not self.tokenizer.exists():
            _call("train_tokenizer.py", "--data", str(self.data), "--out", str(self.tokenizer), "--preset", "toy")
        if not self.dvae.exists():
            import torch

            from dalle_ds.config import DvaeRun, load_preset
            from dalle_ds.models import DiscreteVAE

            torch.manual_seed(0)
            DiscreteVAE(load_preset("toy", "dvae", DvaeRun).model).save_pretrained(self.dvae)
            _call("prepare_data.py", "--out", str(self.data), "--cache_codes", str(self.dvae), "--views", "1")

    def arguments(self, run_dir: Path, *more: str) -> list[str]:
        """Script and options of a run of the transformer."""
        reports = "--report.log_every 1 --report.validate_every 50 --report.preview_every 0 --report.validation_rows 32"
        return [
            str(ROOT / "launchers" / "train_transformer.py"),
            *("--deepspeed_config", str(ROOT / "ds_configs" / self.deepspeed), "--run_dir", str(run_dir)),
            *("--data", str(self.data), "--dvae", str(self.dvae), "--tokenizer", str(self.tokenizer)),
            *self.model,
            *reports.split(),
            *more,
        ]

    def start(self, run_dir: Path, *more: str, prefix: Sequence[str] = ()) -> Ranks:
        """Start or resume a run."""
        return Ranks([*prefix, *self.arguments(run_dir, *more)], PROCESSES, self.folder / f"{run_dir.name}.log")

    def finish(self, run_dir: Path, *more: str) -> Ranks:
        """A run to its end."""
        ranks = self.start(run_dir, *more)
        statuses = ranks.wait(20 * PATIENCE)
        if any(statuses):
            raise RuntimeError(f"{run_dir.name} ended with {statuses}: {ranks.output[-3000:]}")
        return ranks

    def fresh(self, name: str) -> Path:
        """A run directory that is not there."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name


# --- what must be so


def same(run_dir: Path, straight: Path) -> list[str]:
    """Differences between a disturbed run and one that was not, each of which is a defect."""
    found = []
    exports = [(path / "export" / "model.safetensors").read_bytes() for path in (run_dir, straight)]
    if exports[0] != exports[1]:
        found.append("other weights")
    states = []
    for path in (run_dir, straight):
        newest = CheckpointFolder(path / "checkpoints").newest()
        files = {} if newest is None else Manifest.read(newest).files
        states.append({name: record.digest for name, record in files.items() if name.endswith(".safetensors")})
    if states[0] != states[1] or not states[0]:
        found.append("another last checkpoint")
    if records(run_dir) != records(straight):
        found.append("other metrics")
    steps = [record["step"] for record in records(run_dir) if "loss" in record]
    if steps != list(range(1, len(steps) + 1)):
        found.append("updates missing or twice in the metrics")
    return found


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics, without what depends on the clock or counts disturbances."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("second", "memory", "failed_saves", "straggler")
    return [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in lines]


def last_step(run_dir: Path) -> int:
    """The last update in the metrics, 0 where there is none."""
    with suppress(OSError, ValueError, IndexError):
        return int(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def wait_for_step(ranks: Ranks, run_dir: Path, step: int) -> None:
    """Until the metrics have an update."""
    until = time.monotonic() + PATIENCE
    while last_step(run_dir) < step:
        if not ranks.running or time.monotonic() > until:
            raise RuntimeError(f"{run_dir.name} does not come to update {step}: {ranks.output[-3000:]}")
        time.sleep(0.01)


# --- the storm


def storm(runs: Runs, options: Options, say: Callable[[str], None]) -> list[Row]:
    """Kill a run again and again, and hold it against one that was left alone."""
    more = ("--steps", str(options.steps), "--save_every", "3")
    straight = runs.folder / f"straight-{options.steps}"
    if not (straight / "export" / "step.json").exists():
        runs.finish(straight, *more)
    run_dir = runs.fresh("storm")
    rng = random.Random(options.seed)
    moments: Counter[str] = Counter()
    again = lost = 0
    startup = 8.0
    for kill in range(options.kills):
        before = _newest(run_dir)
        ranks = runs.start(run_dir, *more)
        aim = rng.choices(("starting", "training", "saving"), (20, 35, 45))[0]
        alone = aim != "starting" and rng.random() < 0.1
        if aim == "starting":
            time.sleep(rng.uniform(0.3, startup))
        else:
            _wait_until_training(ranks, run_dir, before)
            startup = time.monotonic() - ranks.started
            if aim == "training":
                time.sleep(rng.uniform(0.0, 3.0))
            else:
                time.sleep(rng.uniform(0.0, 1.0))
                _wait_for_writing(ranks, run_dir)
                time.sleep(rng.uniform(0.0, 0.08))
        if not ranks.running:
            raise RuntimeError(f"the run ended after {kill} kills, before the next: {ranks.output[-3000:]}")
        if alone:
            ranks.send(signal.SIGKILL, rng.randrange(PROCESSES))
            statuses = ranks.wait(60)
            if sorted(statuses) != [-signal.SIGKILL, EXIT_REQUEUE]:
                raise RuntimeError(f"after the death of one process they end with {statuses}: {ranks.output[-3000:]}")
        ranks.kill()
        moments[_moment(run_dir, aim)] += 1
        resumed = _resumed_from(ranks.output)
        if resumed is not None and resumed != before:
            lost += 1
        again += max(0, last_step(run_dir) - _newest(run_dir))
        if (kill + 1) % 10 == 0:
            say(f"{kill + 1} kills, at update {last_step(run_dir)} of {options.steps}: {dict(moments)}")
    runs.finish(run_dir, *more)
    differences = same(run_dir, straight)
    for difference in differences:
        say(f"storm: {difference}")
    happened = f"ended with {'; '.join(differences) or 'the undisturbed run’s weights, checkpoint and metrics'}"
    happened += f"; {again} updates were done again, {lost} starts from another checkpoint than the newest; killed "
    happened += ", ".join(f"{count} × {moment}" for moment, count in moments.most_common())
    return [Row("SIGKILL at random moments", happened, options.kills, 0 if differences or lost else options.kills)]


def _newest(run_dir: Path) -> int:
    newest = CheckpointFolder(run_dir / "checkpoints").newest()
    return 0 if newest is None else step_of(newest)


def _resumed_from(output: str) -> int | None:
    """The update that a start went on from; None where it did not come so far."""
    if ": new run in" in output:
        return 0
    found = re.search(r"resumed from \S*/checkpoints/step-(\d+)", output)
    return int(found[1]) if found else None


def _wait_until_training(ranks: Ranks, run_dir: Path, begin: int) -> None:
    """Until a start has made updates of its own. Before it says where it begins, metrics have later ones of the last start."""
    ranks.wait_for(BEGINS, PATIENCE)
    wait_for_step(ranks, run_dir, begin + 1)


def _wait_for_writing(ranks: Ranks, run_dir: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not list((run_dir / "checkpoints").glob("partial-*")):
        if not ranks.running or time.monotonic() > until:
            raise RuntimeError(f"no checkpoint is being written: {ranks.output[-3000:]}")
        time.sleep(0.0005)


def _moment(run_dir: Path, aim: str) -> str:
    """What a kill interrupted, by what it left."""
    folder = run_dir / "checkpoints"
    if list(folder.glob("partial-*")):
        return "writing a checkpoint"
    if list(folder.glob("removed-*")):
        return "removing an old checkpoint"
    return "starting" if aim == "starting" else "between checkpoints"


# --- damaged checkpoints


def damage(
    runs: Runs,
    options: Options,
    say: Callable[[str], None],
    files: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
) -> list[Row]:
    """Damage files of the newest checkpoint, all in every way by default; the one before must be taken, and the run end as
    ever."""
    straight, begun = runs.fresh("damage-straight"), runs.fresh("damage-begun")
    runs.finish(straight, "--steps", "16", "--save_every", "4")
    runs.finish(begun, "--steps", "12", "--save_every", "4")
    newest = Path("checkpoints") / "step-12"
    if files is None:
        files = sorted(str(path.relative_to(begun / newest)) for path in (begun / newest).rglob("*") if path.is_file())
    rng = random.Random(options.seed)
    rows = []
    for name in kinds or FAULTS:
        passed = 0
        for file in files:
            copy = runs.fresh("damaged")
            shutil.copytree(begun, copy)
            FAULTS[name](copy / newest / file, rng)
            ranks = runs.finish(copy, "--steps", "16", "--save_every", "4")
            told = [line for line in ranks.output.splitlines() if line.startswith("step-12 is damaged")]
            problems = same(copy, straight)
            if len(told) != 1 or _resumed_from(ranks.output) != 8:
                problems.append(f"it was not told: {ranks.output[-2000:]}")
            for problem in problems:
                say(f"{file} {name}: {problem}")
            passed += not problems
        what = "each told in one line; resumed from the checkpoint before, to the undisturbed run's weights and metrics"
        rows.append(Row(f"a checkpoint's file {name}", what, len(files), passed))
    return rows


def _truncate(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def _zero(file: Path, rng: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _delete(file: Path, rng: random.Random) -> None:
    file.unlink()


FAULTS: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": _truncate,
    "zeroed": _zero,
    "with one bit flipped": _flip,
    "deleted": _delete,
}


# --- disks


def disk(runs: Runs, options: Options, say: Callable[[str], None]) -> list[Row]:
    """A disk that is full for a while, and one that is read-only for a while."""
    more = ("--steps", "150", "--save_every", "10")
    straight = runs.fresh("disk-straight")
    runs.finish(straight, *more)
    room = _size(straight)
    rows = []
    for name, block, release in (
        ("a full disk", _fill, _empty),
        ("a read-only run directory", _read_only, _writable),
    ):
        run_dir = runs.fresh(f"disk-{name.split()[1]}")
        with _small_disk(run_dir, 2 * room) as mounted:
            if not mounted or not _can_be_fixed(run_dir):
                say(f"{name}: left out, since it takes a tmpfs and chattr, and thus root")
                continue
            ranks = runs.start(run_dir, *more)
            wait_for_step(ranks, run_dir, 22)
            good = CheckpointFolder(run_dir / "checkpoints").newest()
            block(run_dir)
            seconds = ranks.wait_for("ALARM", PATIENCE)
            step = last_step(run_dir)
            whole = good is not None and not Manifest.read(good).faults(good)
            time.sleep(1)
            kept_on = ranks.running
            release(run_dir)
            statuses = ranks.wait(PATIENCE)
            problems = same(run_dir, straight)
            if any(statuses) or not whole or not kept_on:
                problems.append(f"it ended with {statuses}: {ranks.output[-2000:]}")
            for problem in problems:
                say(f"{name}: {problem}")
            happened = (
                f"told after update {step}; the run went on, its earlier checkpoint stayed whole, and once the disk was well "
                "it ended with the undisturbed run's weights and metrics"
            )
            rows.append(Row(f"{name} for a while", happened, 1, int(not problems), seconds))
            if name != "a full disk":
                other = run_dir / "other"
                _read_only(run_dir)
                began = time.monotonic()
                ranks = runs.start(other, *more)
                statuses = ranks.wait(PATIENCE)
                told = "cannot be written" in ranks.output and "Traceback" not in ranks.output
                _writable(run_dir)
                rows.append(
                    Row(
                        "a start in a read-only folder",
                        f"refused with status {statuses[0]}: cannot be written",
                        1,
                        int(told and statuses == [1, 1]),
                        time.monotonic() - began,
                    )
                )
    return rows


@contextmanager
def _small_disk(path: Path, size: int) -> Iterator[bool]:
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=False)


def _fill(run_dir: Path) -> None:
    with (run_dir / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**16))


def _empty(run_dir: Path) -> None:
    (run_dir / "ballast").unlink()


def _read_only(run_dir: Path) -> None:
    # Not by mounting it so, which is refused while files are open for writing.
    subprocess.run(["chattr", "-R", "+i", str(run_dir)], check=True)


def _writable(run_dir: Path) -> None:
    subprocess.run(["chattr", "-R", "-i", str(run_dir)], check=True)


def _can_be_fixed(folder: Path) -> bool:
    probe = folder / "probe"
    probe.touch()
    done = [subprocess.run(["chattr", change, str(probe)], check=False, capture_output=True) for change in ("+i", "-i")]
    probe.unlink()
    return all(each.returncode == 0 for each in done)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- processes


def process(runs: Runs, options: Options, say: Callable[[str], None]) -> list[Row]:
    """A process that is stopped, one that is killed, and signals that ask the run to stop."""
    more = ("--steps", "40", "--save_every", "5")
    straight = runs.fresh("process-straight")
    runs.finish(straight, *more)
    rows = []
    for name, number, rank, expected in (
        ("one process stopped (SIGSTOP)", signal.SIGSTOP, 1, {-signal.SIGKILL, EXIT_REQUEUE}),
        ("one process killed (SIGKILL)", signal.SIGKILL, 1, {-signal.SIGKILL, EXIT_REQUEUE}),
        ("SIGTERM to all", signal.SIGTERM, None, {EXIT_REQUEUE}),
        ("SIGUSR1 to one", signal.SIGUSR1, 1, {EXIT_REQUEUE}),
        ("Ctrl-C", signal.SIGINT, None, {EXIT_REQUEUE}),
    ):
        run_dir = runs.fresh("process")
        ranks = runs.start(run_dir, *more)
        wait_for_step(ranks, run_dir, 12)
        began = time.monotonic()
        ranks.send(number, rank)
        try:
            statuses = ranks.wait(PATIENCE)
        except TimeoutError as error:
            say(f"{name}: {error}")
            continue
        seconds = time.monotonic() - began
        ranks.kill()
        runs.finish(run_dir, *more)
        problems = same(run_dir, straight)
        if not set(statuses) <= expected or EXIT_REQUEUE not in statuses:
            problems.append(f"statuses {statuses}: {ranks.output[-2000:]}")
        for problem in problems:
            say(f"{name}: {problem}")
        happened = (
            f"ended with statuses {statuses}; started again, it came to the undisturbed run's weights and metrics"
        )
        rows.append(Row(name, happened, 1, int(not problems), seconds))
    return rows


# --- data


def data(runs: Runs, options: Options, say: Callable[[str], None]) -> list[Row]:
    """Images that cannot be decoded, a damaged file, a file that is gone; in training of the dVAE, which reads them."""
    rows = []
    for name, share, harm, status in (
        ("5 % broken images", 0.05, _break_pictures, 0),
        ("50 % broken images", 0.5, _break_pictures, 1),
        ("a shard of which 4 % are zeroed", 0.04, _zero_part, 0),
        ("a shard of which half is zeroed", 0.5, _zero_part, 1),
        ("a shard that is gone", 0.0, _drop_shard, 1),
    ):
        copy = runs.fresh("broken-data")
        shutil.copytree(runs.data, copy)
        expected = harm(copy, share, random.Random(options.seed))
        run_dir = runs.fresh("data-faults")
        arguments = [
            str(ROOT / "launchers" / "train_dvae.py"),
            *("--deepspeed_config", str(ROOT / "ds_configs" / "zero1_fp32.json"), "--preset", "toy"),
            *("--data", str(copy), "--run_dir", str(run_dir), "--steps", "60", "--train.batch_size", "32"),
            *("--report.preview_every", "0", "--report.validate_every", "0"),
        ]
        ranks = Ranks(arguments, PROCESSES, runs.folder / "data-faults.log")
        statuses = ranks.wait(2 * PATIENCE)
        seconds = time.monotonic() - ranks.started
        skipped = 0
        if (run_dir / "metrics.jsonl").exists():
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            skipped = max((int(line.get("skipped_total", 0)) for line in lines), default=0)
        told = [
            line
            for line in ranks.output.splitlines()
            if line.startswith(("error", "dalle_ds monitor")) or "skipped" in line
        ]
        ranks.kill()
        good = "Traceback" not in ranks.output and statuses == [status] * PROCESSES
        good &= skipped > 0 if status == 0 else bool(told)
        if not good:
            say(f"{name}: {statuses} {ranks.output[-3000:]}")
        happened = f"{expected}; status {statuses[0]}, {skipped} rows skipped and counted"
        happened += f"; told: {told[-1][:200]}" if told else ""
        rows.append(Row(name, happened, 1, int(good), seconds if statuses[0] else None))
    return rows


def _shards(data: Path) -> list[Path]:
    return sorted(path for path in data.rglob("*.arrow") if "train" in str(path) and "codes" not in str(path))


def _break_pictures(data: Path, share: float, rng: random.Random) -> str:
    """Overwrite the middle of images, found by the signatures of their format."""
    broken = total = 0
    for shard in _shards(data):
        content = bytearray(shard.read_bytes())
        place = content.find(b"\x89PNG\r\n\x1a\n")
        while place >= 0:
            total += 1
            following = content.find(b"\x89PNG\r\n\x1a\n", place + 8)
            if rng.random() < share:
                content[place + 4 : place + 40] = bytes(36)
                broken += 1
            place = following
        shard.write_bytes(content)
    return f"{broken} of {total} images"


def _zero_part(data: Path, share: float, rng: random.Random) -> str:
    shard = _shards(data)[0]
    content = bytearray(shard.read_bytes())
    size = round(share * len(content))
    begin = len(content) // 3
    content[begin : begin + size] = bytes(size)
    shard.write_bytes(content)
    return f"{shard.name}, one of {len(_shards(data))}"


def _drop_shard(data: Path, share: float, rng: random.Random) -> str:
    shards = _shards(data)
    shards[0].unlink()
    return f"{shards[0].name}, one of {len(shards)}"


# --- numbers


def numbers(runs: Runs, options: Options, say: Callable[[str], None]) -> list[Row]:
    """NaN in the loss and in gradients of one process, once and again and again."""
    rows = []
    for name, kind, calls, words in (
        ("NaN in the loss, once", "loss", "7", "update 8 is left out"),
        ("NaN in the gradients, once", "gradient", "7", "update 8 is left out"),
        ("NaN in the loss, 10 times in a row", "loss", "7-16", "WENT BACK to step 5"),
        ("NaN in the gradients, 10 times in a row", "gradient", "7-16", "WENT BACK to step 5"),
        ("NaN in the loss, for ever", "loss", "7-9999", "have not helped"),
    ):
        run_dir = runs.fresh("numbers")
        prefix = (str(Path(__file__)), "--inject", kind, calls)
        ranks = runs.start(run_dir, "--steps", "30", "--save_every", "5", prefix=prefix)
        statuses = ranks.wait(2 * PATIENCE)
        ends = 1 if calls.endswith("9999") else 0
        losses = [record["loss"] for record in records(run_dir) if "loss" in record]
        good = statuses == [ends] * PROCESSES and words in ranks.output.replace("\n", " ")
        good &= ends == 1 or (losses[-1] is not None and losses[-1] < losses[0])
        if not good:
            say(f"{name}: {statuses}, {losses}, {ranks.output[-3000:]}")
        happened = f"told in the same update ({words}); status {statuses[0]}"
        happened += (
            f"; no weight took it in: the loss fell from {losses[0]:.3g} to {losses[-1]:.3g}" if not ends else ""
        )
        rows.append(Row(name, happened, 1, int(good), 0.0))
    return rows


def inject(kind: str, calls: str, script: str, arguments: list[str]) -> None:
    """Be a training launcher in which numbers go wrong on rank 1, at calls of the loss FIRST-LAST, counted from 0."""
    import runpy

    import torch
    from torch import nn

    from dalle_ds.tasks import Batch
    from dalle_ds.tasks.transformer import TransformerTask

    first, _, last = calls.partition("-")
    wrong = range(int(first), int(last or first) + 1)
    original = TransformerTask.loss
    count = -1

    def loss(self: TransformerTask, model: nn.Module, batch: Batch, step: int) -> Any:
        nonlocal count
        count += 1
        value, metrics = original(self, model, batch, step)
        if count in wrong and os.environ["RANK"] == "1":
            if kind == "loss":
                value = value * torch.nan
            else:
                value.register_hook(lambda gradient: gradient * torch.nan)
        return value, metrics

    TransformerTask.loss = loss  # type: ignore[method-assign]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


# --- all of it


def _call(script: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "launchers" / script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed: {done.stdout[-2000:]} {done.stderr[-2000:]}")


def main() -> None:
    """Parse, try, tell."""
    options = parse_options(Options)
    if not options.folder:
        raise ConfigError("--folder is missing: name a folder for corpora and runs")
    console = Console(soft_wrap=True)
    runs = Runs(Path(options.folder).absolute())
    runs.folder.mkdir(parents=True, exist_ok=True)
    runs.prepare()
    tries = {"storm": storm, "damage": damage, "disk": disk, "process": process, "data": data, "numbers": numbers}
    rows: list[Row] = []
    for part in options.only:
        console.print(f"--- {part}")
        rows += tries[part](runs, options, lambda line: console.print(line, highlight=False))
        if options.json:
            Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    table = Table("fault", "tried", "passed", "noticed after", "what happened")
    for row in rows:
        noticed = "" if row.seconds is None else f"{row.seconds:.1f} s"
        table.add_row(row.fault, str(row.tried), str(row.passed), noticed, row.happened)
    console.print(table)
    if any(row.passed < row.tried for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inject"]:
        inject(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
    else:
        run_launcher(main)
