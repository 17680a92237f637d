"""The command line of `launchers/generate.py`."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import built_beside, write_bytes, write_json
from dalle_ds.parallel import Mesh
from dalle_ds.parsing import is_text
from dalle_ds.precision.rates import DTYPES, choose_precision
from dalle_ds.sampling.candidates import Ranking, rank_candidates
from dalle_ds.sampling.codes import Progress, SamplingRequest, sample_codes
from dalle_ds.sampling.completion import open_image, top_rows
from dalle_ds.sampling.draw import Sampling
from dalle_ds.sampling.grid import image_grid
from dalle_ds.sampling.pipeline import TextToImage
from dalle_ds.sampling.progress import DrawingProgress
from dalle_ds.sampling.rerank import ClipReranker
from dalle_ds.sampling.scores import Scores


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file; empty ones are left out.

    Raises:
        DataError: it cannot be read, or has none, or one twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the captions in {path} cannot be read: {error}; name a text file") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise DataError(f"{path} has no captions: write one on each line")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt in seen:
            raise DataError(f"{path} has the caption {prompt!r} twice: leave one out")
        seen.add(prompt)
    return prompts


LIST_NAME = "pictures.json"
"""In a folder of images: a list of {"caption", "picture", "number"}, and "score" where there are scores."""
_OURS = re.compile(r"pictures\.json|[0-9]{5,}-[0-9]{3,}\.png")
"""What such a folder has in it; one with anything else is not replaced."""
KEEP = 8
"""Images that are kept of each prompt's candidates where nobody says."""


@dataclass(frozen=True)
class GenerateOptions:
    """Generate images for prompts."""

    model: str
    """Run directory of launchers/train_transformer.py, or its export."""
    out: str
    """PNG file to write, a row for each prompt. A name without a suffix is a folder instead: one PNG for each image, and
    pictures.json, which tells their captions."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What to draw; given again, another row of images."""
    prompts: str | None = None
    """Text file with a prompt on each line, besides those of --prompt."""
    num: Annotated[int, tyro.conf.arg(aliases=["--num_images_per_prompt", "--pictures"])] = 8
    """Images for each prompt. The deepspeed command refuses --num as an unclear one of its own: give it the longer name."""
    seed: int = 0
    """Image i of a prompt depends on the seed, i and the prompt only."""
    temperature: float = 1.0
    """The logits are divided by it; 0 takes the likeliest code always."""
    top_k: int | None = None
    """Draw among the k likeliest codes only."""
    top_p: float | None = None
    """Draw among the fewest likeliest codes that have this probability together."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is off. More needs a model trained with loader.caption_dropout."""
    rerank: str | None = None
    """Run directory of launchers/train_clip.py, or an exported CLIP: keep those of --num images that fit best."""
    keep: int | None = None
    """Images to keep for each prompt, best first; 8 by default, or --num if that is less."""
    scores: str | None = None
    """JSON file of the scores of all images, by default beside OUT. Given again with larger --num or --keep, or other
    prompts, only what is missing is drawn and scored."""
    init_image: str | None = None
    """An image to complete: the codes of its top rows are kept, the rest is drawn."""
    init_rows: int | None = None
    """Rows of its codes to keep; by default the paper's share, 15 of 32."""
    batch_size: int | None = None
    """Images drawn at once, best a multiple of 4; by default as many as fit in 1 GiB, or in half of a GPU's free memory."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where to compute; auto spreads a transformer larger than one device over GPUs and main memory."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the transformer; auto takes what the device computes fastest."""

    def check(self) -> None:
        """Refuse, with a ConfigError, what cannot be written or belongs to something that was not asked for."""
        out = Path(self.out)
        is_file = out.suffix.lower() == ".png"
        unnamed = out.name in ("", "..")
        if (
            unnamed
            or (out.suffix and not is_file)
            or not out.parent.is_dir()
            or (out.is_dir() if is_file else out.is_file())
        ):
            raise ConfigError(
                "out must be a .png file in a folder that exists, or a name without a suffix for a folder of images, found "
                f"{self.out}"
            )
        if not is_file and out.is_dir() and not _is_ours(out):
            raise ConfigError(f"out={self.out} is a folder with other things in it: name a new one")
        if not self.prompt and self.prompts is None:
            raise ConfigError("nothing to draw: give --prompt TEXT, or --prompts FILE with one on each line")
        self.request(1, None, None)  # refuses what is out of range
        if self.init_rows is not None and self.init_image is None:
            raise ConfigError(f"init_rows={self.init_rows} keeps rows of an image: name it with --init_image")
        for name, value in (("keep", self.keep), ("scores", self.scores)):
            if value is not None and self.rerank is None:
                raise ConfigError(f"{name}={value} needs scores of images: name a CLIP with --rerank")
        if self.keep is not None and not 1 <= self.keep <= self.num:
            raise ConfigError(f"keep must be at least 1 and at most num={self.num}, found {self.keep}")
        if self.scores is not None:
            scores = Path(self.scores)
            if scores.suffix.lower() != ".json" or not scores.parent.is_dir() or scores.is_dir():
                raise ConfigError(f"scores must be a .json file in a folder that exists, found {self.scores}")
            if out.resolve() in scores.resolve().parents:
                raise ConfigError(
                    f"scores={self.scores} lies in out={self.out}, which is replaced as a whole: name another place"
                )

    def all_prompts(self) -> list[str]:
        """Those of the command line, then those of the file.

        Raises:
            DataError: one that UTF-8 cannot hold, so that no file could tell it; a file as `read_prompts`.
        """
        for prompt in self.prompt:
            if not is_text(prompt):
                raise DataError(f"the prompt {prompt!r} has bytes that are no UTF-8: write it in this encoding")
        return [*self.prompt, *(read_prompts(self.prompts) if self.prompts is not None else ())]

    @property
    def sampling(self) -> Sampling:
        """How codes are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.guidance)

    def request(self, prompts: int, given: Tensor | None, on_row: Callable[[Progress], None] | None) -> SamplingRequest:
        """What is asked of the transformer; all prompts' images begin with the codes `given` (n,)."""
        codes = None if given is None else given.expand(prompts, -1)
        return SamplingRequest(self.num, self.seed, self.sampling, codes, self.batch_size, on_row)


def draw_to_file(options: GenerateOptions) -> list[Path]:
    """Draw what was asked for and write it; returns the files, on the first of several processes only.

    Raises:
        ConfigError, DataError, CheckpointError: as `TextToImage` and `Scores`.
    """
    options.check()
    prompts = options.all_prompts()
    tensor = Mesh.tensor_group(options.device)
    options = replace(
        options, dtype=choose_precision(options.dtype, Mesh(tensor.rank, tensor.size, _first_device(options)))
    )
    pipe = TextToImage.from_pretrained(options.model, options.device, DTYPES[options.dtype], tensor=tensor)
    grid = pipe.model.config.grid
    init, given = _initial(pipe, options)
    rows_given = 0 if given is None else len(given) // grid
    pictures: Iterable[list[Image.Image]]
    rankings: list[Ranking] | None = None
    files = [Path(options.out)]
    if options.rerank is None:
        with DrawingProgress(
            grid, len(prompts) * options.num, given_rows=rows_given, enabled=tensor.rank == 0
        ) as progress:
            codes = sample_codes(pipe.model, pipe.encode(prompts), options.request(len(prompts), given, progress))
        if tensor.rank > 0:
            return []  # all have drawn the same
        pictures = (pipe.decode(of_prompt) for of_prompt in codes)  # a folder takes those of one prompt after another
    else:
        rankings, scores = _ranked(pipe, options, prompts, given)
        if tensor.rank > 0:
            return []
        files.append(scores.path)
        pictures = [[one.image for one in ranking.kept] for ranking in rankings]
    if not files[0].suffix:
        _write_folder(files[0], prompts, pictures, rankings)
        return files
    notes = None
    if rankings is not None:
        notes = [[f"{one.score:.3f}  #{one.number}" for one in ranking.kept] for ranking in rankings]
    if init is not None:
        pictures = [[init, *of_prompt] for of_prompt in pictures]
        first = f"given: {rows_given} of {grid} rows"
        notes = [[first, *(notes[row] if notes else [])] for row in range(len(prompts))]
    buffer = io.BytesIO()
    image_grid(list(zip(prompts, pictures, strict=True)), notes=notes).save(buffer, format="PNG")
    write_bytes(files[0], buffer.getvalue())
    return files


def _first_device(options: GenerateOptions) -> torch.device:
    """One that computes, of those that auto spreads a transformer over."""
    return torch.device("cpu" if options.device == "cpu" or not torch.cuda.is_available() else "cuda")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty, or has what `_write_folder` writes and nothing else."""
    names = [path.name for path in folder.iterdir()]
    return not names or (LIST_NAME in names and all(_OURS.fullmatch(name) for name in names))


def _write_folder(
    folder: Path, prompts: Sequence[str], pictures: Iterable[Sequence[Image.Image]], rankings: Sequence[Ranking] | None
) -> None:
    """One file for each image, and the list of them."""
    entries: list[dict[str, Any]] = []
    with built_beside(folder) as partial:
        for row, (prompt, of_prompt) in enumerate(zip(prompts, pictures, strict=True)):
            for place, picture in enumerate(of_prompt):
                entry: dict[str, Any] = {"caption": prompt, "picture": f"{row:05}-{place:03}.png", "number": place}
                if rankings is not None:
                    kept = rankings[row].kept[place]
                    entry |= {"number": kept.number, "score": kept.score}
                picture.save(partial / entry["picture"])
                entries.append(entry)
        write_json(partial / LIST_NAME, entries)


def _initial(pipe: TextToImage, options: GenerateOptions) -> tuple[Image.Image | None, Tensor | None]:
    """The image to complete as the models see it, and the codes (n,) that are kept of it."""
    if options.init_image is None:
        return None, None
    init = open_image(options.init_image, pipe.dvae.config.image_size)
    return init, top_rows(pipe.dvae, init, options.init_rows)


def _ranked(
    pipe: TextToImage, options: GenerateOptions, prompts: Sequence[str], given: Tensor | None
) -> tuple[list[Ranking], Scores]:
    """Draw and score what the file of scores lacks, and keep it up to date."""
    from dalle_ds.models.clip import Clip

    assert options.rerank is not None
    reranker = ClipReranker(Clip.from_pretrained(options.rerank, pipe.device))
    path = Path(options.out).with_suffix(".json") if options.scores is None else Path(options.scores)
    scores = Scores.open(path, _origin(pipe, options, reranker, given))
    is_first = pipe.model.tensor.rank == 0
    known = scores.known
    missing = sum(max(0, options.num - len(known.get(prompt, ()))) for prompt in prompts)
    grid = pipe.model.config.grid
    keep = min(KEEP, options.num) if options.keep is None else options.keep

    def keep_scores(rankings: Sequence[Ranking]) -> None:
        scores.update(rankings, keep)
        if is_first:
            scores.write()

    rows_given = 0 if given is None else len(given) // grid
    with DrawingProgress(grid, missing, given_rows=rows_given, enabled=is_first) as progress:
        request = options.request(len(prompts), given, progress)
        rankings = rank_candidates(pipe, prompts, request, reranker, keep=keep, known=known, on_scores=keep_scores)
    keep_scores(rankings)
    return rankings, scores


def _origin(
    pipe: TextToImage, options: GenerateOptions, reranker: ClipReranker, given: Tensor | None
) -> dict[str, Any]:
    """All that the scores of a prompt's candidates depend on."""
    codes = None if given is None else hashlib.sha256(given.numpy().tobytes()).hexdigest()
    return {
        **pipe.fingerprints(),
        "clip": reranker.fingerprint,
        "dtype": options.dtype,
        # Other arithmetic adds up in another order, and sooner or later draws another code.
        "device": f"auto, {pipe.device.type}" if options.device == "auto" else pipe.device.type,
        "processes": pipe.model.tensor.size,
        "seed": options.seed,
        **asdict(options.sampling),
        "given_codes": codes,
    }
