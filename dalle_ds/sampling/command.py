"""The command line of `launchers/generate.py`."""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.files import built_beside, write_bytes, write_json
from dalle_ds.parallel import Mesh
from dalle_ds.parsing import is_text
from dalle_ds.precision.choice import DTYPES, choose_precision
from dalle_ds.sampling.candidates import ClipReranker, Ranking, Scores, rank_candidates
from dalle_ds.sampling.codes import Progress, Sampling, SamplingRequest, sample_codes
from dalle_ds.sampling.completion import open_image, top_rows
from dalle_ds.sampling.grid import image_grid
from dalle_ds.sampling.pipeline import TextToImage
from dalle_ds.sampling.unclip import OnStage, Unclip, is_unclip
from dalle_ds.sampling.unclip_options import UnclipOptions


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
SECONDS_BETWEEN_LINES = 10.0
"""How often sampling whose output is no terminal prints a line."""


@dataclass(frozen=True)
class GenerateOptions:
    """Generate images for prompts."""

    model: str
    """Run directory of launchers/train_transformer.py, or its export; or a folder of launchers/export_unclip.py."""
    out: str
    """PNG file to write, a row for each prompt. A name without a suffix is a folder instead: one PNG for each image, and
    pictures.json, which tells their captions."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What to show; given again, another row of images."""
    prompts: str | None = None
    """Text file with a prompt on each line, besides those of --prompt."""
    num: Annotated[int, tyro.conf.arg(aliases=["--num_images_per_prompt", "--pictures"])] = 8
    """Images for each prompt. The deepspeed command refuses --num as an unclear one of its own: give it the longer name."""
    seed: int = 0
    """Image i of a prompt depends on the seed, i and the prompt only."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    """--temperature, --top_k, --top_p, --guidance; of an unCLIP, the first three are an autoregressive prior's."""
    unclip: Annotated[UnclipOptions, tyro.conf.arg(name="")] = field(default_factory=UnclipOptions)
    """How the stages of an unCLIP sample."""
    rerank: str | None = None
    """Run directory of launchers/train_clip.py, or an exported CLIP: keep those of --num images that fit best."""
    keep: int | None = None
    """Images to keep for each prompt, best first; 8 by default, or --num if that is less."""
    scores: str | None = None
    """JSON file of the scores of all images, by default beside OUT. Given again with larger --num or --keep, or other
    prompts, only what is missing is sampled and scored."""
    init_image: str | None = None
    """An image to complete: the codes of its top rows are kept, the rest is sampled."""
    init_rows: int | None = None
    """Rows of its codes to keep; by default the paper's share, 15 of 32."""
    batch_size: int | None = None
    """Images sampled at once, best a multiple of 4; by default as many as fit in 1 GiB, or in half of a GPU's free memory."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where to compute; auto spreads a transformer larger than one device over GPUs and main memory."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the transformer, or of an unCLIP's stages; auto takes what the device computes fastest."""

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
            raise ConfigError("nothing to generate: give --prompt TEXT, or --prompts FILE with one on each line")
        SamplingRequest(self.num, batch_size=self.batch_size)  # refuses what is out of range
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


def generate_to_file(options: GenerateOptions) -> list[Path]:
    """Generate what was asked for and write it; returns the files, on the first of several processes only.

    Raises:
        ConfigError, DataError, CheckpointError: as `TextToImage` and `Scores`.
    """
    options.check()
    if is_unclip(options.model):
        return _generate_unclip(options)
    options.unclip.refuse_all(options.model)
    prompts, out = options.all_prompts(), Path(options.out)
    tensor = Mesh.tensor_group(options.device)
    # Of those that auto spreads a transformer over, one that computes.
    device = torch.device("cpu" if options.device == "cpu" or not torch.cuda.is_available() else "cuda")
    dtype = choose_precision(options.dtype, Mesh(tensor.rank, tensor.size, device))
    pipe = TextToImage.from_pretrained(options.model, options.device, DTYPES[dtype], tensor=tensor)
    grid = pipe.model.config.grid
    init = given = None
    if options.init_image is not None:
        init = open_image(options.init_image, pipe.dvae.config.image_size)
        given = top_rows(pipe.dvae, init, options.init_rows)
    rows_given = 0 if given is None else len(given) // grid
    rerank = scores = None
    to_sample = len(prompts) * options.num
    if options.rerank is not None:
        from dalle_ds.models.clip import Clip

        rerank = ClipReranker(Clip.from_pretrained(options.rerank, pipe.device))
        path = out.with_suffix(".json") if options.scores is None else Path(options.scores)
        scores = Scores.open(path, _origin(pipe, options, dtype, rerank, given))
        to_sample = sum(max(0, options.num - len(scores.known.get(prompt, ()))) for prompt in prompts)
    rankings: list[Ranking] | None = None
    images: Iterable[list[Image.Image]]
    with show_progress(grid, to_sample, given_rows=rows_given, enabled=tensor.rank == 0) as on_row:
        codes = None if given is None else given.expand(len(prompts), -1)
        request = SamplingRequest(options.num, options.seed, options.sampling, codes, options.batch_size, on_row)
        if rerank is None or scores is None:
            # A folder takes the images of one prompt after another.
            images = map(pipe.decode, sample_codes(pipe.model, pipe.encode(prompts), request))
        else:
            rankings = _rank(pipe, prompts, request, rerank, scores, options.keep)
            images = [[one.image for one in ranking.kept] for ranking in rankings]
    if tensor.rank > 0:
        return []  # all have sampled the same
    if out.suffix:
        _write_sheet(out, prompts, images, rankings, init, f"given: {rows_given} of {grid} rows")
    else:
        _write_folder(out, prompts, images, rankings)
    return [out] if scores is None else [out, scores.path]


def _generate_unclip(options: GenerateOptions) -> list[Path]:
    for name in ("init_image", "init_rows", "scores"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"{name}={getattr(options, name)} is a DALL·E's, and {options.model} is an unCLIP: leave it out"
            )
    if options.device == "auto":
        raise ConfigError("device=auto spreads a transformer: give cuda, and --max_memory where an unCLIP is too large")
    prompts, out = options.all_prompts(), Path(options.out)
    dtype = DTYPES[choose_precision(options.dtype, Mesh(0, 1, torch.device(options.device)))]
    pipe = Unclip.from_pretrained(options.model, options.device, dtype, max_memory=options.unclip.max_bytes)
    rerank = None
    if options.rerank is not None:
        from dalle_ds.models.clip import Clip

        rerank = Clip.from_pretrained(options.rerank)
    keep = None if rerank is None else options.keep or min(KEEP, options.num)
    with show_stages() as on_stage:
        images = pipe.generate(
            prompts,
            options.num,
            seed=options.seed,
            sampling=options.unclip.resolved(pipe, options.sampling),
            rerank=rerank,
            keep=keep,
            batch_size=options.batch_size or 16,
            on_stage=on_stage,
        )
    if out.suffix:
        _write_sheet(out, prompts, images, None, None, "", cell=max(128, pipe.image_size))
    else:
        _write_folder(out, prompts, images, None)
    return [out]


def _origin(
    pipe: TextToImage, options: GenerateOptions, dtype: str, rerank: ClipReranker, given: Tensor | None
) -> dict[str, Any]:
    """All that the scores of a prompt's candidates depend on."""
    return {
        **pipe.fingerprints(),
        "clip": rerank.clip.fingerprint,
        "dtype": dtype,
        # Other arithmetic adds up in another order, and sooner or later samples another code.
        "device": f"auto, {pipe.device.type}" if options.device == "auto" else pipe.device.type,
        "processes": pipe.model.tensor.size,
        "seed": options.seed,
        **asdict(options.sampling),
        "given_codes": None if given is None else hashlib.sha256(given.numpy().tobytes()).hexdigest(),
    }


def _rank(
    pipe: TextToImage,
    prompts: Sequence[str],
    request: SamplingRequest,
    rerank: ClipReranker,
    scores: Scores,
    keep: int | None,
) -> list[Ranking]:
    """Sample and score what the file of scores lacks, and keep it up to date."""
    keep = min(KEEP, request.num) if keep is None else keep

    def keep_scores(rankings: Sequence[Ranking]) -> None:
        scores.update(rankings, keep)
        if pipe.model.tensor.rank == 0:
            scores.write()

    rankings = rank_candidates(pipe, prompts, request, rerank, keep=keep, known=scores.known, on_scores=keep_scores)
    keep_scores(rankings)
    return rankings


def _write_sheet(
    path: Path,
    prompts: Sequence[str],
    images: Iterable[list[Image.Image]],
    rankings: Sequence[Ranking] | None,
    init: Image.Image | None,
    given: str,
    cell: int = 128,
) -> None:
    """A row for each prompt; first the image that was completed, if any, of which `given` says how much was."""
    rows = list(images)
    notes: list[list[str]] = [[] for _ in prompts]
    if rankings is not None:
        notes = [[f"{one.score:.3f}  #{one.number}" for one in ranking.kept] for ranking in rankings]
    if init is not None:
        rows = [[init, *of_prompt] for of_prompt in rows]
        notes = [[given, *of_prompt] for of_prompt in notes]
    buffer = io.BytesIO()
    image_grid(list(zip(prompts, rows, strict=True)), notes=notes, cell=cell).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty, or has what `_write_folder` writes and nothing else."""
    names = [path.name for path in folder.iterdir()]
    return not names or (LIST_NAME in names and all(_OURS.fullmatch(name) for name in names))


def _write_folder(
    folder: Path, prompts: Sequence[str], images: Iterable[Sequence[Image.Image]], rankings: Sequence[Ranking] | None
) -> None:
    """One file for each image, and the list of them."""
    entries: list[dict[str, Any]] = []
    with built_beside(folder) as partial:
        for row, (prompt, of_prompt) in enumerate(zip(prompts, images, strict=True)):
            for place, image in enumerate(of_prompt):
                entry: dict[str, Any] = {"caption": prompt, "picture": f"{row:05}-{place:03}.png", "number": place}
                if rankings is not None:
                    kept = rankings[row].kept[place]
                    entry |= {"number": kept.number, "score": kept.score}
                image.save(partial / entry["picture"])
                entries.append(entry)
        write_json(partial / LIST_NAME, entries)


@contextmanager
def show_progress(
    grid: int, images: int, *, given_rows: int = 0, enabled: bool = True, console: Console | None = None
) -> Iterator[Callable[[Progress], None]]:
    """Show how many codes are sampled, by a bar on a terminal, a line now and then elsewhere; gives what to pass as `on_row`.

    Args:
        grid: codes in a row of an image.
        images: how many are to be sampled; should there be more, the total grows with them.
        given_rows: rows of each that are given and not sampled.
        enabled: False says nothing, for processes beside the first.
    """
    console = console or Console(soft_wrap=True)
    codes = done = 0
    total, each = images, grid * (grid - given_rows)
    started = printed = time.monotonic()
    columns = TextColumn("sampling"), BarColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn()
    with Bar(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task("", total=total * each, status="")

        def on_row(progress: Progress) -> None:
            nonlocal codes, done, total, printed
            count, now = len(progress.images), time.monotonic()
            total = max(total, done + count)
            codes += count * grid
            if progress.codes.shape[1] == grid**2:
                done += count
            rate = codes / max(now - started, 1e-9)
            status = f"{done}/{total} images, {rate:,.0f} codes/s"
            bar.update(task, total=total * each, completed=codes, status=status)
            if enabled and not console.is_terminal and now - printed >= SECONDS_BETWEEN_LINES:
                printed = now
                left = max(0, total * each - codes) / rate
                console.print(f"sampling: {status}, {left:.0f} s left", highlight=False)

        yield on_row


@contextmanager
def show_stages(console: Console | None = None) -> Iterator[OnStage]:
    """Show how far each stage of an unCLIP is, as `show_progress` does; gives what to pass as `on_stage`."""
    console = console or Console(soft_wrap=True)
    printed = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    started: dict[str, tuple[TaskID, float]] = {}
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def on_stage(stage: str, done: int, total: int) -> None:
            nonlocal printed
            now = time.monotonic()
            if stage not in started:
                started[stage] = bar.add_task(stage, total=total), now
            task, begun = started[stage]
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and done and now - printed >= SECONDS_BETWEEN_LINES:
                printed = now
                left = (now - begun) / done * (total - done)
                console.print(f"{stage}: {done}/{total}, {left:.0f} s left", highlight=False)

        yield on_stage
