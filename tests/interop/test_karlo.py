"""unCLIPs go from `diffusers`' layout and Kakao's to ours and back, and compute the same everywhere."""

from __future__ import annotations

import copy
import gzip
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from huggingface_hub import ModelCard
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

from dalle_ds.config import (
    ClipConfig,
    DecoderConfig,
    DecoderObjective,
    DecoderRun,
    ImageSampling,
    PriorConfig,
    PriorObjective,
    PriorRun,
    UpsamplerConfig,
    UpsamplerObjective,
    UpsamplerRun,
)
from dalle_ds.config.training import LoaderConfig
from dalle_ds.data import BatchLoader
from dalle_ds.data.embeddings import cache_embeddings
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.interop import export_karlo, import_karlo
from dalle_ds.interop.clip_layouts import to_openai
from dalle_ds.interop.karlo import PIPELINES, pipeline
from dalle_ds.interop.karlo_layouts import to_decoder, to_prior_transformer
from dalle_ds.models import Clip, DiffusionPrior, UnclipDecoder, Upsampler
from dalle_ds.models.card import write_card
from dalle_ds.models.latents import EmbeddingScaling
from dalle_ds.models.prior import Caption
from dalle_ds.sampling import Unclip
from dalle_ds.sampling.image_diffusion import image_generators
from dalle_ds.sampling.prior import PriorSampling, caption_noise
from dalle_ds.sampling.super_resolution import SuperResolution
from dalle_ds.sampling.text_to_embedding import DiffusionTextToEmbedding
from dalle_ds.tasks.decoder import DecoderTask
from dalle_ds.tasks.prior import PriorTask
from dalle_ds.tasks.upsampler import UpsamplerTask
from dalle_ds.text.clip_tokenizer import BytePairs, ClipTokenizer
from tests.conftest import ROOT
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
    files = folder / "vocab.json", folder / "merges.txt"
    files[0].write_text(json.dumps(pieces.vocabulary | special))
    shape = {"hidden_size": DIM, "intermediate_size": 4 * DIM, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"projection_dim": DIM}
    tokens = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    text = CLIPTextConfig(**shape, max_position_embeddings=LENGTH, **tokens)
    vision = CLIPVisionConfig(**shape, image_size=16, patch_size=8)
    return {
        # Karlo's pads with "!", which is token 0.
        "tokenizer": CLIPTokenizer(*map(str, files), pad_token="!", model_max_length=LENGTH),
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
    """Networks that predict little: of rounding, which random ones amplify step by step, they would make other images."""
    found = dict(parts)
    for name in ("decoder", "super_res_first", "super_res_last"):
        found[name] = copy.deepcopy(parts[name])
        found[name].conv_out.weight.data *= 0.02
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
    """Also what the layout has no place for, and numbers that are not the inverse of their inverse."""
    assert ours.prior is not None
    numbers = torch.linspace(0.5, 3, 1000)
    factor = numbers[1 / (1 / numbers) != numbers][:DIM]
    scaling, how = EmbeddingScaling(torch.linspace(-1, 1, DIM), factor), PriorSampling(guidance=3.0, best_of=2)
    analytic = {"grid": "5", "gamma": [0.5] * 5, "standard_error": [0.1] * 5, "rows": 8, "data_variance": 0.9}
    prior = DiffusionTextToEmbedding(ours.prior.prior, ours.clip, None, scaling, "cosine", 500, analytic, how)
    ours = Unclip(ours.clip, ours.decoder, prior, [SuperResolution(ours.upsamplers[0].upsampler, ours.decoder.facts)])
    ours.upsamplers[0].facts = replace(ours.decoder.facts, sampling=ImageSampling("ddim", "27", eta=0.5))
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


# --- what is published, and what is broken


def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def weights_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def test_old_names_and_parts_are_read(ours: Unclip, karlo: Path, variations: Path, tmp_path: Path) -> None:
    folder = copied(karlo, tmp_path)
    for name in ("prior", "text_encoder"):  # as before safetensors
        file = weights_file(folder / name)
        torch.save(
            load_file(file), file.with_name("pytorch_model.bin" if "text" in name else "diffusion_pytorch_model.bin")
        )
        file.unlink()
    file = weights_file(folder / "decoder")
    weights, places = load_file(file), {}
    for number in (0, 1):
        part = {name: value for place, (name, value) in enumerate(sorted(weights.items())) if place % 2 == number}
        places |= dict.fromkeys(part, f"part-{number}.safetensors")
        save_file(part, file.with_name(f"part-{number}.safetensors"))
    file.unlink()
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": places}))
    both = tmp_path / "clip"
    import_karlo(variations).clip.save_pretrained(both)
    same(ours, import_karlo(folder, clip=both))


def test_half_precision_is_read(karlo: Path, parts: dict[str, Any], tmp_path: Path) -> None:
    pipe_of(copy.deepcopy(parts)).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "prior" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    whole, half = state_of(import_karlo(karlo)), state_of(import_karlo(tmp_path / "half"))
    for name, value in whole.items():
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], value, atol=1e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "stage", ["prior", "decoder", "text_proj", "super_res_first", "super_res_last", "text_encoder"]
)
def test_what_is_missing_or_left_over_is_named(karlo: Path, tmp_path: Path, stage: str) -> None:
    folder = copied(karlo, tmp_path)
    file = weights_file(folder / stage)
    weights = load_file(file)
    name = sorted(weights)[len(weights) // 2]
    for changed in (
        {key: value for key, value in weights.items() if key != name},
        {**weights, f"{name}.more": torch.zeros(3, 5, 7)},
    ):
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=name.removeprefix("text_model.")):
            import_karlo(folder)
    shutil.rmtree(folder / stage)
    with pytest.raises(CheckpointError, match=stage):
        import_karlo(folder)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("prior/config.json", "norm_in_type", "layer"),
        ("prior/config.json", "additional_embeddings", 3),
        ("decoder/config.json", "resnet_time_scale_shift", "default"),
        ("decoder/config.json", "norm_num_groups", 16),
        ("super_res_first/config.json", "norm_eps", 1e-3),
        ("super_res_last/config.json", "a_new_field", 1),
        ("text_proj/config.json", "time_embed_dim", 64),
        ("prior_scheduler/scheduler_config.json", "prediction_type", "epsilon"),
        ("decoder_scheduler/scheduler_config.json", "variance_type", "fixed_small_log"),
        ("super_res_scheduler/scheduler_config.json", "beta_schedule", "linear"),
        ("decoder/config.json", "block_out_channels", "many"),
        ("model_index.json", "_class_name", "StableDiffusionPipeline"),
        ("model_index.json", "safety_checker", ["stable_diffusion", "StableDiffusionSafetyChecker"]),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(
    karlo: Path, tmp_path: Path, file: str, field: str, value: Any
) -> None:
    folder = copied(karlo, tmp_path)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, field: value}))
    with pytest.raises(
        CheckpointError, match=f"{value if field == '_class_name' or value == 'many' else field}|{folder}"
    ):
        import_karlo(folder)


def test_changed_statistics_and_another_clip_are_seen(ours: Unclip, karlo: Path, tmp_path: Path) -> None:
    export_karlo(ours, tmp_path / "theirs")
    file = weights_file(tmp_path / "theirs" / "prior")
    weights = load_file(file)
    save_file({**weights, "clip_std": 2 * weights["clip_std"]}, file)
    again = import_karlo(tmp_path / "theirs")
    assert again.prior is not None and ours.prior is not None
    torch.testing.assert_close(again.prior.scaling.factor, ours.prior.scaling.factor / 2)
    save_file({**weights, "clip_std": 0 * weights["clip_std"]}, file)
    with pytest.raises(CheckpointError, match="clip_std"):
        import_karlo(tmp_path / "theirs")
    other = copy.deepcopy(ours.clip)
    other.text_projection.weight.data += 0.1
    other.save_pretrained(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="text_projection"):
        import_karlo(karlo, clip=tmp_path / "clip")


# --- diffusers of then and now


@pytest.mark.slow
def test_diffusers_of_then_and_now_run_what_we_export(ours: Unclip, tmp_path: Path) -> None:
    """0.37.1, the last that opens such folders, as it is; this one by `pipeline`."""
    folder, old = tmp_path / "theirs", FOLDER / "diffusers037"
    export_karlo(ours, folder)
    assert old.is_dir(), f"{old} is missing: run make setup"
    code = f"import sys, diffusers, numpy, torch\n{inspect.getsource(images_of)}\n" + (
        "for number, kind in enumerate(sys.argv[2:]):\n"
        "    numpy.save(f'{number}.npy', images_of(getattr(diffusers, kind).from_pretrained(sys.argv[1])))\n"
        "assert diffusers.__version__ == '0.37.1'\n"
    )
    command = [sys.executable, "-c", code, str(folder), *PIPELINES]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(old)}, cwd=tmp_path)
    for number, variation in enumerate((False, True)):
        now = images_of(pipeline(folder, variation=variation))
        assert now.shape == (1, 32, 32, 3) and now.std() > 0.05
        np.testing.assert_allclose(now, np.load(tmp_path / f"{number}.npy"), atol=1e-3)


def images_of(pipe):  # type: ignore[no-untyped-def]  # by another version, too
    given = {"prompt": "a red cat"} if hasattr(pipe, "prior") else {"image_embeddings": torch.ones(1, 16)}
    given.update(decoder_num_inference_steps=2, super_res_num_inference_steps=2, output_type="np")
    return pipe(**given, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("unit_length", lambda unclip: setattr(unclip.clip, "config", replace(unclip.clip.config, unit_length=True))),
        ("tokenizer", lambda unclip: setattr(unclip.clip, "tokenizer", None)),
        ("number of upsamplers", lambda unclip: setattr(unclip, "upsamplers", ())),
        ("prior's model.text", lambda unclip: told(unclip.prior.prior, text="clip_states")),
        ("decoder's model.text", lambda unclip: told(unclip.decoder.decoder, text="clip_states")),
        ("decoder's model.learned_variance", lambda unclip: told(unclip.decoder.decoder, learned_variance=False)),
        ("decoder's objective.predicts", lambda unclip: facts(unclip.decoder, predicts="v")),
        ("upsampler's objective.schedule", lambda unclip: facts(unclip.upsamplers[0], schedule="linear")),
        ("upsampler's objective.residual", lambda unclip: facts(unclip.upsamplers[0], residual=5.0)),
        ("prior's objective.schedule", lambda unclip: setattr(unclip.prior, "schedule_name", "linear")),
        ("prior's kind", lambda unclip: setattr(unclip.prior, "kind", "autoregressive")),
    ],
)
def test_what_diffusers_cannot_compute_is_not_exported(ours: Unclip, tmp_path: Path, words: str, change: Any) -> None:
    unclip = copy.deepcopy(ours)
    change(unclip)
    with pytest.raises(ConfigError, match=words):
        export_karlo(unclip, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def told(model: Any, **change: Any) -> None:
    model.config = replace(model.config, **change)


def facts(stage: Any, **change: Any) -> None:
    stage.facts = replace(stage.facts, **change)


# --- Kakao's checkpoints


def fused(state: dict[str, Tensor], names: list[str], entry: str) -> Tensor:
    """Rows of several matrices, head by head."""
    parts = [state[f"{name}.{entry}"].unflatten(0, (-1, 64)) for name in names]
    return torch.stack(parts, dim=1).flatten(0, 2)


def kakao_prior(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "proj_in": "clip_img_proj",
        "embedding_proj": "text_emb_proj", "encoder_hidden_states_proj": "text_enc_proj", "norm_out": "final_ln",
        "proj_to_clip_embeddings": "out_proj",
    }  # fmt: skip
    found = {"positional_embedding": state["positional_embedding"], "prd_emb": state["prd_embedding"]}
    for number in range(2):
        block, theirs = f"transformer_blocks.{number}", f"transformer.resblocks.{number}"
        names |= {f"{block}.norm1": f"{theirs}.ln_1", f"{block}.norm3": f"{theirs}.ln_2"}
        names |= {f"{block}.attn1.to_out.0": f"{theirs}.attn.c_proj"}
        names |= {f"{block}.ff.net.0.proj": f"{theirs}.mlp.c_fc", f"{block}.ff.net.2": f"{theirs}.mlp.c_proj"}
        for entry in ("weight", "bias"):
            qkv = [f"{block}.attn1.to_{part}" for part in "qkv"]
            found[f"{theirs}.attn.c_qkv.{entry}"] = fused(state, qkv, entry)
    return found | {
        f"{theirs}.{entry}": state[f"{name}.{entry}"] for name, theirs in names.items() for entry in ("weight", "bias")
    }


def kakao_unet(model: Any) -> dict[str, Tensor]:
    """By going through its blocks in order, as its constructor makes them."""
    places, attentions, number = {}, {}, 1
    for level, block in enumerate(model.down_blocks):
        here = f"down_blocks.{level}"
        for at in range(len(block.resnets)):
            places[f"{here}.resnets.{at}"] = f"input_blocks.{number}.0"
            attentions[f"{here}.attentions.{at}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            places[f"{here}.downsamplers.0"] = f"input_blocks.{number}.0"
            number += 1
    attends = [module is not None for module in getattr(model.mid_block, "attentions", [None])]
    places |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": f"middle_block.{1 + attends[0]}"}
    attentions["mid_block.attentions.0"] = "middle_block.1"
    number = 0
    for level, block in enumerate(model.up_blocks):
        here = f"up_blocks.{level}"
        for at in range(len(block.resnets)):
            places[f"{here}.resnets.{at}"] = f"output_blocks.{number}.0"
            attentions[f"{here}.attentions.{at}"] = f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers:
            places[f"{here}.upsamplers.0"] = f"output_blocks.{number - 1}.{1 + hasattr(block, 'attentions')}"
    leaves = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    names = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
    names |= {f"{place}.{leaf}": f"{theirs}.{leaves[leaf]}" for place, theirs in places.items() for leaf in leaves}
    names |= {f"{place}.group_norm": f"{theirs}.norm" for place, theirs in attentions.items()}
    state, found = model.state_dict(), {}
    for entry in ("weight", "bias"):
        found |= {
            f"{new}.{entry}": state[f"{name}.{entry}"] for name, new in names.items() if f"{name}.{entry}" in state
        }
        for place, theirs in attentions.items():
            if f"{place}.to_q.weight" in state:
                made = {
                    "qkv": fused(state, [f"{place}.to_{part}" for part in "qkv"], entry),
                    "encoder_kv": fused(state, [f"{place}.add_k_proj", f"{place}.add_v_proj"], entry),
                    "proj_out": state[f"{place}.to_out.0.{entry}"],
                }
                found |= {
                    f"{theirs}.{name}.{entry}": value[..., None] if entry == "weight" else value
                    for name, value in made.items()
                }
    return found


KAKAO_TEXT = {
    "encoder_hidden_states_proj": "text_seq_proj.0",
    "text_encoder_hidden_states_norm": "text_seq_proj.1",
    "clip_extra_context_tokens_proj": "clip_tok_proj",
    "embedding_proj": "text_feat_proj",
    "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
}


def test_kakaos_checkpoints_are_read(tmp_path: Path) -> None:
    """Of four resolutions and heads of 64, as Karlo's all are."""
    shape: dict[str, Any] = {"layers_per_block": 1, "block_out_channels": (64, 128, 192, 256)}
    kinds = ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3]
    networks: dict[str, Any] = {
        "prior": diffusers.PriorTransformer(2, 64, 2, 64, LENGTH),
        "decoder": diffusers.UNet2DConditionModel(
            sample_size=64, out_channels=6, in_channels=3, attention_head_dim=64, down_block_types=kinds,
            up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
            class_embed_type="identity", cross_attention_dim=32, **shape,
        ),
        "text_proj": UnCLIPTextProjModel(clip_embeddings_dim=64, time_embed_dim=256, cross_attention_dim=32),
        **{
            name: diffusers.UNet2DModel(
                sample_size=256, in_channels=6, out_channels=3, down_block_types=["ResnetDownsampleBlock2D"] * 4,
                up_block_types=["ResnetUpsampleBlock2D"] * 4, add_attention=False,
                layers_per_block=1, block_out_channels=(32, 64, 96, 128),
            )
            for name in ("super_res_first", "super_res_last")
        },
    }  # fmt: skip
    for seed, model in enumerate(networks.values()):
        random_weights(model, seed)
    folder = tmp_path / "kakao"
    prior = {name: value.detach() for name, value in networks["prior"].state_dict().items()}
    of_text = networks["text_proj"].state_dict()
    decoder = kakao_unet(networks["decoder"]) | {"cf_param": of_text["learned_classifier_free_guidance_embeddings"]}
    decoder |= {
        f"{new}.{entry}": of_text[f"{name}.{entry}"] for name, new in KAKAO_TEXT.items() for entry in ("weight", "bias")
    }
    upsamplers = {
        f"model_{which}.{name}": value
        for which, place in (("first_steps", "super_res_first"), ("last_step", "super_res_last"))
        for name, value in kakao_unet(networks[place]).items()
    }
    folder.mkdir()
    for name, state in (
        (
            "prior-ckpt-step=01000000-of-01000000.ckpt",
            {f"model.{key}": value for key, value in kakao_prior(prior).items()},
        ),
        ("decoder-ckpt-step=01000000-of-01000000.ckpt", {f"model.{key}": value for key, value in decoder.items()}),
        ("improved-sr-ckpt-step=1.2M.ckpt", upsamplers),
    ):
        torch.save({"state_dict": state, "epoch": 3, "callbacks": {}}, folder / name)
    torch.save((prior["clip_mean"][0], prior["clip_std"][0]), folder / "ViT-L-14_stats.th")
    pieces = BytePairs(MERGES)
    pieces.save(tmp_path / "merges.txt")
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress((tmp_path / "merges.txt").read_bytes()))
    shape_of_clip = ClipConfig(
        embed_dim=64, image_size=16, patch_size=8, vision_width=64, vision_depth=1, vision_heads=1, text_width=64,
        text_depth=1, text_heads=1, text_len=LENGTH, text_vocab=pieces.vocab_size + 2,
    )  # fmt: skip
    clip = Clip(shape_of_clip)
    torch.save(to_openai(clip.state_dict(), clip.config), folder / "ViT-L-14.pt")
    ours = import_karlo(folder)
    assert ours.prior is not None and ours.prior.sampling == PriorSampling(
        "ddpm", "25", guidance=4.0, bound=5.0, best_of=1
    )
    assert ours.decoder.facts.sampling.guidance == 8 and ours.upsamplers[0].facts.sampling.steps == "7"
    tokens = ours.clip.tokens(["cat"])
    torch.testing.assert_close(ours.clip.embed_texts(["cat"]), clip.eval().embed_texts(tokens, normalize=False))
    export_karlo(ours, tmp_path / "theirs")
    for name, model in networks.items():
        wanted, found = (
            model.state_dict(),
            load_file(tmp_path / "theirs" / name / "diffusion_pytorch_model.safetensors"),
        )
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            assert torch.equal(found[key], value) or key == "clip_std", f"{name}: {key}"
        again = json.loads((tmp_path / "theirs" / name / "config.json").read_text())
        plain = json.loads(json.dumps(model.config))
        assert {key: again[key] for key, value in plain.items() if key[0] != "_" and again[key] != value} == {}
    file = next(folder.glob("prior-ckpt*"))
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["state_dict"]["model.transformer.resblocks.1.ln_2.bias"]
    torch.save(checkpoint, file)
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.norm3\.bias"):
        import_karlo(folder)
    (folder / "ViT-L-14_stats.th").unlink()
    with pytest.raises(CheckpointError, match="ViT-L-14_stats"):
        import_karlo(folder)
    next(folder.glob("decoder-ckpt*")).unlink()
    with pytest.raises(CheckpointError, match="decoder-ckpt"):
        import_karlo(folder)


def test_every_name_of_karlo_is_known(tmp_path: Path) -> None:
    """Its real shapes, without memory."""
    shape: dict[str, Any] = {"layers_per_block": 3, "block_out_channels": (320, 640, 960, 1280)}
    kinds = ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3]
    with torch.device("meta"):
        prior = diffusers.PriorTransformer()
        decoder = diffusers.UNet2DConditionModel(
            sample_size=64, out_channels=6, in_channels=3, attention_head_dim=64, down_block_types=kinds,
            up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)], cross_attention_dim=1536,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
            class_embed_type="identity", **shape,
        )  # fmt: skip
        text_proj = UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536)
        upsampler = diffusers.UNet2DModel(
            sample_size=256, in_channels=6, out_channels=3, down_block_types=["ResnetDownsampleBlock2D"] * 4,
            up_block_types=["ResnetUpsampleBlock2D"] * 4, add_attention=False, **shape,
        )  # fmt: skip
        common: dict[str, Any] = {
            "text": "karlo",
            "text_len": 77,
            "embed_dim": 768,
            "text_width": 768,
            "mask_padding": True,
        }
        ours = DiffusionPrior(PriorConfig(2048, 20, 32, **common))
        images = UnclipDecoder(DecoderConfig(channels=320, context_width=1536, **common))
        small = Upsampler(UpsamplerConfig(learned_variance=False, scale_shift=False))
        found = to_prior_transformer(ours.state_dict(), 20) | dict.fromkeys(
            ("clip_mean", "clip_std"), torch.empty(1, 768)
        )
        of_images = to_decoder(images.state_dict(), 4)
    theirs = {f"decoder.{key}": value for key, value in decoder.state_dict().items()}
    theirs |= {f"text_proj.{key}": value for key, value in text_proj.state_dict().items()}
    for mine, other in (
        (found, prior.state_dict()), (of_images, theirs), (small.unet.state_dict(), upsampler.state_dict())
    ):  # fmt: skip
        assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in other.items()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == pytest.approx(1.02e9, rel=0.01)


# --- fine-tuning


def test_what_is_imported_is_trained(ours: Unclip, data: Path, tmp_path: Path) -> None:
    """An update of prior and decoder, half of the captions dropped; of cached raw embeddings and states."""
    assert ours.prior is not None
    folder = shutil.copytree(data, tmp_path / "data")
    ours.clip.save_pretrained(tmp_path / "clip")
    cache_embeddings(ours.clip, folder, views=2, text_states=True)
    given: dict[str, Any] = {"data": str(folder), "clip": str(tmp_path / "clip"), "run_dir": str(tmp_path / "run")}
    given["loader"] = LoaderConfig(workers=0)
    objective = PriorObjective(embeddings="standardized", text_drop=0.5)
    drops = DecoderObjective(text_drop=0.5)
    tasks = [
        (PriorTask(PriorRun(**given, model=ours.prior.prior.config, objective=objective)), ours.prior.prior),
        (DecoderTask(DecoderRun(**given, model=ours.decoder.decoder.config, objective=drops)), ours.decoder.decoder),
    ]
    for task, imported in tasks:
        model = task.build_model().train()
        model.load_state_dict(imported.state_dict())
        loader = BatchLoader(task.samples("train"), seed=0, batch_size=8, micro_batch=8, rank=0, world_size=1)
        raw = next(iter(loader))
        assert all((raw[f"{name}_embedding"].norm(dim=1) - 1).abs().min() > 0.1 for name in ("text", "image"))
        batch = task.prepare(raw)
        loss, metrics = task.loss(model, batch, 0)
        loss.backward()
        torch.optim.SGD(model.parameters(), 1e-3).step()
        after, _ = task.loss(model, batch, 0)
        assert (
            float(after) < float(loss) and 0 < float(metrics["dropped" if "dropped" in metrics else "text_dropped"]) < 1
        )
        task.pipeline(model.eval()).save_pretrained(tmp_path / task.name)
        # All dropped: whatever captions say, they are "".
        task.run = replace(task.run, objective=replace(task.run.objective, text_drop=1 - 1e-9))
        with torch.no_grad():
            of_other = {**batch, "text": batch["text"].flip(0), "text_embedding": batch["text_embedding"].flip(0)}
            assert torch.equal(task.loss(model, batch, 0)[0], task.loss(model, of_other, 0)[0])
    together = Unclip.from_runs(tmp_path / "decoder", tmp_path / "prior", clip=tmp_path / "clip")
    assert together.generate("a red cat")[0][0].size == (16, 16)
    length = together.embed(["a red cat"]).norm()
    assert abs(float(length) - 1) > 0.1


def test_what_is_fine_tuned_samples_as_before(ours: Unclip, data: Path, tmp_path: Path) -> None:
    """By `--init`: the prior's settings, and the network of the upsampler's last step, go on."""
    assert ours.prior is not None
    ours.save_pretrained(tmp_path / "ours")
    given: dict[str, Any] = {"data": str(data), "run_dir": str(tmp_path / "run")}
    objective = PriorObjective(embeddings="standardized")
    model, init = ours.prior.prior.config, str(tmp_path / "ours" / "prior")
    run = PriorRun(**given, clip=str(tmp_path / "ours" / "clip"), init=init, model=model, objective=objective)
    found = PriorTask(run).pipeline(ours.prior.prior).sampling
    assert found == ours.prior.sampling and found.guidance != 1
    stage, init = ours.upsamplers[0], str(tmp_path / "ours" / "upsampler_1")
    noise = UpsamplerObjective(schedule="cosine", predicts="epsilon")
    task = UpsamplerTask(UpsamplerRun(**given, init=init, model=stage.upsampler.config, objective=noise))
    last = task.pipeline(stage.upsampler).last
    assert last is not None and stage.last is not None
    assert all(torch.equal(last.state_dict()[name], value) for name, value in stage.last.state_dict().items())


@pytest.mark.parametrize(("text", "unit"), [("karlo", True), ("clip_states", False)])
def test_length_and_model_go_together(ours: Unclip, data: Path, tmp_path: Path, text: Any, unit: bool) -> None:
    assert ours.prior is not None
    clip = copy.deepcopy(ours.clip)
    clip.config = replace(clip.config, unit_length=unit)
    clip.save_pretrained(tmp_path / "clip")
    model = replace(ours.prior.prior.config, text=text)
    with pytest.raises(ConfigError, match=r"model\.unit_length"):
        PriorTask(PriorRun(data=str(data), clip=str(tmp_path / "clip"), model=model))


def test_from_the_command_line(karlo: Path, ours: Unclip, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def run(launcher: str, *arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", [launcher, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "launchers" / launcher), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, capsys.readouterr().err
        return str(capsys.readouterr().out)

    ours.clip.save_pretrained(tmp_path / "clip")
    assert "--clip" in run("import_unclip.py", "--from", karlo, "--out", tmp_path / "text-only")
    run("import_unclip.py", "--from", karlo, "--out", tmp_path / "ours", "--clip", tmp_path / "clip")
    same(ours, Unclip.from_pretrained(tmp_path / "ours"))
    write_card(tmp_path / "ours" / "prior", "prior", {"Data": "ten images"})
    (tmp_path / "ours" / "notes").mkdir()
    (tmp_path / "ours" / "notes" / "README.md").write_text("## Data\n\nnot of the model")
    run("export_unclip.py", "--model", tmp_path / "ours", "--out", tmp_path / "ours")
    assert "ten images" in (tmp_path / "ours" / "prior" / "README.md").read_text()
    run("export_unclip.py", "--format", "diffusers", "--model", tmp_path / "ours", "--out", tmp_path / "theirs")
    same(ours, import_karlo(tmp_path / "theirs"))
    card = ModelCard.load(tmp_path / "theirs" / "README.md")
    assert card.data.library_name == "diffusers" and "## prior\n\n### Data\n\nten images" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(tmp_path / "theirs")
    found: dict[str, Any] = {}
    exec(code, found)
    assert len(found["images"]) == 1
