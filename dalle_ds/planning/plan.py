"""A run's plan (parameters, memory, traffic and time on a cluster), and the search for the layout with the best one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from dalle_ds.config import ParallelConfig, Precision
from dalle_ds.config.deepspeed import is_auto, resolve, with_precision
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import Mesh
from dalle_ds.planning.layout import Cluster, Layout
from dalle_ds.planning.memory import MOMENTS, Memory, stage_memory
from dalle_ds.planning.model import Stage, needed_flops, stages_of
from dalle_ds.planning.traffic import StepTime, Transfer, compression, step_time, traffic
from dalle_ds.tasks import Task
from dalle_ds.tasks.base import ModelParallelTask, PipelineTask


@dataclass(frozen=True)
class Plan:
    """What one run takes on one cluster."""

    task: Task[Any]
    layout: Layout
    cluster: Cluster
    device: str  # "cuda" or "cpu"
    stages: tuple[Stage, ...]
    memories: tuple[Memory, ...]  # of a process of each stage
    transfers: tuple[tuple[Transfer, ...], ...]  # of a process of each stage, in one update
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
            "compression": compression(self.stage),
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
    run, degrees = task.run, task.run.parallel
    taken = degrees.replicas * degrees.pipe * degrees.tensor
    if cluster.gpus % taken:
        raise ConfigError(
            f"parallel.replicas={degrees.replicas} × parallel.pipe={degrees.pipe} × parallel.tensor={degrees.tensor} = "
            f"{taken} does not divide {cluster.gpus} processes: plan for a multiple of {taken}, or lower a degree"
        )
    if is_auto(json_config, run):
        faster = (cluster.bf16_tflops or 0) > cluster.fp32_tflops
        json_config = with_precision(json_config, "bf16" if faster else "fp32")
    engine = resolve(json_config, run, cluster.gpus)
    task.check_layout(Mesh(0, cluster.gpus, torch.device("cpu"), degrees), engine.micro_batch, engine.precision)
    cluster.flops(engine.precision)  # refuses what the GPUs cannot compute in
    layout = Layout.of(run, engine, cluster.gpus)
    stages = stages_of(task, layout, device)
    memories = tuple(stage_memory(stage, layout, device) for stage in stages)
    transfers = tuple(traffic(stage, layout) for stage in stages)
    time = step_time(stages, transfers, layout, cluster)
    return Plan(task, layout, cluster, device, stages, memories, transfers, time)


# --- all layouts


class Refusal(NamedTuple):
    """Layouts that cannot work for one reason."""

    layouts: tuple[str, ...]  # their degrees and ZeRO stage
    reason: str  # what does not divide, or what does not fit and by how much
    deficit_bytes: int  # the least that is missing; 0 where the reason is another


class Found(NamedTuple):
    """What a search found."""

    plans: list[Plan]
    """One for each arrangement that fits, with the micro-batch and recomputation that make it fastest; fastest first."""
    refusals: list[Refusal]
    """Those with the smallest deficit first, then those that cannot be."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "plans": [plan.to_dict() for plan in self.plans],
            "refusals": [refusal._asdict() for refusal in self.refusals],
        }


def search(task: Task[Any], json_config: dict[str, Any], cluster: Cluster, device: str = "cuda") -> Found:
    """Plan every arrangement of a task's run.

    Tried are all degrees that multiply to the cluster's processes, tensor groups within a machine; ZeRO stages, unless the
    JSON or `train.zero_stage` states one; recomputation; and micro-batches, unless stated, of 1, 2, 4, … samples. The
    precision, unless stated, is bf16 where the cluster has it, else fp16, or fp32 for what cannot be fp16. All else is the
    run's.
    """
    if task.run.train.precision is None and not {"bf16", "fp16"} & set(json_config):
        fallback: Precision = "fp16" if isinstance(task, ModelParallelTask) else "fp32"
        json_config = with_precision(json_config, "bf16" if cluster.bf16_tflops is not None else fallback)
    plans: list[Plan] = []
    too_large: list[Refusal] = []
    impossible: dict[str, list[str]] = {}
    for degrees, stage in _arrangements(task, json_config, cluster):
        shards = cluster.gpus // (degrees.replicas * degrees.pipe * degrees.tensor)
        counts = {"replicas": degrees.replicas, "pipe": degrees.pipe, "tensor": degrees.tensor}
        parts = [f"{axis} {count}" for axis, count in counts.items() if count > 1]
        name = " ".join([*parts, f"shards {shards} ZeRO-{stage}", *["sequence"] * degrees.sequence])
        zero = {**json_config.get("zero_optimization", {}), "stage": stage}
        variants = list(_variants(task, degrees, {**json_config, "zero_optimization": zero}, cluster, device))
        fitting = [plan for plan in variants if isinstance(plan, Plan) and not plan.deficit_bytes]
        deficits = [plan.deficit_bytes for plan in variants if isinstance(plan, Plan)]
        if fitting:
            plans.append(min(fitting, key=lambda plan: plan.time.total))
        elif deficits:
            reason = f"does not fit: {min(deficits) / 1e9:.1f} GB are missing with the smallest micro-batch"
            too_large.append(Refusal((name,), reason, min(deficits)))
        else:
            impossible.setdefault(str(variants[-1]), []).append(name)
    plans.sort(key=lambda plan: (plan.time.total, plan.memory.peak))
    too_large.sort(key=lambda refusal: refusal.deficit_bytes)
    return Found(plans, too_large + [Refusal(tuple(names), reason, 0) for reason, names in impossible.items()])


def _arrangements(
    task: Task[Any], json_config: dict[str, Any], cluster: Cluster
) -> Iterator[tuple[ParallelConfig, int]]:
    """Degrees and a ZeRO stage."""
    stated = task.run.train.zero_stage
    if stated is None:
        stated = json_config.get("zero_optimization", {}).get("stage")
    processes = cluster.gpus
    is_divided, is_cut = isinstance(task, ModelParallelTask), isinstance(task, PipelineTask)
    for tensor in _divisors(min(processes, cluster.gpus_per_node)) if is_divided else [1]:
        for pipe in _divisors(processes // tensor) if is_cut and processes % tensor == 0 else [1]:
            for replicas in _divisors(processes // (tensor * pipe)) if pipe == 1 else [1]:
                for stage in [stated] if stated is not None else [1] if pipe > 1 else [0, 1, 2, 3]:
                    for sequence in [False, True] if is_cut and tensor > 1 else [False]:
                        yield ParallelConfig(replicas=replicas, tensor=tensor, pipe=pipe, sequence=sequence), stage


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _variants(
    task: Task[Any], degrees: ParallelConfig, json_config: dict[str, Any], cluster: Cluster, device: str
) -> Iterator[Plan | ConfigError]:
    """Plans of one arrangement, by recomputation and micro-batch, and why there are none."""
    train, powersgd = task.run.train, task.run.powersgd
    if degrees.replicas == 1:
        powersgd = replace(powersgd, enabled=False)
    rows = train.batch_size // (cluster.gpus // (degrees.pipe * degrees.tensor))
    # Where nothing divides what a process sees of an update, 1 tells why.
    sizes = [size for size in (2**power for power in range(rows.bit_length())) if rows % size == 0] or [1]
    policies = ("none", "selective", "full") if hasattr(train, "activation_checkpointing") else (None,)
    for policy in policies:
        options = {} if policy is None else {"activation_checkpointing": policy}
        for micro_batch in sizes if train.micro_batch is None else [train.micro_batch]:
            try:
                changed = replace(train, micro_batch=micro_batch, **options)
                run = replace(task.run, parallel=degrees, powersgd=powersgd, train=changed)
                plan = make_plan(type(task).planned(run), json_config, cluster, device)
            except ConfigError as error:
                yield error
                break
            yield plan
            if plan.deficit_bytes:
                break  # more samples need more
