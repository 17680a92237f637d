"""Text to images, and the launcher, with tiny untrained models of the real classes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.config import DalleConfig, DiscreteVAEConfig
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.dvae import DiscreteVAE
from dalle_ds.sampling import SamplingRequest, TextToImage, sample_codes
from dalle_ds.text.tokenizer import Tokenizer
from tests.processes import run_ranks

ROOT = Path(__file__).parents[2]


def small_dvae(**changes: int) -> DiscreteVAE:
    shape = {
        "image_size": 16,
        "groups": 3,
        "encoder_width": 8,
        "decoder_width": 8,
        "decoder_input": 8,
        "vocab_size": 32,
    }
    torch.manual_seed(1)
    return DiscreteVAE(DiscreteVAEConfig(**{**shape, **changes}))


def small_transformer(tokenizer: Tokenizer) -> Dalle:
    torch.manual_seed(2)
    shape = {"width": 32, "depth": 2, "heads": 2, "text_len": 12, "grid": 4, "image_vocab": 32}
    model = Dalle(DalleConfig(**shape, text_vocab=tokenizer.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.train(["a red cat", "a blue dog", "two red dogs"] * 20, path, vocab_size=300)
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def run_directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    small_transformer(tokenizer).save_pretrained(run / "export")
    small_dvae().save_pretrained(run / "export" / "dvae")
    Tokenizer.train(
        ["a red cat", "a blue dog", "two red dogs"] * 20, run / "export" / "tokenizer.model", vocab_size=300
    )
    return run


@pytest.fixture(scope="module")
def pipe(run_directory: Path) -> TextToImage:
    return TextToImage.from_pretrained(run_directory)


def same(left: list[Image.Image], right: list[Image.Image]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_one_list_of_pictures_per_prompt(pipe: TextToImage) -> None:
    pictures = pipe.generate(["a red cat", "a blue dog"], num=3)
    assert [len(row) for row in pictures] == [3, 3]
    assert {(picture.mode, picture.size) for row in pictures for picture in row} == {("RGB", (16, 16))}
    assert len(pipe.generate("a red cat", num=2)) == 1


def test_pictures_depend_on_seed_number_and_prompt_only(pipe: TextToImage) -> None:
    both = pipe.generate(["a red cat", "a blue dog"], num=5, seed=3, batch_size=4)
    assert same(pipe.generate("a blue dog", num=2, seed=3, batch_size=1)[0], both[1][:2])
    assert same(pipe.generate(["a blue dog", "a red cat"], num=5, seed=3)[1], both[0])
    assert not same(pipe.generate("a blue dog", num=5, seed=4)[0], both[1])


def test_pixels_are_those_of_the_dvae(pipe: TextToImage) -> None:
    codes = sample_codes(pipe.model, pipe.encode(["a red cat"]), SamplingRequest(num=2, seed=3))
    expected = pipe.dvae.decode(codes.view(2, 4, 4)).permute(0, 2, 3, 1).numpy() * 255
    found = np.stack([np.asarray(picture) for picture in pipe.generate("a red cat", num=2, seed=3)[0]])
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 0.501


def test_rerank_sorts_best_first(pipe: TextToImage) -> None:
    plain = pipe.generate(["a red cat", "a blue dog"], num=4)
    asked: list[tuple[str, int]] = []

    def brightness(prompt: str, images: list[Image.Image]) -> list[float]:
        asked.append((prompt, len(images)))
        return [float(np.asarray(image).mean()) for image in images]

    sorted_rows = pipe.generate(["a red cat", "a blue dog"], num=4, rerank=brightness)
    assert asked == [("a red cat", 4), ("a blue dog", 4)]
    for row, sorted_row in zip(plain, sorted_rows, strict=True):
        assert same(sorted_row, sorted(row, key=lambda image: -np.asarray(image).mean()))
    with pytest.raises(DataError, match="found 1 for 4"):
        pipe.generate("a red cat", num=4, rerank=lambda prompt, images: [0.0])
    with pytest.raises(DataError, match="not a number"):
        pipe.generate("a red cat", num=1, rerank=lambda prompt, images: [float("nan")])


def test_a_prompt_that_is_cut_is_said_aloud(pipe: TextToImage) -> None:
    with pytest.warns(UserWarning, match="longer than 12 tokens.*two red dogs two red dogs"):
        pipe.generate(["a cat", "two red dogs two red dogs " * 3], num=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.generate("a cat", num=1)


def test_arguments_are_checked(pipe: TextToImage) -> None:
    with pytest.raises(ConfigError, match="top_p"):
        pipe.generate("a cat", top_p=2.0)
    with pytest.raises(DataError, match="no prompt"):
        pipe.generate([])


def test_parts_that_do_not_belong_together_are_refused(tokenizer: Tokenizer) -> None:
    model = small_transformer(tokenizer)
    with pytest.raises(CheckpointError, match=r"dVAE has a vocabulary of 64, .* 32"):
        TextToImage(model, small_dvae(vocab_size=64), tokenizer)
    with pytest.raises(CheckpointError, match=r"code grid of side 8, .* 4"):
        TextToImage(model, small_dvae(image_size=32), tokenizer)
    shape = {"width": 32, "depth": 1, "heads": 2, "text_len": 12, "grid": 4, "image_vocab": 32}
    count = tokenizer.vocab_size
    TextToImage(
        Dalle(DalleConfig(**shape, text_vocab=count + 1)), small_dvae(), tokenizer
    )  # room to spare does no harm
    with pytest.raises(CheckpointError, match=f"tokenizer has a vocabulary of {count}, .* {count - 1}"):
        TextToImage(Dalle(DalleConfig(**shape, text_vocab=count - 1)), small_dvae(), tokenizer)


def test_missing_parts_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small_transformer(tokenizer).save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        TextToImage.from_pretrained(tmp_path / "bare")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            TextToImage.from_pretrained(tmp_path / "bare", device="cuda")


@pytest.mark.parametrize("room", [60_000, 120_000])
def test_layers_in_the_file_draw_the_same_pictures(run_directory: Path, pipe: TextToImage, room: int) -> None:
    """Weights that have no room in memory are read from the export whenever they are used."""
    expected = pipe.generate(["a red cat", "two red dogs"], num=3, seed=1, guidance=2.0)
    spread = TextToImage.from_pretrained(run_directory, device="auto", max_memory={"cpu": room})
    places = spread.model.hf_device_map
    held = sum(parameter.nbytes for parameter in spread.model.parameters() if not parameter.is_meta)
    assert "disk" in places.values()
    assert held <= room
    assert (held > 0) == (room == 120_000)
    assert all(name.count(".") <= 1 for name in places if name.startswith("blocks"))  # no block is split
    assert spread.device == torch.device("cpu")
    found = spread.generate(["a red cat", "two red dogs"], num=3, seed=1, guidance=2.0)
    assert all(same(row, expected_row) for row, expected_row in zip(found, expected, strict=True))


def test_a_model_that_fits_is_spread_over_one_device(run_directory: Path, pipe: TextToImage) -> None:
    whole = TextToImage.from_pretrained(run_directory, device="auto")
    assert same(whole.generate("a cat", num=2)[0], pipe.generate("a cat", num=2)[0])


@pytest.mark.parametrize("blocks_on_first", [3, 4])
def test_two_devices_hand_over(blocks_on_first: int) -> None:
    """Between two layers, or within one. In a process of its own, which gets devices of no substance."""
    command = [sys.executable, "-m", "tests.sampling.two_devices", str(blocks_on_first)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_spread_model_is_not_written(run_directory: Path, tmp_path: Path) -> None:
    spread = TextToImage.from_pretrained(run_directory, device="auto", max_memory={"cpu": 60_000})
    with pytest.raises(CheckpointError, match="copy the folder"):
        spread.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device": "banana"}, "banana"),
        ({"device": "meta"}, "meta"),
        ({"dtype": torch.int64}, "int64"),
        ({"device": "auto", "max_memory": {"cpu": "lots"}}, "lots"),
    ],
)
def test_places_and_dtypes_that_do_not_exist_are_named(run_directory: Path, options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TextToImage.from_pretrained(run_directory, **options)


def test_spreading_says_what_it_needs(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs device=auto, found device=cpu"):
        TextToImage.from_pretrained(run_directory, max_memory={"cpu": 60_000})
    with pytest.raises(CheckpointError, match="'dvae' model"):
        TextToImage.from_pretrained(run_directory / "export" / "dvae", device="auto")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match=r"dalle-ds\[large\]"):
        TextToImage.from_pretrained(run_directory, device="auto")


def test_many_pictures_are_reranked_in_batches_that_fit(pipe: TextToImage) -> None:
    rows = pipe.generate("a red cat", num=512, rerank=lambda _, images: [float(np.asarray(x).mean()) for x in images])
    means = [float(np.asarray(image).mean()) for image in rows[0]]
    assert len(means) == 512
    assert means == sorted(means, reverse=True)


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_ranks("launchers/generate.py", *arguments)


def test_launcher_writes_a_labelled_grid(run_directory: Path, tmp_path: Path, pipe: TextToImage) -> None:
    out = tmp_path / "cats.png"
    arguments = ["--model", str(run_directory), "--prompt", "a red cat", "--prompt", "a blue dog", "--out", str(out)]
    arguments += ["--dtype", "fp32"]
    done = launch(*arguments, "--num", "2", "--seed", "7", "--top_k", "9", "--temperature", "0.9", "--guidance", "2")
    assert done.returncode == 0, done.stderr
    sheet = np.asarray(Image.open(out))
    expected = pipe.generate(["a red cat", "a blue dog"], num=2, seed=7, top_k=9, temperature=0.9, guidance=2.0)
    cells = [sheet[top : top + 128, left : left + 128] for top in (12, 152) for left in (204, 344)]
    for cell, picture in zip(cells, [picture for row in expected for picture in row], strict=True):
        assert np.array_equal(cell, np.asarray(picture).repeat(8, axis=0).repeat(8, axis=1))
    assert [file.name for file in tmp_path.iterdir()] == ["cats.png"]


def test_launcher_says_what_is_wrong_in_one_line(run_directory: Path, tmp_path: Path) -> None:
    for model, extra, named in (
        (tmp_path / "absent", [], "no model at"),
        (run_directory, ["--device", "cuda"], "no GPU"),
        (run_directory, ["--top_p", "7"], "top_p"),
    ):
        done = launch("--model", str(model), "--prompt", "a cat", "--out", str(tmp_path / "x.png"), *extra)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert named in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
