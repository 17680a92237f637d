"""From corpora of captioned images to batches.

| preparing, once | |
|---|---|
| `command` | the command line of all of it |
| `corpora/` | readers: pairs of image and captions, and what is none |
| `processing`, `filters`, `boilerplate` | a pair by itself: cleaned, judged, decoded once |
| `parts`, `prepare_on_ray` | the work in parts: in one process, as jobs, on a Ray cluster |
| `dedup`, `splits` | a pair among all others |
| `prepare`, `report`, `reasons` | all of it in order, and the account of it |
| **reading, at every stage** | |
| `store`, `store_writer`, `snapshot` | rows in Arrow files, verified: images with captions, and vectors of fixed width |
| `dataset`, `images` | a prepared folder; an image from bytes |
| `codes` | a dVAE's codes of images, kept in the same store |
| `augment`, `samples` | views of images; arrays that a stage trains on |
| `order`, `loader`, `workers` | which rows make up which batch, of one corpus or several, read by whom |
| `faults` | what cannot be read while training |

The package is larger than others because a corpus is read as its owner has it (nine kinds, damaged ones included) and every
loss is told.
"""

from dalle_ds.data.codes import CodesCache
from dalle_ds.data.dataset import PairDataset
from dalle_ds.data.loader import BatchLoader, evaluation_batches
from dalle_ds.data.order import Mixture
from dalle_ds.data.samples import ClipSamples, DvaeSamples, EmbeddingSamples, TextImageSamples, UpsamplerSamples

__all__ = [
    "BatchLoader",
    "ClipSamples",
    "CodesCache",
    "DvaeSamples",
    "EmbeddingSamples",
    "Mixture",
    "PairDataset",
    "TextImageSamples",
    "UpsamplerSamples",
    "evaluation_batches",
]
