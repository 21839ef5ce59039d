"""How sure a prediction is: the spread between drawn populations, and intervals whose coverage was measured.

A model draws several populations of one condition. Of each gene, `mean` is the mean over populations of the mean over
cells, and `spread` the standard deviation between the populations' means, without what finitely many cells make of it:
the root of their variance less the variance between cells over their number, and 0 where nothing is left. It does not
vanish in large populations. Intervals are

    mean +- factor * sqrt(spread^2 + floor^2)                                                                  (1)

with factor and floor of a calibration on conditions that were held out whole: `floor` is the median error there, and
`factor` the smallest that covers the measured mean in `level` of all (condition, gene) pairs, with the correction for
their number (split conformal prediction; Lei et al. 2018, JASA 113). Genes of one condition err together, so the
coverage that is reported is that of conditions left out of the calibration in turn, never that of (1) on its own data.
The measured mean is that of a finite number of cells, so intervals cover its noise too; they hold for about as many
populations and cells as the calibration had. Genes that are zero in all measured and control cells do not count: any
interval covers them.

C = conditions, G = genes, K = populations.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from anndata import AnnData

from perturbdiff.data.conditions import ConditionIndex, ControlMatch, match_controls
from perturbdiff.data.expression import as_csr, gene_means
from perturbdiff.data.screen import Screen, expression_of
from perturbdiff.files import progress
from perturbdiff.hub.records import Calibration
from perturbdiff.model import PerturbDiff

LEVEL = 0.9
SMALLEST_FLOOR = 1e-6  # log1p; where most means are predicted to the last digit
MAX_CELLS = 500  # of a population in a calibration


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
    (NaN without calibration or spread). All log1p; an interval does not reach below zero. Of genes that the controls
    lack, in `predicted` or not, all are NaN.
    """
    means = population_means(predicted)  # (K, G)
    mean = means.mean(axis=0)
    spread = latent_spread(predicted, means) if len(means) > 1 else np.full_like(mean, np.nan)
    half = np.full_like(mean, np.nan) if calibration is None else calibration.half_width(spread)
    table = pd.DataFrame(
        {"mean": mean, "spread": spread, "lower": np.maximum(mean - half, 0.0), "upper": mean + half},
        index=predicted.var_names,
    )
    if "measured" in predicted.var:
        table = table[predicted.var["measured"]]
    table = table.reindex(predicted.var_names if control_mean is None else control_mean.index)
    table.insert(1, "control_mean", math.nan if control_mean is None else control_mean)
    table.insert(2, "delta", table["mean"] - table["control_mean"])
    return table.rename_axis("gene").reset_index()


def median_width(summary: pd.DataFrame) -> float:
    """Median interval width, log1p, of the genes that are not zero in all predicted and control cells; may be NaN."""
    expressed = (summary["mean"] > 0) | (summary["control_mean"] > 0)
    return float((summary["upper"] - summary["lower"])[expressed].median(skipna=False)) if expressed.any() else math.nan


def certainty(calibration: Calibration | None, widths: np.ndarray) -> str:
    """How sure predictions are, for a person; `widths` as `median_width` gives them, NaN where it is not known."""
    if calibration is None:
        return "not calibrated: perturbdiff calibrate makes intervals of the spread between populations"
    measured = f"{calibration.coverage:.0%} of means covered on {calibration.n_conditions} conditions left out"
    known = widths[np.isfinite(widths)]
    if len(known) == 0:
        return f"unknown: intervals need --n-populations 2 or more ({measured})"
    width = f"{known.min():.3g} to {known.max():.3g}" if len(known) > 1 else f"{known[0]:.3g}"
    return f"{calibration.level:.0%} intervals of gene means: median width {width} (log1p); {measured}"


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
    1; None of a single population, or where all have the same."""
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


def fit_calibration(
    measured: np.ndarray, predicted: np.ndarray, spread: np.ndarray, used: np.ndarray, level: float = LEVEL
) -> Calibration:
    """Factor and floor of Eq. 1 from conditions whose cells were measured.

    Parameters
    ----------
    measured, predicted, spread
        (C, G) log1p means of measured and of predicted cells, and the spread between populations.
    used
        (C, G) True where a gene counts. One that is zero in all cells is covered by any interval and must not.
    level
        Between 0 and 1.

    Raises
    ------
    ValueError
        Fewer than two conditions (coverage is measured on conditions left out), too few genes, or a value that is not
        finite.
    """
    if not 0 < level < 1:
        raise ValueError(f"level ({level}) must be between 0 and 1; 0.9 covers nine in ten.")
    expressed = used.any(axis=1)
    measured, predicted, spread, used = (values[expressed] for values in (measured, predicted, spread, used))
    n_conditions = len(measured)
    _refuse_few(n_conditions)
    error = np.abs(measured - predicted)
    if not (np.isfinite(error[used]).all() and np.isfinite(spread[used]).all()):
        raise ValueError("means or spreads are not finite; predict two or more populations of finite values.")
    covered = []
    for left_out in range(n_conditions):
        others = np.arange(n_conditions) != left_out
        factor, floor = _conformal(error[others][used[others]], spread[others][used[others]], level)
        genes = used[left_out]
        covered.append((error[left_out, genes] <= factor * np.hypot(spread[left_out, genes], floor)).mean())
    factor, floor = _conformal(error[used], spread[used], level)
    return Calibration(level, factor, floor, float(np.mean(covered)), n_conditions)


def calibrate(
    model: PerturbDiff,
    screen: Screen,
    cells: np.ndarray,
    match: ControlMatch,
    n_populations: int = 5,
    level: float = LEVEL,
    seed: int = 0,
) -> Calibration:
    """Predict held-out conditions of a screen, calibrate on them, and put the result into `model.training`.

    Parameters
    ----------
    screen
        With all genes of the file: library sizes are sums over them.
    cells
        (n_cells,) True for the cells of the conditions, as `split.validation`: whole conditions that training never saw
        and no test will score.
    match
        Whose controls a condition has, as `model.training.control_match`.

    Returns
    -------
    The calibration, which `model.save_pretrained` then writes.

    Raises
    ------
    ValueError, KeyError
        As `fit_calibration`, `match_controls` and `PerturbDiff.predict`.
    """
    if n_populations < 2:
        raise ValueError(f"n_populations ({n_populations}) must be at least 2: a spread is between populations.")
    index = ConditionIndex.build(screen, cells | screen.is_control)
    pools = match_controls(index, match)
    alignment = model.genes.align(screen.expression.genes, min_overlap=0.0)
    in_model = screen.expression.with_genes(model.genes, alignment.columns)
    conditions = np.flatnonzero(~index.is_control)
    _refuse_few(len(conditions))
    rows: list[list[np.ndarray]] = []
    n_cells = np.minimum(index.n_cells[conditions], MAX_CELLS)
    with progress(int(n_cells.sum()) * n_populations, "calibrate", "cell") as bar:
        for condition, n in zip(conditions.tolist(), n_cells.tolist(), strict=True):
            perturbation, cell_type, batch = index.labels(condition)
            own = pools.rows(condition)
            predicted = model.generate(
                screen.adata(own),
                perturbation,
                cell_type,
                batch,
                n_cells=n,
                n_populations=n_populations,
                seed=seed,
                all_genes=True,
                bar=bar,
            )
            measured, control = (gene_means(in_model.log1p(chosen)) for chosen in (index.cells(condition), own))
            summary = population_summary(predicted)
            # A gene that is zero everywhere, or that the screen lacks, would be covered by any interval.
            used = (measured > 0) | (control > 0)
            rows.append([measured, summary["mean"].to_numpy(), summary["spread"].to_numpy(), used])
    measured, mean, spread, used = (np.stack(values) for values in zip(*rows, strict=True))
    calibration = fit_calibration(measured, mean, spread, used, level)
    model.training = replace(model.training, calibration=calibration)
    return calibration


def _refuse_few(n_conditions: int) -> None:
    if n_conditions < 2:
        raise ValueError(
            f"{n_conditions} conditions are too few to calibrate on: coverage is measured on those left out in turn. "
            "Hold out two or more for validation (split.validation)."
        )


def _conformal(error: np.ndarray, spread: np.ndarray, level: float) -> tuple[float, float]:
    # The ceil((n + 1) level)-th smallest of n scores.
    floor = max(float(np.median(error)), SMALLEST_FLOOR)
    scores = error / np.hypot(spread, floor)
    position = math.ceil((len(scores) + 1) * level)
    if position > len(scores):
        raise ValueError(
            f"{len(scores)} (condition, gene) pairs are too few for intervals of level {level}; calibrate on more."
        )
    return max(float(np.partition(scores, position - 1)[position - 1]), np.finfo(float).tiny), floor
