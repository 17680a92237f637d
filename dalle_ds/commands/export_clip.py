"""Export a CLIP for other programs: OpenAI's clip, Hugging Face's transformers, open_clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle_ds.cli import parse_options


@dataclass(frozen=True)
class Options:
    """Write a CLIP, trained or imported, in the layout of another program."""

    model: str
    """Its run directory or export."""
    format: Literal["openai", "hf", "open_clip"]
    """Whose layout: openai is a state dict for clip/model.py, hf a folder of transformers, open_clip one of open_clip."""
    out: str
    """New folder to write."""


def main() -> None:
    """Parse, export."""
    options = parse_options(Options)
    # Imported once the options are read, so that --help and mistakes in them are quick.
    from dalle_ds.interop import export_clip
    from dalle_ds.models import Clip
    from dalle_ds.text.clip_tokenizer import BytePairs

    model = Clip.from_pretrained(options.model)
    export_clip(model, options.out, options.format)
    print(f"{options.out}: fingerprint {model.fingerprint[:12]}, in the layout of {options.format}")
    if model.tokenizer is not None and not isinstance(model.tokenizer.pieces, BytePairs):
        print("its tokenizer is one of sentencepiece, which programs for CLIP do not know: make tokens with dalle_ds")
