"""Which shards of which parameters PowerSGD compresses, and to how much; as `training/replicas.py` does it."""

from __future__ import annotations

import functools

from dalle_ds.parallel.powersgd import MatrixShard, paper_rank
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.parameters import ParameterSet


def compressed_shards(parameters: ParameterSet, layout: Layout, width: int) -> tuple[MatrixShard, ...]:
    """One process's shards of the matrices that cross between replicas as factors; empty where PowerSGD is off.

    Args:
        width: of the model, which the paper's rank follows.
    """
    if not layout.powersgd.enabled or layout.replicas == 1:
        return ()
    return _shards(parameters, layout.shards, layout.tensor, whole_rank(layout, width))


def whole_rank(layout: Layout, width: int) -> int:
    """Rank of a whole matrix, which the processes that divide it share out."""
    stated = layout.powersgd.rank
    return stated if stated is not None else paper_rank(width, layout.shards * layout.tensor)


@functools.lru_cache(maxsize=1024)
def _shards(parameters: ParameterSet, shards: int, tensor: int, rank: int) -> tuple[MatrixShard, ...]:
    found: list[MatrixShard] = []
    for parameter in parameters:
        if parameter.block is None or len(parameter.shape) != 2:
            continue
        rows, columns = parameter.shape
        pieces = shards * parameter.fused
        if rows % pieces:
            continue  # a shard is not made of whole rows, and crosses as it is
        found.append(
            MatrixShard(
                name=parameter.name,
                piece=len(found),
                parts=parameter.fused,
                rows=rows // pieces,
                columns=columns,
                max_rank=rank // (shards * (tensor if parameter.is_divided else 1)),
                bucket=parameter.block,
            )
        )
    return tuple(found)
