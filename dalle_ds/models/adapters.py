"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): beside frozen weights W, a product factor · B A is learned.

On disk they are what `peft` saves and reads. `peft` itself is no use here: it takes the weight of every linear layer for
(outputs, inputs), which `RowParallelLinear`'s need not be, renames the model's weights, and draws adapters after ZeRO-3 has
divided them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle_ds.config import LoraConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.files import built_beside, write_json
from dalle_ds.nn.layers import Unembedding
from dalle_ds.parsing import parse_json

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""That `peft` gives to the names of weights."""


class _Zeros(nn.Linear):
    """Draws its weights in its constructor, as all layers here do (`nn/layers.py`): with B = 0, training begins with W."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def attach_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Freeze a model's weights, whose names stay, and give its linear layers adapters, `NAME.lora_A` and `NAME.lora_B`.

    A is drawn as in `peft` from torch's global generator. ConfigError where no layer is among `config.targets`.
    """
    model.requires_grad_(False)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, Unembedding)
        and (not config.targets or any(f".{name}".endswith(f".{target}") for target in config.targets))
    }
    if not layers:
        raise ConfigError(f"lora.targets={' '.join(config.targets)} names no linear layer of the model: leave it out")
    for layer in layers.values():
        layer.lora_A = nn.Linear(layer.in_features, config.rank, bias=False)
        layer.lora_B = _Zeros(config.rank, layer.out_features, bias=False)
        layer.register_forward_hook(partial(_add, config.factor))


def _add(factor: float, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + factor * layer.lora_B(layer.lora_A(inputs[0]))


def merge(model: nn.Module, adapters: Mapping[str, Tensor], factor: float) -> None:
    """Give a plain model in fp32 the weights W + factor · B A.

    Args:
        adapters: by the names that `attach_adapters` gives them.
    """
    for name in adapted(adapters):
        layer: Any = model.get_submodule(name)
        # Not in place: it may lie in a file.
        layer.weight = nn.Parameter(layer.weight.detach() + factor * product(model, adapters, name))


def adapted(adapters: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers that have adapters."""
    return sorted(name.removesuffix(".lora_A.weight") for name in adapters if name.endswith(".lora_A.weight"))


def product(model: nn.Module, adapters: Mapping[str, Tensor], name: str) -> Tensor:
    """B A of a layer, laid out as its weight is; the model may be on "meta"."""
    whole = adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
    return whole.t() if getattr(model.get_submodule(name), "input_major", False) else whole


@dataclass(frozen=True)
class Adapter:
    """What a run with `lora.rank` exports beside the merged model."""

    weights: Mapping[str, Tensor]
    """fp32, by the names that `attach_adapters` gives them."""
    factor: float
    """alpha / rank."""
    kind: str
    """Of the model: "transformer", "prior", "decoder"."""
    base: str
    """Fingerprint of the model's weights."""
    where: str
    """Of these, for the reader."""

    def save(self, folder: Path) -> None:
        """Write it as `peft` does; CheckpointError where the folder cannot be written."""
        names = adapted(self.weights)
        rank = len(self.weights[f"{names[0]}.lora_A.weight"])
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": self.where,
            "r": rank,
            "lora_alpha": self.factor * rank,
            "target_modules": names,
            "bias": "none",
            "inference_mode": True,
        }
        weights = {f"{_PREFIX}{name}": value.contiguous() for name, value in self.weights.items()}
        try:
            with built_beside(folder) as partial_folder:
                # In one entry: safetensors writes several in any order, and equal adapters are to be equal files.
                save_file(weights, partial_folder / ADAPTER_WEIGHTS_NAME, {"base": f"{self.kind} {self.base}"})
                write_json(partial_folder / ADAPTER_CONFIG_NAME, config)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"could not write the adapter to {folder}: {error}; free some space") from error

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Of a folder, or of the run directory that it is in; CheckpointError where there is none, or it cannot be read."""
        folder = Path(path)
        folder = folder if (folder / ADAPTER_CONFIG_NAME).is_file() else folder / "adapter"
        try:
            config = parse_json((folder / ADAPTER_CONFIG_NAME).read_bytes())
            with safe_open(folder / ADAPTER_WEIGHTS_NAME, "pt") as file:
                kind, base = file.metadata()["base"].split(" ")
                weights = {name.removeprefix(_PREFIX): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            factor = config["lora_alpha"] / config["r"]
            return cls(weights, factor, kind, base, config["base_model_name_or_path"])
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"no adapter at {path} ({error}): name a run that was trained with lora.rank, or its folder adapter"
            ) from error
