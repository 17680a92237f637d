"""Measuring what trained models can do.

- `run`: an evaluation from its options to its result. Begin here
- `of_dvae`, `of_transformer`, `of_pictures`: its parts, each of whose model is given; `context` is what they share
- `folders`: two folders of pictures instead
- `metrics/`: distances, scores, likelihoods, retrieval, the codebook
- `candidates`: pictures drawn for captions, kept on disk; the best of n
- `sets`, `dealing`: which rows and captions, and how they are dealt out to processes
- `results`, `page`: what is written, compared and shown
- `overlap/`: validation pictures that are in the training data
- `study/`: people's choices between models
- `report`, `curves`: the page of a finished pair of runs
"""
