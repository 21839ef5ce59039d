"""Means of training effects as predictions: (G,) shifts of the mean, log1p space, G = genes.

Means over conditions are unweighted, but for `perturbed_mean`: each condition counts once, whatever its number of
cells. Every predictor takes the training means and the context it is asked for, and returns None where it says nothing
of such a context.
"""

from __future__ import annotations

import numpy as np

from perturbdiff.data.notation import Parts
from perturbdiff.means.training import Context, TrainingMeans


def no_change(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) zeros: the perturbed cells are the controls."""
    return np.zeros(len(training.control_of(context)))


def context_mean(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) mean effect of all training perturbations in this (cell_type, batch).

    If the context has none: of the same cell type in any batch; if that has none either: of all training conditions.
    """
    return training.context_means(context.cell_type, context.batch)[0]


def others_mean(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) the `context_mean` without this perturbation itself, at any dose; no change where there is no other."""
    names = {name for name, _ in training.parts(context.perturbation)}
    rows = [
        i
        for i in training.of_context(context.cell_type, context.batch).tolist()
        if {name for name, _ in training.seen[i]} != names
    ]
    mean: np.ndarray = training.effect[rows].mean(axis=0) if rows else no_change(training, context)
    return mean


def perturbed_mean(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) mean over all perturbed training cells of this (cell_type, batch), minus that of its controls.

    Cells count, not conditions, as in Systema (Viñas Torné et al. 2025, Nature Biotechnology). Falls back as
    `context_mean`: then, cells of other contexts stand for those of this one.
    """
    return training.context_means(context.cell_type, context.batch)[1] - training.control_of(context)


def perturbation_mean(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) mean effect of this perturbation over the training contexts.

    One never seen at this dose gets that of its nearest dose, one never seen at all the `context_mean`.
    """
    return _mean_effect(training, training.parts(context.perturbation), context)


def additive(training: TrainingMeans, context: Context) -> np.ndarray | None:
    """(G,) sum of the mean effects of the parts of a combination never seen; None for anything else.

    A part never seen alone counts as the `context_mean`.
    """
    parts = training.parts(context.perturbation)
    if len(parts) < 2 or len(training.of_perturbation(parts)):
        return None
    total: np.ndarray = np.sum([_mean_effect(training, (part,), context) for part in parts], axis=0)
    return total


def shift_cells(controls: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Predicted cells, in the dtype of the (k, G) control cells, whose mean is that of these plus the (G,) shift.

    A gene that rises does so by as much in every cell. One that falls loses the same part of its value in every cell,
    as cells that have none of it cannot lose any; it loses no more than all.
    """
    if controls.ndim != 2 or controls.size == 0:
        raise ValueError(f"controls ({controls.shape}) must be a non-empty array (cells, genes); keep control cells.")
    if shift.shape != controls.shape[1:]:
        raise ValueError(f"shift ({shift.shape}) must be (genes,) of the controls; pass {controls.shape[1:]}.")
    kept, added = moves(controls.mean(axis=0, dtype=np.float64), shift)
    return (controls * kept + added).astype(controls.dtype, copy=False)


def moves(control_mean: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(2, G) what `shift_cells` keeps of each value, and what it adds, of controls with a (G,) mean."""
    lost = np.divide(-shift, control_mean, out=np.zeros(len(shift)), where=(shift < 0) & (control_mean > 0))
    return np.stack([1 - np.minimum(lost, 1), np.maximum(shift, 0)])


def _mean_effect(training: TrainingMeans, parts: Parts, context: Context) -> np.ndarray:
    rows = training.of_perturbation(parts)
    if not len(rows):
        return context_mean(training, context)
    mean: np.ndarray = training.effect[rows].mean(axis=0)
    return mean
