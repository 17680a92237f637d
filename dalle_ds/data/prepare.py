"""Preparing a corpus: read, filter, decode once to be sure, split, and store for random access.

The prepared folder DIR has one folder per split (`train`, `validation`, and for corpora with variants `compositional`),
each of which `datasets.load_from_disk` opens, with columns `image` (encoded bytes), `captions`, `name`, `group` and two
checksums (`store.PAIR_SCHEMA`); and `info.json`, written last. What is found of each pair lies in `DIR.parts` first (`parts`),
part by part, so that a preparation that was killed goes on with the next one, and so that copies are found in a corpus of any
size (`dedup`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dalle_ds.config.plain import sound
from dalle_ds.data import corpora
from dalle_ds.data.corpora import Corpus
from dalle_ds.data.corpora.twemoji import ATTRIBUTION
from dalle_ds.data.dataset import FOR_TRAINING, FORMAT_VERSION, read_info
from dalle_ds.data.dedup import REASONS, Codes, embedded, find_copies, image_model
from dalle_ds.data.filters import FilterOptions
from dalle_ds.data.parts import Division, Part, PartReport, Parts
from dalle_ds.data.processing import ProcessedPair, process_units
from dalle_ds.data.report import PreparationReport
from dalle_ds.data.splits import SplitSorter, StoredPair
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import (
    built_beside,
    digest_of,
    disk_full_is_a_data_error,
    only_process,
    remove_leftovers,
    write_json,
)

Kind = Literal["twemoji", "folder", "webdataset", "hf", "coco", "cub", "conceptual", "wit", "yfcc"]
KINDS: tuple[str, ...] = get_args(Kind)
_JOINED = ("conceptual", "wit", "yfcc")
_EXPECTED = {
    "folder": "captions stand in NAME.txt beside NAME.jpg, or in one .csv, .tsv or .jsonl directly in the folder, whose file "
    "names are relative to it",
    "webdataset": "members of a sample have one name up to the first dot, and follow each other",
}
"""What to compare with where nothing is found."""


class NothingKept(DataError):
    """A corpus of which the filters leave nothing."""


@dataclass(frozen=True)
class PrepareOptions:
    """What a preparation depends on: equal options on an equal source give an equal folder."""

    corpus: Kind | None = None
    """Kind of corpus: the embedded one, a folder of images, WebDataset tars, a Hugging Face dataset on disk; COCO captions
    or the test part of CUB; Conceptual Captions, WIT or YFCC100M."""
    source: str = ""
    """Where the corpus is, of the last three its table; the embedded one has no source."""
    pictures: str = ""
    """Conceptual Captions, WIT, YFCC100M: folder of their images, as img2dataset downloads them."""
    image_column: str | None = None
    """Column of images in a table or dataset; None takes "image" or "file_name"."""
    caption_column: str | None = None
    """Column of captions; None takes "caption" or "text"."""
    validation: float = 0.05
    """Share of groups of equal images that goes to the validation split."""
    compositional: float = 0.05
    """Twemoji: share of skin-toned training emoji held out although their base and their tone are both trained on."""
    shrink: int | None = None
    """Store images whose shorter side has more pixels than this resized to it, as PNG, so that big ones are not
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
        if self.corpus not in (None, "twemoji") and not self.source:
            raise ConfigError(f"corpus {self.corpus} needs source: give the folder or file it is in")
        if self.corpus == "webdataset" and self.image_column:
            raise ConfigError("corpus webdataset finds images by their suffix: leave out image_column")
        if self.corpus in _JOINED and not self.pictures:
            raise ConfigError(f"corpus {self.corpus} needs images: give the folder that img2dataset downloaded them to")
        if self.pictures and self.corpus not in _JOINED:
            raise ConfigError(f"--pictures belongs to the corpora {', '.join(_JOINED)}: leave it out")
        if self.corpus in ("coco", "cub", *_JOINED) and (
            self.image_column or (self.caption_column and self.corpus != "wit")
        ):
            raise ConfigError(f"corpus {self.corpus} has columns of its own: leave out image_column and caption_column")


def prepare(
    options: PrepareOptions, out: str, *, parts: int | None = None, workers: int = 1, overwrite: bool = False
) -> PreparationReport:
    """Prepare a corpus into the folder `out`, which appears only when it is complete.

    The work is done in parts, one after the other. A preparation that was killed goes on with the first part that is not
    complete when it is called again with the same options.

    Args:
        parts: how many; None takes those of a preparation that was begun, or parts of some thousand pairs.
        workers: processes that judge captions and decode images; the result does not depend on it.
        overwrite: replace an earlier preparation in `out`, complete or begun.

    Returns:
        What was kept and dropped. If `out` holds a preparation with the same options already, it is left as it is.

    Raises:
        ConfigError: no corpus given, or a filter lacks a file or a package.
        DataError: the source or `out` cannot be used, nothing of the corpus is kept, the disk is full, or another process
            prepares it.
    """
    _check_corpus(options)
    folder, own = Path(out), Parts(Path(out))
    with only_process(folder, f".{folder.name}.lock"):
        existing = _existing_report(_identity(options), folder, overwrite)
        if existing is not None:
            return existing
        if overwrite:
            shutil.rmtree(own.folder, ignore_errors=True)
        remove_leftovers(own.folder)
        corpus = _corpus(options)
        division = Division.of(corpus, parts or own.begun())
        _do_parts(options, own, corpus, division, range(division.parts), workers)
        try:
            return merge_parts(out, division.parts, overwrite=overwrite)
        except NothingKept:  # what was found is of no use with any other options
            own.remove(own.complete(division.parts))
            raise


def prepare_part(
    options: PrepareOptions, out: str, part: int, parts: int, *, workers: int = 1, overwrite: bool = False
) -> PreparationReport | PartReport:
    """Do part `part` (from 0) of `parts` of a preparation, all of which `merge_parts` puts together.

    Parts may be done at the same time on several machines that share the disk. A part that is there is left as it is.

    Returns:
        What was done; the report of the whole if `out` holds it already.

    Raises:
        ConfigError: no such part, or as `prepare`.
        DataError: as `prepare`, or the part that is there belongs to another preparation, or another process is doing it.
    """
    _check_corpus(options)
    if parts < 1 or not 0 <= part < parts:
        raise ConfigError(f"part must lie in [0, parts), found part {part} of {parts} parts")
    own, identity = Parts(Path(out)), _identity(options)
    with own.only_job(part, parts):
        existing = _existing_report(identity, Path(out), overwrite)
        if existing is not None:
            return existing
        if overwrite:
            shutil.rmtree(own.place(part, parts), ignore_errors=True)
        there = own.existing(part, parts, identity)
        if there is not None:
            return there
        corpus = _corpus(options)
        (report,) = _do_parts(options, own, corpus, Division.of(corpus, parts), [part], workers)
        return report


def _check_corpus(options: PrepareOptions) -> None:
    if options.corpus is None:
        raise ConfigError(f"corpus is missing: give one of {', '.join(KINDS)}")
    options.filters.check_packages()


def _do_parts(
    options: PrepareOptions, own: Parts, corpus: Corpus, division: Division, parts: Sequence[int], workers: int
) -> list[PartReport]:
    """Do those of the parts that are not there."""
    identity = _identity(options)
    missing = [part for part in parts if own.existing(part, division.parts, identity, division) is None]
    if not missing:
        return []
    items = process_units(division.units_of(corpus, missing), options.filters, options.shrink, workers)
    if options.filters.duplicate_model is not None:
        items = embedded(items, image_model(options.filters.duplicate_model))
    return list(own.write(items, missing, division, identity))


def merge_parts(
    out: str, parts: int | None = None, *, options: PrepareOptions | None = None, overwrite: bool = False
) -> PreparationReport:
    """Put the parts of a preparation together: the folder is the same, byte for byte, in however many parts the work was done.
    The parts are removed then.

    Args:
        parts: how many there must be; None takes what they say.
        options: what they must have been prepared with; None takes what they say.
        overwrite: replace an earlier preparation in `out`.

    Raises:
        DataError: a part is missing or damaged, or parts do not belong together; or as `prepare`.
    """
    folder, own = Path(out), Parts(Path(out))
    with only_process(folder, f".{folder.name}.merge.lock"):
        own.clear_merged()
        if not own.folder.exists() and (folder / "info.json").is_file() and not overwrite:
            # A job that was started again after it was done.
            wanted = read_info(folder)["options"] if options is None else _identity(options)
            existing = _existing_report(wanted, folder, overwrite)
            assert existing is not None, "another preparation is an error"
            return existing
        found = own.complete(parts)
        identity = found[0].manifest["options"]
        if options is not None and _identity(options) != identity:
            raise DataError(
                f"the parts in {own.folder} were prepared with other options: leave --corpus and what belongs to it out, "
                "or prepare them again with --overwrite True"
            )
        for number in range(len(found)):  # a job may be told to do it once more
            with own.only_job(number, len(found)):
                pass
        report = _existing_report(identity, folder, overwrite) or _assemble(found, identity, folder)
        own.remove(found)
        return report


def _existing_report(identity: dict[str, Any], folder: Path, overwrite: bool) -> PreparationReport | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / "info.json").is_file():
        raise DataError(f"{folder} exists and was not made by prepare_data: choose another --out")
    if overwrite:
        return None
    info = read_info(folder)
    wanted, found = _with_defaults(identity), _with_defaults(info["options"])
    if found == wanted:
        return PreparationReport.from_json(str(folder), info)
    differing = ", ".join(sorted(name for name in wanted if wanted[name] != found.get(name)))
    raise DataError(
        f"{folder} holds another preparation (different: {differing}): choose another --out, or give --overwrite True"
    )


def _identity(options: PrepareOptions) -> dict[str, Any]:
    """The options, and digests of the files that they name but for the source."""
    identity = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(PrepareOptions)}
    filters = options.filters
    files = {}
    if filters.duplicate_model is not None:
        from dalle_ds.models.pretrained import WEIGHTS_NAME, export_folder

        files[filters.duplicate_model] = digest_of(export_folder(filters.duplicate_model) / WEIGHTS_NAME)
    settings = dataclasses.asdict(filters)
    del settings["none"]  # said by the others
    return {**identity, "filters": settings, "files": files}


def _with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """What was prepared before an option was there was prepared with its default; one that has gone and was not used
    makes no difference."""
    default = _identity(PrepareOptions())
    used = {
        name: value for name, value in identity["filters"].items() if name in default["filters"] or value is not None
    }
    return {**default, **identity, "filters": {**default["filters"], **used}}


# --- from what was found of each pair to the folder -----------------------------------------------------------------


def _corpus(options: PrepareOptions) -> Corpus:
    source, columns = options.source, (options.image_column, options.caption_column)
    readers: dict[str | None, Callable[[], Corpus]] = {
        "twemoji": corpora.read_twemoji,
        "webdataset": lambda: corpora.read_webdataset(source, options.caption_column),
        "folder": lambda: corpora.read_folder(source, *columns),
        "hf": lambda: corpora.read_hf(source, *columns),
        "coco": lambda: corpora.read_coco(source),
        "cub": lambda: corpora.read_cub(source),
        "conceptual": lambda: corpora.read_conceptual(source, options.pictures),
        "wit": lambda: corpora.read_wit(source, options.pictures, options.caption_column),
        "yfcc": lambda: corpora.read_yfcc(source, options.pictures),
    }
    return readers[options.corpus]()


def _assemble(found: list[Part], identity: dict[str, Any], folder: Path) -> PreparationReport:
    fields = {name: value for name, value in identity.items() if name != "files"}
    options = PrepareOptions(**{**fields, "filters": FilterOptions(**identity["filters"])})
    report = PreparationReport(out=str(folder))
    remove_leftovers(folder.parent, folder.name)
    with disk_full_is_a_data_error(folder), built_beside(folder) as partial_folder:
        scratch = partial_folder / "copies"
        entries = (entry for part in found for entry in part.entries(images=False))
        copies = find_copies(entries, options.filters, scratch)
        sorter = SplitSorter(partial_folder, options.validation, options.compositional, options.seed)
        for pair, variant in _kept((entry for part in found for entry in part.entries()), copies, report):
            sorter.add(pair, variant)
        shutil.rmtree(scratch)
        report.kept, report.fingerprint, files = sorter.finish()
        if options.corpus == "twemoji":
            report.notes.append(ATTRIBUTION)
        if options.validation > 0 and not report.kept["validation"]:
            report.notes.append("The validation split is empty: the corpus has a single group of images.")
        if not report.kept["train"]:
            report.notes.append(f"The training split is empty: {FOR_TRAINING}.")
        if not any(report.kept.values()):
            expected = f". Expected: {hint}" if (hint := _EXPECTED.get(options.corpus or "")) else ""
            raise NothingKept(
                f"corpus {options.source or options.corpus} has no pair that can be kept: {report.losses()}{expected}"
            )
        info = {"format_version": FORMAT_VERSION, "options": identity, **report.to_json(), "shards": files}
        write_json(partial_folder / "info.json", info)
    return report


def _kept(
    items: Iterator[ProcessedPair], copies: tuple[Codes, Codes], report: PreparationReport
) -> Iterator[tuple[StoredPair, str]]:
    """The pairs that are kept, with their variants; the others are counted."""
    of_captions = iter(copies[0])
    for item, of_item in zip(items, copies[1], strict=True):
        kept, dropped = [], []
        for caption, code in zip(item.captions, of_captions, strict=False):
            if reason := caption.problem or REASONS.get(int(code)):
                dropped.append(reason)
                report.drop_caption(reason, caption.text or item.name)
            else:
                kept.append(caption)
        if item.problem or not kept:
            report.drop(item.problem or dropped[0], item.name, item.count, unpaired=item.unpaired)
        elif like := REASONS.get(int(of_item)):
            report.drop(like, item.name)
        else:
            report.captions_cut += sum(caption.cut for caption in kept)
            for reason in dropped:
                report.captions_dropped[reason] = report.captions_dropped.get(reason, 0) + 1
            yield StoredPair(item.image, [caption.text for caption in kept], item.name, item.group), item.variant
