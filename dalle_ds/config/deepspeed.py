"""The DeepSpeed JSON, checked against the run's configuration and completed from it."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_ds.config.runs import Run
from dalle_ds.config.training import Precision
from dalle_ds.errors import ConfigError
from dalle_ds.parsing import parse_json, shown

_OURS = {
    "optimizer": "the optim section",
    "scheduler": "the optim section",
    "torch_autocast": 'train.precision, or "bf16" or "fp16" in the JSON',
    "amp": 'train.precision, or "bf16" or "fp16" in the JSON',
}
_CHECKED = (
    "bf16",
    "fp16",
    "zero_optimization",
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "data_types",
    *_OURS,
)
"""Keys that are held against the run; DeepSpeed ignores those it does not know, misspelt ones too."""


@dataclass(frozen=True)
class EngineConfig:
    """What the engine is built from, once the JSON and the run agree."""

    deepspeed: dict[str, Any]
    """The complete DeepSpeed configuration, no "auto" left in it."""
    precision: Precision
    """Arithmetic; fp16 is an fp32 engine around blocks that cast (docs/precision.md)."""
    zero_stage: int
    """ZeRO stage."""
    micro_batch: int
    """Images per process and forward pass."""
    accumulation: int
    """Micro-batches per update."""


def load_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration file.

    Raises:
        ConfigError: missing, or not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--deepspeed_config {path}: there is no such file; ds_configs/ has some to start from")
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed_config {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--deepspeed_config {path} must hold a JSON object, found {type(content).__name__}")
    return content


def is_auto(json_config: dict[str, Any], run: Run) -> bool:
    """Whether precision is left to the device (`"bf16": {"enabled": "auto"}`), and somebody has to settle it.

    Raises:
        ConfigError: the JSON contradicts itself.
    """
    is_open = _section(json_config, "bf16").get("enabled") == "auto"
    return is_open and run.train.precision is None and _json_precision(json_config) in (None, "fp32")


def with_precision(json_config: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """The DeepSpeed JSON with a precision stated instead of "auto"."""
    states = {name: {**_section(json_config, name), "enabled": precision == name} for name in ("bf16", "fp16")}
    return {**json_config, **states}


def resolve(json_config: dict[str, Any], run: Run, world_size: int) -> EngineConfig:
    """Check the DeepSpeed JSON against the run and fill in what it leaves out or calls "auto", but for precision, which
    depends on the device: `is_auto`, `with_precision`.

    `run.parallel` must divide `world_size` processes (`Mesh.divide`).

    The run decides batch sizes and clipping; the JSON decides precision, ZeRO stage and everything else, unless the run
    states those too. Whatever both state must agree.

    Raises:
        ConfigError: a contradiction, or something that cannot work; the message says what to set.
    """
    for name in json_config:
        guess = difflib.get_close_matches(name, _CHECKED, 1, cutoff=0.8)
        if guess and name not in _CHECKED:
            raise ConfigError(f'the DeepSpeed JSON has "{name}": did you mean "{guess[0]}"?')
    for name, section in _OURS.items():
        if name in json_config:
            raise ConfigError(
                f'the DeepSpeed JSON sets "{name}", which is set through {section}: remove it from the JSON'
            )
    degrees = run.parallel
    readers = world_size // (degrees.pipe * degrees.tensor)
    micro_batch, accumulation = _batch(json_config, run, readers)
    if is_auto(json_config, run):
        raise ConfigError(
            '"bf16.enabled" in the DeepSpeed JSON is "auto", which is not settled yet: set it to true or false'
        )
    precision = _agree("precision", run.train.precision, _json_precision(json_config), "fp32")
    stage = _agree("zero_stage", run.train.zero_stage, _json_stage(json_config), 1 if degrees.pipe > 1 else 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f'"zero_optimization.stage" must be 0, 1, 2 or 3, found {shown(stage)}')
    if degrees.pipe > 1 and stage != 1:
        raise ConfigError(
            f"parallel.pipe={degrees.pipe} with ZeRO-{stage}: a pipeline adds up gradients over many micro-batches, which "
            "ZeRO-2 and 3 would reduce after every one, and without ZeRO DeepSpeed's pipelines drift; set "
            '"zero_optimization.stage" to 1'
        )
    _check_offload(json_config, degrees.pipe)
    _check_compression(run, stage, world_size)
    complete = dict(json_config)
    # DeepSpeed knows of one replica only.
    complete["train_batch_size"] = run.train.batch_size // degrees.replicas
    complete["train_micro_batch_size_per_gpu"] = micro_batch
    complete["gradient_accumulation_steps"] = accumulation
    _check_clipping(json_config, run)
    complete["gradient_clipping"] = 0.0  # we clip (`MasterGradients`)
    complete["fp16"] = {"enabled": False}
    complete["bf16"] = {**_section(json_config, "bf16"), "enabled": precision == "bf16"}
    complete["zero_optimization"] = {**_section(json_config, "zero_optimization"), "stage": stage}
    complete.setdefault("zero_allow_untested_optimizer", True)
    # DeepSpeed warns about an offloaded client optimizer that is not its own; ours is AdamW on purpose.
    complete.setdefault("zero_force_ds_cpu_optimizer", False)
    complete.setdefault("steps_per_print", 2**31)
    # Between stages each process sends what it has; the positions of a residual stream may be divided already.
    complete["pipeline"] = {
        "pipe_partitioned": False,
        "grad_partitioned": False,
        **_section(json_config, "pipeline"),
    }
    if precision == "bf16" and stage == 0 and accumulation > 1:
        raise ConfigError(
            f"bf16 with ZeRO-0 would sum the gradients of {accumulation} micro-batches in bf16, which loses small ones: "
            'set "zero_optimization.stage" to 1, or train.micro_batch so that nothing is accumulated'
        )
    if precision == "fp16":
        _check_reduction(json_config)
    needs_norm = stage not in (1, 2) or (precision == "bf16" and stage == 1)
    if not needs_norm and "offload_optimizer" not in complete["zero_optimization"]:
        # The norm is ours too; DeepSpeed's takes a reduction for every parameter group.
        complete["zero_optimization"].setdefault("compute_grad_norm", False)
        if degrees.pipe > 1:  # would wait for ever: stages have different numbers of parameter groups
            complete["zero_optimization"]["compute_grad_norm"] = False
        if precision == "bf16":
            complete["bf16"].setdefault("check_grad_overflow", False)
    if precision == "bf16" and stage > 0:
        # Summed over micro-batches in fp32; DeepSpeed's default is the weights' dtype.
        complete["data_types"] = {"grad_accum_dtype": "fp32", **_section(json_config, "data_types")}
    return EngineConfig(complete, precision, stage, micro_batch, accumulation)


def _batch(json_config: dict[str, Any], run: Run, readers: int) -> tuple[int, int]:
    """Micro-batch and how many of them make an update; `readers` is the number of processes with data of their own."""
    batch, degrees = run.train.batch_size, run.parallel
    processes = "processes" if degrees.pipe == degrees.tensor == 1 else "data-parallel processes"
    if batch % readers:
        raise ConfigError(
            f"train.batch_size={batch} cannot be divided among {readers} {processes}: "
            f"set it to a multiple of {readers}, or start another number of processes"
        )
    stated = _stated(json_config, "train_micro_batch_size_per_gpu")
    micro_batch = run.train.micro_batch if run.train.micro_batch is not None else stated
    if micro_batch is None:
        micro_batch = _default_micro_batch(batch // readers, degrees.pipe)
    if stated is not None and stated != micro_batch:
        raise ConfigError(
            f'train.micro_batch={micro_batch} but the DeepSpeed JSON says "train_micro_batch_size_per_gpu": {stated}: '
            'make them equal, or set the JSON\'s to "auto"'
        )
    if batch % (micro_batch * readers):
        raise ConfigError(
            f"train.batch_size={batch} is not a multiple of train.micro_batch={micro_batch} × {readers} {processes}: "
            f"set train.batch_size to a multiple of {micro_batch * readers}, or train.micro_batch to a divisor of "
            f"{batch // readers}"
        )
    accumulation = batch // (micro_batch * readers)
    for name, value in (("train_batch_size", batch), ("gradient_accumulation_steps", accumulation)):
        stated = _stated(json_config, name)
        if stated is not None and stated != value:
            raise ConfigError(
                f'the DeepSpeed JSON says "{name}": {stated}, but train.batch_size={batch}, train.micro_batch={micro_batch} '
                f'and {readers} {processes} make it {value}: set it to {value} or "auto"'
            )
    return micro_batch, accumulation


def _default_micro_batch(rows: int, stages: int) -> int:
    """All rows of an update at once; in a pipeline, few enough that its stages are idle a fifth of the time at most."""
    if stages == 1:
        return rows
    return next(size for size in range(max(1, rows // (4 * stages)), 0, -1) if rows % size == 0)


def _check_clipping(json_config: dict[str, Any], run: Run) -> None:
    clip = run.optim.clip if run.optim.clip is not None else 0.0
    stated = _stated(json_config, "gradient_clipping", float)
    if stated is not None and stated != clip:
        raise ConfigError(
            f'the DeepSpeed JSON says "gradient_clipping": {stated}, but optim.clip is {run.optim.clip}: '
            'make them equal, or set the JSON\'s to "auto"'
        )


def _check_reduction(json_config: dict[str, Any]) -> None:
    """fp16 gradients are unscaled: averaged over many processes in 16 bits, the small ones would be lost."""
    stated = {
        "communication_data_type": json_config.get("communication_data_type"),
        "data_types.grad_accum_dtype": _section(json_config, "data_types").get("grad_accum_dtype"),
    }
    for name, value in stated.items():
        if value not in (None, "fp32"):
            raise ConfigError(
                f'"{name}" in the DeepSpeed JSON is {shown(value)}, which fp16 runs need in "fp32": leave it out'
            )


def _check_compression(run: Run, stage: int, world_size: int) -> None:
    if not run.powersgd.enabled:
        return
    if stage != 3:
        raise ConfigError(
            f"powersgd.enabled with ZeRO-{stage}: only ZeRO-3 cuts every matrix by itself, so that what a process holds of "
            'its gradient is a matrix too; set "zero_optimization.stage" to 3, or leave powersgd out'
        )
    rank, divisor = run.powersgd.rank, world_size // run.parallel.replicas
    if rank is not None and rank % divisor:
        raise ConfigError(
            f"powersgd.rank={rank} cannot be shared out to the {divisor} processes that divide a replica's matrices: set it "
            f"to a multiple of {divisor}"
        )


def _check_offload(json_config: dict[str, Any], stages: int) -> None:
    offload = _section(_section(json_config, "zero_optimization"), "offload_optimizer")
    if stages > 1 and offload.get("device", "none") != "none":
        raise ConfigError(
            f'"zero_optimization.offload_optimizer" with parallel.pipe={stages}: DeepSpeed then compares norms among stages, '
            "which have different numbers of parameter groups, and waits for ever; leave one of them out"
        )
    if offload.get("device") == "nvme":
        raise ConfigError(
            '"zero_optimization.offload_optimizer.device" is "nvme", where gradients cannot be looked at before the step: '
            'set it to "cpu"'
        )
    if offload.get("ratio", 1.0) != 1.0:
        raise ConfigError(
            f'"zero_optimization.offload_optimizer.ratio" is {shown(offload["ratio"])}, which would hand a part of the '
            "weights to another optimizer: leave it out"
        )


def _agree(name: str, wanted: Any, stated: Any, default: Any) -> Any:
    if wanted is not None and stated is not None and wanted != stated:
        raise ConfigError(
            f"train.{name}={wanted} but the DeepSpeed JSON says {shown(stated)}: give a JSON for {wanted}, or leave "
            f"train.{name} out"
        )
    if wanted is not None:
        return wanted
    return stated if stated is not None else default


def _json_precision(json_config: dict[str, Any]) -> str | None:
    enabled = [name for name in ("fp16", "bf16") if _section(json_config, name).get("enabled") not in (None, "auto")]
    chosen = [name for name in enabled if _enabled(json_config, name)]
    if len(chosen) == 2:
        raise ConfigError('the DeepSpeed JSON enables both "fp16" and "bf16": enable one of them')
    for name, value in _section(json_config, "fp16").items():
        # DeepSpeed's one scale would be 1: each residual block has its own.
        if name != "enabled" and not (name == "loss_scale" and value == 1):
            raise ConfigError(
                f'the DeepSpeed JSON sets "fp16.{name}", which belongs to a single loss scale; here every residual block '
                "has one, set through the scaling section: remove it from the JSON"
            )
    if chosen:
        return chosen[0]
    return "fp32" if enabled else None


def _json_stage(json_config: dict[str, Any]) -> int | None:
    stage = _section(json_config, "zero_optimization").get("stage")
    return None if stage == "auto" else stage


def _stated(json_config: dict[str, Any], name: str, kind: type[int] | type[float] = int) -> Any:
    value = json_config.get(name)
    if value is None or value == "auto":
        return None
    whole = type(value) is int and 1 <= value < 2**63
    if not whole and not (kind is float and type(value) in (int, float) and 0 <= value < math.inf):
        what = "a whole number of at least 1" if kind is int else "a number of at least 0"
        raise ConfigError(f'"{name}" in the DeepSpeed JSON must be {what} or "auto", found {shown(value)}')
    return value


def _section(json_config: dict[str, Any], name: str) -> dict[str, Any]:
    section = json_config.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f'"{name}" in the DeepSpeed JSON must be an object, found {shown(section)}')
    return section


def _enabled(json_config: dict[str, Any], name: str) -> bool:
    enabled = _section(json_config, name).get("enabled", False)
    if not isinstance(enabled, bool):
        raise ConfigError(f'"{name}.enabled" in the DeepSpeed JSON must be true or false, found {shown(enabled)}')
    return enabled
