"""Captions of any characters, and tokenizers' files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from dalle_ds.data.filters import FilterOptions, caption_problem, clean_caption, cut_caption
from dalle_ds.text.tokenizer import Tokenizer
from tests.fuzz.harness import survives, survives_in_child
from tests.fuzz.strategies import any_text, damaged_bytes

captions = st.one_of(
    any_text,
    st.text(st.characters(exclude_categories=()), max_size=2_000),
    st.builds(lambda text, times: text * times, any_text, st.integers(1, 20_000)),
    st.sampled_from(
        ["\0", "\ud800", "\udfff\ud800", "▁", "\ufeff", "\u202e", "a\u0301" * 5_000, "ﷺ" * 5_000, "\U0010ffff"]
    ),
)


@given(text=captions, seed=st.integers(0, 9), dropout=st.sampled_from([0.0, 0.1, 1.0]))
def test_captions(text: str, seed: int, dropout: float, tokenizer: Tokenizer) -> None:
    def check() -> None:
        tokens = tokenizer.encode(text, dropout=dropout, rng=np.random.default_rng(seed))
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert tokenizer.decode(tokens) == tokenizer.normalize(text)
        batch, cut = tokenizer.encode_padded([text, ""], 16)
        assert batch.shape == (2, 16) and cut == (len(tokenizer.encode(text)) > 16)

    survives("captions to tokens", check)


@given(text=captions)
def test_filters(text: str) -> None:
    def check() -> None:
        cleaned = clean_caption(text)
        cleaned.encode()  # what is stored is UTF-8
        assert clean_caption(cleaned) == cleaned
        for option in (FilterOptions(),):
            caption_problem(cut_caption(cleaned, option.max_caption_chars), option)

    survives("captions to filters", check)


@given(ids=st.lists(st.integers(-(2**70), 2**70) | st.integers(-1, 400), max_size=50))
def test_tokens(ids: list[int], tokenizer: Tokenizer) -> None:
    survives("tokens to text", lambda: tokenizer.decode(ids).encode())


def model_files(valid: bytes) -> st.SearchStrategy[bytes]:
    """Damage anywhere, and in the table of normalization, which C++ code walks through."""
    table = sentencepiece.SentencePieceProcessor(model_proto=valid).serialized_model_proto().find(b"nmt_nfkc_cf")
    parts = st.sampled_from(
        [(0, len(valid)), (0, 200), (table, table + 400), (table, len(valid)), (len(valid) - 200, len(valid))]
    )

    def within(part: tuple[int, int]) -> st.SearchStrategy[bytes]:
        begin, end = part
        return damaged_bytes(valid[begin:end], most=3).map(lambda middle: valid[:begin] + middle + valid[end:])

    return parts.flatmap(within) | st.binary(max_size=100)


def test_what_is_whole_is_taken(tokenizer_file: Path) -> None:
    survives_in_child("tokenizer files", lambda: Tokenizer(tokenizer_file.read_bytes()), must_take=True)


@given(data=st.data())
def test_model_files(data: st.DataObject, tokenizer_file: Path) -> None:
    model = data.draw(model_files(tokenizer_file.read_bytes()))

    def check() -> None:
        tokenizer = Tokenizer(model)
        for text in ("a red Circle, 42 ÄÖ ﬁ", "\u00a0日本", "x" * 300):
            tokens = tokenizer.encode(text)
            assert all(0 <= token < tokenizer.vocab_size for token in tokens)
            tokenizer.decode(tokens).encode()
            tokenizer.encode(text, dropout=0.5, rng=np.random.default_rng(0))

    survives_in_child("tokenizer files", check)
