"""The duplicate detector: pictures → embeddings in which copies of one picture are close (CLIP App. C).

A ResNet of bottleneck blocks with what CLIP's authors changed: anti-aliased changes of resolution (Zhang, 2019), weight norm
in place of batch norm (Salimans and Kingma, 2016), so that no picture of a batch learns anything of the others, and GELU.

Without normalization, the start must see to it that signals neither grow nor vanish with depth (Arpit et al., 2019): filters
have norm 1, times what GELU takes away, which keeps the second moment from layer to layer; the last filters of each residual
branch have 1/√blocks besides, so that all branches together add about as much as there was. But GELU's outputs have a mean,
which all pictures share: embeddings would begin almost parallel. So training begins with `fit_start`, which takes the means
away and sets the sizes on some pictures (Salimans and Kingma, §3). Activations stand before convolutions, inside the
branches: on the stream itself, GELU would shrink it at every block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config.overlap import DuplicateDetectorConfig
from dalle_ds.models.clip_pixels import check_images, square_pixels
from dalle_ds.models.pretrained import check_shapes, fingerprint, load_model, load_weights, save_model

EXPANSION = 4
"""A bottleneck block's outer channels over its inner ones."""
# 1 / √E[GELU(z)²] for a standard normal z.
_AFTER_GELU = 1.5335


class WeightNorm(nn.Module):
    """Filters as direction times length: w = g · v / ‖v‖ for each output channel, computed in fp32.

    A plain module with two parameters, since parametrizations of torch compute weights outside of the `forward` for which
    ZeRO-3 gathers them.

    Args:
        kernel: 0 for a linear layer, else the side of a convolution's kernel.
        gain: length of the filters at the start.
        spread: standard deviation of the outputs after `fit_start`.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, gain: float = 1.0, spread: float = 1.0
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.spread = spread
        self.g = nn.Parameter(torch.full((channels_out,), gain))
        self.v = nn.Parameter(torch.empty(channels_out, channels_in, *[kernel] * 2 if kernel else []))
        self.b = nn.Parameter(torch.zeros(channels_out))
        nn.init.normal_(self.v, std=1 / math.sqrt(self.v[0].numel()))

    def fit_start(self, x: Tensor) -> None:
        """Set g and b so that every output channel has mean 0 and standard deviation `spread` over these inputs.

        What is set keeps 8 bits only: processes that each do this begin alike, although their machines may round otherwise.
        """
        with torch.no_grad():
            self.g.fill_(1.0)
            self.b.zero_()
            channels = self.forward(x).float().movedim(1, 0).flatten(1)
            length = self.spread / channels.std(dim=1).clamp_min(1e-2)
            self.g.copy_(length.bfloat16())
            self.b.copy_((-length * channels.mean(dim=1)).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) → (B, channels_out, H, W), or (B, channels_in) → (B, channels_out)."""
        v = self.v.float()
        length = v.flatten(1).norm(dim=1).clamp_min(1e-12)
        weight = (v * (self.g.float() / length).view(-1, *[1] * (v.ndim - 1))).to(self.v.dtype)
        if self.kernel:
            return F.conv2d(x.to(weight.dtype), weight, self.b, padding=self.kernel // 2)
        return F.linear(x.to(weight.dtype), weight, self.b)


def blurred_half(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, C, H/2, W/2) for even H and W: every second of what [1, 2, 1]/4 blurs along both axes.

    The borders are mirrored. What is halved without a blur first changes when the picture moves by a pixel (Zhang, 2019).
    """
    for axis in (2, 3):
        even, odd = x.unfold(axis, 2, 2).unbind(-1)
        before = torch.cat([odd.narrow(axis, 0, 1), odd.narrow(axis, 0, odd.shape[axis] - 1)], dim=axis)
        x = even / 2 + (before + odd) / 4
    return x


class Bottleneck(nn.Module):
    """`shortcut(x) + branch(x)`: 1×1, 3×3 and 1×1 convolutions, a GELU before each; the resolution is halved after the 3×3.

    Args:
        inner: channels of the 3×3 convolution; EXPANSION times as many come out.
        gain: what the branch's last filters are scaled by at the start.
    """

    def __init__(self, channels_in: int, inner: int, halves: bool, gain: float) -> None:
        super().__init__()
        outer = EXPANSION * inner
        self.halves = halves
        self.narrow = WeightNorm(channels_in, inner, 1, _AFTER_GELU)
        self.spread = WeightNorm(inner, inner, 3, _AFTER_GELU)
        self.widen = WeightNorm(inner, outer, 1, _AFTER_GELU * gain, spread=gain)
        self.shortcut = WeightNorm(channels_in, outer, 1) if channels_in != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) → (B, outer, H, W) or half of that size, fp32."""
        hidden = self.spread(F.gelu(self.narrow(F.gelu(x))))
        if self.halves:
            hidden, x = blurred_half(hidden), blurred_half(x)
        # The stream is fp32, as the dVAE's: bf16 would round away small additions to it.
        return self.shortcut(x).float() + self.widen(F.gelu(hidden)).float()


class DuplicateDetector(nn.Module):
    """Pictures → normalized embeddings; the cosine similarity of two is greater, the surer they are copies of one.

    Example:
        >>> detector = DuplicateDetector.from_pretrained("runs/duplicates")
        >>> similarity = detector.embed_images(images) @ detector.embed_images(others).T
    """

    def __init__(self, config: DuplicateDetectorConfig) -> None:
        super().__init__()
        self.config = config
        gain = 1 / math.sqrt(sum(config.blocks))
        channels = config.width
        # A kernel of 7 sees much of a small picture at once; so does one of 3 where nothing has been halved.
        self.stem = WeightNorm(3, channels, 7 if config.stem_halvings else 3)
        blocks: list[nn.Module] = []
        for stage, count in enumerate(config.blocks):
            inner = config.width * 2**stage
            for number in range(count):
                blocks.append(Bottleneck(channels, inner, halves=stage > 0 and number == 0, gain=gain))
                channels = EXPANSION * inner
        self.blocks = nn.Sequential(*blocks)
        self.head = WeightNorm(channels, config.embed_dim, 0, _AFTER_GELU)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) pictures in [0, 1], S = config.image_size → (B, embed_dim) fp32 embeddings of length 1."""
        check_images(images, self.config.image_size)
        return F.normalize(self._features(images), dim=1)

    def _features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] → (B, embed_dim) fp32, of any length."""
        x = self.stem((images.float() * 4 - 2).contiguous(memory_format=torch.channels_last))
        for number in range(self.config.stem_halvings):
            if number > 0:  # ResNet's max-pooling, which comes after its first convolution has halved
                x = F.max_pool2d(x, 3, stride=1, padding=1)
            x = blurred_half(x)
        x = F.gelu(self.blocks(x)).mean(dim=(2, 3))
        return self.head(x).float()

    def fit_start(self, images: Tensor) -> None:
        """Set all g and b so that each layer's outputs have mean 0 and variance 1 over these pictures, and those of residual
        branches 1/blocks. Weights must be whole.

        Args:
            images: (B, 3, S, S) in [0, 1]; some dozens.
        """
        layers = [module for module in self.modules() if isinstance(module, WeightNorm)]
        hooks = [layer.register_forward_pre_hook(lambda layer, inputs: layer.fit_start(inputs[0])) for layer in layers]
        with torch.no_grad():
            self(images)
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def embed_images(self, images: Tensor | Sequence[Image.Image], *, normalize: bool = True) -> Tensor:
        """Embeddings of pictures of any size: their central squares, resized to image_size.

        Args:
            images: (B, 3, H, W) floats in [0, 1], or a list of PIL images.
            normalize: to length 1.

        Returns:
            (B, embed_dim) fp32, on the model's device.

        Raises:
            DataError: a tensor of another shape or type, or no picture at all.
        """
        features = self._features(square_pixels(images, self.config.image_size).to(self.stem.v.device))
        return F.normalize(features, dim=1) if normalize else features

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as they are at the first call: names the embeddings that this detector makes."""
        return fingerprint(self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> DuplicateDetector:
        """The detector exported in `path`, or in `path`/export where that is a run directory; in eval mode.

        Raises:
            CheckpointError: nothing there, another kind of model, or weights that do not fit.
        """
        config, weights = load_model(path, "duplicates", DuplicateDetectorConfig)
        check_shapes(lambda: cls(config), config, weights, path)
        model = cls(config)
        load_weights(model, weights, path)
        return model.eval().to(device)

    def save_pretrained(self, path: str | Path) -> None:
        """Export to folder `path`: `config.json` and `model.safetensors`."""
        save_model(path, "duplicates", self.config, self.state_dict())
