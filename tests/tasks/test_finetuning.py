"""Runs that begin with a trained model: what they take from it, what they refuse, and adapters beside its frozen weights."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle_ds.commands import _weighted
from dalle_ds.config import (
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    Run,
    ScalingConfig,
    load_preset,
    to_dict,
)
from dalle_ds.data import evaluation_batches
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.models import DiscreteVAE
from dalle_ds.models.adapters import Adapter, attach_adapters, merge
from dalle_ds.models.card import write_card
from dalle_ds.models.clip import Clip
from dalle_ds.models.pretrained import fingerprint
from dalle_ds.parallel import Mesh
from dalle_ds.sampling import TextToImage
from dalle_ds.sampling.text_to_embedding import TextToEmbedding
from dalle_ds.tasks import Task
from dalle_ds.tasks.stages import STAGES
from dalle_ds.text.tokenizer import Tokenizer
from dalle_ds.training.checkpoints.storage import Index
from dalle_ds.training.export import export_checkpoint, merge_adapters
from dalle_ds.training.launch import FINE_TUNING, parse_command
from dalle_ds.training.trainer import Trainer
from tests.conftest import EVERYTHING, TINY_DALLE, TINY_DVAE
from tests.processes import run_ranks
from tests.tasks.test_prior_tasks import LATENT, PRIOR, clip, options
from tests.tasks.test_unclip_tasks import DECODER, FAST, UPSAMPLER

__all__ = ["clip"]  # a fixture
peft = pytest.importorskip("peft")
LORA = LoraConfig(rank=2, alpha=3.0)
ZERO1 = {"zero_optimization": {"stage": 1}}
MODELS = {
    "dvae": TINY_DVAE,
    "transformer": TINY_DALLE,
    "prior": PRIOR,
    "latent_prior": LATENT,
    "decoder": DECODER,
    "upsampler": dataclasses.replace(UPSAMPLER, learned_variance=False),
}
OBJECTIVES = {
    "prior": {"timesteps": 50, "analytic_steps": "5", "analytic_rows": 8},
    "decoder": {"timesteps": 50, "predicts": "v"},
    "upsampler": {"timesteps": 50, "predicts": "x0", "residual": 2.0, "crop": 0.5, "degradation": "none"},
}


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Iterator[Mesh]:
    """This process as a run of its own."""
    mesh = Mesh.start("cpu")
    yield mesh
    mesh.stop()


@pytest.fixture(scope="module")
def runs(
    clip: Path, data: Path, dvae_export: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run of every stage, whose `init` is an export of random weights, and which names none of that one's parts."""
    folder, found = tmp_path_factory.mktemp("initial"), {}
    given = options(clip, data, tokenizer_file)
    for stage, model in MODELS.items():
        kind, task = STAGES[stage]
        blank: Any = kind()
        settings: dict[str, Any] = {
            "model": model,
            **{name: given[name] for name in ("data", "steps", "save_every", "report")},
        }
        settings |= {"loader": type(blank.loader)(workers=0), "run_dir": str(folder / f"{stage}-run")}
        settings["train"] = type(blank.train)(batch_size=8, average_decay=0.5)
        settings["optim"] = OptimConfig(lr=1e-2, eps=1e-4, schedule="constant", warmup_steps=0)
        if stage in OBJECTIVES:
            settings["objective"] = dataclasses.replace(blank.objective, **OBJECTIVES[stage])
        if hasattr(blank, "sampling"):
            settings["sampling"] = FAST
        parts = {"dvae": dvae_export, "tokenizer": tokenizer_file, "clip": clip}
        named = {name: str(path) for name, path in parts.items() if hasattr(blank, name)}
        made = task(kind(**settings, **named))
        torch.manual_seed(len(stage))
        plain = made.build_model().eval()
        with torch.no_grad():
            for parameter in plain.parameters():  # the decoder's output begins as zero
                parameter.add_(torch.randn_like(parameter) * 0.05)
        made.export(plain, folder / stage)
        kept = {"clip": named["clip"]} if stage == "decoder" else {}  # of which its export has a fingerprint only
        found[stage] = kind(**settings, **kept, init=str(folder / stage))
    return found


def fit(run: Run, stage: str, deepspeed: dict[str, Any] | None = None) -> Trainer:
    trainer = Trainer(STAGES[stage][1], run, deepspeed or ZERO1, Mesh.start("cpu"))
    trainer.fit()
    return trainer


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def losses(run: Any) -> list[float]:
    lines = [json.loads(line) for line in (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# --- beginning with a model


@pytest.mark.parametrize("stage", MODELS)
def test_the_shape_and_the_parts_of_a_run_are_its_initial_models(runs: dict[str, Any], stage: str, data: Path) -> None:
    run = runs[stage]
    command = ["--deepspeed_config", "ds_configs/zero1_fp32.json", "--data", str(data), "--run_dir", "new"]
    grid = ["--objective.analytic_steps", "5"] if stage == "prior" else []  # 64 of so few timesteps there are not
    section = "upsampler_1" if stage == "upsampler" else stage
    parsed: Any = parse_command(STAGES[stage][0], section, [*command, *grid, f"--init={run.init}"]).run
    assert parsed.model == run.model and parsed.optim == OptimConfig(**FINE_TUNING)
    for name in {"timesteps", "predicts", "residual"} & OBJECTIVES.get(stage, {}).keys():
        assert getattr(parsed.objective, name) == OBJECTIVES[stage][name]
    if stage in ("decoder", "upsampler"):
        assert parsed.sampling == FAST
    task: Task[Any] = STAGES[stage][1](dataclasses.replace(parsed, clip=run.clip) if stage == "decoder" else parsed)
    initial = task.initial_weights()
    assert initial is not None and initial.keys() == weights(run.init).keys()
    assert task.initial_fingerprint == fingerprint(weights(run.init))


@pytest.mark.parametrize(
    ("stage", "section", "change", "flag"),
    [
        ("dvae", "model", {"encoder_width": 16}, "--model.encoder_width 8"),
        ("transformer", "model", {"depth": 2}, "--model.depth 4"),
        ("prior", "objective", {"timesteps": 60}, "--objective.timesteps 50"),
        ("decoder", "objective", {"predicts": "x0"}, "--objective.predicts v"),
        ("upsampler", "objective", {"residual": 1.0}, "--objective.residual 2.0"),
        ("decoder", "model", {"multiples": (1, 1)}, "--model.multiples 1 2"),
    ],
)
def test_what_would_mean_something_else_is_refused(
    runs: dict[str, Any], stage: str, section: str, change: dict[str, Any], flag: str
) -> None:
    run = runs[stage]
    other = dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **change)})
    with pytest.raises(ConfigError) as error:
        STAGES[stage][1](other)
    assert flag in str(error.value)


def test_weights_that_do_not_fit_are_named(runs: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(runs["prior"].init, tmp_path / "export")
    broken = weights(tmp_path / "export")
    del broken["query.weight"]
    save_file(broken, tmp_path / "export" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"query\.weight"):
        STAGES["prior"][1](dataclasses.replace(runs["prior"], init=str(tmp_path / "export"))).initial_weights()


def test_dropout_may_be_another(runs: dict[str, Any]) -> None:
    run = runs["transformer"]
    STAGES["transformer"][1](dataclasses.replace(run, model=dataclasses.replace(run.model, dropout=0.5)))


@pytest.mark.parametrize(
    ("stage", "option"), [("transformer", "dvae"), ("transformer", "tokenizer"), ("decoder", "clip")]
)
def test_other_parts_are_refused(runs: dict[str, Any], stage: str, option: str, clip: Path, tmp_path: Path) -> None:
    Tokenizer.train(["something else entirely"], tmp_path / "tokenizer", 300)
    DiscreteVAE(TINY_DVAE).save_pretrained(tmp_path / "dvae")
    other = Clip.from_pretrained(clip)
    other.logit_scale.data += 1
    other.save_pretrained(tmp_path / "clip")
    with pytest.raises(ConfigError, match=f"--{option}"):
        STAGES[stage][1](dataclasses.replace(runs[stage], **{option: str(tmp_path / option)}))


@pytest.mark.parametrize("stage", ["prior", "latent_prior"])
def test_embeddings_are_scaled_and_coded_as_the_initial_prior_has_them(runs: dict[str, Any], stage: str) -> None:
    run = runs[stage]
    if stage == "prior":  # it was trained with a constant
        run = dataclasses.replace(run, objective=dataclasses.replace(run.objective, embeddings="standardized"))
    task: Any = STAGES[stage][1](run)
    initial = TextToEmbedding.from_pretrained(run.init)
    ours = task.scaling_of_embeddings if stage == "prior" else task.codec
    theirs = initial.scaling if stage == "prior" else initial.codec  # type: ignore[attr-defined]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_whole_weights_are_trained_from_those_of_the_initial_model(runs: dict[str, Any], tmp_path: Path) -> None:
    """After no more than one tiny update, the weights are all but those of the initial model."""
    optim = OptimConfig(lr=1e-6, schedule="constant", warmup_steps=0, weight_decay=0.0)
    run = dataclasses.replace(runs["transformer"], optim=optim, steps=1, run_dir=str(tmp_path / "run"))
    fit(run, "transformer")
    before, after = weights(run.init), weights(Path(run.run_dir) / "export")
    assert all(0 <= (after[name] - value).abs().max() < 2e-6 for name, value in before.items())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    other = dataclasses.replace(run, run_dir=str(tmp_path / "other"), steps=2)
    task = STAGES["transformer"][1](other)
    assert task.initial_fingerprint == json.loads((Path(run.run_dir) / "identity.json").read_text())["init"]


def test_a_resumed_run_needs_the_same_initial_model(runs: dict[str, Any], tmp_path: Path) -> None:
    run = dataclasses.replace(runs["dvae"], steps=2, run_dir=str(tmp_path / "run"))
    fit(run, "dvae")
    shutil.copytree(run.init, tmp_path / "moved")
    fit(dataclasses.replace(run, init=str(tmp_path / "moved"), steps=3), "dvae")
    torch.manual_seed(99)
    DiscreteVAE(TINY_DVAE).save_pretrained(tmp_path / "moved")
    for name, other in (("without", ""), ("another", str(tmp_path / "moved"))):
        shutil.copytree(run.run_dir, tmp_path / name)  # a start that is refused keeps its lock until the process ends
        with pytest.raises(CheckpointError, match="another init"):
            fit(dataclasses.replace(run, init=other, run_dir=str(tmp_path / name), steps=4), "dvae")


@pytest.mark.parametrize("stage", MODELS)
def test_the_lines_on_the_card_of_every_kind_work(
    runs: dict[str, Any], stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs[stage].init, tmp_path / "export")
    write_card(tmp_path / "export", stage)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "export" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "export")
    exec(code, {})


def test_a_runs_card_tells_of_data_training_and_validation(runs: dict[str, Any], tmp_path: Path) -> None:
    run = dataclasses.replace(runs["transformer"], lora=LORA, run_dir=str(tmp_path / "run"))
    fit(run, "transformer")
    card = ModelCard.load(tmp_path / "run" / "export" / "README.md")
    assert "lora" in card.data.tags and card.data.library_name == "dalle_ds"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "validation/loss" in line)
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {
        name.removeprefix("validation/"): pytest.approx(last[name], abs=1e-6) for name in last if "/" in name
    }
    assert fingerprint(weights(run.init))[:12] in card.text and "rank: 2" in card.text
    assert str(tmp_path) not in card.content and str(run.data) not in card.content


# --- adapters


def adapted_pair(run: Any, stage: str, targets: tuple[str, ...] = ()) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A model with adapters that are not zero, the plain one, and the adapters' weights."""
    task = STAGES[stage][1](run)
    config = dataclasses.replace(LORA, targets=targets)
    model, plain = task.build_model(), task.build_model()
    for each in (model, plain):
        each.load_state_dict(weights(run.init))
        each.eval()
    attach_adapters(model, config)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in trained.values():
            value.normal_(std=0.3)
    return model, plain, {name: value.detach() for name, value in trained.items()}


def answer(run: Any, stage: str) -> Callable[[nn.Module], Tensor]:
    """What a model makes of some rows: its loss."""
    task = STAGES[stage][1](run)
    batch = task.prepare(next(iter(evaluation_batches(task.samples("validation"), 4, rank=0, world_size=1))))

    def loss(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.stack([value.float().sum() for name, value in sorted(task.evaluate(model, batch).items())])

    return loss


@pytest.mark.parametrize("stage", ["transformer", "prior", "decoder"])
def test_peft_reads_what_is_saved_and_computes_the_same(runs: dict[str, Any], stage: str, tmp_path: Path) -> None:
    run = runs[stage]
    ours, plain, trained = adapted_pair(run, stage)
    Adapter(trained, LORA.factor, stage, "", run.init).save(tmp_path / "adapter")
    loss = answer(run, stage)
    before, expected = loss(plain), loss(ours)
    assert not torch.allclose(before, expected, rtol=1e-3)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").base_model.model
    assert sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name) == sum(
        map(torch.numel, trained.values())
    )
    torch.testing.assert_close(loss(theirs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", ["transformer", "prior", "decoder"])
def test_a_merged_model_computes_the_same(runs: dict[str, Any], stage: str) -> None:
    run = runs[stage]
    ours, plain, trained = adapted_pair(run, stage)
    loss = answer(run, stage)
    merge(plain, trained, LORA.factor)
    torch.testing.assert_close(loss(plain), loss(ours), rtol=1e-4, atol=1e-4)


def test_targets_choose_layers_by_their_names_ends(runs: dict[str, Any]) -> None:
    *_, trained = adapted_pair(runs["transformer"], "transformer", ("attention.qkv",))
    assert len(trained) == 2 * TINY_DALLE.depth and all("attention.qkv.lora_" in name for name in trained)
    with pytest.raises(ConfigError, match=r"lora\.targets=kv"):
        adapted_pair(runs["transformer"], "transformer", ("kv",))


@pytest.mark.parametrize(
    ("stage", "preset"),
    [
        *(("transformer", preset) for preset in ("small", "medium", "dalle-1b", "dalle-12b")),
        *((stage, preset) for stage in ("prior", "decoder") for preset in ("small", "unclip")),
    ],
)
def test_adapters_of_presets_are_small(stage: str, preset: str) -> None:
    run: Any = load_preset(preset, stage, STAGES[stage][0])
    with torch.device("meta"):
        model = STAGES[stage][1].planned(run).build_model()
        whole = sum(parameter.numel() for parameter in model.parameters())
        attach_adapters(model, LoraConfig(rank=8))
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) < 0.02 * whole


def test_an_adapter_is_all_that_is_trained_kept_and_averaged_and_resumes_to_the_bit(
    runs: dict[str, Any], tmp_path: Path
) -> None:
    for stage in ("transformer", "prior", "decoder"):
        whole = dataclasses.replace(runs[stage], lora=LORA, run_dir=str(tmp_path / stage))
        trainer = fit(whole, stage)
        parted = dataclasses.replace(whole, run_dir=str(tmp_path / f"{stage}-parted"))
        fit(dataclasses.replace(parted, steps=2), stage)
        fit(parted, stage)
        assert losses(whole) == losses(parted)
        # It begins where a run does that trains all of the same model.
        unadapted = dataclasses.replace(runs[stage], steps=1, run_dir=str(tmp_path / f"{stage}-unadapted"))
        fit(unadapted, stage)
        assert losses(whole)[0] == pytest.approx(losses(unadapted)[0], rel=1e-6)
        folder = Path(whole.run_dir)
        for name in ("export/model.safetensors", "adapter/adapter_model.safetensors"):
            assert (folder / name).read_bytes() == (Path(parted.run_dir) / name).read_bytes()
        adapter = Adapter.load(folder)
        index = Index(trainer.directory.checkpoints.all()[-1] / "tensors")
        assert index.parameters.keys() == adapter.weights.keys()
        kinds = {name.split("/")[0] for name in index.tensors}
        assert kinds == {"weight", "average", "exp_avg", "exp_avg_sq"}
        averages = {name: index.tensor(f"average/{name}") for name in adapter.weights}
        assert all(
            torch.equal(value.view(adapter.weights[name].shape), adapter.weights[name])
            for name, value in averages.items()
        )
        assert all(bool(value.any()) for value in adapter.weights.values())
        before, after = weights(whole.init), weights(folder / "export")
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert moved == {name.replace("lora_A.", "") for name in adapter.weights if "lora_A" in name}
        # From the checkpoint, and from the adapter, the same model.
        export_checkpoint(folder, out=tmp_path / f"{stage}-again")
        merge_adapters(whole.init, [(folder, 1.0)], tmp_path / f"{stage}-merged")
        for made in ("again", "merged"):
            found = weights(tmp_path / f"{stage}-{made}")
            assert all(torch.equal(value, found[name]) for name, value in after.items())


@pytest.mark.launch
def test_layouts_change_nothing(runs: dict[str, Any], tmp_path: Path) -> None:
    """Two processes under every ZeRO stage against one, and whole weights from an initial model under ZeRO-3."""
    shards = {"stage": 3, "stage3_param_persistence_threshold": 0}
    layouts = {"zero2": {"stage": 2}, "zero3": shards}
    if EVERYTHING:
        layouts |= {"zero0": {"stage": 0}, "kept": {"stage": 3}}
    jobs: list[dict[str, Any]] = []
    for stage, lora in (("transformer", LORA), ("prior", LORA), ("decoder", LORA), ("decoder", LoraConfig())):
        kind = f"{stage}-{lora.rank}"
        whole = dataclasses.replace(runs[stage], lora=lora, run_dir=str(tmp_path / kind))
        fit(whole, stage)
        for name, zero in layouts.items():
            if name != "zero3" and stage != "transformer":
                continue
            run = dataclasses.replace(whole, run_dir=str(tmp_path / f"{kind}-{name}"))
            jobs.append(
                {
                    "name": f"{kind}-{name}",
                    "stage": stage,
                    "run": to_dict(run),
                    "deepspeed": {"zero_optimization": zero},
                }
            )
    replicas = dataclasses.replace(
        runs["transformer"],
        lora=LORA,
        parallel=ParallelConfig(replicas=2),
        run_dir=str(tmp_path / "transformer-2-replicas"),
    )
    jobs.append(
        {
            "name": "transformer-2-replicas",
            "stage": "transformer",
            "run": to_dict(replicas),
            "deepspeed": {"zero_optimization": shards},
        }
    )
    bf16 = dataclasses.replace(runs["transformer"], lora=LORA, run_dir=str(tmp_path / "transformer-2-bf16"))
    for zero in ({"stage": 0}, shards) if EVERYTHING else (shards,):
        run = dataclasses.replace(bf16, run_dir=f"{bf16.run_dir}-{zero['stage']}")
        engine = {"bf16": {"enabled": True}, "zero_optimization": zero}
        jobs.append({"name": Path(run.run_dir).name, "stage": "transformer", "run": to_dict(run), "deepspeed": engine})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = run_ranks(Path(__file__).parents[1] / "training" / "layouts_worker.py", tmp_path / "jobs.json", processes=2)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    for job in jobs:
        kind, is_bf16 = job["name"].rpartition("-")[0].removesuffix("-bf16"), "bf16" in job["name"]
        reference = dataclasses.replace(runs[job["stage"]], run_dir=str(tmp_path / kind))
        found = dataclasses.replace(reference, run_dir=job["run"]["run_dir"])
        assert losses(found) == pytest.approx(losses(reference), rel=2e-2 if is_bf16 else 1e-5), job["name"]
        if not is_bf16:
            ours, theirs = (weights(Path(each.run_dir) / "export") for each in (reference, found))
            for name, value in ours.items():
                torch.testing.assert_close(
                    theirs[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
                )


def test_adapters_stack_in_any_order_on_their_own_model_only(runs: dict[str, Any], tmp_path: Path) -> None:
    run = runs["transformer"]
    base = fingerprint(weights(run.init))
    for number in (1, 2):
        torch.manual_seed(number)
        *_, trained = adapted_pair(run, "transformer")
        Adapter(trained, LORA.factor, "transformer", base, run.init).save(tmp_path / str(number))
    one, two = (str(tmp_path / name) for name in "12")
    merge_adapters(run.init, [(one, 0.7), (two, -0.5)], tmp_path / "both")
    merge_adapters(run.init, [(two, -0.5), (one, 0.7)], tmp_path / "turned")
    both, turned, initial = weights(tmp_path / "both"), weights(tmp_path / "turned"), weights(run.init)
    assert all(torch.equal(value, turned[name]) for name, value in both.items())
    for name in ("blocks.0.attention.qkv", "blocks.1.down"):
        added = torch.zeros((), dtype=torch.float64)
        for path, weight in ((one, 0.7), (two, -0.5)):
            loaded = Adapter.load(path).weights
            a, b = (loaded[f"{name}.lora_{letter}.weight"].double() for letter in "AB")
            added = added + weight * LORA.factor * (b @ a)
        added = added.t() if name.endswith("down") else added  # that layer's weight is stored the other way round
        torch.testing.assert_close(both[f"{name}.weight"].double(), initial[f"{name}.weight"].double() + added)
    images = TextToImage.from_pretrained(tmp_path / "both").generate(["a red circle"], num=1)
    assert len(images[0]) == 1
    with pytest.raises(CheckpointError, match=f"--adapter {one}"):
        merge_adapters(tmp_path / "both", [(one, 1.0)], tmp_path / "wrong")
    with pytest.raises(ConfigError, match="--out"):
        merge_adapters(run.init, [(one, 1.0)], tmp_path / "both")
    with pytest.raises(CheckpointError, match="no adapter"):
        Adapter.load(run.init)
    assert [_weighted(text) for text in ("a:0.7", "a", "C:/a:-1", "C:/a")] == [
        ("a", 0.7),
        ("a", 1.0),
        ("C:/a", -1.0),
        ("C:/a", 1.0),
    ]


@pytest.mark.parametrize(
    ("change", "deepspeed", "option"),
    [
        ({"init": ""}, {}, "--init"),
        ({"parallel": ParallelConfig(tensor=2)}, {}, r"parallel\.tensor"),
        ({"optim": OptimConfig(moments="16-bit")}, {}, r"optim\.moments"),
        ({"scaling": ScalingConfig(in_fp32=True)}, {}, r"scaling\.in_fp32"),
        ({}, {"fp16": {"enabled": True}}, "gradient scales"),
    ],
)
def test_what_adapters_cannot_be_trained_with_is_refused(
    runs: dict[str, Any],
    change: dict[str, Any],
    deepspeed: dict[str, Any],
    option: str,
    dvae_export: Path,
    tokenizer_file: Path,
) -> None:
    parts = {"dvae": str(dvae_export), "tokenizer": str(tokenizer_file)}
    task = STAGES["transformer"][1](dataclasses.replace(runs["transformer"], lora=LORA, **change, **parts))

    class Divided:
        def size(self, axis: str) -> int:
            return int(getattr(task.run.parallel, axis, 1))

    with pytest.raises(ConfigError, match=option):
        task.check_adapters(Divided(), "fp16" if deepspeed else "fp32")  # type: ignore[arg-type]
