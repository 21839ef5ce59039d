from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scipy import sparse

from perturbdiff.atlas.build.repeats import HASHED, MOST_CONDITIONS, find_repeats
from perturbdiff.data.identity import content_hashes, gene_keys


def random_values(rng, n_cells, n_genes, dtype):
    X = sparse.random(n_cells, n_genes, 0.3, "csr", random_state=int(rng.integers(1 << 30)))
    X.data = rng.integers(1, 4, X.nnz).astype(dtype)
    return X


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "float32"])
def test_cells_have_one_hash_where_they_have_one_content_wherever_they_lie(dtype):
    rng = np.random.default_rng()
    X = random_values(rng, 3000, 8, dtype)  # few genes, so that many are alike, and some are empty
    dense = X.toarray()
    hashes, compared = content_hashes(gene_keys(8), X.indices.astype(np.uint16), X.data, X.indptr)
    assert not compared.any()
    contents = [row.tobytes() for row in dense]
    assert len(set(contents)) == len(set(hashes.tolist())) == len(set(zip(contents, hashes.tolist(), strict=True)))
    # As integers without end.
    keys = [int(key) for key in gene_keys(8)]
    whole = dense.astype(np.uint32) * (64 if dtype == "float32" else 1)
    for row, found in zip(whole[:50].tolist(), hashes[:50].tolist(), strict=True):
        assert sum(k * v for k, v in zip(keys, row, strict=True)) % 2**64 == found


def test_one_count_more_or_in_another_gene_is_another_content():
    rng = np.random.default_rng()
    # Different and even, so that no neighbours that change places give what one more count gives.
    genes, values = np.arange(500, dtype=np.uint16), (2 * rng.permutation(np.arange(1, 32_000))[:500]).astype(np.uint16)
    cells = [values.copy() for _ in range(1001)]
    for i, cell in enumerate(cells[:500]):
        cell[i] += 1
    for i, cell in enumerate(cells[500:999]):
        cell[i], cell[i + 1] = cell[i + 1] + 1, cell[i]
    starts = np.arange(len(cells) + 1) * 500
    hashes, compared = content_hashes(gene_keys(500), np.tile(genes, len(cells)), np.concatenate(cells), starts)
    assert compared.all()
    assert len(set(hashes.tolist())) == 1000  # the last two are the same


def test_cells_are_compared_by_the_genes_that_all_sources_have_if_these_are_enough():
    rng = np.random.default_rng(0)
    common = np.arange(400) < 250
    X = sparse.csr_matrix(rng.poisson(0.1, (300, 400)).astype(np.uint16))
    cut = X @ sparse.diags(common, dtype=np.uint16)
    cut = sparse.csr_matrix(cut.astype(np.uint16))
    cut.eliminate_zeros()
    keys = gene_keys(400, common)
    (whole, compared), (part, alike) = (content_hashes(keys, M.indices, M.data, M.indptr) for M in (X, cut))
    np.testing.assert_array_equal(whole, part)
    np.testing.assert_array_equal(compared, (X[:, common].toarray() > 0).sum(1) >= 20)
    np.testing.assert_array_equal(compared, alike)
    assert 0 < compared.sum() < 300
    np.testing.assert_array_equal(gene_keys(400, np.arange(400) < 199), gene_keys(400))


def test_logarithms_of_another_program_are_the_same_cells():
    rng = np.random.default_rng(0)
    X = sparse.csr_matrix(rng.poisson(0.5, (300, 400)).astype(np.float64))
    X.data = np.log1p(X.data / np.repeat(np.asarray(X.sum(1)).ravel(), np.diff(X.indptr)) * 1e4)
    other = (X.data.astype(np.float32) * np.float32(1 + 2e-7)).astype(np.float32)  # the last digit of single precision
    keys = gene_keys(400)
    one, two = (content_hashes(keys, X.indices, v, X.indptr)[0] for v in (X.data.astype(np.float32), other))
    assert (one == two).mean() > 0.95
    assert len(set(one.tolist())) == 300


@pytest.mark.parametrize("part", [1 << 24, 100, 7])
def test_repeats_are_those_that_a_double_loop_finds(tmp_path, part):
    rng = np.random.default_rng()
    cells = np.zeros(400, HASHED)
    contents = rng.integers(0, 2**64, 150, dtype=np.uint64)
    cells["content"], cells["condition"] = contents[rng.integers(0, 150, 400)], rng.integers(0, 9, 400)
    files = [tmp_path / f"{i}.npy" for i in range(4)]
    for file, own in zip(files, np.split(cells, [0, 130, 300]), strict=True):  # the first has none
        np.save(file, own)
    found = find_repeats(files, len(cells), part)
    by_content = {}
    for content, condition in cells.tolist():
        by_content.setdefault(content, []).append(condition)
    assert found.within == sum(len(own) - len(set(own)) for own in by_content.values())
    assert found.across == sum(len(set(own)) > 1 for own in by_content.values())
    pairs = Counter(pair for own in by_content.values() for pair in combinations(sorted(set(own)), 2))
    assert {(a, b): n for a, b, n in found.pairs.tolist()} == pairs


def test_no_cells_have_no_repeats(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(0, HASHED))
    for files in ([], [tmp_path / "a.npy"]):
        found = find_repeats(files, 0)
        assert (found.within, found.across, found.pairs.shape) == (0, 0, (0, 3))


def test_a_content_of_very_many_conditions_is_noted_with_so_many_of_them(tmp_path):
    n = 10 * MOST_CONDITIONS
    cells = np.zeros(n, HASHED)
    cells["condition"] = np.arange(n)
    np.save(tmp_path / "a.npy", cells)
    found = find_repeats([tmp_path / "a.npy"], n)
    degree = np.bincount(found.pairs[:, :2].ravel())
    assert len(degree) == n
    assert degree.min() >= MOST_CONDITIONS - 1
    assert degree.max() <= 2 * MOST_CONDITIONS
