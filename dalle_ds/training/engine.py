"""The DeepSpeed engine of a run, and of whoever measures one."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dalle_ds.allocator import keep_freed_memory
from dalle_ds.config import OptimConfig
from dalle_ds.config.deepspeed import EngineConfig
from dalle_ds.errors import ConfigError
from dalle_ds.models.adapters import attach_adapters
from dalle_ds.optim import AdamW
from dalle_ds.parallel import Mesh
from dalle_ds.precision import GradientScales
from dalle_ds.tasks import Task
from dalle_ds.tasks.base import ModelParallelTask, PipelineTask


def build_engine(
    build_model: Callable[[], nn.Module],
    parameter_groups: Callable[[nn.Module], list[dict[str, Any]]],
    optim: OptimConfig,
    config: EngineConfig,
    mesh: Mesh,
    seed: int = 0,
) -> Any:
    """A DeepSpeed engine around a new model and its AdamW, on the mesh's device. Collective.

    The engine does not clip (`MasterGradients`); its `client_optimizer` is the AdamW, which rounds at random by `seed`.
    ConfigError where DeepSpeed refuses its configuration.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is about to change; nothing that a user could mend.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if mesh.device.type == "cpu":
        keep_freed_memory()
    try:
        with deepspeed.zero.Init(
            config_dict_or_path=config.deepspeed,
            enabled=config.zero_stage == 3,
            mpu=mesh,
            data_parallel_group=mesh.get_data_parallel_group(),
        ):
            model = build_model()
        model.to(mesh.device)
        optimizer = AdamW(
            parameter_groups(model),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            second_moment_clip=optim.second_moment_clip,
            stochastic_rounding=optim.stochastic_rounding,
            # Shards are different numbers; whole copies of the weights must be rounded alike.
            seed=seed + (mesh.index("shard") if config.zero_stage > 0 else 0),
        )
        # DeepSpeed's bf16 optimizer prints six lines on memory for every parameter group.
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=config.deepspeed,
                dist_init_required=False,
                mpu=mesh if mesh.size("pipe") == 1 else None,  # a pipeline brings its own
            )
    except ValidationError as error:
        raise ConfigError(f"DeepSpeed refuses its JSON: {error}") from error
    if config.zero_stage == 0 and config.precision == "bf16":
        # DeepSpeed allocates Adam's state by a step on zeros, after which the first update would count as the second.
        engine.optimizer.optimizer.state.clear()
    if config.zero_stage == 3:
        _keep_one_copy(engine.optimizer)
    return engine


def _keep_one_copy(optimizer: Any) -> None:
    """Let the fp32 weights that ZeRO-3 gathers and those that it updates be the same memory.

    DeepSpeed means to, but compares a device with its name, and keeps two copies: 4 bytes more for every parameter.
    """
    for gathered, updated in zip(
        optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
    ):
        if gathered is not None and gathered.dtype == updated.dtype and gathered.device == updated.device:
            updated.data = gathered


def build_part(task: Task[Any], mesh: Mesh) -> nn.Module:
    """What this process trains of a task's model."""
    if task.lora is not None:
        model = task.build_model()
        attach_adapters(model, task.lora)
        return model
    if not isinstance(task, ModelParallelTask):
        return task.build_model()
    if mesh.size("pipe") == 1:
        return task.build_model(mesh.tensor)
    from dalle_ds.parallel.pipeline import Pipeline

    assert isinstance(task, PipelineTask)
    return Pipeline(task.pipeline_layers(mesh.tensor), mesh)


@torch.no_grad()
def load_frozen(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the weights that an engine does not train their values, by which every process has them. Collective."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.copy_(weights[name])


def scale_gradients(task: Task[Any], model: nn.Module, precision: str, mesh: Mesh) -> GradientScales | None:
    """Give every residual block of a process's model a gradient scale, and in "fp16" that arithmetic; None where gradients are
    not scaled."""
    if not isinstance(task, ModelParallelTask) or not (precision == "fp16" or task.scaling.in_fp32):
        return None
    dtype = torch.float16 if precision == "fp16" else torch.float32
    scales = GradientScales(task.scaling, task.resblock_count, mesh.size("data"), mesh.device)
    for block in task.resblocks(model):
        block.use(scales.precision(block.number, dtype))
        for parameter in block.parameters():
            if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2:
                # ZeRO-3 then gathers these weights in the dtype that the block casts them to anyway.
                parameter.comm_dtype = dtype  # type: ignore[attr-defined]
    return scales
