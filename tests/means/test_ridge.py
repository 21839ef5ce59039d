"""Ridge against scikit-learn and brute-force refits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from perturbdiff.data.notation import Notation
from perturbdiff.means.predictors import ridge
from perturbdiff.means.ridge import PENALTIES, RidgeFit
from perturbdiff.means.shifts import context_mean
from perturbdiff.means.training import TrainingMeans
from tests.means.examples import CONDITIONS, GENES, asked, training_means

WITH_DOSES = [
    ("A@1", "T", "1"),
    ("A@10", "T", "1"),
    ("A@10", "NK", "1"),
    ("B@5", "T", "1"),
    ("B@5+A@100", "NK", "1"),
    ("C", "NK", "1"),
    ("C@100", "NK", "1"),
]
DOSES = Notation(frozenset("ABC"), "+", "@")


def parts_of(label: str) -> dict[str, float]:
    """Independent of Notation: name -> log10 of the dose."""
    pairs = [part.partition("@") for part in label.split("+")]
    return {name: math.log10(float(dose or 1)) for name, _, dose in pairs}


def features(training: TrainingMeans, perturbation: str, control_mean: np.ndarray) -> list[float]:
    """The documented features, written independently: scaled centred control mean, a column per single, doses."""
    centre = training.control_mean.mean(axis=0)
    scale = np.sqrt(np.mean([np.dot(c - centre, c - centre) for c in training.control_mean])) or 1.0
    conditions = [parts_of(label) for label in training.perturbation]
    singles = sorted({name for parts in conditions for name in parts})
    parts = parts_of(perturbation)
    doses = {name: [p[name] for p in conditions if name in p] for name in singles}
    scaled = [
        (parts[name] - np.mean(doses[name])) / np.std(doses[name]) if name in parts else 0.0
        for name in singles
        if len(set(doses[name])) > 1
    ]
    return [*((control_mean - centre) / scale), *(float(s in parts) for s in singles), *scaled]


def design(training: TrainingMeans) -> np.ndarray:
    rows = zip(training.perturbation, training.control_mean, strict=True)
    return np.array([features(training, p, c) for p, c in rows])


@pytest.mark.parametrize("genes", [3, 200])  # fewer and more than conditions
@pytest.mark.parametrize("conditions", [CONDITIONS, WITH_DOSES])
def test_ridge_equals_scikit_learn_at_the_chosen_penalty(conditions: list[tuple[str, str, str]], genes: int) -> None:
    notation = DOSES if conditions is WITH_DOSES else None
    training = training_means(conditions, seed=2, genes=genes, notation=notation)
    model = Ridge(alpha=training.ridge_fit.penalty).fit(design(training), training.effect)
    control_mean = np.random.default_rng(3).gamma(1.0, size=genes)
    for perturbation in ("A", "B+A", "C+A", "Z", *(["A@3", "C@1000+A@2", "B@7"] if notation else [])):
        expected = model.predict(np.array([features(training, perturbation, control_mean)]))[0]
        np.testing.assert_allclose(ridge(training, asked(perturbation, control=control_mean)), expected, atol=1e-8)


@pytest.mark.parametrize("genes", [3, 200])
@pytest.mark.parametrize("conditions", [CONDITIONS, CONDITIONS[:3], [("A", str(i), "1") for i in range(6)], WITH_DOSES])
def test_closed_form_leave_one_out_equals_refitting(conditions: list[tuple[str, str, str]], genes: int) -> None:
    notation = DOSES if conditions is WITH_DOSES else None
    training = training_means(conditions, seed=4, genes=genes, notation=notation)
    x = design(training)
    refitted = []
    for penalty in PENALTIES:
        total = 0.0
        for i in range(len(x)):
            others = np.arange(len(x)) != i
            model = Ridge(alpha=penalty).fit(x[others], training.effect[others])
            total += ((model.predict(x[i : i + 1])[0] - training.effect[i]) ** 2).sum()
        refitted.append(total)
    np.testing.assert_allclose(training.ridge_fit.loo_error, refitted, rtol=1e-6)
    assert refitted[list(PENALTIES).index(training.ridge_fit.penalty)] <= min(refitted) * (1 + 1e-6)


def test_a_dose_between_is_predicted_better_than_by_the_nearest() -> None:
    rng = np.random.default_rng(8)
    base, slope, control = rng.normal(5, 1, 30), rng.normal(size=30), np.full(30, 5.0)
    labels = [f"A@{10.0**i:g}" for i in range(1, 9) if i != 4]
    perturbed = np.stack([base + i * slope for i in range(1, 9) if i != 4])
    n = len(labels)
    training = TrainingMeans(
        labels, ["T"] * n, ["1"] * n, np.tile(control, (n, 1)), perturbed, np.ones(n), Notation({"A"}, "+", "@")
    )
    predicted = ridge(training, asked("A@10000", "T", "1", control=control))
    np.testing.assert_allclose(predicted, base + 4 * slope - control, atol=0.02)


def test_ridge_extrapolates_to_a_new_context_what_controls_explain_linearly() -> None:
    rng = np.random.default_rng(5)
    factors, genes_of = rng.normal(size=(13, 2)), rng.normal(size=(2, 50))  # 13 cell types in two dimensions
    controls = 3 + factors @ genes_of
    response = rng.normal(size=(2, 50))
    types = [str(i) for i in range(12)]
    perturbed = controls + factors @ response
    training = TrainingMeans(["A"] * 12, types, ["1"] * 12, controls[:12], perturbed[:12], np.ones(12))
    truth, context = factors[12] @ response, asked("A", "new", "1", controls[12])
    error = np.square(ridge(training, context) - truth).sum()
    assert error < 1e-3 * np.square(context_mean(training, context) - truth).sum()


def test_ridge_shrinks_to_the_mean_where_the_controls_explain_nothing() -> None:
    rng = np.random.default_rng(6)
    controls = rng.gamma(1.0, size=(40, 400))
    perturbed = controls + rng.normal(size=(40, 400))
    training = TrainingMeans(["A"] * 40, list(map(str, range(40))), ["1"] * 40, controls, perturbed, np.ones(40))
    assert training.ridge_fit.penalty >= 100
    predicted = ridge(training, asked("A", "40", "1", controls[3]))
    np.testing.assert_allclose(predicted, training.effect.mean(axis=0), atol=0.05)


def test_ridge_with_one_or_two_conditions_is_their_mean() -> None:
    one, two = training_means(CONDITIONS[:1]), training_means([("A", "T", "1"), ("A", "NK", "1")])
    new = np.random.default_rng(7).gamma(1.0, size=GENES)
    np.testing.assert_array_equal(ridge(one, asked("A", "NK", "1", new)), one.effect[0])
    assert two.ridge_fit.penalty == PENALTIES[-1]  # left out, each is predicted by the other under any penalty
    np.testing.assert_allclose(ridge(two, asked("A", "B", "1", new)), two.effect.mean(axis=0), atol=1e-3)


def test_ridge_is_fitted_once_and_refuses_other_genes(monkeypatch: pytest.MonkeyPatch) -> None:
    training = training_means(CONDITIONS)
    ridge(training, asked("A", "T", "1"))
    monkeypatch.setattr(RidgeFit, "__init__", lambda *_: pytest.fail("fitted again"))
    ridge(training, asked("B", "NK", "1"))
    with pytest.raises(ValueError, match="control cells of 3 genes"):
        ridge(training, asked("A", "T", "1", np.zeros(3)))


@pytest.mark.parametrize("n", [3, 7, 36, 45])
def test_of_one_context_no_other_control_changes_the_effect(n):
    rng = np.random.default_rng()
    control = np.tile(rng.random(12) + 2.0, (n, 1))  # whose mean is another by rounding
    effect = rng.normal(size=(n, 12))
    fit = RidgeFit([((f"P{i}", None),) for i in range(n)], control, effect)
    found = [fit.predict((("P1", None),), mean) for mean in (control[0], rng.random(12) + 2.0)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
