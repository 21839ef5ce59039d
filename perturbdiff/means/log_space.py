"""Responses as ratios: effects averaged over contexts in the logarithm of expression.

n = training conditions, m = those of one perturbation, G = genes. Expression is expm1 of a mean log1p value.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from perturbdiff.data.notation import Parts

EPS = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Candidates: 1 makes effects differences of mean log1p values, the least makes them ratios of expression."""
BANDWIDTHS = (np.inf, 1.0, 0.5, 0.25)
"""Candidates, in root mean square distances between training contexts: how unlike controls of a used context may be."""
FAR = 4.0
"""Squared distances, in that at which the convergence was learned, to which it is carried."""
CONVERGENCE = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Candidates, evenly spaced: what share of the difference between controls of contexts the perturbation takes away."""


def log_expression(mean: np.ndarray, eps: float) -> np.ndarray:
    """log(expm1(mean) + eps) of mean log1p values."""
    logs: np.ndarray = np.log(np.expm1(mean) + eps)
    return logs


def mean_of(logs: np.ndarray, eps: float) -> np.ndarray:
    """Mean log1p values whose `log_expression` is given; 0 where there are none."""
    means: np.ndarray = np.log1p(np.maximum(np.exp(logs) - eps, 0))
    return means


class LogSpaceFit:
    """Effects in log(expression + eps), averaged over training contexts by the likeness of their controls.

    With l = log(expm1(mean) + eps) and w the weights of the training contexts k that had the perturbation, the
    predicted change of a context with controls c is

        sum_k w_k (l(perturbed_k) - l(control_k)) - b (l(c) - sum_k w_k l(control_k)),
        w_k proportional to exp(-|control_k - c|^2 / (2 h^2 s^2)),

    where s is the root mean square distance between controls of training conditions. The second term is there since
    contexts become alike: b = 1 gives all the same profile. What was learned of contexts that differ little is not
    carried to one that is far: with d^2 the mean squared distance at which b was learned and D^2 that of c to
    sum_k w_k control_k, b is b min(1, FAR d^2 / D^2)^2. eps, h and b, the same for all perturbations and
    genes, are those with the smallest sum of squared errors of mean log1p values when each training condition is
    predicted from those of the same perturbation in other contexts; of equals, the first ones. Where no perturbation
    was seen in two contexts, they are eps 0.1, h infinite, b 0.

    Parameters
    ----------
    perturbation
        (n,) what each condition received.
    left_out
        (n,) what the errors leave out together: conditions with the same one do not predict each other.
    control_mean, perturbed_mean
        (n, G) log1p space.

    Attributes
    ----------
    eps, bandwidth, convergence
        The chosen ones.
    errors
        (len(EPS), len(BANDWIDTHS), len(CONVERGENCE)) sums of squared errors; empty where nothing could be chosen.
    """

    def __init__(
        self,
        perturbation: Sequence[Parts],
        left_out: Sequence[Hashable],
        control_mean: np.ndarray,
        perturbed_mean: np.ndarray,
    ) -> None:
        self._control = np.asarray(control_mean, dtype=np.float64)
        self._perturbed = np.asarray(perturbed_mean, dtype=np.float64)
        self._scale = 2 * np.square(self._control - self._control.mean(axis=0)).sum(axis=1).mean()
        self.eps, self.bandwidth, self.convergence = 0.1, np.inf, 0.0
        groups: dict[Parts, list[int]] = {}
        for i, parts in enumerate(perturbation):
            groups.setdefault(parts, []).append(i)
        self.errors: np.ndarray = np.zeros((len(EPS), len(BANDWIDTHS), len(CONVERGENCE)))
        self._learned_at = 0.0
        folds = [fold for rows in groups.values() if (fold := self._fold(rows, left_out)) is not None]
        unlike = []
        for rows, usable in folds:
            self._add_errors(np.array(rows), usable)
            others = usable / usable.sum(axis=1, keepdims=True)
            unlike.append(np.square(self._control[rows] - others @ self._control[rows]).sum(axis=1))
        if not folds:
            self.errors = np.empty(0)
            return
        self._learned_at = float(np.concatenate(unlike).mean())
        best = np.flatnonzero(self.errors <= self.errors.min() * (1 + 1e-9))[0]
        e, h, b = np.unravel_index(best, self.errors.shape)
        self.eps, self.bandwidth, self.convergence = EPS[e], BANDWIDTHS[h], CONVERGENCE[b]

    def log_change(
        self, conditions: np.ndarray, control_mean: np.ndarray, kept: float | np.ndarray = 1.0
    ) -> np.ndarray:
        """(G,) change of log(expression + eps) that these training conditions tell of a (G,) control mean.

        `kept` is the part of their effects that counts.
        """
        used = np.ones((1, len(conditions)), dtype=bool)
        weights = self._weights(self._squares(control_mean[None], conditions), used, self.bandwidth)[0]
        control = weights @ log_expression(self._control[conditions], self.eps)
        perturbed = weights @ log_expression(self._perturbed[conditions], self.eps)
        change: np.ndarray = (perturbed - control) * kept
        unlike = np.square(control_mean - weights @ self._control[conditions]).sum()
        near = min(1.0, FAR * self._learned_at / unlike) ** 2 if unlike > 0 else 1.0
        return change - near * self.convergence * (log_expression(control_mean, self.eps) - control)

    def predict(self, changes: Sequence[np.ndarray], control_mean: np.ndarray) -> np.ndarray:
        """(G,) mean log1p values after all these (G,) changes."""
        return mean_of(log_expression(control_mean, self.eps) + np.sum(changes, axis=0), self.eps)

    def _fold(self, rows: list[int], left_out: Sequence[Hashable]) -> tuple[list[int], np.ndarray] | None:
        """Conditions of one perturbation that can be predicted from others, and (m, m) from which."""
        codes = {label: code for code, label in enumerate(dict.fromkeys(left_out[i] for i in rows))}
        if len(codes) < 2:
            return None
        code = np.array([codes[left_out[i]] for i in rows])
        return rows, code[:, None] != code

    def _add_errors(self, rows: np.ndarray, usable: np.ndarray) -> None:
        squares, means = self._squares(self._control[rows], rows), self._perturbed[rows]
        weights = [self._weights(squares, usable, bandwidth) for bandwidth in BANDWIDTHS]
        predicted = np.empty_like(means)
        for e, eps in enumerate(EPS):
            control, perturbed = log_expression(self._control[rows], eps), log_expression(means, eps)
            found: np.ndarray = np.empty(len(CONVERGENCE))
            for h in range(len(BANDWIDTHS)):
                if h == 0 or not np.array_equal(weights[h], weights[h - 1]):  # of one context each, all weights are
                    told, unlike = weights[h] @ perturbed, control - weights[h] @ control
                    # exp(told + (1 - b) unlike) + 1 - eps, from b = 1 down: products cost less than exponentials
                    expression, step = np.exp(told, out=told), np.exp(unlike / (len(CONVERGENCE) - 1))
                    for b in reversed(range(len(CONVERGENCE))):
                        np.maximum(np.add(expression, 1 - eps, out=predicted), 1, out=predicted)
                        np.subtract(np.log(predicted, out=predicted), means, out=predicted)
                        found[b] = np.vdot(predicted, predicted)
                        expression *= step
                self.errors[e, h] += found

    def _squares(self, control_mean: np.ndarray, conditions: np.ndarray) -> np.ndarray:
        """(m, k) squared distances of (m, G) controls to those of k training conditions."""
        centre = self._control[conditions].mean(axis=0)  # differences of large numbers lose digits
        a, b = control_mean - centre, self._control[conditions] - centre
        squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T
        return np.maximum(squares, 0)

    def _weights(self, squares: np.ndarray, usable: np.ndarray, bandwidth: float) -> np.ndarray:
        """(m, k) weights of the usable conditions, adding up to 1 in each row."""
        if self._scale == 0 or np.isinf(bandwidth):
            weights = usable.astype(np.float64)
        else:
            nearest = np.where(usable, squares, np.inf).min(axis=1, keepdims=True)  # its exponential is 1
            weights = np.exp(-np.where(usable, squares - nearest, np.inf) / (2 * bandwidth**2 * self._scale))
        total: np.ndarray = weights.sum(axis=1, keepdims=True)
        return weights / total
