"""Own target and covariance against numbers worked out by hand and numpy's covariance."""

from __future__ import annotations

import numpy as np
import pytest

from perturbdiff.data.vocab import GeneVocab
from perturbdiff.means.shifts import context_mean
from perturbdiff.means.targets import covariance, own_target, targets_alone, with_unseen_targets
from perturbdiff.means.training import TrainingMeans
from tests.means.examples import asked

GENES = ("g", "h", "i", "x", "y")


def knock_downs(*labels: str, left: float = 0.25, genes: GeneVocab | None = None) -> TrainingMeans:
    """All genes at expression 3.99, a target at the share `left` of 4, x raised to 8; one context."""
    n = len(labels)
    control = np.full((n, 5), 3.99)
    perturbed = control.copy()
    perturbed[:, 3] = 8
    for i, label in enumerate(labels):
        for name in label.split("+"):
            if name in GENES:
                perturbed[i, GENES.index(name)] = left * 4 - 0.01
    return TrainingMeans(
        list(labels), ["T"] * n, ["1"] * n, np.log1p(control), np.log1p(perturbed), np.ones(n),
        genes=genes or GeneVocab(GENES),
    )  # fmt: skip


def cells(seed: int | None = None, n: int = 40) -> np.ndarray:
    """Control cells whose genes vary together."""
    rng = np.random.default_rng(seed)
    return np.abs(rng.normal(size=(n, 3)) @ rng.normal(size=(3, 5)) + rng.normal(size=(n, 5)) + 3)


def test_the_target_gets_the_ratio_and_all_else_the_mean_of_the_others():
    training = knock_downs("g", "i")
    control = np.log1p([9.0, 1.99, 7.0, 1.0, 0.0])
    shift = own_target(training, asked("h", "T", "1", control))
    ratios = np.log1p([0.99, 3.99])
    in_g = (ratios[0] - ratios[1]) / 2  # one of the two lowers it
    expected = [in_g, np.log1p(1.99 / 4) - np.log1p(1.99), in_g, np.log1p(8) - np.log1p(3.99), 0.0]
    np.testing.assert_allclose(shift, expected, atol=1e-12)
    rest = [0, 2, 3, 4]
    np.testing.assert_array_equal(shift[rest], context_mean(training, asked("h", "T", "1", control))[rest])


def test_each_target_of_a_combination_is_lowered_and_an_absent_one_stays_absent():
    training = knock_downs("g", left=0.5)
    control = np.log1p([9.99, 6.0, 0.0, 1.0, 1.0])
    shift = own_target(training, asked("i+h+drug", "T", "1", control))
    np.testing.assert_allclose(shift[[1, 2]], [np.log1p(3.0) - np.log1p(6.0), 0.0], atol=1e-12)


def test_activation_raises_the_target_but_not_from_nothing():
    training = knock_downs("g", "h", left=3.0)
    shift = own_target(training, asked("i", "T", "1", np.log1p([1, 1, 2.0, 1, 1])))
    assert shift[2] == pytest.approx(np.log1p(6.0) - np.log1p(2.0))
    assert own_target(training, asked("i", "T", "1", np.log1p([1, 1, 0.0, 1, 1])))[2] == 0


def test_a_gene_has_its_own_ratio_and_a_cell_type_one_of_its_own_where_it_has_targets():
    down, up = knock_downs("g", "h"), knock_downs("i", "h", left=3.0)
    both = TrainingMeans(
        [*down.perturbation, *up.perturbation], ["down"] * 2 + ["up"] * 2, ["1"] * 4,
        np.concatenate([down.control_mean, up.control_mean]), np.concatenate([down.perturbed_mean, up.perturbed_mean]),
        np.ones(4), genes=GeneVocab(GENES),
    )  # fmt: skip
    both.perturbed_mean[0, 0] = np.log1p(4 * 0.5 - 0.01)  # g keeps half
    of_h = np.sqrt(0.25 * 3)  # elsewhere it is both, in the mean of logs
    everywhere = (0.5 * of_h * 3) ** (1 / 3)
    ratios = {
        "down": {"g": 0.5, "h": 0.25, "i": np.sqrt(0.5 * 0.25), "y": np.sqrt(0.5 * 0.25)},
        "up": {"g": 3, "h": 3, "i": 3, "y": 3},
        "new": {"g": 0.5, "h": of_h, "i": 3, "y": everywhere},
    }
    for cell_type, of_genes in ratios.items():
        for name, ratio in of_genes.items():
            alone = targets_alone(both, asked(name, cell_type, "1", np.log1p(np.full(5, 2.0))))
            expected = np.zeros(5)
            expected[GENES.index(name)] = np.log1p(2 * ratio) - np.log1p(2)
            np.testing.assert_allclose(alone, expected, atol=1e-12, err_msg=f"{name} {cell_type}")
    assert (targets_alone(both, asked("drug", "up", "1", np.ones(5))) == 0).all()


def test_only_parts_that_were_never_seen_get_the_change_of_others():
    training, control = knock_downs("g", "i+x"), np.log1p([4.0, 4, 4, 4, 4])
    shift = np.random.default_rng().normal(size=5)
    changed = with_unseen_targets(training, asked("h+x+drug", "T", "1", control), shift)
    expected = shift.copy()
    expected[1] = np.log1p(4 * np.exp(training.target_log_ratio(1, "T"))) - np.log1p(4)
    np.testing.assert_allclose(changed, expected)
    for seen in ("g", "i", "x", "g+i", "drug"):
        np.testing.assert_array_equal(with_unseen_targets(training, asked(seen, "T", "1", control), shift), shift)
    nobody = knock_downs("drug", "other")
    np.testing.assert_array_equal(with_unseen_targets(nobody, asked("h", "T", "1", control), shift), shift)


def test_symbols_name_targets_where_names_are_ids():
    ids = GeneVocab(tuple(f"ENSG{i}" for i in range(5)), symbols=GENES)
    control = cells(0)
    by_name, by_symbol = knock_downs("g", "i"), knock_downs("g", "i", genes=ids)
    for predictor in (own_target, covariance):
        context = asked("h", "T", "1", control)
        np.testing.assert_array_equal(predictor(by_symbol, context), predictor(by_name, context))


@pytest.mark.parametrize("predictor", [own_target, covariance])
def test_nothing_is_said_without_a_target_or_without_knock_downs(predictor):
    assert predictor(knock_downs("g", "i"), asked("drug", "T", "1", cells())) is None
    assert predictor(knock_downs("drug", "other"), asked("h", "T", "1", cells())) is None
    nameless = knock_downs("g", "i")
    nameless = TrainingMeans(
        nameless.perturbation, ["T"] * 2, ["1"] * 2, nameless.control_mean, nameless.perturbed_mean, np.ones(2)
    )
    assert predictor(nameless, asked("h", "T", "1", cells())) is None


def test_covariance_of_one_target_is_its_column_over_its_variance():
    training, control = knock_downs("g", "i"), cells()
    shift = covariance(training, asked("h", "T", "1", control))
    own = own_target(training, asked("h", "T", "1", control))[1]
    full = np.cov(control.T)
    np.testing.assert_allclose(shift, full[:, 1] / full[1, 1] * own, atol=1e-9)
    assert shift[1] == pytest.approx(own)
    # By hand: x is twice h, y does not vary with it.
    small = np.array([[1, 1, 1, 2, 1], [1, 2, 1, 4, 1], [1, 3, 1, 6, 1.0]])
    shift = covariance(training, asked("h", "T", "1", small))
    own = own_target(training, asked("h", "T", "1", small))[1]
    np.testing.assert_allclose(shift, [0, own, 0, 2 * own, 0], atol=1e-12)


def test_covariance_of_several_targets_gives_each_its_own_shift():
    training, control = knock_downs("g", "i"), cells()
    shift = covariance(training, asked("h+y", "T", "1", control))
    own = own_target(training, asked("h+y", "T", "1", control))[[1, 4]]
    full = np.cov(control.T)
    expected = full[:, [1, 4]] @ np.linalg.solve(full[np.ix_([1, 4], [1, 4])], own)
    np.testing.assert_allclose(shift, expected, atol=1e-8)
    np.testing.assert_allclose(shift[[1, 4]], own, atol=1e-8)


def test_targets_that_vary_as_one_are_no_division_by_zero():
    control = cells()
    control[:, 4] = control[:, 1]
    training = knock_downs("g", "i")
    shift = covariance(training, asked("h+y", "T", "1", control))
    np.testing.assert_allclose(shift, covariance(training, asked("h", "T", "1", control)), atol=1e-8)


def test_a_target_that_does_not_vary_says_nothing():
    training, control = knock_downs("g", "i"), cells().astype(np.float32)
    control[:, 1] = np.float32(0.1)
    assert covariance(training, asked("h", "T", "1", control)) is None
    assert covariance(training, asked("h+y", "T", "1", control)) is None
    assert own_target(training, asked("h", "T", "1", control)) is not None
    assert covariance(training, asked("y", "T", "1", control[:1])) is None  # one cell
