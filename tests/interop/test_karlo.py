"""unCLIPs go from `diffusers`' layout and Kakao's to ours and back, and compute the same everywhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.interop import export_karlo, import_karlo
from dalle_ds.interop.karlo import OWN_NAME, pipeline
from dalle_ds.models.prior import Caption
from dalle_ds.sampling import Unclip
from dalle_ds.sampling.image_diffusion import image_generators
from dalle_ds.sampling.prior import caption_noise
from dalle_ds.text.clip_tokenizer import BytePairs, ClipTokenizer
from tests.interop.test_clip import MERGES
from tests.references import FOLDER

CAPTIONS = ["a red cat", "cat"]
DIM, LENGTH = 16, 12


def random_weights(model: nn.Module, seed: int) -> Any:
    """Of a size at which mistakes show; `diffusers` begins some with zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * max(9, parameter[0].numel()) ** -0.5
        parameter.data = 1 + noise if "norm" in name and name.endswith("weight") else noise
    if hasattr(model, "clip_std"):
        model.clip_std.data = 0.3 + torch.rand(model.clip_std.shape, generator=generator)
    return model.eval()


def unet(**settings: Any) -> Any:
    kinds = ("ResnetDownsampleBlock2D",) * 2, ("ResnetUpsampleBlock2D",) * 2
    return diffusers.UNet2DModel(
        sample_size=32, in_channels=6, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=kinds[0], up_block_types=kinds[1], add_attention=False, **settings,
    )  # fmt: skip


def networks() -> dict[str, Any]:
    """Of Karlo's kind, tiny."""
    decoder = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, layers_per_block=1, block_out_channels=(32, 64),
        attention_head_dim=32, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=24,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift", class_embed_type="identity",
    )  # fmt: skip
    prior = diffusers.PriorTransformer(2, 8, 2, DIM, LENGTH)
    text_proj = UnCLIPTextProjModel(clip_embeddings_dim=DIM, time_embed_dim=128, cross_attention_dim=24)
    found = {
        "prior": prior,
        "decoder": decoder,
        "text_proj": text_proj,
        "super_res_first": unet(),
        "super_res_last": unet(),
    }
    found = {name: random_weights(model, seed) for seed, (name, model) in enumerate(found.items())}
    decoder.conv_out.weight.data[3:] *= 0.03  # variances between the bounds, beyond which we do not follow
    return found


def clip_parts(folder: Path) -> dict[str, Any]:
    pieces = BytePairs(MERGES)
    tokenizer, size = ClipTokenizer(pieces), pieces.vocab_size + 2
    tokenizer.save(folder)
    special = {"<|startoftext|>": size - 2, "<|endoftext|>": size - 1}
    (folder / "vocab.json").write_text(json.dumps(pieces.vocabulary | special))
    shape = {"hidden_size": DIM, "intermediate_size": 4 * DIM, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"projection_dim": DIM}
    tokens = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    text = CLIPTextConfig(**shape, max_position_embeddings=LENGTH, **tokens)
    vision = CLIPVisionConfig(**shape, image_size=16, patch_size=8)
    return {
        # Karlo's pads with "!", which is token 0.
        "tokenizer": CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="!", model_max_length=LENGTH),
        "text_encoder": random_weights(CLIPTextModelWithProjection(text), 7),
        "image_encoder": random_weights(CLIPVisionModelWithProjection(vision), 8),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    }  # fmt: skip


def schedulers() -> dict[str, Any]:
    settings = {
        "prior": {"prediction_type": "sample", "clip_sample_range": 5.0},
        "decoder": {"variance_type": "learned_range"},
        "super_res": {},
    }
    return {f"{name}_scheduler": diffusers.UnCLIPScheduler(**given) for name, given in settings.items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {**networks(), **clip_parts(tmp_path_factory.mktemp("tokenizer")), **schedulers()}


def pipe_of(parts: dict[str, Any], kind: str = "UnCLIPPipeline") -> Any:
    left_out = ("prior", "prior_scheduler") if "Variation" in kind else ("image_encoder", "feature_extractor")
    pipe = getattr(diffusers, kind)(**{name: part for name, part in parts.items() if name not in left_out})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def karlo(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image folder."""
    folder = tmp_path_factory.mktemp("karlo") / "karlo"
    pipe_of(parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def variations(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image-variation folder."""
    folder = tmp_path_factory.mktemp("karlo") / "variations"
    pipe_of(parts, "UnCLIPImageVariationPipeline").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(karlo: Path, variations: Path, tmp_path_factory: pytest.TempPathFactory) -> Unclip:
    """Imported, with both of CLIP's towers."""
    both = tmp_path_factory.mktemp("clip") / "clip"
    import_karlo(variations).clip.save_pretrained(both)
    return import_karlo(karlo, clip=both)


def state_of(unclip: Unclip) -> dict[str, Tensor]:
    stages: dict[str, Any] = {"clip": unclip.clip, "decoder": unclip.decoder.module, "up": unclip.upsamplers[0].module}
    if unclip.prior is not None:
        stages |= {"prior": unclip.prior.module}
    found = {
        f"{stage}.{name}": value for stage, module in stages.items() for name, value in module.state_dict().items()
    }
    return found | ({} if unclip.prior is None else dict(unclip.prior.scaling.state_dict()))


def same(unclip: Unclip, other: Unclip) -> None:
    """To the bit, and in all that is said of them."""
    one, two = state_of(unclip), state_of(other)
    assert one.keys() == two.keys()
    assert not [name for name, value in one.items() if not torch.equal(value, two[name])]
    assert unclip.fingerprints() == other.fingerprints()
    assert unclip.decoder.facts == other.decoder.facts and unclip.decoder.decoder.config == other.decoder.decoder.config
    first, second = unclip.upsamplers[0], other.upsamplers[0]
    assert first.facts == second.facts and first.upsampler.config == second.upsampler.config
    if unclip.prior is not None:
        assert other.prior is not None and unclip.prior.prior.config == other.prior.prior.config
        assert unclip.prior.sampling == other.prior.sampling and unclip.prior.analytic == other.prior.analytic


# --- the same numbers


@torch.no_grad()
def test_networks_compute_what_diffusers_do(ours: Unclip, parts: dict[str, Any]) -> None:
    torch.manual_seed(0)
    z_t, z_i, times = torch.randn(3, DIM), torch.randn(3, DIM), torch.tensor([0, 500, 999])
    states, padded = torch.randn(3, LENGTH, DIM), torch.arange(LENGTH) >= torch.tensor([[3], [12], [5]])
    assert ours.prior is not None
    found = ours.prior.prior(Caption(states, z_t, padded), z_i[:, None], times[:, None])[:, 0]
    wanted = parts["prior"](z_i, times, z_t, states, ~padded).predicted_image_embedding
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    decoder, x = ours.decoder.decoder, torch.randn(3, 3, 16, 16)
    none, all_of = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    for dropped in (none, all_of):
        given = parts["text_proj"].learned_classifier_free_guidance_embeddings.expand(3, -1) if dropped.all() else z_i
        context, added = parts["text_proj"](
            image_embeddings=given,
            prompt_embeds=z_t,
            text_encoder_hidden_states=states,
            do_classifier_free_guidance=False,
        )
        keep = nn.functional.pad(~padded, (4, 0), value=True)
        wanted = parts["decoder"](x, times, context, class_labels=added, attention_mask=keep).sample
        found = decoder(x, times, z_i, Caption(states, z_t, padded), embedding_dropped=dropped)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def drawn(generators: list[torch.Generator], steps: int, side: int) -> Tensor:
    """(steps, B, 3, side, side): what our loop draws for images."""
    return torch.stack(
        [torch.stack([torch.randn(3, side, side, generator=each) for each in generators]) for _ in range(steps)]
    )


@pytest.fixture(params=["sample", "epsilon"])
def predicting(request: Any, parts: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Networks that predict little: of rounding, which they amplify step by step, random ones make other images. (Of the noise,
    what is clean is a difference of large numbers, too.)"""
    found = dict(parts)
    for name in ("decoder", "super_res_first", "super_res_last"):
        found[name] = copy.deepcopy(parts[name])
        found[name].conv_out.weight.data *= 0.03
        if request.param == "sample":
            scheduler = f"{name.partition('_first')[0].partition('_last')[0]}_scheduler"
            found[scheduler] = diffusers.UnCLIPScheduler.from_config(parts[scheduler].config, prediction_type="sample")
    return found


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Tensor]], None]:
    """Has their schedulers draw given tensors."""

    def use(noises: list[Tensor]) -> None:
        def draw(shape: Any, **_: Any) -> Tensor:
            noise = noises.pop(0)
            assert noise.shape == tuple(shape)
            return noise

        monkeypatch.setattr(diffusers.schedulers.scheduling_unclip, "randn_tensor", draw)

    return use


def test_captions_become_the_same_images(predicting: dict[str, Any], same_noise: Any, tmp_path: Path) -> None:
    """With guidance, of the empty caption; by how Karlo samples, which the import says."""
    pipe_of(predicting).save_pretrained(tmp_path / "karlo")
    ours = import_karlo(tmp_path / "karlo", tmp_path / "ours")
    z = caption_noise(CAPTIONS, 0, 1, 25, DIM)[:, 0]
    of_decoder = drawn(image_generators("decoder", CAPTIONS, 0), 25, 16)
    of_upsampler = drawn(image_generators("upsampler 32", CAPTIONS, 0), 7, 32)
    same_noise([*z.unbind(1)[1:25], *of_decoder[1:], *of_upsampler[1:]])
    theirs = pipe_of(predicting)(
        CAPTIONS,
        prior_latents=z[:, 0],
        decoder_latents=of_decoder[0],
        super_res_latents=of_upsampler[0],
        output_type="np",
    ).images
    again = Unclip.from_pretrained(tmp_path / "ours")
    found = again.decode(CAPTIONS, again.embed(CAPTIONS)[:, 0])
    torch.testing.assert_close(found, torch.from_numpy(theirs).permute(0, 3, 1, 2), atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match="vision_depth"):
        ours.clip.embed_images(torch.rand(1, 3, 16, 16))


def test_images_become_the_same_variations(predicting: dict[str, Any], same_noise: Any, tmp_path: Path) -> None:
    pipe_of(predicting, "UnCLIPImageVariationPipeline").save_pretrained(tmp_path / "karlo")
    ours = import_karlo(tmp_path / "karlo")
    assert ours.prior is None
    images = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 24, 3), np.uint8)) for seed in (0, 1)]
    of_decoder = drawn(image_generators("decoder", CAPTIONS, 0), 25, 16)
    of_upsampler = drawn(image_generators("upsampler 32", CAPTIONS, 0), 7, 32)
    same_noise([*of_decoder[1:], *of_upsampler[1:]])
    theirs = pipe_of(predicting, "UnCLIPImageVariationPipeline")(
        images, decoder_latents=of_decoder[0], super_res_latents=of_upsampler[0], output_type="np"
    ).images
    found = ours.decode(CAPTIONS, ours.clip.embed_images(images), read_captions=False)
    torch.testing.assert_close(found, torch.from_numpy(theirs).permute(0, 3, 1, 2), atol=1e-3, rtol=0)


# --- there and back


def test_there_and_back_is_exact(ours: Unclip, tmp_path: Path) -> None:
    assert ours.prior is not None
    export_karlo(ours, tmp_path / "theirs")
    same(ours, import_karlo(tmp_path / "theirs", tmp_path / "ours"))
    same(ours, Unclip.from_pretrained(tmp_path / "ours"))
    with pytest.raises(ConfigError, match="--out"):
        export_karlo(ours, tmp_path / "theirs")
    with pytest.raises(ConfigError, match="--out"):
        import_karlo(tmp_path / "theirs", tmp_path / "ours")


def test_theirs_come_back_exactly(ours: Unclip, karlo: Path, tmp_path: Path) -> None:
    """All but the last bit of clip_std, of which we keep the inverse."""
    export_karlo(ours, tmp_path / "again")
    for file in sorted(karlo.rglob("*.safetensors")):
        given, found = load_file(file), load_file(tmp_path / "again" / file.relative_to(karlo))
        assert given.keys() == found.keys()
        for name, value in given.items():
            if name == "clip_std":
                torch.testing.assert_close(found[name], value, rtol=2e-7, atol=0)
            else:
                assert torch.equal(found[name], value), name
    for file in sorted(karlo.rglob("*config.json")):
        if "text_encoder" in file.parts or "tokenizer" in file.parts:
            continue
        values, again = (json.loads(each.read_text()) for each in (file, tmp_path / "again" / file.relative_to(karlo)))
        assert again | values == again, file
