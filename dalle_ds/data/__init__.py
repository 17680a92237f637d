"""From corpora of captioned pictures to batches.

Preparing, once: `corpora` reads pairs, `filters` drops and cleans them, `splits` divides them, `prepare` writes the
folder that every later stage takes as `--data`. Training: `dataset` reads that folder, `augment` makes views, `samples`
turns a row into arrays, `order` and `loader` decide which rows make up which batch. `codes` keeps image codes.
"""

from dalle_ds.data.codes import CodesCache
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.loader import BatchLoader, evaluation_batches
from dalle_ds.data.samples import DvaeSamples, TextImageSamples

__all__ = ["BatchLoader", "CodesCache", "DvaeSamples", "PairDataset", "TextImageSamples", "evaluation_batches"]
