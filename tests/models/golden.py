"""Trains a transformer of the demo's size in fp32 on images made of numbers, and prints the losses.

`golden_losses.json` holds what this printed before the sparse kernels and the chunked cross-entropy existed, when the model
was dense attention under a mask and whole logits: python -m tests.models.golden > tests/models/golden_losses.json
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from dalle_ds.config import DalleConfig, OptimConfig
from dalle_ds.models.dalle import Dalle
from dalle_ds.optim import decay_groups

STEPS = 50
BATCH = 8
MODEL = DalleConfig(width=192, depth=6, heads=3, text_len=32, grid=8, text_vocab=8192, image_vocab=256)
OPTIM = OptimConfig(lr=2e-3)


def batch(config: DalleConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Captions of random lengths, and codes that depend on the first words and on their place: something to learn."""
    words = torch.randint(0, 40, (BATCH, config.text_len), generator=generator)
    lengths = torch.randint(2, config.text_len + 1, (BATCH, 1), generator=generator)
    text = words.masked_fill(torch.arange(config.text_len) >= lengths, -1)
    place = torch.arange(config.image_len)
    noise = torch.randint(0, 3, (BATCH, config.image_len), generator=generator)
    codes = (words[:, :1] % 4 * 60 + place // config.grid * 3 + noise) % config.image_vocab
    return text, codes


def losses(**options: object) -> list[dict[str, float]]:
    """Text and image loss of every update; `options` go to the model's forward pass."""
    torch.manual_seed(0)
    model = Dalle(MODEL)
    optimizer = torch.optim.AdamW(
        decay_groups(model, OPTIM.weight_decay), lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps
    )
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(STEPS):
        out = model(*batch(MODEL, generator), **options)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()
        history.append({"text_loss": out.text_loss.item(), "image_loss": out.image_loss.item()})
    return history


if __name__ == "__main__":
    print(json.dumps(losses(), indent=1))
