"""Holds plans against what real runs hold and exchange.

    deepspeed --num_gpus 2 benchmarks/plan_check.py [--few True] [--json FILE]

Bytes are counted, not sampled: those of every storage that exists, and the most at any moment (`counting.py`). Passes are
counted around plain models; weights, optimizer state, gradients and buffers in DeepSpeed engines of this many processes,
between updates, before the step, and at the peak of an update; exchanges by collective.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from counting import Allocations, Exchanges
from engines import build_step
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import (
    ClipConfig,
    ClipRun,
    DalleConfig,
    DecoderConfig,
    DecoderRun,
    DiscreteVAEConfig,
    DvaeRun,
    LatentPriorConfig,
    LatentPriorRun,
    OptimConfig,
    ParallelConfig,
    PowerSGDConfig,
    PriorConfig,
    PriorObjective,
    PriorRun,
    RecomputingTrainConfig,
    Run,
    ScalingConfig,
    SharpnessConfig,
    TrainConfig,
    TransformerRun,
    UpsamplerConfig,
    UpsamplerObjective,
    UpsamplerRun,
)
from dalle_ds.config.deepspeed import resolve
from dalle_ds.parallel import Mesh
from dalle_ds.planning.layout import Layout
from dalle_ds.planning.memory import Memory, stage_memory
from dalle_ds.planning.model import stages_of
from dalle_ds.planning.traffic import Transfer, traffic
from dalle_ds.precision import GradientScales
from dalle_ds.precision.choice import DTYPES
from dalle_ds.tasks import Batch, Task
from dalle_ds.tasks.stages import STAGES

BUCKET = 50_000
"""Elements of DeepSpeed's own buffers, small against the model."""


@dataclass(frozen=True)
class Options:
    """What to check."""

    parts: tuple[str, ...] = ("activations", "engines", "parallel")
    """Of "activations", "engines" (ZeRO stages, on any number of processes) and "parallel" (on 2 processes)."""
    few: bool = False
    """Whether to count in a few engines only."""
    json: str | None = None
    """File for the figures."""


@dataclass(frozen=True)
class Check:
    """One prediction."""

    setting: str
    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction is off, in relation to what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Setting:
    """A DeepSpeed engine to count in."""

    zero_stage: int
    precision: str = "fp32"
    moments: str = "fp32"
    accumulation: int = 1
    checkpointing: str = "full"
    offload: bool = False
    bf16_states: bool = False
    is_long: bool = False
    """Whether sequences are so long that activations are the most of all."""
    degrees: ParallelConfig = field(default_factory=ParallelConfig)
    powersgd: PowerSGDConfig = field(default_factory=PowerSGDConfig)
    zero: tuple[tuple[str, int], ...] = ()
    stage: str = "transformer"
    sharpness: SharpnessConfig = field(default_factory=SharpnessConfig)

    @property
    def name(self) -> str:
        """For the table."""
        parts = [self.stage] if self.stage != "transformer" else []
        parts += [f"ZeRO-{self.zero_stage} {self.precision}", f"recompute {self.checkpointing}"]
        parts += ["16-bit moments"] if self.moments == "16-bit" else []
        parts += [f"{self.accumulation} micro-batches"] if self.accumulation > 1 else []
        parts += ["offload"] if self.offload else []
        parts += ["bf16 states"] if self.bf16_states else []
        parts += ["long sequences"] if self.is_long else []
        parts += [f"{name} {value}" for name, value in asdict(self.degrees).items() if value not in (1, False)]
        parts += [f"PowerSGD {self.powersgd.storage}"] if self.powersgd.enabled else []
        parts += [f"sharpness over {self.sharpness.pairs} pairs"] if self.sharpness.rho is not None else []
        parts += [f"{name.removeprefix('stage3_')} {value}" for name, value in self.zero]
        return ", ".join(parts)

    def run(self, processes: int) -> Run:
        """The run to count in, of a few million parameters at most."""
        readers = processes // (self.degrees.tensor * self.degrees.pipe)
        shared: dict[str, Any] = {"parallel": self.degrees, "powersgd": self.powersgd}
        shared["optim"] = OptimConfig(warmup_steps=0, moments=self.moments)  # type: ignore[arg-type]
        rows = 1 if self.stage == "transformer" else 2
        sizes = {"batch_size": rows * readers * self.accumulation, "micro_batch": rows, "average_decay": None}
        if self.stage == "dvae":
            shape = DiscreteVAEConfig(
                image_size=32, groups=2, encoder_width=32, decoder_width=32, decoder_input=16, vocab_size=128
            )
            return DvaeRun(model=shape, train=TrainConfig(**sizes), **shared)  # type: ignore[arg-type]
        train = RecomputingTrainConfig(**sizes, activation_checkpointing=self.checkpointing)  # type: ignore[arg-type]
        if self.stage == "clip":
            return ClipRun(model=CLIP, train=train, sharpness=self.sharpness, **shared)
        if self.stage == "prior":
            return PriorRun(model=PRIOR, train=train, objective=PriorObjective(draws_per_row=4), **shared)
        if self.stage == "latent_prior":
            return LatentPriorRun(model=LATENT_PRIOR, train=train, **shared)
        if self.stage == "decoder":
            return DecoderRun(model=DECODER, train=train, **shared)
        if self.stage == "upsampler":
            return UpsamplerRun(model=UPSAMPLER, train=train, objective=UpsamplerObjective(crop=0.5), **shared)
        text_len, grid = (64, 16) if self.is_long else (4, 4)
        model = DalleConfig(width=64, depth=8, heads=2, text_len=text_len, grid=grid, text_vocab=32, image_vocab=32)
        return TransformerRun(model=model, train=train, **shared)

    def json_config(self) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        zero = {"stage": self.zero_stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        zero |= {"stage3_prefetch_bucket_size": BUCKET, **dict(self.zero)} if self.zero_stage == 3 else {}
        zero |= {"offload_optimizer": {"device": "cpu"}} if self.offload else {}  # type: ignore[dict-item]
        found: dict[str, Any] = {name: {"enabled": name == self.precision} for name in ("bf16", "fp16")}
        found["zero_optimization"] = zero
        if self.bf16_states:
            found["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
            found["data_types"] = {"grad_accum_dtype": "bf16"}
        return found


CLIP = ClipConfig(
    embed_dim=32, image_size=32, patch_size=8, vision_width=64, vision_depth=4, vision_heads=2, text_width=64,
    text_depth=4, text_heads=2, text_len=16, text_vocab=64,
)  # fmt: skip
PRIOR = PriorConfig(width=64, depth=8, heads=2, text_len=16, embed_dim=32, text_vocab=64)
LATENT_PRIOR = LatentPriorConfig(
    text_width=64, text_depth=4, text_heads=2, text_len=16, text_vocab=64, width=64, depth=4, heads=2, embed_dim=32,
    components=8, buckets=16,
)  # fmt: skip
DECODER = DecoderConfig(
    image_size=16, channels=32, depth=1, multiples=(1, 2), attention=(8,), head_channels=32, embed_dim=32,
    context_width=32, text_len=16, text_vocab=64, text_depth=2, text_heads=2,
)  # fmt: skip
UPSAMPLER = UpsamplerConfig(image_size=32, low_size=8, channels=32, depth=1, multiples=(1, 2))
# Of a small model, DeepSpeed would otherwise keep all that it has gathered.
SHARDED = (
    ("stage3_param_persistence_threshold", 0),
    ("stage3_max_live_parameters", 0),
    ("stage3_max_reuse_distance", 0),
)
REUSED = (("stage3_param_persistence_threshold", 0), ("stage3_max_live_parameters", 200_000))
SHARP = SharpnessConfig(rho=0.1, pairs=2)
SETTINGS = [
    *(Setting(stage, precision) for stage in (0, 1, 2) for precision in ("fp32", "bf16", "fp16")),
    *(Setting(3, precision, zero=SHARDED) for precision in ("fp32", "bf16", "fp16")),
    Setting(1, accumulation=2),
    Setting(1, "bf16", accumulation=2, checkpointing="none"),
    Setting(2, accumulation=2, checkpointing="selective"),
    Setting(2, "bf16", "16-bit", accumulation=2),
    Setting(3, "fp16", "16-bit", accumulation=2, checkpointing="none", zero=SHARDED),
    Setting(3, "bf16", zero=REUSED),
    Setting(3, "bf16"),
    Setting(2, offload=True),
    Setting(2, "bf16", offload=True),
    Setting(3, "bf16", "16-bit", offload=True, zero=SHARDED),
    Setting(3, "bf16", bf16_states=True, zero=SHARDED),
    Setting(1, "bf16", is_long=True),
    Setting(2, checkpointing="none", is_long=True),
    Setting(1, stage="dvae"),
    Setting(2, "bf16", "16-bit", accumulation=2, stage="dvae"),
    Setting(3, "bf16", stage="dvae", zero=SHARDED),
    Setting(1, stage="clip", checkpointing="none"),
    Setting(1, "bf16", "16-bit", stage="clip", accumulation=3),
    Setting(3, stage="clip", accumulation=2, zero=SHARDED),
    Setting(0, stage="clip", accumulation=2, sharpness=SHARP),
    Setting(1, "bf16", stage="clip", checkpointing="none", sharpness=SharpnessConfig(rho=0.1)),
    Setting(1, "bf16", stage="prior", checkpointing="none"),
    Setting(3, stage="prior", accumulation=2, zero=SHARDED),
    Setting(2, "fp16", "16-bit", stage="latent_prior", checkpointing="none"),
    Setting(3, "bf16", stage="latent_prior", accumulation=2, zero=SHARDED),
    Setting(1, "bf16", stage="decoder", checkpointing="none"),
    Setting(3, stage="decoder", accumulation=2, zero=SHARDED),
    Setting(1, "bf16", stage="upsampler", checkpointing="none"),
    Setting(3, stage="upsampler", accumulation=2, zero=SHARDED),
]

FEW = [
    Setting(1, "bf16", accumulation=2, checkpointing="none"),
    Setting(2, "fp32"),
    Setting(2, "bf16", "16-bit", accumulation=2),
    Setting(3, "fp16", "16-bit", zero=SHARDED),
    Setting(3, "bf16", zero=REUSED),
    Setting(2, "bf16", "16-bit", accumulation=2, stage="dvae"),
    Setting(1, "bf16", "16-bit", stage="clip", accumulation=3),
    Setting(0, stage="clip", accumulation=2, sharpness=SHARP),
    Setting(1, "bf16", stage="prior", checkpointing="none"),
    Setting(3, "bf16", stage="latent_prior", accumulation=2, zero=SHARDED),
    Setting(1, "bf16", stage="decoder", checkpointing="none"),
    Setting(3, stage="upsampler", accumulation=2, zero=SHARDED),
]
PARALLEL = [
    Setting(1, "bf16", degrees=ParallelConfig(tensor=2)),
    Setting(1, checkpointing="none", degrees=ParallelConfig(tensor=2, sequence=True)),
    Setting(1, "fp16", checkpointing="selective", degrees=ParallelConfig(tensor=2, sequence=True)),
    Setting(1, "bf16", accumulation=4, degrees=ParallelConfig(pipe=2)),
    Setting(1, checkpointing="none", accumulation=4, degrees=ParallelConfig(pipe=2)),
    Setting(1, "bf16", checkpointing="none", is_long=True, degrees=ParallelConfig(tensor=2)),
    Setting(1, checkpointing="none", is_long=True, degrees=ParallelConfig(tensor=2, sequence=True)),
    Setting(1, "bf16", checkpointing="selective", is_long=True, degrees=ParallelConfig(tensor=2, sequence=True)),
    Setting(1, "bf16", accumulation=4, checkpointing="none", is_long=True, degrees=ParallelConfig(pipe=2)),
    Setting(1, accumulation=4, is_long=True, degrees=ParallelConfig(pipe=2)),
    Setting(0, degrees=ParallelConfig(replicas=2)),
    Setting(1, "bf16", degrees=ParallelConfig(replicas=2)),
    Setting(3, degrees=ParallelConfig(replicas=2), zero=SHARDED),
    Setting(3, degrees=ParallelConfig(replicas=2), powersgd=PowerSGDConfig(enabled=True, rank=16), zero=SHARDED),
    Setting(
        3,
        "fp16",
        degrees=ParallelConfig(replicas=2),
        powersgd=PowerSGDConfig(enabled=True, rank=16, storage="1-6-9", transport="1-6-9"),
        zero=SHARDED,
    ),
]
"""On two processes: one axis at a time, so that all that is sent is sent along it."""
FEW_PARALLEL = (6, 8, 12, 14)


def check_activations() -> Iterator[Check]:
    """Of plain models: kept at the end of the forward pass, and the peaks of both passes."""
    policies = ("none", "selective", "full")
    for precision in ("fp32", "bf16", "fp16"):
        # Arithmetic in fp16 is slow on CPUs.
        width, text_len, grid = (64, 16, 8) if precision == "fp16" else (256, 64, 16)
        config = DalleConfig(
            width=width, depth=3, heads=4, text_len=text_len, grid=grid, text_vocab=512, image_vocab=256
        )
        for policy in policies:
            train = RecomputingTrainConfig(activation_checkpointing=policy)  # type: ignore[arg-type]
            yield from _check_passes("transformer", TransformerRun(model=config, train=train), precision)
    for precision in ("fp32", "bf16"):
        yield from _check_passes("dvae", Setting(0, stage="dvae").run(1), precision)
        for policy in ("none", "full"):
            for stage in ("clip", "prior", "latent_prior", "decoder", "upsampler"):
                run = Setting(0, stage=stage, checkpointing=policy).run(1)
                yield from _check_passes(stage, run, precision)


def _check_passes(stage: str, run: Run, precision: str) -> Iterator[Check]:
    rows, policy = 2, getattr(run.train, "activation_checkpointing", "none")
    layout = Layout(precision=precision, checkpointing=policy, micro_batch=rows)  # type: ignore[arg-type]
    task = STAGES[stage][1].planned(run)
    planned = stages_of(task, layout, "cpu")[0].update
    model: Any = task.build_model()
    if precision == "fp16":
        scales = GradientScales(ScalingConfig(), len(model.blocks), 1)
        for number, block in enumerate(model.blocks):
            block.use(scales.precision(number, torch.float16))
    else:
        model.to(DTYPES[precision])
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    batch = real_batch(task, rows)
    task.loss(model, batch, 0)[0].backward()  # what is made once, such as masks
    with Allocations(left_out=[*model.parameters(), *batch.values()]) as allocations:
        loss = task.loss(model, batch, 0)[0]
        forward, kept = allocations.peak, allocations.now()
        allocations.peak = 0
        loss.backward()
    setting = f"{stage} {precision}, recompute {policy}"
    yield Check(setting, "kept for the backward pass", planned.kept, kept)
    yield Check(setting, "peak of the forward pass", planned.forward, forward)
    yield Check(setting, "peak of the backward pass", planned.backward, allocations.peak)


def real_batch(task: Task[Any], rows: int) -> Batch:
    """A batch as `batch_spec` has it, of zeros; captions end at once."""
    batch = {
        name: torch.zeros(shape.shape, dtype=shape.dtype) if shape.ndim else torch.ones(())
        for name, shape in task.batch_spec(rows).items()
    }
    if "text" in batch:
        batch["text"].fill_(getattr(task.run.model, "end", 0))  # type: ignore[attr-defined]
    return batch


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def check_engines(mesh: Mesh, settings: Sequence[Setting] = SETTINGS) -> Iterator[Check]:
    """Of engines on this many processes. Collective."""
    for setting in settings:
        yield from _check_engine(setting, mesh)
        gc.collect()


def _check_engine(setting: Setting, mesh: Mesh) -> list[Check]:
    run, json_config = setting.run(mesh.world_size), setting.json_config()
    task = STAGES[setting.stage][1].planned(run)
    layout = Layout.of(run, resolve(json_config, run, mesh.world_size), mesh.world_size)
    layout = replace(layout, saves_beside=False)  # these engines write no checkpoints
    stages = stages_of(task, layout, "cpu")
    memory = max((stage_memory(stage, layout, "cpu") for stage in stages), key=lambda memory: memory.peak)
    transfers = max((traffic(stage, layout) for stage in stages), key=_sent)
    counted = _count(task, json_config, setting, mesh)
    before = memory.at("step") - _kind(memory, "optimizer's step", "step")
    passes = max(map(memory.at, ("loss", "backward", "reduce")))
    checks = [
        Check(setting.name, "held between updates", memory.at("between"), counted["between"]),
        Check(setting.name, "of that, weights", _kind(memory, "weights"), counted["weights"]),
        Check(setting.name, "of that, Adam's moments", _kind(memory, "Adam's moments"), counted["moments"]),
        Check(setting.name, "held before the step", before, counted["before"]),
        Check(setting.name, "peak of the passes", passes, counted["passes"]),
        Check(setting.name, "peak of the step", memory.at("step"), counted["step"]),
    ]
    if mesh.world_size > 1:
        checks.append(Check(setting.name, "sent in an update", _sent(transfers), counted["sent"]))
    return checks


def _sent(transfers: Sequence[Transfer]) -> int:
    return sum(transfer.sent for transfer in transfers)


def _kind(memory: Memory, name: str, moment: str = "between") -> int:
    return sum(use.at(moment) for use in memory.uses if use.kind == name)


def _count(task: Task[Any], json_config: dict[str, Any], setting: Setting, mesh: Mesh) -> dict[str, int]:
    """Bytes of one process, the most of all. Collective."""
    run = task.run
    engine, train_step = build_step(run, json_config, mesh, type(task))
    # A run has its batches all the time: the next one is made ready while an update is computed.
    batches = [real_batch(task, run.train.micro_batch) for _ in range(setting.accumulation)]
    for batch in batches:
        batch.pop("loss_scale", None)

    def update(number: int) -> None:
        train_step.run(batches, number, 1e-3)

    for number in range(3):  # DeepSpeed traces the first, and makes Adam's state in it
        update(number)
    gc.collect()
    held = tensors_behind([engine, train_step, batches])
    weights = [parameter.data for parameter in engine.module.parameters()]
    weights += [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
    states = [v for state in engine.client_optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    counted = {"between": _bytes(held), "weights": _bytes(weights), "moments": _bytes(states)}
    passes = train_step._strategy
    step = passes.step
    with Allocations(known=held) as allocations:

        def watched_step() -> None:
            counted.update(passes=allocations.peak, before=allocations.now())
            allocations.peak = 0
            step()

        passes.step = watched_step
        update(3)
        passes.step = step
        counted["step"] = allocations.peak
    with Exchanges(mesh.world_size) as exchanges:
        update(4)
    counted["sent"] = sum(exchanges.sent.values())
    engine.destroy()
    most = torch.tensor([counted[name] for name in sorted(counted)], dtype=torch.int64)
    if mesh.world_size > 1:
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(sorted(counted), most.tolist(), strict=True))


def _bytes(tensors: Sequence[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def tensors_behind(root: Any) -> list[Tensor]:
    """All tensors that can be reached from an object and have memory."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        # Functions and modules lead to all of the program.
        if id(thing) in seen or isinstance(thing, (type, FunctionType, ModuleType)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor) and thing.layout == torch.strided and thing.device.type != "meta":
            found.append(thing)
            if thing.is_leaf and thing.grad is not None:
                waiting.append(thing.grad)
        waiting += gc.get_referents(thing)
    return found


def main() -> None:
    """Check everything, print a table."""
    # The deepspeed launcher tells the rank here, and in the environment.
    options = parse_options(Options)
    mesh = Mesh.start("cpu")
    checks: list[Check] = []
    if "activations" in options.parts and mesh.is_main:
        checks += check_activations()
    if "engines" in options.parts:
        checks += check_engines(mesh, FEW if options.few else SETTINGS)
    if "parallel" in options.parts and mesh.world_size == 2:
        checks += check_engines(mesh, [PARALLEL[number] for number in FEW_PARALLEL] if options.few else PARALLEL)
    if mesh.is_main:
        table = Table(title=f"{mesh.world_size} processes", title_justify="left")
        for column in ("setting", "what", "predicted", "measured", "error"):
            table.add_column(column, justify="right" if column in ("predicted", "measured", "error") else "left")
        for check in checks:
            row = (f"{check.predicted:,.0f}", f"{check.measured:,.0f}", f"{check.error:+.1%}")
            table.add_row(check.setting, check.what, *row)
        Console(width=140).print(table)
        if options.json is not None:
            records = [{**asdict(check), "error": check.error} for check in checks]
            Path(options.json).write_text(json.dumps(records, indent=2) + "\n")
    mesh.stop()


if __name__ == "__main__":
    run_launcher(main)
