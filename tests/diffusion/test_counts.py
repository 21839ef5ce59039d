"""Values under one count of the control become one count or none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from perturbdiff.data.batch import make_batch
from perturbdiff.data.expression import overdispersion
from perturbdiff.data.samplers import CellSet
from perturbdiff.data.vocab import NULL, Labels
from perturbdiff.diffusion import counts as of_counts
from perturbdiff.diffusion.counts import draw_counts, with_whole_counts
from perturbdiff.diffusion.draws import uniform_draws
from tests.screens import counts_screen, log1p_cp10k, read

LABELS = Labels(torch.full((1, 1), NULL), torch.full((1,), NULL), torch.full((1,), NULL))


def rounded(x0, batch, seed):
    return with_whole_counts(x0, batch.one_count(), uniform_draws(batch, seed, "prediction counts"))


def batch_of(adata, sizes, set_size=6, **settings):
    """Sets whose cells and controls are the first rows, the next ones, ..."""
    screen = read(adata, **settings)
    starts = np.cumsum([0, *sizes])
    rows = [np.arange(start, start + n) for start, n in zip(starts, sizes, strict=False)]
    sets = [CellSet((0, i), 0, r, r) for i, r in enumerate(rows)]
    return make_batch(sets, set_size, screen.expression, LABELS), screen.expression, rows


@pytest.mark.parametrize("kind", ["counts", "log1p"])
def test_one_count_is_that_of_each_cells_depth(kind):
    adata = counts_screen()
    if kind == "log1p":
        adata.X = log1p_cp10k(adata.X)
    batch, expression, rows = batch_of(adata, [6, 4])
    one = batch.controls.one_count(2, 6, expression.preprocessing)
    for b, members in enumerate(rows):
        for s, row in enumerate(members):
            if kind == "counts":
                expected = np.log1p(1e4 / expression.library_size[row]) / 10
            else:
                values = expression.X[row].data
                expected = values[values > 0].min() / 10
            assert one[b, s].item() == pytest.approx(expected, rel=1e-5)
    assert not one[1, 4:].any()


@pytest.mark.parametrize("kind", ["counts", "log1p"])
def test_an_empty_control_has_no_count_and_its_cell_stays(kind):
    adata = counts_screen()
    X = adata.X.toarray() if kind == "counts" else np.asarray(log1p_cp10k(adata.X))
    X[:] = X * (np.arange(adata.n_obs) != 0)[:, None]
    adata.X = X
    batch, expression, _ = batch_of(adata, [6, 6, 6])
    one = batch.controls.one_count(3, 6, expression.preprocessing)
    empty = one == 0
    x0 = torch.full((3, 6, adata.n_vars), 1e-3)
    kept = rounded(x0, batch, 0)
    assert torch.equal(kept[empty], x0[empty])
    assert not torch.isclose(kept[~empty], x0[~empty]).any()


def test_small_values_become_a_count_or_none_and_keep_their_mean():
    batch, expression, _ = batch_of(counts_screen(n_genes=300), [6, 5])
    one = batch.controls.one_count(2, 6, expression.preprocessing)[..., None]
    share = torch.rand(2, 6, 300, generator=torch.Generator().manual_seed(0)) * 2
    x0 = share * one
    made = rounded(x0, batch, 7)
    small = (x0 < one) & batch.mask[..., None]
    assert torch.equal(made[~small], x0[~small])
    is_count = torch.isclose(made, one.expand_as(made))
    assert (is_count | (made == 0))[small].all()
    p = share[small].double()
    hits, sd = is_count[small].double().sum(), (p * (1 - p)).sum().sqrt()
    assert abs(hits - p.sum()) < 5 * sd
    assert ((made > 0) <= (x0 > 0)).all()  # nothing comes of nothing


def test_a_sets_counts_do_not_depend_on_its_neighbours():
    adata = counts_screen(n_genes=50)
    both, _, _ = batch_of(adata, [6, 6])
    alone, _, _ = batch_of(adata, [6])
    x0 = torch.rand(2, 6, 50, generator=torch.Generator().manual_seed(0)) * 0.1
    assert torch.equal(rounded(x0, both, 3)[:1], rounded(x0[:1], alone, 3))
    assert not torch.equal(rounded(x0, both, 3), rounded(x0, both, 4))


def drawn(estimate, control, one, phi=None, seed=0, evenly=False):
    return draw_counts(estimate, control, one, phi, seed, (0, 1), evenly)


def depths(n, seed=0):
    return np.random.default_rng(seed).integers(500, 5000, n)


def log1p_of(counts, depth):
    return np.log1p(counts * (1e4 / depth)[:, None])


def test_cells_that_hold_whole_counts_stay_as_they_are():
    depth = depths(40)
    counts = np.random.default_rng(1).poisson(np.linspace(0, 400, 30), (40, 30))
    cells = log1p_of(counts, depth).astype(np.float32).astype(float)
    one = np.log1p(1e4 / depth)
    np.testing.assert_array_equal(drawn(cells, cells, one, np.ones(30)), counts)


def test_values_between_counts_become_one_of_them_and_keep_their_mean():
    depth, rng = depths(400), np.random.default_rng(2)
    estimate = rng.uniform(0, 4, (400, 20)) * (rng.random((400, 20)) < 0.8)
    counts = np.stack([drawn(estimate, estimate, np.log1p(1e4 / depth), seed=seed) for seed in range(100, 120)])
    assert (counts == np.rint(counts)).all()
    assert (counts >= 0).all()
    below = np.floor(np.expm1(estimate) * depth[:, None] / 1e4 + 1e-6)
    assert np.isin(counts - below, [0, 1]).all()
    np.testing.assert_allclose(
        np.mean([log1p_of(of, depth).mean(axis=0) for of in counts], axis=0), estimate.mean(axis=0), atol=0.02
    )


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_cells_that_stand_for_a_mean_have_it_and_each_its_own_chance(n):
    """Drawn together, the mean of a gene is off by less than one count of one cell; each cell is as often one more."""
    depth, rng = depths(n), np.random.default_rng(3)
    one = np.log1p(1e4 / depth)
    estimate = rng.uniform(0, 3, (n, 20)) * (rng.random((n, 20)) < 0.8)
    below = np.floor(np.expm1(estimate) * depth[:, None] / 1e4 + 1e-6)
    low, high = log1p_of(below, depth), log1p_of(below + 1, depth)
    more, off = np.zeros(estimate.shape), []
    for seed in range(2000):
        counts = drawn(estimate, estimate, one, seed=seed, evenly=True)
        assert np.isin(counts - below, [0, 1]).all()
        assert np.abs((counts - below - (estimate - low) / (high - low)).sum(axis=0)).max() < 1 + 1e-9
        more += counts - below
        off.append(log1p_of(counts, depth).mean(axis=0) - estimate.mean(axis=0))
    np.testing.assert_allclose(more / 2000, (estimate - low) / (high - low), atol=0.06)
    apart = [log1p_of(drawn(estimate, estimate, one, seed=seed), depth).mean(axis=0) for seed in range(2000)]
    noise = np.sqrt(np.mean((np.array(apart) - estimate.mean(axis=0)) ** 2))
    assert np.sqrt(np.mean(np.square(off))) < noise * {1: 1.05, 2: 0.95, 7: 0.75, 60: 0.5}[n]


@pytest.mark.parametrize("phi", [0.0, 0.3, 2.0])
def test_a_gene_that_responds_has_the_spread_of_counts_and_the_mean_of_the_estimates(phi):
    n, rate = 256, np.array([1e-3, 3e-3, 3e-2])
    rng, depth = np.random.default_rng(3), np.full(256, 2000)
    control = log1p_of(rng.poisson(0.02 * 2000 * rate, (n, 3)), depth)
    goal = np.mean([log1p_of(rng.negative_binomial(1 / max(phi, 1e-6), 1 / (1 + 2000 * rate * max(phi, 1e-6)), (n, 3)),
                             depth).mean(axis=0) for _ in range(20)], axis=0)  # fmt: skip
    estimate = control + goal - control.mean(axis=0)  # two humps
    one, counts = np.log1p(1e4 / depth), []
    for seed in range(8):
        counts.append(drawn(estimate, control, one, np.full(3, phi), seed=seed))
        np.testing.assert_allclose(log1p_of(counts[-1], depth).mean(axis=0), goal, atol=0.08)
    mean, variance = np.mean(counts, axis=(0, 1)), np.mean([of.var(axis=0) for of in counts], axis=0)
    np.testing.assert_allclose(mean, 2000 * rate, rtol=0.15)
    np.testing.assert_allclose(variance, mean + phi * mean**2, rtol=0.35)


@pytest.mark.parametrize("phi", [0.001, 0.2, 1.0, 5.0])
@pytest.mark.parametrize("depth", [300, 3000, 40_000])
def test_a_rate_is_the_one_at_which_negative_binomial_counts_have_the_mean(phi, depth):
    goal, deep = np.array([0.05, 0.6, 1.5, 3.0, 5.0]), np.random.default_rng(0).uniform(0.5, 1.5, 20) * depth
    rising = np.tile(of_counts._rising(phi), (5, 1))
    rates = of_counts._rates(goal, 1e4 / deep, rising)
    for rate, wanted in zip(rates, goal, strict=True):
        found = []
        for d in deep:
            mean = rate * d / 1e4
            n, p = 1 / phi, 1 / (1 + phi * mean)
            many = np.geomspace(200, 60 * mean * (1 + 5 * phi) + 300, 4000)
            k = np.unique(np.concatenate([np.arange(200), many]).astype(int))
            upto = stats.nbinom.cdf(k, n, p)
            found.append(np.sum(np.diff(upto, prepend=0) * np.log1p(k * 1e4 / d)))
        assert np.mean(found) == pytest.approx(wanted, abs=0.02)


def test_quantiles_are_those_of_poisson_counts():
    mean = np.array([1e-4, 0.3, 2.0, 5.9, 6.1, 15.0, 80.0, 5e3])[:, None]
    part = (np.arange(2000) + 0.5) / 2000
    expected = stats.poisson.ppf(part, mean)
    found = of_counts._poisson_quantile(np.broadcast_to(part, expected.shape), mean)
    assert (np.abs(found - expected) <= 1).all()
    assert (found != expected).mean() < 0.005
    rare = np.array([0.0, 1e-15, 1e-9, 1e-6, 1 - 1e-6, 1 - 1e-9, 1.0])
    for of in mean:
        found = of_counts._poisson_quantile(rare, of)
        assert (found >= 0).all()
        assert (found[-3:-1] <= stats.poisson.ppf(1 - 1e-12, of)).all()
        assert np.isfinite(found).all()


@given(st.integers(0, 2**31), st.integers(1, 70), st.sampled_from([200, 2000, 50_000]), st.floats(0, 60))
@settings(deadline=None)
def test_counts_are_finite_whole_and_not_negative(seed, n, depth, most):
    rng = np.random.default_rng(seed)
    estimate, control = rng.uniform(-1, most, (n, 30)), rng.uniform(0, 3, (n, 30))
    phi = rng.choice([0, 1e-9, 0.3, 5, 1e6], 30)
    counts = drawn(estimate, control, np.log1p(1e4 / rng.integers(depth // 2, depth, n)), phi, seed)
    assert np.isfinite(counts).all()
    assert (counts == np.rint(counts)).all()
    assert (counts >= 0).all()


def test_draws_of_a_gene_do_not_depend_on_which_others_respond():
    rng, depth = np.random.default_rng(8), depths(32)
    control, one = np.zeros((32, 6)), np.log1p(1e4 / depth)
    estimate = rng.uniform(1, 3, (32, 6))
    calm = estimate.copy()
    calm[:, [0, 2]] = 0
    counts = drawn(estimate, control, one, np.ones(6))
    np.testing.assert_array_equal(drawn(calm, control, one, np.ones(6))[:, [1, 3, 4, 5]], counts[:, [1, 3, 4, 5]])


def test_cells_that_are_far_along_are_so_in_all_genes():
    rng, depth = np.random.default_rng(4), np.full(200, 3000)
    far = rng.uniform(0, 3, 200)
    control = np.zeros((200, 5))
    estimate = 2 + far[:, None] + rng.normal(0, 0.1, (200, 5))
    counts = drawn(estimate, control, np.log1p(1e4 / depth), np.full(5, 0.8))
    assert (np.corrcoef(counts.T)[np.triu_indices(5, 1)] > 0.7).all()


@pytest.mark.parametrize(("n", "genes"), [(1, 1), (1, 5), (3, 1), (5, 0)])
@pytest.mark.parametrize("level", [0.0, 3.0])
def test_small_sets_are_drawn(n, genes, level):
    counts = drawn(np.full((n, genes), level), np.zeros((n, genes)), np.ones(n), np.ones(genes))
    assert counts.shape == (n, genes)
    assert np.isfinite(counts).all()
    assert level > 0 or not counts.any()


def test_overdispersion_is_that_of_the_counts():
    rng, n = np.random.default_rng(6), 4000
    rate, phi = np.array([2e-3, 1e-2, 5e-2, 0.0]), np.array([0.0, 0.5, 2.0, 1.0])
    parts = []
    for fold in (1.0, 3.0):  # the mean of a part is its own
        depth = rng.integers(1000, 6000, n)
        level = rng.gamma(1 / np.maximum(phi, 1e-9), np.maximum(phi, 1e-9), (n, 4)) * fold * rate * depth[:, None]
        parts.append((sparse.csr_matrix(log1p_of(rng.poisson(level), depth)), np.log1p(1e4 / depth)))
    np.testing.assert_allclose(overdispersion(parts, 4), [0, 0.5, 2.0, 0], atol=0.05, rtol=0.15)
    nothing = sparse.csr_matrix((3, 4))
    assert not overdispersion([(nothing, np.zeros(3))], 4).any()
    assert overdispersion([(nothing, np.zeros(3)), *parts], 4) == pytest.approx(overdispersion(parts, 4))
    assert not overdispersion([(sparse.csr_matrix(np.ones((1, 4))), np.ones(1))], 4).any()  # of one cell
