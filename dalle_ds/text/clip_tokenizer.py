"""Captions to CLIP's tokens: pieces of one of two vocabularies between a start and an end token.

CLIP's own vocabulary is byte-level BPE of lower-cased, cleaned text (Radford et al. 2021, §2.4; `clip/simple_tokenizer.py`).
A piece is a run of UTF-8 bytes within a word, a digit or a run of other characters; the last one of each is another piece
than the same bytes elsewhere. Tokens are the 256 bytes, the 256 bytes that end a word, and the merges in their order.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from dalle_ds.config import PADDING, ClipConfig
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import write_text
from dalle_ds.parsing import parse_json
from dalle_ds.text.tokenizer import Tokenizer, checked, valid_unicode

SENTENCEPIECE_NAME = "tokenizer.model"
VOCABULARY_NAME = "vocab.json"

MERGES_NAME = "merges.txt"
_MOST_MERGES = 49_152 - 256 - 2
"""CLIP reads so many from its file, which has more."""
_FILE_BYTES = 2**26
"""Of a file, unpacked; CLIP's has 3 MB."""
_END = "</w>"
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_MISSING = "CLIP's tokenizer needs tokenizers, ftfy and regex: pip install 'dalle-ds[clip]'"
_NAMES = (SENTENCEPIECE_NAME, MERGES_NAME, "tokenizer.json")
Merge = tuple[str, str]


class ClipTokenizer:
    """Captions to rows of tokens, each with a start and an end token.

    Args:
        pieces: the vocabulary, one of DALL·E's kind or of CLIP's.
        start: token that begins every caption; None is the first one behind the vocabulary.
        end: token that ends every caption; None is the one behind `start`.

    Raises:
        ConfigError: `start` or `end` is a token of the vocabulary, or they are the same.
    """

    def __init__(self, pieces: Tokenizer | BytePairs, *, start: int | None = None, end: int | None = None) -> None:
        self.pieces = pieces
        self.start = pieces.vocab_size if start is None else start
        self.end = self.start + 1 if end is None else end
        if min(self.start, self.end) < pieces.vocab_size or self.start == self.end:
            raise ConfigError(
                f"the tokenizer has {pieces.vocab_size} pieces, but the start and end tokens are {self.start} and {self.end}: "
                f"set model.text_vocab to {pieces.vocab_size + 2} or more"
            )

    @classmethod
    def load(cls, path: str | Path, *, start: int | None = None, end: int | None = None) -> ClipTokenizer:
        """Read a tokenizer's file, or the one in the folder `path`.

        Args:
            path: a file of `launchers/train_tokenizer.py`, or one that `BytePairs.load` reads.
            start, end: as the class takes them; `ClipConfig.start` and `.end` of the model that it is for.

        Raises:
            CheckpointError: it is missing or broken.
            ConfigError: `start` or `end` is a token of its vocabulary.
        """
        path = Path(path)
        if path.is_dir():
            found = cls.find(path, start=start, end=end)
            if found is None:
                raise CheckpointError(f"there is no tokenizer in {path}: it has none of {', '.join(_NAMES)}")
            return found
        pieces = BytePairs.load(path) if path.suffix in (".gz", ".txt", ".json") else Tokenizer.load(path)
        return cls(pieces, start=start, end=end)

    @classmethod
    def find(cls, folder: Path, *, start: int | None = None, end: int | None = None) -> ClipTokenizer | None:
        """The tokenizer whose file is in `folder`, one of ours or of Hugging Face's, if there is one; errors as `load`."""
        file = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
        if file is None:
            return None
        found = cls.load(file, start=start, end=end)
        vocabulary = folder / VOCABULARY_NAME
        if isinstance(found.pieces, BytePairs) and vocabulary.is_file():
            try:
                check_vocabulary(found.pieces, parse_json(vocabulary.read_bytes()))
            except (OSError, ValueError, CheckpointError) as error:
                raise CheckpointError(f"tokenizer {vocabulary}: {error}") from error
        return found

    def save(self, folder: str | Path) -> None:
        """Write the vocabulary's file into a folder; DataError where that fails."""
        name = MERGES_NAME if isinstance(self.pieces, BytePairs) else SENTENCEPIECE_NAME
        self.pieces.save(Path(folder) / name)

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """Tokens of captions: start, pieces, end.

        Args:
            length: positions; of captions that need more, the pieces are cut off, not the end token.

        Returns:
            (B, length) int64, -1 behind the end token.

        Raises:
            DataError: one text in place of a list, which would be a caption for each character.
        """
        if isinstance(texts, str):
            raise DataError(f"captions must be a list of texts, found the text {texts[:50]!r}: put it into a list")
        batch = np.full((len(texts), length), PADDING, dtype=np.int64)
        for row, text in zip(batch, texts, strict=True):
            tokens = [self.start, *self.pieces.encode(text)[: length - 2], self.end]
            row[: len(tokens)] = tokens
        return torch.from_numpy(batch)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a row of tokens, up to its end token."""
        pieces = []
        for token in map(int, ids):
            if token == self.end:
                break
            if token not in (self.start, PADDING):
                pieces.append(token)
        return self.pieces.decode(pieces)

    def check(self, config: ClipConfig) -> None:
        """Raise a `ConfigError` unless its tokens are those of a model of this configuration."""
        if (self.start, self.end) != (config.start, config.end):
            raise ConfigError(
                f"the tokenizer's start and end tokens are {self.start} and {self.end}, the model's {config.start} and "
                f"{config.end}: set model.start_token and model.end_token, or model.text_vocab, to the tokenizer's"
            )

    @property
    def fingerprint(self) -> str:
        """The vocabulary's, and the start and end tokens."""
        return f"{self.pieces.fingerprint}-{self.start}-{self.end}"


class BytePairs:
    """CLIP's vocabulary, or another of its kind. Immutable, and picklable: its state is its merges.

    Args:
        merges: pairs of pieces, the earlier the higher their priority.

    Attributes:
        vocab_size: number of tokens, 49,406 for CLIP's; its start and end tokens are the next two.

    Raises:
        CheckpointError: a merge of pieces that none before it makes, or that makes one that there is already.
    """

    def __init__(self, merges: Iterable[Merge]) -> None:
        self._merges = list(merges)
        alphabet = sorted(_byte_characters())  # the visible bytes, then the others
        self._pieces = [*alphabet, *(character + _END for character in alphabet)]
        known = set(self._pieces)
        for number, (left, right) in enumerate(self._merges, start=1):
            if left not in known or right not in known or left.endswith(_END) or left + right in known:
                raise CheckpointError(
                    f"merge {number} ({left[:50]!r} and {right[:50]!r}) is none of byte-level BPE: it is of a piece that no "
                    "earlier one makes, or makes one again"
                )
            known.add(left + right)
            self._pieces.append(left + right)
        self.vocab_size = len(self._pieces)
        self._tokens = {piece: token for token, piece in enumerate(self._pieces)}
        self._model = _model(self._tokens, self._merges)

    def __reduce__(self) -> tuple[type[BytePairs], tuple[list[Merge]]]:
        return BytePairs, (self._merges,)

    @classmethod
    def load(cls, path: str | Path) -> BytePairs:
        """Read OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or Hugging Face's `merges.txt` or `tokenizer.json`.

        Raises:
            CheckpointError: the file is missing, broken, or of a tokenizer of another kind.
        """
        path = Path(path)
        try:
            content = _read(path)
            if path.suffix != ".json":
                return cls(_text_merges(content))
            merges, vocabulary = _json_merges(content)
            pieces = cls(merges)
            check_vocabulary(pieces, vocabulary)
            return pieces
        except OSError as error:
            raise CheckpointError(f"tokenizer {path} cannot be read: {error.strerror or error}") from error
        except (ValueError, EOFError, zlib.error) as error:
            raise CheckpointError(f"tokenizer {path} cannot be read: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"tokenizer {path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write Hugging Face's `merges.txt`; DataError where that fails."""
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self._merges)]
        try:
            write_text(Path(path), "\n".join(lines) + "\n")
        except OSError as error:
            raise DataError(f"could not write {path}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the merges, as 64 hexadecimal digits."""
        return hashlib.sha256("\n".join(map(" ".join, self._merges)).encode()).hexdigest()

    @property
    def vocabulary(self) -> dict[str, int]:
        """Pieces, as Hugging Face's `vocab.json` spells them, and their tokens."""
        return dict(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Tokens of a caption, without a start and an end token. What spells one of these is text like any other.

        Raises:
            ConfigError: `ftfy` or `regex` is not installed.
        """
        characters, tokenize = _byte_characters(), self._model.tokenize
        words = ("".join([characters[byte] for byte in word.encode()]) for word in _words()(clean(text)))
        return [token.id for word in words for token in tokenize(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of tokens, as far as it can be told: a space behind every word. Bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            DataError: an id that is no token.
        """
        bytes_of = {character: byte for byte, character in enumerate(_byte_characters())}
        words = "".join([self._pieces[token] for token in checked(ids, self.vocab_size)]).split(_END)
        return " ".join(
            bytes(bytes_of[character] for character in word).decode(errors="replace") for word in words
        ).strip()


def clean(text: str) -> str:
    """A caption as CLIP's tokenizers see it: mended by ftfy, HTML entities replaced (twice), lower case, single spaces."""
    try:
        import ftfy
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    mended = html.unescape(html.unescape(ftfy.fix_text(valid_unicode(text))))
    # An entity can stand for a surrogate too.
    return re.sub(r"\s+", " ", valid_unicode(mended)).strip().lower()


def _model(vocabulary: dict[str, int], merges: list[Merge]) -> Any:
    """Byte-pair encoding of one word: again and again, the pair that is earliest in the merges is joined."""
    try:
        from tokenizers.models import BPE
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    return BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=_END)


@cache
def _words() -> Callable[[str], list[str]]:
    """What splits clean text into words, digits and runs of other characters."""
    try:
        import regex
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    find: Callable[[str], list[str]] = regex.compile(_WORD, regex.IGNORECASE).findall
    return find


@cache
def _byte_characters() -> list[str]:
    """The character by which each byte is written in a piece: its own in Latin-1 if that is visible, or one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


# --- files ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    with path.open("rb") as file:
        source: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file
        content = source.read(_FILE_BYTES + 1)
    if len(content) > _FILE_BYTES:
        raise CheckpointError(f"has more than {_FILE_BYTES:,} bytes: it is no list of merges")
    return content.decode()


def _text_merges(content: str) -> list[Merge]:
    """Of a file with a line for each merge, behind one of its version."""
    lines = content.split("\n")
    if "#version" not in lines[0]:
        raise CheckpointError("its first line says no version, as that of a list of merges does")
    return [_pair(line.split(" "), number) for number, line in enumerate(lines[1 : _MOST_MERGES + 1], start=1) if line]


def _json_merges(content: str) -> tuple[list[Merge], dict[str, Any]]:
    """Of a tokenizer of Hugging Face's `tokenizers`; and its vocabulary."""
    description = parse_json(content)
    model = description.get("model") if isinstance(description, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != _END:
        raise CheckpointError("its model is not CLIP's byte-level BPE (end_of_word_suffix is not '</w>')")
    rows, vocabulary = model.get("merges"), model.get("vocab")
    if not isinstance(rows, list) or not isinstance(vocabulary, dict):
        raise CheckpointError("its model has no merges or no vocab")
    pairs = (row.split(" ") if isinstance(row, str) else row for row in rows)
    return [_pair(pair, number) for number, pair in enumerate(pairs, start=1)], vocabulary


def _pair(parts: Any, number: int) -> Merge:
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise CheckpointError(f"merge {number} is no pair of pieces")
    return parts[0], parts[1]


def check_vocabulary(pieces: BytePairs, vocabulary: Any) -> None:
    """Raise a `CheckpointError` unless `vocabulary` (Hugging Face's `vocab.json`) gives `pieces` the tokens that we give."""
    if not isinstance(vocabulary, dict):
        raise CheckpointError("its vocabulary is no mapping of pieces to tokens")
    for piece, token in pieces.vocabulary.items():
        if vocabulary.get(piece) != token:
            raise CheckpointError(
                f"its vocabulary numbers {piece!r} {vocabulary.get(piece)}, where its merges tell {token}"
            )
