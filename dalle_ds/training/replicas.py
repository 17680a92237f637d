"""What crosses between replicas: weights once at the start, then gradients once per update (DALL·E §2.5).

DeepSpeed knows of one replica. After the last backward pass of an update, each process has its part of the mean gradient of
its own replica; between that and the step, processes that hold the same part in all replicas average it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.config import PowerSGDConfig
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh, split_of
from dalle_ds.parallel.powersgd import MatrixShard, PowerSGD, in_turns, paper_rank
from dalle_ds.training.zero_state import MasterGradients, MasterWeights

BUCKET = 2**24
"""Elements of uncompressed gradients that cross together, unless one piece has more: 64 MiB in fp32."""


class ReplicaReduction:
    """Averages an engine's gradients over replicas: as they are, in fp32, or matrices of residual blocks by PowerSGD.

    Compressed are the weight matrices of residual blocks. All else crosses as it is, as in the paper: embeddings,
    unembeddings, gains and biases; and so does a matrix of which a shard is not made of whole rows.

    A shard of fused queries, keys and values counts as three matrices, each of as many rows as a shard of one of the three
    would have: so none has rows of two of them.

    ConfigError where nothing of a model can be compressed. (`resolve` refuses what else cannot be.)
    """

    def __init__(self, engine: Any, mesh: Mesh, config: PowerSGDConfig, seed: int) -> None:
        self._gradients, self._mesh = MasterGradients(engine), mesh
        self._left_whole: list[str] = []
        self._compressor = self._compress(engine, config, seed) if config.enabled else None

    def _compress(self, engine: Any, config: PowerSGDConfig, seed: int) -> PowerSGD:
        optimizer, mesh = engine.optimizer, self._mesh
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        blocks = [group.get("block") for group in engine.client_optimizer.param_groups]
        self._parameters = _by_group(optimizer)
        self._group_of = [group for group, parameters in enumerate(self._parameters) for _ in parameters]
        matrices = {
            piece: parameter
            for piece, parameter in enumerate(chain.from_iterable(self._parameters))
            if blocks[self._group_of[piece]] is not None and len(parameter.ds_shape) == 2 and parameter.requires_grad
        }
        # The rank is that of a whole matrix, for all processes that divide a replica to share out. Rows of these matrices are
        # as long as the residual stream is wide, or a part of it.
        width = max((matrix.ds_shape[1] for matrix in matrices.values()), default=1)
        self._rank = config.rank or paper_rank(width, mesh.size("shard") * mesh.size("tensor"))
        found = [
            self._shard(names[id(parameter)], piece, parameter, blocks[self._group_of[piece]])
            for piece, parameter in matrices.items()
        ]
        shards = [shard for shard in found if shard is not None]
        if not shards:
            raise ConfigError(
                "powersgd.enabled compresses weight matrices of residual blocks, and this model has none that the processes "
                "can divide by whole rows: leave it out"
            )
        compressed = {shard.piece for shard in shards}
        self._plain = [piece for piece in range(len(self._group_of)) if piece not in compressed]
        storage = optimizer.fp32_partitioned_groups_flat[0].device  # the host's memory, where DeepSpeed offloads
        return PowerSGD(
            shards, mesh.group("replica"), mesh.size("replica"), config, seed, mesh.device, storage_device=storage
        )

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Put the mean over replicas in place of all gradients. Collective.

        Returns:
            (groups,) fp32, squared norm of what this process then holds of every parameter group. Where it is not to be used:
            NaN or Inf without compression; with it, NaN where a gradient was not finite, and Inf where all were, but their
            factors' format cannot hold them.
        """
        if self._compressor is None:
            self._average(list(chain.from_iterable(self._gradients.groups())))
            return self._gradients.squared_norms()
        pieces = self._pieces()
        plain = [pieces[number] for number in self._plain]
        self._average(plain)
        compressed = self._compressor.reduce(pieces).squares
        norms = torch.stack(torch._foreach_norm(plain, 2, dtype=torch.float32)).to(compressed.device)
        norms = torch.where(norms.isfinite(), norms, math.nan)
        owners = [self._group_of[number] for number in self._plain]
        owners += [self._group_of[shard.piece] for shard in self._compressor.shards]
        squares = torch.zeros(len(self._parameters), device=compressed.device)
        numbers = torch.tensor(owners, device=compressed.device)
        return squares.index_add_(0, numbers, torch.cat([norms.square(), compressed]))

    @property
    def compresses(self) -> bool:
        """Whether gradients cross as factors."""
        return self._compressor is not None

    def restore_error_feedback(self, groups: Collection[int]) -> None:
        """`PowerSGD.restore_error_feedback` of parameter groups whose gradients, still as `reduce` left them, are not used."""
        if self._compressor is None or not groups:
            return
        shards = self._compressor.shards
        numbers = [number for number, shard in enumerate(shards) if self._group_of[shard.piece] in groups]
        self._compressor.restore_error_feedback(numbers, self._pieces())

    def errors(self) -> dict[str, Tensor]:
        """`PowerSGD.errors` by the parameters' names, for what this process holds; empty without compression. Collective."""
        return {} if self._compressor is None else self._compressor.errors()

    def load_error_feedback(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from `errors`, of any number of replicas."""
        if self._compressor is not None:
            self._compressor.load_error_feedback(sums)

    def describe(self) -> list[str]:
        """What crosses, for the user."""
        replicas = self._mesh.size("replica")
        if self._compressor is None:
            return [f"gradients are averaged over {replicas} replicas in fp32"]
        shards = self._compressor.shards
        share = sum(shard.factor_numel for shard in shards) / sum(shard.numel for shard in shards)
        lines = [
            f"gradients are averaged over {replicas} replicas, those of {len(shards)} matrices by PowerSGD of rank "
            f"{self._rank}: {share:.1%} of their numbers cross"
        ]
        if self._left_whole:
            lines.append(f"not compressed: {'; '.join(self._left_whole)}")
        return lines

    def _shard(self, name: str, piece: int, parameter: Any, block: int) -> MatrixShard | None:
        """This process's shard of a parameter; None, and a note for the user, where it is not made of whole rows."""
        mesh = self._mesh
        rows, columns = parameter.ds_shape
        parts = getattr(parameter, "fused", 1)
        count = mesh.size("shard") * parts
        if rows % count:
            runs = f"{mesh.size('shard')} shards" + (f" of {parts} matrices" if parts > 1 else "")
            self._left_whole.append(f"{name}, whose {rows} rows do not make {runs}")
            return None
        place = f"shard {mesh.index('shard')} of {mesh.size('shard')}"
        divisor = mesh.size("shard")
        if split_of(parameter) is not None:  # or else all parts of a tensor group must do the same
            place += f", part {mesh.index('tensor')} of {mesh.size('tensor')}"
            divisor *= mesh.size("tensor")
        return MatrixShard(name, piece, parts, rows // count, columns, self._rank // divisor, block, place)

    def _pieces(self) -> list[Tensor]:
        """This process's gradient of every parameter, as views of what DeepSpeed keeps."""
        pieces: list[Tensor] = []
        for tensors, parameters in zip(self._gradients.groups(), self._parameters, strict=True):
            sizes = iter([parameter.partition_numel() for parameter in parameters])
            for tensor in tensors:  # one parameter's, or several ones'
                own = [next(sizes)]
                while sum(own) < tensor.numel():
                    own.append(next(sizes))
                pieces += tensor.view(-1).split(own)
        return pieces

    def _average(self, pieces: Sequence[Tensor]) -> None:
        """Put means over replicas in place of `pieces`, in whatever format and place they are."""
        buckets: list[list[Tensor]] = []
        room = 0
        for piece in pieces:
            if piece.numel() > room or not buckets:
                buckets.append([])
                room = BUCKET
            buckets[-1].append(piece)
            room -= piece.numel()
        in_turns(self._average_bucket(bucket) for bucket in buckets)

    def _average_bucket(self, pieces: list[Tensor]) -> Generator[None, None, None]:
        device, first = self._mesh.device, pieces[0]
        is_ready = len(pieces) == 1 and first.is_contiguous()
        is_ready = is_ready and first.dtype == torch.float32 and first.device == device
        flat = (
            first.view(-1) if is_ready else torch.cat([piece.flatten().to(device, torch.float32) for piece in pieces])
        )
        flat.div_(self._mesh.size("replica"))
        handle = dist.all_reduce(flat, group=self._mesh.group("replica"), async_op=True)
        yield
        handle.wait()
        if not is_ready:
            for piece, mean in zip(pieces, flat.split([piece.numel() for piece in pieces]), strict=True):
                piece.copy_(mean.view_as(piece))


@torch.no_grad()
def broadcast_start(weights: MasterWeights, mesh: Mesh) -> None:
    """Let all replicas begin with the weights of the first. Collective.

    DeepSpeed sees to this within a replica only.
    """
    source = mesh.ranks("replica")[0]
    for shard in weights.shards:
        crossing = shard.detach().to(mesh.device)
        dist.broadcast(crossing, source, group=mesh.group("replica"))
        shard.copy_(crossing)
    weights.publish()


def _by_group(optimizer: Any) -> list[list[Any]]:
    """The parameters of every group of a ZeRO-3 optimizer, in the order in which `MasterGradients.groups` has their pieces."""
    groups: list[list[Any]] = [[] for _ in optimizer.param_groups]
    for index, parameters in enumerate(optimizer.fp16_groups):
        groups[optimizer.sub_group_to_group_id[index]].extend(parameters)
    return groups
