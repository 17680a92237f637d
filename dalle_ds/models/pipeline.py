"""The text-image transformer as a list of layers that a pipeline deals out to its stages."""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor, nn

from dalle_ds.config import Checkpointing, DalleConfig
from dalle_ds.models.dalle import (
    DalleOutput,
    InputEmbedding,
    check_tokens,
    kept_text,
    residual_block,
    run_block,
    transformer_output,
)
from dalle_ds.models.flops import layer_flops
from dalle_ds.nn.attention import configured_kinds
from dalle_ds.nn.layers import LayerNorm, Unembedding
from dalle_ds.parallel import WHOLE, TensorGroup
from dalle_ds.parallel.stages import PipelineLayer

Passed = tuple[Tensor, ...]
"""Between layers: (B, n, width) fp32, of this process's positions; the captions and codes of the batch; its dropout seeds.

What follows the first is needed by losses, the mask of padding and dropout, and is small: at a width of 3,968, a
two-thousandth.
"""


class OutputStage(nn.Module):
    """The transformer's last layers, under the names that they have in the plain model."""

    def __init__(self, config: DalleConfig, tensor: TensorGroup) -> None:
        super().__init__()
        self.config = config
        self.tensor = tensor
        self.norm = LayerNorm(config.width, tensor)
        self.text_head = Unembedding(config.width, config.text_vocab, tensor)
        self.image_head = Unembedding(config.width, config.image_vocab, tensor)


def pipeline_layers(
    config: DalleConfig, *, checkpointing: Checkpointing = "none", tensor: TensorGroup = WHOLE
) -> list[PipelineLayer]:
    """The layers of a `Dalle`, of the same names and, from the same random state, with the same weights.

    The first takes (text, codes) and, in training, the seeds of `Dalle.forward`; the last returns a `DalleOutput`, with logits
    where no gradients are wanted. Their costs are counted operations: the embeddings' are none to speak of, the heads' are
    many.

    Args:
        config, checkpointing, tensor: as `Dalle` takes them.
    """
    costs = layer_flops(config)
    layers = [PipelineLayer("embedding.", costs[0], partial(InputEmbedding, config, tensor), _embed, "embedding")]
    for number in range(2 * config.depth):
        kind = configured_kinds(config)[number // 2]
        build = partial(residual_block, config, number, tensor)
        run = partial(_run_block, config=config, checkpointing=checkpointing)
        layers.append(PipelineLayer(f"blocks.{number}.", costs[1 + number], build, run, "mlp" if number % 2 else kind))
    layers.append(PipelineLayer("", costs[-1], partial(OutputStage, config, tensor), _finish, "output"))
    return layers


def _embed(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Passed:
    text, codes, *seeds = inputs
    check_tokens(cast(InputEmbedding, layer).config, text, codes)
    return layer(text, codes), text, codes, *seeds


def _run_block(block: nn.Module, passed: Passed, *, config: DalleConfig, checkpointing: Checkpointing) -> Passed:
    x, text, *rest = passed
    seeds = rest[1] if len(rest) > 1 else None
    return run_block(block, x, seeds, kept_text(config, text), checkpointing), text, *rest


def _finish(layer: nn.Module, passed: Passed) -> DalleOutput:
    x, text, codes, *_ = passed
    return transformer_output(cast(OutputStage, layer), x, text, codes, logits=not x.requires_grad)
