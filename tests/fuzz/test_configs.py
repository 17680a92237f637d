"""Configurations of any kind: runs, presets, DeepSpeed's, command lines."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_ds.config import DvaeRun, TransformerRun, from_dict, load_preset, to_dict
from dalle_ds.config.deepspeed import _CHECKED, load_deepspeed_json, resolve
from dalle_ds.errors import ConfigError
from dalle_ds.training.launch import parse_command
from dalle_ds.training.run_directory import RunDirectory, read_config
from tests.conftest import ROOT
from tests.fuzz.harness import survives
from tests.fuzz.strategies import any_text, damaged_bytes, damaged_json, damaged_tree, deep, numbers, scalars, values

RUN = load_preset("toy", "transformer", TransformerRun)
PLAIN = {"stage": "transformer", "run": to_dict(RUN)}
JSONS = [json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))]
YAML_PIECES = [
    "!!python/object/apply:os.system [a]", "!!int ''", "!!bool x", "!!float x", "!!timestamp x", "!!binary x", "!!set {a}",
    "!!omap [a]", "!!pairs [a]", "&a [*a]", "*b", "<<: 1", "? [a] : b", "0x" + "f" * 5000, "9" * 5000, "2001-99-99", "=",
    "&a {a: &b [1, 1], b: &c [*b, *b], c: &d [*c, *c], d: &e [*d, *d], e: &f [*e, *e], f: [*f, *f]}", "%YAML 9.9\n---", "\t",
    "1:99",
]  # fmt: skip


@given(damaged_tree(PLAIN["run"], most=4) | values())
def test_mappings(tree: Any) -> None:
    run = survives("mappings to runs", lambda: from_dict(TransformerRun, tree, "run"))
    if run is not None:
        assert from_dict(TransformerRun, to_dict(run), "run") == run


def yaml_files() -> st.SearchStrategy[bytes]:
    valid = yaml.safe_dump(PLAIN, sort_keys=False)
    lines = valid.splitlines()

    def with_piece(at: int, piece: str) -> bytes:
        return "\n".join([*lines[:at], f"{lines[at].partition(':')[0]}: {piece}", *lines[at + 1 :]]).encode()

    return st.one_of(
        damaged_tree(PLAIN).map(lambda tree: yaml.safe_dump(tree).encode(errors="surrogatepass")),
        damaged_bytes(valid.encode()),
        st.builds(with_piece, st.integers(0, len(lines) - 1), st.sampled_from(YAML_PIECES)),
        st.binary(max_size=60),
        any_text.map(lambda text: text.encode(errors="surrogatepass")),
        deep("[", "]").map(lambda text: text[:3000].encode()),
    )


@given(content=yaml_files())
def test_run_files(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = _folder(tmp_path_factory, "run")
    (folder / "config.yaml").write_bytes(content)
    survives("config.yaml", lambda: RunDirectory(folder, "transformer", RUN))
    survives("config.yaml", lambda: from_dict(TransformerRun, read_config(folder)[1], "run"))


def deepspeed_sections() -> st.SearchStrategy[bytes]:
    """What the checks look at, with anything in it."""
    few = numbers | st.sampled_from([0, 1, 2, 3, 0.5, 64.0, True, None, "auto", "1", [], {}])
    inner = st.sampled_from(
        [
            "enabled",
            "stage",
            "loss_scale",
            "device",
            "ratio",
            "grad_accum_dtype",
            "offload_optimizer",
            "compute_grad_norm",
        ]
    )
    section = st.dictionaries(inner, few | st.dictionaries(inner, few, max_size=2) | values(), max_size=3)
    return st.dictionaries(st.sampled_from(_CHECKED), few | section, max_size=4).map(
        lambda tree: json.dumps(tree).encode()
    )


@given(
    content=st.sampled_from(JSONS).flatmap(damaged_json) | deepspeed_sections(),
    world=st.sampled_from([1, 2, 3, 64]),
    stage=st.sampled_from([RUN, load_preset("toy", "dvae", DvaeRun)]),
)
@settings(max_examples=2 * settings().max_examples)
def test_deepspeed_files(content: bytes, world: int, stage: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = _folder(tmp_path_factory, "ds") / "ds.json"
    file.write_bytes(content)
    found = survives("DeepSpeed JSON", lambda: resolve(load_deepspeed_json(file), stage, world))
    if found is not None:
        batches = (found.micro_batch, found.accumulation)
        assert all(type(number) is int and number > 0 for number in batches) and type(found.zero_stage) is int
        assert found.micro_batch * found.accumulation * world == stage.train.batch_size


def options() -> st.SearchStrategy[list[str]]:
    names = [f"--{name}" for name in _dotted(PLAIN["run"])]
    name = st.sampled_from(
        [*names, "--preset", "--deepspeed_config", "--device", "--local_rank", "--", "-h0", "--deepspeed"]
    )
    value = st.sampled_from(
        ["toy", "None", "True", "[]", "{}", "1e999", "nan", "-1", "ds_configs/zero1_fp32.json", "/", ""]
    )
    one = st.one_of(
        st.tuples(name, value | scalars.map(_argument)), st.tuples(name), st.tuples(any_text.map(_argument))
    )
    start = ["--preset", "toy", "--deepspeed_config", "ds_configs/zero1_fp32.json", "--data", "d", "--run_dir", "r"]
    return st.lists(one, max_size=3).map(lambda parts: start + [text for part in parts for text in part])


def _argument(value: Any) -> str:
    """What a command line can hold: no NUL."""
    return ("1" * 400 if isinstance(value, int) and value > 10**300 else str(value)).replace("\0", "")


def _dotted(tree: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        found
        for key, value in tree.items()
        for found in (_dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
    ]


@given(arguments=options())
@settings(max_examples=max(20, settings().max_examples // 4))
def test_command_lines(arguments: list[str]) -> None:
    """A mistake ends with status 2 and a message, or is an error of ours."""

    def parse() -> Any:
        with (
            contextlib.chdir(ROOT),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            try:
                return parse_command(TransformerRun, "transformer", arguments)
            except SystemExit as stop:
                assert stop.code in (0, 2)
                raise ConfigError("what tyro writes to standard error") from stop

    survives("command lines", parse)


def _folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    folder = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    folder.mkdir(exist_ok=True)
    return folder
