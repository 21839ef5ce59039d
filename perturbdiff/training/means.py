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

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from perturbdiff.data.batch import Moves
from perturbdiff.data.conditions import ConditionIndex, ControlPools
from perturbdiff.data.expression import Cells, gene_means, log1p_of, one_count, overdispersion
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
    def control_mean(self) -> np.ndarray:
        """(k, G) log1p means of their controls."""
        of_pool: dict[int, np.ndarray] = {}
        for condition in self.numbers:
            if (pool := int(self.pools.of[condition])) not in of_pool:
                of_pool[pool] = gene_means(log1p_of(self.cells, self.pools.rows(condition)))
        return np.stack([of_pool[int(self.pools.of[condition])] for condition in self.numbers])

    def means(self, notation: Notation) -> TrainingMeans:
        """Raises ValueError where there is no condition."""
        perturbed, parts = [], []
        for condition in self.numbers:
            rows = self.index.cells(condition)
            log1p = log1p_of(self.cells, rows)
            perturbed.append(gene_means(log1p))
            parts.append((log1p, one_count(self.cells.take(rows), self.cells.preprocessing)))
        return TrainingMeans(
            [perturbation for perturbation, _, _ in self.labels],
            [cell_type for _, cell_type, _ in self.labels],
            [batch for _, _, batch in self.labels],
            self.control_mean,
            np.stack(perturbed),
            self.index.n_cells[self.numbers],
            notation,
            self.cells.genes,
            overdispersion=overdispersion(parts),
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
        asked = [Context(*labels, mean[None]) for labels, mean in zip(self.labels, self.control_mean, strict=True)]
        return [start_shift(means, context, start) for context in asked]

    def _moved(self, shifts: list[np.ndarray]) -> np.ndarray:
        every = np.zeros((len(self.index), 2, len(self.cells.genes)), dtype=np.float32)
        every[:, 0] = 1
        for condition, mean, shift in zip(self.numbers, self.control_mean, shifts, strict=True):
            every[condition] = moves(mean, shift)
        return every
