"""What each stage's run consists of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dalle_ds.config.models import ClipConfig, DalleConfig, DiscreteVAEConfig
from dalle_ds.config.parallel import ParallelConfig, PowerSGDConfig, WatchConfig
from dalle_ds.config.plain import positive, sound
from dalle_ds.config.training import (
    ClipObjective,
    DvaeObjective,
    GuardConfig,
    LoaderConfig,
    LoraConfig,
    OptimConfig,
    RecomputingTrainConfig,
    ReportConfig,
    ScalingConfig,
    SharpnessConfig,
    TrainConfig,
    TransformerLoaderConfig,
)
from dalle_ds.config.unclip import (
    DecoderConfig,
    DecoderObjective,
    ImageSampling,
    LatentPriorConfig,
    LatentPriorObjective,
    PriorConfig,
    PriorObjective,
    UpsamplerConfig,
    UpsamplerObjective,
)
from dalle_ds.errors import ConfigError

_MOST_TURNS = 10_000  # after which all corpora have had their shares; loaders lay out that many at a time


@dataclass(frozen=True)
class Run:
    """What every stage's run has. Paths and counts stand at the top level of the command line."""

    data: str | tuple[str, ...] = ""
    """Folder that `launchers/prepare_data.py` made, or several: `--data A --data B`, or `--data A B`."""
    data_weights: tuple[int, ...] = ()
    """How often each of several folders is drawn from, as whole numbers: `--data_weights 2 1` takes two of three samples from
    the first. None draws from all equally often, whatever their sizes."""
    run_dir: str = ""
    """Folder of this run; naming an existing one resumes it."""
    init: str = ""
    """Model of this stage to begin with: a run directory, an export, an import. What it was trained with is then taken from
    there, and with no --preset its shape too (docs/finetuning.md). Empty begins with random weights."""
    steps: int = 1_000
    """Total updates. Schedules have lengths of their own, so a run may be stopped early and taken further."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and every random choice."""
    save_every: int = 1_000
    """Updates between checkpoints; one is always written at the end."""
    save_minutes: float | None = None
    """Minutes after which a checkpoint is written in any case; None goes by `save_every` alone."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How updates are made."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes divide the work; may change when a run is resumed."""
    powersgd: PowerSGDConfig = field(default_factory=PowerSGDConfig)
    """Compression of gradients between replicas."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Non-finite updates and spikes."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Data loading."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """Processes that hang or are slow."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """Metrics, validation, previews, tracking."""

    def __post_init__(self) -> None:
        sound(self)
        positive("run", self, "steps", "save_every", "save_minutes")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in [0, 2^63), found {self.seed}")
        self._check_weights()
        if self.powersgd.enabled and self.parallel.replicas == 1:
            raise ConfigError(
                "powersgd.enabled compresses what crosses between replicas, and parallel.replicas is 1: raise it, or leave "
                "powersgd out"
            )

    @property
    def corpora(self) -> tuple[str, ...]:
        """The folders of `data`: at least one, empty where none is named."""
        return (self.data,) if isinstance(self.data, str) else self.data or ("",)

    def _check_weights(self) -> None:
        weights, folders = self.data_weights, len(self.corpora)
        if not weights:
            return
        if folders == 1 or len(weights) != folders:
            raise ConfigError(
                f"data_weights has {len(weights)} weights, and data {folders} folder{'s' * (folders != 1)}: give one for each "
                "of several folders, or leave data_weights out"
            )
        if min(weights) < 1 or sum(weights) // math.gcd(*weights) > _MOST_TURNS:
            raise ConfigError(
                f"data_weights must be whole numbers greater than 0 with a sum of at most {_MOST_TURNS:,}, found "
                f"{' '.join(map(str, weights))}"
            )


@dataclass(frozen=True)
class DvaeRun(Run):
    """Training of the discrete VAE (`launchers/train_dvae.py`)."""

    model: DiscreteVAEConfig = field(default_factory=DiscreteVAEConfig)
    """Shape of the model."""
    objective: DvaeObjective = field(default_factory=DvaeObjective)
    """Loss and schedules."""


@dataclass(frozen=True)
class TransformerRun(Run):
    """Training of the text-image transformer (`launchers/train_transformer.py`)."""

    dvae: str = ""
    """Trained dVAE: its run directory or export."""
    tokenizer: str = ""
    """Tokenizer file that `launchers/train_tokenizer.py` made."""
    codes: str = ""
    """Folder of cached codes that `prepare_data.py --codes_out` made; empty looks for them in the folders of the data."""
    model: DalleConfig = field(default_factory=DalleConfig)
    """Shape of the model."""
    train: RecomputingTrainConfig = field(default_factory=RecomputingTrainConfig)
    """How updates are made."""
    loader: TransformerLoaderConfig = field(default_factory=TransformerLoaderConfig)
    """Data loading, codes and text."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """Gradient scales in fp16."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codes and self.loader.codes == "live":
            raise ConfigError(
                f"loader.codes=live makes codes itself, and codes={self.codes} names cached ones: leave one out"
            )


@dataclass(frozen=True)
class ClipRun(Run):
    """Training of CLIP (`launchers/train_clip.py`)."""

    tokenizer: str = ""
    """Tokenizer file: that of `launchers/train_tokenizer.py`, or CLIP's own; empty takes that of `init`."""
    model: ClipConfig = field(default_factory=ClipConfig)
    """Shape of the model."""
    train: RecomputingTrainConfig = field(default_factory=RecomputingTrainConfig)
    """How updates are made."""
    objective: ClipObjective = field(default_factory=ClipObjective)
    """Loss and images."""
    sharpness: SharpnessConfig = field(default_factory=SharpnessConfig)
    """Sharpness-aware minimization."""


@dataclass(frozen=True)
class EmbeddedRun(Run):
    """What the runs of stages have that train on CLIP's embeddings."""

    clip: str = ""
    """Trained or imported CLIP, its run directory or export, whose embeddings `prepare_data.py --cache_embeddings` cached."""
    tokenizer: str = ""
    """Tokenizer file that `launchers/train_tokenizer.py` made; only for model.text=tokens, others read CLIP's."""
    train: RecomputingTrainConfig = field(default_factory=RecomputingTrainConfig)
    """How updates are made."""


@dataclass(frozen=True)
class TextToEmbeddingRun(EmbeddedRun):
    """What both priors' runs have."""

    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """Gradient scales in fp16."""


@dataclass(frozen=True)
class PriorRun(TextToEmbeddingRun):
    """Training of the diffusion prior (`launchers/train_prior.py --kind diffusion`)."""

    model: PriorConfig = field(default_factory=PriorConfig)
    """Shape of the model."""
    objective: PriorObjective = field(default_factory=PriorObjective)
    """Noise, and what is made of the embeddings."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""


@dataclass(frozen=True)
class LatentPriorRun(TextToEmbeddingRun):
    """Training of the autoregressive prior (`launchers/train_prior.py --kind autoregressive`)."""

    model: LatentPriorConfig = field(default_factory=LatentPriorConfig)
    """Shape of the model."""
    objective: LatentPriorObjective = field(default_factory=LatentPriorObjective)
    """What is made of the embeddings."""


@dataclass(frozen=True)
class DecoderRun(EmbeddedRun):
    """Training of unCLIP's decoder (`launchers/train_decoder.py`)."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    """Shape of the model."""
    objective: DecoderObjective = field(default_factory=DecoderObjective)
    """Noise, and what is dropped."""
    sampling: ImageSampling = field(default_factory=ImageSampling)
    """How previews, and who uses the export, sample where nothing else is said."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling.noise:
            raise ConfigError(f"sampling.noise={self.sampling.noise} is an upsampler's: leave it out")


@dataclass(frozen=True)
class UpsamplerRun(Run):
    """Training of an upsampler (`launchers/train_upsampler.py --stage 64-256`, or `256-1024` for the second)."""

    model: UpsamplerConfig = field(default_factory=UpsamplerConfig)
    """Shape of the model."""
    train: RecomputingTrainConfig = field(default_factory=RecomputingTrainConfig)
    """How updates are made."""
    objective: UpsamplerObjective = field(default_factory=UpsamplerObjective)
    """Noise, crops, and what is done to small images."""
    sampling: ImageSampling = field(default_factory=lambda: ImageSampling("ddim", "27"))
    """How previews, and who uses the export, sample where nothing else is said."""

    def __post_init__(self) -> None:
        super().__post_init__()
        model, crop = self.model, self.crop_size
        step = math.lcm(model.factor, model.scale)
        if crop < step or crop % step:
            raise ConfigError(
                f"objective.crop={self.objective.crop} of model.image_size={model.image_size} is {crop} pixels, which "
                f"must be a multiple of {step}: set another share"
            )
        if self.objective.noise and not model.noise_augmentation:
            raise ConfigError(f"objective.noise={self.objective.noise} needs model.noise_augmentation True")
        if self.sampling.noise > self.objective.noise:
            raise ConfigError(
                f"sampling.noise={self.sampling.noise} is more than objective.noise={self.objective.noise}, with which it is "
                "trained: lower it"
            )
        if self.objective.residual and model.learned_variance:
            raise ConfigError(
                "objective.residual has no learned variance: set model.learned_variance False, or leave it out"
            )
        if self.sampling.guidance != 1:
            raise ConfigError(f"sampling.guidance={self.sampling.guidance}: upsamplers have no guidance, leave it out")

    @property
    def crop_size(self) -> int:
        """Side in pixels of the squares that it is trained on."""
        return round(self.objective.crop * self.model.image_size)
