"""CLIP's own vocabulary gives open_clip's and OpenAI's tokens, and what holds of every tokenizer of a CLIP."""

from __future__ import annotations

import gzip
import json
import pickle
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models import Clip
from dalle_ds.text.clip_tokenizer import BytePairs, ClipTokenizer
from dalle_ds.text.tokenizer import Tokenizer
from tests.clip_shapes import CLIP_SHAPES
from tests.references import FOLDER, reference

CLIPS_FILE = FOLDER / "clip" / "bpe_simple_vocab_16e6.txt.gz"
WORDS = ["the", "cat's", "12", "dog", "&amp;", "'", "n’t", "café", "", "!", "flags", "of"]
HARD = [
    "a photo of a cat",
    "",
    "  \t \n ",
    "It's the dog's; they're, we've, I'm, you'll, he'd, 'S 'RE",
    "don’t “quote” ﬁne ＦＵＬＬ width ½ ² Ⅷ 12345 3.14",
    "&lt;b&gt;bold&amp;amp;&#39;s&#x1F600; &nbsp;x",
    "schÃ¶n â€œmojibakeâ€\x9d",
    "日本語の絵 한국어 العربية हिन्दी ไทย",
    "👩‍👩‍👧‍👦 👍🏽 🇮🇸 ❤️",
    "İstanbul ǅ ẞ ſ Σς K Å",
    "a\u0301 e\u0301\u0327 zero\u200bwidth\u2060joiner \ufeffbom",
    "\x00control\x07 \x1b[31mred\x1b[0m \x85 \u2028line\u3000space",
    "supercalifragilisticexpialidocious" * 4,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!!!!!??!?!?! ...........",
    "<|startoftext|> <|endoftext|> <s> [PAD]",
]


@pytest.fixture(scope="module")
def pieces() -> BytePairs:
    return BytePairs.load(CLIPS_FILE)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return reference("open_clip.tokenizer").SimpleTokenizer()


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_have_open_clips_tokens(pieces: BytePairs, theirs: Any, text: str) -> None:
    assert pieces.encode(text) == theirs.encode(text)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.text(st.characters(categories=("L", "M", "N", "P", "Zs")), max_size=60),
        st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
        st.text("abcdefghij 'st!19", max_size=80),
    )
)
def test_any_text_has_open_clips_tokens(text: str) -> None:
    pieces, theirs = _both()
    assert pieces.encode(text) == theirs.encode(text)


@cache
def _both() -> tuple[BytePairs, Any]:
    """Hypothesis wants no fixtures that outlive an example."""
    return BytePairs.load(CLIPS_FILE), reference("open_clip.tokenizer").SimpleTokenizer()


def test_openais_tokens_are_the_same_with_its_special_ones_apart(pieces: BytePairs) -> None:
    openai = reference("clip.simple_tokenizer").SimpleTokenizer()
    for text in HARD[:-1]:
        assert pieces.encode(text) == openai.encode(text)
    # A caption cannot end itself: OpenAI's tokenizer makes an end token of these letters.
    assert openai.encode("a <|endoftext|> b")[1] == 49_407
    assert max(pieces.encode(HARD[-1])) < pieces.vocab_size == 49_406


def test_hugging_faces_tokens_are_the_same_for_plain_captions(pieces: BytePairs, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    pieces.save(tmp_path / "merges.txt")
    special = {"<|startoftext|>": 49_406, "<|endoftext|>": 49_407}
    (tmp_path / "vocab.json").write_text(json.dumps({**pieces.vocabulary, **special}), encoding="utf-8")
    huggingface = CLIPTokenizer.from_pretrained(tmp_path)
    for text in (HARD[0], HARD[3], HARD[7], HARD[12], "A Red Circle, 12 cm"):
        assert huggingface(text).input_ids == [49_406, *pieces.encode(text), 49_407]
    # What transformers itself saves is read again.
    huggingface.save_pretrained(tmp_path / "saved")
    found = ClipTokenizer.load(tmp_path / "saved")
    assert found.pieces.fingerprint == pieces.fingerprint and (found.start, found.end) == (49_406, 49_407)


def test_rows_are_open_clips_with_another_padding(theirs: Any) -> None:
    ours = ClipTokenizer.load(CLIPS_FILE)
    for length in (3, 8, 77):
        rows = ours.encode(HARD, length)
        assert rows.dtype == torch.int64 and rows.shape == (len(HARD), length)
        assert torch.equal(rows.masked_fill(rows == -1, 0), theirs(HARD, context_length=length))
        assert (rows == ours.end).sum(dim=1).tolist() == [1] * len(HARD), "cut captions keep their end token"


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_tokenizer_is_the_same_wherever_it_is_read(kind: str, tmp_path: Path, tokenizer_file: Path) -> None:
    source = CLIPS_FILE if kind == "bytes" else tokenizer_file
    tokenizer = ClipTokenizer.load(source)
    tokenizer.save(tmp_path)
    for again in (ClipTokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint
        assert torch.equal(again.encode(HARD, 40), tokenizer.encode(HARD, 40))
    text = "a red circle, 12 cm"
    assert tokenizer.decode(tokenizer.encode([text], 40)[0]) == {"bytes": "a red circle , 1 2 cm"}.get(kind, text)
    other = ClipTokenizer.load(source, start=60_000, end=60_001)
    assert other.fingerprint != tokenizer.fingerprint
    assert other.encode([text], 40)[0, 0] == 60_000 and (other.encode([text], 40) == 60_001).sum() == 1


def test_sentencepiece_rows_are_the_tokenizers_between_start_and_end(tokenizer_file: Path) -> None:
    plain = Tokenizer.load(tokenizer_file)
    tokenizer = ClipTokenizer.load(tokenizer_file)
    assert (tokenizer.start, tokenizer.end) == (plain.vocab_size, plain.vocab_size + 1)
    row = tokenizer.encode(["a red circle"], 30)[0].tolist()
    wanted = [plain.vocab_size, *plain.encode("a red circle"), plain.vocab_size + 1]
    assert row == wanted + [-1] * (30 - len(wanted))
    with pytest.raises(ConfigError, match=f"set model.text_vocab to {plain.vocab_size + 2} or more"):
        ClipTokenizer.load(tokenizer_file, start=plain.vocab_size - 1, end=plain.vocab_size)
    with pytest.raises(ConfigError, match=r"the model's 4096 and 4097"):
        Clip(CLIP_SHAPES["toy"], tokenizer=tokenizer)
    Clip(replace(CLIP_SHAPES["toy"], text_vocab=plain.vocab_size + 2), tokenizer=tokenizer)


def test_long_words_take_no_long_time(pieces: BytePairs) -> None:
    began = time.process_time()
    assert pieces.decode(pieces.encode("ab" * 50_000)) == "ab" * 50_000
    assert time.process_time() - began < 20, "the time grows with the square"


def test_tokens_outside_the_vocabulary_have_no_text(pieces: BytePairs) -> None:
    with pytest.raises(DataError, match="outside the tokenizer's vocabulary"):
        pieces.decode([49_406])
    assert pieces.decode([pieces.vocabulary["ÿ"]]) == "�"


def lines(*merges: str) -> str:
    return "\n".join(["#version: 0.2", *merges]) + "\n"


def huggingface(**changes: Any) -> str:
    model = {
        "type": "BPE",
        "end_of_word_suffix": "</w>",
        "merges": ["a b"],
        "vocab": BytePairs([("a", "b")]).vocabulary,
    }
    return json.dumps({"model": {**model, **changes}})


def test_smaller_vocabularies_of_the_kind_are_read(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text(lines("a b", "ab c</w>"))
    small = BytePairs.load(tmp_path / "merges.txt")
    assert small.vocab_size == 514 and small.encode("abc ab") == [513, small.vocabulary["a"], small.vocabulary["b</w>"]]
    for merges in (["a b"], [["a", "b"]]):
        (tmp_path / "tokenizer.json").write_text(huggingface(merges=merges))
        assert BytePairs.load(tmp_path / "tokenizer.json").vocab_size == 513


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("merges.txt", lines("ab c"), "merge 1 .* of a piece that no earlier one makes"),
        ("merges.txt", lines("a b", "a b"), "merge 2 .* makes one again"),
        ("merges.txt", lines("a</w> b"), "merge 1"),
        ("merges.txt", lines("a b c"), "merge 1 is no pair"),
        ("merges.txt", lines("ab"), "merge 1 is no pair"),
        ("merges.txt", "a b\n", "says no version"),
        ("merges.txt", "", "says no version"),
        ("merges.txt", b"\xff\xfe", "cannot be read"),
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer.json", "[]", "is not CLIP's"),
        ("tokenizer.json", huggingface(type="Unigram"), "is not CLIP's"),
        ("tokenizer.json", huggingface(end_of_word_suffix=None), "is not CLIP's"),
        ("tokenizer.json", huggingface(merges=None), "no merges"),
        ("tokenizer.json", huggingface(merges=[1]), "merge 1 is no pair"),
        ("tokenizer.json", huggingface(vocab={"!": 5}), "its vocabulary numbers '!' 5, where its merges tell 0"),
        ("clip.txt.gz", b"\x1f\x8b\x08\x00broken", "cannot be read"),
        ("clip.txt.gz", gzip.compress(bytes(2**27)), "more than 67,108,864 bytes"),
    ],
)
def test_broken_vocabularies_are_refused(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=words) as error:
        ClipTokenizer.load(file)
    assert str(file) in str(error.value)


def test_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no tokenizer in"):
        ClipTokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ClipTokenizer.load(tmp_path / "merges.txt")
    (tmp_path / "merges.txt").write_text(lines("a b"))
    for vocabulary, words in (("{}", "its vocabulary numbers '!' None"), ("[1]", "no mapping"), ("{", "vocab.json")):
        (tmp_path / "vocab.json").write_text(vocabulary)
        with pytest.raises(CheckpointError, match=words):
            ClipTokenizer.load(tmp_path)
