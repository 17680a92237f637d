"""Text to images: tokenizer, transformer and dVAE in one object (DALL·E §2.6)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.files import built_beside, write_json
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.decoding import decoding_device
from dalle_ds.models.pretrained import WEIGHTS_NAME, export_folder, fingerprint
from dalle_ds.models.vqgan import ImageTokenizer, load_image_tokenizer
from dalle_ds.parallel import WHOLE, TensorGroup
from dalle_ds.parsing import parse_json
from dalle_ds.sampling.candidates import Reranker, rank_candidates
from dalle_ds.sampling.codes import Progress, Sampling, SamplingRequest, sample_codes
from dalle_ds.sampling.completion import open_image, top_rows
from dalle_ds.sampling.grid import to_pil_images
from dalle_ds.sampling.placement import load_spread
from dalle_ds.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dalle_ds.models.clip import Clip

TOKENIZER_NAME = "tokenizer.model"
DVAE_NAME = "dvae"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS_NAME = "parts.json"
"""Fingerprints of the tokenizer and the dVAE that the transformer was trained with."""


class TextToImage:
    """Generates images for prompts.

    Args:
        model: the transformer; its device is where everything runs.
        dvae: decodes the transformer's image codes; moved to the transformer's device.
        tokenizer: the one that the transformer was trained with.

    Raises:
        CheckpointError: the three do not belong together.
    """

    def __init__(self, model: Dalle, dvae: ImageTokenizer, tokenizer: Tokenizer) -> None:
        config = model.config
        for what, found, needed in (
            ("the dVAE has a vocabulary of", dvae.config.vocab_size, config.image_vocab),
            ("the dVAE's images have a code grid of side", dvae.config.grid, config.grid),
        ):
            if found != needed:
                raise CheckpointError(
                    f"{what} {found}, but the transformer was trained with {needed}: use the one it was trained with"
                )
        if tokenizer.vocab_size > config.text_vocab:
            raise CheckpointError(
                f"the tokenizer has a vocabulary of {tokenizer.vocab_size}, but the transformer has room for "
                f"{config.text_vocab}: use the one it was trained with"
            )
        self.device = decoding_device(model)
        self.model = model
        self.dvae = dvae.to(self.device)
        self.tokenizer = tokenizer
        self.folder: Path | None = None
        """What it was read from."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        max_memory: Mapping[int | str, int | str] | None = None,
        tensor: TensorGroup = WHOLE,
    ) -> TextToImage:
        """Load what a transformer run exports: transformer, `tokenizer.model` and the folder `dvae`.

        Args:
            path: the run directory or its export.
            device: a CPU or GPU; "auto" spreads a transformer that is larger than one device over all there are
                (`load_spread`).
            dtype: of the transformer's weights, fp32, bf16 or fp16; the dVAE stays in fp32.
            max_memory: as in `load_spread`, for "auto" only.
            tensor: the processes that divide the transformer's layers. Each has a `TextToImage` of its own, all of which must
                be asked for the same at the same time, and sample the same.

        Raises:
            CheckpointError: something is missing or does not belong together.
            ConfigError: `device` or `dtype` is none that images can be sampled with here.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(map(str, DTYPES))}, found {dtype}")
        folder = export_folder(path)
        if device == "auto":
            if tensor.size > 1:
                raise ConfigError(
                    "device=auto spreads a transformer by itself: name the device of each process instead"
                )
            model = load_spread(folder, dtype, max_memory=max_memory)
        else:
            if max_memory is not None:
                raise ConfigError(f"max_memory needs device=auto, found device={device}")
            model = Dalle.from_pretrained(folder, tensor=tensor).to(device=usable_device(device), dtype=dtype)
        for part in (TOKENIZER_NAME, DVAE_NAME):
            if not (folder / part).exists():
                raise CheckpointError(
                    f"{folder} has no {part}: it is a transformer alone, and generating images needs all that a "
                    "transformer run exports"
                )
        pipeline = cls(model, load_image_tokenizer(folder / DVAE_NAME), Tokenizer.load(folder / TOKENIZER_NAME))
        pipeline._check_parts(folder)
        pipeline.folder = folder
        return pipeline

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of all that images come from, "transformer" "dvae" "tokenizer"; reads the transformer's file anew.

        Of a transformer that was read from a file, the weights in that file count, whatever dtype they are used in.
        """
        weights = self.model.state_dict() if self.folder is None else _StoredWeights(self.folder / WEIGHTS_NAME)
        return {"transformer": fingerprint(weights), **self._parts()}

    def save_pretrained(self, path: str | Path) -> None:
        """Write what `from_pretrained` reads into folder `path`, whole or not at all.

        Raises:
            CheckpointError: it cannot be written, or is spread over devices.
        """
        if hasattr(self.model, "hf_device_map"):
            raise CheckpointError(
                "a transformer that device=auto spread over several places cannot be written: copy the folder it came from"
            )
        try:
            with built_beside(Path(path)) as partial:
                self.model.save_pretrained(partial)
                self.dvae.save_pretrained(partial / DVAE_NAME)
                self.tokenizer.save(partial / TOKENIZER_NAME)
                write_json(partial / PARTS_NAME, self._parts())
        except OSError as error:
            raise CheckpointError(f"could not write the model to {path}: {error}; free some space") from error

    def _parts(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.fingerprint, "dvae": self.dvae.fingerprint}

    def _check_parts(self, folder: Path) -> None:
        """Refuse a tokenizer or dVAE that the transformer was not trained with: it would generate noise without a word."""
        if not (folder / PARTS_NAME).is_file():
            return
        try:
            parts = dict(parse_json((folder / PARTS_NAME).read_bytes()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{folder / PARTS_NAME} cannot be read: export the model again") from error
        for name, found in self._parts().items():
            if parts.get(name) != found:
                raise CheckpointError(
                    f"the {name} in {folder} is not the one that the transformer was trained with (fingerprint "
                    f"{found[:12]}, trained with {str(parts.get(name))[:12]}): put the right one there, or export again"
                )

    def generate(
        self,
        prompts: str | Sequence[str],
        num: int = 8,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        rerank: Reranker | Clip | None = None,
        batch_size: int | None = None,
        on_row: Callable[[Progress], None] | None = None,
        keep: int | None = None,
        image: str | Path | Image.Image | None = None,
        rows: int | None = None,
    ) -> list[list[Image.Image]]:
        """Sample `num` images for each prompt, or complete an image `num` times for each.

        Args:
            prompts: one or several; a prompt too long for the model is cut, with a warning.
            temperature, top_k, top_p, guidance: as in `Sampling`.
            seed: image i of a prompt depends on the seed, i and the prompt only, not on what is sampled beside it.
            rerank: given, each prompt's images are sorted by its scores, best first; a CLIP, or what gives scores
                (`rank_candidates` returns them, too).
            batch_size, on_row: as in `SamplingRequest`.
            keep: how many of the reranked images to return; memory is then bounded, whatever `num` is. None returns all.
            image: a file or an image to complete (DALL·E §3.3), resized and cropped as in training. The codes of its top rows
                stay as they are; its pixels there are those of the dVAE, and near the edge those that go with what is sampled
                below.
            rows: rows of its codes to keep; None keeps the paper's share, 15 of 32; all are the image through the dVAE.

        Returns:
            One list of images per prompt.

        Raises:
            ConfigError: an argument out of range, or of something that was not asked for; named.
            DataError: an image that cannot be read; a reranker that does not give one score per image.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        given = None
        if image is not None:
            given = top_rows(self.dvae, open_image(image, self.dvae.config.image_size), rows).expand(len(prompts), -1)
        elif rows is not None:
            raise ConfigError(f"rows={rows} keeps rows of an image: give image, or leave rows out")
        if keep is not None and rerank is None:
            raise ConfigError(f"keep={keep} takes the best by rerank: give rerank, or leave keep out and set num")
        request = SamplingRequest(num, seed, Sampling(temperature, top_k, top_p, guidance), given, batch_size, on_row)
        if rerank is not None:
            rankings = rank_candidates(self, prompts, request, rerank, keep=keep)
            return [[one.image for one in ranking.kept] for ranking in rankings]
        return [self.decode(codes) for codes in sample_codes(self.model, self.encode(prompts), request)]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as the transformer reads them: (B, T) int64, −1 where padded; warns of each that is too long."""
        length = self.model.config.text_len
        if not prompts:
            raise DataError("no prompt was given: name at least one")
        rows = []
        for prompt in prompts:
            row, truncated = self.tokenizer.encode_padded([prompt], length)
            if truncated:
                warnings.warn(f"the prompt is longer than {length} tokens and was cut: {prompt!r}", stacklevel=2)
            rows.append(row)
        return torch.cat(rows)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Images of codes (B, W²).

        They are decoded one at a time: convolutions over several add up in another order, and pixels near the edge
        between two of the 256 levels would depend on the batch.
        """
        side = self.model.config.grid
        return [to_pil_images(self.dvae.decode(one.view(1, side, side).to(self.device)))[0] for one in codes]


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: there is none here, or images are not sampled on such.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda, cuda:1 and so on, or auto, found {device!r}")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ConfigError(
                f"device={device} was asked for, but PyTorch finds {count or 'no'} GPU here: use device=cpu"
            )
    return found


class _StoredWeights(Mapping[str, Tensor]):
    """The tensors of a file, read one at a time."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())
