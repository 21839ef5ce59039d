import numpy as np
import pytest
from scipy import sparse

from perturbdiff.config import DataConfig
from perturbdiff.data.gene_choice import GeneMoments, best_genes, squared_response
from perturbdiff.data.screen import Screen
from tests.screens import counts_screen, log1p_cp10k, real_screen


def moments_of(*parts):
    moments = GeneMoments(parts[0][0].shape[1])
    for X, measured in parts:
        moments.add(sparse.csr_matrix(X), measured)
    return moments


@pytest.mark.parametrize("seed", range(3))
def test_a_gene_varies_as_it_does_in_the_cells_that_measured_it(seed):
    rng = np.random.default_rng(seed)
    logged = log1p_cp10k(rng.poisson(rng.lognormal(0, 1, 100), (90, 100)) + 0.2)
    measured = rng.random((3, 100)) < 0.8
    measured[0] |= ~measured.any(axis=0)
    measured[:, 0] = False
    parts = [(rows, genes) for rows, genes in zip(np.split(logged, [20, 65]), measured, strict=True)]
    moments = moments_of(*parts)
    for i, (rows, genes) in enumerate(parts):
        parts[i] = np.where(genes, rows, np.nan)
    known = np.concatenate(parts)
    np.testing.assert_allclose(moments.variance()[1:], np.nanvar(known[:, 1:], axis=0), rtol=1e-9, atol=1e-12)
    assert moments.variance()[0] == 0


def test_each_score_names_its_best_genes_in_turn():
    one, two = np.array([5.0, 4, 3, 2, 1, 0]), np.array([0.0, 1, 2, 3, 4, 5])
    assert best_genes(2, one, two).tolist() == [0, 5]
    assert best_genes(4, one, two).tolist() == [0, 1, 4, 5]
    assert best_genes(3, one).tolist() == [0, 1, 2]
    assert best_genes(3, np.zeros(6)).tolist() == [0, 1, 2]  # of equal ones the first
    assert best_genes(9, one, two).tolist() == [0, 1, 2, 3, 4, 5]
    assert best_genes(3, two, np.zeros(6)).tolist() == [3, 4, 5]  # a score that knows nothing names none


def response_by_loops(adata, keep, by):
    logged, obs = log1p_cp10k(adata.X), adata.obs
    total = np.zeros(adata.n_vars)
    for labels, cells in obs[keep & (obs["perturbation"] != "control")].groupby(
        ["perturbation", "cell_type", "batch"], observed=True
    ):
        here = (obs["perturbation"] == "control") & keep
        for name, label in zip(("cell_type", "batch"), labels[1:], strict=True):
            here &= (obs[name] == label) if name in by else True
        own, control = logged[obs.index.isin(cells.index)], logged[here.to_numpy()]
        if len(own) > 1 and len(control) > 1:
            noise = own.var(axis=0, ddof=1) / len(own) + control.var(axis=0, ddof=1) / len(control)
            total += (own.mean(axis=0) - control.mean(axis=0)) ** 2 - noise
    return np.maximum(total, 0)


@pytest.mark.parametrize("by", ["batch", "cell_type"])
def test_the_squared_response_is_that_of_a_loop_over_conditions(by):
    adata = counts_screen(n_genes=30, n=7, seed=int(np.random.default_rng().integers(1 << 30)))
    keep = np.random.default_rng(1).random(len(adata)) < 0.7
    keep |= (adata.obs["perturbation"] == "control").to_numpy()
    screen = Screen.read(adata, DataConfig(screen="memory"))
    at = screen.obs.index.get_indexer(adata.obs_names)
    cells = np.zeros(len(screen), dtype=bool)
    cells[at] = keep
    expected = response_by_loops(adata, keep, {"cell_type", by})
    np.testing.assert_allclose(squared_response(screen, cells, by), expected, rtol=1e-4, atol=1e-4)


def test_there_is_no_response_without_perturbed_cells_or_of_single_ones():
    adata = counts_screen(n_genes=30, n=1)
    screen = Screen.read(adata, DataConfig(screen="memory"))
    assert (squared_response(screen, np.ones(len(screen), dtype=bool), "batch") == 0).all()
    assert (squared_response(screen, screen.is_control, "batch") == 0).all()


def test_genes_of_kang_that_are_kept_hold_its_response():
    screen = Screen.read(real_screen("kang2018_pbmc_ifnb.h5ad"), DataConfig(screen="kang"))
    train = np.ones(len(screen), dtype=bool)
    response, moments = squared_response(screen, train, "cell_type"), GeneMoments(len(screen.expression.genes))
    moments.add(screen.expression.log1p(train))
    for scores in ((moments.variance(),), (moments.variance(), response)):
        assert response[best_genes(2000, *scores)].sum() > 0.97 * response.sum()
