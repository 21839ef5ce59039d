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
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn.metrics import mean_squared_error, roc_auc_score

from perturbdiff.diffusion.distances import pair_distances
from perturbdiff.evaluation.metrics import (
    METRICS,
    Measured,
    classifier_auc,
    correlation,
    in_own_order,
    mean_scores,
    mse_of_means,
    pearson_delta,
    pearson_of_changes,
    score_condition,
    split_half_ceiling,
    variance_ratio,
    wasserstein,
    zero_fraction,
)
from perturbdiff.hub.records import loss

QUALITY = Path(os.environ.get("PERTURBDIFF_QUALITY", Path(__file__).parents[2] / "../shared/quality"))
# Name in the protocol's scorer -> ours.
SAME = {
    "pearson_delta": "pearson_delta",
    "mse": "mse_of_means",
    "energy_u": "energy_distance",
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
        pairs = [(a, b) for i, a in enumerate(p) for j, b in enumerate(q) if p is not q or i != j]
        return math.fsum(math.exp(-(math.dist(a, b) ** 2) / bandwidth) for a, b in pairs) / len(pairs)

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
    # Theirs is of variances with the number of cells in the denominator.
    n, m = theirs["n_pred"], theirs["n_real"]
    assert ours["variance_ratio"] == pytest.approx(theirs["var_ratio"] * n / (n - 1) * (m - 1) / m, rel=1e-6)


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
    assert mse_of_means(pred, real) == pytest.approx(mean_squared_error(real, pred))


def test_variance_ratio_is_the_median_over_detected_genes() -> None:
    real = np.zeros((40, 5))
    real[:2, 0] = 1.0  # 5 % of the cells: counts
    real[:20, 1] = real[:20, 2] = 2.0
    real[:1, 3] = 9.0  # 2.5 %: does not count
    real[:, 4] = 3.0  # does not vary
    pred = real * np.sqrt([0.5, 0.8, 3.0, 100.0, 1.0])
    assert variance_ratio(pred, real) == pytest.approx(0.8)


@pytest.mark.parametrize(("n", "m", "k", "genes"), [(30, 40, 25, 80), (2, 3, 2, 5), (420, 500, 50, 30)])
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
    pred, real = real[::2] * np.float32(0.9), real[1::2]  # float32 in the file, and fewer than 500
    theirs = score_one(*(a.astype(float) for a in (pred, real, control)))
    assert_same_scores(score_condition(pred, real, control), theirs)


def test_score_condition_is_the_single_metrics_in_the_order_of_the_table() -> None:
    rng = np.random.default_rng(8)
    pred, real, control, other = (cells(rng, n, 12, rate) for n, rate in ((520, 1), (30, 2), (25, 1), (20, 1)))
    before = [a.copy() for a in (pred, real, control, other)]
    others = rng.gamma(1.0, size=12), rng.gamma(1.0, size=12)
    scores = score_condition(pred, real, control, other, 24, others)
    means = pred.mean(axis=0), real.mean(axis=0)
    some, own = in_own_order(pred), in_own_order(real)
    of_500 = some[:500]  # distances are those of 500 cells at most
    distances = [d.numpy() for d in pair_distances(torch.from_numpy(some[:24]), torch.from_numpy(own[:24]))]
    assert scores == pytest.approx({
        "pearson_delta": pearson_delta(*means, control.mean(axis=0), other.mean(axis=0)),
        "energy_distance": loop_energy(of_500, real),
        "mse_of_means": mse_of_means(*means),
        "variance_ratio": variance_ratio(pred, real),
        "pearson_perturbed": pearson_delta(*means, *others),
        "rbf_mmd": loop_mmd(of_500, real),
        "wasserstein": wasserstein(some[:24], own[:24]),
        "zero_fraction": zero_fraction(some[:24], own[:24]),
        "correlation": correlation(some[:24], own[:24]),
        "classifier_auc": classifier_auc(*distances),
        "n_pred": 520,
        "n_real": 30,
        "n_control": 25,
    }, abs=1e-9)  # fmt: skip
    assert list(scores)[: len(METRICS)] == list(METRICS)
    for array, copy in zip((pred, real, control, other), before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("n_real", [530, 6, 1])
def test_scores_of_several_methods_are_those_of_each_alone(n_real) -> None:
    rng = np.random.default_rng()
    real, control, other = cells(rng, n_real, 15, 1.2), cells(rng, 40, 15), cells(rng, 30, 15)
    others = rng.random(15), rng.random(15)
    measured = Measured(real, control, other, others)
    for n, n_equal in ((520, 5), (5, 5), (30, None), (2, 1)):
        pred = cells(rng, n, 15)
        distances = measured.distances(in_own_order(pred))
        alone = score_condition(
            pred[rng.permutation(n)], real[rng.permutation(n_real)], control, other, n_equal, others
        )
        for found in (measured.scores(pred, n_equal), measured.scores(pred, n_equal, distances)):
            assert found == pytest.approx(alone, abs=1e-12, nan_ok=True)
    with pytest.raises(ValueError, match="genes"):
        measured.scores(pred[:, :3])


def test_correlations_of_many_changes_are_those_of_each() -> None:
    rng = np.random.default_rng()
    pred, real = rng.normal(size=12), rng.normal(size=(5, 12))
    expected = [stats.pearsonr(pred, of).statistic for of in real]
    np.testing.assert_allclose(pearson_of_changes(pred, real), expected, atol=1e-12)
    real[2] = 0.7  # the same change of all genes
    assert np.isnan(pearson_of_changes(pred, real)).tolist() == [False, False, True, False, False]
    assert np.nan_to_num(pearson_of_changes(np.ones(12), real), nan=9.0).tolist() == [0, 0, 9, 0, 0]


def test_the_order_of_cells_does_not_matter() -> None:
    rng = np.random.default_rng()
    pred, real, control = cells(rng, 700, 15), cells(rng, 600, 15, 1.2), cells(rng, 50, 15)
    scores = score_condition(pred, real, control, n_equal=90)
    again = score_condition(*(a[rng.permutation(len(a))] for a in (pred, real, control)), n_equal=90)
    assert again == pytest.approx(scores, abs=1e-9, nan_ok=True)
    ceilings = [split_half_ceiling(real[rng.permutation(len(real))], control) for _ in range(2)]
    assert ceilings[0] == pytest.approx(ceilings[1], abs=1e-9, nan_ok=True)


def test_no_effect_scores_nothing_whatever_the_numbers_of_cells() -> None:
    """Cells of one distribution as prediction, truth and controls: every change is noise, every distance none."""
    rng = np.random.default_rng(16)
    scores: dict[str, list[float]] = {}
    for _ in range(300):
        pred, real, control, other = (cells(rng, n, 60) for n in (90, 45, 50, 50))
        for name, of in (
            ("halves", score_condition(pred, real, control, other, 40)),
            ("shared", score_condition(pred, real, control)),
        ):
            for metric, value in of.items():
                scores.setdefault(f"{name} {metric}", []).append(value)
    mean = {name: np.mean(values) for name, values in scores.items()}
    error = {name: np.std(values) / np.sqrt(300) for name, values in scores.items()}
    for metric, none in (
        ("pearson_delta", 0), ("energy_distance", 0), ("rbf_mmd", 0), ("classifier_auc", 0.5), ("variance_ratio", 1),
    ):  # fmt: skip
        margin = 0.03 if metric == "variance_ratio" else 4 * error[f"halves {metric}"]
        assert abs(mean[f"halves {metric}"] - none) < margin, metric
    assert mean["shared pearson_delta"] > 0.3  # what one set of controls on both sides does


def test_single_metrics_of_distributions_equal_scipy_and_loops() -> None:
    rng = np.random.default_rng(17)
    pred, real = cells(rng, 40, 25), cells(rng, 40, 25, 1.5)
    by_gene = [stats.wasserstein_distance(pred[:, g], real[:, g]) for g in range(25)]
    assert wasserstein(pred, real) == pytest.approx(np.mean(by_gene))
    zeros = [abs(sum(c == 0 for c in pred[:, g]) - sum(c == 0 for c in real[:, g])) / 40 for g in range(25)]
    assert zero_fraction(pred, real) == pytest.approx(np.mean(zeros))
    pred[:, 24] = 1.0  # varies in the real cells alone
    pairs = []
    seen = [g for g in range(25) if (real[:, g] > 0).mean() >= 0.05]
    for i, a in enumerate(seen):
        for b in seen[:i]:
            own = 0.0 if 24 in (a, b) else np.corrcoef(pred[:, a], pred[:, b])[0, 1]
            pairs.append(abs(own - np.corrcoef(real[:, a], real[:, b])[0, 1]))
    assert correlation(pred, real) == pytest.approx(np.mean(pairs))


def test_the_classifier_is_that_of_a_loop_and_tells_what_can_be_told() -> None:
    rng = np.random.default_rng(18)
    pred, real = cells(rng, 30, 8), cells(rng, 30, 8, 1.6)

    def auc(p: np.ndarray, r: np.ndarray) -> float:
        return classifier_auc(*(d.numpy() for d in pair_distances(torch.from_numpy(p), torch.from_numpy(r))))

    areas = []
    for own, other in ((slice(0, 15), slice(15, 30)), (slice(15, 30), slice(0, 15))):
        test = np.concatenate([pred[own], real[own]])
        nearer = [
            np.mean([math.dist(c, t) for t in real[other]]) - np.mean([math.dist(c, t) for t in pred[other]])
            for c in test
        ]
        areas.append(roc_auc_score(np.repeat([1, 0], 15), nearer))
    assert auc(pred, real) == pytest.approx(np.mean(areas))
    assert auc(pred, pred + 50) == 1
    assert math.isnan(auc(pred[:3], real[:3]))
    collapsed = np.repeat(real.mean(axis=0)[None], 30, axis=0)
    for part in (0.0, 0.3, 0.5):
        assert auc(collapsed + part * (real - collapsed), cells(rng, 30, 8, 1.6)) > 0.8
    assert np.mean([auc(cells(rng, 40, 8), cells(rng, 40, 8)) for _ in range(40)]) == pytest.approx(0.5, abs=0.05)


def test_every_metric_prefers_the_truth_in_its_direction() -> None:
    rng = np.random.default_rng(9)
    real, control, other = cells(rng, 200, 30, 2.0), cells(rng, 200, 30), cells(rng, 200, 30)
    others = cells(rng, 50, 30, 1.5).mean(axis=0), cells(rng, 50, 30, 1.5).mean(axis=0)
    good = score_condition(cells(rng, 200, 30, 2.0), real, control, other, others=others)
    bad = score_condition(control[:, ::-1] * 3, real, control, other, others=others)
    for name, direction in METRICS.items():
        assert loss(direction)(good[name]) < loss(direction)(bad[name]), name


def test_identical_sets_score_perfectly() -> None:
    rng = np.random.default_rng(10)
    real, control = cells(rng, 20, 15, 2.0), cells(rng, 10, 15)
    scores = score_condition(real, real, control)
    assert scores["pearson_delta"] == pytest.approx(1)
    assert scores["variance_ratio"] == pytest.approx(1)
    assert scores["mse_of_means"] == scores["wasserstein"] == scores["zero_fraction"] == scores["correlation"] == 0
    assert scores["energy_distance"] == pytest.approx(loop_energy(real, real), abs=1e-6)
    assert max(scores["energy_distance"], scores["rbf_mmd"]) < 0


def test_predicting_the_controls_is_no_change_at_all() -> None:
    rng = np.random.default_rng(11)
    real, control = cells(rng, 20, 15, 2.0), cells(rng, 10, 15)
    scores = score_condition(control[::-1], real, control)
    assert [name for name in METRICS if math.isnan(scores[name])] == ["pearson_perturbed"]
    assert scores["pearson_delta"] == 0


@pytest.mark.parametrize(
    ("pred_n", "real_n", "genes", "undefined"),
    [
        (1, 9, 8, {"energy_distance", "variance_ratio", "rbf_mmd", "correlation", "classifier_auc"}),
        (9, 1, 8, {"energy_distance", "variance_ratio", "rbf_mmd", "correlation", "classifier_auc"}),
        (9, 9, 1, {"pearson_delta", "correlation"}),
    ],
)
def test_what_one_cell_or_one_gene_leaves_undefined_is_nan(
    pred_n: int, real_n: int, genes: int, undefined: set[str]
) -> None:
    rng = np.random.default_rng(12)
    pred, real, control = (rng.gamma(2.0, size=(n, genes)) for n in (pred_n, real_n, 1))
    scores = score_condition(pred, real, control)
    assert {name for name in METRICS if math.isnan(scores[name])} == {*undefined, "pearson_perturbed"}


def test_all_zeros_give_nan_where_nothing_varies_and_zero_elsewhere() -> None:
    zeros = np.zeros((6, 4))
    scores = score_condition(zeros, zeros, zeros)
    undefined = {"pearson_delta", "pearson_perturbed", "rbf_mmd", "variance_ratio", "correlation"}
    assert {name for name in METRICS if math.isnan(scores[name])} == undefined
    assert scores["classifier_auc"] == 0.5
    assert all(scores[name] == 0 for name in METRICS if name not in {*undefined, "classifier_auc"})


def test_illegal_arrays_are_refused_by_name_value_and_remedy() -> None:
    good, bad = np.ones((3, 4)), np.ones((3, 4))
    bad[1, 2], bad[2, 2] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"pred \(\(0, 4\)\) must be a non-empty array \(cells, genes\); check"):
        score_condition(good[:0], good, good)
    with pytest.raises(ValueError, match=r"control \(\(4,\)\) must be a non-empty array \(cells, genes\)"):
        score_condition(good, good, good[0])
    with pytest.raises(ValueError, match=r"genes \(pred 4, real 3, control 4, truth_control 4\) must agree; put"):
        score_condition(good, good[:, :3], good)
    with pytest.raises(ValueError, match=r"real \(2 NaN or infinite values\) must be finite; check"):
        score_condition(good, bad, good)
    with pytest.raises(ValueError, match=r"real \(csr_matrix\) must be a dense array of numbers; pass x.toarray"):
        variance_ratio(good, sparse.csr_matrix(good))
    with pytest.raises(ValueError, match=r"genes \(pred_mean 4, real_mean 1\) must agree"):  # would broadcast
        mse_of_means(good[0], good[0, :1])
    with pytest.raises(ValueError, match=r"real \(\(0, 4\)\)"):
        split_half_ceiling(good[:0], good)


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
        assert table.loc["wasserstein", "mean"] == pytest.approx(sum(c["wasserstein"] for c in conditions) / 4)
        assert np.isnan(table.loc["rbf_mmd", "mean"])


def test_mean_scores_refuses_no_conditions_and_missing_metrics() -> None:
    with pytest.raises(ValueError, match=r"scores \(0 conditions\) must not be empty; score"):
        mean_scores([])
    with pytest.raises(ValueError, match=r"scores \(\['pearson_delta'\]\) lack \['energy_distance'"):
        mean_scores([{"pearson_delta": 0.5}])


def test_split_half_predicts_each_half_of_the_cells_from_the_other() -> None:
    rng = np.random.default_rng(14)
    real, control = cells(rng, 9, 6, 2.0), cells(rng, 5, 6)
    ceiling = split_half_ceiling(real, control)
    assert (ceiling["n_pred"], ceiling["n_real"], ceiling["n_control"]) == (4, 5, 5)
    # All 126 ways of taking 4 cells of 9: the ceiling is one of them, so the halves are disjoint and complete.
    masks = [np.array([(i >> j) & 1 for j in range(9)], dtype=bool) for i in range(2**9)]
    splits = [score_condition(real[mask], real[~mask], control) for mask in masks if mask.sum() == 4]
    assert any(split == pytest.approx(ceiling, abs=1e-9, nan_ok=True) for split in splits)


def test_split_half_is_near_perfect_for_many_cells_and_nan_for_three() -> None:
    rng = np.random.default_rng(15)
    control = cells(rng, 400, 30)
    ceiling = split_half_ceiling(cells(rng, 800, 30, 2.0), control)
    assert ceiling["pearson_delta"] > 0.97
    assert abs(ceiling["energy_distance"]) < 0.02
    few = split_half_ceiling(cells(rng, 3, 30), control)
    assert all(math.isnan(few[name]) for name in METRICS)
    assert (few["n_pred"], few["n_real"], few["n_control"]) == (1, 2, 400)


def test_copies_of_a_cell_are_spread_over_the_own_order():
    cells = np.random.default_rng(3).poisson(1.0, (30, 20)).astype(float)
    copies = np.repeat(cells, 10, axis=0)
    one, other = (in_own_order(copies[np.random.default_rng(seed).permutation(300)]) for seed in (0, 1))
    np.testing.assert_array_equal(one, other)
    assert len(np.unique(one[:30], axis=0)) > 15
    assert wasserstein(one[:100], np.concatenate([cells] * 4)[:100]) < 0.2
