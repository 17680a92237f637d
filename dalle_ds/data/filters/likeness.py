"""Pictures that a model finds alike: whose embeddings point the same way. `perceptual` does without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dalle_ds.data.images import center_crop_resize, decode_image
from dalle_ds.data.processing import ProcessedPair
from dalle_ds.errors import ConfigError
from dalle_ds.parsing import parse_json

if TYPE_CHECKING:
    from dalle_ds.models import Clip

_BLOCK = 4096
_BATCH = 32
Rows = npt.NDArray[np.intp]


def picture_model(path: str) -> Clip:
    """The CLIP at `path`, a run directory or export.

    Raises:
        CheckpointError: nothing there that can be read.
        ConfigError: another kind of model.
    """
    from dalle_ds.models import Clip, pretrained

    folder = pretrained.export_folder(path)
    kind = parse_json((folder / pretrained.CONFIG_NAME).read_bytes()).get("kind")
    if kind != "clip":
        raise ConfigError(f"filters.duplicate_model {path} is a {kind}: give a CLIP")
    return Clip.from_pretrained(folder).to(_device()).eval()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def embedded(items: Iterable[ProcessedPair], model: Clip) -> Iterator[ProcessedPair]:
    """The items, those that are kept so far with the embeddings of their pictures: D numbers of 16 bits.

    Every batch has the same size, if need be with a picture in it several times: results of other shapes of the same
    product may differ in the last bit, and what is prepared must not depend on how the work was divided.
    """
    batch: list[ProcessedPair] = []
    for item in items:
        batch.append(item)
        if sum(bool(entry.image) for entry in batch) == _BATCH or len(batch) == 4 * _BATCH:
            yield from _embedded_batch(batch, model)
            batch = []
    yield from _embedded_batch(batch, model)


@torch.no_grad()
def _embedded_batch(batch: list[ProcessedPair], model: Clip) -> Iterator[ProcessedPair]:
    size = model.config.image_size  # in which the model would look at them, too: a batch of whole pictures may be large
    pictures = [
        Image.fromarray(center_crop_resize(decode_image(item.image, short_side=size), size))
        for item in batch
        if item.image
    ]
    if pictures:
        padded = (pictures * _BATCH)[:_BATCH] if len(pictures) < _BATCH else pictures
        vectors = model.embed_images(padded).float().cpu().numpy().astype("<f2")
    given = iter(range(len(pictures)))
    for item in batch:
        yield replace(item, embedding=vectors[next(given)].tobytes()) if item.image else item


def close_embeddings(vectors: npt.NDArray[np.float16], rows: Rows, cosine: float) -> Rows:
    """Those of the ascending `rows` whose vectors have at least this cosine with that of an earlier one that is kept.

    All are compared with all, 4,096 with 4,096 at a time: exact, on a GPU where there is one, and a matter of hours beyond
    some million pictures on one.

    Args:
        vectors: (N, D), of length 1.
    """
    device = _device()

    def loaded(block: Rows) -> torch.Tensor:
        return torch.from_numpy(vectors[block].astype(np.float32)).to(device)

    kept: list[Rows] = []
    dropped: list[Rows] = []
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        these = loaded(block)
        close = torch.zeros(len(block), dtype=torch.bool, device=device)
        for earlier in kept:
            close |= (these @ loaded(earlier).T >= cosine).any(dim=1)
        drop = close.cpu().numpy()
        within = np.tril((these @ these.T >= cosine).cpu().numpy(), -1)
        for row in np.flatnonzero(within.any(axis=1)):
            drop[row] |= bool((within[row] & ~drop).any())
        kept.append(block[~drop])
        dropped.append(block[drop])
    return np.concatenate(dropped) if dropped else np.zeros(0, dtype=np.intp)
