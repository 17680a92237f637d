"""Feature networks: the one that FID is defined by is the one that others compute, and files are read without running them.
Blur: what "radius" means, and that none is none."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torch import nn

from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.evaluation.features import gaussian_blur, load_network
from tests.references import reference


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """torch-fidelity's network of random weights under which features differ between images, batch normalization's too."""
    module = reference("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    nothing = tmp_path_factory.mktemp("inception") / "nothing.pth"
    torch.save({}, nothing)

    class Network(module.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
        def load_state_dict(self, _: object) -> None:  # type: ignore[override]
            """Keep the random ones."""

    network = Network("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(nothing))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.05, 0.2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
    return network


def test_fids_network_is_torch_fidelitys(theirs: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(theirs.state_dict(), file)
    network = load_network(str(file))
    assert (network.distance, network.score) == ("fid", "inception_score")
    pixels = torch.randint(0, 256, (2, 3, 32, 39), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for ours, expected in zip(network(pixels), theirs(pixels), strict=True):
        assert expected[0].sub(expected[1]).abs().max() > 1e-2 * expected.abs().max()
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_without_torch_fidelity_its_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="pip install torch-fidelity"):
        load_network(str(tmp_path / "weights.pth"))


class Colours(nn.Module):
    """Means of colours, and classes red, green and blue."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = pixels.float().mean(dim=[2, 3])
        return torch.cat([means, means.square()], dim=1), 50 * means


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_torchscript_archive_is_a_network(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Colours()), str(tmp_path / "colours.pt"))
    network = load_network(str(tmp_path / "colours.pt"))
    assert network.name == "colours.pt" and len(network.sha256) == 64
    pixels = torch.randint(0, 256, (2, 3, 8, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for ours, expected in zip(network(pixels), Colours()(pixels), strict=True):
        assert torch.equal(ours, expected)
    torch.jit.save(torch.jit.script(nn.ReLU()), str(tmp_path / "relu.pt"))
    with pytest.raises(CheckpointError, match=r"relu\.pt"):
        load_network(str(tmp_path / "relu.pt"))


def test_without_a_file_nothing_is_called_fid() -> None:
    network = load_network()
    assert not {"fid", "inception"} & {*network.distance.split("_"), *network.score.split("_")}
    assert network.protocol([0.0])["sha256"] == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    features, logits = network(torch.zeros(2, 3, 24, 20, dtype=torch.uint8))
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)


def test_its_logits_are_the_packages_own() -> None:
    network = load_network()
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    own = network.module.network((pixels.float() - 127) / 128)
    assert torch.allclose(network(pixels)[1], own, atol=1e-5)


class Trap:
    """What must never be unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("what", ["missing", "text", "other weights", "a tensor", "a trap"])
def test_other_files_are_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reference("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path / "weights.pth"
    if what == "text":
        path.write_text("no weights")
    elif what == "other weights":
        torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    elif what == "a tensor":
        torch.save(torch.zeros(3), path)
    elif what == "a trap":
        path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"weights\.pth"):
        load_network(str(path))
    assert not (tmp_path / "sprung").exists()


# --- blur

RADII = (1.0, 2.0, 4.0, 8.0)


def noise(height: int, width: int, count: int = 2) -> torch.Tensor:
    """Random images: nothing is harder to blur right."""
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_radius_0_is_no_blur() -> None:
    pixels = noise(9, 12)
    assert torch.equal(gaussian_blur(pixels, 0), pixels)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("shape", [(48, 40), (5, 7)])  # the second one smaller than the kernel
def test_radius_is_the_standard_deviation_as_scipy_has_it(radius: float, shape: tuple[int, int]) -> None:
    pixels = noise(*shape)
    exact = gaussian_filter(pixels.numpy().astype(np.float64), (0, 0, radius, radius), mode="nearest", truncate=4)
    blurred = gaussian_blur(pixels, radius)
    assert blurred.dtype == torch.uint8
    assert np.abs(blurred.numpy() - exact).max() < 0.501  # rounding


@pytest.mark.parametrize("radius", RADII)
def test_pillow_approximates_the_same_blur(radius: float) -> None:
    pixels = noise(64, 64, 1)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    theirs = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)
    ours = gaussian_blur(pixels, radius)[0].permute(1, 2, 0).numpy().astype(np.float64)
    unblurred = pixels[0].permute(1, 2, 0).numpy().astype(np.float64)
    assert np.abs(ours - theirs).mean() < 1.5  # of 256 levels: three box blurs are not quite a Gaussian
    assert np.abs(ours - theirs).mean() < 0.05 * np.abs(ours - unblurred).mean()


@pytest.mark.parametrize("radius", [-1.0, float("nan"), float("inf")])
def test_a_radius_that_is_none_is_refused(radius: float) -> None:
    with pytest.raises(ConfigError, match="0 or greater"):
        gaussian_blur(noise(4, 4), radius)
