"""Train the text tokenizer on the captions of a prepared data's train split."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_ds.cli import parse_options
from dalle_ds.config import load_preset
from dalle_ds.text.tokenizer import Tokenizer, TokenizerConfig


@dataclass(frozen=True)
class Options:
    """Train the byte-pair encoding of captions (DALL·E §2.2)."""

    data: tuple[str, ...]
    """Folders that launchers/prepare_data.py made; the captions of their train splits are used."""
    out: str
    """Model file to write, in sentencepiece's format."""
    vocab_size: int | None = None
    """Most pieces in the vocabulary; None takes the preset's, or 16,384 without one. A small corpus supports fewer."""
    preset: str | None = None
    """Preset whose tokenizer section gives vocab_size."""


def main() -> None:
    options = parse_options(Options)
    config = load_preset(options.preset, "tokenizer", TokenizerConfig) if options.preset else TokenizerConfig()
    if options.vocab_size is not None:
        config = TokenizerConfig(options.vocab_size)
    # Imported once the options are read, so that --help and mistakes in them are quick.
    from dalle_ds.data.dataset import PairDataset
    from dalle_ds.data.faults import FaultLog

    faults = FaultLog()
    corpora = [PairDataset.open(folder, "train") for folder in options.data]
    captions = (caption for pairs in corpora for caption in pairs.all_captions(faults))
    report = Tokenizer.train(captions, options.out, config.vocab_size)
    print(f"{options.out}: {report}")
    if left_out := faults.left_out():
        print(left_out)
