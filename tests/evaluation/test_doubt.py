"""Jackknife, bootstrap and comparisons against closed forms, loops and simulations with known truth."""

import numpy as np
import pytest

from perturbdiff.evaluation.doubt import (
    COMPARED,
    FOLDS,
    Jackknife,
    compare,
    folds_of,
    interval,
    spread_of_responses,
    standard_error,
)
from perturbdiff.evaluation.metrics import Measured, in_own_order, score_condition
from perturbdiff.hub.records import loss


def cells(rng, n, genes=30, rate=1.0):
    return np.log1p(rng.poisson(rate * np.linspace(0.05, 3, genes), size=(n, genes)).astype(float))


def leave_out(pred, real, control, truth_control):
    return Jackknife(Measured(real, control, truth_control), folds_of(len(pred), len(real))).scores(pred)


@pytest.mark.parametrize(("n", "m"), [(60, 47), (9, 8), (620, 40)])
def test_scores_without_a_fold_are_those_of_the_cells_that_are_left(n, m):
    rng = np.random.default_rng(n)
    pred, real, control, other = (cells(rng, k) for k in (n, m, 20, 31))
    found = leave_out(pred, real, control, other)
    folds = min(FOLDS, n // 2, m // 2)
    pred, real, other = (in_own_order(of) for of in (pred, real, other))

    def without(of, k):
        return of[np.arange(len(of)) % folds != k]

    for k in range(folds):
        of_means = score_condition(pred, without(real, k), control, without(other, k))
        assert found["pearson_delta"][k] == pytest.approx(of_means["pearson_delta"])
        assert found["mse_of_means"][k] == pytest.approx(of_means["mse_of_means"])
        of_cells = score_condition(without(pred[:500], k), without(real, k), control)
        assert found["energy_distance"][k] == pytest.approx(of_cells["energy_distance"], abs=1e-9)


def test_few_cells_leave_the_error_unknown():
    rng = np.random.default_rng(0)
    assert all(len(of) == 0 for of in leave_out(cells(rng, 3), cells(rng, 50), cells(rng, 9), cells(rng, 9)).values())
    assert np.isnan(standard_error(np.empty(0)))
    assert all(len(of) == 2 for of in leave_out(cells(rng, 4), cells(rng, 50), cells(rng, 9), cells(rng, 1)).values())


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(1).normal(size=FOLDS)
    without = (values.sum() - values) / (FOLDS - 1)
    assert standard_error(without) == pytest.approx(values.std(ddof=1) / np.sqrt(FOLDS))


def test_errors_are_as_large_as_scores_vary_from_sample_to_sample():
    rng = np.random.default_rng(2)
    pred, control = cells(rng, 200, rate=1.2), cells(rng, 200)
    scores, errors = {name: [] for name in COMPARED}, {name: [] for name in COMPARED}
    for _ in range(150):
        real, other = cells(rng, 80, rate=1.5), cells(rng, 80)
        found, without = score_condition(pred, real, control, other), leave_out(pred, real, control, other)
        for name in COMPARED:
            scores[name].append(found[name])
            errors[name].append(standard_error(without[name]))
    for name in COMPARED:
        assert 0.7 < np.mean(errors[name]) / np.std(scores[name]) < 1.6, name


def test_intervals_of_few_conditions_are_of_their_cells_and_of_many_of_conditions():
    assert interval(np.array([0.5]), np.array([0.1])) == pytest.approx((0.5 - 0.2262, 0.5 + 0.2262), abs=1e-4)
    low, high = interval(np.array([0.2, 0.4]), np.array([0.03, 0.04]))
    assert (low + high) / 2 == pytest.approx(0.3)
    assert (high - low) / 2 == pytest.approx(2.2622 * 0.05 / 2, abs=1e-4)
    assert interval(np.array([0.5]), None) is None
    assert interval(np.array([]), np.array([])) is None
    assert interval(np.array([0.5]), np.array([np.nan])) is None
    values = np.random.default_rng(3).normal(1, 0.5, 60)
    low, high = interval(values, None)
    half = 1.96 * values.std() / np.sqrt(60)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    wider = interval(values, np.full(60, 1.0))
    assert wider[1] - wider[0] > 1.5 * (high - low)


def test_only_differences_beyond_their_error_are_told():
    own, other = np.array([1.0, 1.0, 1.0, np.nan]), np.array([0.0, 2.0, 1.01, 1.0])
    errors = np.full(4, 0.1)
    counts = {"better": 1, "worse": 1, "not distinguishable": 1, "not comparable": 1}
    assert compare(own, other, errors, loss("higher")) == counts
    assert compare(own, other, errors, loss("lower")) == counts
    assert compare(own[:1], other[:1], np.array([np.nan]), loss("lower"))["not comparable"] == 1
    assert compare(np.array([0.6]), np.array([0.9]), np.array([0.01]), loss("ideal 0.5"))["better"] == 1


def test_two_methods_that_are_one_are_rarely_told_apart():
    rng = np.random.default_rng(4)
    told = 0
    for _ in range(100):
        real, control, other = cells(rng, 80, rate=1.5), cells(rng, 60), cells(rng, 60)
        pair = [cells(rng, 80, rate=1.4) for _ in range(2)]
        values = [score_condition(of, real, control, other)["energy_distance"] for of in pair]
        without = [leave_out(of, real, control, other)["energy_distance"] for of in pair]
        error = standard_error(without[1] - without[0])
        counts = compare(np.array(values[:1]), np.array(values[1:]), np.array([error]), loss("lower"))
        told += counts["better"] + counts["worse"]
    assert told <= 12  # 5 of 100 in the mean


def test_spread_between_perturbations_is_without_the_noise_of_means():
    rng = np.random.default_rng(5)
    truth = {f"P{i}": rng.normal(0, 0.3, 400) for i in range(6)}
    means = {name: mean + rng.normal(0, 0.2, 400) for name, mean in truth.items()}
    alike = {name: rng.normal(0, 0.2, 400) for name in truth}
    noise = {name: (np.full(400, 0.04), np.full(400, 0.04)) for name in truth}
    predicted, measured = spread_of_responses(alike, means, noise)
    assert measured == pytest.approx(400 * 0.09, rel=0.1)
    assert abs(predicted) < 0.1 * measured
