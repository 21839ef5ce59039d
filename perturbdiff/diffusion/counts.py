"""Values that counts can have: nothing between none and one, and in predicted cells whole counts alone.

B = sets, S = cells per set, G = genes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
STEPS, DRAWS = 6, 128  # of finding a rate, and cells that it is found with
ALIKE = 8  # cells among which their order is random
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
        for gene in np.flatnonzero(np.abs(goal - control.mean(axis=0)) > RESPONDS).tolist():
            generator = numpy_generator(seed, "prediction counts of a gene", *key, gene)
            level = min(max(float(overdispersion[gene]), LEAST_OVERDISPERSION), MOST_OVERDISPERSION)
            counts[:, gene] = _gamma_poisson(estimate[:, gene], float(goal[gene]), unit[:, 0], level, generator)
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
    estimate: np.ndarray, goal: float, unit: np.ndarray, overdispersion: float, generator: np.random.Generator
) -> np.ndarray:
    """(S,) counts whose log1p values have the mean `goal`, in the order of the estimates but for what is Poisson."""
    n = len(estimate)
    several = max(1, DRAWS // n)
    depth = np.tile(1 / unit, several)

    def gamma(n: int) -> np.ndarray:  # rising, mean 1
        rising: np.ndarray = gammaincinv(1 / overdispersion, (np.arange(n) + generator.random(n)) / n) * overdispersion
        return rising

    others = generator.permutation(gamma(len(depth))) * depth
    wanted = rate = math.expm1(goal)
    least = float(unit.min())
    for _ in range(STEPS):
        found = float(np.add.reduce(np.log1p(generator.poisson(others * rate) / depth))) / len(depth)
        rate *= min(max((wanted + least) / (math.expm1(found) + least), 0.5), 2.0)
    level = np.empty(n)
    level[np.lexsort((generator.random(n), estimate))] = gamma(n)
    tries = max(1, min(CANDIDATES, n // CELLS_OF_ONE))
    counts = generator.poisson(level * rate / unit, (tries, n))
    off = np.abs(np.log1p(counts * unit).mean(axis=1) - goal)
    best: np.ndarray = counts[off.argmin()]
    return best
