"""Train a prior: from captions to CLIP's image embeddings, by diffusion or code by code."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import train_prior

if __name__ == "__main__":
    run_launcher(train_prior)
