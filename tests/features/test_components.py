"""Genes with terms as vectors: cosines of dense arithmetic, whatever is reduced."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from perturbdiff.features.annotations import Annotations, read_gmt
from perturbdiff.features.components import LEAST, component_table


def known(n=60, n_terms=40, seed=None, density=0.15):
    """Random terms, each of a gene or more, and no gene without."""
    rng = np.random.default_rng(seed)
    has = rng.random((n, n_terms)) < density
    has[np.arange(n), rng.integers(0, n_terms, n)] = True
    has = has[:, has.any(axis=0)]
    terms = tuple(f"t{i}" for i in range(has.shape[1]))
    aliases = {"OLD3": "g3"}
    return Annotations(tuple(f"g{i}" for i in range(n)), terms, sparse.csr_matrix(has.astype(np.float32)), aliases)


def cosines(annotations):
    """(n, n) of rows weighted by log(n / df), by a loop."""
    has = annotations.has.toarray()
    weighted = np.array([[value * np.log(len(has) / has[:, j].sum()) for j, value in enumerate(row)] for row in has])
    norms = np.sqrt((weighted**2).sum(1))
    return (weighted @ weighted.T) / np.outer(norms, norms)


@pytest.mark.parametrize(("n", "n_terms"), [(60, 40), (30, 80), (700, 40), (40, 700)])
def test_with_all_components_inner_products_are_cosines(n, n_terms):
    annotations = known(n, n_terms)
    table = component_table(annotations, 1000, "go")
    assert table.names == annotations.genes
    np.testing.assert_allclose(table.values @ table.values.T, cosines(annotations), atol=1e-5)
    assert (table.values.max(axis=0) >= -table.values.min(axis=0) - 1e-6).all()


def test_fewer_components_are_the_best_of_that_rank():
    annotations = known()
    values = component_table(annotations, 5, "go").values.astype(float)
    roots, vectors = np.linalg.eigh(cosines(annotations))
    best = (vectors[:, -5:] * roots[-5:]) @ vectors[:, -5:].T
    np.testing.assert_allclose(values @ values.T, best, atol=1e-5)


@pytest.mark.parametrize("n", [60, 900])
def test_components_of_perturbed_genes_are_exact_for_them_and_for_what_they_share_with_others(n):
    annotations = known(n, 200, density=0.03)
    perturbed = ["g1", "OLD3", "g7", "nobody", "g20"]
    table = component_table(annotations, 8, "go", perturbed)
    assert table.values.shape[1] <= 4
    exact = cosines(annotations)
    ids = {"g1": 1, "OLD3": 3, "g3": 3, "g7": 7, "g20": 20}
    for one, i in ids.items():
        for other in table.names:
            j = ids.get(other, int(other.lstrip("gOLD")))
            found = table.rows([one])[0].astype(float) @ table.rows([other])[0]
            np.testing.assert_allclose(found, exact[i, j], atol=1e-5)
    assert not (table.rows(["nobody"])).any()
    left_out = [i for i, gene in enumerate(annotations.genes) if gene not in table.names]
    inverse = np.linalg.pinv(exact[np.ix_([1, 3, 7, 20], [1, 3, 7, 20])], rcond=1e-9, hermitian=True)
    for i in left_out:  # its squared length in their span
        shared = exact[i, [1, 3, 7, 20]]
        assert shared @ inverse @ shared < LEAST + 1e-6


def test_the_same_file_in_any_order_is_the_same_table(tmp_path):
    rng = np.random.default_rng()
    lines = [f"s{i}\t\t" + "\t".join(f"g{j}" for j in rng.choice(30, 6, replace=False)) for i in range(25)]
    found = []
    for order in (np.arange(25), rng.permutation(25)):
        (tmp_path / "s.gmt").write_text("\n".join(lines[i] for i in order) + "\n")
        found.append(component_table(read_gmt(tmp_path / "s.gmt"), 10, "s"))
    assert found[0].names == found[1].names
    np.testing.assert_array_equal(found[0].values, found[1].values)


def test_nothing_to_tell_apart_is_refused():
    with pytest.raises(ValueError, match="none of x, y is among its 60 genes"):
        component_table(known(), 5, "go", ["x", "y"])
    same = Annotations(("a", "b"), ("t",), sparse.csr_matrix(np.ones((2, 1), np.float32)))
    with pytest.raises(ValueError, match="tell no genes apart"):
        component_table(same, 5, "go")
    with pytest.raises(ValueError, match="must be at least 1"):
        component_table(known(), 0, "go")
