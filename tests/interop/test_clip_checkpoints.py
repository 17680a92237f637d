"""CLIPs in the checkpoints that training programs write, and in folders whose weights are in parts."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pathlib
import subprocess
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_ds.errors import CheckpointError
from dalle_ds.interop import export_clip, import_clip, load_clip
from dalle_ds.interop.clip_layouts import to_openai
from tests.interop.test_clip import clip, same
from tests.models.test_clip import SMALL

WARNS = pytest.mark.filterwarnings("ignore:.*does not say the activation")
State = dict[str, Tensor]


class Touch:
    """An object whose pickle makes a file when it is unpickled."""

    def __init__(self, path: Path, function: Callable[..., Any] = subprocess.check_call) -> None:
        self.calls = function, (["touch", str(path)] if function is subprocess.check_call else f"touch {path}",)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.calls


class Settings(dict):  # type: ignore[type-arg]  # as Lightning's AttributeDict
    """Of a program that is not installed here."""


def weights() -> State:
    return to_openai(clip(SMALL).state_dict(), SMALL)


def under(begin: str, state: State) -> State:
    return OrderedDict((begin + name, value.clone()) for name, value in state.items())


def compiled_within(state: State) -> State:
    return {name.replace("visual.", "visual._orig_mod."): value for name, value in state.items()}


def beside(**more: Any) -> dict[str, Any]:
    """What stands beside the weights: counters, an optimizer's state, options, and objects of any class."""
    adam = {number: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4, 4)} for number in range(3)}
    objects = {
        "args": argparse.Namespace(lr=1e-3, out=pathlib.PosixPath("/runs"), seen={1, 2}, kinds=(int, torch.float16)),
        "scores": defaultdict(list, {"loss": [np.float64(0.5)], 7: np.arange(3)}),
        "hyper_parameters": Settings({"lr": 1e-3, "device": torch.device("cpu"), "size": torch.Size([2])}),
        "last": deque([0.5, 0.25], maxlen=3),
        "schedule": [partial(max, 1), Counter("ab"), inspect.Parameter.POSITIONAL_ONLY],
        "random": torch.get_rng_state(),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "callbacks": {"Checkpoint{'monitor': None}": {"best": torch.tensor(1.0)}},
        "bytes": b"\x00\xff",
        "strange keys": {(1, 2): "a", None: "b", 3: torch.zeros(2)},
    }
    return {"epoch": 10, "name": "x", "optimizer": {"state": adam, "param_groups": [{"lr": 1e-3}]}, **objects, **more}


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "open_clip's epoch_10.pt": lambda state: beside(state_dict=under("module.", state)),
    "state_dict": lambda state: {"state_dict": state},
    "model_state_dict": lambda state: beside(model_state_dict=state),
    "model": lambda state: {"model": state, "step": 1},
    "two keys": lambda state: {"checkpoint": {"model": under("clip.", state)}},
    "module.": lambda state: under("module.", state),
    "compiled": lambda state: under("_orig_mod.", state),
    "both": lambda state: {"state_dict": under("module._orig_mod.", state)},
    "Lightning": lambda state: beside(state_dict=under("model.", state), optimizer_states=[{0: torch.ones(2)}]),
    "Lightning, compiled": lambda state: {"state_dict": under("clip._orig_mod.module.", state)},
    "a compiled tower": lambda state: {"state_dict": compiled_within(state)},
    "a part of a model": lambda state: {"state_dict": {**under("clip.", state), "head.weight": torch.zeros(2)}},
    "DeepSpeed's": lambda state: beside(module=state, buffer_names=[], param_shapes=[{"a": torch.Size([1])}]),
}


@WARNS
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_clip_in_a_training_checkpoint_is_read(tmp_path: Path, wrapper: str, new_format: bool) -> None:
    content = WRAPPERS[wrapper](weights())
    if not new_format:
        content.pop("complex", None)  # of an unknown length there
    torch.save(content, tmp_path / "epoch_10.pt", _use_new_zipfile_serialization=new_format)
    same(clip(SMALL), load_clip(tmp_path / "epoch_10.pt"))


@WARNS
def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    file, canary = tmp_path / "clip.pt", tmp_path / "canary"
    torch.save(beside(state_dict=weights(), more=[Touch(canary)], attack=Touch(canary)), file)
    same(clip(SMALL), load_clip(file))
    assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists(), "the attack itself works"
    canary.unlink()
    torch.save(beside(state_dict=weights(), attack=Touch(canary, os.system)), file)
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        load_clip(file)
    assert not canary.exists()


def test_safetensors_with_wrappers_are_read_and_that_their_activation_is_unknown_is_told(tmp_path: Path) -> None:
    save_file(
        {name: value.contiguous() for name, value in under("module.", weights()).items()}, tmp_path / "c.safetensors"
    )
    with pytest.warns(UserWarning, match="--activation"):
        same(clip(SMALL), load_clip(tmp_path / "c.safetensors"))
    assert load_clip(tmp_path / "c.safetensors", activation="gelu").config.activation == "gelu"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda state: {"model": state, "ema": under("module.", state)}, "several models, under 'ema.module', 'model'"),
        (lambda state: {**state, "module.logit_scale": torch.zeros(())}, r"has logit_scale with and without a wrapper"),
        (lambda state: {"generator": {"w": torch.zeros(2)}, "step": 3}, r"visual\.conv1\.weight .* it has generator\.w"),
        (lambda state: {"step": 3}, r"visual\.conv1\.weight has shape None"),
        (lambda _: {"state_dict": under("model.", clip(SMALL).state_dict())}, r"beside its config\.json"),
    ],
)  # fmt: skip
def test_checkpoints_without_one_clip_say_what_they_have(
    tmp_path: Path, content: Callable[[State], Any], words: str
) -> None:
    torch.save(content(weights()), tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=words) as error:
        load_clip(tmp_path / "clip.pt")
    assert str(tmp_path / "clip.pt") in str(error.value)


@pytest.mark.parametrize("format", ["hf", "open_clip"])
def test_weights_of_a_folder_may_have_wrappers(tmp_path: Path, format: Any) -> None:
    export_clip(clip(SMALL), tmp_path / "theirs", format)
    (whole,) = tmp_path.glob("theirs/*.safetensors")
    name = {"hf": "pytorch_model.bin", "open_clip": "open_clip_pytorch_model.bin"}[format]
    torch.save(beside(state_dict=under("module.", load_file(whole))), whole.with_name(name))
    whole.unlink()
    same(clip(SMALL), load_clip(tmp_path / "theirs"))


# --- weights in parts ------------------------------------------------------------------------------------------------------


def in_parts(folder: Path, suffix: str, format: Any = "hf") -> Path:
    """A folder with its weights in three parts; their index."""
    export_clip(clip(SMALL), folder, format)
    (whole,) = folder.glob("*.safetensors")
    tensors = load_file(whole)
    stem = "model" if format == "hf" else "open_clip_model"
    stem = stem if suffix == "safetensors" else stem.replace("model", "pytorch_model")
    places = {name: f"{stem}-{n % 3 + 1:05}-of-00003.{suffix}" for n, name in enumerate(tensors)}
    for place in set(places.values()):
        part = {name: tensors[name] for name in tensors if places[name] == place}
        (save_file if suffix == "safetensors" else torch.save)(part, folder / place)
    whole.unlink()
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    return index


@pytest.mark.parametrize("format", ["hf", "open_clip"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_parts_are_read(tmp_path: Path, suffix: str, format: Any) -> None:
    index = in_parts(tmp_path / "theirs", suffix, format)
    same(clip(SMALL), load_clip(tmp_path / "theirs"))
    same(clip(SMALL), import_clip(index, tmp_path / "ours"))
    source = json.loads((tmp_path / "ours" / "source.json").read_text())
    assert source["file"] == index.name and len(source["parts"]) == 3


def moved(index: Path, name: str, place: Any) -> None:
    """The index says that a tensor is elsewhere."""
    content = json.loads(index.read_text())
    content["weight_map"][name] = place
    index.write_text(json.dumps(content))


PART = "model-00002-of-00003.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a part that is missing": (lambda index: index.with_name(PART).unlink(), rf"lists 3 files.*missing: {PART}"),
    "a tensor that is missing": (lambda index: moved(index, "extra", PART), rf"{PART} lacks extra"),
    "a tensor in two parts": (
        lambda index: save_file(
            load_file(index.with_name(PART)) | load_file(index.with_name(PART.replace("2-", "1-"))), index.with_name(PART)
        ),
        rf"{PART} has \S+, which is not in it by",
    ),
    "a place elsewhere": (lambda index: moved(index, "logit_scale", "../x.safetensors"), r"logit_scale is in '\.\./x"),
    "a place that is no text": (lambda index: moved(index, "logit_scale", 7), r"logit_scale is in 7"),
    "itself": (lambda index: moved(index, "logit_scale", index.name), "logit_scale is in"),
    "no map": (lambda index: index.write_text("{}"), "no weight_map"),
    "no JSON": (lambda index: index.write_text("{"), "cannot be read"),
    "no index": (lambda index: index.unlink(), r"no file of weights.*index\.json"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_parts_that_are_not_as_their_index_says_are_named(tmp_path: Path, damage: str) -> None:
    index = in_parts(tmp_path / "theirs", "safetensors")
    change, words = DAMAGES[damage]
    change(index)
    with pytest.raises(CheckpointError, match=words):
        load_clip(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="name its folder"):
        load_clip(index.with_name(PART.replace("2-", "1-")))
