"""Draws a code with a transformer over two devices, which have shapes and places but no numbers; fails where they mix.

python -m tests.sampling.two_devices N: the first N residual blocks lie on the first device.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import dispatch_model
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from dalle_ds.config import DalleConfig
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.decoding import DecodingWeights, new_cache, prefill
from dalle_ds.nn.attention.decoding import slots_of
from dalle_ds.sampling.codes import Sampling, sample

CONFIG = DalleConfig(width=32, depth=4, heads=4, text_len=6, grid=4, text_vocab=20, image_vocab=16, kernel=3)
FIRST, SECOND = "mock:0", "mock:1"
real_tensor = torch.tensor


def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which would look for real memory on a device that has none."""
    if device is None or torch.device(device).type == "cpu":
        return real_tensor(data, **options)
    with unset_fake_temporarily():
        made = real_tensor(data, **options)
    return torch.zeros(made.shape, dtype=made.dtype, device=device)


def main(blocks_on_first: int) -> None:
    for kind in ("row", "column", "conv"):
        slots_of(kind, CONFIG.grid, CONFIG.kernel)  # kept from now on, with their numbers
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("mock")
    torch.tensor = tensor
    Dalle._check = staticmethod(lambda *_: None)  # reads numbers
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = Dalle(CONFIG).eval()
        places = {"embedding": FIRST, "norm": SECOND, "text_head": SECOND, "image_head": SECOND}
        places |= {f"blocks.{i}": FIRST if i < blocks_on_first else SECOND for i in range(2 * CONFIG.depth)}
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            place = next(place for prefix, place in places.items() if name.startswith(prefix + "."))
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(parameter.to(place), requires_grad=False))
        model = dispatch_model(model, places, main_device=FIRST, force_hooks=True)
        cache, weights = new_cache(model, 4), DecodingWeights(model)
        logits = prefill(model, torch.zeros(4, CONFIG.text_len, dtype=torch.int64, device=FIRST), cache)
        for step in range(3):
            codes = sample(logits, torch.rand(4, dtype=torch.float64, device=FIRST), Sampling())
            logits = weights.step(codes, step, cache)
            assert logits.device == torch.device(FIRST), logits.device
        found = {str(layer.codes.device) for layer in cache.layers}
        assert found == {FIRST, SECOND}, found


if __name__ == "__main__":
    main(int(sys.argv[1]))
