"""Measuring what trained models can do.

- `run`: an evaluation from its options to its result. Begin here
- `of_dvae`, `of_transformer`, `of_pictures`: its parts, each of whose model is given; `context` is what they share
- `folders`: two folders of pictures instead
- `statistics`: Fréchet distance (FID), Inception Score, and the sums over processes that they need
- `features`, `inception`: networks whose features are compared; `blur` comes before them, `appearance` puts all together
- `matching`: CLIP score and retrieval
- `candidates`: pictures drawn for captions, kept on disk; the best of n
- `likelihood`: nats, and bits per dimension
- `reconstruction`, `codebook`: PSNR, SSIM; use of the codes, and what they look like
- `sets`, `dealing`: which rows and captions, and how they are dealt out to processes
- `results`, `page`: what is written, compared and shown
- `overlap`: validation pictures that are in the training data
- `study`, `study_votes`: people's choices between models
- `report`, `curves`, `ranking`: the page of a finished pair of runs
"""
