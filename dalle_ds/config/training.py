"""How a model is trained: objective, optimizer, updates, data loading, reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle_ds.config.checks import fraction, positive
from dalle_ds.errors import ConfigError

Checkpointing = Literal["none", "selective", "full"]
"""What a model computes again in the backward pass; see `TrainConfig.activation_checkpointing`."""


@dataclass(frozen=True)
class DvaeObjective:
    """The dVAE's loss and its schedules (DALL·E §2.1, App. A.2)."""

    kl_weight: float = 6.6
    """Final β. The loss is mean NLL per pixel value + β · (codes per pixel value) · mean KL per code."""
    kl_warmup_steps: int = 5_000
    """Updates over which β rises from 0 on a half cosine."""
    temperature_start: float = 1.0
    """Gumbel-softmax temperature τ at the first update."""
    temperature_end: float = 1 / 16
    """τ from `temperature_steps` on."""
    temperature_steps: int = 150_000
    """Updates over which τ falls on a half cosine."""

    def __post_init__(self) -> None:
        positive("objective", self, "temperature_start", "temperature_end")
        for name in ("kl_weight", "kl_warmup_steps", "temperature_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"objective.{name} must not be negative, found {getattr(self, name)}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 4.5e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.96
    """Decay of the second moment (0.96 for the transformer, 0.999 for the dVAE)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 4.5e-2
    """Decoupled weight decay, on weight matrices and kernels only."""
    clip: float | None = 4.0
    """Largest global gradient norm; None does not clip."""
    schedule: Literal["constant", "cosine", "plateau"] = "plateau"
    """What follows the warm-up: `constant`; `cosine` from lr to final_lr over decay_steps; `plateau` halves the rate
    whenever the smoothed training loss has stopped falling (DALL·E App. B.2)."""
    warmup_steps: int = 5_000
    """Updates of linear warm-up from 0."""
    decay_steps: int | None = None
    """Cosine: the update, counted from the first, at which final_lr is reached; it is held from there on."""
    final_lr: float = 0.0
    """Cosine: the rate from decay_steps on."""
    plateau_patience: int = 10_000
    """Plateau: updates without a relative improvement of plateau_threshold that halve the rate."""
    plateau_threshold: float = 1e-3
    """Plateau: the relative improvement of the smoothed training loss that counts."""
    plateau_smoothing: float = 0.999
    """Plateau: decay of the exponential average of the training loss."""
    plateau_halvings: int = 5
    """Plateau: the most halvings (five in the paper, to 1/32 of the peak)."""

    def __post_init__(self) -> None:
        positive("optim", self, "lr", "eps", "clip", "decay_steps", "plateau_patience")
        fraction("optim", self, "beta1", "beta2", "plateau_smoothing", "plateau_threshold")
        for name in ("weight_decay", "warmup_steps", "final_lr", "plateau_halvings"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name} must not be negative, found {getattr(self, name)}")
        if self.schedule == "cosine":
            if self.decay_steps is None:
                raise ConfigError(
                    "optim.schedule=cosine needs optim.decay_steps: set the update at which final_lr is reached"
                )
            if self.decay_steps <= self.warmup_steps:
                raise ConfigError(
                    f"optim.decay_steps={self.decay_steps} must be greater than optim.warmup_steps={self.warmup_steps}"
                )


@dataclass(frozen=True)
class TrainConfig:
    """How updates are made. Precision and ZeRO stage come from the DeepSpeed JSON; state them here to have it checked."""

    batch_size: int = 512
    """Pictures per update over all processes."""
    micro_batch: int | None = None
    """Pictures per process and forward pass; None takes batch_size / processes, that is no gradient accumulation."""
    precision: Literal["fp32", "bf16"] | None = None
    """Arithmetic and storage of the weights; None takes the DeepSpeed JSON's."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage; None takes the DeepSpeed JSON's."""
    activation_checkpointing: Checkpointing = "none"
    """What the transformer computes again in the backward pass instead of keeping it: `full` each residual block,
    `selective` its normalized and its activated vectors, which takes little time."""
    average_decay: float | None = 0.999
    """Decay per update of the exponential average of the weights, which is what is validated, drawn and exported; None
    keeps no average."""

    def __post_init__(self) -> None:
        positive("train", self, "batch_size", "micro_batch")
        fraction("train", self, "average_decay")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ConfigError(
                f"train.batch_size={self.batch_size} is not a multiple of train.micro_batch={self.micro_batch}"
            )


@dataclass(frozen=True)
class LoaderConfig:
    """How batches reach the model."""

    workers: int = 4
    """Processes per rank that read, decode and augment; 0 does it in the training process. Batches do not depend on it."""
    codes: Literal["auto", "cached", "live"] = "auto"
    """Transformer only: `cached` reads codes made by `prepare_data.py --cache_codes`, `live` runs the dVAE on freshly
    augmented pictures, `auto` takes the cache where one of this dVAE exists."""
    caption_dropout: float = 0.0
    """Transformer only: share of captions replaced by the empty one, which classifier-free guidance needs (0.1 is usual)."""
    bpe_dropout: float = 0.1
    """Transformer only: share of BPE merges skipped at random in training (DALL·E App. B.2)."""

    def __post_init__(self) -> None:
        fraction("loader", self, "caption_dropout", "bpe_dropout")
        if self.workers < 0:
            raise ConfigError(f"loader.workers must not be negative, found {self.workers}")


@dataclass(frozen=True)
class ReportConfig:
    """What a run says of itself, and when. Every figure goes to RUN_DIR/metrics.jsonl; these fields change no weight."""

    log_every: int = 10
    """Updates between lines of metrics."""
    validate_every: int = 1_000
    """Updates between validation losses; 0 validates at the end only."""
    validation_rows: int = 2_048
    """Validation pictures per validation, spread evenly over the split; all where it has fewer."""
    preview_every: int = 5_000
    """Updates between preview pictures in RUN_DIR/samples; 0 draws at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept in RUN_DIR/checkpoints."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device at the run's precision; given, the progress line shows the model FLOPs utilization."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases tracking, which needs `pip install wandb`."""
    wandb_project: str = "dalle_ds"
    """Weights & Biases project."""

    def __post_init__(self) -> None:
        positive("report", self, "log_every", "validation_rows", "keep_checkpoints", "peak_tflops")
        for name in ("validate_every", "preview_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"report.{name} must not be negative, found {getattr(self, name)}")
