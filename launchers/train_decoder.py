"""Train unCLIP's decoder, on images and their CLIP embeddings."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import train_decoder

if __name__ == "__main__":
    run_launcher(train_decoder)
