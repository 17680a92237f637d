"""From corpora of captioned images to batches.

Preparing, once: `corpora` reads pairs, `examine` judges each by itself and `prepare` among all others (`filters`), divides
(`splits`) and writes the folder that every later stage takes as `--data`; `parts` shares the work among jobs, `engine` among
the machines of a Ray cluster, and `command` is all of it at the command line. Training:
`dataset` reads that folder, whose rows are in a `store`, `augment` makes views, `samples` turns a row into arrays, `mixture`
makes one of several corpora, `order` and `loader` decide which rows make up which batch, `workers` are the loader's processes.
`features` keeps in the same store what a model computes of images, above all `codes`. `faults` counts what cannot be read,
`inspection` reads everything.
"""

from dalle_ds.data.codes import CodesCache
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.loader import BatchLoader, evaluation_batches
from dalle_ds.data.mixture import Mixture
from dalle_ds.data.samples import ClipSamples, DvaeSamples, TextImageSamples

__all__ = [
    "BatchLoader",
    "ClipSamples",
    "CodesCache",
    "DvaeSamples",
    "Mixture",
    "PairDataset",
    "TextImageSamples",
    "evaluation_batches",
]
