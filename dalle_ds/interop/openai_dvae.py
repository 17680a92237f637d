"""OpenAI's released dVAE (`encoder.pkl`, `decoder.pkl`: pickled modules of the package `dall_e`) as one of ours.

Neither the package nor the files' pickled code is run (`dalle_ds.interop.torch_files`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dalle_ds.config import DiscreteVAEConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.files import built_beside, write_json
from dalle_ds.interop.torch_files import load_tensors
from dalle_ds.models.clip import Clip
from dalle_ds.models.dvae import DiscreteVAE
from dalle_ds.models.pretrained import loaded
from dalle_ds.models.vqgan import Vqgan

Model = TypeVar("Model", Clip, DiscreteVAE, Vqgan)
SOURCE_NAME = "source.json"
"""Which files an imported model was made from, in its folder."""
_GROUPS = 4  # dall_e has no other number
_MOST_BLOCKS = 64
"""In a group, of a dVAE that is built from what a file claims; the released one has 2."""
_ENDS: dict[str, dict[str, tuple[int | None, ...]]] = {
    "encoder": {"blocks.input.w": (None, 3, 7, 7), "blocks.output.conv.w": (None, None, 1, 1)},
    "decoder": {"blocks.input.w": (None, None, 1, 1), "blocks.output.conv.w": (6, None, 1, 1)},
}
"""The convolutions at both ends of each part, by which it is known."""
_CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
)


def load_openai_dvae(encoder: str | Path, decoder: str | Path, image_size: int = 256) -> DiscreteVAE:
    """The dVAE of OpenAI's two files; in eval mode, in fp32, on the CPU.

    Args:
        encoder, decoder: pickled `dall_e.Encoder` and `dall_e.Decoder`, of any width and vocabulary, or their state dicts.
        image_size: side of the images that it is used for; the files do not say it, and it changes no weight.

    Raises:
        CheckpointError: a file that cannot be read, is not trusted, or is of another model; or the two do not fit together.
        ConfigError: an image size that does not fit the model.
    """
    found = {"encoder": _read(encoder, "encoder"), "decoder": _read(decoder, "decoder")}
    config = _config(found, encoder, decoder, image_size)
    where = f"{encoder} and {decoder}"
    weights = {f"{part}.{name}": value for part, tensors in found.items() for name, value in tensors.items()}
    return loaded(lambda: DiscreteVAE(config), config, weights, where)


def import_openai_dvae(encoder: str | Path, decoder: str | Path, out: str | Path, image_size: int = 256) -> DiscreteVAE:
    """`load_openai_dvae`, exported to folder `out`, with the two files' SHA-256 in `source.json` beside the weights.

    Raises:
        CheckpointError: as `load_openai_dvae`, or the folder cannot be written.
        ConfigError: `out` is there already, and is something else than an imported model, which would be replaced.
    """

    def make() -> tuple[DiscreteVAE, dict[str, Any]]:
        model = load_openai_dvae(encoder, decoder, image_size)
        return model, {"encoder": described(Path(encoder)), "decoder": described(Path(decoder))}

    return exported(make, out)


def exported(make: Callable[[], tuple[Model, dict[str, Any]]], out: str | Path) -> Model:
    """The imported model that `make` returns, and what it was made from, written to folder `out` as `source.json`.

    Raises:
        CheckpointError: the folder cannot be written.
        ConfigError: `out` is there already, and is something else than an imported model.
    """
    folder = Path(out)
    if folder.exists() and not (folder / SOURCE_NAME).is_file():
        raise ConfigError(f"--out {folder} is there already, and is no imported model: name a new folder")
    model, source = make()
    try:
        with built_beside(folder) as partial:
            model.save_pretrained(partial)
            write_json(partial / SOURCE_NAME, source)
    except OSError as error:
        raise CheckpointError(f"could not write the model to {folder}: {error}; free some space") from error
    return model


def _read(path: str | Path, part: str) -> dict[str, Tensor]:
    tensors = load_tensors(path, _CLASSES)
    _check_ends(tensors, part, path)
    wrong = next((name for name, value in tensors.items() if not value.is_floating_point()), None)
    if wrong is not None:
        raise CheckpointError(f"{path} is not OpenAI's {part}: its {wrong[:100]!r} is of {tensors[wrong].dtype}")
    return tensors


def _check_ends(tensors: Mapping[str, Tensor], part: str, path: str | Path) -> None:
    for name, shape in _ENDS[part].items():
        found = tuple(tensors[name].shape) if name in tensors else ()
        if len(found) != 4 or 0 in found or any(n not in (None, size) for size, n in zip(found, shape, strict=True)):
            wanted = ", ".join("n" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"{path} is not OpenAI's {part}: its {name} has shape {found or None}, where ({wanted}) is needed; are "
                "encoder and decoder in each other's place?"
            )


def _config(
    found: dict[str, dict[str, Tensor]], encoder: str | Path, decoder: str | Path, image_size: int
) -> DiscreteVAEConfig:
    """The shape, as far as it can be told from the convolutions at both ends."""
    fields, others = (_fields(found[part], part) for part in ("encoder", "decoder"))
    if fields["vocab_size"] != others["vocab_size"]:
        raise CheckpointError(
            f"{encoder} has {fields['vocab_size']} codes and {decoder} has {others['vocab_size']}: they are of two dVAEs"
        )
    fields = {**others, **fields}
    _checked(fields, f"{encoder} and {decoder} are not OpenAI's dVAE")
    return DiscreteVAEConfig(**fields, image_size=image_size)


def config_of_openai_dvae(tensors: Mapping[str, Tensor], where: str) -> tuple[str, DiscreteVAEConfig]:
    """Which part of the release has these tensors, "encoder" or "decoder", and the shape as far as that part tells it.

    Raises:
        CheckpointError: a convolution at an end is missing, or the shapes make no dVAE.
    """
    part = "decoder" if tuple(tensors["blocks.input.w"].shape[2:]) == (1, 1) else "encoder"
    _check_ends(tensors, part, where)
    return part, _checked(_fields(tensors, part), f"{where} is not OpenAI's {part}")


def _fields(tensors: Mapping[str, Tensor], part: str) -> dict[str, int]:
    inner, outer = tensors["blocks.input.w"].shape, tensors["blocks.output.conv.w"].shape
    fields = {"groups": _GROUPS, "blocks_per_group": _blocks(tensors)}
    if part == "encoder":
        return {**fields, "encoder_width": inner[0], "vocab_size": outer[0]}
    return {**fields, "decoder_width": outer[1], "decoder_input": inner[0], "vocab_size": inner[1]}


def _checked(fields: dict[str, int], wrong: str) -> DiscreteVAEConfig:
    try:
        if fields["blocks_per_group"] > _MOST_BLOCKS:
            raise ConfigError(f"it would have {fields['blocks_per_group']} blocks in a group, more than {_MOST_BLOCKS}")
        return DiscreteVAEConfig(**fields)
    except ConfigError as error:
        raise CheckpointError(f"{wrong}: {error}") from error


def _blocks(names: Iterable[str]) -> int:
    """Residual blocks in the first group."""
    prefix = "blocks.group_1.block_"
    return len({name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)})


def described(path: Path) -> dict[str, str]:
    """A file's name and its SHA-256, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"file": path.name, "sha256": digest.hexdigest()}
