"""What a process has of a task's model, and what an update through it takes: measured on the module itself, without memory."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
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
from dalle_ds.tasks import Task
from dalle_ds.tasks.base import ContrastiveTask, ModelParallelTask

# --- parameters


@dataclass(frozen=True)
class Parameter:
    """One parameter as one process of a tensor group has it, before ZeRO divides it."""

    layer: int
    """Number of its pipeline layer."""
    name: str
    """In the plain model."""
    shape: torch.Size
    group: str
    """Name of its optimizer parameter group."""
    block: int | None = None
    """Number of its residual block, if it is in one."""
    has_small_moments: bool = False
    """Whether its moments take 2 bytes each."""
    is_divided: bool = False
    """Whether the tensor group divides it."""
    fused: int = 1
    """Matrices that it consists of, one above the other."""

    @functools.cached_property
    def numel(self) -> int:
        """Elements of this process's piece."""
        return self.shape.numel()


@dataclass(frozen=True, eq=False)
class ParameterSet:
    """The parameters of one process in the order of their optimizer groups; only itself is equal to it."""

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


@functools.lru_cache(maxsize=1024)
def updated_by_group(parameters: ParameterSet, zero_stage: int, shards: int) -> tuple[int, ...]:
    """Elements of each optimizer group that one of `shards` processes updates, padding included."""
    sizes = [[parameter.numel for parameter in group] for group in parameters.groups]
    if zero_stage == 0:
        return tuple(map(sum, sizes))
    if zero_stage == 3:
        return tuple(sum(-(-size // shards) for size in group) for group in sizes)
    return tuple(2 * -(-sum(group) // (2 * shards)) for group in sizes)  # aligned to two elements


@functools.lru_cache(maxsize=1024)
def touched(parameters: ParameterSet, shards: int) -> int:
    """The most elements that all parameters of which a process updates a part have together, under ZeRO-1 and 2."""
    sums = [0] * shards
    for group, updated in zip(parameters.groups, updated_by_group(parameters, 1, shards), strict=True):
        begin = 0
        for parameter in group:
            end = begin + parameter.numel
            for shard in range(begin // updated, min(shards - 1, (end - 1) // updated) + 1):
                sums[shard] += parameter.numel
            begin = end
    return max(sums)


@functools.lru_cache(maxsize=1024)
def compressed_shards(parameters: ParameterSet, layout: Layout) -> tuple[MatrixShard, ...]:
    """One process's shards of the matrices that cross between replicas as PowerSGD's factors, as `training/replicas.py` cuts
    them."""
    if not layout.powersgd.enabled or layout.replicas == 1:
        return ()
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
    return tuple(found)


# --- passes


@dataclass(frozen=True)
class Update:
    """What the passes of one update take on one process. Bytes are those beside weights, gradients and optimizer."""

    kept: int = 0
    """Of a micro-batch, from its forward pass to its backward pass."""
    forward: int = 0
    """The most in a forward pass, what is kept included."""
    backward: int = 0
    """The most in a backward pass, one weight's gradient at a time included."""
    always: int = 0
    """For the whole run: a second copy of the weights, the batches."""
    afterwards: int = 0
    """Once all micro-batches are through: gradients that are yet to be given to the engine."""
    received: int = 0
    """From the stage before, of a micro-batch: floating-point numbers, whose gradients go back."""
    sent: int = 0
    """To the next stage, of a micro-batch, as `received`."""
    tokens: int = 0
    """Besides, to the next stage: integers."""
    forwards: int = 0
    """Forward passes that gather ZeRO-3's weights."""
    backwards: int = 0
    """Backward passes that gather them, and reduce gradients."""
    work: Work = field(default_factory=Work)
    """Of all passes."""

    def with_work(self, *passes: tuple[int, Pass]) -> Update:
        """With the work of passes beside, each so many times."""
        work = Work().add(self.work)
        for times, one in passes:
            work.add(one.work, times)
        return replace(self, work=work)


@dataclass(frozen=True)
class Stage:
    """What one stage's processes hold and do; without a pipeline, there is one."""

    number: int
    """Counted from 0."""
    parameters: ParameterSet
    """Of one process, before ZeRO divides them."""
    update: Update


def stages_of(task: Task[Any], layout: Layout, device: str) -> tuple[Stage, ...]:
    """The stages of a task's model.

    Args:
        device: "cuda" or "cpu".
    """
    model = _Model(type(task), _without_layout(task.run), layout.tensor, layout.sequence, layout.precision, device)
    layers, _, whole = _built(model)
    if not layers[0].kind:
        return (Stage(0, whole, _update(model, layout, whole.count)),)
    passes = _passes(model, layout.micro_batch)
    bounds = _bounds(tuple(layer.cost for layer in layers), layout.pipe)
    stages = []
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        parameters = ParameterSet(tuple(p for p in whole if first <= p.layer < last)) if layout.pipe > 1 else whole
        of_stage = [passes[layer.kind] for layer in layers[first:last]]
        before = passes[layers[first - 1].kind].outputs if first else ()
        after = of_stage[-1].outputs if last < len(layers) else ()
        stages.append(Stage(number, parameters, _in_turn(of_stage, before, after, layout)))
    return tuple(stages)


def needed_flops(task: Task[Any]) -> float:
    """Operations of one sample that the model needs, nothing computed twice: the base of the MFU."""
    return _needed_flops(type(task), _without_layout(task.run))


def _without_layout(run: Run) -> Run:
    """Settings that change nothing here would make for more traces."""
    train = replace(run.train, micro_batch=None, zero_stage=None)
    return replace(run, parallel=ParallelConfig(), powersgd=PowerSGDConfig(), train=train)


@functools.lru_cache(maxsize=64)
def _needed_flops(kind: Any, run: Run) -> float:
    flops: float = kind.planned(run).flops_per_sample()
    return flops


@functools.lru_cache(maxsize=64)
def _bounds(costs: tuple[float, ...], stages: int) -> list[int]:
    return balanced(costs, stages)


def _in_turn(passes: list[Pass], before: Iterable[Tensor], after: Iterable[Tensor], layout: Layout) -> Update:
    """Micro-batches through consecutive layers."""
    kept = list(itertools.accumulate((one.kept for one in passes), initial=0))
    update = Update(
        kept=kept[-1],
        forward=max(begin + one.forward for begin, one in zip(kept, passes, strict=False)),
        backward=max(begin + one.backward for begin, one in zip(kept, passes, strict=False)),
        received=_size(tensor for tensor in before if tensor.is_floating_point()),
        sent=_size(tensor for tensor in after if tensor.is_floating_point()),
        tokens=_size(tensor for tensor in after if not tensor.is_floating_point()),
        forwards=layout.accumulation,
        backwards=layout.accumulation,
    )
    distinct = {id(one): one for one in passes}
    counts = Counter(map(id, passes))
    return update.with_work(*((layout.accumulation * counts[key], one) for key, one in distinct.items()))


# --- what is built and traced


@dataclass(frozen=True)
class _Model:
    """All that traces depend on, besides the rows."""

    kind: Any
    """Class of the task."""
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
    if isinstance(task, ModelParallelTask):
        layers = task.pipeline_layers(group)
    else:
        layers = [PipelineLayer("", 1.0, task.build_model, lambda module, inputs: module)]
    with on_meta(model.device), torch.device("meta"):
        modules = nn.ModuleList(layer.build() for layer in layers)
        if model.precision == "fp16" and isinstance(task, ModelParallelTask):
            for block in task.resblocks(modules):
                block.use(BranchPrecision(torch.float16, torch.empty(1)))  # type: ignore[operator]
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
    """A micro-batch of so many rows through one layer of each kind."""
    layers, modules, _ = _built(model)
    task = model.task
    assert isinstance(task, ModelParallelTask)
    batch = task.batch_spec(rows)
    passed: tuple[Tensor, ...] = task.inputs(batch)
    found: dict[str, Pass] = {}
    with on_meta(model.device):
        for layer, module in zip(layers, modules, strict=True):
            if layer.kind not in found:

                def run(*inputs: Tensor, layer: PipelineLayer = layer, module: nn.Module = module) -> Any:
                    return layer.run(module, inputs)

                def loss(*inputs: Tensor, run: Any = run) -> Tensor:
                    return task.loss(lambda *_, **__: run(*inputs), batch, 0)[0]  # type: ignore[arg-type]

                found[layer.kind] = traced(loss if layer is layers[-1] else run, passed, list(module.parameters()))
            passed = found[layer.kind].outputs
    return found


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _update(model: _Model, layout: Layout, count: int) -> Update:
    """An update of a model that is not made of layers; `count` is that of its parameters."""
    task, times, rows = model.task, layout.accumulation, layout.micro_batch
    update = Update(always=times * _size(task.batch_spec(rows).values()), forwards=times, backwards=times)
    if isinstance(task, ContrastiveTask):
        return _whole_batch(model, task, update, layout, count)
    one = _loss(model, rows, 1)
    return replace(update, kept=one.kept, forward=one.forward, backward=one.backward).with_work((times, one))


@functools.lru_cache(maxsize=256)
def _loss(model: _Model, rows: int, readers: int) -> Pass:
    """The loss of so many rows on each of so many processes, and its gradients."""
    task, module = model.task, _built(model)[1][0]
    batch = task.batch_spec(rows)

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip(batch, values, strict=True))
        if isinstance(task, ContrastiveTask):
            return task.loss_of(task.embed(module, named), Peers(0, readers))[0]
        return task.loss(module, named, 0)[0]

    with on_meta(model.device):
        return traced(loss, list(batch.values()), list(module.parameters()))


@functools.lru_cache(maxsize=256)
def _embedded(model: _Model, rows: int) -> tuple[tuple[str, ...], Pass, Pass]:
    """Names of what a `ContrastiveTask` makes of so many rows; the passes without and with gradients."""
    task, module = model.task, _built(model)[1][0]
    assert isinstance(task, ContrastiveTask)
    batch, names = task.batch_spec(rows), list[str]()

    def embed(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = task.embed(module, dict(zip(batch, values, strict=True)))
        names[:] = outputs
        return tuple(outputs.values())

    inputs, weights = list(batch.values()), list(module.parameters())
    with on_meta(model.device):
        first, again = traced(embed, inputs, weights, backward=False), traced(embed, inputs, weights)
    return tuple(names), first, again


def _whole_batch(model: _Model, task: ContrastiveTask[Any], update: Update, layout: Layout, count: int) -> Update:
    """An update by cached gradients (`training/passes/caching.py`), or by sharpness-aware ones (`sharpness.py`) beside."""
    sharpness, total = task.sharpness, layout.micro_batch * layout.accumulation
    pairs = layout.batch_size if sharpness is None else sharpness.pairs or layout.batch_size
    rows = layout.micro_batch if sharpness is None else min(pairs, layout.micro_batch)
    pieces = total // rows
    if pieces == 1 and sharpness is None:
        one = _loss(model, rows, layout.readers)
        return replace(update, kept=one.kept, forward=one.forward, backward=one.backward).with_work((1, one))
    names, first, again = _embedded(model, rows)
    whole = [
        (value if value.ndim == 0 and sharpness is None else torch.empty(total, *value.shape[1:], device="meta"))
        .detach()
        .requires_grad_()
        for value in again.outputs
    ]
    with on_meta(model.device):
        of_all = traced(
            lambda *values: task.loss_of(dict(zip(names, values, strict=True)), Peers(0, layout.readers))[0], whole, []
        )
    held = 3 * _size(whole)  # as they come, joined, and their gradients
    update = replace(
        update,
        kept=held + again.kept,
        forward=held + max(first.forward, of_all.forward, of_all.backward, again.forward),
        backward=held + again.backward,
        forwards=2 * pieces,
    )
    if sharpness is None:
        return update.with_work((pieces, first), (pieces, again), (1, of_all))
    span = sharpness.span(layout.batch_size, layout.micro_batch, layout.readers)
    groups = pieces * rows * span // pairs
    moves = groups if groups == 1 else 2 * groups
    # Perturbed weights, those that ZeRO-3 gathers to copy them, sums of gradients, and 16-bit gradients in fp32.
    weights = layout.weight_bytes * count
    gathered = weights if layout.zero_stage == 3 else 0
    sums, in_fp32 = 4 * count * min(2, groups), 4 * count if layout.weight_bytes < 4 else 0
    update = replace(
        update,
        always=update.always + weights,
        forward=max(update.forward, held + gathered),
        backward=max(update.backward + sums, held + sums + weights + in_fp32),
        afterwards=sums + gathered + (weights if in_fp32 else 0),
        forwards=1 + moves,
        backwards=1,
    )
    if span > 1:
        ascent = Exchange("data", "all-reduce", span)
        size, times = moves * 4 * count, moves * len(list(_built(model)[1].parameters()))
        update = replace(update, work=Work(exchanged=Counter({ascent: size}), exchanges=Counter({ascent: times})))
    through = pieces * (2 if groups == 1 else 3)
    return update.with_work((2 * pieces if pieces > 1 else 0, first), (through, again), (2, of_all))
