"""Perturbations by what tables say of them: kernel ridge on several tables, each with a learned weight.

n = training perturbations that a table describes, F = features, T = tables, G = genes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perturbdiff.data.notation import Parts
from perturbdiff.data.rng import numpy_generator
from perturbdiff.features.tables import FeatureTable

FEWEST = 4  # training perturbations that say what features mean
MOST_WEIGHING = 300  # of them that weights are learned from, drawn by a fixed seed
LOG_WEIGHTS = (-9.0, 3.0)  # bounds of ln weight, of a table whose rows vary by 1: 20 times what cannot be told at most
STARTS = (-4.0, -2.0, 0.0, 2.0)  # ln weights, of all tables at once: the best of them begins the search
LEAST_WEIGHT = 0.01  # of the largest one; what is less is 0


class FeatureFit:
    """What perturbations do beyond the mean of their contexts, by kernel ridge on the tables that describe them.

    effect = mean + sum over tables of W_t v_t, where v_t are a perturbation's features in table t: the sum over its
    parts, centred and scaled over the n perturbations to a mean square length of 1; zeros where the table lacks it. The
    ridge penalty is 1, and each table has a weight w_t on its squared length in place of a penalty of its own: kernel
    ridge on sum of w_t K_t. The weights have the least squared error of perturbations that are left out one at a time,
    which is exact without refitting (Allen 1974). A table that says nothing of the left-out ones gets none: weights
    under LEAST_WEIGHT of the largest are 0, and all are where the error is less than that of the mean of the others by
    no more than the standard error of this difference over perturbations (as of one in Breiman et al. 1984).

    Parameters
    ----------
    tables
        T of them; nothing else than their rows of these perturbations is looked at.
    perturbation
        What each condition received.
    effect
        (conditions, G) less the mean effect of their contexts.
    weights
        Those of the tables, where others learned them.

    Attributes
    ----------
    weights
        (T,) as above.
    error
        Squared left-out error with weights that were learned here, over that of the mean of the others; else 1.
    """

    def __init__(
        self,
        tables: Sequence[FeatureTable],
        perturbation: Sequence[Parts],
        effect: np.ndarray,
        weights: np.ndarray | None = None,
    ) -> None:
        rows: dict[tuple[str, ...], list[int]] = {}
        for i, parts in enumerate(perturbation):
            rows.setdefault(tuple(name for name, _ in parts), []).append(i)
        self._tables = tuple(tables)
        every = list(rows)
        vectors = [_vectors(table, every) for table in tables]
        described = np.flatnonzero(np.any([v.any(axis=1) for v in vectors], axis=0)) if tables else np.zeros(0, int)
        self.names = [every[i] for i in described]
        self.weights, self.error = np.zeros(len(tables)), 1.0
        if len(self.names) < FEWEST:
            return
        target = np.stack([effect[rows[name]].mean(axis=0) for name in self.names])  # (n, G)
        vectors = [v[described] for v in vectors]
        self._centres = [v.mean(axis=0) for v in vectors]
        vectors = [v - centre for v, centre in zip(vectors, self._centres, strict=True)]
        squares = np.array([np.square(v).sum(axis=1).mean() for v in vectors])
        self._scales = np.divide(1.0, np.sqrt(squares), out=np.zeros(len(squares)), where=squares > 0)
        vectors = [v * scale for v, scale in zip(vectors, self._scales, strict=True)]
        self.weights, self.error = _learned(vectors, target) if weights is None else (weights, 1.0)
        if not self.weights.any():
            return
        design = np.concatenate([v * np.sqrt(w) for v, w in zip(vectors, self.weights, strict=True)], axis=1)  # (n, F)
        self._mean = target.mean(axis=0)
        if design.shape[1] <= len(design):
            penalised = design.T @ design + np.eye(design.shape[1])
            self._coefficients = np.linalg.solve(penalised, design.T @ (target - self._mean))  # (F, G)
        else:
            penalised = design @ design.T + np.eye(len(design))
            self._coefficients = design.T @ np.linalg.solve(penalised, target - self._mean)

    def predict(self, parts: Parts) -> np.ndarray | None:
        """(G,) beyond the mean of its context; None of what no table describes, or where nothing was learned."""
        if not self.weights.any():
            return None
        name = tuple(part for part, _ in parts)
        found = [_vectors(table, [name])[0] for table in self._tables]
        if not any(vector.any() for vector in found):
            return None
        scaled = zip(found, self._centres, self._scales, np.sqrt(self.weights), strict=True)
        shift: np.ndarray = self._mean + np.concatenate([(v - c) * s * w for v, c, s, w in scaled]) @ self._coefficients
        return shift

    def summary(self) -> str:
        """For people: what each table counts."""
        if not self.weights.any():
            return "none: no table foretells training perturbations that are left out"
        shares = zip(self._tables, self.weights / self.weights.max(), strict=True)
        shown = ", ".join(f"{table.name} {share:.2g}" for table, share in shares)
        return f"{shown}; training perturbations that are left out have {self.error:.2f} of the error of their mean"


def _vectors(table: FeatureTable, names: Sequence[tuple[str, ...]]) -> np.ndarray:
    """(len(names), F) sum over parts of rows, centred over the whole table; zeros for parts that it lacks."""
    centre = table.centre_and_scale()[0].astype(np.float64)
    single = list(dict.fromkeys(part for name in names for part in name))
    found = table.positions(single) >= 0
    rows = np.where(found[:, None], table.rows(single) - centre, 0.0)
    row = {part: rows[i] for i, part in enumerate(single)}
    nothing = np.zeros(table.values.shape[1])
    return np.stack([np.sum([row[part] for part in name], axis=0) if name else nothing for name in names])


def _learned(vectors: Sequence[np.ndarray], target: np.ndarray) -> tuple[np.ndarray, float]:
    """(T,) weights, and their error over that of the mean, of vectors (n, F) each."""
    n = len(target)
    if n > MOST_WEIGHING:
        some = np.sort(numpy_generator(0, "weights of features").permutation(n)[:MOST_WEIGHING])
        vectors, target = [v[some] for v in vectors], target[some]
    kernels = np.stack([_centred(v @ v.T) for v in vectors])  # (T, n, n)
    products = target @ target.T
    of_mean, _ = left_out_errors(np.full(len(kernels), -np.inf), kernels, products)
    if of_mean.sum() <= 0:
        return np.zeros(len(kernels)), 1.0
    from scipy.optimize import minimize  # a sixth of a second that other predictions do without

    def log_error(logs: np.ndarray) -> tuple[float, np.ndarray]:
        errors, gradient = left_out_errors(logs, kernels, products)
        return float(np.log(errors.sum() / of_mean.sum())), gradient / errors.sum()

    start = min(STARTS, key=lambda log: log_error(np.full(len(kernels), log))[0])
    found = minimize(
        log_error, np.full(len(kernels), start), jac=True, method="L-BFGS-B", bounds=[LOG_WEIGHTS] * len(kernels),
        options={"ftol": 1e-5, "maxiter": 50},
    )  # fmt: skip
    best = np.exp(found.x)
    best[best < LEAST_WEIGHT * best.max()] = 0.0
    with np.errstate(divide="ignore"):
        errors, _ = left_out_errors(np.log(best), kernels, products)
    gain = of_mean - errors
    if gain.mean() <= gain.std(ddof=1) / np.sqrt(len(gain)):
        return np.zeros(len(kernels)), 1.0
    return best, float(errors.sum() / of_mean.sum())


def left_out_errors(
    log_weights: np.ndarray, kernels: np.ndarray, products: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) squared error of each perturbation, left out, summed over genes; (T,) the gradient of their sum.

    Parameters
    ----------
    log_weights
        (T,) natural logarithms; -inf is no weight.
    kernels
        (T, n, n) centred.
    products
        (n, n) of the targets with each other.

    Notes
    -----
    With an intercept and the ridge penalty 1, targets minus their fit are B y, B = (K + 1)^-1 - 1 1'/n, and the
    left-out residual of i is (B y)_i / B_ii.
    """
    weights = np.exp(log_weights)
    n = len(products)
    inverse = np.linalg.inv(np.tensordot(weights, kernels, 1) + np.eye(n))
    residual = inverse - 1 / n
    leverage = np.diag(residual)
    of_targets = residual @ products  # (n, n)
    squares = np.einsum("ij,ji->i", of_targets, residual)  # (B C B)_ii
    # d sum = tr(dB X), and dB = -inverse dK inverse.
    X = 2 * of_targets.T / leverage**2 - np.diag(2 * squares / leverage**3)
    gradient: np.ndarray = -weights * np.tensordot(kernels, inverse @ X @ inverse, 2)
    return squares / leverage**2, gradient


def _centred(kernel: np.ndarray) -> np.ndarray:
    means = kernel.mean(axis=0)
    centred: np.ndarray = kernel - means - means[:, None] + means.mean()
    return centred
