"""All layouts of a run on a cluster: those that fit, the fastest first, and why the others do not work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dalle_ds.config import ParallelConfig
from dalle_ds.errors import ConfigError
from dalle_ds.planning.cluster import Cluster
from dalle_ds.planning.plan import Plan, make_plan
from dalle_ds.tasks import Task
from dalle_ds.tasks.base import ModelParallelTask


@dataclass(frozen=True)
class Refusal:
    """Layouts that cannot work for one reason."""

    layouts: tuple[str, ...]
    """Their degrees and ZeRO stage."""
    reason: str
    """What does not divide, or what does not fit and by how much."""
    deficit_bytes: int
    """The least that is missing; 0 where the reason is another."""


@dataclass(frozen=True)
class Found:
    """What a search found."""

    plans: tuple[Plan, ...]
    """One for each arrangement that fits, with the micro-batch and recomputation that make it fastest; fastest first."""
    refusals: tuple[Refusal, ...]
    """Those with the smallest deficit first, then those that cannot be."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"plans": [plan.to_dict() for plan in self.plans], "refusals": [asdict(each) for each in self.refusals]}


def search(task: Task[Any], json_config: dict[str, Any], cluster: Cluster, device: str = "cuda") -> Found:
    """Plan every arrangement of a task's run.

    Tried are all degrees that multiply to the cluster's processes, tensor groups within a machine; ZeRO stages, unless the
    JSON or `train.zero_stage` states one; recomputation; and micro-batches, unless stated, of 1, 2, 4, … samples. The
    precision, unless stated, is bf16 where the cluster has it, else fp16, or fp32 for what cannot be fp16. All else is the
    run's.
    """
    if task.run.train.precision is None and not {"bf16", "fp16"} & set(json_config):
        precision = (
            "bf16" if cluster.bf16_tflops is not None else "fp16" if isinstance(task, ModelParallelTask) else "fp32"
        )
        json_config = {**json_config, **{name: {"enabled": name == precision} for name in ("bf16", "fp16")}}
    plans: list[Plan] = []
    too_large: list[Refusal] = []
    impossible: dict[str, list[str]] = {}
    for degrees, stage in _arrangements(task, json_config, cluster):
        shards = cluster.gpus // (degrees.replicas * degrees.pipe * degrees.tensor)
        counts = {"replicas": degrees.replicas, "pipe": degrees.pipe, "tensor": degrees.tensor}
        parts = [f"{axis} {count}" for axis, count in counts.items() if count > 1]
        name = " ".join([*parts, f"shards {shards} ZeRO-{stage}", *["sequence"] * degrees.sequence])
        try:
            best, deficit = _best(task, json_config, degrees, stage, shards, cluster, device)
        except ConfigError as error:
            impossible.setdefault(str(error), []).append(name)
            continue
        if best is not None:
            plans.append(best)
        else:
            reason = f"does not fit: {deficit / 1e9:.1f} GB are missing with the smallest micro-batch"
            too_large.append(Refusal((name,), reason, deficit))
    plans.sort(key=lambda plan: (plan.time.total, plan.memory.peak))
    too_large.sort(key=lambda refusal: refusal.deficit_bytes)
    return Found(tuple(plans), (*too_large, *(Refusal(tuple(names), why, 0) for why, names in impossible.items())))


def _best(
    task: Task[Any],
    json_config: dict[str, Any],
    degrees: ParallelConfig,
    stage: int,
    shards: int,
    cluster: Cluster,
    device: str,
) -> tuple[Plan | None, int]:
    """The fastest plan that fits, and the least deficit where none does.

    Raises:
        ConfigError: nothing of the arrangement can be planned.
    """
    run, fitting, deficits = task.run, list[Plan](), list[int]()
    refusal: ConfigError | None = None
    json_config = {**json_config, "zero_optimization": {**json_config.get("zero_optimization", {}), "stage": stage}}
    powersgd = run.powersgd if degrees.replicas > 1 else replace(run.powersgd, enabled=False)
    rows = run.train.batch_size // (shards * degrees.replicas)
    # Where nothing divides what a process sees of an update, 1 tells why.
    sizes = [size for size in (2**power for power in range(rows.bit_length())) if rows % size == 0] or [1]
    policies = ("none", "selective", "full") if hasattr(run.train, "activation_checkpointing") else (None,)
    for policy in policies:
        options = {} if policy is None else {"activation_checkpointing": policy}
        for micro_batch in sizes if run.train.micro_batch is None else [run.train.micro_batch]:
            train = replace(run.train, micro_batch=micro_batch, **options)
            changed = replace(run, parallel=degrees, powersgd=powersgd, train=train)
            try:
                plan = make_plan(type(task).planned(changed), json_config, cluster, device)
            except ConfigError as error:
                refusal = error
                break
            deficits.append(plan.deficit_bytes)
            if plan.deficit_bytes:
                break  # more samples need more
            fitting.append(plan)
    if not deficits and refusal is not None:
        raise refusal
    return min(fitting, key=lambda plan: plan.time.total, default=None), min(deficits)


def _arrangements(
    task: Task[Any], json_config: dict[str, Any], cluster: Cluster
) -> Iterator[tuple[ParallelConfig, int]]:
    """Degrees and a ZeRO stage."""
    stated = task.run.train.zero_stage
    if stated is None:
        stated = json_config.get("zero_optimization", {}).get("stage")
    processes, is_divided = cluster.gpus, isinstance(task, ModelParallelTask)
    for tensor in _divisors(min(processes, cluster.gpus_per_node)) if is_divided else [1]:
        for pipe in _divisors(processes // tensor) if is_divided and processes % tensor == 0 else [1]:
            for replicas in _divisors(processes // (tensor * pipe)) if pipe == 1 else [1]:
                for stage in [stated] if stated is not None else [1] if pipe > 1 else [0, 1, 2, 3]:
                    for sequence in [False, True] if tensor > 1 else [False]:
                        yield ParallelConfig(replicas=replicas, tensor=tensor, pipe=pipe, sequence=sequence), stage


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
