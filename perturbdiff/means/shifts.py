"""Mean responses of the training conditions, as they are: shifts of the mean, (G,) log1p.

Means over conditions are unweighted, where nothing else is said: each condition counts once, whatever its number of
cells.
"""

from __future__ import annotations

import math

import numpy as np

from perturbdiff.data.notation import Parts
from perturbdiff.means.training import Context, TrainingMeans


def no_change(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) zeros: the perturbed cells are the controls."""
    return np.zeros(training.effect.shape[1])


def context_mean(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) mean effect of all training perturbations in this context, or what stands for it (`in_context`)."""
    return training.effect[training.in_context(context.cell_type, context.batch)].mean(axis=0)


def perturbed_mean(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) from the controls to the mean of all perturbed training cells of this context, or what stands for it.

    Notes
    -----
    The reference of Viñas Torné et al. 2025 (Systema).
    """
    chosen = training.in_context(context.cell_type, context.batch)
    mean = np.average(training.perturbed_mean[chosen], axis=0, weights=training.n_cells[chosen])
    return mean - context.control_mean


def perturbation_mean(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) mean effect of this perturbation over the training contexts.

    One that was never seen at this dose gets that of its nearest dose, on a log scale; one never seen `context_mean`.
    """
    rows = conditions_of(training, training.notation.parse(context.perturbation))
    return context_mean(training, context) if rows is None else training.effect[rows].mean(axis=0)


def additive(training: TrainingMeans, context: Context) -> np.ndarray | None:
    """(G,) sum of the mean effects of the parts of a combination that was never seen; a part that was never seen adds
    `context_mean`. None for anything else."""
    parts = training.notation.parse(context.perturbation)
    if len(parts) < 2 or conditions_of(training, parts) is not None:
        return None
    rows = [conditions_of(training, (part,)) for part in parts]
    if all(of is None for of in rows):
        return None
    singles = [context_mean(training, context) if of is None else training.effect[of].mean(axis=0) for of in rows]
    return np.sum(singles, axis=0)


def conditions_of(training: TrainingMeans, parts: Parts) -> np.ndarray | None:
    """(n,) True for the training conditions of a perturbation, at its dose or the nearest; None without any."""
    names = [name for name, _ in parts]
    known = {of for of in training.parts if [name for name, _ in of] == names}
    if not known:
        return None
    nearest = min(known, key=lambda of: (_distance(of, parts), of))
    return np.array([of == nearest for of in training.parts])


def _distance(parts: Parts, others: Parts) -> float:
    """Between the doses of the same names, on a log scale; no dose is dose 1."""
    return sum(abs(math.log((a or 1.0) / (b or 1.0))) for (_, a), (_, b) in zip(parts, others, strict=True))


def shift_cells(control: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Predicted cells, in the dtype of the (k, G) control cells, whose mean is that of these plus the (G,) shift.

    A gene that rises does so by as much in every cell. One that falls loses the same part of its value in every cell,
    as cells that have none of it cannot lose any; it loses no more than all.
    """
    if control.ndim != 2 or control.size == 0:
        raise ValueError(f"control ({control.shape}) must be a non-empty array (cells, genes); keep control cells.")
    if shift.shape != control.shape[1:]:
        raise ValueError(f"shift ({shift.shape}) must be (genes,) of the controls; pass {control.shape[1:]}.")
    mean = control.mean(axis=0, dtype=np.float64)
    lost = np.divide(-shift, mean, out=np.zeros(len(shift)), where=(shift < 0) & (mean > 0))
    return (control * (1 - np.minimum(lost, 1)) + np.maximum(shift, 0)).astype(control.dtype, copy=False)
