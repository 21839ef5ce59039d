"""Two screens have one identity if, and only if, they hold the same cells."""

import anndata
import numpy as np
import pytest
from scipy import sparse

from perturbdiff.config import DataConfig
from perturbdiff.data.identity import cells_sha256, screen_identity
from perturbdiff.data.screen import Screen
from tests.screens import counts_screen

SEED = np.random.SeedSequence().entropy


@pytest.fixture
def rng():
    print(f"seed {SEED}")
    return np.random.default_rng(SEED)


@pytest.fixture
def adata(rng):
    return counts_screen(seed=int(rng.integers(1 << 31)))


def read(adata, **settings):
    return Screen.read(adata, DataConfig(screen="unused", **settings))


def identity(adata, **settings):
    return screen_identity(read(adata, **settings))


def changed(adata, other):
    before, now = identity(adata), identity(other)
    return {key for key in before if before[key] != now[key]}


def in_a_layer(adata):
    other = adata.copy()
    other.layers["counts"], other.X = other.X.copy(), other.X * 3
    return identity(other, layer="counts")


def in_a_file(adata, path):
    adata.write_h5ad(path)
    return identity(str(path))


def test_where_and_how_cells_are_stored_does_not_matter(adata, rng, tmp_path):
    one = identity(adata)
    dense = anndata.AnnData(adata.X.toarray(), obs=adata.obs, var=adata.var)
    csc = anndata.AnnData(sparse.csc_matrix(adata.X.astype(np.int64)), obs=adata.obs, var=adata.var)
    shuffled = adata[rng.permutation(adata.n_obs)].copy()
    assert identity(dense) == identity(csc) == identity(shuffled) == one
    assert in_a_layer(adata) == in_a_file(adata, tmp_path / "x.h5ad") == one


def one_more_count(adata, rng):
    row, gene = int(rng.integers(adata.n_obs)), int(rng.integers(adata.n_vars))
    adata.X = adata.X.toarray()
    adata.X[row, gene] += 1


def reversed_cells(adata, rng):
    adata.X = adata.X.toarray()[::-1].copy()


def swapped_labels(adata, rng):
    labels = adata.obs["perturbation"].to_numpy(copy=True)
    i, j = np.flatnonzero(labels == "A")[0], np.flatnonzero(labels == "B")[0]
    labels[i], labels[j] = labels[j], labels[i]
    adata.obs["perturbation"] = labels


def a_renamed_batch(adata, rng):
    adata.obs["batch"] = adata.obs["batch"].astype(str).replace("b1", "b3")


def a_renamed_gene(adata, rng):
    adata.var_names = ["renamed", *adata.var_names[1:]]


def a_renamed_cell(adata, rng):
    names = adata.obs_names.to_numpy(copy=True)
    names[int(rng.integers(len(names)))] = "renamed"
    adata.obs_names = names


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (one_more_count, {"expression"}),
        (reversed_cells, {"expression"}),
        (swapped_labels, {"labels"}),
        (a_renamed_batch, {"labels"}),
        (a_renamed_gene, {"genes"}),
        (a_renamed_cell, {"cells", "labels"}),
    ],
)
def test_each_change_is_seen_where_it_is(adata, rng, change, what):
    other = adata.copy()
    change(other, rng)
    moved = {"expression"} if "labels" in what else set()  # cells are in the order of their labels and names
    assert what <= changed(adata, other) <= what | moved


def test_cells_and_genes_are_counted(adata):
    assert {"n_cells", "n_genes"} <= changed(adata, adata[:-1, :-1].copy())
    assert (identity(adata)["n_cells"], identity(adata)["n_genes"]) == adata.shape


def test_logarithms_that_differ_in_the_last_digits_are_the_same_and_others_are_not(adata, rng):
    adata.X = np.asarray(np.log1p(adata.X.toarray() / adata.X.sum(axis=1) * 1e4), dtype=np.float64)
    last, more = adata.copy(), adata.copy()
    last.X = adata.X * (1 + 1e-15 * rng.standard_normal(adata.shape))
    more.X[int(rng.integers(adata.n_obs))] *= 1.001
    assert changed(adata, last) == set()
    assert changed(adata, more) == {"expression"}


def test_held_out_cells_are_the_same_in_any_order_of_cells_and_genes(adata, rng):
    screen = read(adata)
    names = list(rng.permutation(adata.obs_names)[:9])
    other = adata[rng.permutation(adata.n_obs), rng.permutation(adata.n_vars)].copy()
    assert cells_sha256(read(other), names) == cells_sha256(screen, names)
    other.X = other.X.toarray()
    other.X[~other.obs_names.isin(names)] += 1  # of the others nothing is asked
    assert cells_sha256(read(other), names) == cells_sha256(screen, names)
    other.X[other.obs_names.get_loc(names[3]), int(rng.integers(adata.n_vars))] += 1
    assert cells_sha256(read(other), names) != cells_sha256(screen, names)
