import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from perturbdiff.data.vocab import LabelVocab, Vocabularies
from perturbdiff.features.tables import FeatureTable, coverage, read_table, with_tables, write_table

NAMES = ("STAT1", "IRF1", "NA", "βeta-1, 2", 'a "quoted" one')
VALUES = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def table(names=NAMES, values=VALUES, name="t"):
    return FeatureTable(name, tuple(names), np.asarray(values, dtype=np.float32))


@pytest.mark.parametrize(
    ("names", "values", "says"),
    [
        ((), np.ones((0, 2), np.float32), "at least one name"),
        (("A",), np.ones((1, 0), np.float32), "one feature"),
        (("A",), np.ones(1, np.float32), "one feature"),
        (("A", "B"), np.ones((1, 2), np.float32), "a row of float32 for each"),
        (("A",), np.ones((1, 2)), "float64"),
        (("A", ""), np.ones((2, 1), np.float32), "'' is no name"),
        (("A" * 5001,), np.ones((1, 1), np.float32), "is no name of 1 to 5000"),
        (("\ud800",), np.ones((1, 1), np.float32), "is no name"),
        (("A", "B", "A"), np.ones((3, 1), np.float32), "same name: A;"),
        (("A", "B"), np.array([[1], [np.nan]], np.float32), "values of B are missing"),
        (("A", "B"), np.array([[1], [-np.inf]], np.float32), "values of B are missing"),
    ],
)
def test_tables_that_are_none_are_refused(names, values, says):
    with pytest.raises(ValueError, match=says):
        FeatureTable("t", names, values)


def standard(some):
    centre, scale = some.centre_and_scale()
    assert centre.dtype == np.float32
    return (some.values - centre) * np.float32(scale)


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.integers(-1000, 1000)))
def test_standard_columns_are_centred_and_their_values_have_a_mean_square_of_one(values):
    out = standard(table([f"G{i}" for i in range(len(values))], values))
    assert np.abs(out.mean(axis=0, dtype=float)).max() < 1e-4
    constant = (values == values[0]).all(axis=0)
    assert (out[:, constant] == 0).all()
    square = np.mean([x * x for row in out.astype(float).tolist() for x in row])
    np.testing.assert_allclose(square, 0.0 if constant.all() else 1.0, atol=1e-4)


def test_what_rounding_leaves_of_a_constant_column_is_not_scaled_up():
    for n in range(1, 40):
        values = np.full((n, 1), 0.1, dtype=np.float32)
        np.testing.assert_array_equal(standard(table([f"G{i}" for i in range(n)], values)), np.zeros((n, 1)))


def test_standard_values_keep_relative_distances_and_forget_shift_and_scale():
    out = standard(table()).astype(float)
    before = np.linalg.norm(VALUES[:, None] - VALUES[None], axis=2)
    after = np.linalg.norm(out[:, None] - out[None], axis=2)
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(after[off] / before[off], after[0, 1] / before[0, 1], rtol=1e-5)
    np.testing.assert_allclose(standard(table(values=VALUES * 7 + [3, -2, 100])), out, atol=1e-5)


def test_directions_have_length_one_and_nothing_has_none():
    values = np.array([[3, 4], [0, 0], [-1e-20, 0]], np.float32)
    expected = [[0.6, 0.8], [0, 0], [-1, 0]]
    np.testing.assert_allclose(table(("a", "b", "c"), values).directions().values, expected, rtol=1e-6)


def test_rows_are_those_of_the_names_and_zero_where_there_is_none():
    rows = table().rows(["IRF1", "nobody", "STAT1", "IRF1"])
    np.testing.assert_array_equal(rows, [VALUES[1], np.zeros(3), VALUES[0], VALUES[1]])
    assert rows.dtype == np.float32
    assert table().rows([]).shape == (0, 3)
    rows[:] = 9.0
    np.testing.assert_array_equal(table().values, VALUES)


def test_other_case_is_taken_where_one_name_fits_and_exact_names_come_first():
    some = table(("STAT1", "Irf1", "IRF1", "Straße", "x"))
    found = some.positions(["Stat1", "Irf1", "IRF1", "irf1", "STRASSE", "X", "stat", "STAT1"])
    assert found.tolist() == [0, 1, 2, -1, 3, 4, -1, 0]
    np.testing.assert_array_equal(some.rows(["irf1"]), np.zeros((1, 3)))


def test_coverage_says_what_each_table_lacks_and_what_no_table_has():
    first = table(("A", "B", "Stat1", "x", "y"), name="esm2")
    second = table(("C", "B", "z", "v", "w"), name="genept")
    text = coverage([first, second], ["A", "B", "C", "STAT1", "D", "E", "B"])
    assert text.splitlines() == [
        "esm2: 3 of 6, 1 of them in other upper and lower case; lacks C, D, E",
        "genept: 2 of 6; lacks A, STAT1, D, E",
        "in no table: D, E",
    ]
    assert coverage([second], ["B"]).splitlines() == ["genept: 1 of 1", "in no table: nothing"]
    assert "and 95 more" in coverage([], [f"G{i}" for i in range(100)])
    assert "\x1b" not in coverage([first], ["\x1b[2J"])


def test_perturbations_with_features_alone_come_after_those_with_rows():
    labels = {"perturbation": ("A", "B"), "cell_type": ("T",), "batch": ()}
    known = Vocabularies(*(LabelVocab(kind, names) for kind, names in labels.items()), "+")
    tables = [table(("Z", "B", "Q"), np.ones((3, 2)), "t"), table(("Q", "W"), np.ones((2, 5)), "u")]
    described = with_tables(known, tables)
    assert described.perturbations.names == ("A", "B", "Z", "Q", "W")
    assert described.labelled == ("A", "B")
    assert described.tables == (("t", 2), ("u", 5))
    assert described.encode([("Q+A", None, None)]).perturbation.tolist() == [[0, 3]]


def test_a_written_table_is_read_back(tmp_path):
    write_table(table(), tmp_path / "new" / "esm2.parquet")
    again = read_table(tmp_path / "new" / "esm2.parquet")
    assert (again.name, again.names) == ("esm2", NAMES)
    np.testing.assert_array_equal(again.values, VALUES)
