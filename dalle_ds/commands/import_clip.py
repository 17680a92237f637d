"""Import a CLIP that others published: its file or folder becomes an exported model, with none of its code run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from dalle_ds.cli import parse_options


@dataclass(frozen=True)
class Options:
    """Make an exported CLIP, as launchers/train_clip.py does, of OpenAI's, Hugging Face's or open_clip's files."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """OpenAI's file, such as ViT-B-32.pt, a training program's checkpoint, or a folder of a Hugging Face CLIPModel or of
    open_clip."""
    out: str
    """Folder to write; give it as --clip to other launchers."""
    format: Literal["auto", "openai", "hf", "open_clip"] = "auto"
    """Whose layout it has; auto goes by the names of files, and takes a file with no configuration beside for OpenAI's."""
    tokenizer: str | None = None
    """Its tokenizer: bpe_simple_vocab_16e6.txt.gz for OpenAI's models. None takes the one in the folder, if any."""
    activation: Literal["quick_gelu", "gelu"] | None = None
    """Of the MLPs. None takes what the folder says, and quick_gelu for a single file, as OpenAI's models have; one of
    open_clip's needs gelu, unless its model's name says quickgelu."""


def main() -> None:
    """Parse, import."""
    options = parse_options(Options)
    # Imported once the options are read, so that --help and mistakes in them are quick.
    from dalle_ds.interop import import_clip

    model = import_clip(
        options.source, options.out, options.format, tokenizer=options.tokenizer, activation=options.activation
    )
    config = model.config
    print(
        f"{options.out}: a CLIP of {config.image_size}-pixel images in patches of {config.patch_size}, {config.embed_dim} "
        f"dimensions, {config.activation}, fingerprint {model.fingerprint[:12]}"
    )
    if model.tokenizer is None:
        print("it has no tokenizer, and can embed images but no captions: give --tokenizer")
