"""A run's plan: parameters, memory, traffic and time on a cluster."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dalle_ds.config.deepspeed import is_auto, resolve, with_precision
from dalle_ds.parallel import Mesh
from dalle_ds.planning.cluster import Cluster
from dalle_ds.planning.layout import Layout, shards_of
from dalle_ds.planning.memory import MOMENTS, Memory, stage_memory
from dalle_ds.planning.model import Stage, needed_flops, stages_of
from dalle_ds.planning.steptime import StepTime, step_time
from dalle_ds.planning.traffic import Transfer, compression, traffic
from dalle_ds.tasks import Task


@dataclass(frozen=True)
class Plan:
    """What one run takes on one cluster."""

    task: Task[Any]
    layout: Layout
    cluster: Cluster
    device: str
    """"cuda" or "cpu"."""
    stages: tuple[Stage, ...]
    memories: tuple[Memory, ...]
    """Of a process of each stage."""
    transfers: tuple[tuple[Transfer, ...], ...]
    """Of a process of each stage, in one update."""
    time: StepTime

    @property
    def heaviest(self) -> int:
        """Number of the stage whose processes hold the most."""
        return max(range(len(self.memories)), key=lambda number: self.memories[number].peak)

    @property
    def memory(self) -> Memory:
        """Of the process that holds the most."""
        return self.memories[self.heaviest]

    @property
    def stage(self) -> Stage:
        """Of the process that holds the most."""
        return self.stages[self.heaviest]

    @property
    def host(self) -> int:
        """Bytes of main memory that the process with the most takes."""
        return max(memory.host for memory in self.memories)

    @property
    def deficit_bytes(self) -> int:
        """Bytes that a process needs beyond what the cluster has for it, on the device or in main memory; 0 if it fits."""
        return max(0, self.memory.peak - self.cluster.memory, self.host - self.cluster.host_memory)

    @property
    def items(self) -> tuple[str, int]:
        """What throughput counts, and how many of them a sample has."""
        name, count = self.task.items_per_sample()
        return (name, count) if count else ("samples", 1)

    @property
    def items_per_second(self) -> float:
        """Of all processes together."""
        return self.layout.batch_size * self.items[1] / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: needed operations in relation to what all GPUs could do at their peak."""
        peak = self.cluster.flops(self.layout.precision) * self.layout.processes
        return needed_flops(self.task) * self.layout.batch_size / self.time.total / peak

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.task.run.steps * self.time.total / 86_400

    def parameters(self) -> dict[str, int]:
        """Of the whole model, by its parts."""
        layout = replace(self.layout, tensor=1, pipe=1, sequence=False)
        return stages_of(self.task, layout, self.device)[0].parameters.parts()

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "layout": asdict(self.layout),
            "cluster": asdict(self.cluster),
            "parameters": {**self.parameters(), "per_process": self.stage.parameters.count},
            "memory": {
                "bytes": {use.kind: {m: use.at(m) for m in MOMENTS} | {"host": use.host} for use in self.memory.uses},
                "peak": self.memory.peak,
                "peak_moment": self.memory.peak_moment,
                "host": self.host,
                "available": self.cluster.memory,
                "host_available": self.cluster.host_memory,
                "deficit_bytes": self.deficit_bytes,
            },
            "transfers": [asdict(t) | {"sent": t.sent} for t in self.transfers[self.heaviest]],
            "compression": compression(self.stage, self.layout),
            "seconds": asdict(self.time) | {"total": self.time.total},
            f"{self.items[0]}_per_second": self.items_per_second,
            "mfu": self.mfu,
            "days": self.days,
        }


def make_plan(task: Task[Any], json_config: dict[str, Any], cluster: Cluster, device: str = "cuda") -> Plan:
    """The plan of a task's run on all GPUs of a cluster.

    Args:
        task: from `Task.planned`, or one that trains.
        json_config: the DeepSpeed JSON's content.
        device: "cuda", or "cpu" for processes that compute in main memory.

    Raises:
        ConfigError: whatever training would refuse, and a precision that the cluster has no units for.
    """
    run = task.run
    shards_of(run.parallel, cluster.gpus)
    if is_auto(json_config, run):
        faster = (cluster.bf16_tflops or 0) > cluster.fp32_tflops
        json_config = with_precision(json_config, "bf16" if faster else "fp32")
    engine = resolve(json_config, run, cluster.gpus)
    task.check_layout(Mesh(0, cluster.gpus, torch.device("cpu"), run.parallel), engine.micro_batch, engine.precision)
    cluster.flops(engine.precision)  # refuses what the GPUs cannot compute in
    layout = Layout.of(run, engine, cluster.gpus)
    stages = stages_of(task, layout, device)
    memories = tuple(stage_memory(stage, layout, device) for stage in stages)
    transfers = tuple(traffic(stage, layout) for stage in stages)
    time = step_time(stages, transfers, layout, cluster)
    return Plan(task, layout, cluster, device, stages, memories, transfers, time)
