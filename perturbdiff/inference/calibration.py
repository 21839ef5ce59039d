"""Intervals of gene means, calibrated on conditions that were held out whole, for responding genes apart.

    mean +- factor * sqrt(spread^2 + floor^2)                                                                  (1)

with spread as in `intervals`. Genes that respond err more than the many others, whose errors would make the intervals
of all: so there are two factors and two floors. A gene is said to respond where the prediction says so: its predicted
change is among the largest RESPONDING of all (condition, gene) pairs, what was measured is not known when one predicts.
Of each kind, `floor` is the median error, and `factor` the smallest that covers the measured mean in `level` of the
pairs, with the correction for their number (split conformal prediction, in two groups; Lei et al. 2018, JASA 113; Vovk
2012, ACML). Genes of one condition err together, so the coverage that is said is that of other conditions: of those
held out for test, or else of each left out in turn. The measured mean is that of a finite number of cells, so intervals
cover its noise too; they hold for about as many populations and cells as the calibration had. Genes that are zero in
all measured and control cells do not count: any interval covers them.

C = conditions, G = genes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from perturbdiff.data.conditions import ConditionIndex, ControlMatch, match_controls
from perturbdiff.data.expression import gene_means
from perturbdiff.data.screen import Screen
from perturbdiff.data.selectors import LABELS
from perturbdiff.files import progress, short, written
from perturbdiff.hub.records import Calibration, Coverage, Intervals, Width
from perturbdiff.inference.intervals import population_means, population_summary
from perturbdiff.model import PerturbDiff

MEANS = "means.parquet"  # of a run folder: `held_out_means` of its test conditions
LEVEL = 0.9
RESPONDING = 0.1  # of the pairs
SMALLEST_FLOOR = 1e-6  # log1p; where most means are predicted to the last digit
MAX_CELLS = 256  # of a population
MAX_CONDITIONS = 24  # more are taken evenly


def held_out_means(
    model: PerturbDiff, screen: Screen, cells: np.ndarray, match: ControlMatch, n_populations: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Predicted populations of held-out conditions beside what was measured.

    Parameters
    ----------
    screen
        With all genes of the file: library sizes are sums over them.
    cells
        (n_cells,) True for the cells of the conditions: whole ones that training never saw.
    match
        Whose controls a condition has, as `model.training.control_match`.

    Returns
    -------
    One row a (condition, gene) pair that counts: `perturbation`, `cell_type`, `batch`; the columns of
    `population_summary`, with intervals where the model is calibrated; `measured`, the mean of the measured cells, and
    `population_0`, ... the means of the populations. All log1p.

    Raises
    ------
    ValueError, KeyError
        As `match_controls` and `PerturbDiff.predict`; fewer than two populations.
    """
    if n_populations < 2:
        raise ValueError(f"n_populations ({n_populations}) must be at least 2: a spread is between populations.")
    index = ConditionIndex.build(screen, cells | screen.is_control)
    pools = match_controls(index, match)
    alignment = model.genes.align(screen.expression.genes, min_overlap=0.0)
    in_model = screen.expression.with_genes(model.genes, alignment.columns)
    conditions = np.flatnonzero(~index.is_control)
    if len(conditions) > MAX_CONDITIONS:
        conditions = conditions[np.linspace(0, len(conditions) - 1, MAX_CONDITIONS).round().astype(np.int64)]
    n_cells = np.minimum(index.n_cells[conditions], MAX_CELLS)
    tables = []
    with progress(int(n_cells.sum()) * n_populations, "populations", "cell") as bar:
        for condition, n in zip(conditions.tolist(), n_cells.tolist(), strict=True):
            labels, own = index.labels(condition), pools.rows(condition)
            predicted = model.generate(
                screen.adata(own), *labels, n_cells=n, n_populations=n_populations, seed=seed, all_genes=True, bar=bar
            )
            measured, control = (gene_means(in_model.log1p(rows)) for rows in (index.cells(condition), own))
            control_mean = pd.Series(control, index=model.genes.names)
            table = population_summary(predicted, control_mean, model.training.calibration)
            populations = population_means(predicted)
            more = {"measured": measured, **{f"population_{k}": means for k, means in enumerate(populations)}}
            names = {name: pd.Categorical([label] * len(table)) for name, label in zip(LABELS, labels, strict=True)}
            table = pd.concat([pd.DataFrame(names), table, pd.DataFrame(more)], axis=1)
            # A gene that is zero everywhere, or that the screen lacks, would be covered by any interval.
            tables.append(table[(measured > 0) | (control > 0)])
    if not tables:
        return pd.DataFrame(columns=[*LABELS, "gene"])
    found = pd.concat(tables, ignore_index=True)
    return found.astype(dict.fromkeys(LABELS, "category"))  # their union


def write_means(means: pd.DataFrame, path: Path) -> None:
    with written(path) as temporary:
        means.to_parquet(temporary, index=False)


def read_means(path: Path) -> pd.DataFrame:
    """What `write_means` wrote. Raises ValueError where it is damaged."""
    try:
        found = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a whole table ({short(error)}); remove it, or train anew.") from error
    if missing := [name for name in (*LABELS, "gene", "control_mean", "population_0") if name not in found]:
        raise ValueError(f"{path} lacks the columns {missing}; remove it, or train anew.")
    labels = [*LABELS, "gene"]
    numbers = found.drop(columns=labels).apply(pd.to_numeric, errors="coerce")
    return pd.concat([found[labels].astype(str), numbers], axis=1)


def fit_calibration(pairs: pd.DataFrame, level: float = LEVEL) -> Calibration:
    """Eq. 1 from conditions whose cells were measured.

    Parameters
    ----------
    pairs
        As `held_out_means` gives them.
    level
        Between 0 and 1.

    Returns
    -------
    Of the level, its coverage that of conditions left out in turn. Where fewer than twice as many pairs are there as
    one kind of genes needs, all respond.

    Raises
    ------
    ValueError
        Fewer than two conditions (coverage is measured on conditions left out), too few pairs, or a value that is not
        finite.
    """
    if not 0 < level < 1:
        raise ValueError(f"level ({level}) must be between 0 and 1; 0.9 covers nine in ten.")
    number = pairs.groupby(list(LABELS), observed=True).ngroup().to_numpy()
    n_conditions = len(np.unique(number))
    _refuse_few(n_conditions)
    error, spread, change = _errors(pairs)
    if not np.isfinite([error, spread, change]).all():
        raise ValueError("means or spreads are not finite; predict two or more populations of finite values.")
    inside, responding = np.zeros(len(pairs), dtype=bool), np.zeros(len(pairs), dtype=bool)
    for left_out in range(n_conditions):
        here = number == left_out
        fitted = _intervals(error[~here], spread[~here], change[~here], level)
        inside[here] = error[here] <= fitted.half_width(spread[here], change[here])
        responding[here] = fitted.responds(change[here])
    coverage = _coverage(inside, responding, "validation", n_conditions)
    return Calibration(**vars(_intervals(error, spread, change, level)), n_conditions=n_conditions, coverage=coverage)


def coverage_on_test(calibration: Calibration, pairs: pd.DataFrame) -> Coverage:
    """How much intervals cover of conditions that neither stopped nor chose nor calibrated anything.

    `pairs` as `held_out_means` gives them, one or more.
    """
    error, spread, change = _errors(pairs)
    inside = error <= calibration.half_width(spread, change)
    n_conditions = len(pairs[list(LABELS)].drop_duplicates())
    return _coverage(inside, calibration.responds(change), "test", n_conditions)


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

    `cells` are of conditions that no test will score, as `split.validation`. Otherwise as `held_out_means`; raises as
    it and `fit_calibration`.

    Returns
    -------
    The calibration, which `model.save_pretrained` then writes.
    """
    _refuse_few(int((~ConditionIndex.build(screen, cells | screen.is_control).is_control).sum()))
    calibration = fit_calibration(held_out_means(model, screen, cells, match, n_populations, seed), level)
    model.training = replace(model.training, calibration=calibration)
    return calibration


def _refuse_few(n_conditions: int) -> None:
    if n_conditions < 2:
        raise ValueError(
            f"{n_conditions} conditions are too few to calibrate on: coverage is measured on those left out in turn. "
            "Train again with two or more, as 'split.validation=[A:T,B:T]'."
        )


def _errors(pairs: pd.DataFrame) -> list[np.ndarray]:
    # Of each pair: the error of the mean without sign, the spread, the predicted change.
    error = (pairs["measured"] - pairs["mean"]).abs()
    return [column.to_numpy(dtype=np.float64) for column in (error, pairs["spread"], pairs["delta"])]


def _coverage(
    inside: np.ndarray, responding: np.ndarray, conditions: Literal["test", "validation"], n_conditions: int
) -> Coverage:
    of_responding = float(inside[responding].mean()) if responding.any() else None
    return Coverage(conditions, n_conditions, float(inside.mean()), of_responding)


def _intervals(error: np.ndarray, spread: np.ndarray, change: np.ndarray, level: float) -> Intervals:
    change, needed = np.abs(change), math.ceil(level / (1 - level))
    n_responding = max(math.ceil(RESPONDING * len(change)), needed)
    least = 0.0
    if n_responding + needed <= len(change):
        least = float(np.partition(change, -n_responding)[-n_responding])
        if (change < least).sum() < needed:  # many change as much
            least = 0.0
    responds = change >= least
    responding = _conformal(error[responds], spread[responds], level)
    others = responding if responds.all() else _conformal(error[~responds], spread[~responds], level)
    return Intervals(level, least, others, responding)


def _conformal(error: np.ndarray, spread: np.ndarray, level: float) -> Width:
    # The ceil((n + 1) level)-th smallest of n scores.
    floor = max(float(np.median(error)), SMALLEST_FLOOR)
    scores = error / np.hypot(spread, floor)
    position = math.ceil((len(scores) + 1) * level)
    if position > len(scores):
        raise ValueError(
            f"{len(scores)} (condition, gene) pairs are too few for intervals of level {level}; calibrate on more."
        )
    return Width(max(float(np.partition(scores, position - 1)[position - 1]), np.finfo(float).tiny), floor)
