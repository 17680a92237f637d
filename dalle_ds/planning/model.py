"""What a process has of a task's model, and what an update through it takes: measured on the module itself, without memory."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dalle_ds.config import ParallelConfig, PowerSGDConfig, Run
from dalle_ds.parallel import TensorGroup
from dalle_ds.parallel.peers import Peers
from dalle_ds.parallel.powersgd import MatrixShard, paper_rank
from dalle_ds.parallel.stages import PipelineLayer, balanced
from dalle_ds.parallel.tensor import split_of
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.trace import Exchange, Pass, Work, on_meta, traced
from dalle_ds.precision import BranchPrecision
from dalle_ds.tasks import Batch, Task
from dalle_ds.tasks.base import ContrastiveTask, ModelParallelTask, PipelineTask

# --- parameters


@dataclass(frozen=True)
class Parameter:
    """One parameter as one process of a tensor group has it, before ZeRO divides it."""

    layer: int  # number of its pipeline layer
    name: str  # in the plain model
    shape: torch.Size
    group: str  # name of its optimizer parameter group
    block: int | None = None  # number of its residual block, if it is in one
    has_small_moments: bool = False  # whether its moments take 2 bytes each
    is_divided: bool = False  # whether the tensor group divides it
    fused: int = 1  # matrices that it consists of, one above the other

    @functools.cached_property
    def numel(self) -> int:
        """Elements of this process's piece."""
        return self.shape.numel()


@dataclass(frozen=True)
class ParameterSet:
    """The parameters of one process in the order of their optimizer groups."""

    parameters: tuple[Parameter, ...]

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Elements of each."""
        return [parameter.numel for parameter in self.parameters]

    @functools.cached_property
    def count(self) -> int:
        """Elements of all."""
        return sum(self.sizes)

    @functools.cached_property
    def groups(self) -> list[list[Parameter]]:
        """By optimizer group."""
        return [list(group) for _, group in itertools.groupby(self.parameters, key=lambda parameter: parameter.group)]

    def parts(self) -> dict[str, int]:
        """Elements by the first part of their names."""
        counts: Counter[str] = Counter()
        for parameter in self.parameters:
            counts[parameter.name.partition(".")[0]] += parameter.numel
        return dict(counts)

    def updated_by_group(self, zero_stage: int, shards: int) -> list[int]:
        """Elements of each optimizer group that one of `shards` processes updates, padding included."""
        if zero_stage == 3:
            return [sum(-(-parameter.numel // shards) for parameter in group) for group in self.groups]
        sizes = [sum(parameter.numel for parameter in group) for group in self.groups]
        # ZeRO-1 and 2 align to two elements.
        return sizes if zero_stage == 0 else [2 * -(-size // (2 * shards)) for size in sizes]

    def touched(self, shards: int) -> int:
        """The most elements that all parameters of which a process updates a part have together, under ZeRO-1 and 2."""
        changes = [0] * (shards + 1)  # from each process to the next
        for group, updated in zip(self.groups, self.updated_by_group(1, shards), strict=True):
            begin = 0
            for parameter in group:
                end = begin + parameter.numel
                changes[begin // updated] += parameter.numel
                changes[(end - 1) // updated + 1] -= parameter.numel
                begin = end
        return max(itertools.accumulate(changes))


# --- stages


@dataclass(frozen=True)
class Update:
    """What the passes of one update take on one process. Bytes are those beside weights, gradients and optimizer."""

    kept: int  # of a micro-batch, from its forward pass to its backward pass
    forward: int  # the most in a forward pass, what is kept included
    backward: int  # the most in a backward pass, one weight's gradient at a time included
    forwards: int  # forward passes that gather ZeRO-3's weights
    backwards: int  # backward passes that gather them, and reduce gradients
    work: Work  # of all passes
    always: int = 0  # for the whole run: a second copy of the weights, the batches
    afterwards: int = 0  # once all micro-batches are through: gradients that are yet to be given to the engine
    received: int = 0  # from the stage before, of a micro-batch: floating-point numbers, whose gradients go back
    sent: int = 0  # to the next stage, of a micro-batch, as `received`
    tokens: int = 0  # besides, to the next stage: integers
    gathered_again: tuple[int, ...] = ()  # sizes of weights that ZeRO-3 gathers to compute blocks again


@dataclass(frozen=True)
class Stage:
    """What one stage's processes hold and do; without a pipeline, there is one."""

    number: int  # counted from 0
    parameters: ParameterSet  # of one process, before ZeRO divides them
    update: Update
    updated: list[int]  # elements of each optimizer group that one process of a replica updates, padding included
    compressed: list[MatrixShard]  # one process's shards of what crosses between replicas as PowerSGD's factors


def stages_of(task: Task[Any], layout: Layout, device: str) -> tuple[Stage, ...]:
    """The stages of a task's model.

    Args:
        device: "cuda" or "cpu".
    """
    model = _Model(type(task), _without_layout(task.run), layout.tensor, layout.sequence, layout.precision, device)
    layers, _, whole = _built(model)

    def stage(number: int, parameters: ParameterSet, update: Update) -> Stage:
        updated = parameters.updated_by_group(layout.zero_stage, layout.shards)
        return Stage(number, parameters, update, updated, _compressed(parameters, layout))

    if not layers[0].kind:
        return (stage(0, whole, _update(model, layout, whole.count)),)
    passes = _passes(model, layout.micro_batch)
    bounds = _balanced(tuple(layer.cost for layer in layers), layout.pipe)
    stages = []
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        parameters = ParameterSet(tuple(p for p in whole if first <= p.layer < last)) if layout.pipe > 1 else whole
        of_stage = [passes[layer.kind] for layer in layers[first:last]]
        before = passes[layers[first - 1].kind].outputs if first else ()
        after = of_stage[-1].outputs if last < len(layers) else ()
        ends: dict[str, Any] = {
            "received": _size(tensor for tensor in before if tensor.is_floating_point()),
            "sent": _size(tensor for tensor in after if tensor.is_floating_point()),
            "tokens": _size(tensor for tensor in after if not tensor.is_floating_point()),
        }
        stages.append(stage(number, parameters, replace(_in_turn(of_stage, layout.accumulation), **ends)))
    return tuple(stages)


def needed_flops(task: Task[Any]) -> float:
    """Operations of one sample that the model needs, nothing computed twice: the base of the MFU."""
    return _needed_flops(type(task), _without_layout(task.run))


@functools.lru_cache(maxsize=64)
def _needed_flops(kind: Any, run: Run) -> float:
    return float(kind.planned(run).flops_per_sample())


def _without_layout(run: Run) -> Run:
    """Settings that change nothing here would make for more traces."""
    train = replace(run.train, micro_batch=None, zero_stage=None)
    return replace(run, parallel=ParallelConfig(), powersgd=PowerSGDConfig(), train=train)


def _compressed(parameters: ParameterSet, layout: Layout) -> list[MatrixShard]:
    """As `training/replicas.py` cuts them."""
    if not layout.powersgd.enabled or layout.replicas == 1:
        return []
    matrices = [p for p in parameters if p.block is not None and len(p.shape) == 2]
    divisor = layout.shards * layout.tensor
    rank = layout.powersgd.rank or paper_rank(max((matrix.shape[1] for matrix in matrices), default=1), divisor)
    found: list[MatrixShard] = []
    for matrix in matrices:
        rows, rest = divmod(matrix.shape[0], layout.shards * matrix.fused)
        if rest:
            continue  # a shard is not made of whole rows, and crosses as it is
        of_shard = rank // (layout.shards * (layout.tensor if matrix.is_divided else 1))
        assert matrix.block is not None
        found.append(MatrixShard(matrix.name, len(found), matrix.fused, rows, matrix.shape[1], of_shard, matrix.block))
    return found


_balanced = functools.lru_cache(maxsize=64)(balanced)


# --- what is built and traced


@dataclass(frozen=True)
class _Model:
    """All that traces depend on, besides the rows."""

    kind: Any  # class of the task
    run: Run
    tensor: int
    sequence: bool
    precision: str
    device: str

    @property
    def task(self) -> Task[Any]:
        """Without files."""
        task: Task[Any] = self.kind.planned(self.run)
        return task


@functools.lru_cache(maxsize=32)
def _built(model: _Model) -> tuple[list[PipelineLayer], nn.ModuleList, ParameterSet]:
    """The layers of a model, or one without a kind that is all of it; as one process of its tensor group has them."""
    task, group = model.task, TensorGroup(0, model.tensor, sequence=model.sequence)
    if isinstance(task, PipelineTask):
        layers = task.pipeline_layers(group)
    else:
        build = functools.partial(task.build_model, group) if isinstance(task, ModelParallelTask) else task.build_model
        layers = [PipelineLayer("", 1.0, build, lambda module, inputs: module)]
    with on_meta(model.device), torch.device("meta"):
        modules = nn.ModuleList(layer.build() for layer in layers)
        if model.precision == "fp16" and isinstance(task, ModelParallelTask):
            for block in task.resblocks(modules):
                block.use(BranchPrecision(torch.float16, torch.empty(1)))
    if model.precision == "bf16":
        modules.to(torch.bfloat16)
    places = {
        id(p): (number, layers[number].name + name)
        for number, module in enumerate(modules)
        for name, p in module.named_parameters()
    }
    parameters = [
        Parameter(
            *places[id(parameter)],
            shape=parameter.shape,
            group=options["name"],
            block=options.get("block"),
            has_small_moments=options.get("moments") == "16-bit",
            is_divided=split_of(parameter) is not None,
            fused=getattr(parameter, "fused", 1),
        )
        for options in task.parameter_groups(modules if layers[0].kind else modules[0])
        for parameter in options["params"]
    ]
    return layers, modules, ParameterSet(tuple(parameters))


@functools.lru_cache(maxsize=1024)
def _passes(model: _Model, rows: int) -> dict[str, Pass]:
    """A micro-batch of so many rows through one layer of each kind, the last one with the loss."""
    layers, modules, _ = _built(model)
    task = model.task
    assert isinstance(task, PipelineTask)
    batch = task.batch_spec(rows)
    inputs: tuple[Tensor, ...] = task.inputs(batch)

    def run(layer: PipelineLayer, module: nn.Module, *given: Tensor) -> Any:
        if layer is not layers[-1]:
            return layer.run(module, given)
        return task.loss(lambda *_, **__: layer.run(module, given), batch, 0)[0]  # type: ignore[arg-type]

    found: dict[str, Pass] = {}
    with on_meta(model.device):
        for layer, module in zip(layers, modules, strict=True):
            if layer.kind not in found:
                function = functools.partial(run, layer, module)
                found[layer.kind] = traced(function, inputs, module)
            inputs = found[layer.kind].outputs
    return found


def _in_turn(passes: Sequence[Pass], times: int) -> Update:
    """Micro-batches, so many, through consecutive layers."""
    kept = list(itertools.accumulate((one.kept for one in passes), initial=0))
    return Update(
        kept=kept[-1],
        forward=max(begin + one.forward for begin, one in zip(kept, passes, strict=False)),
        backward=max(begin + one.backward for begin, one in zip(kept, passes, strict=False)),
        forwards=times,
        backwards=times,
        work=_work(*((times, one) for one in passes)),
        gathered_again=times * tuple(size for one in passes for size in one.gathered_again),
    )


def _work(*passes: tuple[int, Pass], beside: Work | None = None) -> Work:
    """Of passes, each so many times."""
    work = beside or Work()
    for times, one in passes:
        work.add(one.work, times)
    return work


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _update(model: _Model, layout: Layout, count: int) -> Update:
    """An update of a model that is not made of layers; `count` is that of its parameters."""
    task, rows, times = model.task, layout.micro_batch, layout.accumulation
    batches = times * _size(task.batch_spec(rows).values())
    if not isinstance(task, ContrastiveTask):
        return replace(_in_turn([_loss(model, rows, 1)], times), always=batches)
    if times == 1 and task.sharpness is None:
        return replace(_in_turn([_loss(model, rows, layout.readers)], 1), always=batches)
    return _whole_batch(model, task, layout, batches, count)


def _traced(model: _Model, batch: Batch, function: Callable[[Batch], Any], *, backward: bool = True) -> Pass:
    """Of function(batch) and its gradients."""
    with on_meta(model.device):
        return traced(
            lambda *values: function(dict(zip(batch, values, strict=True))),
            list(batch.values()),
            _built(model)[1],
            backward=backward,
        )


@functools.lru_cache(maxsize=256)
def _loss(model: _Model, rows: int, readers: int) -> Pass:
    """The loss of so many rows on each of so many processes."""
    task, module = model.task, _built(model)[1][0]

    def loss(batch: Batch) -> Tensor:
        if isinstance(task, ContrastiveTask):
            return task.loss_of(task.embed(module, batch), Peers(0, readers))[0]
        return task.loss(module, batch, 0)[0]

    return _traced(model, task.batch_spec(rows), loss)


@functools.lru_cache(maxsize=256)
def _embedded(model: _Model, rows: int) -> tuple[list[str], Pass, Pass]:
    """Names of what a `ContrastiveTask` makes of so many rows; the passes without and with gradients."""
    task, module, names = model.task, _built(model)[1][0], list[str]()
    assert isinstance(task, ContrastiveTask)

    def embed(batch: Batch) -> tuple[Tensor, ...]:
        outputs = task.embed(module, batch)
        names[:] = outputs
        return tuple(outputs.values())

    batch = task.batch_spec(rows)
    return names, _traced(model, batch, embed, backward=False), _traced(model, batch, embed)


def _whole_batch(model: _Model, task: ContrastiveTask[Any], layout: Layout, batches: int, count: int) -> Update:
    """An update by cached gradients (`training/strategies.py`), or by sharpness-aware ones (`sharpness.py`) beside.

    Args:
        batches: bytes of all of them.
        count: that of the parameters.
    """
    sharpness, total = task.sharpness, layout.micro_batch * layout.accumulation
    pairs = (sharpness.pairs if sharpness else None) or layout.batch_size
    rows = min(pairs, layout.micro_batch)
    pieces = total // rows
    names, first, again = _embedded(model, rows)
    whole = [
        (value if value.ndim == 0 and sharpness is None else torch.empty(total, *value.shape[1:], device="meta"))
        .detach()
        .requires_grad_()
        for value in again.outputs
    ]
    batch = dict(zip(names, whole, strict=True))
    of_all = _traced(model, batch, lambda outputs: task.loss_of(outputs, Peers(0, layout.readers))[0])
    held = 3 * _size(whole)  # as they come, joined, and their gradients
    kept, forward = held + again.kept, held + max(first.forward, of_all.forward, of_all.backward, again.forward)
    backward = held + again.backward
    if sharpness is None:
        work, regathered = _work((pieces, first), (pieces, again), (1, of_all)), pieces * again.gathered_again
        return Update(kept, forward, backward, 2 * pieces, pieces, work, always=batches, gathered_again=regathered)
    span = sharpness.span(layout.batch_size, layout.micro_batch, layout.readers)
    groups = pieces * rows * span // pairs
    moves = groups if groups == 1 else 2 * groups
    # Perturbed weights, those that ZeRO-3 gathers to copy them, sums of gradients, and 16-bit gradients in fp32.
    weights = layout.weight_bytes * count
    gathered = weights if layout.zero_stage == 3 else 0
    sums, in_fp32 = 4 * count * min(2, groups), 4 * count if layout.weight_bytes < 4 else 0
    ascent = Work()
    if span > 1:
        kind = Exchange("data", "all-reduce", span)
        ascent.exchanged[kind] = moves * 4 * count
        ascent.exchanges[kind] = moves * len(list(_built(model)[1].parameters()))
    without, through = 2 * pieces if pieces > 1 else 0, pieces * (2 if groups == 1 else 3)
    return Update(
        kept=kept,
        forward=max(forward, held + gathered),
        backward=max(backward + sums, held + sums + weights + in_fp32),
        forwards=1 + moves,
        backwards=1,
        work=_work((without, first), (through, again), (2, of_all), beside=ascent),
        always=batches + weights,
        afterwards=sums + gathered + (weights if in_fp32 else 0),
    )
