"""The text-image transformer (DALL·E §2.2, App. B.1): one causal stream of text tokens, then image codes.

The stream has T text positions and then W² image positions; position p *predicts* token p of [text, codes]:

    position        0     1    …   T−1      T               T+1   …   T+W²−1
    input           SOT   t₀   …   t_{T−2}  SOI + t_{T−1}   c₀    …   c_{W²−2}
    predicts        t₀    t₁   …   t_{T−1}  c₀              c₁    …   c_{W²−1}

so position embeddings index the token being predicted, and the last code is never an input. The start of the image
carries the last text slot besides its own embedding: no caption token is lost at the paper's length of 256 + 1024. For
captions of fewer than T tokens that slot is always padding, the sum is a constant vector, and this is exactly the
paper's layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import PADDING, Checkpointing, DalleConfig
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models.pretrained import check_shapes, load_model, load_weights, save_model
from dalle_ds.nn.attention import Attend, AttentionPattern, SelfAttention, configured_kinds
from dalle_ds.nn.layers import (
    ColumnParallelLinear,
    Embedding,
    LayerNorm,
    Linear,
    RowParallelLinear,
    Unembedding,
    VocabParallelEmbedding,
    dropout,
    recomputed,
    seeds_on_host,
)
from dalle_ds.parallel import WHOLE, TensorGroup, split_of
from dalle_ds.precision import BranchPrecision, enter_branch, join_branch


class DalleOutput(NamedTuple):
    """Losses in nats per token, and logits, all fp32.

    A tuple, not a dataclass: ZeRO-3 finds the tensors that a module returns in tuples, lists and dicts only.
    """

    loss: Tensor
    """() text_weight · text_loss + (1 − text_weight) · image_loss (DALL·E §2.2)."""
    text_loss: Tensor
    """() mean cross-entropy over the text tokens of this batch, padding left out; 0 where there is none."""
    image_loss: Tensor
    """() mean cross-entropy over the codes of this batch."""
    text_logits: Tensor | None
    """(B, T, text_vocab); None where they were not asked for."""
    image_logits: Tensor | None
    """(B, W², image_vocab); None where they were not asked for."""
    text_tokens: Tensor
    """() int64, how many tokens text_loss is the mean of."""


class ResidualBlock(nn.Module):
    """x + branch(norm(x)): the unit that has a gradient scale of its own (DALL·E §2.4), and that pipelines are cut between.

    The identity path and the normalization are fp32. The branch computes in the dtype of its weights, or as `use` says.
    """

    number: int = 0
    """Place among the model's residual blocks, counted from 0."""
    dropout: float = 0.0
    """Share of the branch's output that is dropped in training, where samples have seeds."""
    precision: BranchPrecision | None = None

    def __init__(self, width: int, tensor: TensorGroup = WHOLE) -> None:
        super().__init__()
        self.tensor = tensor
        self.norm = LayerNorm(width, tensor)

    def use(self, precision: BranchPrecision) -> None:
        """Compute the branch in 16 bits, with scaled gradients, from weights that stay fp32."""
        self.precision = precision
        for module in self.modules():
            if isinstance(module, Linear):
                module.precision = precision

    def _enter(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the branch begins with; `dtype` is that of its weights."""
        normalized = self.norm(x)
        entered = normalized.to(dtype) if self.precision is None else enter_branch(normalized, self.precision)
        return self.tensor.copy_to_tensor_region(entered)

    def _join(self, x: Tensor, branch: Tensor, dropout_seeds: Tensor | None) -> Tensor:
        if self.dropout and self.training and dropout_seeds is not None:
            branch = dropout(branch, dropout_seeds, self.number, self.dropout, self.tensor)
        return x + branch if self.precision is None else join_branch(x, branch, self.precision)


class AttentionBlock(ResidualBlock):
    """Residual block x + attention(norm(x))."""

    def __init__(
        self,
        pattern: Attend,
        width: int,
        heads: int,
        residual_scale: float,
        tensor: TensorGroup = WHOLE,
    ) -> None:
        super().__init__(width, tensor)
        self.attention = SelfAttention(pattern, width, heads, residual_scale, tensor)

    def forward(
        self, x: Tensor, dropout_seeds: Tensor | None = None, keep: Tensor | None = None, *, recompute: bool = False
    ) -> Tensor:
        """(B, n, width) fp32, or this process's positions of it → the same; `keep` is that of `SelfAttention`, the rest as in
        `MlpBlock`."""
        qkv = recomputed(self.project, x) if recompute else self.project(x)
        return self._join(x, self.attention.attend(qkv, keep), dropout_seeds)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of (B, n, width) fp32, as `SelfAttention.project` returns them."""
        return self.attention.project(self._enter(x, self.attention.qkv.weight.dtype))


class MlpBlock(ResidualBlock):
    """Residual block x + mlp(norm(x)), with one hidden layer of four times the width and GELU."""

    def __init__(self, width: int, residual_scale: float, tensor: TensorGroup = WHOLE) -> None:
        super().__init__(width, tensor)
        self.up = ColumnParallelLinear(width, 4 * width, tensor)
        self.down = RowParallelLinear(4 * width, width, tensor, scale=residual_scale, input_major=True)

    def forward(self, x: Tensor, dropout_seeds: Tensor | None = None, *, recompute: bool = False) -> Tensor:
        """(B, n, width) fp32, or this process's positions of it → the same.

        Args:
            dropout_seeds: as `Dalle.forward` takes them.
            recompute: keep no normalized or activated vectors, but compute them again.
        """
        if recompute:
            return self._join(x, recomputed(self._narrow, recomputed(self._widen, x)), dropout_seeds)
        return self._join(x, self._narrow(self._widen(x)), dropout_seeds)

    def _widen(self, x: Tensor) -> Tensor:
        return self.up(self._enter(x, self.up.weight.dtype))

    def _narrow(self, hidden: Tensor) -> Tensor:
        return self.down(F.gelu(hidden))


class InputEmbedding(nn.Module):
    """What the residual stream starts from, fp32 (DALL·E Fig. 10); the module's docstring has the layout."""

    def __init__(self, config: DalleConfig, tensor: TensorGroup = WHOLE) -> None:
        super().__init__()
        self.config = config
        self.tensor = tensor
        width = config.width
        self.text_token = VocabParallelEmbedding(config.text_vocab, width, tensor)
        self.padding = Embedding(config.text_len, width)  # one for each text slot
        self.text_position = Embedding(config.text_len, width)
        self.image_token = VocabParallelEmbedding(config.image_vocab, width, tensor)
        self.image_row = Embedding(config.grid, width)
        self.image_column = Embedding(config.grid, width)
        self.start = Embedding(2, width)  # of text, of image

    def forward(self, text: Tensor, codes: Tensor) -> Tensor:
        """Inputs of all positions: (B, T) and (B, W²) → (B, T + W², width), or this process's positions of it."""
        return self.tensor.positions(torch.cat([self.prefix(text), self.codes(codes[:, :-1], 0)], dim=1))

    def prefix(self, text: Tensor) -> Tensor:
        """Inputs of positions 0 … T, all that a caption decides: (B, T) → (B, T + 1, width)."""
        batch, length = text.shape
        indices = torch.arange(length, device=text.device)
        is_padding = (text == PADDING)[..., None]
        slots = torch.where(is_padding, self.padding(indices), self.text_token(text.clamp(min=0))).float()
        start_of_text, start_of_image = self.start(torch.arange(2, device=text.device)).float()
        shifted = torch.cat([start_of_text.expand(batch, 1, -1), slots[:, :-1]], dim=1)
        image_start = start_of_image + slots[:, -1:] + self.image_positions(0, 1, text.device)
        return torch.cat([shifted + self.text_position(indices).float(), image_start], dim=1)

    def codes(self, codes: Tensor, first: int) -> Tensor:
        """Inputs that predict codes first + 1 …: codes first …, (B, n) → (B, n, width)."""
        positions = self.image_positions(first + 1, codes.shape[1], codes.device)
        return self.image_token(codes).float() + positions

    def image_positions(self, first: int, count: int, device: torch.device) -> Tensor:
        """(count, width), row embedding + column embedding of codes first, first + 1, … in raster order."""
        raster = torch.arange(first, first + count, device=device)
        row, column = raster // self.config.grid, raster % self.config.grid
        return self.image_row(row).float() + self.image_column(column).float()


class OutputLayers(Protocol):
    """What has the transformer's last layers."""

    config: DalleConfig
    tensor: TensorGroup
    norm: LayerNorm
    text_head: Unembedding
    image_head: Unembedding


def transformer_output(layers: OutputLayers, x: Tensor, text: Tensor, codes: Tensor, *, logits: bool) -> DalleOutput:
    """Losses and logits from what the last residual block returns.

    Args:
        x: (B, T + W², width) fp32, or this process's positions of it.
        text, codes, logits: as `Dalle.forward` takes them.
    """
    config = layers.config
    hidden = layers.tensor.copy_to_tensor_region(layers.norm(x))
    of_text, of_image = hidden[:, : config.text_len], hidden[:, config.text_len :]
    text_logits = image_logits = None
    if logits:
        text_logits, image_logits = layers.text_head(of_text), layers.image_head(of_image)
        text_sum = _summed_cross_entropy(text_logits, text)
        image_sum = _summed_cross_entropy(image_logits, codes)
    else:
        text_sum, image_sum = layers.text_head(of_text, text), layers.image_head(of_image, codes)
    text_tokens = (text != PADDING).sum()
    text_loss = text_sum / text_tokens.clamp(min=1)
    image_loss = image_sum / codes.numel()
    loss = config.text_weight * text_loss + (1 - config.text_weight) * image_loss
    return DalleOutput(loss, text_loss, image_loss, text_logits, image_logits, text_tokens)


def residual_block(config: DalleConfig, number: int, tensor: TensorGroup = WHOLE) -> ResidualBlock:
    """The residual block of a number in [0, 2 · depth): attention and MLPs in turn."""
    residual_scale = (2 * config.depth) ** -0.5
    block: ResidualBlock
    if number % 2:
        block = MlpBlock(config.width, residual_scale, tensor)
    else:
        kind = configured_kinds(config)[number // 2]
        pattern = AttentionPattern(kind, config.text_len, config.grid, config.kernel)
        block = AttentionBlock(pattern, config.width, config.heads, residual_scale, tensor)
    block.number, block.dropout = number, config.dropout
    return block


def run_block(
    block: nn.Module, x: Tensor, dropout_seeds: Tensor | None, keep: Tensor | None, checkpointing: Checkpointing
) -> Tensor:
    """What a residual block makes of x; `dropout_seeds` are those of `Dalle.forward`, `keep` is that of `SelfAttention`."""
    inputs = (x, dropout_seeds, keep) if isinstance(block, AttentionBlock) else (x, dropout_seeds)
    if not torch.is_grad_enabled() or checkpointing == "none":
        return cast(Tensor, block(*inputs))
    if checkpointing == "selective":
        return cast(Tensor, block(*inputs, recompute=True))
    return recomputed(block, *inputs)


def kept_text(config: DalleConfig, text: Tensor) -> Tensor | None:
    """(B, T) bool, the text positions that may be attended to; None where all may, as in the paper.

    Position p holds token p − 1, and position 0 the start of text, which is never padding.
    """
    if not config.mask_padding:
        return None
    kept = torch.ones_like(text, dtype=torch.bool)
    kept[:, 1:] = text[:, :-1] != PADDING
    return kept


class Dalle(nn.Module):
    """The autoregressive transformer over text tokens and image codes.

    The paper does not say, and this model chooses: layer normalization before each residual branch; GELU; no dropout, but
    for those who ask for it; untied embeddings; initial weights as `nn/layers.py` says, those that end a residual branch
    scaled by 1 / sqrt(number of residual blocks), as in GPT-2; padding left out of the text loss.

    The residual stream is fp32 whatever the dtype of the weights (DALL·E §2.4 keeps its identity path so); each block
    computes in the weights' dtype. Logits are fp32.

    The losses are means over the tokens of one forward pass. The image loss has the same number in every pass; the mean
    of text losses over processes or micro-batches weighs each equally, however many tokens it has (`text_tokens`).

    Args:
        config: shape of the model.
        checkpointing: what each residual block keeps for the backward pass: `RecomputingTrainConfig.activation_checkpointing`.
        tensor: the processes that divide the layers. Each of them has a `Dalle` of its own, which must be called with the same
            batch, at the same time; all get the same results.
    """

    def __init__(
        self, config: DalleConfig, *, checkpointing: Checkpointing = "none", tensor: TensorGroup = WHOLE
    ) -> None:
        super().__init__()
        if checkpointing not in get_args(Checkpointing):
            raise ConfigError(
                f"checkpointing must be one of {', '.join(get_args(Checkpointing))}, found {checkpointing!r}"
            )
        self.config = config
        tensor.check(config)
        self.checkpointing: Checkpointing = checkpointing
        self.tensor = tensor
        self.embedding = InputEmbedding(config, tensor)
        # Flat, and each x → x: gradients are scaled per residual block, and pipelines cut this list.
        self.blocks = nn.ModuleList(residual_block(config, number, tensor) for number in range(2 * config.depth))
        self.norm = LayerNorm(config.width, tensor)
        self.text_head = Unembedding(config.width, config.text_vocab, tensor)
        self.image_head = Unembedding(config.width, config.image_vocab, tensor)

    def forward(
        self, text: Tensor, codes: Tensor, *, logits: bool = True, dropout_seeds: Tensor | None = None
    ) -> DalleOutput:
        """Loss and logits of captioned images.

        Args:
            text: (B, T) int64 in [0, text_vocab), −1 where padded.
            codes: (B, W²) int64 in [0, image_vocab), in raster order.
            logits: whether the result has them, in fp32. Without, losses are made chunk by chunk and their products of a
                16-bit model have 16-bit factors (`linear_cross_entropy`): for training, where logits would take more
                memory than all the rest.
            dropout_seeds: (B,) int64, seeds of what `dropout` drops of each image in training; None drops nothing.

        Raises:
            DataError: a wrong shape or dtype; a value out of range, which is looked for on the CPU only, since looking
                on a GPU would make it wait in every step.
        """
        check_tokens(self.config, text, codes)
        dropout_seeds = seeds_on_host(dropout_seeds, self.config.dropout)
        x = self.residual_blocks(self.embedding(text, codes), dropout_seeds, kept_text(self.config, text))
        return transformer_output(self, x, text, codes, logits=logits)

    def residual_blocks(self, x: Tensor, dropout_seeds: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """What all residual blocks in turn make of x, as `run_block`."""
        for block in self.blocks:
            x = run_block(block, x, dropout_seeds, keep, self.checkpointing)
        return x

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the blocks' weights, and of the keys and values that they make."""
        return self.layers[0][0].attention.qkv.weight.dtype

    @property
    def layers(self) -> list[tuple[AttentionBlock, MlpBlock]]:
        """The residual blocks, two by two."""
        return two_by_two(self.blocks)

    # --- export

    @classmethod
    def from_pretrained(cls, path: str | Path, *, tensor: TensorGroup = WHOLE) -> Dalle:
        """The model in an export or run directory, on the CPU in fp32.

        Args:
            tensor: the processes that divide its layers, each of which loads its part.

        Raises:
            CheckpointError: no transformer there, or weights that do not fit.
        """
        config, weights = load_model(path, "transformer", DalleConfig)
        check_shapes(lambda: cls(config), config, weights, path)
        model = cls(config, tensor=tensor)
        for name, parameter in model.named_parameters():
            split = split_of(parameter)
            if split is not None and name in weights:
                weights[name] = split.cut(weights[name], tensor.rank, tensor.size)
        load_weights(model, weights, path)
        return model.eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into folder `path`; a divided model cannot (`launchers/export.py`)."""
        if self.tensor.size > 1:
            raise CheckpointError(
                f"this process has one of the model's {self.tensor.size} parts: export it from a checkpoint, by "
                "python launchers/export.py"
            )
        save_model(path, "transformer", self.config, self.state_dict())


def check_tokens(config: DalleConfig, text: Tensor, codes: Tensor) -> None:
    """Raise a `DataError` where captions and images are not what `Dalle.forward` takes."""
    check_range(text, "text", config.text_len, PADDING, config.text_vocab)
    check_range(codes, "codes", config.image_len, 0, config.image_vocab)
    if len(text) != len(codes):
        raise DataError(f"text has {len(text)} rows and codes {len(codes)}: give one caption per image")


def check_range(tokens: Tensor, name: str, length: int, lowest: int, vocab: int) -> None:
    if tokens.dim() != 2 or tokens.shape[1] != length or len(tokens) == 0:
        raise DataError(f"{name} must have shape (B, {length}) with B of at least 1, found {tuple(tokens.shape)}")
    if tokens.dtype != torch.int64:
        raise DataError(f"{name} must be int64, found {tokens.dtype}")
    if tokens.device.type == "cpu":
        smallest, largest = (int(bound) for bound in tokens.aminmax())
        if smallest < lowest or largest >= vocab:
            raise DataError(f"{name} must lie in [{lowest}, {vocab - 1}], found values from {smallest} to {largest}")


def _summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="sum")


def two_by_two(blocks: nn.ModuleList) -> list[tuple[AttentionBlock, MlpBlock]]:
    """Each attention with the MLP behind it."""
    each = iter(blocks)
    return [(cast(AttentionBlock, attention), cast(MlpBlock, mlp)) for attention, mlp in zip(each, each, strict=True)]
