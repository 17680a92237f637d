"""CLIPs of others, their tokenizers, and captions for them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_ds.interop import export_clip, load_clip, load_tensors
from dalle_ds.interop.clip_layouts import to_openai
from dalle_ds.models import Clip
from dalle_ds.text.clip_tokenizer import BytePairs, ClipTokenizer
from tests.fuzz.harness import survives
from tests.fuzz.strategies import any_text, damaged_bytes, damaged_json
from tests.fuzz.test_models import Exchanged
from tests.interop import programs
from tests.models.test_clip import SMALL, clip

DESCRIPTIONS = ("hf/config.json", "hf/preprocessor_config.json", "open_clip/open_clip_config.json", "ours/config.json")
MERGES = [("a", "b"), ("ab", "c</w>"), ("t", "h"), ("th", "e</w>")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP in every layout, of which files are exchanged."""
    place = tmp_path_factory.mktemp("clips")
    tokenizer = ClipTokenizer(BytePairs(MERGES))
    model = clip(replace(SMALL, text_vocab=tokenizer.pieces.vocab_size + 2), tokenizer=tokenizer)
    for format in ("hf", "open_clip", "openai"):
        export_clip(model, place / format, format)
    model.save_pretrained(place / "ours")
    return place


def load(folder: Path) -> Any:
    return Clip.from_pretrained(folder) if folder.name == "ours" else load_clip(folder)


def test_what_is_whole_is_taken(folder: Path) -> None:
    for name in ("hf", "open_clip", "openai", "ours"):
        assert survives("CLIPs, JSON", lambda name=name: load(folder / name)) is not None


@given(data=st.data(), name=st.sampled_from(DESCRIPTIONS))
@settings(max_examples=max(30, settings().max_examples // 2))
def test_descriptions(data: st.DataObject, name: str, folder: Path) -> None:
    content = data.draw(damaged_json(json.loads((folder / name).read_text())))
    with Exchanged(folder / name, content):
        survives("CLIPs, JSON", lambda: load((folder / name).parent))


@given(data=st.data())
@settings(max_examples=max(15, settings().max_examples // 4))  # each writes a file and may build a model
def test_state_dicts(data: st.DataObject, folder: Path) -> None:
    """Of the right names, with shapes that are not."""
    state = to_openai(clip(SMALL).state_dict(), SMALL)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(state)))
        state[name] = torch.zeros(data.draw(st.lists(st.integers(0, 130), max_size=4).filter(lambda s: len(s) < 3)))
    torch.save(state, folder / "changed.pt")
    survives("CLIPs, state dicts", lambda: load_clip(folder / "changed.pt"))


SCRIPTED = [
    programs.name("__torch__", "Net"),
    programs.name("__torch__.os", "system"),
    programs.name("torch.jit._pickle", "build_intlist"),
    programs.tensor(),
    programs.storage(),
    programs.text("w"),
    programs.module(programs.name("__torch__", "Net"), w=programs.tensor()),
    *(b")", b"\x81", b"}", b"(", b"u", b"b", b"R", b"t", b"q\x00", b"h\x00", b"s", b"0", b"2"),
]


@given(parts=st.lists(st.sampled_from(SCRIPTED) | st.binary(max_size=4), max_size=30))
def test_torchscript_programs(parts: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    entries = {"data/0": bytes(4 * programs.FLOATS), "constants.pkl": b""}
    file = programs.write_zip(tmp_path_factory.getbasetemp() / "fuzzed.pt", programs.program(*parts), entries)
    survives("TorchScript, instructions", lambda: load_tensors(file, None))


@given(data=st.data(), kind=st.sampled_from(["merges.txt", "merges.txt.gz", "tokenizer.json", "vocab.json"]))
def test_tokenizers(data: st.DataObject, kind: str, folder: Path) -> None:
    place = folder / "tokenizers"
    place.mkdir(exist_ok=True)
    pieces = BytePairs(MERGES)
    pieces.save(place / "merges.txt")
    (place / "vocab.json").write_text(json.dumps(pieces.vocabulary))
    file = place / kind
    if kind.endswith(".json"):
        # A few of the pieces, so that the damage is not to these alone.
        few = dict(list(pieces.vocabulary.items())[-6:])
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "merges": [list(merge) for merge in MERGES], "vocab": few}
        file.write_bytes(data.draw(damaged_json({"model": model} if kind == "tokenizer.json" else few)))
    else:
        content = (place / "merges.txt").read_bytes()
        file.write_bytes(data.draw(damaged_bytes(gzip.compress(content) if kind.endswith(".gz") else content)))
    survives("CLIP's tokenizers", lambda: ClipTokenizer.load(place if kind == "vocab.json" else file))


@given(
    texts=st.lists(any_text | st.text("ab the'sT&;<|>#x1", max_size=200), min_size=1, max_size=4),
    length=st.integers(3, 20),
)
def test_captions(texts: list[str], length: int) -> None:
    tokenizer = ClipTokenizer(BytePairs(MERGES))
    rows = survives("captions for CLIP", lambda: tokenizer.encode(texts, length))
    assert rows is not None and (rows == tokenizer.end).sum(dim=1).tolist() == [1] * len(texts)
    assert (rows[:, 0] == tokenizer.start).all() and int(rows.min()) >= -1
    for row in rows:
        assert isinstance(survives("captions for CLIP", lambda row=row: tokenizer.decode(row.tolist())), str)
