"""The U-Net of ADM and GLIDE (Dhariwal and Nichol 2021; Nichol et al. 2021), as `diffusers` has it, with what it lacks: ADM's
zero initialization, dropout that depends on a sample's seed alone, and attention that takes a mask of any context.

State-dict keys are those of `diffusers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import Checkpointing, DecoderConfig, UnetConfig, UpsamplerConfig
from dalle_ds.errors import ConfigError
from dalle_ds.meta_device import device_type
from dalle_ds.nn.layers import dropout, seeds_on_host
from dalle_ds.parallel import WHOLE


def decoder_unet(config: DecoderConfig, checkpointing: Checkpointing) -> nn.Module:
    """Attends to a context at the resolutions of `config.attention`; `class_labels`, (B, 4 · channels · multiples[0]), are
    added to the embedding of the timestep."""
    kinds = ["SimpleCrossAttn" if side in config.attention else "Resnet" for side in config.resolutions]
    down = [f"{kind}Down{'sample' * (kind == 'Resnet')}Block2D" for kind in kinds]
    up = [f"{kind}Up{'sample' * (kind == 'Resnet')}Block2D" for kind in reversed(kinds)]
    unet: Any = _unet(
        "UNet2DConditionModel",
        config,
        checkpointing,
        in_channels=3,
        down_block_types=tuple(down),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=tuple(up),
        cross_attention_dim=config.context_width,
        attention_head_dim=config.head_channels,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    unet.set_attn_processor(ContextAttention())
    decoder: nn.Module = unet
    return decoder


def upsampler_unet(config: UpsamplerConfig, checkpointing: Checkpointing) -> nn.Module:
    """Convolutions alone, over x_t and, behind it, the enlarged small image."""
    count = len(config.multiples)
    unet: Any = _unet(
        "UNet2DModel",
        config,
        checkpointing,
        in_channels=6,
        down_block_types=("ResnetDownsampleBlock2D",) * count,
        up_block_types=("ResnetUpsampleBlock2D",) * count,
        add_attention=False,
        class_embed_type="timestep" if config.noise_augmentation else None,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
    )
    if config.noise_augmentation:
        # diffusers gives it fp32, whatever the weights are.
        unet.class_embedding.register_forward_pre_hook(
            lambda module, given: (given[0].to(module.linear_1.weight.dtype),)
        )
    upsampler: nn.Module = unet
    return upsampler


def _unet(kind: str, config: UnetConfig, checkpointing: Checkpointing, **settings: Any) -> nn.Module:
    if checkpointing not in ("none", "full"):
        raise ConfigError(f"train.activation_checkpointing={checkpointing}: U-Nets have none or full")
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError("decoder and upsamplers need diffusers: pip install 'dalle_ds[unclip]'") from error
    # It warns that a model is moved to 16 bits, of which we decide.
    diffusers.utils.logging.set_verbosity_error()
    unet: Any = getattr(diffusers, kind)(
        sample_size=config.image_size,
        out_channels=6 if config.learned_variance else 3,
        layers_per_block=config.depth,
        block_out_channels=tuple(config.channels * multiple for multiple in config.multiples),
        **settings,
    )
    if checkpointing == "full":
        unet.enable_gradient_checkpointing()
    for name, module in unet.named_modules():
        # ADM: what ends a residual branch begins as zero, and so does the output.
        if name.endswith((".conv2", ".to_out.0")) or name == "conv_out":
            _zero(module)
    found: nn.Module = unet
    return found


@torch.no_grad()
def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        getattr(
            parameter, "ds_tensor", parameter
        ).zero_()  # within ZeRO-3's construction, of which this process has a shard


SHORT = 256
"""Image positions up to which the backward pass of attention in 16 bits takes up to eight times as long as in fp32 on CPUs."""


class ContextAttention:
    """Attention of image positions to a context and to each other, in one softmax (GLIDE §2.3). `diffusers`' own takes a mask
    as long as the image for one of the image's positions."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) and a context (B, T, D) → (B, C, H, W); `attention_mask` is (B, 1, T), what is added to scores."""
        positions = attention.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        keys = attention.add_k_proj(encoder_hidden_states), attention.to_k(positions)
        values = attention.add_v_proj(encoder_hidden_states), attention.to_v(positions)
        query, key, value = (
            part.unflatten(2, (attention.heads, -1)).transpose(1, 2)
            for part in (attention.to_q(positions), torch.cat(keys, dim=1), torch.cat(values, dim=1))
        )
        mask = None if attention_mask is None else F.pad(attention_mask, (0, positions.shape[1]))[:, None]
        dtype = query.dtype
        if device_type(query) == "cpu" and dtype != torch.float32 and query.requires_grad and query.shape[2] <= SHORT:
            query, key, value, mask = (part if part is None else part.float() for part in (query, key, value, mask))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).to(dtype)
        joined = attention.to_out[0](attended.transpose(1, 2).flatten(2))
        return hidden_states + joined.transpose(1, 2).reshape(hidden_states.shape)


class KeyedDropout(nn.Module):
    """Drops of a sample what its seed says (`nn.layers.dropout`): the same in every layout, and after a resume.

    Args:
        number: tells apart those of a model.
    """

    def __init__(self, rate: float, number: int) -> None:
        super().__init__()
        self.rate, self.number = rate, number
        self.seeds: Tensor | None = None
        """(B,) int64 of the batch that passes, on the CPU; None drops nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same."""
        if self.seeds is None or not self.training:
            return x
        return dropout(x.flatten(2), self.seeds, self.number, self.rate, WHOLE).view_as(x)


def use_keyed_dropout(unet: nn.Module, rate: float) -> Callable[[Tensor | None], None]:
    """Put `KeyedDropout`s into the residual blocks of a U-Net; returns what gives them all the seeds of a batch."""
    found: list[KeyedDropout] = []
    for module in list(unet.modules()):
        if type(module).__name__ == "ResnetBlock2D":
            found.append(KeyedDropout(rate, len(found)))
            module.dropout = found[-1]

    def give(seeds: Tensor | None) -> None:
        for each in found:
            each.seeds = seeds_on_host(seeds, rate)

    return give
