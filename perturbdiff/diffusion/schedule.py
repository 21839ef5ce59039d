"""The forward process: q(x_t | x_0) = N(sqrt(ab_t) x_0, (1 - ab_t) I), cell by cell, one t per set.

Ho et al. 2020; Nichol & Dhariwal 2021 for the cosine schedule; Yuan et al. 2026 for its power.
Coefficients are float64 and cast to float32 after the gather, as in the published code.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

ScheduleName = Literal["linear", "cosine", "power_cosine"]
POWER_COSINE_GAMMA = 0.3


def make_betas(name: ScheduleName, n_timesteps: int) -> Tensor:
    """Noise added at each step, (T,) float64.

    `linear` is 1e-4 to 0.02 at T = 1000, scaled with 1000 / T so that other T end at the same noise.
    """
    if name == "linear":
        scale = 1000 / n_timesteps
        return torch.linspace(1e-4 * scale, 0.02 * scale, n_timesteps, dtype=torch.float64).clamp(max=0.999)
    gamma = POWER_COSINE_GAMMA if name == "power_cosine" else 1.0
    edges = torch.arange(n_timesteps + 1, dtype=torch.float64) / n_timesteps
    alpha_bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).clamp(min=0) ** (2 * gamma)
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


class Schedule:
    """Coefficients of the diffusion at each t in 0..T-1 (t = T-1 is the noisiest)."""

    def __init__(self, name: ScheduleName = "linear", n_timesteps: int = 1000) -> None:
        self.name = name
        self.n_timesteps = n_timesteps
        self.betas = make_betas(name, n_timesteps)  # (T,)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)  # ab_t

    def alpha_bar(self, t: int) -> Tensor:
        """ab_t as a float64 scalar; 1 at t = -1, the clean end."""
        return self.alphas_cumprod[t] if t >= 0 else torch.ones((), dtype=torch.float64)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) noise.

        Parameters
        ----------
        x0, noise
            (B, S, G), model units.
        t
            (B,) integers in 0..T-1, one per set.
        """
        alpha_bar = self.alphas_cumprod.to(t.device, non_blocking=True)[t]  # (B,)
        signal = alpha_bar.sqrt().float()[:, None, None]
        sigma = (1 - alpha_bar).sqrt().float()[:, None, None]
        return signal * x0 + sigma * noise

    def strided(self, n_steps: int) -> list[int]:
        """`n_steps` timesteps from T-1 down, evenly spaced, the first the noisiest ("trailing" spacing).

        Training sees next to no signal at T-1, so unit noise is the right start there (Lin et al. 2024).
        """
        return [round(self.n_timesteps * (n_steps - i) / n_steps) - 1 for i in range(n_steps)]
