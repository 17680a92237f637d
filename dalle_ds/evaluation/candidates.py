"""Candidates for captions, kept on disk where wanted, and the best among the first n of them.

Candidate i of a caption depends on the seed, i and the caption only, so that the best of 8 is chosen among the same images
that the best of 64 is chosen among, and all points of a curve over n are of the same images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.results import differences
from dalle_ds.files import write_bytes, write_json
from dalle_ds.parsing import parse_json
from dalle_ds.precision.choice import DTYPES, Choice
from dalle_ds.sampling import SamplingRequest, TextToImage, sample_codes

CAPTIONS = 4
"""Captions whose candidates are in memory at once."""
PROTOCOL_NAME = "protocol.json"


@dataclass(frozen=True)
class Candidates:
    """Codes of some images for each of a list of captions."""

    pipeline: TextToImage
    """Samples them."""
    captions: list[str]
    request: SamplingRequest
    """How many images of each caption, and how they are sampled."""
    folder: Path | None = None
    """Where codes are kept and found again, in files of `CAPTIONS` captions; None keeps none. To be prepared by one process
    (`prepare`) before any asks for codes."""

    def prepare(self, dtype: str, weights: str) -> None:
        """Make the folder, if any, ready for these codes.

        Args:
            dtype: arithmetic of the transformer.
            weights: the transformer's fingerprint.

        Raises:
            ConfigError: it holds codes of another protocol, or something else.
            DataError: its description cannot be read.
        """
        if self.folder is None:
            return
        protocol = {
            "captions": texts_sha256(self.captions),
            "num": self.request.num,
            "seed": self.request.seed,
            "sampling": vars(self.request.sampling),
            "transformer": weights,
            "tokenizer": self.pipeline.tokenizer.fingerprint,
            "dtype": dtype,
            "captions_in_a_file": CAPTIONS,
        }
        path = self.folder / PROTOCOL_NAME
        try:
            found = parse_json(path.read_bytes())
        except FileNotFoundError:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ConfigError(f"--pictures {self.folder} holds something else: name another folder") from None
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, protocol)
            return
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}; name another folder with --pictures") from error
        differing = differences(found if isinstance(found, dict) else {}, protocol)
        if differing:
            kept = kept_precision(self.folder)
            again = f", or give --dtype {kept.precision}" if kept and kept.precision != dtype else ""
            raise ConfigError(
                f"the images in {self.folder} are other ones ({'; '.join(differing)}, there and asked for): name another "
                f"folder with --pictures{again}"
            )

    def codes(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), num, W²) int64 of some captions: found in the folder, or sampled."""
        config = self.pipeline.model.config
        path = None if self.folder is None else self.folder / f"{rows[0]:08}.safetensors"
        shape = (len(rows), self.request.num, config.image_len)
        kept = None if path is None else _read(path, shape, config.image_vocab)
        if kept is not None:
            return kept
        text = self.pipeline.encode([self.captions[row] for row in rows])
        codes = sample_codes(self.pipeline.model, text, self.request)
        if path is not None:
            write_bytes(path, save({"codes": codes.to(torch.int32)}))
        return codes


def kept_precision(folder: Path) -> Choice | None:
    """That of the codes that a folder keeps; None where it keeps none, or does not tell."""
    path = folder / PROTOCOL_NAME
    try:
        dtype = parse_json(path.read_bytes())["dtype"]
        return Choice(dtype, f"that of {path}") if dtype in DTYPES else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # `Candidates.prepare` says what is wrong


def texts_sha256(texts: Iterable[str]) -> str:
    """Of texts in their order."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def best_of(scores: Tensor, n: int) -> Tensor:
    """Which of the first `n` candidates scores best: (B, N) → (B,) int64; the first of equals."""
    return scores[:, :n].argmax(dim=1)


def _read(path: Path, shape: tuple[int, ...], vocab_size: int) -> Tensor | None:
    """Kept codes, or None where there are none, or a file that a disk has damaged: those are sampled again."""
    try:
        codes = load(path.read_bytes())["codes"].long()
    except (OSError, SafetensorError, KeyError):
        return None
    whole = tuple(codes.shape) == shape and int(codes.min()) >= 0 and int(codes.max()) < vocab_size
    return codes if whole else None
