"""Loadings of genes on the principal components of expression: what is known of a gene from the cells it is seen in.

G = genes, F = components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, eigsh

from perturbdiff.config import DataConfig
from perturbdiff.data.h5ad import read_h5ad_parts
from perturbdiff.data.screen import read_expression
from perturbdiff.features.tables import FeatureTable

DENSE = 512  # cells or genes up to which all eigenvectors are computed: Lanczos is inexact where rank is lacking
NOISE = 1e-10  # of the largest eigenvalue: what rounding leaves of an eigenvalue that is 0


def coexpression_table(
    X: sparse.csr_matrix, genes: Sequence[str], n_components: int = 32, name: str = "coexpression"
) -> FeatureTable:
    """Loadings of genes on the principal components of standardised expression.

    Inner products of rows are gene-gene correlations, as well as F components can give them.

    Parameters
    ----------
    X
        (cells, G) log1p values, of training cells only. Never made dense where both sides are large.
    genes
        (G,) names.
    n_components
        F; at most min(cells, G) - 1. Components without variance are zero.

    Returns
    -------
    Rows of right singular vectors times singular values / sqrt(cells), largest first, each column with its largest
    entry positive; zeros for a gene that is constant over the cells. The same X gives the same table.
    """
    n_cells, n_genes = X.shape
    if len(genes) != n_genes or min(X.shape) < 2 or n_components < 1:
        raise ValueError(
            f"co-expression of X {X.shape} with {len(genes)} names and {n_components} components: it needs 2 cells, 2 "
            "genes, a name for each, and 1 component."
        )
    X = X.astype(np.float64)
    X.sum_duplicates()
    if not np.isfinite(X.data).all():
        raise ValueError("co-expression of values that are not finite; give log1p values.")
    mean = np.asarray(X.mean(axis=0)).ravel()
    varies = X.max(axis=0).toarray().ravel() > X.min(axis=0).toarray().ravel()
    zeros = n_cells - np.bincount(X.indices, minlength=n_genes)  # cells in which a gene has no value stored
    squares = np.bincount(X.indices, weights=np.square(X.data - mean[X.indices]), minlength=n_genes)
    variance = squares + zeros * np.square(mean)  # times cells
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)

    def by_cell(v: np.ndarray) -> np.ndarray:
        """A v, with A (cells, G) the standardised X / sqrt(cells); v (G, ...)."""
        scaled = (v.T * scale).T
        return X @ scaled - mean @ scaled

    def by_gene(u: np.ndarray) -> np.ndarray:
        """A' u; u (cells, ...)."""
        return ((X.T @ u - np.multiply.outer(mean, u.sum(axis=0))).T * scale).T

    n_components = min(n_components, min(X.shape) - 1)
    if n_genes <= n_cells:
        roots, vectors = largest_eigenvectors(lambda v: by_gene(by_cell(v)), n_genes, n_components)
        loadings = vectors * np.sqrt(roots)
    else:
        roots, vectors = largest_eigenvectors(lambda u: by_cell(by_gene(u)), n_cells, n_components)
        loadings = by_gene(vectors)
    loadings[:, roots <= NOISE * max(roots[0], NOISE)] = 0.0
    loadings[~varies] = 0.0
    return FeatureTable(name, tuple(genes), (loadings * signs(loadings)).astype(np.float32))


def loadings_of_file(path: str | Path, n_components: int = 64, min_cells: int = 10) -> FeatureTable:
    """Directions of the genes of an .h5ad in its principal components: what is known of a gene from other cells.

    Genes that are seen in few cells have no direction but noise.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_h5ad_parts`, `read_expression`; no two genes are in `min_cells` cells.
    """
    config = DataConfig(screen=str(path))
    expression = read_expression(*read_h5ad_parts(path), config.input_kind, config, str(path))
    seen = np.flatnonzero(expression.X.getnnz(axis=0) >= min_cells)
    if len(seen) < 2:
        raise ValueError(f"{path}: {len(seen)} genes are seen in {min_cells} cells or more; give more cells.")
    genes = expression.genes.select(seen)
    X = expression.with_genes(genes, seen).log1p()
    return coexpression_table(X, genes.names, n_components, Path(path).stem).directions()


def signs(loadings: np.ndarray) -> np.ndarray:
    """(F,) 1 or -1: with these, the largest entry of each column is positive."""
    size = np.abs(loadings)
    first = np.argmax(size >= (1 - 1e-6) * size.max(axis=0), axis=0)  # of entries that are equal but for rounding
    return np.where(np.take_along_axis(loadings, first[None], axis=0)[0] < 0, -1.0, 1.0)


def largest_eigenvectors(apply: Callable[[np.ndarray], np.ndarray], n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest eigenvalues, from the largest down, and eigenvectors (n, k) of a positive operator."""
    if n <= DENSE:
        roots, vectors = np.linalg.eigh(apply(np.eye(n)))
    else:
        operator = LinearOperator((n, n), matvec=apply, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(n)  # the same each time
        roots, vectors = eigsh(operator, k, v0=start, tol=1e-10)
    order = np.argsort(roots)[::-1][:k]
    return np.maximum(roots[order], 0.0), vectors[:, order]
