"""CLIPs go from OpenAI's, Hugging Face's and open_clip's files to ours and back, and compute the same everywhere."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.config import ClipConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.interop import export_clip, import_clip, load_clip, load_tensors
from dalle_ds.interop.clip_layouts import to_openai
from dalle_ds.models import Clip
from dalle_ds.text.clip_tokenizer import BytePairs, ClipTokenizer
from tests.conftest import ROOT
from tests.interop.programs import call, dictionary, name, program, tensor, text, write_zip
from tests.models.test_clip import SMALL, WIDE, captions, clip, openai_clip, pictures, standardized, transformers_clip
from tests.references import reference
from tests.text.test_clip_tokenizer import CLIPS_FILE

TOLERANCE = 1e-5
FORMATS = ("openai", "hf", "open_clip")
GELU = replace(WIDE, activation="gelu", vision_heads=4, image_mean=(0.5, 0.4, 0.3), end_token=7)
FULL = replace(SMALL, text_len=16, text_vocab=49_408)
MERGES = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
"""Of a vocabulary of CLIP's kind that is quickly read."""


@pytest.fixture
def merges_file(tmp_path: Path) -> Path:
    file = tmp_path / "few-merges.txt"
    BytePairs(MERGES).save(file)
    return file


def same(model: Clip, other: Clip) -> None:
    assert other.config == model.config
    weights, found = model.state_dict(), other.state_dict()
    assert set(found) == set(weights)
    for key, value in weights.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@torch.no_grad()
def equal(model: Clip, image: Callable[[Tensor], Tensor], caption: Callable[[Tensor], Tensor]) -> None:
    """Embeddings of someone else's functions on standardized images and on tokens padded with zeros."""
    config = model.config
    wanted = image(standardized(config, pictures(config)))
    assert (model.embed_images(pictures(config), normalize=False) - wanted).abs().max() < TOLERANCE
    wanted = caption(captions(config, padding=0))
    assert (model.embed_texts(captions(config), normalize=False) - wanted).abs().max() < TOLERANCE


# --- there and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("config", [SMALL, GELU], ids=["openai's", "gelu"])
def test_there_and_back_is_exact(tmp_path: Path, format: Any, config: ClipConfig) -> None:
    model = clip(config)
    if format == "openai" and config == GELU:
        with pytest.raises(ConfigError, match="the model's activation is gelu"):
            export_clip(model, tmp_path / "theirs", format)
        assert not (tmp_path / "theirs").exists()
        return
    export_clip(model, tmp_path / "theirs", format)
    same(model, load_clip(tmp_path / "theirs"))
    with pytest.raises(ConfigError, match="is there already"):
        export_clip(model, tmp_path / "theirs", format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_tokenizer_comes_along(
    tmp_path: Path, tokenizer_file: Path, merges_file: Path, format: Any, kind: str
) -> None:
    file = merges_file if kind == "bytes" else tokenizer_file
    tokenizer = ClipTokenizer.load(file)
    model = clip(replace(SMALL, text_vocab=tokenizer.pieces.vocab_size + 2), tokenizer=tokenizer)
    export_clip(model, tmp_path / "theirs", format)
    again = import_clip(tmp_path / "theirs", tmp_path / "ours", format)
    assert again.tokenizer is not None and again.tokenizer.fingerprint == tokenizer.fingerprint
    again = Clip.from_pretrained(tmp_path / "ours")
    assert again.fingerprint == model.fingerprint
    # Imported again in its place, and given another tokenizer.
    import_clip(tmp_path / "theirs", tmp_path / "ours", tokenizer=file)
    assert Clip.from_pretrained(tmp_path / "ours").fingerprint == model.fingerprint
    source = json.loads((tmp_path / "ours" / "source.json").read_text())
    assert set(source) == {"file", "sha256"} and (tmp_path / "theirs" / source["file"]).is_file()


# --- what others write ---------------------------------------------------------------------------------------------------


def openai_file(model: Clip, path: Path, writing: str) -> None:
    theirs = openai_clip(model)
    # As OpenAI's archives hold them.
    numbers = {"input_resolution": model.config.image_size, "context_length": model.config.text_len, "vocab_size": 0}
    if writing == "safetensors":
        save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, path)
    elif writing == "torchscript":
        for key, number in numbers.items():
            vars(theirs).pop(key, None)
            theirs.register_buffer(key, torch.tensor(number))
        example = standardized(model.config, pictures(model.config)), captions(model.config, 0)[:3]
        inputs = {"forward": example, "encode_image": example[0], "encode_text": example[1]}
        with torch.no_grad():
            torch.jit.save(torch.jit.trace_module(theirs, inputs, check_trace=False), str(path))
    else:
        state = {**theirs.state_dict(), **{key: torch.tensor(number) for key, number in numbers.items()}}
        torch.save(state, path, _use_new_zipfile_serialization=writing == "zip")


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Converting a tensor")
@pytest.mark.parametrize("writing", ["zip", "legacy", "safetensors", "torchscript"])
def test_openais_files_are_read(tmp_path: Path, writing: str) -> None:
    model = clip(SMALL)
    file = tmp_path / ("clip.safetensors" if writing == "safetensors" else "ViT.pt")
    openai_file(model, file, writing)
    found = load_clip(file)
    same(model, found)
    theirs = openai_clip(model)
    equal(found, theirs.encode_image, theirs.encode_text)
    # The layout does not say which; open_clip's files of weights alone look the same.
    assert load_clip(file, activation="gelu").config == replace(SMALL, activation="gelu")


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Converting a tensor")
def test_code_in_openais_archives_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = clip(SMALL)
    openai_file(model, tmp_path / "ViT.pt", "torchscript")
    with zipfile.ZipFile(tmp_path / "ViT.pt") as source, zipfile.ZipFile(tmp_path / "broken.pt", "w") as target:
        for entry in source.infolist():
            code = "/code/" in entry.filename or entry.filename.endswith("constants.pkl")
            target.writestr(entry.filename, b"raise SystemExit" if code else source.read(entry))
    with pytest.raises(RuntimeError):
        torch.jit.load(str(tmp_path / "broken.pt"))
    same(model, load_clip(tmp_path / "broken.pt"))
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        load_tensors(tmp_path / "broken.pt")
    # A class of the archive's own is inert, and no name of Python's is one.
    state = dictionary(w=tensor(), inner=name("__torch__.os", "system") + b")\x81" + dictionary(v=tensor()) + b"b")
    content = program(name("__torch__", "Net") + b")\x81" + state + b"b")
    entries = {"data/0": bytes(24), "constants.pkl": b""}
    found = load_tensors(write_zip(tmp_path / "f", content, entries), None)
    assert set(found) == {"w", "inner.v"}
    functions = [("__torch__", "system"), ("torch.jit._pickle", "build_intlist"), ("builtins", "eval")]
    for function in functions:
        content = program(name("__torch__", "Net") + b")\x81" + dictionary(w=tensor(), x=call(name(*function))) + b"b")
        assert set(load_tensors(write_zip(tmp_path / "f", content, entries), None)) == {"w"}
    for function in (("os", "system"), ("os", "x" * 100_000), ("os", "\x1b[2J")):
        content = program(call(name(*function), text("touch canary")))
        with pytest.raises(CheckpointError, match="not trusted") as error:
            load_tensors(write_zip(tmp_path / "f", content, entries), None)
        assert len(str(error.value)) < 500 and str(error.value).isprintable()
    assert not Path("canary").exists()


@pytest.mark.parametrize("writing", ["model.safetensors", "pytorch_model.bin", "before 2023"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_faces_folders_are_read(tmp_path: Path, writing: str, activation: str) -> None:
    config = replace(SMALL, activation=activation)
    model = clip(config)
    legacy = writing == "before 2023"
    theirs = transformers_clip(model, **({"eos_token_id": 2, "bos_token_id": 0} if legacy else {}))
    theirs.save_pretrained(tmp_path / "hf")
    if writing != "model.safetensors":
        (tmp_path / "hf" / "model.safetensors").unlink()
        numbers = {f"{part}_model.embeddings.position_ids": torch.arange(5)[None] for part in ("text", "vision")}
        torch.save({**theirs.state_dict(), **(numbers if legacy else {})}, tmp_path / "hf" / "pytorch_model.bin")
    found = load_clip(tmp_path / "hf")
    same(model, found)
    equal(
        found,
        lambda pixels: theirs.get_image_features(pixels).pooler_output,
        lambda tokens: theirs.get_text_features(tokens).pooler_output,
    )


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("writing", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clips_folders_are_read(tmp_path: Path, writing: str, custom: bool) -> None:
    module = reference("open_clip")
    torch.manual_seed(5)
    fields: dict[str, Any] = {
        "embed_dim": 24,
        "quick_gelu": custom,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 96, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4, "layers": 1},
    }
    if custom:  # whose end token is 2 if nothing else is said
        fields["text_cfg"]["pool_type"] = "eos"
    theirs = (module.CustomTextCLIP if custom else module.CLIP)(**fields).eval()
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.3, 0.4, 0.5]}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**fields, "custom_text": custom}, "preprocess_cfg": preprocess})
    )
    weights = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    if writing.endswith("bin"):
        torch.save(weights, tmp_path / writing)
    else:
        save_file(weights, tmp_path / writing)
    found = load_clip(tmp_path)
    assert found.config.activation == ("quick_gelu" if custom else "gelu")
    assert (found.config.vision_heads, found.config.image_std) == (3, (0.3, 0.4, 0.5))
    assert found.config.end == (2 if custom else 99)
    equal(found, theirs.encode_image, theirs.encode_text)
    with pytest.raises(ConfigError, match="leave it out"):
        load_clip(tmp_path, activation="gelu" if custom else "quick_gelu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_16_bits_are_read_in_32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = clip(SMALL)
    half = {key: value.to(dtype) for key, value in to_openai(model.state_dict(), SMALL).items()}
    torch.save(half, tmp_path / "half.pt")
    found = load_clip(tmp_path / "half.pt").state_dict()
    for key, value in model.state_dict().items():
        assert found[key].dtype == torch.float32 and torch.equal(found[key], value.to(dtype).float())


# --- what others read ----------------------------------------------------------------------------------------------------


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    tokenizer = ClipTokenizer.load(CLIPS_FILE)
    model = clip(replace(FULL, activation="gelu", image_std=(0.5, 0.4, 0.3)), tokenizer=tokenizer)
    export_clip(model, tmp_path / "hf", "hf")
    theirs, processor = CLIPModel.from_pretrained(tmp_path / "hf"), CLIPProcessor.from_pretrained(tmp_path / "hf")
    assert sum(value.numel() for value in theirs.parameters()) == sum(value.numel() for value in model.parameters())
    words = ["a photo of a cat", "It's 12 red circles, isn't it?", "a flag " * 30]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 40, 3), dtype=np.uint8))
    inputs = processor(text=words, images=[image], return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        output = theirs(**inputs)
    cosines = model.embed_images([image]) @ model.embed_texts(words).T
    assert (output.logits_per_image - cosines / 0.07).abs().max() < 1e-4
    # And writes in its own way, which is read again.
    theirs.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    again = load_clip(tmp_path / "theirs")
    same(model, again)
    assert again.tokenizer is not None and again.tokenizer.fingerprint == tokenizer.fingerprint


def test_open_clip_reads_what_we_write(tmp_path: Path) -> None:
    module = reference("open_clip")
    for number, config in enumerate((FULL, GELU)):
        model = clip(config)
        export_clip(model, tmp_path / str(number), "open_clip")
        theirs = module.create_model(f"local-dir:{tmp_path / str(number)}").eval()
        equal(model, theirs.encode_image, theirs.encode_text)
        assert tuple(theirs.visual.image_mean) == config.image_mean


def test_openais_code_reads_what_we_write(tmp_path: Path) -> None:
    model = clip(SMALL)
    export_clip(model, tmp_path / "openai", "openai")
    weights = torch.load(tmp_path / "openai" / "model.pt", weights_only=True)
    theirs = reference("clip.model").build_model(weights).float()
    # It rounds its matrices to fp16.
    with torch.no_grad():
        wanted = theirs.encode_text(captions(SMALL, padding=0))
    assert (model.embed_texts(captions(SMALL), normalize=False) - wanted).abs().max() < 0.01
    theirs.load_state_dict(torch.load(tmp_path / "openai" / "model.pt", weights_only=True))
    equal(model, theirs.encode_image, theirs.encode_text)


# --- what is refused -----------------------------------------------------------------------------------------------------


def changed(folder: Path, file: str, change: Callable[[Any], Any]) -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["vision_config"].update(hidden_act="gelu"), r"vision_config\.hidden_act = gelu"),
        (lambda c: c["text_config"].update(intermediate_size=9), r"text_config\.intermediate_size = 9, where only 256"),
        (lambda c: c["text_config"].update(layer_norm_eps=1e-6), r"text_config\.layer_norm_eps"),
        (lambda c: c["vision_config"].update(num_channels=1), r"vision_config\.num_channels"),
        (lambda c: c["vision_config"].update(num_hidden_layers=3), r"'vision_model\.encoder\.layers\.2\."),
        (lambda c: c["vision_config"].update(num_hidden_layers=10**9), "vision_depth=1000000000"),
        (lambda c: c["text_config"].update(vocab_size="many"), "text_vocab must be int"),
        (lambda c: c["text_config"].update(eos_token_id=[3]), "end_token must be int"),
        (lambda c: c["text_config"].update(eos_token_id=100), "end_token must lie in"),
        (lambda c: c.update(projection_dim=25), "'text_projection.weight' has shape"),
        (lambda c: c.update(vision_config=3), "mapping of fields"),
        (lambda c: c.pop("vision_config"), "preprocessor size = .*, where only .* 224"),
    ],
)
def test_hugging_face_configurations_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    export_clip(clip(SMALL), tmp_path / "hf", "hf")
    changed(tmp_path / "hf", "config.json", change)
    with pytest.raises(CheckpointError, match=words) as error:
        load_clip(tmp_path / "hf")
    assert str(tmp_path / "hf") in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c["model_cfg"]["vision_cfg"].update(mlp_ratio=4.9),
            r"vision_cfg\.mlp_ratio = 4\.9, where only 4\.0",
        ),
        (lambda c: c["model_cfg"]["vision_cfg"].update(layers=[2, 2, 2, 2]), "vision_depth must be int"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="x"), r"vision_cfg\.timm_model_name = x"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(novelty=1), r"vision_cfg\.novelty = 1"),
        (
            lambda c: c["model_cfg"]["vision_cfg"].update(pool_type="avg"),
            r"vision_cfg\.pool_type = avg, where only tok",
        ),
        (lambda c: c["model_cfg"]["text_cfg"].update(hf_model_name="roberta"), r"text_cfg\.hf_model_name = roberta"),
        (lambda c: c["model_cfg"]["text_cfg"].update(no_causal_mask=True), r"text_cfg\.no_causal_mask = True"),
        (lambda c: c["model_cfg"].update(init_logit_bias=-10), "init_logit_bias = -10"),
        (lambda c: c["model_cfg"].update(multimodal_cfg={}), "multimodal_cfg"),
        (lambda c: c["preprocess_cfg"].update(resize_mode="squash"), r"preprocess_cfg\.resize_mode = squash"),
        (lambda c: c["preprocess_cfg"].update(size=[64, 64]), r"preprocess_cfg\.size = \[64, 64\], where only 32"),
        (lambda c: c.pop("model_cfg"), "model_cfg"),
        (lambda c: c["model_cfg"]["text_cfg"].update(width=128), "'ln_final.bias' has shape"),
    ],
)
def test_open_clip_configurations_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    export_clip(clip(SMALL), tmp_path / "oc", "open_clip")
    changed(tmp_path / "oc", "open_clip_config.json", change)
    with pytest.raises(CheckpointError, match=words) as error:
        load_clip(tmp_path / "oc")
    assert str(tmp_path / "oc") in str(error.value)


def test_fields_that_change_nothing_are_let_be(tmp_path: Path) -> None:
    model = clip(SMALL)
    export_clip(model, tmp_path / "oc", "open_clip")
    more = {"patch_dropout": 0.5, "timm_pool": "avg", "output_tokens": True, "mlp_ratio": 4, "qk_norm": False}
    changed(tmp_path / "oc", "open_clip_config.json", lambda c: c["model_cfg"]["vision_cfg"].update(more))
    same(model, load_clip(tmp_path / "oc"))
    export_clip(model, tmp_path / "hf", "hf")
    vision = {"vision_config_dict": {"image_size": [32, 32]}, "vision_config": {"image_size": 7}}

    def older(content: Any) -> None:
        content["vision_config"].update(vision["vision_config"])
        content["vision_config_dict"] = vision["vision_config_dict"]

    changed(tmp_path / "hf", "config.json", older)
    same(model, load_clip(tmp_path / "hf"))
    changed(tmp_path / "hf", "preprocessor_config.json", lambda c: c.update(size=32, crop_size=32, rescale_factor=None))
    same(model, load_clip(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop_size": 64}, r"preprocessor crop_size = 64, where only \{'height': 32, 'width': 32\}"),
        ({"size": {"height": 32, "width": 32}}, "preprocessor size = .*, where only {'shortest_edge': 32}"),
        ({"resample": 2}, "preprocessor resample = 2, where only 3"),
        ({"rescale_factor": 1}, "preprocessor rescale_factor = 1"),
        ({"do_resize": False}, "preprocessor do_resize = False"),
        ({"do_center_crop": False}, "preprocessor do_center_crop = False"),
        ({"do_rescale": False}, "preprocessor do_rescale = False"),
        ({"do_normalize": False}, "preprocessor do_normalize = False"),
        ({"image_std": [0.0, 1.0, 1.0]}, r"model\.image_std"),
    ],
)
def test_pictures_that_are_made_otherwise_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    export_clip(clip(SMALL), tmp_path / "hf", "hf")
    changed(tmp_path / "hf", "preprocessor_config.json", lambda c: c.update(change))
    with pytest.raises(CheckpointError, match=words):
        load_clip(tmp_path / "hf")


def test_the_newer_of_two_descriptions_of_pictures_is_taken(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    export_clip(clip(SMALL), tmp_path / "hf", "hf")
    older = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    newer = tmp_path / "hf" / "processor_config.json"
    for content, wanted in (
        (
            {"processor_class": "CLIPProcessor", "image_processor": {**older, "image_std": [0.5, 0.4, 0.3]}},
            (0.5, 0.4, 0.3),
        ),
        ({"processor_class": "CLIPProcessor"}, SMALL.image_std),
    ):
        newer.write_text(json.dumps(content))
        theirs = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil").image_std
        assert load_clip(tmp_path / "hf").config.image_std == tuple(theirs) == wanted


def test_a_folder_may_be_of_two_programs_and_its_files_keep_its_configuration(
    tmp_path: Path, merges_file: Path
) -> None:
    """As LAION publishes them; the two models differ here, to tell which one is read."""
    tokenizer = ClipTokenizer.load(merges_file)
    config = replace(SMALL, activation="gelu", text_vocab=tokenizer.pieces.vocab_size + 2)
    models = {"hf": clip(config, seed=1, tokenizer=tokenizer), "open_clip": clip(config, seed=2, tokenizer=tokenizer)}
    for format, model in models.items():
        export_clip(model, tmp_path / format, format)  # type: ignore[arg-type]
    shutil.copytree(tmp_path / "hf", tmp_path / "both")
    shutil.copytree(tmp_path / "open_clip", tmp_path / "both", dirs_exist_ok=True)
    same(models["hf"], load_clip(tmp_path / "both", "hf"))
    same(models["open_clip"], load_clip(tmp_path / "both", "open_clip"))
    same(models["open_clip"], load_clip(tmp_path / "both"))
    for format, file in (("hf", "model.safetensors"), ("open_clip", "open_clip_model.safetensors")):
        found = import_clip(tmp_path / "both" / file, tmp_path / "ours")
        same(models[format], found)
        assert found.tokenizer is not None
        assert json.loads((tmp_path / "ours" / "source.json").read_text())["file"] == file
    # Elsewhere it is a file of weights alone, which does not say what they are to be used with.
    alone = Path(shutil.copy(tmp_path / "both" / "open_clip_model.safetensors", tmp_path))
    with pytest.raises(ConfigError, match=r"no open_clip_config\.json beside it"):
        load_clip(alone)
    assert load_clip(alone, activation="gelu").config == config
    assert load_clip(alone, "openai").config == replace(config, activation="quick_gelu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("visual.proj"), r"'visual\.proj' has shape None"),
        (lambda w: w.pop("visual.conv1.weight"), r"its visual\.conv1\.weight has shape None"),
        (lambda w: w.update(extra=torch.zeros(1)), r"'extra' has shape \(1,\), where None"),
        (lambda w: w.update({"ln_final.weight": torch.zeros(7)}), r"'ln_final\.weight' has shape \(7,\)"),
        (
            lambda w: w.pop("transformer.resblocks.1.attn.in_proj_bias"),
            r"'transformer\.resblocks\.1\.attn\.in_proj_bias'",
        ),
        (lambda w: w.update({"visual.layer1.0.conv1.weight": torch.zeros(1)}), "ResNet"),
        (lambda w: w.update({"token_embedding.weight": torch.zeros(100, 60)}), "width 60, no multiple of 64"),
        (lambda w: w.update(logit_bias=torch.zeros(())), "'logit_bias'"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    weights = to_openai(clip(SMALL).state_dict(), SMALL)
    change(weights)
    torch.save(weights, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=words) as error:
        load_clip(tmp_path / "clip.pt")
    assert str(tmp_path / "clip.pt") in str(error.value)


def test_sources_that_are_none_are_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no"):
        load_clip(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no CLIP"):
        load_clip(tmp_path)
    export_clip(clip(SMALL), tmp_path / "hf", "hf")
    with pytest.raises(CheckpointError, match=r"has none of open_clip_model\.safetensors"):
        load_clip(tmp_path / "hf", "open_clip")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json cannot be read"):
        load_clip(tmp_path / "hf" / "model.safetensors", "open_clip")
    with pytest.raises(ConfigError, match=r"the tokenizer has .* pieces"):
        load_clip(tmp_path / "hf", tokenizer=tokenizer_file)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_clip(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no file of weights"):
        load_clip(tmp_path / "hf")
    with pytest.raises(ConfigError, match="no imported model"):
        import_clip(tmp_path / "hf", tmp_path)
    with pytest.raises(ConfigError, match="end_token is 2"):
        export_clip(clip(replace(SMALL, start_token=3, end_token=2)), tmp_path / "new", "hf")
    for field, value in (
        ("text_heads", 2),
        ("vision_heads", 4),
        ("end_token", 7),
        ("image_mean", (0.5, 0.5, 0.5)),
        ("image_std", (0.5, 0.5, 0.5)),
    ):
        with pytest.raises(ConfigError, match=f"{field} is "):
            export_clip(clip(replace(SMALL, **{field: value})), tmp_path / "new", "openai")
    assert not (tmp_path / "new").exists()


# --- the command lines ---------------------------------------------------------------------------------------------------


def launch(monkeypatch: pytest.MonkeyPatch, launcher: str, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [launcher, *map(str, arguments)])
    runpy.run_path(str(ROOT / "launchers" / launcher), run_name="__main__")


def test_the_launchers_import_and_export(
    tmp_path: Path, merges_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = clip(replace(SMALL, text_vocab=256 + 256 + len(MERGES) + 2))
    openai_file(model, tmp_path / "ViT.pt", "zip")
    launch(monkeypatch, "import_clip.py", "--from", tmp_path / "ViT.pt", "--out", tmp_path / "bare")
    assert "it has no tokenizer" in capsys.readouterr().out
    launch(
        monkeypatch,
        "import_clip.py",
        "--from",
        tmp_path / "ViT.pt",
        "--tokenizer",
        merges_file,
        "--out",
        tmp_path / "ours",
    )
    found = Clip.from_pretrained(tmp_path / "ours")
    same(model, found)
    assert found.fingerprint[:12] in (printed := capsys.readouterr().out) and "no tokenizer" not in printed
    assert found.embed_texts(["a cat"]).shape == (1, 24)
    for format in FORMATS:
        launch(
            monkeypatch, "export_clip.py", "--model", tmp_path / "ours", "--format", format, "--out", tmp_path / format
        )
        same(model, load_clip(tmp_path / format))
    shutil.rmtree(tmp_path / "ours")
    with pytest.raises(SystemExit):
        launch(monkeypatch, "export_clip.py", "--model", tmp_path / "ours", "--format", "hf", "--out", tmp_path / "new")
    assert "error: no model at" in capsys.readouterr().err
