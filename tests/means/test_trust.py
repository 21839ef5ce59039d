"""What is expected of predictions: against refits, least squares by hand, and effects of which the truth is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from perturbdiff.data.vocab import GeneVocab
from perturbdiff.means.predictors import STACKED, newness_of, stack_for, stacked
from perturbdiff.means.shifts import others_mean
from perturbdiff.means.training import Context, TrainingMeans
from perturbdiff.means.trust import FROM_SIZES, MOST_R, Trust, _told, expected_r, least, trust


def screen(rng, n_perturbations=8, n_contexts=4, shared=0.3, own=0.3, noise=0.0, n_genes=40, n_cells=50):
    """Every perturbation in every context; a context is a cell type of its own. `own` is one number or one each."""
    labels = list(itertools.product(range(n_perturbations), range(n_contexts)))
    control = rng.random((n_contexts, n_genes)) + 5.0
    common = rng.normal(0, shared, n_genes)
    effect = common + rng.normal(size=(n_perturbations, n_genes)) * np.broadcast_to(own, n_perturbations)[:, None]
    change = np.stack([effect[p] + rng.normal(0, noise, n_genes) if noise else effect[p] for p, _ in labels])
    means = np.stack([control[c] for _, c in labels])
    names, types = [f"P{p}" for p, _ in labels], [f"T{c}" for _, c in labels]
    return TrainingMeans(names, types, ["b"] * len(labels), means, means + change, np.full(len(labels), n_cells))


def new_context(perturbation, rng, n_genes=40):
    return Context(perturbation, "new", "b", rng.random((5, n_genes)) + 5.0)


def without(training, gone):
    keep = [i for i in range(len(training.perturbation)) if not gone(i)]
    return replace(
        training,
        perturbation=[training.perturbation[i] for i in keep],
        cell_type=[training.cell_type[i] for i in keep],
        batch=[training.batch[i] for i in keep],
        control_mean=training.control_mean[keep],
        perturbed_mean=training.perturbed_mean[keep],
        n_cells=training.n_cells[keep],
    )


def partial(a, b, given):
    """Correlation of what least squares on `given` and a constant leaves of both."""
    design = np.stack([np.ones(len(a)), given], axis=1)
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (a, b)]
    return float(np.corrcoef(*left)[0, 1]), float(np.sqrt(np.square(left[0]).mean()))


def test_r_of_a_left_out_condition_is_the_partial_correlation_of_a_refit():
    rng = np.random.default_rng()
    training = screen(rng, noise=0.2)
    stack = stack_for(training, "cell type")
    found = [_told(stack, of) for of in stack.left_out]
    assert len(found) == len(training.perturbation)
    expected = []
    for cell_type in sorted({*training.cell_type}):
        rest = without(training, lambda i, of=cell_type: training.cell_type[i] == of)
        for i in [i for i, of in enumerate(training.cell_type) if of == cell_type]:
            asked = Context(training.perturbation[i], cell_type, "b", training.control_mean[[i]])
            weights = stack.weights(STACKED, without=int(cell_type[1:]))
            shift = sum(weight * STACKED[name](rest, asked) for name, weight in weights.items())
            others = np.mean([rest.effect[k] for k, of in enumerate(rest.perturbation) if of != asked.perturbation], 0)
            np.testing.assert_allclose(others_mean(rest, asked), others, atol=1e-12)
            r, size = partial(shift, training.effect[i], others)
            expected.append((size, r))
    np.testing.assert_allclose(np.sort(np.array(found), axis=0), np.sort(np.array(expected), axis=0), atol=1e-6)


def test_of_one_perturbation_r_is_the_correlation_itself():
    rng = np.random.default_rng()
    training = screen(rng, n_perturbations=1, n_contexts=5, noise=0.1)
    found = trust(training, new_context("P0", rng))
    assert found.n_left_out == 5
    assert found.verdict == "known"
    assert found.expected_pearson > 0.8


@pytest.mark.parametrize("n", [2, 5, FROM_SIZES, 30])
def test_the_range_is_that_of_one_more_condition_by_least_squares(n):
    rng = np.random.default_rng()
    sizes, r = rng.gamma(2.0, size=n), np.tanh(rng.normal(0.4, 0.3, n))
    size = float(np.exp(rng.uniform(np.log(sizes).min(), np.log(sizes).max())))
    x, z = np.log(sizes), np.arctanh(r)
    if n < FROM_SIZES:
        at, error, degrees = z.mean(), z.std(ddof=1) * math.sqrt(1 + 1 / n), n - 1
    else:
        fit = stats.linregress(x, z)
        at, degrees = fit.intercept + fit.slope * math.log(size), n - 2
        residual = np.square(z - fit.intercept - fit.slope * x).sum() / degrees
        error = math.sqrt(residual * (1 + 1 / n + (math.log(size) - x.mean()) ** 2 / np.square(x - x.mean()).sum()))
    half = stats.t.ppf(0.95, degrees) * error
    np.testing.assert_allclose(expected_r(sizes, r, size), np.tanh([at, at - half, at + half]), atol=1e-9)


def test_no_size_beyond_those_of_others_is_told_better_than_theirs():
    sizes = np.linspace(1, 2, 20)
    r = np.tanh(np.log(sizes))
    for inside, outside in ((1.0, 1e-3), (2.0, 1e3)):
        assert expected_r(sizes, r, outside) == pytest.approx(expected_r(sizes, r, inside))


def test_edges_of_the_range():
    assert all(map(math.isnan, expected_r(np.ones(1), np.array([0.9]), 1.0)))
    assert all(map(math.isnan, expected_r(np.zeros(0), np.zeros(0), 1.0)))
    assert expected_r(np.ones(20), np.ones(20), 1.0) == pytest.approx((MOST_R,) * 3)  # sizes that are all the same
    assert expected_r(np.ones(3), -np.ones(3), 1.0) == pytest.approx((-MOST_R,) * 3)


def test_strong_responses_are_known_and_noise_is_not():
    rng = np.random.default_rng()
    own, noise = np.where(np.arange(12) < 6, 0.6, 0.0), []
    for _ in range(4):
        training = screen(rng, n_perturbations=12, shared=0.0, own=own, noise=0.25)
        found = [trust(training, new_context(f"P{p}", rng)) for p in range(12)]
        assert {of.verdict for of in found[:6]} == {"known"}
        assert min(of.expected_pearson for of in found[:6]) > 0.5
        assert all(of.low <= of.expected_pearson <= of.high for of in found)
        noise += [of.verdict for of in found[6:]]
    assert noise.count("known") <= 2  # of 24


def test_ranges_hold_what_a_new_context_then_measures():
    rng = np.random.default_rng(11)  # of what is certain only on average
    inside, known_right, known, untold_r, n = 0, 0, 0, [], 0
    for _ in range(6):
        everything = screen(rng, n_perturbations=16, n_contexts=5, own=rng.gamma(1.0, 0.2, 16), noise=0.3)
        training = without(everything, lambda i, of=everything: of.cell_type[i] == "T4")
        for i in [i for i, of in enumerate(everything.cell_type) if of == "T4"]:
            asked = Context(everything.perturbation[i], "T4", "b", everything.control_mean[[i]])
            r, _ = partial(stacked(training, asked), everything.effect[i], others_mean(training, asked))
            found = trust(training, asked)
            n, inside = n + 1, inside + (found.low <= r <= found.high)
            if found.verdict == "known":
                known, known_right = known + 1, known_right + (r > 0)
            else:
                untold_r.append(r)
    assert 0.82 <= inside / n <= 0.98
    assert known >= 20
    assert known_right / known >= 0.95
    assert np.mean(untold_r) < 0.5


def test_nothing_is_told_of_perturbations_that_nobody_saw():
    rng = np.random.default_rng()
    training = screen(rng)
    found = trust(training, Context("never", "T0", "b", training.control_mean[:1]))
    assert (found.verdict, found.new) == ("cannot tell", "perturbation")
    both = trust(training, new_context("never", rng))
    assert (both.verdict, both.new) == ("cannot tell", "perturbation and cell type")


def test_less_noise_than_the_mean_of_the_others_is_no_knowledge():
    rng = np.random.default_rng()
    training = screen(rng, n_perturbations=20, n_genes=2000, noise=0.2)
    found = trust(training, Context("never", "T0", "b", training.control_mean[:1]))
    assert found.verdict == "cannot tell"  # though r is above 0: of context and perturbation all conditions know more
    assert found.high < 0.2


def test_what_was_trained_is_said_to_be():
    training = screen(np.random.default_rng())
    assert trust(training, Context("P1", "T2", "b", training.control_mean[:1])) == Trust("trained", None)
    dose = trust(training, Context("P1@7", "T2", "b", training.control_mean[:1]))
    assert dose.new in ("dose", "perturbation")
    assert dose.verdict != "trained"


def test_where_nothing_can_be_left_out_nobody_can_tell():
    rng = np.random.default_rng()
    alone = screen(rng, n_perturbations=1, n_contexts=1)
    found = trust(alone, new_context("P0", rng))
    assert (found.verdict, found.n_left_out) == ("cannot tell", 0)
    assert math.isnan(found.expected_pearson)
    tiny = screen(rng, n_cells=3)  # left-out conditions of so few cells say nothing
    assert trust(tiny, new_context("P0", rng)).verdict == "cannot tell"


def test_of_a_combination_with_an_unseen_part_nothing_is_said():
    rng = np.random.default_rng()
    training = screen(rng, n_contexts=1)
    found = trust(training, Context("P0+never", "T0", "b", training.control_mean[:1]))
    assert found == Trust("cannot tell", "combination")


def test_combinations_that_are_sums_are_known():
    rng = np.random.default_rng()
    singles = screen(rng, n_contexts=1, shared=0.0)
    pairs = list(itertools.combinations(range(6), 2))
    change = np.stack([singles.effect[a] + singles.effect[b] for a, b in pairs])
    change += rng.normal(0, 0.1, change.shape)
    control, n = np.repeat(singles.control_mean[:1], len(pairs), axis=0), len(pairs)
    training = TrainingMeans(
        [*singles.perturbation, *(f"P{a}+P{b}" for a, b in pairs)], [*singles.cell_type, *["T0"] * n],
        [*singles.batch, *["b"] * n], np.concatenate([singles.control_mean, control]),
        np.concatenate([singles.perturbed_mean, control + change]), np.full(8 + n, 50),
    )  # fmt: skip
    found = trust(training, Context("P6+P7", "T0", "b", training.control_mean[:1]))
    assert (found.verdict, found.new, found.n_left_out) == ("known", "combination", n)


def test_own_genes_of_what_nobody_saw_do_not_count():
    rng = np.random.default_rng()
    training = replace(
        screen(rng, n_contexts=1, n_genes=10), genes=GeneVocab(tuple(f"P{i}" for i in range(10))),
    )  # fmt: skip
    asked = Context("P9", "T0", "b", training.control_mean[:1])
    known = trust(training, asked)
    assert known.verdict == "cannot tell"
    assert newness_of(training, asked) == "perturbation"
    assert {of.n_genes for of in stack_for(training, "perturbation").left_out} == {9}


def test_the_least_known_context_speaks_for_all():
    known, better = Trust("known", "batch", 0.5, 0.1, 0.8, 9), Trust("known", "batch", 0.6, 0.3, 0.8, 9)
    untold, unknown = Trust("cannot tell", "batch", 0.1, -0.3, 0.5, 9), Trust("cannot tell", "perturbation")
    assert least([better, known]) is known
    assert least([known, untold, Trust("trained", None)]) is untold
    assert least([untold, unknown, better]) is unknown
    assert least([Trust("trained", None), better]) is better
