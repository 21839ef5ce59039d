"""What sets start from with diffusion.start=target or mean: control cells that are moved.

With target, the genes that are perturbed are moved as knock-downs move their own (`means.targets.targets_alone`), in
training as in predictions. The network learns what is left, which in the own genes of many perturbations is nothing in
the mean: so it leaves that of an unseen one where it is. Of an unseen one predictions go as far as training
perturbations respond alike (`means.predictors.response_kept`).

With mean, each training condition starts from its own measured mean, so that the network learns the shape of a
response; what was not trained starts from the mean that simple methods tell (`means.predictors.start_shift`).

n = conditions, G = genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from perturbdiff.data.batch import Moves
from perturbdiff.data.conditions import ConditionIndex, ControlPools
from perturbdiff.data.expression import (
    Cells,
    gene_moments,
    log1p_of,
    log1p_taken,
    noise_of_means,
    one_count,
    overdispersion,
)
from perturbdiff.data.notation import Notation
from perturbdiff.means.predictors import Start, response_kept, start_shift
from perturbdiff.means.shifts import moves
from perturbdiff.means.training import Context, TrainingMeans


@dataclass(frozen=True)
class Starts:
    """Perturbed conditions that have controls, by their number in an index of cells."""

    cells: Cells
    index: ConditionIndex
    pools: ControlPools

    @cached_property
    def numbers(self) -> list[int]:
        found: list[int] = np.flatnonzero(self.pools.of >= 0).tolist()
        return found

    @cached_property
    def labels(self) -> list[tuple[str, str, str]]:
        return [self.index.labels(condition) for condition in self.numbers]

    @cached_property
    def control(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(k, G) log1p means of their controls, (k, G) variances between these, and (k,) how many they are."""
        of_pool: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        for condition in self.numbers:
            if (pool := int(self.pools.of[condition])) not in of_pool:
                of_pool[pool] = gene_moments(log1p_of(self.cells, self.pools.rows(condition)))
        mean, variance, n = zip(*(of_pool[int(self.pools.of[condition])] for condition in self.numbers), strict=True)
        return np.stack(mean), np.stack(variance), np.array(n)

    def means(self, notation: Notation) -> TrainingMeans:
        """Raises ValueError where there is no condition."""
        moments, preprocessing, n_genes = [], self.cells.preprocessing, len(self.cells.genes)

        def parts() -> Iterator[tuple[sparse.csr_matrix, np.ndarray]]:  # one in memory at a time
            for condition in self.numbers:
                taken = self.cells.take(self.index.cells(condition))
                log1p = log1p_taken(taken, n_genes, preprocessing)
                moments.append(gene_moments(log1p))
                yield log1p, one_count(taken, preprocessing)

        of_counts = overdispersion(parts(), n_genes)
        perturbed, variance, n_cells = (np.array(of_all) for of_all in zip(*moments, strict=True))
        control_mean, control_variance, n_controls = self.control
        batches: dict[int, set[str]] = {}
        for condition, (_, _, batch) in zip(self.numbers, self.labels, strict=True):
            batches.setdefault(int(self.pools.of[condition]), set()).add(batch)
        shared = np.array([len(batches[int(self.pools.of[condition])]) > 1 for condition in self.numbers])
        control_noise = noise_of_means(control_variance, n_controls)
        return TrainingMeans(
            [perturbation for perturbation, _, _ in self.labels],
            [cell_type for _, cell_type, _ in self.labels],
            [batch for _, _, batch in self.labels],
            control_mean,
            perturbed,
            n_cells,
            notation,
            self.cells.genes,
            overdispersion=of_counts,
            control_noise=None if control_noise is None else np.where(shared[:, None], 0.0, control_noise),
            perturbed_noise=noise_of_means(variance, n_cells),
        )

    def trained_moves(self, means: TrainingMeans, start: Start) -> Moves:
        """Of each condition, which are those of `means`; of controls, none."""
        if start == "mean":
            return Moves(self._moved(list(means.effect)), np.ones(len(self.index), dtype=np.float32))
        return self.told_moves(means, start, network_weight=1.0)

    def told_moves(self, means: TrainingMeans, start: Start, network_weight: float) -> Moves:
        """Of conditions that were not trained, or as if they were not."""
        response = np.ones(len(self.index), dtype=np.float32)
        if start == "target":
            response[self.numbers] = [response_kept(means, perturbation) for perturbation, _, _ in self.labels]
        told = self._moved(self._shifts(means, start))
        rest = self._moved(self._shifts(means, "mean")) if network_weight < 1 and start != "mean" else None
        return Moves(told, response, rest)

    def _shifts(self, means: TrainingMeans, start: Start) -> list[np.ndarray]:
        asked = [Context(*labels, mean[None]) for labels, mean in zip(self.labels, self.control[0], strict=True)]
        return [start_shift(means, context, start) for context in asked]

    def _moved(self, shifts: list[np.ndarray]) -> np.ndarray:
        every = np.zeros((len(self.index), 2, len(self.cells.genes)), dtype=np.float32)
        every[:, 0] = 1
        for condition, mean, shift in zip(self.numbers, self.control[0], shifts, strict=True):
            every[condition] = moves(mean, shift)
        return every
