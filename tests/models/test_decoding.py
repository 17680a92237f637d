"""Incremental decoding: the uncached model's logits, whatever is cached where, and a cache no larger than it has to be."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dalle_ds.config import DalleConfig
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.decoding import DecodingWeights, bytes_per_step, new_cache, prefill
from dalle_ds.models.inference import PackedLinear
from dalle_ds.nn.attention import attention_mask
from dalle_ds.nn.attention.decoding import _attend_plainly, bytes_per_prompt, bytes_per_row, slots_of

CONFIG = DalleConfig(width=32, depth=3, heads=4, text_len=6, grid=4, text_vocab=20, image_vocab=16, kernel=3)
KINDS = ("row", "column", "conv", "full")
SHAPES = [(1, 3, 3), (2, 1, 11), (4, 6, 3), (5, 1, 11), (7, 4, 5)]
"""(grid, text_len, kernel), with kernels larger than the grid."""


def build(seed: int = 0, **changes: object) -> Dalle:
    """A model whose every weight matters."""
    torch.manual_seed(seed)
    model = Dalle(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(config: DalleConfig, size: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Captions of several lengths, one of them empty, and codes."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, config.text_vocab, (size, config.text_len), generator=generator)
    for row in range(size):
        text[row, row:] = -1
    return text, torch.randint(0, config.image_vocab, (size, config.image_len), generator=generator)


def decoded(
    model: Dalle, text: Tensor, codes: Tensor, first: int = 0, weights: DecodingWeights | None = None
) -> Tensor:
    """(B, W² − first, image_vocab) logits, one position at a time after `first` codes."""
    weights = DecodingWeights(model, reused=False) if weights is None else weights
    cache = new_cache(model, len(text))
    found = [prefill(model, text, cache, codes[:, :first] if first else None)]
    steps = range(first, model.config.image_len - 1)
    return torch.stack([*found, *(weights.step(codes[:, step], step, cache) for step in steps)], dim=1)


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize(("grid", "text_len", "kernel"), SHAPES)
@pytest.mark.parametrize("attention", [*((kind,) * 2 for kind in KINDS), ("row", "column", "conv", "full")])
@torch.no_grad()
def test_cached_logits_are_the_uncached(
    attention: tuple, grid: int, text_len: int, kernel: int, mask_padding: bool
) -> None:
    model = build(
        attention=attention,
        depth=len(attention),
        grid=grid,
        text_len=text_len,
        kernel=kernel,
        mask_padding=mask_padding,
    )
    text, codes = batch(model.config)
    expected = model(text, codes).image_logits
    for first in sorted({0, grid**2 // 2, grid**2 - 1}):
        for weights in (None, DecodingWeights(model)):
            assert (decoded(model, text, codes, first, weights) - expected[:, first:]).abs().max() < 1e-4


@torch.no_grad()
def test_static_shapes_give_the_same_logits() -> None:
    """The step that a CUDA graph holds: no number of it is known to Python, and every call has the same shapes."""
    for grid, text_len, kernel in SHAPES[1:]:
        model = build(attention=KINDS, depth=4, grid=grid, text_len=text_len, kernel=kernel, mask_padding=True)
        text, codes = batch(model.config)
        expected, weights = decoded(model, text, codes), DecodingWeights(model)
        cache = new_cache(model, len(text))
        prefill(model, text, cache)
        for step in range(model.config.image_len - 1):
            logits = weights.step_of_tensor(codes[:, step], torch.tensor([step]), cache)
            assert (logits - expected[:, step + 1]).abs().max() < 1e-4


@torch.no_grad()
def test_static_shapes_never_wait_for_a_value() -> None:
    """Tensors without values refuse whatever a CUDA graph could not hold: a number read back, a shape that values decide."""
    model = build(attention=KINDS, depth=4, mask_padding=True)
    text, codes = batch(CONFIG)
    weights, cache = DecodingWeights(model, reused=False), new_cache(model, len(text))
    prefill(model, text, cache)
    weights.step_of_tensor(codes[:, 0], torch.tensor([0]), cache)  # makes the tables
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_codes, step = mode.from_tensor(codes[:, 1]), mode.from_tensor(torch.tensor([1]))
        assert weights.step_of_tensor(fake_codes, step, cache).shape == (3, CONFIG.image_vocab)
        with pytest.raises(DataDependentOutputException):
            step.item()


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("rows", [[0, 0, 0], [1, 0, 1, 1, 0, 2], [0] * 4 + [1] * 4, [0, 1] * 4 + [1] * 33])
@torch.no_grad()
def test_pictures_of_one_prompt_share_its_text(rows: list[int], mask_padding: bool) -> None:
    model = build(attention=KINDS, depth=4, mask_padding=mask_padding)
    text = batch(CONFIG)[0][: max(rows) + 1]
    codes = torch.randint(0, CONFIG.image_vocab, (len(rows), CONFIG.image_len))
    cache = new_cache(model, rows)
    assert {layer.text.shape for layer in cache.layers} == {(2, len(text), CONFIG.heads, CONFIG.text_len, 8)}
    found = [prefill(model, text, cache)]
    found += [
        DecodingWeights(model, reused=False).step(codes[:, step], step, cache) for step in range(CONFIG.image_len - 1)
    ]
    expected = model(text[rows], codes).image_logits
    assert (torch.stack(found, dim=1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("first", [0, 7])
@torch.no_grad()
def test_a_prompt_can_be_taken_over(first: int) -> None:
    """Prompts run through the model one at a time, and then images of all of them in one batch."""
    model = build(attention=KINDS, depth=4, mask_padding=True)
    text, codes = batch(CONFIG)
    rows = [2, 0, 1, 2, 0]
    known, prefixes = codes[:, :first], []
    for prompt in range(3):
        prefix = new_cache(model, 1)
        prefill(model, text[prompt : prompt + 1], prefix, known[prompt : prompt + 1] if first else None)
        prefixes.append(prefix)
    cache = new_cache(model, rows)
    cache.load(prefixes)
    expected = model(text[rows], codes[rows]).image_logits
    for step in range(first, CONFIG.image_len - 1):
        logits = DecodingWeights(model, reused=False).step(codes[rows][:, step], step, cache)
        assert (logits - expected[:, step + 1]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "text_len", "kernel"), SHAPES)
def test_each_position_reads_what_its_mask_allows_and_no_more(kind: str, grid: int, text_len: int, kernel: int) -> None:
    """Against the dense mask, by following what lies in each slot."""
    slots = slots_of(kind, grid, kernel)
    mask = attention_mask(kind, text_len, grid, kernel)[text_len:, text_len:]
    held = [-1] * slots.count
    for position in range(grid**2):
        held[slots.written[position]] = position
        read = [held[slot] for run in slots.runs[position] for slot in range(run.start, run.stop)]
        assert sorted(read) == mask[position].nonzero()[:, 0].tolist()
        assert slots.reads[position] == len(read)


def test_slots_are_those_that_a_kind_needs() -> None:
    """At the paper's grid: a row and one more; the whole image by columns; five rows and five more."""
    counts = {kind: slots_of(kind, 32, 11).count for kind in KINDS}
    assert counts == {"row": 33, "column": 1024, "conv": 166, "full": 1024}
    most = {kind: max(slots_of(kind, 32, 11).reads) for kind in KINDS}
    assert most == {"row": 33, "column": 32, "conv": 61, "full": 1024}
    assert all(len(runs) == 1 for kind in ("row", "column", "full") for runs in slots_of(kind, 32, 11).runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_buffers(dtype: torch.dtype) -> None:
    model = build(attention=KINDS, depth=4).to(dtype)
    config = model.config
    cache = new_cache(model, [0, 0, 1, 1, 1])
    assert cache.nbytes == 2 * bytes_per_prompt(config, dtype) + 5 * sum(bytes_per_row(config, dtype).values())
    for kind, layer in zip(KINDS, cache.layers, strict=True):
        assert layer.codes.nbytes == 5 * bytes_per_row(config, dtype)[kind]
        per_slot = layer.codes.nbytes // layer.slots.count
        assert 5 * bytes_per_row(config, dtype, 9)[kind] == layer.slots.reads[9] * per_slot
    counted = bytes_per_step(config, dtype, rows=5, prompts=2, position=9)
    norms = sum(value.numel() for name, value in model.blocks.named_parameters() if "norm" in name)
    weights = sum(value.nbytes for value in model.blocks.parameters()) + norms * (4 - dtype.itemsize)
    head = sum(value.nbytes for value in model.image_head.parameters())
    head += sum(value.numel() for value in model.norm.parameters()) * 4
    assert (counted["blocks"], counted["image_head"]) == (weights, head)
    assert counted["text"] == sum(layer.text.nbytes for layer in cache.layers)
    assert sum(counted.values()) == weights + head + counted["text"] + 5 * sum(bytes_per_row(config, dtype, 9).values())


@torch.no_grad()
def test_decoding_computes_one_position() -> None:
    """The regression of peers' caches that are never used: no layer may see more than one position in a step."""
    model = build()
    text, codes = batch(CONFIG)
    cache = new_cache(model, len(text))
    prefill(model, text, cache)
    seen: list[int] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].numel()))
    DecodingWeights(model, reused=False).step(codes[:, 0], 0, cache)
    assert len(seen) == 6 * CONFIG.depth + 2
    assert max(seen) == 3 * 4 * CONFIG.width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_does_not_depend_on_the_number_of_rows(dtype: torch.dtype) -> None:
    """Bit for bit, at a width where products of other row counts do add up in another order."""
    model = build(width=512, depth=2, heads=8, text_len=64, grid=6, attention=("row", "conv"), image_vocab=512).to(
        dtype
    )
    weights, config = DecodingWeights(model), model.config
    text = torch.randint(0, 20, (1, config.text_len))
    prefix = new_cache(model, 1)
    prefill(model, text, prefix)
    codes = torch.randint(0, config.image_vocab, (40, 12)).repeat(2, 1)
    expected = None
    for rows in (4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 64, 80):
        cache = new_cache(model, [0] * rows)
        cache.load([prefix])
        logits = torch.stack([weights.step(codes[:rows, step], step, cache) for step in range(12)])
        expected = logits if expected is None else expected
        assert torch.equal(logits[:, :4], expected), f"{rows} rows"
    assert torch.equal(logits[:, 40:44], expected)


@torch.no_grad()
def test_weights_are_those_of_the_moment() -> None:
    """Made anew after the model was trained on, they are the new ones."""
    model = build()
    linear = model.blocks[1].up
    before, x = PackedLinear(linear.weight, linear.bias, gelu=True), torch.randn(4, CONFIG.width)
    torch.testing.assert_close(before(x), torch.nn.functional.gelu(linear(x)))
    text, codes = batch(CONFIG)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    expected = model(text, codes).image_logits
    assert (decoded(model, text, codes, weights=DecodingWeights(model)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_without_packing_there_is_an_ordinary_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = torch.randn(24, 16).to(dtype), torch.randn(24).to(dtype), torch.randn(9, 16).to(dtype)
    packed = PackedLinear(weight, bias, gelu=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    ordinary = PackedLinear(weight, bias, gelu=True)
    assert not ordinary.packed
    torch.testing.assert_close(ordinary(x), packed(x), atol=1e-5 if dtype == torch.float32 else 0.02, rtol=1.6e-2)
    assert torch.equal(ordinary(x)[:4], ordinary(x[:4]))


@torch.no_grad()
def test_logits_of_a_bf16_model_are_fp32_and_near() -> None:
    model = build(attention=KINDS, depth=4).bfloat16()
    text, codes = batch(CONFIG)
    expected = model(text, codes).image_logits
    found = decoded(model, text, codes, weights=DecodingWeights(model))
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 8.0, 40.0])
def test_what_a_graph_holds_attends_as_exactly_as_torch(dtype: torch.dtype, size: float) -> None:
    """Scores are fp32: rounded to 16 bits they would be off by several per cent here, and infinite in fp16."""
    queries, keys, values = (
        torch.randn(2, 3, n, 64).mul(scale).to(dtype) for n, scale in ((5, size), (9, size), (9, 1))
    )
    bias = torch.zeros(9).masked_fill_(torch.arange(9) == 4, float("-inf"))
    found, total = _attend_plainly(queries, keys, values, bias)
    scores = (queries.double() @ keys.double().transpose(-1, -2)) / 8 + bias
    torch.testing.assert_close(total.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    exact = scores.softmax(-1) @ values.double()
    error = 4 * torch.finfo(dtype).eps + 1e-6 * size**2
    assert (found - exact).abs().max() < error * values.abs().max()


@torch.no_grad()
def test_mistakes_are_named() -> None:
    model = build()
    text, codes = batch(CONFIG)
    cache = new_cache(model, len(text))
    prefill(model, text, cache)
    for step in (-1, CONFIG.image_len - 1):
        with pytest.raises(ConfigError, match=rf"\[0, 14\].*found {step}"):
            DecodingWeights(model, reused=False).step(codes[:, 0], step, cache)
    with pytest.raises(DataError, match="3 prompts, found 2 captions"):
        prefill(model, text[:2], cache)
    with pytest.raises(DataError, match=r"at most 15.*\(3, 16\)"):
        prefill(model, text, cache, codes)
    with pytest.raises(DataError, match=r"\[0, 15\]"):
        DecodingWeights(model, reused=False).step(codes[:, 0] + 16, 0, cache)
