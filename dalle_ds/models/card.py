"""Model cards: the README.md of an exported model, as the Hugging Face Hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dalle_ds.files import write_text

CARD_NAME = "README.md"
_TEXT_TO_IMAGE = 'images = model.generate(["a red circle"], num=1)'
# Of each kind: what it is; its class; a line that uses it.
_KINDS = {
    "dvae": ("a discrete VAE (DALL·E §2.1)", "models", "DiscreteVAE", ""),
    "transformer": ("a text-image transformer, with its dVAE (DALL·E §2.2)", "sampling", "TextToImage", _TEXT_TO_IMAGE),
    "clip": ("a CLIP", "models", "Clip", 'embeddings = model.embed_texts(["a red circle"])'),
    "prior": (
        "a diffusion prior of CLIP's image embeddings (unCLIP §2.2)",
        "sampling.text_to_embedding",
        "TextToEmbedding",
        'embeddings = model.sample(["a red circle"])',
    ),
    "latent_prior": (
        "an autoregressive prior of CLIP's image embeddings (unCLIP §2.2)",
        "sampling.text_to_embedding",
        "TextToEmbedding",
        'embeddings = model.sample(["a red circle"])',
    ),
    "decoder": (
        "a decoder of CLIP's image embeddings (unCLIP §2.1)",
        "sampling.embedding_to_image",
        "EmbeddingToImage",
        'images = model.sample(["a red circle"], None)  # embeddings, or of the caption alone',
    ),
    "upsampler": ("an upsampler of images (unCLIP §2.1)", "sampling.super_resolution", "SuperResolution", ""),
    "unclip": ("an unCLIP, DALL·E 2: prior, decoder, upsamplers", "sampling.unclip", "Unclip", _TEXT_TO_IMAGE),
}


def write_card(
    folder: Path,
    kind: str,
    sections: Mapping[str, str] | None = None,
    *,
    tags: tuple[str, ...] = (),
    validation: Mapping[str, float] | None = None,
    data: str = "",
) -> None:
    """Write an exported model's card into its folder; OSError where that fails.

    Args:
        kind: of `config.json`, or "unclip".
        sections: more of Markdown, by heading.
        validation: metrics of the split "validation" of `data`.
    """
    from huggingface_hub import EvalResult, ModelCardData

    what, module, name, use = _KINDS[kind]
    makes_images = kind in ("transformer", "decoder", "unclip")
    results = [
        EvalResult("text-to-image", "folder", data, metric, round(value, 6), dataset_split="validation")
        for metric, value in (validation or {}).items()
    ]
    matter = ModelCardData(
        library_name="dalle_ds",
        pipeline_tag="text-to-image" if makes_images else None,
        tags=["dalle_ds", kind, *tags],
        model_name=f"{kind} of {data}" if results else None,
        eval_results=results or None,
    )
    lines = [f"from dalle_ds.{module} import {name}", "", f'model = {name}.from_pretrained(".")  # this folder', use]
    load = "\n".join(lines).rstrip()
    body = {"How to load": f"```python\n{load}\n```", **(sections or {})}
    text = "\n\n".join(f"## {heading}\n\n{content}" for heading, content in body.items())
    write_text(
        folder / CARD_NAME, f"---\n{matter.to_yaml()}\n---\n\n# {kind}\n\nThis is {what}, by dalle_ds.\n\n{text}\n"
    )
