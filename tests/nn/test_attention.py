"""The masks against the set definitions of DALL·E App. B.1, written as a slow double loop over coordinates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle_ds.config import DalleConfig
from dalle_ds.errors import ConfigError
from dalle_ds.nn.attention import AttentionPattern, attention_mask, configured_kinds, layer_kinds
from dalle_ds.nn.attention.blockwise import is_worthwhile


def allowed_codes(kind: str, query: int, side: int, kernel: int) -> set[int]:
    """Raster indices that code `query` may attend to, enumerated from the kind's definition."""
    if kind == "full":
        return set(range(query + 1))
    if kind == "row":  # a window of side + 1 tokens that ends with the query
        return {query - back for back in range(side + 1) if query - back >= 0}
    if kind == "column":
        row, column = divmod(query, side)
        return {earlier * side + column for earlier in range(row + 1)}
    reached = set()
    for rows_up in range(kernel // 2 + 1):
        for columns_left in range(-(kernel // 2), kernel // 2 + 1):
            key = query - rows_up * side - columns_left
            if 0 <= key <= query:
                reached.add(key)
    return reached


@pytest.mark.parametrize("kind", ["row", "column", "conv", "full"])
@pytest.mark.parametrize(("text_len", "side", "kernel"), [(6, 4, 11), (6, 4, 3), (256, 32, 11), (3, 1, 1), (5, 7, 5)])
def test_mask_is_the_definition(kind: str, text_len: int, side: int, kernel: int) -> None:
    mask = attention_mask(kind, text_len, side, kernel)
    assert mask.dtype == torch.bool
    assert mask.shape == (text_len + side**2, text_len + side**2)
    for query, row in enumerate(mask.tolist()):
        found = {key for key, may_attend in enumerate(row) if may_attend}
        if query < text_len:
            assert found == set(range(query + 1))
        else:
            codes = allowed_codes(kind, query - text_len, side, kernel)
            assert found == set(range(text_len)) | {text_len + key for key in codes}


def test_the_papers_key_counts() -> None:
    """At side 32: 33 keys for row (the window counts the query itself), 32 for column, 61 for the 11×11 kernel."""
    most = {kind: int(attention_mask(kind, 1, 32)[1:, 1:].sum(dim=1).max()) for kind in ("row", "column", "conv")}
    assert most == {"row": 33, "column": 32, "conv": 61}


def test_schedule_of_the_paper() -> None:
    kinds = layer_kinds(64)
    assert [kinds.count(kind) for kind in ("row", "column", "conv")] == [47, 16, 1]
    assert kinds[:6] == ("row", "column", "row", "row", "row", "column")
    assert [layer for layer, kind in enumerate(kinds, start=1) if kind == "column"] == list(range(2, 63, 4))
    assert kinds[-1] == "conv"
    assert layer_kinds(1) == ("conv",)
    assert layer_kinds(2) == ("row", "conv")


def test_config_overrides_the_schedule() -> None:
    shape = {"width": 8, "depth": 2, "heads": 2}
    assert configured_kinds(DalleConfig(**shape, attention=("full", "column"))) == ("full", "column")
    assert configured_kinds(DalleConfig(**shape)) == ("row", "conv")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("rows", 4, 4), "rows"),
        (("row", 0, 4), "text_len=0"),
        (("row", 4, 0), "grid=0"),
        (("conv", 4, 4, 10), "10"),
    ],
)
def test_mistakes_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        attention_mask(*arguments)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("grid", "length"), [*((4, length) for length in (1, 4, 5, 6, 13, 21)), (14, 201), (14, 150)])
@pytest.mark.parametrize("kind", ["row", "column", "conv", "full"])
def test_pattern_is_masked_attention(kind: str, grid: int, length: int, padded: bool) -> None:
    """Against torch's own masked attention, for sequences that end anywhere in the text or the image."""
    torch.manual_seed(0)
    qkv = torch.randn(2, length, 3, 2, 8)
    mask = attention_mask(kind, 5, grid, 3)[:length, :length].repeat(2, 1, 1, 1)
    keep = None
    if padded:
        keep = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
        mask[..., :5] &= keep[:, None, None, :length]
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(AttentionPattern(kind, 5, grid, 3)(qkv, keep), expected)
    if grid == 14 and kind != "full":
        assert is_worthwhile(kind, 5, grid, 3, length, qkv.dtype)  # so not by the same mask
