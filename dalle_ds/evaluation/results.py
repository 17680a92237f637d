"""Results of evaluations: figures with the protocol that they were obtained by, and comparisons of what is comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import write_json
from dalle_ds.parsing import parse_json, shown

METHOD = 1
"""Raised whenever a figure would come out otherwise from the same pictures."""
DEPTH = 20
"""How deep a protocol may be nested; files that others made may be nested deeper."""


@dataclass(frozen=True)
class Result:
    """Figures of one evaluation."""

    protocol: dict[str, Any]
    """How it was measured: equal in results that may be compared. Nested dicts and plain values."""
    models: dict[str, str]
    """What was measured: fingerprints by name."""
    metrics: dict[str, float]
    """Figures by name; "/" divides a name into groups."""
    version: str
    """Of dalle_ds."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know beside the figures."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each part took."""

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, vars(self))

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            DataError: there is no such file, or it holds something else.
        """
        try:
            content = parse_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a result of an evaluation: {error}") from error
        kinds = {"protocol": dict, "models": dict, "metrics": dict, "version": str, "notes": list, "seconds": dict}
        if not isinstance(content, dict) or set(content) != set(kinds):
            raise DataError(f"{path} is no result of an evaluation: launchers/evaluate.py writes them as result.json")
        for name, kind in kinds.items():
            if not isinstance(content[name], kind):
                raise DataError(f"{path}: {name} must be a {kind.__name__}, found {shown(content[name])}")
        for name, value in content["metrics"].items():
            if type(value) not in (int, float):
                raise DataError(f"{path}: metrics.{name} must be a number, found {shown(value)}")
        return cls(**content)


def compare(one: Result, other: Result, allow: Sequence[str] = ()) -> dict[str, tuple[float, float]]:
    """The figures that two results share: name → (one's, other's).

    Args:
        allow: fields of the protocol that may differ, with all below them ("sampling", "sampling.temperature").

    Raises:
        ConfigError: their protocols differ elsewhere; every differing field is named, with both values.
    """
    first, second = flat(one.protocol), flat(other.protocol)
    differing = [
        f"{name}: {shown(first.get(name))} and {shown(second.get(name))}"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name) and not any(name == a or name.startswith(f"{a}.") for a in allow)
    ]
    if differing:
        raise ConfigError(
            f"these results were obtained by different protocols and cannot be compared: {'; '.join(differing)}. Evaluate "
            "one of them again like the other; where a difference is what you are after, name its field with --allow"
        )
    return {name: (value, other.metrics[name]) for name, value in one.metrics.items() if name in other.metrics}


def flat(protocol: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dots in the names."""
    found: dict[str, Any] = {}
    for name, value in protocol.items():
        nested = isinstance(value, dict) and prefix.count(".") < DEPTH
        found |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found
