"""Expression matrices: cells by row, normalisation, and highly variable genes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from perturbdiff.config import Preprocessing
from perturbdiff.data.vocab import GeneVocab


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


def highly_variable_genes(X: sparse.csr_matrix, n: int) -> np.ndarray:
    """Columns of the `n` genes with the largest dispersion for their mean, in column order; see `GeneMoments`.

    Parameters
    ----------
    X
        (n_cells, G) log1p values of the training cells.
    """
    moments = GeneMoments(X.shape[1])
    moments.add(X)
    return moments.highly_variable(n)


class GeneMoments:
    """Mean and variance of each gene over cells that come in parts, and the highly variable genes they show."""

    def __init__(self, n_genes: int) -> None:
        self.n_cells = np.zeros(n_genes, dtype=np.int64)  # that measured the gene
        self.total = np.zeros(n_genes)
        self.total_square = np.zeros(n_genes)

    def add(self, X: sparse.csr_matrix, measured: np.ndarray | None = None) -> None:
        """(n, G) log1p values of some more cells, which measured these genes (G,); all if None."""
        linear = np.expm1(X.data.astype(np.float64))
        if measured is not None:
            linear *= measured[X.indices]
        self.n_cells += X.shape[0] if measured is None else X.shape[0] * measured
        self.total += np.bincount(X.indices, weights=linear, minlength=X.shape[1])
        self.total_square += np.bincount(X.indices, weights=linear * linear, minlength=X.shape[1])

    def highly_variable(self, n: int) -> np.ndarray:
        """Columns of the `n` genes with the largest dispersion for their mean, in column order.

        Notes
        -----
        Satija et al. 2015, as `scanpy.pp.highly_variable_genes(flavor="seurat")`: dispersion of the un-logged values,
        logged, z-scored within 20 bins of log mean.
        """
        n_genes = len(self.total)
        if n >= n_genes:
            return np.arange(n_genes)
        n_cells = np.maximum(self.n_cells, 1)
        mean = self.total / n_cells
        variance = (self.total_square / n_cells - mean**2) * n_cells / np.maximum(n_cells - 1, 1)
        mean[mean == 0] = 1e-12
        dispersion = variance / mean
        log_dispersion = np.log(np.where(dispersion > 0, dispersion, np.nan))
        log_mean = np.log1p(mean)
        edges = np.linspace(log_mean.min(), log_mean.max(), 21)
        bins = np.clip(np.searchsorted(edges, log_mean, side="left") - 1, 0, 19)
        score = np.full(n_genes, -np.inf)
        for b in np.unique(bins):
            inside = (bins == b) & np.isfinite(log_dispersion)
            values = log_dispersion[inside]
            if len(values) == 1:
                score[inside] = 1.0  # one gene alone in its bin: variable by definition
            elif len(values) > 1:
                spread = values.std(ddof=1)
                score[inside] = (values - values.mean()) / (spread if spread > 0 else 1.0)
        chosen = np.argsort(-score, kind="stable")[:n]
        return np.sort(chosen)
