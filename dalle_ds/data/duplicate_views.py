"""Pairs that the duplicate detector learns from: a picture and what became of a copy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dalle_ds.config.overlap import DistortionConfig
from dalle_ds.data.augment import useful_short_side
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.distortions import distort
from dalle_ds.data.images import center_crop_resize, resize_short_side
from dalle_ds.data.samples import RowSamples, channels_first


class DuplicateSamples(RowSamples):
    """Two views of a picture, `image` and `copy`, (3, R, R) uint8 each. The copy is always distorted.

    Both end in what the detector does to any picture: the shorter side resized to R, and the middle taken.

    Args:
        dataset: rows.
        image_size: R.
        distortions: of the copy.
        both: distort the other view too, by itself.
    """

    def __init__(
        self, dataset: PairDataset, image_size: int, distortions: DistortionConfig, *, both: bool = False
    ) -> None:
        super().__init__(dataset)
        self._image_size = image_size
        self._distortions = distortions
        self._both = both

    def sample(self, row: int, rng: np.random.Generator) -> dict[str, npt.NDArray | int]:
        """See `loader.Samples`."""
        useful = useful_short_side(self._image_size)
        picture = self._dataset.picture(row, useful)
        pixels = picture
        if min(pixels.shape[:2]) > useful:  # more pixels would make distortions slow, and none of them would be seen
            pixels = resize_short_side(pixels, useful)
        first, second = rng.spawn(2)
        image = distort(pixels, self._distortions, first) if self._both else picture
        return {"image": self._array(image), "copy": self._array(distort(pixels, self._distortions, second))}

    def _array(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return channels_first(center_crop_resize(pixels, self._image_size))
