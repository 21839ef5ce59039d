"""Genes with terms as dense vectors: principal components of which terms they have.

n = genes, T = terms, F = components.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from perturbdiff.features.annotations import Annotations
from perturbdiff.features.coexpression import DENSE, NOISE, largest_eigenvectors, signs
from perturbdiff.features.tables import FeatureTable
from perturbdiff.files import few

LEAST = 0.05  # of a gene's squared length that components of other genes must hold, so that they say something of it


def component_table(
    known: Annotations, n_components: int, name: str, perturbed: Sequence[str] | None = None
) -> FeatureTable:
    """Components of the genes' terms, each term weighted by log(n / genes that have it), each gene of length 1.

    Inner products of rows are cosines of the genes, as well as F components can give them.

    Parameters
    ----------
    n_components
        F; fewer where there are no more.
    perturbed
        Genes whose likenesses matter: components are theirs, and exact where they are no more than F. Others get their
        part in these components; those that have less than LEAST of their squared length there share next to nothing
        with any of these and are left out. A gene that only its alias is known by gets a row of that name. Without,
        components are those of all genes.

    Raises
    ------
    ValueError
        No gene of `perturbed` is known; F under 1; all genes have the same terms.
    """
    if n_components < 1:
        raise ValueError(f"--n-components ({n_components}) must be at least 1.")
    genes, X = known.genes, _weighted(known.has)
    if perturbed is not None:
        position = {gene: i for i, gene in enumerate(genes)}
        row = {name: position[known.aliases.get(name, name)] for name in perturbed if _in(known, position, name)}
        if not row:
            raise ValueError(f"none of {few(list(perturbed))} is among its {len(genes):,} genes; names or symbols?")
        renamed = {name: i for name, i in row.items() if genes[i] != name}
        genes, X = (*genes, *renamed), X[[*range(len(genes)), *renamed.values()]]
        basis = _basis(X[sorted(set(row.values()))], n_components)
    else:
        basis = _basis(X, n_components)
    if not basis.shape[1]:
        raise ValueError(f"its {len(known.terms):,} terms tell no genes apart: those that have any have all of them.")
    values = np.asarray(X @ basis)
    if perturbed is not None:
        stay = np.flatnonzero(np.square(values).sum(axis=1) >= LEAST)
        genes, values = tuple(genes[i] for i in stay), values[stay]
    return FeatureTable(name, tuple(genes), (values * signs(values)).astype(np.float32), known.about)


def _in(known: Annotations, position: dict[str, int], name: str) -> bool:
    return known.aliases.get(name, name) in position


def _weighted(has: sparse.csr_matrix) -> sparse.csr_matrix:
    """(n, T) rows of length 1; those without a term that tells genes apart are zeros."""
    n = np.asarray(has.sum(axis=0)).ravel()
    X = sparse.csr_matrix(has.astype(np.float64) @ sparse.diags(np.log(has.shape[0] / n)))
    length = np.sqrt(np.asarray(X.multiply(X).sum(axis=1)).ravel())
    scale = np.divide(1.0, length, out=np.zeros(len(length)), where=length > 0)
    return sparse.csr_matrix(sparse.diags(scale) @ X)


def _basis(X: sparse.csr_matrix, n_components: int) -> np.ndarray:
    """(T, F) orthonormal right singular vectors of X, those of the largest singular values."""
    n, width = X.shape
    k = min(n_components, n, width, max(DENSE, min(n, width) - 1))  # of more, not all can be had
    if width <= n:
        roots, vectors = largest_eigenvectors(lambda v: X.T @ (X @ v), width, k)
    else:
        roots, vectors = largest_eigenvectors(lambda u: X @ (X.T @ u), n, k)
        vectors = np.asarray(X.T @ vectors) / np.sqrt(np.maximum(roots, np.finfo(float).tiny))
    return vectors[:, roots > NOISE * roots[0]]
