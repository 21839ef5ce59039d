"""The training loss: MMD^2 between the true and the denoised set, plus MSE (Yuan et al. 2026, Eq. 8).

B = sets, S = cells per set, G = genes. Every distance is per set and counts real cells only.
The distances also take a single set, (S, G), and then return a scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from perturbdiff.config import DiffusionConfig
from perturbdiff.data.batch import NULL, CellSetBatch, Labels
from perturbdiff.data.seeds import torch_generator
from perturbdiff.diffusion.schedule import Schedule

KernelName = Literal["energy", "rbf", "laplace"]
# Multiples of the mean (squared) distance within the target set: the usual mixture of scales (Li et al. 2017).
BANDWIDTHS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Draws:
    """All that is random in the loss of a batch.

    t
        (B,) timesteps.
    noise
        (B, S, G) standard normal.
    self_cond
        (B,) True where a set sees its own first estimate.
    labels
        Conditions after dropout.
    rounding
        (B, S, G) uniform, with diffusion.whole_counts.
    """

    t: Tensor
    noise: Tensor
    self_cond: Tensor
    labels: Labels
    rounding: Tensor | None = None


def training_draws(batch: CellSetBatch, config: DiffusionConfig, seed: int, with_features: bool = False) -> Draws:
    """Draws keyed by (seed, epoch, set number): the same after a resume and on any number of processes.

    `with_features` also draws the sets whose perturbations are known by their features alone.
    """
    n_sets, set_size = batch.mask.shape
    device = batch.mask.device
    t = torch.empty(n_sets, dtype=torch.int64, device=device)
    uniform = torch.empty(n_sets, 5, device=device)
    noise = torch.empty(n_sets, set_size, batch.n_genes, device=device)
    for b, key in enumerate(batch.keys):
        generator = torch_generator(device, seed, "training draws", *key)
        torch.randint(config.n_timesteps, (), generator=generator, out=t[b])
        torch.rand(5, generator=generator, out=uniform[b])
        torch.randn(set_size, batch.n_genes, generator=generator, out=noise[b])
    of_context = config.p_drop_label
    of_perturbation = of_context if config.p_drop_perturbation is None else config.p_drop_perturbation
    p_drop = torch.tensor([of_perturbation, of_context, of_context], device=device)
    hide_perturbation, hide_cell_type, hide_batch = (uniform[:, :3] < p_drop).unbind(1)
    labels = replace(
        batch.labels,
        perturbation=batch.labels.perturbation.masked_fill(hide_perturbation[:, None], NULL),
        cell_type=batch.labels.cell_type.masked_fill(hide_cell_type, NULL),
        batch=batch.labels.batch.masked_fill(hide_batch, NULL),
        hidden=uniform[:, 3] < config.p_drop_cond,
    )
    if with_features:  # a draw of its own, so that the others are those of a model without features
        draws = [torch_generator(device, seed, "unlabelled", *key) for key in batch.keys]
        chosen = [torch.rand((), generator=generator, device=device) < config.p_unlabelled for generator in draws]
        labels = replace(labels, unlabelled=torch.stack(chosen) if chosen else hide_batch)
    return Draws(t, noise, uniform[:, 4] < config.p_self_cond, labels, _rounding(batch, config, seed))


def _rounding(batch: CellSetBatch, config: DiffusionConfig, seed: int) -> Tensor | None:
    return uniform_draws(batch, seed, "rounding") if config.whole_counts else None


def uniform_draws(batch: CellSetBatch, seed: int, purpose: str) -> Tensor:
    """(B, S, G) uniform numbers, keyed by set."""
    drawn = torch.empty(*batch.mask.shape, batch.n_genes, device=batch.mask.device)
    for b, key in enumerate(batch.keys):
        torch.rand(drawn.shape[1:], generator=torch_generator(drawn.device, seed, purpose, *key), out=drawn[b])
    return drawn


def validation_draws(batch: CellSetBatch, config: DiffusionConfig, seed: int, n_t: int = 8) -> Draws:
    """Fixed draws: t from an even grid over the schedule, noise by set, no dropout, no self-conditioning."""
    n_sets, set_size = batch.mask.shape
    device = batch.mask.device
    grid = [int((k + 0.5) / n_t * config.n_timesteps) for k in range(n_t)]
    noise = torch.empty(n_sets, set_size, batch.n_genes, device=device)
    for b, key in enumerate(batch.keys):
        generator = torch_generator(device, seed, "validation noise", *key)
        torch.randn(set_size, batch.n_genes, generator=generator, out=noise[b])
    t = torch.tensor([grid[number % n_t] for _, number in batch.keys], dtype=torch.int64, device=device)
    never = torch.zeros(n_sets, dtype=torch.bool, device=device)
    return Draws(t, noise, never, batch.labels, _rounding(batch, config, seed))


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
        x_t = self.schedule.q_sample(x0, draws.t, draws.noise)
        # Self-conditioning (Chen et al. 2023): a first estimate, without gradient, for the sets that drew it.
        self_cond = torch.zeros_like(x0)
        chosen = draws.self_cond
        if self.config.p_self_cond > 0 and (self.in_step or chosen.any()):
            mask = batch.mask[chosen]
            with torch.no_grad():
                estimate = denoiser(
                    x_t[chosen], draws.t[chosen], control[chosen], draws.labels.select(chosen), None, mask, mask
                )
            self_cond[chosen] = estimate.float()
        x0_pred = denoiser(x_t, draws.t, control, draws.labels, self_cond, batch.mask, batch.mask).float()
        # Eq. 8: L = MMD^2 + MSE
        set_mse = mse(x0, x0_pred, batch.mask)
        if draws.rounding is not None:  # the gradient is that of the mean, which rounding keeps
            x0_pred = x0_pred + (with_whole_counts(x0_pred, batch.one_count(), draws.rounding) - x0_pred).detach()
        set_mmd = MMD[self.config.kernel](x0, x0_pred, batch.mask, batch.mask)
        if self.config.unbiased:
            set_mmd = set_mmd - self_pairs(x0_pred, batch.mask)
        total = self.config.mse_weight * set_mse + self.config.mmd_weight * set_mmd
        if self.config.mean_weight > 0:
            total = total + self.config.mean_weight * squared_mean_distance(x0, x0_pred, batch.mask)
        return LossOutput(total, set_mse, set_mmd)


def pairwise_distance(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (B, S, S') between the cells of two sets.

    The clamp keeps the gradient finite between equal cells; its value is that of the published code.
    """
    return _squared_distance(x, y).clamp_min(1e-8).sqrt()


def energy_distance(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
    """Half the energy distance of each pair of sets, E|x-y| - E|x-x'|/2 - E|y-y'|/2 (V-statistic).

    Parameters
    ----------
    x, y
        (B, S, G) and (B, S', G), model units (log1p CP10k / 10).
    x_mask, y_mask
        (B, S) and (B, S') True where a cell is real; all real if None.

    Returns
    -------
    (B,) non-negative up to rounding; 0 where either set is empty.

    Notes
    -----
    Székely & Rizzo 2013; the factor 1/2 is that of Yuan et al. 2026.
    """
    return _mmd_squared(lambda a, b: -pairwise_distance(a, b), x, y, x_mask, y_mask) / 2


def self_pairs(y: Tensor, mask: Tensor | None = None) -> Tensor:
    """What pairs of a cell with itself take from the energy distance of a set of n cells, E|y-y'| / (2 (n - 1)): (B,).

    With them the best n cells are narrower than those they are to be like (by n / (n - 1) within); without them the
    energy distance is a proper score of the distribution they were drawn from (Gneiting & Raftery 2007).
    """
    w = _weights(y[..., 0], mask)
    n = (w > 0).sum(-1)
    within = _mean(pairwise_distance(y, y), w, w)  # (B,)
    return torch.where(n > 1, within / (2 * (n - 1).clamp_min(1)), torch.zeros_like(within))


def squared_mean_distance(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """|mean x - mean y|^2 of each pair of sets over real cells, summed over genes, (B,): a linear kernel's MMD."""
    w = _weights(x[..., 0], mask)[..., None]
    return ((x - y) * w).sum(-2).square().sum(-1)


def with_whole_counts(x: Tensor, one: Tensor, uniform: Tensor) -> Tensor:
    """No cell holds less than one count: values v under it become one count or none, at random, their mean kept.

    Parameters
    ----------
    x
        (B, S, G) estimates, model units.
    one
        (B, S) one count in the control that each cell starts from; 0 where nobody knows, and values stay there.
    uniform
        (B, S, G) in 0..1.
    """
    one = one[..., None]
    return torch.where(x < one, torch.where(uniform * one < x, one, 0.0), x)


def rbf_mmd(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
    """Squared MMD of each pair of sets with a mixture of Gaussian kernels, exp(-d^2 / (m s)).

    `s` is the mean squared distance within the target set `x` (no gradient), `m` runs over BANDWIDTHS.
    Shapes as in `energy_distance`. Gretton et al. 2012, V-statistic; mean over the mixture.
    """
    scale = _spread(_squared_distance(x, x), x_mask)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        d2 = _squared_distance(a, b) / scale
        return torch.stack([torch.exp(-d2 / m) for m in BANDWIDTHS]).mean(0)

    return _mmd_squared(kernel, x, y, x_mask, y_mask)


def laplace_mmd(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
    """Squared MMD of each pair of sets with a mixture of Laplace kernels, exp(-|d| / (m s)).

    `s` is the mean distance within the target set `x` (no gradient). Otherwise as `rbf_mmd`.
    """
    scale = _spread(pairwise_distance(x, x), x_mask)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        d = pairwise_distance(a, b) / scale
        return torch.stack([torch.exp(-d / m) for m in BANDWIDTHS]).mean(0)

    return _mmd_squared(kernel, x, y, x_mask, y_mask)


MMD: dict[KernelName, Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "energy": energy_distance,
    "rbf": rbf_mmd,
    "laplace": laplace_mmd,
}


def mse(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each set over its real cells and all genes, (B,); 0 for an empty set."""
    per_cell = (x - y).square().mean(-1)  # (B, S)
    return (per_cell * _weights(per_cell, mask)).sum(-1)


def _mmd_squared(
    kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None
) -> Tensor:
    # MMD^2 = E k(x,x') + E k(y,y') - 2 E k(x,y), diagonals included.
    w_x, w_y = _weights(x[..., 0], x_mask), _weights(y[..., 0], y_mask)
    value = _mean(kernel(x, x), w_x, w_x) + _mean(kernel(y, y), w_y, w_y) - 2 * _mean(kernel(x, y), w_x, w_y)  # (B,)
    both = (w_x.sum(-1) > 0) & (w_y.sum(-1) > 0)
    return torch.where(both, value, torch.zeros_like(value))


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    # float32 even under autocast: the difference of large squares does not survive bf16.
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float(), y.float()
        x2, y2 = x.square().sum(-1), y.square().sum(-1)
        squared = x2[..., :, None] - 2 * x @ y.transpose(-1, -2) + y2[..., None, :]  # (B, S, S')
        return squared.clamp_min(0)  # rounding leaves equal cells below 0, where a narrow Gaussian kernel overflows


def _weights(cells: Tensor, mask: Tensor | None) -> Tensor:
    # (B, S): 1/n on the n real cells of a set, 0 elsewhere.
    real = torch.ones_like(cells) if mask is None else mask.to(cells.dtype)
    return real / real.sum(-1, keepdim=True).clamp_min(1)


def _mean(values: Tensor, w_x: Tensor, w_y: Tensor) -> Tensor:
    # Products and a sum: autocast would make an einsum a bf16 matmul, too coarse for a difference of means.
    return (values * w_x[..., :, None] * w_y[..., None, :]).sum((-2, -1))


def _spread(distances: Tensor, mask: Tensor | None) -> Tensor:
    w = _weights(distances[..., 0], mask)
    return _mean(distances.detach(), w, w).clamp_min(1e-8)[..., None, None]
