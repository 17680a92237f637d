"""OpenAI's two files become a dVAE that computes what OpenAI's own code computes, and goes wherever a trained one goes."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dall_e
import pytest
import torch
from torch import nn

from dalle_ds.config import TransformerRun
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.interop import import_openai_dvae, load_openai_dvae
from dalle_ds.models import DiscreteVAE
from dalle_ds.tasks.transformer import TransformerTask
from tests.conftest import ROOT, TINY_DALLE

WIDTH, CODES = 16, 96


def release(seed: int = 0, width: int = WIDTH, codes: int = CODES, blocks: int = 2) -> tuple[nn.Module, nn.Module]:
    """OpenAI's modules with random weights, as PyTorch 1.7 would have pickled them."""
    torch.manual_seed(seed)
    encoder = dall_e.Encoder(n_hid=width, vocab_size=codes, n_blk_per_group=blocks)
    decoder = dall_e.Decoder(n_hid=width, vocab_size=codes, n_init=24, n_blk_per_group=blocks)
    for part in (encoder, decoder):
        for name, value in part.named_parameters():
            if name.endswith(".b"):  # which the release initializes with zeros
                nn.init.normal_(value, std=0.1)
    return encoder, decoder


def save(
    folder: Path, parts: tuple[nn.Module, nn.Module], *, new_format: bool = True, whole: bool = True
) -> list[Path]:
    files = [folder / "encoder.pkl", folder / "decoder.pkl"]
    for part, file in zip(parts, files, strict=True):
        torch.save(part if whole else part.state_dict(), file, _use_new_zipfile_serialization=new_format)
    return files


def same_model(ours: DiscreteVAE, encoder: nn.Module, decoder: nn.Module) -> None:
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = encoder(dall_e.map_pixels(images))
        assert torch.allclose(ours.encoder(dall_e.map_pixels(images)), logits, rtol=0, atol=1e-5)
        codes = ours.encode(images)
        top = logits.topk(2, dim=1).values
        assert torch.equal(codes[top[:, 0] - top[:, 1] > 1e-4], logits.argmax(1)[top[:, 0] - top[:, 1] > 1e-4])
        one_hot = nn.functional.one_hot(codes, CODES).permute(0, 3, 1, 2).float()
        wanted = decoder(one_hot)
        assert torch.allclose(ours.decoder(one_hot), wanted, rtol=0, atol=1e-5)
        pictures = dall_e.unmap_pixels(torch.sigmoid(wanted[:, :3]))
        assert torch.allclose(ours.decode(codes), pictures, rtol=0, atol=1e-5)
        assert logits.std() > 0.1 and pictures.std() > 0.01


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("whole", [True, False], ids=["module", "state dict"])
def test_it_computes_what_openais_code_does(tmp_path: Path, new_format: bool, whole: bool) -> None:
    parts = release()
    ours = load_openai_dvae(*save(tmp_path, parts, new_format=new_format, whole=whole), image_size=64)
    assert (ours.config.image_size, ours.config.vocab_size, ours.config.decoder_input) == (64, CODES, 24)
    assert not ours.training and {value.dtype for value in ours.state_dict().values()} == {torch.float32}
    same_model(ours, *parts)


def test_other_depths_and_halves(tmp_path: Path) -> None:
    parts = release(blocks=1)
    same_model(load_openai_dvae(*save(tmp_path, parts)), *parts)
    encoder, decoder = load_openai_dvae(*save(tmp_path, (parts[0].half(), parts[1].half()))).state_dict(), parts[1]
    assert torch.equal(encoder["decoder.blocks.input.w"], decoder.float().state_dict()["blocks.input.w"])


def test_no_class_of_the_files_is_imported(tmp_path: Path) -> None:
    """Nor what PyTorch would import to unpickle them."""
    files = save(tmp_path, release())
    code = f"""
import sys
sys.modules["dall_e"] = None
from dalle_ds.interop import load_openai_dvae
load_openai_dvae({str(files[0])!r}, {str(files[1])!r})
assert not [name for name in sys.modules if name.startswith("dall_e.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def call(launcher: str, *arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [launcher, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "launchers" / launcher), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_launcher_makes_what_the_next_stage_takes(
    tmp_path: Path,
    data: Path,
    tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoder, decoder = parts = release()
    files, out = save(tmp_path, parts), tmp_path / "dvae"
    options = ("--encoder", files[0], "--decoder", files[1], "--out", out, "--image_size", "24")
    assert call("import_dvae.py", *options, monkeypatch=monkeypatch) == 0
    model = DiscreteVAE.from_pretrained(out)
    same_model(model, encoder, decoder)
    printed = capsys.readouterr().out
    assert f"{CODES} codes" in printed and model.fingerprint[:12] in printed
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "source.json"}
    source = json.loads((out / "source.json").read_text())
    assert source["encoder"] == {"file": "encoder.pkl", "sha256": hashlib.sha256(files[0].read_bytes()).hexdigest()}

    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    assert call("prepare_data.py", "--out", copied, "--cache_codes", out, monkeypatch=monkeypatch) == 0
    assert list((copied / "codes").glob(f"{model.fingerprint[:16]}*"))
    shape = replace(TINY_DALLE, grid=3, image_vocab=CODES)
    task = TransformerTask(TransformerRun(data=str(copied), dvae=str(out), tokenizer=str(tokenizer_file), model=shape))
    assert task.dvae.fingerprint == model.fingerprint

    # Once more: what was imported is replaced, and only that.
    assert call("import_dvae.py", *options, monkeypatch=monkeypatch) == 0


def test_nothing_but_an_imported_model_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, out = save(tmp_path, release()), tmp_path / "run"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"weeks of work")
    with pytest.raises(ConfigError, match="is there already"):
        import_openai_dvae(*files, out)
    assert (out / "model.safetensors").read_bytes() == b"weeks of work"


def test_mistakes_are_told_in_a_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = save(tmp_path, release())
    before = sorted(tmp_path.iterdir())
    for encoder, decoder, words in (
        ("/nowhere", files[1], "/nowhere cannot be read"),
        (files[1], files[0], "decoder.pkl is not OpenAI's encoder"),
        (files[0], files[0], "encoder.pkl is not OpenAI's decoder"),
    ):
        options = ("--encoder", encoder, "--decoder", decoder, "--out", tmp_path / "out")
        assert call("import_dvae.py", *options, monkeypatch=monkeypatch) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert words in error
    assert (
        call("import_dvae.py", *options[:3], files[1], *options[4:], "--image_size", "30", monkeypatch=monkeypatch) == 1
    )
    assert "image_size=30 is not a multiple of 8" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    encoder, decoder = release()
    files = save(tmp_path, (encoder, decoder))

    def refused(state: dict[str, torch.Tensor] | nn.Module, words: str, part: int = 0) -> None:
        changed = tmp_path / "changed.pkl"
        torch.save(state, changed)
        chosen = [changed if number == part else file for number, file in enumerate(files)]
        with pytest.raises(CheckpointError, match=words):
            load_openai_dvae(*chosen)

    state = encoder.state_dict()
    refused({name: value for name, value in state.items() if name != "blocks.input.w"}, "blocks.input.w has shape None")
    refused({name: value for name, value in state.items() if "conv_3.b" not in name}, "conv_3.b' has shape None")
    refused({**state, "more": torch.ones(1)}, "'encoder.more' has shape")
    refused({**state, "blocks.input.w": state["blocks.input.w"].long()}, "is of torch.int64")
    refused({**state, "blocks.input.w": torch.empty(0, 3, 7, 7)}, r"blocks.input.w has shape \(0, 3")
    refused({**state, "blocks.input.w": torch.ones(2**17, 3, 7, 7, dtype=torch.float16)}, "do not fit the model")
    refused({**state, "blocks.output.conv.w": torch.ones(1, 128, 1, 1)}, "are of two dVAEs")
    many = {f"blocks.group_1.block_{block}.id_path.b": torch.ones(1) for block in range(65)}
    refused({**state, **many}, "65 blocks in a group")
    refused(release(codes=64)[1].state_dict(), f"has {CODES} codes and .* has 64", part=1)
    refused(release(width=32)[0].blocks, "blocks.input.w has shape None")
    refused(nn.Linear(2, 2), "torch.nn.modules.linear.Linear")
    wide = release(blocks=1)[1]
    refused(wide, "has shape", part=1)
