"""What cells are, whatever their file is called and wherever it lies: hashes of a screen's content as it was read."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbdiff.data.rng import numpy_generator
from perturbdiff.data.screen import Expression, Screen
from perturbdiff.data.selectors import LABELS
from perturbdiff.files import json_sha256

LOG1P_STEPS = 4096  # logarithms are hashed in steps of 1/4096: another machine's differ in the last digits
ALIKE_STEPS = 64  # those of cells that are compared: of another file, made by another program
LEAST_GENES = 20  # of a cell that is compared with others: cells of fewer are alike by chance
LEAST_COMMON = 200  # genes that all sources have, for cells to be compared by them alone
_CHUNK = 1 << 22  # values hashed together
_ROWS = 1024  # cells hashed at once: the numbers stay in the cache


def screen_identity(screen: Screen) -> dict[str, Any]:
    """Numbers of cells and genes, and hashes: of genes in their order, which weights follow; names of cells; the label
    of each; X with the library sizes, in the order of the screen, which follows from labels and names.
    """
    names_of_cells, genes = screen.obs.index.tolist(), screen.expression.genes
    labels = [names_of_cells]
    for name in LABELS:
        codes, names = pd.factorize(screen.obs[name].to_numpy(), sort=True)
        labels.append([hashlib.sha256(codes.astype("<i8").tobytes()).hexdigest(), list(names)])
    return {
        "n_cells": len(screen),
        "n_genes": len(genes),
        "genes": json_sha256([genes.names, genes.ensembl]),
        "cells": json_sha256(sorted(names_of_cells)),
        "labels": json_sha256(labels),
        "expression": expression_sha256(screen.expression),
    }


def cells_sha256(screen: Screen, names: list[str]) -> str:
    """Hash of X and the library sizes of some cells, in this order; genes may come in any."""
    expression, rows = screen.expression, screen.obs.index.get_indexer(pd.Index(names))
    genes = np.array(expression.genes.names, dtype=object)
    rank = np.empty(len(genes), np.int32)
    rank[np.argsort(genes)] = np.arange(len(genes), dtype=np.int32)
    taken = expression.take(rows)
    X = sparse.csr_matrix((taken.values, rank[taken.genes], taken.indptr), (len(rows), len(genes)))
    X.sort_indices()
    of_genes = json_sha256(sorted(genes))
    kind = expression.preprocessing.input_kind
    return json_sha256([of_genes, _sha256(X, taken.library_size, kind)])


def expression_sha256(expression: Expression) -> str:
    """Hash of X and the library sizes."""
    return _sha256(expression.X, expression.library_size, expression.preprocessing.input_kind)


def _sha256(X: sparse.csr_matrix, library_size: np.ndarray, kind: str) -> str:
    digest = hashlib.sha256(f"{kind} {X.shape}".encode())
    for array, dtype in ((X.indptr, "<i8"), (X.indices, "<i4"), (X.data, "<u4"), (library_size, "<f4")):
        for start in range(0, len(array), _CHUNK):
            part = array[start : start + _CHUNK]
            if array is X.data and kind == "log1p":
                part = np.rint(part * LOG1P_STEPS)
            digest.update(part.astype(dtype).data)
    return digest.hexdigest()


def gene_keys(n_genes: int, common: np.ndarray | None = None) -> np.ndarray:
    """(G,) uint64 odd numbers that values are multiplied with, the same in every process; 0 outside the `common` genes,
    (G,) bool, unless these are too few."""
    keys = numpy_generator(0, "content of cells").integers(0, 2**64, n_genes, dtype=np.uint64) | np.uint64(1)
    return keys if common is None or common.sum() < LEAST_COMMON else keys * common


def content_hashes(
    keys: np.ndarray, genes: np.ndarray, values: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) uint64 sums of key times value, modulo 2**64, of cells whose values start at `starts` (n + 1,); and which of
    the cells have genes enough to be compared, (n,) bool.

    Notes
    -----
    Multilinear hashing: two cells that differ share a sum with a chance of 2**-48 or less where values are uint16.
    """
    numbers = np.rint(values * ALIKE_STEPS).astype(np.uint32) if values.dtype.kind == "f" else values
    hashes = np.zeros(len(starts) - 1, dtype=np.uint64)
    n_genes = np.diff(starts)
    for first in range(0, len(hashes), _ROWS):
        ends = starts[first : first + _ROWS + 1]
        own = slice(int(ends[0]), int(ends[-1]))
        cells = numbers[own].astype(np.uint64), genes[own].astype(np.int32), ends - ends[0]
        hashes[first : first + _ROWS] = sparse.csr_matrix(cells, (len(ends) - 1, len(keys))) @ keys
    if not keys.all():
        n_genes = np.diff(np.append(0, np.cumsum(keys[genes] > 0))[starts])
    return hashes, n_genes >= LEAST_GENES
