"""Configurations: presets, plain dicts and back, and the checks that several sections share.

A preset is a file `dalle_ds/presets/NAME.yaml`, one for each size, with one section for each stage.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from dalle_ds.errors import ConfigError
from dalle_ds.parsing import shown

PRESET_DIR = Path(__file__).parents[1] / "presets"
Config = TypeVar("Config")
_CREDENTIALS = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]*@", re.IGNORECASE)


def preset_names() -> list[str]:
    """Names that `--preset` takes."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def load_preset(name: str, stage: str, kind: type[Config]) -> Config:
    """The `stage` section ("dvae", "transformer", …) of preset `name` as a `kind`.

    Raises:
        ConfigError: unknown preset, no such section, or a field that the dataclass does not have.
    """
    if name not in preset_names():
        guess = difflib.get_close_matches(name, preset_names(), 1)
        hint = f"; did you mean {guess[0]}?" if guess else ""
        raise ConfigError(f"unknown preset {name!r}: known are {', '.join(preset_names())}{hint}")
    sections = yaml.safe_load((PRESET_DIR / f"{name}.yaml").read_text())
    if stage not in sections:
        raise ConfigError(f"preset {name!r} has no section {stage!r}: it has {', '.join(sections)}")
    return from_dict(kind, sections[stage], f"preset {name}: {stage}")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists and scalars, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # which makes lists of tuples


def from_dict(kind: type[Config], values: dict[str, Any], where: str) -> Config:
    """The inverse of `to_dict`; missing fields take their defaults.

    Args:
        where: what to name in an error, such as the file that the values came from.

    Raises:
        ConfigError: a field that `kind` does not have, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of fields, found {shown(values)}")
    hints = typing.get_type_hints(kind)
    names = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            guess = difflib.get_close_matches(name[:50], names, 1) if isinstance(name, str) else []
            hint = f"; did you mean {guess[0]}?" if guess else ""
            raise ConfigError(f"{where} has no field {shown(name)}{hint}")
        arguments[name] = _convert(hints[name], value, f"{where}.{name}")
    return kind(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        is_list = isinstance(value, (list, tuple))
        choices = tuple(choice for choice in choices if choice is not type(None))
        fitting = (choice for choice in choices if is_list == (typing.get_origin(choice) is tuple))
        return _convert(next(fitting, choices[0]), value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(choices[0], item, where) for item in value)
    if origin is Literal and value in choices:
        return value
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{where} is a number of more than 64 bits: leave it out for its default")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where} must be a finite number, found {value}")
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    wanted = f"one of {', '.join(map(repr, choices))}" if origin is Literal else getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} must be {wanted}, found {shown(value)}")


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Fields, as dotted names, in which two configurations of one kind differ: name → (old value, new value)."""
    old_fields, new_fields = dict(flatten(to_dict(old))), dict(flatten(to_dict(new)))
    names = {**old_fields, **new_fields}
    return {
        name: (old_fields.get(name), new_fields.get(name))
        for name in names
        if old_fields.get(name) != new_fields.get(name)
    }


def flatten(values: dict[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Fields of nested mappings by their dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def positive(owner: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{owner}.{name} must be greater than 0, found {value}")


def fraction(owner: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0.0 <= value < 1.0:
            raise ConfigError(f"{owner}.{name} must lie in [0, 1), found {value}")


def at_least(lowest: int, owner: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise ConfigError(f"{owner}.{name} must be at least {lowest}, found {value}")


def sound(config: Any, where: str = "") -> None:
    """What must hold of every field, whatever it means: numbers are finite, and no URL has a password in it, which files of
    the run or of prepared data, trackers and logs would show to whoever may read them."""
    for entry in dataclasses.fields(config):
        value, name = getattr(config, entry.name), f"{where}{entry.name}"
        if dataclasses.is_dataclass(value):
            sound(value, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, found {value}")
        elif any(
            isinstance(item, str) and _CREDENTIALS.search(item)
            for item in (value if isinstance(value, tuple) else [value])
        ):
            raise ConfigError(
                f"{name} is a URL with a user name or password before its host, which files and logs would show: leave these "
                "out of it"
            )
