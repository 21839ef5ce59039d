"""Effects as ratios of means, averaged over the contexts that are like the one that is asked for.

n = training conditions, G = genes.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from perturbdiff.means.shifts import conditions_of
from perturbdiff.means.training import Context, TrainingMeans

OFFSETS = (0.01, 0.03, 0.1, 0.3)  # log1p, added to means before their logarithm: ratios of small ones are noise
WIDTHS = (0.5, 1.0, 2.0, np.inf)  # of likeness, in medians of the distance between contexts
ALIKE = (0.0, 0.1, 0.2, 0.3, 0.5)  # part of the difference between contexts that a perturbation takes away
MAX_WORK = 2e9  # multiplications to choose among these


class LogSpaceFit:
    """A perturbation multiplies means by what it multiplied them by in other contexts, weighted by likeness.

    log(m + e) of the perturbed mean is that of the control mean, plus the average of its change over the training
    contexts of the perturbation, minus b times the difference of the controls from the average of theirs: contexts
    become alike under a strong perturbation. The weight of a context falls with the distance d of its controls, in the
    same logarithms, as exp(-(d / h)^2). e, h and b are those of the smallest squared error, in log1p, when each
    training condition is predicted from the others of its perturbation.
    """

    def __init__(self, training: TrainingMeans) -> None:
        self._training = training
        self.offset, self.width, self.alike = 0.1, float(np.inf), 0.0
        groups = self._groups()
        if groups:
            choices = list(product(OFFSETS, WIDTHS, ALIKE))
            errors = [self._left_out(groups, offset, width) for offset, width in product(OFFSETS, WIDTHS)]
            self.offset, self.width, self.alike = choices[int(np.argmin(np.concatenate(errors)))]

    def predict(self, context: Context) -> np.ndarray | None:
        """(G,) shift of the mean; of a combination that was never seen, parts multiply. None where nothing was seen."""
        training, parts = self._training, self._training.notation.parse(context.perturbation)
        seen = [conditions_of(training, parts)]
        if seen[0] is None:
            seen = [conditions_of(training, (part,)) for part in parts]
        control = np.log(context.control_mean + self.offset)
        change = np.zeros_like(control)
        for rows in seen:
            if rows is None:
                return None
            before = np.log(training.control_mean[rows] + self.offset)
            after = np.log(training.perturbed_mean[rows] + self.offset)
            weights = _weights(np.linalg.norm(before - control, axis=1)[None], self.width, self._unit(before))
            change += (weights @ (after - before))[0] - self.alike * (control - (weights @ before)[0])
        return np.maximum(np.exp(control + change) - self.offset, 0) - context.control_mean

    def _groups(self) -> list[np.ndarray]:
        """Conditions of each perturbation that was seen in several contexts; as many as there is time for."""
        by_parts: dict[tuple[object, ...], list[int]] = {}
        for i, parts in enumerate(self._training.parts):
            by_parts.setdefault(parts, []).append(i)
        groups = [np.array(rows) for rows in by_parts.values() if len(rows) > 1]
        work = np.cumsum([len(rows) ** 2 * self._training.effect.shape[1] for rows in groups])
        return groups[: max(int((work * len(OFFSETS) * len(WIDTHS) <= MAX_WORK).sum()), 1)]

    def _unit(self, before: np.ndarray) -> float:
        """The median distance between contexts, of logarithms of their control means."""
        if len(before) < 2:
            return 1.0
        return float(np.median(_distances(before)[np.triu_indices(len(before), 1)])) or 1.0

    def _left_out(self, groups: list[np.ndarray], offset: float, width: float) -> np.ndarray:
        """(len(ALIKE),) squared errors of conditions that are predicted from the others of their perturbation."""
        training, errors = self._training, np.zeros(len(ALIKE))
        for rows in groups:
            before = np.log(training.control_mean[rows] + offset)
            after = np.log(training.perturbed_mean[rows] + offset)
            distances = _distances(before)
            np.fill_diagonal(distances, np.inf)
            weights = _weights(distances, width, self._unit(before))
            change, away = weights @ (after - before), before - weights @ before
            for i, alike in enumerate(ALIKE):
                predicted = np.maximum(np.exp(before + change - alike * away) - offset, 0)
                errors[i] += ((predicted - training.perturbed_mean[rows]) ** 2).sum()
        return errors


def _distances(x: np.ndarray) -> np.ndarray:
    square = (x**2).sum(axis=1)
    return np.sqrt(np.maximum(square[:, None] + square - 2 * x @ x.T, 0))


def _weights(distances: np.ndarray, width: float, unit: float) -> np.ndarray:
    """Rows that sum to 1, of (m, n) distances; an infinite one weighs nothing."""
    power, finite = np.full(distances.shape, -np.inf), np.isfinite(distances)
    power[finite] = -((distances[finite] / (width * unit)) ** 2)
    weights = np.exp(power - power.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
