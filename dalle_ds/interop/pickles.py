"""Tensors out of files that `torch.save` pickled, whole modules included, without unpickling them.

A pickle is a program: it names functions, and whoever unpickles it calls them. Here its instructions are read one by one
(`pickletools.genops`, which only parses) and carried out on values of our own:

- A name that the file asks for is looked up in a table and never imported. What is not in the table is an error that says
  its name; a dotted name or one put together at run time is a name like any other.
- A class of a module stands for an `_Instance` that keeps what the file says of it, and has no behaviour.
- The few functions in the table (an OrderedDict, a tensor, a parameter) are methods below, which check what they are given.
- Instructions that PyTorch never writes are refused, so that every one that is carried out is in `_Machine`.
- Checkpoints of training programs (`wrapped`) have anything beside the weights: whatever is not in the table stands for an
  `_Instance` there too, as does what it is called with. Keys that are no text, as of an optimizer's state, are left out.

What a file takes is bounded by its length: its program may have `_PROGRAM_BYTES`, and its tensors as many bytes as the file.
Both formats of `torch.save` are read: an uncompressed zip archive, and before PyTorch 1.6 pickles one after the other.
TorchScript archives, as `torch.jit.save` writes them, are zip archives of the first kind with source code beside; that is
left alone, and every class that it would define is one of those that have no behaviour.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from dalle_ds.errors import CheckpointError

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
"""Classes of PyTorch that a file may have instances of."""

_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_PLAIN = frozenset({"builtins.set", "collections.OrderedDict", "torch.Size", "torch.device"})
_REBUILDERS = frozenset(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "parameter"))

_PROGRAM_BYTES = 2**20
"""Longest pickle, without the tensors' contents; that of OpenAI's dVAE has 30 kB. An instruction of one byte can make an
object of 200, so this bounds memory as well as time."""
_NAMES = 10_000
"""Most named tensors and modules. One that lies in several places counts in each: that is how little becomes much."""
_NAME_CHARS = 1_000
"""Longest name of a tensor, with those of the modules around it. Modules within each other are bounded by it too."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ZIP_MAGIC = b"PK\x03\x04"
_SCRIPTED = "__torch__."
"""How the names of a TorchScript archive's own classes begin; nothing of Python's or PyTorch's has such a name."""


def read_pickled_tensors(
    path: str | Path, classes: Collection[str] = (), *, scripted: bool = False, wrapped: bool = False
) -> dict[str, Tensor]:
    """The named tensors of a module or state dict that was written by `torch.save`, in the dtypes they have, on the CPU.

    Args:
        path: the file, in either format of `torch.save`.
        classes: full names, such as "dall_e.utils.Conv2d", of the classes of modules that the file may have instances of,
            besides `TORCH_CLASSES`. None of them is imported, and none needs to be installed.
        scripted: whether the file may be a TorchScript archive. Of such a module, attributes that are tensors are named too.
        wrapped: whether it may be a training program's checkpoint, with state dicts or modules among other things. Names are
            put together, such as "state_dict.module.visual.proj".

    Returns:
        What `state_dict()` of the module would: "blocks.input.w" and so on.

    Raises:
        CheckpointError: the file cannot be read, is broken, or asks for anything that is not in the table of what it may.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            magic = file.read(4)
            file.seek(0)
            archive = _ZipFile(file, scripted) if magic == _ZIP_MAGIC else _LegacyFile(file, size)
            machine = _Machine(_table(classes), scripted=archive.scripted, wrapped=wrapped)
            named = dict(_named_tensors(machine.run(archive.program), wrapped))
            _check_sizes(named, machine.storages, size)
            storages = archive.contents(machine.storages, {view.storage.key for view in named.values()})
            return {name: view.of(storages[view.storage.key]) for name, view in named.items()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except _Refused as error:
        raise CheckpointError(f"{path} {error}") from error
    except (ValueError, IndexError, KeyError, EOFError, OverflowError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{path} is broken, or was not written by torch.save: {_short(error)}") from error
    except (zipfile.BadZipFile, RuntimeError) as error:
        raise CheckpointError(f"{path} is a broken archive: {_short(error)}") from error


class _Refused(Exception):
    """What is wrong with a file; the message goes on from the file's name."""


# --- what a program computes with -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Name:
    """A class, function or constant that a file asked for and may have."""

    name: str
    is_class: bool
    """Whether it makes an `_Instance`."""


@dataclass(eq=False)
class _Instance:
    """An object of a class that was not imported."""

    kind: str
    state: Any = None
    """Its `__dict__`, if the file gave it one."""


@dataclass(frozen=True)
class _Storage:
    """Contents of tensors, which follow the program."""

    dtype: torch.dtype
    key: str
    numel: int

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(eq=False)
class _View:
    """A tensor: a part of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or len(self.size) > 16 or not all(_is_count(n) for n in numbers):
            raise _Refused("has a tensor whose size or strides make no sense")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        # As many elements as the storage has, at most, keeps strides of 0 from making much of little.
        if 0 not in self.size and (last >= self.storage.numel or self.numel > self.storage.numel):
            raise _Refused("has a tensor that reaches beyond its storage")

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def of(self, contents: Tensor) -> Tensor:
        """The tensor, given its storage (numel,)."""
        if 0 in self.size:
            return torch.empty(self.size, dtype=self.storage.dtype)
        return contents.as_strided(self.size, self.stride, self.offset)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _table(classes: Collection[str]) -> dict[str, _Name]:
    table = {name: _Name(name, is_class=False) for name in (*_DTYPES, *_PLAIN, *_REBUILDERS)}
    return table | {name: _Name(name, is_class=True) for name in (*TORCH_CLASSES, *classes)}


# --- the program ----------------------------------------------------------------------------------------------------

_CONSTANTS: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Carries out a pickle's instructions (protocols 2 to 5) on plain values, `_Name`s, `_Instance`s and `_View`s."""

    def __init__(self, table: dict[str, _Name], *, scripted: bool = False, wrapped: bool = False) -> None:
        self._table = table
        self._scripted = scripted
        self._wrapped = wrapped
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}
        """What the programs that were run have mentioned, by key."""

    def run(self, program: BinaryIO) -> Any:
        """The value of the pickle at the file's position, which moves behind it."""
        begin = program.tell()
        source = io.BytesIO(program.read(_PROGRAM_BYTES))
        self._stack, self._marks, self._memo = [], [], {}
        try:
            for instruction, argument, _ in pickletools.genops(source):
                if instruction.name == "STOP":
                    break
                self._carry_out(instruction.name, argument)
        except ValueError as error:
            if source.tell() == _PROGRAM_BYTES:
                raise _Refused(f"has a pickle of more than {_PROGRAM_BYTES:,} bytes: it is no module") from error
            raise
        program.seek(begin + source.tell())
        return self._pop()

    def _carry_out(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS or (self._wrapped and name in _BYTES):
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(reversed([self._pop() for _ in range(_TUPLES[name])])))
        elif name in ("PROTO", "FRAME"):
            pass  # genops knows the instructions of every protocol, and needs no frames
        else:
            step = getattr(self, f"_do_{name.lower()}", None)
            if step is None:
                raise _Refused(f"has the pickle instruction {name}, which torch.save does not write: it is not trusted")
            step(argument)

    def _pop(self) -> Any:
        return self._stack.pop()

    def _items(self) -> list[Any]:
        """What has been put on the stack since the last mark."""
        items, self._stack = self._stack, self._marks.pop()
        return items

    # One method for each instruction that is not a mere value.

    def _do_mark(self, _: None) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _do_pop(self, _: None) -> None:
        self._pop()

    def _do_tuple(self, _: None) -> None:
        items = self._items()
        self._stack.append(tuple(items))

    def _do_binput(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _do_long_binput = _do_binput

    def _do_memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _do_binget(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _do_long_binget = _do_binget

    def _do_append(self, _: None) -> None:
        self._extend([self._pop()])

    def _do_appends(self, _: None) -> None:
        self._extend(self._items())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not self._is_idle(target):
            _misused("APPENDS", target)

    def _do_additems(self, _: None) -> None:
        items = self._items()
        target = self._stack[-1]
        if type(target) is not set:
            _misused("ADDITEMS", target)
        target.update(self._texts(items))

    def _do_setitem(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def _do_setitems(self, _: None) -> None:
        self._update(self._items())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if self._is_idle(target):
            return
        if type(target) is not dict:
            _misused("SETITEMS", target)
        pairs = zip(items[::2], items[1::2], strict=True)
        target.update((_key(key), value) for key, value in pairs if not self._wrapped or type(key) is str)

    def _texts(self, items: list[Any]) -> list[str]:
        return [_key(value) for value in items if not self._wrapped or type(value) is str]

    def _is_idle(self, target: Any) -> bool:
        """Whether it stands for something beside the weights, of which nothing is of use."""
        return self._wrapped and isinstance(target, (_Instance, _Name))

    def _do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._look_up(module, name))

    def _do_stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if type(module) is not str or type(name) is not str:
            raise _Refused("asks for a name that is no text: it is not trusted")
        self._stack.append(self._look_up(module, name))

    def _look_up(self, module: str, name: str) -> _Name:
        # Protocol 2 is written for Python 2 as well.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        # "torch._utils" "x" and "torch" "_utils.x" are one name: the table, not the spelling, decides what it stands for.
        if self._scripted and full.startswith(_SCRIPTED):
            return _Name(full, is_class=True)
        if full not in self._table:
            if self._wrapped:
                return _Name(full, is_class=True)
            raise _Refused(
                f"asks for {_quoted(full)}, which is not among what a file of its kind may have: it is not trusted, and "
                "nothing of it was run"
            )
        return self._table[full]

    def _do_newobj(self, _: None) -> None:
        arguments, kind = self._pop(), self._pop()
        strange = not isinstance(kind, _Name) or not kind.is_class or arguments != ()
        if strange and not self._wrapped:
            _misused("NEWOBJ", kind)
        self._stack.append(_Instance("an object" if strange else kind.name))

    def _do_build(self, _: None) -> None:
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, _Instance):
            target.state = state
        elif type(target) is not dict and not self._wrapped:
            # An OrderedDict's attributes, such as a state dict's versions, are of no use.
            _misused("BUILD", target)

    def _do_reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        known = isinstance(function, _Name) and function.name in self._table and type(arguments) is tuple
        if self._wrapped and (not known or any(isinstance(value, _Instance) for value in arguments)):
            self._stack.append(_Instance("an object"))
            return
        if not isinstance(function, _Name) or function.is_class or type(arguments) is not tuple:
            _misused("REDUCE", function)
        if function.name == "builtins.set" and len(arguments) == 1 and type(arguments[0]) is list:
            self._stack.append(set(self._texts(arguments[0])))
        else:
            self._stack.append(_call(function.name, arguments))

    def _do_binpersid(self, _: None) -> None:
        entry = self._pop()
        if self._wrapped and type(entry) is tuple and len(entry) > 1 and getattr(entry[1], "is_class", False):
            entry = _Instance("a storage of another kind")
        else:
            entry = _persistent(entry)
        if isinstance(entry, _Storage) and self.storages.setdefault(entry.key, entry) != entry:
            raise _Refused(f"says two things of its storage {_quoted(entry.key)}")
        self._stack.append(entry)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """What the function of that name, from the table, would return."""
    if name in _REBUILDERS and name.endswith("parameter"):
        data, *_ = arguments
        if not isinstance(data, _View):
            _misused(name, data)
        return data
    if name in _REBUILDERS:
        storage, offset, size, stride, *_ = arguments
        if not isinstance(storage, _Storage) or type(size) is not tuple or type(stride) is not tuple:
            _misused(name, storage)
        return _View(storage, offset, size, stride)
    if name == "collections.OrderedDict" and arguments == ():
        return {}
    if name == "torch.Size" and len(arguments) == 1 and type(arguments[0]) is tuple:
        return arguments[0]
    if name == "torch.device":
        return _Instance(name)
    raise _Refused(f"calls {name} with what torch.save does not give it: it is not trusted")


def _persistent(entry: Any) -> Any:
    """What a persistent id stands for: a storage, or in old files a class (with its source, which is left alone)."""
    if (
        type(entry) is tuple
        and len(entry) >= 2
        and all(isinstance(part, (str, int, _Name, type(None))) for part in entry)
    ):
        kind, what, *rest = entry
        if kind == "module" and isinstance(what, _Name) and what.is_class:
            return what
        if kind == "storage" and isinstance(what, _Name) and what.name in _DTYPES and len(rest) in (3, 4):
            key, _, numel, *view = rest
            if type(key) is str and _is_count(numel) and view in ([], [None]):
                return _Storage(_DTYPES[what.name], key, numel)
    raise _Refused("has a persistent id that is no storage of PyTorch's: it is not trusted")


def _key(value: Any) -> str:
    """A dictionary's key or a set's element. Text alone: numbers can be chosen so that their hashes meet, which takes for
    ever, and nested tuples so that hashing them overflows the C stack."""
    if type(value) is not str:
        raise _Refused(f"has a {type(value).__name__} for a key, where only text is read")
    return value


def _misused(instruction: str, target: Any) -> NoReturn:
    what = target.name if isinstance(target, _Name) else target.kind if isinstance(target, _Instance) else None
    # The classes of a TorchScript archive have whatever names the file gives them.
    raise _Refused(
        f"uses {instruction} on {_quoted(what) if what else type(target).__name__}, as torch.save does not: it is not trusted"
    )


# --- the tensors ----------------------------------------------------------------------------------------------------


def _named_tensors(content: Any, wrapped: bool) -> Iterator[tuple[str, _View]]:
    """Tensors of a module (parameters and lasting buffers, as in `Module.state_dict`) or of a state dict, by name; of
    dictionaries within each other where that is `wrapped`."""
    if type(content) is dict and content and all(isinstance(value, _View) for value in content.values()):
        yield from content.items()
        return
    if not isinstance(content, _Instance) and not (wrapped and type(content) is dict):
        raise _Refused("holds neither a module nor a dictionary of tensors")
    pending: list[tuple[str, Any]] = [("", content)]
    count = 1
    while pending:
        prefix, module = pending.pop()
        mapping = type(module) is dict
        state = _members(module if mapping else module.state)
        passing = state.get("_non_persistent_buffers_set")
        tensors = {**_members(state.get("_parameters")), **_members(state.get("_buffers"))}
        children = _members(state.get("_modules"))
        if mapping or module.kind.startswith(_SCRIPTED):
            tensors = children = state
        # Before names are put together, whose lengths multiply with their numbers.
        count += len(tensors) + len(children)
        longest = len(prefix) + max(map(len, (*tensors, *children)), default=0)
        if count > _NAMES or longest > _NAME_CHARS:
            raise _Refused("has more modules, or more within each other, than make sense")
        for name, value in tensors.items():
            if isinstance(value, _View) and not (type(passing) is set and name in passing):
                yield f"{prefix}{name}", value
        within = (_Instance, dict) if mapping else _Instance
        pending += [(f"{prefix}{name}.", child) for name, child in children.items() if isinstance(child, within)]


def _members(state: Any) -> dict[str, Any]:
    return state if type(state) is dict else {}


def _check_sizes(named: dict[str, _View], storages: dict[str, _Storage], file_bytes: int) -> None:
    tensors = sum(view.numel * view.storage.dtype.itemsize for view in named.values())
    if max(tensors, sum(storage.bytes for storage in storages.values())) > file_bytes:
        raise _Refused(f"describes tensors of more bytes than the {file_bytes:,} that it has")


def _contents(storage: _Storage, content: bytes) -> Tensor:
    if len(content) != storage.bytes:
        raise _Refused(
            f"has {len(content):,} bytes of storage {_quoted(storage.key)}, where {storage.bytes:,} are needed: it is cut off"
        )
    if not content:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(content), dtype=storage.dtype)


class _ZipFile:
    """PyTorch ≥ 1.6: FOLDER/data.pkl is the program, FOLDER/data/KEY are the storages, nothing of them is compressed."""

    def __init__(self, file: BinaryIO, scripted: bool) -> None:
        self._zip = zipfile.ZipFile(file)
        entries = self._zip.infolist()
        self._entries = {entry.filename: entry for entry in entries}
        programs = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1 or len(entries) != len(self._entries):
            raise _Refused("is an archive, and not one of torch.save: it has no data.pkl, or several")
        self._folder = programs[0].removesuffix("data.pkl")
        self.scripted = f"{self._folder}constants.pkl" in self._entries
        if self.scripted and not scripted:
            raise _Refused("is a TorchScript archive, which has code beside tensors: only files of torch.save are read")
        for entry in entries:
            code = self.scripted and entry.filename.startswith(f"{self._folder}code/")
            if not code and (entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size):
                raise _Refused("is a compressed archive: torch.save does not write such")
        if f"{self._folder}byteorder" in self._entries and self._read("byteorder", 16) != b"little":
            raise _Refused("was written on a big-endian machine: save it again on another")
        self.program: BinaryIO = io.BytesIO(self._read("data.pkl", _PROGRAM_BYTES))

    def contents(self, storages: dict[str, _Storage], wanted: set[str]) -> dict[str, Tensor]:
        """Contents of the storages that are wanted, by key."""
        return {key: _contents(storages[key], self._read(f"data/{key}", storages[key].bytes)) for key in wanted}

    def _read(self, name: str, most: int) -> bytes:
        """An entry, unless it claims more bytes than `most`: memory is taken for what is claimed."""
        entry = self._entries.get(f"{self._folder}{name}")
        if entry is None:
            raise _Refused(f"has no {_quoted(name)}: it is cut off")
        if entry.file_size > most:
            raise _Refused(f"has {entry.file_size:,} bytes of {_quoted(name)}, where {most:,} are the most that fit")
        return self._zip.read(entry)


class _LegacyFile:
    """PyTorch < 1.6: pickles of a magic number, a protocol, the machine, the program, the storages' keys; then storages."""

    scripted = False

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._size = size
        head = _Machine({})
        if head.run(file) != _LEGACY_MAGIC or head.run(file) != _LEGACY_PROTOCOL:
            raise _Refused("is no file of torch.save, or one of before PyTorch 0.2")
        machine = head.run(file)
        if type(machine) is not dict or machine.get("little_endian") is not True:
            raise _Refused("was written on a big-endian machine: save it again on another")
        self.program = file

    def contents(self, storages: dict[str, _Storage], wanted: set[str]) -> dict[str, Tensor]:
        """Contents of the storages that are wanted, by key. Each must be known, to tell where the next one begins."""
        keys = _Machine({}).run(self.program)
        if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != set(storages):
            raise _Refused("has a list of storages that is not that of its program: it is cut off")
        found: dict[str, Tensor] = {}
        for key in keys:
            (numel,) = struct.unpack("<q", self.program.read(8))
            storage = storages[key]
            if storage.numel != numel or storage.bytes > self._size - self.program.tell():
                raise _Refused(f"has a storage {_quoted(key)} that is not as its program says: it is cut off")
            if key in wanted:
                found[key] = _contents(storage, self.program.read(storage.bytes))
            else:
                self.program.seek(storage.bytes, 1)
        return found


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}…")


def _short(error: BaseException) -> str:
    return str(error)[:200] or type(error).__name__
