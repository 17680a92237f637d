"""Prompts from a file."""

from __future__ import annotations

from pathlib import Path

from dalle_ds.errors import DataError


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file; empty ones are left out.

    Raises:
        DataError: it cannot be read, or has none, or one twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the captions in {path} cannot be read: {error}; name a text file") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise DataError(f"{path} has no captions: write one on each line")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt in seen:
            raise DataError(f"{path} has the caption {prompt!r} twice: leave one out")
        seen.add(prompt)
    return prompts
