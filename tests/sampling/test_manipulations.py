"""Images changed through their latents."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_ds.commands import generate
from dalle_ds.config import ImageSampling
from dalle_ds.data.embeddings import cache_embeddings
from dalle_ds.diffusion import noise_schedule
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models.latents import EmbeddingMoments
from dalle_ds.sampling import Unclip
from dalle_ds.sampling.image_diffusion import (
    MIN_ALPHA_BAR,
    DiffusionFacts,
    Known,
    denoise_images,
    invert_images,
    invertible_grid,
)
from dalle_ds.sampling.latent import (
    BipartiteLatent,
    component_counts,
    interpolate,
    reduce_components,
    slerp,
    text_diff,
)
from dalle_ds.sampling.manipulation_command import SUBCOMMANDS, write_film
from dalle_ds.sampling.manipulations import pixels_of, shrink_to, typography, write_on
from tests.conftest import ROOT
from tests.sampling.test_unclip import clip, pipe  # noqa: F401

CPU = torch.device("cpu")
FACTS = DiffusionFacts("cosine", 1000, "v", ImageSampling("ddim", "20", threshold="none"))


def image(seed: int, side: int = 80) -> Image.Image:
    """A smooth one."""
    small = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(small, (side, side), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    return Image.fromarray((pixels * 255).byte().numpy())


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


# --- the loop


def gaussian(bars: Tensor, centre: Tensor) -> object:
    """v of data that is N(centre, 0.3²): known in closed form, and smooth."""

    def predict(x: Tensor, timestep: int) -> Tensor:
        a = float(bars[timestep])
        x0 = centre + 0.09 * a**0.5 / (0.09 * a + 1 - a) * (x - a**0.5 * centre)
        epsilon = (x - a**0.5 * x0) / (1 - a) ** 0.5
        return a**0.5 * epsilon - (1 - a) ** 0.5 * x0

    return predict


@pytest.mark.parametrize("residual", [0.0, 2.0])
def test_inversion_comes_back_and_better_with_more_steps_and_with_corrections(residual: float) -> None:
    facts = dataclasses.replace(FACTS, residual=residual)
    predict = gaussian(noise_schedule("cosine").alpha_bars, torch.linspace(-0.5, 0.5, 16).view(1, 1, 4, 4))
    images = 0.4 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    base = 0.1 * torch.ones(2, 3, 4, 4) if residual else None

    def error(steps: str, iterations: int) -> float:
        start = invert_images(predict, images, facts, steps, iterations, base)  # type: ignore[arg-type]
        how = dataclasses.replace(facts.sampling, steps=steps)
        back = denoise_images(predict, (3, 4, 4), [], facts, how, CPU, base, start=start)  # type: ignore[arg-type]
        return float((back - images).abs().max())

    coarse, fine, corrected = error("10", 0), error("100", 0), error("10", 5)
    assert fine < coarse / 4 and corrected < coarse / 50


def test_of_one_gaussian_inversion_finds_the_noise_that_the_flow_carries_there() -> None:
    """The probability flow maps N(0, σ²) to N(0, ᾱ σ² + 1 − ᾱ) by a factor."""
    bars = noise_schedule("cosine").alpha_bars
    predict = gaussian(bars, torch.zeros(1, 1, 4, 4))
    images = 0.3 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    start = invert_images(predict, images, FACTS, "300", 2)  # type: ignore[arg-type]
    last = float(bars[invertible_grid(noise_schedule("cosine"), "300").timesteps[-1]])
    assert last >= MIN_ALPHA_BAR
    torch.testing.assert_close(start, images / 0.3 * (last * 0.09 + 1 - last) ** 0.5, rtol=0.02, atol=1e-3)


def test_inpainting_keeps_what_is_known_and_fits_the_rest_to_it() -> None:
    """Of images of one colour each, the unknown half takes the colour of the known one, the better the more rounds."""
    bars = noise_schedule("cosine", 100).alpha_bars

    def predict(x: Tensor, timestep: int) -> Tensor:
        a = float(bars[timestep])
        mean = x.mean((2, 3), keepdim=True) / a**0.5  # of all pixels: the noise is averaged away
        return mean.clamp(-1, 1).expand_as(x)

    facts = dataclasses.replace(FACTS, timesteps=100, predicts="x0")
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., :8] = True
    colours = torch.linspace(-0.8, 0.8, 8).view(8, 1, 1, 1).expand(-1, 3, 16, 16)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    off = []
    for rounds in (1, 8):
        how = ImageSampling("ddpm", "20")
        known = Known(colours, mask, rounds)
        found = denoise_images(predict, (3, 16, 16), generators, facts, how, CPU, known=known)
        assert torch.equal(found[..., :8], colours[..., :8])
        off.append(float((found - colours)[..., 8:].abs().mean()))
    assert off[1] < 0.6 * off[0]
    with pytest.raises(ConfigError, match="dpm"):
        denoise_images(predict, (3, 16, 16), generators, facts, ImageSampling("dpm", "20"), CPU, known=known)


# --- latents


def test_slerp_is_the_arc() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = F.normalize(torch.randn(2, 5, 8, generator=generator), dim=-1)
    for share in (0.0, 0.1, 0.5, 1.0):
        found = slerp(u, v, share)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
        angle = (u * v).sum(1).arccos()
        torch.testing.assert_close((u * found).sum(1).clamp(-1, 1).arccos(), share * angle, atol=1e-3, rtol=0)
    assert torch.equal(slerp(u, v, 0), u) and torch.equal(slerp(u, v, 1), v)
    torch.testing.assert_close(slerp(u, u, 0.3), u)
    one = slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 0.5)  # lengths are kept apart
    torch.testing.assert_close(one, torch.tensor([[0.5**0.5, 2**0.5]]))


def latent_of(count: int) -> BipartiteLatent:
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(count, 6, generator=generator), dim=1)
    noise = tuple(torch.randn(count, 3, side, side, generator=generator) for side in (2, 4))
    return BipartiteLatent(embeddings, noise, tuple(f"key {n}" for n in range(count)), "7", None, {"clip": "abc"})


def test_an_interpolation_begins_and_ends_with_its_images() -> None:
    latent = latent_of(3)
    way = interpolate(latent, 4)
    assert len(way) == 7
    for row, frame in ((0, 0), (1, 3), (2, 6)):
        assert torch.equal(way.embeddings[frame], latent.embeddings[row])
        assert all(torch.equal(a[frame], b[row]) for a, b in zip(way.noise, latent.noise, strict=True))
    torch.testing.assert_close(way.embeddings.norm(dim=1), torch.ones(7))
    fixed = interpolate(latent, 4, fixed_noise=[each[:1] for each in latent.noise])
    assert all(
        torch.equal(each[0], frame) for each, way in zip(latent.noise, fixed.noise, strict=True) for frame in way
    )
    with pytest.raises(ConfigError, match="frames"):
        interpolate(latent, 1)
    with pytest.raises(DataError):
        interpolate(latent.take([0]), 3)


def test_a_text_diff_turns_toward_the_difference_alone() -> None:
    latent = latent_of(2)
    target, before = F.normalize(torch.randn(2, 6, generator=torch.Generator().manual_seed(5)), dim=1)
    turned = text_diff(latent, target, before, [0.0, 0.25, 1.0])
    assert torch.equal(turned.embeddings[0], latent.embeddings[0]) and torch.equal(
        turned.noise[1][4], latent.noise[1][1]
    )
    direction = F.normalize(target - before, dim=0)
    torch.testing.assert_close(turned.embeddings[2], direction)
    cosines = turned.embeddings.view(2, 3, 6) @ direction
    assert bool((cosines.diff(dim=1) > 0).all())
    torch.testing.assert_close(text_diff(latent, target, None, [1.0]).embeddings[0], target)
    for wrong in ([], [1.5]):
        with pytest.raises(ConfigError, match="thetas"):
            text_diff(latent, target, None, wrong)
    with pytest.raises(DataError):
        text_diff(latent, target, target.expand(2, -1), [0.5])


def test_components_are_a_pca() -> None:
    rows = torch.randn(200, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = rows * torch.linspace(3, 0.1, 12, dtype=torch.float64) + 1
    moments = EmbeddingMoments(12)
    moments.add(rows)
    found = reduce_components(rows[:5].float(), moments.mean, moments.components()[1], [1, 4, 12])
    data = rows.numpy()
    _, _, directions = np.linalg.svd(data - data.mean(0), full_matrices=False)
    for place, count in enumerate((1, 4, 12)):
        first = directions[:count]
        wanted = torch.from_numpy(data.mean(0) + (data[:5] - data.mean(0)) @ first.T @ first)
        wanted = F.normalize(wanted, dim=1) * rows[:5].norm(dim=1, keepdim=True)
        torch.testing.assert_close(found[:, place].double(), wanted, rtol=1e-4, atol=1e-4)
    assert component_counts(1024) == [20, 30, 40, 80, 120, 160, 200, 320]
    assert component_counts(64)[0] == 1 and component_counts(64)[-1] == 20 and component_counts(2048)[-1] == 320
    with pytest.raises(ConfigError, match="13"):
        reduce_components(rows[:1].float(), moments.mean, moments.components()[1], [13])


def test_a_file_of_latents_is_read_again_or_refused(tmp_path: Path) -> None:
    latent, file = latent_of(2), tmp_path / "two.safetensors"
    latent.save(file)
    found = BipartiteLatent.load(file)
    assert torch.equal(found.embeddings, latent.embeddings) and found.keys == latent.keys
    assert all(map(torch.equal, found.noise, latent.noise)) and found.provenance == {"clip": "abc"}
    assert (found.steps, found.captions) == ("7", None)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        BipartiteLatent.load(file)
    dataclasses.replace(latent, keys=("one",)).save(file)
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        BipartiteLatent.load(file)
    with pytest.raises(CheckpointError, match="missing"):
        BipartiteLatent.load(tmp_path / "missing")


# --- of an unCLIP


@pytest.fixture(scope="module")
def inverted(pipe: Unclip) -> BipartiteLatent:  # noqa: F811
    return pipe.invert([image(0), image(1)], steps="8", iterations=3)


def test_eta_0_makes_the_images_again_and_more_eta_others(pipe: Unclip, inverted: BipartiteLatent) -> None:  # noqa: F811
    whole = pixels_of([image(0).resize((64, 64), Image.Resampling.BICUBIC), image(1).resize((64, 64))])
    back = pipe.reconstruct(inverted)
    assert back.shape == (2, 3, 64, 64)
    others = [pipe.reconstruct(inverted, eta=eta, seed=1) for eta in (0.05, 0.3, 1.0)]
    apart = [psnr(other, back) for other in others]
    # Random weights make a rugged flow, and 8 steps are few.
    assert apart[0] > apart[1] > apart[2] and psnr(back, whole) > psnr(others[-1], whole) + 3
    again = pipe.reconstruct(inverted.take([1]))
    torch.testing.assert_close(again[0], back[1], atol=1e-3, rtol=0)
    still = pipe.vary(inverted, 2, eta=0.0)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in still)
    first, second = pipe.vary(inverted, 2, seed=3)[0]
    assert not np.array_equal(np.asarray(first), np.asarray(second))
    alone = pipe.vary(inverted.take([0]), 2, seed=3)[0]  # whatever is beside it
    assert np.abs(np.asarray(alone[1]).astype(int) - np.asarray(second)).max() <= 1
    with pytest.raises(DataError):
        pipe.reconstruct(dataclasses.replace(inverted, noise=inverted.noise[:1]))


def test_captions_are_part_of_the_way_there_and_back(pipe: Unclip) -> None:  # noqa: F811
    with_text = pipe.invert([image(0)], ["a red circle"], steps="6", iterations=2)
    back = pipe.reconstruct(with_text)
    misread = pipe.reconstruct(dataclasses.replace(with_text, captions=("a blue square",)))
    unread = pipe.reconstruct(dataclasses.replace(with_text, captions=None))
    assert (misread - back).abs().max() > 1e-3 and (unread - back).abs().max() > 1e-3
    with pytest.raises(DataError):
        pipe.invert([image(0)], ["a", "b"], steps="2")


def test_ends_of_an_interpolation_are_reconstructions(pipe: Unclip, inverted: BipartiteLatent) -> None:  # noqa: F811
    frames = pixels_of(pipe.interpolate(inverted, 3))
    back = (pipe.reconstruct(inverted) * 255).round() / 255
    assert (frames[[0, 2]] - back).abs().max() < 0.02 and len(frames) == 3
    fixed = [pixels_of(pipe.interpolate(inverted, 3, fixed_noise=True, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(fixed[0], fixed[1]) and not torch.equal(fixed[0], fixed[2])


def test_an_edit_begins_with_the_image(pipe: Unclip, inverted: BipartiteLatent) -> None:  # noqa: F811
    rows = pipe.edit(inverted, "a red circle", ["a", "b"], [0.0, 0.5])
    back = (pipe.reconstruct(inverted) * 255).round() / 255
    for row, other in zip(rows, back, strict=True):
        first, second = pixels_of(row)
        assert (first - other).abs().max() < 0.02 and (second - other).abs().max() > 0.02
    with pytest.raises(DataError):
        pipe.edit(inverted, "a red circle", ["a", "b", "c"])


def test_known_pixels_stay_through_all_stages(pipe: Unclip) -> None:  # noqa: F811
    whole, mask = image(0, 64), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 40, 30))
    for prompt in (None, "a red circle"):
        found = pipe.inpaint(whole, mask, prompt, 2, rounds=2)
        for each in found:
            pixels, given = np.asarray(each).astype(int), np.asarray(whole).astype(int)
            assert np.abs(pixels[30:] - given[30:]).max() <= 1 and np.abs(pixels[:, 40:] - given[:, 40:]).max() <= 1
            assert np.abs(pixels[:30, :40] - given[:30, :40]).max() > 3
        assert not np.array_equal(np.asarray(found[0]), np.asarray(found[1]))
    with pytest.raises(DataError, match="mask"):
        pipe.inpaint(whole, Image.new("L", (64, 64)))
    with pytest.raises(DataError, match="128 × 64"):
        pipe.inpaint(whole, Image.new("L", (128, 64), 255))
    for wrong in ({"rounds": 0}, {"num": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            pipe.inpaint(whole, mask, **wrong)


def test_batches_change_nothing(pipe: Unclip) -> None:  # noqa: F811
    """Of one, or of all images at a time."""
    mask = Image.new("L", (80, 80))
    mask.paste(255, (0, 0, 80, 30))
    found = []
    for size in (1, 16):
        latent = pipe.invert([image(0), image(1)], steps="3", batch_size=size)
        images = pipe.reconstruct(latent, eta=0.3, batch_size=size)
        filled = pixels_of(pipe.inpaint(image(1), mask, "a red circle", 2, rounds=1, batch_size=size))
        found.append((*latent.noise, images, filled))
    for one, all_ in zip(*found, strict=True):
        torch.testing.assert_close(one, all_, atol=5e-3, rtol=0)


def test_probes(pipe: Unclip) -> None:  # noqa: F811
    moments = EmbeddingMoments(16)
    moments.add(F.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=1))
    counts, rows = pipe.project([image(0)], moments, [1, 16])
    assert counts == [1, 16]
    pipe.bring(pipe.clip)
    plain = pipe.decode([""], pipe.clip.embed_images([image(0)]), read_captions=False)
    assert (pixels_of(rows[0][1:]) - plain).abs().max() < 0.02  # all components are the embedding
    found = pipe.typography(image(0), ["a circle", "a square"], ["iPod"], 1, steps="3")
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(2))
    assert len(found.images) == len(found.variations) == 2
    with pytest.raises(DataError):
        pipe.typography(image(0), ["a circle"], ["iPod"])


def test_a_word_is_written_within_the_image() -> None:
    plain = Image.new("RGB", (96, 96), (0, 128, 0))
    written = np.asarray(write_on(plain, "a rather long label"))
    assert (written == 255).all(-1).sum() > 200 and (written[:6] == np.array([0, 128, 0])).all()
    assert np.asarray(plain).max() == 128


def test_small_images_are_means() -> None:
    pixels = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(shrink_to(pixels, 4)[0, 0, 0, 0], pixels[0, 0, :2, :2].mean())


# --- the command line


def test_the_subcommands(
    pipe: Unclip,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(typography.__wrapped__.__kwdefaults__, "steps", "2")
    model, one, two, mask = (tmp_path / name for name in ("model", "one.png", "two.png", "mask.png"))
    pipe.save_pretrained(model)
    image(0).save(one)
    image(1).save(two)
    Image.new("L", (80, 80), 255).save(mask)

    def run(name: str, out: str, *rest: str) -> Image.Image:
        arguments = [name, "--model", str(model), "--out", str(tmp_path / out), *rest]
        monkeypatch.setattr("sys.argv", ["generate.py", *arguments])
        generate()
        assert out in capsys.readouterr().out
        return Image.open(io.BytesIO((tmp_path / out).read_bytes()))

    given = ["--image", str(one), "--image", str(two), "--steps", "3"]
    sheet = run("vary", "v.png", *given, "--num", "1", "--eta", "0.5", "1", "--latent", str(tmp_path / "two.latent"))
    assert sheet.width > 4 * 128 and sheet.height > 2 * 128
    film = run("interpolate", "i.gif", "--latent", str(tmp_path / "two.latent"), "--frames", "4")
    assert film.n_frames == 6 and film.size == (128, 128)
    run("interpolate", "i.png", *given, "--frames", "3", "--fixed_noise", "True")
    run("edit", "e.png", *given, "--target", "a red circle", "--frames", "2")
    run("inpaint", "p.png", *given[:2], "--mask", str(mask), "--num", "1", "--rounds", "1")
    run("probe", "l.png", *given[:4], "--labels", "a circle", "a square", "--words", "iPod", "--num", "1")
    for wrong, arguments in (
        ("target", ["edit", *given]),
        ("mask", ["inpaint", *given[:2]]),
        ("labels", ["probe", *given[:4]]),
        ("image", ["vary"]),
        ("theta", ["edit", *given, "--target", "a", "--theta", "2"]),
        ("frames", ["interpolate", *given[:2]]),
        ("batch_size", ["vary", *given, "--batch_size", "0"]),
        ("latent", ["vary", *given, "--latent", str(tmp_path / "no" / "where")]),
        ("vanish", ["vanish"]),
        ("init_image", ["complete", "--prompt", "a"]),
    ):
        with pytest.raises(ConfigError, match=wrong):
            run(arguments[0], "x.png", *arguments[1:])
    with pytest.raises(ConfigError, match="png"):
        run("vary", "x.gif", *given)


def test_every_command_of_the_page(
    pipe: Unclip,  # noqa: F811
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(typography.__wrapped__.__kwdefaults__, "steps", "2")
    pipe.save_pretrained(tmp_path / "demo" / "unclip")
    shutil.copytree(data, tmp_path / "demo" / "data")
    cache_embeddings(pipe.clip, Path("demo/data"))
    for number, name in enumerate(("judge.png", "pilot.png")):
        image(number).save(name)
    Image.new("L", (80, 80), 255).save("mask.png")
    page = (ROOT / "docs" / "manipulations.md").read_text()
    commands = re.findall(r"^python launchers/generate\.py (.*)$", page, re.MULTILINE)
    assert {command.split()[0] for command in commands} == set(SUBCOMMANDS)
    for command in commands:
        words = shlex.split(re.sub(r"--(num|frames|rounds) \d+", r"--\1 2", command))
        few = [] if words[0] in ("inpaint", "probe") else ["--steps", "2", "--iterations", "0"]
        monkeypatch.setattr("sys.argv", ["generate.py", *words, *few])
        generate()
        assert Path(words[words.index("--out") + 1]).is_file()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace('steps="25", iterations=3', 'steps="2"'), names)
    assert len(names["way"]) == 9 and len(names["edited"][1]) == 3 and len(names["filled"]) == 2  # type: ignore[arg-type, index]


def test_a_film_has_its_frames(tmp_path: Path) -> None:
    import imageio_ffmpeg

    frames = [Image.new("RGB", (63, 64), (40 * number, 0, 0)) for number in range(5)]
    write_film(tmp_path / "film.mp4", frames)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    facts = next(reader)
    shown = [np.frombuffer(frame, np.uint8).reshape(*reversed(facts["size"]), 3) for frame in reader]
    assert len(shown) == 5 and facts["size"] == (126, 128)
    assert all(math.isclose(frame[..., 0].mean(), 40 * number, abs_tol=8) for number, frame in enumerate(shown))
