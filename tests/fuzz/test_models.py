"""Exported models and pickles."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dalle_ds.config import DiscreteVAEConfig, VqganConfig
from dalle_ds.doctor.weights import check_weights
from dalle_ds.interop import load_openai_dvae, load_tensors, load_vqgan
from dalle_ds.models import Dalle, DiscreteVAE, Vqgan
from dalle_ds.sampling import TextToImage
from dalle_ds.text.tokenizer import Tokenizer
from tests.conftest import TINY_DALLE, TINY_DVAE
from tests.fuzz.harness import survives
from tests.fuzz.strategies import damaged_bytes, damaged_json, damaged_tree
from tests.interop import programs


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A random transformer's export, of which files are exchanged."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported") / "export"
    TextToImage(
        Dalle(TINY_DALLE).eval(), DiscreteVAE(TINY_DVAE).eval(), Tokenizer.load(tokenizer_file)
    ).save_pretrained(folder)
    return folder


def test_what_is_whole_is_taken(exported: Path, tmp_path: Path) -> None:
    assert survives("exports, JSON", lambda: TextToImage.from_pretrained(exported)) is not None
    for content in PICKLES:
        (tmp_path / "whole.pkl").write_bytes(content)
        tensors = survives("pickles, damaged", lambda: load_tensors(tmp_path / "whole.pkl", CLASSES))
        assert len(tensors) == 4


class Exchanged:
    """A file with other contents for a while."""

    def __init__(self, file: Path, content: bytes) -> None:
        self.file, self.content, self.before = file, content, file.read_bytes()

    def __enter__(self) -> None:
        self.file.write_bytes(self.content)

    def __exit__(self, *_: Any) -> None:
        self.file.write_bytes(self.before)


@given(data=st.data(), name=st.sampled_from(["config.json", "dvae/config.json", "parts.json"]))
def test_descriptions(data: st.DataObject, name: str, exported: Path) -> None:
    content = data.draw(damaged_json(json.loads((exported / name).read_text())))
    with Exchanged(exported / name, content):
        survives("exports, JSON", lambda: TextToImage.from_pretrained(exported))
        survives("doctor, JSON", lambda: check_weights(exported))


def safetensors_files(valid: bytes) -> st.SearchStrategy[bytes]:
    """Damage anywhere, or to the JSON in front of the tensors."""
    (length,) = struct.unpack("<Q", valid[:8])
    header, body = json.loads(valid[8 : 8 + length]), valid[8 + length :]

    def file(tree: Any) -> bytes:
        text = json.dumps(tree).encode()
        return struct.pack("<Q", len(text)) + text + body

    few = {name: header[name] for name in list(header)[:8]}
    others = {name: header[name] for name in list(header)[8:]}
    return st.one_of(
        damaged_bytes(valid),
        damaged_bytes(valid[: 8 + length]).map(lambda front: front + body),
        damaged_tree(few).map(lambda tree: file({**tree, **others} if isinstance(tree, dict) else tree)),
    )


@given(data=st.data(), name=st.sampled_from(["dvae/model.safetensors", "model.safetensors"]))
def test_weights(data: st.DataObject, name: str, exported: Path) -> None:
    content = data.draw(safetensors_files((exported / name).read_bytes()))
    with Exchanged(exported / name, content):
        # One by one: together they would be refused by the fingerprints of parts.json already.
        survives("exports, safetensors", lambda: DiscreteVAE.from_pretrained(exported / "dvae"))
        survives("exports, safetensors", lambda: Dalle.from_pretrained(exported))
        survives("doctor, safetensors", lambda: check_weights(exported))


def saved(content: Any, new_format: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new_format)
    return buffer.getvalue()


CLASSES = ("torch.nn.modules.linear.Linear",)
MODULE = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 1)))
PICKLES = [saved(content, new) for content in (MODULE, MODULE.state_dict()) for new in (True, False)]
OPCODES = [
    b"\x80\x02",
    b"}",
    b"]",
    b")",
    b"(",
    b"t",
    b"u",
    b"R",
    b"b",
    b"\x81",
    b"Q",
    b"q\x00",
    b"h\x00",
    b"\x93",
    b"0",
    b"N",
    b"a",
    b"e",
]
OPCODES += [
    b"s",
    b"\x85",
    b"\x86",
    b"\x87",
    b"\x88",
    b"J\xff\xff\xff\xff",
    b"K\x02",
    b"\x8f",
    b"\x90",
    b"\x94",
    b".",
    b"2",
    b"1",
    b"\x92",
]
PARTS = [
    *OPCODES, programs.storage(), programs.tensor(), programs.text("w"), programs.text("_modules"), programs.number(2**40),
    programs.name("torch._utils", "_rebuild_tensor_v2"), programs.name("torch.nn.modules.container", "Sequential"),
    programs.name("collections", "OrderedDict"), programs.name("os", "system"), programs.module(), programs.dictionary(w=b"N"),
]  # fmt: skip


@given(content=st.sampled_from(PICKLES).flatmap(damaged_bytes))
def test_pickles(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.pkl"
    file.write_bytes(content)
    survives("pickles, damaged", lambda: load_tensors(file, CLASSES))
    survives("doctor, pickles", lambda: check_weights(file))


@given(parts=st.lists(st.sampled_from(PARTS) | st.binary(max_size=4), max_size=30), zipped=st.booleans())
def test_programs(parts: list[bytes], zipped: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    write = programs.write_zip if zipped else programs.write_legacy
    file = write(tmp_path_factory.getbasetemp() / "fuzzed.pkl", programs.program(*parts))
    survives("pickles, instructions", lambda: load_tensors(file))
    survives("doctor, pickles", lambda: check_weights(file))


SMALL_RELEASE = DiscreteVAE(
    DiscreteVAEConfig(
        image_size=16, encoder_width=8, decoder_width=8, decoder_input=8, vocab_size=16, blocks_per_group=1
    )
)


@given(data=st.data())
@settings(max_examples=max(15, settings().max_examples // 4))  # each writes two files and builds a model
def test_state_dicts_for_a_dvae(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of the right names, with shapes that are not."""
    folder = tmp_path_factory.getbasetemp()
    files = []
    for part in ("encoder", "decoder"):
        state = dict(getattr(SMALL_RELEASE, part).state_dict())
        for _ in range(data.draw(st.integers(0, 2))):
            name = data.draw(st.sampled_from(sorted(state)))
            shape = data.draw(st.lists(st.integers(0, 8), max_size=5))
            state[name] = torch.zeros(shape)
        files.append(folder / f"{part}.pkl")
        torch.save(state, files[-1])
    survives("OpenAI's dVAE", lambda: load_openai_dvae(*files, image_size=16))
    survives("doctor, state dicts", lambda: [check_weights(file) for file in files])


SMALL_VQGAN = Vqgan(
    VqganConfig(image_size=16, width=32, multipliers=(1, 1), blocks_per_level=1, attention_levels=(1,), vocab_size=16)
)


@given(data=st.data())
@settings(max_examples=max(15, settings().max_examples // 4))
def test_state_dicts_for_a_vqgan(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    state, file = dict(SMALL_VQGAN.state_dict()), tmp_path_factory.getbasetemp() / "vqgan.ckpt"
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(sorted(state)))
        other = name.replace("0", data.draw(st.sampled_from(["0", "7", "77", "-1"])))
        state[other] = torch.zeros(data.draw(st.lists(st.integers(0, 8), max_size=5)))
    torch.save({"state_dict": state}, file)
    survives("VQGAN", lambda: load_vqgan(file, image_size=16))
    survives("doctor, state dicts", lambda: check_weights(file))
