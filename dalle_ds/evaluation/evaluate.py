"""An evaluation from its options to its result, and the commands of launchers/evaluate.py."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import dalle_ds
from dalle_ds.allocator import keep_freed_memory
from dalle_ds.cli import explain, parse_options
from dalle_ds.config.parallel import WatchConfig
from dalle_ds.data import PairDataset
from dalle_ds.data.dataset import read_info
from dalle_ds.data.filters import FilterOptions
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.candidates import Candidates, kept_precision, texts_sha256
from dalle_ds.evaluation.measure import (
    Context,
    measure_dvae,
    measure_generated,
    measure_likelihood,
    measure_real_matching,
)
from dalle_ds.evaluation.metrics.features import FeatureNetwork, load_network
from dalle_ds.evaluation.metrics.frechet import Appearance, distances
from dalle_ds.evaluation.options import CompareOptions, EvaluateOptions
from dalle_ds.evaluation.results import METHOD, Result, compare, comparison_table, console_table, write_page
from dalle_ds.evaluation.sets import (
    RESIZE,
    GatheredRows,
    ImageFolder,
    choose_captions,
    shard_rows,
    stacked,
    without_overlap,
)
from dalle_ds.files import write_text
from dalle_ds.models import Clip, DiscreteVAE
from dalle_ds.models.pretrained import fingerprint
from dalle_ds.parallel import Mesh
from dalle_ds.precision.rates import DTYPES, choose_precision
from dalle_ds.resilience.watch import Watch
from dalle_ds.sampling import ClipReranker, TextToImage

RESULT_NAME, CAPTIONS_NAME = "result.json", "captions.jsonl"
JUDGED_BY_ITSELF = (
    "The CLIP that chose among candidates also judged them: CLIP score and retrieval grow with n by that alone. Name another "
    "one with --judge."
)


def evaluate(options: EvaluateOptions, mesh: Mesh) -> Result:
    """Measure what the options ask for, and write it to the folder `out`. Collective; the main process writes.

    Raises:
        ConfigError, DataError, CheckpointError: something is missing, or does not belong together.
    """
    out = Path(options.out)
    if mesh.is_main:
        _prepare(out)  # before hours are spent
    if options.transformer is not None:
        pictures = options.pictures
        options = replace(
            options,
            dtype=choose_precision(options.dtype, mesh, lambda: kept_precision(Path(pictures)) if pictures else None),
        )
    if options.real is not None:
        result, context = compare_folders(options, mesh), None
    else:
        result, context = _evaluate_models(options, mesh, out)
    if mesh.is_main:
        write_page(out, result, context.sheets if context is not None else {})
        result.save(out / RESULT_NAME)
    return result


def _evaluate_models(options: EvaluateOptions, mesh: Mesh, out: Path) -> tuple[Result, Context]:
    assert options.data is not None
    dataset = PairDataset.open(options.data, options.split)
    if len(dataset) < 2:
        raise DataError(f"split {options.split} of {options.data} has {len(dataset)} rows, too few to measure anything")
    pipeline = vae = reranker = judge = None
    if options.transformer is not None:
        pipeline = TextToImage.from_pretrained(options.transformer, mesh.device, DTYPES[options.dtype])
    if options.dvae is not None:
        vae = DiscreteVAE.from_pretrained(options.dvae).to(mesh.device)
    if options.clip is not None:
        reranker = _clip(options.clip, mesh)
    if options.judge is not None:
        judge = _clip(options.judge, mesh)
    elif reranker is not None:
        judge = reranker
    seen_by = (vae, pipeline.dvae if pipeline is not None else None, judge)
    size = options.size or next(model.config.image_size for model in seen_by if model is not None)
    generates = pipeline is not None and bool(options.numbers)
    network = load_network(options.inception, mesh.device) if vae is not None or generates else None
    context = Context(
        mesh=mesh,
        dataset=dataset,
        captions=choose_captions(dataset, options.captions, options.seed),
        size=size,
        radii=options.radii,
        network=network,
        kept=without_overlap(options.without, dataset) if options.without is not None else None,
        reference_of_captions=options.reference == "captions",
        judge=judge,
    )
    if generates:
        _check_captions(context)
    models = {"dvae": vae.fingerprint} if vae is not None else {}
    protocol = _protocol(options, context)
    if vae is not None:
        with context.timed("dvae"):
            measure_dvae(context, vae)
    if pipeline is not None:
        weights = fingerprint(pipeline.model.state_dict())
        models |= {"transformer": weights, "tokenizer": pipeline.tokenizer.fingerprint}
        models |= {"transformer_dvae": pipeline.dvae.fingerprint}
        with context.timed("likelihood"):
            measure_likelihood(context, pipeline)
        if options.numbers:
            protocol["generation"] = {
                "best_of": options.numbers,
                "seed": options.seed,
                "sampling": vars(options.sampling),
                "dtype": options.dtype,
                "reference": options.reference,
            }
            protocol["reranker"] = reranker.fingerprint if reranker is not None and max(options.numbers) > 1 else None
            with context.timed("pictures"):
                _measure_generated(options, context, pipeline, reranker, weights, out)
    if judge is not None:
        with context.timed("real images and captions"):
            measure_real_matching(context)
        if generates and judge is reranker and max(options.numbers) > 1:
            context.notes.append(JUDGED_BY_ITSELF)
    return Result(protocol, models, context.metrics, dalle_ds.__version__, context.notes, context.seconds), context


def _measure_generated(
    options: EvaluateOptions, context: Context, pipeline: TextToImage, reranker: Clip | None, weights: str, out: Path
) -> None:
    captions, mesh = [caption.text for caption in context.captions], context.mesh
    folder = Path(options.pictures) if options.pictures is not None else None
    candidates = Candidates(
        pipeline, captions, num=max(options.numbers), sampling=options.sampling, seed=options.seed, folder=folder
    )
    if folder is not None:
        mesh.decide(lambda: candidates.prepare(candidates.protocol(options.dtype, weights)))
    choosing = ClipReranker(reranker) if reranker is not None and max(options.numbers) > 1 else None
    lines = measure_generated(context, pipeline, candidates, options.numbers, choosing)
    if mesh.is_main:
        write_text(out / CAPTIONS_NAME, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _prepare(out: Path) -> None:
    """Make the folder for what is found, or say why it cannot be used."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        writable = os.access(out, os.W_OK)
    except OSError as error:
        raise ConfigError(f"--out {out} must be a folder, and cannot be made: {error.strerror}") from error
    if not writable:
        raise ConfigError(f"--out {out} cannot be written to: name another folder, or change its permissions")


def _check_captions(context: Context) -> None:
    """Refuse too few captions before any image is generated."""
    for name, members in context.of_captions.items():
        if int(members.sum()) < 2:
            where = " without the overlap" if name else ""
            raise DataError(
                f"there are {int(members.sum())} captions{where}, of whose generated images nothing can be said: raise "
                "--captions, or take another split"
            )


def _clip(path: str, mesh: Mesh) -> Clip:
    clip = Clip.from_pretrained(path, mesh.device)
    if clip.tokenizer is None:
        raise ConfigError(f"the CLIP in {path} has no tokenizer, so it cannot read captions: export it with one")
    return clip


def _protocol(options: EvaluateOptions, context: Context) -> dict[str, Any]:
    """How it is measured, but for how images are generated."""
    dataset, captions = context.dataset, context.captions
    overlap = None if context.kept is None else (~context.kept).nonzero()[:, 0].tolist()
    return {
        "method": METHOD,
        "set": {
            "split": dataset.split,
            "fingerprint": dataset.fingerprint,
            "rows": len(dataset),
            **_filtered(options.data),
        },
        "without": None if overlap is None else {"rows": len(overlap), "sha256": texts_sha256(map(str, overlap))},
        "pictures": {"size": context.size, "resize": RESIZE},
        "captions": {
            "number": len(captions),
            "sha256": texts_sha256(caption.text for caption in captions),
            "seed": options.seed,
        },
        "features": context.network.protocol(options.radii) if context.network is not None else None,
        "judge": context.judge.fingerprint if context.judge is not None else None,
    }


def _filtered(data: str | None) -> dict[str, Any]:
    """The filters that the set was prepared with, and how many pairs were dropped for each reason; "unknown" where an older
    preparation does not tell."""
    info = read_info(Path(data or ""))
    try:
        settings, files = info["options"]["filters"], info["options"].get("files", {})
        known = {entry.name for entry in fields(FilterOptions)}
        active = FilterOptions(**{name: value for name, value in settings.items() if name in known}).active
        # Of files their content's digest, not their place.
        filters = {name: files.get(value, value) if isinstance(value, str) else value for name, value in active.items()}
        dropped = {reason: entry["count"] for reason, entry in info["dropped"].items()}
    except (KeyError, TypeError, AttributeError, ConfigError):
        return {"filters": "unknown", "dropped": "unknown"}
    return {"filters": filters or "none", "dropped": dropped or "none"}


def compare_folders(options: EvaluateOptions, mesh: Mesh) -> Result:
    """Distance of the images in `fake` from those in `real`, and score of the former. Collective.

    Raises:
        ConfigError: no size is given, and the images have several.
        DataError: a folder with fewer than two images, or an image that cannot be read.
    """
    assert options.real is not None and options.fake is not None
    real, fake = ImageFolder(options.real), ImageFolder(options.fake)
    size = options.size or _only_size((real, fake))
    network = load_network(options.inception, mesh.device)
    of_real, real_sha256 = _appearance(real, network, options.radii, size, mesh, generated=False)
    of_fake, fake_sha256 = _appearance(fake, network, options.radii, size, mesh, generated=True)
    protocol = {
        "method": METHOD,
        "set": {"fingerprint": real_sha256, "rows": len(real)},
        "pictures": {"size": size, "resize": RESIZE},
        "generated": {"number": len(fake)},
        "features": network.protocol(options.radii),
    }
    notes = real.notes() + fake.notes()
    return Result(protocol, {"pictures": fake_sha256}, distances(of_real, of_fake)[""], dalle_ds.__version__, notes)


def _only_size(folders: Sequence[ImageFolder]) -> int:
    """The side of square images, judged by the first of each folder; where one of the others differs, it is resized."""
    shapes = {folder.read(0)[0].shape[:2] for folder in folders}
    sides = {side for shape in shapes for side in shape}
    if len(sides) > 1:
        raise ConfigError(
            f"the images have sides of {', '.join(map(str, sorted(sides)))} pixels: say with --size at which they are to be "
            "compared"
        )
    return sides.pop()


def _appearance(
    folder: ImageFolder,
    network: FeatureNetwork,
    radii: Sequence[float],
    size: int,
    mesh: Mesh,
    *,
    generated: bool,
) -> tuple[Appearance, str]:
    """Statistics of a folder, and the SHA-256 of its files' contents in the order of their names."""
    every = {"": torch.ones(len(folder), dtype=torch.bool)}
    found = Appearance(network, radii, every, generated=generated)
    digests = GatheredRows(len(folder), (32,), torch.int32)
    for rows in shard_rows(len(folder), mesh, str(folder.folder)):
        images = [folder.read(row, size) for row in rows]
        found.add(rows, stacked([pixels for pixels, _ in images]).to(mesh.device))
        digests.put(rows, torch.tensor([list(digest) for _, digest in images]))
    contents = bytes(digests.gather(mesh).flatten().tolist())
    return found.summed(mesh), hashlib.sha256(contents).hexdigest()


def evaluate_command(arguments: Sequence[str]) -> None:
    """Measure, write, print the figures.

    Raises:
        ConfigError, DataError, CheckpointError: as `evaluate`.
    """
    options = parse_options(EvaluateOptions, arguments)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and (options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())):
        keep_freed_memory()
        _report(options, evaluate(options, Mesh(0, 1, torch.device("cpu"))))  # with no process group, at no cost
        return
    mesh = Mesh.start(options.device)
    with nullcontext() if alone else Watch(mesh, explain, WatchConfig()):
        result = evaluate(options, mesh)
        mesh.barrier()
    mesh.stop()
    if mesh.is_main:
        _report(options, result)


def compare_command(arguments: Sequence[str]) -> None:
    """Print the figures of two results side by side.

    Raises:
        ConfigError: their protocols differ.
        DataError: a file is no result.
    """
    options = parse_options(CompareOptions, arguments)
    one, other = (Result.load(path) for path in options.results)
    figures = compare(one, other, options.allow)
    console = Console(width=None if Console().is_terminal else 140)
    for name in sorted({*one.models, *other.models}):
        before, after = one.models.get(name), other.models.get(name)
        console.print(f"{name}: " + ("the same" if before == after else f"{str(before)[:12]} and {str(after)[:12]}"))
    console.print(comparison_table(figures, options.results))


def _report(options: EvaluateOptions, result: Result) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    console.print(console_table(result))
    for note in result.notes:
        console.print(f"note: {note}")
    console.print(f"wrote {options.out}/result.json and {options.out}/evaluation.html")
