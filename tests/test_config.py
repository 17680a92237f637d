"""Configuration: presets have the paper's shapes, overrides arrive, mistakes are told."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dalle_ds.config
from dalle_ds.cli import parse_options
from dalle_ds.config import (
    ClipRun,
    DalleConfig,
    DecoderRun,
    DiscreteVAEConfig,
    DvaeRun,
    LatentPriorRun,
    OptimConfig,
    PriorRun,
    TransformerRun,
    UpsamplerRun,
    differences,
    from_dict,
    load_preset,
    preset_names,
    to_dict,
)
from dalle_ds.config.plain import flatten
from dalle_ds.errors import ConfigError
from dalle_ds.evaluation.evaluate import EvaluateOptions
from dalle_ds.text.tokenizer import TokenizerConfig
from dalle_ds.training.launch import parse_command


def test_every_preset_is_whole_and_its_stages_fit() -> None:
    assert set(preset_names()) == {
        "toy", "emoji", "small", "medium", "dalle-1b", "dalle-3b", "dalle-6b", "dalle-12b", "unclip",
    }  # fmt: skip
    for name in ("toy", "emoji", "small", "unclip"):
        clip, pieces = load_preset(name, "clip", ClipRun), load_preset(name, "tokenizer", TokenizerConfig).vocab_size
        priors = load_preset(name, "prior", PriorRun), load_preset(name, "latent_prior", LatentPriorRun)
        decoder = load_preset(name, "decoder", DecoderRun)
        first, second = (load_preset(name, f"upsampler_{number}", UpsamplerRun).model for number in (1, 2))
        assert decoder.model.image_size == first.low_size and first.image_size == second.low_size
        for run in (*priors, decoder):
            assert run.model.embed_dim == clip.model.embed_dim and run.model.text_vocab >= pieces
    for name in set(preset_names()) - {"unclip"}:
        dvae, transformer = load_preset(name, "dvae", DvaeRun), load_preset(name, "transformer", TransformerRun)
        assert (dvae.model.grid, dvae.model.vocab_size) == (transformer.model.grid, transformer.model.image_vocab)
        assert load_preset(name, "tokenizer", TokenizerConfig).vocab_size <= transformer.model.text_vocab


def test_every_field_has_a_docstring() -> None:
    files = sorted(Path(dalle_ds.config.__file__).parent.glob("*.py"))
    classes = [
        node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 15
    for node in classes:
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(statement.target)} has no docstring"


def test_plain_form_round_trip() -> None:
    run = TransformerRun(model=DalleConfig(width=64, heads=2, depth=2, attention=("row", "conv")), steps=7)
    assert from_dict(TransformerRun, to_dict(run), "test") == run


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modle": {}}, "has no field 'modle'; did you mean model"),
        ({"model": {"widht": 3}}, r"test\.model has no field 'widht'; did you mean width"),
        ({"model": {"width": "wide"}}, r"test\.model\.width must be int, found 'wide'"),
        ({"model": {"width": 3.5}}, r"test\.model\.width must be int, found 3.5"),
        ({"optim": {"schedule": "linear"}}, r"schedule must be one of 'constant', 'cosine', 'plateau', found 'linear'"),
        ({"steps": True}, "test.steps must be int, found True"),
        ({"model": 3}, "must be a mapping"),
    ],
)
def test_wrong_fields_and_types_are_named(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_dict(TransformerRun, values, "test")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DalleConfig(width=100, heads=3), "model.width=100 cannot be split over model.heads=3"),
        (lambda: DalleConfig(kernel=4), "model.kernel must be odd"),
        (lambda: DalleConfig(depth=2, attention=("row",)), "names 1 layers but model.depth is 2"),
        (lambda: DiscreteVAEConfig(image_size=36), "model.image_size=36 is not a multiple of 8.*4 groups"),
        (lambda: DiscreteVAEConfig(encoder_width=10), "model.encoder_width must be a multiple of 4"),
        (lambda: OptimConfig(schedule="cosine"), "needs optim.decay_steps"),
        (
            lambda: OptimConfig(schedule="cosine", decay_steps=10, warmup_steps=20),
            "must be greater than optim.warmup_steps",
        ),
        (lambda: OptimConfig(beta2=1.0), r"optim.beta2 must lie in \[0, 1\)"),
        (lambda: DvaeRun(steps=0), "steps must be greater than 0"),
    ],
)
def test_fields_that_do_not_go_together_say_what_to_set(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_differences_are_dotted_names_with_both_values() -> None:
    old, new = DvaeRun(steps=3), DvaeRun(steps=4, optim=OptimConfig(lr=1.0))
    assert differences(old, new) == {"steps": (3, 4), "optim.lr": (4.5e-4, 1.0)}
    assert differences(old, old) == {}


COMMAND = ["--deepspeed_config", "ds_configs/zero1_fp32.json", "--data", "d", "--run_dir", "r"]


def test_the_command_line_changes_any_field_of_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    extra = ["--local_rank=1", "--preset", "toy", "--model.depth", "2", "--model.attention", "row", "conv"]
    extra += ["--train.activation_checkpointing", "full", "--optim.clip", "None", "--steps", "9"]
    command = parse_command(TransformerRun, "transformer", [*extra, *COMMAND])
    preset = load_preset("toy", "transformer", TransformerRun)
    assert differences(preset, command.run) == {
        "data": ("", "d"),
        "run_dir": ("", "r"),
        "steps": (preset.steps, 9),
        "model.depth": (preset.model.depth, 2),
        "model.attention": (None, ["row", "conv"]),
        "train.activation_checkpointing": ("none", "full"),
        "optim.clip": (4.0, None),
    }
    assert command.deepspeed["zero_optimization"] == {"stage": 1}
    assert command.device == "auto"


STAGES = {"dvae": DvaeRun, "transformer": TransformerRun, "clip": ClipRun}


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_of_a_stage_is_read_by_code_that_runs_in_it(stage: str) -> None:
    """Not of the model's shape, which `build_model` hands on as a whole."""
    package = Path(dalle_ds.config.__file__).parents[1]
    rooms = ("training", "resilience", "optim", "parallel", "precision", "data")
    files = [file for room in rooms for file in (package / room).rglob("*.py")]
    files += [package / "planning" / "check.py", package / "models" / "adapters.py"]
    files += [package / "tasks" / f"{name}.py" for name in ("base", stage)]
    read: set[str] = set()
    for file in files:
        if file.name not in ("samples.py", "codes.py", "command.py"):  # whose arguments have names of settings
            nodes = list(ast.walk(ast.parse(file.read_text())))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {"alpha"} if "factor" in read else set()  # `LoraConfig.factor`
    names = [name for name in dict(flatten(to_dict(STAGES[stage]()))) if not name.startswith("model.")]
    assert [name for name in names if name.rpartition(".")[2] not in read] == []


def test_mistakes_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(ConfigError, match=r"unknown preset 'toi': known are.*did you mean toy"):
        parse_command(DvaeRun, "dvae", ["--preset", "toi", *COMMAND])
    with pytest.raises(ConfigError, match="--preset is missing"):
        parse_command(DvaeRun, "dvae", COMMAND)
    with pytest.raises(ConfigError, match="--deepspeed_config is missing"):
        parse_command(DvaeRun, "dvae", ["--preset", "toy"])
    with pytest.raises(ConfigError, match="--data is missing"):
        parse_command(DvaeRun, "dvae", ["--preset", "toy", *COMMAND[:2]])
    with pytest.raises(SystemExit):
        parse_command(DvaeRun, "dvae", ["--preset", "toy", "--model.widht", "3", *COMMAND])
    assert "Unrecognized options: --model.widht" in capsys.readouterr().err
    for kind, stage, option in (
        (ClipRun, "clip", "--loader.bpe_dropout"),  # only the transformer's texts have it
        (DvaeRun, "dvae", "--loader.codes"),
        (DvaeRun, "dvae", "--train.activation_checkpointing"),
    ):
        with pytest.raises(SystemExit):
            parse_command(kind, stage, ["--preset", "toy", option, "0.1", *COMMAND])
        assert option in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_command(DvaeRun, "dvae", ["--preset", "toy", "--model.image_size", "30", *COMMAND])
    assert "model.image_size=30 is not a multiple of 4" in " ".join(capsys.readouterr().err.replace("│", " ").split())


BUT_DATA = ["--preset", "toy", "--deepspeed_config", "ds_configs/zero1_fp32.json", "--run_dir", "r"]


@pytest.mark.parametrize(
    ("given", "data"),
    [
        (["--data", "a"], "a"),
        (["--data", "a", "b"], ("a", "b")),
        (["--data", "a", "--seed", "1", "--data", "b"], ("a", "b")),
        (["--data=a", "--data=b", "--data", "c"], ("a", "b", "c")),
    ],
)
def test_data_is_one_folder_or_several(monkeypatch: pytest.MonkeyPatch, given: list[str], data: object) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    run = parse_command(DvaeRun, "dvae", [*BUT_DATA, *given]).run
    assert run.data == data
    assert run.corpora == ((data,) if isinstance(data, str) else data)
    plain = to_dict(run)
    assert plain["data"] == (data if isinstance(data, str) else list(data)), "one folder is kept as it always was"
    assert from_dict(DvaeRun, plain, "x") == run


def test_weights_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    run = parse_command(DvaeRun, "dvae", [*BUT_DATA, "--data", "a", "--data_weights", "2", "1", "--data", "b"]).run
    assert (run.data, run.data_weights) == (("a", "b"), (2, 1))


@pytest.mark.parametrize(
    "values",
    [
        {"data": "a", "data_weights": (1,)},
        {"data": ("a", "b"), "data_weights": (1,)},
        {"data": ("a", "b"), "data_weights": (1, 2, 3)},
        {"data": ("a", "b"), "data_weights": (1, 0)},
        {"data": ("a", "b"), "data_weights": (2, -1)},
        {"data": ("a", "b"), "data_weights": (1, 10_000)},
    ],
)
def test_weights_that_say_nothing_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match="data_weights"):
        DvaeRun(**values)
    assert DvaeRun(data=("a", "b"), data_weights=(10**6, 2 * 10**6)).data_weights == (10**6, 2 * 10**6)


def test_an_option_of_one_folder_does_not_take_the_last_of_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(EvaluateOptions, ["--data", "a", "--data", "b", "--out", "o"])
    assert "b" in capsys.readouterr().err
