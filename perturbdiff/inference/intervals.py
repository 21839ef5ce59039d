"""How sure a prediction is: the spread between drawn populations, and intervals whose coverage was measured.

A model draws several populations of one condition. Of each gene, `mean` is the mean over populations of the mean over
cells, and `spread` the standard deviation between the populations' means, without what finitely many cells make of it:
the root of their variance less the variance between cells over their number, and 0 where nothing is left. It does not
vanish in large populations. Intervals are those of `calibration`.

G = genes, K = populations.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from perturbdiff.data.expression import as_csr, gene_means
from perturbdiff.data.screen import expression_of
from perturbdiff.hub.records import Calibration, Coverage
from perturbdiff.model import PerturbDiff


def population_summary(
    predicted: AnnData, control_mean: pd.Series | None = None, calibration: Calibration | None = None
) -> pd.DataFrame:
    """Mean and uncertainty of each gene over the populations of one prediction.

    Parameters
    ----------
    predicted
        As `PerturbDiff.predict` returns it, of one condition.
    control_mean
        (G,) log1p of the control cells by gene, as `mean_expression` gives it: the genes of the table.
    calibration
        Of the model: `model.training.calibration`.

    Returns
    -------
    One row a gene: `gene`, `mean`, `control_mean`, `delta`, `spread` (NaN of a single population), `lower` and `upper`
    (NaN without calibration, controls or spread). All log1p; an interval does not reach below zero. Of genes that the
    controls lack, in `predicted` or not, all are NaN.
    """
    means = population_means(predicted)  # (K, G)
    mean = means.mean(axis=0)
    spread = latent_spread(predicted, means) if len(means) > 1 else np.full_like(mean, np.nan)
    table = pd.DataFrame({"mean": mean, "spread": spread}, index=predicted.var_names)
    if "measured" in predicted.var:
        table = table[predicted.var["measured"]]
    table = table.reindex(predicted.var_names if control_mean is None else control_mean.index)
    table.insert(1, "control_mean", math.nan if control_mean is None else control_mean)
    table.insert(2, "delta", table["mean"] - table["control_mean"])
    spread, change = table["spread"].to_numpy(), table["delta"].to_numpy()
    half = np.full_like(spread, np.nan) if calibration is None else calibration.half_width(spread, change)
    table["lower"], table["upper"] = (table["mean"] - half).clip(lower=0.0), table["mean"] + half
    return table.rename_axis("gene").reset_index()


def median_width(summary: pd.DataFrame) -> float:
    """Median interval width, log1p, of the genes that are not zero in all predicted and control cells; may be NaN."""
    expressed = (summary["mean"] > 0) | (summary["control_mean"] > 0)
    return float((summary["upper"] - summary["lower"])[expressed].median(skipna=False)) if expressed.any() else math.nan


def calibration_for(
    model: PerturbDiff,
    guidance_scale: float | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    varied: bool = True,
    **_: Any,
) -> Calibration | None:
    """Of the model; None where these arguments of `PerturbDiff.generate` ask for other sampling than its own."""
    own = model.config.sampling
    asked = (guidance_scale, own.guidance_scale), (steps, own.n_steps), (sampler, own.sampler)
    same = varied and all(given in (None, calibrated) for given, calibrated in asked)
    return model.training.calibration if same else None


def certainty(calibration: Calibration | None, widths: np.ndarray, otherwise: bool = False) -> str:
    """How sure predictions are, for a person.

    `widths` as `median_width` gives them, NaN where it is not known; `otherwise` where the model has a calibration of
    other sampling.
    """
    if calibration is None and otherwise:
        return (
            "not known: intervals were calibrated for draws by the model's own sampling (without --guidance-scale, "
            "--steps, --sampler, --average)"
        )
    if calibration is None:
        return (
            "not calibrated: no intervals. Training with two or more validation conditions makes them, as "
            "'split.validation=[A:T,B:T]'"
        )
    measured = f"covered {covered(calibration.coverage)}"
    known = widths[np.isfinite(widths)]
    if len(known) == 0:
        return f"unknown: intervals need --n-populations 2 or more ({measured})"
    width = f"{known.min():.3g} to {known.max():.3g}" if len(known) > 1 else f"{known[0]:.3g}"
    return f"{calibration.level:.0%} intervals of gene means: median width {width} (log1p); {measured}"


def covered(coverage: Coverage) -> str:
    """How many means such intervals held, and of which conditions, for a person."""
    n, of = coverage.n_conditions, coverage.conditions
    responding = "" if coverage.of_responding is None else f", {coverage.of_responding:.0%} of genes that respond,"
    which = f"{n} {of} condition{'' if n == 1 else 's'}" + (", left out in turn" if of == "validation" else "")
    return f"{coverage.of_all:.0%} of means{responding} on {which}"


def population_means(predicted: AnnData) -> np.ndarray:
    """(K, G) float64 mean over the cells of each population."""
    X, populations = as_csr(predicted.X), predicted.obs["population"].to_numpy()
    return np.stack([gene_means(X[populations == k]) for k in np.unique(populations)])


def latent_spread(predicted: AnnData, means: np.ndarray) -> np.ndarray:
    """(G,) standard deviation between populations of these means, (K, G), finitely many cells' noise taken off.

    Of populations with a single cell nobody knows that noise: nothing is taken off.
    """
    spread: np.ndarray = np.sqrt(np.maximum(means.var(axis=0, ddof=1) - _noise(predicted, means), 0))
    return spread


def latent_share(predicted: AnnData) -> float | None:
    """Part of the variance between the means of populations that finitely many cells do not make, over all genes: 0 to
    1; None of a single population or populations of a single cell, or where all have the same."""
    if predicted.obs["population"].value_counts().min() < 2:
        return None
    means = population_means(predicted)
    total = float(means.var(axis=0, ddof=1).sum()) if len(means) > 1 else 0.0
    return min(max(1 - float(_noise(predicted, means).sum()) / total, 0.0), 1.0) if total > 0 else None


def _noise(predicted: AnnData, means: np.ndarray) -> np.ndarray:
    # (G,) variance of the (K, G) means as far as cells are finitely many; 0 of single cells.
    X, populations = as_csr(predicted.X).astype(np.float64), predicted.obs["population"].to_numpy()
    noise = np.zeros(means.shape[1])
    for own, k in zip(means, np.unique(populations), strict=True):
        cells = X[populations == k]
        variance = np.maximum(gene_means(cells.multiply(cells).tocsr()) - own**2, 0)
        noise += variance / max(cells.shape[0] - 1, 1) / len(means)
    return noise


def mean_expression(model: PerturbDiff, cells: AnnData) -> pd.Series:
    """(G,) float64 mean log1p of some cells by gene of the model; NaN where the cells lack it."""
    expression = expression_of(cells, model.preprocessing)
    alignment = model.genes.align(expression.genes, min_overlap=0.0)
    means = gene_means(expression.with_genes(model.genes, alignment.columns).log1p())
    return pd.Series(means, index=model.genes.names).where(alignment.columns >= 0)
