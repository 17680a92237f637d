"""A plan as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
_MOMENT_TITLES = ("between updates", "forward", "backward", "backward ends", "in the step")


def gigabytes(size: float) -> str:
    """Bytes as GB, with as many digits as tell something."""
    return "–" if size == 0 else f"{size / GB:.1f}" if size >= GB else f"{size / GB:.2g}"


def plan_tables(plan: Plan) -> RenderableType:
    """All of a plan."""
    cluster = plan.cluster
    machines = -(-cluster.gpus // cluster.gpus_per_node)
    heading = (
        f"processes: {cluster.gpus}, machines: {machines}, {cluster.memory_gb} GB for each process "
        f"({cluster.reserved_gb} GB of it reserved)\n{describe_layout(plan.layout)}\n"
    )
    where = f" of stage {plan.stage.number}" if plan.layout.pipe > 1 else ""
    tables = [_parameters(plan, where), _memory(plan, where)]
    if plan.transfers[plan.heaviest]:
        tables.append(_traffic(plan))
    notes = [fit_sentence(plan)]
    saved = compression(plan.stage, plan.layout)
    if saved:
        notes.append(f"PowerSGD leaves out {saved:.1%} of the gradients that it compresses.")
    return Group(heading, *tables, _time(plan), *notes, _assumptions(cluster))


def describe_layout(layout: Layout) -> str:
    """Degrees and settings on one line."""
    degrees = (
        (layout.replicas, "replicas"),
        (layout.pipe, "stages"),
        (layout.shards, "shards"),
        (layout.tensor, "tensor parts"),
    )
    arranged = " × ".join(f"{count} {name}" for count, name in degrees if count > 1) or "1 process"
    optional = {
        f"average {'in main memory' if layout.average == 'cpu' else 'on the device'}": layout.average != "none",
        f"optimizer in main memory{' with weights' if layout.offload_weights else ''}": layout.offload_optimizer,
        f"PowerSGD, errors {layout.powersgd.storage}, factors {layout.powersgd.transport}": layout.powersgd.enabled,
    }
    parts = [
        arranged + (" by positions" if layout.sequence else ""),
        f"ZeRO-{layout.zero_stage}",
        layout.precision,
        f"{layout.accumulation} × {layout.micro_batch} × {layout.readers} = {layout.batch_size} samples per update",
        f"recompute {layout.checkpointing}",
        f"{layout.moments} moments",
        *(text for text, is_so in optional.items() if is_so),
    ]
    return ", ".join(parts)


def _table(title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _parameters(plan: Plan, where: str) -> Table:
    counts = plan.parameters()
    counts |= {
        "the model": sum(counts.values()),
        f"a process{where}, before ZeRO divides them": plan.stage.parameters.count,
    }
    return _table("Parameters", ["of"], ["millions"], [(name, f"{count / 1e6:,.1f}") for name, count in counts.items()])


def _memory(plan: Plan, where: str) -> Table:
    """By kind and moment, of the process that holds the most."""
    memory, cluster = plan.memory, plan.cluster
    rows = [[use.kind, *[gigabytes(use.at(m)) for m in MOMENTS], gigabytes(use.host)] for use in memory.uses]
    rows.append(["all", *[gigabytes(memory.at(moment)) for moment in MOMENTS], gigabytes(plan.host)])
    rows.append(["available", *[gigabytes(cluster.memory)] * len(MOMENTS), gigabytes(cluster.host_memory)])
    return _table(f"Memory of a process{where}, GB", ["kind"], [*_MOMENT_TITLES, "main memory"], rows)


def _traffic(plan: Plan) -> Table:
    rows = [
        (t.axis, t.what, t.operation, str(t.processes), str(t.times), gigabytes(t.sent))
        for t in plan.transfers[plan.heaviest]
    ]
    names = ["axis", "what", "operation"]
    return _table("Sent by a process in an update", names, ["processes", "times", "GB"], rows)


def _time(plan: Plan) -> Table:
    """Where an update's time goes, and what comes of it."""
    seconds = {entry.name: getattr(plan.time, entry.name) for entry in fields(plan.time)} | {"all": plan.time.total}
    rows = [(name, f"{value:.3g}") for name, value in seconds.items() if value]
    rows.append((f"{plan.items[0]} per second", f"{plan.items_per_second:,.0f}"))
    rows.append(("model FLOPs utilization", f"{plan.mfu:.1%}"))
    rows.append((f"days for {plan.task.run.steps:,} updates", f"{plan.days:.1f}"))
    return _table("Projected time of an update", ["for"], ["seconds"], rows)


def _assumptions(cluster: Cluster) -> str:
    """What the projected time rests on."""
    return (
        f"Assumed: matrix products reach {cluster.utilization:.0%} of their peak, collectives {cluster.link_utilization:.0%} "
        f"of {cluster.node_gb_s:g} GB/s within a machine and {cluster.network_gb_s:g} GB/s per GPU between machines, after "
        f"{cluster.collective_us:g} µs each; what shards exchange in the passes is hidden behind {cluster.overlap:.0%} of the "
        "computation; loading data, validation and checkpoints take no time"
    )


def fit_sentence(plan: Plan) -> str:
    """Whether it fits, and what to change if not."""
    cluster = plan.cluster
    device = f"{gigabytes(plan.memory.peak)} of {gigabytes(cluster.memory)} GB per process"
    host = f" and {gigabytes(plan.host)} of {gigabytes(cluster.host_memory)} GB of main memory" if plan.host else ""
    if not plan.deficit_bytes:
        return f"It fits: {device}{host}."
    text = f"It does not fit: {device}{host}; {gigabytes(plan.deficit_bytes)} GB are missing."
    if plan.memory.peak <= cluster.memory:
        return f"{text} To change that: keep less in main memory (train.average_device, offload), or use more machines."
    return f"{text} {remedy(plan.memory, plan.layout, plan.device)}"


def remedy(memory: Memory, layout: Layout, device: str) -> str:
    """What to change so that less is held at the peak: the options that save the most first.

    Args:
        device: on "cpu" there is no other memory to move things to.
    """
    held = {use.kind: use.at(memory.peak_moment) for use in memory.uses}

    def of(*kinds: str) -> int:
        return sum(held.get(kind, 0) for kind in kinds)

    state, on_gpu = of("fp32 weights", "Adam's moments", "gradients", "weights"), device != "cpu"
    bucket = f"lower zero_optimization.reduce_bucket_size, which is {layout.buffers.reduce:,}"
    live = "lower zero_optimization.stage3_max_live_parameters and stage3_max_reuse_distance"
    more = "divide the model among more processes (fewer parallel.replicas, or more parallel.tensor)"
    offers = [
        (
            layout.micro_batch > 1,
            of("activations", "working set") // 2,
            f"halve train.micro_batch, {layout.micro_batch} now",
        ),
        (layout.checkpointing != "full", of("activations") * 3 // 4, "set train.activation_checkpointing to full"),
        (
            layout.zero_stage < 3 and layout.pipe == 1,
            state - state // layout.shards,
            "set zero_optimization.stage to 3",
        ),
        (layout.moments == "fp32", of("Adam's moments") // 2, "set optim.moments to 16-bit"),
        (on_gpu, of("Adam's moments", "fp32 weights"), "offload the optimizer to main memory"),
        (on_gpu, of("average"), "set train.average_device to cpu"),
        (True, of("reduction buckets") * 3 // 4, bucket),
        (True, of("gathered weights") * 3 // 4, live),
        (True, state // 2, more),
    ]
    best = sorted(((saved, text) for is_possible, saved, text in offers if is_possible and saved), reverse=True)[:4]
    return f"To change that: {'; '.join(text for _, text in best)}." if best else ""


def found_tables(found: Found) -> RenderableType:
    """What a search found: the fastest layouts, and why others do not work."""
    if not found.plans:
        return Group("No layout fits.\n", _refusals(found.refusals))
    plans = found.plans
    rows = [
        (
            describe_layout(plan.layout),
            gigabytes(plan.memory.peak),
            f"{plan.time.total:.3g}",
            f"{plan.items_per_second:,.0f}",
            f"{plan.mfu:.1%}",
        )
        for plan in plans[:_SHOWN]
    ]
    figures = ["GB", "seconds", f"{plans[0].items[0]}/s", "MFU"]
    table = _table(f"{len(plans)} layouts fit; the fastest", ["layout"], figures, rows)
    return Group(table, _refusals(found.refusals), _assumptions(plans[0].cluster))


def _refusals(refusals: Sequence[Refusal]) -> Table:
    """The layouts with the smallest deficit, and all reasons of another kind."""
    too_large = [refusal for refusal in refusals if refusal.deficit_bytes]
    others = [refusal for refusal in refusals if not refusal.deficit_bytes]
    rows = []
    for refusal in [*too_large[:_SHOWN], *others]:
        more = f" and {len(refusal.layouts) - 1} more" if len(refusal.layouts) > 1 else ""
        rows.append((refusal.layouts[0] + more, refusal.reason))
    return _table(
        f"{len(too_large)} layouts do not fit; the nearest. Others cannot be", ["layouts", "reason"], [], rows
    )
