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

    With fewer conditions than features the problem lives in the n-dimensional span of the conditions: the axes of the
    design give the hat matrix H of every penalty, and the error of a condition predicted from all others is its
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
        named = np.stack([self._named(parts) for parts in perturbation])
        self._design = np.concatenate([(control - self._centre) / self._scale, named], axis=1)  # (n, F)
        self._feature_mean = self._design.mean(axis=0)
        self._design -= self._feature_mean
        self._mean_effect = np.mean(effect, axis=0, dtype=np.float64)
        target = effect - self._mean_effect
        u, squares = _axes(self._design)  # (n, r), (r,)
        self._along = u.T @ target  # (r, G)
        self.loo_error, self.penalty = np.empty(0), float(PENALTIES[-1])
        if len(target) > 1:
            beyond = target - u @ self._along if u.shape[1] < len(u) else None
            self.loo_error = _left_out_errors(u, squares, self._along, beyond)
            self.penalty = float(PENALTIES[self.loo_error <= self.loo_error.min() * (1 + 1e-9)].max())
        self._shrunk = u / (squares + self.penalty)  # (n, r)

    def predict(self, perturbation: Parts, control_mean: np.ndarray) -> np.ndarray:
        """(G,) effect of the perturbation in the context with this (G,) control mean."""
        of_context = (control_mean - self._centre) / self._scale
        features = np.concatenate([of_context, self._named(perturbation)]) - self._feature_mean
        return self._mean_effect + (self._design @ features) @ self._shrunk @ self._along

    def _named(self, perturbation: Parts) -> np.ndarray:
        """Indicators of single perturbations, then doses of those that training had at several."""
        named = np.zeros(len(self._columns) + len(self._dose_columns))
        for name, dose in perturbation:
            if name in self._columns:
                named[self._columns[name]] = 1.0
            if name in self._dose_columns:
                mean, deviation = self._dose_scale[name]
                named[self._dose_columns[name]] += (math.log10(dose or 1.0) - mean) / deviation
        return named


def _axes(design: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, r) orthonormal axes of an (n, F) design, r at most the smaller of both, and the (r,) squares along them."""
    n, n_features = design.shape
    if n <= n_features:
        squares, vectors = np.linalg.eigh(design @ design.T)
        return vectors, np.maximum(squares, 0)
    squares, vectors = np.linalg.eigh(design.T @ design)
    some = squares > np.finfo(float).eps * n * squares.max()
    return design @ vectors[:, some] / np.sqrt(squares[some]), squares[some]


def _left_out_errors(u: np.ndarray, squares: np.ndarray, along: np.ndarray, beyond: np.ndarray | None) -> np.ndarray:
    """(len(PENALTIES),) squared errors of left-out conditions, of a target with (r, G) parts `along` the axes u and
    (n, G) parts `beyond` them, if any. Sums over genes are of products, which are taken once for all penalties."""
    products = along @ along.T
    of_beyond, crossed = (0.0, 0.0) if beyond is None else (np.square(beyond).sum(axis=1), beyond @ along.T)
    errors = []
    for penalty in PENALTIES:
        kept = u * (penalty / (squares + penalty))  # residuals are beyond + kept @ along
        residual = of_beyond + (kept * (2 * crossed + kept @ products)).sum(axis=1)
        leverage = 1 / len(u) + (np.square(u) * (squares / (squares + penalty))).sum(axis=1)  # H_ii; 1/n: the intercept
        errors.append((residual / np.square(1 - leverage)).sum())
    return np.array(errors)
