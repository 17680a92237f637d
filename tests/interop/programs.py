"""Pickles put together by hand, instruction by instruction, and the two files of `torch.save` around them."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

FLOATS = 6
"""Elements of the one storage, "0", that the files have."""


def proto(version: int = 2) -> bytes:
    return b"\x80" + bytes([version])


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded  # LONG1


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def storage(key: str = "0", numel: int = FLOATS, kind: bytes = name("torch", "FloatStorage")) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(size: tuple[int, ...] = (2, 3), stride: tuple[int, ...] = (3, 1), offset: int = 0, **of: object) -> bytes:
    def counts(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    hooks = call(name("collections", "OrderedDict"))
    parts = (storage(**of), number(offset), counts(size), counts(stride), b"\x89", hooks)  # type: ignore[arg-type]
    return call(name("torch._utils", "_rebuild_tensor_v2"), *parts)


def dictionary(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def module(kind: bytes = name("torch.nn.modules.container", "Sequential"), **state: bytes) -> bytes:
    return kind + b")\x81" + dictionary(**state) + b"b"


def program(*parts: bytes, version: int = 2) -> bytes:
    return proto(version) + b"".join(parts) + b"."


def write_zip(path: Path, content: bytes, entries: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    """A file as PyTorch ≥ 1.6 writes it."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", b"3\n")
        for entry, data in ({"data/0": bytes(4 * FLOATS)} if entries is None else entries).items():
            archive.writestr(f"archive/{entry}", data)
    return path


def write_legacy(path: Path, content: bytes, keys: tuple[str, ...] = ("0",), numel: int = FLOATS) -> Path:
    """A file as earlier ones wrote it; a storage's id has one entry more, None."""
    content = content.replace(b"tQ", b"NtQ")
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}]
    parts = [pickle.dumps(each, 2) for each in head] + [content, pickle.dumps(list(keys), 2)]
    path.write_bytes(b"".join(parts) + struct.pack("<q", numel) + bytes(4 * FLOATS))
    return path
