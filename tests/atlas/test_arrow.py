from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from perturbdiff.atlas.arrow import AtlasCells
from perturbdiff.atlas.store import Atlas
from perturbdiff.config import Preprocessing
from perturbdiff.data.expression import CellRows
from perturbdiff.data.vocab import GeneVocab
from tests.atlases import CONDITIONS, random_cells, write_atlas

COUNTS = Preprocessing("counts", 1e4, 10.0)
LOG1P = Preprocessing("log1p", 1e4, 10.0)
N_CELLS = sum(condition[3] for condition in CONDITIONS)
N_GENES = 20
NAMES = tuple(f"gene_{g}" for g in range(N_GENES))
TYPES = [("uint16", "uint16"), ("uint32", "uint32"), ("float32", "uint16")]

runs = st.lists(
    st.tuples(st.integers(0, N_CELLS - 1), st.integers(1, 25)).map(
        lambda run: list(range(run[0], min(sum(run), N_CELLS)))
    ),
    max_size=6,
)
rows_of_runs = st.one_of(
    runs.map(lambda parts: [row for part in parts for row in part]),
    st.lists(st.integers(0, N_CELLS - 1), max_size=20),
)


def table(cells: sparse.csr_matrix, library: np.ndarray, value_column: str = "counts") -> pa.Table:
    offsets = pa.array(cells.indptr, pa.int32())
    lists = [pa.ListArray.from_arrays(offsets, pa.array(part)) for part in (cells.indices, cells.data)]
    return pa.table([pa.array(library, pa.float32()), *lists], names=["library_size", "genes", value_column])


def gather(tables, genes: tuple[str, ...] = NAMES, file_genes: tuple[str, ...] = NAMES) -> AtlasCells:
    return AtlasCells(tables, "counts", GeneVocab(file_genes), GeneVocab(genes), COUNTS, lambda row: f"cell {row}")


def dense(cells: CellRows, n_genes: int) -> np.ndarray:
    """One cell and one value after the other."""
    X = np.zeros((len(cells.indptr) - 1, n_genes), dtype=np.float64)
    for cell in range(len(X)):
        for place in range(cells.indptr[cell], cells.indptr[cell + 1]):
            assert X[cell, cells.genes[place]] == 0
            X[cell, cells.genes[place]] = cells.values[place]
    assert cells.indptr[0] == 0
    assert cells.indptr[-1] == len(cells.genes) == len(cells.values)
    return X


def with_types(cells: sparse.csr_matrix, gene_type: str) -> sparse.csr_matrix:
    cells.indices = cells.indices.astype(gene_type)  # scipy makes them int32
    return cells


@pytest.fixture(scope="module", params=TYPES, ids=str)
def atlas(request, tmp_path_factory):
    """An atlas on disk, the cells of its Arrow cache, and the same as a matrix with library sizes."""
    value_type, gene_type = request.param
    folder = tmp_path_factory.mktemp("atlas")
    X = random_cells(N_CELLS, N_GENES, 3, value_type, gene_type)
    library = np.arange(1, N_CELLS + 1)
    path = write_atlas(folder / "atlas", cells=X, library_size=library, value_type=value_type, gene_type=gene_type)
    opened = Atlas.open(path)
    how = LOG1P if value_type == "float32" else COUNTS
    return opened, opened.arrow_cells(None, how, folder / "cache"), X, library


@given(rows=rows_of_runs)
def test_cells_of_the_arrow_cache_are_the_cells_that_were_written(atlas, rows):
    opened, cells, X, library = atlas
    taken = cells.take(np.array(rows, dtype=np.int64))
    expected = X[rows]
    np.testing.assert_array_equal(taken.indptr, expected.indptr if rows else [0])
    np.testing.assert_array_equal(taken.genes, expected.indices)
    np.testing.assert_array_equal(taken.values, expected.data)
    np.testing.assert_array_equal(taken.library_size, library[rows])
    assert taken.indptr.dtype == np.int64
    assert taken.genes.dtype == opened.info.gene_type
    assert taken.values.dtype == opened.info.value_type
    assert taken.library_size.dtype == np.float32


@given(
    rows=rows_of_runs,
    genes=st.permutations(range(N_GENES)).flatmap(lambda p: st.integers(1, N_GENES).map(lambda n: p[:n])),
)
def test_genes_are_chosen_by_name_and_renumbered(atlas, rows, genes):
    opened, whole, X, library = atlas
    wanted = GeneVocab(tuple(NAMES[g] for g in genes))
    kind = opened.info.value_column
    tables = [table(X, library, kind)]
    cells = AtlasCells(tables, kind, opened.genes, wanted, whole.preprocessing, opened.row_name)
    taken = cells.take(np.array(rows, dtype=np.int64))
    assert cells.genes == wanted
    np.testing.assert_array_equal(dense(taken, len(genes)), X.toarray()[rows][:, genes])


@given(
    rows=rows_of_runs,
    cuts=st.lists(st.integers(0, N_CELLS), max_size=6),
    skipped=st.integers(0, 9),
    chunk=st.integers(1, N_CELLS + 9),
)
def test_slices_and_chunks_of_tables_make_no_difference(rows, cuts, skipped, chunk):
    X = random_cells(N_CELLS + 9, N_GENES, 4)
    library = np.arange(N_CELLS + 9)
    whole = table(X, library).slice(skipped, N_CELLS)
    borders = [0, *sorted(cuts), N_CELLS]
    parts = [whole.slice(a, b - a) for a, b in pairwise(borders)]
    parts = [pa.Table.from_batches(part.to_batches(chunk), part.schema) for part in parts]
    taken = gather(parts).take(np.array(rows, dtype=np.int64))
    at = [row + skipped for row in rows]
    np.testing.assert_array_equal(dense(taken, N_GENES), X.toarray()[at])
    np.testing.assert_array_equal(taken.library_size, library[at])


def test_a_run_is_copied_and_the_table_stays_as_it_is():
    X = random_cells(10, N_GENES, 5)
    cells = gather([table(X, np.ones(10))])
    taken = cells.take(np.arange(10))
    taken.values[:] = 0
    assert X.data.all()
    np.testing.assert_array_equal(cells.take(np.arange(10)).values, X.data)


def test_genes_of_a_subset_in_the_order_of_the_file_stay_sorted():
    X = random_cells(30, N_GENES, 6)
    taken = gather([table(X, np.ones(30))], NAMES[1::2]).take(np.arange(30))
    for cell in range(30):
        part = taken.genes[taken.indptr[cell] : taken.indptr[cell + 1]].astype(int)
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("n_genes", [2**16 - 1, 2**16])
def test_renumbering_reaches_the_last_gene_of_a_large_vocabulary(n_genes):
    file_genes = tuple(f"gene_{g}" for g in range(n_genes + 1))
    X = sparse.csr_matrix(([1, 2], [0, n_genes], [0, 2]), (1, n_genes + 1))
    rows = table(with_types(X.astype(np.uint16), "uint32"), np.ones(1))
    taken = gather([rows], file_genes[1:], file_genes).take(np.array([0]))
    assert taken.genes.tolist() == [n_genes - 1]
    assert taken.values.tolist() == [2]


@pytest.mark.parametrize("genes", [NAMES[:8], NAMES[7::-1]])
def test_a_gene_index_outside_of_the_vocabulary_is_refused(genes):
    X = sparse.csr_matrix(([1, 1, 1], [3, 2, 8], [0, 1, 1, 3]), (3, N_GENES))
    cells = gather([table(X, np.ones(3))], genes, NAMES[:8])
    assert cells.take(np.array([0, 1, 0])).values.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"^cell 2 has gene index 8, but there are 8 genes; [^\n]*$"):
        cells.take(np.array([1, 0, 2, 1]))


def test_a_cell_with_more_genes_than_values_is_refused():
    X = sparse.csr_matrix(([1, 1, 1], [3, 2, 8], [0, 1, 2, 3]), (3, N_GENES))
    right = table(X, np.ones(3))
    wrong = pa.ListArray.from_arrays(pa.array([0, 1, 1, 3], pa.int32()), right["counts"].chunk(0).values)
    cells = gather([right.set_column(2, "counts", wrong)])
    with pytest.raises(ValueError, match=r"^cell 1 has 1 genes but 0 values; "):
        cells.take(np.array([0, 1, 2]))


@pytest.mark.parametrize("row", [-1, 10, 2**62])
def test_a_row_that_is_not_there_is_refused(row):
    with pytest.raises(IndexError, match=f"^row {row} is not one of these 10 cells"):
        gather([table(random_cells(10, N_GENES), np.ones(10))]).take(np.array([3, row]))


def test_missing_lists_and_elements_are_refused():
    whole = table(random_cells(2, N_GENES), np.ones(2))
    for lists in ([[1], None], [[1], [None]]):
        genes = pa.array(lists, pa.list_(pa.uint16()))
        with pytest.raises(ValueError, match="missing"):
            gather([whole.set_column(1, "genes", genes)])


def test_genes_that_the_atlas_lacks_are_refused():
    with pytest.raises(ValueError, match="lacks 1 of the 3 wanted genes, for example TP53; "):
        gather([table(random_cells(2, N_GENES), np.ones(2))], ("gene_3", "TP53", "gene_0"))


def test_rows_of_one_table_in_memory_count_from_zero(atlas):
    opened, whole, X, _ = atlas
    how = whole.preprocessing
    second = table(X[17:34], np.ones(17), opened.info.value_column)
    cells = opened.shard_cells(second, 1, how)
    np.testing.assert_array_equal(dense(cells.take(np.arange(17)), N_GENES), X[17:34].toarray())
    assert len(cells) == 17
    assert cells.preprocessing is how
