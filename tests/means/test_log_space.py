"""The log-space predictor against a slow loop over conditions and genes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from perturbdiff.data.notation import Notation
from perturbdiff.means.log_space import BANDWIDTHS, CONVERGENCE, EPS, LogSpaceFit, log_expression, mean_of
from perturbdiff.means.predictors import log_space
from perturbdiff.means.shifts import perturbation_mean
from perturbdiff.means.training import TrainingMeans
from tests.means.examples import CONDITIONS, asked, training_means


def slow_prediction(training, rows, control, eps, bandwidth, convergence):
    """The documented formula, gene by gene."""
    n, n_genes = training.control_mean.shape
    pairs = [sum((a - b) ** 2) for a in training.control_mean for b in training.control_mean]
    scale = sum(pairs) / n**2
    weight = []
    for k in rows:
        squared = sum((training.control_mean[k][g] - control[g]) ** 2 for g in range(n_genes))
        weight.append(1.0 if math.isinf(bandwidth) else math.exp(-squared / (2 * bandwidth**2 * scale)))
    weight = [w / sum(weight) for w in weight]
    predicted = []
    for g in range(n_genes):

        def logs(mean):
            return math.log(math.exp(mean) - 1 + eps)

        controls = sum(w * logs(training.control_mean[k][g]) for w, k in zip(weight, rows, strict=True))
        perturbed = sum(w * logs(training.perturbed_mean[k][g]) for w, k in zip(weight, rows, strict=True))
        reached = logs(control[g]) + (perturbed - controls) - convergence * (logs(control[g]) - controls)
        predicted.append(math.log(1 + max(math.exp(reached) - eps, 0)))
    return np.array(predicted)


def slow_errors(training, left_out):
    errors = np.zeros((len(EPS), len(BANDWIDTHS), len(CONVERGENCE)))
    for i, perturbation in enumerate(training.perturbation):
        rows = [
            j for j, other in enumerate(training.perturbation) if other == perturbation and left_out[j] != left_out[i]
        ]
        for e, eps in enumerate(EPS):
            for h, bandwidth in enumerate(BANDWIDTHS):
                for b, convergence in enumerate(CONVERGENCE):
                    if rows:
                        predicted = slow_prediction(
                            training, rows, training.control_mean[i], eps, bandwidth, convergence
                        )
                        errors[e, h, b] += ((predicted - training.perturbed_mean[i]) ** 2).sum()
    return errors


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("across", ["batches", "cell types"])
def test_settings_are_those_of_the_slow_loop(across, seed):
    conditions = [(p, c, b) for p in "AB" for c in ("T", "NK", "B") for b in "12" if (p, c, b) != ("B", "T", "1")]
    training = training_means([*conditions, ("C", "T", "1")], seed, genes=4)
    contexts = list(zip(training.cell_type, training.batch, strict=True))
    left_out = contexts if across == "batches" else training.cell_type
    fit = training.fit_across_batches if across == "batches" else training.fit_across_cell_types
    expected = slow_errors(training, left_out)
    np.testing.assert_allclose(fit.errors, expected, rtol=1e-8)
    e, h, b = (
        EPS.index(fit.eps),
        BANDWIDTHS.index(fit.bandwidth),
        CONVERGENCE.index(fit.convergence),
    )
    assert expected[e, h, b] == pytest.approx(expected.min(), rel=1e-8)


@pytest.mark.parametrize("cell_type", ["T", "Mk"])
def test_predictions_are_those_of_the_slow_loop(cell_type):
    training = training_means(CONDITIONS, None)
    context = asked("A", cell_type, "9")
    fit = training.fit_across_batches if cell_type == "T" else training.fit_across_cell_types
    control = context.control.mean(axis=0)
    expected = slow_prediction(training, [0, 3, 7], control, fit.eps, fit.bandwidth, fit.convergence)
    np.testing.assert_allclose(log_space(training, context), expected - control, atol=1e-9)


def test_a_response_of_ratios_is_found_in_a_context_of_another_level():
    rng = np.random.default_rng(3)
    expression, ratio = rng.lognormal(1, 1, size=(6, 40)), rng.lognormal(0, 1, size=40)
    control, perturbed = np.log1p(expression), np.log1p(expression * ratio)
    training = TrainingMeans(["A"] * 5, list("12345"), ["b"] * 5, control[:5], perturbed[:5], np.ones(5))
    context = asked("A", "6", "b", control[5])
    error = np.abs(log_space(training, context) - (perturbed[5] - control[5])).max()
    assert (training.fit_across_cell_types.eps, training.fit_across_cell_types.convergence) == (0.01, 0.0)
    assert error < 0.02 < 0.1 < np.abs(perturbation_mean(training, context) - (perturbed[5] - control[5])).max()


def test_contexts_that_become_alike_are_predicted_to_become_so():
    rng = np.random.default_rng(4)
    control, reached = rng.gamma(2.0, size=(6, 40)), rng.gamma(2.0, size=40)
    training = TrainingMeans(["A"] * 5, list("12345"), ["b"] * 5, control[:5], np.tile(reached, (5, 1)), np.ones(5))
    assert training.fit_across_cell_types.convergence == 1.0
    np.testing.assert_allclose(log_space(training, asked("A", "6", "b", control[5])), reached - control[5], atol=1e-9)


def test_shifts_of_means_are_within_the_family():
    """eps 1, all weights equal, b 0 is the mean effect, as `perturbation mean` has it."""
    rng = np.random.default_rng(5)
    control, effect = rng.gamma(2.0, size=(9, 30)), rng.gamma(1.0, size=30)
    training = TrainingMeans(["A"] * 8, list("12345678"), ["b"] * 8, control[:8], control[:8] + effect, np.ones(8))
    context = asked("A", "9", "b", control[8])
    np.testing.assert_allclose(log_space(training, context), effect, atol=1e-9)
    np.testing.assert_allclose(log_space(training, context), perturbation_mean(training, context), atol=1e-9)


def test_like_contexts_count_where_they_tell_more():
    rng = np.random.default_rng(6)
    kinds, effects = rng.gamma(2.0, size=(2, 50)), rng.gamma(1.0, size=(2, 50))
    kind = np.arange(10) % 2
    control = kinds[kind] + rng.uniform(0, 0.05, size=(10, 50))
    training = TrainingMeans(
        ["A"] * 9, list("123456789"), ["b"] * 9, control[:9], (control + effects[kind])[:9], np.ones(9)
    )
    assert training.fit_across_cell_types.bandwidth == BANDWIDTHS[-1]
    np.testing.assert_allclose(log_space(training, asked("A", "10", "b", control[9])), effects[1], atol=0.05)


def test_of_two_contexts_nothing_is_weighted():
    training = training_means([("A", "T", "1"), ("A", "NK", "1")])
    assert training.fit_across_cell_types.bandwidth == np.inf  # one other: all bandwidths are equal
    assert np.isfinite(log_space(training, asked("A"))).all()


def test_one_condition_gives_its_own_ratio():
    control, perturbed = np.log1p([[1.0, 3.0, 0.0]]), np.log1p([[2.0, 3.0, 1.0]])
    training = TrainingMeans(["A"], ["T"], ["1"], control, perturbed, np.ones(1))
    fit = training.fit_across_cell_types
    assert (fit.eps, fit.bandwidth, fit.convergence, fit.errors.size) == (0.1, np.inf, 0.0, 0)
    new = np.log1p([4.0, 0.0, 0.0])
    expected = np.log1p([4.1 * 2.1 / 1.1 - 0.1, 0.0, 0.1 * 1.1 / 0.1 - 0.1]) - new
    np.testing.assert_allclose(log_space(training, asked("A", control=new)), expected, atol=1e-12)


def test_a_combination_never_seen_multiplies_and_nothing_is_said_of_what_was_never_seen():
    training = training_means(CONDITIONS)
    context = asked("A+C", "T", "1")
    fit = training.fit_across_batches
    control = context.control.mean(axis=0)
    total = log_expression(control, fit.eps)
    for rows in ([0, 3, 7], [2]):
        single = slow_prediction(training, rows, control, fit.eps, fit.bandwidth, fit.convergence)
        total = total + log_expression(single, fit.eps) - log_expression(control, fit.eps)
    np.testing.assert_allclose(log_space(training, context), mean_of(total, fit.eps) - control, atol=1e-9)
    for label in ("Z", "A+Z", "D"):
        assert log_space(training, asked(label)) is None
    assert log_space(training, asked("B+A")) is not None


def test_the_nearest_dose_is_taken():
    notation = Notation({"A"}, "+", "@")
    training = training_means([("A@1", "T", "1"), ("A@100", "NK", "1")], notation=notation)
    for near, seen in (("A@3", "A@1"), ("A@50", "A@100")):
        np.testing.assert_array_equal(log_space(training, asked(near)), log_space(training, asked(seen)))


@pytest.mark.parametrize("genes", [1, 5])
def test_controls_that_are_all_zero_or_the_same_stay_finite(genes):
    zeros = np.zeros((3, genes))
    for control in (zeros, zeros + 2.0):
        training = TrainingMeans(["A"] * 3, list("TNB"), ["1"] * 3, control, zeros, np.ones(3))
        shift = log_space(training, asked("A", "Mk", "1", control[0]))
        np.testing.assert_allclose(shift, -control[0], atol=1e-12)


def test_far_contexts_do_not_underflow():
    control = np.array([[0.0, 0], [0.1, 0], [0.2, 0]])
    fit = LogSpaceFit([()] * 3, list("abc"), control, control + 1)
    fit.bandwidth = 0.25
    change = fit.log_change(np.arange(3), np.array([100.0, 0.0]))
    assert np.isfinite(change).all()
    np.testing.assert_allclose(change, fit.log_change(np.array([2]), np.array([100.0, 0.0])), atol=1e-9)


def test_logarithms_and_means_undo_each_other():
    mean = np.concatenate([[0.0], np.random.default_rng().gamma(1.0, size=50)])
    for eps in EPS:
        np.testing.assert_allclose(mean_of(log_expression(mean, eps), eps), mean, atol=1e-12)
    np.testing.assert_allclose(log_expression(mean, 1.0), mean, atol=1e-12)


def test_what_alike_contexts_taught_is_not_carried_to_a_far_one():
    rng = np.random.default_rng(7)
    control = 2 + rng.uniform(0, 0.1, size=(5, 40))
    training = TrainingMeans(["A"] * 5, list("12345"), ["b"] * 5, control, np.tile(control[0] + 1, (5, 1)), np.ones(5))
    fit = training.fit_across_cell_types
    assert fit.convergence == 1.0  # all reach the same
    learned_at = np.mean(
        [np.square(own - np.delete(control, i, 0).mean(axis=0)).sum() for i, own in enumerate(control)]
    )
    mean = control.mean(axis=0)
    kept = []
    for far in (0.5, 1.9, 20.0, 1000.0):
        new = mean + far * np.sqrt(learned_at / 40)
        without = log_expression(np.tile(control[0] + 1, (5, 1)), fit.eps).mean(0) - log_expression(
            control, fit.eps
        ).mean(0)
        unlike = log_expression(new, fit.eps) - log_expression(control, fit.eps).mean(axis=0)
        kept.append(float(np.mean((without - fit.log_change(np.arange(5), new)) / unlike)))
    if np.isinf(fit.bandwidth):
        np.testing.assert_allclose(kept, [1, 1, (4 / 400) ** 2, (4 / 1000**2) ** 2], rtol=1e-6)
    assert kept[0] > 0.99 > 0.1 > kept[2] > kept[3]
