"""Image codes computed once: a transformer that reads them needs neither images nor a dVAE while it trains.

`DATA/codes/<first 16 digits of the dVAE's fingerprint>/`, or for data that cannot be written a folder of the fingerprints of
data and dVAE elsewhere, is a cache as `features` has it. The training split has several views of each image, augmented as
DALL·E Listing 2 does; other splits have the central one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dalle_ds.data.features import FeatureCache, FeatureReport

if TYPE_CHECKING:
    from dalle_ds.models import DiscreteVAE


class CodesCache(FeatureCache):
    """Cached codes of one split."""

    name = "codes"
    model = "dvae_fingerprint"
    option = "--cache_codes DVAE"
    out_option = "--codes_out"

    @property
    def grid(self) -> tuple[int, ...]:
        """(h, w) of the codes."""
        return self.shape

    def codes(self, row: int, view: int) -> npt.NDArray[np.int64]:
        """(h·w,) codes of one view of a row's image; raises as `features`."""
        return self.features(row, view).astype(np.int64).reshape(-1)


def cache_codes(
    dvae: DiscreteVAE,
    data_dir: str | Path,
    *,
    views: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    overwrite: bool = False,
    codes_dir: str | Path | None = None,
) -> FeatureReport:
    """`FeatureCache.write` of a dVAE's codes, `codes_dir` being `elsewhere`; the dVAE is moved to the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dvae.to(device)

    @torch.inference_mode()
    def encode(images: Tensor) -> Tensor:
        codes = dvae.encode(images.to(device).float() / 255)
        assert codes.min() >= 0 and codes.max() < dvae.config.vocab_size, "codes outside the dVAE's vocabulary"
        return codes

    return CodesCache.write(
        encode,
        data_dir,
        fingerprint=dvae.fingerprint,
        image_size=dvae.config.image_size,
        dtype=code_dtype(dvae.config.vocab_size),
        views=views,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        overwrite=overwrite,
        elsewhere=codes_dir,
    )


def code_dtype(vocab_size: int) -> str:
    """As narrow a type as holds codes below `vocab_size`."""
    return "<u2" if vocab_size <= 2**16 else "<u4"
