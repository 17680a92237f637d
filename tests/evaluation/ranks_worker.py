"""One process of several that measure a set together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_ds.evaluation.features import FeatureNetwork
from dalle_ds.evaluation.frechet import Appearance, distances, inception_scores
from dalle_ds.evaluation.sets import GatheredRows, Selections, shard_rows
from dalle_ds.parallel import Mesh

RADII = [0.0, 1.0]
REAL, FAKE, FEW = 53, 37, 19  # rows, of which the last fill two chunks: more processes than that get none


class Toy(nn.Module):
    """Features of a random convolution."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.randn(12, 3, 4, 4, generator=generator) / 100
        self.classes = torch.randn(6, 12, generator=generator)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(torch.conv2d(pixels.float(), self.kernel, stride=4)).mean(dim=(2, 3))
        return features, features @ self.classes.T


NETWORK = FeatureNetwork("toy", "00", "toy_frechet", "toy_score", Toy())


def pictures(rows: int, seed: int) -> Tensor:
    """(rows, 3, 12, 12) uint8."""
    generator = torch.Generator().manual_seed(seed)
    tint = torch.rand(rows, 3, 1, 1, generator=generator)
    return (tint * torch.randint(0, 256, (rows, 3, 12, 12), generator=generator)).byte()


def selections(rows: int) -> Selections:
    """All rows, and those whose number is no multiple of 5."""
    return {"": torch.ones(rows, dtype=torch.bool), "without_overlap": torch.arange(rows) % 5 != 0}


def measure(mesh: Mesh) -> dict[str, object]:
    """Figures of two sets, of few rows, and values collected row by row."""
    found: dict[str, Appearance] = {}
    for name, rows in (("real", REAL), ("fake", FAKE), ("few", FEW)):
        pixels = pictures(rows, seed=rows)
        looks = Appearance(NETWORK, RADII, selections(rows))
        for chosen in shard_rows(rows, mesh):
            looks.add(chosen, pixels[chosen])
        found[name] = looks.summed(mesh)
    collected = GatheredRows(FAKE)
    for chosen in shard_rows(FAKE, mesh, chunk=5):
        collected.put(chosen, torch.tensor(chosen) * 0.1)
    figures: dict[str, object] = {}
    for name in ("fake", "few"):
        apart, quality = distances(found["real"], found[name]), inception_scores(found[name])
        figures[name] = {selection: apart[selection] | quality[selection] for selection in apart}
    return figures | {
        "rows": collected.gather(mesh).tolist(),
    }


if __name__ == "__main__":
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    (out / f"{rank}.json").write_text(json.dumps(measure(Mesh(rank, world, torch.device("cpu")))))
    dist.destroy_process_group()
