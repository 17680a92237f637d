"""The duplicate detector: its parts against torch's, signals that keep their size with depth, exports."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.integrate import quad
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dalle_ds.config.overlap import DuplicateDetectorConfig
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models import duplicates
from dalle_ds.models.duplicates import DuplicateDetector, WeightNorm, blurred_half

TINY = DuplicateDetectorConfig(image_size=16, width=8, blocks=(1, 2), stem_halvings=1, embed_dim=12)


@pytest.fixture
def detector() -> DuplicateDetector:
    torch.manual_seed(0)
    return DuplicateDetector(TINY).eval()


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_weight_norm_is_torchs(kernel: int) -> None:
    torch.manual_seed(0)
    ours = WeightNorm(5, 7, kernel, gain=1.7)
    plain: nn.Module = nn.Conv2d(5, 7, kernel, padding=kernel // 2) if kernel else nn.Linear(5, 7)
    theirs = weight_norm(plain, dim=0)
    weight = theirs.parametrizations.weight
    with torch.no_grad():
        ours.g.copy_(torch.rand(7) + 0.5)
        ours.b.copy_(torch.randn(7))
        weight.original0.copy_(ours.g.view_as(weight.original0))
        weight.original1.copy_(ours.v)
        theirs.bias.copy_(ours.b)
    x = torch.randn(3, 5, 6, 6) if kernel else torch.randn(3, 5)
    mine, other = ours(x), theirs(x)
    torch.testing.assert_close(mine, other)
    mine.square().sum().backward()
    other.square().sum().backward()
    torch.testing.assert_close(ours.v.grad, weight.original1.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.g.grad, weight.original0.grad.flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height, width", [(2, 2), (8, 6), (16, 16)])
def test_halving_blurs_as_a_convolution_does(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width)
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    wanted = F.conv2d(padded, kernel.expand(3, 1, 3, 3), stride=2, groups=3)
    torch.testing.assert_close(blurred_half(x), wanted)


def test_the_gain_after_gelu_is_the_integral() -> None:
    def integrand(z: float) -> float:
        gelu = z * 0.5 * (1 + math.erf(z / math.sqrt(2)))
        return gelu**2 * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    assert 1 / math.sqrt(quad(integrand, -12, 12)[0]) == pytest.approx(duplicates._AFTER_GELU, rel=1e-3)


def test_signals_and_gradients_keep_their_size_through_fifty_blocks() -> None:
    torch.manual_seed(0)
    model = DuplicateDetector(dataclasses.replace(TINY, width=32, blocks=(50,), stem_halvings=0, image_size=8))
    stream = F.interpolate(torch.randn(8, 32, 2, 2), 8, mode="bilinear")
    stream = (stream / stream.square().mean().sqrt()).requires_grad_()
    x, sizes = model.blocks[0](stream), []
    for block in model.blocks[1:]:
        sizes.append(float(x.detach().square().mean().sqrt()))
        x = block(x)
    assert max(sizes) / min(sizes) < 4
    x.backward(torch.randn_like(x) / math.sqrt(x.numel()))
    assert stream.grad is not None
    assert 0.2 < float(stream.grad.norm()) < 20


def test_training_begins_with_outputs_of_mean_0_and_embeddings_apart(detector: DuplicateDetector) -> None:
    images = F.interpolate(torch.rand(24, 3, 4, 4), 16, mode="bilinear")  # pictures have smooth parts
    parallel = detector(images)
    detector.fit_start(images)
    means: list[float] = []
    spreads: dict[float, list[float]] = {}

    def look(layer: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        assert isinstance(layer, WeightNorm)
        channels = output.detach().movedim(1, 0).flatten(1)
        means.append(float(channels.mean(dim=1).abs().max()) / layer.spread)
        spreads.setdefault(layer.spread, []).extend(channels.std(dim=1).tolist())

    for layer in detector.modules():
        if isinstance(layer, WeightNorm):
            layer.register_forward_hook(look)
    apart = detector(images)
    assert max(means) < 0.05  # of 8 bits
    branches = 1 / math.sqrt(3)
    assert set(spreads) == {1.0, branches}
    assert all(found == pytest.approx(wanted, rel=0.02) for wanted, each in spreads.items() for found in each)
    assert float((parallel @ parallel.T).mean()) > 0.5 and float((apart @ apart.T).mean()) < 0.1


def test_a_picture_learns_nothing_of_the_others_in_its_batch(detector: DuplicateDetector) -> None:
    images = torch.rand(6, 3, 16, 16)
    together = detector.train()(images)
    torch.testing.assert_close(together, torch.cat([detector(image[None]) for image in images]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(6))
    assert together.dtype == torch.float32


def test_pictures_of_any_size_and_kind_are_embedded(detector: DuplicateDetector) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    pictures = [Image.fromarray(pixels), Image.fromarray(pixels).resize((40, 30)).convert("L")]
    found = detector.embed_images(pictures)
    assert found.shape == (2, 12) and not found.requires_grad
    torch.testing.assert_close(found[:1], detector(tensor), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(detector.embed_images(tensor), detector(tensor))
    raw = detector.embed_images(tensor, normalize=False)
    torch.testing.assert_close(F.normalize(raw, dim=1), found[:1], rtol=1e-5, atol=1e-6)
    assert float(raw.norm()) != pytest.approx(1, abs=1e-3)
    wide = torch.rand(2, 3, 16, 30)
    torch.testing.assert_close(detector.embed_images(wide), detector(wide[..., 7:23]))
    with pytest.raises(DataError, match="16, 16"):
        detector(wide)


def test_bf16_weights_give_nearly_the_same(detector: DuplicateDetector) -> None:
    images = torch.rand(4, 3, 16, 16)
    wanted = detector(images)
    found = detector.to(torch.bfloat16)(images)
    assert found.dtype == torch.float32
    assert float((found * wanted).sum(dim=1).min()) > 0.995


def test_the_default_is_a_resnet_50() -> None:
    with torch.device("meta"):
        model = DuplicateDetector(DuplicateDetectorConfig())
    convolutions = [module for module in model.modules() if isinstance(module, WeightNorm) and module.kernel]
    assert len(convolutions) == 1 + 16 * 3 + 4  # one, three in each block, and four shortcuts
    assert sum(module.v.numel() for module in convolutions) == 23_454_912  # what torchvision's ResNet-50 has
    assert model(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 512)


def test_export_and_import(detector: DuplicateDetector, tmp_path: Path) -> None:
    detector.save_pretrained(tmp_path / "export")
    loaded = DuplicateDetector.from_pretrained(tmp_path / "export")
    assert loaded.config == TINY and not loaded.training
    assert loaded.fingerprint == detector.fingerprint
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.embed_images(images), detector.embed_images(images))
    torch.manual_seed(1)
    assert DuplicateDetector(TINY).fingerprint != detector.fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "dvae"}, "holds a 'dvae' model"),
        ({"model": {"width": 10**9}}, "width=1000000000"),
        ({"model": {"blocks": [1, 3]}}, "do not fit the model"),
        ({"model": {"blocks": [1, 10**9]}}, "each of model.blocks"),
    ],
)
def test_a_configuration_that_is_not_the_weights_is_refused(
    change: dict[str, object], words: str, detector: DuplicateDetector, tmp_path: Path
) -> None:
    detector.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with pytest.raises((CheckpointError, ConfigError), match=words):
        DuplicateDetector.from_pretrained(tmp_path)


def test_shapes_that_cannot_be_are_told() -> None:
    for values, words in (
        ({"image_size": 20}, "not a multiple of 32"),
        ({"image_size": 32}, "less than twice that"),
        ({"blocks": ()}, "1 to 6 stages"),
        ({"width": 0}, "greater than 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            DuplicateDetectorConfig(**values)
