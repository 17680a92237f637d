"""Tensors of checkpoints: whatever way processes cut a model, what one set of them writes another can read."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_ds.errors import CheckpointError
from dalle_ds.parallel import Split
from dalle_ds.training.checkpoints import storage, writing
from dalle_ds.training.checkpoints.storage import (
    INDEX_NAME,
    Index,
    LocalShards,
    ParamShard,
    TensorSlice,
    matrix_size,
)
from dalle_ds.training.checkpoints.writing import write_safetensors
from tests.training.by_hand import write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHAPES: dict[str, tuple[tuple[int, ...], Split | None]] = {
    "qkv.weight": ((24, 7), Split(0, 3)),
    "qkv.bias": ((24,), Split(0, 3)),
    "out.weight": ((5, 16), Split(1)),
    "odd.weight": ((3, 24), Split(1, 3)),
    "vocabulary": ((8, 5), Split(0)),
    "gain": ((9,), None),
    "kernel": ((4, 3, 2, 2), None),
    "scalar": ((), None),
}
"""Shapes of a model's parameters, and how a tensor group divides them."""
CUTS = [
    ("whole", 1, 1),
    ("whole", 1, 2),
    ("end to end", 3, 1),
    ("end to end", 2, 2),
    ("end to end", 5, 4),
    ("each", 3, 1),
    ("each", 2, 4),
]
"""How ZeRO cuts (0; 1 and 2; 3), shards, processes of a tensor group."""


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in SHAPES.items()}


def cut(
    whole: dict[str, Tensor], style: str, shards: int, parts: int
) -> Iterator[tuple[list[Tensor], list[ParamShard]]]:
    """What every process keeps of a model, as DeepSpeed would have it, padded with NaN: its shards and what these have.

    Parameters are in two groups, as those with and without weight decay are.
    """
    groups = [["qkv.weight", "out.weight", "odd.weight", "kernel"], ["qkv.bias", "vocabulary", "gain", "scalar"]]
    for shard, part in itertools.product(range(shards), range(parts)):
        pieces: dict[str, Tensor] = {}
        for name, value in whole.items():
            split = SHAPES[name][1]
            pieces[name] = value if split is None or parts == 1 else split.cut(value, part, parts)
        tensors: list[Tensor] = []
        param_shards: list[ParamShard] = []

        def keep(name: str, start: int, length: int, number: int, offset: int) -> None:
            split = SHAPES[name][1] if parts > 1 else None
            place = (part, parts) if split is not None else (0, 1)  # noqa: B023
            shape = tuple(pieces[name].shape)  # noqa: B023
            if length > 0:
                param_shards.append(ParamShard(name, shape, start, length, number, offset, split, *place))  # noqa: B023

        for group in groups:
            flat = [pieces[name].flatten() for name in group]
            if style == "whole":
                for name, value in zip(group, flat, strict=True):
                    keep(name, 0, len(value), len(tensors), 0)
                    tensors.append(value.clone())
            elif style == "end to end":
                total = torch.cat(flat)
                size = math.ceil(len(total) / shards)
                padded = torch.cat([total, torch.full((size * shards - len(total),), math.nan)])
                begin = 0
                for name, value in zip(group, flat, strict=True):
                    first, last = max(begin, shard * size), min(begin + len(value), (shard + 1) * size)
                    keep(name, first - begin, last - first, len(tensors), first - shard * size)
                    begin += len(value)
                tensors.append(padded[shard * size : (shard + 1) * size].clone())
            else:
                own, begin = [], 0
                for name, value in zip(group, flat, strict=True):
                    size = math.ceil(len(value) / shards)
                    padded = torch.cat([value, torch.full((size * shards - len(value),), math.nan)])
                    own.append(padded[shard * size : (shard + 1) * size])
                    keep(name, shard * size, min(size, len(value) - shard * size), len(tensors), begin)
                    begin += size
                tensors.append(torch.cat(own))
        yield tensors, param_shards


def local_shards_of(tensors: list[Tensor], param_shards: list[ParamShard]) -> dict[str, LocalShards]:
    return {
        f"weight/{shard.name}": LocalShards(matrix_size(shard.whole), shard.slices(shard.of(tensors[shard.shard])))
        for shard in param_shards
    }


def written(folder: Path, style: str, shards: int, parts: int) -> Index:
    """What all processes of a cut write, written by one: of what several have, the first one's."""
    together: dict[str, dict] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for tensors, param_shards in cut(values(), style, shards, parts):
        for name, pieces in local_shards_of(tensors, param_shards).items():
            sizes[name] = pieces.size
            for place, part in pieces.parts:
                together.setdefault(name, {}).setdefault((place.row, place.column), (place, part))
    folder.mkdir(exist_ok=True)
    write_tensors(
        folder, {name: LocalShards(sizes[name], list(parts.values())) for name, parts in together.items()}, {}
    )
    return Index(folder)


@pytest.mark.parametrize(("style", "shards", "parts"), CUTS)
def test_shards_tile_every_parameter_and_have_its_values(style: str, shards: int, parts: int) -> None:
    whole = values()
    # Of what all processes of a tensor group have alike, that of the first is looked at.
    seen = {name: torch.zeros(matrix_size(value.shape), dtype=torch.int64) for name, value in whole.items()}
    for number, (tensors, param_shards) in enumerate(cut(whole, style, shards, parts)):
        is_first_copy = number < parts or style != "whole"
        for shard in param_shards:
            assert shard.whole == tuple(whole[shard.name].shape)
            matrix = whole[shard.name].view(matrix_size(shard.whole))
            slices = shard.slices(shard.of(tensors[shard.shard]))
            assert sum(at.rows * at.columns for at, _ in slices) == shard.length
            for at, part in slices:
                assert torch.equal(part, at.of(matrix)), shard
                if is_first_copy and (SHAPES[shard.name][1] is not None or number % parts == 0):
                    at.of(seen[shard.name]).add_(1)
    assert all(bool((count == 1).all()) for count in seen.values())


def test_an_undivided_run_has_three_slices_at_most() -> None:
    for start, end in itertools.combinations(range(35), 2):
        run = torch.arange(start, end)
        slices = ParamShard("a", (5, 7), start, end - start, 0, 0).slices(run)
        assert len(slices) <= 3
        assert torch.cat([part.flatten() for _, part in slices]).equal(run)


@pytest.mark.parametrize(("there", "here"), list(itertools.permutations(CUTS, 2)), ids=str)
def test_what_one_cut_has_written_another_reads(tmp_path: Path, there: tuple, here: tuple) -> None:
    index = written(tmp_path, *there)
    for (expected, param_shards), (found, _) in zip(cut(values(), *here), cut(values(), *here), strict=True):
        for tensor, reference in zip(found, expected, strict=True):
            tensor[~reference.isnan()] = -1.0
        index.read(local_shards_of(found, param_shards))
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("style", "shards", "parts"), CUTS)
def test_whole_tensors_are_read_one_by_one(tmp_path: Path, style: str, shards: int, parts: int) -> None:
    index = written(tmp_path, style, shards, parts)
    for name, value in values().items():
        assert torch.equal(index.tensor(f"weight/{name}"), value.reshape(matrix_size(value.shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int16])
def test_a_file_is_what_safetensors_would_write(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: (100 * value).to(dtype) for name, value in values().items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    entries = [(name, dtype, value.shape, lambda value=value: value) for name, value in tensors.items()]
    write_safetensors(tmp_path / "ours", entries, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_of_several_types_is_read_by_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.int16), "b": torch.randn(2, 3), "c": torch.randn(5).bfloat16()}
    forced: list[int] = []
    monkeypatch.setattr(writing.os, "fsync", forced.append)
    entries = [(name, v.dtype, v.shape, lambda v=v: v) for name, v in tensors.items()]
    write_safetensors(tmp_path / "file", entries)
    assert len(forced) == 1
    content = (tmp_path / "file").read_bytes()
    behind = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:behind])
    assert all((behind + header[name]["data_offsets"][0]) % v.element_size() == 0 for name, v in tensors.items())
    loaded = load_file(tmp_path / "file")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_strided_parts_are_written_and_read_by_their_elements(tmp_path: Path) -> None:
    codes = torch.arange(-20, 20, dtype=torch.int16).view(5, 8)
    halves = [(TensorSlice(0, 0, 5, 4), codes[:, :4]), (TensorSlice(0, 4, 5, 4), codes[:, 4:])]  # not contiguous
    write_tensors(tmp_path, {"codes/a": LocalShards((5, 8), halves)}, {"a": {"shape": [5, 8]}})
    index = Index(tmp_path)
    assert torch.equal(index.tensor("codes/a"), codes) and index.tensors["codes/a"].dtype == torch.int16
    assert index.parameters == {"a": {"shape": [5, 8]}}
    into = torch.zeros(8, 5, dtype=torch.int16)
    index.read({"codes/a": LocalShards((5, 8), [(TensorSlice(0, 0, 5, 8), into.t())])})
    assert torch.equal(into.t(), codes)


def test_large_slices_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BUFFER_BYTES", 64)
    index = written(tmp_path, "whole", 1, 1)
    for (expected, param_shards), (found, _) in zip(
        cut(values(), "each", 2, 4), cut(values(), "each", 2, 4), strict=True
    ):
        for tensor in found:
            tensor[~tensor.isnan()] = -1.0
        index.read(local_shards_of(found, param_shards))
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(found, expected, strict=True))


def test_what_is_missing_cut_off_or_of_another_shape_is_told(tmp_path: Path) -> None:
    index = written(tmp_path, "end to end", 3, 1)
    file = "rank-0.safetensors"
    place = TensorSlice(0, 0, 2, 2)
    with pytest.raises(CheckpointError, match=r"weight/a of 2 × 2 is needed, and .* has none"):
        index.read({"weight/a": LocalShards((2, 2), [(place, torch.zeros(2, 2))])})
    with pytest.raises(CheckpointError, match=r"weight/gain of 2 × 2 is needed, and .* has one of 9 × 1"):
        index.read({"weight/gain": LocalShards((2, 2), [(place, torch.zeros(2, 2))])})
    place = TensorSlice(0, 0, 9, 1)
    with pytest.raises(CheckpointError, match=r"weight/gain is needed as torch.int16, and .* has torch.float32"):
        index.read({"weight/gain": LocalShards((9, 1), [(place, torch.zeros(9, 1, dtype=torch.int16))])})
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-200])
    with pytest.raises(CheckpointError, match=f"{file} is cut off"):
        for name in index.tensors:
            index.tensor(name)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        index.tensor("weight/gain")


def test_a_hole_is_not_read_over(tmp_path: Path) -> None:
    written(tmp_path, "end to end", 3, 1)
    content = json.loads((tmp_path / INDEX_NAME).read_text())
    content["tensors"]["weight/qkv.weight"]["chunks"].pop()
    (tmp_path / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"weight/qkv.weight is not stored whole"):
        Index(tmp_path).tensor("weight/qkv.weight")
    for broken in ("{", "[]", '{"files": {}, "parameters": {}, "tensors": {"a": {}}}'):
        (tmp_path / INDEX_NAME).write_text(broken)
        with pytest.raises(CheckpointError, match=r"index.json cannot be read"):
            Index(tmp_path)
