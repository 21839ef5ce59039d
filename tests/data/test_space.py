"""Which space values are in is found from the values: all become the same, or are called unknown."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from perturbdiff.data import space as module
from perturbdiff.data.expression import as_csr
from perturbdiff.data.screen import Screen
from perturbdiff.data.space import (
    LOG1P_MAX,
    RAW_COUNTS,
    Space,
    check_values,
    find_space,
    renormalised,
    space_of,
    totals,
)
from tests.screens import counts_screen
from tests.spaces import SPACES, counts, normalised

GENES = [f"gene_{g}" for g in range(6)]
SEEDS = st.integers(0, 2**32 - 1)


def as_model_sees(values, total=1e4):
    X = as_csr(values)
    space = RAW_COUNTS if check_values(X, range(X.shape[1])) else find_space(X)
    found = renormalised(X, space, total, str).toarray().astype(np.float64)
    return space, np.log1p(normalised(found, total)) if space.whole else found


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float32, np.float64]),
    form=st.sampled_from(sorted(SPACES)),
)
def test_values_of_every_known_space_become_the_same(seed, dtype, form):
    X = counts(seed)
    space, found = as_model_sees(SPACES[form](X).astype(dtype))
    assert space.certain, form
    np.testing.assert_allclose(found, np.log1p(normalised(X, 1e4)), atol=1e-4)


@given(
    seed=st.integers(0, 2**32 - 1), form=st.sampled_from(["log1p of 10,000", "log1p of the median", "log2", "log10"])
)
def test_of_a_part_of_the_genes_the_base_is_known_and_the_sum_is_not(seed, form):
    X = counts(seed, n_genes=160)
    values = SPACES[form](X)[:, np.random.default_rng(seed).permutation(160)[:80]].astype(np.float32)
    space, found = as_model_sees(values)
    assert (space.total, space.whole) == (None, False)
    assert space.certain
    np.testing.assert_allclose(found, np.log1p(space.undone(values)), atol=1e-5)
    if form.startswith("log1p"):
        np.testing.assert_array_equal(found.astype(np.float32), values)  # never converted


def test_integrated_and_imputed_values_are_unknown_and_stay():
    X = np.log1p(normalised(counts(0), 1e4))
    rng = np.random.default_rng(0)
    for values in (X + 0.1 * rng.random(X.shape), X @ np.abs(rng.normal(size=(80, 80))) / 80):
        space, found = as_model_sees(values.astype(np.float32))
        assert (space.certain, space.total, str(space)) == (False, None, "log1p values")
        np.testing.assert_array_equal(found.astype(np.float32), values.astype(np.float32))


def test_a_hundred_batches_normalised_by_themselves_are_too_many():
    X = counts(0, n_cells=400)
    space, _ = as_model_sees(np.log1p(normalised(X, np.repeat(np.arange(200) + 300.0, 2)[:, None])))
    assert (space.total, space.certain) == (None, True)


def test_fractions_of_counts_are_counts():
    X = counts(0)
    rng = np.random.default_rng(0)
    for values, certain in ((X * 0.93, True), (X * rng.uniform(0.8, 1, X.shape), False)):
        space, _ = as_model_sees(values)
        assert (space.bases, space.total, space.whole, space.certain) == ((), None, False, certain)
        np.testing.assert_array_equal(renormalised(as_csr(values), space, 1e4, str).toarray(), np.rint(values))


def test_of_few_cells_a_round_sum_is_known_and_another_is_not():
    X = counts(3)[:3]
    assert find_space(as_csr(np.log1p(normalised(X, 1e4)))).total == pytest.approx(1e4)
    assert find_space(as_csr(np.log1p(normalised(X, 1234.5)))) == Space((math.e,), False, None, True)
    assert find_space(as_csr(np.log1p(X))) == Space((math.e,), True, None, True)


def test_cells_of_another_space_than_the_rest_are_named():
    values = np.log1p(normalised(counts(0, n_cells=3000, n_genes=30), 1e4))
    values[1234] = np.log1p(np.expm1(values[1234]) / 5)
    X = as_csr(values)
    with pytest.raises(
        ValueError, match=r"log1p of 10,000 counts a cell in most cells, but that of c1234 sums to 2,000"
    ):
        renormalised(X, find_space(X), 1e4, "c{}".format)


def test_empty_cells_say_nothing_and_stay_empty():
    values = SPACES["log2"](counts(0))
    values[::3] = 0
    _, found = as_model_sees(values)
    assert not found[::3].any()
    np.testing.assert_allclose(found[1::3], np.log1p(normalised(counts(0), 1e4))[1::3], atol=1e-4)
    np.testing.assert_array_equal(totals(np.ones(3), np.array([0, 0, 2, 2, 3, 3])), [0, 2, 0, 1, 0])
    assert not find_space(sparse.csr_matrix((4, 6))).certain


@pytest.mark.parametrize("n_cells", [1, 2, 7])
def test_values_of_a_space_agree_with_a_loop_over_cells(n_cells):
    X = counts(n_cells, n_cells=n_cells)
    values = np.log2(1 + normalised(X, 1e3))
    found = renormalised(as_csr(values), Space((2.0,), False, 1e3, True), 500.0, str).toarray()
    for cell, row in enumerate(values):
        undone = [2.0**x - 1 for x in row]
        np.testing.assert_allclose(found[cell], [math.log(1 + y * 500 / sum(undone)) for y in undone], atol=1e-6)


# ---------------------------------------------------------------- values that are none


def with_value(value, gene=5):
    X = np.array([[0, 3, 0, 1, 0, 0], [2, 0, 0, 0, 0, 7]], dtype=np.float64)
    X[1, gene] = value
    return as_csr(X)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.25, -3.0])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_nan_infinite_and_negative_values_are_refused_with_gene_and_value(monkeypatch, value, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    with pytest.raises(ValueError, match=rf"X of gene 'gene_3' holds {value}, which is (not finite|negative)"):
        check_values(with_value(value, gene=3), GENES)


def test_whole_numbers_are_told_from_fractions_in_whatever_chunk_they_lie(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 2)
    assert check_values(with_value(3), GENES)
    for gene in range(6):
        assert not check_values(with_value(0.5, gene), GENES)


# ---------------------------------------------------------------- in a screen


def read(X, **settings):
    from perturbdiff.config import DataConfig

    adata = counts_screen(n=8)
    adata.X = sparse.csr_matrix(X(adata.X.toarray()))
    return Screen.read(adata, DataConfig(**settings))


@pytest.mark.parametrize("form", sorted(SPACES))
def test_a_screen_in_any_space_is_the_screen_of_its_counts(form):
    screen, other = read(lambda X: X), read(SPACES[form])
    np.testing.assert_allclose(other.expression.log1p().toarray(), screen.expression.log1p().toarray(), atol=1e-4)
    assert other.expression.preprocessing.target_sum == 1e4
    said = other.notes and other.notes[0].startswith("X holds ")
    assert said or form == "log1p of 10,000"


def test_a_screen_of_logarithms_keeps_its_own_counts_a_cell_on_request():
    screen = read(SPACES["log1p of a million"], target_sum=None)
    assert screen.expression.preprocessing.target_sum == pytest.approx(1e6)
    assert "log1p values of 1e+06 counts a cell" in screen.summary()


def test_what_was_declared_must_not_contradict_what_is_found():
    with pytest.raises(ValueError, match=r"declared as counts but holds log2\(1 \+ x\) of 10,000 counts a cell"):
        read(SPACES["log2"], input_kind="counts")
    with pytest.raises(ValueError, match="declared as log1p but holds values without logarithm of 10,000"):
        read(SPACES["not logged"], input_kind="log1p")
    with pytest.raises(ValueError, match="declared as log1p but holds raw counts: gene 'gene_"):
        read(lambda X: X + LOG1P_MAX, input_kind="log1p")
    assert read(lambda X: np.minimum(X, 9), input_kind="log1p").expression.preprocessing.target_sum is None
    rng = np.random.default_rng(0)
    soup = read(lambda X: X * rng.uniform(0.8, 1, X.shape), input_kind="counts")
    assert soup.expression.preprocessing.input_kind == "counts"
    assert soup.expression.X.dtype == np.uint16


def test_counts_of_some_cells_and_logarithms_of_others_are_refused():
    def mixed(X):
        X = X * 30
        X[::2] = np.log1p(X[::2])
        return X

    with pytest.raises(ValueError, match=r"holds whole numbers alone in \d+ of \d+ cells and fractions in the others"):
        space_of(as_csr(mixed(counts(0))), [""] * 80, "auto", "x.h5ad")
    soup = mixed(counts(0))
    assert space_of(as_csr(soup), [""] * 80, "counts", "x.h5ad").counts


def test_a_part_of_only_empty_cells_stays_empty():
    X = sparse.csr_matrix((3, 80), dtype=np.float32)
    for bases, total in (((2.0,), 1e4), ((math.e,), 1e4), ((math.e,), None)):
        assert renormalised(X, Space(bases, False, total, True), 1e4, str).nnz == 0
