"""Draws of how batches differ, against covariances that are known, and what is drawn for which control cells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perturbdiff.means.populations import (
    NOT_KNOWN,
    OF_BATCHES,
    OF_ITS_BATCH,
    OF_RESPONSES,
    population_draws,
)
from perturbdiff.means.training import TrainingMeans
from perturbdiff.means.variation import BatchVariation
from tests.means.examples import training_means

A, B, C = ((("A", None),), (("B", None),), (("C", None),))
MANY = 4096


def loop_covariance(groups: list[np.ndarray]) -> np.ndarray:
    """Of values (m, G) of several groups around their own means, by a double loop."""
    genes, free = groups[0].shape[1], sum(len(group) - 1 for group in groups)
    total = np.zeros((genes, genes))
    for group in groups:
        for value in group:
            residual = value - group.mean(axis=0)
            total += np.outer(residual, residual)
    return total / free


def test_without_noise_draws_have_the_covariance_of_batches_around_the_means_of_their_cell_types() -> None:
    rng = np.random.default_rng()
    mean = rng.normal(size=(9, 5))
    types = ["T"] * 5 + ["NK"] * 4
    variation = BatchVariation([A] * 9, types, mean, np.zeros((9, 5)))
    expected = loop_covariance([mean[:5], mean[5:]])
    drawn = variation.draw(A, MANY, seed=1)
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.05 * np.abs(expected).max())
    np.testing.assert_allclose(variation.variance(A), np.diag(expected))
    np.testing.assert_allclose(drawn.mean(axis=0), 0, atol=0.05)


def test_the_noise_of_finitely_many_cells_is_taken_off_without_bias() -> None:
    rng, found = np.random.default_rng(), []
    true = np.array([4.0, 1.0, 0.5])
    for _ in range(300):
        noise = rng.uniform(0.2, 1.0, size=(30, 3))
        mean = rng.normal(size=(30, 3)) * np.sqrt(true) + rng.normal(size=(30, 3)) * np.sqrt(noise)
        found.append(BatchVariation([A] * 30, ["T", "NK"] * 15, mean, noise).variance(A))
    standard_error = np.std(found, axis=0) / np.sqrt(len(found))
    assert (np.abs(np.mean(found, axis=0) - true) < 4 * standard_error + 0.01 * true).all()


def test_genes_that_vary_no_more_than_their_noise_are_not_drawn() -> None:
    mean = np.array([[1.0, 0.0], [3.0, 0.2]])
    variation = BatchVariation([A, A], ["T", "T"], mean, np.array([[0.1, 5.0], [0.1, 5.0]]))
    drawn = variation.draw(A, 8, seed=0)
    assert (drawn[:, 1] == 0).all()
    assert (drawn[:, 0] != 0).all()


def test_few_batches_lean_on_all_perturbations_as_far_as_these_are_alike() -> None:
    rng = np.random.default_rng(0)
    scale = {A: 1.0, B: 1.0, C: 1.0}
    labels = [parts for parts in scale for _ in range(40)]
    alike = BatchVariation(labels, ["T"] * 120, rng.normal(size=(120, 200)), np.zeros((120, 200)))
    assert max(alike.weight.values()) < 0.2
    factors = np.concatenate([np.full((40, 1), size) for size in (0.1, 1.0, 4.0)])
    unlike = BatchVariation(labels, ["T"] * 120, factors * rng.normal(size=(120, 200)), np.zeros((120, 200)))
    assert min(unlike.weight.values()) > 0.8
    values = factors[38:] * rng.normal(size=(82, 200))
    few = BatchVariation([A, A, *labels[40:]], ["T"] * 82, values, np.zeros((82, 200)))
    assert few.weight[A] < few.weight[B]  # of a variance of one degree of freedom little is known
    new = (("new", None),)
    between = [unlike.variance(parts).mean() for parts in scale]
    assert between[0] < unlike.variance(new).mean() < between[2]


def test_draws_are_of_a_seed_and_their_number_alone_and_lie_evenly() -> None:
    rng = np.random.default_rng()
    mean = rng.normal(size=(12, 6))
    variation = BatchVariation([A] * 12, ["T"] * 12, mean, np.zeros((12, 6)))
    many = variation.draw(A, 33, seed=5)
    np.testing.assert_allclose(variation.draw(A, 3, seed=5), many[:3], atol=1e-12)
    np.testing.assert_allclose(variation.draw(A, 1, seed=5), many[:1], atol=1e-12)
    assert np.abs(variation.draw(A, 3, seed=6) - many[:3]).max() > 1e-3
    off = [np.square(variation.draw(A, 16, seed).mean(axis=0)).sum() for seed in range(20)]
    assert np.mean(off) < 0.2 * variation.variance(A).sum() / 16  # of independent ones, all of it


def test_more_batches_than_genes_and_more_genes_than_batches_draw_alike() -> None:
    rng = np.random.default_rng()
    mean = rng.normal(size=(4, 3))
    wide = np.concatenate([mean, np.zeros((4, 20))], axis=1)  # genes that do not vary
    one, other = (BatchVariation([A] * 4, ["T"] * 4, m, np.zeros(m.shape)) for m in (mean, wide))
    drawn = other.draw(A, MANY, seed=2)
    assert (drawn[:, 3:] == 0).all()
    np.testing.assert_allclose(np.cov(one.draw(A, MANY, seed=2).T), np.cov(drawn[:, :3].T), atol=0.1 * mean.var())


@pytest.mark.parametrize("genes", [1, 4])
def test_one_batch_tells_nothing_and_says_so(genes: int) -> None:
    variation = BatchVariation([A, A, B], ["T", "NK", "T"], np.ones((3, genes)), np.zeros((3, genes)))
    assert not variation.known
    with pytest.raises(ValueError, match="no perturbation has two batches of a cell type"):
        variation.draw(A, 2, seed=0)


def test_batches_that_are_alike_draw_zeros() -> None:
    variation = BatchVariation([A, A], ["T", "T"], np.zeros((2, 3)), np.zeros((2, 3)))
    assert (variation.draw(A, 4, seed=0) == 0).all()


# ---------------------------------------------------------------- for which control cells


def trained(noise: bool = True) -> TrainingMeans:
    conditions = [(p, "T", b) for p in ("A", "B") for b in ("1", "2", "3")] + [("A", "NK", "1")]
    means = training_means(conditions)
    zeros = np.full(means.effect.shape, 1e-9)
    known = zeros if noise else None
    return replace(means, control_noise=known, perturbed_noise=known)


def test_of_a_trained_batch_nothing_is_drawn_and_of_a_new_one_how_responses_differ() -> None:
    means = trained()
    own = population_draws(means, A, "T", {"2"}, {"1", "2", "3"}, 4, 0)
    assert (own.how, own.of_population) == (OF_ITS_BATCH, None)
    new = population_draws(means, A, "T", {"9"}, {"1", "2", "3"}, MANY, 0)
    assert (new.how, new.effect) == (OF_RESPONSES, None)
    assert means.effect_variation is not None
    np.testing.assert_allclose(np.var(new.of_population, axis=0), means.effect_variation.variance(A), rtol=0.05)
    unknown = population_draws(means, A, "T", {"2"}, set(), 4, 0)  # a model without batches does not know its own
    assert unknown.how == OF_RESPONSES
    other_type = population_draws(means, B, "NK", {"1"}, {"1"}, 4, 0)
    assert other_type.how == OF_RESPONSES


@pytest.mark.parametrize("batches", [{"1", "2"}, {None}, {None, "1"}])
def test_of_several_batches_or_none_perturbed_cells_differ_around_the_mean_of_trained_ones(batches: set) -> None:
    means = trained()
    found = population_draws(means, A, "T", batches, {"1", "2", "3"}, MANY, 0)
    assert found.how == OF_BATCHES
    np.testing.assert_allclose(found.effect, means.effect[:3].mean(axis=0))
    assert means.perturbed_variation is not None
    between = means.perturbed_variation.variance(A)
    np.testing.assert_allclose(np.var(found.of_population, axis=0), between, rtol=0.05, atol=1e-4)
    of_cells = (means.n_cells[:3, None] * np.full((3, len(between)), 1e-9)).mean(axis=0)
    np.testing.assert_allclose(np.square(found.within), of_cells / (of_cells + between))
    never = population_draws(means, C, "T", batches, set(), 2, 0)  # no mean of its own is known
    assert (never.how, never.effect) == (OF_BATCHES, None)
    assert np.abs(never.of_population).max() > 0


def test_models_that_do_not_know_say_so() -> None:
    one_batch = training_means([("A", "T", "1"), ("B", "T", "1")])
    zeros = np.zeros(one_batch.effect.shape)
    for means in (None, trained(noise=False), replace(one_batch, control_noise=zeros, perturbed_noise=zeros)):
        found = population_draws(means, A, "T", {None}, set(), 2, 0)
        assert (found.how, found.of_population) == (NOT_KNOWN, None)


def test_genes_that_were_not_measured_do_not_differ() -> None:
    found = population_draws(trained(), A, "T", {None}, set(), 4, 0)
    genes = np.arange(found.of_population.shape[1]) != 2
    some = found.of_genes(genes)
    assert (some.of_population[:, 2] == 0).all()
    np.testing.assert_array_equal(some.of_population[:, genes], found.of_population[:, genes])


@pytest.mark.parametrize("noise", [np.full((2, 3), -1.0), np.full((2, 3), np.nan), np.zeros((2, 4))])
def test_noise_that_cannot_be_is_refused(noise: np.ndarray) -> None:
    two = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"perturbed_noise .* must be variances, finite and not negative"):
        TrainingMeans(["A", "B"], ["T", "T"], ["1", "1"], two, two, np.ones(2), perturbed_noise=noise)
