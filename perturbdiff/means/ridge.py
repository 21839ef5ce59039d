"""Ridge regression of mean effects on controls and perturbations, its penalty by exact leave-one-out.

n = training conditions, G = genes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from perturbdiff.data.notation import Parts

PENALTIES = np.logspace(-3, 5, 17)
"""Candidates for the ridge penalty. Features have unit scale: the last one is as good as the plain mean."""
SAME = 1e-9  # of their length, that control means differ by from rounding alone


class RidgeFit:
    """Linear model of the effect of a condition, its penalty chosen by leaving out one training condition at a time.

    effect = b + W c + V a + U d, where c is the control mean of the context (centred on the training conditions and
    divided by their root mean square distance from the centre, so that it weighs as much as an indicator), a the
    perturbation indicators (one column per single perturbation named in training, "A+B" being 1 in both A and B) and d
    the doses: one column per perturbation that training had at several, log10(dose) in standard deviations from the
    mean of its conditions, 0 in conditions without it; no dose is dose 1. The intercept b is free, one penalty holds
    W, V and U. A perturbation never named has a = d = 0: the context decides alone.

    With fewer conditions than features the problem lives in the n-dimensional span of the conditions: a thin SVD of
    the design gives the hat matrix H of every penalty, and the error of a condition predicted from all others is its
    residual over 1 - H_ii, exactly, without refitting (Allen 1974). The penalty with the smallest sum of squares wins,
    the largest one of equals. A single training condition gives its own effect.

    Parameters
    ----------
    perturbation
        (n,) what each condition received.
    control_mean, effect
        (n, G) log1p space.

    Attributes
    ----------
    penalty
        The chosen one.
    loo_error
        (len(PENALTIES),) sum of squared leave-one-out errors over conditions and genes; empty for one condition.
    """

    def __init__(self, perturbation: Sequence[Parts], control_mean: np.ndarray, effect: np.ndarray) -> None:
        control = np.asarray(control_mean, dtype=np.float64)
        doses: dict[str, list[float]] = {}  # log10, of each single perturbation
        for parts in perturbation:
            for name, dose in parts:
                doses.setdefault(name, []).append(math.log10(dose or 1.0))
        self._columns = {name: i for i, name in enumerate(sorted(doses))}
        scaled = [name for name in sorted(doses) if len(set(doses[name])) > 1]
        self._dose_columns = {name: len(doses) + i for i, name in enumerate(scaled)}
        self._dose_scale = {name: (np.mean(doses[name]), np.std(doses[name])) for name in scaled}
        self._centre = control.mean(axis=0)
        distance = np.sqrt(((control - self._centre) ** 2).sum(axis=1).mean())
        # All in one context, but for rounding: the control mean says nothing.
        one_context = distance <= SAME * np.sqrt((control**2).sum(axis=1).mean())
        self._scale = 1.0 if one_context else distance
        self.design = np.stack(
            [self._features(parts, c) for parts, c in zip(perturbation, control, strict=True)]
        )  # (n, G + single perturbations + those at several doses)
        self._feature_mean = self.design.mean(axis=0)
        target = np.asarray(effect, dtype=np.float64)
        self._mean_effect = target.mean(axis=0)
        self._u, self._s, self._vt = np.linalg.svd(self.design - self._feature_mean, full_matrices=False)
        self._projected = self._u.T @ target  # (rank, G)
        if len(target) == 1:
            self.loo_error, self.penalty = np.empty(0), float(PENALTIES[-1])
        else:
            self.loo_error = np.array([(self._left_out(target, penalty) ** 2).sum() for penalty in PENALTIES])
            self.penalty = float(PENALTIES[self.loo_error <= self.loo_error.min() * (1 + 1e-9)].max())

    def predict(self, perturbation: Parts, control_mean: np.ndarray) -> np.ndarray:
        """(G,) effect of the perturbation in the context with this (G,) control mean."""
        feature = self._vt @ (self._features(perturbation, control_mean) - self._feature_mean)
        return self._mean_effect + (feature * self._s / (self._s**2 + self.penalty)) @ self._projected

    def _features(self, perturbation: Parts, control_mean: np.ndarray) -> np.ndarray:
        named = np.zeros(len(self._columns) + len(self._dose_columns))
        for name, dose in perturbation:
            if name in self._columns:
                named[self._columns[name]] = 1.0
            if name in self._dose_columns:
                mean, deviation = self._dose_scale[name]
                named[self._dose_columns[name]] += (math.log10(dose or 1.0) - mean) / deviation
        return np.concatenate([(control_mean - self._centre) / self._scale, named])

    def _left_out(self, target: np.ndarray, penalty: float) -> np.ndarray:
        """(n, G) effect of each condition minus its prediction from the others."""
        shrinkage = self._s**2 / (self._s**2 + penalty)
        fitted = self._mean_effect + (self._u * shrinkage) @ self._projected
        leverage = 1 / len(target) + (self._u**2 * shrinkage).sum(axis=1)  # H_ii; 1/n is the intercept
        return (target - fitted) / (1 - leverage)[:, None]
