"""What test_powersgd.py looks at and one process cannot show: four processes, started once, act as 2, 3 or 4 replicas.

Each process writes {scenario: what it found} to `rank-N.pt` in the folder that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.config import PowerSGDConfig
from dalle_ds.parallel.powersgd import MatrixShard, PowerSGD, Reduced

WORLD = 4
UPDATES = 6
FORMATS = [(storage, transport) for storage in ("fp32", "1-6-9") for transport in ("fp32", "1-6-9")]
SHARDS = (
    MatrixShard("wide", 0, 1, 12, 40, 3, bucket=0),
    MatrixShard("fused", 1, 3, 10, 17, 3, bucket=0),
    MatrixShard("tall", 3, 1, 33, 20, 3, bucket=1),
    MatrixShard("small", 4, 2, 5, 6, 3, bucket=2),
)
"""Piece 2 is one that is not compressed."""
LOOSE = 2


def gradients(replica: int, update: int, size: float = 1.0) -> list[Tensor]:
    """Pieces of one replica, with singular values that fall."""
    generator = torch.Generator().manual_seed(1000 * update + replica)
    pieces = [torch.randn(7, generator=generator) for _ in range(5)]
    for shard in SHARDS:
        matrices = torch.randn(shard.parts, shard.rows, shard.columns, generator=generator)
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        falling = values * 0.7 ** torch.arange(values.shape[-1])
        pieces[shard.piece] = size * (left * falling[:, None] @ right).flatten()
    return pieces


def mean_gradients(replicas: int, update: int) -> dict[str, Tensor]:
    """The mean over replicas of what is compressed, in double precision."""
    each = [gradients(replica, update) for replica in range(replicas)]
    return {s.name: torch.stack([pieces[s.piece] for pieces in each]).double().mean(0) for s in SHARDS}


def at_rank(rank: int) -> list[MatrixShard]:
    """The shards, compressed to another rank."""
    return [MatrixShard(s.name, s.piece, s.parts, s.rows, s.columns, rank, s.bucket) for s in SHARDS]


def described(reduced: Reduced) -> dict[str, list[Any]]:
    return {name: getattr(reduced, name).tolist() for name in ("squares", "overflowed", "zeroed")}


def means(compressor: PowerSGD, pieces: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """Ĝ by name, and what `reduce` said; the piece that is not compressed must be left alone."""
    before = pieces[LOOSE].clone()
    reduced = compressor.reduce(pieces)
    assert torch.equal(pieces[LOOSE], before)
    return {shard.name: pieces[shard.piece].clone() for shard in SHARDS}, described(reduced)


def full_rank(replica: int, replicas: int, group: Any) -> Any:
    compressor = PowerSGD(at_rank(1000), group, replicas, PowerSGDConfig(), seed=1)
    return means(compressor, gradients(replica, 0))


def many_updates(replica: int, replicas: int, group: Any) -> Any:
    """Ĝ of some updates and what is left in the error buffers, for all formats."""
    found = {}
    for storage, transport in FORMATS:
        compressor = PowerSGD(SHARDS, group, replicas, PowerSGDConfig(storage=storage, transport=transport), seed=1)
        made = [means(compressor, gradients(replica, update)) for update in range(UPDATES)]
        found[storage, transport] = made, compressor.errors()
    return found


def other_number(replica: int, group_of: dict[int, Any]) -> Any:
    """What four replicas learned, two go on with; and the next Ĝ of either, from gradients that all replicas share."""
    found = {}
    for storage in ("fp32", "1-6-9"):
        config = PowerSGDConfig(storage=storage)
        four = PowerSGD(SHARDS, group_of[4], 4, config, seed=1)
        for update in range(UPDATES):
            four.reduce(gradients(replica, update))
        sums = four.errors()
        two = PowerSGD(SHARDS, group_of[2], 2, config, seed=1)
        two.load_error_feedback({**sums, "another": torch.ones(3)})
        moved = two.errors()
        without = PowerSGD(SHARDS, group_of[2], 2, config, seed=1)
        compressors = {"four": four, "two": two, "without": without}
        following = {name: means(c, gradients(9, UPDATES))[0] for name, c in compressors.items()}
        two.load_error_feedback({"tall": sums["tall"]})
        found[storage] = sums, moved, following, two.errors()
    return found


def not_finite(replica: int, replicas: int, group: Any) -> Any:
    """One update amid good ones in which numbers of the shard "tall" are not finite, or too great for the format."""
    tall = next(s for s in SHARDS if s.name == "tall").piece

    def spoil(*at: tuple[int, float]) -> Callable[[list[Tensor]], None]:
        def change(pieces: list[Tensor]) -> None:
            for index, value in at:
                pieces[tall][index] = value

        return change

    coded, flat = {"transport": "1-6-9", "storage": "1-6-9"}, {}
    faults: dict[str, tuple[dict[str, Any], int | None, Callable[[list[Tensor]], None]]] = {
        "nan on the first": (flat, 0, spoil((0, math.nan))),
        "nan on the last": (flat, 1, spoil((659, math.nan))),
        "inf": (flat, 1, spoil((77, math.inf))),
        "opposite infinities": (flat, 0, spoil((40, math.inf), (41, -math.inf))),
        "overflow of the sum": (flat, None, lambda pieces: pieces[tall].fill_(3e38)),
        "overflow of the norm": (flat, None, lambda pieces: pieces[tall].mul_(1e25)),
        "nan in codes": (coded, 1, spoil((5, math.nan))),
        "P beyond the format": (coded, None, lambda pieces: pieces[tall].mul_(2.0**20)),
        "Q beyond the format": ({**coded, "p_scale_log2": -30}, None, lambda pieces: pieces[tall].mul_(2.0**20)),
    }
    found = {}
    for name, (options, where, change) in faults.items():
        compressor = PowerSGD(SHARDS, group, replicas, PowerSGDConfig(**options), seed=1)
        compressor.reduce(gradients(replica, 0))
        before = compressor.errors()
        pieces = gradients(replica, 1)
        if where in (None, replica):
            change(pieces)
        made, said = means(compressor, pieces)
        after = compressor.errors()
        found[name] = before, made, said, after, means(compressor, gradients(replica, 2))
    return found


def scales(replica: int, replicas: int, group: Any) -> Any:
    """For scales of either factor from small to too great: whether it was found out, and how far Ĝ is from that of fp32.

    The second replica's gradients are those of the first, or nearly cancel them: either sums overflow, or what is summed.
    """
    found = []
    for other in (1.0, -0.9):
        pieces = [piece * (other if replica else 1.0) for piece in gradients(0, 0)]
        exact = PowerSGD(SHARDS, group, replicas, PowerSGDConfig(), seed=1)
        expected, _ = means(exact, [piece.clone() for piece in pieces])
        for factor in ("p_scale_log2", "q_scale_log2"):
            for log2 in range(-8, 8):
                config = PowerSGDConfig(transport="1-6-9", **{factor: log2})
                made, said = means(PowerSGD(SHARDS, group, replicas, config, seed=1), [p.clone() for p in pieces])
                for shard, flag in zip(SHARDS, said["overflowed"], strict=True):
                    distance = (made[shard.name] - expected[shard.name]).norm() / expected[shard.name].norm()
                    found.append((factor, log2, flag, float(distance)))
    return found


def broken_buffer(replica: int, replicas: int, group: Any) -> Any:
    """One replica's error buffer of "wide" is not finite."""
    compressor = PowerSGD(SHARDS, group, replicas, PowerSGDConfig(), seed=1)
    compressor.reduce(gradients(replica, 0))
    errors = compressor.errors()
    spoilt = errors["wide"].clone()
    spoilt[3] = math.inf if replica == 1 else spoilt[3]
    compressor.load_error_feedback({**errors, "wide": spoilt})
    said = means(compressor, gradients(replica, 1))[1]
    return errors, said, compressor.errors(), means(compressor, gradients(replica, 2))


def collectives(replica: int, replicas: int, group: Any) -> Any:
    """Which collectives begin and are waited for, with the elements that they are given."""
    log: list[tuple[str, str, int]] = []

    def logged(name: str, call: Callable[..., Any], numel: Callable[..., int]) -> Callable[..., Any]:
        def begin(*args: Any, **options: Any) -> Any:
            assert options["async_op"] and options["group"] is group
            label = (name, numel(*args))
            log.append(("begin", *label))
            handle = call(*args, **options)

            class Handle:
                def wait(self) -> None:
                    log.append(("wait", *label))
                    handle.wait()

            return Handle()

        return begin

    found = {}
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor")}
    for transport in ("fp32", "1-6-9"):
        compressor = PowerSGD(SHARDS, group, replicas, PowerSGDConfig(transport=transport), seed=1)
        log.clear()
        try:
            for name, call in originals.items():
                setattr(dist, name, logged(name, call, lambda *tensors: tensors[-1].numel()))
            compressor.reduce(gradients(replica, 0))
        finally:
            for name, call in originals.items():
                setattr(dist, name, call)
        found[transport] = list(log)
    return found


def regression(replica: int, replicas: int, group: Any) -> Any:
    """Distances to the solution of a linear regression by stochastic gradients, each replica's from data of its own.

    Four of sixteen outputs are noisy: they take up the low rank, and the distance is that of the others.
    """
    size, noisy, batch, rate = 16, 4, 8, 0.01
    target = torch.randn(size, size, generator=torch.Generator().manual_seed(7))
    found = {}
    for name, rank in (("plain", size), ("low rank", 2), ("nothing kept", 2)):
        generator = torch.Generator().manual_seed(replica)
        shard = MatrixShard("weight", 0, 1, size, size, rank, bucket=0)
        compressor = PowerSGD([shard], group, replicas, PowerSGDConfig(), seed=1)
        weight = torch.zeros(size, size)
        for _ in range(1000):
            inputs = torch.randn(batch, size, generator=generator)
            outputs = inputs @ target.t()
            outputs[:, :noisy] += 5 * torch.randn(batch, noisy, generator=generator)
            piece = ((inputs @ weight.t() - outputs).t() @ inputs / batch).flatten()
            compressor.reduce([piece])
            if name == "nothing kept":
                compressor.load_error_feedback({})
            weight -= rate * piece.view(size, size)
        found[name] = float((weight - target)[noisy:].norm() / target[noisy:].norm())
    return found


def work(rank: int, folder: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    first, second, three = dist.new_group([0, 1]), dist.new_group([2, 3]), dist.new_group([0, 1, 2])
    pair = first if rank < 2 else second
    found: dict[str, Any] = {
        "full rank": {4: full_rank(rank, 4, None), 2: full_rank(rank % 2, 2, pair)},
        "many updates": {4: many_updates(rank, 4, None), 2: many_updates(rank % 2, 2, pair)},
        "other number": other_number(rank, {4: None, 2: pair}),
    }
    if rank < 3:
        found["full rank"][3] = full_rank(rank, 3, three)
        found["many updates"][3] = many_updates(rank, 3, three)
    if rank < 2:
        found["not finite"] = not_finite(rank, 2, pair)
        found["scales"] = scales(rank, 2, pair)
        found["broken buffer"] = broken_buffer(rank, 2, pair)
        found["collectives"] = collectives(rank, 2, pair)
        found["regression"] = regression(rank, 2, pair)
    torch.save(found, Path(folder) / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
