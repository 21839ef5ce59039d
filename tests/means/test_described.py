"""Kernel ridge on tables: refits, loops and finite differences agree, and tables that say nothing count for nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perturbdiff.features.tables import FeatureTable
from perturbdiff.means import described
from perturbdiff.means.described import FEWEST, FeatureFit, left_out_errors
from perturbdiff.means.predictors import features, stacked
from perturbdiff.means.shifts import context_mean
from perturbdiff.means.training import Context, TrainingMeans
from tests.means.examples import training_means


def table(name, names, values):
    return FeatureTable(name, tuple(names), np.asarray(values, dtype=np.float32))


def parts(*names):
    return tuple((name, None) for name in names)


def centred_kernel(vectors):
    vectors = vectors - vectors.mean(axis=0)
    return vectors @ vectors.T


def refitted(kernels, weights, target):
    """(n,) squared error of each target predicted from a fit of the others alone, with an intercept that is free."""
    n, errors = len(target), []
    total = sum(w * kernel for w, kernel in zip(weights, kernels, strict=True))
    for i in range(n):
        rest = np.delete(np.arange(n), i)
        system = np.block([[total[np.ix_(rest, rest)] + np.eye(n - 1), np.ones((n - 1, 1))], [np.ones((1, n - 1)), 0]])
        solved = np.linalg.solve(system, np.vstack([target[rest], np.zeros((1, target.shape[1]))]))
        errors.append(np.square(target[i] - total[i, rest] @ solved[:-1] - solved[-1]).sum())
    return errors


def test_left_out_errors_are_those_of_refits_and_their_gradient_that_of_differences():
    rng = np.random.default_rng()
    for n, n_tables in ((4, 1), (9, 3), (15, 2)):
        kernels = np.stack([centred_kernel(rng.normal(size=(n, rng.integers(1, 20)))) for _ in range(n_tables)])
        target, logs = rng.normal(size=(n, 6)), rng.normal(size=n_tables)
        errors, gradient = left_out_errors(logs, kernels, target @ target.T)
        np.testing.assert_allclose(errors, refitted(kernels, np.exp(logs), target), rtol=1e-8)
        for t in range(n_tables):
            step = 1e-5 * np.eye(n_tables)[t]
            up, down = (left_out_errors(logs + s, kernels, target @ target.T)[0].sum() for s in (step, -step))
            np.testing.assert_allclose(gradient[t], (up - down) / 2e-5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [3, 40])  # fewer and more features than perturbations
def test_predictions_are_those_of_a_kernel_machine_with_these_weights(width):
    rng = np.random.default_rng()
    names = [f"p{i}" for i in range(20)]
    one, two = rng.normal(size=(21, width)), rng.normal(size=(21, 5))
    tables = [table("one", [*names, "new"], one), table("two", [*names, "new"], two)]
    target = one[:20] @ rng.normal(size=(width, 7)) + two[:20] @ rng.normal(size=(5, 7))
    fit = FeatureFit(tables, [parts(name) for name in names], target)
    assert (fit.weights > 0).any()
    expected = target.mean(axis=0)
    total, new = np.eye(20), np.zeros(20)
    for values, weight in zip((one, two), fit.weights, strict=True):
        centred = values.astype(np.float32).astype(float) - values[:20].astype(np.float32).mean(axis=0)
        scale = weight / np.square(centred[:20]).sum(axis=1).mean()
        total, new = total + scale * centred[:20] @ centred[:20].T, new + scale * centred[:20] @ centred[20]
    expected = expected + new @ np.linalg.solve(total, target - target.mean(axis=0))
    np.testing.assert_allclose(fit.predict(parts("new")), expected, rtol=1e-4, atol=1e-5)


def test_a_table_that_says_something_counts_and_noise_does_not():
    rng = np.random.default_rng(0)
    names = [f"p{i}" for i in range(40)]
    true, noise = rng.normal(size=(40, 4)), rng.normal(size=(40, 30))
    target = true @ rng.normal(size=(4, 50)) + rng.normal(size=(40, 50))
    known, nothing = table("true", names, true), table("noise", names, noise)
    received = [parts(name) for name in names]
    both = FeatureFit([nothing, known], received, target)
    assert both.weights[0] == 0
    assert both.weights[1] > 0
    assert both.error < 0.5
    alone = FeatureFit([nothing], received, target)
    assert (alone.error, alone.weights.tolist()) == (1.0, [0.0])
    assert alone.predict(parts("p1")) is None


def test_what_helps_by_no_more_than_chance_does_not_count():
    """Of random tables few count, and what they take off the error is more than its standard error."""
    rng = np.random.default_rng(5)
    names = [f"p{i}" for i in range(20)]
    received = [parts(name) for name in names]
    counted = 0
    for _ in range(60):
        fit = FeatureFit([table("noise", names, rng.normal(size=(20, 8)))], received, rng.normal(size=(20, 4)))
        counted += bool(fit.weights.any())
    assert counted <= 15  # a quarter, as one standard error leaves a sixth


def test_weights_that_others_learned_are_taken():
    rng = np.random.default_rng()
    names = [f"p{i}" for i in range(12)]
    tables = [table(name, names, rng.normal(size=(12, 4))) for name in "ab"]
    target = tables[0].values @ rng.normal(size=(4, 5))
    received = [parts(name) for name in names]
    own = FeatureFit(tables, received, target)
    again = FeatureFit(tables, received, target, own.weights)
    np.testing.assert_array_equal(again.predict(received[2]), own.predict(received[2]))
    assert FeatureFit(tables, received, target, np.zeros(2)).predict(received[2]) is None


def test_the_scale_and_the_place_of_a_table_do_not_matter():
    rng = np.random.default_rng()
    names = [f"p{i}" for i in range(12)]
    values, target = rng.normal(size=(12, 3)), rng.normal(size=(12, 5))
    target += values @ rng.normal(size=(3, 5)) * 3
    received = [parts(name) for name in names]
    fit = FeatureFit([table("t", names, values)], received, target)
    moved = FeatureFit([table("t", names, 7 * values + 3)], received, target)
    np.testing.assert_allclose(moved.predict(parts("p3")), fit.predict(parts("p3")), rtol=1e-3, atol=1e-4)


def test_combinations_are_sums_and_doses_are_one(monkeypatch):
    rng = np.random.default_rng()
    names = [f"p{i}" for i in range(10)]
    values = rng.normal(size=(10, 2))
    values -= values.mean(axis=0)  # so that a sum of rows is a row of the sum
    sums = [*values, values[0] + values[1]]
    target = np.array(sums) @ rng.normal(size=(2, 6))
    received = [parts(name) for name in names] + [parts("p0", "p1")]
    fit = FeatureFit([table("t", names, values)], received, target)
    as_one = FeatureFit([table("t", [*names, "both"], sums)], [*received[:-1], parts("both")], target)
    np.testing.assert_allclose(fit.predict(parts("p2", "p3")), fit.predict((("p2", 0.5), ("p3", 2.0))))
    np.testing.assert_allclose(fit.predict(parts("p0", "p1")), as_one.predict(parts("both")), rtol=1e-4, atol=1e-4)


def test_too_few_or_undescribed_perturbations_teach_nothing():
    values, target = np.eye(8)[:, :3], np.arange(40.0).reshape(8, 5)
    names = [f"p{i}" for i in range(8)]
    few = FeatureFit([table("t", names, values)], [parts(name) for name in names[: FEWEST - 1]], target[: FEWEST - 1])
    other = FeatureFit([table("t", ["x"], [[1.0, 2.0]])], [parts(name) for name in names], target)
    constant = FeatureFit([table("t", names, np.ones((8, 2)))], [parts(name) for name in names], target)
    for fit in (few, other, constant):
        assert not fit.weights.any()
        assert fit.predict(parts("p0")) is None


def test_weights_of_many_perturbations_are_learned_of_some(monkeypatch):
    monkeypatch.setattr(described, "MOST_WEIGHING", 10)
    rng = np.random.default_rng(1)
    names = [f"p{i}" for i in range(200)]
    values = rng.normal(size=(200, 3))
    target = values @ rng.normal(size=(3, 8))
    fit = FeatureFit([table("t", names, values)], [parts(name) for name in names], target)
    assert np.corrcoef(fit.predict(parts("p5")), target[5])[0, 1] > 0.99


@pytest.fixture(scope="module")
def described_means() -> tuple[TrainingMeans, np.ndarray, np.ndarray]:
    """Twelve perturbations in two contexts, whose effect is the context's and that of their features."""
    rng = np.random.default_rng(0)
    names, genes = [f"p{i}" for i in range(13)], 30
    values, directions = rng.normal(size=(13, 3)), rng.normal(size=(3, genes))
    conditions = [(name, "T", batch) for name in names[:12] for batch in "12"]
    training = training_means(conditions, genes=genes)
    own = {"1": rng.normal(size=genes), "2": rng.normal(size=genes)}
    effect = np.stack([own[batch] + values[int(name[1:])] @ directions for name, _, batch in conditions])
    tables = (table("t", names, values),)
    return replace(training, perturbed_mean=training.control_mean + effect, tables=tables), own["2"], effect


def test_an_unseen_perturbation_is_its_context_and_its_features(described_means):
    training, of_context, _ = described_means
    context = Context("p12", "T", "2", training.control_mean[[1]])
    shift = features(training, context)
    others = replace(training, tables=())
    truth = (
        of_context
        + training.tables[0].values[12]
        @ np.linalg.lstsq(training.tables[0].values[:12].astype(float), training.effect[1::2] - of_context, rcond=None)[
            0
        ]
    )
    assert np.corrcoef(shift, truth)[0, 1] > 0.99
    assert np.corrcoef(context_mean(training, context), truth)[0, 1] < 0.9
    assert features(others, context) is None
    undescribed = Context("q", "T", "2", training.control_mean[[1]])
    np.testing.assert_array_equal(features(training, undescribed), context_mean(training, undescribed))


def test_features_are_weighed_beside_the_others(described_means):
    training, *_ = described_means
    context = Context("p12", "T", "2", training.control_mean[[1]])
    shift, without = stacked(training, context), stacked(replace(training, tables=()), context)
    best = features(training, context)
    assert np.square(shift - best).sum() < 0.1 * np.square(without - best).sum()
