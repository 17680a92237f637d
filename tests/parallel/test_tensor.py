"""A transformer divided among 2 and 4 processes is the same transformer: weights, losses, gradients, logits, images."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_ds.config import to_dict
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.models import Dalle, DiscreteVAE
from dalle_ds.models.decoding import new_cache
from dalle_ds.parallel import Split, TensorGroup, split_of
from dalle_ds.sampling import TextToImage
from dalle_ds.text.tokenizer import Tokenizer
from tests.conftest import TINY_DALLE
from tests.parallel.tensor_worker import with_biases
from tests.processes import run_ranks

WORKER = Path(__file__).with_name("tensor_worker.py")
CONFIG = dataclasses.replace(
    TINY_DALLE, heads=4, attention=("row", "column", "conv", "full"), kernel=3, mask_padding=True
)
PROMPTS = ["a red circle", "a blue square"]


def case(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "sequence": False,
        "checkpointing": "none",
        "scale": 0,
        "logits": False,
        "dropout": 0.0,
    } | changes


CASES = [
    case("plain"),
    case("logits", logits=True),
    case("selective", checkpointing="selective"),
    case("full", checkpointing="full"),
    case("scaled", scale=1024),
    case("dropout", dropout=0.3),
    case("dropout-full", dropout=0.3, checkpointing="full", logits=True),
    case("sequence-dropout", dropout=0.3, sequence=True),
    case("sequence", sequence=True),
    case("sequence-logits", sequence=True, logits=True),
    case("sequence-selective", sequence=True, checkpointing="selective"),
    case("sequence-full-scaled", sequence=True, checkpointing="full", scale=1024),
]


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, CONFIG.text_vocab, (3, CONFIG.text_len), generator=generator)
    for row, length in enumerate((2, CONFIG.text_len, 5)):
        text[row, length:] = -1
    codes = torch.randint(0, CONFIG.image_vocab, (3, CONFIG.image_len), generator=generator)
    return {"text": text, "codes": codes, "dropout_seeds": torch.tensor([5, 2**62, 11])}


@functools.cache
def whole(rate: float) -> dict[str, Tensor]:
    """What one process computes."""
    torch.manual_seed(0)
    model = Dalle(dataclasses.replace(CONFIG, dropout=rate))
    result = {name: p.detach().clone() for name, p in model.named_parameters()}
    output = model(**batch())
    output.loss.backward()
    result |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = ("loss", "text_loss", "text_logits", "image_logits")
    return result | {name: getattr(output, name).detach() for name in names}


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory, dvae_export: Path, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("tensor")
    torch.save(batch(), folder / "batch.pt")
    job = {"out": str(folder), "model": to_dict(CONFIG), "cases": CASES, "prompts": PROMPTS}
    job |= {"dvae": str(dvae_export), "tokenizer": str(tokenizer_file)}
    (folder / "job.json").write_text(json.dumps(job))
    for processes in (2, 4):
        done = run_ranks(WORKER, folder / "job.json", processes=processes)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("entry", CASES, ids=lambda entry: entry["name"])
def test_it_is_the_same_model(divided: Path, entry: dict[str, Any], processes: int) -> None:
    found = torch.load(divided / f"{entry['name']}-{processes}.pt", weights_only=True)
    expected = whole(entry["dropout"])
    gradients = {key for key in expected if key.endswith(".grad")}
    assert {key for key in found if key.endswith(".grad")} == gradients and len(gradients) > 50
    for key, value in found.items():
        if key + ".grad" in gradients:
            assert torch.equal(value, expected[key]), f"{key} does not start from the same numbers"
        else:
            assert value.shape == expected[key].shape, key
            assert (value - expected[key]).abs().max() < 1e-5 * max(1.0, float(expected[key].abs().max())), key


def test_dropout_changes_the_loss() -> None:
    """Equal losses would prove nothing about it otherwise."""
    assert abs(whole(0.3)["loss"] - whole(0.0)["loss"]) > 1e-3


@pytest.mark.launch
@pytest.mark.parametrize("processes", [2, 4])
def test_it_draws_the_same_pictures(divided: Path, dvae_export: Path, tokenizer_file: Path, processes: int) -> None:
    found = torch.load(divided / f"drawn-{processes}.pt", weights_only=True)
    torch.manual_seed(0)
    model = with_biases(Dalle(CONFIG).eval())
    pipeline = TextToImage(model, DiscreteVAE.from_pretrained(dvae_export), Tokenizer.load(tokenizer_file))
    drawn = [picture.tobytes() for row in pipeline.generate(PROMPTS, num=3, seed=5) for picture in row]
    assert [bytes(row.tolist()) for row in found["pictures"]] == drawn
    assert len(set(drawn)) > 1
    text, _ = pipeline.tokenizer.encode_padded(PROMPTS, CONFIG.text_len)
    codes = (torch.arange(CONFIG.image_len) % CONFIG.image_vocab).expand(len(text), -1)
    with torch.no_grad():
        logits = model(text, codes).image_logits
    assert logits is not None
    torch.testing.assert_close(found["decoded"].transpose(0, 1), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("split", "shape"), [(Split(0), (12, 5)), (Split(1), (3, 8)), (Split(0, 3), (24,))])
def test_pieces_join_to_the_whole(split: Split, shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape)
    pieces = [split.cut(whole, rank, 4) for rank in range(4)]
    assert all(piece.numel() == whole.numel() // 4 for piece in pieces)
    assert torch.equal(split.join(pieces), whole)


def test_fused_matrices_are_divided_by_head() -> None:
    """Each process gets the queries, keys and values of its own heads."""
    whole = torch.arange(12).repeat_interleave(2)  # 3 × 4 heads of size 2
    assert Split(0, 3).cut(whole, 1, 2).unique().tolist() == [2, 3, 6, 7, 10, 11]


def test_a_part_loads_its_own_of_an_export_and_cannot_be_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Dalle(CONFIG)
    model.save_pretrained(tmp_path)
    part = Dalle.from_pretrained(tmp_path, tensor=TensorGroup(1, 2))
    for (name, piece), whole in zip(part.named_parameters(), model.parameters(), strict=True):
        split = split_of(piece)
        expected = whole if split is None else split.cut(whole, 1, 2)
        assert torch.equal(piece, expected), name
    assert {name.rsplit(".", 2)[-2] for name, p in part.named_parameters() if split_of(p) is not None} == {
        *("qkv", "out", "up", "down", "text_token", "image_token", "text_head", "image_head")
    }
    with pytest.raises(CheckpointError, match="one of the model's 2 parts"):
        part.save_pretrained(tmp_path / "part")


def test_a_group_that_does_not_divide_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.heads=4 cannot be divided among parallel\.tensor=3"):
        Dalle(CONFIG, tensor=TensorGroup(0, 3))


def test_divided_positions_cannot_draw() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.sequence"):
        new_cache(Dalle(CONFIG, tensor=TensorGroup(0, 2, sequence=True)), 1)
