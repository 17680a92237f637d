"""Train the text tokenizer on the captions of a prepared data's train split."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import train_tokenizer

if __name__ == "__main__":
    run_launcher(train_tokenizer)
