"""JSON and YAML from files that may be damaged, or made to harm: a value, or a ValueError, and nothing else."""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

import yaml

_Repr = reprlib.Repr()
_Repr.maxlevel, _Repr.maxstring, _Repr.maxother, _Repr.maxlong = 2, 80, 80, 40
_HALVES = re.compile("[\ud800-\udfff]")
_DEPTH = 100
"""How deep YAML may be nested: its parser takes time that grows with the square."""
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document; bytes are UTF-8.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, of plain types only. Parts of it may be one object, and may contain themselves.

    Raises:
        ValueError: it is none, asks for other types, or is nested too deeply.
    """
    try:
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > _DEPTH:
                raise ValueError("it is nested too deeply")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    # What its constructors stumble on, such as `!!int ''`, `!!bool x` and `!!timestamp x`.
    except (LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"a value that is not what its tag says ({error})") from error


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold; JSON and command lines can have halves of characters."""
    return isinstance(value, str) and not _HALVES.search(value)


def shown(value: Any) -> str:
    """A value as an error tells it, shortened: a few lines of YAML can stand for one that fills memory when written out."""
    try:
        return _Repr.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__}"
