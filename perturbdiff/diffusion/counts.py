"""Values that counts can have: nothing between none and one, and in predicted cells whole counts alone.

B = sets, S = cells per set, G = genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.special import gammaincinv, ndtri
from torch import Tensor

from perturbdiff.data.rng import numpy_generator, uniform_at

MOST = 30.0  # log1p units: more is in no cell, and overflows
RESPONDS = 0.5  # log1p units: a gene whose mean moves by more is drawn anew
DIGITS = 2  # of the mean that it gets: the last bits of a sum must not decide what is drawn
LEAST_OVERDISPERSION = 1e-3  # under which counts are Poisson
MOST_OVERDISPERSION = 50.0
STEPS, CELLS = 4, 64  # of finding a rate, and cells that it is found with
FEW, FEW_AND_NOISE = 6.0, 20  # up to this mean, a Poisson count is summed over what it can be; and all but never more
GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2
ALIKE = 8  # cells among which their order is random
AT_ONCE = 1 << 18  # values that are drawn anew
QUANTILES = 256  # of a gamma distribution
TRIES = 4


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
    below, part = np.zeros_like(estimate), estimate / one[:, None]
    several = part > 1 - 1e-6  # few values: the others lie between none and one
    value, of_one = estimate[several], np.broadcast_to(unit, estimate.shape)[several]
    whole = np.floor(np.expm1(value) / of_one + 1e-6)  # what is a whole count to float32 stays one
    low = np.log1p(whole * of_one)
    gap = np.maximum(np.log1p((whole + 1) * of_one) - low, 1e-15)  # of very many counts the logarithms are the same
    below[several], part[several] = whole, (value - low) / gap
    generator = numpy_generator(seed, "prediction counts", *key)
    if evenly:
        counts = below + _evenly(np.clip(part, 0, 1), one, generator)
    else:
        counts = below + (generator.random(estimate.shape) < part)
    if overdispersion is not None:
        goal = estimate.mean(axis=0).round(DIGITS)
        responding = np.flatnonzero(np.abs(goal - control.mean(axis=0)) > RESPONDS)
        for genes in np.array_split(responding, 1 + responding.size * len(one) // AT_ONCE):
            of_gene = np.arange(2 * (1 + TRIES) * len(one)).reshape(2, 1 + TRIES, -1)
            positions = genes[:, None, None, None] * of_gene.size + of_gene
            counts[:, genes] = _gamma_poisson(
                estimate[:, genes].T, goal[genes], unit[:, 0],
                overdispersion[genes].clip(LEAST_OVERDISPERSION, MOST_OVERDISPERSION),
                uniform_at(positions, seed, "prediction counts of genes", *key),
            ).T  # fmt: skip
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
    estimate: np.ndarray, goal: np.ndarray, unit: np.ndarray, overdispersion: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """(R, S) counts of R genes, whose gamma levels come in the order of the estimates.

    Parameters
    ----------
    estimate
        (R, S) log1p values.
    goal, overdispersion
        (R,) mean of log1p values that counts get, and how much more than Poisson counts they vary.
    unit
        (S,) one count in each cell, of the scale of rates.
    uniform
        (R, 2, 1 + TRIES, S) in 0..1.

    Notes
    -----
    A Latin hypercube of levels and of what is Poisson (McKay, Beckman & Conover 1979, Technometrics 21:239): each
    S-th part of both is drawn once. Of TRIES for what is Poisson, the one whose mean is nearest `goal`.
    """
    n, rising = estimate.shape[1], np.array([_rising(of) for of in overdispersion.tolist()]).reshape(-1, QUANTILES)
    order, within = uniform[:, 0], uniform[:, 1]
    rank = np.argsort(np.lexsort((order[:, 0], estimate)))
    at = np.minimum((rank + within[:, 0]) * (QUANTILES / n), QUANTILES - 1).astype(int)
    level = np.take_along_axis(rising, at, axis=1)
    mean = level * _rates(goal, unit, rising)[:, None] / unit
    counts = _poisson_quantile((np.argsort(order[:, 1:]) + within[:, 1:]) / n, mean[:, None])
    off = np.abs(np.log1p(counts * unit).mean(axis=2) - goal[:, None])
    best: np.ndarray = counts[np.arange(len(goal)), off.argmin(axis=1)]
    return best


def _poisson_quantile(part: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The least counts up to which this part of Poisson counts lies; of many, by Cornish & Fisher's expansion."""
    few = np.minimum(mean, FEW)
    chance = np.exp(-few)
    upto, count = chance.copy(), np.zeros(np.broadcast_shapes(part.shape, few.shape))
    for c in range(1, FEW_AND_NOISE + 1):
        count += part > upto
        chance *= few / c
        upto += chance
    z, spread = ndtri(part.clip(1e-16, 1 - 1e-16)), np.sqrt(mean)
    many = mean + spread * z + (z * z - 1) * (1 / 6 - z / (72 * np.maximum(spread, 1)))
    return np.where(mean < FEW, count, np.ceil(many - 0.5).clip(0))


def _rates(goal: np.ndarray, unit: np.ndarray, rising: np.ndarray) -> np.ndarray:
    """(R,) rates, of the log1p scale, at which gamma-Poisson counts have these means of log1p values.

    Parameters
    ----------
    goal, unit
        As of `_gamma_poisson`. CELLS quantiles of `unit`, each with another part of the levels, stand for all cells.
    rising
        (R, QUANTILES) of levels.

    Notes
    -----
    The secant method on the logarithm of the rate, for log(expm1(mean)), which is all but a line in it.
    """
    cells = (np.arange(CELLS) + 0.5) / CELLS
    unit = np.sort(unit)[(cells * len(unit)).astype(int)]
    along = np.argsort(np.argsort(cells * CELLS * GOLDEN % 1))  # a lattice rule: no gap in the square of both
    level = rising.reshape(-1, CELLS, QUANTILES // CELLS).mean(axis=2)[:, along] / unit
    values = np.log1p(np.arange(1, FEW_AND_NOISE + 1)[:, None] * unit)
    wanted = _log_expm1(goal)
    rate, before, slope = wanted, None, np.ones_like(wanted)
    for _ in range(STEPS):
        found = _log_expm1(_mean_log1p(level * np.exp(rate)[:, None], unit, values).mean(axis=1))
        if before is not None:
            moved = np.where(rate == before[0], 1.0, rate - before[0])
            slope = ((found - before[1]) / moved).clip(0.2, 2.0)
        before = rate, found
        rate = rate + ((wanted - found) / slope).clip(-4, 4)
    return np.exp(rate)


@lru_cache(maxsize=1 << 14)
def _rising(overdispersion: float) -> np.ndarray:
    """(QUANTILES,) of the gamma distribution of mean 1; those of a gene serve all its sets."""
    shape = 1 / overdispersion
    quantiles: np.ndarray = gammaincinv(shape, (np.arange(QUANTILES) + 0.5) / QUANTILES) / shape
    return quantiles


def _log_expm1(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.log(np.expm1(x).clip(1e-12))  # a mean of nothing asks for next to nothing
    return result


def _mean_log1p(mean: np.ndarray, unit: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(R, CELLS) expectation of log1p(unit * C) where C is Poisson: its sum, and for many its expansion about the mean.

    Central moments of a Poisson count of mean m: m, m, 3 m^2 + m. `values` are those of 1, 2, ... counts.
    """
    few = np.minimum(mean, FEW)
    chance, total = np.exp(-few), np.zeros_like(few)
    for c in range(1, FEW_AND_NOISE + 1):
        chance *= few / c
        total += chance * values[c - 1]
    w = unit / (1 + unit * mean)
    many = np.log1p(unit * mean) - w * w * mean * (1 / 2 - w / 3 + w * w * (3 * mean + 1) / 4)
    return np.where(mean < FEW, total, many)
