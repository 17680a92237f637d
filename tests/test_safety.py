"""What the library must never do with what it is given: run it, unpack it where it likes, or show what is secret."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dalle_ds.config import TransformerRun, from_dict
from dalle_ds.data.prepare import PrepareOptions
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.training.launch import parse_command
from dalle_ds.training.run_directory import read_config
from tests.conftest import ROOT

ROOMS = ("dalle_ds", "launchers")

NAMES = {
    # They run what they read, or anything that a name of theirs says.
    **dict.fromkeys(("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle"), "unpickling"),
    **dict.fromkeys(("torch.hub", "torch.package", "torch.serialization"), "unpickling"),
    "torch.jit.load": "code of an archive",
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "importlib.import_module", "runpy"), "code from text"),
    **dict.fromkeys(("os.system", "os.popen", "pty", "subprocess.getoutput", "subprocess.getstatusoutput"), "a shell"),
    **dict.fromkeys(
        ("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader"),
        "YAML tags",
    ),
    "tempfile.mktemp": "a name that another may take",
    "shutil.unpack_archive": "unpacking",
    # Design decision 13: nothing needs the network.
    **dict.fromkeys(("requests", "urllib", "http", "ftplib", "httpx", "aiohttp", "huggingface_hub"), "the network"),
}
"""Names, and whatever lies below them."""
HARMLESS = (
    "torch.serialization.safe_globals",  # what it allows is given by our code, and is for `weights_only`
    "huggingface_hub.EvalResult",  # plain data, written as YAML
    "huggingface_hub.ModelCardData",
)
METHODS = {"extractall": "unpacking", "extract": "unpacking"}
LISTENING = ("bind", "create_server", "start_server", "HTTPServer", "ThreadingHTTPServer", "TCPServer")
LOCAL = ("127.0.0.1", "localhost", "::1")
COLLECTIVES = ("torch.distributed.", "deepspeed.comm.")

ALLOWED = {
    (
        "dalle_ds/evaluation",
        "code of an archive",
    ): "a feature network that the user names, TorchScript by its own choice",
    ("dalle_ds", "objects between processes"): "of one run, in a network that PyTorch trusts whatever is sent",
    (
        "dalle_ds/resilience",
        "listening to other machines",
    ): "the watch for dead processes on them: it reads lines of JSON",
}


class Finding(NamedTuple):
    file: str
    line: int
    rule: str


def audit(source: str, file: str = "x.py") -> Iterator[Finding]:
    """What a module does, or imports, that needs a reason."""
    tree = ast.parse(source)
    known: dict[str, str] = {}  # local name → full name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})

    def full(node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return known.get(node.id, node.id)
        return f"{full(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"

    def rule_of(name: str) -> str | None:
        parts = [] if name in HARMLESS else name.split(".")
        return next(
            (NAMES[".".join(parts[:n])] for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in NAMES), None
        )

    for node in ast.walk(tree):
        rules: list[str | None] = []
        if isinstance(node, ast.Import):
            rules = [rule_of(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            rules = [rule_of(f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, (ast.Name, ast.Attribute)):
            rules = [rule_of(full(node)) if isinstance(node.ctx, ast.Load) else None]
        elif isinstance(node, ast.Call):
            rules = list(_rules_of_call(node, full(node.func)))
        yield from (Finding(file, node.lineno, rule) for rule in rules if rule is not None)


def _rules_of_call(call: ast.Call, name: str) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}

    def is_constant(argument: str, *values: object) -> bool:
        node = given.get(argument)
        return isinstance(node, ast.Constant) and any(node.value is value for value in values)

    method = name.rpartition(".")[2]
    if name == "torch.load" and not is_constant("weights_only", True):
        yield "unpickling"
    if isinstance(call.func, ast.Attribute) and method in METHODS:
        yield METHODS[method]
    if "shell" in given and not is_constant("shell", False):
        yield "a shell"
    if "allow_pickle" in given and not is_constant("allow_pickle", False):
        yield "unpickling"
    if "trust_remote_code" in given and not is_constant("trust_remote_code", False):
        yield "code from text"
    if "share" in given and not is_constant("share", False):
        yield "listening to other machines"
    if "use_safetensors" in given and not is_constant("use_safetensors", True):
        yield "unpickling"
    if name.startswith(COLLECTIVES) and "object" in method:
        yield "objects between processes"
    hosts = [
        given[key] for key in ("host", "server_name") if key in given and method in ("launch", "run", "start_server")
    ]
    if method in LISTENING:
        hosts += call.args[:1]
    for host in hosts:
        first = host.elts[0] if isinstance(host, ast.Tuple) and host.elts else host
        if not (isinstance(first, ast.Constant) and first.value in LOCAL):
            yield "listening to other machines"


def all_findings() -> list[Finding]:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 100
    return [found for path in files for found in audit(path.read_text(), str(path.relative_to(ROOT)))]


def reason(finding: Finding) -> tuple[str, str] | None:
    return next(
        (key for key in ALLOWED if f"{finding.file}/".startswith(f"{key[0]}/") and finding.rule == key[1]), None
    )


def test_the_library_does_nothing_that_runs_or_unpacks_what_it_is_given() -> None:
    findings = all_findings()
    assert not [found for found in findings if reason(found) is None]
    assert {reason(found) for found in findings} == set(ALLOWED), "every allowance is of use"


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import pickle", "unpickling"),
        ("from pickle import loads as read", "unpickling"),
        ("import _pickle", "unpickling"),
        ("import torch; torch.load(f)", "unpickling"),
        ("import torch as t; t.load(f, weights_only=False)", "unpickling"),
        ("from torch import load; load(f, weights_only=flag)", "unpickling"),
        ("import torch; torch.serialization.add_safe_globals([x])", "unpickling"),
        ("import torch; torch.jit.load(f)", "code of an archive"),
        ("import numpy as np; np.load(f, allow_pickle=True)", "unpickling"),
        ("M.from_pretrained(p, use_safetensors=None)", "unpickling"),
        ("run = eval", "code from text"),
        ("exec(text)", "code from text"),
        ("import importlib; importlib.import_module(name)", "code from text"),
        ("M.from_pretrained(p, trust_remote_code=True)", "code from text"),
        ("import os; os.system('ls')", "a shell"),
        ("from os import popen", "a shell"),
        ("import subprocess; subprocess.run(c, shell=True)", "a shell"),
        ("from subprocess import getoutput as out; out(c)", "a shell"),
        ("import yaml; yaml.load(t, Loader=yaml.SafeLoader)", "YAML tags"),
        ("from yaml import full_load", "YAML tags"),
        ("import tempfile; tempfile.mktemp()", "a name that another may take"),
        ("import tarfile; tarfile.open(p).extractall()", "unpacking"),
        ("with ZipFile(p) as z: z.extract(n)", "unpacking"),
        ("import shutil; shutil.unpack_archive(p)", "unpacking"),
        ("import urllib.request", "the network"),
        ("from huggingface_hub import snapshot_download", "the network"),
        ("import torch.distributed as dist; dist.all_gather_object(a, b)", "objects between processes"),
        ("s.bind(('0.0.0.0', 80))", "listening to other machines"),
        ("s.bind((host, 80))", "listening to other machines"),
        ("import socket; socket.create_server(('', 0))", "listening to other machines"),
        ("demo.launch(server_name='0.0.0.0')", "listening to other machines"),
        ("demo.launch(share=True)", "listening to other machines"),
    ],
)
def test_the_audit_finds(source: str, rule: str) -> None:
    assert rule in {found.rule for found in audit(source)}


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(f, weights_only=True)",
        "from torch.serialization import safe_globals; safe_globals([x])",
        "import yaml; yaml.safe_load(t)",
        "import re; re.compile('x')",
        "import torch; torch.compile(f)",
        "model.eval()",
        "s.bind(('127.0.0.1', 0))",
        "demo.launch(server_name='127.0.0.1', share=False)",
        "import subprocess; subprocess.run([c], shell=False)",
        "import tarfile; tarfile.open(p).extractfile(m)",
        "import numpy as np; np.load(p, mmap_mode='r')",
    ],
)
def test_the_audit_leaves_alone(source: str) -> None:
    assert not list(audit(source))


# --- secrets --------------------------------------------------------------------------------------------------------

PLANTED = {
    "WANDB_API_KEY": "5ecre7" * 6 + "aaaa",
    "HF_TOKEN": "hf_PlantedTokenOfTheHub",
    "AWS_SECRET_ACCESS_KEY": "PlantedKeyOfTheCloud",
    "SOME_PASSWORD": "PlantedPassword",
}


def leaks(text: bytes, secrets: Iterable[str]) -> list[str]:
    """Secrets of which a third stands in `text`, in case that a file's format cuts it into pieces."""
    third = {secret: [secret[n : n + 12].encode() for n in range(0, len(secret) - 11, 4)] for secret in secrets}
    return [secret for secret, parts in third.items() if any(part in text for part in parts)]


@pytest.mark.launch
def test_no_secret_is_written_or_printed_by_a_run(tmp_path: Path, data: Path) -> None:
    """From the environment, from the DeepSpeed JSON, whose monitors take keys, from the git repository around it."""
    json_file, out = tmp_path / "deepspeed.json", tmp_path / "run"
    in_json = "PlantedKeyOfComet"
    json_file.write_text(json.dumps({"comet": {"enabled": False, "api_key": in_json}}))
    command = [sys.executable, str(ROOT / "launchers" / "train_dvae.py"), "--preset", "toy", "--steps", "2"]
    command += [
        "--deepspeed_config",
        str(json_file),
        "--data",
        str(data),
        "--run_dir",
        str(out),
        "--train.batch_size",
        "4",
    ]
    command += ["--model.image_size", "16", "--model.encoder_width", "8", "--model.decoder_width", "8"]
    command += ["--report.wandb", "offline", "--report.wandb_project", "a_project_to_look_for"]
    environment = {**os.environ, **PLANTED, "PYTHONPATH": str(ROOT)}
    of_git = "PlantedTokenOfGit"
    for folder in ("objects", "refs"):
        (tmp_path / ".git" / folder).mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / ".git" / "config").write_text(f'[remote "origin"]\n\turl = https://{of_git}:x@example.org/a.git\n')
    done = subprocess.run(command, capture_output=True, env=environment, timeout=180, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len(written) > 8 and any(
        b"a_project_to_look_for" in text for path, text in written.items() if "wandb" in path.parts
    )
    for where, text in {**written, "output": done.stdout + done.stderr}.items():
        assert not leaks(text, [*PLANTED.values(), in_json, of_git]), where


def test_leaks_are_found() -> None:
    secret = PLANTED["AWS_SECRET_ACCESS_KEY"]
    assert leaks(b"key: PlantedKeyOfTheCloud", PLANTED.values()) == [secret]
    assert leaks(b"..PlantedKeyOfThe\x00Cloud", PLANTED.values()) == [secret]


URLS = ("s3://me:Planted@bucket/data", "see https://Planted@example.org/x", "HTTP://a:Planted@[::1]:80")


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("field", ["data", "run_dir", "dvae", "tokenizer", "report.wandb_project"])
def test_urls_with_passwords_are_refused_and_not_repeated(
    field: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section, _, name = field.rpartition(".")
    values = {section: {name: url}} if section else {name: url}
    with pytest.raises(ConfigError, match=rf"{field} is a URL with a user name or password") as error:
        from_dict(TransformerRun, values, "run")
    assert "Planted" not in str(error.value)
    monkeypatch.chdir(ROOT)
    arguments = ["--preset", "toy", "--deepspeed_config", "ds_configs/zero1_fp32.json", f"--{field}", url]
    with pytest.raises(SystemExit):
        parse_command(TransformerRun, "transformer", arguments)
    shown = capsys.readouterr().err
    assert "is a URL with a user name or password" in " ".join(shown.replace("│", " ").split())
    assert "Planted" not in shown


@pytest.mark.parametrize("value", ["/data/me@home", "s3://bucket/a@b", "https://example.org/?mail=a@b", "a:b@c", ""])
def test_other_strings_are_left_alone(value: str) -> None:
    assert TransformerRun(data=value).data == value


# --- what files ask for ---------------------------------------------------------------------------------------------


def test_yaml_tags_run_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "config.yaml").write_text(f"stage: dvae\nrun: !!python/object/apply:os.system ['touch {canary}']\n")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_config(tmp_path)
    assert not canary.exists()


def test_prepared_folders_keep_no_passwords() -> None:
    with pytest.raises(ConfigError, match="source is a URL with a user name or password") as error:
        PrepareOptions(corpus="folder", source=URLS[0])
    assert "Planted" not in str(error.value)
