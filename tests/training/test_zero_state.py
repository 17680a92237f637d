"""Who counts what of a gradient that several processes hold."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dalle_ds.training.zero_state import GroupLayout

AXES = {"replica": 2, "shard": 3, "tensor": 2, "pipe": 1}


class Place:
    """A mesh, as one of its processes sees it."""

    device = torch.device("cpu")

    def __init__(self, **indices: int) -> None:
        self.indices = indices

    def size(self, axis: str) -> int:
        return AXES[axis]

    def index(self, axis: str) -> int:
        return self.indices[axis]


@pytest.mark.parametrize("sharded", [False, True])
def test_every_gradient_is_counted_once_whoever_holds_it(sharded: bool) -> None:
    groups: list[dict[str, Any]] = [{"name": "whole"}, {"name": "divided", "divided": True}]
    squares, counted = torch.zeros(2), torch.zeros(2)
    for replica, shard, tensor in itertools.product(range(2), range(3), range(2)):
        mesh: Any = Place(replica=replica, shard=shard, tensor=tensor, pipe=0)
        layout = GroupLayout(groups, sharded, mesh)
        # A process has the same part of a gradient as others, or a part of its own: of 1 in all.
        held = torch.tensor([1.0, 1 / 2]) / (3 if sharded else 1)
        squares += layout.spread(held)
        counted += held * torch.tensor(layout.counted)
    torch.testing.assert_close(squares, torch.ones(2))
    torch.testing.assert_close(counted, torch.ones(2))
