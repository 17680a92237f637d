"""A run's plan: parameters, memory, traffic and time on a cluster, from formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dalle_ds.config import Run, TransformerRun
from dalle_ds.config.deepspeed import is_auto, resolve, with_precision
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.planning.cluster import Cluster
from dalle_ds.planning.layout import Layout, shards_of
from dalle_ds.planning.memory import MOMENTS, Memory, stage_memory
from dalle_ds.planning.stages import Stage, stages_of
from dalle_ds.planning.steptime import StepTime, step_time
from dalle_ds.planning.traffic import Transfer, compression, traffic
from dalle_ds.planning.work import Work, work_of


@dataclass(frozen=True)
class Plan:
    """What one run takes on one cluster."""

    run: Run
    layout: Layout
    cluster: Cluster
    device: str
    """"cuda" or "cpu"."""
    stages: tuple[Stage, ...]
    work: Work
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
    def lacking(self) -> int:
        """Bytes that a process needs beyond what the cluster has for it, on the device or in main memory; 0 if it fits."""
        return max(0, self.memory.peak - self.cluster.memory, self.host - self.cluster.host_memory)

    @property
    def host(self) -> int:
        """Bytes of main memory that the process with the most takes."""
        return max(memory.host for memory in self.memories)

    @property
    def items_per_second(self) -> float:
        """Tokens or pixels, of all processes together."""
        return self.layout.batch_size * self.work.items[1] / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: needed operations in relation to what all GPUs could do at their peak."""
        peak = self.cluster.flops(self.layout.precision) * self.layout.processes
        return self.work.needed * self.layout.batch_size / self.time.total / peak

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.run.steps * self.time.total / 86_400

    def parameters_by_role(self) -> dict[str, int]:
        """Of the whole model."""
        counts: Counter[str] = Counter()
        (whole,) = stages_of(self.run, replace(self.layout, tensor=1, pipe=1, sequence=False), "cpu")
        for parameter in whole.parameters:
            counts[parameter.role] += parameter.numel
        return dict(counts)

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "layout": asdict(self.layout),
            "cluster": asdict(self.cluster),
            "parameters": {**self.parameters_by_role(), "per_process": self.stage.parameters.count},
            "memory": {
                "bytes": {use.kind: {m: use.at(m) for m in MOMENTS} | {"host": use.host} for use in self.memory.uses},
                "peak": self.memory.peak,
                "peak_moment": self.memory.peak_moment,
                "host": self.host,
                "available": self.cluster.memory,
                "host_available": self.cluster.host_memory,
                "lacking": self.lacking,
            },
            "transfers": [asdict(t) | {"sent": t.sent} for t in self.transfers[self.heaviest]],
            "compression": compression(self.stage, self.layout),
            "seconds": asdict(self.time) | {"total": self.time.total},
            f"{self.work.items[0]}_per_second": self.items_per_second,
            "mfu": self.mfu,
            "days": self.days,
        }


def make_plan(run: Run, json_config: dict[str, Any], cluster: Cluster, device: str = "cuda") -> Plan:
    """The plan of a run on all GPUs of a cluster.

    Args:
        json_config: the DeepSpeed JSON's content.
        device: "cuda", or "cpu" for processes that compute in main memory.

    Raises:
        ConfigError: whatever training would refuse, and a precision that the cluster has no units for.
    """
    shards_of(run.parallel, cluster.gpus)
    if is_auto(json_config, run):
        json_config = with_precision(
            json_config, "bf16" if (cluster.bf16_tflops or 0) > cluster.fp32_tflops else "fp32"
        )
    engine = resolve(json_config, run, cluster.gpus)
    if isinstance(run, TransformerRun):
        Mesh(0, cluster.gpus, torch.device("cpu"), run.parallel).check(run.model)
    elif run.parallel.tensor * run.parallel.pipe > 1:
        raise ConfigError("a dVAE is divided by ZeRO and replicas only: leave out parallel.tensor and parallel.pipe")
    layout = Layout.of(run, engine, cluster.gpus)
    return plan_layout(run, layout, cluster, device)


def plan_layout(run: Run, layout: Layout, cluster: Cluster, device: str) -> Plan:
    """The plan of a layout that is known to be possible."""
    cluster.flops(layout.precision)  # refuses what the GPUs cannot compute in
    stages = stages_of(run, layout, device)
    config = run.model if isinstance(run, TransformerRun) else None
    memories = tuple(stage_memory(stage, layout, device) for stage in stages)
    transfers = tuple(traffic(stage, config, layout) for stage in stages)
    work = work_of(run, stages, layout, device)
    time = step_time(stages, transfers, work.executed, layout, cluster)
    return Plan(run, layout, cluster, device, stages, work, memories, transfers, time)
