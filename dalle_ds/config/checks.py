"""Checks that several sections share."""

from __future__ import annotations

from typing import Any

from dalle_ds.errors import ConfigError


def positive(owner: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{owner}.{name} must be greater than 0, found {value}")


def fraction(owner: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0.0 <= value < 1.0:
            raise ConfigError(f"{owner}.{name} must lie in [0, 1), found {value}")
