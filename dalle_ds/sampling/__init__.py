"""Drawing pictures from captions."""

from dalle_ds.sampling.codes import Progress, sample_codes, score
from dalle_ds.sampling.draw import Sampling
from dalle_ds.sampling.grid import picture_grid
from dalle_ds.sampling.pipeline import Reranker, TextToImage

__all__ = ["Progress", "Reranker", "Sampling", "TextToImage", "picture_grid", "sample_codes", "score"]
