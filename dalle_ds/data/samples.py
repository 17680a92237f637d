"""From a row of a prepared split to the arrays that a stage trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dalle_ds.config import PADDING
from dalle_ds.data.augment import (
    augment_for_dvae,
    augment_for_transformer,
    clip_center_view,
    clip_random_view,
    embedded_view,
    useful_short_side,
)
from dalle_ds.data.codes import CodesCache
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.faults import Fault
from dalle_ds.data.images import Pixels, center_crop_resize
from dalle_ds.diffusion.degradation import shrink

if TYPE_CHECKING:
    from dalle_ds.data.embeddings import EmbeddingCache
    from dalle_ds.text.clip_tokenizer import ClipTokenizer
    from dalle_ds.text.tokenizer import Tokenizer

KEPT_BYTES = 2**26
"""Decoded images that a process keeps of a split; one that would take more is decoded anew for every sample."""


class RowSamples:
    """What samples of any kind are drawn from: the rows of a dataset.

    Args:
        dataset: rows.
        image_size: side R of the views.
        train: random views, and a random caption of several; otherwise the central view and the first caption.
    """

    def __init__(self, dataset: PairDataset, image_size: int, *, train: bool) -> None:
        self._dataset = dataset
        self._image_size = image_size
        self._train = train
        self._decoded: dict[tuple[int, int], Pixels] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self._dataset.faults

    def check_unchanged(self) -> None:
        self._dataset.check_unchanged()

    def _pixels(self, row: int, short_side: int) -> Pixels:
        """An image, decoded once where the whole split is small: decoding may take longer than all else that is done to it."""
        pixels = self._decoded.get((row, short_side))
        if pixels is None:
            pixels = self._dataset.image(row, short_side)
            if len(self._dataset) * pixels.nbytes <= KEPT_BYTES:
                self._decoded[row, short_side] = pixels
        return pixels

    def _caption(self, row: int, rng: np.random.Generator) -> str:
        captions = self._dataset.captions(row)
        return captions[int(rng.integers(len(captions)))] if self._train else captions[0]


class DvaeSamples(RowSamples):
    """Images for the dVAE: `image`, (3, R, R) uint8, in training a view as in DALL·E Listing 1. Args: see `RowSamples`."""

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, npt.NDArray | int]:
        size = self._image_size
        pixels = self._pixels(row, useful_short_side(size))
        view = augment_for_dvae(pixels, size, rng) if self._train else center_crop_resize(pixels, size)
        return {"image": channels_first(view)}


class TextImageSamples(RowSamples):
    """Captions with images for the transformer.

    `text` is (text_len,) int64, -1 after the caption's tokens, and `truncated` is 1 where they were more than fit. Beside
    them stands `codes`, (h·w,) int64, where `codes` are given, else `image`, (3, R, R) uint8, in training a view as in DALL·E
    Listing 2; and in evaluation `other_text`, the text of another row.

    Args:
        dataset, image_size, train: see `RowSamples`.
        tokenizer: of the model.
        text_len: text positions; longer captions are cut.
        caption_dropout: share of captions replaced by the empty one in training.
        bpe_dropout: share of BPE merges skipped in training (DALL·E App. B.2).
        codes: the dataset's cached image codes, of which training takes a random view, or None for images.
    """

    def __init__(
        self,
        dataset: PairDataset,
        tokenizer: Tokenizer,
        *,
        text_len: int,
        image_size: int,
        train: bool,
        caption_dropout: float = 0.0,
        bpe_dropout: float = 0.0,
        codes: CodesCache | None = None,
    ) -> None:
        super().__init__(dataset, image_size, train=train)
        self._tokenizer = tokenizer
        self._text_len = text_len
        self._caption_dropout = caption_dropout if train else 0.0
        self._bpe_dropout = bpe_dropout if train else 0.0
        self._codes = codes

    @property
    def faults(self) -> tuple[Fault, ...]:
        files, codes = self._dataset.faults, () if self._codes is None else self._codes.faults
        # Most images without codes are those of files that were missing then, too; none is to be counted twice.
        return max(files, codes, key=lambda faults: sum(fault.rows for fault in faults))

    def check_unchanged(self) -> None:
        super().check_unchanged()
        if self._codes is not None:
            self._codes.check_unchanged()

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, npt.NDArray | int]:
        if self._train:
            return {**self._text(row, rng), **self._image(row, rng)}
        # A caption from the other half of the split: neighbouring rows are often variants of one thing.
        other = (row + len(self) // 2) % len(self)
        return {**self._text(row, rng), "other_text": self._text(other, rng)["text"], **self._image(row, rng)}

    def _text(self, row: int, rng: np.random.Generator) -> dict[str, npt.NDArray | int]:
        if rng.random() < self._caption_dropout:
            return {"text": np.full(self._text_len, PADDING, dtype=np.int64), "truncated": 0}
        text, truncated = own_tokens(self._tokenizer, self._text_len, self._caption(row, rng), self._bpe_dropout, rng)
        return {"text": text, "truncated": truncated}

    def _image(self, row: int, rng: np.random.Generator) -> dict[str, npt.NDArray | int]:
        if self._codes is not None:
            view = int(rng.integers(self._codes.views)) if self._train else 0
            return {"codes": self._codes.codes(row, view)}
        size = self._image_size
        pixels = self._pixels(row, useful_short_side(size))
        view_pixels = augment_for_transformer(pixels, size, rng) if self._train else center_crop_resize(pixels, size)
        return {"image": channels_first(view_pixels)}


class ClipSamples(RowSamples):
    """Images with captions for CLIP.

    `image` is (3, R, R) uint8; `text` is (text_len,) int64, with start and end tokens and -1 behind them; `truncated` is 1
    where the caption's tokens were more than fit.

    Args:
        dataset, image_size, train: see `RowSamples`.
        tokenizer: of the model.
        text_len: text positions; longer captions are cut, and keep their end token.
        min_crop, mirror: of random views (`augment.clip_random_view`).
    """

    def __init__(
        self,
        dataset: PairDataset,
        tokenizer: ClipTokenizer,
        *,
        text_len: int,
        image_size: int,
        train: bool,
        min_crop: float = 1.0,
        mirror: bool = False,
    ) -> None:
        super().__init__(dataset, image_size, train=train)
        self._tokenizer = tokenizer
        self._text_len = text_len
        self._min_crop = min_crop
        self._mirror = mirror

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, npt.NDArray | int]:
        caption, size = self._caption(row, rng), self._image_size
        text, truncated = clip_tokens(self._tokenizer, self._text_len, caption)
        if self._train:  # views may be of a part of the image, whose pixels are to be as many
            pixels = self._pixels(row, 2 * size)
            view = clip_random_view(pixels, size, rng, self._min_crop, self._mirror)
        else:
            view = clip_center_view(self._pixels(row, size), size)
        return {"text": text, "truncated": truncated, "image": channels_first(view)}


class EmbeddingSamples(RowSamples):
    """Embeddings of images and of their captions, and the captions, for priors; and the images, for decoders.

    `image_embedding` and `text_embedding` are (embed_dim,) float32 of unit length; `text` is (text_len,) int64, -1 after the
    caption's tokens, and `truncated` is 1 where they were more than fit; `states` are CLIP's of these tokens, (text_len,
    text_width) float32, 0 after them; `image` is (3, R, R) uint8, the view that is embedded.

    Args:
        dataset, train: see `RowSamples`.
        embeddings: the dataset's, of which training takes a random view.
        encode: `own_tokens` or `clip_tokens` of a tokenizer and a length.
        states: whether samples have states.
        image_size: side R of images; 0 leaves them out.
    """

    def __init__(
        self,
        dataset: PairDataset,
        embeddings: EmbeddingCache,
        encode: Callable[[str], tuple[npt.NDArray, int]],
        *,
        train: bool,
        states: bool = False,
        image_size: int = 0,
    ) -> None:
        super().__init__(dataset, image_size, train=train)
        self._embeddings = embeddings
        self._encode = encode
        self._states = states

    @property
    def faults(self) -> tuple[Fault, ...]:
        return max(
            self._dataset.faults, self._embeddings.faults, key=lambda faults: sum(fault.rows for fault in faults)
        )

    def check_unchanged(self) -> None:
        super().check_unchanged()
        self._embeddings.check_unchanged()

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, npt.NDArray | int]:
        captions, cached = self._dataset.captions(row), self._embeddings
        number = int(rng.integers(len(captions))) if self._train else 0
        view = int(rng.integers(cached.views)) if self._train else 0
        text, truncated = self._encode(captions[number])
        found: dict[str, npt.NDArray | int] = {
            "text": text,
            "truncated": truncated,
            "image_embedding": cached.image(row, view),
            "text_embedding": cached.text(row, number),
        }
        if self._states:
            states = cached.states(row, number)
            found["states"] = np.pad(states, ((0, len(text) - len(states)), (0, 0)))
        if self._image_size:
            found["image"] = channels_first(self._view(row, view))
        return found

    def _view(self, row: int, view: int) -> Pixels:
        size = self._image_size
        if view == 0:
            return clip_center_view(self._pixels(row, size), size)
        return embedded_view(self._pixels(row, 2 * size), size, (self._embeddings.seed, row, view))


class UpsamplerSamples(RowSamples):
    """Images with small ones of the same, for upsamplers.

    `image` is (3, R, R) uint8 and `low` (3, R / scale, R / scale) uint8: in training a random crop, whose small image may be
    degraded; otherwise the central square, R = image_size.

    Args:
        dataset, image_size, train: see `RowSamples`.
        scale: how many times smaller `low` is.
        crop: R in training, a multiple of `scale`.
        degrade: makes `low` of a crop; None, or where it is not drawn, takes means of scale² pixels.
        degraded: share of crops that `degrade` makes `low` of.
        mirror: mirror every other training image.
    """

    def __init__(
        self,
        dataset: PairDataset,
        image_size: int,
        *,
        train: bool,
        scale: int,
        crop: int,
        degrade: Callable[[Pixels, int, np.random.Generator], Pixels] | None = None,
        degraded: float = 1.0,
        mirror: bool = False,
    ) -> None:
        super().__init__(dataset, image_size, train=train)
        self._scale, self._crop, self._mirror = scale, crop, mirror
        self._degrade, self._degraded = degrade, degraded

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, npt.NDArray | int]:
        size, scale = self._image_size, self._scale
        pixels = self._pixels(row, size)
        if not self._train:
            view = clip_center_view(pixels, size)
            return {"image": channels_first(view), "low": channels_first(shrink(view, scale))}
        view = clip_random_view(pixels, size, rng, mirror=self._mirror)
        top, left = (int(rng.integers(size - self._crop + 1)) for _ in range(2))
        view = view[top : top + self._crop, left : left + self._crop]
        if self._degrade is not None and rng.random() < self._degraded:
            low = self._degrade(view, scale, rng)
        else:
            low = shrink(view, scale)
        return {"image": channels_first(view), "low": channels_first(low)}


def own_tokens(
    tokenizer: Tokenizer, length: int, caption: str, dropout: float = 0.0, rng: np.random.Generator | None = None
) -> tuple[npt.NDArray, int]:
    """(length,) int64 tokens, -1 after the caption's, and 1 where they were more than fit."""
    text = np.full(length, PADDING, dtype=np.int64)
    # One token more than fits tells whether the caption is cut, without tokenizing all of an endless one.
    tokens = tokenizer.encode(caption, dropout=dropout, rng=rng, max_tokens=length + 1)
    kept = tokens[:length]
    text[: len(kept)] = kept
    return text, int(len(tokens) > len(kept))


def clip_tokens(tokenizer: ClipTokenizer, length: int, caption: str) -> tuple[npt.NDArray, int]:
    """As `own_tokens`, with start and end tokens; a caption that is cut keeps its end token."""
    # With one position more than there are, a caption that does not fit has its end token there.
    text = tokenizer.encode([caption], length + 1)[0].numpy()
    truncated = int(text[-1] != PADDING)
    text = text[:-1]
    if truncated:
        text[-1] = tokenizer.end
    return text, truncated


def channels_first(pixels: Pixels) -> Pixels:
    """(H, W, 3) → (3, H, W), contiguous."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
