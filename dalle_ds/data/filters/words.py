"""Files of phrases and expressions that captions must not have, or must have."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import cache
from pathlib import Path

from dalle_ds.errors import ConfigError


@cache
def word_list(path: str) -> re.Pattern[str]:
    """What finds any of the phrases of a file, each as whole words, and of its /regular expressions/, whatever the case.

    Empty lines, and those that begin with #, are left out.

    Raises:
        ConfigError: the file cannot be read, has nothing in it, or an expression that is none.
    """
    patterns = []
    for number, line in enumerate(_read(path).decode("utf-8-sig", "replace").splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        is_expression = len(entry) > 2 and entry[0] == entry[-1] == "/"
        phrase = r"\s+".join(map(re.escape, unicodedata.normalize("NFC", entry).split()))
        pattern = entry[1:-1] if is_expression else rf"(?<!\w){phrase}(?!\w)"
        try:
            re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise ConfigError(f"{path} line {number} is no regular expression ({error}): {entry}") from error
        patterns.append(f"(?:{pattern})")
    if not patterns:
        raise ConfigError(f"{path} has no phrases: write one in a line")
    try:
        return re.compile("|".join(patterns), re.IGNORECASE)
    except re.error as error:
        raise ConfigError(f"the expressions of {path} do not go together ({error}): leave out named groups") from error


def file_digest(path: str) -> str:
    """SHA-256 of a word list's contents, in hexadecimal.

    Raises:
        ConfigError: it cannot be read.
    """
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"word list {path} cannot be read: {error.strerror}") from error
