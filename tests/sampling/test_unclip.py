"""Image diffusion and the unCLIP pipeline."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from torch import Tensor

from dalle_ds.config import ClipConfig, DecoderConfig, ImageSampling, PriorConfig, UpsamplerConfig
from dalle_ds.diffusion import noise_schedule, step_grid
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models import Clip, DiffusionPrior, UnclipDecoder, Upsampler
from dalle_ds.models.latents import EmbeddingScaling
from dalle_ds.models.upsampler import enlarge
from dalle_ds.sampling import Unclip, UnclipSampling
from dalle_ds.sampling.codes import Sampling
from dalle_ds.sampling.command import GenerateOptions, generate_to_file
from dalle_ds.sampling.embedding_to_image import EmbeddingToImage
from dalle_ds.sampling.image_diffusion import DiffusionFacts, denoise_images, image_generators
from dalle_ds.sampling.super_resolution import SuperResolution, _starts
from dalle_ds.sampling.text_to_embedding import DiffusionTextToEmbedding
from dalle_ds.sampling.unclip import Residents
from dalle_ds.text.clip_tokenizer import ClipTokenizer
from dalle_ds.text.tokenizer import Tokenizer
from tests.models.test_decoder import fill

CPU = torch.device("cpu")
# Of ε, what is clean is a difference of large numbers at first: random weights make other images of rounding.
FACTS = DiffusionFacts("cosine", 100, "v", ImageSampling(steps="4"))
CAPTIONS = ["a red circle", "a blue square", "a black triangle"]


# --- the loop


def toy(x: Tensor, timestep: int) -> Tensor:
    """Some function of what a model is told, with variance channels."""
    epsilon = torch.tanh(x + 0.01 * timestep)
    return torch.cat([epsilon, torch.cos(3 * x)], dim=1)


def noises(count: int, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ancestral_steps_with_learned_variance_are_diffusers(steps: int) -> None:
    shape, (first, *rest) = (3, 4, 4), noises(steps + 1, (3, 4, 4), 3)
    facts = dataclasses.replace(FACTS, timesteps=1000, predicts="epsilon")
    how = ImageSampling(steps=str(steps), threshold="static")
    found = denoise_images(toy, shape, [torch.Generator().manual_seed(3)], facts, how, CPU)
    theirs = DDPMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", variance_type="learned_range", timestep_spacing="linspace",
        clip_sample=True,
    )  # fmt: skip
    grid = step_grid(str(steps), 1000)
    if steps > 1:
        theirs.set_timesteps(steps)
        assert theirs.timesteps.tolist() == grid[::-1]
    schedule = noise_schedule("cosine", 1000).on(grid)
    x, drawn = first[None], iter(rest)
    for step in reversed(range(steps)):
        output = toy(x, grid[step])
        if steps == 1:
            a = float(schedule.alpha_bars[0])
            x = ((x - (1 - a) ** 0.5 * output[:, :3]) / a**0.5).clamp(-1, 1)
            break
        # theirs draws its noise itself; its mean is compared, and ours is added to it
        at = theirs.timesteps[steps - 1 - step]
        pair = [theirs.step(output, at, x, generator=torch.Generator().manual_seed(9)).prev_sample for _ in range(2)]
        own = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
        assert torch.equal(*pair)
        if step:
            deviation = (theirs._get_variance(int(at), predicted_variance=output[:, 3:]) * 0.5).exp()
            x = pair[0] - deviation * own + deviation * next(drawn)[None]
        else:
            x = pair[0]
    torch.testing.assert_close(found, x.clamp(-1, 1), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("predicts", ["epsilon", "v"])
def test_ddim_is_diffusers(predicts: Any) -> None:
    """On a "leading" grid, the one of theirs whose previous step is right."""
    facts = dataclasses.replace(FACTS, timesteps=1000, predicts=predicts, schedule="linear")
    how = ImageSampling("ddim", "strided 20", threshold="static")
    found = denoise_images(
        lambda x, t: toy(x, t)[:, :3], (3, 4, 4), [torch.Generator().manual_seed(3)], facts, how, CPU
    )
    theirs = DDIMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, timestep_spacing="leading", set_alpha_to_one=True, clip_sample=True,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[predicts],
    )  # fmt: skip
    theirs.set_timesteps(20)
    x = noises(1, (3, 4, 4), 3)[0][None]
    for at in theirs.timesteps:
        x = theirs.step(toy(x, int(at))[:, :3], at, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(found, x.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_dynamic_thresholding_keeps_contrast_and_none_keeps_values() -> None:
    found = {}
    for threshold in ("static", "dynamic", "none"):
        how = ImageSampling("ddim", "3", threshold=threshold)  # type: ignore[arg-type]
        seen: list[Tensor] = []

        def predict(x: Tensor, timestep: int, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return torch.full_like(x, 4.0)

        facts = dataclasses.replace(FACTS, predicts="x0")
        denoise_images(predict, (3, 4, 4), [torch.Generator().manual_seed(0)], facts, how, CPU)
        found[threshold] = seen[1]
    assert not torch.equal(found["none"], found["static"])
    # All values alike lie at their quantile: both kinds of thresholds make 1 of them.
    torch.testing.assert_close(found["dynamic"], found["static"])


def test_learned_variance_is_bounded() -> None:
    """DALLE2-pytorch's fraction is not, and gave NaN (issues 138, 311)."""
    for raw in (1e4, -1e4):
        out = denoise_images(
            lambda x, t, raw=raw: torch.cat([x * 0.1, torch.full_like(x, raw)], 1), (3, 4, 4),
            [torch.Generator().manual_seed(0)], FACTS, ImageSampling(steps="10"), CPU,
        )  # fmt: skip
        assert bool(out.isfinite().all())


# --- stages


@pytest.fixture(scope="module")
def clip(tokenizer_file: Path) -> Clip:
    torch.manual_seed(0)
    shape = ClipConfig(
        embed_dim=16, image_size=16, patch_size=8, vision_width=16, vision_depth=1, vision_heads=2, text_width=16,
        text_depth=1, text_heads=2, text_len=12, text_vocab=600,
    )  # fmt: skip
    return Clip(shape, tokenizer=ClipTokenizer.load(tokenizer_file, start=shape.start, end=shape.end)).eval()


def decoder_stage(clip: Clip, tokenizer_file: Path, text: Any = "tokens") -> EmbeddingToImage:
    config = DecoderConfig(
        image_size=16, channels=32, depth=1, multiples=(1, 2), dropout=0.0, attention=(8,), head_channels=32, embed_dim=16,
        context_width=16, text=text, text_len=12, text_vocab=600, text_depth=1, text_heads=2, text_width=16,
        mask_padding=text == "clip_states",
    )  # fmt: skip
    torch.manual_seed(1)
    decoder = UnclipDecoder(config).eval()
    fill(decoder)
    tokenizer = Tokenizer.load(tokenizer_file) if text == "tokens" else None
    return EmbeddingToImage(decoder, tokenizer, clip if text == "clip_states" else None, clip.fingerprint, FACTS)


def upsampler_stage(low: int = 16, scale: int = 2, **change: Any) -> SuperResolution:
    torch.manual_seed(2)
    config = UpsamplerConfig(low * scale, 32, 1, (1, 2), 0.0, low_size=low)
    model = Upsampler(dataclasses.replace(config, **change)).eval()
    fill(model)
    return SuperResolution(model, dataclasses.replace(FACTS, sampling=ImageSampling("ddim", "3")))


@pytest.fixture(scope="module")
def pipe(clip: Clip, tokenizer_file: Path) -> Unclip:
    torch.manual_seed(3)
    prior = DiffusionPrior(PriorConfig(width=16, depth=1, heads=2, text_len=12, embed_dim=16, text_vocab=600)).eval()
    scaling = EmbeddingScaling.constant(16, 4.0)
    first = DiffusionTextToEmbedding(prior, clip, Tokenizer.load(tokenizer_file), scaling, "cosine", 20)
    return Unclip(clip, decoder_stage(clip, tokenizer_file), first, [upsampler_stage(), upsampler_stage(32)])


@pytest.mark.parametrize("text", ["tokens", "clip_states"])
def test_guidance_1_is_none_to_the_bit_and_the_variance_is_not_guided(
    clip: Clip, tokenizer_file: Path, text: Any
) -> None:
    stage = decoder_stage(clip, tokenizer_file, text)
    embeddings = F.normalize(torch.randn(3, 16), dim=1)
    calls: list[int] = []
    hook = stage.decoder.unet.register_forward_hook(lambda *given: calls.append(len(given[1][0])))
    plain = stage.sample(CAPTIONS, embeddings)
    assert calls == [3] * 4
    calls.clear()
    assert torch.equal(stage.sample(CAPTIONS, embeddings, sampling=ImageSampling(steps="4", guidance=1.0)), plain)
    guided = stage.sample(CAPTIONS, embeddings, sampling=ImageSampling(steps="4", guidance=3.0))
    assert calls[4:] == [6] * 4 and (guided - plain).abs().max() > 1e-3
    hook.remove()
    # By hand, the first step: prediction guided, variance the conditional one's.
    condition, null = stage.condition(CAPTIONS, embeddings), stage.condition(CAPTIONS, None, False)
    x = torch.randn(3, 3, 16, 16)
    steps = torch.full((3,), 50)
    with torch.no_grad():
        c, n = (stage.decoder.denoise(x, steps, each) for each in (condition, null))
    from dalle_ds.diffusion import guide

    mixed = guide(c, n, 3.0, channels=3)
    torch.testing.assert_close(mixed[:, :3], n[:, :3] + 3 * (c[:, :3] - n[:, :3]))
    assert torch.equal(mixed[:, 3:], c[:, 3:])


def test_what_is_left_out_does_not_matter(clip: Clip, tokenizer_file: Path) -> None:
    stage = decoder_stage(clip, tokenizer_file)
    embeddings = F.normalize(torch.randn(3, 16), dim=1)
    generators = {"seed": 1, "numbers": [4, 5, 6]}
    one = stage.sample(CAPTIONS, embeddings, read_captions=False, **generators)
    x = image_generators("decoder", CAPTIONS, 1, [4, 5, 6])
    assert all(
        torch.equal(torch.randn(3, generator=a), torch.randn(3, generator=b))
        for a, b in zip(x, image_generators("decoder", CAPTIONS, 1, [4, 5, 6]), strict=True)
    )
    condition = stage.condition(["other", "words", "here"], embeddings, False)
    for a, b in zip(condition[:2], stage.condition(CAPTIONS, embeddings, False)[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert (stage.sample(CAPTIONS, embeddings, **generators) - one).abs().max() > 1e-3
    assert (stage.sample(CAPTIONS, None, **generators) - one).abs().max() > 1e-3
    with pytest.raises(DataError):
        stage.sample(CAPTIONS, embeddings[:2])


def test_tiles_cover_and_a_plain_function_is_the_same_by_tiles() -> None:
    """Of a model that sees each pixel by itself, tiles change nothing but rounding."""
    for side, tile in ((64, 32), (96, 32), (100, 32), (1024, 256), (32, 32)):
        starts = _starts(side // 4 * 4, tile, 4)
        assert starts[0] == 0 and starts[-1] == max(0, side // 4 * 4 - tile) and all(start % 4 == 0 for start in starts)
        assert all(b - a <= tile * 3 // 4 for a, b in itertools.pairwise(starts))
    stage = upsampler_stage()
    stage.upsampler.forward = lambda x, steps, low, **_: torch.tanh(x) * 0.5 + 0.1  # type: ignore[method-assign]
    low = torch.rand(1, 3, 32, 48)
    whole, parts = (stage.sample(low, ["a"], tile=tile) for tile in (None, 32))
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="tile"):
        stage.sample(low, ["a"], tile=31)


def test_tiles_of_a_real_model_are_near_the_whole() -> None:
    stage, low = upsampler_stage(), F.interpolate(torch.rand(1, 3, 8, 8), (48, 48), mode="bicubic").clamp(0, 1)
    whole, parts = (stage.sample(low, ["a"], tile=tile) for tile in (None, 64))
    other = stage.sample(low, ["a"], seed=1)
    assert (parts - whole).abs().mean() < 0.25 * (other - whole).abs().mean()


def test_noise_is_added_to_the_small_image_where_it_is_told() -> None:
    low = torch.rand(1, 3, 16, 16)
    stage = upsampler_stage(noise_augmentation=True)
    stage.facts = dataclasses.replace(stage.facts, noise_share=0.5)
    how = dataclasses.replace(stage.facts.sampling, noise=0.3)
    assert (stage.sample(low, ["a"], sampling=how) - stage.sample(low, ["a"])).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"objective\.noise"):
        stage.sample(low, ["a"], sampling=dataclasses.replace(how, noise=0.6))
    with pytest.raises(ConfigError, match="noise_augmentation"):
        upsampler_stage().sample(low, ["a"], sampling=how)
    with pytest.raises(ConfigError, match="guidance"):
        stage.sample(low, ["a"], sampling=ImageSampling(guidance=2.0))


@pytest.mark.parametrize("predicts", ["epsilon", "x0", "v"])
def test_of_a_difference_that_is_known_the_true_image_is_made(predicts: Any) -> None:
    """A model that knows the image, of which it tells the difference from the enlarged small one."""
    true = torch.rand(1, 3, 32, 32)
    low = F.avg_pool2d(true, 2)
    stage = upsampler_stage(learned_variance=False)
    base = enlarge(low * 2 - 1, 2)
    facts = dataclasses.replace(stage.facts, predicts=predicts, residual=5.0)
    schedule = facts.noise

    def knows(x: Tensor, steps: Tensor, low: Tensor, **_: Any) -> Tensor:
        step = int(steps[0])
        rest = 5 * (true * 2 - 1 - base)
        return schedule.target(predicts, rest, schedule.epsilon_of(rest, x, step), step)

    stage.upsampler.forward = knows  # type: ignore[method-assign, assignment]
    found = SuperResolution(stage.upsampler, facts).sample(low, ["a"])
    torch.testing.assert_close(found, true, atol=1e-4, rtol=0)


# --- the pipeline


def test_an_image_depends_on_its_seed_number_and_caption_alone(pipe: Unclip) -> None:
    told: list[tuple[str, int, int]] = []
    images = pipe.generate(CAPTIONS, 2, seed=5, on_stage=lambda *what: told.append(what))
    assert [len(row) for row in images] == [2, 2, 2] and images[0][0].size == (64, 64)
    alone = pipe.generate(CAPTIONS[1], 1, seed=5)[0][0]
    difference = torch.tensor(list(alone.tobytes())).float() - torch.tensor(list(images[1][0].tobytes())).float()
    assert difference.abs().max() <= 1
    assert images[1][0].tobytes() != images[1][1].tobytes() != pipe.generate(CAPTIONS[1], 2, seed=6)[0][1].tobytes()
    stages = [stage for stage, *_ in told]
    assert list(dict.fromkeys(stages)) == ["prior", "decoder", "upsampler_1", "upsampler_2"]
    for stage in set(stages):
        done, total = [what[1:] for what in told if what[0] == stage][-1]
        assert done == total > 0


def test_stages_may_be_absent(pipe: Unclip, clip: Clip) -> None:
    without = Unclip(clip, pipe.decoder)
    torch.testing.assert_close(without.embed(CAPTIONS, 2)[:, 1], clip.embed_texts(CAPTIONS))
    assert without.generate(CAPTIONS[0])[0][0].size == (16, 16) and without.image_size == 16
    assert pipe.image_size == 64


def test_settings_reach_their_stages(pipe: Unclip) -> None:
    calls: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
        for name, module in (("decoder", pipe.decoder.decoder.unet), ("first", pipe.upsamplers[0].upsampler),
                             ("second", pipe.upsamplers[1].upsampler))
    ]  # fmt: skip
    how = UnclipSampling(decoder=ImageSampling(steps="5"), upsamplers=(ImageSampling("ddim", "2"),))
    pipe.generate(CAPTIONS[0], sampling=how)
    assert calls == {"decoder": 5, "first": 2, "second": 3}
    for hook in hooks:
        hook.remove()


def test_images_are_ranked(pipe: Unclip, clip: Clip) -> None:
    def brightness(prompt: str, images: list[Image.Image]) -> list[float]:
        return [float(torch.tensor(list(image.tobytes())).float().mean()) for image in images]

    plain = pipe.generate(CAPTIONS[0], 4, seed=1)[0]
    best = pipe.generate(CAPTIONS[0], 4, seed=1, rerank=brightness, keep=2)[0]
    order = sorted(plain, key=lambda image: -brightness("", [image])[0])
    assert [image.tobytes() for image in best] == [image.tobytes() for image in order[:2]]
    assert len(pipe.generate(CAPTIONS[0], 2, rerank=clip)[0]) == 2
    for arguments in ({"keep": 2}, {"num": 2, "keep": 3, "rerank": brightness}, {"num": 0}):
        with pytest.raises(ConfigError):
            pipe.generate(CAPTIONS[0], **arguments)
    with pytest.raises(DataError):
        pipe.generate([])


def test_a_folder_has_all_of_it(pipe: Unclip, tmp_path: Path) -> None:
    folder = tmp_path / "unclip"
    pipe.save_pretrained(folder)
    assert not (folder / "prior" / "clip").exists()
    again = Unclip.from_pretrained(folder)
    wanted = pipe.generate(CAPTIONS[0], seed=2)[0][0].tobytes()
    assert again.generate(CAPTIONS[0], seed=2)[0][0].tobytes() == wanted
    half = Unclip.from_pretrained(folder, dtype=torch.bfloat16).generate(CAPTIONS[0], seed=2)
    assert half[0][0].size == (64, 64)
    (folder / "unclip.json").write_text(json.dumps({"clip": "other", "stages": ["decoder"]}))
    with pytest.raises(CheckpointError, match="clip"):
        Unclip.from_pretrained(folder)
    (folder / "unclip.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"unclip\.json"):
        Unclip.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"unclip\.json"):
        Unclip.from_pretrained(tmp_path)


def test_stages_are_put_together_from_runs(pipe: Unclip, clip: Clip, tmp_path: Path) -> None:
    assert pipe.prior is not None
    pipe.prior.save_pretrained(tmp_path / "prior")
    pipe.decoder.save_pretrained(tmp_path / "decoder")
    for number, stage in enumerate(pipe.upsamplers):
        stage.save_pretrained(tmp_path / f"up{number}")
    clip.save_pretrained(tmp_path / "clip")
    ups = [tmp_path / "up0", tmp_path / "up1"]
    whole = Unclip.from_runs(tmp_path / "decoder", tmp_path / "prior", ups)
    wanted = pipe.generate(CAPTIONS[0], seed=2)[0][0].tobytes()
    assert whole.generate(CAPTIONS[0], seed=2)[0][0].tobytes() == wanted
    assert Unclip.from_runs(tmp_path / "decoder", clip=tmp_path / "clip").prior is None
    with pytest.raises(ConfigError, match="CLIP"):
        Unclip.from_runs(tmp_path / "decoder")
    with pytest.raises(CheckpointError, match="upsampler 1"):
        Unclip.from_runs(tmp_path / "decoder", tmp_path / "prior", ups[::-1])
    other = Clip(clip.config, tokenizer=clip.tokenizer).eval()
    with pytest.raises(CheckpointError, match="decoder"):
        Unclip(other, pipe.decoder)


def test_stages_take_turns_under_a_bound() -> None:
    class Stage:
        where = "cpu"

        def to(self, device: torch.device) -> None:
            self.where = device.type

    a, b, c = Stage(), Stage(), Stage()
    residents = Residents(torch.device("cuda"), 10)
    residents.bring((a, 4))
    residents.bring((b, 5))
    assert [s.where for s in (a, b, c)] == ["cuda", "cuda", "cpu"]
    residents.bring((a, 4))
    residents.bring((c, 3))  # b was used longest ago
    assert [s.where for s in (a, b, c)] == ["cuda", "cpu", "cuda"]
    residents.bring((b, 10))
    assert [s.where for s in (a, b, c)] == ["cpu", "cuda", "cpu"]
    with pytest.raises(ConfigError, match="max_memory"):
        residents.bring((a, 11))


def test_a_bound_changes_no_image(pipe: Unclip, clip: Clip) -> None:
    bounded = Unclip(clip, pipe.decoder, pipe.prior, pipe.upsamplers, max_memory=2**30)
    wanted = pipe.generate(CAPTIONS[0], seed=2)[0][0].tobytes()
    assert bounded.generate(CAPTIONS[0], seed=2)[0][0].tobytes() == wanted
    with pytest.raises(ConfigError, match="max_memory"):
        Unclip(clip, pipe.decoder, max_memory=1000).generate(CAPTIONS[0])


# --- the command


def test_the_command_takes_it_like_a_dalle(pipe: Unclip, clip: Clip, tmp_path: Path, capsys: Any) -> None:
    pipe.save_pretrained(tmp_path / "unclip")
    clip.save_pretrained(tmp_path / "clip")
    from dalle_ds.sampling.unclip_options import UnclipOptions

    given = GenerateOptions(
        model=str(tmp_path / "unclip"), out=str(tmp_path / "sheet.png"), prompt=tuple(CAPTIONS), num=2, dtype="fp32",
        unclip=UnclipOptions(decoder_steps="3", decoder_guidance=2.0, upsampler_steps=("2", "2"), prior_steps="3", tile=32),
        rerank=str(tmp_path / "clip"), keep=1,
    )  # fmt: skip
    assert generate_to_file(given) == [tmp_path / "sheet.png"]
    assert Image.open(tmp_path / "sheet.png").height > 3 * 64
    folder = dataclasses.replace(given, out=str(tmp_path / "images"), rerank=None, keep=None)
    generate_to_file(folder)
    assert len(list((tmp_path / "images").glob("*.png"))) == 6
    for change, words in (
        ({"init_image": "x.png"}, "init_image"),
        ({"sampling": Sampling(temperature=0.5)}, "temperature"),
        ({"unclip": UnclipOptions(upsampler_steps=("1", "1", "1"))}, "upsampler_steps"),
        ({"device": "auto"}, "device"),
        ({"sampling": Sampling(guidance=2.0)}, "decoder_guidance"),
        ({"unclip": UnclipOptions(tile=17)}, "tile"),
        ({"unclip": UnclipOptions(upsampler_steps=("3", "5000"))}, "step grid"),
    ):
        with pytest.raises(ConfigError, match=words):
            generate_to_file(dataclasses.replace(given, **change))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="decoder_steps"):
        UnclipOptions(decoder_steps="3").refuse_all("some")
