"""Values that counts can have: nothing between none and one, and in predicted cells whole counts alone.

B = sets, S = cells per set, G = genes.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import gammaincinv
from torch import Tensor

RESPONDS = 0.5  # log1p units: a gene whose mean moves by more is drawn anew
LEAST_OVERDISPERSION = 1e-3  # under which counts are Poisson
MOST_OVERDISPERSION = 50.0
STEPS, DRAWS = 6, 128  # of finding a rate, and cells that it is found with
CANDIDATES, CELLS_OF_ONE = 8, 4  # draws among which the one with the best mean is taken, one for so many cells


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


def draw_counts(
    estimate: np.ndarray,
    control: np.ndarray,
    one: np.ndarray,
    overdispersion: np.ndarray | None,
    total: float | None,
    generator: np.random.Generator,
) -> np.ndarray:
    """(S, G) whole counts of the cells of a set, whose means of log1p values are those of the estimates.

    Parameters
    ----------
    estimate, control
        (S, G) denoised cells, and the controls that they start from; log1p values.
    one
        (S,) one count in each control, more than 0; log1p values.
    overdispersion
        (G,) of perturbed cells. None: no gene is drawn anew.
    total
        What the expm1 of a cell adds up to where the genes are all of a library; None: nobody knows.

    Notes
    -----
    A value between two counts becomes one of them, at random, its mean kept. Genes that respond (RESPONDS) are drawn
    anew, gamma-Poisson with the depth of the control: an estimate that adds a response to each control has one hump of
    the controls without a count of the gene, and one of the others. The gamma draws, stratified, come in the order of
    the estimates, so that cells that are far along are so in all genes.
    """
    unit = np.expm1(one)[:, None]
    if total is not None:
        level = np.expm1(estimate)
        sums = level.sum(axis=1, keepdims=True)
        estimate = np.log1p(level * np.divide(total, sums, out=np.ones_like(sums), where=sums > 0))
    below = np.floor(np.expm1(estimate) / unit + 1e-6)  # what is a whole count to float32 stays one
    low, high = np.log1p(below * unit), np.log1p((below + 1) * unit)
    counts = below + (generator.random(estimate.shape) * (high - low) < estimate - low)
    if overdispersion is not None:
        goal = estimate.mean(axis=0)
        responds = np.flatnonzero(np.abs(goal - control.mean(axis=0)) > RESPONDS)
        if len(responds):
            drawn = estimate[:, responds], goal[responds], unit, overdispersion[responds]
            counts[:, responds] = _gamma_poisson(*drawn, generator)
    return counts


def _gamma_poisson(
    estimate: np.ndarray, goal: np.ndarray, unit: np.ndarray, overdispersion: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """(S, R) counts whose log1p values have the (R,) means `goal`, in the order of the estimates but for Poisson."""
    n = len(estimate)
    overdispersion = np.clip(overdispersion, LEAST_OVERDISPERSION, MOST_OVERDISPERSION)
    several = max(1, DRAWS // n)
    depth = np.tile(1 / unit, (several, 1))

    def gamma(n: int) -> np.ndarray:  # rising, mean 1
        uniform = (np.arange(n)[:, None] + generator.random((n, len(goal)))) / n
        return gammaincinv(1 / overdispersion, uniform) * overdispersion

    others = generator.permuted(gamma(len(depth)), axis=0) * depth
    rate = np.expm1(goal)
    for _ in range(STEPS):
        found = np.log1p(generator.poisson(others * rate) / depth).mean(axis=0)
        rate *= np.clip((np.expm1(goal) + unit.min()) / (np.expm1(found) + unit.min()), 0.5, 2.0)
    order = np.lexsort((generator.random(estimate.shape), estimate), axis=0)
    level = np.empty_like(estimate)
    np.put_along_axis(level, order, gamma(n), axis=0)
    tries = max(1, min(CANDIDATES, n // CELLS_OF_ONE))
    counts = generator.poisson(np.broadcast_to(level * rate / unit, (tries, *level.shape)))
    off = np.abs(np.log1p(counts * unit).mean(axis=1) - goal)  # (tries, R)
    best: np.ndarray = np.take_along_axis(counts, off.argmin(axis=0)[None, None], axis=0)[0]
    return best.astype(np.float64)
