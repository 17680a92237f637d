"""Tasks whose model is a row of residual blocks: tensor groups and pipelines divide it, fp16 has a scale for each block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from dalle_ds.config import ScalingConfig
from dalle_ds.errors import ConfigError
from dalle_ds.parallel import WHOLE, Mesh, TensorGroup
from dalle_ds.parallel.stages import PipelineLayer
from dalle_ds.tasks.base import Batch, RunConfig, Task


class LayeredTask(Task[RunConfig]):
    """What the Trainer asks for besides, to divide the model (DALL·E §2.5) and to scale gradients (§2.4)."""

    @abstractmethod
    def build_model(self, tensor: TensorGroup = WHOLE) -> nn.Module:
        """The model, or this process's part of it in a tensor group."""

    @abstractmethod
    def pipeline_layers(self, tensor: TensorGroup) -> list[PipelineLayer]:
        """The layers of `build_model`'s model."""

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the first of `pipeline_layers` takes of a batch."""

    @property
    @abstractmethod
    def scaling(self) -> ScalingConfig:
        """Gradient scales of `resblocks` in fp16."""

    @abstractmethod
    def resblocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Those residual blocks that this process's model has; each has its `number` and `use(BranchPrecision)`."""

    @property
    @abstractmethod
    def resblock_count(self) -> int:
        """Residual blocks of the whole model."""

    @abstractmethod
    def check_division(self, mesh: Mesh) -> None:
        """Raise a `ConfigError` where the model cannot be divided so."""

    def check_layout(self, mesh: Mesh, micro_batch: int, precision: str) -> None:
        self.check_division(mesh)
        if self.scaling.in_fp32 and precision != "fp32":
            raise ConfigError(
                f"scaling.in_fp32 is for fp32 runs, and this is {precision}: leave it out, or give a DeepSpeed JSON for fp32"
            )
