"""Upsamplers, against `diffusers`' U-Net and what the paper says of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor

from dalle_ds.config import UpsamplerConfig
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models import Upsampler
from dalle_ds.models.upsampler import enlarge
from tests.models.test_decoder import fill

CONFIG = UpsamplerConfig(image_size=32, low_size=8, channels=32, depth=1, multiples=(1, 2), dropout=0.0)
STEPS = torch.tensor([0, 999])


def upsampler_of(config: UpsamplerConfig = CONFIG) -> Upsampler:
    torch.manual_seed(0)
    model = Upsampler(config).eval()
    fill(model)
    return model


def inputs(height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, height, width), torch.rand(2, 3, height // 4, width // 4) * 2 - 1


def test_it_is_diffusers_unet_over_the_enlarged_image() -> None:
    model, (x, low) = upsampler_of(), inputs()
    theirs = UNet2DModel(
        sample_size=32, in_channels=6, out_channels=6, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
        add_attention=False, resnet_time_scale_shift="scale_shift",
    ).eval()  # fmt: skip
    theirs.load_state_dict(model.unet.state_dict(), strict=True)
    large = F.interpolate(low, scale_factor=4, mode="bicubic", antialias=True)
    with torch.no_grad():
        wanted = theirs(torch.cat([x, large], dim=1), STEPS).sample
        torch.testing.assert_close(model(x, STEPS, low), wanted, atol=1e-5, rtol=1e-5)


def test_the_papers_sizes() -> None:
    """700 M, and 300 M, up to what scale-shift normalization and a learned variance take."""
    second = UpsamplerConfig(1024, 192, 2, (1, 1, 2, 2, 4, 4), 0.0, low_size=256)
    with torch.device("meta"):
        for config, millions in ((UpsamplerConfig(), 729.7), (second, 282.1)):
            model = Upsampler(config)
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
            assert not [name for name, module in model.named_modules() if type(module).__name__ == "Attention"]


def test_the_small_image_is_enlarged_smoothly() -> None:
    """By nearest neighbour, as in DALLE2-pytorch, a ramp has steps of 0, 0, 0, 1."""
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    steps = enlarge(ramp, 4)[0, 0, 0].diff()[8:-8]
    torch.testing.assert_close(steps, torch.full_like(steps, 2 / 7 / 4))


def test_images_of_any_size_are_taken() -> None:
    model = upsampler_of()
    with torch.no_grad():
        assert model(*inputs(16, 48)[:1], STEPS, inputs(16, 48)[1]).shape == (2, 6, 16, 48)


def test_noise_augmentation_is_told_in_16_bits_too() -> None:
    """`diffusers` gives the noise's embedding in fp32, whatever the weights are."""
    model, (x, low) = upsampler_of(dataclasses.replace(CONFIG, noise_augmentation=True)), inputs()
    with torch.no_grad():
        wanted = model(x, STEPS, low, noise_steps=STEPS)
        found = model.to(torch.bfloat16)(x, STEPS, low, noise_steps=STEPS)
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_noise_augmentation_is_told() -> None:
    model, (x, low) = upsampler_of(dataclasses.replace(CONFIG, noise_augmentation=True)), inputs()
    with torch.no_grad():
        none = model(x, STEPS, low)
        torch.testing.assert_close(model(x, STEPS, low, noise_steps=torch.zeros(2, dtype=torch.int64)), none)
        assert (model(x, STEPS, low, noise_steps=torch.tensor([300, 0])) - none).abs().amax((1, 2, 3)).gt(
            1e-3
        ).tolist() == [
            True,
            False,
        ]


def test_fresh_weights_predict_nothing_and_exports_are_read_strictly(tmp_path: Path) -> None:
    x, low = inputs()
    assert not Upsampler(CONFIG)(x, STEPS, low).any()
    model = upsampler_of()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(Upsampler.from_pretrained(tmp_path)(x, STEPS, low), model(x, STEPS, low))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"depth": 1', '"depth": 2'))
    with pytest.raises(CheckpointError, match="fit"):
        Upsampler.from_pretrained(tmp_path)


def test_wrong_shapes_and_settings_are_refused() -> None:
    model, (x, low) = upsampler_of(), inputs()
    for bad_x, bad_low in ((x, low[..., :4]), (x[:1], low), (x[..., :20], low[..., :5].repeat(1, 1, 1, 1)[..., :4])):
        with pytest.raises(DataError):
            model(bad_x, STEPS[: len(bad_x)], bad_low)
    for name, value in (("low_size", 7), ("low_size", 32), ("channels", 33), ("image_size", 33)):
        with pytest.raises(ConfigError, match=f"model.({name}|image_size)"):
            dataclasses.replace(CONFIG, **{name: value})
