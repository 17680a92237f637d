"""Sampling codes: one code against `transformers`' logits warpers and the distribution itself; images against the uncached
model, whatever the batch, with guidance that acts in every step."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from dalle_ds.config import DalleConfig
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.decoding import DecodingWeights
from dalle_ds.sampling import Progress, Sampling, SamplingRequest, sample_codes, score
from dalle_ds.sampling import codes as drawing
from dalle_ds.sampling.codes import candidate_uniforms, guide, keep_top_k, keep_top_p, sample

CONFIG = DalleConfig(width=64, depth=4, heads=4, text_len=6, grid=4, text_vocab=20, image_vocab=32)
CODES = CONFIG.image_len


@pytest.fixture(scope="module")
def model() -> Dalle:
    """Far from uniform, and sensitive to the caption, as a trained model is."""
    torch.manual_seed(0)
    model = Dalle(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.tensor([[3, 1, 4, -1, -1, -1], [2, 7, 1, 8, 2, 8], [-1] * 6])


@torch.no_grad()
def reference_codes(model: Dalle, caption: Tensor, sampling: Sampling, seed: int, candidate: int) -> Tensor:
    """One image, every step computed from the beginning by the whole model, guidance by its formula: (W²,)."""
    uniforms = candidate_uniforms(tuple(caption.tolist()), seed, candidate, CODES)
    codes = torch.zeros(1, CODES, dtype=torch.int64)
    for step in range(CODES):
        conditional = model(caption[None], codes).image_logits[:, step]
        unconditional = model(torch.full_like(caption, -1)[None], codes).image_logits[:, step]
        logits = (1 - sampling.guidance) * unconditional + sampling.guidance * conditional
        codes[0, step] = sample(logits, uniforms[step : step + 1], sampling)[0]
    return codes[0]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(guidance=3.0), Sampling(guidance=0.0), Sampling(0.7, 8, 0.9, 2.0), Sampling(0, guidance=2.0)],
)
def test_codes_are_those_of_the_uncached_model(model: Dalle, text: Tensor, sampling: Sampling) -> None:
    kept = text.clone()
    codes = sample_codes(model, text, SamplingRequest(num=2, sampling=sampling, seed=5))
    assert codes.shape == (3, 2, CODES)
    for caption in range(3):
        for candidate in range(2):
            expected = reference_codes(model, text[caption], sampling, 5, candidate)
            assert torch.equal(codes[caption, candidate], expected)
    assert torch.equal(text, kept)  # peers zero the prompt under guidance


def test_pictures_differ(model: Dalle, text: Tensor) -> None:
    """So that the tests of equality mean something: over candidates, captions, seeds, and with guidance."""
    codes = sample_codes(model, text, SamplingRequest(num=3, seed=0))
    assert len(codes.view(9, -1).unique(dim=0)) == 9
    assert not torch.equal(codes, sample_codes(model, text, SamplingRequest(num=3, seed=1)))
    assert not torch.equal(
        codes, sample_codes(model, text, SamplingRequest(num=3, seed=0, sampling=Sampling(guidance=3.0)))
    )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_does_not_depend_on_its_neighbours(
    model: Dalle, text: Tensor, guidance: float, dtype: torch.dtype
) -> None:
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    own = Dalle(CONFIG).to(dtype)
    own.load_state_dict(weights)
    sampling = Sampling(guidance=guidance)
    expected = sample_codes(own, text, SamplingRequest(num=9, sampling=sampling, seed=2, batch_size=8))
    for batch_size in (1, 3, 9, 16, 24, None):
        assert torch.equal(
            sample_codes(own, text, SamplingRequest(num=9, sampling=sampling, seed=2, batch_size=batch_size)), expected
        )
    fewer = sample_codes(own, text.flip(0), SamplingRequest(num=2, sampling=sampling, seed=2, batch_size=5))
    assert torch.equal(fewer, expected.flip(0)[:, :2])
    alone = sample_codes(own, text[1:2], SamplingRequest(num=1, sampling=sampling, seed=2))
    assert torch.equal(alone[0, 0], expected[1, 0])


def test_the_decoder_always_sees_a_multiple_of_4_rows(model: Dalle, text: Tensor, monkeypatch: object) -> None:
    """What the property above rests on; a toy model alone could keep it by luck."""
    rows: set[int] = set()
    decode = DecodingWeights.step
    monkeypatch.setattr(
        DecodingWeights, "step", lambda self, codes, *rest: rows.add(len(codes)) or decode(self, codes, *rest)
    )
    for batch_size in (1, 3, 4):
        sample_codes(model, text, SamplingRequest(num=3, batch_size=batch_size))
    assert rows == {4}
    sample_codes(model, text, SamplingRequest(num=3, batch_size=9))
    assert rows == {4, 12}


@pytest.mark.parametrize(("guidance", "expected"), [(1.0, 2), (2.0, 3)])
def test_each_caption_is_prefilled_once(
    model: Dalle, text: Tensor, monkeypatch: object, guidance: float, expected: int
) -> None:
    """Nine candidates in batches of two; with guidance, the empty caption once for all of them."""
    calls: list[int] = []
    prefill = drawing.prefill
    monkeypatch.setattr(drawing, "prefill", lambda *arguments: calls.append(1) or prefill(*arguments))
    sample_codes(model, text[:2], SamplingRequest(num=9, batch_size=2, sampling=Sampling(guidance=guidance)))
    assert len(calls) == expected


def test_guidance_shares_each_step(model: Dalle, text: Tensor, monkeypatch: object) -> None:
    """Rows under the caption and rows under the empty one are decoded together, so that weights are read once."""
    seen: list[int] = []
    decode = DecodingWeights.step
    monkeypatch.setattr(
        DecodingWeights, "step", lambda self, codes, *rest: seen.append(len(codes)) or decode(self, codes, *rest)
    )
    sample_codes(model, text[:1], SamplingRequest(num=8, sampling=Sampling(guidance=2.0)))
    assert seen == [16] * (CODES - 1)


def test_as_many_pictures_at_once_as_fit(model: Dalle, text: Tensor, monkeypatch: object) -> None:
    """In batches whose caches stay below the budget; and they are the images of any other batches."""
    budget = 250_000
    monkeypatch.setattr(drawing, "CPU_BUDGET", budget)
    sizes: list[int] = []
    cache = drawing.new_cache
    monkeypatch.setattr(
        drawing, "new_cache", lambda *arguments: sizes.append((made := cache(*arguments)).nbytes) or made
    )
    batches: list[int] = []
    codes = sample_codes(
        model, text[:1], SamplingRequest(num=40, on_row=lambda progress: batches.append(len(progress.images)))
    )
    fitting = max(batches)
    assert 4 < fitting < 40
    assert fitting % 4 == 0
    assert budget / 4 < max(sizes) < budget
    assert torch.equal(codes[:, :3], sample_codes(model, text[:1], SamplingRequest(num=3, batch_size=1)))


def test_progress_has_the_rows_of_the_pictures(model: Dalle, text: Tensor) -> None:
    seen: list[Progress] = []
    codes = sample_codes(model, text, SamplingRequest(num=2, batch_size=4, on_row=seen.append))
    assert [progress.codes.shape for progress in seen] == [
        (4, 4),
        (4, 8),
        (4, 12),
        (4, 16),
        (2, 4),
        (2, 8),
        (2, 12),
        (2, 16),
    ]
    assert seen[0].images == ((0, 0), (0, 1), (1, 0), (1, 1))
    for progress in seen:
        for (caption, candidate), so_far in zip(progress.images, progress.codes, strict=True):
            assert torch.equal(so_far, codes[caption, candidate, : len(so_far)])


def test_progress_is_a_copy(model: Dalle, text: Tensor) -> None:
    """What a caller does with it does not reach the images."""
    expected = sample_codes(model, text, SamplingRequest(seed=3))
    assert torch.equal(
        sample_codes(model, text, SamplingRequest(seed=3, on_row=lambda progress: progress.codes.zero_())), expected
    )


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(1, 4, 4), (6, 4, 4), (512, 360, 256), (513, 512, 260), (7, 3, 3), (9, 9, 9), (8, 512, 8)],
)
def test_batches_are_about_equally_full(count: int, most: int, expected: int) -> None:
    assert drawing.even_batches(count, most) == expected
    assert -(-count // expected) == -(-count // most)


def test_no_rows_are_computed_for_nothing(model: Dalle, text: Tensor, monkeypatch: object) -> None:
    rows: list[int] = []
    decode = DecodingWeights.step
    monkeypatch.setattr(
        DecodingWeights, "step", lambda self, codes, *rest: rows.append(len(codes)) or decode(self, codes, *rest)
    )
    sample_codes(model, text[:1], SamplingRequest(num=2, batch_size=512))
    sample_codes(model, text[:1], SamplingRequest(num=18, batch_size=16))
    assert rows == [4] * (CODES - 1) + [12] * 2 * (CODES - 1)


@pytest.mark.parametrize("num", [1, 3, 40])
def test_prompts_count_too(model: Dalle, num: int, monkeypatch: object) -> None:
    """All that a batch keeps stays below the budget: its cache, and the prompts' own."""
    budget = 400_000
    monkeypatch.setattr(drawing, "CPU_BUDGET", budget)
    live: dict[int, int] = {}
    most = 0
    new_cache = drawing.new_cache

    def counted(*arguments: object) -> object:
        nonlocal most
        cache = new_cache(*arguments)
        live[id(cache)] = cache.nbytes
        weakref.finalize(cache, live.pop, id(cache))
        most = max(most, sum(live.values()))
        return cache

    monkeypatch.setattr(drawing, "new_cache", counted)
    text = torch.arange(60).view(60, 1).expand(60, 6) % torch.tensor([20, 3, 4, 5, 7, 11])
    sample_codes(model, text[: max(2, 60 // num)], SamplingRequest(num=num))
    assert budget / 4 < most < budget


def test_a_model_without_numbers_is_named(text: Tensor) -> None:
    broken = Dalle(CONFIG)
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_p=0.9)):
        with pytest.raises(DataError, match=r"not numbers.*diverged"):
            sample_codes(broken, text, SamplingRequest(sampling=sampling))


def test_the_lowest_temperature_takes_the_likeliest() -> None:
    logits = torch.randn(50, 9)
    found = sample(logits, torch.rand(50, dtype=torch.float64), Sampling(temperature=1e-300))
    assert torch.equal(found, logits.argmax(dim=-1))


def test_a_seed_is_a_number_whatever_its_type(model: Dalle, text: Tensor) -> None:
    assert torch.equal(
        sample_codes(model, text, SamplingRequest(seed=np.int64(3))), sample_codes(model, text, SamplingRequest(seed=3))
    )


@torch.no_grad()
def test_score_is_a_log_probability(model: Dalle) -> None:
    """Over all codes of a one-code image, the probabilities sum to 1; and the image loss is the mean score."""
    torch.manual_seed(0)
    single = Dalle(DalleConfig(width=32, depth=2, heads=2, text_len=3, grid=1, text_vocab=9, image_vocab=11))
    all_codes = torch.arange(11)[:, None]
    scores = score(single, torch.tensor([[1, 2, -1]]).expand(11, -1), all_codes)
    assert scores.exp().sum().item() == pytest.approx(1.0)
    text = torch.tensor([[3, 1, 4, -1, -1, -1], [2, 7, 1, 8, 2, 8]])
    codes = torch.randint(0, 32, (2, CODES), generator=torch.Generator().manual_seed(0))
    both = score(model, text, codes)
    assert both.shape == (2,)
    assert -both.sum().item() / (2 * CODES) == pytest.approx(model(text, codes).image_loss.item(), rel=1e-5)
    assert score(model, text[1:], codes[1:]).item() == pytest.approx(both[1].item(), rel=1e-5)


def test_mistakes_are_named(model: Dalle, text: Tensor) -> None:
    with pytest.raises(ConfigError, match="num must be at least 1, found 0"):
        sample_codes(model, text, SamplingRequest(num=0))
    with pytest.raises(ConfigError, match="batch_size must be at least 1, found -1"):
        sample_codes(model, text, SamplingRequest(batch_size=-1))
    with pytest.raises(DataError, match=r"text must have shape \(B, 6\)"):
        sample_codes(model, text[:, :4], SamplingRequest())
    with pytest.raises(DataError, match="B of at least 1"):
        sample_codes(model, text[:0], SamplingRequest())
    with pytest.raises(DataError, match=r"\[-1, 19\]"):
        sample_codes(model, text + 20, SamplingRequest())


# --- from logits to a code


NO_TOKENS = torch.empty(0)


def random_logits(rows: int = 50, vocab: int = 40, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale


@pytest.mark.parametrize("top_k", [1, 2, 7, 40, 1000])
def test_top_k_is_that_of_transformers(top_k: int) -> None:
    logits = random_logits().round()  # with ties
    assert torch.equal(keep_top_k(logits, top_k), TopKLogitsWarper(top_k)(NO_TOKENS, logits.clone()))


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(top_p: float) -> None:
    logits = random_logits()
    assert torch.equal(keep_top_p(logits, top_p), TopPLogitsWarper(top_p)(NO_TOKENS, logits.clone()))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(2.0, top_k=4), Sampling(1.5, top_p=0.7), Sampling(1, 5, 0.8)],
)
def test_frequencies_are_the_probabilities(sampling: Sampling) -> None:
    """Evenly spaced uniform numbers hit each code in proportion to its probability, as `transformers` filters it."""
    logits = random_logits(rows=1, vocab=12, scale=1.5)
    count = 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = sample(logits.expand(count, -1), uniforms, sampling)
    warped = logits / sampling.temperature
    if sampling.top_k is not None:
        warped = TopKLogitsWarper(sampling.top_k)(NO_TOKENS, warped)
    if sampling.top_p is not None:
        warped = TopPLogitsWarper(sampling.top_p)(NO_TOKENS, warped)
    frequencies = drawn.bincount(minlength=12).double() / count
    torch.testing.assert_close(frequencies, warped.softmax(-1)[0], atol=2 / count, rtol=0)


def test_extreme_uniform_numbers_never_draw_an_impossible_code() -> None:
    logits = torch.tensor([[-torch.inf, 0.3, 0.1, -torch.inf, 0.7, -torch.inf]]).expand(2, -1)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, uniforms, Sampling()).tolist() == [1, 4]


def test_temperature_0_is_the_likeliest_code() -> None:
    logits = random_logits()
    uniforms = torch.rand(len(logits), dtype=torch.float64)
    assert torch.equal(sample(logits, uniforms, Sampling(temperature=0)), logits.argmax(-1))


def test_guidance_is_the_formula() -> None:
    conditional, unconditional = random_logits(2)[:, :5], random_logits(4)[2:, :5]
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)


def test_uniforms_depend_on_seed_candidate_and_caption() -> None:
    base = candidate_uniforms((1, 2, -1), 0, 0, 64)
    assert torch.equal(base, candidate_uniforms((1, 2, -1), 0, 0, 64))
    assert base.dtype == torch.float64
    for other in (((1, 2, -1), 1, 0), ((1, 2, -1), 0, 1), ((1, 3, -1), 0, 0)):
        assert not torch.isclose(base, candidate_uniforms(*other, 64)).any()
    many = torch.cat([candidate_uniforms((5,), 3, candidate, 1024) for candidate in range(20)])
    assert abs(many.mean().item() - 0.5) < 0.01
    assert abs(many.var().item() - 1 / 12) < 0.005


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"temperature": -0.1}, "temperature .*-0.1"),
        ({"temperature": float("nan")}, "temperature .*nan"),
        ({"top_k": 0}, "top_k .*0"),
        ({"top_p": 0.0}, "top_p .*0.0"),
        ({"top_p": 1.5}, "top_p .*1.5"),
        ({"guidance": -1.0}, "guidance .*-1.0"),
        ({"guidance": float("inf")}, "guidance .*inf"),
    ],
)
def test_settings_out_of_range_are_named(arguments: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Sampling(**arguments)
