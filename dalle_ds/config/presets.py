"""Named configurations: `dalle_ds/presets/NAME.yaml`, one file per size, one section per stage."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar

import yaml

from dalle_ds.config.plain import from_dict
from dalle_ds.errors import ConfigError

PRESET_DIR = Path(__file__).parents[1] / "presets"
Config = TypeVar("Config")


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
