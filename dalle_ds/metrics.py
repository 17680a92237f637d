"""The lines of a run's `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalle_ds.parsing import parse_json


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Each whole line as a dict with the update as "step"; what is left of a line that was cut off is passed over."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] < 2**63:
            yield record
