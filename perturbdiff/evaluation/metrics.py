"""How close predicted cells are to real ones: the scores of one condition and their means over conditions.

All cells are dense log1p values, (n, G). G = genes. Two changes are compared, each a mean minus that of control cells:
the predicted one is measured from the controls that predictions start from, the real one from other controls, so that
no noise of theirs is in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbdiff.diffusion.distances import MAX_SCORED, NO_SPREAD, energy_of, pair_distances

METRICS: dict[str, Literal["higher", "lower", "ideal 1", "ideal 0.5"]] = {
    "pearson_delta": "higher",
    "energy_distance": "lower",
    "mse_of_means": "lower",
    "variance_ratio": "ideal 1",
    "pearson_perturbed": "higher",
    "rbf_mmd": "lower",
    "wasserstein": "lower",
    "zero_fraction": "lower",
    "correlation": "lower",
    "classifier_auc": "ideal 0.5",
}
"""Names of the scores in printing order -> which way is better."""

DETECTED = 1e-3  # log1p value above which a gene counts as seen in a cell
MIN_DETECTION_RATE = 0.05
COPY = 1e-7  # keys of copies of one cell differ by rounding alone
CORRELATED_GENES = 50  # of the largest variance, whose correlations are compared


def pearson_delta(
    pred_mean: np.ndarray, real_mean: np.ndarray, control_mean: np.ndarray, truth_control_mean: np.ndarray | None = None
) -> float:
    """Pearson correlation over genes of predicted and real change, (G,) means each.

    Parameters
    ----------
    control_mean, truth_control_mean
        Of the controls that the predicted and the real change are measured from. Where they are the same cells, their
        noise is in both changes: no effect at all then scores up to .5.

    Returns
    -------
    0 where no change is predicted, or the same for all genes; NaN where the real change is the same for all genes.
    """
    if truth_control_mean is None:
        truth_control_mean = control_mean
    pred, real, control, truth_control = checked_arrays(
        1, pred_mean=pred_mean, real_mean=real_mean, control_mean=control_mean, truth_control_mean=truth_control_mean
    )
    return float(pearson_of_changes(pred - control, real - truth_control))


def pearson_of_changes(pred: np.ndarray, real: np.ndarray) -> np.ndarray:
    """(...) `pearson_delta` of (..., G) changes."""
    pred, real = (change - change.mean(axis=-1, keepdims=True) for change in (pred, real))
    pred_norm, real_norm = (np.sqrt((change**2).sum(axis=-1)) for change in (pred, real))
    least = NO_SPREAD * np.sqrt(real.shape[-1])  # of a standard deviation of NO_SPREAD
    none, unknown = np.broadcast_arrays(pred_norm <= least, real_norm <= least)
    value = (pred * real).sum(axis=-1) / np.where(none | unknown, 1.0, pred_norm * real_norm)
    return np.where(unknown, np.nan, np.where(none, 0.0, value))


def mse_of_means(pred_mean: np.ndarray, real_mean: np.ndarray) -> float:
    """Mean over genes of the squared difference of the (G,) means."""
    pred, real = checked_arrays(1, pred_mean=pred_mean, real_mean=real_mean)
    return float(((pred - real) ** 2).mean())


def rbf_mmd(between: np.ndarray, within_pred: np.ndarray, within_real: np.ndarray) -> float:
    """Squared MMD with the kernel exp(-d^2 / median d^2 of the real cells), unbiased (U-statistic): sets of any sizes
    compare, and no difference is 0 in the mean, not more than 0.

    Parameters
    ----------
    between, within_pred, within_real
        (n, m), (n, n) and (m, m) distances of predicted and real cells.

    Returns
    -------
    NaN where it is undefined: one cell on a side, or half of the real pairs identical.

    Notes
    -----
    Gretton et al. 2012, Eq. 3.
    """
    n, m = between.shape
    bandwidth = np.median(within_real[np.triu_indices(m, 1)] ** 2) if m > 1 else 0.0
    if bandwidth <= NO_SPREAD or n < 2:
        return float("nan")
    k_between, k_pred, k_real = (np.exp(-(d**2) / bandwidth) for d in (between, within_pred, within_real))
    within = (k_pred.sum() - n) / (n * (n - 1)) + (k_real.sum() - m) / (m * (m - 1))  # less each cell with itself
    return float(within - 2 * k_between.mean())


def variance_ratio(pred: np.ndarray, real: np.ndarray) -> float:
    """Median over genes of the variance of the (n, G) predicted cells over that of the (m, G) real ones.

    Over the genes detected in at least 5 % of the real cells and varying among them; below 1 the prediction is too
    uniform. NaN if there is no such gene or fewer than 2 cells on a side.
    """
    pred, real = checked_arrays(2, pred=pred, real=real)
    return _variance_ratio(pred, _Real(real))


def wasserstein(pred: np.ndarray, real: np.ndarray) -> float:
    """Mean over genes of the Wasserstein distance of order 1 of the (n, G) predicted and the (n, G) real values, as
    many cells of each: the mean difference of sorted values."""
    pred, real = checked_arrays(2, pred=pred, real=real)
    return _wasserstein(pred, _Real(real))


def zero_fraction(pred: np.ndarray, real: np.ndarray) -> float:
    """Mean over genes of the difference in the part of the cells that have none."""
    pred, real = checked_arrays(2, pred=pred, real=real)
    return _zero_fraction(pred, _Real(real))


def correlation(pred: np.ndarray, real: np.ndarray) -> float:
    """Mean difference of the correlations between genes, of the (n, G) predicted and the (n, G) real cells.

    Between the CORRELATED_GENES that vary most among the real cells, of those in 5 % of them. A gene that does not vary
    correlates with none. NaN for fewer than 3 cells or 2 genes.
    """
    pred, real = checked_arrays(2, pred=pred, real=real)
    return _correlation(pred, _Real(real))


class _Real:
    """What scores ask of (m, G) real cells, found once for all methods."""

    def __init__(self, cells: np.ndarray) -> None:
        self.cells = cells

    @cached_property
    def in_order(self) -> np.ndarray:
        """(m, G) each gene's values, rising."""
        return np.sort(self.cells, axis=0)

    @cached_property
    def zeros(self) -> np.ndarray:
        """(G,) part of the cells that have none."""
        return (self.cells <= DETECTED).mean(axis=0)

    @cached_property
    def seen(self) -> np.ndarray:
        """(G,) whether a gene is in enough cells."""
        return (self.cells > DETECTED).mean(axis=0) >= MIN_DETECTION_RATE

    @cached_property
    def varying(self) -> tuple[np.ndarray, np.ndarray]:
        """(G,) whether a gene is seen and varies, and the variances of those that do; of two cells and more."""
        variance = self.cells.var(axis=0, ddof=1)
        genes = self.seen & (variance > NO_SPREAD)
        return genes, variance[genes]

    @cached_property
    def correlated(self) -> tuple[np.ndarray, np.ndarray]:
        """Genes that vary most, and the correlations of each pair of them."""
        variance = self.cells.var(axis=0)
        genes = np.flatnonzero(self.seen & (variance > NO_SPREAD))
        chosen = genes[np.argsort(-variance[genes], kind="stable")[:CORRELATED_GENES]]
        return chosen, _correlations(self.cells[:, chosen])


def _variance_ratio(pred: np.ndarray, real: _Real) -> float:
    if min(len(pred), len(real.cells)) < 2:
        return float("nan")
    genes, variance = real.varying
    return float(np.median(pred[:, genes].var(axis=0, ddof=1) / variance)) if genes.any() else float("nan")


def _wasserstein(pred: np.ndarray, real: _Real) -> float:
    return float(np.abs(np.sort(pred, axis=0) - real.in_order).mean())


def _zero_fraction(pred: np.ndarray, real: _Real) -> float:
    return float(np.abs((pred <= DETECTED).mean(axis=0) - real.zeros).mean())


def _correlation(pred: np.ndarray, real: _Real) -> float:
    chosen, correlations = real.correlated
    if min(len(pred), len(real.cells)) < 3 or len(chosen) < 2:
        return float("nan")
    return float(np.abs(_correlations(pred[:, chosen]) - correlations)[np.triu_indices(len(chosen), 1)].mean())


def _correlations(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=0)
    norm = np.sqrt((x**2).sum(axis=0))
    x = np.divide(x, norm, out=np.zeros_like(x), where=norm > NO_SPREAD)
    return x.T @ x


def classifier_auc(between: np.ndarray, within_pred: np.ndarray, within_real: np.ndarray) -> float:
    """How well distances tell predicted cells from real ones: area under the ROC curve.

    Cells of one half are judged by their mean distance to the real cells of the other half less that to the predicted
    ones, and the other way round. Same numbers of predicted and real cells are taken.

    Parameters
    ----------
    between, within_pred, within_real
        (n, n), (n, n) and (n, n) distances; the halves are the first cells and the last.

    Returns
    -------
    .5 in the mean where nothing tells them apart, 1 where everything does; NaN for fewer than 4 cells.

    Notes
    -----
    A two-sample test by a classifier (Lopez-Paz & Oquab 2017), which is the witness function of the energy distance:
    nearest neighbours, of which predictions without spread have none but each other, take these for good ones.
    """
    n = min(between.shape) // 2
    if n < 2:
        return float("nan")
    first, second = slice(0, n), slice(n, 2 * n)
    found = []
    for own, other in ((first, second), (second, first)):
        # (2 n, 2 n) of the predicted and real cells of one half to those of the other.
        to_pred = np.concatenate([within_pred[own, other], between[other, own].T])
        to_real = np.concatenate([between[own, other], within_real[own, other]])
        judged = to_real.mean(axis=1) - to_pred.mean(axis=1)
        of_real = np.sort(judged[n:])
        below, up_to = (np.searchsorted(of_real, judged[:n], side) for side in ("left", "right"))
        found.append((below + up_to).sum() / (2 * n**2))  # Mann-Whitney: equal ones count half
    return float(np.mean(found))


def in_own_order(cells: np.ndarray) -> np.ndarray:
    """(n, G) cells in an order that is like a random one and their own: whatever order they come in, some of them are
    the same cells. Copies of one cell are spread over all."""
    key = cells @ _direction(cells.shape[1]) * 1e5 % 1
    order = np.argsort(key, kind="stable")
    place = np.arange(len(cells))
    first = np.maximum.accumulate(np.where(np.diff(key[order], prepend=-1.0) > COPY, place, 0))  # of its copies
    key[order] = (key[order] + (place - first) * (np.sqrt(5) - 1) / 2) % 1
    return cells if (key[1:] >= key[:-1]).all() else cells[np.argsort(key, kind="stable")]


@cache
def _direction(n_genes: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=n_genes)


class Measured:
    """The measured side of a condition: what all methods are scored against, found once.

    Parameters
    ----------
    real, control, truth_control, others
        As of `score_condition`.

    Attributes
    ----------
    real
        (m, G) in their own order.
    """

    def __init__(
        self,
        real: np.ndarray,
        control: np.ndarray,
        truth_control: np.ndarray | None = None,
        others: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        shared = control if truth_control is None else truth_control
        real, control, shared = checked_arrays(2, real=real, control=control, truth_control=shared)
        self.real, self.others = in_own_order(real), others
        self.control_mean, self.n_control = control.mean(axis=0), len(control)
        self._truth_control = shared
        self._mean, self._truth_mean = self.real.mean(axis=0), shared.mean(axis=0)
        self._all, self._first = _Real(self.real), dict[int, _Real]()
        self._within: Tensor | None = None

    @cached_property
    def truth_control(self) -> np.ndarray:
        """(k, G) controls that the real change is measured from, in their own order."""
        return in_own_order(self._truth_control)

    def distances(self, pred: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """`pair_distances` of the first MAX_SCORED predicted cells in their own order, (n, G), and the real ones."""
        between, within_pred, self._within = pair_distances(
            torch.from_numpy(pred[:MAX_SCORED]), torch.from_numpy(self.real[:MAX_SCORED]), within_y=self._within
        )
        return between, within_pred, self._within

    def scores(
        self, pred: np.ndarray, n_equal: int | None = None, distances: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> dict[str, float]:
        """`score_condition` of predicted cells; `distances` of these in their own order, where they are known."""
        (pred,) = checked_arrays(2, pred=pred)
        if pred.shape[1] != self.real.shape[1]:
            raise ValueError(
                f"number of genes (pred {pred.shape[1]}, real {self.real.shape[1]}) must agree; put all on the same "
                "genes in the same order."
            )
        pred, real = in_own_order(pred), self.real
        pred_mean = pred.mean(axis=0)
        distances = self.distances(pred) if distances is None else distances
        between, within_pred, within_real = (values.numpy() for values in distances)
        n = min(len(pred), len(real), len(pred) if n_equal is None else n_equal)
        some = min(n, MAX_SCORED)
        first = self._first.setdefault(n, _Real(real[:n]))
        others = self.others
        return {
            "pearson_delta": float(pearson_of_changes(pred_mean - self.control_mean, self._mean - self._truth_mean)),
            "energy_distance": float(energy_of(distances)),
            "mse_of_means": mse_of_means(pred_mean, self._mean),
            "variance_ratio": _variance_ratio(pred, self._all),
            "pearson_perturbed": float("nan") if others is None else pearson_delta(pred_mean, self._mean, *others),
            "rbf_mmd": rbf_mmd(between, within_pred, within_real),
            "wasserstein": _wasserstein(pred[:n], first),
            "zero_fraction": _zero_fraction(pred[:n], first),
            "correlation": _correlation(pred[:n], first),
            "classifier_auc": classifier_auc(
                between[:some, :some], within_pred[:some, :some], within_real[:some, :some]
            ),
            **_counts(pred, real, self.n_control),
        }


def score_condition(
    pred: np.ndarray,
    real: np.ndarray,
    control: np.ndarray,
    truth_control: np.ndarray | None = None,
    n_equal: int | None = None,
    others: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:
    """All `METRICS` of one condition.

    Parameters
    ----------
    pred, real
        Predicted (n, G) and real (m, G) perturbed cells, log1p.
    control, truth_control
        REAL control cells of the condition's context, (k, G): those that predictions start from, the reference of the
        predicted change, and others, that of the real one. A model that supplied the controls of its own change could
        move them, and would game the score. The same cells if None, with the noise of `pearson_delta`.
    n_equal
        Cells of either side for the metrics that depend on their number (wasserstein, zero_fraction, correlation,
        classifier_auc): give the same to all methods. As many as both sides have if None.
    others
        (G,) means of cells of other perturbations in this context, one for each side: `pearson_perturbed` is of the
        changes from these. NaN if None.

    Returns
    -------
    One value per name in `METRICS`, NaN where it is undefined, and the numbers of cells n_pred, n_real, n_control. The
    order of the cells does not matter.

    Raises
    ------
    ValueError
        For an empty or non-finite array or disagreeing genes.

    Notes
    -----
    Changes from other perturbations: Viñas Torné et al. 2025 (Systema), as what all perturbations share is easy.
    """
    shared = control if truth_control is None else truth_control
    pred, real, control, shared = checked_arrays(2, pred=pred, real=real, control=control, truth_control=shared)
    return Measured(real, control, shared, others).scores(pred, n_equal)


def mean_scores(scores: Sequence[Mapping[str, float]] | pd.DataFrame) -> pd.DataFrame:
    """Unweighted mean over conditions of each metric, with the number of conditions that could not be scored.

    Parameters
    ----------
    scores
        What `score_condition` returned for each condition, as a list or as one row each. Other columns are ignored.

    Returns
    -------
    One row per name in `METRICS`: mean over the conditions where it is defined (NaN if none), n_nan of the others. Two
    methods compare only where their n_nan agree, so print it beside the mean.

    Raises
    ------
    ValueError
        If there is no condition or a metric is missing.
    """
    table = scores if isinstance(scores, pd.DataFrame) else pd.DataFrame(list(scores))
    if len(table) == 0:
        raise ValueError("scores (0 conditions) must not be empty; score at least one condition.")
    missing = [name for name in METRICS if name not in table.columns]
    if missing:
        raise ValueError(
            f"scores ({sorted(map(str, table.columns))}) lack {missing}; pass what score_condition returns."
        )
    values = table[list(METRICS)].to_numpy(dtype=float)  # (conditions, metrics)
    undefined = np.isnan(values)
    n_defined = (~undefined).sum(axis=0)
    mean = np.full(len(METRICS), np.nan)
    np.divide(np.where(undefined, 0.0, values).sum(axis=0), n_defined, out=mean, where=n_defined > 0)
    return pd.DataFrame({"mean": mean, "n_nan": undefined.sum(axis=0)}, index=pd.Index(list(METRICS), name="metric"))


def split_half_ceiling(
    real: np.ndarray, control: np.ndarray, truth_control: np.ndarray | None = None, n_equal: int | None = None,
    others: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Scores of a random half of the real cells predicting the other half.

    A lower bound of what can be reached: both halves have half the cells, so their means are noisier than those of a
    model that knew the distribution. It matters for weak perturbations with few cells.

    Parameters
    ----------
    real
        (m, G) real perturbed cells, log1p; their order does not matter.
    control, truth_control, n_equal, others
        As `score_condition`.

    Returns
    -------
    As `score_condition`; all metrics NaN for fewer than 4 real cells.

    Raises
    ------
    ValueError
        As `score_condition`.
    """
    real, control = checked_arrays(2, real=real, control=control)
    real = in_own_order(real)
    half, other = np.split(real, [len(real) // 2])
    if len(real) < 4:
        return {**dict.fromkeys(METRICS, float("nan")), **_counts(half, other, len(control))}
    return score_condition(half, other, control, truth_control, n_equal, others)


def _counts(pred: np.ndarray, real: np.ndarray, n_control: int) -> dict[str, float]:
    return {"n_pred": len(pred), "n_real": len(real), "n_control": n_control}


def checked_arrays(ndim: Literal[1, 2], **arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays in double precision, once they are known to be non-empty, finite and of the same genes."""
    shape = {1: "(genes,)", 2: "(cells, genes)"}[ndim]
    checked = []
    for name, values in arrays.items():
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":  # a sparse matrix becomes an object
            raise ValueError(f"{name} ({type(values).__name__}) must be a dense array of numbers; pass x.toarray().")
        if array.ndim != ndim or array.size == 0:
            raise ValueError(f"{name} ({array.shape}) must be a non-empty array {shape}; check the selection of cells.")
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise ValueError(f"{name} ({bad} NaN or infinite values) must be finite; check the log1p transform.")
        checked.append(array.astype(np.float64, copy=False))
    if len({array.shape[-1] for array in checked}) > 1:
        sizes = ", ".join(f"{name} {array.shape[-1]}" for name, array in zip(arrays, checked, strict=True))
        raise ValueError(f"number of genes ({sizes}) must agree; put all on the same genes in the same order.")
    return checked
