"""Small files that ask for gigabytes, read by a process that may not have them.

python -m tests.data.bombs FOLDER
Prints JSON: what became of each, and by how many MiB the process grew.
"""

from __future__ import annotations

import gzip
import itertools
import json
import resource
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from dalle_ds.data.corpora import files, read_folder, read_webdataset
from dalle_ds.data.images import decode_image
from dalle_ds.errors import DataError
from tests.data.conftest import picture_bytes

GIGABYTES = 2
PACKER = zlib.compressobj(wbits=-zlib.MAX_WBITS)
PART = PACKER.compress(bytes(2**24)) + PACKER.flush(zlib.Z_FULL_FLUSH)
MEMBERS = 100_000
TAR_PARTS = 6  # 96 MiB: tarfile takes a minute to skip a gigabyte that was compressed so well


def zeros(parts: int = GIGABYTES * 64, before: bytes = b"", wrapper: int = zlib.MAX_WBITS) -> bytes:
    """A zlib stream of some bytes and 16 MiB · `parts` of zeros; made of equal parts, its checksum is wrong."""
    compressor = zlib.compressobj(wbits=wrapper)
    head = compressor.compress(before) + compressor.flush(zlib.Z_FULL_FLUSH)
    return head + PART * parts + compressor.flush()


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (4, 4)) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    rows = (b"IDAT", zlib.compress(bytes(4 * 13)))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in (header, *chunks, rows, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    buffer = bytearray(picture_bytes(0, (4, 4), "GIF"))
    struct.pack_into("<HH", buffer, 6, *screen)
    place = buffer.index(b"\x2c\x00\x00\x00\x00")  # the image descriptor
    struct.pack_into("<HH", buffer, place + 5, *frame)
    return bytes(buffer)


def webp(side: int) -> bytes:
    buffer = bytearray(picture_bytes(0, (4, 4), "WEBP"))
    place = buffer.index(b"VP8 ") + 8 + 6  # in a key frame's header
    struct.pack_into("<HH", buffer, place, side, side)
    return bytes(buffer)


def tiff(side: int) -> bytes:
    buffer = bytearray(picture_bytes(0, (4, 4), "TIFF"))
    first = struct.unpack_from("<I", buffer, 4)[0]
    for number in range(struct.unpack_from("<H", buffer, first)[0]):
        place = first + 2 + 12 * number
        if struct.unpack_from("<H", buffer, place)[0] in (256, 257):  # width, length
            struct.pack_into("<HHII", buffer, place, *struct.unpack_from("<H", buffer, place), 4, 1, side)
    return bytes(buffer)


PICTURES: dict[str, Callable[[], bytes]] = {
    "png of 60000×60000": lambda: png(size=(60_000, 60_000)),
    "png with a zTXt chunk": lambda: png((b"zTXt", b"a\0\0" + zeros())),
    "png with an iTXt chunk": lambda: png((b"iTXt", b"a\0\1\0\0\0" + zeros())),
    "png with an iCCP chunk": lambda: png((b"iCCP", b"a\0\0" + zeros())),
    "png with more than its pixels": lambda: png((b"IDAT", zeros())),
    "gif with a huge screen": lambda: gif((65_535, 65_535), (4, 4)),
    "gif with a huge frame": lambda: gif((4, 4), (65_535, 65_535)),
    "webp of 16383×16383": lambda: webp(16_383),
    "tiff of 60000×60000": lambda: tiff(60_000),
    "bmp of 60000×60000": lambda: (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6)
    ),
    "ppm of 60000×60000": lambda: b"P6 60000 60000 255\n" + bytes(99),
    "eps, which would start Ghostscript": lambda: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshow\n"
    ),
}


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def archives(folder: Path) -> Iterator[tuple[str, Path]]:
    size = TAR_PARTS * 2**24
    for name, before in (
        ("a huge image in a tar", header("a.png", size)),
        ("a huge caption in a tar", header("a.txt", size)),
        ("a huge name in a tar", header("././@LongLink", size, tarfile.GNUTYPE_LONGNAME)),
        ("a huge pax header in a tar", header("pax", size, tarfile.XHDTYPE)),
        ("something huge that is no sample", header("a.mp4", size)),
    ):
        path = folder / f"{name}.tar"
        path.write_bytes(zeros(TAR_PARTS, before, wrapper=16 + zlib.MAX_WBITS))  # gzip
        yield name, path
    unused = (header(f"a.{number}", 2**20) + bytes(2**20) for number in range(TAR_PARTS * 16))
    folders = itertools.repeat(header("folder", 0, tarfile.DIRTYPE), MEMBERS)
    for name, members in (
        ("many members of a sample that are not used", unused),
        ("a hundred thousand members", folders),
    ):
        path = folder / f"{name}.tar"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.writelines(members)
        yield name, path


def outcome(read: Callable[[], object]) -> str:
    try:
        return str(read())
    except DataError as error:
        return f"DataError: {error}"


def main(folder: Path) -> None:
    files.MAX_IMAGE_BYTES = 2**24
    found: dict[str, str] = {}
    decode_image(picture_bytes(0))
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    contents = {name: make() for name, make in PICTURES.items()}
    tars = list(archives(folder))
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    for name, content in contents.items():
        found[name] = outcome(lambda content=content: decode_image(content).shape)
    for name, path in tars:
        found[name] = outcome(
            lambda path=path: list(
                dict.fromkeys(getattr(pair, "reason", "kept") for pair in read_webdataset(str(path)))
            )
        )
    tables = folder / "table"
    tables.mkdir()
    (tables / "a.jsonl").write_text(
        '{"file_name": "a.png", "caption": ' + "[" * 200_000 + "\n"
        '{"file_name": "a.png", "caption": "' + "x" * 2_000_000 + '"}\n'
        '{"file_name": "a.png", "caption": ' + "1" * 5_000 + "}\n"
        '{"file_name": "a.png", "caption": "good"}\n'
    )
    (tables / "a.png").write_bytes(picture_bytes(0))
    found["a table of bombs"] = outcome(lambda: [getattr(pair, "reason", "kept") for pair in read_folder(str(tables))])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"found": found, "grown_mib": grown / 1024, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
