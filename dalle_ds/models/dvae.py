"""The discrete VAE (DALL·E §2.1, App. A): images ↔ a grid of codes.

The state-dict keys are those of OpenAI's released encoder and decoder, at any number of groups, width and vocabulary.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import DiscreteVAEConfig, VqganConfig
from dalle_ds.errors import DataError
from dalle_ds.models.pretrained import fingerprint, load_model, loaded, save_model


def gumbel_noise(seeds: Tensor, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise (len(seeds), *shape), fp32; row i depends on `seeds[i]` alone.

    Noise drawn from one stream per process would change with the number of processes and the micro-batch; drawn from the
    samples' own seeds, every layout trains on the same numbers.

    Args:
        seeds: (B,) int64.
    """
    noise = torch.empty((len(seeds), *shape), device=device)
    if not noise.is_meta:
        generator = torch.Generator(device=device)
        for row, seed in zip(noise, seeds.tolist(), strict=True):
            generator.manual_seed(seed)
            row.exponential_(generator=generator)
    # −ln of a standard exponential is standard Gumbel; the floor keeps a drawn 0 finite.
    return -torch.log(noise.clamp_min(1e-30))


EPSILON = 0.1
"""Width of the margin that keeps mapped pixels away from 0 and 1, where the density has poles."""


def map_pixels(images: Tensor) -> Tensor:
    """φ: pixels in [0, 1] → [ε, 1 − ε], where the likelihood is evaluated and what the encoder sees."""
    return (1 - 2 * EPSILON) * images + EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """φ⁻¹, clamped to [0, 1]."""
    return ((mapped - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def logit_laplace_nll(pixels: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """Negative log-likelihood of pixels under the logit-Laplace distribution, in nats (DALL·E App. A.3).

    It is the density of sigmoid(x) for x ~ Laplace(mu, exp(log_b)):
    ln f = −ln 2 − ln b − ln v − ln(1 − v) − |logit(v) − mu| / b.

    Args:
        pixels: (B, 3, H, W) in the open interval (0, 1), as `map_pixels` returns them.
        mu, log_b: (B, 3, H, W), location and log scale of the Laplace distribution in logit space.

    Returns:
        (B, 3, H, W), one value per pixel and channel; the caller averages.
    """
    logits = torch.logit(pixels)
    # −ln v − ln(1 − v) = softplus(−logit) + softplus(logit), exact where ln(1 − v) would round.
    log_jacobian = F.softplus(-logits) + F.softplus(logits)
    # exp(−ln b) overflows fp32 below −88; 0 · inf would be NaN where mu is exact.
    return math.log(2.0) + log_b - log_jacobian + (logits - mu).abs() * torch.exp(-log_b.clamp_min(-80))


class Conv2d(nn.Module):
    """Stride-1 convolution that keeps the size, with parameters named `w` and `b` as in the release.

    Args:
        fp32: compute in fp32 whatever the weights' dtype: the two convolutions at the codes, as in the release, and the
            two at the pixels, since bf16 (the release has fp16) tells only 231 of 256 grey levels apart.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, fp32: bool = False) -> None:
        super().__init__()
        self.padding = (kernel - 1) // 2
        self.fp32 = fp32
        self.w = nn.Parameter(torch.empty(channels_out, channels_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(channels_out))
        nn.init.normal_(self.w, std=1 / math.sqrt(channels_in * kernel**2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) → (B, channels_out, H, W)."""
        weight, bias = (self.w.float(), self.b.float()) if self.fp32 else (self.w, self.b)
        # TF32, PyTorch's default for convolutions, would keep 10 bits of fp32's 23.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if weight.is_cuda else nullcontext()
        with exact:
            return F.conv2d(x.to(weight.dtype), weight, bias, padding=self.padding)


class ResidualBlock(nn.Module):
    """`id_path(x) + gain · res_path(x)` with four ReLU-convolution pairs of a quarter of the width (DALL·E App. A.1).

    Args:
        kernels: of the four convolutions; the encoder's last is 1×1, the decoder's first.
        gain: small constant on the residual path, 1 / layers², for stability at the start (DALL·E §2.1).
        upsample: whether what comes in is to be doubled in height and width first. The 1×1 convolutions that come next give
            the same on each of the four copies of a pixel: they are computed once for all, before.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernels: tuple[int, int, int, int],
        gain: float,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        assert not upsample or kernels[0] == 1, "only 1×1 convolutions may come before upsampling"
        self.upsample = upsample
        hidden = channels_out // 4
        widths = (channels_in, hidden, hidden, hidden, channels_out)
        self.gain = gain
        self.id_path = Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, kernel in enumerate(kernels):
            layers[f"relu_{index + 1}"] = nn.ReLU()
            layers[f"conv_{index + 1}"] = Conv2d(widths[index], widths[index + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) → (B, channels_out, H, W), or (B, channels_out, 2 · H, 2 · W)."""
        identity, residual = self.id_path(x), x
        for name, layer in self.res_path.named_children():
            residual = layer(residual)
            if self.upsample and name == "conv_1":
                identity, residual = (
                    F.interpolate(each, scale_factor=2, mode="nearest") for each in (identity, residual)
                )
        # The stream is fp32: in bf16's 8 bits, most of what a gain of 1/64 leaves of the residual would be rounded away.
        return torch.add(identity.float(), residual.float(), alpha=self.gain)


def _group(
    widths: list[int], kernels: tuple[int, int, int, int], gain: float, *, upsample: bool = False, pool: bool = False
) -> nn.Sequential:
    """One group: a block per step of `widths`, after doubled, or before halved, height and width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(len(widths) - 1):
        first = upsample and index == 0
        layers[f"block_{index + 1}"] = ResidualBlock(widths[index], widths[index + 1], kernels, gain, first)
    if pool:
        layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)


class Encoder(nn.Module):
    """Mapped pixels (B, 3, H, W) → logits over the codes (B, vocab_size, H / factor, W / factor), fp32."""

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        gain = 1 / (config.groups * config.blocks_per_group) ** 2
        width = config.encoder_width
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(3, width, 7, fp32=True))
        for group in range(config.groups):
            wider = config.encoder_width * 2**group
            layers[f"group_{group + 1}"] = _group(
                [width] + [wider] * config.blocks_per_group, (3, 3, 3, 1), gain, pool=group < config.groups - 1
            )
            width = wider
        layers["output"] = nn.Sequential(
            OrderedDict(relu=nn.ReLU(), conv=Conv2d(width, config.vocab_size, 1, fp32=True))
        )
        self.blocks = nn.Sequential(layers)
        self.vocab_size = config.vocab_size

    def forward(self, mapped: Tensor) -> Tensor:
        """Mapped pixels to logits; see the class."""
        return self.blocks(mapped.contiguous(memory_format=torch.channels_last))


class Decoder(nn.Module):
    """Code weights (B, vocab_size, h, w), one-hot or relaxed → logit-Laplace parameters (B, 6, H, W): μ, then ln b."""

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        gain = 1 / (config.groups * config.blocks_per_group) ** 2
        width = config.decoder_input
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(config.vocab_size, width, 1, fp32=True))
        for group in range(config.groups):
            narrower = config.decoder_width * 2 ** (config.groups - 1 - group)
            layers[f"group_{group + 1}"] = _group(
                [width] + [narrower] * config.blocks_per_group, (1, 3, 3, 3), gain, upsample=group > 0
            )
            width = narrower
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(width, 6, 1, fp32=True)))
        self.blocks = nn.Sequential(layers)

    def forward(self, code_weights: Tensor) -> Tensor:
        """Code weights to likelihood parameters; see the class."""
        return self.blocks(code_weights.contiguous(memory_format=torch.channels_last))


class DvaeOutput(NamedTuple):
    """What one training forward pass of the dVAE gives; a tuple, so that DeepSpeed's hooks find its tensors."""

    nll: Tensor
    """() mean negative log-likelihood per pixel value, nats."""
    kl: Tensor
    """() mean KL divergence from the uniform prior per code, nats."""
    logits: Tensor
    """(B, vocab_size, h, w) fp32."""


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL divergence of softmax(logits) from the uniform distribution, nats: (B, K, h, w) → (B, h, w)."""
    log_posterior = torch.log_softmax(logits, dim=1)
    return math.log(logits.shape[1]) + (log_posterior.exp() * log_posterior).sum(dim=1)


def check_images(images: Tensor, config: DiscreteVAEConfig | VqganConfig) -> None:
    """Refuse with a DataError what is not (B, 3, H, W) floats, of sides that a whole number of codes has."""
    factor = config.factor
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise DataError(
            f"images must be (B, 3, H, W) with H and W multiples of {factor}, found shape {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise DataError(f"images must be floats in [0, 1], found {images.dtype}: divide bytes by 255")


def check_codes(codes: Tensor, config: DiscreteVAEConfig | VqganConfig) -> None:
    """Refuse with a DataError what is not (B, h, w) codes of the vocabulary."""
    if codes.ndim != 3:
        raise DataError(f"codes must be (B, h, w), found shape {tuple(codes.shape)}")
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < config.vocab_size):
        raise DataError(
            f"codes must lie in [0, {config.vocab_size}), found {int(codes.min())} to {int(codes.max())}: "
            "they were made by another dVAE"
        )


class DiscreteVAE(nn.Module):
    """Discrete VAE: `encode` images to codes, `decode` codes to images, `forward` for training.

    Example:
        >>> vae = DiscreteVAE.from_pretrained("runs/dvae")
        >>> codes = vae.encode(images)  # (B, 3, H, W) in [0, 1] → (B, h, w)
        >>> images = vae.decode(codes)
    """

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor, temperature: float, gumbel: Tensor) -> DvaeOutput:
        """The parts of the evidence lower bound under the soft Gumbel relaxation (DALL·E §2.1).

        The likelihood is that of the images decoded from softmax((logits + gumbel) / temperature), soft in both
        directions; the KL is the categorical's, from the plain softmax of the logits.

        Args:
            images: (B, 3, H, W) in [0, 1].
            temperature: τ > 0.
            gumbel: (B, vocab_size, h, w) standard Gumbel noise.
        """
        check_images(images, self.config)
        mapped = map_pixels(images.float())
        logits = self.encoder(mapped)
        relaxed = torch.softmax((logits + gumbel) / temperature, dim=1)
        mu, log_b = self.likelihood_parameters(relaxed)
        return DvaeOutput(logit_laplace_nll(mapped, mu, log_b).mean(), kl_to_uniform(logits).mean(), logits)

    def nll(self, images: Tensor, codes: Tensor) -> Tensor:
        """(B,) negative log-likelihood per pixel value of images (B, 3, H, W) in [0, 1] given codes (B, h, w), nats."""
        mu, log_b = self.likelihood_parameters(self._one_hot(codes))
        return logit_laplace_nll(map_pixels(images.float()), mu, log_b).mean(dim=(1, 2, 3))

    def _one_hot(self, codes: Tensor) -> Tensor:
        return F.one_hot(codes, self.config.vocab_size).permute(0, 3, 1, 2).float()

    def likelihood_parameters(self, code_weights: Tensor) -> tuple[Tensor, Tensor]:
        """(B, vocab_size, h, w) code weights → μ and ln b of the logit-Laplace, each (B, 3, H, W) fp32."""
        mu, log_b = self.decoder(code_weights).float().chunk(2, dim=1)
        if self.config.min_log_scale is not None:
            # A smooth floor: a hard clamp would give ln b no gradient to leave it.
            log_b = self.config.min_log_scale + F.softplus(log_b - self.config.min_log_scale)
        return mu, log_b

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] → (B, h, w) int64 codes: the most likely ones, with no noise (DALL·E §2.2)."""
        check_images(images, self.config)
        return self.encoder(map_pixels(images.float())).argmax(dim=1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(B, h, w) int64 codes → (B, 3, H, W) images in [0, 1]: the medians, whatever ln b (DALL·E App. A.3)."""
        check_codes(codes, self.config)
        mu, _ = self.likelihood_parameters(self._one_hot(codes))
        return unmap_pixels(torch.sigmoid(mu))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as they are at the first call: names the codes that this dVAE makes."""
        return fingerprint(self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> DiscreteVAE:
        """The dVAE exported in `path`, or in `path`/export where that is a run directory; in eval mode, on the CPU.

        Raises:
            CheckpointError: nothing there, another kind of model, or weights that do not fit.
        """
        config, weights = load_model(path, "dvae", DiscreteVAEConfig)
        return loaded(lambda: cls(config), config, weights, path)

    def save_pretrained(self, path: str | Path) -> None:
        """Export to folder `path`: `config.json` and `model.safetensors`."""
        save_model(path, "dvae", self.config, self.state_dict())
