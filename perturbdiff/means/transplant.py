"""Cells of other training conditions as a prediction: nothing is shifted, real cells stand for the wanted ones."""

from __future__ import annotations

import numpy as np

from perturbdiff.means.training import Context, TrainingMeans


def transplant_rows(training: TrainingMeans, context: Context) -> list[int] | None:
    """The training conditions whose cells stand for the wanted ones; None if there is none.

    Those of the same perturbation (at its nearest dose) in all contexts, the ones whose controls have the most alike
    mean first; of a perturbation never seen, all conditions of this (cell_type, batch), in their order.
    """
    rows = training.of_perturbation(training.parts(context.perturbation))
    if len(rows):
        squares = np.square(training.control_mean[rows] - training.control_of(context)).sum(axis=1)
        return [int(i) for i in rows[np.argsort(squares, kind="stable")]]
    here = context.cell_type, context.batch
    same = [i for i, where in enumerate(zip(training.cell_type, training.batch, strict=True)) if where == here]
    return same or None
