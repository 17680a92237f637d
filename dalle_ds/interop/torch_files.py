"""Tensors out of files that `torch.save` or `torch.jit.save` wrote, whole modules included.

`torch.load(weights_only=True)` reads them; it imports nothing and calls nothing that a file names, but for what makes tensors.
Classes of modules and of what else training programs save stand for `_Inert` objects, which keep their state and do nothing.
What a file takes is bounded by its length before it is read: `_scan` parses its pickle, and runs nothing of it.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.serialization import safe_globals

from dalle_ds.errors import CheckpointError
from dalle_ds.parsing import shown

TORCH_CLASSES = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        "activation.ReLU",
        "container.Sequential",
        "linear.Identity",
        "pooling.MaxPool2d",
        "upsampling.Upsample",
    )
)
"""Classes of PyTorch whose instances any file may have."""

_PROGRAM_BYTES = 2**20
"""Longest pickle, without the tensors' contents; that of OpenAI's dVAE has 30 kB. An instruction of one byte can make an
object of 200, so this bounds memory as well as time."""
_MOST_TUPLES = 50_000
"""A tensor has four. Tuples within tuples overflow the C stack where they are hashed, at some 150,000."""
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_MOST_LONGS = 10_000
"""Integers of more than 32 bits, which can be chosen so that their hashes meet; random states have a few hundred."""
_LOOKING_UP = ("GLOBAL", "NEWOBJ", "REDUCE", "BUILD")
_MOST_LOOKUPS = 10**8
"""Classes times objects: `torch.load` goes through the list of the former at each of the latter. A TorchScript archive has a
class for most of its modules."""
_MOST_NAMES = 10_000
"""Named tensors and modules. One that lies in several places counts in each: that is how little becomes much."""
_NAME_CHARS = 1_000
"""Longest name of a tensor, with those of the modules around it. Modules within each other are bounded by it too."""
_LEGACY_PICKLES, _LEGACY_CONTENT = 5, 3
"""In a file of before PyTorch 1.6: a magic number, a protocol, the machine, the content, the storages' keys."""
_NOT_TRUSTED = ("builtins.bytearray", "torch._utils.", "os.", "posix.", "nt.", "sys.")
"""How names begin by which `torch.load` may make much of little, or which it takes for nobody."""
_REBUILDERS = frozenset(
    f"torch._utils._rebuild_{name}"
    for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
)
"""Of these, those that only make views of storages."""


_HARMLESS = re.compile(
    r"collections\.(OrderedDict|Counter|defaultdict)|_codecs\.encode|(builtins|__builtin__)\.(set|complex|bytearray)|"
    r"torch\.(storage\.)?\w+Storage|torch\.(Size|Tensor|device|bool|(uint|int|float|bfloat|complex)\d+)|"
    r"torch\.nn\.parameter\.Parameter|torch\.nn\.modules\.\w+\.[A-Z]\w*|dall_e\.\w+\.[A-Z]\w*|__torch__\.[\w.]+|"
    + "|".join(map(re.escape, _REBUILDERS))
)
"""Names of what makes tensors, and of the classes of modules that have them."""


class _Refused(Exception):
    """What is wrong with a file; the message goes on from the file's name."""


class _LikeDict(type):
    """`torch.load` sets items of what is a `dict` alone: a subclass of it that is not imported has to seem one."""

    def __eq__(cls, other: object) -> bool:
        return other is dict or super().__eq__(other)

    __hash__ = type.__hash__


class _Inert(metaclass=_LikeDict):
    """An object of a class that is not imported, or the result of a function that is not called."""

    state: Any = None
    """Its `__dict__`, if the file gave it one."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Leave an item of a dictionary of another class alone."""


class _Scripted(_Inert):
    """A module of a TorchScript archive, whose state has its tensors and modules by name."""


_SECOND = f"{__name__}._second"


def _second(*arguments: Any) -> Any:
    return arguments[1]


def _empty_list(*_: Any) -> list[Any]:
    return []


def load_tensors(path: str | Path, classes: Collection[str] | None = ()) -> dict[str, Tensor]:
    """The named tensors of a module or state dict, in the dtypes they have, on the CPU.

    Args:
        path: the file of `torch.save`: a zip archive, or as before PyTorch 1.6 pickles one after the other.
        classes: full names, such as "dall_e.utils.Conv2d", of the classes that the file may have instances of, besides
            `TORCH_CLASSES`. None: any, as in a training program's checkpoint, whose dictionaries and modules are searched
            (names are put together, such as "state_dict.module.visual.proj"); a TorchScript archive too. No class is
            imported, none needs to be installed.

    Returns:
        What `state_dict()` of the module would: "blocks.input.w" and so on.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or asks for what it may not.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            zipped = file.read(4) == b"PK\x03\x04"
            content = _load_zip(path, classes) if zipped else _load_legacy(file, classes)
        named = dict(_named_tensors(content, search=classes is None))
        if sum(value.numel() * value.itemsize for value in named.values()) > size:
            raise _Refused(f"describes tensors of more bytes than the {size:,} that it has")
        return named
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except _Refused as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # torch.load lets through whatever a damaged file makes its parts raise
        hint = (
            ""
            if zipped
            else " (of files of before PyTorch 1.6, only dictionaries of tensors are read: save its state dict)"
        )
        raise CheckpointError(f"{path} is damaged, or asks for what is not trusted: {_short(error)}{hint}") from error


def _load_zip(path: Path, classes: Collection[str] | None) -> Any:
    """The content of FOLDER/data.pkl, whose storages FOLDER/data/KEY are mapped into memory rather than read."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        programs = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1 or len(entries) != len(archive.infolist()):
            raise _Refused("is an archive, and not one of torch.save: it has no data.pkl, or several")
        folder = programs[0].removesuffix("data.pkl")
        scripted = f"{folder}constants.pkl" in entries
        if scripted and classes is not None:
            raise _Refused("is a TorchScript archive, which has code beside tensors: only files of torch.save are read")
        for name, entry in entries.items():
            if scripted and name.startswith(f"{folder}code/"):
                continue
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise _Refused("is a compressed archive: torch.save does not write such")
            if name == programs[0] and entry.file_size > _PROGRAM_BYTES:
                raise _Refused(f"has a pickle of {entry.file_size:,} bytes, where {_PROGRAM_BYTES:,} are the most")
            with archive.open(entry) as content:
                while content.read(2**20):  # compares it with its checksum, which torch.load does not
                    pass
        names = _scan(io.BytesIO(archive.read(programs[0])))
    with safe_globals(_stand_ins(names, classes)):
        if not scripted:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # What torch.load knows a TorchScript archive by, and refuses it, gets another name in a copy in memory, which shares
        # the file's pages but for this one. The code is left alone.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as copy:
            place = copy.rfind(b"constants.pkl")
            copy[place] = ord("_")
            return torch.load(cast(IO[bytes], copy), map_location="cpu", weights_only=True)


def _load_legacy(file: BinaryIO, classes: Collection[str] | None) -> Any:
    file.seek(0)
    head = io.BytesIO(file.read(_PROGRAM_BYTES))
    names: set[str] = set()
    ends = [0]
    for _ in range(_LEGACY_PICKLES):
        names |= _scan(head)
        ends.append(head.tell())
    begin, end = ends[_LEGACY_CONTENT : _LEGACY_CONTENT + 2]
    content = head.getvalue()[begin:end]
    plain = _without_sources(content)
    file.seek(0)
    if plain != content:
        file = io.BytesIO(file.read(begin) + plain + file.read()[end - begin :])
    with safe_globals([*_stand_ins(names, classes), (_second, _SECOND)]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _without_sources(program: bytes) -> bytes:
    """The same pickle for `torch.load`, which takes no persistent ids of classes as modules have them before PyTorch 1.6:
    ("module", class, file, source) becomes the argument of a call that returns the class."""
    marks: list[int] = []
    parts, done, begin, named = [], 0, 0, (-1, "")
    for instruction, argument, position in pickletools.genops(program):
        place = position or 0
        if instruction.name == "MARK":
            marks.append(place)
        elif pickletools.markobject in instruction.stack_before:
            begin = marks.pop()
        elif instruction.name == "GLOBAL":
            named = place, str(argument)
        elif instruction.name == "BINPERSID" and named[0] > begin and not named[1].endswith("Storage"):
            call = "c{}\n{}\n".format(*_SECOND.rsplit(".", 1)).encode()
            parts += [program[done:begin], call, program[begin:place], b"R"]
            done = place + 1
    return b"".join([*parts, program[done:]])


def _stand_ins(names: set[str], classes: Collection[str] | None) -> list[Any]:
    """What `torch.load` takes for the names that it does not know: of these classes, or of any."""
    allowed = names if classes is None else names & {*TORCH_CLASSES, *classes}

    def stand_in(name: str) -> Any:
        if name == "collections.deque":
            return _empty_list  # torch.load extends only lists
        return _Scripted if name.startswith("__torch__.") else _Inert

    return [(stand_in(name), name) for name in allowed]


def _scan(program: BinaryIO) -> set[str]:
    """Refuse a pickle that would take much of little, and return the full names that it asks for; it moves behind it."""
    counts: Counter[str] = Counter()
    names: set[str] = set()
    for instruction, argument, _ in pickletools.genops(program):
        protocol = int(argument or 0) if instruction.name == "PROTO" else instruction.proto
        if protocol > 2:
            raise _Refused(
                f"is a pickle of protocol {protocol}, where only torch.save's own is read, 2: save it again without "
                "pickle_protocol"
            )
        counts[instruction.name] += 1
        if instruction.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # Protocol 2 has the names of Python 2, of which torch.load knows some.
            renamed = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names |= {f"{module}.{name}", ".".join(renamed)}
    for kind, (found, most) in {
        "tuples": (sum(counts[name] for name in _TUPLES), _MOST_TUPLES),
        "long integers": (counts["LONG1"], _MOST_LONGS),
        "objects times classes": (len(names) * sum(counts[name] for name in _LOOKING_UP), _MOST_LOOKUPS),
    }.items():
        if found > most:
            raise _Refused(f"has {found:,} {kind}, more than make sense ({most:,})")
    for name in sorted(names - _REBUILDERS):
        if name.startswith(_NOT_TRUSTED):
            raise _Refused(f"asks for {shown(name)}, which is not trusted: save its state dict alone, in another file")
    return names


def imported_names(path: Path) -> list[str]:
    """What `pickle` would import, and might call, to open a file of `torch.save`; but for what `torch.load` trusts, classes of
    layers and those of TorchScript. Nothing of it is run.

    A name that is put together on the stack, which `torch.save` does not write, is told as its last two texts.
    """
    found: set[str] = set()
    with suppress(Exception):  # of damage, `load_tensors` tells
        for program in _programs(path):
            texts = ["", ""]
            for instruction, argument, _ in pickletools.genops(program):
                if isinstance(argument, str):
                    texts = [texts[1], argument]
                if instruction.name in ("GLOBAL", "INST"):
                    found.add(".".join(str(argument).split(" ", 1)))
                elif instruction.name.startswith(("STACK_GLOBAL", "EXT")):
                    found.add(f"{instruction.name} {'.'.join(texts) if argument is None else argument}")
    return sorted(name for name in found if not _HARMLESS.fullmatch(name))


def _programs(path: Path) -> Iterator[BinaryIO]:
    """The pickles of a file, as far as they are read."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            head = io.BytesIO(file.read(_PROGRAM_BYTES))
            for _ in range(_LEGACY_PICKLES):
                yield head
            return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl"):
                with archive.open(entry) as content:
                    yield io.BytesIO(content.read(_PROGRAM_BYTES))


def _named_tensors(content: Any, search: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a module (parameters and lasting buffers, as in `Module.state_dict`) or of a state dict, by name; of
    dictionaries within each other where these are searched."""
    if not search and not isinstance(content, _Inert):
        if (
            not isinstance(content, dict)
            or not content
            or not all(isinstance(name, str) and _is_tensor(value) for name, value in content.items())
        ):
            raise _Refused("holds neither a module nor a dictionary of tensors")
        yield from content.items()
        return
    if isinstance(content, (list, tuple)):
        content = {str(number): value for number, value in enumerate(content)}
    if not isinstance(content, (_Inert, dict)):
        raise _Refused("holds neither a module nor a dictionary")
    pending: list[tuple[str, Any]] = [("", content)]
    count = 1
    while pending:
        prefix, holder = pending.pop()
        state = _mapping(holder if isinstance(holder, dict) else holder.state)
        passing = state.get("_non_persistent_buffers_set")
        tensors = {**_mapping(state.get("_parameters")), **_mapping(state.get("_buffers"))}
        children = _mapping(state.get("_modules"))
        if isinstance(holder, (dict, _Scripted)):
            tensors = children = state
        # Before names are put together, whose lengths multiply with their numbers.
        count += len(tensors) + len(children)
        longest = len(prefix) + max(map(len, (*tensors, *children)), default=0)
        if count > _MOST_NAMES or longest > _NAME_CHARS:
            raise _Refused("has more modules, or more within each other, than make sense")
        for name, value in tensors.items():
            if _is_tensor(value) and not (isinstance(passing, set) and name in passing):
                yield f"{prefix}{name}", value.detach()
        within = (_Inert, dict) if isinstance(holder, dict) else _Inert
        pending += [(f"{prefix}{name}.", child) for name, child in children.items() if isinstance(child, within)]


def _mapping(state: Any) -> dict[str, Any]:
    return {key: value for key, value in state.items() if isinstance(key, str)} if isinstance(state, dict) else {}


def _is_tensor(value: Any) -> bool:
    """Whether it is an ordinary one: no sparse, quantized, nested or empty shell of one."""
    if not isinstance(value, Tensor) or value.is_quantized or value.is_nested:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def _short(error: Exception) -> str:
    """What the error says, in a line: of torch.load, without what it advises."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    for advice in (" Please use", "Check the documentation", "Exception raised from"):
        text = text.partition(advice)[0]
    return "".join(letter if letter.isprintable() else " " for letter in text)[:200].strip() or type(error).__name__
