"""CLIP against `transformers`, open_clip and OpenAI's own code, and its own promises."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle_ds.config import ClipConfig, from_dict, to_dict
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.interop.clip_layouts import open_clip_config, to_huggingface, to_openai
from dalle_ds.models import Clip, DiscreteVAE
from dalle_ds.models.clip import huggingface_config
from dalle_ds.models.clip_images import square_pixels
from dalle_ds.text.clip_tokenizer import BytePairs, ClipTokenizer
from tests.clip_shapes import CLIP_SHAPES
from tests.references import FOLDER, reference

TOLERANCE = 1e-5
# Heads of 64, which is all that OpenAI's code has; towers that differ in every number.
SMALL = ClipConfig(
    embed_dim=24,
    image_size=32,
    patch_size=8,
    vision_width=128,
    vision_depth=2,
    vision_heads=2,
    text_width=64,
    text_depth=3,
    text_heads=1,
    text_len=12,
    text_vocab=100,
)
WIDE = ClipConfig(
    embed_dim=40,
    image_size=42,
    patch_size=14,
    vision_width=64,
    vision_depth=3,
    vision_heads=1,
    text_width=192,
    text_depth=1,
    text_heads=3,
    text_len=20,
    text_vocab=64,
)
SHAPES = {"small": SMALL, "wide": WIDE}


def clip(config: ClipConfig = SMALL, seed: int = 0, **options: Any) -> Clip:
    """A CLIP with random weights, none of which is where it makes no difference."""
    torch.manual_seed(seed)
    model = Clip(config, **options)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name != "logit_scale":
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model.eval()


def captions(config: ClipConfig, padding: int = -1) -> Tensor:
    """Tokens of captions of every length that the model takes."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.full((config.text_len - 1, config.text_len), padding)
    for length, row in enumerate(rows):
        row[0], row[length + 1] = config.start, config.end
        row[1 : length + 1] = torch.randint(0, config.text_vocab - 2, (length,), generator=generator)
    return rows


def standardized(config: ClipConfig, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(value)[:, None, None] for value in (config.image_mean, config.image_std))
    return (images - mean) / std


def pictures(config: ClipConfig) -> Tensor:
    return torch.rand(3, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(4))


def transformers_clip(model: Clip, **text_config: Any) -> Any:
    from transformers import CLIPConfig, CLIPModel

    fields = huggingface_config(model.config)
    fields["text_config"] |= text_config
    theirs = CLIPModel(CLIPConfig(**fields))
    theirs.load_state_dict(to_huggingface(model.state_dict()))
    return theirs.eval()


def openai_clip(model: Clip) -> Any:
    config = model.config
    theirs = reference("clip.model").CLIP(
        embed_dim=config.embed_dim,
        image_resolution=config.image_size,
        vision_layers=config.vision_depth,
        vision_width=config.vision_width,
        vision_patch_size=config.patch_size,
        context_length=config.text_len,
        vocab_size=config.text_vocab,
        transformer_width=config.text_width,
        transformer_heads=config.text_heads,
        transformer_layers=config.text_depth,
    )
    theirs.load_state_dict(to_openai(model.state_dict(), config))
    return theirs.eval()


def open_clip_clip(model: Clip) -> Any:
    theirs = reference("open_clip").CLIP(**open_clip_config(model.config)["model_cfg"])
    theirs.load_state_dict(to_openai(model.state_dict(), model.config))
    return theirs.eval()


# --- the same numbers as others' ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_embeddings_are_those_of_transformers(shape: str, activation: str) -> None:
    config = replace(SHAPES[shape], activation=activation)
    model = clip(config)
    theirs = transformers_clip(model)
    images, text = pictures(config), captions(config)
    wanted = theirs.get_image_features(standardized(config, images)).pooler_output
    assert (model.embed_images(images, normalize=False) - wanted).abs().max() < TOLERANCE
    wanted = theirs.get_text_features(captions(config, padding=config.end)).pooler_output
    assert (model.embed_texts(text, normalize=False) - wanted).abs().max() < TOLERANCE
    assert wanted.std() > 0.1, "embeddings so small that anything equals them"

    output = model(images, text[: len(images)])
    both = theirs(captions(config, padding=config.end)[: len(images)], standardized(config, images))
    logits = output.scale * output.image_embeddings @ output.text_embeddings.T
    assert (logits - both.logits_per_image).abs().max() < 10 * TOLERANCE
    assert output.scale.shape == () and output.image_embeddings.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_embeddings_are_those_of_openais_code(shape: str) -> None:
    config = SHAPES[shape]
    model = clip(config)
    theirs = openai_clip(model)
    images, text = pictures(config), captions(config)
    wanted = theirs.encode_image(standardized(config, images))
    assert (model.embed_images(images, normalize=False) - wanted).abs().max() < TOLERANCE
    wanted = theirs.encode_text(captions(config, padding=0))
    assert (model.embed_texts(text, normalize=False) - wanted).abs().max() < TOLERANCE
    logits, _ = theirs(standardized(config, images), captions(config, padding=0)[: len(images)])
    output = model(images, text[: len(images)])
    assert (output.scale * output.image_embeddings @ output.text_embeddings.T - logits).abs().max() < 10 * TOLERANCE


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_embeddings_are_those_of_open_clip(shape: str, activation: str) -> None:
    # Heads of 32, which OpenAI's code does not have.
    config = replace(SHAPES[shape], activation=activation, vision_heads=SHAPES[shape].vision_width // 32)
    model = clip(config)
    theirs = open_clip_clip(model)
    images = pictures(config)
    wanted = theirs.encode_image(standardized(config, images))
    assert (model.embed_images(images, normalize=False) - wanted).abs().max() < TOLERANCE
    wanted = theirs.encode_text(captions(config, padding=0))
    assert (model.embed_texts(captions(config), normalize=False) - wanted).abs().max() < TOLERANCE


@torch.no_grad()
def test_padding_of_any_kind_and_none_gives_the_same_embedding() -> None:
    model = clip()
    wanted = model.embed_texts(captions(SMALL))
    for padding in (0, SMALL.end, SMALL.start, 7):
        assert torch.equal(model.embed_texts(captions(SMALL, padding)), wanted)
    for length, row in enumerate(captions(SMALL)):
        assert (model.embed_texts(row[None, : length + 2]) - wanted[length]).abs().max() < 1e-6
    # And every token up to the end token matters.
    text = captions(SMALL)[-1:]
    for place in range(SMALL.text_len - 1):
        other = text.clone()
        other[0, place] = (other[0, place] + 1) % 50
        assert (model.embed_texts(other) - model.embed_texts(text)).abs().max() > 1e-4


@torch.no_grad()
def test_text_states_are_those_that_embeddings_are_made_of() -> None:
    """One function for both, so that what a prior reads in training is what it reads in sampling."""
    model = clip().eval()
    text = captions(SMALL)
    states, padded = model.text_states(text)
    reference = transformers_clip(model).text_model(input_ids=text.masked_fill(text == -1, SMALL.end)).last_hidden_state
    torch.testing.assert_close(states, reference, rtol=1e-5, atol=1e-5)
    assert torch.equal(padded, text == -1)
    ends = (~padded).sum(dim=1) - 1
    embeddings = model.text_projection(states[torch.arange(len(text)), ends])
    torch.testing.assert_close(embeddings, model.embed_texts(text, normalize=False), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_end_token_may_be_any() -> None:
    """Also 2, which `transformers` takes for "the greatest one": that is how its files of before 2023 say 49,407."""
    config = replace(SMALL, start_token=5, end_token=2)
    model, text = clip(config), captions(SMALL)
    text[text == SMALL.start], text[text == SMALL.end] = 5, 2
    text[:, 1:][(text[:, 1:] == 2) & (text[:, :-1] == -1)] = 3
    rows = torch.stack([row for row in text if (row == 2).sum() == 1])
    hidden = model.text_model(input_ids=rows.masked_fill(rows < 0, 0)).last_hidden_state
    wanted = model.text_projection(hidden[rows == 2])
    assert (model.embed_texts(rows, normalize=False) - wanted).abs().max() < TOLERANCE
    greatest = transformers_clip(clip(), eos_token_id=2)
    wanted = greatest.get_text_features(captions(SMALL, padding=0)).pooler_output
    assert (clip().embed_texts(captions(SMALL), normalize=False) - wanted).abs().max() < TOLERANCE


@torch.no_grad()
def test_pictures_of_any_size_are_seen_as_transformers_sees_them() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = SMALL.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
    )
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (33, 32), (32, 47), (100, 71), (17, 90), (200, 31), (5, 3), (64, 64), (1, 9), (50, 31)]
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    images.append(images[3].convert("L"))
    model = clip()
    theirs = transformers_clip(model)
    pixels = processor(images, return_tensors="pt").pixel_values
    assert (standardized(SMALL, square_pixels(images, size)) - pixels).abs().max() < 1e-5
    wanted = theirs.get_image_features(pixels).pooler_output
    assert (model.embed_images(images, normalize=False) - wanted).abs().max() < TOLERANCE
    # A tensor of the same image differs by the rounding of Pillow's bytes, as long as nothing is clipped on the way.
    for image in images[: len(sizes)]:
        image = image.point(lambda value: 96 + value // 4)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        assert (square_pixels(tensor, size) - square_pixels([image], size)).abs().max() < 2.5 / 255


def test_edges_that_overshoot_are_clipped() -> None:
    """As bytes are by Pillow."""
    edge = torch.zeros(1, 3, 20, 20)
    edge[..., 10:] = 1
    seen = square_pixels(edge, 33)
    assert seen.min() == 0 and seen.max() == 1


def test_transparent_pictures_are_seen_on_white() -> None:
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    half = Image.new("LA", (40, 40), (0, 128))
    palette = clear.quantize()
    seen = square_pixels([clear, half, palette], 32)
    assert torch.equal(seen[0], torch.ones(3, 32, 32)) and torch.equal(seen[2], torch.ones(3, 32, 32))
    assert (seen[1] - 127 / 255).abs().max() < 1e-6


# --- shapes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"])
def test_named_shapes_are_open_clips(name: str) -> None:
    own = name.replace("/", "-").replace("@336px", "-336")
    file = FOLDER / "open_clip" / "model_configs" / f"{own}.json"
    with torch.device("meta"):
        ours, theirs = Clip(CLIP_SHAPES[name]), reference("open_clip").CLIP(**json.loads(file.read_text()))
    wanted = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in to_openai(ours.state_dict(), ours.config).items()} == wanted
    assert sum(value.numel() for value in ours.parameters()) == sum(value.numel() for value in theirs.parameters())


def test_unclips_shape_is_the_papers() -> None:
    config = CLIP_SHAPES["unclip-H/16"]
    assert (config.grid**2 + 1, config.embed_dim) == (257, 1024)
    assert config.vision_width / config.vision_heads == config.text_width / config.text_heads == 64
    with torch.device("meta"):
        model = Clip(config)
    assert len(model.vision_model.encoder.layers) == 32 and len(model.text_model.encoder.layers) == 24
    # 12 w² + 13 w in a block, positions and patches, class token, norms, vocabulary, projections.
    vision = 32 * (12 * 1280**2 + 13 * 1280) + 257 * 1280 + 3 * 16 * 16 * 1280 + 1280 + 4 * 1280 + 1280 * 1024
    text = 24 * (12 * 1024**2 + 13 * 1024) + (77 + 49_408) * 1024 + 2 * 1024 + 1024 * 1024
    assert sum(value.numel() for value in model.parameters()) == vision + text + 1


@pytest.mark.parametrize("config", CLIP_SHAPES.values(), ids=CLIP_SHAPES)
def test_configurations_survive_files(config: ClipConfig) -> None:
    assert from_dict(ClipConfig, to_dict(config), "file") == config


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("embed_dim", 0, "model.embed_dim must be greater than 0"),
        ("image_size", 33, "multiple of model.patch_size"),
        ("vision_heads", 3, "model.vision_heads to a divisor"),
        ("text_heads", 3, "model.text_heads to a divisor"),
        ("text_len", 2, "model.text_len must be at least 3"),
        ("text_vocab", 2, "model.text_vocab must be at least 3"),
        ("end_token", 100, r"model.end_token must lie in \[0, 100\)"),
        ("start_token", 99, "must differ"),
        ("image_std", (1.0, 0.0, 1.0), "model.image_std"),
        ("image_mean", (0.5,), "model.image_mean"),
    ],
)
def test_shapes_that_cannot_be_are_refused(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(SMALL, **{field: value})


# --- weights and training -----------------------------------------------------------------------------------------------


def test_initial_weights_are_drawn_as_openais() -> None:
    torch.manual_seed(1)
    config = replace(WIDE, vision_width=256, vision_heads=4, text_width=256, text_heads=4, text_depth=2, text_vocab=400)
    ours = to_openai(Clip(config).state_dict(), config)
    theirs = openai_clip_fresh(config).state_dict()
    assert set(ours) == set(theirs)
    for name, wanted in theirs.items():
        found, expected = ours[name].double(), wanted.double()
        if expected.numel() == 1 or float(expected.std()) == 0:
            assert torch.allclose(found, expected), name
            continue
        # Room for five times what samples differ by; the kurtosis tells uniform draws (1.8) from normal ones (3).
        room = 5 / math.sqrt(expected.numel())
        assert abs(found.std() / expected.std() - 1) < room, name
        if expected.numel() > 2_000:
            assert abs(kurtosis(found) - kurtosis(expected)) < 0.4, name


def openai_clip_fresh(config: ClipConfig) -> nn.Module:
    torch.manual_seed(2)
    with torch.device("cpu"):
        return reference("clip.model").CLIP(
            config.embed_dim,
            config.image_size,
            config.vision_depth,
            config.vision_width,
            config.patch_size,
            config.text_len,
            config.text_vocab,
            config.text_width,
            config.text_heads,
            config.text_depth,
        )


def kurtosis(values: Tensor) -> float:
    centered = values - values.mean()
    return float((centered**4).mean() / (centered**2).mean() ** 2)


def test_the_same_seed_draws_the_same_weights() -> None:
    torch.manual_seed(7)
    first, after = Clip(SMALL), torch.rand(3)
    torch.manual_seed(7)
    second = Clip(SMALL)
    assert torch.equal(torch.rand(3), after)
    assert first.fingerprint == second.fingerprint != Clip(SMALL).fingerprint


@pytest.mark.parametrize(
    ("exponent", "gradient", "wanted"),
    [
        (math.log(1 / 0.07), 2.0, 2 / 0.07),
        (math.log(1 / 0.07), -2.0, -2 / 0.07),
        (math.log(100) + 0.3, -2.0, 0.0),  # following it would raise the scale further
        (math.log(100) + 0.3, 2.0, 200.0),  # and this lowers it
    ],
)
def test_the_scale_stops_at_100_and_is_not_stuck_there(exponent: float, gradient: float, wanted: float) -> None:
    model = clip()
    with torch.no_grad():
        model.logit_scale.fill_(exponent)
    output = model(pictures(SMALL)[:2], captions(SMALL)[:2])
    assert output.scale.item() == pytest.approx(min(100.0, math.exp(exponent)), rel=1e-5)
    (output.scale * gradient).backward()
    assert model.logit_scale.grad.item() == pytest.approx(wanted, rel=1e-4)


def test_a_scale_above_100_comes_back() -> None:
    model = clip()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100) + 0.05)
    optimizer = torch.optim.SGD([model.logit_scale], lr=1e-3)
    for direction in (-1.0, 1.0):
        for _ in range(2):
            optimizer.zero_grad()
            (direction * model(pictures(SMALL)[:1], captions(SMALL)[:1]).scale).backward()
            optimizer.step()
        above = model.logit_scale.item() - math.log(100)
        assert above == pytest.approx(0.05, abs=1e-6) if direction < 0 else above < -0.1, direction


def test_recomputed_blocks_have_the_same_gradients_and_every_parameter_has_one() -> None:
    images, text = pictures(SMALL), captions(SMALL)[2:5]
    gradients = []
    for checkpointing in ("none", "full"):
        model = clip(checkpointing=checkpointing).train()
        towers = model.vision_model, model.text_model
        counted = [count_calls(tower.encoder.layers[0].mlp.fc1) for tower in towers]
        output = model(images, text)
        nn.functional.cross_entropy(
            output.scale * output.image_embeddings @ output.text_embeddings.T, torch.arange(3)
        ).backward()
        assert [len(calls) for calls in counted] == [1 if checkpointing == "none" else 2] * 2
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is not None and gradient.abs().max() > 0) or name.endswith("k_proj.bias"), name
        assert torch.equal(gradient, gradients[1][name]), name
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing"):
        Clip(SMALL, checkpointing="selective")


def count_calls(module: nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


# --- use ----------------------------------------------------------------------------------------------------------------


def test_an_exported_clip_is_the_same_clip(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = ClipTokenizer.load(tokenizer_file)
    config = replace(SMALL, text_vocab=tokenizer.pieces.vocab_size + 2, activation="gelu", image_std=(0.5, 0.5, 0.5))
    model = clip(config, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "clip")
    assert {path.name for path in (tmp_path / "clip").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    }
    again = Clip.from_pretrained(tmp_path / "clip")
    assert again.config == config and again.fingerprint == model.fingerprint and not again.training
    words = ["a red circle", "", "a blue square " * 9]
    assert torch.equal(again.embed_texts(words), model.embed_texts(words))
    assert torch.equal(again.embed_texts(words), model.embed_texts(tokenizer.encode(words, config.text_len)))
    assert not again.embed_texts(words).requires_grad
    bare = clip(config)
    bare.save_pretrained(tmp_path / "clip")
    assert Clip.from_pretrained(tmp_path / "clip").tokenizer is None
    assert bare.fingerprint != model.fingerprint


class Devices(TorchDispatchMode):
    """What the tensors of all operations lie on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.seen |= {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        return result


def test_a_forward_pass_copies_nothing_from_the_host() -> None:
    """Which a GPU would be waited for; another device stands in for one."""
    with torch.device("meta"):
        images, text = torch.rand(2, 3, 32, 32), torch.zeros(2, SMALL.text_len, dtype=torch.int64)
    model = clip().to("meta")
    with Devices() as devices:
        output = model(images, text)
    assert devices.seen == {"meta"} and output.image_embeddings.shape == output.text_embeddings.shape == (2, 24)


def test_bf16_weights_give_nearly_the_same_embeddings_in_fp32(tmp_path: Path) -> None:
    model = clip()
    model.save_pretrained(tmp_path / "clip")
    half = Clip.from_pretrained(tmp_path / "clip", dtype=torch.bfloat16)
    assert half.text_projection.weight.dtype == torch.bfloat16
    for found, wanted in (
        (half.embed_images(pictures(SMALL)), model.embed_images(pictures(SMALL))),
        (half.embed_texts(captions(SMALL)), model.embed_texts(captions(SMALL))),
    ):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 0.05 and (found * wanted).sum(dim=1).min() > 0.995
        assert torch.allclose(found.norm(dim=1), torch.ones(len(found)), atol=1e-6)


def test_files_that_do_not_fit_are_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    clip().save_pretrained(tmp_path / "clip")
    ClipTokenizer.load(tokenizer_file).save(tmp_path / "clip")
    with pytest.raises(CheckpointError, match=r"does not fit the model: the tokenizer has .* pieces"):
        Clip.from_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="tokenizer"):
        Clip.from_pretrained(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="no model at"):
        Clip.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="where a 'dvae' model is needed"):
        DiscreteVAE.from_pretrained(tmp_path / "clip")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (torch.tensor([[98, 1, 2]]), "row 0 of text has no end token"),
        (torch.tensor([[98, 1, 99], [98, 1, 2]]), "row 1 of text has no end token"),
        (torch.tensor([[98, 100, 99]]), "must lie in"),
        (torch.tensor([[98, -2, 99]]), "must lie in"),
        (torch.tensor([[98.0, 1.0, 99.0]]), "must be int64"),
        (torch.full((1, 13), 99), "T of at most 12"),
        (torch.full((13,), 99), "must have shape"),
        (torch.empty(0, 5, dtype=torch.int64), "must have shape"),
    ],
)
def test_tokens_that_mean_nothing_are_refused(text: Tensor, words: str) -> None:
    model = clip()
    with pytest.raises(DataError, match=words):
        model.embed_texts(text)
    with pytest.raises(DataError, match=words):
        model(pictures(SMALL)[:1], text)


def test_pictures_that_are_none_are_refused() -> None:
    model = clip()
    for images, words in (
        (torch.rand(3, 32, 32), "images must be"),
        (torch.rand(2, 1, 32, 32), "images must be"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "divide bytes by 255"),
        (torch.rand(0, 3, 32, 32), "images must be"),
        ([], "at least one"),
        (["picture.png"], "PIL images, found a str"),
        (Image.new("RGB", (40, 40)), "put it into a list"),
    ):
        with pytest.raises(DataError, match=words):
            model.embed_images(images)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"\(B, 3, 32, 32\)"):
        model(torch.rand(1, 3, 40, 40), captions(SMALL)[:1])
    with pytest.raises(ConfigError, match="no tokenizer"):
        model.embed_texts(["a cat"])


def test_one_caption_is_no_list_of_captions() -> None:
    tokenizer = ClipTokenizer(BytePairs([]))
    model = clip(replace(SMALL, text_vocab=514), tokenizer=tokenizer)
    with pytest.raises(DataError, match="found the text 'a cat': put it into a list"):
        model.embed_texts("a cat")
