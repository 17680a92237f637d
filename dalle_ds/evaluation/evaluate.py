"""An evaluation from its options to its result, and the commands of launchers/evaluate.py."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image

import dalle_ds
from dalle_ds.allocator import keep_freed_memory
from dalle_ds.cli import parse_options
from dalle_ds.config import to_dict
from dalle_ds.config.plain import at_least, positive, sound
from dalle_ds.data import PairDataset
from dalle_ds.data.dataset import read_info
from dalle_ds.data.filters import FilterOptions
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation.candidates import Candidates, kept_precision, texts_sha256
from dalle_ds.evaluation.features import FeatureNetwork, load_network
from dalle_ds.evaluation.frechet import Appearance, distances, inception_scores
from dalle_ds.evaluation.measure import (
    Context,
    measure_dvae,
    measure_generated,
    measure_likelihood,
    measure_real_matching,
)
from dalle_ds.evaluation.priors import measure_prior
from dalle_ds.evaluation.results import METHOD, Result, print_result, write_page
from dalle_ds.evaluation.sets import (
    RESIZE,
    GatheredRows,
    ImageFolder,
    choose_captions,
    shard_rows,
    stacked,
    without_overlap,
)
from dalle_ds.evaluation.unclip import (
    UnclipRequest,
    measure_unclip,
    measure_upsamplers,
)
from dalle_ds.files import write_text
from dalle_ds.models import Clip, load_image_tokenizer
from dalle_ds.models.pretrained import fingerprint
from dalle_ds.parallel import Mesh
from dalle_ds.precision.choice import DTYPES, choose_precision
from dalle_ds.resilience.watch import joined
from dalle_ds.sampling import ClipReranker, Sampling, SamplingRequest, TextToImage, Unclip
from dalle_ds.sampling.prior import PriorSampling
from dalle_ds.sampling.text_to_embedding import TextToEmbedding
from dalle_ds.sampling.unclip_options import UnclipOptions

RESULT_NAME, CAPTIONS_NAME = "result.json", "captions.jsonl"
JUDGED_BY_ITSELF = (
    "The CLIP that chose among candidates also judged them: CLIP score and retrieval grow with n by that alone. Name another "
    "one with --judge."
)
JUDGED_BY_THE_STAGES = (
    "The CLIP that the unCLIP's stages were trained with also judged its images: name another one with --judge."
)


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure trained models on a split of prepared data, or generated images against real ones in two folders.

    Every part runs whose model is given: reconstructions and codebook with --dvae; likelihoods and images generated for
    captions with --transformer; caption matching and the choice among candidates with --clip; sampled image embeddings with
    --prior, all of an unCLIP with --unclip. Several processes (deepspeed or torchrun) divide the work, with the same figures.
    """

    out: str
    """Folder for result.json, evaluation.html and images."""
    data: str | None = None
    """Folder that launchers/prepare_data.py made."""
    split: str = "validation"
    """Split of the data to measure on."""
    transformer: str | None = None
    """Run directory or export of a transformer."""
    dvae: str | None = None
    """Run directory or export of a dVAE."""
    clip: str | None = None
    """Run directory or export of a CLIP: chooses among candidates, and judges where there is no --judge."""
    judge: str | None = None
    """A second CLIP, for CLIP score and retrieval, so that candidates are not judged by the model that chose them."""
    prior: str | None = None
    """Run directory or export of a prior: image embeddings that it samples for first captions are held against true ones."""
    unclip: str | None = None
    """Folder of launchers/export_unclip.py: images of true embeddings, the prior's, captions' own and captions alone are held
    against true ones, and upsamplers against resizing."""
    guidances: str = ""
    """Of the unCLIP's decoder, as 1,2,4: what each makes of appearance and match."""
    stages: Annotated[UnclipOptions, tyro.conf.arg(name="")] = field(default_factory=UnclipOptions)
    """How the stages of the unCLIP sample."""
    num: int = 8
    """Samples of the prior for each caption."""
    prior_sampling: PriorSampling = field(default_factory=PriorSampling)
    """How a diffusion prior samples (an autoregressive one takes --temperature and the like). Of each best_of samples, the one
    that is nearest to the caption is measured beside single ones."""
    captions: int | None = 30_000
    """Captions to generate images for: a random choice among the split's different ones, all if there are fewer; None: all."""
    best_of: str = "1"
    """Numbers of candidates, as 1,8,64,512: of the first n of each caption, the one that --clip prefers is measured. Empty
    generates no images."""
    reference: Literal["split", "captions"] = "split"
    """Real images that generated ones are compared with: all of the split, or those of the captions only."""
    inception: str | None = None
    """File pt_inception-2015-12-05-6726825d.pth, by whose features FID and Inception Score are defined (it needs
    torch-fidelity), or a TorchScript archive; without it, an EfficientNet-lite0 is used, and the figures have other names."""
    blur: str = "0,1,2,4,8"
    """Radii of the Gaussian blur of real and generated images before features are taken: standard deviations, pixels."""
    size: int | None = None
    """Side in pixels to which images are resized before they are blurred; None takes that of the models' images."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    """--temperature, --top_k, --top_p, --guidance."""
    seed: int = 0
    """Of the choice of captions and of the images."""
    pictures: str | None = None
    """Folder that keeps the codes of generated images, for an evaluation that is stopped, or another with the same ones."""
    without: str | None = None
    """JSON of rows that overlap with the training data (launchers/overlap.py): figures come with and without them."""
    real: str | None = None
    """Folder of real images, instead of data and models."""
    fake: str | None = None
    """Folder of generated images, to be compared with those in --real."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs where there are any."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the transformer when it samples, and of its likelihoods; auto takes that of the codes in --pictures,
    else what the device computes fastest. Results of different ones are not compared."""

    def __post_init__(self) -> None:
        sound(self)
        positive("evaluation", self, "captions", "size")
        if self.prior is not None:
            at_least(2 * self.prior_sampling.best_of, "evaluation", self, "num")
        _ = self.radii, self.numbers
        if self.unclip is None:
            self.stages.refuse_all("what is measured")
            if self.guidances:
                raise ConfigError(
                    f"guidances={self.guidances} are of an unCLIP: name it with --unclip, or leave them out"
                )
        if any(not 0 <= value < math.inf for value in _numbers("guidances", self.guidances)):
            raise ConfigError(f"guidances must be 0 or greater, as 1,2,4, found {self.guidances!r}")
        if (self.real is None) != (self.fake is None):
            raise ConfigError("--real and --fake belong together: name a folder of real and one of generated images")
        known = ("transformer", "dvae", "clip", "judge", "prior", "unclip")
        models = [name for name in known if getattr(self, name) is not None]
        if self.real is not None:
            if self.data is not None or models:
                raise ConfigError("--real and --fake compare two folders: leave --data and the models out")
        elif self.data is None:
            raise ConfigError(
                "nothing to measure on: name prepared data with --data, or two folders with --real, --fake"
            )
        elif not models:
            raise ConfigError("nothing to measure: give --transformer, --dvae, --clip, --prior, --unclip, or several")
        if self.transformer is not None and max(self.numbers, default=1) > 1 and self.clip is None:
            raise ConfigError(f"--best_of {self.best_of} needs a model that chooses: name one with --clip")

    @property
    def radii(self) -> list[float]:
        """`blur` as numbers, in increasing order."""
        radii = sorted(set(_numbers("blur", self.blur)))
        if not radii or radii[0] < 0 or not all(map(math.isfinite, radii)):
            raise ConfigError(f"blur must be radii of 0 or greater, as 0,1,2, found {self.blur!r}")
        return radii

    @property
    def numbers(self) -> list[int]:
        """`best_of` as numbers, in increasing order."""
        numbers = sorted(set(_numbers("best_of", self.best_of)))
        if any(number < 1 or number != int(number) for number in numbers):
            raise ConfigError(f"best_of must be whole numbers of at least 1, as 1,8,64, found {self.best_of!r}")
        return [int(number) for number in numbers]


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{name} must be numbers with commas between them, found {text!r}") from error


def evaluate(options: EvaluateOptions, mesh: Mesh) -> Result:
    """Measure what the options ask for, and write it to the folder `out`. Collective; the main process writes.

    Raises:
        ConfigError, DataError, CheckpointError: something is missing, or does not belong together.
    """
    out = Path(options.out)
    sheets: dict[str, Image.Image] = {}
    if mesh.is_main:  # before hours are spent
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out} must be a folder, and cannot be made: {error.strerror}") from error
        if not os.access(out, os.W_OK):
            raise ConfigError(f"--out {out} cannot be written to: name another folder, or change its permissions")
    if options.real is not None:
        result = compare_folders(options, mesh)
    else:
        result, sheets = _evaluate_models(options, mesh)
    if mesh.is_main:
        write_page(out, result, sheets)
        result.save(out / RESULT_NAME)
    return result


def _evaluate_models(options: EvaluateOptions, mesh: Mesh) -> tuple[Result, dict[str, Image.Image]]:
    assert options.data is not None
    dataset = PairDataset.open(options.data, options.split)
    if len(dataset) < 2:
        raise DataError(f"split {options.split} of {options.data} has {len(dataset)} rows, too few to measure anything")
    pipeline = None
    transformer, kept = options.transformer, options.pictures
    if transformer is not None:
        dtype = choose_precision(options.dtype, mesh, lambda: kept_precision(Path(kept)) if kept else None)
        options = replace(options, dtype=dtype)
        pipeline = TextToImage.from_pretrained(transformer, mesh.device, DTYPES[dtype])
    vae = load_image_tokenizer(options.dvae).to(mesh.device) if options.dvae is not None else None
    chooser = _clip(options.clip, mesh)
    judge = _clip(options.judge, mesh) or chooser
    prior = TextToEmbedding.from_pretrained(options.prior, mesh.device) if options.prior is not None else None
    unclip = None
    if options.unclip is not None:
        dtype = choose_precision(options.dtype, mesh)
        unclip = Unclip.from_pretrained(options.unclip, mesh.device, DTYPES[dtype], max_memory=options.stages.max_bytes)
        codes = options.sampling if transformer is None else Sampling()  # else they are the transformer's
        how = options.stages.resolved(unclip, codes)
        unclip_request = UnclipRequest(how, _numbers("guidances", options.guidances), options.seed)
    seen_by = (vae, pipeline.dvae if pipeline is not None else None, judge, prior.clip if prior is not None else None)
    sizes = [model.config.image_size for model in seen_by if model is not None]
    generates = pipeline is not None and bool(options.numbers)
    chooses = generates and max(options.numbers) > 1
    context = Context(
        mesh=mesh,
        dataset=dataset,
        captions=choose_captions(dataset, options.captions, options.seed),
        size=options.size or (unclip.image_size if unclip is not None else sizes[0]),
        radii=options.radii,
        network=load_network(options.inception, mesh.device)
        if vae is not None or generates or unclip is not None
        else None,
        kept=without_overlap(options.without, dataset) if options.without is not None else None,
        reference_of_captions=options.reference == "captions",
        judge=judge,
    )
    protocol = _protocol(options, context)
    models: dict[str, str] = {}
    if generates or unclip is not None:
        _check_captions(context)
    if generates:
        protocol["generation"] = {
            "best_of": options.numbers,
            "seed": options.seed,
            "sampling": vars(options.sampling),
            "dtype": options.dtype,
            "reference": options.reference,
        }
        protocol["reranker"] = chooser.fingerprint if chooser is not None and chooses else None
    if vae is not None:
        models["dvae"] = vae.fingerprint
        with context.timed("dvae"):
            measure_dvae(context, vae)
    if pipeline is not None:
        models |= {
            "transformer": fingerprint(pipeline.model.state_dict()),
            "tokenizer": pipeline.tokenizer.fingerprint,
            "transformer_dvae": pipeline.dvae.fingerprint,
        }
        with context.timed("likelihood"):
            measure_likelihood(context, pipeline)
        if generates:
            with context.timed("pictures"):
                _measure_generated(options, context, pipeline, chooser if chooses else None, models["transformer"])
    if judge is not None:
        with context.timed("real images and captions"):
            measure_real_matching(context)
        if chooses and judge is chooser:
            context.notes.append(JUDGED_BY_ITSELF)
    if prior is not None:
        sampling = _prior_sampling(options, prior)
        protocol["prior"] = {"clip": prior.clip.fingerprint, "num": options.num, "seed": options.seed}
        protocol["prior"] |= {"best_of": options.prior_sampling.best_of, "sampling": vars(sampling)}
        models["prior"] = fingerprint(prior.prior.state_dict())
        with context.timed("prior"):
            measure_prior(context, prior, options.num, options.seed, sampling, options.prior_sampling.best_of)
    if unclip is not None:
        protocol["unclip"] = {"clip": unclip.clip.fingerprint, "seed": options.seed, "dtype": dtype}
        protocol["unclip"] |= {"guidances": options.guidances, "sampling": to_dict(unclip_request.sampling)}
        models |= unclip.fingerprints()
        if judge is not None and judge.fingerprint == unclip.clip.fingerprint:
            context.notes.append(JUDGED_BY_THE_STAGES)
        with context.timed("unclip"):
            measure_unclip(context, unclip, unclip_request)
        with context.timed("upsamplers"):
            measure_upsamplers(context, unclip, unclip_request)
    result = Result(protocol, models, context.metrics, dalle_ds.__version__, context.notes, context.seconds)
    return result, context.sheets


def _measure_generated(
    options: EvaluateOptions, context: Context, pipeline: TextToImage, chooser: Clip | None, weights: str
) -> None:
    request = SamplingRequest(max(options.numbers), options.seed, options.sampling)
    folder = Path(options.pictures) if options.pictures is not None else None
    candidates = Candidates(pipeline, [caption.text for caption in context.captions], request, folder)
    context.mesh.decide(lambda: candidates.prepare(options.dtype, weights))
    reranker = ClipReranker(chooser) if chooser is not None else None
    lines = measure_generated(context, pipeline, candidates, options.numbers, reranker)
    if context.mesh.is_main:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(Path(options.out) / CAPTIONS_NAME, text)


def _prior_sampling(options: EvaluateOptions, prior: TextToEmbedding[Any, Any]) -> PriorSampling | Sampling:
    """Of single samples, by the options that the prior's kind has."""
    if prior.kind == "diffusion":
        given = options.prior_sampling
        if given == PriorSampling(best_of=given.best_of):  # the export's, where nothing else is said
            given = prior.sampling  # type: ignore[attr-defined]
        return prior.resolved(replace(given, best_of=1))
    return options.sampling


def _check_captions(context: Context) -> None:
    """Refuse too few captions before any image is generated."""
    for name, members in context.of_captions.items():
        if int(members.sum()) < 2:
            where = " without the overlap" if name else ""
            raise DataError(
                f"there are {int(members.sum())} captions{where}, of whose generated images nothing can be said: raise "
                "--captions, or take another split"
            )


def _clip(path: str | None, mesh: Mesh) -> Clip | None:
    if path is None:
        return None
    clip = Clip.from_pretrained(path, mesh.device)
    if clip.tokenizer is None:
        raise ConfigError(f"the CLIP in {path} has no tokenizer, so it cannot read captions: export it with one")
    return clip


def _protocol(options: EvaluateOptions, context: Context) -> dict[str, Any]:
    """How it is measured, but for how images are generated."""
    dataset, captions = context.dataset, context.captions
    overlap = None if context.kept is None else (~context.kept).nonzero()[:, 0].tolist()
    of_set = {"split": dataset.split, "fingerprint": dataset.fingerprint, "rows": len(dataset)}
    return {
        "method": METHOD,
        "set": of_set | _filtered(options.data or ""),
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


def _filtered(data: str) -> dict[str, Any]:
    """The filters that the set was prepared with, and how many pairs were dropped for each reason; "unknown" where an older
    preparation does not tell."""
    info = read_info(Path(data))
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


# --- two folders


def compare_folders(options: EvaluateOptions, mesh: Mesh) -> Result:
    """Distance of the images in `fake` from those in `real`, and score of the former. Collective.

    Raises:
        ConfigError: no size is given, and the images have several.
        DataError: a folder with fewer than two images, or an image that cannot be read.
    """
    assert options.real is not None and options.fake is not None
    real, fake = ImageFolder(options.real), ImageFolder(options.fake)
    # By the first image of each folder; where one of the others differs, it is resized.
    sides = {side for folder in (real, fake) for side in folder.read(0)[0].shape[:2]}
    if options.size is None and len(sides) > 1:
        raise ConfigError(
            f"the images have sides of {', '.join(map(str, sorted(sides)))} pixels: say with --size at which they are to be "
            "compared"
        )
    size = options.size or sides.pop()
    network = load_network(options.inception, mesh.device)
    of_real, real_sha256 = _appearance(real, network, options.radii, size, mesh)
    of_fake, fake_sha256 = _appearance(fake, network, options.radii, size, mesh)
    protocol = {
        "method": METHOD,
        "set": {"fingerprint": real_sha256, "rows": len(real)},
        "pictures": {"size": size, "resize": RESIZE},
        "generated": {"number": len(fake)},
        "features": network.protocol(options.radii),
    }
    metrics = distances(of_real, of_fake)[""] | inception_scores(of_fake)[""]
    return Result(protocol, {"pictures": fake_sha256}, metrics, dalle_ds.__version__, real.notes + fake.notes)


def _appearance(
    folder: ImageFolder, network: FeatureNetwork, radii: Sequence[float], size: int, mesh: Mesh
) -> tuple[Appearance, str]:
    """Statistics of a folder, and the SHA-256 of its files' contents in the order of their names."""
    found = Appearance(network, radii, {"": torch.ones(len(folder), dtype=torch.bool)})
    digests = GatheredRows(len(folder), (32,), torch.int32)
    for rows in shard_rows(len(folder), mesh, str(folder.folder)):
        images = [folder.read(row, size) for row in rows]
        found.add(rows, stacked([pixels for pixels, _ in images]).to(mesh.device))
        digests.put(rows, torch.tensor([list(digest) for _, digest in images]))
    contents = bytes(digests.gather(mesh).flatten().tolist())
    return found.summed(mesh), hashlib.sha256(contents).hexdigest()


# --- commands


def evaluate_command(arguments: Sequence[str]) -> None:
    """Measure, write, print the figures.

    Raises:
        ConfigError, DataError, CheckpointError: as `evaluate`.
    """
    options = parse_options(EvaluateOptions, arguments)
    with joined(options.device) as mesh:
        if mesh.world_size == 1 and mesh.device.type == "cpu":
            keep_freed_memory()
        result = evaluate(options, mesh)
    if mesh.is_main:
        print_result(result)
        print(f"wrote {options.out}/result.json and {options.out}/evaluation.html")
