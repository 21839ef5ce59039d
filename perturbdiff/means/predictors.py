"""All predictors of mean responses by the names they are printed with."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from perturbdiff.data.notation import Parts
from perturbdiff.means.newness import New, axes
from perturbdiff.means.shifts import additive, context_mean, no_change, perturbation_mean, perturbed_mean
from perturbdiff.means.stack import MOST_FOLDS, MOST_PERTURBATIONS, Stack
from perturbdiff.means.targets import covariance, own_target, targets_alone, with_unseen_targets
from perturbdiff.means.training import Context, Predictor, TrainingMeans

Start = Literal["controls", "target", "mean"]
"""Of diffusion.start."""


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
    return _log_space(training, context, {})


def shrunk(training: TrainingMeans, context: Context) -> np.ndarray | None:
    """(G,) `log_space`, of each effect the part that is no noise of finitely many cells (`means.signal`).

    None where that says nothing, or nobody knows the noise.
    """
    return None if training.signal is None else _log_space(training, context, training.signal)


def _log_space(training: TrainingMeans, context: Context, kept: Mapping[Parts, np.ndarray]) -> np.ndarray | None:
    # Of effects that `kept` does not have, all is kept.
    control, parts = training.control_of(context), training.parts(context.perturbation)
    found = [training.of_perturbation(parts)]
    if not len(found[0]):
        found = [training.of_perturbation((part,)) for part in parts]
    if not found or not all(map(len, found)):
        return None
    known = {training.cell_type[i] for rows in found for i in rows}
    fit = training.fit_across_batches if context.cell_type in known else training.fit_across_cell_types
    changes = [fit.log_change(rows, control, kept.get(training.seen[rows[0]], 1.0)) for rows in found]
    return fit.predict(changes, control) - control


def features(training: TrainingMeans, context: Context) -> np.ndarray | None:
    """(G,) the `context_mean`, and what perturbations with such features do beyond it.

    `FeatureFit` has the model. Of a perturbation that no table describes, and where the tables say nothing of training
    perturbations, the `context_mean` alone. None without tables.
    """
    if not training.tables:
        return None
    shift = context_mean(training, context)
    beyond = training.feature_fit.predict(training.parts(context.perturbation))
    return shift if beyond is None else shift + beyond


def stacked(training: TrainingMeans, context: Context) -> np.ndarray | None:
    """(G,) the others weighted by how well they predict training conditions that are as new as this one.

    `Stack` has the model. As new: in the same way (`means.newness`), or in the next that training can leave out: one
    axis of two, a cell type for a batch. The own genes of parts that no condition has change as those of others do
    (`target_shift`), and say nothing of the weights. None where training has nothing to leave out so.
    """
    stack = stack_for(training, newness_of(training, context))
    if stack is None:
        return None
    total = weighed(training, context, stack)
    return None if total is None else with_unseen_targets(training, context, total)


def weighed(training: TrainingMeans, context: Context, stack: Stack) -> np.ndarray | None:
    """(G,) what a stack makes of the others, own genes too; None where it has no weights and does not shrink."""
    shifts = {name: STACKED[name](training, context) for name in stack.names}
    told = {name: shift for name, shift in shifts.items() if shift is not None}
    weights = stack.weights(list(told))
    if not weights and not stack.shrinks:
        return None
    return sum((weight * told[name] for name, weight in weights.items()), start=no_change(training, context))


def start_shift(training: TrainingMeans, context: Context, start: Start) -> np.ndarray:
    """(G,) what a set can start from, as a shift of the controls: none, `targets_alone`, or a mean response.

    The last is `stacked`, or the next that says something of the context, but for the own genes of parts that no
    condition has, which change as those of others do (`target_shift`).
    """
    if start == "controls":
        return no_change(training, context)
    if start == "target":
        return targets_alone(training, context)
    for predict in (stacked, shrunk, log_space, additive):
        if (shift := predict(training, context)) is not None:
            return with_unseen_targets(training, context, shift)
    return with_unseen_targets(training, context, context_mean(training, context))


def response_kept(training: TrainingMeans, perturbation: str) -> float:
    """Which part of a predicted response to keep, 0 to 1.

    Of a perturbation that no condition has, the less the fewer the others' responses have in common: the square root of
    the sum of the weights of `stacked` for such a one, own genes left out. The sum itself gives the least squared
    error, and responses that are too small together; its root keeps their size (Louis 1984, JASA 79:393). 1 of what was
    seen, or in part, and where training has nothing to leave out.
    """
    parts = training.parts(perturbation)
    stack = stack_for(training, "perturbation") if parts and training.unseen(parts) == parts else None
    return 1.0 if stack is None else math.sqrt(sum(stack.weights(stack.names).values()))


def newness_of(training: TrainingMeans, context: Context) -> New:
    """How what is asked for is new to training conditions."""
    names = frozenset(name for name, _ in training.parts(context.perturbation))
    return training.known.new(names, context.cell_type, context.batch)


def stack_for(training: TrainingMeans, new: New) -> Stack | None:
    """Of training conditions that are as new when they are left out, or the next that can be had; None without any."""
    return next((stack for kind in AS_NEW[new] if (stack := _stack(training, kind)) is not None), None)


def _stack(training: TrainingMeans, new: New) -> Stack | None:
    if new not in training.learned:
        unseen, both = axes(new)[0] in ("perturbation", "combination"), len(axes(new)) > 1
        contexts = zip(training.cell_type, training.batch, strict=True)
        places: list[Hashable] = [*training.cell_type] if axes(new)[-1] == "cell type" else [*contexts]
        perturbations: list[Hashable] = [tuple(name for name, _ in seen) for seen in training.seen]
        # What tables count is learned of all conditions: with one left out, two that are alike leave nothing to see.
        taught = replace(training, table_weights=training.feature_fit.weights)
        training.learned[new] = Stack.fit(
            taught,
            STACKED,
            perturbations if unseen else places,
            lambda known, condition: known.new(*condition) == new,
            most_folds=MOST_PERTURBATIONS if unseen else MOST_FOLDS,
            shrinks=unseen,
            place=places if both else None,
        )
    stack: Stack | None = training.learned[new]
    return stack


AS_NEW: dict[New, tuple[New, ...]] = {
    "perturbation": ("perturbation",),
    "combination": ("combination",),
    "cell type": ("cell type",),
    "batch": ("batch", "cell type"),  # of cell types that were seen in one batch each
    "dose": ("batch", "cell type"),
    "perturbation and cell type": ("perturbation and cell type", "perturbation and batch", "perturbation"),
    "perturbation and batch": ("perturbation and batch", "perturbation and cell type", "perturbation"),
    "combination and cell type": ("combination and cell type", "combination and batch", "combination"),
    "combination and batch": ("combination and batch", "combination and cell type", "combination"),
}
"""How training conditions that are left out may be new, to stand for what is asked for, the nearest first."""


PREDICTORS: dict[str, Predictor] = {
    "no change": no_change,
    "context mean": context_mean,
    "perturbed mean": perturbed_mean,
    "perturbation mean": perturbation_mean,
    "additive": additive,
    "ridge": ridge,
    "log space": log_space,
    "shrunk": shrunk,
    "own target": own_target,
    "covariance": covariance,
    "features": features,
    "stacked": stacked,
}
"""By the names they are printed with."""

STACKED = {
    name: PREDICTORS[name]
    for name in ("context mean", "perturbation mean", "additive", "ridge", "log space", "shrunk", "features")
}
"""Those that `stacked` weighs."""
