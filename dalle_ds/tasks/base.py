"""What the Trainer asks of a task, and what a task may be able to besides: to be divided, and to compare a whole batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle_ds.config import LoraConfig, Run, ScalingConfig, SharpnessConfig
from dalle_ds.data.dataset import read_info
from dalle_ds.data.loader import Batch, Samples
from dalle_ds.data.order import Mixture
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.adapters import Adapter, merge
from dalle_ds.models.dalle import ResidualBlock
from dalle_ds.models.pretrained import check_shapes, export_folder, fingerprint, load_model
from dalle_ds.optim import decay_groups, resblock_groups
from dalle_ds.parallel import WHOLE, Mesh, TensorGroup
from dalle_ds.parallel.peers import ALONE, Peers
from dalle_ds.parallel.stages import PipelineLayer
from dalle_ds.tasks.initial import check_settings, initial_facts

RunConfig = TypeVar("RunConfig", bound=Run)
Metrics = dict[str, Tensor]
Outputs = dict[str, Tensor]
"""What a model gives by name: (n, …) one entry per row, or () the same for all rows."""


class _Fingerprinted(Protocol):
    @property
    def fingerprint(self) -> str: ...


Part = TypeVar("Part", bound=_Fingerprinted)


class Task(ABC, Generic[RunConfig]):
    """A trainable thing. The Trainer owns processes, engine, loop and files; a task owns what is particular.

    Args:
        run: the run's configuration.
    """

    name: str
    """Names the stage in run directories and messages: "dvae", "transformer"."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        if run.init:
            check_settings(run, self.name)

    @classmethod
    def planned(cls, run: RunConfig) -> Task[RunConfig]:
        """A task that has read no files: `build_model`, `parameter_groups`, `batch_spec` and `loss` work on "meta" tensors."""
        task = cls.__new__(cls)
        task.run = run
        return task

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model, with fresh weights drawn from torch's global generator."""

    def check_layout(self, mesh: Mesh, micro_batch: int, precision: str) -> None:
        """Raise a `ConfigError` for what this task cannot do: a model, or an update in micro-batches of so many rows, that is
        divided so; arithmetic in this precision; 16-bit moments of a model without residual blocks."""
        if self.run.optim.moments == "16-bit" and type(self).residual_blocks is Task.residual_blocks:
            raise ConfigError(
                f"optim.moments=16-bit is for matrices of residual blocks, which a {self.name} has none of: leave it out"
            )
        for name in ("tensor", "pipe"):
            degree = getattr(mesh.degrees, name)
            if degree > 1:
                raise ConfigError(
                    f"parallel.{name}={degree}, but a {self.name} is not divided in that way: leave it out; ZeRO divides what "
                    "is too large for one device"
                )
        if precision == "fp16":
            raise ConfigError(
                f"fp16 scales the gradients of residual blocks, which a {self.name} does not offer: give a DeepSpeed JSON for "
                "bf16 or fp32"
            )

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters that are trained; None trains all weights."""
        found: LoraConfig | None = getattr(self.run, "lora", None)
        return found if found is not None and found.rank else None

    def check_adapters(self, mesh: Mesh, precision: str) -> None:
        """Raise a `ConfigError` for what `lora` cannot be trained with."""
        run, lora = self.run, self.lora
        if lora is None:
            return
        scaled = precision == "fp16" or getattr(getattr(run, "scaling", None), "in_fp32", False)
        for is_refused, reason in (
            (not run.init, "needs the model that adapters are of: name it with --init"),
            (
                mesh.size("tensor") * mesh.size("pipe") > 1,
                "has no parallel.tensor or parallel.pipe, which would divide each adapter: frozen weights take little memory "
                "under ZeRO-3",
            ),
            (run.powersgd.enabled, "has no powersgd.enabled, whose factors would be as large as adapters"),
            (run.optim.moments == "16-bit", "has no optim.moments=16-bit, which are for whole matrices"),
            (scaled, "has no gradient scales: give a DeepSpeed JSON for bf16 or fp32, and leave scaling.in_fp32 out"),
        ):
            if is_refused:
                raise ConfigError(f"lora.rank={lora.rank} {reason}")

    def adapter(self, trained: Mapping[str, Tensor]) -> Adapter:
        """What `lora` has trained, with the model that it is of."""
        assert self.lora is not None
        return Adapter(trained, self.lora.factor, self.name, self.initial_fingerprint, self.run.init)

    def plain_model(self, trained: Mapping[str, Tensor]) -> nn.Module:
        """The model in fp32 on the CPU, adapters merged, from the weights that are trained."""
        model = self.build_model()
        if self.lora is None:
            model.load_state_dict(trained, assign=True)
        else:
            initial = self.initial_weights() or {}
            model.load_state_dict({name: value.float() for name, value in initial.items()}, assign=True)
            merge(model, trained, self.lora.factor)
        return model.eval()

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer parameter groups."""
        compact = self.residual_blocks(model) if self.run.optim.moments == "16-bit" else ()
        return decay_groups(model, self.run.optim.weight_decay, compact)

    def residual_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Blocks of the model whose matrices `optim.moments` is for; a task without any leaves this as it is."""
        return ()

    def initial_weights(self) -> Mapping[str, Tensor] | None:
        """The plain model's state dict for the first update, on the CPU, or None to begin with those of `build_model`."""
        if not self.run.init:
            return None
        # As they lie in the file: a process reads the parts that it keeps, and memory for all is that of the system's cache.
        _, weights = load_model(self.run.init, self.name, type(self.run.model))  # type: ignore[attr-defined]
        check_shapes(self.build_model, None, weights, self.run.init)
        return weights

    @cached_property
    def initial_fingerprint(self) -> str:
        """Of the model in `run.init`."""
        weights = self.initial_weights()
        assert weights is not None
        return fingerprint(weights)

    def part(self, option: str, inside: str, load: Callable[[str | Path], Part], what: str) -> Part:
        """A trained part: the one that an option names, or, where it names none, that in the export of the initial model.

        Args:
            inside: its name in that folder.
            load: reads it.
            what: the option's value, in words.

        Raises:
            ConfigError: there is none, or it is not the one that the initial model was trained with.
        """
        init, place = self.run.init, getattr(self.run, option)
        known = initial_facts(init).get(option) if init else None
        if not place and init and (own := export_folder(init) / inside).exists():
            place = own
        if not place:
            raise ConfigError(f"--{option} is missing: name {what}")
        found = load(place)
        if known is not None and found.fingerprint != known:
            raise ConfigError(
                f"--{option} {place} is not the one that the model in --init {init} was trained with (fingerprint "
                f"{found.fingerprint[:12]}, trained with {known[:12]}): name that one, or leave --{option} out"
            )
        return found

    def samples(self, split: str) -> Samples:
        """The rows of "train" (augmented) or "validation" (not), of all of the run's corpora.

        Raises:
            DataError: a folder or split cannot be read, or one of several corpora has no rows to train on.
        """
        corpora = [self.corpus_samples(folder, split) for folder in self.run.corpora]
        if len(corpora) == 1:
            return corpora[0]
        for folder, corpus in zip(self.run.corpora, corpora, strict=True):
            if split == "train" and len(corpus) == 0:
                raise DataError(f"{folder} has no training rows: prepare more data, or leave it out of --data")
        return Mixture(corpora, self.run.data_weights)

    @abstractmethod
    def batch_spec(self, rows: int) -> Batch:
        """What `loss` takes of a batch of so many rows, on torch's "meta" device: shapes and types to plan with."""

    @abstractmethod
    def corpus_samples(self, folder: str, split: str) -> Samples:
        """The rows of one prepared folder, as `samples` wants them."""

    def data_identity(self) -> dict[str, str]:
        """The part of `identity` that is of the prepared folders.

        Raises:
            ConfigError: two of them hold the same rows.
        """
        found: dict[str, str] = {}
        for folder in self.run.corpora:
            fingerprint = read_info(Path(folder))["fingerprint"]
            if fingerprint in found:
                raise ConfigError(
                    f"--data names {found[fingerprint]} and {folder}, which hold the same rows: leave one out; "
                    "--data_weights says how often each corpus is drawn from"
                )
            found[fingerprint] = folder
        return numbered("data", list(found))

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Fingerprints of what the run learns from; a resumed run must find the same."""

    def parts(self) -> dict[str, str]:
        """Those entries of `identity` of which an export has copies, or is made with."""
        return {}

    def prepare(self, batch: Batch) -> Batch:
        """A batch, already on the device, made ready for `loss`; called once, outside the model's forward pass."""
        return batch

    def num_items(self, batch: Batch) -> Tensor:
        """() how many items the varying part of this micro-batch's loss is a mean over; 1 where all batches weigh the same."""
        return torch.ones((), device=batch["key"].device)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        """Training loss of a micro-batch and metrics to report.

        Args:
            model: the DeepSpeed engine, or the plain model.
            batch: as `prepare` left it. `batch["loss_scale"]`, set by the Trainer, is what the mean over this micro-batch must
                be multiplied by so that the mean over all ranks and micro-batches is the mean over the whole batch.
            step: update, counted from 0.

        Returns:
            () loss and detached metrics. Those that are () are averaged over ranks and micro-batches, as is the loss; vectors
            are summed and given to `digest`.
        """

    def measure(self, model: Callable[..., Any], batches: Iterator[Batch], mesh: Mesh) -> None:
        """Measure on training data what an export tells of the averaged model; before the export, on all processes.

        Args:
            batches: this process's micro-batches, endless.
        """

    def recall(self, export: Path) -> None:
        """Take what `measure` found from an export of the same weights."""

    def digest(self, sums: Metrics) -> dict[str, float]:
        """Metrics from the vectors among those of `loss`, summed over the whole batch."""
        return {}

    @abstractmethod
    def evaluate(self, model: Callable[..., Any], batch: Batch) -> Metrics:
        """Sums over the rows of a batch of validation data where `batch["valid"]` is 1; any shape, added up over batches and
        ranks."""

    @abstractmethod
    def summarize(self, sums: Metrics) -> dict[str, float]:
        """Validation metrics from the added-up sums of `evaluate`."""

    @abstractmethod
    def preview(self, model: nn.Module, batch: Batch) -> Image.Image:
        """An image that shows what the plain, averaged model can do, made from a few rows of validation data."""

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the plain model, with all that using it needs, into `folder`."""

    def alarm(self, metrics: Mapping[str, float], step: int) -> str | None:
        """A sentence for the user if the metrics of update `step` show that something is going wrong."""
        return None

    def flops_per_sample(self) -> float:
        """FLOPs that one sample needs, forward and backward, for the utilization that is shown."""
        with torch.device("meta"):
            model = self.build_model()
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.loss(model, self.batch_spec(1), 0)
        return 3.0 * counter.get_total_flops()  # the backward pass takes twice as many as the forward pass

    def describe(self) -> list[str]:
        """Lines for the user at the start of a run."""
        return []

    def items_per_sample(self) -> tuple[str, int]:
        """What throughput counts besides samples: ("tokens", tokens in a sample)."""
        return "pixels", 0


class ModelParallelTask(Task[RunConfig]):
    """A task whose model is a row of `ResidualBlock`s: tensor groups divide it (DALL·E §2.5), and gradients are scaled in each
    block by itself (§2.4). Its run has `scaling`, and its model's configuration says what a group divides."""

    @abstractmethod
    def build_model(self, tensor: TensorGroup = WHOLE) -> nn.Module:
        """The model, or this process's part of it in a tensor group."""

    @property
    @abstractmethod
    def resblock_count(self) -> int:
        """Residual blocks of the whole model."""

    @property
    def scaling(self) -> ScalingConfig:
        """Gradient scales of `resblocks` in fp16."""
        found: ScalingConfig = self.run.scaling  # type: ignore[attr-defined]
        return found

    def resblocks(self, model: nn.Module) -> Sequence[ResidualBlock]:
        """Those residual blocks that this process's model has."""
        return [module for module in model.modules() if isinstance(module, ResidualBlock)]

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return resblock_groups(model, self.resblocks(model), self.run.optim)

    def check_layout(self, mesh: Mesh, micro_batch: int, precision: str) -> None:
        if mesh.size("pipe") > 1 and not isinstance(self, PipelineTask):
            raise ConfigError(
                f"parallel.pipe={mesh.size('pipe')}, but a {self.name} is not made into a pipeline: leave it out; ZeRO and "
                "parallel.tensor divide what is too large for one device"
            )
        mesh.check(self.run.model)  # type: ignore[attr-defined]
        if self.scaling.in_fp32 and precision != "fp32":
            raise ConfigError(
                f"scaling.in_fp32 is for fp32 runs, and this is {precision}: leave it out, or give a DeepSpeed JSON for fp32"
            )


class PipelineTask(ModelParallelTask[RunConfig]):
    """A task whose model can be cut into the stages of a pipeline."""

    @abstractmethod
    def pipeline_layers(self, tensor: TensorGroup) -> list[PipelineLayer]:
        """The layers of `build_model`'s model."""

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the first of `pipeline_layers` takes of a batch."""


class ContrastiveTask(Task[RunConfig]):
    """A task whose loss compares all rows of an update with each other, on all processes and in all micro-batches.

    It is in two parts: what the model makes of each row by itself, and the loss of all rows together. How many processes and
    micro-batches make up an update changes neither loss nor gradients (`CachedStrategy` in `training/strategies.py`).
    """

    @cached_property
    def validation_rows(self) -> int:
        """Rows of one validation, which are compared with each other."""
        return min(self.run.report.validation_rows, len(self.samples("validation")))

    @property
    def sharpness(self) -> SharpnessConfig | None:
        """Sharpness-aware minimization; None for a task, or a run, without."""
        return None

    @abstractmethod
    def embed(self, model: nn.Module, batch: Batch) -> Outputs:
        """What the loss takes of the rows of a micro-batch, each of which depends on that row alone."""

    @abstractmethod
    def loss_of(self, outputs: Outputs, peers: Peers = ALONE) -> tuple[Tensor, Metrics]:
        """Loss of an update, of which `outputs` are this process's rows, and metrics to report. Collective.

        Returns:
            () loss and detached metrics. Those that are () are averaged over processes, as are the loss and gradients; vectors
            are summed and given to `digest`.
        """

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        """Of a micro-batch that is all of its update, on the only process."""
        return self.loss_of(self.embed(model, batch))


def numbered(name: str, fingerprints: Sequence[str]) -> dict[str, str]:
    """`{name: fingerprint}`; of several corpora, how many there are, and each under a name of its own for errors to tell."""
    if len(fingerprints) == 1:
        return {name: fingerprints[0]}
    each = {f"{name} {number}": fingerprint for number, fingerprint in enumerate(fingerprints, 1)}
    return {name: f"{len(each)} corpora", **each}


def row_noise(seeds: Tensor, draws: int, dim: int, device: torch.device, uniforms: int = 2) -> tuple[Tensor, Tensor]:
    """Random numbers of each row, from its seed alone: the same in every layout.

    Args:
        seeds: (B,) int64.

    Returns:
        (B, uniforms) uniform in [0, 1), and (B, draws, dim) normal, fp32.
    """
    shares = torch.empty(len(seeds), uniforms, device=device)
    noise = torch.empty(len(seeds), draws, dim, device=device)
    if not noise.is_meta:
        generator = torch.Generator(device=device)
        for seed, few, many in zip(seeds.tolist(), shares, noise, strict=True):
            generator.manual_seed(seed)
            few.uniform_(generator=generator)
            many.normal_(generator=generator)
    return shares, noise
