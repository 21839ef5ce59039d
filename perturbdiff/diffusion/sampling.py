"""Sampling: from noise to a denoised cell set, with DDIM or DDPM, self-conditioning and guidance.

Song et al. 2021 (DDIM), Ho et al. 2020 (DDPM), Ho & Salimans 2022 (guidance). B = sets, S = cells, G = genes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from perturbdiff.config import SamplingConfig
from perturbdiff.diffusion.schedule import Schedule


class Denoise(Protocol):
    """What the samplers call: positional (x_t, t, control, cond, self_cond); `cond` None is the null condition."""

    def __call__(self, x_t: Tensor, t: Tensor, control: Tensor, cond: Any, self_cond: Tensor | None, /) -> Tensor: ...


def timesteps(config: SamplingConfig, schedule: Schedule) -> list[int]:
    """The t of each denoiser call, descending.

    `strided` spreads n_steps over the whole schedule. `reference` runs start_time - 1, ..., 0, all of them.
    """
    if config.spacing == "strided":
        return schedule.strided(config.n_steps)
    return list(range(config.start_time - 1, -1, -1))


@torch.no_grad()
def sample(
    denoiser: Denoise,
    noise: Tensor,
    control: Tensor,
    cond: Any,
    config: SamplingConfig,
    schedule: Schedule,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Run the reverse process from `noise`.

    Parameters
    ----------
    denoiser
        x0-predicting network, in eval mode.
    noise
        (B, S, G) standard normal.
    control
        (B, S', G), model units.
    cond
        Condition, handed to the denoiser as it is.
    draw_noise
        Gives (B, S, G) standard normal noise for each step of DDPM and of DDIM with eta > 0; called once a step,
        for the last one too, so that a trajectory's draws do not depend on its length. Required then.

    Returns
    -------
    (B, S, G) denoised sets, model units, values under config.cutoff set to 0.
    """
    steps = timesteps(config, schedule)
    stochastic = config.sampler == "ddpm" or config.eta > 0
    if stochastic and draw_noise is None:
        raise ValueError(f"sampler {config.sampler!r} with eta {config.eta} draws noise at each step; give draw_noise.")
    step = ddpm_step if config.sampler == "ddpm" else ddim_step
    x_t, x0 = noise, None
    for t, t_next in zip(steps, [*steps[1:], -1], strict=True):
        x0 = predict_x0(denoiser, x_t, t, control, cond, x0, config)
        fresh = draw_noise() if stochastic and draw_noise is not None else None
        x_t = step(x_t, x0, t, t_next, schedule, config, fresh)
    return torch.where(x_t < config.cutoff, 0.0, x_t)


def predict_x0(
    denoiser: Denoise,
    x_t: Tensor,
    t: int,
    control: Tensor,
    cond: Any,
    self_cond: Tensor | None,
    config: SamplingConfig,
) -> Tensor:
    """Guided estimate (1 + w) x0(cond) - w x0(null), values under the cutoff set to 0.

    The published code guides in eps space; for a given x_t that is the same line.
    """
    times = torch.full((x_t.shape[0],), t, device=x_t.device)
    x0 = denoiser(x_t, times, control, cond, self_cond)
    if config.guidance_scale > 0:
        w = config.guidance_scale
        x0 = (1 + w) * x0 - w * denoiser(x_t, times, control, None, self_cond)
    return torch.where(x0 < config.cutoff, 0.0, x0)


def ddim_step(
    x_t: Tensor, x0: Tensor, t: int, t_next: int, schedule: Schedule, config: SamplingConfig, noise: Tensor | None
) -> Tensor:
    """x at `t_next` (-1 is the end: x0 itself). Song et al. 2021, Eq. 12.

    In float32 from ab on, as published: near t = 0, 1 - ab loses four digits there, and trajectories show it.
    """
    if t_next < 0:
        return x0
    ab, ab_next = schedule.alpha_bar(t).float(), schedule.alpha_bar(t_next).float()
    sigma = config.eta * ((1 - ab_next) / (1 - ab)).sqrt() * (1 - ab / ab_next).sqrt()
    recip, recip_m1 = (1 / schedule.alpha_bar(t)).sqrt().float(), (1 / schedule.alpha_bar(t) - 1).sqrt().float()
    eps = (recip * x_t - x0) / recip_m1
    x = ab_next.sqrt() * x0 + (1 - ab_next - sigma**2).clamp_min(0).sqrt() * eps
    return x if noise is None else x + sigma * noise


def ddpm_step(
    x_t: Tensor, x0: Tensor, t: int, t_next: int, schedule: Schedule, config: SamplingConfig, noise: Tensor | None
) -> Tensor:
    """Ancestral step with the "fixed large" variance, beta_t (Ho et al. 2020, Eq. 7).

    Strided steps use the betas of the shortened chain, 1 - ab_t / ab_next (Nichol & Dhariwal 2021).
    """
    ab, ab_next = schedule.alpha_bar(t), schedule.alpha_bar(t_next)
    beta = 1 - ab / ab_next
    coef_x0 = (ab_next.sqrt() * beta / (1 - ab)).float()
    coef_x = ((1 - beta).sqrt() * (1 - ab_next) / (1 - ab)).float()
    mean = coef_x0 * x0 + coef_x * x_t
    return mean if noise is None or t_next < 0 else mean + beta.sqrt().float() * noise
