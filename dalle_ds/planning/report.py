"""Plans as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table

from dalle_ds.planning.layout import GB, Cluster, Layout
from dalle_ds.planning.memory import MOMENTS, Memory
from dalle_ds.planning.plan import Found, Plan, Refusal
from dalle_ds.planning.traffic import compression

_SHOWN = 10
"""Rows of tables that could have hundreds."""
_MOMENT_TITLES = ("between updates", "forward", "backward", "backward ends", "in the step")


def gigabytes(size: float) -> str:
    """Bytes as GB, with as many digits as tell something."""
    return "–" if size == 0 else f"{size / GB:.1f}" if size >= GB else f"{size / GB:.2g}"


def plan_tables(plan: Plan) -> RenderableType:
    """All of a plan."""
    cluster, memory, transfers = plan.cluster, plan.memory, plan.transfers[plan.heaviest]
    where = f" of stage {plan.stage.number}" if plan.layout.pipe > 1 else ""
    parts: list[RenderableType] = [
        f"processes: {cluster.gpus}, machines: {-(-cluster.gpus // cluster.gpus_per_node)}, {cluster.memory_gb} GB for each "
        f"process ({cluster.reserved_gb} GB of it reserved)\n{_describe(plan.layout)}\n"
    ]
    counts = plan.parameters()
    counts["the model"] = sum(counts.values())
    counts[f"a process{where}, before ZeRO divides them"] = plan.stage.parameters.count
    parts.append(_table("Parameters", ["of"], ["millions"], ((of, f"{n / 1e6:,.1f}") for of, n in counts.items())))
    sizes = {use.kind: [*map(use.at, MOMENTS), use.host] for use in memory.uses}
    sizes["all"] = [*map(memory.at, MOMENTS), plan.host]
    sizes["available"] = [*[cluster.memory] * len(MOMENTS), cluster.host_memory]
    held = ((kind, *map(gigabytes, of_kind)) for kind, of_kind in sizes.items())
    parts.append(_table(f"Memory of a process{where}, GB", ["kind"], [*_MOMENT_TITLES, "main memory"], held))
    if transfers:
        sent = ((t.axis, t.what, t.operation, str(t.processes), str(t.times), gigabytes(t.sent)) for t in transfers)
        names = ["axis", "what", "operation"]
        parts.append(_table("Sent by a process in an update", names, ["processes", "times", "GB"], sent))
    seconds = asdict(plan.time) | {"all": plan.time.total}
    times = [
        *((name, f"{value:.3g}") for name, value in seconds.items() if value),
        (f"{plan.items[0]} per second", f"{plan.items_per_second:,.0f}"),
        ("model FLOPs utilization", f"{plan.mfu:.1%}"),
        (f"days for {plan.task.run.steps:,} updates", f"{plan.days:.1f}"),
    ]
    parts += [_table("Projected time of an update", ["for"], ["seconds"], times), fit_sentence(plan)]
    saved = compression(plan.stage)
    if saved:
        parts.append(f"PowerSGD leaves out {saved:.1%} of the gradients that it compresses.")
    return Group(*parts, _assumptions(cluster))


def _describe(layout: Layout) -> str:
    """Degrees and settings on one line."""
    degrees = {
        "replicas": layout.replicas,
        "stages": layout.pipe,
        "shards": layout.shards,
        "tensor parts": layout.tensor,
    }
    arranged = " × ".join(f"{count} {name}" for name, count in degrees.items() if count > 1) or "1 process"
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
    for name in (*left, *right):
        table.add_column(name, justify="right" if name in right else "left")
    for row in rows:
        table.add_row(*row)
    return table


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

    state = of("fp32 weights", "Adam's moments", "gradients", "weights")
    offers = {
        f"lower zero_optimization.reduce_bucket_size, which is {layout.buffers.reduce:,}": of("reduction buckets")
        * 3
        // 4,
        "lower zero_optimization.stage3_max_live_parameters and stage3_max_reuse_distance": of("gathered weights")
        * 3
        // 4,
        "divide the model among more processes (fewer parallel.replicas, or more parallel.tensor)": state // 2,
    }
    if layout.micro_batch > 1:
        offers[f"halve train.micro_batch, {layout.micro_batch} now"] = of("activations", "working set") // 2
    if layout.checkpointing != "full":
        offers["set train.activation_checkpointing to full"] = of("activations") * 3 // 4
    if layout.zero_stage < 3 and layout.pipe == 1:
        offers["set zero_optimization.stage to 3"] = state - state // layout.shards
    if layout.moments == "fp32":
        offers["set optim.moments to 16-bit"] = of("Adam's moments") // 2
    if device != "cpu":
        offers["offload the optimizer to main memory"] = of("Adam's moments", "fp32 weights")
        offers["set train.average_device to cpu"] = of("average")
    best = sorted(((saved, text) for text, saved in offers.items() if saved), reverse=True)[:4]
    return f"To change that: {'; '.join(text for _, text in best)}." if best else ""


def found_tables(found: Found) -> RenderableType:
    """What a search found: the fastest layouts, and why others do not work."""
    if not found.plans:
        return Group("No layout fits.\n", _refusals(found.refusals))
    rows = (
        (
            _describe(plan.layout),
            gigabytes(plan.memory.peak),
            f"{plan.time.total:.3g}",
            f"{plan.items_per_second:,.0f}",
            f"{plan.mfu:.1%}",
        )
        for plan in found.plans[:_SHOWN]
    )
    fastest = found.plans[0]
    figures = ["GB", "seconds", f"{fastest.items[0]}/s", "MFU"]
    table = _table(f"{len(found.plans)} layouts fit; the fastest", ["layout"], figures, rows)
    return Group(table, _refusals(found.refusals), _assumptions(fastest.cluster))


def _refusals(refusals: Sequence[Refusal]) -> Table:
    """The layouts with the smallest deficit, and all reasons of another kind."""
    too_large = [refusal for refusal in refusals if refusal.deficit_bytes]
    others = [refusal for refusal in refusals if not refusal.deficit_bytes]
    rows = []
    for names, reason, _ in too_large[:_SHOWN] + others:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rows.append((names[0] + more, reason))
    title = f"{len(too_large)} layouts do not fit; the nearest. Others cannot be"
    return _table(title, ["layouts", "reason"], [], rows)
