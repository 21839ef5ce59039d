"""Which part of a response is no noise."""

from __future__ import annotations

import numpy as np
import pytest

from perturbdiff.means.predictors import log_space, shrunk
from perturbdiff.means.signal import SHARE, signal
from perturbdiff.means.training import TrainingMeans
from tests.means.examples import asked


def slow_signal(labels, effect, noise):
    """Gene by gene, as the formula is written."""
    names = list(dict.fromkeys(labels))
    of = {name: [i for i, label in enumerate(labels) if label == name] for name in names}
    d = {p: [np.mean([effect[i][g] for i in rows]) for g in range(effect.shape[1])] for p, rows in of.items()}
    v = {p: [sum(noise[i][g] for i in rows) / len(rows) ** 2 for g in range(effect.shape[1])] for p, rows in of.items()}
    genes = range(effect.shape[1])
    t = [max(np.mean([d[p][g] ** 2 - v[p][g] for p in names]), 0.0) for g in genes]
    t = [value + SHARE * np.mean(t) for value in t]
    t = [value / np.mean(t) for value in t]
    a = {p: max(np.mean([d[p][g] ** 2 - v[p][g] for g in genes]), 0.0) for p in names}
    return {p: [a[p] * t[g] / (a[p] * t[g] + v[p][g]) for g in genes] for p in names}


@pytest.mark.parametrize("seed", range(3))
def test_it_is_that_of_the_slow_loop(seed):
    rng = np.random.default_rng(seed)
    labels = [(("A", None),), (("B", None),), (("A", None),), (("C", None),)]
    effect, noise = rng.normal(size=(4, 6)), rng.gamma(1.0, size=(4, 6)) * 0.3 + 1e-3
    found, expected = signal(labels, effect, noise), slow_signal(labels, effect, noise)
    for parts, part in found.items():
        np.testing.assert_allclose(part, expected[parts], rtol=1e-12)
        assert ((part >= 0) & (part <= 1)).all()


def test_without_noise_all_of_it_counts_and_of_noise_alone_nothing_much():
    rng = np.random.default_rng(0)
    labels = [((str(i), None),) for i in range(20)]
    effect = rng.normal(size=(20, 50))
    assert all((part == 1).all() for part in signal(labels, effect, np.zeros((20, 50))).values())
    assert np.mean(list(signal(labels, effect, np.ones((20, 50))).values())) < 0.05
    nothing = signal(labels, np.zeros((20, 50)), np.zeros((20, 50)))
    assert all((part == 0).all() for part in nothing.values())


def test_weak_responses_measured_with_few_cells_are_nearer_to_the_truth():
    rng = np.random.default_rng(1)
    labels = [((str(i), None),) for i in range(30)]
    truth = rng.normal(size=(30, 200)) * rng.gamma(0.5, size=(30, 1)) * rng.gamma(0.5, size=200)
    noise = np.full((30, 200), 0.3) * rng.gamma(2.0, size=200)
    measured = truth + rng.normal(size=truth.shape) * np.sqrt(noise)
    found = np.stack(list(signal(labels, measured, noise).values())) * measured
    assert ((found - truth) ** 2).sum() < 0.6 * ((measured - truth) ** 2).sum()


def means(noise):
    rng = np.random.default_rng(2)
    control, effect = 2 + rng.gamma(2.0, size=(6, 9)), rng.normal(size=(2, 9))[[0, 1] * 3] * 0.3
    own = None if noise is None else np.full((6, 9), noise)
    labels = (["A", "B"] * 3, ["T"] * 6, ["1", "1", "2", "2", "3", "3"])
    return TrainingMeans(
        *labels, control[[0, 0, 1, 1, 2, 2]], control[[0, 0, 1, 1, 2, 2]] + effect, np.ones(6),
        control_noise=own, perturbed_noise=own,
    )  # fmt: skip


@pytest.mark.parametrize("label", ["A", "A+B"])
def test_shrunk_goes_from_the_whole_response_to_what_contexts_have_in_common(label):
    context = asked(label, "T", "9", genes=9)
    assert shrunk(means(None), context) is None
    assert shrunk(means(0.0), asked("Z", "T", "9", genes=9)) is None
    np.testing.assert_allclose(shrunk(means(0.0), context), log_space(means(0.0), context), atol=1e-12)
    training = means(100.0)
    training.fit_across_batches.convergence = 0.0
    np.testing.assert_allclose(shrunk(training, context), 0.0, atol=1e-12)
    between = [np.abs(shrunk(means(noise), context)).sum() for noise in (0.0, 0.001, 0.01)]
    assert between[0] > between[1] > between[2]
