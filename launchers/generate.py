"""Draw pictures for prompts with a trained transformer, and write them as one labelled PNG.

python launchers/generate.py --model RUN_OR_EXPORT --prompt TEXT --out PNG, or, for a transformer divided among N GPUs (tensor
parallelism), torchrun --nproc_per_node N launchers/generate.py with the same options and --device cuda.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.errors import ConfigError
from dalle_ds.files import write_bytes
from dalle_ds.memory import keep_freed_memory
from dalle_ds.parallel import Mesh
from dalle_ds.sampling import TextToImage, picture_grid

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Draw pictures for prompts."""

    model: str
    """Run directory of launchers/train_transformer.py, or its export."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """What to draw; given again, another row of pictures."""
    out: str
    """PNG file to write: a row for each prompt."""
    num: Annotated[int, tyro.conf.arg(aliases=["--pictures"])] = 8
    """Pictures for each prompt. Launchers of several processes take --num for an option of theirs: call it --pictures."""
    seed: int = 0
    """Picture i of a prompt depends on the seed, i and the prompt only."""
    temperature: float = 1.0
    """The logits are divided by it; 0 takes the likeliest code always."""
    top_k: int | None = None
    """Draw among the k likeliest codes only."""
    top_p: float | None = None
    """Draw among the fewest likeliest codes that have this probability together."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is off. More needs a model trained with loader.caption_dropout."""
    batch_size: int | None = None
    """Pictures drawn at once, best a multiple of 4; by default as many as fit in 1 GiB, or in half of a GPU's free memory."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where to compute; auto spreads a transformer larger than one device over GPUs and main memory."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the transformer; bf16 is the faster."""


def main() -> None:
    """Parse, draw, write."""
    options = parse_options(Options)
    out = Path(options.out)
    if out.suffix.lower() != ".png" or not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"out must be a .png file in a folder that exists, found {options.out}")
    if options.device == "cpu":
        keep_freed_memory()
    tensor = Mesh.tensor_group(options.device)
    pipe = TextToImage.from_pretrained(options.model, options.device, DTYPES[options.dtype], tensor=tensor)
    pictures = pipe.generate(
        options.prompt,
        num=options.num,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance=options.guidance,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    if tensor.rank > 0:
        return  # all have drawn the same
    buffer = io.BytesIO()
    picture_grid(list(zip(options.prompt, pictures, strict=True))).save(buffer, format="PNG")
    write_bytes(out, buffer.getvalue())
    print(f"wrote {out}")


if __name__ == "__main__":
    run_launcher(main)
