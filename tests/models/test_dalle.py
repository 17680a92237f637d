"""The transformer: what predicts what, what may influence what, the loss, the cache, and the export."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.config import DalleConfig
from dalle_ds.errors import CheckpointError, DataError
from dalle_ds.models.dalle import Dalle
from dalle_ds.nn.layers import LayerNorm

CONFIG = DalleConfig(width=32, depth=3, heads=4, text_len=6, grid=4, text_vocab=20, image_vocab=16, kernel=3)
T, CODES = CONFIG.text_len, CONFIG.image_len
SCHEDULES = [("row",) * 3, ("column",) * 3, ("conv",) * 3, ("full",) * 3, None]


def build(seed: int = 0, **changes: object) -> Dalle:
    """A model whose every weight matters: biases and gains are random too."""
    torch.manual_seed(seed)
    model = Dalle(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(size: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, CONFIG.text_vocab, (size, T), generator=generator)
    for row in range(size):
        text[row, 2 + row :] = -1
    return text, torch.randint(0, CONFIG.image_vocab, (size, CODES), generator=generator)


def reference_hidden(model: Dalle, text: Tensor, codes: Tensor) -> Tensor:
    """The paper's computation, one position at a time, from the state dict alone: (B, T + W², width)."""
    weights, side, heads = model.state_dict(), CONFIG.grid, CONFIG.heads
    kernel_reach, outputs = CONFIG.kernel // 2, []

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def table(name: str, index: int) -> Tensor:
        return weights[f"embedding.{name}.weight"][index]

    def keys_of(kind: str, position: int) -> list[int]:
        if position < T:
            return list(range(position + 1))
        query, allowed = position - T, []
        for key in range(query + 1):
            back = query - key
            window = any(abs(back - up * side) <= kernel_reach for up in range(kernel_reach + 1))
            if {"row": back <= side, "column": back % side == 0, "conv": window, "full": True}[kind]:
                allowed.append(T + key)
        return list(range(T)) + allowed

    kinds = model.config.attention or ("row", "column", "conv")
    for caption, picture in zip(text.tolist(), codes.tolist(), strict=True):
        slots = [table("padding", i) if token < 0 else table("text_token", token) for i, token in enumerate(caption)]
        inputs = [table("start", 0) + table("text_position", 0)]
        inputs += [slots[i - 1] + table("text_position", i) for i in range(1, T)]
        inputs += [table("start", 1) + slots[-1] + table("image_row", 0) + table("image_column", 0)]
        inputs += [
            table("image_token", picture[i - 1]) + table("image_row", i // side) + table("image_column", i % side)
            for i in range(1, CODES)
        ]
        x = torch.stack(inputs)
        for layer, kind in enumerate(kinds):
            name = f"blocks.{2 * layer}"
            q, k, v = linear(norm(x, f"{name}.norm"), f"{name}.attention.qkv").chunk(3, dim=-1)
            attended = torch.zeros_like(x)
            for position in range(len(x)):
                keys = keys_of(kind, position)
                for head in torch.arange(CONFIG.width).chunk(heads):
                    scores = k[keys][:, head] @ q[position, head] / math.sqrt(len(head))
                    attended[position, head] = scores.softmax(0) @ v[keys][:, head]
            x = x + linear(attended, f"{name}.attention.out")
            name = f"blocks.{2 * layer + 1}"
            hidden = F.gelu(linear(norm(x, f"{name}.norm"), f"{name}.up"))
            x = x + hidden @ weights[f"{name}.down.weight"] + weights[f"{name}.down.bias"]  # stored (inputs, outputs)
        outputs.append(norm(x, "norm"))
    return torch.stack(outputs)


@pytest.mark.parametrize("attention", SCHEDULES)
@torch.no_grad()
def test_logits_and_losses_are_the_papers(attention: tuple | None) -> None:
    """Against a reading of the paper with loops for everything, weights from the state dict."""
    model = build(attention=attention)
    text, codes = batch()
    out = model(text, codes)
    hidden, weights = reference_hidden(model, text, codes), model.state_dict()
    text_logits = hidden[:, :T] @ weights["text_head.weight"].T + weights["text_head.bias"]
    image_logits = hidden[:, T:] @ weights["image_head.weight"].T + weights["image_head.bias"]
    torch.testing.assert_close(out.text_logits, text_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.image_logits, image_logits, atol=1e-4, rtol=1e-4)

    text_log, image_log = text_logits.log_softmax(-1), image_logits.log_softmax(-1)
    nats = [-text_log[b, p, text[b, p]] for b in range(len(text)) for p in range(T) if text[b, p] >= 0]
    text_loss = sum(nats) / len(nats)
    image_loss = -image_log.gather(-1, codes[..., None]).mean()
    assert len(nats) == int(out.text_tokens)
    torch.testing.assert_close(out.text_loss, text_loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.image_loss, image_loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, text_loss / 8 + image_loss * 7 / 8, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_token_reaches_later_positions_only() -> None:
    """Token p changes no logits at positions up to p, which predict it and those before, and does change p + 1."""
    model = build(attention=("full",) * 3)
    text, codes = batch()
    text = text.clamp(min=0)  # no padding: the last text slot holds a token too
    before = model(text, codes)
    for position in range(T + CODES):
        changed_text, changed_codes = text.clone(), codes.clone()
        if position < T:
            changed_text[:, position] = (text[:, position] + 1) % CONFIG.text_vocab
        else:
            changed_codes[:, position - T] = (codes[:, position - T] + 1) % CONFIG.image_vocab
        after = model(changed_text, changed_codes)
        text_change = (after.text_logits - before.text_logits).abs().amax(dim=(0, 2))
        image_change = (after.image_logits - before.image_logits).abs().amax(dim=(0, 2))
        changes = torch.cat([text_change, image_change])
        assert changes[: position + 1].max() == 0
        assert position == T + CODES - 1 or changes[position + 1] > 1e-4


def test_batch_without_captions() -> None:
    model = build()
    text, codes = batch()
    out = model(torch.full_like(text, -1), codes)
    out.loss.backward()
    assert out.text_loss.item() == 0
    assert out.text_tokens.item() == 0
    torch.testing.assert_close(out.loss, out.image_loss * 7 / 8)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_arguments_are_left_alone() -> None:
    text, codes = batch()
    kept = text.clone(), codes.clone()
    build()(text, codes).loss.backward()
    assert torch.equal(text, kept[0])
    assert torch.equal(codes, kept[1])


@pytest.mark.parametrize("attention", SCHEDULES)
def test_checkpointing_changes_no_gradient(attention: tuple | None) -> None:
    text, codes = batch()
    gradients = []
    for checkpointing in ("none", "selective", "full"):
        model = build(attention=attention, mask_padding=True)
        model.checkpointing = checkpointing
        calls: list[str] = []
        for name in ("blocks.0.norm", "blocks.0.attention.out", "blocks.1.norm", "blocks.1.up", "blocks.1.down"):
            module = model.get_submodule(name)
            module.register_forward_hook(lambda *_, calls=calls, name=name: calls.append(name))
        model(text, codes, logits=False).loss.backward()
        # Matrix products whose results nothing needs are not repeated.
        twice = {name for name in calls if calls.count(name) == 2}
        norms = {"blocks.0.norm", "blocks.1.norm"}
        assert twice == {"none": set(), "selective": norms, "full": norms | {"blocks.1.up"}}[checkpointing]
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        for plain, recomputed in zip(gradients[0], other, strict=True):
            assert torch.equal(plain, recomputed)


def test_without_logits_nothing_else_changes() -> None:
    """Losses and gradients of the chunked path are those of the logits, in fp32."""
    text, codes = batch()
    results = []
    for logits in (True, False):
        model = build()
        out = model(text, codes, logits=logits)
        out.loss.backward()
        assert (out.text_logits is None) == (out.image_logits is None) == (not logits)
        results.append((out, [parameter.grad for parameter in model.parameters()]))
    (plain, plain_gradients), (chunked, chunked_gradients) = results
    for name in ("loss", "text_loss", "image_loss", "text_tokens"):
        torch.testing.assert_close(getattr(plain, name), getattr(chunked, name))
    for ours, theirs in zip(chunked_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attention", SCHEDULES)
def test_masked_padding_reaches_nothing(attention: tuple | None) -> None:
    """With mask_padding the padding embeddings change no code's logits; without it, as in the paper, they do."""
    text, codes = batch()
    for mask_padding in (True, False):
        model = build(attention=attention, mask_padding=mask_padding)
        before = model(text, codes).image_logits
        # The last slot is also part of the start of the image, which is attended to: leave it.
        model.embedding.padding.weight[:-1] += 1.0
        after = model(text, codes).image_logits
        assert torch.equal(before, after) == mask_padding


@torch.no_grad()
@pytest.mark.parametrize("attention", SCHEDULES)
def test_masking_padding_leaves_the_caption(attention: tuple | None) -> None:
    """The last token of a caption reaches the codes, whether or not padding follows it."""
    text, codes = batch()
    text[:, 2:] = -1
    text[0, -1] = 3  # no padding at the end
    other = text.clone()
    other[:, 1] = (other[:, 1] + 1) % CONFIG.text_vocab
    model = build(attention=attention, mask_padding=True)
    before, after = (model(some, codes).image_logits for some in (text, other))
    assert ((before - after).abs().amax(dim=(1, 2)) > 1e-4).all()


def test_norms_are_fp32_whatever_their_gains() -> None:
    norm, x = LayerNorm(64), torch.randn(5, 64) * 30 + 1
    torch.nn.init.normal_(norm.weight)
    norm = norm.bfloat16()
    expected = torch.nn.functional.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double())
    torch.testing.assert_close(norm(x), expected.float(), atol=1e-5, rtol=1e-5)


def test_bf16_weights_keep_an_fp32_residual_stream() -> None:
    model = build().bfloat16()
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    inner: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, arguments, output: seen.append((arguments[0].dtype, output.dtype)))
    for name, module in model.blocks.named_modules():
        if name.endswith(("qkv", "out", "up", "down")):
            module.register_forward_hook(lambda _, arguments, output: inner.append(output.dtype))
    text, codes = batch()
    out = model(text, codes)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert set(inner) == {torch.bfloat16}
    assert {out.loss.dtype, out.text_logits.dtype, out.image_logits.dtype} == {torch.float32}
    assert abs(out.loss.item() - build()(text, codes).loss.item()) < 0.05


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    """Initial weights of the right size, at two widths, give a loss close to ln(vocabulary)."""
    for width in (32, 256):
        torch.manual_seed(0)
        model = Dalle(dataclasses.replace(CONFIG, width=width, depth=8, text_vocab=500, image_vocab=500))
        out = model(*batch())
        assert abs(out.image_loss.item() - math.log(500)) < 0.6
        assert abs(out.text_loss.item() - math.log(500)) < 0.6


def test_initial_weights() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, width=192, depth=4)
    for name, value in Dalle(config).state_dict().items():
        if name.endswith("bias"):
            assert value.abs().max() == 0, name
        elif "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            inputs = value.shape[0] if name.endswith("down.weight") else value.shape[1]
            expected = 0.02 if name.startswith("embedding") else (3 * inputs) ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                expected /= math.sqrt(8)
            assert value.std().item() == pytest.approx(expected, rel=0.15), name


def test_it_can_learn_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    model = Dalle(CONFIG)
    text, codes = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        out = model(text, codes)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    # Each first token is one of three captions': the floor of the text loss is ln 3 per caption, over all its tokens.
    assert out.image_loss.item() < 0.05
    assert out.text_loss.item() < 3 * math.log(3) / int(out.text_tokens) + 0.05


def test_patterns_are_three_and_not_stored() -> None:
    model = Dalle(dataclasses.replace(CONFIG, depth=6))
    assert len({block.attention.pattern for block in model.blocks[::2]}) == 3  # row, column, conv, over six layers
    assert not list(model.buffers())


def test_export_and_import(tmp_path: Path) -> None:
    model = build(attention=("full", "row", "conv"))
    model.save_pretrained(tmp_path / "run" / "export")
    text, codes = batch()
    for path in (tmp_path / "run", tmp_path / "run" / "export"):
        again = Dalle.from_pretrained(path)
        assert again.config == model.config
        assert torch.equal(again(text, codes).loss, model(text, codes).loss)
    with pytest.raises(CheckpointError, match="nothing-here"):
        Dalle.from_pretrained(tmp_path / "nothing-here")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda text, codes: (text[:, :-1], codes), r"text must have shape \(B, 6\).*\(3, 5\)"),
        (lambda text, codes: (text, codes[:, :-1]), r"codes must have shape \(B, 16\).*\(3, 15\)"),
        (lambda text, codes: (text, codes.view(3, 4, 4)), r"\(3, 4, 4\)"),
        (lambda text, codes: (text[:2], codes), "2 rows and codes 3"),
        (lambda text, codes: (text[:0], codes[:0]), r"\(0, 6\)"),
        (lambda text, codes: (text + 20, codes), r"text must lie in \[-1, 19\]"),
        (lambda text, codes: (text - 1, codes), "from -2"),
        (lambda text, codes: (text, codes - 16), r"codes must lie in \[0, 15\]"),
        (lambda text, codes: (text, codes * 0 + 16), "to 16"),
        (lambda text, codes: (text.int(), codes), "text must be int64"),
    ],
)
def test_wrong_input_is_named(spoil: object, named: str) -> None:
    with pytest.raises(DataError, match=named):
        build()(*spoil(*batch()))


def test_logits_of_a_bf16_model_are_multiplied_out_in_fp32() -> None:
    model = build().bfloat16()
    text, codes = batch()
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, arguments, output: seen.append(output))
    logits = model(text, codes).image_logits
    weight, bias = model.image_head.weight.double(), model.image_head.bias.double()
    exact = seen[0][:, model.config.text_len :].double() @ weight.T + bias
    assert seen[0].dtype == torch.float32
    assert (logits.double() - exact).abs().max() < 1e-5
