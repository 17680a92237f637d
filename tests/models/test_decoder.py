"""The decoder, against `diffusers`' U-Net and what the papers say of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from dalle_ds.config import DecoderConfig
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models import UnclipDecoder
from dalle_ds.models.prior import Caption

CONFIG = DecoderConfig(
    image_size=16, channels=32, depth=1, multiples=(1, 2), dropout=0.1, attention=(8,), head_channels=32, embed_dim=16,
    context_width=32, text_len=6, text_vocab=50, text_depth=1, text_heads=2, text_width=24,
)  # fmt: skip
STATES = dataclasses.replace(CONFIG, text="clip_states")


def fill(model: nn.Module) -> None:
    """Weights that begin as zero hide what is behind them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)


def decoder_of(config: DecoderConfig = CONFIG, seed: int = 0) -> UnclipDecoder:
    torch.manual_seed(seed)
    decoder = UnclipDecoder(config).eval()
    fill(decoder)
    return decoder


def caption_of(config: DecoderConfig, lengths: tuple[int, ...] = (3, 6, 1)) -> Caption:
    torch.manual_seed(1)
    rows = len(lengths)
    padded = torch.arange(config.text_len) >= torch.tensor(lengths)[:, None]
    embedding = F.normalize(torch.randn(rows, config.embed_dim), dim=1)
    if config.text == "clip_states":
        return Caption(torch.randn(rows, config.text_len, config.text_width), embedding, padded)
    return Caption(torch.randint(0, 50, (rows, config.text_len)).masked_fill(padded, -1), embedding)


def inputs(config: DecoderConfig = CONFIG) -> tuple[Tensor, Tensor, Tensor, Caption]:
    torch.manual_seed(2)
    x = torch.randn(3, 3, config.image_size, config.image_size)
    return x, torch.tensor([0, 500, 999]), F.normalize(torch.randn(3, config.embed_dim), dim=1), caption_of(config)


def rows_of(caption: Caption, rows: Any) -> Caption:
    return Caption(*(None if part is None else part[rows] for part in caption))  # type: ignore[arg-type]


def test_it_is_diffusers_unet_with_context_and_an_added_time_embedding() -> None:
    """unclip.md's settings written out, strict keys; what the wrapper passes on is what `condition` returned."""
    decoder = decoder_of()
    theirs = UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, layers_per_block=1, block_out_channels=(32, 64),
        attention_head_dim=32, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=32,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift", class_embed_type="identity",
    ).eval()  # fmt: skip
    theirs.load_state_dict(decoder.unet.state_dict(), strict=True)
    x, steps, embedding, caption = inputs()
    with torch.no_grad():
        condition = decoder.condition(embedding, caption)
        wanted = theirs(x, steps, condition.context, class_labels=condition.added).sample
        torch.testing.assert_close(decoder(x, steps, embedding, caption), wanted, atol=1e-5, rtol=1e-5)
    assert condition.context.shape == (3, 4 + 6, 32) and condition.added.shape == (3, 4 * 32)


def test_the_papers_sizes() -> None:
    with torch.device("meta"):
        decoder = UnclipDecoder(DecoderConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in decoder.named_children()}
    assert count["unet"] == pytest.approx(2.238e9, rel=1e-3)
    assert sum(p.numel() for p in decoder.text_encoder.blocks.parameters()) == pytest.approx(1.209e9, rel=1e-3)
    # "3.5 B" (GLIDE: 2.3 B and 1.2 B)
    assert sum(count.values()) == pytest.approx(3.5e9, rel=0.01)


def test_fresh_weights_predict_nothing() -> None:
    """ADM's zero initialization."""
    torch.manual_seed(0)
    decoder = UnclipDecoder(CONFIG)
    assert not decoder(*inputs()).any()
    zeros = [name for name, parameter in decoder.unet.named_parameters() if not parameter.any() and "weight" in name]
    assert zeros and all(".conv2." in name or ".to_out.0." in name or name == "conv_out.weight" for name in zeros)
    blocks = sum(type(module).__name__ == "ResnetBlock2D" for module in decoder.unet.modules())
    assert sum(".conv2." in name for name in zeros) == blocks


@pytest.mark.parametrize("config", [CONFIG, STATES, dataclasses.replace(CONFIG, mask_padding=True),
                                    dataclasses.replace(STATES, mask_padding=True)])  # fmt: skip
def test_a_row_depends_on_itself_alone_and_a_dropped_one_not_on_what_it_drops(config: DecoderConfig) -> None:
    decoder = decoder_of(config)
    x, steps, embedding, caption = inputs(config)
    with torch.no_grad():
        whole = decoder(x, steps, embedding, caption)
        for row in range(3):
            one = slice(row, row + 1)
            alone = decoder(x[one], steps[one], embedding[one], rows_of(caption, one))
            torch.testing.assert_close(alone, whole[one], atol=1e-4, rtol=1e-4)
        first = torch.tensor([True, False, False])
        for name, changed in (
            ("embedding_dropped", (x, steps, embedding.flip(1), caption)),
            ("text_dropped", (x, steps, embedding, rows_of(caption, torch.tensor([1, 0, 2])))),
        ):
            dropped, other = decoder(x, steps, embedding, caption, **{name: first}), decoder(*changed, **{name: first})
            torch.testing.assert_close(dropped[:1], other[:1], atol=1e-5, rtol=1e-5)
            assert (dropped[0] - whole[0]).abs().max() > 1e-3, f"{name} changes nothing"
            assert (dropped[1] - other[1]).abs().max() > 1e-3, f"{name} drops other rows"
            torch.testing.assert_close(dropped[1:], whole[1:], atol=1e-5, rtol=1e-5)
        # What is dropped still sees x_t and the timestep.
        both = {"embedding_dropped": first, "text_dropped": first}
        assert (decoder(x, steps, embedding, caption, **both) - decoder(-x, steps, embedding, caption, **both))[0].any()


def test_padding_has_embeddings_of_its_own_or_is_hidden() -> None:
    x, steps, embedding, caption = inputs(STATES)
    assert caption.padded is not None
    noise = torch.where(caption.padded[..., None], torch.randn_like(caption.text), caption.text)
    for masked in (False, True):
        decoder = decoder_of(dataclasses.replace(STATES, mask_padding=masked))
        with torch.no_grad():
            one = decoder(x, steps, embedding, caption)
            other = decoder(x, steps, embedding, caption._replace(text=noise))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_masked_context_as_long_as_the_image_is_attended_to_as_others_are() -> None:
    """64 tokens at 8 × 8: `diffusers` takes such a mask for one that has the image's positions, and fails."""
    config = dataclasses.replace(CONFIG, text_len=60, mask_padding=True)
    decoder, (x, steps, embedding, _) = decoder_of(config), inputs()
    caption = caption_of(config, (3, 59, 7))
    shorter = Caption(caption.text[:, :59], caption.embedding)
    with torch.no_grad():
        one, other = (decoder(x, steps, embedding, each) for each in (caption, shorter))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_dropout_is_a_function_of_the_samples_seed() -> None:
    decoder, (x, steps, embedding, caption) = decoder_of().train(), inputs()
    seeds = torch.tensor([7, 8, 7])
    with torch.no_grad():
        torch.manual_seed(5)
        one = decoder(x, steps, embedding, caption, dropout_seeds=seeds)
        torch.manual_seed(6)
        rest = slice(1, None)
        other = decoder(x[rest], steps[rest], embedding[rest], rows_of(caption, rest), dropout_seeds=seeds[rest])
        torch.testing.assert_close(one[rest], other, atol=1e-4, rtol=1e-4)
        assert (one - decoder(x, steps, embedding, caption)).abs().max() > 1e-3
        unseeded = decoder(x, steps, embedding, caption)
        torch.testing.assert_close(unseeded, decoder.eval()(x, steps, embedding, caption, dropout_seeds=seeds))


@pytest.mark.parametrize("config", [CONFIG, STATES])
def test_checkpointing_leaves_gradients(config: DecoderConfig) -> None:
    gradients = []
    for checkpointing in ("none", "full"):
        torch.manual_seed(0)
        decoder = UnclipDecoder(config, checkpointing=checkpointing)  # type: ignore[arg-type]
        fill(decoder)
        decoder(*inputs(config), dropout_seeds=torch.arange(3)).square().mean().backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], msg=name)
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        UnclipDecoder(config, checkpointing="selective")


@pytest.mark.parametrize("config", [CONFIG, STATES])
def test_exports_are_read_strictly(config: DecoderConfig, tmp_path: Path) -> None:
    decoder = decoder_of(config)
    decoder.save_pretrained(tmp_path)
    again = UnclipDecoder.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(*inputs(config)), decoder(*inputs(config)))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"channels": 32', '"channels": 64'))
    with pytest.raises(CheckpointError, match="fit"):
        UnclipDecoder.from_pretrained(tmp_path)


def test_wrong_shapes_and_settings_are_refused() -> None:
    decoder, (x, steps, embedding, caption) = decoder_of(), inputs()
    for bad in (
        (x[..., :8], steps, embedding, caption),
        (x[:2], steps, embedding, caption),
        (x, steps, embedding[:, :8], caption),
        (x, steps, embedding[:2], caption),
    ):
        with pytest.raises(DataError):
            decoder(*bad)
    for name, value in (
        ("channels", 48), ("image_size", 17), ("multiples", ()), ("attention", (4,)), ("head_channels", 48),
        ("text_heads", 3), ("dropout", 1.0), ("depth", 0), ("text", "words"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"model.{name}"):
            dataclasses.replace(CONFIG, **{name: value})


def test_the_callers_tensors_stay_as_they_are() -> None:
    """DALLE2-pytorch multiplied the caller's embedding in place: of norm 181 after three calls."""
    decoder, given = decoder_of(), inputs()
    x, steps, embedding, caption = given
    kept = [x.clone(), steps.clone(), embedding.clone(), caption.text.clone()]
    dropped = torch.tensor([True, False, True])
    for _ in range(3):
        decoder(*given, embedding_dropped=dropped, text_dropped=dropped)
    assert all(map(torch.equal, kept, [x, steps, embedding, caption.text]))
