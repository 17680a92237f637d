"""Captions to CLIP's tokens: pieces of one of two vocabularies between a start and an end token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dalle_ds.byte_pairs import MERGES_NAME, BytePairs, check_vocabulary
from dalle_ds.config import PADDING, ClipConfig
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.parsing import parse_json
from dalle_ds.tokenizer import Tokenizer

SENTENCEPIECE_NAME = "tokenizer.model"
VOCABULARY_NAME = "vocab.json"
_NAMES = (SENTENCEPIECE_NAME, MERGES_NAME, "tokenizer.json")


class Pieces(Protocol):
    """A vocabulary: `Tokenizer`, or CLIP's own, `BytePairs`."""

    vocab_size: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that its tokens depend on."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens in [0, vocab_size)."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of tokens."""
        ...

    def save(self, path: str | Path) -> None:
        """Write its file."""
        ...


class ClipTokenizer:
    """Captions to rows of tokens, each with a start and an end token.

    Args:
        pieces: the vocabulary.
        start: token that begins every caption; None is the first one behind the vocabulary.
        end: token that ends every caption; None is the one behind `start`.

    Raises:
        ConfigError: `start` or `end` is a token of the vocabulary, or they are the same.
    """

    def __init__(self, pieces: Pieces, *, start: int | None = None, end: int | None = None) -> None:
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
