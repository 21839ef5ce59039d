"""Whether predicted populations vary as measured ones do: a distance between distributions over distributions.

A response is a random distribution, so that its populations (batches, donors, replicates of one nominal condition) are
a cloud of distributions. G = genes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from perturbdiff.diffusion.distances import MAX_SCORED, cell_to_cell, energy_of
from perturbdiff.evaluation.metrics import checked_arrays, in_own_order


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
