"""What tests compare with: packages that cannot be installed beside the rest, since they insist on torchvision.

`make setup` puts them into `.venv/references`, where nothing finds them by chance: torchmetrics, for one, imports
torch-fidelity whenever it is installed. What they take from torchvision are transforms and layers that the compared parts
do not use.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import packaging.version

FOLDER = Path(sys.prefix) / "references"
_STUBS = (
    "pkg_resources",
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


def reference(name: str) -> ModuleType:
    """Import module `name` ("open_clip", "clip.model", "torch_fidelity.metric_fid") and leave no stub behind."""
    with _stubs():
        return importlib.import_module(name)


@contextmanager
def _stubs() -> Iterator[None]:
    assert FOLDER.is_dir(), f"{FOLDER} is missing: run make setup"
    modules = {name: _Stub(name) for name in _STUBS}
    for name, stub in modules.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, stub)
    modules["pkg_resources"].packaging = packaging  # type: ignore[attr-defined]  # which clip takes from there
    import transformers  # noqa: F401 - first: it looks whether torchvision is there

    sys.path.append(str(FOLDER))
    sys.modules.update(modules)
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for stub in modules:
            sys.modules.pop(stub, None)


class _Stub(ModuleType):
    """A module that has every name; none of them does anything."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__version__ = "0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (MagicMock,), {})


class _Anything(type):
    """A class, so that it can be derived from, with whatever attributes."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return name
