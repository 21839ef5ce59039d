"""How sure scores are: what they would be without some cells, and on other conditions; which differences are real.

K = folds, C = conditions, G = genes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from scipy.special import stdtrit
from torch import Tensor

from perturbdiff.evaluation.metrics import Measured, in_own_order, pearson_of_changes

COMPARED = ("pearson_delta", "energy_distance", "mse_of_means")  # metrics whose noise within a condition is known
FOLDS = 10
LEVEL = 0.95
DRAWS = 2000  # of the bootstrap over conditions
ENOUGH_CONDITIONS = 5  # to speak of other conditions than these
ALIKE = 1 / 3  # of the measured spread between perturbations; predictions with less look alike


class Jackknife:
    """Scores of a condition's methods without each of `n_folds` folds of its cells, by name of COMPARED.

    The energy distance is without a fold of the predicted cells too; the mean that is predicted is what it is. An
    empty array where no fold would leave two cells of each. Folds are of cells in their own order, the same for all
    methods, so that these compare fold by fold.
    """

    def __init__(self, measured: Measured, n_folds: int) -> None:
        self._measured, self._n_folds = measured, n_folds
        if n_folds >= 2:
            self._mean = _without_each(measured.real, n_folds)  # (K, G)
            self._change = self._mean - _without_each(measured.truth_control, n_folds)

    def scores(self, pred: np.ndarray, distances: tuple[Tensor, Tensor, Tensor] | None = None) -> dict[str, np.ndarray]:
        """(K,) each, of predicted cells; `distances` of these in their own order, where they are known."""
        if self._n_folds < 2:
            return {name: np.empty(0) for name in COMPARED}
        mean = pred.mean(axis=0)
        if distances is None:
            distances = self._measured.distances(in_own_order(pred))
        return {
            "pearson_delta": pearson_of_changes(mean - self._measured.control_mean, self._change),
            "energy_distance": _energies(distances, self._n_folds),
            "mse_of_means": ((mean - self._mean) ** 2).mean(axis=1),
        }


def folds_of(*n_cells: int) -> int:
    """Folds of two cells or more, of the smallest of some sets of cells."""
    return min(FOLDS, min(n_cells) // 2)


def _without_each(cells: np.ndarray, n_folds: int) -> np.ndarray:
    """(K, G) means of the cells without each fold, one in K of them in turn; all where a fold has every cell."""
    kept = _kept(len(cells), n_folds) if len(cells) > 1 else np.ones((n_folds, 1))
    means: np.ndarray = kept @ cells / kept.sum(axis=1, keepdims=True)
    return means


def _kept(n: int, n_folds: int) -> np.ndarray:
    """(K, n) which cells are there without each fold: 1 or 0."""
    return (np.arange(n) % n_folds != np.arange(n_folds)[:, None]).astype(np.float64)


def _energies(distances: tuple[Tensor, Tensor, Tensor], n_folds: int) -> np.ndarray:
    """(K,) energy distances (U-statistic) without each fold."""
    between, within_pred, within_real = (values.numpy() for values in distances)
    of_pred, of_real = (_kept(n, n_folds) for n in between.shape)

    def total(rows: np.ndarray, values: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return (rows @ values * columns).sum(axis=1)

    a, b = of_pred.sum(axis=1), of_real.sum(axis=1)
    value = 2 * total(of_pred, between, of_real) / (a * b)
    value -= total(of_pred, within_pred, of_pred) / np.maximum(a * (a - 1), 1)
    value -= total(of_real, within_real, of_real) / np.maximum(b * (b - 1), 1)
    return np.where((a > 1) & (b > 1), value, np.nan)


def standard_error(without: np.ndarray) -> float:
    """Jackknife standard error of a score, from (K,) scores without each fold; NaN for fewer than two.

    Of fewer than FOLDS it is wider by as much as their t distribution is than that of FOLDS.

    Notes
    -----
    Tukey 1958; Efron & Tibshirani 1993, Eq. 11.5, of blocks.
    """
    n = len(without)
    if n < 2:
        return float("nan")
    wider = _width(n) / _width(FOLDS)
    return float(wider * np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))


def interval(values: np.ndarray, errors: np.ndarray | None) -> tuple[float, float] | None:
    """95 % interval of the mean of a score over conditions.

    Parameters
    ----------
    values
        (C,) of the conditions where it is defined.
    errors
        (C,) standard errors within each; None where nobody knows.

    Returns
    -------
    Five conditions or more are taken for some of many: a bootstrap over conditions, each with its own error. Fewer
    speak of themselves alone: the error of their cells. None where that is unknown.
    """
    n = len(values)
    if n >= ENOUGH_CONDITIONS:
        generator = np.random.default_rng(0)
        chosen = generator.integers(0, n, (DRAWS, n))
        noise = np.zeros(n) if errors is None else np.where(np.isfinite(errors), errors, _largest(errors))
        means = (values[chosen] + generator.normal(size=(DRAWS, n)) * noise[chosen]).mean(axis=1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)
    if n == 0 or errors is None or not np.isfinite(errors).all():
        return None
    half = _width(FOLDS) * float(np.sqrt((errors**2).sum())) / n
    return float(values.mean()) - half, float(values.mean()) + half


def compare(
    own: np.ndarray, other: np.ndarray, errors: np.ndarray, loss: Callable[[np.ndarray], np.ndarray]
) -> dict[str, int]:
    """On how many conditions the model is better than another method, worse, cannot be told apart or compared.

    Parameters
    ----------
    own, other
        (C,) scores of both.
    errors
        (C,) standard errors of their difference, which share cells.
    loss
        Of a score; less is better.
    """
    gain = loss(other) - loss(own)
    known = np.isfinite(gain) & np.isfinite(errors)
    told = known & (np.abs(gain) > _width(FOLDS) * errors)
    return {
        "better": int((told & (gain > 0)).sum()),
        "worse": int((told & (gain < 0)).sum()),
        "not distinguishable": int((known & ~told).sum()),
        "not comparable": int((~known).sum()),
    }


def _largest(errors: np.ndarray) -> float:
    known = errors[np.isfinite(errors)]
    return float(known.max()) if len(known) else 0.0


@cache
def _width(n_folds: int) -> float:
    return float(stdtrit(n_folds - 1, (1 + LEVEL) / 2))


def spread_of_responses(
    pred: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray], noise: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[float, float]:
    """Spread between the mean responses of the perturbations of one context, predicted and measured, without noise.

    Parameters
    ----------
    pred, real
        Perturbation -> (G,) mean; two or more.
    noise
        Perturbation -> (G,) variance of both means.

    Returns
    -------
    Sums over genes of the variance between perturbations, less that of the means themselves; perhaps under 0.
    """
    spreads = []
    for side, means in enumerate((pred, real)):
        between = np.stack(list(means.values())).var(axis=0, ddof=1).sum()
        spreads.append(float(between - np.mean([noise[label][side].sum() for label in means])))
    return spreads[0], spreads[1]
