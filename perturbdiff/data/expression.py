"""Expression matrices: cells by row, normalisation, and highly variable genes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from perturbdiff.config import Preprocessing
from perturbdiff.data.vocab import GeneVocab

ONE_COUNT = "one_count"  # obs column: the log1p value of a single count in a predicted cell


@dataclass(frozen=True)
class CellRows:
    """Some cells in CSR form.

    indptr, genes, values
        CSR over the n cells, genes sorted within a cell; values are counts (uint16, uint32) or log1p values (float32).
    library_size
        (n,) float32 total counts per cell; ones for log1p values.
    """

    indptr: np.ndarray
    genes: np.ndarray
    values: np.ndarray
    library_size: np.ndarray

    @classmethod
    def concat(cls, parts: Sequence[CellRows]) -> CellRows:
        """The cells of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([np.diff(part.indptr) for part in parts])
        return cls(
            np.concatenate([[0], np.cumsum(lengths)]),
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("genes", "values", "library_size")),
        )


class Cells(Protocol):
    """Cells by row number, wherever they lie: in memory or in an atlas."""

    @property
    def genes(self) -> GeneVocab: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    def take(self, rows: np.ndarray) -> CellRows:
        """The cells of these rows, in this order; a row may come twice."""


@dataclass(frozen=True)
class ConcatenatedCells:
    """Cells of several sources under one numbering: the first part's rows, then the second's, ..."""

    parts: tuple[Cells, ...]
    ends: np.ndarray  # rows up to and with each part

    @classmethod
    def concatenate(cls, parts: Sequence[Cells], n_cells: Sequence[int]) -> ConcatenatedCells:
        """Parts with the same genes and preprocessing, and how many cells each has."""
        return cls(tuple(parts), np.cumsum(n_cells))

    @property
    def genes(self) -> GeneVocab:
        return self.parts[0].genes

    @property
    def preprocessing(self) -> Preprocessing:
        return self.parts[0].preprocessing

    def take(self, rows: np.ndarray) -> CellRows:
        """As `Cells.take`."""
        part = np.searchsorted(self.ends, rows, "right")
        borders = np.flatnonzero(np.diff(part)) + 1
        taken = []
        for stretch in np.split(np.arange(len(rows)), borders) if len(rows) else [np.arange(0)]:
            of = int(part[stretch[0]]) if len(stretch) else 0
            taken.append(self.parts[of].take(rows[stretch] - (int(self.ends[of - 1]) if of else 0)))
        return CellRows.concat(taken)


def as_csr(matrix: Any) -> sparse.csr_matrix:
    """X of an AnnData, dense, CSR or CSC, as CSR with sorted indices and no stored zeros.

    Raises
    ------
    ValueError
        Not a matrix of numbers, or a sparse one whose indices lead outside of it.
    """
    if not (isinstance(matrix, np.ndarray) or sparse.issparse(matrix)):
        raise ValueError(
            f"X is a {type(matrix).__name__}; it must be a dense, CSR or CSC matrix in memory (AnnData: to_memory())."
        )
    if matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
        raise ValueError(
            f"X has {matrix.ndim} dimensions and type {matrix.dtype}; it must be a dense, CSR or CSC matrix of "
            "numbers, cells by genes."
        )
    if matrix.dtype == np.float16:  # scipy has no sparse matrices of it
        matrix = matrix.astype(np.float32)
    if sparse.issparse(matrix) and matrix.format in ("csr", "csc"):
        try:  # scipy trusts indices: with a bad one it reads and writes outside of the arrays
            type(matrix)(matrix).check_format(full_check=True)
        except ValueError as error:
            raise ValueError(f"X is a damaged sparse matrix ({error}); get or write the file again.") from error
    csr = sparse.csr_matrix(matrix)
    if not csr.has_canonical_format or not csr.data.all():
        csr = csr.copy()  # the caller's arrays stay as they are
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return csr


def library_sizes(X: sparse.csr_matrix) -> np.ndarray:
    """Total counts per cell over all genes of X, (n_cells,) float32."""
    return np.asarray(X.sum(axis=1, dtype=np.float64)).ravel().astype(np.float32)


def gene_means(X: sparse.csr_matrix) -> np.ndarray:
    """(G,) float64 means over cells."""
    return np.asarray(X.mean(axis=0, dtype=np.float64)).ravel()


def gene_moments(X: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray, int]:
    """(G,) mean of cells, (G,) variance between them (unbiased; 0 of a single one), how many they are."""
    n, mean, exact = X.shape[0], gene_means(X), X.astype(np.float64)
    variance = np.maximum(gene_means(exact.multiply(exact)) - mean**2, 0.0) * (n / max(n - 1, 1))
    return mean, variance, n


def noise_of_means(variance: np.ndarray, n_cells: np.ndarray) -> np.ndarray | None:
    """(k, G) variance of k means. That of a single cell is the mean of the others'; None if all are single."""
    several = n_cells > 1
    if not several.any():
        return None
    between = np.where(several[:, None], variance, variance[several].mean(axis=0))
    noise: np.ndarray = between / n_cells[:, None]
    return noise


def log1p_normalised(X: sparse.csr_matrix, library_size: np.ndarray, preprocessing: Preprocessing) -> sparse.csr_matrix:
    """log1p(count * target_sum / library_size), float32; log1p input is returned as it is. No division by scale."""
    if preprocessing.input_kind == "log1p":
        return X.astype(np.float32)
    assert preprocessing.target_sum is not None, "counts are normalised to a number"
    per_cell = np.divide(
        preprocessing.target_sum, library_size, out=np.zeros(len(library_size)), where=library_size > 0
    )
    values = np.log1p(X.data * np.repeat(per_cell, np.diff(X.indptr))).astype(np.float32)
    return sparse.csr_matrix((values, X.indices, X.indptr), shape=X.shape)


def one_count(cells: CellRows, preprocessing: Preprocessing) -> np.ndarray:
    """(n,) float64 log1p value of a single count in some cells; 0 in empty ones.

    Of log1p values, whose library sizes nobody knows, the smallest one that a cell has.
    """
    if preprocessing.input_kind == "counts":
        size = cells.library_size.astype(np.float64)
        return np.log1p(np.divide(preprocessing.target_sum or 0.0, size, out=np.zeros(len(size)), where=size > 0))
    filled, least = np.diff(cells.indptr) > 0, np.zeros(len(cells.indptr) - 1)
    least[filled] = np.minimum.reduceat(cells.values, cells.indptr[:-1][filled]) if filled.any() else 0.0
    return least


def counts_of(log1p: sparse.csr_matrix, one: np.ndarray) -> sparse.csr_matrix:
    """(n, G) float32 whole counts of log1p values, of which (n,) `one` is a single count; 0 in cells where it is 0."""
    unit = np.repeat(np.expm1(np.asarray(one, dtype=np.float64)), np.diff(log1p.indptr))
    counts = np.divide(np.expm1(log1p.data.astype(np.float64)), unit, out=np.zeros(len(unit)), where=unit > 0)
    return sparse.csr_matrix((np.rint(counts).astype(np.float32), log1p.indices, log1p.indptr), log1p.shape)


def overdispersion(parts: Iterable[tuple[sparse.csr_matrix, np.ndarray]], n_genes: int) -> np.ndarray:
    """(G,) variance of counts beyond that of Poisson, as a part of the squared mean; at least 0.

    Parameters
    ----------
    parts
        Cells whose means differ from part to part, one part at a time: (n, G) log1p values and (n,) `one_count`.

    Notes
    -----
    By moments, phi = sum((c - m)^2 - m) / sum(m^2) over all cells, m = a part's rate times a cell's depth: the parts
    with the most expression count most. Depths are known but for a factor a part, which is all that is needed.
    """
    excess = square = np.zeros(n_genes)
    for log1p, one in parts:
        unit = np.expm1(one)
        depth = np.divide(1.0, unit, out=np.zeros(len(unit)), where=unit > 0)
        if not depth.any():
            continue
        counts = sparse.csr_matrix((np.expm1(log1p.data.astype(np.float64)), log1p.indices, log1p.indptr), log1p.shape)
        counts = sparse.diags_array(depth) @ counts
        total, of_depth = (np.asarray(counts.T @ weights) for weights in (np.ones(len(depth)), depth))
        rate, squares = total / depth.sum(), np.asarray(counts.multiply(counts).sum(axis=0)).ravel()
        expected = rate**2 * (depth**2).sum()
        excess = excess + squares - 2 * rate * of_depth + expected - total
        square = square + expected
    return np.maximum(np.divide(excess, square, out=np.zeros(n_genes), where=square > 0), 0.0)


def log1p_of(cells: Cells, rows: np.ndarray) -> sparse.csr_matrix:
    """(n, G) log1p values of some cells."""
    return log1p_taken(cells.take(rows), len(cells.genes), cells.preprocessing)


def log1p_taken(cells: CellRows, n_genes: int, preprocessing: Preprocessing) -> sparse.csr_matrix:
    """As `log1p_of`, of cells that were taken."""
    X = sparse.csr_matrix((cells.values, cells.genes, cells.indptr), (len(cells.indptr) - 1, n_genes))
    return log1p_normalised(X, cells.library_size, preprocessing)
