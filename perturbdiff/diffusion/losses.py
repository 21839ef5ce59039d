"""The training loss: MMD^2 between the true and the denoised set, plus MSE (Yuan et al. 2026, Eq. 8).

B = sets, S = cells per set, G = genes. Every distance is per set and counts real cells only, and of genes only those
that were measured: for a set without a gene, the denoiser is one without that gene. It sees 0 in every input, noise
too, so that no weight of the gene gets a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perturbdiff.config import DiffusionConfig
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.diffusion.counts import with_whole_counts
from perturbdiff.diffusion.distances import energy_mmd, mse
from perturbdiff.diffusion.draws import Draws
from perturbdiff.diffusion.schedule import Schedule


@dataclass(frozen=True)
class LossOutput:
    """Per set, (B,): `total` = mse_weight * mse + mmd_weight * mmd, and its parts."""

    total: Tensor
    mse: Tensor
    mmd: Tensor


class DiffusionLoss:
    """MMD^2 + MSE between x0 and the denoiser's estimate from x_t.

    `in_step` calls the denoiser as often with any draws, for processes that meet in its every pass (ZeRO-3).
    """

    def __init__(self, config: DiffusionConfig, in_step: bool = False) -> None:
        self.config, self.in_step = config, in_step
        self.schedule = Schedule(config.schedule, config.n_timesteps)

    def __call__(self, denoiser: nn.Module, batch: CellSetBatch, draws: Draws) -> LossOutput:
        x0, control = batch.dense()  # (B, S, G) each
        x_t = batch.of_measured(self.schedule.q_sample(x0, draws.t, draws.noise))
        # Self-conditioning (Chen et al. 2023): a first estimate, without gradient, for the sets that drew it.
        self_cond = torch.zeros_like(x0)
        chosen = draws.self_cond
        if self.config.p_self_cond > 0 and (self.in_step or len(chosen)):
            mask = batch.mask[chosen]
            with torch.no_grad():
                estimate = denoiser(
                    x_t[chosen], draws.t[chosen], control[chosen], draws.labels.select(chosen), None, mask
                )
            self_cond[chosen] = estimate.float()
            self_cond = batch.of_measured(self_cond)
        x0_pred = denoiser(x_t, draws.t, control, draws.labels, self_cond, batch.mask).float()
        x0_pred = batch.of_measured(x0_pred)
        # Eq. 8: L = MMD^2 + MSE
        set_mse = mse(x0, x0_pred, batch.mask, batch.measured)
        if draws.rounding is not None:  # the gradient is that of the mean, which rounding keeps
            x0_pred = x0_pred + (with_whole_counts(x0_pred, batch.one_count(), draws.rounding) - x0_pred).detach()
        set_mmd = energy_mmd(x0, x0_pred, batch.mask, batch.mask, self.config.unbiased)
        total = self.config.mse_weight * set_mse + self.config.mmd_weight * set_mmd
        return LossOutput(total, set_mse, set_mmd)
