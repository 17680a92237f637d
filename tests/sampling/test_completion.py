"""Completing images: kept codes stay, the rest is what the uncached model draws after them, whoever draws beside."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.config import DalleConfig
from dalle_ds.data.images import center_crop_resize, decode_image
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.decoding import DecodingWeights
from dalle_ds.models.dvae import DiscreteVAE
from dalle_ds.sampling import Sampling, SamplingRequest, TextToImage, default_rows, kept_rows_mask, sample_codes, score
from dalle_ds.sampling import codes as drawing
from dalle_ds.sampling.codes import candidate_uniforms, sample
from dalle_ds.sampling.completion import open_image, top_rows
from dalle_ds.text.tokenizer import Tokenizer
from tests.conftest import TINY_DALLE

CONFIG = DalleConfig(width=32, depth=4, heads=2, text_len=5, grid=4, text_vocab=20, image_vocab=16, kernel=3)
CODES = CONFIG.image_len
KINDS = ("row", "column", "conv", "full")


def build(**changes: object) -> Dalle:
    """A model whose every weight matters."""
    torch.manual_seed(0)
    model = Dalle(dataclasses.replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


TEXT = torch.tensor([[3, 1, 4, -1, -1], [2, 7, 1, 8, 2]])
KNOWN = torch.randint(0, CONFIG.image_vocab, (2, CODES), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(model: Dalle, caption: Tensor, given: Tensor, sampling: Sampling, seed: int, number: int) -> Tensor:
    """One image, every step by the whole model from the beginning, under a dense mask: (W²,)."""
    uniforms = candidate_uniforms(tuple(caption.tolist()), seed, number, CODES)
    codes = torch.zeros(1, CODES, dtype=torch.int64)
    codes[0, : len(given)] = given
    for step in range(len(given), CODES):
        logits = model(caption[None], codes).image_logits[:, step]
        if sampling.guidance != 1:
            empty = model(torch.full_like(caption, -1)[None], codes).image_logits[:, step]
            logits = empty + sampling.guidance * (logits - empty)
        codes[0, step] = sample(logits, uniforms[step : step + 1], sampling)[0]
    return codes[0]


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(), Sampling(0, guidance=3.0), Sampling(0.9, 9, 0.9, 2.0)])
@pytest.mark.parametrize("attention", [*((kind,) * 2 for kind in KINDS), KINDS])
def test_the_rest_is_what_the_uncached_model_draws(attention: tuple[str, ...], sampling: Sampling) -> None:
    """At every attention kind: rings that have gone round, rows that are begun, the last code alone."""
    model = build(attention=attention, depth=len(attention), mask_padding=attention == KINDS)
    before = score(model, TEXT, KNOWN)
    for count in (1, 6, 8, CODES - 1):
        codes = sample_codes(model, TEXT, SamplingRequest(num=2, sampling=sampling, seed=4, given=KNOWN[:, :count]))
        for caption in range(2):
            for number in range(2):
                expected = reference(model, TEXT[caption], KNOWN[caption, :count], sampling, 4, number)
                assert torch.equal(codes[caption, number], expected), f"{count} codes given"
    assert torch.equal(score(model, TEXT, KNOWN), before)


def test_without_given_codes_it_is_drawing() -> None:
    model = build()
    expected = sample_codes(model, TEXT, SamplingRequest(num=3, seed=2))
    assert torch.equal(sample_codes(model, TEXT, SamplingRequest(num=3, seed=2, given=KNOWN[:, :0])), expected)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_picture_is_completed_to_itself(guidance: float) -> None:
    """The random numbers of a code are those of its place, so a drawn image's own beginning leads to its own end."""
    model, sampling = build(), Sampling(guidance=guidance)
    drawn = sample_codes(model, TEXT, SamplingRequest(seed=3, sampling=sampling))
    for rows in (1, 2, 3):
        again = sample_codes(
            model, TEXT, SamplingRequest(seed=3, sampling=sampling, given=drawn[:, 0, : rows * CONFIG.grid])
        )
        assert torch.equal(again, drawn)


def test_all_codes_given_are_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(drawing, "prefill", None)
    monkeypatch.setattr(DecodingWeights, "step", None)
    assert torch.equal(sample_codes(model, TEXT, SamplingRequest(num=2, given=KNOWN)), KNOWN[:, None].expand(-1, 2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_completion_does_not_depend_on_its_neighbours(guidance: float, dtype: torch.dtype) -> None:
    """Also where one caption has two beginnings, which no cache may confuse."""
    model = build().to(dtype)
    sampling = Sampling(guidance=guidance)
    text, given = TEXT[[0, 1, 0]], torch.cat([KNOWN, KNOWN[1:]])[:, :6]
    expected = sample_codes(model, text, SamplingRequest(num=5, sampling=sampling, seed=2, given=given))
    assert not torch.equal(expected[0, :, 6:], expected[2, :, 6:])
    for size in (1, 7, 15):
        found = sample_codes(
            model, text, SamplingRequest(num=5, sampling=sampling, seed=2, batch_size=size, given=given)
        )
        assert torch.equal(found, expected)
    alone = sample_codes(model, text[2:], SamplingRequest(num=1, sampling=sampling, seed=2, given=given[2:]))
    assert torch.equal(alone[0, 0], expected[2, 0])


@pytest.mark.parametrize(("guidance", "prompts"), [(1.0, 2), (2.0, 4)])
def test_given_codes_are_read_in_one_pass(monkeypatch: pytest.MonkeyPatch, guidance: float, prompts: int) -> None:
    """One for each caption, and with guidance one more for each beginning; decoding starts behind them."""
    model, passes, steps = build(), [], []
    prefill, decode = drawing.prefill, DecodingWeights.step
    monkeypatch.setattr(drawing, "prefill", lambda *given: passes.append(given[3].shape) or prefill(*given))
    monkeypatch.setattr(DecodingWeights, "step", lambda *given: steps.append(given[2]) or decode(*given))
    sample_codes(model, TEXT, SamplingRequest(num=2, sampling=Sampling(guidance=guidance), given=KNOWN[:, :9]))
    assert passes == [(1, 9)] * prompts
    assert steps == list(range(9, CODES - 1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (KNOWN[:1], r"shape \(2, n\).*found torch.int64 of shape \(1, 16\)"),
        (torch.zeros(2, 17, dtype=torch.int64), "n of at most 16"),
        (KNOWN.float(), "float32"),
        (KNOWN + 1, r"\[0, 15\], found values from 1 to 16"),
        (KNOWN - 1, r"\[0, 15\], found values from -1 to 14"),
    ],
)
def test_wrong_codes_are_named(given: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        sample_codes(build(), TEXT, SamplingRequest(given=given))


def test_the_paper_keeps_480_of_1024() -> None:
    assert kept_rows_mask(32, default_rows(32)).sum() == 480
    assert [default_rows(grid) for grid in (1, 2, 4, 8, 16, 64)] == [1, 1, 1, 3, 7, 30]


@pytest.mark.parametrize("grid", [1, 2, 5, 32])
def test_the_mask_has_the_top_rows(grid: int) -> None:
    for rows in range(grid + 1):
        mask = kept_rows_mask(grid, rows)
        assert mask.shape == (grid, grid) and mask.dtype == torch.bool
        assert mask.flatten().tolist() == [True] * (rows * grid) + [False] * ((grid - rows) * grid)
    for wrong in (-1, grid + 1):
        with pytest.raises(ConfigError, match=rf"\[0, {grid}\].*found {wrong}"):
            kept_rows_mask(grid, wrong)


# --- images


@pytest.fixture(scope="module")
def pipe(dvae_export: Path, tokenizer_file: Path) -> TextToImage:
    torch.manual_seed(0)
    model = Dalle(TINY_DALLE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return TextToImage(model, DiscreteVAE.from_pretrained(dvae_export), Tokenizer.load(tokenizer_file))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """40 × 28 pixels of noise."""
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 40, 3), dtype=np.uint8)).save(path)
    return path


def same(left: list[Image.Image], right: list[Image.Image]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def codes_of(pipe: TextToImage, path: Path) -> Tensor:
    pixels = center_crop_resize(decode_image(path.read_bytes()), 16)
    return pipe.dvae.encode(torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255)[0]


def test_the_top_rows_of_a_picture_are_kept(pipe: TextToImage, photo: Path) -> None:
    """The codes are those of the view of the image that evaluation encodes."""
    expected = codes_of(pipe, photo)
    for rows in (0, 1, 3, 4):
        found = top_rows(pipe.dvae, open_image(photo, 16), rows)
        assert torch.equal(found, expected[:rows].flatten())
    assert torch.equal(top_rows(pipe.dvae, open_image(photo, 16)), expected[:1].flatten())


def test_a_completed_picture(pipe: TextToImage, photo: Path) -> None:
    prompts, grid = ["a red circle", "a blue square"], 4
    rows = pipe.generate(prompts, image=photo, rows=2, num=3, seed=1)
    assert [len(row) for row in rows] == [3, 3]
    given = codes_of(pipe, photo)[:2].flatten().expand(2, -1)
    codes = sample_codes(pipe.model, pipe.encode(prompts), SamplingRequest(num=3, seed=1, given=given))
    assert all(same(row, pipe.decode(of_prompt)) for row, of_prompt in zip(rows, codes, strict=True))
    assert torch.equal(codes[..., : 2 * grid], given[:, None].expand(-1, 3, -1))
    assert same(pipe.generate(prompts, image=photo, rows=0, num=2, seed=1)[1], pipe.generate(prompts, num=2, seed=1)[1])
    whole = pipe.generate("a red circle", image=photo, rows=4, num=1)[0]
    assert same(whole, pipe.decode(codes_of(pipe, photo).view(1, -1)))
    brightness = lambda _, images: [float(np.asarray(image).mean()) for image in images]  # noqa: E731
    by_brightness = pipe.generate(prompts, image=photo, rows=2, num=3, seed=1, keep=1, rerank=brightness)
    for best, row in zip(by_brightness, rows, strict=True):
        assert same(best, [max(row, key=lambda picture: np.asarray(picture).mean())])


def test_a_picture_in_memory_is_the_file(photo: Path) -> None:
    expected = np.asarray(open_image(photo, 16))
    assert np.array_equal(open_image(Image.open(photo), 16), expected)
    assert np.array_equal(open_image(str(photo), 16), expected)
    clear = Image.new("RGBA", (9, 20), (255, 0, 0, 0))
    assert (np.asarray(open_image(clear, 16)) == 255).all()  # on white
    with_palette = Image.open(photo).convert("P")
    assert np.array_equal(open_image(with_palette, 16), open_image(with_palette.convert("RGB"), 16))
    for mode in ("CMYK", "YCbCr", "HSV", "RGBX", "L", "1"):
        converted = Image.open(photo).convert(mode)
        assert np.array_equal(open_image(converted, 16), open_image(converted.convert("RGB"), 16)), mode
    half_clear = Image.new("RGBA", (8, 8), (200, 0, 0, 100))
    assert np.array_equal(open_image(half_clear.convert("RGBa"), 16), open_image(half_clear, 16))
    turned, exif = photo.with_suffix(".jpg"), Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).save(turned, exif=exif)
    assert np.array_equal(open_image(Image.open(turned), 16), open_image(turned, 16))
    as_stored = Image.fromarray(np.asarray(Image.open(turned)))
    assert not np.array_equal(open_image(turned, 16), open_image(as_stored, 16))


def test_wrong_pictures_are_named(pipe: TextToImage, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.png cannot be read: No such file"):
        pipe.generate("a red circle", image=tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png: image cannot be decoded"):
        pipe.generate("a red circle", image=tmp_path / "text.png")
    with pytest.raises(DataError, match=r"an image of mode F cannot be used.*convert it"):
        pipe.generate("a red circle", image=Image.new("F", (8, 8)))
    cut_short = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(cut_short, "PNG")
    with pytest.raises(DataError, match="cannot be used"):
        pipe.generate("a red circle", image=Image.open(io.BytesIO(cut_short.getvalue()[:2000])))
    with pytest.raises(ConfigError, match=r"\[0, 4\].*found 5"):
        pipe.generate("a red circle", image=Image.new("RGB", (8, 8)), rows=5)
