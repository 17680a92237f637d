"""The commands: `dalle NAME`, `python -m dalle_ds NAME` or `launchers/NAME.py`; each a function without arguments.

What a command needs is imported when it is called, and mostly once its options are read: `--help` and mistakes in them are
quick.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dalle_ds.cli import own_arguments, parse_options
from dalle_ds.errors import ConfigError

# --- data and tokenizer


def prepare_data() -> None:
    """Prepare a corpus for training, cache image codes or embeddings of prepared data, or several of these.

    python launchers/prepare_data.py --corpus twemoji --out DIR, or --corpus folder --source PICTURES --out DIR; docs/data.md
    tells of other corpora, of parts that several jobs do, and of embeddings, which several processes share.
    """
    from rich import print

    from dalle_ds.data.command import Preparation, run

    for report in run(parse_options(Preparation)):
        print(report)


@dataclass(frozen=True)
class TokenizerOptions:
    """Train the byte-pair encoding of captions (DALL·E §2.2)."""

    data: tuple[str, ...]
    """Folders that launchers/prepare_data.py made; the captions of their train splits are used."""
    out: str
    """Model file to write, in sentencepiece's format."""
    vocab_size: int | None = None
    """Most pieces in the vocabulary; None takes the preset's, or 16,384 without one. A small corpus supports fewer."""
    preset: str | None = None
    """Preset whose tokenizer section gives vocab_size."""


def train_tokenizer() -> None:
    """Train the text tokenizer on the captions of a prepared data's train split."""
    from dalle_ds.config import load_preset
    from dalle_ds.text.tokenizer import Tokenizer, TokenizerConfig

    options = parse_options(TokenizerOptions)
    config = load_preset(options.preset, "tokenizer", TokenizerConfig) if options.preset else TokenizerConfig()
    if options.vocab_size is not None:
        config = TokenizerConfig(options.vocab_size)
    from dalle_ds.data.dataset import PairDataset
    from dalle_ds.data.faults import FaultLog

    faults = FaultLog()
    corpora = [PairDataset.open(folder, "train") for folder in options.data]
    captions = (caption for pairs in corpora for caption in pairs.all_captions(faults))
    report = Tokenizer.train(captions, options.out, config.vocab_size)
    print(f"{options.out}: {report}")
    if left_out := faults.left_out():
        print(left_out)


# --- training: deepspeed launchers/train_STAGE.py --deepspeed_config FILE --preset NAME --data DIR --run_dir DIR …


def train_dvae() -> None:
    """Train the discrete VAE."""
    _train("dvae")


def train_transformer() -> None:
    """Train the text-image transformer, on cached or live image codes."""
    _train("transformer")


def train_clip() -> None:
    """Train CLIP, from random weights or from those of another one."""
    _train("clip")


def train_prior() -> None:
    """Train a prior of CLIP's image embeddings, on cached embeddings: --kind diffusion (the default) or autoregressive."""
    kind = _choice("kind", ["diffusion", "autoregressive"], "diffusion")
    _train("prior" if kind == "diffusion" else "latent_prior")


def train_decoder() -> None:
    """Train unCLIP's decoder, on images and their cached embeddings."""
    _train("decoder")


def train_upsampler() -> None:
    """Train an upsampler: --stage 64-256 (the first, a preset's section upsampler_1) or 256-1024 (the second)."""
    sections = {"64-256": "upsampler_1", "256-1024": "upsampler_2"}
    _train(sections[_choice("stage", list(sections), None)])


def _choice(name: str, choices: list[str], default: str | None) -> str:
    """Take --NAME out of the command line, which decides what its other options are."""
    import argparse

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument(f"--{name}", choices=choices, default=default)
    try:
        known, sys.argv[1:] = first.parse_known_args(sys.argv[1:])
    except argparse.ArgumentError as error:
        raise ConfigError(f"--{name}: {error.message}") from error
    found = getattr(known, name) or (choices[0] if {"-h", "--help"} & set(sys.argv) else None)
    if found is None:
        raise ConfigError(f"--{name} is missing: give one of {', '.join(choices)}")
    return str(found)


def _train(section: str) -> None:
    from dalle_ds.planning.check import check_plan
    from dalle_ds.tasks.stages import SECTIONS, STAGES
    from dalle_ds.training.launch import train

    train(*STAGES[SECTIONS[section]], section, check_plan)


def plan() -> None:
    """Plan a run on a cluster: parameters, bytes by kind and moment, traffic by axis, projected time; or rank all layouts.

    python launchers/plan.py --preset dalle-12b --cluster h100-80gb --gpus 64 --deepspeed_config ds_configs/zero3_bf16.json
    python launchers/plan.py --preset dalle-12b --cluster h100-80gb --gpus 64 --search True
    python launchers/plan.py --preset dalle-12b --stage clip --cluster h100-80gb --gpus 256
    """
    from rich.console import Console

    from dalle_ds.files import write_json
    from dalle_ds.planning.command import parse_plan_command
    from dalle_ds.planning.plan import make_plan, search
    from dalle_ds.planning.report import found_tables, plan_tables

    command = parse_plan_command()
    given = (command.task, command.deepspeed, command.cluster, command.device)
    figures: dict[str, Any]
    if command.search:
        found = search(*given)
        tables, figures = found_tables(found), found.to_dict()
    else:
        plan = make_plan(*given)
        tables, figures = plan_tables(plan), plan.to_dict()
    Console(width=130).print(tables)
    if command.json is not None:
        write_json(command.json, figures)


@dataclass(frozen=True)
class CurvesOptions:
    """Draw the curves of a run's metrics.jsonl."""

    run_dir: str
    """Run directory."""
    out: str
    """Image to write; its name ends in .png, .svg or .pdf."""


def curves() -> None:
    """Plot how a run is doing, while it goes on or after: loss, gradient norm, learning rate, gradient scales."""
    options = parse_options(CurvesOptions)
    if Path(options.out).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--out {options.out} must end in .png, .svg or .pdf")
    from dalle_ds.evaluation.curves import NUMERICS, curves_figure, panels_of, read_metrics

    figure = curves_figure(panels_of(read_metrics(options.run_dir), NUMERICS), columns=2)
    figure.savefig(options.out, dpi=150)
    print(f"wrote {options.out}")


@dataclass(frozen=True)
class CheckpointOptions:
    """Tell what a checkpoint holds, whether it is whole, and where it can be resumed; status 1 where it is broken."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or a run directory, whose newest one is taken."""


@dataclass(frozen=True)
class WeightsOptions:
    """Tell what weights are, what they load into, and what opening them would run; status 1 where they are broken or would."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A file or folder of weights, a run directory's export or what others published."""


def doctor() -> None:
    """Look at what a run has left behind, at weights, prepared data, or what runs would be on, and say whether it is sound."""
    from rich.console import Console

    from dalle_ds.doctor.environment import EnvOptions, describe_environment

    console = Console(width=None if sys.stdout.isatty() else 127)
    if own_arguments() == ["env"]:  # before anything is imported that may be missing
        console.print(describe_environment())
        return
    from dalle_ds.doctor.cluster import ClusterOptions, check_cluster
    from dalle_ds.doctor.data import DataOptions, inspect_data

    checkpoint = Annotated[CheckpointOptions, tyro.conf.subcommand("checkpoint")]
    cluster = Annotated[ClusterOptions, tyro.conf.subcommand("cluster")]
    data = Annotated[DataOptions, tyro.conf.subcommand("data")]
    env = Annotated[EnvOptions, tyro.conf.subcommand("env")]
    weights = Annotated[WeightsOptions, tyro.conf.subcommand("weights")]
    options = parse_options(
        checkpoint | cluster | data | env | weights,  # type: ignore[arg-type]
        description=inspect.getdoc(doctor),
    )
    if isinstance(options, ClusterOptions):
        report, faults = check_cluster(options)
    elif isinstance(options, DataOptions):
        data_inspection = inspect_data(options)
        report, faults = data_inspection.report(), data_inspection.faults
    elif isinstance(options, WeightsOptions):
        from dalle_ds.doctor.weights import check_weights

        report, faults = check_weights(Path(options.path))
    else:
        from dalle_ds.doctor.checkpoint import check_checkpoint

        report, faults = check_checkpoint(Path(options.path))
    if report is not None:
        console.print(report)
    if faults:
        sys.exit(1)


# --- what has been trained


def generate() -> None:
    """Generate images for prompts with a trained model, or change images, and write them as one labelled PNG.

    python launchers/generate.py --model RUN_OR_EXPORT --prompt TEXT --out PNG, with --num 512 --rerank CLIP for the best of
    many; with deepspeed or torchrun, for a transformer divided among GPUs. The same as generate.py text …; of images begin
    complete (of a DALL·E: the rest of one) and vary, interpolate, edit, inpaint, probe (of an unCLIP): docs/manipulations.md.
    """
    from dalle_ds.allocator import keep_freed_memory
    from dalle_ds.sampling.command import GenerateOptions, generate_to_file
    from dalle_ds.sampling.manipulation_command import SUBCOMMANDS, Manipulation

    arguments = own_arguments()
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "text"
    known = ["text", "complete", *SUBCOMMANDS]
    if name not in known:
        raise ConfigError(f"generate.py has no subcommand {name!r}: take one of {', '.join(known)}")
    kind: type[GenerateOptions | Manipulation] = SUBCOMMANDS.get(name, GenerateOptions)
    options = parse_options(kind, arguments, description=None if name in SUBCOMMANDS else inspect.getdoc(generate))
    if options.device == "cpu":
        keep_freed_memory()
    if not isinstance(options, GenerateOptions):
        options.check()
        options.run()
        print(f"wrote {options.out}")
        return
    if name == "complete" and options.init_image is None:
        raise ConfigError("generate.py complete needs the image whose rest it samples: give --init_image FILE")
    for path in generate_to_file(options):
        print(f"wrote {path}")


@dataclass(frozen=True)
class ReportOptions:
    """Generate images for captions of the data, and put them with figures and loss curves on one page."""

    data: str
    """Folder that launchers/prepare_data.py made."""
    dvae: str
    """Run directory of the dVAE."""
    transformer: str
    """Run directory of the transformer."""
    out: str
    """Folder for pictures.png and report.html."""
    num: int = 4
    """Samples per caption."""
    seed: int = 0
    """Seed of the samples."""


def report() -> None:
    """Show a finished dVAE and transformer: OUT/pictures.png and OUT/report.html."""
    options = parse_options(ReportOptions)
    from dalle_ds.evaluation.report import write_report

    figures = write_report(
        options.data, options.dvae, options.transformer, options.out, num=options.num, seed=options.seed
    )
    for name, value in figures.items():
        print(f"{name:24} {value:.3f}")
    print(f"wrote {options.out}/pictures.png and {options.out}/report.html")


def evaluate() -> None:
    """Measure trained models, or compare what two evaluations found.

    python launchers/evaluate.py --data DIR --dvae DIR --transformer DIR --clip DIR --best_of 1,8,64 --out DIR
    python launchers/evaluate.py --data DIR --prior DIR --out DIR
    python launchers/evaluate.py --real DIR --fake DIR --out DIR
    python launchers/evaluate.py compare A/result.json B/result.json

    Several processes share the work: deepspeed launchers/evaluate.py with the same options, or torchrun.
    """
    from dalle_ds.evaluation.evaluate import evaluate_command
    from dalle_ds.evaluation.results import compare_command

    if sys.argv[1:2] == ["compare"]:
        compare_command(sys.argv[2:])
    else:
        evaluate_command(sys.argv[1:])


def overlap() -> None:
    """Find validation images that are in the training data, and show them: OUT/neighbours.jsonl, pairs.html, overlap.json."""
    from dalle_ds.evaluation.overlap import OverlapOptions, find_overlap

    find_overlap(parse_options(OverlapOptions))


def study() -> None:
    """A study of human preference between two models' images: pages for voters, and the count of what they save.

    python launchers/study.py make --a DIR --b DIR --out STUDY
    python launchers/study.py count votes-*.json --study STUDY
    """
    from rich.console import Console

    from dalle_ds.evaluation import study as human

    make = Annotated[human.MakeOptions, tyro.conf.subcommand("make")]
    count = Annotated[human.CountOptions, tyro.conf.subcommand("count")]
    options = parse_options(make | count, description=inspect.getdoc(study))  # type: ignore[arg-type]
    if isinstance(options, human.MakeOptions):
        key = human.make_study(options)
        print(
            f"wrote {options.out}: {len(key['pairs'])} pairs; give each page in pages/ to 5 voters, and key.json to none"
        )
    else:
        Console(width=None if sys.stdout.isatty() else 127).print(human.report(human.count_study(options)))


# --- models into files and out of them


@dataclass(frozen=True)
class ExportOptions:
    """Write the exported model of any checkpoint that a run still has."""

    run_dir: str
    """Run directory of launchers/train_dvae.py or train_transformer.py; the run may be going on."""
    step: int | None = None
    """Checkpoint, by the updates it has had; None takes the newest."""
    weights: Literal["average", "raw"] | None = None
    """`average` of the weights or `raw` ones; None takes the average if the run has one, as training does."""
    out: str | None = None
    """Folder to write, or to replace; None takes RUN_DIR/export."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights that are written."""


def export() -> None:
    """Export a model from a checkpoint, as training does at its end: one process, one tensor in memory at a time."""
    options = parse_options(ExportOptions)
    from dalle_ds.training.export import export_checkpoint

    folder, step = export_checkpoint(
        options.run_dir, step=options.step, weights=options.weights, out=options.out, dtype=options.dtype
    )
    print(f"exported step {step} to {folder}")


@dataclass(frozen=True)
class MergeAdaptersOptions:
    """Merge low-rank adapters into the model that they were trained on, one or several at once."""

    model: str
    """Its run directory or export."""
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """Run with lora.rank, or its folder adapter, and after a colon a weight, `RUN:0.7`; 1 where there is none. May be given
    again: what they add to the weights is summed."""
    out: str
    """New folder to write."""


def merge_adapters() -> None:
    """Merge low-rank adapters into their model: --model BASE --adapter A:0.7 --adapter B:0.5 --out DIR."""
    options = parse_options(MergeAdaptersOptions)
    from dalle_ds.training import export

    folder = export.merge_adapters(options.model, [_weighted(text) for text in options.adapter], options.out)
    print(f"merged {len(options.adapter)} into {folder}")


def _weighted(text: str) -> tuple[str, float]:
    """ "PATH:0.7" or "PATH", as a path and a weight."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:  # a path with a colon
        return text, 1.0


@dataclass(frozen=True)
class ExportClipOptions:
    """Write a CLIP, trained or imported, in the layout of another program."""

    model: str
    """Its run directory or export."""
    format: Literal["openai", "hf", "open_clip"]
    """Whose layout: openai is a state dict for clip/model.py, hf a folder of transformers, open_clip one of open_clip."""
    out: str
    """New folder to write."""


def export_clip() -> None:
    """Export a CLIP for other programs: OpenAI's clip, Hugging Face's transformers, open_clip."""
    options = parse_options(ExportClipOptions)
    from dalle_ds import interop
    from dalle_ds.models import Clip
    from dalle_ds.text.clip_tokenizer import BytePairs

    model = Clip.from_pretrained(options.model)
    interop.export_clip(model, options.out, options.format)
    print(f"{options.out}: fingerprint {model.fingerprint[:12]}, in the layout of {options.format}")
    if model.tokenizer is not None and not isinstance(model.tokenizer.pieces, BytePairs):
        print("its tokenizer is one of sentencepiece, which programs for CLIP do not know: make tokens with dalle_ds")


@dataclass(frozen=True)
class ExportUnclipOptions:
    """Put prior, decoder and upsamplers into one folder, which launchers/generate.py takes as --model, or `diffusers` runs."""

    out: str
    """Folder to write, or to replace; for diffusers a new one."""
    decoder: str | None = None
    """Run directory or export of launchers/train_decoder.py."""
    prior: str | None = None
    """Run directory or export of launchers/train_prior.py; without one, captions' embeddings stand in for images'."""
    upsampler: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Run directory or export of launchers/train_upsampler.py; given again, the one after it."""
    clip: str | None = None
    """The CLIP that they were trained with, where there is no prior, which has it."""
    model: str | None = None
    """Folder that has all of them, in their place."""
    format: Literal["dalle_ds", "diffusers"] = "dalle_ds"
    """diffusers: for its UnCLIPPipeline and UnCLIPImageVariationPipeline, which know models with model.text=karlo only."""


def export_unclip() -> None:
    """Put the stages of an unCLIP, trained one by one, into one folder; or write it for diffusers."""
    options = parse_options(ExportUnclipOptions)
    out = Path(options.out)
    from dalle_ds.files import write_text
    from dalle_ds.models.card import CARD_NAME, append_card
    from dalle_ds.models.pretrained import export_folder
    from dalle_ds.sampling.unclip import Unclip, is_unclip

    if out.exists() and not is_unclip(out) and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already, and no unCLIP: name a new folder")
    if (options.decoder is None) == (options.model is None):
        raise ConfigError("give --decoder, with the other stages, or --model, which has all")
    if options.model is not None and (options.prior or options.upsampler or options.clip):
        raise ConfigError("--model has all stages: leave out --prior, --upsampler and --clip")
    if options.decoder is None:
        pipe = Unclip.from_pretrained(str(options.model))
        folders = {name: Path(str(options.model)) / name for name in pipe.stages}
    else:
        pipe = Unclip.from_runs(options.decoder, options.prior, options.upsampler, options.clip)
        paths = [*([options.prior] if options.prior else []), options.decoder, *options.upsampler]
        folders = {name: export_folder(path) for name, path in zip(pipe.stages, paths, strict=True)}
    # Read before anything is written: out may be the model's own folder.
    cards = {
        name: card.read_text(encoding="utf-8")
        for name, folder in folders.items()
        if (card := folder / CARD_NAME).is_file()
    }
    if options.format == "diffusers":
        from dalle_ds.interop import export_karlo

        export_karlo(pipe, out)
        # Beside its networks, which have another layout now, they would tell how to load what is not there.
        for name, text in cards.items():
            append_card(out, name, text)
    else:
        pipe.save_pretrained(out)
        for name, text in cards.items():
            write_text(out / name / CARD_NAME, text)
    print(f"{out}: {', '.join(pipe.stages)}; images of {pipe.image_size} pixels")


@dataclass(frozen=True)
class ImportClipOptions:
    """Make an exported CLIP, as launchers/train_clip.py does, of OpenAI's, Hugging Face's or open_clip's files."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """OpenAI's file, such as ViT-B-32.pt, a training program's checkpoint, or a folder of a Hugging Face CLIPModel or of
    open_clip."""
    out: str
    """Folder to write; give it as --clip to other launchers."""
    format: Literal["auto", "openai", "hf", "open_clip"] = "auto"
    """Whose layout it has; auto goes by the names of files, and takes a file with no configuration beside for OpenAI's."""
    tokenizer: str | None = None
    """Its tokenizer: bpe_simple_vocab_16e6.txt.gz for OpenAI's models. None takes the one in the folder, if any."""
    activation: Literal["quick_gelu", "gelu"] | None = None
    """Of the MLPs. None takes what the folder says, and quick_gelu for a single file, as OpenAI's models have; one of
    open_clip's needs gelu, unless its model's name says quickgelu."""


def import_clip() -> None:
    """Import a CLIP that others published: its file or folder becomes an exported model, with none of its code run."""
    options = parse_options(ImportClipOptions)
    from dalle_ds import interop

    model = interop.import_clip(
        options.source, options.out, options.format, tokenizer=options.tokenizer, activation=options.activation
    )
    config = model.config
    print(
        f"{options.out}: a CLIP of {config.image_size}-pixel images in patches of {config.patch_size}, {config.embed_dim} "
        f"dimensions, {config.activation}, fingerprint {model.fingerprint[:12]}"
    )
    if model.tokenizer is None:
        print("it has no tokenizer, and can embed images but no captions: give --tokenizer")


@dataclass(frozen=True)
class ImportUnclipOptions:
    """Make an unCLIP, as launchers/export_unclip.py does, of one in diffusers' layout, such as Karlo, or of Kakao's files."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """Folder of diffusers' UnCLIPPipeline or UnCLIPImageVariationPipeline, or of Kakao's checkpoints (.ckpt) and CLIP."""
    out: str
    """New folder to write; give it as --model to launchers/generate.py."""
    clip: str | None = None
    """The same CLIP, as launchers/import_clip.py makes it, where the folder has none; or only the text tower, as text-to-image
    folders of diffusers do, which is not enough to train on."""


def import_unclip() -> None:
    """Import an unCLIP that others published, such as Karlo, with none of its code run."""
    options = parse_options(ImportUnclipOptions)
    from dalle_ds.interop import import_karlo

    pipe = import_karlo(options.source, options.out, clip=options.clip)
    print(f"{options.out}: an unCLIP of {pipe.image_size}-pixel images, {'with' if pipe.prior else 'without'} a prior")
    if not pipe.clip.config.vision_depth:
        print("its CLIP has no image tower, and can embed captions but no images: give --clip to train on it")


@dataclass(frozen=True)
class ImportDvaeOptions:
    """Make an exported dVAE, as launchers/train_dvae.py does, of the two files that OpenAI published, or of a VQGAN."""

    out: str
    """Folder to write; give it as --dvae to other launchers."""
    encoder: str | None = None
    """OpenAI's encoder.pkl."""
    decoder: str | None = None
    """OpenAI's decoder.pkl."""
    vqgan: str | None = None
    """Instead of both, a checkpoint of taming-transformers' VQModel or GumbelVQ."""
    image_size: int = 256
    """Side in pixels of the square images that it is used for; OpenAI's codes have an eighth of it on each side."""


def import_dvae() -> None:
    """Import the dVAE that OpenAI released, encoder.pkl and decoder.pkl, or a VQGAN, with none of their code run."""
    options = parse_options(ImportDvaeOptions)
    from dalle_ds.interop import import_openai_dvae, import_vqgan

    model: Any
    if options.vqgan is not None and options.encoder is None and options.decoder is None:
        model = import_vqgan(options.vqgan, options.out, options.image_size)
    elif options.vqgan is None and options.encoder is not None and options.decoder is not None:
        model = import_openai_dvae(options.encoder, options.decoder, options.out, options.image_size)
    else:
        raise ConfigError("give --encoder and --decoder for OpenAI's dVAE, or --vqgan alone")
    codes, grid = model.config.vocab_size, model.config.grid
    print(f"{options.out}: {grid}×{grid} of {codes:,} codes, fingerprint {model.fingerprint[:12]}")


COMMANDS: dict[str, Callable[[], None]] = {
    command.__name__: command
    for command in (
        curves, doctor, evaluate, export, export_clip, export_unclip, generate, import_clip, import_dvae, import_unclip,
        merge_adapters, overlap, plan, prepare_data, report, study, train_clip, train_decoder, train_dvae, train_prior,
        train_tokenizer, train_transformer, train_upsampler,
    )
}  # fmt: skip
