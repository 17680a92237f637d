"""taming-transformers' checkpoints become a VQGAN that computes what `diffusers`' VQModel does, and stands in for the dVAE."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle_ds.config import VqganConfig
from dalle_ds.errors import CheckpointError, ConfigError, DataError
from dalle_ds.interop import import_vqgan, load_openai_dvae, load_vqgan
from dalle_ds.models import Dalle, DiscreteVAE, Vqgan, load_image_tokenizer
from tests.conftest import ROOT
from tests.interop.test_openai_dvae import call, release, save
from tests.interop.test_torch_files import Payload
from tests.processes import run_ranks

CODES, SIZE = 48, 16
SHAPE = VqganConfig(
    image_size=SIZE, width=32, multipliers=(1, 1, 2), blocks_per_level=1, attention_levels=(1, 2), latent_channels=8,
    embed_dim=6, vocab_size=CODES,
)  # fmt: skip
# diffusers' names, as its conversion of latent diffusion's autoencoders has them, and taming's.
NAMES = (
    (r"\.(down|up)_blocks\.", r".\1."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.mid_block\.resnets\.0", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def theirs() -> VQModel:
    """Of `SHAPE`, with random weights."""
    torch.manual_seed(0)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32, 64),
        latent_channels=8,
        vq_embed_dim=6,
        num_vq_embeddings=CODES,
    )
    for value in model.parameters():
        nn.init.normal_(value, std=0.1 if value.ndim > 1 else 0.5)
    nn.init.normal_(model.decoder.conv_out.weight, std=0.03)
    with torch.no_grad():  # codes where the latents of images are, so that many are used
        found = model.encode(torch.rand(3, 3, SIZE, SIZE)).latents.permute(0, 2, 3, 1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(found)
    return model.eval()


def taming(model: VQModel) -> dict[str, Tensor]:
    """Its state dict in taming's layout, where the decoder's levels are numbered as the encoder's are."""
    state = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\.up\.(\d)", lambda found: f".up.{2 - int(found[1])}", name)
        state[name] = value[..., None, None] if re.search(r"\.(q|k|v|proj_out)\.weight", name) else value
    return state


class Callback:
    """Lightning's checkpoints have classes among their keys."""


def checkpoint(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """As Lightning writes it."""
    loss = {
        f"loss.{name}": torch.ones(2) for name in ("discriminator.main.0.weight", "perceptual_loss.lin0.model.1.weight")
    }
    content = {
        "epoch": 3,
        "state_dict": {**state, **loss},
        "callbacks": {Callback: {"best": 1.0}},
        "optimizer_states": [],
    }
    torch.save({**content, **more}, path)
    return path


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("container", ["lightning", "state dict", "safetensors"])
def test_it_computes_what_diffusers_code_does(tmp_path: Path, images: Tensor, container: str) -> None:
    reference = theirs()
    file = tmp_path / "vqgan.ckpt"
    if container == "lightning":
        checkpoint(file, taming(reference))
    elif container == "state dict":
        torch.save(taming(reference), file)
    else:
        file = file.with_suffix(".safetensors")
        save_file({name: value.contiguous() for name, value in taming(reference).items()}, file)
    ours = load_vqgan(file, image_size=SIZE)
    assert ours.config == SHAPE and ours.config.grid == 4 and not ours.training
    with torch.no_grad():
        latents = reference.encode(2 * images - 1).latents
        found = ours.quant_conv(ours.encoder(2 * images - 1))
        assert torch.allclose(found, latents, rtol=0, atol=1e-5 * float(latents.abs().max()))
        _, _, (_, _, indices) = reference.quantize(latents)
        codes = ours.encode(images)
        assert torch.equal(codes, indices.view(3, 4, 8)) and len(codes.unique()) > 4
        wanted = reference.decode(latents).sample
        assert torch.allclose(ours.decode(codes), ((wanted + 1) / 2).clamp(0, 1), rtol=0, atol=1e-5)
        assert float(ours.decode(codes).std()) > 0.05


def test_gumbel_vq_chooses_the_likeliest_code(tmp_path: Path, images: Tensor) -> None:
    reference, state = theirs(), taming(theirs())
    torch.manual_seed(2)
    del state["quantize.embedding.weight"]
    sizes = {"quantize.proj": CODES, "quant_conv": 8, "post_quant_conv": 8}
    for name, size in sizes.items():
        state |= {f"{name}.weight": torch.randn(size, 8, 1, 1), f"{name}.bias": torch.randn(size)}
    embed = state["quantize.embed.weight"] = torch.randn(CODES, 8)

    def convolved(name: str, x: Tensor) -> Tensor:
        return torch.einsum("oi,b...i->b...o", state[f"{name}.weight"][:, :, 0, 0], x) + state[f"{name}.bias"]

    ours = load_vqgan(checkpoint(tmp_path / "last.ckpt", state), image_size=SIZE)
    assert ours.config.gumbel
    with torch.no_grad():
        codes = ours.encode(images)
        latents = reference.encoder(2 * images - 1).permute(0, 2, 3, 1)
        assert torch.equal(codes, convolved("quantize.proj", convolved("quant_conv", latents)).argmax(dim=-1))
        assert len(codes.unique()) > 1
        wanted = reference.decoder(convolved("post_quant_conv", embed[codes]).permute(0, 3, 1, 2))
        assert torch.allclose(ours.decode(codes), ((wanted + 1) / 2).clamp(0, 1), rtol=0, atol=1e-5)


def test_an_export_is_read_back_by_its_kind(tmp_path: Path, dvae_export: Path) -> None:
    file = checkpoint(tmp_path / "last.ckpt", taming(theirs()))
    model = import_vqgan(file, tmp_path / "vqgan", image_size=SIZE)
    again = load_image_tokenizer(tmp_path / "vqgan")
    assert isinstance(again, Vqgan) and again.fingerprint == model.fingerprint
    assert isinstance(load_image_tokenizer(dvae_export), DiscreteVAE)
    source = json.loads((tmp_path / "vqgan" / "source.json").read_text())
    assert source == {"vqgan": {"file": "last.ckpt", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}}
    with pytest.raises(CheckpointError, match="'vqgan' model where a 'dvae'"):
        DiscreteVAE.from_pretrained(tmp_path / "vqgan")
    with pytest.raises(DataError, match="multiples of 4"):
        model.encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(DataError, match=rf"\[0, {CODES}\)"):
        model.decode(torch.tensor([[[CODES]]]))


@pytest.mark.launch
def test_a_transformer_trains_on_its_codes_and_generates(
    tmp_path: Path,
    data: Path,
    tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint(tmp_path / "last.ckpt", taming(theirs()))
    vqgan, copied, run = tmp_path / "vqgan", tmp_path / "data", tmp_path / "run"
    options = ("--vqgan", tmp_path / "last.ckpt", "--out", vqgan, "--image_size", SIZE)
    assert call("import_dvae.py", *options, monkeypatch=monkeypatch) == 0
    model = Vqgan.from_pretrained(vqgan)
    printed = capsys.readouterr().out
    assert "4×4" in printed and f"{CODES} codes" in printed and model.fingerprint[:12] in printed
    shutil.copytree(data, copied)
    assert call("prepare_data.py", "--out", copied, "--cache_codes", vqgan, monkeypatch=monkeypatch) == 0
    shape = f"--model.width 32 --model.depth 2 --model.heads 2 --model.text_len 8 --model.grid 4 --model.image_vocab {CODES}"
    done = run_ranks(
        *("launchers/train_transformer.py", "--deepspeed_config", ROOT / "ds_configs" / "zero1_fp32.json"),
        *("--preset", "toy", "--data", copied, "--dvae", vqgan, "--tokenizer", tokenizer_file, "--run_dir", run),
        *("--steps", 2, "--save_every", 2, "--train.batch_size", 4, "--report.validation_rows", 4, *shape.split()),
        processes=1,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "codes: cached" in done.stdout
    assert Dalle.from_pretrained(run / "export").config.image_vocab == CODES
    out = tmp_path / "evaluation"
    options = ("--data", copied, "--transformer", run, "--out", out, "--captions", "4", "--blur", "0")
    assert call("evaluate.py", *options, monkeypatch=monkeypatch) == 0
    figures = json.loads((out / "result.json").read_text())["metrics"]
    assert "likelihood/codes_bits_per_dimension" in figures and "likelihood/bits_per_dimension" not in figures
    png = tmp_path / "out.png"
    options = ("--model", run, "--prompt", "a red circle", "--num", "2", "--out", png)
    assert call("generate.py", *options, monkeypatch=monkeypatch) == 0
    assert Image.open(png).width > 2 * SIZE


# --- files that are something else ------------------------------------------------------------------------------------


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    state, file = taming(theirs()), tmp_path / "last.ckpt"

    def refused(changes: dict[str, Tensor | None], words: str) -> None:
        changed = {name: value for name, value in {**state, **changes}.items() if value is not None}
        with pytest.raises(CheckpointError, match=words) as error:
            load_vqgan(checkpoint(file, changed))
        assert str(error.value).startswith(str(file)) or f"in {file} do" in str(error.value)

    refused({"encoder.conv_in.weight": None}, r"encoder\.conv_in\.weight has shape None")
    refused({"encoder.conv_in.weight": torch.ones(32, 1, 3, 3)}, r"conv_in\.weight' has shape \(32, 1")
    refused({"encoder.conv_in.weight": torch.empty(0, 3, 3, 3)}, r"conv_in\.weight has shape \(0,")
    refused({"quant_conv.weight": torch.ones(6, 16, 1, 1)}, "do not fit the model")  # what double_z has
    refused({"decoder.up.1.attn.0.q.weight": None}, r"decoder\.up\.1\.attn\.0\.q\.weight' has shape None")
    refused({"more": torch.ones(1)}, "'more' has shape")
    refused({"quantize.embedding.weight": None}, r"quantize\.embedding\.weight has shape None")
    refused({"quantize.embedding.weight": torch.ones(CODES, 6).long()}, r"is of torch\.int64")
    refused({"encoder.conv_in.weight": torch.ones(33, 3, 3, 3)}, "multiple of 32")
    refused(
        {f"encoder.down.{level}.block.0.conv1.weight": torch.ones(32, 32, 3, 3) for level in range(17)}, "17 levels"
    )
    refused({"other.encoder.conv_in.weight": torch.ones(32, 3, 3, 3)}, "several models")
    with pytest.raises(ConfigError, match="image_size=18 is not a multiple of 4"):
        load_vqgan(checkpoint(file, state), image_size=18)


def test_a_dvae_and_a_vqgan_in_each_others_place(tmp_path: Path) -> None:
    files = save(tmp_path, release(), whole=False)
    vqgan = checkpoint(tmp_path / "last.ckpt", taming(theirs()))
    torch.save(taming(theirs()), plain := tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"encoder\.pkl is no VQGAN"):
        load_vqgan(files[0])
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt is damaged, or asks for what is not trusted|neither a module nor"
    ):
        load_openai_dvae(vqgan, files[1])
    with pytest.raises(CheckpointError, match=r"plain\.pt is not OpenAI's encoder"):
        load_openai_dvae(plain, files[1])


def test_nothing_of_a_malicious_checkpoint_is_run_and_damage_is_told(tmp_path: Path) -> None:
    canary, state = tmp_path / "canary", taming(theirs())
    file = checkpoint(tmp_path / "last.ckpt", state, hyper_parameters=Payload(os.system, f"touch {canary}"))
    torch.load(file, weights_only=False)
    assert canary.exists(), "the attack itself works"
    canary.unlink()
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        load_vqgan(file)
    assert not canary.exists()
    whole = checkpoint(tmp_path / "whole.ckpt", state).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**8))
    for name in ("cut.ckpt", "cut.safetensors", "bomb.ckpt", "nowhere.ckpt"):
        with pytest.raises(CheckpointError, match=re.escape(name)):
            import_vqgan(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_launcher_takes_one_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ((), ("--encoder", "e"), ("--encoder", "e", "--decoder", "d", "--vqgan", "v")):
        assert call("import_dvae.py", *options, "--out", tmp_path / "out", monkeypatch=monkeypatch) == 1
        assert "--vqgan" in capsys.readouterr().err
