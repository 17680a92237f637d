"""Import the dVAE that OpenAI released: encoder.pkl and decoder.pkl become an exported model, with none of their code run."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_ds.cli import parse_options


@dataclass(frozen=True)
class Options:
    """Make an exported dVAE, as launchers/train_dvae.py does, of the two files that OpenAI published."""

    encoder: str
    """OpenAI's encoder.pkl."""
    decoder: str
    """OpenAI's decoder.pkl."""
    out: str
    """Folder to write; give it as --dvae to other launchers."""
    image_size: int = 256
    """Side in pixels of the square images that it is used for; codes have an eighth of it on each side."""


def main() -> None:
    """Parse, import."""
    options = parse_options(Options)
    # Imported once the options are read, so that --help and mistakes in them are quick.
    from dalle_ds.interop import import_openai_dvae

    model = import_openai_dvae(options.encoder, options.decoder, options.out, options.image_size)
    print(f"{options.out}: a dVAE of {model.config.vocab_size:,} codes, fingerprint {model.fingerprint[:12]}")
