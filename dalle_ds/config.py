"""Typed configuration of every stage: dataclasses whose field docstrings are both documentation and command-line help.

A run's configuration is a preset (`dalle_ds/presets/NAME.yaml`, one file per size, one section per stage) with any field
overridden on the command line (`--model.width 512`). Checks that need one section only live in its `__post_init__`; checks
across sections live in the run's.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from dalle_ds.errors import ConfigError

PRESET_DIR = Path(__file__).parent / "presets"
PADDING = -1
"""What a text tensor holds where there is no token."""
ATTENTION_KINDS = ("row", "column", "conv", "full")
Checkpointing = Literal["none", "selective", "full"]
"""What a model computes again in the backward pass; see `TrainConfig.activation_checkpointing`."""
Config = TypeVar("Config")


def _positive(owner: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{owner}.{name} must be greater than 0, found {value}")


def _fraction(owner: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0.0 <= value < 1.0:
            raise ConfigError(f"{owner}.{name} must lie in [0, 1), found {value}")


# --- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscreteVAEConfig:
    """Shape of the discrete VAE (DALL·E App. A.1). The defaults are the released model's."""

    image_size: int = 256
    """Side in pixels of the square pictures that it is trained on."""
    groups: int = 4
    """Groups of residual blocks; each but the last halves (encoder) or doubles (decoder) the resolution."""
    blocks_per_group: int = 2
    """Residual blocks in each group."""
    encoder_width: int = 256
    """Channels of the encoder's first group; each further group doubles them."""
    decoder_width: int = 256
    """Channels of the decoder's last group; each earlier group doubles them."""
    decoder_input: int = 128
    """Channels between the decoder's 1×1 input convolution (the codebook) and its first group."""
    vocab_size: int = 8192
    """Number of codes."""
    min_log_scale: float | None = None
    """Floor of the decoder's ln b. The paper has none; pictures with large areas of one exact colour need one, or those
    areas' likelihood grows without bound and takes the gradient from everything else (docs/dvae.md)."""

    def __post_init__(self) -> None:
        _positive(
            "model", self, "image_size", "groups", "blocks_per_group", "encoder_width", "decoder_width", "decoder_input"
        )
        if self.vocab_size < 2:
            raise ConfigError(f"model.vocab_size must be at least 2, found {self.vocab_size}")
        for name in ("encoder_width", "decoder_width"):
            if getattr(self, name) % 4:
                raise ConfigError(
                    f"model.{name} must be a multiple of 4 (a residual block's inner width is a quarter), "
                    f"found {getattr(self, name)}"
                )
        if self.image_size % self.factor:
            raise ConfigError(
                f"model.image_size={self.image_size} is not a multiple of {self.factor}, by which {self.groups} groups "
                f"shrink a picture: set model.image_size to a multiple of {self.factor}, or model.groups lower"
            )

    @property
    def factor(self) -> int:
        """How many pixels of a side become one code."""
        return 2 ** (self.groups - 1)

    @property
    def grid(self) -> int:
        """Codes along each side of a picture."""
        return self.image_size // self.factor


@dataclass(frozen=True)
class DalleConfig:
    """Shape of the autoregressive text-image transformer (DALL·E App. B.1). The defaults are the 12 B model's."""

    width: int = 3968
    """d_model: width of the residual stream."""
    depth: int = 64
    """Attention layers, each followed by an MLP."""
    heads: int = 62
    """Attention heads; the head size is width / heads (64 in the paper)."""
    text_len: int = 256
    """Text positions."""
    grid: int = 32
    """Image codes along each side; the picture takes grid² positions."""
    text_vocab: int = 16384
    """Text vocabulary: room for as many pieces; the tokenizer may have fewer."""
    image_vocab: int = 8192
    """Image vocabulary. Must be the dVAE's."""
    attention: tuple[Literal["row", "column", "conv", "full"], ...] | None = None
    """Attention kind of every layer, first to last; None is the paper's schedule (`dalle_ds.models.attention.layer_kinds`)."""
    kernel: int = 11
    """Side of the conv kind's kernel; odd."""
    mask_padding: bool = False
    """Whether padding is left out of what every position attends to; the paper's model attends to it."""
    text_weight: float = 0.125
    """Weight of the text loss; the image loss has 1 minus this (DALL·E §2.2: 1/8 and 7/8)."""

    def __post_init__(self) -> None:
        _positive("model", self, "width", "depth", "heads", "text_len", "grid", "text_vocab", "image_vocab")
        if self.width % self.heads:
            raise ConfigError(
                f"model.width={self.width} cannot be split over model.heads={self.heads}: "
                "set model.heads to a divisor of model.width (width / 64 in the paper)"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"model.kernel must be odd and positive, found {self.kernel}")
        if not 0.0 <= self.text_weight <= 1.0:
            raise ConfigError(f"model.text_weight must lie in [0, 1], found {self.text_weight}")
        if self.attention is not None:
            unknown = sorted(set(self.attention) - set(ATTENTION_KINDS))
            if unknown:
                raise ConfigError(
                    f"model.attention has unknown kinds {unknown}; known are {', '.join(ATTENTION_KINDS)}"
                )
            if len(self.attention) != self.depth:
                raise ConfigError(
                    f"model.attention names {len(self.attention)} layers but model.depth is {self.depth}: "
                    "give one kind per layer, or leave it out for the paper's schedule"
                )

    @property
    def image_len(self) -> int:
        """Image positions."""
        return self.grid**2

    @property
    def total_len(self) -> int:
        """Text and image positions together (1280 in the paper)."""
        return self.text_len + self.image_len


# --- training -------------------------------------------------------------------------------------------------------


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
        _positive("objective", self, "temperature_start", "temperature_end")
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
        _positive("optim", self, "lr", "eps", "clip", "decay_steps", "plateau_patience")
        _fraction("optim", self, "beta1", "beta2", "plateau_smoothing", "plateau_threshold")
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
        _positive("train", self, "batch_size", "micro_batch")
        _fraction("train", self, "average_decay")
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
        _fraction("loader", self, "caption_dropout", "bpe_dropout")
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
        _positive("report", self, "log_every", "validation_rows", "keep_checkpoints", "peak_tflops")
        for name in ("validate_every", "preview_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"report.{name} must not be negative, found {getattr(self, name)}")


@dataclass(frozen=True)
class Run:
    """What every stage's run has. Paths and counts stand at the top level of the command line."""

    data: str = ""
    """Folder that `launchers/prepare_data.py` made."""
    run_dir: str = ""
    """Folder of this run; naming an existing one resumes it."""
    steps: int = 1_000
    """Total updates. Schedules have lengths of their own, so a run may be stopped early and taken further."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and every random choice."""
    save_every: int = 1_000
    """Updates between checkpoints; one is always written at the end."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How updates are made."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Data loading."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """Metrics, validation, previews, tracking."""

    def __post_init__(self) -> None:
        _positive("run", self, "steps", "save_every")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in [0, 2^63), found {self.seed}")


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
    model: DalleConfig = field(default_factory=DalleConfig)
    """Shape of the model."""


# --- presets and plain data -----------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    """Names that `--preset` takes."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def load_preset(name: str, stage: str, kind: type[Config]) -> Config:
    """The `stage` section ("dvae", "transformer", …) of preset `name` as a `kind`.

    Raises:
        ConfigError: unknown preset, no such section, or a field that the dataclass does not have.
    """
    if name not in preset_names():
        guess = difflib.get_close_matches(name, preset_names(), 1)
        hint = f"; did you mean {guess[0]}?" if guess else ""
        raise ConfigError(f"unknown preset {name!r}: known are {', '.join(preset_names())}{hint}")
    sections = yaml.safe_load((PRESET_DIR / f"{name}.yaml").read_text())
    if stage not in sections:
        raise ConfigError(f"preset {name!r} has no section {stage!r}: it has {', '.join(sections)}")
    return from_dict(kind, sections[stage], f"preset {name}: {stage}")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists and scalars, ready for YAML or JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def from_dict(kind: type[Config], values: dict[str, Any], where: str) -> Config:
    """The inverse of `to_dict`; missing fields take their defaults.

    Args:
        where: what to name in an error, such as the file that the values came from.

    Raises:
        ConfigError: a field that `kind` does not have, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of fields, found {values!r}")
    hints = typing.get_type_hints(kind)
    names = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            guess = difflib.get_close_matches(str(name), names, 1)
            hint = f"; did you mean {guess[0]}?" if guess else ""
            raise ConfigError(f"{where} has no field {name!r}{hint}")
        arguments[name] = _convert(hints[name], value, f"{where}.{name}")
    return kind(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        return _convert(next(choice for choice in choices if choice is not type(None)), value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(choices[0], item, where) for item in value)
    if origin is Literal and value in choices:
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    wanted = f"one of {', '.join(map(repr, choices))}" if origin is Literal else getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} must be {wanted}, found {value!r}")


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Fields, as dotted names, in which two configurations of one kind differ: name → (old value, new value)."""
    old_fields, new_fields = dict(_flatten(to_dict(old))), dict(_flatten(to_dict(new)))
    names = {**old_fields, **new_fields}
    return {
        name: (old_fields.get(name), new_fields.get(name))
        for name in names
        if old_fields.get(name) != new_fields.get(name)
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
