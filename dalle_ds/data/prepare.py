"""Preparing a corpus: read, filter, decode once to be sure, split, and store for random access.

The prepared folder DIR has one folder per split (`train`, `validation`, and for corpora with variants `compositional`),
each of which `datasets.load_from_disk` opens, with columns `image` (encoded bytes), `captions`, `name` and `group`; and
`info.json`, written last. Memory grows with the corpus only by hashes that find duplicates, about 100 bytes a caption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dalle_ds.data import corpora, twemoji
from dalle_ds.data.corpora import Broken, RawPair
from dalle_ds.data.disk import disk_full_is_a_data_error
from dalle_ds.data.filters import FilterOptions, caption_problem, clean_caption, cut_caption, picture_problem
from dalle_ds.data.images import decode_image, encode_png, picture_size, resize_short_side
from dalle_ds.data.report import PreparationReport
from dalle_ds.data.splits import compositional_holdout, unit_hash
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import built_beside, write_json
from dalle_ds.parsing import parse_json

if TYPE_CHECKING:
    from dalle_ds.data.arrow import SplitWriter, StoredPair

FORMAT_VERSION = 2
UNDECODABLE = "undecodable picture"
DUPLICATE = "duplicate"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PrepareOptions:
    """What a preparation depends on: equal options on an equal source give an equal folder."""

    corpus: Literal["twemoji", "folder", "webdataset", "hf"] | None = None
    """Kind of corpus: the embedded one, a folder of pictures, WebDataset tars, or a Hugging Face dataset on disk."""
    source: str = ""
    """Where the corpus is; the embedded one has no source."""
    image_column: str | None = None
    """Column of pictures in a table or dataset; None takes "image" or "file_name"."""
    caption_column: str | None = None
    """Column of captions; None takes "caption" or "text"."""
    validation: float = 0.05
    """Share of groups of equal pictures that goes to the validation split."""
    compositional: float = 0.05
    """Twemoji: share of skin-toned training emoji held out although their base and their tone are both trained on."""
    shrink: int | None = None
    """Store pictures whose shorter side has more pixels than this resized to it, as PNG, so that big ones are not
    decoded in every epoch; None stores all as they are."""
    seed: int = 0
    """Seed of the splits."""
    filters: FilterOptions = field(default_factory=FilterOptions)
    """What is left out."""

    def __post_init__(self) -> None:
        for name in ("validation", "compositional"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must lie in [0, 1), found {getattr(self, name)}")
        if self.shrink is not None and self.shrink <= 0:
            raise ConfigError(f"shrink must be greater than 0, found {self.shrink}")
        if self.corpus == "twemoji" and (self.source or self.image_column or self.caption_column):
            raise ConfigError("corpus twemoji is embedded: leave out source, image_column and caption_column")
        if self.corpus in ("folder", "webdataset", "hf") and not self.source:
            raise ConfigError(f"corpus {self.corpus} needs source: give the folder or file it is in")
        if self.corpus == "webdataset" and self.image_column:
            raise ConfigError("corpus webdataset finds pictures by their suffix: leave out image_column")


def prepare(options: PrepareOptions, out: str, *, workers: int = 1, overwrite: bool = False) -> PreparationReport:
    """Prepare a corpus into the folder `out`, which appears only when it is complete.

    Args:
        workers: processes that decode; the result does not depend on it.
        overwrite: replace an earlier preparation in `out`.

    Returns:
        What was kept and dropped. If `out` holds a preparation with the same options already, it is left as it is.

    Raises:
        ConfigError: no corpus given.
        DataError: the source or `out` cannot be used, nothing of the corpus is kept, or the disk is full.
    """
    if options.corpus is None:
        raise ConfigError("corpus is missing: give twemoji, folder, webdataset or hf")
    folder = Path(out)
    existing = _existing_report(options, folder, overwrite)
    if existing is not None:
        return existing
    report = PreparationReport(out=out)
    with disk_full_is_a_data_error(folder), built_beside(folder) as partial_folder:
        sorter = _SplitSorter(partial_folder, options)
        for pair in _checked(_captioned(_read(options), options.filters, report), options, workers, report):
            sorter.add(pair)
        report.kept, report.fingerprint, shards = sorter.finish()
        report.notes = _notes(options, report)
        if not any(report.kept.values()):
            reasons = ", ".join(f"{reason} ({entry.count})" for reason, entry in report.dropped.items())
            raise DataError(
                f"corpus {options.source or options.corpus} has no pair that can be kept: dropped {reasons}"
            )
        info = {"format_version": FORMAT_VERSION, "options": _identity(options), **report.to_json(), "shards": shards}
        write_json(partial_folder / "info.json", info)
    return report


def read_info(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        DataError: the folder is missing, was not made by `prepare`, or has another format.
    """
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist: make it with launchers/prepare_data.py --out {folder}")
    try:
        info = parse_json((folder / "info.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not a prepared data folder: no readable info.json ({error})") from error
    if not isinstance(info, dict):
        raise DataError(f"{folder} is not a prepared data folder: its info.json is no manifest")
    if info.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder} has data format {info.get('format_version')}, but this version reads {FORMAT_VERSION}: "
            "prepare it again with --overwrite True"
        )
    missing = {"fingerprint", "options", "splits", "shards"} - set(info)
    if missing:
        raise DataError(
            f"{folder}/info.json has no {', '.join(sorted(missing))}: prepare it again with --overwrite True"
        )
    return info


def _existing_report(options: PrepareOptions, folder: Path, overwrite: bool) -> PreparationReport | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / "info.json").is_file():
        raise DataError(f"{folder} exists and was not made by prepare_data: choose another --out")
    if overwrite:
        return None
    info = read_info(folder)
    wanted = _identity(options)
    if info["options"] == wanted:
        return PreparationReport.from_json(str(folder), info)
    differing = ", ".join(sorted(name for name in wanted if wanted[name] != info["options"].get(name)))
    raise DataError(
        f"{folder} holds another preparation (different: {differing}): choose another --out, or give --overwrite True"
    )


def _identity(options: PrepareOptions) -> dict[str, Any]:
    identity = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(PrepareOptions)}
    return {**identity, "filters": dataclasses.asdict(options.filters)}


def _notes(options: PrepareOptions, report: PreparationReport) -> list[str]:
    notes = [twemoji.ATTRIBUTION] if options.corpus == "twemoji" else []
    if options.validation > 0 and not report.kept["validation"]:
        notes.append("The validation split is empty: the corpus has a single group of pictures.")
    return notes


# --- read and filter ------------------------------------------------------------------------------------------------


def _read(options: PrepareOptions) -> Iterator[RawPair | Broken]:
    if options.corpus == "twemoji":
        return corpora.read_twemoji()
    if options.corpus == "webdataset":
        return corpora.read_webdataset(options.source, options.caption_column)
    reader = corpora.read_folder if options.corpus == "folder" else corpora.read_hf
    return reader(options.source, options.image_column, options.caption_column)


def _captioned(
    pairs: Iterator[RawPair | Broken], options: FilterOptions, report: PreparationReport
) -> Iterator[RawPair]:
    """The pairs that have captions left after cleaning, filtering and removal of duplicates."""
    seen: set[bytes] = set()  # 16-byte hashes of (picture, caption)
    for pair in pairs:
        if isinstance(pair, Broken):
            report.drop(pair.reason, _storable(pair.name))
            continue
        picture = hashlib.sha256(pair.image).digest()
        captions: list[str] = []
        reasons: list[str] = []
        cut = 0
        for text in pair.captions:
            cleaned = clean_caption(text)
            caption = cut_caption(cleaned, options.max_caption_chars)
            digest = hashlib.sha256(picture + caption.encode()).digest()[:16]
            reason = caption_problem(caption, options) or (DUPLICATE if digest in seen else None)
            if reason:
                reasons.append(reason)
                continue
            seen.add(digest)
            captions.append(caption)
            cut += caption != cleaned
        if not captions:
            report.drop(reasons[0], _storable(pair.name))
            continue
        report.captions_cut += cut
        for reason in reasons:
            report.captions_dropped[reason] = report.captions_dropped.get(reason, 0) + 1
        yield dataclasses.replace(pair, captions=captions, name=_storable(pair.name))


def _storable(name: str) -> str:
    """File names need not be valid Unicode; what is stored must be."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _checked(
    pairs: Iterator[RawPair], options: PrepareOptions, workers: int, report: PreparationReport
) -> Iterator[RawPair]:
    """The pairs whose pictures can be decoded and pass the filters, shrunk if asked for."""
    check = partial(_check_picture, filters=options.filters, shrink=options.shrink)
    for pair, (image, problem) in _map_in_order(check, pairs, workers):
        if problem:
            report.drop(problem, pair.name)
        else:
            yield pair if image is None else dataclasses.replace(pair, image=image)


def _check_picture(pair: RawPair, filters: FilterOptions, shrink: int | None) -> tuple[bytes | None, str | None]:
    """(what to store in place of the picture, None to store it as it is; why it is dropped, or None)."""
    try:
        width, height = picture_size(pair.image)
        problem = picture_problem(width, height, filters)
        if problem:
            return None, problem
        pixels = decode_image(pair.image, max_pixels=filters.max_pixels, short_side=shrink)
    except DataError:
        return None, UNDECODABLE
    if shrink is None or min(width, height) <= shrink:
        return None, None
    return encode_png(resize_short_side(pixels, shrink)), None


def _map_in_order(
    function: Callable[[Item], Result], items: Iterator[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in the order of the items, computed by `workers` processes, a few items ahead."""
    if workers <= 1:
        for item in items:
            yield item, function(item)
        return
    method = "forkserver" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([__name__])  # imported once, not by every process
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(function, item)))
                if len(pending) >= 8 * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that decodes pictures was killed, most likely for lack of memory: "
                "use fewer --workers or lower filters.max_megapixels"
            ) from error


# --- split ----------------------------------------------------------------------------------------------------------


class _SplitSorter:
    """Sends every pair to its split while the corpus streams by.

    Two choices need the whole corpus: which variants to hold out, and which group becomes the validation split should
    none fall into it by its hash. Pairs that may be concerned (all variants; while validation is empty, each group with
    the lowest hash yet) wait in a file until the end.
    """

    def __init__(self, folder: Path, options: PrepareOptions) -> None:
        from dalle_ds.data.arrow import SplitWriter  # imports datasets, which worker processes do without

        self._folder = folder
        self._options = options
        self._writers: dict[str, SplitWriter] = {
            "train": SplitWriter(folder / "train"),
            "validation": SplitWriter(folder / "validation"),
        }
        self._waiting = SplitWriter(folder / "waiting")
        self._variants: list[str] = []  # of the waiting pairs
        self._lowest = (1.0, "")  # (hash, group)

    def add(self, pair: RawPair) -> None:
        """Store one pair."""
        place = unit_hash(self._options.seed, pair.group)
        if place < self._options.validation:
            self._writers["validation"].add(_stored(pair))
            return
        no_validation = self._options.validation > 0 and not self._writers["validation"].rows
        if no_validation:
            self._lowest = min(self._lowest, (place, pair.group))
        if pair.variant or (no_validation and pair.group == self._lowest[1]):
            self._waiting.add(_stored(pair))
            self._variants.append(pair.variant)
        else:
            self._writers["train"].add(_stored(pair))

    def finish(self) -> tuple[dict[str, int], str, dict[str, list[dict[str, Any]]]]:
        """Place the waiting pairs and close the splits: (split → rows, fingerprint of all, split → shards)."""
        from dalle_ds.data.arrow import SplitWriter, read_rows

        self._waiting.close()
        needs_validation = self._options.validation > 0 and not self._writers["validation"].rows
        waiting = [pair.group for pair in read_rows(self._folder / "waiting")]
        several_groups = self._writers["train"].rows > 0 or len(set(waiting)) > 1
        to_validation = self._lowest[1] if needs_validation and several_groups else None
        variants = [
            (group, variant)
            for group, variant in zip(waiting, self._variants, strict=True)
            if variant and group != to_validation
        ]
        held_out = compositional_holdout(variants, self._options.compositional, self._options.seed)
        if held_out:
            self._writers["compositional"] = SplitWriter(self._folder / "compositional")
        for pair, variant in zip(read_rows(self._folder / "waiting"), self._variants, strict=True):
            if pair.group == to_validation:
                split = "validation"
            else:
                split = "compositional" if (pair.group, variant) in held_out else "train"
            self._writers[split].add(pair)
        shutil.rmtree(self._folder / "waiting")
        digests = [f"{split}:{writer.close()}" for split, writer in self._writers.items()]
        fingerprint = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        rows = {split: writer.rows for split, writer in self._writers.items()}
        shards = {split: [vars(shard) for shard in writer.shards] for split, writer in self._writers.items()}
        return rows, fingerprint, shards


def _stored(pair: RawPair) -> StoredPair:
    from dalle_ds.data.arrow import StoredPair

    return StoredPair(pair.image, pair.captions, pair.name, pair.group)
