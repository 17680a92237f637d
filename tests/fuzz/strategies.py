"""Inputs: arbitrary values, and valid ones with damage."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

any_text = st.text(st.characters(exclude_categories=()), max_size=40)
"""Any code points, lone surrogates and NUL among them."""
numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, -(2**31), 2**63 - 1, 2**63, 2**64, 10**12, 10**30, 10**400]),
    st.floats(),
)
scalars = st.one_of(
    st.none(), st.booleans(), numbers, any_text, st.sampled_from(["auto", "", "1", "fp16", "../x", "\0"])
)


def values(keys: st.SearchStrategy[str] = any_text) -> st.SearchStrategy[Any]:
    """Nested lists and mappings with text for keys."""
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
    )


def deep(opening: str, closing: str) -> st.SearchStrategy[str]:
    """Brackets within brackets, closed or not."""
    return st.builds(lambda n, closed: opening * n + closing * n * closed, st.integers(1, 200_000), st.booleans())


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a tree of lists and mappings."""
    yield path
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*path, key))


@st.composite
def damaged_tree(draw: st.DrawFn, tree: Any, most: int = 2) -> Any:
    """A tree in which up to `most` places hold something else, or are missing."""
    changed = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(places(changed))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(values())
            continue
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        known = st.sampled_from([parent[path[-1]], *list(parent.values() if isinstance(parent, dict) else parent)])
        what = draw(st.integers(0, 4))
        if what == 0:
            del parent[path[-1]]
        elif what == 1 and isinstance(parent, dict):
            parent[draw(any_text)] = parent.pop(path[-1])
        else:
            parent[path[-1]] = copy.deepcopy(draw(values() if what > 2 else known | scalars))
    return changed


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes, most: int = 6) -> bytes:
    """Bytes of which some are changed, missing, repeated, moved or more."""
    for _ in range(draw(st.integers(1, most))):
        # Anywhere, and at the beginning more often than elsewhere; plain integers would be small ones mostly.
        at = draw(st.integers(0, 63) | st.integers(1, 2**30).map(lambda n: n * 2_654_435_761 >> 7)) % max(1, len(data))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 4096]))
        what = draw(st.integers(0, 6))
        if what == 0:
            data = data[:at]
        elif what == 1:
            data = data[:at] + data[at + length :]
        elif what == 2:
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif what == 3:
            data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
        elif what == 4:
            big = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]))
            size = draw(st.sampled_from([1, 2, 4, 8]))
            word = (big % 2 ** (8 * size)).to_bytes(size, draw(st.sampled_from(["little", "big"])))  # type: ignore[arg-type]
            data = data[:at] + word + data[at + size :]
        elif data:
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
    return data


def damaged_json(tree: Any) -> st.SearchStrategy[bytes]:
    """A JSON file: valid with something else in it, no JSON any more, or something else entirely."""

    def written(value: Any) -> bytes:
        return json.dumps(value).encode()  # escapes surrogates, and writes NaN and Infinity

    return st.one_of(
        damaged_tree(tree).map(written),
        damaged_bytes(written(tree)),
        values().map(written),
        st.binary(max_size=60),
        deep("[", "]").map(str.encode),
        deep('{"a":', "}").map(str.encode),
    )
