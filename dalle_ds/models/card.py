"""Model cards: the README.md of an exported model, as the Hugging Face Hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dalle_ds.files import write_text

CARD_NAME = "README.md"
_IMAGES = 'images = model.generate(["a red circle"], num=1)'
_PRIOR = (
    "feature-extraction",
    "sampling.text_to_embedding",
    "TextToEmbedding",
    'embeddings = model.sample(["a red circle"])',
)
_DECODE = 'images = model.sample(["a red circle"], None)  # embeddings; None: of the caption alone'
# Of each kind: what it is; its task on the Hub; its class; a line that uses it.
_KINDS = {
    "dvae": ("a discrete VAE (DALL·E §2.1)", "image-to-image", "models", "DiscreteVAE", ""),
    "transformer": (
        "a text-image transformer, with its dVAE (DALL·E §2.2)", "text-to-image", "sampling", "TextToImage", _IMAGES,
    ),
    "clip": (
        "a CLIP", "zero-shot-image-classification", "models", "Clip", 'embeddings = model.embed_texts(["a red circle"])',
    ),
    "prior": ("a diffusion prior of CLIP's image embeddings (unCLIP §2.2)", *_PRIOR),
    "latent_prior": ("an autoregressive prior of CLIP's image embeddings (unCLIP §2.2)", *_PRIOR),
    "decoder": (
        "a decoder of CLIP's image embeddings (unCLIP §2.1)", "text-to-image", "sampling.embedding_to_image",
        "EmbeddingToImage", _DECODE,
    ),
    "upsampler": (
        "an upsampler of images (unCLIP §2.1)", "image-to-image", "sampling.super_resolution", "SuperResolution", "",
    ),
    "unclip": (
        "an unCLIP, DALL·E 2: prior, decoder, upsamplers", "text-to-image", "sampling.unclip", "Unclip", _IMAGES,
    ),
}  # fmt: skip


def write_card(
    folder: Path,
    kind: str,
    sections: Mapping[str, str] | None = None,
    *,
    tags: tuple[str, ...] = (),
    validation: Mapping[str, float] | None = None,
    data: str = "",
    library: str = "dalle_ds",
    load: str = "",
) -> None:
    """Write an exported model's card into its folder; OSError where that fails.

    Args:
        kind: of `config.json`, or "unclip".
        sections: more of Markdown, by heading.
        validation: metrics of the split "validation" of `data`.
        library: that loads the model.
        load: lines of Python that do; by default those of dalle_ds.
    """
    from huggingface_hub import EvalResult, ModelCardData

    what, task, module, name, use = _KINDS[kind]
    results = [
        EvalResult(task, "folder", data, metric, round(value, 6), dataset_split="validation")
        for metric, value in (validation or {}).items()
    ]
    matter = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=["dalle_ds", kind, *tags],
        model_name=f"{kind} of {data}" if results else None,
        eval_results=results or None,
    )
    lines = [f"from dalle_ds.{module} import {name}", "", f'model = {name}.from_pretrained(".")  # this folder', use]
    load = load or "\n".join(lines).rstrip()
    body = {"How to load": f"```python\n{load}\n```", **(sections or {})}
    text = "\n\n".join(f"## {heading}\n\n{content}" for heading, content in body.items())
    write_text(
        folder / CARD_NAME, f"---\n{matter.to_yaml()}\n---\n\n# {kind}\n\nThis is {what}, by dalle_ds.\n\n{text}\n"
    )


def append_card(folder: Path, name: str, card: str) -> None:
    """Tell at the end of a model's card what that of a stage of it says, but for how to load the stage alone."""
    whole = folder / CARD_NAME
    _, *sections = card.split("\n## ")
    told = [f"### {section.strip()}" for section in sections if not section.startswith("How to load\n")]
    write_text(whole, "\n\n".join([whole.read_text(encoding="utf-8").rstrip(), f"## {name}", *told]) + "\n")
