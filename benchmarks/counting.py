"""Counts what a program really allocates and exchanges, tensor by tensor, on any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of the storages that exist, and the most at any time, while this mode is on.

    Counted are the storages that operators return, whoever keeps them: also those that autograd saves, which no Python object
    names. Copies inside of operators are not seen.

    Args:
        known: tensors that exist already and are to be counted.
        left_out: tensors that are not; they must exist for as long as this mode is on.
    """

    def __init__(self, known: Iterable[Tensor] = (), left_out: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
        self.peak = 0
        """Most bytes so far."""
        for tensor in known:
            self._note(tensor)

    def now(self) -> int:
        """Bytes that exist."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        self.peak = max(self.peak, self.now())
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" or storage._cdata in self._left_out:
            return
        known = self._storages.get(storage._cdata)
        if known is None or known[0].expired() or known[1] != storage.nbytes():
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())


class Exchanges(TorchDispatchMode):
    """Bytes that this process sends, by collective, while this mode is on; along which axis is not told apart.

    Args:
        processes: of collectives that do not name their group.
    """

    def __init__(self, processes: int) -> None:
        super().__init__()
        self._processes = processes
        self.sent: Counter[str] = Counter()
        """By name of the operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.partition(".")[0].strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: tuple[Any, ...]) -> None:
        tensors = [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]
        if not tensors:
            return  # a barrier
        largest = max(tensor.nbytes for tensor in tensors)
        group = next((found for found in map(process_group, args) if found is not None), None)
        processes = self._processes if group is None else group.size()
        share = (processes - 1) / processes
        if operation == "allreduce":
            self.sent["all-reduce"] += int(2 * share * sum(tensor.nbytes for tensor in tensors))
        elif operation in ("allgather_base", "reduce_scatter_base", "alltoall_base"):
            name = {"allgather_base": "all-gather", "reduce_scatter_base": "reduce-scatter"}.get(
                operation, "all-to-all"
            )
            self.sent[name] += int(share * largest)
        elif operation in ("allgather", "reduce_scatter"):
            # A list of all processes' parts, and this one's.
            name = "all-gather" if operation == "allgather" else "reduce-scatter"
            self.sent[name] += int(share * largest * processes)
        elif operation == "send":
            self.sent["send"] += largest
        elif operation not in ("recv", "broadcast", "barrier"):
            raise NotImplementedError(f"a collective that is not counted: {operation}")


def process_group(argument: Any) -> Any:
    """The process group that an argument of a collective is; None if it is something else."""
    is_object = isinstance(argument, torch.ScriptObject)
    is_group = is_object and "ProcessGroup" in str(argument._type())
    return dist.ProcessGroup.unbox(argument) if is_group else None
