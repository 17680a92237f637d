"""The processes of a run and what they do together."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.errors import ConfigError, DalleError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Mesh:
    """This process's place among the processes that share the run's data.

    Every method that communicates must be called by all ranks, in the same order.
    """

    rank: int
    """Index of this process."""
    world_size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return self.rank == 0

    @classmethod
    def start(cls, device: str = "auto", timeout_minutes: int = 30) -> Mesh:
        """Join the process group that the `deepspeed` launcher, srun or torchrun described in the environment.

        A process started with none of them becomes a group of one.

        Args:
            device: "auto" (CUDA where there is one), "cpu" or "cuda".

        Raises:
            ConfigError: CUDA asked for where there is none, or fewer GPUs than processes on this machine.
        """
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(_free_port())
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        chosen = _pick_device(device, local_rank)
        if chosen.type == "cpu":
            # Before DeepSpeed is imported, which would take a GPU that is there.
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        if chosen.type == "cpu":
            # DeepSpeed would compile a shared-memory operator on first use; gloo needs none and is no slower.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        else:
            torch.cuda.set_device(chosen)
        if not dist.is_initialized():
            try:
                deepspeed.init_distributed(
                    dist_backend="nccl" if chosen.type == "cuda" else "gloo",
                    timeout=datetime.timedelta(minutes=timeout_minutes),
                    verbose=False,
                )
            except dist.DistNetworkError as error:
                port = os.environ.get("MASTER_PORT", "unknown")
                raise ConfigError(
                    f"the processes cannot meet at port {port} ({error}); where another run uses it, give the deepspeed "
                    "launcher another one: --master_port N"
                ) from error
        return cls(dist.get_rank(), dist.get_world_size(), chosen)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all ranks, as a new tensor on this process's device."""
        total = value.detach().to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def decide(self, choose: Callable[[], Value]) -> Value:
        """What `choose` returns on the main process, on every process; where it raises a `DalleError`, all raise it.

        For what must not be decided by each process for itself, such as anything read from a disk that they may see at
        different times.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = choose()
            except DalleError as error:
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _pick_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, found {device!r}")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and available == 0):
        return torch.device("cpu")
    if local_rank >= available:
        raise ConfigError(
            f"process {local_rank} of this machine needs a GPU of its own, but PyTorch sees {available}: "
            "start fewer processes (deepspeed --num_gpus), or train on the CPU with --device cpu"
        )
    return torch.device("cuda", local_rank)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
