"""Prepare a corpus for training, cache image codes of prepared data, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rich import print

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.data.codes import cache_codes
from dalle_ds.data.engine import prepare_with_ray
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
    """Processes that judge captions and decode pictures."""
    overwrite: bool = False
    """Replace an earlier preparation, or earlier codes of the same dVAE."""
    engine: Literal["ray"] | None = None
    """Ray does the parts, on the cluster at RAY_ADDRESS or on this machine's cores; None does all in this process."""
    shard: int | None = None
    """Prepare only this part of the corpus, from 0."""
    shards: int | None = None
    """How many parts there are; with Ray, None takes as many as can be done at a time."""
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
    if options.engine is not None and (options.corpus is None or options.shard is not None or options.merge):
        raise ConfigError(
            "engine prepares all parts of a corpus and merges them: give corpus, and neither shard nor merge"
        )
    if options.shard is not None and (options.shards is None or options.merge or options.cache_codes is not None):
        raise ConfigError("shard needs shards, the number of parts, and goes neither with merge nor with cache_codes")
    if options.shards is not None and options.shard is None and not options.merge and options.engine is None:
        raise ConfigError("shards needs shard, the part to prepare, or merge True, or an engine")


def main() -> None:
    """Parse, prepare, cache."""
    options = parse_options(Options)
    check(options)
    how: dict[str, Any] = {"workers": options.workers, "overwrite": options.overwrite}
    if options.merge:
        wanted = None if options.corpus is None else options
        print(merge_parts(options.out, options.shards, options=wanted, overwrite=options.overwrite))
    elif options.shard is not None and options.shards is not None:
        print(prepare_part(options, options.out, options.shard, options.shards, **how))
    elif options.engine is not None:
        print(prepare_with_ray(options, options.out, options.shards, **how))
    elif options.corpus is not None:
        print(prepare(options, options.out, **how))
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
