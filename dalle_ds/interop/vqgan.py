"""VQGAN and Gumbel-VQ of taming-transformers as a model of ours that stands in for the dVAE.

Checkpoints are Lightning's, or a state dict. All of the shape is in the weights, so that taming's YAML file is not read; what
only its training needs, `loss.*` (discriminator, LPIPS), is left out.

The transformers that others trained on such codes are not read, since `Dalle` cannot hold them. minDALL-E has a vector of its
own for each image position, which no sum of a row's and a column's is, and no start of the image; ru-DALL·E has CogView's
layer normalization at the end of each residual branch, and one output layer for text and image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_ds.config import VqganConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.interop.clip_import import read_weights
from dalle_ds.interop.clip_layouts import unwrapped
from dalle_ds.interop.openai_dvae import described, exported
from dalle_ds.models.pretrained import loaded
from dalle_ds.models.vqgan import Vqgan

VQGAN_MARK = "encoder.conv_in.weight"
TRAINING_ONLY = "loss."
"""How the names of the tensors begin that only training needs."""


def load_vqgan(checkpoint: str | Path, image_size: int = 256) -> Vqgan:
    """The VQGAN or Gumbel-VQ of a checkpoint of taming-transformers; in eval mode, in fp32, on the CPU.

    Args:
        checkpoint: Lightning's `last.ckpt`, a state dict of `torch.save`, or a safetensors file.
        image_size: side of the images that it is used for; the file does not say it, and it changes no weight.

    Raises:
        CheckpointError: a file that cannot be read, is not trusted, or is of another model.
        ConfigError: an image size that does not fit the model.
    """
    file = Path(checkpoint)
    found = unwrapped(read_weights(file), VQGAN_MARK, str(file))
    weights = {name: value for name, value in found.items() if not name.startswith(TRAINING_ONLY)}
    config = replace(config_of_vqgan(weights, str(file)), image_size=image_size)
    wrong = next((name for name, value in weights.items() if not value.is_floating_point()), None)
    if wrong is not None:
        raise CheckpointError(f"{file} is no VQGAN: its {wrong[:100]!r} is of {weights[wrong].dtype}")
    return loaded(lambda: Vqgan(config), config, weights, file)


def import_vqgan(checkpoint: str | Path, out: str | Path, image_size: int = 256) -> Vqgan:
    """`load_vqgan`, exported to folder `out`, with the checkpoint's SHA-256 in `source.json` beside the weights.

    Raises:
        CheckpointError: as `load_vqgan`, or the folder cannot be written.
        ConfigError: as `load_vqgan`, or `out` is there already, and is something else than an imported model.
    """

    def make() -> tuple[Vqgan, dict[str, Any]]:
        return load_vqgan(checkpoint, image_size), {"vqgan": described(Path(checkpoint))}

    return exported(make, out)


def config_of_vqgan(weights: Mapping[str, Tensor], where: str) -> VqganConfig:
    """The shape of the VQGAN that has these tensors, for the smallest images.

    Raises:
        CheckpointError: a tensor is missing, or the shapes make no VQGAN.
    """

    def sizes(name: str, dimensions: int = 4) -> tuple[int, ...]:
        found = tuple(weights[name].shape) if name in weights else None
        if found is None or len(found) != dimensions or 0 in found:
            has = ", ".join(sorted(weights)[:3])
            raise CheckpointError(
                f"{where} is no VQGAN of taming's layout: its {name} has shape {found}; it has {has} …"
            )
        return found

    def numbers(pattern: str) -> list[int]:
        """The numbers for which there are tensors whose names begin so."""
        return sorted({int(match[1]) for name in weights if (match := re.match(pattern, name))})

    width = sizes(VQGAN_MARK)[0]
    levels = numbers(r"encoder\.down\.(\d{1,3})\.")
    embed_dim, latent_channels = sizes("quant_conv.weight")[:2]
    gumbel = "quantize.proj.weight" in weights
    try:
        return VqganConfig(
            image_size=2 ** max(len(levels) - 1, 0),
            width=width,
            multipliers=tuple(sizes(f"encoder.down.{level}.block.0.conv1.weight")[0] // width for level in levels),
            blocks_per_level=len(numbers(r"encoder\.down\.0\.block\.(\d{1,3})\.")),
            attention_levels=tuple(numbers(r"encoder\.down\.(\d{1,3})\.attn\.")),
            latent_channels=latent_channels,
            embed_dim=embed_dim,
            vocab_size=sizes("quantize.embed.weight" if gumbel else "quantize.embedding.weight", 2)[0],
            gumbel=gumbel,
        )
    except ConfigError as error:
        raise CheckpointError(f"{where} is no VQGAN that can be read: {error}") from error
