"""What `torch.save` writes is read as PyTorch itself reads it; whatever else a pickle may ask for is refused, and not done."""

from __future__ import annotations

import builtins
import copyreg
import io
import os
import pickle
import re
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dalle_ds.errors import CheckpointError
from dalle_ds.interop import load_tensors
from tests.fuzz.limits import limited_memory
from tests.interop.programs import (
    call,
    dictionary,
    module,
    name,
    number,
    program,
    proto,
    storage,
    tensor,
    text,
    write_legacy,
    write_zip,
)

CLASSES = ("torch.nn.modules.conv.Conv2d", "torch.nn.modules.batchnorm.BatchNorm2d")
WRITERS = {"zip": write_zip, "legacy": write_legacy}
SECONDS = 10.0
"""Of the processor, within which each file is refused; most take milliseconds."""


def refused(path: Path, words: str = ".") -> None:
    began = time.process_time()
    with limited_memory(), pytest.raises(CheckpointError, match=words) as error:
        load_tensors(path, CLASSES)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 500
    assert time.process_time() - began < SECONDS


# --- what is read ---------------------------------------------------------------------------------------------------


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1)))


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_modules_and_state_dicts_are_read_as_pytorch_reads_them(tmp_path: Path, new_format: bool, whole: bool) -> None:
    original = model()
    original[0].register_buffer("passing", torch.ones(5), persistent=False)
    torch.save(
        original if whole else original.state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=new_format
    )
    found = load_tensors(tmp_path / "m.pt", CLASSES)
    wanted = original.state_dict()
    assert set(found) == set(wanted) and len(found) == 9
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value)


@pytest.mark.parametrize("new_format", [True, False])
def test_views_and_every_dtype(tmp_path: Path, new_format: bool) -> None:
    numbers = torch.arange(24.0)
    tensors = {
        str(dtype): torch.arange(5).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    }
    tensors |= {
        "bytes": torch.arange(9, dtype=torch.uint8),
        "bools": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
    }
    tensors |= {"part": numbers[3:9], "turned": numbers.view(4, 6).T, "scalar": torch.tensor(2.5)}
    torch.save(tensors, tmp_path / "t.pt", _use_new_zipfile_serialization=new_format)
    found = load_tensors(tmp_path / "t.pt")
    assert list(found) == list(tensors)
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_is_put_together_by_hand_is_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    """So that the refusals below are of what each changes in it."""
    path = write(tmp_path / "f", program(dictionary(w=tensor())))
    assert torch.equal(load_tensors(path)["w"], torch.zeros(2, 3))
    nested = module(_modules=dictionary(a=module(_parameters=dictionary(w=tensor()))))
    assert list(load_tensors(write(path, program(nested)))) == ["a.w"]


def test_what_torch_load_does_not_read_says_what_to_do(tmp_path: Path) -> None:
    for protocol in (3, 4, 5):
        torch.save(model().state_dict(), tmp_path / "m.pt", pickle_protocol=protocol)
        refused(tmp_path / "m.pt", "pickle_protocol")


def test_damage_is_found_wherever_it_is(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "m.pt")
    content = bytearray((tmp_path / "m.pt").read_bytes())
    content[content.index(struct.pack("<f", 1.0) * 3) + 100] ^= 1
    (tmp_path / "m.pt").write_bytes(content)
    refused(tmp_path / "m.pt", "CRC")


def test_files_of_machines_with_the_other_byte_order_are_read(tmp_path: Path) -> None:
    numbers = struct.pack(">6f", *range(6))
    path = write_zip(tmp_path / "f", program(dictionary(w=tensor())), {"data/0": numbers, "byteorder": b"big"})
    assert torch.equal(load_tensors(path)["w"], torch.arange(6.0).view(2, 3))


# --- what would be run ----------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._calls = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._calls


def attacks(canary: Path) -> dict[str, tuple[Any, int]]:
    """Objects whose pickles, of a protocol, make the file `canary` when they are unpickled."""
    touch = f"touch {canary}"
    source = f"open({str(canary)!r}, 'w').close()"
    inner = io.BytesIO()
    torch.save(Payload(os.system, touch), inner)
    return {
        "os.system": (Payload(os.system, touch), 2),
        "os.system, STACK_GLOBAL": (Payload(os.system, touch), 4),
        "eval": (Payload(eval, f"__import__('os').system({touch!r})"), 2),
        "eval, STACK_GLOBAL": (Payload(eval, f"__import__('os').system({touch!r})"), 4),
        "exec": (Payload(exec, source), 4),
        "subprocess": (Payload(subprocess.check_call, touch.split()), 2),
        "open": (Payload(builtins.open, str(canary), "w"), 4),
        "among weights": ({"w": torch.zeros(2), "x": Payload(os.system, touch)}, 2),
        "a dotted name": (Payload(Path(canary).touch.__func__, canary), 4),
        "a pickle within": (Payload(pickle.loads, pickle.dumps(Payload(os.system, touch))), 4),
        "PyTorch's own loader": (Payload(torch.storage._load_from_bytes, inner.getvalue()), 4),
    }


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_nothing_of_a_malicious_file_is_run(
    tmp_path: Path, attack: str, new_format: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch's loader asks, by default, for the same caution; within, the attack is free of it.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    payload, protocol = attacks(canary)[attack]
    path = tmp_path / "model.pkl"
    torch.save(payload, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new_format)
    torch.load(path, weights_only=False)
    assert canary.exists(), "the attack itself works"
    canary.unlink()
    refused(path, "not trusted|of protocol")
    assert not canary.exists()


TOUCH = text("touch canary")
SYSTEM = name("os", "system")
ATTACKS_BY_HAND = {
    "a name of text on the stack": text("os") + text("system") + b"\x93" + b"(" + TOUCH + b"tR",
    "a name from the memo": text("os") + b"q\x00" + text("system") + b"q\x01" + b"00h\x00h\x01\x93(" + TOUCH + b"tR",
    "a dotted attribute": text("torch") + text("hub.os.system") + b"\x93" + b"(" + TOUCH + b"tR",
    "an attribute of what is allowed": text("torch._utils") + text("_rebuild_parameter.__globals__") + b"\x93",
    "another spelling of eval": name("__builtin__", "eval") + b"(" + text("1") + b"tR",
    "getattr": call(name("builtins", "getattr"), name("torch", "Size"), text("__class__")),
    "INST": b"(" + TOUCH + b"ios\nsystem\n",
    "OBJ": b"(" + SYSTEM + TOUCH + b"o",
    "NEWOBJ of a function": name("torch._utils", "_rebuild_tensor_v2") + b")\x81",
    "NEWOBJ_EX": name("torch.nn.modules.conv", "Conv2d") + b")}\x92",
    "REDUCE of text": TOUCH + b")R",
    "REDUCE of no tuple": name("torch", "Size") + b"]R",
    "BUILD of a function": name("torch", "Size") + b"}b",
    "BUILD of a list": b"]}b",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pstorage\n",
    "a persistent id of text": TOUCH + b"Q",
    "a persistent id of a class that is not allowed": b"("
    + text("module")
    + SYSTEM
    + text("f.py")
    + text("x = 1")
    + b"tQ",
    "a persistent id of a storage that is none": b"("
    + text("storage")
    + name("torch", "Size")
    + text("0")
    + text("cpu")
    + number(1)
    + b"tQ",
    "a buffer from outside": b"\x97",
    "a protocol that is text": b"I01\n",
    "a tensor whose class is built": call(name("torch._utils", "_rebuild_from_type_v2"), SYSTEM),
    "NumPy": call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray")),
    "functools.partial": call(name("functools", "partial"), SYSTEM, TOUCH),
}


TOLD = "not trusted|of protocol|neither a module"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("attack", ATTACKS_BY_HAND)
def test_instructions_that_torch_save_does_not_write_are_refused(
    tmp_path: Path, attack: str, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A process may have given functions numbers by which pickles call them.
    monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "system"))  # type: ignore[attr-defined]
    refused(write(tmp_path / "f", program(ATTACKS_BY_HAND[attack])), TOLD)
    refused(write(tmp_path / "f", program(dictionary(w=tensor(), x=ATTACKS_BY_HAND[attack]))), TOLD)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_any_class_that_is_asked_for_does_nothing(
    tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the files of training programs."""
    monkeypatch.chdir(tmp_path)
    for attack in (*ATTACKS_BY_HAND.values(), call(name("builtins", "eval"), text("open('canary', 'w')"))):
        path = write(tmp_path / "f", program(dictionary(w=tensor(), x=attack)))
        try:
            assert set(load_tensors(path, None)) == {"w"}
        except CheckpointError as error:
            assert re.search(TOLD, str(error))
    path = write(tmp_path / "f", program(dictionary(w=tensor(), x=call(name("argparse", "Namespace"), TOUCH) + b"}b")))
    assert set(load_tensors(path, None)) == {"w"}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    refused_any = name("builtins", "bytearray") + b"(" + number(2**33) + b"tR"
    with limited_memory(), pytest.raises(CheckpointError, match=r"builtins\.bytearray"):
        load_tensors(write(path, program(dictionary(w=tensor(), x=refused_any))), None)


# --- what would take for ever, or all memory ------------------------------------------------------------------------


def chain(links: int) -> bytes:
    """Modules within each other."""
    inside = b""
    for _ in range(links):
        inside += name("torch.nn.modules.container", "Sequential") + b")\x81}(" + text("_modules") + b"}(" + text("m")
    return inside + b"N" + b"uub" * links


def fan(levels: int) -> bytes:
    """Two of each level in the next: 2^levels names of one tensor."""
    code = module(_parameters=dictionary(w=tensor())) + b"q\x00"
    for _ in range(levels):
        code += module(_modules=b"}(" + text("a") + b"h\x00" + text("b") + b"h\x00u") + b"q\x00"
    return code


def long_names() -> bytes:
    """One name of half a million characters before each of twenty thousand."""
    children = b"".join(text(f"{child:x}") + b"h\x00" for child in range(20_000))
    inner = module() + b"q\x00" + module(_modules=b"}(" + children + b"u") + b"q\x01"
    return inner + module(_modules=b"}(" + text("n" * 500_000) + b"h\x01u")


def itself() -> bytes:
    """A module that is its own child."""
    kind = name("torch.nn.modules.container", "Sequential")
    return kind + b")\x81q\x00}(" + text("_modules") + b"}(" + text("m") + b"h\x00uub"


def many_classes() -> bytes:
    """A list of many classes and many objects."""
    classes = b"".join(name("a", f"x{n}") for n in range(2_000))
    return b"](" + classes + name("a", "x") + b"q\x00" + b"h\x00)\x81" * 200_000 + b"e"


def colliding() -> bytes:
    """A dictionary of numbers whose hashes are equal: each is compared with all before."""
    return b"}(" + b"".join(number(step * (2**61 - 1)) + b"N" for step in range(2, 60_000)) + b"u"


MUCH = 2**40
BOMBS = {
    "a tensor beyond its storage": dictionary(w=tensor(size=(2, 4))),
    "a tensor that begins beyond its storage": dictionary(w=tensor(offset=1)),
    "a tensor that begins before its storage": dictionary(w=tensor(offset=2**63)),
    "much out of little by strides": dictionary(w=tensor(size=(MUCH, MUCH), stride=(0, 0))),
    "a huge empty tensor": dictionary(w=tensor(size=(2**62, 2**62, 0), stride=(0, 0, 0))),
    "more dimensions than strides": dictionary(w=tensor(size=(2, 3, 1))),
    "a storage larger than the file": dictionary(w=tensor(size=(MUCH,), stride=(1,), numel=MUCH)),
    "a storage that is not there": dictionary(w=tensor(key="1")),
    "a storage elsewhere": dictionary(w=tensor(key="../../etc/passwd")),
    "one tensor under thousands of names": b"}("
    + text("w")
    + tensor()
    + b"q\x00"
    + b"".join(text(f"{n}") + b"h\x00" for n in range(9_000))
    + b"u",
    "a list of itself": b"]q\x00h\x00a",
    "a dictionary of itself": b"}q\x00" + text("a") + b"h\x00s",
    "a module of itself": itself(),
    "modules within each other": chain(5_000),
    "modules in two places each": fan(40),
    "long names": long_names(),
    "numbers that collide": colliding(),
    "many classes and objects": many_classes(),
    "nested tuples as a key": b"}(" + b")" + b"\x85" * 500_000 + b"Nu",
    "nested lists": b"]" * 500_000 + b"a" * 499_999,
    "nested tuples": b")" + b"\x85" * 1_000_000,
    "nested marks": b"(" * 1_000_000,
    "sets": b"\x8f" * 1_000_000,
    "a long program": b"N0" * 2_000_000,
    "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n",
    "text that ends beyond the program": b"X\xff\xff\xff\xff",
    "text of 2^62 bytes": b"\x8d" + struct.pack("<Q", 2**62),
    "a number of 2^31 bytes": b"\x8b\xff\xff\xff\x7f",
    "no value": b"",
    "a memo that was not written": b"h\x07",
    "no mark": b"t",
    "an odd dictionary": b"}(" + text("a") + b"u",
    "text that is no text": b"X\x01\x00\x00\x00\xff",
    "an instruction that is none": b"\xff",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_program_takes_much_time_or_memory(tmp_path: Path, bomb: str) -> None:
    refused(write_zip(tmp_path / "f", program(BOMBS[bomb])))
    if len(BOMBS[bomb]) < 100_000:  # the long ones take a second each, in a machine that is the same
        refused(write_legacy(tmp_path / "f", program(BOMBS[bomb])))


def claiming(path: Path, size: int) -> Path:
    """A zip archive whose storage says that it has `size` bytes, in the archive's list and before its contents."""
    data = write_zip(path, program(dictionary(w=tensor(size=(2,), stride=(1,), numel=size // 4)))).read_bytes()
    for signature, place in ((b"PK\x03\x04", 18), (b"PK\x01\x02", 20)):
        begin = data.rfind(signature)
        data = data[: begin + place] + struct.pack("<II", size, size) + data[begin + place + 8 :]
    path.write_bytes(data)
    return path


def test_archives_that_torch_save_does_not_write_are_refused(tmp_path: Path) -> None:
    good, path = program(dictionary(w=tensor())), tmp_path / "f"
    refused(write_zip(path, bytes(50_000_000), compression=zipfile.ZIP_DEFLATED), "is a compressed archive")
    refused(write_zip(path, good, {"data/0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED), "is a compressed archive")
    refused(write_zip(path, good, {"data/0": bytes(24), "constants.pkl": b""}), "is a TorchScript archive")
    with zipfile.ZipFile(write_zip(path, good), "a") as archive:
        archive.writestr("another/data.pkl", good)
    refused(path, "no data.pkl, or several")
    refused(write_zip(path, good, {}), "data/0")
    refused(write_zip(path, bytes(2**21)), "a pickle of")
    refused(claiming(path, 2**31 - 16))
    with pytest.warns(UserWarning, match="Duplicate name"):
        refused(write_zip(path, good, {"data/0": bytes(24), "data.pkl": good}), "or several")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(nn.ReLU()), str(tmp_path / "script.pt"))
    refused(tmp_path / "script.pt", "archive")


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(tmp_path: Path, new_format: bool) -> None:
    torch.save(model().state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=new_format)
    whole = (tmp_path / "m.pt").read_bytes()
    for length in (*range(0, len(whole), max(1, len(whole) // 150)), len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        refused(tmp_path / "cut.pt")


def test_files_that_are_not_there_or_are_something_else(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")
    for content in (b"", b"hello", proto() + b"N.", bytes(100)):
        (tmp_path / "f").write_bytes(content)
        refused(tmp_path / "f")
    refused(write_zip(tmp_path / "f", program(dictionary(w=storage()))), "neither a module nor")
    refused(write_zip(tmp_path / "f", program(b"}")), "neither a module nor")
