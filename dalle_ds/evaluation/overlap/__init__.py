"""Which validation pictures are in the training data (DALL·E §3.1, after CLIP App. C).

`embeddings` embeds both sets with a CLIP or by perceptual hashes, `neighbours` finds the most similar training picture of each
validation picture, `page` shows pairs to a person, who chooses the threshold by eye, and `search` does it all.
"""

from dalle_ds.evaluation.overlap.search import OverlapOptions, find_overlap

__all__ = ["OverlapOptions", "find_overlap"]
