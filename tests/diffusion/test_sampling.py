"""The samplers against published trajectories and against toys whose answer is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from perturbdiff.config import DiffusionConfig, SamplingConfig, check_sampling
from perturbdiff.diffusion.sampling import ddim_step, ddpm_step, predict_x0, sample, timesteps
from perturbdiff.diffusion.schedule import Schedule
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.reference.convert import covariate_encoder_from_reference, denoiser_from_reference

LINEAR = Schedule("linear", 1000)
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


class Recorded:
    """A denoiser that keeps its arguments."""

    def __init__(self, denoiser: Callable[..., Tensor]) -> None:
        self.denoiser = denoiser
        self.calls: list[tuple[Tensor, int, object, Tensor | None]] = []

    def __call__(self, x_t: Tensor, t: Tensor, control: Tensor, cond: object, self_cond: Tensor | None) -> Tensor:
        (one_t,) = t.unique().tolist()
        assert t.shape == x_t.shape[:1]
        self.calls.append((x_t.clone(), one_t, cond, self_cond))
        return self.denoiser(x_t, t, control, cond, self_cond)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise_source(*shape: int, seed: int = 1) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(*shape, generator=generator)


# Published trajectories.


def published(numbers: dict[str, Tensor]) -> Denoiser:
    return denoiser_from_reference({k: v for k, v in numbers.items() if k.startswith("model.")}, n_heads=4)


def reference_config(sampler: str, start_time: int = 20, w: float = 1.0, eta: float = 0.0) -> SamplingConfig:
    return SamplingConfig(
        sampler=sampler, spacing="reference", start_time=start_time, guidance_scale=w, eta=eta, cutoff=1e-4
    )


def trajectory(
    numbers: dict[str, Tensor], config: SamplingConfig, noises: Tensor | None
) -> tuple[Tensor, Tensor, list[int]]:
    """The output of each step, the estimates handed on between steps, the timesteps."""
    denoiser = Recorded(published(numbers))
    draws: Iterator[Tensor] = iter(()) if noises is None else iter(noises)
    result = sample(
        denoiser, numbers["in.noise"], numbers["in.cont_emb"], numbers["in.batch_emb"], config, LINEAR, draws.__next__
    )
    assert next(draws, None) is None
    conditional = [call for call in denoiser.calls if call[2] is not None]
    assert conditional[0][3] is None
    samples = torch.stack([*(call[0] for call in conditional[1:]), result])
    return samples, torch.stack([call[3] for call in conditional[1:]]), [call[1] for call in conditional]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_every_step_equals_the_published_one(golden, agree, sampler):
    numbers = golden(f"{sampler}_tiny")
    samples, estimates, steps = trajectory(numbers, reference_config(sampler), numbers.get("noise_per_step"))
    assert steps == numbers["t_per_step"].tolist()
    agree(samples, numbers["sample_per_step"], "samples")
    agree(estimates, numbers["pred_xstart_per_step"][:-1], "estimates of x0")
    agree(samples[-1], numbers["pred_xstart_per_step"][-1], "last estimate of x0")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_100_steps_equal_the_published_ones(golden, agree, sampler):
    numbers = golden(f"{sampler}_tiny")
    config = reference_config(sampler, start_time=100)
    samples, _, steps = trajectory(numbers, config, numbers.get("start100.noise_per_step"))
    assert len(steps) == 100
    agree(samples[-1], numbers["start100.final_sample"], "sample")
    agree(samples[-1], numbers["start100.final_pred_xstart"], "last estimate of x0")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sample_without_guidance_equals_the_published_one(golden, agree, sampler):
    numbers = golden(f"{sampler}_tiny")
    samples, _, _ = trajectory(numbers, reference_config(sampler, w=0.0), numbers.get("noise_per_step"))
    agree(samples[-1], numbers["noguide.final_sample"], "sample")


def test_every_step_of_stochastic_ddim_equals_the_published_one(golden, agree):
    numbers = golden("ddim_tiny")
    samples, _, _ = trajectory(numbers, reference_config("ddim", eta=0.5), numbers["eta0.5.noise_per_step"])
    agree(samples, numbers["eta0.5.sample_per_step"], "samples")


@pytest.mark.parametrize("t", [19, 0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_parts_of_a_step_equal_the_published_ones(golden, agree, sampler, t):
    numbers = golden(f"{sampler}_tiny")
    stored = {k.removeprefix(f"t{t}."): v for k, v in numbers.items() if k.startswith(f"t{t}.")}
    config, denoiser = reference_config(sampler), published(numbers)
    control, cov, x_t, self_cond = (
        numbers["in.cont_emb"], numbers["in.batch_emb"], stored["x_t"], stored["prev_pred"],
    )  # fmt: skip
    times = torch.full((3,), t)
    with torch.no_grad():
        agree(denoiser(x_t, times, control, cov, self_cond), stored["x0_cond"], "conditional estimate")
        agree(denoiser(x_t, times, control, None, self_cond), stored["x0_uncond"], "null estimate")
        x0 = predict_x0(denoiser, x_t, t, control, cov, self_cond, config)
    agree(x0, stored["pred_xstart"], "guided estimate")
    mean = ddpm_step(x_t, x0, t, t - 1, LINEAR, config, None)
    agree(mean, stored["mean"], "mean")
    if t > 0:
        sigma = ddpm_step(torch.zeros(1), torch.zeros(1), t, t - 1, LINEAR, config, torch.ones(1))
        agree(2 * sigma.log().expand_as(mean), stored["log_variance"], "log variance")


def test_ddpm_step_has_the_published_coefficients_at_every_t(golden, agree):
    numbers, config = golden("schedules"), SamplingConfig()
    one, zero = torch.ones(()), torch.zeros(())

    def coefficient(x_t: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        return torch.stack([ddpm_step(x_t, x0, t, t - 1, LINEAR, config, noise) for t in range(1000)])

    agree(coefficient(zero, one, zero), numbers["linear.posterior_mean_coef1"], "of x0", rtol=1e-6, atol=0)
    agree(coefficient(one, zero, zero), numbers["linear.posterior_mean_coef2"], "of x_t", rtol=1e-6, atol=0)
    std = numbers["linear.fixed_large_variance"].sqrt()
    agree(coefficient(zero, zero, one)[1:], std[1:], "of the noise", rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_reference_sampler_equals_the_published_checkpoint(golden, agree, weights):
    numbers = golden("ckpt_tiny")
    prefix = f"{weights}.state."
    state = {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}
    encoder = covariate_encoder_from_reference({k: v for k, v in state.items() if k.startswith("cov_encoder.")})
    denoiser = denoiser_from_reference({k: v for k, v in state.items() if k.startswith("model.")}, n_heads=4)
    x_t, control, t = numbers["in.x_t"], numbers["in.cont_emb"], numbers["in.t"]
    with torch.no_grad():
        cov = encoder(numbers["in.cov_pert"], numbers["in.cov_celltype"], numbers["in.cov_batch"])
        agree(cov, numbers[f"{weights}.batch_emb"], "covariate embedding")
        agree(denoiser(x_t, t, control, cov, numbers["in.prev_pred"]), numbers[f"{weights}.x"], "conditional estimate")
        agree(denoiser(x_t, t, control, None, numbers["in.prev_pred"]), numbers[f"{weights}.uncond_x"], "null estimate")
        result = sample(denoiser, x_t, control, cov, reference_config("ddim", start_time=100), LINEAR)
    agree(result, numbers[f"{weights}.ddim100_sample"], "sample")


# Toys.


@pytest.mark.parametrize("n_steps", [1, 2, 10, 37])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_the_true_x0_as_estimate_returns_it(n_steps, eta):
    x0 = normal(2, 3, 4).abs()
    config = SamplingConfig(n_steps=n_steps, eta=eta)
    result = sample(lambda *_: x0, normal(2, 3, 4, seed=1), x0, None, config, LINEAR, noise_source(2, 3, 4))
    torch.testing.assert_close(result, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_steps", [2, 10, 100])
def test_deterministic_ddim_with_the_true_x0_stays_on_its_line_to_the_noise(n_steps):
    x0, noise = normal(2, 3, 4).abs(), normal(2, 3, 4, seed=1)
    denoiser = Recorded(lambda *_: x0)
    sample(denoiser, noise, x0, None, SamplingConfig(n_steps=n_steps), LINEAR)
    last = ALPHA_BAR[-1]
    eps = (noise.double() - math.sqrt(last) * x0) / math.sqrt(1 - last)
    for x_t, t, _, _ in denoiser.calls:
        expected = math.sqrt(ALPHA_BAR[t]) * x0 + math.sqrt(1 - ALPHA_BAR[t]) * eps
        torch.testing.assert_close(x_t.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_with_the_true_x0_keeps_the_marginals_of_the_forward_process(eta):
    shape = (4, 100, 100)
    start = math.sqrt(ALPHA_BAR[-1]) * 2 + math.sqrt(1 - ALPHA_BAR[-1]) * normal(*shape)
    denoiser = Recorded(lambda x_t, *_: torch.full_like(x_t, 2.0))
    config = SamplingConfig(n_steps=8, eta=eta)
    sample(denoiser, start, start, None, config, LINEAR, noise_source(*shape))
    assert len(denoiser.calls) == 8
    for x_t, t, _, _ in denoiser.calls:
        assert_moments(x_t, math.sqrt(ALPHA_BAR[t]) * 2, 1 - ALPHA_BAR[t])


@pytest.mark.parametrize(("t", "t_next"), [(999, 800), (500, 499), (40, 3), (1, 0)])
def test_ddim_step_with_eta_1_is_the_posterior_given_x0(t, t_next):
    # q(x_next | x_t, x0), by Bayes from x_next ~ N(sqrt(ab_next) x0, 1 - ab_next) and x_t | x_next.
    x0, x_t = normal(2, 3, 4).double(), normal(2, 3, 4, seed=1).double()
    ab_next, alpha = ALPHA_BAR[t_next], ALPHA_BAR[t] / ALPHA_BAR[t_next]
    precision = 1 / (1 - ab_next) + alpha / (1 - alpha)
    mean = (math.sqrt(ab_next) / (1 - ab_next) * x0 + math.sqrt(alpha) / (1 - alpha) * x_t) / precision
    for eta in (1.0, 0.5):
        config, one = SamplingConfig(eta=eta), torch.ones_like(x0)
        centre = ddim_step(x_t, x0, t, t_next, LINEAR, config, 0 * one)
        spread = ddim_step(x_t, x0, t, t_next, LINEAR, config, one) - centre
        if eta == 1:
            torch.testing.assert_close(centre, mean, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(spread, one * eta / math.sqrt(precision), rtol=2e-3, atol=0)


def assert_moments(x: Tensor, mean: float, variance: float) -> None:
    """Mean and variance of independent normal values, at five standard errors."""
    n = x.numel()
    assert x.double().mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert x.double().var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


def gaussian_denoiser(mean: float, variance: float) -> Callable[..., Tensor]:
    """E[x0 | x_t] of x0 ~ N(mean, variance)."""

    def denoise(x_t: Tensor, t: Tensor, *_: object) -> Tensor:
        ab = float(ALPHA_BAR[int(t[0])])
        return mean + variance * math.sqrt(ab) / (variance * ab + 1 - ab) * (x_t - math.sqrt(ab) * mean)

    return denoise


@pytest.mark.parametrize("n_steps", [3, 10, 50])
def test_strided_ddpm_is_exact_for_a_gaussian_of_variance_1(n_steps):
    # Then beta, the variance the step adds, is the true one of any stride: x_t ~ N(sqrt(ab) mean, 1) at every t.
    # The last step returns E[x0 | x_t], whose variance is ab.
    shape = (4, 100, 100)
    denoiser = Recorded(gaussian_denoiser(2.0, 1.0))
    start = normal(*shape) + 2 * math.sqrt(ALPHA_BAR[-1])
    config = SamplingConfig(sampler="ddpm", n_steps=n_steps, cutoff=-math.inf)
    result = sample(denoiser, start, start, None, config, LINEAR, noise_source(*shape))
    for x_t, t, _, _ in denoiser.calls:
        assert_moments(x_t, math.sqrt(ALPHA_BAR[t]) * 2, 1)
    assert_moments(result, 2.0, ALPHA_BAR[denoiser.calls[-1][1]])


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_all_steps_sample_a_gaussian_of_any_variance(sampler, eta):
    shape = (1, 100, 100)
    config = SamplingConfig(sampler=sampler, spacing="reference", start_time=1000, eta=eta, cutoff=-math.inf)
    result = sample(
        gaussian_denoiser(3.0, 0.25), normal(*shape), normal(*shape), None, config, LINEAR, noise_source(*shape)
    )
    assert result.mean().item() == pytest.approx(3, abs=0.03)
    assert result.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_1_plus_w_times_conditional_less_w_times_null(w):
    conditional, null = normal(2, 3, 4).abs() + 5, normal(2, 3, 4, seed=1).abs()
    denoiser = Recorded(lambda x_t, t, control, cond, self_cond: null if cond is None else conditional)
    self_cond = normal(2, 3, 4, seed=2)
    config = SamplingConfig(guidance_scale=w, cutoff=-math.inf)
    x0 = predict_x0(denoiser, normal(2, 3, 4), 7, conditional, "condition", self_cond, config)
    torch.testing.assert_close(x0, conditional + w * (conditional - null))
    assert [call[2] for call in denoiser.calls] == (["condition"] if w == 0 else ["condition", None])
    assert all(call[1] == 7 and call[3] is self_cond for call in denoiser.calls)


def test_estimates_under_the_cutoff_become_0_and_others_stay():
    estimate = torch.tensor([[[-3.0, 0.0, 0.0999, 0.1, 0.2, 7.0]]])
    config = SamplingConfig(cutoff=0.1)
    x0 = predict_x0(lambda *_: estimate, estimate, 5, estimate, None, None, config)
    assert x0.tolist() == torch.tensor([[[0.0, 0.0, 0.0, 0.1, 0.2, 7.0]]]).tolist()


def test_each_step_sees_the_estimate_of_the_step_before():
    denoiser = Recorded(lambda x_t, t, *_: torch.full_like(x_t, 1.0 + int(t[0])))
    sample(denoiser, normal(1, 2, 3), normal(1, 2, 3), "condition", SamplingConfig(n_steps=5), LINEAR)
    times = [call[1] for call in denoiser.calls]
    assert times == timesteps(SamplingConfig(n_steps=5), LINEAR) == [999, 799, 599, 399, 199]
    assert denoiser.calls[0][3] is None
    assert [call[3].unique().tolist() for call in denoiser.calls[1:]] == [[1.0 + t] for t in times[:-1]]


def test_control_and_condition_reach_every_call():
    seen = []

    def denoiser(x_t: Tensor, t: Tensor, control: Tensor, cond: object, self_cond: Tensor | None) -> Tensor:
        seen.append((control, cond))
        return x_t

    control, cond = normal(1, 5, 3), object()
    sample(denoiser, normal(1, 2, 3), control, cond, SamplingConfig(n_steps=4, guidance_scale=1), LINEAR)
    assert len(seen) == 8
    assert all(c is control for c, _ in seen)
    assert [label for _, label in seen] == [cond, None] * 4


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.3)])
def test_stochastic_samplers_draw_noise_once_a_step(sampler, eta):
    draws = iter(normal(6, 1, 2, 3, seed=1))
    config, x = SamplingConfig(sampler=sampler, eta=eta, n_steps=6), normal(1, 2, 3)
    sample(lambda x_t, *_: x_t, x, x, None, config, LINEAR, draws.__next__)
    assert next(draws, None) is None


def test_deterministic_ddim_draws_no_noise():
    def refuse() -> Tensor:
        raise AssertionError("noise was drawn")

    sample(lambda x_t, *_: x_t, normal(1, 2, 3), normal(1, 2, 3), None, SamplingConfig(n_steps=3), LINEAR, refuse)


def test_last_step_adds_no_noise():
    x0, x_t = normal(1, 2, 3).abs(), normal(1, 2, 3, seed=1)
    for step in (ddim_step, ddpm_step):
        result = step(x_t, x0, 40, -1, LINEAR, SamplingConfig(eta=1.0), torch.full((1, 2, 3), 1e6))
        torch.testing.assert_close(result, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.1)])
def test_a_stochastic_sampler_without_noise_is_an_error_that_says_what_to_give(sampler, eta):
    x = normal(1, 2, 3)
    with pytest.raises(ValueError, match=f"'{sampler}'.*give draw_noise"):
        sample(lambda *_: x, x, x, None, SamplingConfig(sampler=sampler, eta=eta), LINEAR)


def test_reference_spacing_runs_every_t_below_start_time():
    assert timesteps(reference_config("ddim", start_time=4), LINEAR) == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 0}, r"sampling.n_steps \(0\)"),
        ({"n_steps": 51}, r"sampling.n_steps \(51\)"),
        ({"spacing": "reference", "start_time": 51}, r"sampling.start_time \(51\)"),
        ({"spacing": "reference", "start_time": 0}, r"sampling.start_time \(0\)"),
        ({"eta": 1.5}, r"sampling.eta \(1.5\)"),
        ({"eta": -0.1}, r"sampling.eta \(-0.1\)"),
        ({"guidance_scale": -1.0}, r"sampling.guidance_scale \(-1.0\)"),
    ],
)
def test_trajectories_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(SamplingConfig(**settings), DiffusionConfig(n_timesteps=50))


def test_every_number_of_steps_up_to_n_timesteps_is_allowed():
    for n in range(1, 51):
        check_sampling(SamplingConfig(n_steps=n), DiffusionConfig(n_timesteps=50))
        check_sampling(SamplingConfig(spacing="reference", start_time=n, n_steps=1), DiffusionConfig(n_timesteps=50))
