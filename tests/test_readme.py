"""Every command of the README and of the docs is understood; `make test-all` runs the README's as a newcomer would, with fewer
updates."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro
from huggingface_hub import ModelCard
from PIL import Image

from dalle_ds.config import ImageSampling
from dalle_ds.models import Clip, Dalle, DiscreteVAE
from dalle_ds.models.decoder import UnclipDecoder
from dalle_ds.models.latents import EmbeddingScaling
from dalle_ds.models.prior import DiffusionPrior
from dalle_ds.sampling import TextToImage
from dalle_ds.sampling.embedding_to_image import EmbeddingToImage
from dalle_ds.sampling.image_diffusion import DiffusionFacts
from dalle_ds.sampling.text_to_embedding import DiffusionTextToEmbedding
from dalle_ds.text.clip_tokenizer import ClipTokenizer
from dalle_ds.text.tokenizer import Tokenizer
from tests.conftest import ROOT, TINY_DALLE
from tests.tasks.test_clip_task import SHAPE
from tests.tasks.test_prior_tasks import PRIOR
from tests.tasks.test_unclip_tasks import DECODER

README = (ROOT / "README.md").read_text()
FEW = "--steps 2 --report.validation_rows 4 --train.batch_size 4"
HERE = f"READY= VENV={shlex.quote(sys.prefix)}"
DEMO, UNCLIP = (
    " ".join([*(f"{stage}_ARGS={shlex.quote(FEW)}" for stage in stages), HERE])
    for stages in (("DVAE", "TRANSFORMER"), ("PRIOR", "DECODER", "UPSAMPLER"))
)
# What a command gets in addition, so that it ends in seconds; by the words that it contains.
SHORTER = {
    "make demo-clip": f"{DEMO} CLIP_ARGS={shlex.quote(FEW)} EVALUATE_ARGS='--captions 4 --best_of 1,2 --blur 0'",
    "make demo-unclip": f"{UNCLIP} UNCLIP_ARGS='--captions 4 --blur 0 --decoder_steps 2'",
    "make demo": DEMO,
    "make test": f"--dry-run {HERE}",  # this suite
    "train_dvae.py": FEW,
    "train_transformer.py": f"{FEW} --report.preview_every 1000",
    "--prompt": "--num 2",
    "interpolate": "--steps 2 --frames 2",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#") and not line.startswith("source ")]


def documented() -> list[str]:
    """Calls of launchers and benchmarks in all pages, each once, with lines that go on joined; not those cut short by …"""
    pages = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md")]
    found: dict[str, None] = {}
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", "\n".join(pages), re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if re.match(r"(deepspeed .*|python |torchrun .*)(launchers|benchmarks)/\w+\.py", line) and "…" not in line:
                found[line.partition("  #")[0].strip()] = None
    return list(found)


class Understood(BaseException):
    """The command line has been parsed."""


@pytest.mark.parametrize("command", documented())
def test_every_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    (script,) = (n for n, word in enumerate(words) if re.match(r"(launchers|benchmarks)/", word))
    parse = tyro.cli

    def understood(*arguments: Any, **options: Any) -> Any:
        parse(*arguments, **options)
        raise Understood

    monkeypatch.setattr(tyro, "cli", understood)
    monkeypatch.setattr("dalle_ds.training.launch.initial_settings", lambda *_: {})  # of a model that is not there
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / Path(words[script]).parent))
    monkeypatch.setattr(sys, "argv", words[script:])
    with pytest.raises(Understood):
        runpy.run_path(words[script], run_name="__main__")


@pytest.mark.parametrize("target", re.findall(r"^make ([\w-]+)$", README, re.MULTILINE))
def test_every_target_is_there(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target, "READY="], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def shortened(command: str) -> str:
    command = re.sub(r" --num (8|512)", "", command)
    command = command.replace("--keep 8", "--keep 2").replace(
        "--captions 100 --best_of 1,8,64", "--captions 4 --best_of 1,2"
    )
    command = (
        command.replace("deepspeed ", "deepspeed --num_gpus 2 --master_port 29617 ", 1)
        if command.startswith("deepspeed")
        else command
    )
    extra = next((extra for words, extra in SHORTER.items() if words in command), "")
    return f"{command} {extra}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A copy of the repository, by links, with a folder of one's own images."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("Makefile", "launchers", "ds_configs", "dalle_ds", "setup.py", "constraints.txt", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_pictures").symlink_to(corpus)
    return folder


def run(command: str, place: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(place),
    }
    done = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}{done.stderr[-5000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.launch
def test_the_readmes_commands_work_in_their_order(place: Path) -> None:
    assert len(commands()) == 18
    for command in commands():
        run(shortened(command), place)
    for picture in (
        "demo/pictures.png",
        "demo/drawn.png",
        "demo/best.png",
        "demo/completed.png",
        "demo/curves.png",
        "demo/between.gif",
        "my_pictures.png",
    ):
        with Image.open(place / picture) as opened:
            assert min(opened.size) > 100
    assert "<svg" in (place / "demo/report.html").read_text()
    again = run(shortened("make demo"), place)
    assert "demo/dvae is done" in again and "demo/transformer is done" in again


@pytest.mark.slow
@pytest.mark.launch
def test_the_readmes_python_works_after_them(place: Path) -> None:
    pieces = blocks("python")
    assert len(pieces) == 2
    for piece in pieces:
        run(f"{shlex.quote(sys.executable)} -c {shlex.quote(piece)}", place)
    assert (place / "demo/iceland.png").exists()


@pytest.mark.slow
@pytest.mark.launch
def test_the_commands_of_finetuning_work_in_their_order(
    place: Path, dvae_export: Path, tokenizer_file: Path, data: Path
) -> None:
    """From exports of random weights, to images of an adapted transformer and of an unCLIP."""
    tokenizer, dvae = Tokenizer.load(tokenizer_file), DiscreteVAE.from_pretrained(dvae_export)
    TextToImage(Dalle(TINY_DALLE), dvae, tokenizer).save_pretrained(place / "my_transformer")
    clip = Clip(SHAPE, tokenizer=ClipTokenizer.load(tokenizer_file, start=SHAPE.start, end=SHAPE.end)).eval()
    clip.save_pretrained(place / "my_clip")
    prior, decoder = DiffusionPrior(PRIOR).eval(), UnclipDecoder(DECODER).eval()
    scaling = EmbeddingScaling.constant(PRIOR.embed_dim, 4.0)
    DiffusionTextToEmbedding(prior, clip, tokenizer, scaling, "cosine", 100).save_pretrained(place / "my_prior")
    facts = DiffusionFacts("cosine", 100, "v", ImageSampling("ddim", "2"))
    EmbeddingToImage(decoder, tokenizer, None, clip.fingerprint, facts).save_pretrained(place / "my_decoder")
    page = re.sub(r"\\\n\s*", " ", (ROOT / "docs" / "finetuning.md").read_text())
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 8
    few = "--steps 2 --report.validation_rows 4 --loader.workers 0 --lora.rank 2"
    for line in lines:
        run(re.sub(r"--steps 200", few, line).replace("--lora.rank 8 ", ""), place)
    for folder in ("my_style/export", "my_style_prior/export", "my_style_decoder/export", "my_style_unclip", "my_mix"):
        use_as_the_card_says(place / folder)
    with Image.open(place / "my_style.png") as opened:
        assert min(opened.size) > 50


def use_as_the_card_says(folder: Path) -> None:
    """Its lines of Python work; the Hub finds its front matter sound."""
    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "dalle_ds" and str(folder.parent) not in text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    run(f"cd {shlex.quote(str(folder))} && {shlex.quote(sys.executable)} -c {shlex.quote(code)}", folder.parents[0])
