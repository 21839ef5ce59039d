"""Distances between cell sets: energy distance and other squared MMDs, MSE; each per set, over real cells only.

B = sets, S = cells per set, G = genes. They also take a single set, (S, G), and then return a scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

KernelName = Literal["energy", "rbf", "laplace"]


# Multiples of the mean (squared) distance within the target set: the usual mixture of scales (Li et al. 2017).
BANDWIDTHS = (0.5, 1.0, 2.0)


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
