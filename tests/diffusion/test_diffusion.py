"""Schedules, grids, steps and losses against `diffusers`, and against float64 references where `diffusers` is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dalle_ds.diffusion import (
    AnalyticVariance,
    ScoreMoments,
    clip_x0,
    ddim_inversion_step,
    ddim_step,
    ddpm_step,
    guide,
    hybrid_loss,
    noise_schedule,
    step_grid,
)
from dalle_ds.diffusion.losses import discretized_nll
from dalle_ds.diffusion.steps import learned_log_variance
from dalle_ds.errors import ConfigError

diffusers = pytest.importorskip("diffusers")
SHAPE = (3, 6, 8, 8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("name", "theirs"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
def test_schedules_are_those_of_diffusers(name: str, theirs: str) -> None:
    reference = diffusers.DDPMScheduler(1000, beta_schedule=theirs, beta_start=1e-4, beta_end=0.02)
    ours = noise_schedule(name)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.alpha_bars.float(), reference.alphas_cumprod, rtol=2e-4, atol=1e-9)
    torch.testing.assert_close(ours.betas.float(), reference.betas, rtol=1e-3, atol=1e-7)


def test_the_linear_schedule_keeps_its_ends_at_any_length() -> None:
    short = noise_schedule("linear", 100)
    assert short.betas[0].item() == pytest.approx(1e-3) and short.betas[-1].item() == pytest.approx(0.2)


@pytest.mark.parametrize("bad", [("cosine", 0), ("linear", 20), ("sigmoid", 10)])
def test_impossible_schedules_are_refused(bad: tuple[str, int]) -> None:
    with pytest.raises(ConfigError):
        noise_schedule(*bad)  # type: ignore[arg-type]


def test_grids() -> None:
    assert step_grid(1000, 1000) == list(range(1000))
    assert step_grid("64", 1000)[0] == 0 and step_grid(64, 1000)[-1] == 999 and len(step_grid(64, 1000)) == 64
    glide = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399]
    glide += [400, 500, 599, 600, 799, 800, 999]
    assert step_grid("10,10,3,2,2", 1000) == glide
    assert step_grid("fast27", 1000) == [*glide[:-1], 997]
    assert step_grid("strided 250", 1000) == list(range(0, 1000, 4))
    assert step_grid("1", 1000) == [0]
    for bad in ("0", "1001", "600,1", "strided 999", "ddim50", "", "-3"):
        with pytest.raises(ConfigError):
            step_grid(bad, 1000)


@pytest.mark.parametrize("count", [1, 7, 27, 64])
def test_spaced_grids_are_linspace(count: int) -> None:
    reference = diffusers.DDPMScheduler(1000, timestep_spacing="linspace")
    reference.set_timesteps(count)
    assert step_grid(count, 1000)[::-1] == (reference.timesteps.tolist() if count > 1 else [0])


@pytest.mark.parametrize("predicts", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("count", [3, 15, 27, 64, 1000])
def test_ddpm_is_that_of_diffusers(predicts: str, count: int) -> None:
    """With a learned range of variances, on a linspace grid."""
    reference = diffusers.DDPMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type={"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}[predicts],
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    reference.set_timesteps(count)
    reference.alphas_cumprod = noise_schedule("cosine").alpha_bars
    reference.one = torch.tensor(1.0, dtype=torch.float64)
    schedule = noise_schedule("cosine").on(step_grid(count, 1000))
    for step in {count - 1, count // 2, 1}:
        x, output = randn(3, 3, 8, 8), (randn(*SHAPE, seed=1) / 3).clamp(-1, 1)
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        want = reference.step(output, int(schedule.timesteps[step]), x, generator=generator).prev_sample
        x0 = schedule.x0_of(predicts, output[:, :3], x, step)  # type: ignore[arg-type]
        variance = learned_log_variance(schedule, step, output[:, 3:]).exp()
        torch.testing.assert_close(ddpm_step(schedule, step, x, x0, noise, variance), want, rtol=1e-6, atol=1e-6)


def test_a_learned_variance_stays_in_its_range_and_finds_back() -> None:
    """Without a bound it may grow until it is infinite."""
    schedule = noise_schedule("cosine").on(step_grid(50, 1000))
    output = torch.tensor([-1e4, -1.0, 0.3, 1.0, 1e4], dtype=torch.float64, requires_grad=True)
    found = learned_log_variance(schedule, 20, output)
    low, high = schedule.posterior_variances[20].log(), schedule.betas[20].log()
    torch.testing.assert_close(found[[0, 1, 3, 4]], torch.stack([low, low, high, high]))
    found.sum().backward()
    assert output.grad is not None
    torch.testing.assert_close(output.grad, ((high - low) / 2).expand(5))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_that_of_diffusers(eta: float) -> None:
    reference = diffusers.DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True
    )
    reference.set_timesteps(50)
    reference.alphas_cumprod = noise_schedule("cosine").alpha_bars
    schedule = noise_schedule("cosine").on(step_grid("strided 50", 1000))
    assert reference.timesteps.tolist() == schedule.timesteps.tolist()[::-1]
    for step in (0, 1, 25, 49):
        x, epsilon, noise = randn(3, 3, 8, 8), randn(3, 3, 8, 8, seed=1), randn(3, 3, 8, 8, seed=2)
        want = reference.step(epsilon, int(schedule.timesteps[step]), x, eta=eta, variance_noise=noise).prev_sample
        x0 = schedule.x0_of("epsilon", epsilon, x, step)
        torch.testing.assert_close(ddim_step(schedule, step, x, x0, eta, noise), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [1, 15, 27, 64])
def test_every_grid_goes_to_its_own_previous_step(count: int) -> None:
    """Schedulers that subtract a fixed stride land beside the grid. A model that knows x₀ stays on the path."""
    schedule = noise_schedule("cosine").on(step_grid(count, 1000))
    x0, noise = randn(2, 5), randn(2, 5, seed=1)
    x = schedule.add_noise(x0, noise, count - 1)
    for step in reversed(range(count)):
        x = ddim_step(schedule, step, x, x0)
        if step:
            torch.testing.assert_close(x, schedule.add_noise(x0, noise, step - 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x, x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("predicts", ["epsilon", "x0", "v"])
def test_predictions_mean_the_same_x0(predicts: str) -> None:
    schedule, step = noise_schedule("linear"), torch.tensor([0, 400, 999])
    x0, noise = randn(3, 4), randn(3, 4, seed=1)
    x = schedule.add_noise(x0, noise, step)
    output = schedule.target(predicts, x0, noise, step)  # type: ignore[arg-type]
    torch.testing.assert_close(schedule.x0_of(predicts, output, x, step), x0, rtol=1e-6, atol=1e-6)  # type: ignore[arg-type]
    torch.testing.assert_close(schedule.epsilon_of(x0, x, step), noise, rtol=1e-6, atol=1e-6)


def test_inversion_is_undone_by_ddim() -> None:
    schedule = noise_schedule("cosine").on(step_grid(20, 900))
    x, epsilon = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for step in range(20):
        noisier = ddim_inversion_step(schedule, step, x, epsilon)
        x0 = schedule.x0_of("epsilon", epsilon, noisier, step)
        torch.testing.assert_close(ddim_step(schedule, step, noisier, x0), x, rtol=1e-8, atol=1e-8)
        x = noisier


@pytest.mark.parametrize("count", [2, 8, 64])
def test_analytic_ddpm_ends_with_the_datas_variance(count: int) -> None:
    """Of Gaussian data the true x₀ given x_t is known, and so is the best reverse variance: any grid then ends with exactly
    the data's mean and variance, where β̃ loses variance and β adds some."""
    mean, variance, schedule = 0.3, 0.04, noise_schedule("cosine").on(step_grid(count, 1000))
    alpha_bar = schedule.alpha_bars
    gamma = 1 / (alpha_bar * variance + 1 - alpha_bar)  # E score², exactly
    steps = AnalyticVariance(schedule, gamma, variance).ddpm()
    m, v = alpha_bar[-1].sqrt() * mean, alpha_bar[-1] * variance + 1 - alpha_bar[-1]  # of x_T
    plain = v
    for step in reversed(range(count)):
        a = schedule.alpha_bars[step]
        slope = a.sqrt() * variance / (a * variance + 1 - a)  # x₀ = mean + slope · (x − √ᾱ mean)
        probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        x0 = mean + slope * (probe - a.sqrt() * mean)
        ends = ddpm_step(schedule, step, probe, x0, torch.zeros_like(probe)).flatten()
        gain = ends[1] - ends[0]
        m, v = ends[0] + gain * m, gain**2 * v + (steps[step] if step else 0)
        plain = gain**2 * plain + (schedule.posterior_variances[step] if step else 0)
    left = variance * (1 - schedule.alpha_bars[0]) / (schedule.alpha_bars[0] * variance + 1 - schedule.alpha_bars[0])
    torch.testing.assert_close(m.item(), mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((v + left).item(), variance, rtol=1e-5, atol=0)
    assert plain < v


def test_score_moments_add_up_over_processes() -> None:
    schedule = noise_schedule("cosine").on([10, 500, 990])
    x0, noise = 0.2 * randn(3000, 4), randn(3000, 4, seed=1)
    step = torch.arange(3000) % 3
    x = schedule.add_noise(x0, noise, step)
    alpha_bar = schedule.alpha_bars[step][:, None]
    known = alpha_bar.sqrt() * 0.04 / (alpha_bar * 0.04 + 1 - alpha_bar) * x  # the best guess of N(0, 0.04) data
    whole, first, second = ScoreMoments(schedule), ScoreMoments(schedule), ScoreMoments(schedule)
    whole.add(step, x, known)
    first.add(step[:1000], x[:1000], known[:1000])
    second.add(step[1000:], x[1000:], known[1000:])
    torch.testing.assert_close(first.sums + second.sums, whole.sums, rtol=1e-12, atol=0)
    gamma, error = whole.mean()
    exact = 1 / (schedule.alpha_bars * 0.04 + 1 - schedule.alpha_bars)
    assert ((gamma - exact).abs() < 4 * error).all() and (error < 0.05 * gamma).all()
    with pytest.raises(ConfigError):
        ScoreMoments(schedule).mean()


def test_certainty_is_never_less_than_the_datas() -> None:
    """The covariance is kept under the data's own variance, not under 1."""
    schedule = noise_schedule("cosine").on(step_grid(8, 1000))
    none = AnalyticVariance(schedule, torch.zeros(8), 0.04)  # Γ = 0: nothing known
    at_most = schedule.posterior_variances + 0.04 * (
        schedule.previous_alpha_bars * (schedule.betas / (1 - schedule.alpha_bars)).square()
    )
    assert (none.ddpm() <= at_most + 1e-15).all()
    torch.testing.assert_close(
        AnalyticVariance(schedule, torch.full((8,), 1e9), 0.04).ddpm(), schedule.posterior_variances
    )
    with pytest.raises(ConfigError):
        AnalyticVariance(schedule, torch.zeros(7), 0.04)


def test_guidance_leaves_variance_channels_alone() -> None:
    conditional, unconditional = randn(*SHAPE), randn(*SHAPE, seed=1)
    guided = guide(conditional, unconditional, 3.0, channels=3)
    assert torch.equal(guided[:, 3:], conditional[:, 3:])
    torch.testing.assert_close(guided[:, :3], (3 * conditional - 2 * unconditional)[:, :3])
    assert torch.equal(guide(conditional, unconditional, 1.0), unconditional + (conditional - unconditional))


def test_clipping() -> None:
    x0 = torch.tensor([[-3.0, 0.5, 1.5, 0.1], [0.2, -0.3, 0.1, 0.0]])
    assert torch.equal(clip_x0(x0), x0)
    assert torch.equal(clip_x0(x0, 1.0), x0.clamp(-1, 1))
    dynamic = clip_x0(x0, 1.0, quantile=1.0)
    torch.testing.assert_close(dynamic[0], x0[0] / 3)
    torch.testing.assert_close(dynamic[1], x0[1])  # never enlarged
    with pytest.raises(ConfigError):
        clip_x0(x0, None, quantile=0.9)


def test_a_callers_tensors_stay() -> None:
    schedule = noise_schedule("cosine").on(step_grid(4, 1000))
    x, x0, noise = randn(2, 3), randn(2, 3, seed=1), randn(2, 3, seed=2)
    copies = x.clone(), x0.clone(), noise.clone()
    ddpm_step(schedule, 2, x, x0, noise)
    ddim_step(schedule, 2, x, x0, 0.5, noise)
    clip_x0(x0, 0.1)
    guide(x, x0, 2.0)
    assert all(torch.equal(a, b) for a, b in zip((x, x0, noise), copies, strict=True))


def test_discretized_likelihoods_sum_to_one() -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_variance in ((0.2, -6.0), (-0.97, -3.0), (3.0, -8.0), (0.0, 2.0)):
        nll = discretized_nll(levels, torch.full_like(levels, mean), torch.full_like(levels, log_variance), 256)
        assert torch.isfinite(nll).all()
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_hybrid_loss_is_smallest_at_the_true_posterior() -> None:
    schedule = noise_schedule("cosine")
    x0, noise, step = randn(4, 2, 4, 4), randn(4, 2, 4, 4, seed=1), torch.tensor([1, 10, 500, 999])
    exact = schedule.target("epsilon", x0, noise, step)
    low = torch.cat([exact, torch.full_like(exact, -1)], dim=1)  # β̃, and the true mean
    simple, bits = hybrid_loss(schedule, "epsilon", low, x0, noise, step, 256)
    torch.testing.assert_close(simple, torch.zeros(4))
    torch.testing.assert_close(bits, torch.zeros(4), rtol=0, atol=1e-4)
    _, worse = hybrid_loss(
        schedule, "epsilon", torch.cat([exact, torch.full_like(exact, 1)], dim=1), x0, noise, step, 256
    )
    high, true = schedule.betas, schedule.posterior_variances
    ratio = (true / high)[step]
    want = 0.5 * (ratio - 1 - ratio.log()) / math.log(2)
    torch.testing.assert_close(worse.double(), want, rtol=1e-3, atol=1e-4)


def test_the_variational_term_trains_the_variance_only() -> None:
    schedule = noise_schedule("cosine")
    x0, noise, step = randn(4, 2, 4, 4), randn(4, 2, 4, 4, seed=1), torch.tensor([0, 10, 500, 999])
    output = randn(4, 4, 4, 4, seed=3).requires_grad_()
    _, bits = hybrid_loss(schedule, "epsilon", output, x0, noise, step, 256)
    bits.sum().backward()
    assert output.grad is not None and torch.isfinite(output.grad).all()
    assert not output.grad[:, :2].any() and output.grad[:, 2:].any()
    with pytest.raises(ConfigError):
        hybrid_loss(schedule, "epsilon", output[:, :3], x0, noise, step, 256)
