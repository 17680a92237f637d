"""Contrastive gradients do not depend on how a batch is shared out; SAM is SAM: two launches, against plain torch.

The reference knows nothing of engines: a plain model, a loss written out here, torch's autograd and AdamW.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.models.clip import Clip
from tests.conftest import ROOT, free_port
from tests.training.contrastive_worker import BATCH, CASES, RHO, Case, cases_of, plain_model, rows

pytestmark = pytest.mark.launch

WORKER = Path(__file__).with_name("contrastive_worker.py")
LAUNCHED = [(processes, name) for processes in (2, 4) for name in cases_of(processes)]
EXACT = [(n, name) for n, name in LAUNCHED if CASES[name].precision == "fp32" and not CASES[name].broken]
SHARP = [(n, name) for n, name in EXACT if CASES[name].sharp]
BROKEN = [(n, name) for n, name in LAUNCHED if CASES[name].broken]
BF16 = [(n, name) for n, name in LAUNCHED if CASES[name].precision == "bf16"]
Launches = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """What a launch of so many processes found."""
    folder = tmp_path_factory.mktemp("contrastive")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(WORKER), str(folder), *(str(free_port()) for _ in (2, 4))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return cache(lambda processes: torch.load(folder / f"found-{processes}.pt", weights_only=True))


def joint_loss(groups: list[Clip]) -> Tensor:
    """Symmetric cross-entropy of the whole batch, each group of pairs with weights of its own."""
    batch, share = rows(0, BATCH), BATCH // len(groups)
    outputs = []
    for number, model in enumerate(groups):
        part = slice(number * share, (number + 1) * share)
        outputs.append(model(batch["image"][part], batch["text"][part]))
    image = torch.cat([output.image_embeddings for output in outputs]).double()
    text = torch.cat([output.text_embeddings for output in outputs]).double()
    scale = torch.cat([output.scale.double().expand(share) for output in outputs])[:, None]
    targets = torch.arange(BATCH)
    return (F.cross_entropy(scale * image @ text.T, targets) + F.cross_entropy(scale * text @ image.T, targets)) / 2


def gradients_of(groups: list[Clip]) -> list[dict[str, Tensor]]:
    """Of each group's weights, as many times as there are groups; rows of others count through theirs only, the scale is
    common."""
    for model in groups:
        model.zero_grad()
    joint_loss(groups).backward()
    each = [
        {name: len(groups) * p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
        for model in groups
    ]
    # All rows pull at one scale, though each group has its own value of it where the weights are perturbed.
    scales = [model.logit_scale.detach().exp().clamp(max=100) for model in groups]
    pull = torch.stack([gradients["logit_scale"] / s for gradients, s in zip(each, scales, strict=True)]).mean(0)
    return [{**gradients, "logit_scale": pull * scale} for gradients, scale in zip(each, scales, strict=True)]


@cache
def reference(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the whole batch on one process; with SAM, the gradient where it is taken."""
    groups = [plain_model(case).double() for _ in range(BATCH // case.sharp if case.sharp else 1)]
    loss = float(joint_loss(groups).detach())
    if case.sharp:
        moved = []
        for model, gradients in zip(groups, gradients_of(groups), strict=True):
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
            moved.append(deepcopy(model))
            with torch.no_grad():
                for name, parameter in moved[-1].named_parameters():
                    parameter.add_(gradients[name], alpha=RHO / norm)
        groups = moved
    each = gradients_of(groups)
    return loss, {name: torch.stack([gradients[name] for gradients in each]).mean(0) for name in each[0]}


@pytest.mark.parametrize(("processes", "name"), EXACT)
def test_loss_and_gradients_are_those_of_one_process(launched: Launches, processes: int, name: str) -> None:
    case, report = CASES[name], launched(processes)[name]
    loss, expected = reference(case)
    assert report["figures"]["loss"] == pytest.approx(loss, rel=1e-5)
    total = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    assert report["figures"]["grad_norm"] == pytest.approx(total, rel=1e-5)
    assert report["gradients"].keys() == expected.keys()
    for weight, gradient in expected.items():
        # The bias of keys has no gradient: it adds the same to all of a row's logits.
        distance = (report["gradients"][weight].double() - gradient).norm()
        assert distance < 1e-5 * gradient.norm() + 1e-6 * total, weight


@pytest.mark.parametrize(("processes", "name"), EXACT)
def test_the_step_is_taken_from_the_weights_as_they_were(launched: Launches, processes: int, name: str) -> None:
    """Torch's AdamW, on the same gradients; and every process computes with the result."""
    report = launched(processes)[name]
    assert all(rank["restored"] and rank["applied"] and not rank["unchanged"] for rank in report["everywhere"])
    assert (report["steps"], report["samples"]) == (1, BATCH // CASES[name].replicas)
    model = plain_model(CASES[name])
    for weight, parameter in model.named_parameters():
        parameter.grad = report["gradients"][weight].clone()
    undecayed = ("token_embedding.weight", "position_embedding.weight")
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith(undecayed)]
    others = [p for p in model.parameters() if all(p is not each for each in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.045}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.96)).step()
    for weight, parameter in model.named_parameters():
        torch.testing.assert_close(report["weights"][weight], parameter.detach(), rtol=1e-5, atol=1e-6)
    model.load_state_dict(report["weights"])
    batch = rows(0, BATCH)
    embeddings = model.eval().embed_texts(batch["text"])
    for rank in report["everywhere"]:
        torch.testing.assert_close(rank["embeddings"], embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("processes", "name"), LAUNCHED)
def test_engines_take_the_weights_of_another_model(launched: Launches, processes: int, name: str) -> None:
    report = launched(processes)[name]
    assert report["loaded exactly"]
    assert max(rank["loaded"] for rank in report["everywhere"]) < (0.02 if CASES[name].precision == "bf16" else 1e-5)


@pytest.mark.parametrize(("processes", "name"), SHARP)
def test_the_gradient_of_sam_is_another_one(launched: Launches, processes: int, name: str) -> None:
    """That it agrees with the reference proves nothing if the perturbation is too small to matter."""
    _, flat = reference(Case(0))
    report = launched(processes)[name]
    sharp = report["gradients"]
    total = math.sqrt(sum(float(gradient.square().sum()) for gradient in flat.values()))
    assert math.sqrt(sum(float((sharp[weight] - flat[weight]).square().sum()) for weight in flat)) > 0.01 * total
    assert report["figures"]["sharpness"] > 0


@pytest.mark.parametrize(("processes", "name"), BROKEN)
def test_what_is_not_finite_on_one_process_leaves_the_update_out(launched: Launches, processes: int, name: str) -> None:
    report = launched(processes)[name]
    assert all(rank["restored"] and rank["unchanged"] and not rank["applied"] for rank in report["everywhere"])
    assert not math.isfinite(report["figures"]["loss"]) and report["steps"] == 1
    expected = plain_model().eval().embed_texts(rows(0, BATCH)["text"])
    for rank in report["everywhere"]:
        torch.testing.assert_close(rank["embeddings"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("processes", "name"), BF16)
def test_bf16_follows(launched: Launches, processes: int, name: str) -> None:
    report = launched(processes)[name]
    loss, expected = reference(CASES[name])
    total = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    assert report["figures"]["loss"] == pytest.approx(loss, rel=0.02)
    assert report["figures"]["loss"] != pytest.approx(loss, rel=1e-6), "bf16 was not used"
    ours = report["gradients"]
    distance = math.sqrt(sum(float((ours[weight] - expected[weight]).square().sum()) for weight in expected))
    # Where SAM takes it, the gradient is another one by as much as it is long, and depends the more on rounding.
    assert distance < (0.3 if CASES[name].sharp else 0.1) * total
    assert all(rank["restored"] for rank in report["everywhere"])


@pytest.mark.parametrize("processes", [2, 4])
def test_at_its_limit_the_scale_is_moved_by_the_whole_batch_or_not_at_all(launched: Launches, processes: int) -> None:
    """Some processes' own rows would raise it, others' lower it."""
    name = "zero1 at the limit"
    _, expected = reference(CASES[name])
    assert float(expected["logit_scale"]) > 0, "this test needs a scale that wants to fall"
    found = float(launched(processes)[name]["gradients"]["logit_scale"])
    assert found == pytest.approx(float(expected["logit_scale"]), rel=1e-5)


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_of_gathered_rows_are_summed(launched: Launches, processes: int) -> None:
    everyone, own = launched(processes)["peers"].split([6 * processes, 6])
    assert everyone.tolist() == [float(rank) for rank in range(processes) for _ in range(6)]
    assert own.tolist() == [processes * (processes + 1) / 2] * 6
