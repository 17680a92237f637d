"""Prepare a corpus for training, cache image codes of prepared data, or both."""

from __future__ import annotations

from dataclasses import dataclass

from rich import print

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.data.codes import cache_codes
from dalle_ds.data.prepare import PrepareOptions, merge_parts, prepare, prepare_part
from dalle_ds.errors import ConfigError
from dalle_ds.models import DiscreteVAE


@dataclass(frozen=True)
class Options(PrepareOptions):
    """Prepare a corpus (--corpus) into the folder --out, cache a dVAE's image codes there (--cache_codes), or both.

    Several jobs can share the preparation: each does one part (--shard I --shards N), and one merges them (--merge True).
    """

    out: str = ""
    """Folder of prepared data: made with --corpus, otherwise expected to be there."""
    workers: int = 1
    """Processes that decode pictures."""
    overwrite: bool = False
    """Replace an earlier preparation, or earlier codes of the same dVAE."""
    shard: int | None = None
    """Prepare only this part of the corpus, from 0."""
    shards: int | None = None
    """How many parts there are."""
    merge: bool = False
    """Put the parts together, once all are there; --corpus and what belongs to it may be left out."""
    cache_codes: str | None = None
    """Trained dVAE, its run directory or export, whose codes of all pictures are kept in the folder."""
    views: int = 8
    """Cached codes: augmented views of each training picture."""
    batch_size: int = 64
    """Cached codes: pictures encoded at a time."""


def check(options: Options) -> None:
    """Raises `ConfigError` for what cannot be meant."""
    if not options.out:
        raise ConfigError("out is missing: give the folder of prepared data, --out DIR")
    if options.corpus is None and options.cache_codes is None and not options.merge:
        raise ConfigError("nothing to do: give --corpus, --cache_codes, or both")
    if options.workers < 0:
        raise ConfigError(f"workers must not be negative, found {options.workers}")
    if options.shard is not None and (options.shards is None or options.merge or options.cache_codes is not None):
        raise ConfigError("shard needs shards, the number of parts, and goes neither with merge nor with cache_codes")
    if options.shards is not None and options.shard is None and not options.merge:
        raise ConfigError("shards needs shard, the part to prepare, or merge True")


def main() -> None:
    """Parse, prepare, cache."""
    options = parse_options(Options)
    check(options)
    if options.merge:
        wanted = None if options.corpus is None else options
        print(merge_parts(options.out, options.shards, options=wanted, overwrite=options.overwrite))
    elif options.shard is not None and options.shards is not None:
        part = (options.shard, options.shards)
        print(prepare_part(options, options.out, *part, workers=options.workers, overwrite=options.overwrite))
    elif options.corpus is not None:
        print(prepare(options, options.out, workers=options.workers, overwrite=options.overwrite))
    if options.cache_codes is not None:
        report = cache_codes(
            DiscreteVAE.from_pretrained(options.cache_codes),
            options.out,
            views=options.views,
            seed=options.seed,
            batch_size=options.batch_size,
            workers=options.workers,
            overwrite=options.overwrite,
        )
        print(str(report))


if __name__ == "__main__":
    run_launcher(main)
