"""Whether predicted populations vary as measured ones do: their means, and a distance between clouds of populations.

A response is a random distribution, so that its populations (batches, donors, replicates of one nominal condition) are
a cloud of distributions. G = genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from perturbdiff.data.expression import gene_means
from perturbdiff.data.screen import Screen
from perturbdiff.diffusion.distances import MAX_SCORED, cell_to_cell, energy_of
from perturbdiff.evaluation.metrics import checked_arrays, in_own_order

LEAST_CELLS = 10  # of a measured batch; the mean of fewer is mostly noise


def two_level_distance(predicted: Sequence[np.ndarray], measured: Sequence[np.ndarray]) -> float:
    """Energy distance between the clouds of predicted and of measured populations (U-statistic over populations).

    The distance of two populations is that of their kernel means, sqrt(2 E|x-y| - E|x-x'| - E|y-y'|) over all pairs of
    cells (V-statistic, never below 0). It holds the noise of finite populations, as much on both sides if they have as
    many cells: give as many.

    Parameters
    ----------
    predicted, measured
        Two or more populations each: (n_i, G) log1p cells, of which 500 are taken. Neither the order of cells nor that
        of populations matters.

    Returns
    -------
    0 in the mean where both clouds are of one law, and at times less; more where predicted populations vary less than
    measured ones, vary otherwise, or lie elsewhere.

    Raises
    ------
    ValueError
        For fewer than two populations on a side, one that is empty or not finite, or disagreeing genes.

    Notes
    -----
    Kernel means of the energy distance lie in a Hilbert space (Sejdinovic et al. 2013), where an energy distance is 0
    for equal laws alone (Lyons 2013).
    """
    named: dict[str, np.ndarray] = {}
    for name, side in (("predicted", predicted), ("measured", measured)):
        if len(side) < 2:
            raise ValueError(f"{name} populations ({len(side)}) must be two or more; one does not tell how they vary.")
        named |= {f"{name} population {i}": cells for i, cells in enumerate(side)}
    taken = [in_own_order(cells)[:MAX_SCORED] for cells in checked_arrays(2, **named)]
    sizes = np.array([len(cells) for cells in taken])
    begin, cells = np.cumsum(sizes) - sizes, torch.from_numpy(np.concatenate(taken))
    cells = cells - cells.mean(0)
    mean = np.empty((len(taken), len(taken)))  # of the distances between the cells of two populations
    for i, own in enumerate(map(slice, begin, begin + sizes)):
        distances = cell_to_cell(cells[own], cells)  # (n_i, all cells)
        distances[:, own].fill_diagonal_(0)
        mean[i] = np.add.reduceat(distances.sum(0).numpy(), begin) / (sizes[i] * sizes)
    within = mean.diagonal()
    between = torch.from_numpy(np.sqrt(np.maximum(2 * mean - within[:, None] - within, 0)))
    n = len(predicted)
    return float(energy_of((between[:n, n:], between[:n, :n], between[n:, n:])))


@dataclass(frozen=True)
class PopulationScores:
    """How predicted populations vary beside measured ones.

    variance_ratio
        Predicted over measured variance of population means, summed over genes, without what finitely many cells make
        (the variance between cells over their number). 1 is right; not to be taken for that between cells.
    pc1_ratio
        The same along the first principal direction of the measured means, nothing taken off.
    two_level
        `two_level_distance`.
    coverage
        Part of measured (population, gene) means in the 5 to 95 % range of the predicted ones. K predicted populations
        of the measured law cover .9 (K - 1) / (K + 1).
    within
        Predicted over measured variance between the cells of a population, means over genes.
    mean_error
        Mean over genes of the difference of the means of population means, without sign.
    """

    variance_ratio: float
    pc1_ratio: float
    two_level: float
    coverage: float
    within: float
    mean_error: float


def population_scores(predicted: Sequence[np.ndarray], measured: Sequence[np.ndarray]) -> PopulationScores:
    """Scores of populations, (n_i, G) log1p cells each, two or more on a side and two cells in each.

    Raises ValueError as `two_level_distance`, and for a population of one cell.
    """
    distance = two_level_distance(predicted, measured)
    if min(map(len, [*predicted, *measured])) < 2:
        raise ValueError("a population of one cell does not tell how its cells differ; give two or more of each.")
    mine, theirs = (
        np.stack([cells.mean(axis=0, dtype=np.float64) for cells in side]) for side in (predicted, measured)
    )
    noise = [
        np.mean([c.var(axis=0, ddof=1, dtype=np.float64) / len(c) for c in s], axis=0) for s in (predicted, measured)
    ]
    between = [(means.var(axis=0, ddof=1) - own).sum() for means, own in zip((mine, theirs), noise, strict=True)]
    direction = np.linalg.svd(theirs - theirs.mean(axis=0), full_matrices=False)[2][0]
    along = [(means @ direction).var(ddof=1) for means in (mine, theirs)]
    low, high = np.quantile(mine, [0.05, 0.95], axis=0)
    within = [np.mean([cells.var(axis=0, dtype=np.float64) for cells in side]) for side in (predicted, measured)]
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing varies: no ratio
        ratios = [float(np.float64(a) / b) for a, b in (between, along, within)]
    covered = float(((theirs >= low) & (theirs <= high)).mean())
    mean_error = float(np.abs(mine.mean(axis=0) - theirs.mean(axis=0)).mean())
    return PopulationScores(ratios[0], ratios[1], distance, covered, ratios[2], mean_error)


def batch_means(screen: Screen, perturbation: str, cell_type: str, but: str) -> pd.DataFrame:
    """(batches, genes) log1p means of a measured condition in batches of LEAST_CELLS cells or more, `but` one."""
    obs = screen.obs
    here = ((obs["perturbation"] == perturbation) & (obs["cell_type"] == cell_type) & (obs["batch"] != but)).to_numpy()
    found = {
        batch: gene_means(screen.expression.log1p(rows))
        for batch in sorted(obs["batch"][here].astype(str).unique())
        if len(rows := np.flatnonzero(here & (obs["batch"] == batch).to_numpy())) >= LEAST_CELLS
    }
    return pd.DataFrame.from_dict(found, orient="index", columns=list(screen.expression.genes.names))
