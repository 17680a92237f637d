"""What filters of captions cost and find: languages by two packages, and a million captions through all of them.

python benchmarks/filters.py --json filters.json
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import print
from rich.table import Table

from dalle_ds.cli import parse_options
from dalle_ds.data.dedup import REASONS, find_copies
from dalle_ds.data.filters import FilterOptions, foreign_margin
from dalle_ds.data.processing import ProcessedPair, process_caption

LANGUAGES = Path(__file__).with_name("languages.tsv")
WORDS = tuple(
    "the on in of with and red old small house dog cat river street woman man child tree car table garden mountain morning "  # noqa: SIM905
    "light photo market bridge boat window summer winter city walking sitting playing near under over".split()
)
CHUNK = 2000


@dataclass(frozen=True)
class Options:
    """Compare language detectors, then filter many captions."""

    rows: int = 1_000_000
    """Captions that are filtered."""
    workers: int = 2
    """Processes that filter."""
    detectors: bool = True
    """Compare language detectors afterwards; lingua takes a gigabyte."""
    json: str | None = None
    """File that the figures are written to."""


# --- languages ------------------------------------------------------------------------------------------------------


def languages() -> list[tuple[bool, str]]:
    """(whether it is English, caption): captions of a few words, names and names of emoji among them."""
    rows = (line.split("\t") for line in LANGUAGES.read_text(encoding="utf-8").splitlines())
    return [(language == "en", caption) for language, caption in rows]


def lingua(low_accuracy: bool) -> Callable[[str], float]:
    """How much less likely than another language English is, as a logarithm of lingua's confidences."""
    import math

    from lingua import Language, LanguageDetectorBuilder

    codes = [language for language in Language.all() if language.name != "LATIN"]
    builder = LanguageDetectorBuilder.from_languages(*codes)
    detector = (builder.with_low_accuracy_mode() if low_accuracy else builder).build()
    # Of English alone: lingua takes eleven times as long for a list of all.
    return lambda caption: -math.log(max(detector.compute_language_confidence(caption, Language.ENGLISH), 1e-9))


def compare_detectors() -> Iterator[dict[str, Any]]:
    """Precision and recall of what is kept as English, at several thresholds."""
    rows = languages()
    detectors: dict[str, tuple[Callable[[], Callable[[str], float]], tuple[float, ...]]] = {
        "py3langid, margin in nats": (lambda: foreign_margin, (0, 4, 8, 12, 16, 20)),
        "lingua, -log confidence": (partial(lingua, False), (0.7, 1.6, 2.3, 3.0, 3.9)),
        "lingua low accuracy, -log confidence": (partial(lingua, True), (0.7, 1.6, 2.3, 3.0, 3.9)),
    }
    for name, (make, thresholds) in detectors.items():
        start = time.perf_counter()
        score = make()
        for _, caption in rows:  # models are loaded when they are first used
            score(caption)
        loaded = time.perf_counter()
        scores = [score(caption) for _, caption in rows]
        seconds = time.perf_counter() - loaded
        for threshold in thresholds:
            for least in (1, 3):
                judged = [
                    (english, value <= threshold)
                    for (english, caption), value in zip(rows, scores, strict=True)
                    if least == 1 or len(caption.split()) >= least
                ]
                both = sum(english and kept for english, kept in judged)
                yield {
                    "detector": name,
                    "threshold": threshold,
                    "words": f"{least} or more",
                    "captions": len(judged),
                    "precision": both / max(1, sum(kept for _, kept in judged)),
                    "recall": both / sum(english for english, _ in judged),
                    "captions_per_second": len(rows) / seconds,
                    "seconds_to_load": max(0.0, loaded - start - seconds),  # 0 where another has loaded them
                }


# --- a million captions ---------------------------------------------------------------------------------------------


def synthetic(start: int, count: int) -> list[str]:
    """Captions of every kind: one in six foreign, one in ten boilerplate or shouted, one in twenty said often."""
    foreign = [caption for english, caption in languages() if not english]
    captions = []
    for number in range(start, start + count):
        chance = random.Random(number)
        kind = chance.random()
        if kind < 0.17:
            captions.append(f"{chance.choice(foreign)} {chance.choice(foreign)}")
        elif kind < 0.22:
            captions.append(f"Photographed on {chance.randint(1, 28)} March {chance.randint(1990, 2020)}")
        elif kind < 0.27:
            captions.append(f"BUY {chance.randint(1, 9)} SHOES {' '.join(chance.choices(WORDS, k=3)).upper()}")
        elif kind < 0.28:
            captions.append(f"{' '.join(chance.choices(WORDS, k=5))}, free shipping")
        elif kind < 0.33:
            captions.append(f"a {chance.choice(WORDS)} near the {chance.choice(WORDS)}")
        else:
            captions.append(" ".join(chance.choices(WORDS, k=chance.randint(2, 20))))
    return captions


def judged(start: int, count: int, filters: FilterOptions) -> tuple[float, list[ProcessedPair]]:
    """(seconds of a core that filters took, what was found)."""
    captions = synthetic(start, count)
    begin = time.process_time()
    found = [
        ProcessedPair(
            start + place, str(start + place), None, [process_caption(text, filters)], f"{start + place:064x}"
        )
        for place, text in enumerate(captions)
    ]
    return time.process_time() - begin, found


class Memory:
    """The most memory that this process and its children had at a time, looked at ten times a second."""

    def __enter__(self) -> Memory:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self.peak = max(self.peak, sum(map(_resident, _family(os.getpid()))))


def _family(process: int) -> list[int]:
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found.extend(member for child in task.read_text().split() for member in _family(int(child)))
        except OSError:  # it has ended
            continue
    return found


def _resident(process: int) -> int:
    """Bytes of a process that it shares with no other, and its part of those that it shares."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def filter_many(options: Options, folder: Path) -> dict[str, Any]:
    """All filters of captions, and then the copies, of as many captions as asked for."""
    filters = FilterOptions(paper=True, max_caption_copies=5)
    starts = range(0, options.rows, CHUNK)
    reasons: Counter[str] = Counter()
    seconds_of_filters = 0.0

    def examined(pool: ProcessPoolExecutor) -> Iterator[ProcessedPair]:
        nonlocal seconds_of_filters
        waves = 4 * options.workers
        for first in range(0, len(starts), waves):  # so that no more than is needed waits in memory
            wave = starts[first : first + waves]
            counts = [min(CHUNK, options.rows - start) for start in wave]
            for seconds, items in pool.map(partial(judged, filters=filters), wave, counts):
                seconds_of_filters += seconds
                reasons.update(item.captions[0].problem or "kept" for item in items)
                yield from items

    context = multiprocessing.get_context("spawn")
    with Memory() as memory, ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        begin = time.perf_counter()
        copies, _ = find_copies(examined(pool), filters, folder / "copies")
        seconds = time.perf_counter() - begin
    copied = Counter(REASONS.get(int(code)) for code in copies)
    return {
        "rows": options.rows,
        "workers": options.workers,
        "seconds": seconds,
        "rows_per_second": options.rows / seconds,
        "rows_per_second_of_a_core": options.rows / seconds_of_filters,
        "peak_memory_bytes": memory.peak,
        "found": dict(reasons) | {str(reason): count for reason, count in copied.items() if reason},
        "filters": asdict(filters) | {"block": "4 phrases"},
    }


def main() -> None:
    """Measure, show, write."""
    options = parse_options(Options)
    with tempfile.TemporaryDirectory() as folder:  # first, while no detector is in this process's memory
        figures: dict[str, Any] = {"filters": filter_many(options, Path(folder))}
    print(figures["filters"])
    figures["detectors"] = list(compare_detectors()) if options.detectors else []
    if figures["detectors"]:
        table = Table(*figures["detectors"][0])
        for row in figures["detectors"]:
            table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
        print(table)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
