import numpy as np
import pytest
from scipy import sparse

from perturbdiff.features.coexpression import coexpression_table, loadings_of_file
from tests.screens import counts_screen, log1p_cp10k, written


def expression(n_cells, n_genes, seed=0):
    """Cells of a few programmes, counts and log1p, mostly zeros."""
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, 1, (n_cells, 4)) @ rng.gamma(0.3, 1, (4, n_genes))
    return np.log1p(rng.poisson(rates)).astype(np.float32)


def dense_correlations(X):
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.corrcoef(X.astype(float).T))


@pytest.mark.parametrize("shape", [(300, 20), (60, 90), (700, 600), (600, 700)])
def test_loadings_are_those_of_a_dense_svd(shape):
    X = expression(*shape)
    X[:, 3], X[:, 5] = 0.0, 0.7  # constant
    genes = [f"G{i}" for i in range(shape[1])]
    found = coexpression_table(sparse.csr_matrix(X), genes, 10)
    assert (found.name, found.names) == ("coexpression", tuple(genes))
    correlations = dense_correlations(X)
    roots, vectors = np.linalg.eigh(correlations)
    roots, vectors = roots[::-1][:10], vectors[:, ::-1][:, :10]
    best = (vectors * roots) @ vectors.T  # the nearest matrix of rank 10
    np.testing.assert_allclose(found.values.astype(float) @ found.values.T, best, atol=1e-5)
    np.testing.assert_allclose(np.square(found.values).sum(axis=0), roots, rtol=1e-4)
    np.testing.assert_allclose(np.abs(found.values[:, 0]), np.abs(vectors[:, 0]) * np.sqrt(roots[0]), atol=1e-4)
    assert (found.values[[3, 5]] == 0).all()
    assert (found.values.max(axis=0) >= -found.values.min(axis=0) - 1e-6).all()


def test_with_all_components_inner_products_are_correlations():
    X = expression(200, 15)
    found = coexpression_table(sparse.csr_matrix(X), [f"G{i}" for i in range(15)], 100)
    assert found.values.shape == (15, 14)
    rest = dense_correlations(X) - found.values.astype(float) @ found.values.T
    assert np.linalg.norm(rest, 2) < np.linalg.eigvalsh(dense_correlations(X))[0] + 1e-5
    few_cells = coexpression_table(sparse.csr_matrix(X[:6]), [f"G{i}" for i in range(15)], 100)
    assert few_cells.values.shape == (15, 5)
    np.testing.assert_allclose(few_cells.values @ few_cells.values.T, dense_correlations(X[:6]), atol=1e-5)


@pytest.mark.parametrize("shape", [(50, 30), (900, 600)])
def test_the_same_cells_give_the_same_bits_in_any_order_of_storage(shape):
    X = sparse.csr_matrix(expression(*shape))
    genes = [f"G{i}" for i in range(shape[1])]
    once = coexpression_table(X, genes, 8).values
    X_before = X.copy()
    np.testing.assert_array_equal(coexpression_table(X, genes, 8).values, once)
    assert (abs(X - X_before).max(), X.dtype) == (0, np.float32)
    halves = sparse.csr_matrix((np.repeat(X.data / 2, 2), np.repeat(X.indices, 2), 2 * X.indptr), shape)
    assert halves.nnz == 2 * X.nnz
    np.testing.assert_array_equal(coexpression_table(halves, genes, 8).values, once)


def test_components_without_variance_are_zero():
    rng = np.random.default_rng(0)
    one = rng.poisson(1.0, (40, 1)).astype(np.float32)
    X = sparse.csr_matrix(np.hstack([one, 2 * one, np.zeros((40, 3), np.float32), one.max() - one]))
    found = coexpression_table(X, list("abcdef"), 4).values
    np.testing.assert_allclose(found[:, 0], [1, 1, 0, 0, 0, -1], atol=1e-6)
    assert (found[:, 1:] == 0).all()
    nothing = coexpression_table(sparse.csr_matrix((5, 4), dtype=np.float32), list("abcd"), 2).values
    np.testing.assert_array_equal(nothing, np.zeros((4, 2)))


@pytest.mark.parametrize(
    ("X", "genes", "n"),
    [
        (np.ones((1, 3)), "abc", 2), (np.ones((3, 1)), "a", 2), (np.ones((3, 3)), "ab", 2), (np.ones((3, 3)), "abc", 0),
        (np.array([[np.nan, 1], [0, 1]]), "ab", 1), (np.eye(3), "aab", 1),
    ],
)  # fmt: skip
def test_expression_without_loadings_is_refused(X, genes, n):
    with pytest.raises(ValueError, match=r"co-expression|same name"):
        coexpression_table(sparse.csr_matrix(X), list(genes), n)


def test_loadings_of_a_file_are_directions_of_its_log1p_genes(tmp_path):
    adata = counts_screen(n_genes=60)
    X = adata.X.toarray()
    X[:, 7] = 0
    X[:3, 7] = 1  # seen in three cells
    adata.X = sparse.csr_matrix(X)
    made = loadings_of_file(written(adata, tmp_path / "ref.h5ad"), n_components=50, min_cells=10)
    seen = [i for i in range(60) if (X[:, i] > 0).sum() >= 10]
    assert 7 not in seen
    assert made.names == tuple(adata.var_names[seen])
    correlation = np.corrcoef(np.asarray(log1p_cp10k(adata.X))[:, seen].T)
    top = np.linalg.eigh(correlation)
    vectors = (
        top.eigenvectors[:, ::-1][:, : made.values.shape[1]]
        * np.sqrt(np.maximum(top.eigenvalues[::-1], 0))[: made.values.shape[1]]
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(made.values @ made.values.T, vectors @ vectors.T, atol=1e-4)


def test_loadings_need_genes_that_are_seen(tmp_path):
    with pytest.raises(ValueError, match="0 genes are seen in 100000 cells"):
        loadings_of_file(written(counts_screen(), tmp_path / "ref.h5ad"), min_cells=100_000)
