"""Values under one count of the control become one count or none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perturbdiff.data.batch import make_batch
from perturbdiff.data.samplers import CellSet
from perturbdiff.data.vocab import NULL, Labels
from perturbdiff.diffusion.counts import with_whole_counts
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
