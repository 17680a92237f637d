"""Measuring what trained models can do. It is large since every figure is defined here exactly: sums over processes,
distances of rank-deficient sets, likelihoods of 8-bit images, a search that can be stopped, votes that can be checked.

- `evaluate`: an evaluation from its options to its result (`results`). Begin here
- `measure`: its parts, each of whose model is given
- `metrics`: reconstruction, use of the codebook, likelihood, match with captions
- `frechet`: Fréchet distance and Inception Score, in the features of a network (`features`)
- `candidates`: images generated for captions, kept on disk; the best of n
- `priors`: sampled image embeddings against true ones
- `sets`: which rows and captions, and how processes share them out
- `overlap`, `embeddings`: validation images that are in the training data
- `study`: people's choices between models
- `report`, `curves`: the page of a finished pair of runs; `pages` writes all pages
"""
