"""Stacked means: weights against a direct search, what is left out, what nobody can say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from perturbdiff.means import stack
from perturbdiff.means.predictors import PREDICTORS, STACKED, stacked
from perturbdiff.means.stack import Stack
from perturbdiff.means.training import Context, TrainingMeans


def grid(seed, n_perturbations=3, n_contexts=4, n_genes=12, effect=None):
    """Every perturbation in every context; a context is a cell type of its own."""
    rng = np.random.default_rng(seed)
    labels = list(itertools.product([f"P{i}" for i in range(n_perturbations)], [f"T{i}" for i in range(n_contexts)]))
    controls = {f"T{i}": rng.random(n_genes) + 2.0 for i in range(n_contexts)}
    shared = rng.normal(0, 0.3, n_genes)
    effects = {f"P{i}": shared + rng.normal(0, 0.2, n_genes) for i in range(n_perturbations)}
    control = np.stack([controls[c] for _, c in labels])
    change = np.stack([effects[p] if effect is None else effect(p, c) for p, c in labels])
    n = len(labels)
    return TrainingMeans(
        [p for p, _ in labels], [c for _, c in labels], ["b"] * n, control, control + change, np.full(n, 9)
    )


def context(perturbation, cell_type, n_genes=12, seed=7):
    return Context(perturbation, cell_type, "b", np.random.default_rng(seed).random((5, n_genes)) + 2.0)


def mean_of_others(training, asked):
    rows = [i for i, p in enumerate(training.perturbation) if p == asked.perturbation]
    return training.effect[rows].mean(axis=0)


def noise(training, asked):
    return np.random.default_rng(len(asked.cell_type)).normal(size=training.effect.shape[1])


def test_the_predictor_that_is_right_gets_all_weight():
    training = grid(0)
    of_all = Stack.fit(training, {"mean": mean_of_others, "noise": noise}, training.cell_type, lambda *_: True)
    assert of_all is not None
    weights = of_all.weights(of_all.names)
    assert weights["mean"] == pytest.approx(1, abs=1e-3)


def test_weights_are_those_of_a_search_on_left_out_conditions():
    rng = np.random.default_rng()
    training = grid(int(rng.integers(1 << 30)))
    training = replace(training, perturbed_mean=training.perturbed_mean + rng.normal(0, 0.2, training.effect.shape))
    predictors = {"mean": mean_of_others, "half": lambda t, c: 0.3 * t.effect.mean(axis=0) + 0.1}
    found = Stack.fit(training, predictors, training.cell_type, lambda *_: True).weights(("mean", "half"))
    made, true = [], []
    for i, cell_type in enumerate(training.cell_type):
        keep = [k for k, c in enumerate(training.cell_type) if c != cell_type]
        rest = TrainingMeans(
            [training.perturbation[k] for k in keep], [training.cell_type[k] for k in keep], ["b"] * len(keep),
            training.control_mean[keep], training.perturbed_mean[keep], training.n_cells[keep],
        )  # fmt: skip
        asked = Context(training.perturbation[i], cell_type, "b", training.control_mean[[i]])
        made.append([predict(rest, asked) for predict in predictors.values()])
        true.append(training.effect[i])
    made, true = np.array(made), np.array(true)
    steps = np.linspace(0, 1.5, 301)
    errors = {(a, b): float(((a * made[:, 0] + b * made[:, 1] - true) ** 2).sum()) for a in steps for b in steps[::10]}
    a, b = min(errors, key=errors.get)
    assert found.get("mean", 0) == pytest.approx(a / (a + b), abs=0.06)
    assert sum(found.values()) == pytest.approx(1)
    assert all(weight > 0 for weight in found.values())


def test_predictors_that_are_silent_anywhere_are_left_out_and_weights_are_of_those_that_speak():
    training = grid(1)
    predictors = {"mean": mean_of_others, "silent": lambda t, c: None, "noise": noise}
    found = Stack.fit(training, predictors, training.cell_type, lambda *_: True)
    assert found.names == ("mean", "noise")
    assert set(found.weights(["mean"])) == {"mean"}
    assert found.weights([]) == {}
    nothing = Stack.fit(training, {"none": lambda t, c: np.zeros(12)}, training.cell_type, lambda *_: True)
    assert nothing.weights(["none"]) == {}


def test_with_nothing_to_leave_out_nothing_is_said():
    assert Stack.fit(grid(2, n_contexts=1), {"mean": mean_of_others}, ["T0"] * 3, lambda *_: True) is None
    assert Stack.fit(grid(2), {"mean": mean_of_others}, grid(2).cell_type, lambda *_: False) is None
    alone = grid(2, n_perturbations=1, n_contexts=1)
    assert stacked(alone, context("P0", "new")) is None


def test_many_conditions_are_a_part_that_does_not_depend_on_their_order(monkeypatch):
    monkeypatch.setattr(stack, "MOST_CONDITIONS", 10)
    training = grid(3, n_perturbations=9)
    found = stacked(training, context("P4", "new"))
    order = np.random.default_rng().permutation(len(training.perturbation))
    shuffled = stacked(stack._rows(training, order), context("P4", "new"))
    assert found is not None
    np.testing.assert_allclose(shuffled, found, atol=1e-6)


def test_new_batches_new_cell_types_and_new_perturbations_have_weights_of_their_own():
    training = grid(4)
    for asked in (("P0", "T1"), ("P0", "new"), ("never", "T1")):
        assert stacked(training, context(*asked)) is not None
    assert set(training.learned) == {"batch", "cell type", "perturbation"}
    assert stacked(training, context("P0+P1", "T1")) is None  # no combination was trained: the additive mean stands


def test_stacked_is_a_mean_of_the_others():
    training, asked = grid(5), context("P1", "new")
    assert "stacked" not in STACKED
    told = [PREDICTORS[name](training, asked) for name in STACKED]
    told = np.stack([shift for shift in told if shift is not None])
    found = stacked(training, asked)
    assert (found >= told.min(axis=0) - 1e-9).all()
    assert (found <= told.max(axis=0) + 1e-9).all()
