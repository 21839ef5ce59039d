"""Stacked means: weights against a direct search, what is left out, what nobody can say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from perturbdiff.data.vocab import GeneVocab
from perturbdiff.means import stack
from perturbdiff.means.predictors import PREDICTORS, STACKED, response_kept, stacked, start_shift
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


def test_weights_are_learned_where_all_that_are_asked_said_something():
    training = grid(1)
    at_p0 = {"P0": True}
    predictors = {
        "mean": mean_of_others,
        "silent": lambda t, c: None,
        "noise": noise,
        "right of P0": lambda t, c: mean_of_others(t, c) if at_p0.get(c.perturbation) else None,
    }
    found = Stack.fit(training, predictors, training.cell_type, lambda *_: True)
    assert set(found.weights(["mean"])) == {"mean"}
    assert found.weights([]) == found.weights(["silent"]) == {}
    # What is only said of P0 is weighed on P0, beside what is said of all: two that are the same share.
    both = found.weights(["mean", "right of P0", "silent"])
    assert both == pytest.approx({"mean": 0.5, "right of P0": 0.5}, abs=0.01)
    of_p0 = [i for i, p in enumerate(training.perturbation) if p == "P0"]
    alone = Stack.fit(
        stack._rows(training, of_p0), {name: predictors[name] for name in ("mean", "noise")},
        [training.cell_type[i] for i in of_p0], lambda *_: True,
    )  # fmt: skip
    chosen = Stack.fit(
        training,
        {"mean": mean_of_others, "noise": lambda t, c: noise(t, c) if at_p0.get(c.perturbation) else None},
        training.cell_type, lambda *_: True,
    )  # fmt: skip
    assert chosen.weights(["mean", "noise"]) == pytest.approx(alone.weights(["mean", "noise"]))
    nothing = Stack.fit(training, {"none": lambda t, c: np.zeros(12)}, training.cell_type, lambda *_: True)
    assert nothing.weights(["none"]) == {}
    assert Stack.fit(training, {"silent": lambda t, c: None}, training.cell_type, lambda *_: True) is None


def test_of_what_is_new_weights_shrink_to_what_left_out_conditions_have_in_common():
    rng = np.random.default_rng()
    training = grid(int(rng.integers(1 << 30)), n_contexts=1, n_perturbations=6)
    names = [str(parts) for parts in training.perturbation]
    double = {"twice": lambda t, c: 2 * t.effect.mean(axis=0)}
    found = Stack.fit(training, double, names, lambda *_: True, shrinks=True).weights(["twice"])["twice"]
    made, true = [], []
    for i in range(6):
        rest = np.delete(training.effect, i, axis=0)
        made.append(2 * rest.mean(axis=0))
        true.append(training.effect[i])
    made, true = np.ravel(made), np.ravel(true)
    assert 0 < found < 1
    assert found == pytest.approx(made @ true / (made @ made), rel=1e-3)
    half = {"half": lambda t, c: 0.1 * t.effect.mean(axis=0)}
    assert Stack.fit(training, half, names, lambda *_: True, shrinks=True).weights(["half"]) == {"half": 1.0}
    wrong = {"wrong": lambda t, c: -t.effect.mean(axis=0)}
    assert Stack.fit(training, wrong, names, lambda *_: True, shrinks=True).weights(["wrong"]) == {}


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


def test_of_two_new_axes_what_shares_either_is_left_out():
    training = grid(6, n_perturbations=4, n_contexts=3)
    seen = []

    def spy(rest, asked):
        seen.append(({*rest.perturbation}, {*rest.cell_type}, asked.perturbation, asked.cell_type))
        return rest.effect.mean(axis=0)

    found = Stack.fit(
        training, {"spy": spy}, training.perturbation, lambda known, of: known.new(*of) == "perturbation and cell type",
        most_folds=99, place=training.cell_type,
    )  # fmt: skip
    assert len(found.left_out) == len(seen) == 12
    for perturbations, cell_types, perturbation, cell_type in seen:
        assert perturbations == {*training.perturbation} - {perturbation}
        assert cell_types == {*training.cell_type} - {cell_type}


def test_what_is_new_on_both_axes_is_weighed_by_what_is_as_new_or_the_next():
    training = grid(7)
    assert stacked(training, context("never", "new")) is not None
    assert set(training.learned) == {"perturbation and cell type"}
    one = grid(7, n_contexts=1)
    np.testing.assert_allclose(stacked(one, context("never", "new")), stacked(one, context("never", "T0")))
    assert one.learned["perturbation and cell type"] is one.learned["perturbation and batch"] is None


def combinations(seed, scale):
    """Six singles and their pairs, whose effects are a part of the sum, beside many more singles."""
    rng = np.random.default_rng(seed)
    singles = [f"S{i}" for i in range(30)]
    effect = {name: rng.normal(0, 0.3, 12) for name in singles}
    pairs = list(itertools.combinations(singles[:6], 2))
    labels = singles + ["+".join(pair) for pair in pairs]
    change = np.stack([*effect.values(), *(scale * (effect[a] + effect[b]) for a, b in pairs)])
    control = np.tile(rng.random(12) + 2.0, (len(labels), 1))
    n = len(labels)
    return TrainingMeans(labels, ["T"] * n, ["b"] * n, control, control + change, np.full(n, 9))


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_combinations_are_the_part_of_the_sum_that_others_are(scale):
    training = combinations(np.random.default_rng().integers(1 << 30), scale)
    asked = context("S6+S7", "T")
    expected = scale * (training.effect[6] + training.effect[7])
    found = stacked(training, asked)
    # Combinations are less than a third of what could be left out: all of those that are drawn teach.
    assert len(training.learned["combination"].left_out) == 15
    np.testing.assert_allclose(found, expected, atol=0.12)


def test_a_combination_that_is_learned_from_keeps_its_parts(monkeypatch):
    monkeypatch.setattr(stack, "MOST_CONDITIONS", 12)
    training = combinations(3, 1.0)
    rows = stack._some(training)
    assert len(rows) <= 12
    kept = {training.perturbation[i] for i in rows}
    pairs = [label for label in kept if "+" in label]
    assert pairs
    assert all({*label.split("+")} <= kept for label in pairs)


def test_stacked_is_a_mean_of_the_others():
    training, asked = grid(5), context("P1", "new")
    told = [PREDICTORS[name](training, asked) for name in STACKED]
    told = np.stack([shift for shift in told if shift is not None])
    found = stacked(training, asked)
    assert (found >= told.min(axis=0) - 1e-9).all()
    assert (found <= told.max(axis=0) + 1e-9).all()


def stack_of(training):
    """Weights for an unseen perturbation."""
    stacked(training, Context("never", "T", "b", training.control_mean[:1]))
    return training.learned["perturbation"].weights(list(STACKED)).values()


def test_effects_that_have_nothing_in_common_are_no_change_but_for_the_own_gene():
    rng = np.random.default_rng()
    genes = tuple(f"P{i}" for i in range(12))
    cells = rng.random((5, 12)) + 2.0
    control = np.tile(cells.mean(axis=0), (6, 1))
    signs = np.array([1, -1, 1, -1, 1, -1])[:, None] * np.full(12, 0.3)  # what the others have in common is wrong
    perturbed = control + signs
    for i in range(6):
        perturbed[i, i] = np.log1p(np.expm1(control[i, i]) / 4)
    training = TrainingMeans(
        list(genes[:6]), ["T"] * 6, ["b"] * 6, control, perturbed, np.full(6, 9), genes=GeneVocab(genes)
    )
    asked = Context("P7", "T", "b", cells)
    ratio = training.target_log_ratio(7, "T")
    assert ratio == pytest.approx(np.log(1 / 4), abs=0.01)
    before = np.expm1(asked.control_mean[7])
    expected = np.zeros(12)
    expected[7] = np.log1p(before * np.exp(ratio)) - np.log1p(before)
    np.testing.assert_allclose(stacked(training, asked), expected, atol=1e-9)
    np.testing.assert_allclose(start_shift(training, asked, "mean"), expected, atol=1e-9)
    assert response_kept(training, "P7") == response_kept(training, "P7+P8") == 0
    for seen in ("P0", "P0+P7", "P0+P1"):
        assert response_kept(training, seen) == 1
    # Alone, a training perturbation leaves nothing to learn weights from: its effect stands, and its own gene's change.
    first = stack._rows(training, np.array([0]))
    expected = first.effect[0].copy()
    expected[7] = (
        np.log1p(np.expm1(asked.control_mean[7]) * np.exp(first.target_log_ratio(7, "T"))) - asked.control_mean[7]
    )
    assert stacked(first, asked) is None
    assert response_kept(first, "P7") == 1
    alike = replace(training, perturbed_mean=control + 0.3)
    assert response_kept(alike, "P7") == pytest.approx(1, abs=1e-4)
    half = replace(training, perturbed_mean=control + 0.3 * (rng.normal(size=(6, 12)) + 1))
    assert response_kept(half, "P7") == pytest.approx(np.sqrt(sum(stack_of(half))), abs=1e-6)
    np.testing.assert_allclose(start_shift(first, asked, "mean"), expected, atol=1e-9)
