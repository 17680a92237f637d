"""Configurations as plain dicts, lists and scalars, and back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal, TypeVar

from dalle_ds.errors import ConfigError
from dalle_ds.parsing import shown

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists and scalars, ready for YAML or JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


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
