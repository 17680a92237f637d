"""A plan as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.console import Group, RenderableType
from rich.table import Table

from dalle_ds.planning.cluster import GB, Cluster
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.memory import MOMENTS, Memory
from dalle_ds.planning.plan import Plan
from dalle_ds.planning.search import Found, Refusal
from dalle_ds.planning.traffic import compression

_SHOWN = 10
"""Rows of tables that could have hundreds."""
_MOMENT_TITLES = {
    "between": "between updates",
    "loss": "in the loss",
    "backward": "backward begins",
    "reduce": "backward ends",
    "step": "in the step",
}


def gigabytes(size: float) -> str:
    """Bytes as GB, with as many digits as tell something."""
    return "–" if size == 0 else f"{size / GB:.1f}" if size >= GB else f"{size / GB:.2g}"


def plan_tables(plan: Plan) -> RenderableType:
    """All of a plan."""
    tables = [parameter_table(plan), memory_table(plan), time_table(plan)]
    if plan.transfers[plan.heaviest]:
        tables.insert(2, traffic_table(plan))
    return Group(_heading(plan), *tables, _notes(plan))


def describe_layout(layout: Layout) -> str:
    """Degrees and settings on one line."""
    degrees = {
        "replicas": layout.replicas,
        "stages": layout.pipe,
        "shards": layout.shards,
        "tensor parts": layout.tensor,
    }
    arranged = " × ".join(f"{count} {name}" for name, count in degrees.items() if count > 1) or "1 process"
    parts = [
        arranged + (" by positions" if layout.sequence else ""),
        f"ZeRO-{layout.zero_stage}",
        layout.precision,
        f"{layout.accumulation} × {layout.micro_batch} × {layout.readers} = {layout.batch_size} samples per update",
        f"recompute {layout.checkpointing}",
        f"{layout.moments} moments",
    ]
    if layout.average != "none":
        parts.append(f"average {'in main memory' if layout.average == 'cpu' else 'on the device'}")
    if layout.offload_optimizer:
        parts.append("optimizer in main memory" + (" with weights" if layout.offload_weights else ""))
    if layout.powersgd.enabled:
        settings = layout.powersgd
        parts.append(f"PowerSGD, errors {settings.storage}, factors {settings.transport}")
    return ", ".join(parts)


def _heading(plan: Plan) -> str:
    cluster = plan.cluster
    machines = -(-cluster.gpus // cluster.gpus_per_node)
    processes = "1 process" if cluster.gpus == 1 else f"{cluster.gpus} processes"
    return (
        f"{processes} on {machines} machine{'s' if machines > 1 else ''}, {cluster.memory_gb} GB each "
        f"({cluster.reserved_gb} GB of it reserved)\n{describe_layout(plan.layout)}\n"
    )


def parameter_table(plan: Plan) -> Table:
    """By part of the model, and what one process has of them."""
    table = Table(title="Parameters", title_justify="left")
    table.add_column("of")
    table.add_column("millions", justify="right")
    counts = plan.parameters_by_role()
    for role, count in counts.items():
        table.add_row(role, f"{count / 1e6:,.1f}")
    table.add_row("the model", f"{sum(counts.values()) / 1e6:,.1f}", end_section=True)
    where = f" of stage {plan.stage.number}" if plan.layout.pipe > 1 else ""
    table.add_row(f"a process{where}, before ZeRO divides them", f"{plan.stage.parameters.count / 1e6:,.1f}")
    return table


def memory_table(plan: Plan) -> Table:
    """By kind and moment, of the process that holds the most."""
    memory, cluster = plan.memory, plan.cluster
    where = f" of stage {plan.stage.number}" if plan.layout.pipe > 1 else ""
    table = Table(title=f"Memory of a process{where}, GB", title_justify="left")
    table.add_column("kind")
    for moment in MOMENTS:
        table.add_column(_MOMENT_TITLES[moment], justify="right")
    table.add_column("main memory", justify="right")
    for use in memory.uses:
        row = [gigabytes(use.at(moment)) for moment in MOMENTS]
        table.add_row(use.kind, *row, gigabytes(use.host), end_section=use is memory.uses[-1])
    sums = [gigabytes(memory.at(moment)) for moment in MOMENTS]
    table.add_row("all", *sums, gigabytes(plan.host))
    table.add_row("available", *[gigabytes(cluster.memory)] * len(MOMENTS), gigabytes(cluster.host_memory))
    return table


def traffic_table(plan: Plan) -> Table:
    """What one process sends in an update."""
    table = Table(title="Sent by a process in an update", title_justify="left")
    for column in ("axis", "what", "operation"):
        table.add_column(column)
    for column in ("processes", "times", "GB"):
        table.add_column(column, justify="right")
    for transfer in plan.transfers[plan.heaviest]:
        table.add_row(
            transfer.axis,
            transfer.what,
            transfer.operation,
            str(transfer.processes),
            str(transfer.times),
            gigabytes(transfer.sent),
        )
    return table


def time_table(plan: Plan) -> Table:
    """Where an update's time goes, and what comes of it."""
    table = Table(title="Projected time of an update", title_justify="left")
    table.add_column("for")
    table.add_column("seconds", justify="right")
    for entry in fields(plan.time):
        seconds = getattr(plan.time, entry.name)
        if seconds:
            table.add_row(entry.name, f"{seconds:.3g}")
    table.add_row("all", f"{plan.time.total:.3g}", end_section=True)
    table.add_row(f"{plan.work.items[0]} per second", f"{plan.items_per_second:,.0f}")
    table.add_row("model FLOPs utilization", f"{plan.mfu:.1%}")
    table.add_row(f"days for {plan.run.steps:,} updates", f"{plan.days:.1f}")
    return table


def _notes(plan: Plan) -> str:
    lines = [verdict(plan), "Assumed: " + assumptions(plan.cluster)]
    saved = compression(plan.stage, plan.layout)
    if saved:
        lines.insert(1, f"PowerSGD leaves out {saved:.1%} of the gradients that it compresses.")
    return "\n".join(lines)


def assumptions(cluster: Cluster) -> str:
    """What the projected time rests on."""
    return (
        f"matrix products reach {cluster.utilization:.0%} of their peak, collectives {cluster.link_utilization:.0%} of "
        f"{cluster.node_gb_s:g} GB/s within a machine and {cluster.network_gb_s:g} GB/s per GPU between machines, after "
        f"{cluster.collective_us:g} µs each; what shards exchange in the passes is hidden behind {cluster.overlap:.0%} of the "
        "computation; loading data, validation and checkpoints take no time"
    )


def verdict(plan: Plan) -> str:
    """Whether it fits, in one sentence."""
    cluster = plan.cluster
    device = f"{gigabytes(plan.memory.peak)} of {gigabytes(cluster.memory)} GB per process"
    host = f" and {gigabytes(plan.host)} of {gigabytes(cluster.host_memory)} GB of main memory" if plan.host else ""
    if plan.lacking:
        text = f"It does not fit: {device}{host}; {gigabytes(plan.lacking)} GB are lacking."
        if plan.memory.peak <= cluster.memory:
            return f"{text} To change that: keep less in main memory (train.average_device, offload), or use more machines."
        return f"{text} {remedy(plan.memory, plan.layout, plan.device)}"
    return f"It fits: {device}{host}."


def remedy(memory: Memory, layout: Layout, device: str) -> str:
    """What to change so that less is held at the peak: the options that save the most first.

    Args:
        device: on "cpu" there is no other memory to move things to.
    """
    moment = memory.peak_moment
    held = {use.kind: use.at(moment) for use in memory.uses}
    options: list[tuple[int, str]] = []

    def offer(saved: int, text: str) -> None:
        if saved > 0:
            options.append((saved, text))

    activations = held.get("activations", 0) + held.get("working set of a block", 0) + held.get("loss and logits", 0)
    if layout.micro_batch > 1:
        offer(activations // 2, f"halve train.micro_batch, which is {layout.micro_batch}")
    if layout.checkpointing != "full":
        offer(held.get("activations", 0) * 3 // 4, "set train.activation_checkpointing to full")
    state = sum(held.get(kind, 0) for kind in ("fp32 weights", "Adam's moments", "gradients", "weights"))
    if layout.zero_stage < 3 and layout.pipe == 1 and layout.shards > 1:
        offer(state - state // layout.shards, "set zero_optimization.stage to 3")
    if layout.moments == "fp32":
        offer(held.get("Adam's moments", 0) // 2, "set optim.moments to 16-bit")
    if not layout.offload_optimizer and device != "cpu":
        offer(held.get("Adam's moments", 0) + held.get("fp32 weights", 0), "offload the optimizer to main memory")
    if layout.average == "same" and device != "cpu":
        offer(held.get("average", 0), "set train.average_device to cpu")
    buckets = held.get("reduction buckets", 0)
    offer(buckets * 3 // 4, f"lower zero_optimization.reduce_bucket_size, which is {layout.buffers.reduce:,}")
    offer(
        held.get("gathered weights", 0) * 3 // 4,
        "lower zero_optimization.stage3_max_live_parameters and stage3_max_reuse_distance",
    )
    offer(state // 2, "divide the model among more processes (fewer parallel.replicas, or more parallel.tensor)")
    best = [text for _, text in sorted(options, reverse=True)[:4]]
    return f"To change that: {'; '.join(best)}." if best else ""


def found_tables(found: Found) -> RenderableType:
    """What a search found: the fastest layouts, and why others do not work."""
    if not found.plans:
        return Group("No layout fits.\n", refusals_table(found.refusals))
    return Group(
        layouts_table(found.plans),
        refusals_table(found.refusals),
        "Assumed: " + assumptions(found.plans[0].cluster),
    )


def layouts_table(plans: Sequence[Plan]) -> Table:
    """Plans side by side."""
    table = Table(title=f"{len(plans)} layouts fit; the fastest", title_justify="left")
    table.add_column("layout")
    for column in ("GB", "seconds", f"{plans[0].work.items[0]}/s", "MFU"):
        table.add_column(column, justify="right")
    for plan in plans[:_SHOWN]:
        table.add_row(
            describe_layout(plan.layout),
            gigabytes(plan.memory.peak),
            f"{plan.time.total:.3g}",
            f"{plan.items_per_second:,.0f}",
            f"{plan.mfu:.1%}",
        )
    return table


def refusals_table(refusals: Sequence[Refusal]) -> Table:
    """The layouts that lack the least, and all reasons of another kind."""
    lacking = [refusal for refusal in refusals if refusal.lacking]
    others = [refusal for refusal in refusals if not refusal.lacking]
    table = Table(title=f"{len(lacking)} layouts do not fit; the nearest. Others cannot be", title_justify="left")
    table.add_column("layouts")
    table.add_column("reason")
    for refusal in [*lacking[:_SHOWN], *others]:
        more = f" and {len(refusal.layouts) - 1} more" if len(refusal.layouts) > 1 else ""
        table.add_row(refusal.layouts[0] + more, refusal.reason)
    return table
