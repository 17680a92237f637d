"""Views of pictures, in the order of the rows: what a dVAE encodes when codes are cached."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dalle_ds.data.augment import augment_for_transformer, useful_short_side
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.images import center_crop_resize
from dalle_ds.data.order import hash_integers
from dalle_ds.errors import DataError


class Views(Dataset[tuple[Tensor, bool]]):
    """All views of a row: ((views, 3, R, R) uint8, whether the picture could be read).

    Args:
        dataset: rows.
        image_size: R.
        random_views: how many augmented views (DALL·E Listing 2) of each; None takes the central one.
        seed: of the augmented ones.
    """

    def __init__(self, dataset: PairDataset, image_size: int, random_views: int | None, seed: int) -> None:
        self._dataset = dataset
        self._image_size = image_size
        self._random_views = random_views
        self._seed = seed
        self.views = random_views or 1
        """Views of each row."""

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> tuple[Tensor, bool]:
        size = self._image_size
        try:
            pixels = self._dataset.picture(row, useful_short_side(size))
        except DataError:
            return torch.zeros(self.views, 3, size, size, dtype=torch.uint8), False
        if self._random_views is None:
            views = [center_crop_resize(pixels, size)]
        else:
            views = [augment_for_transformer(pixels, size, self._rng(row, view)) for view in range(self.views)]
        return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2), True

    def _rng(self, row: int, view: int) -> np.random.Generator:
        return np.random.default_rng(hash_integers(self._seed, row, view))


def collate(rows: list[tuple[Tensor, bool]]) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """((rows, views, 3, R, R) uint8, (rows,) whether the picture could be read)."""
    return torch.stack([views for views, _ in rows]), np.array([readable for _, readable in rows])
