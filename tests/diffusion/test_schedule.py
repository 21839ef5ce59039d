"""The forward process against the published coefficients, closed forms and sampled moments."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from perturbdiff.diffusion.schedule import Schedule, make_betas

NAMES = ["linear", "cosine", "power_cosine"]


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_equal_the_published_ones(golden, agree, name):
    expected = {k.removeprefix(f"{name}."): v for k, v in golden("schedules").items() if k.startswith(f"{name}.")}
    schedule = Schedule(name, 1000)
    beta, ab = schedule.betas, schedule.alphas_cumprod
    ab_prev = torch.stack([schedule.alpha_bar(t - 1) for t in range(1000)])
    variance = beta * (1 - ab_prev) / (1 - ab)
    ours = {
        "betas": beta,
        "alphas_cumprod": ab,
        "alphas_cumprod_prev": ab_prev,
        "alphas_cumprod_next": torch.cat([ab[1:], torch.zeros(1, dtype=torch.float64)]),
        "sqrt_alphas_cumprod": ab.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - ab).sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / ab).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / ab - 1).sqrt(),
        "posterior_mean_coef1": beta * ab_prev.sqrt() / (1 - ab),
        "posterior_mean_coef2": (1 - beta).sqrt() * (1 - ab_prev) / (1 - ab),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": torch.cat([variance[1:2], variance[1:]]).log(),
        "fixed_large_variance": torch.cat([variance[1:2], beta[1:]]),
        "fixed_large_log_variance": torch.cat([variance[1:2], beta[1:]]).log(),
    }
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        assert value.dtype == torch.float64
        agree(value, expected[key], key, rtol=1e-9, atol=1e-12)


def test_q_sample_equals_the_published_one(golden, agree):
    numbers = golden("loss_tiny")
    x0, t, noise = numbers["in.x_start"], numbers["in.t"], numbers["in.noise"]
    schedule = Schedule("linear", 1000)
    agree(schedule.q_sample(x0, t, noise), numbers["q_sample.x_t_f64"], "float64 noise")
    x_t = schedule.q_sample(x0, t, noise.float())
    assert x_t.dtype == torch.float32
    agree(x_t, numbers["q_sample.f32noise"], "float32 noise")


@pytest.mark.parametrize(("name", "power"), [("cosine", 1.0), ("power_cosine", 0.3)])
@pytest.mark.parametrize("n_timesteps", [10, 37, 1000])
def test_cosine_schedules_follow_their_closed_form(name, power, n_timesteps):
    def f(u: float) -> float:
        return (math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2) ** power

    schedule = Schedule(name, n_timesteps)
    for t in range(n_timesteps - 1):  # the last beta is cut at 0.999
        assert schedule.alphas_cumprod[t].item() == pytest.approx(f((t + 1) / n_timesteps) / f(0), rel=1e-9)
    assert schedule.betas[-1].item() == 0.999


def test_linear_schedule_is_1e_4_to_0_02_at_1000_steps():
    betas = make_betas("linear", 1000).numpy()
    np.testing.assert_allclose(betas, 1e-4 + np.arange(1000) * (0.02 - 1e-4) / 999, rtol=1e-12)
    cumulated = [float(np.prod(1 - betas[: t + 1])) for t in range(0, 1000, 37)]
    np.testing.assert_allclose(Schedule("linear", 1000).alphas_cumprod[::37].numpy(), cumulated, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_timesteps", [1, 2, 20, 100, 1000])
def test_signal_falls_at_every_step_and_stays_positive(name, n_timesteps):
    schedule = Schedule(name, n_timesteps)
    alpha_bar = [schedule.alpha_bar(t).item() for t in range(-1, n_timesteps)]
    assert alpha_bar[0] == 1
    assert all(0 < later < earlier for earlier, later in pairwise(alpha_bar))


@pytest.mark.parametrize("n_timesteps", [20, 100, 400, 1000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_last_step_has_next_to_no_signal_whatever_the_number_of_steps(name, n_timesteps):
    assert Schedule(name, n_timesteps).alphas_cumprod[-1] < 1e-4


@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_q_sample_has_the_moments_of_the_chain_of_small_steps(t):
    # x_s = sqrt(1 - beta_s) x_{s-1} + sqrt(beta_s) noise, carried on as mean and variance.
    mean, variance = 1.7, 0.0
    for s in range(t + 1):
        beta = 1e-4 + s * (0.02 - 1e-4) / 999
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    noise = torch.randn(1, 500, 400, generator=torch.Generator().manual_seed(t))
    x_t = Schedule("linear", 1000).q_sample(torch.full_like(noise, 1.7), torch.tensor([t]), noise).double()
    n = noise.numel()
    assert x_t.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert x_t.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


def test_q_sample_takes_one_t_per_set():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(4, 3, 5, generator=generator), torch.randn(4, 3, 5, generator=generator)
    t = torch.tensor([0, 300, 300, 999])
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x_t = Schedule("linear", 1000).q_sample(x0, t, noise)
    for b in range(4):
        signal, sigma = math.sqrt(alpha_bar[t[b]]), math.sqrt(1 - alpha_bar[t[b]])
        np.testing.assert_allclose(x_t[b].numpy(), signal * x0[b].numpy() + sigma * noise[b].numpy(), atol=1e-6)


@pytest.mark.parametrize("n_timesteps", [1, 2, 3, 7, 10, 50, 101, 1000])
def test_strided_timesteps_are_distinct_descending_and_start_at_the_noisiest(n_timesteps):
    schedule = Schedule("linear", n_timesteps)
    for n_steps in range(1, n_timesteps + 1):
        steps = schedule.strided(n_steps)
        assert len(steps) == n_steps
        assert steps[0] == n_timesteps - 1
        assert steps[-1] >= 0
        assert all(later < earlier for earlier, later in pairwise(steps))
        gaps = [earlier - later for earlier, later in zip(steps, [*steps[1:], -1], strict=True)]
        assert max(abs(gap - n_timesteps / n_steps) for gap in gaps) <= 1
    assert schedule.strided(n_timesteps) == list(range(n_timesteps))[::-1]
