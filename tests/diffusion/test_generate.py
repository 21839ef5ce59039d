"""What is done to the denoiser's estimate before it is a predicted cell."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from perturbdiff.config import DiffusionConfig, SamplingConfig
from perturbdiff.data.batch import make_batch
from perturbdiff.data.samplers import CellSet
from perturbdiff.data.vocab import NULL, Labels
from perturbdiff.diffusion.counts import with_whole_counts
from perturbdiff.diffusion.draws import uniform_draws
from perturbdiff.diffusion.generate import choose_controls, sample_batch
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


def random_pool(n_cells=120, n_genes=40, seed=0):
    generator = np.random.default_rng(seed)
    X = generator.poisson(generator.gamma(0.3, 3, size=(n_cells, 1)) * generator.gamma(1, 1, size=n_genes))
    obs = pd.DataFrame({"perturbation": "control", "cell_type": "T", "batch": "b"}, index=map(str, range(n_cells)))
    X[:, 0] += 1  # no empty cell
    return read(anndata.AnnData(sparse.csr_matrix(X.astype(np.float32)), obs)).expression


@pytest.mark.parametrize("n_cells", [7, 60, 119])
def test_a_part_of_the_controls_has_their_mean(n_cells):
    pool = random_pool()
    X = pool.log1p().toarray().astype(float)
    chosen = choose_controls(pool, n_cells, 3, 0)
    assert len(set(chosen.tolist())) == n_cells
    off = np.linalg.norm(X[chosen].mean(0) - X.mean(0))
    random = [
        np.linalg.norm(X[np.random.default_rng(k).permutation(120)[:n_cells]].mean(0) - X.mean(0)) for k in range(50)
    ]
    assert off <= min(random) + 1e-12
    assert (choose_controls(pool, n_cells, 3, 0) == chosen).all()
    if n_cells < 119:
        assert set(choose_controls(pool, n_cells, 3, 1).tolist()) != set(chosen.tolist())


def test_the_spread_of_a_part_of_the_controls_is_theirs():
    pool = random_pool(300)
    X = pool.log1p().toarray().astype(float)
    ratios = [X[choose_controls(pool, 100, seed, 0)].var(0).sum() / X.var(0).sum() for seed in range(8)]
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("n_cells", [None, 120, 240, 250])
def test_every_control_is_used_before_one_is_used_again(n_cells):
    chosen = choose_controls(random_pool(), n_cells, 0, 0)
    uses = np.bincount(chosen, minlength=120)
    assert len(chosen) == (n_cells or 120)
    assert set(uses.tolist()) <= {len(chosen) // 120, -(-len(chosen) // 120)}


@pytest.mark.parametrize("p_self_cond", [0.0, 0.5])
def test_a_denoiser_that_never_saw_its_estimate_is_not_given_it(p_self_cond):
    batch, _, _ = batch_of(counts_screen(), [6])
    seen = []

    class Recorded(torch.nn.Module):
        def forward(self, x_t, t, control, cond, self_cond, *masks):
            seen.append(self_cond is not None)
            return control

    diffusion = DiffusionConfig(p_self_cond=p_self_cond)
    sample_batch(Recorded(), batch, SamplingConfig(n_steps=3), diffusion, 0)
    assert seen == [False, p_self_cond > 0, p_self_cond > 0]
