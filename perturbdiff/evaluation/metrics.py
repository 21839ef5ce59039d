"""How close predicted cells are to real ones: the scores of one condition and their means over conditions.

All cells are dense log1p values, (n, G). G = genes. "Delta" is a mean profile minus that of the real control cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from perturbdiff.diffusion.distances import NO_SPREAD, cell_distances, energy_of

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


def rbf_mmd(between: np.ndarray, within_pred: np.ndarray, within_real: np.ndarray) -> float:
    """Squared MMD with the kernel exp(-d^2 / median d^2 of the real cells), biased (V-statistic).

    Parameters
    ----------
    between, within_pred, within_real
        (n, m), (n, n) and (m, m) distances of predicted and real cells.

    Returns
    -------
    Between 0 and 2. NaN where the bandwidth is undefined: one real cell, or half of the real pairs identical.

    Notes
    -----
    Gretton et al. 2012.
    """
    m = len(within_real)
    bandwidth = np.median(within_real[np.triu_indices(m, 1)] ** 2) if m > 1 else 0.0
    if bandwidth <= NO_SPREAD:
        return float("nan")
    k_between, k_pred, k_real = (np.exp(-(d**2) / bandwidth).mean() for d in (between, within_pred, within_real))
    return float(k_pred + k_real - 2 * k_between)


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
    distances = cell_distances(pred, real)
    return {
        "pearson_delta": pearson_delta(pred_mean, real_mean, control_mean),
        "r2_of_means": r2_of_means(pred_mean, real_mean),
        "mse_of_means": mse_of_means(pred_mean, real_mean),
        "mae_of_means": mae_of_means(pred_mean, real_mean),
        "energy_distance": float(energy_of(distances)),
        "rbf_mmd": rbf_mmd(*(values.numpy() for values in distances)),
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
