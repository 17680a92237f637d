"""How a model is trained: objective, optimizer, updates, data loading, reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dalle_ds.config.plain import at_least, fraction, positive
from dalle_ds.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
"""Arithmetic of a run; see `TrainConfig.precision`."""
Checkpointing = Literal["none", "selective", "full"]
"""What a model computes again in the backward pass; see `RecomputingTrainConfig.activation_checkpointing`."""


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
        at_least(0, "objective", self, "kl_weight", "kl_warmup_steps", "temperature_steps")


@dataclass(frozen=True)
class ClipObjective:
    """CLIP's loss and what its images are cut from (CLIP §2.3, §2.4)."""

    local_loss: bool = True
    """Whether each process computes the similarities of its own rows only (n × N twice) instead of all N × N: the same loss
    and gradients in less memory, at the cost of a reduce-scatter of the embeddings' gradients."""
    min_crop: float = 0.9
    """Training images are random squares of at least this share of the greatest square's area, in (0, 1]. 1 moves the
    greatest square along the longer side, which is CLIP's; 0.9 is open_clip's."""
    mirror: bool = False
    """Whether every other training image is mirrored. CLIP's are not: captions may tell left from right."""

    def __post_init__(self) -> None:
        if not 0.0 < self.min_crop <= 1.0:
            raise ConfigError(f"objective.min_crop must lie in (0, 1], found {self.min_crop}")


@dataclass(frozen=True)
class SharpnessConfig:
    """Sharpness-aware minimization (SAM): gradients are taken where a small step has made the loss higher."""

    rho: float | None = None
    """Length of that step, over all weights (unCLIP App. C: 0.1); None makes none. An update then takes two to four
    times as long (docs/clip.md)."""
    pairs: int | None = None
    """Consecutive pairs of the batch that share a step, whatever processes and micro-batches they lie in (unCLIP App. C: 64);
    None takes all of an update."""

    def __post_init__(self) -> None:
        positive("sharpness", self, "rho", "pairs")
        if self.pairs is not None and self.rho is None:
            raise ConfigError(
                f"sharpness.pairs={self.pairs} needs a step to share: set sharpness.rho, or leave sharpness.pairs None"
            )

    def span(self, batch: int, micro_batch: int, processes: int) -> int:
        """How many data-parallel processes share a step. An update's positions run through the first micro-batches of all
        processes, then the second ones, and so on.

        Raises:
            ConfigError: groups of pairs do not fit.
        """
        pairs = self.pairs or batch
        if batch % pairs:
            raise ConfigError(
                f"train.batch_size={batch} is no multiple of sharpness.pairs={pairs}: set train.batch_size to a multiple of "
                f"{pairs}"
            )
        if micro_batch % pairs == 0:
            return 1
        parts, rest = divmod(pairs, micro_batch)
        span = min(parts, processes)
        if rest or parts % span or processes % span:
            raise ConfigError(
                f"sharpness.pairs={pairs} cannot be made up of micro-batches of {micro_batch} on {processes} processes: set "
                f"train.micro_batch to {math.gcd(pairs, batch // processes)}"  # which always fits
            )
        return span


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
    second_moment_clip: float | None = 5.0
    """Largest value of Adam's running second moment (DALL·E App. B.2); None does not clip."""
    moments: Literal["fp32", "16-bit"] = "fp32"
    """Storage of Adam's moments of weight matrices in residual blocks: `16-bit` takes 4 bytes per parameter instead of 8,
    formats 1-6-9 and 0-6-10 (DALL·E App. D). Those of gains, biases, embeddings and unembeddings are always fp32."""
    stochastic_rounding: bool = False
    """Whether 16-bit moments are rounded at random, without bias, instead of to the nearest value."""
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
    halve_at: tuple[int, ...] | None = None
    """Updates, counted from 0, before which the rate is halved by hand, after the warm-up and whatever the schedule; once
    given, `plateau` halves no more by itself. A run may be resumed with another list."""

    def __post_init__(self) -> None:
        positive("optim", self, "lr", "eps", "clip", "second_moment_clip", "decay_steps", "plateau_patience")
        fraction("optim", self, "beta1", "beta2", "plateau_smoothing", "plateau_threshold")
        at_least(0, "optim", self, "weight_decay", "warmup_steps", "final_lr", "plateau_halvings")
        for update in self.halve_at or ():
            if update < self.warmup_steps:
                raise ConfigError(
                    f"optim.halve_at has update {update}, which lies in the warm-up: give updates from "
                    f"optim.warmup_steps={self.warmup_steps} on"
                )
        if self.stochastic_rounding and self.moments == "fp32":
            raise ConfigError(
                "optim.stochastic_rounding rounds 16-bit moments: set optim.moments 16-bit, or leave it out"
            )
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
    """Images per update over all processes."""
    micro_batch: int | None = None
    """Images per process and forward pass; None takes batch_size / processes, that is no gradient accumulation; in a
    pipeline, what leaves four micro-batches for each stage."""
    precision: Precision | None = None
    """Arithmetic; None takes the DeepSpeed JSON's. bf16 stores 16-bit weights beside fp32 ones; fp16 stores fp32 weights,
    computes in fp16 inside the transformer's residual blocks, and scales each block's gradients (docs/precision.md)."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage; None takes the DeepSpeed JSON's."""
    average_decay: float | None = 0.999
    """Decay of the exponential average of the weights, which is what is validated, drawn and exported; None keeps no
    average."""
    average_every: int = 1
    """Updates between weights that the average takes in (25 in DALL·E App. B.2, with a decay of 0.99)."""
    average_device: Literal["same", "cpu"] = "same"
    """Where the average is kept: beside the weights, or on the host, to which they are copied while training goes on."""

    def __post_init__(self) -> None:
        positive("train", self, "batch_size", "micro_batch", "average_every")
        fraction("train", self, "average_decay")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ConfigError(
                f"train.batch_size={self.batch_size} is not a multiple of train.micro_batch={self.micro_batch}"
            )


@dataclass(frozen=True)
class RecomputingTrainConfig(TrainConfig):
    """How updates of transformers are made."""

    activation_checkpointing: Checkpointing = "none"
    """What is computed again in the backward pass instead of kept: `full` each residual block, `selective` (text-image
    transformer and diffusion prior) its normalized and its activated vectors, which takes little time."""


@dataclass(frozen=True)
class ScalingConfig:
    """Gradient scales of the residual blocks in fp16 (DALL·E App. D). The defaults are the paper's.

    Scales are per data-parallel process: a run on M of them multiplies these by M, as the paper does.
    """

    initial_log2: float = 13.0
    """log2 of the first scale."""
    doubling_updates: int = 1_000
    """Updates without non-finite gradients in which a scale doubles."""
    backoff: float = 2.0**0.5
    """What a scale is divided by where its block's gradients were not finite."""
    window: int = 125
    """Updates within which a scale is not divided twice."""
    min_log2: float = 7.0
    """log2 of the smallest scale."""
    max_log2: float = 24.0
    """log2 of the greatest scale."""
    skip: Literal["update", "block"] = "update"
    """What is not updated after non-finite gradients: the whole model, as in the paper, or the blocks that had them."""
    in_fp32: bool = False
    """Scale in fp32 runs too, where it changes nothing but rounding: for telling errors of scaling from those of fp16."""

    def __post_init__(self) -> None:
        positive("scaling", self, "doubling_updates")
        at_least(0, "scaling", self, "window")
        if self.backoff <= 1:
            raise ConfigError(f"scaling.backoff must be greater than 1, found {self.backoff}")
        if not self.min_log2 <= self.initial_log2 <= self.max_log2:
            raise ConfigError(
                f"scaling.initial_log2={self.initial_log2} must lie between scaling.min_log2={self.min_log2} and "
                f"scaling.max_log2={self.max_log2}"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): beside the frozen weights of `init`, (alpha / rank) · B A is trained."""

    rank: int = 0
    """Columns of B and rows of A, which are all that is trained; 0 trains all weights."""
    alpha: float | None = None
    """Adapters are multiplied by alpha / rank; None takes the rank, and multiplies by 1."""
    targets: tuple[str, ...] = ()
    """Names, or their ends, of the linear layers that get adapters, such as `attention.qkv`; none takes all but those that
    end in logits."""

    def __post_init__(self) -> None:
        at_least(0, "lora", self, "rank")
        positive("lora", self, "alpha")

    @property
    def factor(self) -> float:
        """That B A is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class GuardConfig:
    """What a run does about updates that go wrong, in every precision.

    An update is bad if the loss or a gradient is not finite (it is then skipped), or if the loss is a spike. After
    `patience` bad updates in a row the run goes back to its last good checkpoint and leaves out the data that followed it.
    A gradient that overflowed in a residual block in fp16 is no bad update: it is what scaling expects.
    """

    patience: int = 10
    """Bad updates in a row that lead back to the last good checkpoint."""
    rollbacks: int = 3
    """How often a run goes back without getting beyond where it went wrong, before it ends with an error."""
    spike_deviations: float | None = 8.0
    """A loss is a spike if it lies this many standard deviations above the mean of the last `window` losses that were none,
    and at least 5 % above it; None looks for non-finite ones only."""
    window: int = 200
    """How many losses the mean is over; there are no spikes before as many have been seen."""

    def __post_init__(self) -> None:
        positive("guard", self, "patience", "spike_deviations")
        at_least(0, "guard", self, "rollbacks")
        at_least(2, "guard", self, "window")


@dataclass(frozen=True)
class LoaderConfig:
    """How batches reach the model."""

    workers: int = 4
    """Processes per rank that read, decode and augment; 0 does it in the training process. Batches do not depend on it."""
    max_unreadable: float = 0.1
    """Share of rows that may be unreadable, in [0, 1]: missing files, damaged images. Other rows stand in for them; where
    there are more than chance explains, the run ends. 0 ends it at the first, 1 never."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_unreadable <= 1.0:
            raise ConfigError(f"loader.max_unreadable must lie in [0, 1], found {self.max_unreadable}")
        at_least(0, "loader", self, "workers")


@dataclass(frozen=True)
class TransformerLoaderConfig(LoaderConfig):
    """How batches reach the transformer."""

    codes: Literal["auto", "cached", "live"] = "auto"
    """`cached` reads codes made by `prepare_data.py --cache_codes`, `live` runs the dVAE on freshly augmented images, `auto`
    takes the cache where one of this dVAE exists, for each of several corpora."""
    caption_dropout: float = 0.0
    """Share of captions replaced by the empty one, which classifier-free guidance needs (0.1 is usual)."""
    bpe_dropout: float = 0.1
    """Share of BPE merges skipped at random in training (DALL·E App. B.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("loader", self, "caption_dropout", "bpe_dropout")


@dataclass(frozen=True)
class ReportConfig:
    """What a run says of itself, and when. Every figure goes to RUN_DIR/metrics.jsonl; these fields change no weight."""

    log_every: int = 10
    """Updates between lines of metrics."""
    validate_every: int = 1_000
    """Updates between validation losses; 0 validates at the end only."""
    validation_rows: int = 2_048
    """Validation images per validation, spread evenly over the split; all where it has fewer."""
    preview_every: int = 5_000
    """Updates between preview images in RUN_DIR/samples; 0 draws at the end only."""
    numerics_every: int = 0
    """Updates between histograms of gradient exponents in RUN_DIR/numerics.jsonl, of the transformer per residual block; 0
    makes none."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept in RUN_DIR/checkpoints."""
    keep_every: int | None = None
    """The first checkpoint at or after each multiple of so many updates is never removed; None keeps the newest only."""
    background_saves: bool = True
    """Whether updates go on while a checkpoint is being written, for which each process copies its part to main memory."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device at the run's precision; given, the progress line shows the model FLOPs utilization."""
    plan_check: Literal["refuse", "warn", "off"] = "refuse"
    """What happens before training if its plan needs more memory than there is: `refuse` ends it, where that is beyond doubt;
    `warn` only tells; `off` does not plan."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases tracking, which needs `pip install wandb`."""
    wandb_project: str = "dalle_ds"
    """Weights & Biases project."""

    def __post_init__(self) -> None:
        positive("report", self, "log_every", "validation_rows", "keep_checkpoints", "keep_every", "peak_tflops")
        at_least(0, "report", self, "validate_every", "preview_every", "numerics_every")
