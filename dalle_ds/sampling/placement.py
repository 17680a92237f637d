"""Transformers larger than one device: their layers spread over GPUs, main memory and disk by `accelerate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dalle_ds.config import DalleConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.pretrained import WEIGHTS_NAME, check_shapes, export_folder, load_config

GPU_SHARE = 0.8
"""Of a GPU's free memory, what weights may take."""


def load_spread(
    path: str | Path, dtype: torch.dtype, *, max_memory: Mapping[int | str, int | str] | None = None
) -> Dalle:
    """The transformer of an export or run directory, on as many devices as it needs; a residual block is never split.

    GPUs are filled first, but for a fifth of what is free there, which images in the making take; then main memory. What is
    left stays in the exported file, and is read from there whenever it is used. Layers that are not on a GPU are computed
    there all the same, where there is one. In 16 bits, codes may be others than those of one device, since products are not
    packed and the logits are multiplied out in fp32.

    Args:
        dtype: of the weights.
        max_memory: bytes, or "20GiB" and the like, that weights may take: GPUs by number, main memory as "cpu". None
            takes what is free, as said above.

    Raises:
        CheckpointError: no transformer there, or weights that do not fit.
        ConfigError: `accelerate` is not installed, or cannot make sense of `max_memory`.
    """
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_max_memory
    except ImportError as error:
        raise ConfigError("device=auto needs accelerate: pip install 'dalle-ds[large]'") from error
    folder = export_folder(path)
    config = load_config(folder, "transformer", DalleConfig)
    try:
        file = safe_open(folder / WEIGHTS_NAME, framework="pt")
        names = file.keys()
        weights = {name: torch.empty(file.get_slice(name).get_shape(), dtype=dtype, device="meta") for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the model in {folder} cannot be read: {error}; export it again") from error
    check_shapes(lambda: Dalle(config), config, weights, folder)
    with torch.device("meta"):
        model = Dalle(config).to(dtype).eval()
    blocks = sorted({type(block).__name__ for block in model.blocks})
    try:
        room = get_max_memory(dict(max_memory) if max_memory else None)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"max_memory {dict(max_memory or {})} does not name devices and sizes: {error}") from error
    if not max_memory:
        room = {place: size if place == "cpu" else int(size * GPU_SHARE) for place, size in room.items()}
    places = infer_auto_device_map(model, max_memory=room, no_split_module_classes=blocks, dtype=dtype)
    in_file = {}
    for name in names:
        place = _place(name, places)
        if place == "disk":
            in_file[name] = {
                "safetensors_file": str(folder / WEIGHTS_NAME),
                "weight_name": name,
                "dtype": str(dtype).removeprefix("torch."),
            }
        else:
            weights[name] = file.get_tensor(name).to(device=place, dtype=dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(False)
    main = next((place for place in places.values() if place not in ("cpu", "disk")), "cpu")
    return dispatch_model(model, places, main_device=main, offload_index=in_file or None, force_hooks=len(places) > 1)


def _place(name: str, places: Mapping[str, int | str]) -> int | str:
    """The place of a weight, by the longest of the modules' names that it lies in."""
    module = name
    while module not in places:
        module = module.rpartition(".")[0]
    return places[module]
