import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbdiff.config import Preprocessing
from perturbdiff.data.expression import as_csr, library_sizes, log1p_normalised
from tests.screens import log1p_cp10k

GENES = [f"gene_{g}" for g in range(6)]
COUNTS = np.array([[0, 3, 0, 1, 0, 0], [2, 0, 0, 0, 0, 7], [0, 0, 0, 0, 0, 0], [1, 1, 4, 0, 0, 0]], dtype=np.float32)


def with_value(value, row=1, gene=5, base=COUNTS):
    X = base.astype(np.float64).copy()
    X[row, gene] = value
    return X


# ---------------------------------------------------------------- as_csr


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *itertools.product(
            [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array],
            [np.float32, np.float64, np.int8, np.int64, np.uint16, bool],
        ),
        (np.asarray, np.float16),
    ],
)
def test_any_form_and_number_type_gives_the_same_cells(form, dtype):
    dense = COUNTS.astype(dtype)
    csr = as_csr(form(dense))
    assert isinstance(csr, sparse.csr_matrix)
    assert csr.has_canonical_format
    np.testing.assert_array_equal(csr.toarray().astype(float), dense.astype(float))


def test_unsorted_repeated_and_stored_zero_entries_are_cleaned_without_touching_the_callers_arrays():
    data, indices, indptr = np.array([5.0, 0.0, 1.0, 2.0]), np.array([2, 1, 0, 0]), np.array([0, 2, 4])
    given = sparse.csr_matrix((data, indices, indptr), shape=(2, 3))
    csr = as_csr(given)
    np.testing.assert_array_equal(csr.toarray(), [[0, 0, 5], [3, 0, 0]])
    assert csr.nnz == 2
    assert csr.has_canonical_format
    np.testing.assert_array_equal(given.data, [5, 0, 1, 2])
    np.testing.assert_array_equal(given.indices, [2, 1, 0, 0])
    np.testing.assert_array_equal(given.indptr, [0, 2, 4])


@pytest.mark.parametrize(
    ("form", "array", "place", "value"),
    [
        (sparse.csr_matrix, "indices", 1, 99),
        (sparse.csr_matrix, "indices", 1, -2),
        (sparse.csr_matrix, "indptr", 2, 1000),
        (sparse.csc_matrix, "indices", 1, 99),
        (sparse.csc_matrix, "indptr", 2, 1000),
    ],
)
def test_sparse_indices_outside_the_matrix_are_refused(form, array, place, value):
    matrix = form(COUNTS)
    getattr(matrix, array)[place] = value
    with pytest.raises(ValueError, match="X is a damaged sparse matrix"):
        as_csr(matrix)


@pytest.mark.parametrize("given", [None, [[1.0]], pd.DataFrame([[1.0]]), np.array([["a"]]), np.zeros((2, 2, 2))])
def test_what_is_no_matrix_of_numbers_is_refused(given):
    with pytest.raises(ValueError, match="it must be a dense, CSR or CSC matrix"):
        as_csr(given)


# ---------------------------------------------------------------- normalisation


def test_library_sizes_are_row_sums_without_overflow():
    X = sparse.csr_matrix(np.full((2, 3), 60_000, dtype=np.uint16))
    np.testing.assert_array_equal(library_sizes(X), [180_000, 180_000])
    assert library_sizes(X).dtype == np.float32


@pytest.mark.parametrize("target_sum", [1e4, 250.0])
def test_normalised_counts_equal_numpy(target_sum):
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.3, (40, 25)).astype(np.uint16)
    counts[7] = 0
    library = counts.sum(1).astype(np.float32) * 1.5
    how = Preprocessing("counts", target_sum, 10.0)
    got = log1p_normalised(sparse.csr_matrix(counts), library, how)
    per_cell = np.divide(target_sum, library, out=np.zeros(40), where=library > 0)
    np.testing.assert_allclose(got.toarray(), np.log1p(counts * per_cell[:, None]), rtol=1e-6)
    assert got.dtype == np.float32


def test_normalising_a_panel_by_its_row_sums_is_log1p_cp10k():
    got = log1p_normalised(as_csr(COUNTS), library_sizes(as_csr(COUNTS)), Preprocessing("counts", 1e4, 10.0))
    np.testing.assert_allclose(got.toarray(), log1p_cp10k(COUNTS), rtol=1e-6)


def test_log1p_input_is_not_normalised_again():
    X = as_csr(log1p_cp10k(COUNTS))
    got = log1p_normalised(X, np.full(4, 3.0, np.float32), Preprocessing("log1p", 1e4, 10.0))
    np.testing.assert_array_equal(got.toarray(), X.toarray().astype(np.float32))
