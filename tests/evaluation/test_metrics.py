"""Metrics against double loops, scikit-learn, SciPy and the scorer of the quality protocol."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from perturbdiff.evaluation.metrics import (
    METRICS,
    mae_of_means,
    mean_scores,
    mse_of_means,
    pearson_delta,
    r2_of_means,
    score_condition,
    split_half_ceiling,
    variance_ratio,
)

QUALITY = Path(os.environ.get("PERTURBDIFF_QUALITY", Path(__file__).parents[2] / "../shared/quality"))
# Name in the protocol's scorer -> ours.
SAME = {
    "pearson_delta": "pearson_delta",
    "r2_mean": "r2_of_means",
    "mse": "mse_of_means",
    "mae": "mae_of_means",
    "energy_u": "energy_distance",
    "mmd2": "rbf_mmd",
    "var_ratio": "variance_ratio",
    "n_pred": "n_pred",
    "n_real": "n_real",
    "n_ctrl": "n_control",
}


def cells(rng: np.random.Generator, n: int, genes: int, rate: float = 1.0) -> np.ndarray:
    """log1p of counts, many of them zero."""
    return np.log1p(rng.poisson(rate * np.linspace(0.05, 3, genes), size=(n, genes)).astype(float))


def loop_energy(x: np.ndarray, y: np.ndarray) -> float:
    def mean(pairs: list[float]) -> float:
        return math.fsum(pairs) / len(pairs)

    between = [math.dist(a, b) for a in x for b in y]
    within_x = [math.dist(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    within_y = [math.dist(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    return 2 * mean(between) - mean(within_x) - mean(within_y)


def loop_mmd(x: np.ndarray, y: np.ndarray) -> float:
    bandwidth = np.median([math.dist(y[i], y[j]) ** 2 for i in range(len(y)) for j in range(i)])

    def mean_kernel(p: np.ndarray, q: np.ndarray) -> float:
        return math.fsum(math.exp(-(math.dist(a, b) ** 2) / bandwidth) for a in p for b in q) / (len(p) * len(q))

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


@pytest.fixture(scope="module")
def score_one() -> Callable[..., Any]:
    path = QUALITY / "score.py"
    if not path.exists():
        pytest.skip(f"no {path}; set PERTURBDIFF_QUALITY to the folder of the quality protocol")
    spec = importlib.util.spec_from_file_location("quality_score", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():  # the file silences all warnings when imported
        spec.loader.exec_module(module)

    def quiet(*arrays: np.ndarray) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return module.score_one(*arrays)[0]

    return quiet


def assert_same_scores(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert {name: ours[name] for name in SAME.values()} == pytest.approx(
        {SAME[name]: theirs[name] for name in SAME}, rel=1e-6, abs=1e-8, nan_ok=True
    )


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 9), st.integers(0, 10**6))
def test_distances_of_sets_equal_double_loops(n: int, m: int, genes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.gamma(1.0, size=(n, genes)), rng.gamma(1.5, size=(m, genes))
    scores = score_condition(x, y, y)
    assert scores["energy_distance"] == pytest.approx(loop_energy(x, y), abs=1e-9)
    assert scores["rbf_mmd"] == pytest.approx(loop_mmd(x, y), abs=1e-9)


def test_scores_of_means_equal_scikit_learn_and_scipy() -> None:
    rng = np.random.default_rng(5)
    pred, real, control = (cells(rng, n, 60).mean(axis=0) for n in (20, 30, 25))
    assert pearson_delta(pred, real, control) == pytest.approx(stats.pearsonr(pred - control, real - control)[0])
    assert r2_of_means(pred, real) == pytest.approx(r2_score(real, pred))
    assert mse_of_means(pred, real) == pytest.approx(mean_squared_error(real, pred))
    assert mae_of_means(pred, real) == pytest.approx(mean_absolute_error(real, pred))


def test_variance_ratio_is_the_median_over_detected_genes() -> None:
    real = np.zeros((40, 5))
    real[:2, 0] = 1.0  # 5 % of the cells: counts
    real[:20, 1] = real[:20, 2] = 2.0
    real[:1, 3] = 9.0  # 2.5 %: does not count
    real[:, 4] = 3.0  # does not vary
    pred = real * np.sqrt([0.5, 0.8, 3.0, 100.0, 1.0])
    assert variance_ratio(pred, real) == pytest.approx(0.8)


@pytest.mark.parametrize(("n", "m", "k", "genes"), [(30, 40, 25, 80), (2, 3, 2, 5), (620, 700, 50, 30)])
def test_score_condition_equals_the_scorer_of_the_protocol(
    score_one: Callable[..., Any], n: int, m: int, k: int, genes: int
) -> None:
    rng = np.random.default_rng(n)
    pred, real, control = cells(rng, n, genes, 1.3), cells(rng, m, genes, 1.6), cells(rng, k, genes)
    assert_same_scores(score_condition(pred, real, control), score_one(pred, real, control))


def test_score_condition_equals_the_scorer_on_real_cells(score_one: Callable[..., Any]) -> None:
    path = QUALITY / "T1" / "real.h5ad"
    if not path.exists():
        pytest.skip(f"no {path}; set PERTURBDIFF_QUALITY to the folder of the quality protocol")
    screen = anndata.read_h5ad(path)
    is_control = (screen.obs["perturbation"] == "control").to_numpy()
    real, control = screen.X[~is_control], screen.X[is_control]
    pred, real = real[::2] * np.float32(0.9), real[1::2]  # float32 in the file
    theirs = score_one(*(a.astype(float) for a in (pred, real, control)))
    assert_same_scores(score_condition(pred, real, control), theirs)


def test_score_condition_is_the_single_metrics_in_the_order_of_the_table() -> None:
    rng = np.random.default_rng(8)
    pred, real, control = cells(rng, 520, 12), cells(rng, 30, 12, 2.0), cells(rng, 25, 12)
    before = [a.copy() for a in (pred, real, control)]
    scores = score_condition(pred, real, control)
    means = pred.mean(axis=0), real.mean(axis=0)
    of_500 = pred[np.random.default_rng(1).choice(520, 500, replace=False)]  # distances are those of 500 cells at most
    assert scores == {
        "pearson_delta": pearson_delta(*means, control.mean(axis=0)),
        "r2_of_means": r2_of_means(*means),
        "mse_of_means": mse_of_means(*means),
        "mae_of_means": mae_of_means(*means),
        "energy_distance": pytest.approx(loop_energy(of_500, real), abs=1e-9),
        "rbf_mmd": pytest.approx(loop_mmd(of_500, real), abs=1e-9),
        "variance_ratio": variance_ratio(pred, real),
        "n_pred": 520,
        "n_real": 30,
        "n_control": 25,
    }
    assert list(scores)[: len(METRICS)] == list(METRICS)
    for array, copy in zip((pred, real, control), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_every_metric_prefers_the_truth_in_its_direction() -> None:
    rng = np.random.default_rng(9)
    real, control = cells(rng, 200, 30, 2.0), cells(rng, 200, 30)
    good = score_condition(cells(rng, 200, 30, 2.0), real, control)
    bad = score_condition(control * 3, real, control)
    for name, direction in METRICS.items():
        loss = {"higher": lambda v: -v, "lower": lambda v: v, "ideal 1": lambda v: abs(math.log(v))}[direction]
        assert loss(good[name]) < loss(bad[name]), name


def test_identical_sets_score_perfectly() -> None:
    rng = np.random.default_rng(10)
    real, control = cells(rng, 20, 15, 2.0), cells(rng, 10, 15)
    scores = score_condition(real, real, control)
    assert scores["pearson_delta"] == pytest.approx(1)
    assert scores["r2_of_means"] == 1
    assert scores["variance_ratio"] == pytest.approx(1)
    assert scores["mse_of_means"] == scores["mae_of_means"] == 0
    assert scores["rbf_mmd"] == pytest.approx(0, abs=1e-12)
    assert scores["energy_distance"] == pytest.approx(loop_energy(real, real), abs=1e-6)
    assert scores["energy_distance"] < 0


def test_predicting_the_controls_leaves_only_the_correlation_undefined() -> None:
    rng = np.random.default_rng(11)
    real, control = cells(rng, 20, 15, 2.0), cells(rng, 10, 15)
    scores = score_condition(control[::-1], real, control)
    assert [name for name in METRICS if math.isnan(scores[name])] == ["pearson_delta"]


@pytest.mark.parametrize(
    ("pred_n", "real_n", "genes", "undefined"),
    [
        (1, 9, 8, {"energy_distance", "variance_ratio"}),
        (9, 1, 8, {"energy_distance", "rbf_mmd", "variance_ratio"}),
        (9, 9, 1, {"pearson_delta", "r2_of_means"}),
    ],
)
def test_what_one_cell_or_one_gene_leaves_undefined_is_nan(
    pred_n: int, real_n: int, genes: int, undefined: set[str]
) -> None:
    rng = np.random.default_rng(12)
    pred, real, control = (rng.gamma(2.0, size=(n, genes)) for n in (pred_n, real_n, 1))
    scores = score_condition(pred, real, control)
    assert {name for name in METRICS if math.isnan(scores[name])} == undefined


def test_all_zeros_give_nan_where_nothing_varies_and_zero_elsewhere() -> None:
    zeros = np.zeros((6, 4))
    scores = score_condition(zeros, zeros, zeros)
    undefined = {"pearson_delta", "r2_of_means", "rbf_mmd", "variance_ratio"}
    assert {name for name in METRICS if math.isnan(scores[name])} == undefined
    assert all(scores[name] == 0 for name in METRICS if name not in undefined)


def test_illegal_arrays_are_refused_by_name_value_and_remedy() -> None:
    good, bad = np.ones((3, 4)), np.ones((3, 4))
    bad[1, 2], bad[2, 2] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"pred \(\(0, 4\)\) must be a non-empty array \(cells, genes\); check"):
        score_condition(good[:0], good, good)
    with pytest.raises(ValueError, match=r"control \(\(4,\)\) must be a non-empty array \(cells, genes\)"):
        score_condition(good, good, good[0])
    with pytest.raises(ValueError, match=r"genes \(pred 4, real 3, control 4\) must agree; put"):
        score_condition(good, good[:, :3], good)
    with pytest.raises(ValueError, match=r"real \(2 NaN or infinite values\) must be finite; check"):
        score_condition(good, bad, good)
    with pytest.raises(ValueError, match=r"real \(csr_matrix\) must be a dense array of numbers; pass x.toarray"):
        variance_ratio(good, sparse.csr_matrix(good))
    with pytest.raises(ValueError, match=r"genes \(pred_mean 4, real_mean 1\) must agree"):  # would broadcast
        mse_of_means(good[0], good[0, :1])
    with pytest.raises(ValueError, match=r"real \(\(0, 4\)\)"):
        split_half_ceiling(good[:0], good, seed=0)


def test_mean_scores_shows_how_many_conditions_each_mean_leaves_out() -> None:
    rng = np.random.default_rng(13)
    conditions = [dict(zip(METRICS, row, strict=True)) for row in rng.normal(size=(4, len(METRICS)))]
    conditions[0]["pearson_delta"] = conditions[2]["pearson_delta"] = math.nan
    for scores in conditions:
        scores["rbf_mmd"] = math.nan
        scores["n_pred"] = 7
    for given_as in (conditions, pd.DataFrame(conditions).assign(perturbation="A")):
        table = mean_scores(given_as)
        assert list(table.index) == list(METRICS)
        assert table["n_nan"].to_dict() == {**dict.fromkeys(METRICS, 0), "pearson_delta": 2, "rbf_mmd": 4}
        assert table.loc["pearson_delta", "mean"] == pytest.approx(
            (conditions[1]["pearson_delta"] + conditions[3]["pearson_delta"]) / 2
        )
        assert table.loc["mae_of_means", "mean"] == pytest.approx(sum(c["mae_of_means"] for c in conditions) / 4)
        assert np.isnan(table.loc["rbf_mmd", "mean"])


def test_mean_scores_refuses_no_conditions_and_missing_metrics() -> None:
    with pytest.raises(ValueError, match=r"scores \(0 conditions\) must not be empty; score"):
        mean_scores([])
    with pytest.raises(ValueError, match=r"scores \(\['pearson_delta'\]\) lack \['r2_of_means'"):
        mean_scores([{"pearson_delta": 0.5}])


def test_split_half_predicts_each_half_of_the_cells_from_the_other() -> None:
    rng = np.random.default_rng(14)
    real, control = cells(rng, 9, 6, 2.0), cells(rng, 5, 6)
    ceiling = split_half_ceiling(real, control, seed=3)
    assert (ceiling["n_pred"], ceiling["n_real"], ceiling["n_control"]) == (4, 5, 5)
    # All 126 ways of taking 4 cells of 9: the ceiling is one of them, so the halves are disjoint and complete.
    masks = [np.array([(i >> j) & 1 for j in range(9)], dtype=bool) for i in range(2**9)]
    splits = [score_condition(real[mask], real[~mask], control) for mask in masks if mask.sum() == 4]
    assert any(split == pytest.approx(ceiling, abs=1e-9) for split in splits)
    assert split_half_ceiling(real, control, seed=3) == ceiling
    assert len({split_half_ceiling(real, control, seed=s)["mae_of_means"] for s in range(8)}) > 1


def test_split_half_is_near_perfect_for_many_cells_and_nan_for_three() -> None:
    rng = np.random.default_rng(15)
    control = cells(rng, 400, 30)
    ceiling = split_half_ceiling(cells(rng, 800, 30, 2.0), control, seed=0)
    assert ceiling["pearson_delta"] > 0.97
    assert abs(ceiling["energy_distance"]) < 0.02
    few = split_half_ceiling(cells(rng, 3, 30), control, seed=0)
    assert all(math.isnan(few[name]) for name in METRICS)
    assert (few["n_pred"], few["n_real"], few["n_control"]) == (1, 2, 400)
    assert not any(math.isnan(value) for value in split_half_ceiling(cells(rng, 4, 30), control, seed=0).values())
