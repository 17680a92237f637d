"""The command line of `launchers/prepare_data.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from dalle_ds.data.codes import cache_codes
from dalle_ds.data.parts import PartReport
from dalle_ds.data.prepare import PrepareOptions, merge_parts, prepare, prepare_part
from dalle_ds.data.prepare_on_ray import prepare_on_ray
from dalle_ds.data.report import PreparationReport
from dalle_ds.errors import ConfigError


@dataclass(frozen=True)
class Preparation(PrepareOptions):
    """Prepare a corpus (--corpus) into the folder --out, cache a dVAE's image codes there (--cache_codes), or both.

    Several jobs can share the preparation: each does one part (--part I --parts N), and one merges them (--merge True).
    """

    out: str = ""
    """Folder of prepared data: made with --corpus, otherwise expected to be there."""
    workers: int = 1
    """Processes that judge captions and decode images."""
    overwrite: bool = False
    """Replace an earlier preparation, or earlier codes of the same dVAE."""
    engine: Literal["ray"] | None = None
    """Ray does the parts, on the cluster at RAY_ADDRESS or on this machine's cores; None does all in this process."""
    part: Annotated[int | None, tyro.conf.arg(aliases=["--shard"])] = None
    """Prepare only this part of the corpus, from 0."""
    parts: Annotated[int | None, tyro.conf.arg(aliases=["--shards"])] = None
    """How many parts there are, each of which is begun anew where it was stopped; None takes parts of some thousand pairs, or
    with Ray four times as many as can be done at a time."""
    merge: bool = False
    """Put the parts together, once all are there; --corpus and what belongs to it may be left out."""
    cache_codes: str | None = None
    """Trained dVAE, its run directory or export, whose codes of all images are kept in the folder."""
    codes_out: str | None = None
    """Cached codes: folder to keep them in, for data that cannot be written; training takes it as --codes. None keeps them in
    the folder of the data."""
    views: int = 8
    """Cached codes: augmented views of each training image."""
    batch_size: int = 64
    """Cached codes: images encoded at a time."""

    def check(self) -> None:
        """Raises `ConfigError` for what cannot be meant."""
        if not self.out:
            raise ConfigError("out is missing: give the folder of prepared data, --out DIR")
        if self.corpus is None and self.cache_codes is None and not self.merge:
            raise ConfigError("nothing to do: give --corpus, --cache_codes, or both")
        if self.codes_out is not None and self.cache_codes is None:
            raise ConfigError(
                f"codes_out={self.codes_out} is for codes: name the dVAE that makes them, --cache_codes DVAE"
            )
        if self.workers < 0:
            raise ConfigError(f"workers must not be negative, found {self.workers}")
        if self.parts is not None and self.parts < 1:
            raise ConfigError(f"parts must be greater than 0, found {self.parts}")
        if self.engine is not None and (self.corpus is None or self.part is not None or self.merge):
            raise ConfigError(
                "engine prepares all parts of a corpus and merges them: give corpus, and neither part nor merge"
            )
        if self.part is not None and (self.parts is None or self.merge or self.cache_codes is not None):
            raise ConfigError("part needs parts, their number, and goes neither with merge nor with cache_codes")


def run(options: Preparation) -> Iterator[PreparationReport | PartReport | str]:
    """Prepare, cache codes, or both; yields what there is to tell of each.

    Raises:
        ConfigError, DataError, CheckpointError: as `prepare`, `cache_codes` and `DiscreteVAE.from_pretrained`.
    """
    options.check()
    how: dict[str, Any] = {"workers": options.workers, "overwrite": options.overwrite}
    if options.merge:
        wanted = None if options.corpus is None else options
        yield merge_parts(options.out, options.parts, options=wanted, overwrite=options.overwrite)
    elif options.part is not None and options.parts is not None:
        yield prepare_part(options, options.out, options.part, options.parts, **how)
    elif options.engine is not None:
        yield prepare_on_ray(options, options.out, options.parts, **how)
    elif options.corpus is not None:
        yield prepare(options, options.out, parts=options.parts, **how)
    if options.cache_codes is not None:
        from dalle_ds.models import DiscreteVAE  # imports torch's modules, which preparation does without

        dvae = DiscreteVAE.from_pretrained(options.cache_codes)
        report = cache_codes(
            dvae, options.out, views=options.views, seed=options.seed, batch_size=options.batch_size,
            codes_dir=options.codes_out, **how,
        )  # fmt: skip
        yield str(report)
