"""Runs a transformer divided among the launched processes; started by test_tensor.py with the deepspeed launcher.

Arguments: a JSON file with {"out": folder, "cases": [{"name", "sequence", "checkpointing", "scale"}], "pictures": …}.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.cli import run_launcher
from dalle_ds.config import DalleConfig, ParallelConfig, from_dict
from dalle_ds.models import Dalle, DiscreteVAE
from dalle_ds.models.dalle import ResidualBlock
from dalle_ds.models.decoding import DecodingWeights, new_cache, prefill
from dalle_ds.nn.layers import RowParallelLinear
from dalle_ds.parallel import Mesh, TensorGroup, split_of
from dalle_ds.parallel.mesh import share_tensors
from dalle_ds.precision import BranchPrecision
from dalle_ds.sampling import TextToImage
from dalle_ds.text.tokenizer import Tokenizer


def gathered(local: Tensor, parameter: Tensor, group: TensorGroup) -> Tensor:
    """The whole of something that is divided as a parameter is; what is not divided must be the same everywhere."""
    pieces = [torch.empty_like(local) for _ in range(group.size)]
    dist.all_gather(pieces, local.contiguous(), group=group.group)
    split = split_of(parameter)
    if split is not None:
        return split.join(pieces)
    for piece in pieces:
        assert torch.equal(piece, local), "processes disagree on a parameter that they share"
    return local


def losses(case: dict[str, Any], config: DalleConfig, batch: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    tensor = mesh.divide(ParallelConfig(tensor=mesh.world_size, sequence=case["sequence"])).tensor
    torch.manual_seed(0)
    config = dataclasses.replace(config, dropout=case["dropout"])
    model = Dalle(config, checkpointing=case["checkpointing"], tensor=tensor)
    if case["scale"]:
        for block in model.blocks:
            cast(ResidualBlock, block).use(BranchPrecision(torch.float32, torch.tensor([float(case["scale"])])))
    result = {name: gathered(p.detach(), p, tensor) for name, p in model.named_parameters()}
    output = model(batch["text"], batch["codes"], logits=case["logits"], dropout_seeds=batch["dropout_seeds"])
    output.loss.backward()
    result |= {
        f"{name}.grad": gathered(p.grad, p, tensor) for name, p in model.named_parameters() if p.grad is not None
    }
    result |= {"loss": output.loss.detach(), "text_loss": output.text_loss.detach()}
    if case["logits"]:
        assert output.text_logits is not None and output.image_logits is not None
        result |= {"text_logits": output.text_logits.detach(), "image_logits": output.image_logits.detach()}
    return {name: value.clone() for name, value in result.items()}


@torch.no_grad()
def with_biases(model: Dalle) -> Dalle:
    """With biases that no process may add twice; fresh ones are 0."""
    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            module.bias.copy_(torch.linspace(-0.5, 0.5, len(module.bias)))
    return model


def pictures(job: dict[str, Any], config: DalleConfig, mesh: Mesh) -> dict[str, Tensor]:
    """Codes that processes draw together, with weights made ready for many steps and without."""
    torch.manual_seed(0)
    model = with_biases(Dalle(config, tensor=mesh.divide(ParallelConfig(tensor=mesh.world_size)).tensor).eval())
    pipeline = TextToImage(model, DiscreteVAE.from_pretrained(job["dvae"]), Tokenizer.load(job["tokenizer"]))
    drawn = pipeline.generate(job["prompts"], num=3, seed=5)
    flat = [picture.tobytes() for row in drawn for picture in row]
    stacked = torch.stack([torch.frombuffer(bytearray(picture), dtype=torch.uint8) for picture in flat])
    text, _ = pipeline.tokenizer.encode_padded(job["prompts"], config.text_len)
    weights, cache = DecodingWeights(model, reused=False), new_cache(model, len(text))
    logits = [prefill(model, text, cache)]
    for step in range(config.image_len - 1):
        logits.append(weights.step(torch.full((len(text),), step % config.image_vocab), step, cache))
    return {"pictures": stacked, "decoded": torch.stack(logits)}


def check_sharing(mesh: Mesh) -> None:
    """All parts of a model go on with what the first one has read."""
    divided = mesh.divide(ParallelConfig(tensor=mesh.world_size))
    own = {"text": torch.full((2, 3), mesh.rank), "weight": torch.rand(4)[::2] + mesh.rank}
    shared = share_tensors(own, divided, "model")
    assert shared is not None and shared["text"].tolist() == [[0] * 3] * 2 and shared["weight"].max() < 1
    assert own["text"].unique().tolist() == [mesh.rank]
    assert share_tensors(None, divided, "model") is None


def main() -> None:
    mesh = Mesh.start("cpu")
    check_sharing(mesh)
    job = json.loads(Path(sys.argv[-1]).read_text())
    config = from_dict(DalleConfig, job["model"], "test")
    out = Path(job["out"])
    batch = torch.load(out / "batch.pt", weights_only=True)
    for case in job["cases"]:
        result = losses(case, config, batch, mesh)
        if mesh.is_main:
            torch.save(result, out / f"{case['name']}-{mesh.world_size}.pt")
    drawn = pictures(job, config, mesh)
    if mesh.is_main:
        torch.save(drawn, out / f"drawn-{mesh.world_size}.pt")
    mesh.stop()


if __name__ == "__main__":
    run_launcher(main)
