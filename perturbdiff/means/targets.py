"""Knock-downs and knock-outs, which are named by the gene that they act on: what is known of that gene alone.

G = genes. Shifts are of means, (G,) log1p.
"""

from __future__ import annotations

import numpy as np

from perturbdiff.means.shifts import context_mean
from perturbdiff.means.training import Context, TrainingMeans

EXPRESSED = 0.05  # mean log1p of a gene in controls, of which a ratio says something
NO_SPREAD = 1e-12


def own_target(training: TrainingMeans, context: Context) -> np.ndarray | None:
    """`context_mean`, but for the target itself: what targets of the training perturbations lost or gained of their own
    mean, on average of logarithms. None where no part is a gene, or no training perturbation says what happens to one.
    """
    own = _own_shift(training, context)
    if own is None:
        return None
    shift = context_mean(training, context).copy()
    for gene, change in own.items():
        shift[gene] = change
    return shift


def covariance(training: TrainingMeans, context: Context) -> np.ndarray | None:
    """What the change of the target takes along: cov(gene, target) / var(target) among the control cells, times it.

    None as `own_target`, and where the target does not vary.

    Notes
    -----
    Linear response, as CIPHER (Kuznets-Speck et al. 2025).
    """
    own = _own_shift(training, context)
    if own is None:
        return None
    centred = context.control - context.control_mean
    variance = {gene: float((centred[:, gene] ** 2).sum()) for gene in own}
    if min(variance.values()) <= NO_SPREAD:
        return None
    return np.sum([centred.T @ centred[:, gene] / variance[gene] * own[gene] for gene in own], axis=0)


def _own_shift(training: TrainingMeans, context: Context) -> dict[int, float] | None:
    """Of each part that is a gene, its position and the change of its mean; None where nothing says it."""
    positions = _positions(training)
    targets = [positions[name] for name, _ in training.notation.parse(context.perturbation) if name in positions]
    ratios = []
    for i, parts in enumerate(training.parts):
        if len(parts) == 1 and (gene := positions.get(parts[0][0])) is not None:
            before, after = training.control_mean[i, gene], training.perturbed_mean[i, gene]
            if before >= EXPRESSED:
                ratios.append(np.log((after + EXPRESSED / 10) / (before + EXPRESSED / 10)))
    if not targets or not ratios:
        return None
    return {gene: float(context.control_mean[gene] * np.expm1(np.mean(ratios))) for gene in targets}


def _positions(training: TrainingMeans) -> dict[str, int]:
    if training.genes is None:
        return {}
    symbols = training.genes.symbols or ()
    return {name: i for names in (symbols, training.genes.names) for i, name in enumerate(names) if name}
