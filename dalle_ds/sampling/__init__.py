"""Generating images from captions, choosing among them, completing and changing them.

Over its size, since both DALL·E and unCLIP are sampled from here, and each way to change an image adds some.
"""

from dalle_ds.sampling.candidates import ClipReranker, Ranking, Reranker, rank_candidates
from dalle_ds.sampling.codes import Progress, Sampling, SamplingRequest, sample_codes, score
from dalle_ds.sampling.completion import default_rows, kept_rows_mask
from dalle_ds.sampling.grid import image_grid
from dalle_ds.sampling.pipeline import TextToImage
from dalle_ds.sampling.unclip import Unclip, UnclipSampling

__all__ = [
    "ClipReranker",
    "Progress",
    "Ranking",
    "Reranker",
    "Sampling",
    "SamplingRequest",
    "TextToImage",
    "Unclip",
    "UnclipSampling",
    "default_rows",
    "image_grid",
    "kept_rows_mask",
    "rank_candidates",
    "sample_codes",
    "score",
]
