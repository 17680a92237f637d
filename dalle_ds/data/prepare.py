"""Preparing a corpus: read, filter, decode once to be sure, split, and store for random access.

The prepared folder DIR has one folder per split (`train`, `validation`, and for corpora with variants `compositional`),
each of which `datasets.load_from_disk` opens, with columns `image` (encoded bytes), `captions`, `name`, `group` and two
checksums (`shards.SCHEMA`); and `info.json`, written last. Memory grows with the corpus only by hashes that find
duplicates, about 100 bytes a caption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dalle_ds.config.checks import sound
from dalle_ds.data import corpora, parts, twemoji
from dalle_ds.data.corpora import Corpus
from dalle_ds.data.disk import disk_full_is_a_data_error
from dalle_ds.data.examine import Examined, examine
from dalle_ds.data.filters import FilterOptions
from dalle_ds.data.parts import PartReport
from dalle_ds.data.report import PreparationReport
from dalle_ds.data.splits import compositional_holdout, unit_hash
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import built_beside, write_json
from dalle_ds.parsing import parse_json

if TYPE_CHECKING:
    from dalle_ds.data.arrow import SplitWriter, StoredPair

FORMAT_VERSION = 2
DUPLICATE = "duplicate"


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
        sound(self)
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
    units = enumerate(_corpus(options).units())
    return _assemble(examine(units, options.filters, options.shrink, workers), options, folder)


def prepare_part(
    options: PrepareOptions, out: str, shard: int, shards: int, *, workers: int = 1, overwrite: bool = False
) -> PreparationReport | PartReport:
    """Do part `shard` (from 0) of `shards` of a preparation, all of which `merge_parts` puts together.

    Parts may be done at the same time on several machines that share the disk. A part that is there is left as it is.

    Returns:
        What was done; the report of the whole if `out` holds it already.

    Raises:
        ConfigError: no corpus given, or no such part.
        DataError: as `prepare`, or the part that is there belongs to another preparation.
    """
    parts.check_part(shard, shards)
    if options.corpus is None:
        raise ConfigError("corpus is missing: give twemoji, folder, webdataset or hf")
    folder, identity = Path(out), _identity(options)
    existing = _existing_report(options, folder, overwrite)
    if existing is not None:
        return existing
    part = parts.part_folder(folder, shard, shards)
    there = None if overwrite else parts.existing_part(part, identity)
    if there is not None:
        return there
    share = parts.Share(_corpus(options).units(), shard, shards)
    return parts.write_part(examine(share, options.filters, options.shrink, workers), share, part, identity)


def merge_parts(
    out: str, shards: int | None = None, *, options: PrepareOptions | None = None, overwrite: bool = False
) -> PreparationReport:
    """Put the parts of a preparation together: the folder is the one that `prepare` makes by itself, byte for byte. The
    parts are removed then.

    Args:
        shards: how many parts there must be; None takes what they say.
        options: what they must have been prepared with; None takes what they say.
        overwrite: replace an earlier preparation in `out`.

    Raises:
        DataError: a part is missing or damaged, or parts do not belong together; or as `prepare`.
    """
    folder = Path(out)
    parts.clear_merged(folder)
    if not parts.parts_folder(folder).exists() and (folder / "info.json").is_file() and not overwrite:
        # A job that was started again after it was done.
        existing = _existing_report(options or _options_of(read_info(folder)["options"]), folder, overwrite)
        assert existing is not None, "another preparation is an error"
        return existing
    found = parts.complete_parts(folder, shards)
    stored = _options_of(found[0].manifest["options"])
    if options is not None and _identity(options) != _identity(stored):
        raise DataError(
            f"the parts in {parts.parts_folder(folder)} were prepared with other options: leave --corpus and what belongs to "
            "it out, or prepare them again with --overwrite True"
        )
    report = _existing_report(stored, folder, overwrite) or _assemble(parts.merged(found), stored, folder)
    parts.remove_parts(folder)
    return report


def read_info(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        DataError: the folder is missing, was not made by `prepare`, or has another format.
    """
    try:
        if not folder.is_dir():
            raise DataError(
                f"data folder {folder} does not exist: make it with launchers/prepare_data.py --out {folder}"
            )
        info = parse_json((folder / "info.json").read_bytes())
    except DataError:
        raise
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


def _options_of(identity: dict[str, Any]) -> PrepareOptions:
    """The inverse of `_identity`."""
    return PrepareOptions(**{**identity, "filters": FilterOptions(**identity["filters"])})


def _notes(options: PrepareOptions, report: PreparationReport) -> list[str]:
    notes = [twemoji.ATTRIBUTION] if options.corpus == "twemoji" else []
    if options.validation > 0 and not report.kept["validation"]:
        notes.append("The validation split is empty: the corpus has a single group of pictures.")
    return notes


# --- from what was found of each pair to the folder -----------------------------------------------------------------


def _corpus(options: PrepareOptions) -> Corpus:
    if options.corpus == "twemoji":
        return corpora.read_twemoji()
    if options.corpus == "webdataset":
        return corpora.read_webdataset(options.source, options.caption_column)
    reader = corpora.read_folder if options.corpus == "folder" else corpora.read_hf
    return reader(options.source, options.image_column, options.caption_column)


def _assemble(items: Iterator[Examined], options: PrepareOptions, folder: Path) -> PreparationReport:
    report = PreparationReport(out=str(folder))
    with disk_full_is_a_data_error(folder), built_beside(folder) as partial_folder:
        sorter = _SplitSorter(partial_folder, options)
        for pair, variant in _kept(items, report):
            sorter.add(pair, variant)
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


def _kept(items: Iterator[Examined], report: PreparationReport) -> Iterator[tuple[StoredPair, str]]:
    """The pairs that are kept, with their variants; the others are counted."""
    from dalle_ds.data.arrow import StoredPair  # imports datasets, which worker processes do without

    seen: set[bytes] = set()  # 16-byte hashes of (picture, caption)
    for item in items:
        captions: list[str] = []
        reasons: list[str] = []
        cut = 0
        for caption in item.captions:
            digest = hashlib.sha256(bytes.fromhex(item.picture) + caption.text.encode()).digest()[:16]
            reason = caption.problem or (DUPLICATE if digest in seen else None)
            if reason:
                reasons.append(reason)
                continue
            seen.add(digest)
            captions.append(caption.text)
            cut += caption.cut
        problem = item.problem if captions or not reasons else reasons[0]
        if problem:
            report.drop(problem, item.name)
            continue
        report.captions_cut += cut
        for reason in reasons:
            report.captions_dropped[reason] = report.captions_dropped.get(reason, 0) + 1
        yield StoredPair(item.image, captions, item.name, item.group), item.variant


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

    def add(self, pair: StoredPair, variant: str) -> None:
        """Store one pair."""
        place = unit_hash(self._options.seed, pair.group)
        if place < self._options.validation:
            self._writers["validation"].add(pair)
            return
        no_validation = self._options.validation > 0 and not self._writers["validation"].rows
        if no_validation:
            self._lowest = min(self._lowest, (place, pair.group))
        if variant or (no_validation and pair.group == self._lowest[1]):
            self._waiting.add(pair)
            self._variants.append(variant)
        else:
            self._writers["train"].add(pair)

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
