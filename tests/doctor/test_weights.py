"""`launchers/doctor.py weights`: what files are, what they load into, and that nothing in them is run."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from dalle_ds.doctor.weights import check_weights
from dalle_ds.errors import CheckpointError
from dalle_ds.interop import export_clip
from dalle_ds.interop.torch_files import imported_names
from dalle_ds.models import Dalle, DiscreteVAE, Vqgan
from tests.conftest import TINY_DALLE, TINY_DVAE
from tests.interop import programs
from tests.interop.test_openai_dvae import call, release, save
from tests.interop.test_torch_files import ATTACKS_BY_HAND, attacks
from tests.interop.test_vqgan import SHAPE, checkpoint, taming, theirs
from tests.models.test_clip import SMALL, clip


def told(path: Path) -> tuple[str, list[str]]:
    """What is printed, in a line, and the faults."""
    report, faults = check_weights(path)
    output = io.StringIO()
    Console(width=1000, file=output).print(report)
    return " ".join(output.getvalue().replace("│", "").split()), faults


def test_our_own_exports(tmp_path: Path) -> None:
    models = {
        "dvae": DiscreteVAE(TINY_DVAE),
        "vqgan": Vqgan(SHAPE),
        "transformer": Dalle(TINY_DALLE),
        "clip": clip(SMALL),
    }
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
        text, faults = told(tmp_path / kind)
        numbers = sum(value.numel() for value in model.state_dict().values())
        assert f"loads into dalle_ds: {kind}" in text and f"parameters {numbers:,}" in text and not faults
    text, faults = told(tmp_path)
    assert text.count("state sound") == len(models) and not faults


def test_what_others_publish(tmp_path: Path) -> None:
    for file, part in zip(save(tmp_path, release()), ("encoder", "decoder"), strict=True):
        text, faults = told(file)
        assert f"OpenAI's dVAE: {part}" in text and "of float32" in text and not faults
    torch.save({"state_dict": taming(theirs()), "loss.x": torch.ones(1)}, tmp_path / "vqgan.ckpt")
    text, faults = told(tmp_path / "vqgan.ckpt")
    assert "taming's VQModel" in text and "torch.save's zip archive" in text and not faults
    model = clip(replace(SMALL, vision_width=64, vision_heads=1, text_width=64, text_heads=1))
    for format, words in (
        ("openai", "OpenAI's or open_clip's"),
        ("open_clip", "OpenAI's or"),
        ("hf", "Hugging Face's"),
    ):
        export_clip(model, tmp_path / format, format)
        text, faults = told(tmp_path / format)
        assert f"CLIP in {words}" in text and not faults
    shape = {"sample_size": 8, "block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(**shape, **blocks).save_pretrained(tmp_path / "unet")
    text, faults = told(tmp_path / "unet")
    assert "diffusers: UNet2DModel" in text and not faults


def test_files_in_parts(tmp_path: Path, dvae_export: Path) -> None:
    weights = load_file(dvae_export / "model.safetensors")
    names = sorted(weights)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for part, some in parts.items():
        save_file({name: weights[name] for name in some}, tmp_path / part)
    index = {"weight_map": {name: part for part, some in parts.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    text, faults = told(tmp_path)
    assert "index of 2 files" in text and f"{len(weights)} of float32" in text and not faults
    save_file({name: weights[name] for name in names[2::2]}, tmp_path / next(iter(parts)))
    assert next(iter(parts)) in told(tmp_path)[1][0]
    (tmp_path / next(iter(parts))).unlink()
    with pytest.raises(CheckpointError, match=next(iter(parts))):
        check_weights(tmp_path)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = DiscreteVAE(TINY_DVAE)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.blocks.group_2")}
    save_file({**state, "extra": torch.ones(1), "encoder.blocks.input.b": torch.ones(3)}, file)
    faults = told(tmp_path)[1]
    assert [fault.partition(":")[0] for fault in faults] == ["missing", "unexpected", "of another shape"]
    assert "decoder.blocks" in faults[0] and "extra" in faults[1] and "encoder.blocks.input.b" in faults[2]
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["blocks_per_group"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "blocks_per_group=1000000000" in told(tmp_path)[1][0]


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_what_would_be_run_is_named_and_not_run(tmp_path: Path, attack: str, new_format: bool) -> None:
    canary, file = tmp_path / "canary", tmp_path / "model.pt"
    payload, protocol = attacks(canary)[attack]
    torch.save(payload, file, pickle_protocol=protocol, _use_new_zipfile_serialization=new_format)
    names = imported_names(file)
    assert names and any(name in " ".join(told(file)[1]) for name in names)
    if new_format and protocol == 2:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        assert set(found) <= {name.replace("__builtin__", "builtins") for name in names}
    assert not canary.exists()


def test_no_instruction_hides_what_it_names(tmp_path: Path) -> None:
    for attack, code in ATTACKS_BY_HAND.items():
        for write in (programs.write_zip, programs.write_legacy):
            file = write(tmp_path / "f", programs.program(programs.dictionary(w=programs.tensor(), x=code)))
            assert imported_names(file) or b"system" not in code, attack
            assert told(file)[1] or not imported_names(file), attack


def test_pickles_in_parts_and_without_a_protocol_are_looked_at(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for protocol, name in ((0, "f.pt"), (2, "model-1-of-1.bin")):
        (tmp_path / name).write_bytes(pickle.dumps(attacks(canary)["os.system"][0], protocol))
    (tmp_path / "model.bin.index.json").write_text(json.dumps({"weight_map": {"w": "model-1-of-1.bin"}}))
    for name in ("f.pt", "model.bin.index.json"):
        assert "posix.system" in told(tmp_path / name)[1][0]
    assert not canary.exists()


def test_a_name_hides_no_pickle(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    torch.save({"a": torch.nn.Linear(1, 1), "b": Path}, file)  # what is in it counts, not what it is called
    assert any("pathlib" in fault for fault in told(file)[1])


def test_training_programs_classes_are_named(tmp_path: Path) -> None:
    text, faults = told(checkpoint(tmp_path / "last.ckpt", taming(theirs())))
    assert "taming's VQModel" in text and "test_vqgan.Callback" in faults[0]


def test_broken_files_and_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"w": torch.ones(100)}, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**8))
    save_file({"[/bold] \x1b[31mw": torch.ones(2)}, tmp_path / "markup.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "script.pt"))
    words = {"cut.safetensors": "cannot be read", "text.pt": "damaged", "bomb.pt": "compressed archive"}
    for name in (*words, "w.safetensors", "script.pt", "markup.safetensors"):
        assert call("doctor.py", "weights", tmp_path / name, monkeypatch=monkeypatch) == (name in words), name
        assert words.get(name, "sound") in " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "TorchScript" in told(tmp_path / "script.pt")[0]
    assert "[/bold] ?[31mw" in told(tmp_path / "markup.safetensors")[0]
    assert call("doctor.py", "weights", tmp_path / "nowhere", monkeypatch=monkeypatch) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights"):
        check_weights(tmp_path / "empty")
