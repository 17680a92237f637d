"""The tokenizer, against sentencepiece itself, a literal reading of the BPE-dropout algorithm, and unicodedata."""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import random
import re
import runpy
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from string import ascii_lowercase

import emoji
import numpy as np
import pytest
import sentencepiece
import torch

from dalle_ds.data.faults import FaultLog
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.text import tokenizer as implementation
from dalle_ds.text.tokenizer import Tokenizer, TokenizerConfig

CAPTIONS = sorted({entry["en"].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values()})
LAUNCHER = Path(__file__).parents[2] / "launchers" / "train_tokenizer.py"
NEVER = 1e-300  # a dropout that takes our own merging, not sentencepiece's, and in practice never skips
FOREIGN = [
    "Женщина, 30 лет — Ёлка",
    "日本語のキャプション、ｶﾀｶﾅ",
    "قطة على السرير",
    "नमस्ते दुनिया",
    "👩‍👩‍👧 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇲🇬",
    "Straße, Ångström, naïve café",
    "e\u0301 versus é",
    "<unk> <0x41> <s> ▁ ▅ \0 \x7f",
    "3.14 & 2,000!! don't — “quote”",
    "broken \ud800 surrogate",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.train(CAPTIONS, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_file: Path) -> Tokenizer:
    return Tokenizer.load(model_file)


@pytest.fixture(scope="module")
def reference(model_file: Path) -> sentencepiece.SentencePieceProcessor:
    """sentencepiece, given nothing but the file."""
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


def random_texts(count: int) -> list[str]:
    """Strings that repeat few letters (many competing merges) among spaces, punctuation and characters that combine."""
    generator = random.Random(0)
    alphabets = ["aab", "aniosertkl", "xyzzy 12.,é中\u0301👩\u200d\0▁▅ßİ\u0344～\u301cｱﾞ\t\n"]
    return [
        "".join(generator.choices(generator.choice(alphabets), k=generator.randrange(50))) for _ in range(count)
    ] + FOREIGN[:-1]


def all_pieces(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Every piece that is text: no byte, not the unknown piece."""
    ids = range(processor.get_piece_size())
    return [processor.id_to_piece(i) for i in ids if not processor.is_byte(i) and not processor.is_unknown(i)]


# --- the vocabulary -------------------------------------------------------------------------------------------------


def test_a_piece_is_letters_or_one_other_character(reference: sentencepiece.SentencePieceProcessor) -> None:
    pieces = all_pieces(reference)
    assert all(re.fullmatch("[a-z]+", piece) or len(piece) == 1 for piece in pieces)
    assert {"▁", *ascii_lowercase} <= set(pieces)
    assert {"woman", "skin", "tone"} <= set(pieces)
    assert sum(reference.is_byte(i) for i in range(reference.get_piece_size())) == 256


def test_pieces_stay_inside_words_where_the_corpus_tempts_them_out(tmp_path: Path) -> None:
    Tokenizer.train(["new york 2024, new york 2024, don't stop!!! a.b.c"] * 50, tmp_path / "t.model", 600)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert all(re.fullmatch("[a-z]+", piece) or len(piece) == 1 for piece in all_pieces(processor))
    spelled = processor.encode("New York 2024!!", out_type=str)
    assert spelled == ["new", "▁", "york", "▁", "2", "0", "2", "4", "!", "!"]


def test_the_first_merge_is_the_most_frequent_pair(reference: sentencepiece.SentencePieceProcessor) -> None:
    pairs: Counter[str] = Counter()
    for word in re.findall("[a-z]+", " ".join(map(str.lower, CAPTIONS))):
        pairs.update(map("".join, itertools.pairwise(word)))
    first = next(piece for piece in all_pieces(reference) if len(piece) > 1)
    assert pairs[first] == max(pairs.values())


def test_text_is_encoded_segment_by_segment(
    tokenizer: Tokenizer, reference: sentencepiece.SentencePieceProcessor
) -> None:
    for text in CAPTIONS[::10] + random_texts(300):
        expected = []
        for segment in re.findall("[a-z]+|[^a-z]", tokenizer.normalize(text)):
            if segment == " ":
                expected.append(reference.piece_to_id("▁"))
            elif reference.is_unknown(reference.piece_to_id(segment)) and len(segment) == 1:
                expected += [reference.piece_to_id(f"<0x{byte:02X}>") for byte in segment.encode()]
            else:
                expected += reference.encode(segment)
        assert tokenizer.encode(text) == expected, ascii(text)


@pytest.mark.parametrize(
    ("captions", "vocab_size"),
    [
        (["a"], 16_384),
        (["中"], 16_384),
        (["\0"], 16_384),
        (["▅ ▅"], 16_384),
        (["42!"], 16_384),
        (["ab" * 5_000], 16_384),
        (["Кошка сидит на окне", "hello world"], 300),
        (["a house"], 285),
        (["\ud800 lone"], 1_000),
        (FOREIGN, 500),
    ],
)
def test_any_corpus_with_text_gives_a_tokenizer(tmp_path: Path, captions: list[str], vocab_size: int) -> None:
    report = Tokenizer.train(captions, tmp_path / "t.model", vocab_size)
    small = Tokenizer.load(tmp_path / "t.model")
    assert small.vocab_size == report.vocab_size <= vocab_size
    for text in [*captions, "Any words at all, 7 of them.", *FOREIGN]:
        assert small.decode(small.encode(text)) == small.normalize(text)
        assert 0 not in small.encode(text)  # the unknown piece


def test_letters_and_space_survive_a_lopsided_corpus() -> None:
    rows = implementation._rows([("the", 10**10), ("cat", 1)], ["é"])
    lopsided = Tokenizer(implementation._train_model(rows, 400))
    assert len(lopsided.encode("q z é")) == 5  # none of them needs bytes


def test_characters_leave_half_of_the_vocabulary_to_words(tmp_path: Path) -> None:
    chinese = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 3_000))
    words = ["".join(letters) for letters in itertools.product("bdk", "aeiou", "lmnr", "aeiou", "st")]
    report = Tokenizer.train([chinese, *words], tmp_path / "t.model", 1_000)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    other = [piece for piece in all_pieces(processor) if not piece.isascii()]
    assert report.vocab_size == 1_000
    assert 300 < len(other) < 500
    assert sum(len(piece) > 1 for piece in all_pieces(processor)) > 300


def test_rare_characters_get_no_piece_but_frequent_ones_do(tmp_path: Path) -> None:
    Tokenizer.train(["ж" * 9_999, "щ"], tmp_path / "t.model")
    small = Tokenizer.load(tmp_path / "t.model")
    assert len(small.encode("ж")) == 1
    assert len(small.encode("щ")) == 2  # its UTF-8 bytes


# --- training -------------------------------------------------------------------------------------------------------


def test_the_report_says_how_many_pieces_the_corpus_supports(tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = Tokenizer.train(iter(CAPTIONS), tmp_path / "t.model")
    words = {word for caption in CAPTIONS for word in re.findall("[a-z]+", tokenizer.normalize(caption))}
    assert (report.captions, report.words) == (len(CAPTIONS), len(words))
    assert report.vocab_size == tokenizer.vocab_size < report.requested == 16_384
    assert f"only {report.vocab_size:,} of 16,384 pieces" in str(report)


def test_the_vocabulary_has_the_size_asked_for_where_the_corpus_allows(tmp_path: Path) -> None:
    report = Tokenizer.train(CAPTIONS, tmp_path / "t.model", 1_000)
    assert report.vocab_size == report.requested == Tokenizer.load(tmp_path / "t.model").vocab_size == 1_000
    assert str(report).startswith("1,000 pieces")


def test_training_depends_on_counts_alone(tmp_path: Path, model_file: Path) -> None:
    Tokenizer.train(reversed(CAPTIONS), tmp_path / "somewhere" / "else.model")
    assert (tmp_path / "somewhere" / "else.model").read_bytes() == model_file.read_bytes()
    Tokenizer.train(CAPTIONS[1:], tmp_path / "fewer.model")
    assert (tmp_path / "fewer.model").read_bytes() != model_file.read_bytes()


def test_counting_keeps_the_frequent_words_in_bounded_memory() -> None:
    generator = random.Random(0)
    frequent = [f"common{letter}" for letter in ascii_lowercase]
    rare = ("".join(generator.choices(ascii_lowercase, k=12)) for _ in itertools.count())
    captions = [f"{word} {next(rare)} {next(rare)}!" for word in frequent * 20]
    number, words, characters = implementation._count(captions, words_in_memory=100)
    assert number == len(captions)
    assert len(words) <= 100
    assert dict(words[:26]) == dict.fromkeys(frequent, 20)
    assert characters == [("!", len(captions))]


@pytest.mark.parametrize("captions", [[], [""], ["  \t ", "▁"]])
def test_a_corpus_without_text_is_refused(tmp_path: Path, captions: list[str]) -> None:
    with pytest.raises(DataError, match=rf"none of {len(captions)} captions"):
        Tokenizer.train(captions, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_too_small_for_its_fixed_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size must be at least 285.*found 284"):
        TokenizerConfig(284)
    with pytest.raises(ConfigError, match="found 0"):
        Tokenizer.train(CAPTIONS, tmp_path / "t.model", 0)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "t.model"
    target.write_bytes(b"old")

    def interrupted(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dalle_ds.files.os.fsync", interrupted)
    with pytest.raises(DataError, match=r"t\.model cannot be written \(No space left on device\)"):
        Tokenizer.train(CAPTIONS[:10], target)
    assert [file.name for file in tmp_path.iterdir()] == ["t.model"]
    assert target.read_bytes() == b"old"


def test_a_folder_that_cannot_exist_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        Tokenizer.train(CAPTIONS[:10], tmp_path / "file" / "t.model")


# --- normalization and round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "   ", *CAPTIONS[::100], *FOREIGN, "x" * 10_000, "caption, " * 1_200, "猫" * 10_000]
)
def test_decoding_gives_back_the_normalized_text(tokenizer: Tokenizer, text: str) -> None:
    normalized = tokenizer.normalize(text)
    assert tokenizer.decode(tokenizer.encode(text)) == normalized
    assert tokenizer.decode(tokenizer.encode(text, dropout=0.5, rng=np.random.default_rng(0))) == normalized


def test_every_character_survives(tokenizer: Tokenizer) -> None:
    step = 37  # of the code points, for time
    for code in itertools.chain(range(0x3000), range(0x3000, sys.maxunicode + 1, step)):
        if not 0xD800 <= code < 0xE000:
            text = f"a{chr(code)}b"
            assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalize(text), hex(code)


def test_normalization_is_nfkc_lower_case_and_single_spaces(tokenizer: Tokenizer) -> None:
    texts = [*CAPTIONS, *FOREIGN[:6], "ＦＵＬＬ　ＷＩＤＴＨ ﬁﬂ ½ ℃ Ⅷ", "ΑΒΓ ÀÉÎÕÜ", "  two\t\n  lines\u00a0\u2003 "]
    for text in texts:
        assert tokenizer.normalize(text) == " ".join(unicodedata.normalize("NFKC", text).lower().split())
    assert tokenizer.normalize("under▁score") == "under score"


def test_the_empty_caption_has_no_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == tokenizer.encode(" \n") == []
    assert tokenizer.encode("", dropout=0.1, rng=np.random.default_rng(0)) == []
    assert tokenizer.decode([]) == ""


# --- merging --------------------------------------------------------------------------------------------------------


def test_encoding_is_sentencepieces_own(tokenizer: Tokenizer, reference: sentencepiece.SentencePieceProcessor) -> None:
    rng = np.random.default_rng(0)
    for text in CAPTIONS + random_texts(3_000):
        expected = reference.encode(text)
        assert tokenizer.encode(text) == expected, ascii(text)
        assert tokenizer.encode(text, dropout=NEVER, rng=rng) == expected, ascii(text)


def merge_distribution(word: str, merges: dict[str, int], dropout: float) -> dict[tuple[str, ...], float]:
    """Probability of every outcome of BPE dropout by its definition (Provilkov et al. 2020, Algorithm 1).

    Every subset of the possible merges may be dropped before a step; the best of the others is applied; none left ends.
    """

    @cache
    def outcomes(pieces: tuple[str, ...]) -> dict[tuple[str, ...], float]:
        possible = [i for i in range(len(pieces) - 1) if pieces[i] + pieces[i + 1] in merges]
        result: Counter[tuple[str, ...]] = Counter()
        for stays in itertools.product([False, True], repeat=len(possible)):
            probability = float(np.prod([1 - dropout if stay else dropout for stay in stays]))
            left = [i for i, stay in zip(possible, stays, strict=True) if stay]
            if not left:
                result[pieces] += probability
                continue
            best = min(left, key=lambda i: (merges[pieces[i] + pieces[i + 1]], i))
            joined = (*pieces[:best], pieces[best] + pieces[best + 1], *pieces[best + 2 :])
            for outcome, share in outcomes(joined).items():
                result[outcome] += probability * share
        return dict(result)

    return outcomes(tuple(word))


def assert_dropout_is_the_papers(tokenizer: Tokenizer, path: Path, word: str, dropout: float, samples: int) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    merges = {piece: reference.piece_to_id(piece) for piece in all_pieces(reference) if len(piece) > 1}
    expected = merge_distribution(word, merges, dropout)
    assert sum(expected.values()) == pytest.approx(1)
    rng = np.random.default_rng(1)
    seen = Counter(
        tuple(reference.id_to_piece(tokenizer.encode(word, dropout=dropout, rng=rng))) for _ in range(samples)
    )
    assert set(seen) <= set(expected)
    for outcome, probability in expected.items():
        deviation = (probability * (1 - probability) / samples) ** 0.5
        assert seen[outcome] / samples == pytest.approx(probability, abs=4.5 * deviation + 1 / samples), outcome


@pytest.mark.parametrize("word", ["on", "woman", "kneeling", "anana"])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_has_the_distribution_of_the_papers_algorithm(
    tokenizer: Tokenizer, model_file: Path, word: str, dropout: float
) -> None:
    assert_dropout_is_the_papers(tokenizer, model_file, word, dropout, samples=4_000)


def test_dropout_forgets_merges_of_pieces_that_are_gone(tmp_path: Path) -> None:
    """In "xaaa" a skipped "aa" must not look possible again once its left "a" is in "xa" and its right one in "aa"."""
    Tokenizer.train(["xa"] * 100 + ["aa"] * 50 + ["xaaa"] * 20, tmp_path / "t.model", 288)
    assert_dropout_is_the_papers(Tokenizer.load(tmp_path / "t.model"), tmp_path / "t.model", "xaaa", 0.4, 60_000)


def test_dropout_of_one_spells_letter_by_letter(
    tokenizer: Tokenizer, reference: sentencepiece.SentencePieceProcessor
) -> None:
    tokens = tokenizer.encode("Woman kneeling", dropout=1.0, rng=np.random.default_rng(0))
    assert reference.id_to_piece(tokens) == list("woman▁kneeling")


def global_generators() -> tuple[object, ...]:
    """States of the generators that a careless draw would change."""
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


def test_dropout_draws_from_the_given_generator_alone(tokenizer: Tokenizer) -> None:
    text = " ".join(CAPTIONS[:40])

    def draw(seed: int) -> list[int]:
        return tokenizer.encode(text, dropout=0.1, rng=np.random.default_rng(seed))

    before = global_generators()
    first = draw(0)
    assert global_generators() == before
    assert draw(1) != first != tokenizer.encode(text)
    assert draw(0) == first
    rng = np.random.default_rng(0)
    assert tokenizer.encode(text, dropout=0.1, rng=rng) == first
    assert tokenizer.encode(text, dropout=0.1, rng=rng) != first


@pytest.mark.parametrize("dropout", [-0.1, 1.5, float("nan")])
def test_dropout_outside_its_range_is_refused(tokenizer: Tokenizer, dropout: float) -> None:
    with pytest.raises(ConfigError, match="must lie in"):
        tokenizer.encode("cat", dropout=dropout, rng=np.random.default_rng(0))


def test_dropout_without_a_generator_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="needs an rng"):
        tokenizer.encode("cat", dropout=0.1)


# --- batches --------------------------------------------------------------------------------------------------------


def test_padded_batches_count_what_they_cut_off(tokenizer: Tokenizer) -> None:
    texts = ["", "a", "a b", "a b c", "a b c d"]  # 0, 1, 3, 5 and 7 tokens
    batch, truncated = tokenizer.encode_padded(texts, text_len=5)
    assert batch.shape == (5, 5)
    assert batch.dtype == torch.int64
    assert truncated == 1
    for row, text in zip(batch.tolist(), texts, strict=True):
        tokens = tokenizer.encode(text, max_tokens=5)
        assert row == tokens + [-1] * (5 - len(tokens))
        assert tokens == tokenizer.encode(text)[:5]
    assert tokenizer.decode(batch[4]) == "a b c"


def test_padded_batches_have_the_papers_length(tokenizer: Tokenizer) -> None:
    texts = ["woman kneeling", "word " * 500]
    batch, truncated = tokenizer.encode_padded(texts)
    assert batch.shape == (2, 256)
    assert truncated == 1
    expected = [tokenizer.encode(text, max_tokens=256) for text in texts]
    assert [[token for token in row if token != -1] for row in batch.tolist()] == expected


@pytest.mark.parametrize("token", [-2, 1_000_000])
def test_decoding_what_is_no_token_is_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(DataError, match=f"token {token} is outside"):
        tokenizer.decode([token])


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_copy_sent_to_another_process_is_the_same(tokenizer: Tokenizer, model_file: Path) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint == hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert copy.vocab_size == tokenizer.vocab_size
    assert copy.encode("Woman kneeling") == tokenizer.encode("Woman kneeling")


def sentencepiece_model(sentences: list[str], model_type: str, normalization: str, byte_fallback: bool) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=400 if byte_fallback else 150,
        model_type=model_type,
        normalization_rule_name=normalization,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        split_digits=True,
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


WORDS = re.findall("[a-z]+", " ".join(CAPTIONS[::5]).lower()) + list(ascii_lowercase)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (b"", "not a sentencepiece model"),
        (b"hello, this is text\n" * 50, "not a sentencepiece model"),
        (sentencepiece_model(WORDS, "bpe", "nmt_nfkc_cf", False), "lacks bytes"),
        (
            sentencepiece_model(["0 0", *WORDS, *["a cat"] * 500], "bpe", "nmt_nfkc_cf", True),
            "neither a run of the letters",
        ),
        (sentencepiece_model(WORDS, "bpe", "nmt_nfkc_cf", True), "lacks the space"),
        (sentencepiece_model([*WORDS, "0 0"], "bpe", "nmt_nfkc", True), "lower case"),
        (sentencepiece_model([*WORDS, "0 0"], "unigram", "nmt_nfkc_cf", True), "order of BPE merges"),
    ],
    ids=["empty", "text", "no bytes", "pieces with spaces", "no space", "keeps case", "unigram"],
)
def test_a_model_of_another_kind_is_refused(tmp_path: Path, model: bytes, reason: str) -> None:
    (tmp_path / "other.model").write_bytes(model)
    with pytest.raises(CheckpointError, match=rf"other\.model: .*{reason}.*train_tokenizer\.py"):
        Tokenizer.load(tmp_path / "other.model")


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_cut_off_file_is_refused(tmp_path: Path, model_file: Path, share: float) -> None:
    whole = model_file.read_bytes()
    (tmp_path / "cut.model").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.model: "):
        Tokenizer.load(tmp_path / "cut.model")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.model cannot be read .*train_tokenizer\.py"):
        Tokenizer.load(tmp_path / "absent.model")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


# --- the launcher ---------------------------------------------------------------------------------------------------


class CaptionRows:
    """What the launcher uses of a prepared split."""

    def all_captions(self, faults: FaultLog) -> Iterator[str]:
        return iter(CAPTIONS)


def launch(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    def opened(data_dir: str, split: str) -> CaptionRows:
        assert (data_dir, split) == ("prepared", "train")
        return CaptionRows()

    monkeypatch.setattr("dalle_ds.data.dataset.PairDataset.open", opened)
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", "--data", "prepared", *options])
    runpy.run_path(str(LAUNCHER), run_name="__main__")


@pytest.mark.parametrize(("options", "size"), [((), 700), (("--vocab_size", "600"), 600)])
def test_the_launcher_trains_on_every_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str], size: int
) -> None:
    (tmp_path / "tiny.yaml").write_text("tokenizer:\n  vocab_size: 700\n")
    monkeypatch.setattr("dalle_ds.config.plain.PRESET_DIR", tmp_path)
    out = tmp_path / "folder" / "t.model"
    launch(monkeypatch, "--out", str(out), "--preset", "tiny", *options)
    Tokenizer.train(CAPTIONS[: len(CAPTIONS) // 2 * 2], tmp_path / "expected.model", size)
    assert out.read_bytes() == (tmp_path / "expected.model").read_bytes()
    assert capsys.readouterr().out.startswith(f"{out}: {size} pieces from ")


def test_the_launcher_says_what_a_small_corpus_supports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch, "--out", str(tmp_path / "t.model"))
    assert "of 16,384 pieces" in capsys.readouterr().out


def test_the_launcher_shows_mistakes_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        launch(monkeypatch, "--out", str(tmp_path / "t.model"), "--vocab_size", "0")
    assert capsys.readouterr().err.startswith("error: tokenizer.vocab_size must be at least 285")
