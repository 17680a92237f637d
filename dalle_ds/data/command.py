"""The command line of `launchers/prepare_data.py`."""

from __future__ import annotations

import os
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
    """Prepare a corpus (--corpus) into the folder --out, cache there a dVAE's image codes (--cache_codes) or a CLIP's
    embeddings (--cache_embeddings), or several of these.

    Several jobs can share the preparation: each does one part (--part I --parts N), and one merges them (--merge True).
    Several processes (deepspeed or torchrun) can share the embeddings.
    """

    out: str = ""
    """Folder of prepared data: made with --corpus, otherwise expected to be there."""
    workers: int = 1
    """Processes that judge captions and decode images."""
    overwrite: bool = False
    """Replace an earlier preparation, or earlier codes or embeddings of the same model."""
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
    cache_embeddings: str | None = None
    """Trained CLIP, its run directory or export, whose embeddings of all images and captions are kept in the folder, with the
    moments that priors need."""
    views: int | None = None
    """Views of each training image. Cached codes: augmented ones, 8 if None. Embeddings: the central one and random ones, 1 if
    None."""
    text_states: bool = False
    """Cached embeddings: keep what CLIP makes of each token of a caption, too, for priors with model.text clip_states, which
    compute it in every step otherwise."""
    batch_size: int = 64
    """Cached codes and embeddings: images encoded at a time."""

    def check(self) -> None:
        """Raises `ConfigError` for what cannot be meant."""
        if not self.out:
            raise ConfigError("out is missing: give the folder of prepared data, --out DIR")
        caches = self.cache_codes is not None or self.cache_embeddings is not None
        if self.corpus is None and not caches and not self.merge:
            raise ConfigError("nothing to do: give --corpus, --cache_codes or --cache_embeddings, or several of them")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (self.corpus or self.cache_codes is not None or self.merge):
            raise ConfigError("several processes can share --cache_embeddings alone: do all else in one process before")
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
        if self.part is not None and (self.parts is None or self.merge or caches):
            raise ConfigError(
                "part needs parts, their number, and goes neither with merge nor with cache_codes or cache_embeddings"
            )


def run(options: Preparation) -> Iterator[PreparationReport | PartReport | str]:
    """Prepare, cache codes, cache embeddings; yields what there is to tell of each.

    Raises:
        ConfigError, DataError, CheckpointError: as `prepare`, `cache_codes`, `cache_embeddings` and the models'
            `from_pretrained`.
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
    cached: dict[str, Any] = {"seed": options.seed, "batch_size": options.batch_size, **how}
    if options.views is not None:
        cached["views"] = options.views
    if options.cache_codes is not None:
        from dalle_ds.models import load_image_tokenizer  # imports torch's modules, which preparation does without

        dvae = load_image_tokenizer(options.cache_codes)
        yield str(cache_codes(dvae, options.out, codes_dir=options.codes_out, **cached))
    if options.cache_embeddings is not None:
        from dalle_ds.data.embeddings import cache_embeddings
        from dalle_ds.models import Clip
        from dalle_ds.resilience.watch import joined

        with joined() as mesh:
            clip = Clip.from_pretrained(options.cache_embeddings)
            report = cache_embeddings(clip, options.out, text_states=options.text_states, mesh=mesh, **cached)
        if mesh.is_main:
            yield str(report)
