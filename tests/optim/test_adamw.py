"""AdamW against torch's own, against the paper's rule in float64, and through DeepSpeed's checkpoints."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle_ds.config import OptimConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.optim import adamw
from dalle_ds.optim.adamw import AdamW, rounding_warning
from dalle_ds.precision.codecs import FLOAT_0_6_10, FLOAT_1_6_9
from tests.conftest import EVERYTHING
from tests.processes import run_ranks

SIXTEEN = pytest.mark.parametrize("moments", ["fp32", "16-bit"])


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def give_gradients(parameters: list[Tensor], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def bits_of(optimizer: AdamW) -> list[Any]:
    """Everything that an update may change, as copies."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            found += [parameter.detach().clone(), *(copy.deepcopy(state[key]) for key in sorted(state))]
    return found


def assert_same_bits(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other)
        else:
            assert one == other


SHAPES = [(300_001,), (300, 7), (5,), (), (3, 4, 2, 2)]


def groups(parameters: list[Tensor]) -> list[dict[str, Any]]:
    return [
        {"params": parameters[:2], "weight_decay": 0.3},
        {"params": parameters[2:3], "lr": 3e-2},
        {"params": parameters[3:], "weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-3},
    ]


@pytest.mark.parametrize("clip", [None, 1e9], ids=["fused", "in chunks"])
def test_without_extras_it_is_torchs_adamw(clip: float | None) -> None:
    ours, theirs = tensors(*SHAPES), tensors(*SHAPES)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.045}
    optimizer = AdamW(groups(ours), **settings, second_moment_clip=clip)
    reference = torch.optim.AdamW(groups(theirs), **settings)
    for step in range(50):
        for parameters in (ours, theirs):
            give_gradients(parameters, step, scale=10.0 ** (step % 7 - 4))
            if step % 3 == 0:
                parameters[1].grad = None
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = 1e-2 / (1 + step)
            each.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[mine][name], reference.state[other][name], rtol=2e-6, atol=1e-9)
    assert float(optimizer.state[ours[1]]["step"]) == 33


@pytest.mark.parametrize("clip", [None, 1e9], ids=["fused", "in chunks"])
def test_other_layouts_and_types_are_torchs_too(clip: float | None) -> None:
    def make() -> list[Tensor]:
        image, matrix, table = tensors((4, 3, 5, 5), (40, 30), (20, 30))
        return [
            image.detach().to(memory_format=torch.channels_last).requires_grad_(),
            matrix.detach().bfloat16().requires_grad_(),
            table.detach()[:, ::3].requires_grad_(),
        ]

    ours, theirs = make(), make()
    optimizer = AdamW(ours, lr=0.1, second_moment_clip=clip)
    # torch's fused kernel takes bfloat16 to fp32 and back, its loops do not; but it takes no notice of strides.
    references = [torch.optim.AdamW(theirs[::2], lr=0.1), torch.optim.AdamW(theirs[1:2], lr=0.1, fused=True)]
    for step in range(10):
        for parameters in (ours, theirs):
            give_gradients(parameters, step)
            assert parameters[0].grad is not None
            if step % 2:
                parameters[0].grad = parameters[0].grad.to(memory_format=torch.channels_last)
        for each in (optimizer, *references):
            each.step()
    torch.testing.assert_close(ours[::2], theirs[::2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=2**-6, atol=2**-6)


def papers_rule(
    weight: float, gradients: list[float], lr: float, betas: tuple[float, float], eps: float, decay: float, clip: float
) -> tuple[float, float, float]:
    """Weight, mean and variance of one parameter after updates by float64 arithmetic (DALL·E App. B.2)."""
    mean = variance = 0.0
    for step, gradient in enumerate(gradients, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        variance = min(betas[1] * variance + (1 - betas[1]) * gradient**2, clip)
        weight -= lr * decay * weight
        weight -= lr * (mean / (1 - betas[0] ** step)) / (math.sqrt(variance / (1 - betas[1] ** step)) + eps)
    return weight, mean, variance


@SIXTEEN
def test_the_variance_is_clipped_before_it_is_used_and_stored(moments: Any) -> None:
    (parameter,) = tensors((200,))
    starts = parameter.tolist()
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.96), "eps": 1e-8}
    optimizer = AdamW([parameter], **settings, weight_decay=0.045, second_moment_clip=5.0, moments=moments)
    seen: list[list[float]] = []
    for step in range(30):
        give_gradients([parameter], step, scale=4.0)
        assert parameter.grad is not None
        seen.append(parameter.grad.tolist())
        optimizer.step()
    mean, variance = optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]
    if moments == "16-bit":
        mean, variance = FLOAT_1_6_9.decode(mean), FLOAT_0_6_10.decode(variance)
    expected = [
        papers_rule(start, list(column), **settings, decay=0.045, clip=5.0)
        for start, column in zip(starts, zip(*seen, strict=True), strict=True)
    ]
    weights, means, variances = (torch.tensor(column) for column in zip(*expected, strict=True))
    tolerance = {"fp32": 1e-6, "16-bit": 2e-3}[moments]
    torch.testing.assert_close(parameter.detach(), weights, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mean, means, rtol=tolerance, atol=4 * tolerance)
    torch.testing.assert_close(variance, variances, rtol=tolerance, atol=tolerance)
    assert (variance == 5).float().mean() > 0.4 and variance.max() == 5  # the clip did something


def test_a_gradient_bound_takes_the_fast_path_where_the_clip_cannot_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    slow: list[int] = []
    original = adamw._update_piece
    monkeypatch.setattr(adamw, "_update_piece", lambda *args: (slow.append(1), original(*args)))
    bounded, exact = tensors((1000,), (30, 30)), tensors((1000,), (30, 30))
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.96), "second_moment_clip": 5.0}
    fast, reference = AdamW(bounded, **settings), AdamW(exact, **settings)
    # Whether each update may use the fused kernel: 2.23² < 5 < 2.24², and what is not finite is no bound.
    for step, (scale, bound, is_fused) in enumerate(
        [(0.5, 2.23, True), (9.0, 40.0, False), (0.5, 2.23, True), (0.5, None, False), (0.5, math.nan, False),
         (0.5, math.inf, False), (0.5, 2.24, False), (0.5, 2.23, True)]
    ):  # fmt: skip
        give_gradients(bounded, step, scale)
        give_gradients(exact, step, scale)
        for parameter in (*bounded, *exact):
            assert parameter.grad is not None
            if scale < 1:
                parameter.grad.clamp_(-2.2, 2.2)
        slow.clear()
        with fast.updating(gradient_bound=bound):
            fast.step()
        assert len(slow) == (0 if is_fused else 2), step
        reference.step()
        assert len(slow) == (2 if is_fused else 4), step
    for mine, other in zip(bounded, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
        variances = fast.state[mine]["exp_avg_sq"], reference.state[other]["exp_avg_sq"]
        torch.testing.assert_close(*variances, rtol=1e-6, atol=1e-6)


def test_a_bound_does_not_vouch_for_variances_from_before_the_clip() -> None:
    (parameter,) = tensors((100,))
    optimizer = AdamW([parameter], lr=1e-2, betas=(0.9, 0.96))
    for step in range(5):
        give_gradients([parameter], step, scale=20.0)
        with optimizer.updating(gradient_bound=100.0):
            optimizer.step()
    assert optimizer.state[parameter]["exp_avg_sq"].max() > 50
    optimizer.param_groups[0]["second_moment_clip"] = 5.0
    give_gradients([parameter], 9, scale=0.1)
    with optimizer.updating(gradient_bound=1.0):
        optimizer.step()
    assert optimizer.state[parameter]["exp_avg_sq"].max() == 5.0


@SIXTEEN
@pytest.mark.parametrize("whole", [True, False])
def test_skipping_changes_no_bit(moments: Any, whole: bool) -> None:
    parameters = tensors((1000,), (20, 20))
    optimizer = AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}], moments=moments)
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
    before = bits_of(optimizer)
    per_tensor = len(before) // 2
    give_gradients(parameters, 10)
    with optimizer.updating([] if whole else [1]):
        optimizer.step()
    after = bits_of(optimizer)
    assert_same_bits(after[:per_tensor], before[:per_tensor])
    if whole:
        assert_same_bits(after, before)
    else:
        assert not torch.equal(after[per_tensor], before[per_tensor])
        assert float(optimizer.state[parameters[1]]["step"]) == 4
    optimizer.step()
    assert float(optimizer.state[parameters[0]]["step"]) == 4


def test_a_group_that_is_not_updated_is_so_wherever_it_stands() -> None:
    """DeepSpeed's ZeRO-1 and 2 call `step` with one group after the other in the place of all."""
    parameters = tensors((10,), (20,))
    optimizer = AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    give_gradients(parameters, 0)
    before, groups = [parameter.detach().clone() for parameter in parameters], optimizer.param_groups
    with optimizer.updating([1]):
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(before, parameters, strict=True)] == [True, False]


def test_groups_may_be_empty_and_gradients_missing() -> None:
    parameters = tensors((10,), (20,))
    optimizer = AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "moments": "16-bit"}])
    optimizer.step()
    assert all(not optimizer.state.get(parameter) for parameter in parameters)
    whole = optimizer.param_groups
    # The two ways in which DeepSpeed hands over one shard at a time.
    give_gradients(parameters, 0)
    for index in range(2):
        optimizer.param_groups = [whole[index]]
        optimizer.step()
    optimizer.param_groups = whole
    assert [float(optimizer.state[parameter]["step"]) for parameter in parameters] == [1, 1]
    for group in whole:
        group["params"] = []
    for index, parameter in enumerate(parameters):
        whole[index]["params"] = [parameter]
        optimizer.step()
        whole[index]["params"] = []
    assert [float(optimizer.state[parameter]["step"]) for parameter in parameters] == [2, 2]


def test_a_closure_is_called_with_gradients() -> None:
    (parameter,) = tensors((3,))
    optimizer = AdamW([parameter])

    def closure() -> Tensor:
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == (tensors((3,))[0] ** 2).sum()
    assert float(optimizer.state[parameter]["step"]) == 1


def test_moments_in_16_bits_take_four_bytes() -> None:
    (parameter,) = tensors((40_000,))
    optimizer = AdamW([parameter], moments="16-bit", second_moment_clip=5.0)
    give_gradients([parameter], 0)
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    stored = sum(value.untyped_storage().nbytes() for value in state.values() if isinstance(value, Tensor))
    assert stored == 4 * parameter.numel() + 4  # and the step count


@pytest.mark.parametrize("stochastic", [False, True])
def test_chunks_do_not_show(stochastic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (2**18, 64):
        monkeypatch.setattr(adamw, "CHUNK", chunk)
        (parameter,) = tensors((1003,))
        optimizer = AdamW([parameter], moments="16-bit", stochastic_rounding=stochastic, second_moment_clip=0.5)
        for step in range(5):
            give_gradients([parameter], step)
            optimizer.step()
        results.append(bits_of(optimizer))
    if not stochastic:
        assert_same_bits(*results)
    else:
        assert results[0][0].shape == results[1][0].shape
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)


def fit(moments: Any, stochastic: bool, seed: int) -> float:
    """Loss of a small network on its 4096 examples after 500 updates."""
    torch.manual_seed(seed)
    inputs = torch.randn(4096, 8)
    targets = torch.sin(2 * inputs[:, :1]) * inputs[:, 1:2] + 0.1 * torch.randn(4096, 1)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = AdamW(
        model.parameters(),
        lr=1e-2,
        betas=(0.9, 0.96),
        weight_decay=0.045,
        second_moment_clip=5.0,
        moments=moments,
        stochastic_rounding=stochastic,
    )
    loss = torch.zeros(())
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 500)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "at random"])
def test_16_bit_moments_train_as_well(stochastic: bool) -> None:
    # Two seeds: that of a single one moves by a percent or two if its first weights move by 1e-5.
    reference = sum(fit("fp32", False, seed) for seed in range(2))
    assert reference < 2 * 0.025  # a linear model is left with 0.4
    assert sum(fit("16-bit", stochastic, seed) for seed in range(2)) == pytest.approx(reference, rel=0.02)


def test_a_variance_that_is_rounded_to_nearest_can_stand_still_and_at_random_it_does_not() -> None:
    found = {}
    for stochastic in (False, True):
        parameter = torch.zeros(20_000, requires_grad=True)
        optimizer = AdamW(
            [parameter], betas=(0.9, 0.9999), moments="16-bit", stochastic_rounding=stochastic, weight_decay=0.0
        )
        for step in range(400):
            parameter.grad = torch.full_like(parameter, 1.0 if step == 0 else 0.0)
            optimizer.step()
        found[stochastic] = FLOAT_0_6_10.decode(optimizer.state[parameter]["exp_avg_sq"]).mean().item()
    exact = 1e-4 * 0.9999**399
    assert found[True] == pytest.approx(exact, rel=1e-3)
    assert found[False] > 1.03 * exact  # a decay of 1e-4 is less than half a step of 2^-11 to 2^-10


@pytest.mark.parametrize("beta2", [0.9, 0.96, 0.98, 0.999, 0.9999])
def test_a_variance_that_cannot_follow_is_warned_of_and_no_other(beta2: float) -> None:
    """From four times the square of a constant gradient, it comes to rest within 25 %, or there is a warning."""
    parameter = torch.nn.Parameter(torch.zeros(50))
    optimizer = AdamW([parameter], betas=(0.9, beta2), moments="16-bit")
    parameter.grad = torch.linspace(1, 2, 50)
    optimizer.step()
    state = optimizer.state[parameter]
    FLOAT_0_6_10.encode(4 * parameter.grad.square(), out=state["exp_avg_sq"])
    seen = None
    while seen is None or not torch.equal(seen, state["exp_avg_sq"]):
        seen = state["exp_avg_sq"].clone()
        optimizer.step()
    off = float((1 - parameter.grad.square() / FLOAT_0_6_10.decode(seen)).max())
    warning = rounding_warning(OptimConfig(beta2=beta2, moments="16-bit"))
    assert (warning is None) == (off < 0.25)
    assert warning is None or "optim.stochastic_rounding" in warning
    for optim in (OptimConfig(beta2=beta2), OptimConfig(beta2=beta2, moments="16-bit", stochastic_rounding=True)):
        assert rounding_warning(optim) is None


def make(moments: Any, stochastic: bool, seed: int = 1) -> tuple[list[Tensor], AdamW]:
    parameters = tensors((300_001,), (30, 7), (5,))
    optimizer = AdamW(
        [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "lr": 1e-2}],
        betas=(0.9, 0.96),
        moments=moments,
        stochastic_rounding=stochastic,
        seed=seed,
        second_moment_clip=5.0,
    )
    return parameters, optimizer


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize(("moments", "stochastic"), [("fp32", False), ("16-bit", False), ("16-bit", True)])
def test_a_run_goes_on_from_its_state_bit_for_bit(moments: Any, stochastic: bool, file: bool, tmp_path: Path) -> None:
    parameters, optimizer = make(moments, stochastic)
    for step in range(8):
        if step == 4:
            saved: Any = {"optimizer": optimizer.state_dict(), "weights": [p.detach().clone() for p in parameters]}
            saved = copy.deepcopy(saved)
            if file:
                torch.save(saved, tmp_path / "state.pt")
                saved = torch.load(tmp_path / "state.pt", weights_only=True)
        give_gradients(parameters, step)
        if step == 0:
            parameters[1].grad = None  # the order of first updates is not that of parameters
        optimizer.step()
    again, resumed = make(moments, stochastic)
    resumed.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for parameter, weights in zip(again, saved["weights"], strict=True):
            parameter.copy_(weights)
    for step in range(4, 8):
        give_gradients(again, step)
        resumed.step()
    assert_same_bits(bits_of(resumed), bits_of(optimizer))
    kind = torch.int16 if moments == "16-bit" else torch.float32
    assert resumed.state[again[0]]["exp_avg"].dtype == resumed.state[again[0]]["exp_avg_sq"].dtype == kind


def test_loaded_state_is_a_copy() -> None:
    parameters, optimizer = make("16-bit", False)
    give_gradients(parameters, 0)
    optimizer.step()
    before = bits_of(optimizer)[1:5]
    again, resumed = make("16-bit", False)
    resumed.load_state_dict(optimizer.state_dict())
    give_gradients(again, 1)
    resumed.step()
    assert_same_bits(bits_of(optimizer)[1:5], before)


def test_noise_depends_on_seed_step_and_tensor() -> None:
    def noise(seed: int) -> list[Tensor]:
        """Which of 5000 equal elements were rounded up: of tensor 0 and 1 in update 1, of tensor 0 in update 2."""
        parameters = [torch.zeros(5000, requires_grad=True) for _ in range(2)]
        optimizer = AdamW(parameters, betas=(0.5, 0.5), moments="16-bit", stochastic_rounding=True, seed=seed)
        found = []
        for step in range(2):
            for parameter in parameters:
                parameter.grad = torch.full((5000,), 2 / 3)
            optimizer.step()
            found += [optimizer.state[parameter]["exp_avg"].clone() for parameter in parameters[: 2 - step]]
            for parameter in parameters:
                optimizer.state[parameter]["exp_avg"].zero_()
        assert all(len(codes.unique()) == 2 for codes in found)
        return [codes > codes.min() for codes in found]

    first = noise(1)
    assert all(torch.equal(one, again) for one, again in zip(first, noise(1), strict=True))
    different = [*first, *noise(2)]
    for index, one in enumerate(different):
        assert all((one == other).float().mean() < 0.7 for other in different[:index])  # independent: 5 in 9


def test_a_state_of_torchs_adamw_can_be_taken_over() -> None:
    theirs, ours = tensors((100,), (5, 5)), tensors((100,), (5, 5))
    reference, optimizer = torch.optim.AdamW(theirs, lr=1e-2), AdamW(ours, lr=5.0, second_moment_clip=0.05)
    give_gradients(theirs, 0)
    reference.step()
    optimizer.load_state_dict(reference.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["second_moment_clip"], group["moments"]) == (1e-2, 0.05, "fp32")
    give_gradients(ours, 1, scale=1e-4)
    ours[0].grad = 5000 * ours[0].grad
    optimizer.step()
    state = optimizer.state[ours[0]]
    assert float(state["step"]) == 2 and state["exp_avg_sq"].max() <= 0.05


def test_settings_that_were_saved_win_but_for_the_format() -> None:
    parameters, optimizer = make("fp32", False)
    give_gradients(parameters, 0)
    optimizer.step()
    state = optimizer.state_dict()
    _, other = make("fp32", False)
    other.param_groups[0].update(lr=7.0, second_moment_clip=1.0)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 1e-3 and other.param_groups[0]["second_moment_clip"] == 5.0
    _, compact = make("16-bit", False)
    compact.load_state_dict(make("fp32", False)[1].state_dict())  # from before its first update
    assert [group["moments"] for group in compact.param_groups] == ["16-bit", "16-bit"]


@pytest.mark.parametrize(("saved", "wanted"), [("fp32", "16-bit"), ("16-bit", "fp32")])
def test_moments_of_another_format_are_refused(saved: Any, wanted: Any) -> None:
    parameters, optimizer = make(saved, False)
    give_gradients(parameters, 0)
    optimizer.step()
    _, other = make(wanted, False)
    with pytest.raises(CheckpointError, match=f"are {saved}.*moments={wanted}.*optim.moments"):
        other.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["moments"] = wanted
    with pytest.raises(ConfigError, match="before the first update"):
        optimizer.step()


def test_moments_of_another_shape_are_refused() -> None:
    parameters, optimizer = make("16-bit", False)
    give_gradients(parameters, 0)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][1]["exp_avg"] = torch.zeros(30, 1, dtype=torch.int16)  # would broadcast
    with pytest.raises(CheckpointError, match=r"\(30, 1\).*\(30, 7\)"):
        make("16-bit", False)[1].load_state_dict(state)


def test_a_copy_goes_on_alike() -> None:
    parameters, optimizer = make("16-bit", True)
    give_gradients(parameters, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    give_gradients(parameters, 1)
    give_gradients([parameter for group in twin.param_groups for parameter in group["params"]], 1)
    optimizer.step()
    twin.step()
    assert_same_bits(bits_of(twin), bits_of(optimizer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"second_moment_clip": 0.0}, "second_moment_clip"),
        ({"second_moment_clip": 9.0, "moments": "16-bit"}, "second_moment_clip=9.0"),
        ({"moments": "bf16"}, "moments"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamW(tensors((3,)), **settings)
    with pytest.raises(ConfigError, match=message):
        AdamW([{"params": tensors((3,)), **settings}])


def test_tensors_that_cannot_be_updated_are_refused() -> None:
    half = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    half.grad = torch.ones_like(half)
    with pytest.raises(ConfigError, match=r"fp32 parameters or shards, found torch\.bfloat16"):
        AdamW([half], moments="16-bit").step()
    complex_one = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    complex_one.grad = torch.ones_like(complex_one)
    with pytest.raises(ConfigError, match="complex"):
        AdamW([complex_one]).step()
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse"):
        AdamW(embedding.parameters()).step()


# What a process of its own does for the last test: two groups, one of each storage, through save and load.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(13, 50)
        self.second = nn.Linear(50, 7)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs))).pow(2).mean()


def train_and_resume(layout: dict[str, Any], folder: Path, mesh: Any) -> dict[str, Any]:
    """Figures of a run of six updates against one that was saved after three and went on in a fresh engine."""
    import deepspeed

    stage = layout["zero_optimization"]["stage"]
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **layout,
    }

    def build() -> Any:
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
            model = Net()
        matrices = [model.first.weight, model.second.weight]
        optimizer = AdamW(
            [
                {"params": matrices, "moments": "16-bit", "weight_decay": 0.1},
                {"params": [model.first.bias, model.second.bias], "weight_decay": 0.0},
            ],
            lr=1e-2,
            betas=(0.9, 0.96),
            second_moment_clip=1e-4,
            stochastic_rounding=True,
            seed=4,
        )
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        return engine

    def train(engine: Any, steps: range) -> list[float]:
        losses = []
        for step in steps:
            inputs = torch.randn(16, 13, generator=torch.Generator().manual_seed(step))
            loss = engine(inputs)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    def states(engine: Any) -> list[dict[str, Any]]:
        optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        found = [{**state, "weights": shard.detach()} for shard, state in optimizer.state.items()]
        return sorted(found, key=lambda state: state["index"])

    straight = build()
    losses = train(straight, range(3))
    straight.save_checkpoint(str(folder), tag="three")
    losses += train(straight, range(3, 6))
    resumed = build()
    resumed.load_checkpoint(str(folder), tag="three")
    continued = train(resumed, range(3, 6))
    ends, others = states(straight), states(resumed)
    return {
        "losses": losses,
        "continued": continued,
        "differ": [
            name
            for one, other in zip(ends, others, strict=True)
            for name in one
            if not torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name]))
        ],
        "types": [str(state[name].dtype) for state in others for name in ("exp_avg", "exp_avg_sq")],
        "steps": [float(state["step"]) for state in others],
    }


LAYOUTS: dict[str, dict[str, Any]] = {
    f"{name}{stage}": {"zero_optimization": {"stage": stage, **more}}
    for name, stages, more in (
        ("zero", (0, 1, 2, 3), {}),
        ("offload", (1, 2, 3), {"offload_optimizer": {"device": "cpu"}}),
    )
    for stage in stages
}
if not EVERYTHING:
    LAYOUTS = {name: LAYOUTS[name] for name in ("zero0", "zero3", "offload2")}


@pytest.fixture(scope="module")
def deepspeed_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("deepspeed")
    done = run_ranks(__file__, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.launch
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepspeed_saves_loads_and_goes_on_bit_for_bit(layout: str, deepspeed_runs: dict[str, Any]) -> None:
    found = deepspeed_runs[layout]
    assert found["continued"] == found["losses"][3:]
    assert found["differ"] == []
    assert set(found["steps"]) == {6.0}
    assert sorted(set(found["types"])) == ["torch.float32", "torch.int16"]
    assert found["losses"][5] < 0.9 * found["losses"][0]
    assert found["losses"] == pytest.approx(deepspeed_runs["zero0"]["losses"], rel=1e-3)


def main() -> None:
    from dalle_ds.parallel import Mesh

    folder = Path(sys.argv[-1])
    mesh = Mesh.start("cpu")
    found = {}
    for name, layout in LAYOUTS.items():
        found[name] = train_and_resume(layout, folder / name, mesh)
    (folder / "found.json").write_text(json.dumps(found))
    mesh.stop()


if __name__ == "__main__":
    main()
