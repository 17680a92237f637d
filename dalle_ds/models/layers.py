"""Leaf layers of the transformer, each of which draws its own initial weights in its constructor.

That place is not a matter of taste: under ZeRO-3 a parameter is split over the processes as soon as the constructor of
its module returns, so nothing can initialize a finished model. All draws come from torch's global generator, which the
trainer seeds.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.models.cross_entropy import linear_cross_entropy
from dalle_ds.precision import BranchPrecision, branch_linear


class Linear(nn.Linear):
    """A linear layer with weights from a normal distribution of standard deviation scale / sqrt(3 · inputs), biases 0.

    At GPT-2's width of 768 that is GPT-2's 0.02; at others it keeps the size of the outputs.
    """

    precision: BranchPrecision | None = None
    """How to compute inside a residual block with a gradient scale; None computes in the dtype of the weights."""

    def __init__(self, inputs: int, outputs: int, *, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        nn.init.normal_(self.weight, std=scale * (3 * inputs) ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        if self.precision is not None:
            return branch_linear(input, self.weight, self.bias, self.precision)
        return F.linear(input, self.weight, self.bias)


class Unembedding(Linear):
    """Logits of a vocabulary, fp32 whatever the dtype of the weights (DALL·E App. D, guideline 2)."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """(…, inputs) → (…, outputs), multiplied out in fp32; given targets (…), their `linear_cross_entropy` instead."""
        with _without_autocast(input.device.type):  # would make logits 16-bit
            if targets is not None:
                return linear_cross_entropy(input.flatten(0, -2), self.weight, self.bias, targets.flatten())
            return F.linear(input.float(), self.weight.float(), self.bias.float())


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class Embedding(nn.Embedding):
    """An embedding table with weights from a normal distribution of standard deviation 0.02, as in GPT-2."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        nn.init.normal_(self.weight, std=0.02)


class LayerNorm(nn.LayerNorm):
    """Layer normalization of the fp32 residual stream, whatever the dtype of its gain and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last axis of `input`, fp32 → fp32."""
        return F.layer_norm(input, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
