"""Checks that several sections share."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from dalle_ds.errors import ConfigError

_CREDENTIALS = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]*@", re.IGNORECASE)


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
