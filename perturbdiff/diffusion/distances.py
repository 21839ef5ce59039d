"""Distances between cell sets, over real cells only: MMD^2 and MSE of the loss, the energy distance of the scores.

B = sets, S and S' = cells per set, G = genes. They also take a single pair, (S, G) and (S', G), and return a scalar.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_SPREAD = 1e-12  # a variance or standard deviation up to this is rounding, not signal
FLOOR = 1e-4  # of a distance in the loss, as published
MAX_SCORED = 500  # cells of a side whose distances are scored: memory and time grow with their square


def energy_mmd(
    x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None, unbiased: bool = False
) -> Tensor:
    """MMD^2 with the energy distance's kernel, `E|x-y| - E|x-x'|/2 - E|y-y'|/2` (V-statistic).

    Parameters
    ----------
    x, y
        (B, S, G) and (B, S', G), model units (log1p CP10k / 10). Gradients go to y, and x is what it is to be like.
    x_mask, y_mask
        (B, S) and (B, S') True where a cell is real; all real if None.
    unbiased
        E|y-y'| is over distinct cells. With pairs of a cell with itself the best n cells are narrower than those they
        are to be like (by n / (n - 1) within); without them the distance is a proper score of the distribution they
        were drawn from (Gneiting & Raftery 2007).

    Returns
    -------
    (B,) non-negative up to rounding; 0 where either set is empty.

    Notes
    -----
    Sejdinovic et al. 2013: half the energy distance. Yuan et al. 2026, Eq. 8, whose floor of a distance, 1e-4, keeps
    the gradient finite between equal cells.
    """
    w_x, w_y = _weights(x, x_mask), _weights(y, y_mask)
    half = torch.full_like(w_y[..., 0], 0.5)
    if unbiased:  # n^2 / (n (n - 1)) of it; of one cell as it is
        n = (w_y > 0).sum(-1)
        half = torch.where(n > 1, n / (2 * (n - 1).clamp_min(1)), half)
    with torch.autocast(x.device.type, enabled=False):  # the difference of large squares does not survive bf16
        value: Tensor = _EnergyMMD.apply(_exact(x.detach()), _exact(y), w_x, w_y, half)
    both = (w_x.sum(-1) > 0) & (w_y.sum(-1) > 0)
    return torch.where(both, value, torch.zeros_like(value))


class _EnergyMMD(torch.autograd.Function):
    # With its gradient made beside it, from the same distances: a third of the time that autograd takes, which reads
    # and writes cells once for each square, difference and product.

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, w_x: Tensor, w_y: Tensor, half: Tensor) -> Tensor:
        x2, y2 = x.square().sum(-1), y.square().sum(-1)
        within_x = _floored(_squared(x, x, x2, x2))
        squared_between, squared_within = _squared(x, y, x2, y2), _squared(y, y, y2, y2)
        between, within = _floored(squared_between), _floored(squared_within)
        value = _mean(between, w_x, w_y) - _mean(within_x, w_x, w_x) / 2 - half * _mean(within, w_y, w_y)
        if ctx.needs_input_grad[1]:
            # d|a - b| / db = (b - a) / |a - b|; 0 at the floor. Of pairs within y both cells move.
            of_x = torch.where(squared_between >= FLOOR**2, _pair_weights(w_x, w_y) / between, 0.0).mT  # (B, S', S)
            of_y = torch.where(squared_within >= FLOOR**2, _pair_weights(w_y, w_y) / within, 0.0)  # (B, S', S')
            of_y *= -2 * half[..., None, None]
            slope = y * (of_x.sum(-1) + of_y.sum(-1))[..., None]
            slope -= of_x @ x
            slope -= of_y @ y
            ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[None, Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return None, slope * of_value[..., None, None], None, None, None


def mse(x: Tensor, y: Tensor, mask: Tensor | None = None, genes: Tensor | None = None) -> Tensor:
    """Mean squared error of each set over its real cells and all genes, or (B, G) `genes`, (B,); 0 for an empty set."""
    error = (x - y).square()
    if genes is None:
        of_cells = error.mean(-1)  # (B, S)
    else:
        of_cells = (error * genes[:, None]).sum(-1) / genes.sum(-1, keepdim=True).clamp_min(1)
    return (of_cells * _weights(x, mask)).sum(-1)


def energy_distance(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
    """Energy distance of each pair of sets, `2 E|x-y| - E|x-x'| - E|y-y'|` over distinct cells (U-statistic).

    Shapes and masks as in `energy_mmd`, of which it is twice, less the bias of pairs of a cell with itself: sets of
    other sizes compare, and a set and itself are at less than 0.

    Returns
    -------
    (B,) float64, in the units of x; NaN where a set has fewer than 2 cells.

    Notes
    -----
    Székely & Rizzo 2013. Distances are taken in the type of the cells, means of them in float64.
    """
    return energy_of(pair_distances(x, y, y_mask), x_mask, y_mask)


def energy_of(
    distances: tuple[Tensor, Tensor, Tensor], x_mask: Tensor | None = None, y_mask: Tensor | None = None
) -> Tensor:
    """`energy_distance` of what `pair_distances` gave."""
    between, within_x, within_y = (values.double() for values in distances)
    w_x, w_y = _weights(within_x, x_mask), _weights(within_y, y_mask)
    n_x, n_y = (w_x > 0).sum(-1), (w_y > 0).sum(-1)
    # From the mean over all pairs to that over distinct ones: the others are 0.
    within = _mean(within_x, w_x, w_x) * n_x / (n_x - 1) + _mean(within_y, w_y, w_y) * n_y / (n_y - 1)
    return torch.where((n_x < 2) | (n_y < 2), torch.nan, 2 * _mean(between, w_x, w_y) - within)


def pair_distances(
    x: Tensor, y: Tensor, y_mask: Tensor | None = None, within_y: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Euclidean distances x-y, x-x and y-y of the cells, (B, S, S'), (B, S, S) and (B, S', S'); 0 from itself.

    `within_y` is y-y where it is known: it is the same for every x.
    """
    # A shift changes no distance, but |a|^2 + |b|^2 - 2ab cancels badly far from the origin.
    centre = (y * _weights(y, y_mask)[..., None]).sum(-2, keepdim=True)
    x, y = x - centre, y - centre
    return cell_to_cell(x, y), _within(x), _within(y) if within_y is None else within_y


def cell_distances(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_distances` of predicted (n, G) and real (m, G) cells in float64, of at most 500 of either.

    Which of more cells are taken is fixed, by a seed for each side.
    """
    return pair_distances(*(torch.from_numpy(_thinned(cells, seed)) for seed, cells in ((1, x), (2, y))))


def _thinned(cells: np.ndarray, seed: int) -> np.ndarray:
    if len(cells) > MAX_SCORED:
        cells = cells[np.sort(np.random.default_rng(seed).choice(len(cells), MAX_SCORED, replace=False))]
    return np.array(cells, np.float64, order="C")


def cell_to_cell(x: Tensor, y: Tensor) -> Tensor:
    """(B, S, S') Euclidean distances of cells near the origin; those from itself are 0 up to rounding."""
    with torch.autocast(x.device.type, enabled=False):
        x, y = _exact(x), _exact(y)
        return _squared(x, y, x.square().sum(-1), y.square().sum(-1)).clamp_min(0).sqrt()


def _within(x: Tensor) -> Tensor:
    distances = cell_to_cell(x, x)
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances


def _exact(cells: Tensor) -> Tensor:
    return cells if cells.dtype == torch.float64 else cells.float()


def _squared(x: Tensor, y: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
    # (B, S, S') squared distances of cells whose squares are x2 and y2, some below 0 by rounding.
    return x2[..., :, None] - 2 * (x @ y.mT) + y2[..., None, :]


def _floored(squared: Tensor) -> Tensor:
    return squared.clamp_min(FLOOR**2).sqrt()


def _weights(cells: Tensor, mask: Tensor | None) -> Tensor:
    # (B, S): 1/n on the n real cells of a set, 0 elsewhere.
    real = torch.ones_like(cells[..., 0]) if mask is None else mask.to(cells.dtype)
    return real / real.sum(-1, keepdim=True).clamp_min(1)


def _pair_weights(w_x: Tensor, w_y: Tensor) -> Tensor:
    return w_x[..., :, None] * w_y[..., None, :]


def _mean(values: Tensor, w_x: Tensor, w_y: Tensor) -> Tensor:
    # Products and a sum: autocast would make an einsum a bf16 matmul, too coarse for a difference of means.
    return (values * _pair_weights(w_x, w_y)).sum((-2, -1))
