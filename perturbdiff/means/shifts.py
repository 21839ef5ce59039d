"""Predictions without a network: controls of the held-out context plus a mean response of the training conditions.

n = training conditions, G = genes. A shift is a (G,) change of the mean, log1p space. Means over conditions are
unweighted: each condition counts once, whatever its number of cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from perturbdiff.data.notation import Notation, Parts

PENALTIES = np.logspace(-3, 5, 17)
"""Candidates for the ridge penalty. Features have unit scale: the last one is as good as the plain mean."""


@dataclass(frozen=True, eq=False)
class TrainingEffects:
    """Mean responses of the n training conditions, log1p space; condition i is entry i of every field.

    Raises ValueError if there is no condition, the lengths disagree or a value is not finite.
    """

    perturbation: list[str]
    cell_type: list[str]
    batch: list[str]
    control_mean: np.ndarray  # (n, G) mean of the matched controls
    effect: np.ndarray  # (n, G) mean of the perturbed cells minus control_mean
    n_cells: np.ndarray  # (n,) perturbed cells; for reports, no mean is weighted by it
    notation: Notation = field(default_factory=lambda: Notation(()))  # what labels mean; without names "A+B" is A and B

    def __post_init__(self) -> None:
        n = len(self.perturbation)
        if n == 0:
            raise ValueError("training conditions (0) must be at least one; put perturbed cells in the training split.")
        for name in ("cell_type", "batch", "control_mean", "effect", "n_cells"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} ({len(getattr(self, name))} entries) must have one per condition; pass {n}.")
        if self.effect.ndim != 2 or self.effect.shape != self.control_mean.shape:
            raise ValueError(
                f"effect ({self.effect.shape}) must be (conditions, genes) like control_mean; "
                f"pass {self.control_mean.shape}."
            )
        for name in ("control_mean", "effect"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} (NaN or infinite) must be finite; drop conditions without matched controls.")

    def parts(self, perturbation: str) -> Parts:
        """What a label stands for, whatever the order of its parts."""
        return self.notation.parse(perturbation)

    @cached_property
    def ridge_fit(self) -> RidgeFit:
        """The model behind `ridge`, fitted once for all held-out conditions."""
        return RidgeFit(self)


def no_change(
    effects: TrainingEffects, perturbation: str, cell_type: str, batch: str, control_mean: np.ndarray
) -> np.ndarray:
    """(G,) zeros: the perturbed cells are the controls."""
    return np.zeros(effects.effect.shape[1])


def context_mean_shift(
    effects: TrainingEffects, perturbation: str, cell_type: str, batch: str, control_mean: np.ndarray
) -> np.ndarray:
    """(G,) mean effect of all training perturbations in this (cell_type, batch).

    If the context has none: of the same cell type in any batch; if that has none either: of all training conditions.
    """
    same_type = np.array([c == cell_type for c in effects.cell_type])
    same_context = same_type & np.array([b == batch for b in effects.batch])
    for chosen in (same_context, same_type):
        if chosen.any():
            return effects.effect[chosen].mean(axis=0)
    return effects.effect.mean(axis=0)


def perturbation_mean_shift(
    effects: TrainingEffects, perturbation: str, cell_type: str, batch: str, control_mean: np.ndarray
) -> np.ndarray:
    """(G,) mean effect of this perturbation over the training contexts.

    One never seen at this dose gets that of its nearest dose. A combination "A+B" never seen gets the sum of the mean
    effects of its parts, if all were seen alone; anything else never seen gets `context_mean_shift`.
    """
    seen = [effects.parts(p) for p in effects.perturbation]

    def mean_effect(parts: Parts) -> np.ndarray | None:
        known = {p for p in seen if [name for name, _ in p] == [name for name, _ in parts]}
        if not known:
            return None
        nearest = min(known, key=lambda p: (_distance(p, parts), p))
        return effects.effect[np.array([p == nearest for p in seen])].mean(axis=0)

    parts = effects.parts(perturbation)
    shift = mean_effect(parts)
    if shift is not None:
        return shift
    singles = [mean_effect((part,)) for part in parts]
    known = [single for single in singles if single is not None]
    if len(known) == len(parts):
        return np.sum(known, axis=0)
    return context_mean_shift(effects, perturbation, cell_type, batch, control_mean)


def ridge(
    effects: TrainingEffects, perturbation: str, cell_type: str, batch: str, control_mean: np.ndarray
) -> np.ndarray:
    """(G,) effect regressed on the (G,) control mean of the context and on the perturbation.

    `RidgeFit` has the model. cell_type and batch enter through control_mean alone, so a context never trained on is
    placed among the training contexts by what its controls express.
    """
    if control_mean.shape != effects.effect.shape[1:]:
        raise ValueError(f"control_mean ({control_mean.shape}) must be (genes,); pass {effects.effect.shape[1:]}.")
    return effects.ridge_fit.predict(perturbation, control_mean)


BASELINES: dict[str, Callable[[TrainingEffects, str, str, str, np.ndarray], np.ndarray]] = {
    "no change": no_change,
    "context mean shift": context_mean_shift,
    "perturbation mean shift": perturbation_mean_shift,
    "ridge": ridge,
}
"""Printed name -> function of (effects, perturbation, cell_type, batch, control_mean) -> shift, weakest first."""


def shift_cells(controls: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Predicted cells: (k, G) control cells plus the (G,) shift, clipped at 0, in the dtype of the controls.

    The clipping moves the mean of a gene that is mostly 0 by less than a negative shift says.
    """
    if controls.ndim != 2 or controls.size == 0:
        raise ValueError(f"controls ({controls.shape}) must be a non-empty array (cells, genes); keep control cells.")
    if shift.shape != controls.shape[1:]:
        raise ValueError(f"shift ({shift.shape}) must be (genes,) of the controls; pass {controls.shape[1:]}.")
    return np.maximum(controls + shift, 0).astype(controls.dtype, copy=False)


class RidgeFit:
    """Linear model of the effect of a condition, its penalty chosen by leaving out one training condition at a time.

    effect = b + W c + V a, where c is the control mean of the context (centred on the training conditions and divided
    by their root mean square distance from the centre, so that it weighs as much as an indicator) and a the
    perturbation indicators: one column per single perturbation named in training, "A+B" being 1 in both A and B. The
    intercept b is free, one penalty holds W and V. A perturbation never named has a = 0: the context decides alone.

    With fewer conditions than features the problem lives in the n-dimensional span of the conditions: a thin SVD of
    the design gives the hat matrix H of every penalty, and the error of a condition predicted from all others is its
    residual over 1 - H_ii, exactly, without refitting (Allen 1974). The penalty with the smallest sum of squares wins,
    the largest one of equals. Held-out conditions are never seen. A single training condition gives its own effect.

    Attributes
    ----------
    penalty
        The chosen one.
    loo_error
        (len(PENALTIES),) sum of squared leave-one-out errors over conditions and genes; empty for one condition.
    """

    def __init__(self, effects: TrainingEffects) -> None:
        control = np.asarray(effects.control_mean, dtype=np.float64)
        self._parts = effects.parts
        names = sorted({name for p in effects.perturbation for name, _ in effects.parts(p)})
        self._columns = {name: i for i, name in enumerate(names)}
        self._centre = control.mean(axis=0)
        distance = np.sqrt(((control - self._centre) ** 2).sum(axis=1).mean())
        self._scale = distance if distance > 0 else 1.0  # all in one context: the control mean says nothing
        self.design = np.stack(
            [self._features(p, c) for p, c in zip(effects.perturbation, control, strict=True)]
        )  # (n, G + single perturbations)
        self._feature_mean = self.design.mean(axis=0)
        target = np.asarray(effects.effect, dtype=np.float64)
        self._mean_effect = target.mean(axis=0)
        self._u, self._s, self._vt = np.linalg.svd(self.design - self._feature_mean, full_matrices=False)
        self._projected = self._u.T @ target  # (rank, G)
        if len(target) == 1:
            self.loo_error, self.penalty = np.empty(0), float(PENALTIES[-1])
        else:
            self.loo_error = np.array([(self._left_out(target, penalty) ** 2).sum() for penalty in PENALTIES])
            self.penalty = float(PENALTIES[self.loo_error <= self.loo_error.min() * (1 + 1e-9)].max())

    def predict(self, perturbation: str, control_mean: np.ndarray) -> np.ndarray:
        """(G,) effect of the perturbation in the context with this (G,) control mean."""
        feature = self._vt @ (self._features(perturbation, control_mean) - self._feature_mean)
        return self._mean_effect + (feature * self._s / (self._s**2 + self.penalty)) @ self._projected

    def _features(self, perturbation: str, control_mean: np.ndarray) -> np.ndarray:
        indicator = np.zeros(len(self._columns))
        for name, _ in self._parts(perturbation):
            if name in self._columns:
                indicator[self._columns[name]] = 1.0
        return np.concatenate([(control_mean - self._centre) / self._scale, indicator])

    def _left_out(self, target: np.ndarray, penalty: float) -> np.ndarray:
        """(n, G) effect of each condition minus its prediction from the others."""
        shrinkage = self._s**2 / (self._s**2 + penalty)
        fitted = self._mean_effect + (self._u * shrinkage) @ self._projected
        leverage = 1 / len(target) + (self._u**2 * shrinkage).sum(axis=1)  # H_ii; 1/n is the intercept
        return (target - fitted) / (1 - leverage)[:, None]


def _distance(parts: Parts, others: Parts) -> float:
    """Between the doses of the same names, on a log scale; no dose is dose 1."""
    return sum(abs(math.log((a or 1.0) / (b or 1.0))) for (_, a), (_, b) in zip(parts, others, strict=True))
