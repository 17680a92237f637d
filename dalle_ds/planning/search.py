"""All layouts of a run on a cluster: those that fit, the fastest first, and why the others do not work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dalle_ds.config import Checkpointing, ParallelConfig, Run, TransformerRun
from dalle_ds.errors import ConfigError
from dalle_ds.planning.cluster import Cluster
from dalle_ds.planning.plan import Plan, make_plan

_RECOMPUTE: tuple[Checkpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Refusal:
    """Layouts that cannot work for one reason."""

    layouts: tuple[str, ...]
    """Their degrees and ZeRO stage."""
    reason: str
    """What does not divide, or what does not fit and by how much."""
    lacking: int
    """Bytes that are lacking at least; 0 where the reason is another."""


@dataclass(frozen=True)
class Found:
    """What a search found."""

    plans: tuple[Plan, ...]
    """One for each arrangement that fits, with the micro-batch and recomputation that make it fastest; fastest first."""
    refusals: tuple[Refusal, ...]
    """Those that lack the least first, then those that cannot be."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "plans": [plan.to_dict() for plan in self.plans],
            "refusals": [asdict(refusal) for refusal in self.refusals],
        }


@dataclass(frozen=True)
class _Arrangement:
    """Degrees and a ZeRO stage."""

    degrees: ParallelConfig
    shards: int
    zero_stage: int

    @property
    def name(self) -> str:
        counts = {"replicas": self.degrees.replicas, "pipe": self.degrees.pipe, "tensor": self.degrees.tensor}
        parts = [f"{name} {count}" for name, count in counts.items() if count > 1]
        return " ".join([*parts, f"shards {self.shards} ZeRO-{self.zero_stage}"]) + (
            " sequence" if self.degrees.sequence else ""
        )


def search(run: Run, json_config: dict[str, Any], cluster: Cluster, device: str = "cuda") -> Found:
    """Plan every arrangement of a run.

    Tried are all degrees that multiply to the cluster's processes, tensor groups within a machine; ZeRO stages, unless the
    JSON or `train.zero_stage` states one; recomputation; and micro-batches, unless stated, of 1, 2, 4, … samples. The
    precision, unless stated, is bf16 where the cluster has it, else fp16. All else is the run's.
    """
    run, json_config = _with_precision(run, json_config, cluster)
    plans: list[Plan] = []
    lacking: list[Refusal] = []
    impossible: dict[str, list[str]] = {}
    for arrangement in _arrangements(run, json_config, cluster):
        try:
            best, least = _best(run, json_config, arrangement, cluster, device)
        except ConfigError as error:
            impossible.setdefault(str(error), []).append(arrangement.name)
            continue
        if best is not None:
            plans.append(best)
        else:
            reason = f"does not fit: {least / 1e9:.1f} GB are lacking with the smallest micro-batch"
            lacking.append(Refusal((arrangement.name,), reason, least))
    plans.sort(key=lambda plan: (plan.time.total, plan.memory.peak))
    lacking.sort(key=lambda refusal: refusal.lacking)
    refused = [Refusal(tuple(names), reason, 0) for reason, names in impossible.items()]
    return Found(tuple(plans), (*lacking, *refused))


def _best(
    run: Run, json_config: dict[str, Any], arrangement: _Arrangement, cluster: Cluster, device: str
) -> tuple[Plan | None, int]:
    """The fastest plan that fits, and the fewest bytes that are lacking where none does."""
    best: Plan | None = None
    least: int | None = None
    zero = {**json_config.get("zero_optimization", {}), "stage": arrangement.zero_stage}
    json_config = {**json_config, "zero_optimization": zero}
    powersgd = run.powersgd if arrangement.degrees.replicas > 1 else replace(run.powersgd, enabled=False)
    recomputations = [{"activation_checkpointing": kind} for kind in _RECOMPUTE]
    for recompute in recomputations if isinstance(run, TransformerRun) else [{}]:
        for micro_batch in _micro_batches(run, arrangement, cluster):
            train = replace(run.train, micro_batch=micro_batch, **recompute)  # type: ignore[arg-type]
            changed = replace(run, parallel=arrangement.degrees, powersgd=powersgd, train=train)
            plan = make_plan(changed, json_config, cluster, device)
            least = plan.lacking if least is None else min(least, plan.lacking)
            if plan.lacking:
                break  # more samples need more
            if best is None or plan.time.total < best.time.total:
                best = plan
    assert least is not None, "no micro-batch was tried"
    return best, least


def _arrangements(run: Run, json_config: dict[str, Any], cluster: Cluster) -> Iterator[_Arrangement]:
    stated = run.train.zero_stage
    if stated is None:
        stated = json_config.get("zero_optimization", {}).get("stage")
    processes = cluster.gpus
    is_divided = isinstance(run, TransformerRun)
    for tensor in _divisors(min(processes, cluster.gpus_per_node)) if is_divided else [1]:
        for pipe in _divisors(processes // tensor) if is_divided and processes % tensor == 0 else [1]:
            for replicas in _divisors(processes // (tensor * pipe)) if pipe == 1 else [1]:
                shards = processes // (tensor * pipe * replicas)
                for stage in [stated] if stated is not None else [1] if pipe > 1 else [0, 1, 2, 3]:
                    for sequence in [False, True] if tensor > 1 else [False]:
                        degrees = ParallelConfig(replicas=replicas, tensor=tensor, pipe=pipe, sequence=sequence)
                        yield _Arrangement(degrees, shards, stage)


def _micro_batches(run: Run, arrangement: _Arrangement, cluster: Cluster) -> list[int]:
    """Powers of two that divide what a process sees of an update; 1 where nothing does, to be told why."""
    if run.train.micro_batch is not None:
        return [run.train.micro_batch]
    rows = run.train.batch_size // (arrangement.shards * arrangement.degrees.replicas)
    return [size for size in (2**power for power in range(rows.bit_length())) if rows % size == 0] or [1]


def _with_precision(run: Run, json_config: dict[str, Any], cluster: Cluster) -> tuple[Run, dict[str, Any]]:
    is_stated = run.train.precision is not None or any(name in json_config for name in ("bf16", "fp16"))
    if is_stated:
        return run, json_config
    name = "bf16" if cluster.bf16_tflops is not None or not isinstance(run, TransformerRun) else "fp16"
    return run, {**json_config, name: {"enabled": True}}


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
