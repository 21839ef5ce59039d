"""All predictors of mean responses by the names they are printed with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from perturbdiff.means.shifts import additive, context_mean, no_change, perturbation_mean, perturbed_mean
from perturbdiff.means.targets import covariance, own_target
from perturbdiff.means.training import Context, TrainingMeans


def ridge(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) effect regressed on the control mean of the context, on the perturbation and on its dose.

    `RidgeFit` has the model. cell_type and batch enter through the control mean alone, so a context never trained on is
    placed among the training contexts by what its controls express.
    """
    return training.ridge_fit.predict(training.parts(context.perturbation), training.control_of(context))


def log_space(training: TrainingMeans, context: Context) -> np.ndarray | None:
    """(G,) shift by the effects of this perturbation in other contexts, as ratios, weighted by likeness of controls.

    `LogSpaceFit` has the model; its settings were chosen by leaving out cell types where this cell type is new to the
    perturbation, contexts otherwise. A dose never seen is the nearest one, a combination never seen the sum of the
    changes of its parts. None where the perturbation, or a part, was never seen.
    """
    control, parts = training.control_of(context), training.parts(context.perturbation)
    found = [training.of_perturbation(parts)]
    if not len(found[0]):
        found = [training.of_perturbation((part,)) for part in parts]
    if not found or not all(map(len, found)):
        return None
    known = {training.cell_type[i] for rows in found for i in rows}
    fit = training.fit_across_batches if context.cell_type in known else training.fit_across_cell_types
    return fit.predict([fit.log_change(rows, control) for rows in found], control) - control


PREDICTORS: dict[str, Callable[[TrainingMeans, Context], np.ndarray | None]] = {
    "no change": no_change,
    "context mean": context_mean,
    "perturbed mean": perturbed_mean,
    "perturbation mean": perturbation_mean,
    "additive": additive,
    "ridge": ridge,
    "log space": log_space,
    "own target": own_target,
    "covariance": covariance,
}
"""Printed name -> (G,) shift of the mean in log1p space, or None where it says nothing of such a context."""
