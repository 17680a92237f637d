"""Corpora from anywhere, and prepared folders that are damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_ds.data.codes import CodesCache, cache_codes
from dalle_ds.data.corpora import Broken, RawPair, read_folder, read_hf, read_webdataset
from dalle_ds.data.dataset import PairDataset
from dalle_ds.models import DiscreteVAE
from tests.conftest import TINY_DVAE
from tests.fuzz.harness import survives, survives_in_child
from tests.fuzz.strategies import any_text, damaged_bytes, damaged_json, damaged_tree, values


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()
ROWS = [{"file_name": "a.png", "caption": "a red square"}, {"file_name": "b.png", "caption": ["one", "two"]}]


def read_all(corpus: Iterable[RawPair | Broken]) -> list[RawPair | Broken]:
    found = list(corpus)
    for pair in found:
        if isinstance(pair, RawPair):
            assert pair.captions and all(isinstance(caption, str) for caption in pair.captions)
            assert isinstance(pair.image, bytes)
        else:
            assert pair.reason
    return found


def clean(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    folder = tmp_path_factory.getbasetemp() / f"fuzzed-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def tables() -> st.SearchStrategy[tuple[str, bytes]]:
    row = damaged_tree(ROWS[0]) | values()
    lines = st.lists(row.map(json.dumps) | st.just("[" * 100_000) | any_text, max_size=4).map("\n".join)
    jsonl = lines.map(lambda text: text.encode(errors="surrogatepass"))
    csv = damaged_bytes(b'file_name,caption\na.png,"a red square, small"\nb.png,two\n', most=4) | jsonl
    return st.tuples(st.just("t.jsonl"), jsonl) | st.tuples(st.just("t.csv"), csv)


@given(table=tables(), columns=st.sampled_from([(None, None), ("file_name", "caption"), ("caption", "x")]))
def test_tables(table: tuple[str, bytes], columns: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = clean(tmp_path_factory, "table")
    (folder / "a.png").write_bytes(PICTURE)
    (folder / table[0]).write_bytes(table[1])
    survives("tables of captions", lambda: read_all(read_folder(str(folder), *columns)))


@given(caption=st.binary(max_size=60) | any_text.map(lambda text: text.encode(errors="surrogatepass")))
@settings(max_examples=max(10, settings().max_examples // 2))
def test_caption_files(caption: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = clean(tmp_path_factory, "captions")
    (folder / "a.png").write_bytes(PICTURE)
    (folder / "a.txt").write_bytes(caption)
    survives("caption files", lambda: read_all(read_folder(str(folder))))


def tar_of(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


MEMBERS = [
    ("a.png", PICTURE),
    ("a.txt", b"a red square"),
    ("b.png", PICTURE),
    ("b.json", json.dumps({"caption": "two"}).encode()),
]
TARS = [tar_of(MEMBERS), tar_of(MEMBERS, tarfile.GNU_FORMAT), tar_of([("x" * 300 + ".png", PICTURE), ("ü.txt", b"x")])]
TARS += [pack(TARS[0]) for pack in (gzip.compress, bz2.compress, lzma.compress)]


@example(content=TARS[3][:3])  # was a TypeError
@given(content=st.sampled_from(TARS).flatmap(damaged_bytes))
def test_tars(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = clean(tmp_path_factory, "tar") / "a.tar"
    file.write_bytes(content)
    survives("tars", lambda: read_all(read_webdataset(str(file))))


@given(text=damaged_json({"caption": ["one", "two"], "text": "three"}), column=st.sampled_from([None, "text"]))
def test_json_in_tars(text: bytes, column: str | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = clean(tmp_path_factory, "tar") / "a.tar"
    file.write_bytes(tar_of([("a.png", PICTURE), ("a.json", text)]))
    survives("JSON in tars", lambda: read_all(read_webdataset(str(file), column)))


# --- prepared folders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A prepared folder with cached codes, and the fingerprint of their dVAE."""
    folder = tmp_path_factory.mktemp("prepared-with-codes") / "data"
    shutil.copytree(data, folder)
    dvae = DiscreteVAE(TINY_DVAE).eval()
    cache_codes(dvae, folder, views=1)
    return folder, dvae.fingerprint


def look(folder: Path, fingerprint: str) -> None:
    dataset = PairDataset.open(folder, "train")
    for row in (0, len(dataset) - 1):
        dataset.image(row)
        dataset.captions(row)
    codes = CodesCache.open(folder, fingerprint, "train")
    codes.codes(0, 0)


def files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_what_is_whole_is_taken(prepared: tuple[Path, str]) -> None:
    survives_in_child("prepared folders, JSON", lambda: look(*prepared), must_take=True)


@given(data=st.data())
def test_damaged_descriptions(data: st.DataObject, prepared: tuple[Path, str]) -> None:
    folder, fingerprint = prepared
    file = folder / data.draw(st.sampled_from([path for path in files(folder) if path.suffix == ".json"]))
    before = file.read_bytes()
    file.write_bytes(data.draw(damaged_json(json.loads(before))))
    try:
        survives_in_child("prepared folders, JSON", lambda: look(folder, fingerprint))
    finally:
        file.write_bytes(before)


@given(data=st.data())
def test_damaged_contents(data: st.DataObject, prepared: tuple[Path, str]) -> None:
    """Arrow is C++ code, and reads what it is told from files mapped into memory."""
    folder, fingerprint = prepared
    file = folder / data.draw(st.sampled_from([path for path in files(folder) if path.suffix != ".json"]))
    before = file.read_bytes()
    content = data.draw(damaged_bytes(before) | damaged_bytes(before[:1000]).map(lambda front: front + before[1000:]))
    file.write_bytes(content)
    try:
        survives_in_child("prepared folders, contents", lambda: look(folder, fingerprint))
    finally:
        file.write_bytes(before)


@given(data=st.data())
@settings(max_examples=max(10, settings().max_examples // 4))
def test_datasets_on_disk(
    data: st.DataObject, prepared: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What `save_to_disk` writes, as a prepared split is, damaged."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed-hf"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared[0] / "train", folder)
    file = folder / data.draw(st.sampled_from(files(folder)))
    file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
    survives_in_child("Hugging Face datasets", lambda: read_all(read_hf(str(folder), "image", "captions")))
