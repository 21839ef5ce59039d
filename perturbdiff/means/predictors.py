"""Every simple predictor of a mean response, by the name that it is printed under.

They are what a network has to beat. Nothing of the conditions that are asked for is seen but their control cells.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from perturbdiff.means import shifts, targets
from perturbdiff.means.log_space import LogSpaceFit
from perturbdiff.means.ridge import RidgeFit
from perturbdiff.means.training import Context, TrainingMeans

NO_CHANGE = "no change"


class MeanPredictors:
    """Fitted once to the training means, for all conditions."""

    def __init__(self, training: TrainingMeans) -> None:
        ridge, log_space = RidgeFit(training), LogSpaceFit(training)
        self._training = training
        self._predictors: dict[str, Callable[[TrainingMeans, Context], np.ndarray | None]] = {
            NO_CHANGE: shifts.no_change,
            "context mean": shifts.context_mean,
            "perturbed mean": shifts.perturbed_mean,
            "perturbation mean": shifts.perturbation_mean,
            "additive": shifts.additive,
            "ridge": lambda _, context: ridge.predict(context),
            "log space": lambda _, context: log_space.predict(context),
            "own target": targets.own_target,
            "covariance": targets.covariance,
        }

    def shifts(self, context: Context) -> dict[str, np.ndarray]:
        """(G,) change of the mean log1p by predictor, of those that say something of such a condition."""
        found = {name: predict(self._training, context) for name, predict in self._predictors.items()}
        return {name: shift for name, shift in found.items() if shift is not None}


def transplant_rows(training: TrainingMeans, context: Context) -> np.ndarray:
    """(n,) True for the training conditions whose cells are taken for those asked for: of the perturbation in other
    contexts, or else of all perturbations in this one."""
    rows = shifts.conditions_of(training, training.notation.parse(context.perturbation))
    return training.in_context(context.cell_type, context.batch) if rows is None else rows
