"""How close predicted cells are to real ones: the scores of one condition and their means over conditions.

All cells are dense log1p values, (n, G). G = genes. "Delta" is a mean profile minus that of the real control cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

METRICS: dict[str, Literal["higher", "lower", "ideal 1"]] = {
    "pearson_delta": "higher",
    "r2_of_means": "higher",
    "mse_of_means": "lower",
    "mae_of_means": "lower",
    "energy_distance": "lower",
    "rbf_mmd": "lower",
    "variance_ratio": "ideal 1",
}
"""Names of the scores in printing order -> which way is better."""

DETECTED = 1e-3  # log1p value above which a gene counts as seen in a cell
MIN_DETECTION_RATE = 0.05
NO_SPREAD = 1e-12  # a standard deviation or variance up to this is rounding, not signal


def pearson_delta(pred_mean: np.ndarray, real_mean: np.ndarray, control_mean: np.ndarray) -> float:
    """Pearson correlation over genes of predicted and real delta, (G,) means each; NaN if one delta is constant."""
    pred, real, control = _checked(1, pred_mean=pred_mean, real_mean=real_mean, control_mean=control_mean)
    pred_delta, real_delta = pred - control, real - control
    if pred_delta.std() <= NO_SPREAD or real_delta.std() <= NO_SPREAD:
        return float("nan")
    return float(np.corrcoef(pred_delta, real_delta)[0, 1])


def r2_of_means(pred_mean: np.ndarray, real_mean: np.ndarray) -> float:
    """Coefficient of determination of the (G,) real mean by the predicted one; NaN if the real one is constant."""
    pred, real = _checked(1, pred_mean=pred_mean, real_mean=real_mean)
    if real.std() <= NO_SPREAD:
        return float("nan")
    return float(1 - ((pred - real) ** 2).sum() / ((real - real.mean()) ** 2).sum())


def mse_of_means(pred_mean: np.ndarray, real_mean: np.ndarray) -> float:
    """Mean over genes of the squared difference of the (G,) means."""
    pred, real = _checked(1, pred_mean=pred_mean, real_mean=real_mean)
    return float(((pred - real) ** 2).mean())


def mae_of_means(pred_mean: np.ndarray, real_mean: np.ndarray) -> float:
    """Mean over genes of the absolute difference of the (G,) means."""
    pred, real = _checked(1, pred_mean=pred_mean, real_mean=real_mean)
    return float(np.abs(pred - real).mean())


def energy_distance(x: np.ndarray, y: np.ndarray, max_cells: int = 500) -> float:
    """Energy distance of two sets of cells, 2 E|x-y| - E|x-x'| - E|y-y'| over pairs of distinct cells (U-statistic).

    Parameters
    ----------
    x, y
        Predicted (n, G) and real (m, G) cells, log1p.
    max_cells
        Larger sets are thinned to this many cells, with a fixed seed for each side.

    Returns
    -------
    Distance in log1p units, comparable between different n because no cell is paired with itself; it may therefore be
    slightly negative. NaN for fewer than 2 cells on a side.

    Raises
    ------
    ValueError
        For an empty or non-finite array, disagreeing genes or max_cells below 2.

    Notes
    -----
    Székely & Rizzo 2013. Twice the scale of the training loss's energy distance (Yuan et al. 2026).
    """
    return _energy(*_distances(x, y, max_cells))


def rbf_mmd(x: np.ndarray, y: np.ndarray, max_cells: int = 500) -> float:
    """Squared MMD of two sets of cells with the kernel exp(-d^2 / median d^2 of the real cells), biased (V-statistic).

    Parameters
    ----------
    x, y
        Predicted (n, G) and real (m, G) cells, log1p; the real ones set the bandwidth.
    max_cells
        As in `energy_distance`.

    Returns
    -------
    Between 0 and 2. NaN where the bandwidth is undefined: one real cell, or half of the real pairs identical.

    Raises
    ------
    ValueError
        As `energy_distance`.

    Notes
    -----
    Gretton et al. 2012.
    """
    return _mmd(*_distances(x, y, max_cells))


def variance_ratio(pred: np.ndarray, real: np.ndarray) -> float:
    """Median over genes of the variance of the (n, G) predicted cells over that of the (m, G) real ones.

    Over the genes detected in at least 5 % of the real cells and varying among them; below 1 the prediction is too
    uniform. NaN if there is no such gene or fewer than 2 cells on a side.
    """
    pred, real = _checked(2, pred=pred, real=real)
    real_variance = real.var(axis=0)
    genes = ((real > DETECTED).mean(axis=0) >= MIN_DETECTION_RATE) & (real_variance > NO_SPREAD)
    if min(len(pred), len(real)) < 2 or not genes.any():
        return float("nan")
    return float(np.median(pred[:, genes].var(axis=0) / real_variance[genes]))


def score_condition(pred: np.ndarray, real: np.ndarray, control: np.ndarray) -> dict[str, float]:
    """All `METRICS` of one condition.

    Parameters
    ----------
    pred, real
        Predicted (n, G) and real (m, G) perturbed cells, log1p.
    control
        (k, G) REAL control cells of the condition's context. They are the reference of both deltas: a model that
        supplied the controls of its own delta could move them, and would game the score.

    Returns
    -------
    One value per name in `METRICS`, NaN where it is undefined, and the numbers of cells n_pred, n_real, n_control.

    Raises
    ------
    ValueError
        For an empty or non-finite array or disagreeing genes.
    """
    pred, real, control = _checked(2, pred=pred, real=real, control=control)
    pred_mean, real_mean, control_mean = pred.mean(axis=0), real.mean(axis=0), control.mean(axis=0)
    distances = _distances(pred, real)
    return {
        "pearson_delta": pearson_delta(pred_mean, real_mean, control_mean),
        "r2_of_means": r2_of_means(pred_mean, real_mean),
        "mse_of_means": mse_of_means(pred_mean, real_mean),
        "mae_of_means": mae_of_means(pred_mean, real_mean),
        "energy_distance": _energy(*distances),
        "rbf_mmd": _mmd(*distances),
        "variance_ratio": variance_ratio(pred, real),
        **_counts(pred, real, control),
    }


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


def split_half_ceiling(real: np.ndarray, control: np.ndarray, seed: int) -> dict[str, float]:
    """Scores of a random half of the real cells predicting the other half.

    A lower bound of what can be reached: both halves have half the cells, so their means are noisier than those of a
    model that knew the distribution. It matters for weak perturbations with few cells.

    Parameters
    ----------
    real, control
        (m, G) real perturbed and (k, G) real control cells, log1p.
    seed
        Of the split.

    Returns
    -------
    As `score_condition`; all metrics NaN for fewer than 4 real cells.

    Raises
    ------
    ValueError
        As `score_condition`.
    """
    real, control = _checked(2, real=real, control=control)
    order = np.random.default_rng(seed).permutation(len(real))
    half, other = np.split(real[order], [len(real) // 2])
    if len(real) < 4:
        return {**dict.fromkeys(METRICS, float("nan")), **_counts(half, other, control)}
    return score_condition(half, other, control)


def _counts(pred: np.ndarray, real: np.ndarray, control: np.ndarray) -> dict[str, float]:
    return {"n_pred": len(pred), "n_real": len(real), "n_control": len(control)}


def _distances(x: np.ndarray, y: np.ndarray, max_cells: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Euclidean distances x-y, x-x, y-y of the thinned sets, (n, m), (n, n), (m, m)."""
    x, y = _checked(2, x=x, y=y)
    if max_cells < 2:
        raise ValueError(f"max_cells ({max_cells}) must be at least 2; pass 500 or leave it out.")
    x, y = _thinned(x, max_cells, seed=1), _thinned(y, max_cells, seed=2)
    centre = y.mean(axis=0)  # a shift changes no distance, but |a|^2 + |b|^2 - 2ab cancels badly far from the origin
    x, y = x - centre, y - centre
    between, within_x, within_y = _pairwise(x, y), _pairwise(x, x), _pairwise(y, y)
    np.fill_diagonal(within_x, 0.0)
    np.fill_diagonal(within_y, 0.0)
    return between, within_x, within_y


def _pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0.0))


def _thinned(cells: np.ndarray, max_cells: int, seed: int) -> np.ndarray:
    if len(cells) <= max_cells:
        return cells
    return cells[np.sort(np.random.default_rng(seed).choice(len(cells), max_cells, replace=False))]


def _energy(between: np.ndarray, within_x: np.ndarray, within_y: np.ndarray) -> float:
    n, m = between.shape
    if min(n, m) < 2:
        return float("nan")
    return float(2 * between.mean() - within_x.sum() / (n * (n - 1)) - within_y.sum() / (m * (m - 1)))


def _mmd(between: np.ndarray, within_x: np.ndarray, within_y: np.ndarray) -> float:
    m = len(within_y)
    bandwidth = np.median(within_y[np.triu_indices(m, 1)] ** 2) if m > 1 else 0.0
    if bandwidth <= NO_SPREAD:
        return float("nan")
    k_between, k_x, k_y = (np.exp(-(d**2) / bandwidth).mean() for d in (between, within_x, within_y))
    return float(k_x + k_y - 2 * k_between)


def _checked(ndim: Literal[1, 2], **arrays: np.ndarray) -> list[np.ndarray]:
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
