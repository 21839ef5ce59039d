"""Values that counts can have: nothing between none and one, and in predicted cells whole counts alone.

B = sets, S = cells per set, G = genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.special import gammaincinv
from torch import Tensor

from perturbdiff.data.rng import numpy_generator

MOST = 30.0  # log1p units: more is in no cell, and overflows
RESPONDS = 0.5  # log1p units: a gene whose mean moves by more is drawn anew
DIGITS = 2  # of the mean that it gets: the last bits of a sum must not decide what is drawn
LEAST_OVERDISPERSION = 1e-3  # under which counts are Poisson
MOST_OVERDISPERSION = 50.0
STEPS, CELLS = 4, 64  # of finding a rate, and cells that it is found with
FEW, FEW_AND_NOISE = 10.0, 28  # up to this mean, a Poisson count is summed over what it can be; and all but never more
GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2
ALIKE = 8  # cells among which their order is random
AT_ONCE = 1 << 18  # values that are drawn anew
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
    estimate: np.ndarray, control: np.ndarray, one: np.ndarray, overdispersion: np.ndarray | None, seed: int,
    key: Sequence[int], evenly: bool = False,
) -> np.ndarray:  # fmt: skip
    """(S, G) whole counts of some cells, whose means of log1p values are those of the estimates.

    Parameters
    ----------
    estimate, control
        (S, G) denoised cells, and the controls that they start from; log1p values.
    one
        (S,) one count in each control, more than 0; log1p values.
    overdispersion
        (G,) of perturbed cells. None: no gene is drawn anew.
    seed, key
        Of what is random; `key` is that of the cells. Draws of a gene do not depend on the others.
    evenly
        Whether values between two counts are drawn together, so that their mean over cells is all but that of the
        estimates, too: for cells that stand for a mean. Those of a population have the noise of cells apart.

    Notes
    -----
    A value between two counts becomes one of them, at random, its mean kept. Genes that respond (RESPONDS) are drawn
    anew, gamma-Poisson with the depth of the control: an estimate that adds a response to each control has one hump of
    the controls without a count of the gene, and one of the others. The gamma draws, stratified, come in the order of
    the estimates, so that cells that are far along are so in all genes.
    """
    unit, estimate = np.expm1(one)[:, None], np.minimum(estimate, MOST)
    below = np.floor(np.expm1(estimate) / unit + 1e-6)  # what is a whole count to float32 stays one
    low, high = np.log1p(below * unit), np.log1p((below + 1) * unit)
    generator, part = numpy_generator(seed, "prediction counts", *key), (estimate - low) / (high - low)
    if evenly:
        counts = below + _evenly(np.clip(part, 0, 1), one, generator)
    else:
        counts = below + (generator.random(estimate.shape) < part)
    if overdispersion is not None:
        goal = estimate.mean(axis=0).round(DIGITS)
        responding = np.flatnonzero(np.abs(goal - control.mean(axis=0)) > RESPONDS)
        for genes in np.array_split(responding, 1 + responding.size * len(one) // AT_ONCE):
            generators = [numpy_generator(seed, "prediction counts of a gene", *key, gene) for gene in genes.tolist()]
            levels = overdispersion[genes].clip(LEAST_OVERDISPERSION, MOST_OVERDISPERSION)
            counts[:, genes] = _gamma_poisson(estimate[:, genes], goal[genes], unit[:, 0], levels, generators)
    return counts


def _evenly(part: np.ndarray, one: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(S, G) ones, in this part of all draws each, whose sums over cells differ from those of the parts by under one.

    Systematic sampling (Madow & Madow 1944, Annals of Mathematical Statistics 15:1), from another start for each gene,
    of cells in a row in which a count is about as much: so their weighted sums differ little, too.
    """
    alike = np.argsort(np.argsort(one, kind="stable"), kind="stable") // ALIKE
    order = np.argsort(alike + generator.random(len(one)))
    reached = np.floor(part[order].cumsum(axis=0) + generator.random(part.shape[1]))
    drawn = np.empty_like(part)
    drawn[order] = np.diff(reached, axis=0, prepend=0.0)
    return drawn


def _gamma_poisson(
    estimate: np.ndarray, goal: np.ndarray, unit: np.ndarray, overdispersion: np.ndarray,
    generators: Sequence[np.random.Generator],
) -> np.ndarray:  # fmt: skip
    """(S, R) counts of R genes, in the order of the estimates but for what is Poisson: draws of a mean nearest `goal`.

    Parameters
    ----------
    estimate
        (S, R) of log1p values.
    goal, overdispersion, generators
        (R,) of the genes.
    unit
        (S,) one count in each cell, of the scale of rates.
    """
    n, n_genes = estimate.shape
    random = np.array([generator.random((2, n)) for generator in generators]).reshape(n_genes, 2, n)
    shape = 1 / overdispersion[:, None]
    rising = gammaincinv(shape, (np.arange(n) + random[:, 0]) / n) / shape  # mean 1
    level = np.empty_like(rising)
    np.put_along_axis(level, np.lexsort((random[:, 1], estimate.T)), rising, axis=1)
    mean = level * _rates(goal, unit, overdispersion)[:, None] / unit
    tries = max(1, min(CANDIDATES, n // CELLS_OF_ONE))
    drawn = [generator.poisson(of, (tries, n)) for generator, of in zip(generators, mean, strict=True)]
    counts = np.array(drawn).reshape(n_genes, tries, n)
    off = np.abs(np.log1p(counts * unit).mean(axis=2) - goal[:, None])
    best: np.ndarray = counts[np.arange(n_genes), off.argmin(axis=1)]
    return best.T


def _rates(goal: np.ndarray, unit: np.ndarray, overdispersion: np.ndarray) -> np.ndarray:
    """(R,) rates, of the log1p scale, at which gamma-Poisson counts have these means of log1p values.

    Parameters
    ----------
    goal, overdispersion
        (R,) of the genes.
    unit
        (S,) one count in each cell, of the scale of rates. CELLS quantiles of them, each with another quantile of the
        gamma distribution, stand for all.

    Notes
    -----
    The secant method on the logarithm of the rate, for log(expm1(mean)), which is all but a line in it.
    """
    cells = (np.arange(CELLS) + 0.5) / CELLS
    unit = np.sort(unit)[(cells * len(unit)).astype(int)]
    along = np.argsort(np.argsort(cells * CELLS * GOLDEN % 1))  # a lattice rule: no gap in the square of both
    rising = np.array([_rising(of) for of in overdispersion.tolist()]).reshape(-1, CELLS)
    level = rising[:, along] / unit
    wanted = _log_expm1(goal)
    rate, before, slope = wanted, None, np.ones_like(wanted)
    for _ in range(STEPS):
        found = _log_expm1(_mean_log1p(level * np.exp(rate)[:, None], unit).mean(axis=1))
        if before is not None:
            moved = np.where(rate == before[0], 1.0, rate - before[0])
            slope = ((found - before[1]) / moved).clip(0.2, 2.0)
        before = rate, found
        rate = rate + ((wanted - found) / slope).clip(-4, 4)
    return np.exp(rate)


@lru_cache(maxsize=1 << 14)
def _rising(overdispersion: float) -> np.ndarray:
    """(CELLS,) quantiles of the gamma distribution of mean 1; those of a gene serve all its sets."""
    shape = 1 / overdispersion
    quantiles: np.ndarray = gammaincinv(shape, (np.arange(CELLS) + 0.5) / CELLS) / shape
    return quantiles


def _log_expm1(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.log(np.expm1(x).clip(1e-12))  # a mean of nothing asks for next to nothing
    return result


def _mean_log1p(mean: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """(R, CELLS) expectation of log1p(unit * C) where C is Poisson: its sum, and for many its expansion about the mean.

    Central moments of a Poisson count of mean m: m, m, 3 m^2 + m.
    """
    few = np.minimum(mean, FEW)
    chance, total = np.exp(-few), np.zeros_like(few)
    for c in range(1, FEW_AND_NOISE + 1):
        chance *= few / c
        total += chance * np.log1p(c * unit)
    w = unit / (1 + unit * mean)
    many = np.log1p(unit * mean) - w**2 * mean / 2 + w**3 * mean / 3 - w**4 * (3 * mean**2 + mean) / 4
    return np.where(mean < FEW, total, many)
