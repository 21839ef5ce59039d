import numpy as np

from perturbdiff.data.measured import MeasuredGenes


def drawn(seed: int):
    """Stretches of rows, and by row which genes were measured."""
    rng = np.random.default_rng(seed)
    lengths, table = rng.integers(1, 9, 12), rng.random((4, 6)) < 0.7
    panel = rng.integers(0, 4, 12)
    return rng, MeasuredGenes(np.cumsum(lengths) - lengths, panel, table), table[np.repeat(panel, lengths)]


def test_genes_are_measured_in_rows_where_they_are_in_each():
    for seed in range(30):
        rng, measured, of_rows = drawn(seed)
        rows = rng.integers(0, len(of_rows), rng.integers(1, 20))
        assert measured.in_all(rows).tolist() == [all(of_rows[row, g] for row in rows) for g in range(6)]
        assert measured.complete(rows).tolist() == [all(of_rows[row]) for row in rows]


def test_parts_hold_every_row_once_with_its_genes():
    for seed in range(30):
        rng, measured, of_rows = drawn(seed)
        rows = rng.permutation(len(of_rows))[:15]
        parts = list(measured.parts(rows))
        assert sorted(np.concatenate([part for part, _ in parts])) == sorted(rows)
        for part, genes in parts:
            assert (of_rows[part] == genes).all()


def test_selected_genes_that_all_measured_need_no_table():
    measured = MeasuredGenes(np.array([0, 4]), np.array([0, 1]), np.array([[True, True, False], [True, True, True]]))
    assert measured.select(np.array([1, 0])) is None
    assert measured.select(np.array([2, 1])).table.tolist() == [[False, True], [True, True]]
