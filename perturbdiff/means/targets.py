"""Knock-downs by what they are known to do: less of their own gene, and of what varies with it.

G = genes, T = targets. A perturbation has a target where its name, or that of a part, is a gene.
"""

from __future__ import annotations

import numpy as np

from perturbdiff.data.notation import Parts
from perturbdiff.means.shifts import context_mean
from perturbdiff.means.training import Context, TrainingMeans


def own_target(training: TrainingMeans, context: Context) -> np.ndarray | None:
    """(G,) the `context_mean`, but for the targets: there, what training perturbations do to their own gene.

    None where no part is a gene, or no training perturbation says what becomes of its own (`target_shift`).
    """
    parts = training.parts(context.perturbation)
    if target_shift(training, context, training.targets(parts)) is None:
        return None
    return _with_targets(training, context, parts, context_mean(training, context))


def targets_alone(training: TrainingMeans, context: Context) -> np.ndarray:
    """(G,) zeros, but for the targets: `target_shift` there, where training says it."""
    parts = training.parts(context.perturbation)
    return _with_targets(training, context, parts, np.zeros(len(training.control_of(context))))


def with_unseen_targets(training: TrainingMeans, context: Context, shift: np.ndarray) -> np.ndarray:
    """(G,) the shift, but for the targets of parts that no condition has: `target_shift` there."""
    return _with_targets(training, context, training.unseen(training.parts(context.perturbation)), shift)


def target_shift(training: TrainingMeans, context: Context, targets: np.ndarray) -> np.ndarray | None:
    """(T,) change of the targets by what perturbations leave of their own gene, or make of it.

    The expression of this context's controls, times the fraction that the training perturbation of the gene leaves, or
    else those of other genes in the mean of logs (`TrainingMeans.target_log_ratio`). What controls do not express stays
    so. None where there is no target, or no training perturbation says it.
    """
    found = [training.target_log_ratio(gene, context.cell_type) for gene in targets.tolist()]
    ratios = [ratio for ratio in found if ratio is not None]  # of all targets or of none
    if not ratios:
        return None
    control = training.control_of(context)[targets]
    change: np.ndarray = np.log1p(np.expm1(control) * np.exp(ratios)) - control
    return change


def covariance(training: TrainingMeans, context: Context) -> np.ndarray | None:
    """(G,) linear response to the targets' own change, by the covariance of genes over the control cells.

    Of one target: its column of the covariance over its variance, times its shift in `own_target`. Of several: the
    combination of their columns that gives each its shift. CIPHER (Kuznets-Speck et al. 2025, bioRxiv
    2025.06.27.661814), with the size of the response given by the target. None as `own_target`, and where a target
    does not vary over the controls.
    """
    targets = training.targets(training.parts(context.perturbation))
    change = target_shift(training, context, targets)
    if change is None:
        return None
    of_targets = np.asarray(context.control[:, targets], dtype=np.float64)  # (k, T)
    if (of_targets == of_targets[0]).all(axis=0).any():
        return None
    of_targets -= of_targets.mean(axis=0)
    columns = (of_targets.T @ (context.control - training.control_of(context))) / len(of_targets)  # (T, G)
    force = np.linalg.lstsq(columns[:, targets], change, rcond=1e-10)[0]  # targets may vary as one
    shift: np.ndarray = force @ columns
    return shift


def _with_targets(training: TrainingMeans, context: Context, parts: Parts, shift: np.ndarray) -> np.ndarray:
    targets = training.targets(parts)
    change = target_shift(training, context, targets)
    if change is None:
        return shift
    shift = shift.copy()
    shift[targets] = change
    return shift
