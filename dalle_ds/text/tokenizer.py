"""Captions to tokens: lowercase byte-pair encoding in which merges stay inside runs of the letters a–z (DALL·E §2.2).

The vocabulary is a standard sentencepiece BPE model: any program with sentencepiece reads it and gets the same tokens.
Three things about it are the paper's (`openai/DALL-E` issue 22 for the second):

- Text is normalized first, by the table stored in the model (sentencepiece's `nmt_nfkc_cf`): Unicode NFKC, simple case
  folding (lower case), every kind of white space turned into one space, none at either end. The table travels with the
  model, so tokens do not depend on the Unicode version of the Python that runs it.
- Every piece is a run of the letters a–z or a single other character. Spaces, digits and punctuation are therefore
  never merged with each other or with a word, and a space is a token of its own. Characters that the corpus did not
  have, or had too rarely, are spelled in UTF-8 bytes: all 256 are in the vocabulary and nothing is ever unknown.
- Training may use BPE dropout (10 %, DALL·E App. B.2): each merge is skipped at random, so that one word is seen in
  many spellings. sentencepiece has it too, but draws from a generator hidden in the thread, so the draw here is ours.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from dalle_ds.config import PADDING
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import write_bytes

_NORMALIZATION = "nmt_nfkc_cf"
_SPACE = "\u2581"  # how sentencepiece writes a space inside a piece; normalization turns this character into a space
_SEGMENT = re.compile("[a-z]+|[^a-z]")
_BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
_BASE_CHARACTERS = _SPACE + ascii_lowercase + "0"  # in every vocabulary; `_rows` says why the digit is
_SMALLEST_VOCABULARY = 1 + len(_BYTE_PIECES) + len(_BASE_CHARACTERS)  # 1 for the unknown piece, which is never used
_CHARACTER_COVERAGE = 0.9995
_WORDS_IN_MEMORY = 2_000_000
_REMEDY = "name the file that launchers/train_tokenizer.py wrote, or train it again"
Counts = list[tuple[str, int]]


@dataclass(frozen=True)
class TokenizerConfig:
    """What `launchers/train_tokenizer.py` trains."""

    vocab_size: int = 16_384
    """Most pieces in the vocabulary (DALL·E §2.2); a small corpus supports fewer."""

    def __post_init__(self) -> None:
        if self.vocab_size < _SMALLEST_VOCABULARY:
            raise ConfigError(
                f"tokenizer.vocab_size must be at least {_SMALLEST_VOCABULARY} (256 bytes, "
                f"the letters a–z, the space, the digit 0 and sentencepiece's unknown piece), found {self.vocab_size}"
            )


@dataclass(frozen=True)
class TokenizerReport:
    """What training a tokenizer came to; `str()` of it is a sentence for the user."""

    captions: int
    """Captions read, empty ones included."""
    words: int
    """Different a–z words that the vocabulary was trained on."""
    vocab_size: int
    """Pieces in the vocabulary."""
    requested: int
    """Pieces that were asked for."""

    def __str__(self) -> str:
        source = f"{self.words:,} different words in {self.captions:,} captions"
        if self.vocab_size < self.requested:
            return f"the corpus supports only {self.vocab_size:,} of {self.requested:,} pieces ({source})"
        return f"{self.vocab_size:,} pieces from {source}"


class Tokenizer:
    """A trained vocabulary. Immutable, and picklable: its state is the model file's bytes.

    Attributes:
        vocab_size: number of tokens; they are 0 … vocab_size - 1.
    """

    def __init__(self, model: bytes) -> None:
        """Open the bytes of a model that `train` wrote; `load` opens a file.

        Raises:
            CheckpointError: not the model of a tokenizer made by `train`.
        """
        self._model = model
        self._processor = _parse(model)
        self.vocab_size: int = self._processor.get_piece_size()
        pieces = self._processor.id_to_piece(list(range(self.vocab_size)))
        # A lower id is an earlier merge: ids serve as merge priorities.
        self._merges = {piece: token for token, piece in enumerate(pieces) if len(piece) > 1 and piece.isalpha()}
        self._characters = {piece: token for token, piece in enumerate(pieces) if len(piece) == 1}
        self._bytes = [self._processor.piece_to_id(piece) for piece in _BYTE_PIECES]

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self._model,)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a model file.

        Raises:
            CheckpointError: the file is missing, broken, or not a model made by `train`.
        """
        try:
            return cls(Path(path).read_bytes())
        except OSError as error:
            raise CheckpointError(f"tokenizer {path} cannot be read ({error.strerror}): {_REMEDY}") from error
        except CheckpointError as error:
            raise CheckpointError(f"tokenizer {path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the model file; DataError where that fails."""
        _write(Path(path), self._model)

    @staticmethod
    def train(captions: Iterable[str], path: str | Path, vocab_size: int = 16_384) -> TokenizerReport:
        """Train a vocabulary on `captions`, read once, and write it to `path`.

        The file depends on how often each word occurs, not on the captions' order (as long as fewer than 2,000,000
        different words occur; beyond that the rarest are forgotten on the way).

        Args:
            vocab_size: most pieces; a small corpus gets fewer, which the report says.

        Raises:
            ConfigError: vocab_size is less than the bytes, letters and space that every vocabulary has.
            DataError: there is no caption, or none with text, or the file cannot be written.
        """
        TokenizerConfig(vocab_size)
        number, words, characters = _count(captions)
        if not words and not characters:
            raise DataError(f"none of {number:,} captions has any text: a tokenizer needs some to train on")
        kept = _frequent_characters(characters, limit=(vocab_size - _SMALLEST_VOCABULARY) // 2)
        model = _train_model(_rows(words, kept), vocab_size)
        _write(Path(path), model)
        return TokenizerReport(number, len(words), Tokenizer(model).vocab_size, vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, as 64 hexadecimal digits."""
        return hashlib.sha256(self._model).hexdigest()

    def normalize(self, text: str) -> str:
        """`text` as the model sees it, which is also what `decode(encode(text))` gives back."""
        return self._processor.normalize(valid_unicode(text)).replace(_SPACE, " ")

    def encode(
        self,
        text: str,
        *,
        dropout: float = 0.0,
        rng: np.random.Generator | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Tokens of a caption, without any special ones; the empty caption has none.

        Args:
            dropout: probability in [0, 1] of skipping a merge (BPE dropout; 0.1 in the paper, in training only). At 0
                the result is exactly sentencepiece's own, at 1 words are spelled letter by letter.
            rng: what dropout draws from; the same state gives the same tokens.
            max_tokens: cut off after this many.

        Raises:
            ConfigError: dropout is outside [0, 1], or positive without an rng.
        """
        if not 0.0 <= dropout <= 1.0:
            raise ConfigError(f"BPE dropout must lie in [0, 1], found {dropout}")
        if dropout == 0.0:
            tokens: list[int] = self._processor.encode(valid_unicode(text))
        elif rng is None:
            raise ConfigError(f"BPE dropout of {dropout} needs an rng, found none: pass np.random.default_rng(seed)")
        else:
            tokens = self._encode_with_dropout(text, _coin_flips(rng, dropout))
        return tokens[:max_tokens]

    def encode_padded(self, texts: Sequence[str], text_len: int = 256) -> tuple[Tensor, int]:
        """Tokens of a batch of captions, cut off or padded to one length.

        Returns:
            (B, text_len) int64, -1 where a caption has ended, and the number of captions that were cut off.
        """
        batch = np.full((len(texts), text_len), PADDING, dtype=np.int64)
        truncated = 0
        for row, text in zip(batch, texts, strict=True):
            tokens = self.encode(text)
            truncated += len(tokens) > text_len
            row[: len(tokens)] = tokens[:text_len]
        return torch.from_numpy(batch), truncated

    def decode(self, ids: Iterable[int]) -> str:
        """Text of tokens; -1 is padding and adds nothing. Bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            DataError: an id that is neither -1 nor a token.
        """
        text: str = self._processor.decode(checked((token for token in ids if token != PADDING), self.vocab_size))
        return text

    def _encode_with_dropout(self, text: str, skips: Iterator[bool]) -> list[int]:
        tokens: list[int] = []
        for segment in _SEGMENT.findall(self._processor.normalize(valid_unicode(text))):
            if len(segment) > 1:
                tokens += self._merge_with_dropout(segment, skips)
            elif (token := self._characters.get(segment)) is not None:
                tokens.append(token)
            else:
                tokens += [self._bytes[byte] for byte in segment.encode()]
        return tokens

    def _merge_with_dropout(self, word: str, skips: Iterator[bool]) -> list[int]:
        """Tokens of an a–z word by BPE dropout (Provilkov et al. 2020, Algorithm 1).

        Before every step the algorithm drops each possible merge independently, then applies the one of highest
        priority among those left. Merges behind that one do not matter to the step, so it is enough to walk them in
        order of priority, with one coin each, up to the first that stays.
        """
        length = len(word)
        pieces = list(word)  # pieces[i] starts at letter i, and is empty once merged into the one before
        before = list(range(-1, length - 1))  # starts of the neighbouring pieces
        after = list(range(1, length + 1))
        merges = self._merges
        # (merged token, where its left piece starts): the earliest merge goes first, the leftmost among equals.
        queue = [(merges[pair], left) for left in range(length - 1) if (pair := word[left : left + 2]) in merges]
        heapq.heapify(queue)
        skipped = []
        while queue:
            token, left = heapq.heappop(queue)
            right = after[left]
            if not pieces[left] or right == length or merges.get(pieces[left] + pieces[right]) != token:
                continue  # one of the two pieces has since been merged with another
            if next(skips):
                skipped.append((token, left))
                continue
            pieces[left] += pieces[right]
            pieces[right] = ""
            after[left] = after[right]
            if after[left] < length:
                before[after[left]] = left
            for start in (before[left], left):
                if start >= 0 and after[start] < length:
                    joined = merges.get(pieces[start] + pieces[after[start]])
                    if joined is not None:
                        heapq.heappush(queue, (joined, start))
            for candidate in skipped:
                heapq.heappush(queue, candidate)
            skipped.clear()
        return [merges[piece] if len(piece) > 1 else self._characters[piece] for piece in pieces if piece]


def checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Tokens as integers; DataError where one is outside the vocabulary."""
    tokens = [int(token) for token in ids]
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise DataError(f"token {token} is outside the tokenizer's vocabulary of {vocab_size:,}")
    return tokens


def _coin_flips(rng: np.random.Generator, probability: float) -> Iterator[bool]:
    """Endless independent draws that are True with `probability`."""
    while True:
        yield from (rng.random(64) < probability).tolist()


def valid_unicode(text: str) -> str:
    """`text` with lone surrogates, which broken JSON yields and UTF-8 cannot hold, replaced by "?"."""
    return text if text.isascii() else text.encode(errors="replace").decode()


# --- training -------------------------------------------------------------------------------------------------------


def _count(captions: Iterable[str], words_in_memory: int = _WORDS_IN_MEMORY) -> tuple[int, Counts, Counts]:
    """Number of captions; a–z words with their counts, the most frequent first; the same for characters but the space.

    When more than `words_in_memory` different words are held, the rarest are forgotten until half as many are left.
    """
    normalizer = sentencepiece.SentencePieceNormalizer(
        rule_name=_NORMALIZATION, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=True
    )
    number = 0
    words: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for caption in captions:
        number += 1
        for segment in _SEGMENT.findall(normalizer.normalize(valid_unicode(caption))):
            (words if segment[0] in ascii_lowercase else characters)[segment] += 1
        if len(words) > words_in_memory:
            words = Counter(dict(_by_frequency(words)[: words_in_memory // 2]))
    del characters[" "]
    return number, _by_frequency(words), _by_frequency(characters)


def _by_frequency(counts: Counter[str]) -> Counts:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _frequent_characters(characters: Counts, limit: int) -> list[str]:
    """The fewest characters that make up 99.95 % of the text outside a–z (sentencepiece's usual share), or `limit`.

    The limit leaves half of the vocabulary to words, even where the captions are in scripts of many characters.
    """
    wanted = math.ceil(_CHARACTER_COVERAGE * sum(count for _, count in characters))
    kept: list[str] = []
    for character, count in characters[:limit]:
        if wanted <= 0:
            break
        wanted -= count
        kept.append(character)
    return kept


def _rows(words: Counts, characters: list[str]) -> Iterator[str]:
    """The corpus in sentencepiece's TSV format. Each word stands alone, so no merge can cross its borders.

    sentencepiece takes characters in order of frequency until their summed share rounds to 1, so every character is
    given a share that rounding cannot lose. A space cannot stand alone, as it would be stripped; it is given between
    two digits, which `split_digits` keeps from merging with it.
    """
    share = max(1, sum(len(word) * count for word, count in words) // 10_000)
    yield f"0 0\t{share}"
    for character in [*ascii_lowercase, *characters]:
        yield f"{character}\t{share}"
    for word, count in words:
        yield f"{word}\t{count}"


def _train_model(rows: Iterator[str], vocab_size: int) -> bytes:
    """Bytes of the sentencepiece model of a corpus in TSV format."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=rows,
        model_writer=model,
        input_format="tsv",
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name=_NORMALIZATION,
        add_dummy_prefix=False,
        remove_extra_whitespaces=True,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _write(path: Path, model: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, model)
    except OSError as error:
        raise DataError(
            f"tokenizer {path} cannot be written ({error.strerror}): name a file in a folder that you may write to"
        ) from error


# --- loading --------------------------------------------------------------------------------------------------------


def _parse(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Open a model and check that it is one of ours: dropout relies on it, and so does the text's round trip."""
    try:
        if not model:  # which sentencepiece opens without complaint
            raise RuntimeError("the file is empty")
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        processor.id_to_piece(list(range(processor.get_piece_size())))
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter of a piece that is not UTF-8
        raise CheckpointError(f"not a sentencepiece model, or a broken one: {_REMEDY}") from error
    fault = _fault(processor)
    if fault:
        raise CheckpointError(f"a sentencepiece model that train_tokenizer.py did not make, as {fault}: {_REMEDY}")
    return processor


def _fault(processor: sentencepiece.SentencePieceProcessor) -> str | None:
    """What keeps a sentencepiece model from being one that `Tokenizer.train` made."""
    if not all(processor.is_byte(processor.piece_to_id(piece)) for piece in _BYTE_PIECES):
        return "it lacks bytes for the characters outside its vocabulary"
    if any(processor.is_unknown(processor.piece_to_id(character)) for character in _BASE_CHARACTERS):
        return "it lacks the space or one of the letters a–z"
    tokens = [t for t in range(processor.get_piece_size()) if not processor.is_byte(t) and not processor.is_unknown(t)]
    for token in tokens:
        piece = processor.id_to_piece(token)
        if len(piece) != 1 and not (piece.isascii() and piece.isalpha() and piece.islower()):
            return f"its piece {piece!r} is neither a run of the letters a–z nor one character"
    if [-processor.get_score(token) for token in tokens] != list(range(len(tokens))):
        return "its pieces are not in the order of BPE merges"
    if processor.normalize("  A\u00a0 \uff22 ") != f"a{_SPACE}b":
        return "it does not put text into lower case, or does not collapse white space"
    return None
