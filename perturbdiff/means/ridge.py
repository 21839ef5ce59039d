"""The effect of a condition, regressed on what its controls express and on its perturbation.

n = training conditions, G = genes.
"""

from __future__ import annotations

import numpy as np

from perturbdiff.means.training import Context, TrainingMeans

PENALTIES = np.logspace(-3, 5, 17)
"""Candidates for the ridge penalty. Features have unit scale: the last one is as good as the plain mean."""


class RidgeFit:
    """Linear model of the effect of a condition, its penalty chosen by leaving out one training condition at a time.

    effect = b + W c + V a, where c is the control mean of the context (centred on the training conditions and divided
    by their root mean square distance from the centre, so that it weighs as much as an indicator) and a the
    perturbation indicators: one column per single perturbation named in training, "A+B" being 1 in both A and B. The
    intercept b is free, one penalty holds W and V. A perturbation never named has a = 0: the context decides alone. One
    that was given at several doses has a second column, log10 of the dose, centred and divided by its standard
    deviation over the conditions that have it.

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

    def __init__(self, training: TrainingMeans) -> None:
        control = np.asarray(training.control_mean, dtype=np.float64)
        self._notation = training.notation
        names = sorted({name for parts in training.parts for name, _ in parts})
        self._columns = {name: i for i, name in enumerate(names)}
        self._doses = _scales(training)
        self._dose_columns = {name: len(names) + i for i, name in enumerate(self._doses)}
        self._centre = control.mean(axis=0)
        distance = np.sqrt(((control - self._centre) ** 2).sum(axis=1).mean())
        self._scale = distance if distance > 0 else 1.0  # all in one context: the control mean says nothing
        self.design = np.stack(
            [self._features(p, c) for p, c in zip(training.perturbation, control, strict=True)]
        )  # (n, G + single perturbations + those with doses)
        self._feature_mean = self.design.mean(axis=0)
        target = np.asarray(training.effect, dtype=np.float64)
        self._mean_effect = target.mean(axis=0)
        self._u, self._s, self._vt = np.linalg.svd(self.design - self._feature_mean, full_matrices=False)
        self._projected = self._u.T @ target  # (rank, G)
        if len(target) == 1:
            self.loo_error, self.penalty = np.empty(0), float(PENALTIES[-1])
        else:
            self.loo_error = np.array([(self._left_out(target, penalty) ** 2).sum() for penalty in PENALTIES])
            self.penalty = float(PENALTIES[self.loo_error <= self.loo_error.min() * (1 + 1e-9)].max())

    def predict(self, context: Context) -> np.ndarray:
        """(G,) effect of the perturbation in the context. Raises ValueError where its genes are others."""
        if context.control.shape[1] != len(self._centre):
            raise ValueError(f"control ({context.control.shape}) must have the {len(self._centre)} genes of training.")
        feature = self._vt @ (self._features(context.perturbation, context.control_mean) - self._feature_mean)
        return self._mean_effect + (feature * self._s / (self._s**2 + self.penalty)) @ self._projected

    def _features(self, perturbation: str, control_mean: np.ndarray) -> np.ndarray:
        indicator = np.zeros(len(self._columns) + len(self._doses))
        for name, dose in self._notation.parse(perturbation):
            if name in self._columns:
                indicator[self._columns[name]] = 1.0
            if name in self._doses:
                centre, scale = self._doses[name]
                indicator[self._dose_columns[name]] = (np.log10(dose or 1.0) - centre) / scale
        return np.concatenate([(control_mean - self._centre) / self._scale, indicator])

    def _left_out(self, target: np.ndarray, penalty: float) -> np.ndarray:
        """(n, G) effect of each condition minus its prediction from the others."""
        shrinkage = self._s**2 / (self._s**2 + penalty)
        fitted = self._mean_effect + (self._u * shrinkage) @ self._projected
        leverage = 1 / len(target) + (self._u**2 * shrinkage).sum(axis=1)  # H_ii; 1/n is the intercept
        return (target - fitted) / (1 - leverage)[:, None]


def _scales(training: TrainingMeans) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of log10 of the doses of each perturbation that has several."""
    doses: dict[str, list[float]] = {}
    for parts in training.parts:
        for name, dose in parts:
            doses.setdefault(name, []).append(float(np.log10(dose or 1.0)))
    return {name: (float(np.mean(of)), float(np.std(of))) for name, of in sorted(doses.items()) if len(set(of)) > 1}
