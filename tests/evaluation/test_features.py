"""Feature networks: the one that FID is defined by is the one that others compute, and files are read without running them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle_ds.errors import CheckpointError
from dalle_ds.evaluation.metrics.features import load_network
from dalle_ds.evaluation.metrics.inception import InceptionV3, resize_like_tensorflow
from tests.references import reference


@pytest.fixture(scope="module")
def weights() -> Iterator[dict[str, torch.Tensor]]:
    """Random weights under which features differ between pictures, statistics of batch normalization too."""
    torch.manual_seed(0)
    network = InceptionV3()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.05, 0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    yield network.state_dict()


@pytest.fixture(scope="module")
def file(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(weights, path)
    return path


def test_inception_computes_what_torch_fidelity_does(file: Path) -> None:
    theirs = reference("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    )
    network = load_network(str(file))
    assert (network.distance, network.score) == ("fid", "inception_score")
    pixels = torch.randint(0, 256, (2, 3, 32, 39), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for ours, expected in zip(network(pixels), theirs(pixels), strict=True):
        assert expected[0].sub(expected[1]).abs().max() > 1e-2 * expected.abs().max()
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("size", [7, 299, 401])
def test_pictures_are_resized_as_tensorflow_does(size: int) -> None:
    theirs = reference("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    pixels = 255 * torch.rand(1, 3, size, size + 5, generator=torch.Generator().manual_seed(3))
    expected = theirs(pixels, size=(299, 299), align_corners=False)
    assert (resize_like_tensorflow(pixels, 299) - expected).abs().max() < 1e-3  # of 256 levels


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
