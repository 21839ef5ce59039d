import builtins
import csv
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from perturbdiff.data import feature_files
from perturbdiff.data.features import (
    FeatureTable,
    coexpression_table,
    coverage,
    loadings_of_file,
    morgan_table,
    read_table,
    write_table,
)
from tests.screens import counts_screen, log1p_cp10k, written

NAMES = ("STAT1", "IRF1", "NA", "βeta-1, 2", 'a "quoted" one')
VALUES = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def write_csv(path, names, values):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *(f"f{i}" for i in range(values.shape[1]))])
        for name, row in zip(names, values.tolist(), strict=True):
            writer.writerow([name, *map(repr, row)])


def write_parquet(path, names, values):
    columns = {f"f{i}": column for i, column in enumerate(values.T)}
    pq.write_table(pa.table({"name": list(names), **columns}), path)


def write_matrix_npz(path, names, values):
    np.savez(path, names=np.array(names), values=values)


def write_named_npz(path, names, values):
    np.savez_compressed(path, **dict(zip(names, values, strict=True)))


def write_matrix_safetensors(path, names, values):
    safetensors.numpy.save_file({"values": np.ascontiguousarray(values)}, path, {"names": json.dumps(names)})


def write_named_safetensors(path, names, values):
    safetensors.numpy.save_file(dict(zip(names, values, strict=True)), path)


WRITERS = [
    (".csv", write_csv), (".parquet", write_parquet), (".npz", write_matrix_npz), (".npz", write_named_npz),
    (".safetensors", write_matrix_safetensors), (".safetensors", write_named_safetensors),
]  # fmt: skip


def assert_holds(table, names, values):
    """The same vector under each name, whatever the order of rows."""
    assert table.values.dtype == np.float32
    assert sorted(table.names) == sorted(names)
    for name, row in zip(names, values, strict=True):
        np.testing.assert_array_equal(table.values[table.names.index(name)], row)


@pytest.mark.parametrize(("suffix", "write"), WRITERS, ids=lambda part: getattr(part, "__name__", ""))
def test_every_format_gives_back_what_was_written(tmp_path, suffix, write):
    path = tmp_path / f"esm2{suffix}"
    write(path, NAMES, VALUES)
    table = read_table(path)
    assert table.name == "esm2"
    assert_holds(table, NAMES, VALUES)
    assert read_table(str(path), name="ESM-2").name == "ESM-2"


@settings(max_examples=40)
@given(
    data=st.data(),
    names=st.lists(st.text("abcXYZ019 ,\"'β-_.", min_size=1, max_size=8), min_size=1, max_size=6, unique=True),
)
@pytest.mark.parametrize(("suffix", "write"), WRITERS, ids=lambda part: getattr(part, "__name__", ""))
def test_any_names_and_numbers_come_back(tmp_path_factory, suffix, write, data, names):
    shape = (len(names), data.draw(st.integers(1, 4)))
    values = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
    path = tmp_path_factory.mktemp("any") / f"t{suffix}"
    write(path, names, values)
    assert_holds(read_table(path), names, values)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i1", "i8", "u2"])
@pytest.mark.parametrize("write", [write_matrix_npz, write_named_npz])
def test_numbers_of_any_type_are_read_from_npz(tmp_path, dtype, write):
    values = np.arange(10).reshape(5, 2).astype(dtype)
    write(tmp_path / "t.npz", NAMES, values)
    assert_holds(read_table(tmp_path / "t.npz"), NAMES, values.astype(np.float32))


def test_matrices_in_column_order_are_read(tmp_path):
    np.savez(tmp_path / "t.npz", names=np.array(NAMES), values=np.asfortranarray(VALUES))
    assert_holds(read_table(tmp_path / "t.npz"), NAMES, VALUES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_tensors_of_any_type_are_read(tmp_path, dtype):
    values = torch.arange(10).reshape(5, 2).to(dtype)
    safetensors.torch.save_file({"values": values}, tmp_path / "t.safetensors", {"names": json.dumps(NAMES)})
    assert_holds(read_table(tmp_path / "t.safetensors"), NAMES, values.float().numpy())


def test_a_gene_may_be_called_values(tmp_path):
    for suffix, write in ((".npz", write_named_npz), (".safetensors", write_named_safetensors)):
        write(tmp_path / f"t{suffix}", ("values", "B"), VALUES[:2])
        assert_holds(read_table(tmp_path / f"t{suffix}"), ("values", "B"), VALUES[:2])


@pytest.mark.parametrize("index_name", [None, "gene", "name"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_names_may_be_the_index_of_a_data_frame(tmp_path, suffix, index_name):
    frame = pd.DataFrame(
        VALUES.astype(float), index=pd.Index(NAMES, name=index_name), columns=[f"{i}" for i in range(3)]
    )
    path = tmp_path / f"t{suffix}"
    frame.to_csv(path) if suffix == ".csv" else frame.to_parquet(path)
    assert_holds(read_table(path), NAMES, VALUES)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_column_name_may_stand_anywhere(tmp_path, suffix):
    frame = pd.DataFrame({"x": VALUES[:, 0].astype(float), "name": NAMES, "y": VALUES[:, 1].astype(float)})
    path = tmp_path / f"t{suffix}"
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    assert_holds(read_table(path), NAMES, VALUES[:, :2])


def test_row_numbers_that_pandas_kept_are_no_feature(tmp_path):
    frame = pd.DataFrame({"name": NAMES, "x": VALUES[:, 0]}).iloc[[4, 1, 2]]  # its index is a column of the file
    frame.to_parquet(tmp_path / "t.parquet")
    assert "__index_level_0__" in pq.read_schema(tmp_path / "t.parquet").names
    assert_holds(read_table(tmp_path / "t.parquet"), [NAMES[i] for i in (4, 1, 2)], VALUES[[4, 1, 2], :1])


def test_tables_of_many_blocks_and_row_groups_are_read_whole(tmp_path, monkeypatch):
    names = [f"G{i}" for i in range(1000)]
    values = np.random.default_rng(1).normal(size=(1000, 7)).astype(np.float32)
    monkeypatch.setattr(feature_files, "CSV_BLOCK", 4000)
    monkeypatch.setattr(feature_files, "BATCH_VALUES", 300)
    write_csv(tmp_path / "t.csv", names, values)
    frame = pd.DataFrame(values, index=names, columns=list("abcdefg"))
    frame.to_parquet(tmp_path / "t.parquet", row_group_size=64)
    for suffix in (".csv", ".parquet"):
        table = read_table(tmp_path / f"t{suffix}")
        assert table.names == tuple(names)
        np.testing.assert_array_equal(table.values, values)


def test_csv_of_other_systems_are_read(tmp_path):
    text = "name,a,b\r\nSTAT1,1,-2e3\r\nIRF1,.5,4"
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert_holds(read_table(tmp_path / "t.csv"), ("STAT1", "IRF1"), [[1, -2000], [0.5, 4]])


BAD_CSV = {
    "no bytes": ("", "must name columns"),
    "a header alone": ("name,a\n", "at least one name"),
    "one column": ("name\nA\n", "must name columns"),
    "other separators": ("name;a\nA;1\n", "separated by commas"),
    "no header": ("A,0.5,1.25\nB,2,3\n", "must name the columns"),
    "text for a number": ("name,a\nA,1\nB,high\n", "high"),
    "nothing for a number": ("name,a\nA,\n", "conversion error"),
    "NaN": ("name,a\nA,1\nB,nan\n", "values of B"),
    "infinity": ("name,a\nA,inf\n", "values of A"),
    "too large for float32": ("name,a\nA,1e39\n", "too large for float32"),
    "a short row": ("name,a,b\nA,1,2\nB,1\n", "Expected 3 columns, got 2"),
    "a long row": ("name,a\nA,1\nB,1,2\n", "Expected 2 columns, got 3"),
    "a name twice": ("name,a\nA,1\nB,1\nA,2\n", "same name: A;"),
    "no name": ("name,a\n,1\n", "is no name"),
    "row numbers": (",name,a\n0,A,1\n", "leave row numbers out"),
    "two columns of names": ("name,name,a\nA,A,1\n", "one column 'name', not 2"),
    "a long name": ("name,a\n" + "A" * 6000 + ",1\n", "6,000 bytes"),
    "not UTF-8": (b"name,a\n\xff\xfe,1\n", "not a readable .csv"),
    "UTF-16": ("name,a\nA,1\n".encode("utf-16"), "not a readable .csv"),
}  # fmt: skip


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text.isprintable()
    assert 20 < len(text) < 600
    return text


@pytest.mark.parametrize("kind", BAD_CSV)
def test_a_csv_that_is_wrong_is_refused_in_one_line(tmp_path, kind):
    content, says = BAD_CSV[kind]
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_table(path)
    one_line(error)
    assert "t.csv" in str(error.value)


BAD_PARQUET = {
    "no rows": ({"name": pa.array([], pa.string()), "a": pa.array([], pa.float32())}, "at least one name"),
    "no features": ({"name": ["A"]}, "no columns of numbers"),
    "text": ({"name": ["A"], "a": ["high"]}, "column a holds string"),
    "lists": ({"name": ["A"], "a": [[1.0, 2.0]]}, "column a holds list"),
    "true and false": ({"name": ["A"], "a": [True]}, "column a holds bool"),
    "a gap": ({"name": ["A", "B"], "a": [1.0, None]}, "values of B"),
    "NaN": ({"name": ["A", "B"], "a": [1.0, float("nan")]}, "values of B"),
    "no name": ({"name": ["A", None], "a": [1.0, 2.0]}, "name or SMILES is missing"),
    "numbers for names": ({"name": [1, 2], "a": [1.0, 2.0]}, "must be text, not int64"),
    "a name twice": ({"name": ["A", "A"], "a": [1.0, 2.0]}, "same name: A;"),
    "a long name": ({"name": ["A" * 6000], "a": [1.0]}, "6,000 bytes"),
}


@pytest.mark.parametrize("kind", BAD_PARQUET)
def test_a_parquet_that_is_wrong_is_refused_in_one_line(tmp_path, kind):
    columns, says = BAD_PARQUET[kind]
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_table(tmp_path / "t.parquet")
    one_line(error)


def test_an_index_of_two_columns_is_refused(tmp_path):
    index = pd.MultiIndex.from_tuples([("A", "x"), ("B", "x")], names=["gene", "kind"])
    pd.DataFrame({"a": [1.0, 2.0]}, index=index).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="index of 2 columns"):
        read_table(tmp_path / "t.parquet")


BAD_NPZ = {
    "objects": ({"names": np.array(["A"], dtype=object), "values": np.ones((1, 2))}, "dtype=str"),
    "object vectors": ({"A": np.array([1.0, None], dtype=object)}, "must be numbers"),
    "text": ({"A": np.array(["x"])}, "must be numbers"),
    "complex": ({"A": np.array([1j])}, "must be numbers"),
    "no arrays": ({}, "at least one name"),
    "ragged": ({"A": np.ones(2), "B": np.ones(3)}, "B has 3 features, A 2"),
    "two axes": ({"A": np.ones((2, 2))}, "must have 1 axes"),
    "a number": ({"A": np.float64(1)}, "must have 1 axes"),
    "empty vectors": ({"A": np.ones(0)}, "something in it"),
    "NaN": ({"A": np.ones(2), "B": np.array([1, np.nan])}, "values of B"),
    "too few names": ({"names": np.array(["A"]), "values": np.ones((2, 2))}, "1 names for 2 rows"),
    "names of numbers": ({"names": np.array([1, 2]), "values": np.ones((2, 2))}, "must be text"),
    "values of one axis": ({"names": np.array(["A"]), "values": np.ones(2)}, "must have 2 axes"),
    "a third array": ({"names": np.array(["A"]), "values": np.ones((1, 2)), "x": np.ones(2)}, "1 other arrays"),
    "a name twice": ({"names": np.array(["A", "A"]), "values": np.ones((2, 2))}, "same name: A;"),
    "a long name": ({"names": np.array(["A" * 6000]), "values": np.ones((1, 2))}, "6,000 letters"),
}


@pytest.mark.parametrize("kind", BAD_NPZ)
def test_an_npz_that_is_wrong_is_refused_in_one_line(tmp_path, kind):
    arrays, says = BAD_NPZ[kind]
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_table(tmp_path / "t.npz")
    one_line(error)


ONE = np.ones(2, dtype=np.float32)
BAD_SAFETENSORS = {
    "no tensors": ({}, None, "at least one name"),
    "ragged": ({"A": ONE, "B": np.ones(3, dtype=np.float32)}, None, "B has 3 features, A 2"),
    "two axes": ({"A": np.ones((2, 2))}, None, "must have one axis"),
    "a number": ({"A": np.ones(())}, None, "must have one axis"),
    "empty": ({"A": ONE[:0]}, None, "must have one axis"),
    "not numbers": ({"A": np.array([True])}, None, "type BOOL"),
    "infinity": ({"A": ONE / 0.5, "B": np.array([1, np.inf])}, None, "values of B"),
    "no metadata": ({"values": np.ones((2, 2))}, None, "metadata must have names"),
    "no names": ({"values": np.ones((2, 2))}, {"genes": "x"}, "metadata must have names"),
    "names no JSON": ({"values": np.ones((2, 2))}, {"names": "[A, B]"}, "no JSON"),
    "names no list": ({"values": np.ones((2, 2))}, {"names": '{"A": 1, "B": 2}'}, "metadata must have names"),
    "names of numbers": ({"values": np.ones((2, 2))}, {"names": "[1, 2]"}, "metadata must have names"),
    "too many names": ({"values": np.ones((2, 2))}, {"names": '["A", "B", "C"]'}, "3 names for 2 rows"),
    "a name twice": ({"values": np.ones((2, 2))}, {"names": '["A", "A"]'}, "same name: A;"),
    "half a character": ({"values": np.ones((1, 2))}, {"names": '["\\ud800"]'}, "is no name"),
    "another tensor": ({"values": np.ones((1, 2)), "B": ONE}, {"names": '["A"]'}, "must have one axis"),
}


@pytest.mark.parametrize("kind", BAD_SAFETENSORS)
def test_safetensors_that_are_wrong_are_refused_in_one_line(tmp_path, kind):
    tensors, metadata, says = BAD_SAFETENSORS[kind]
    safetensors.numpy.save_file(tensors, tmp_path / "t.safetensors", metadata)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_table(tmp_path / "t.safetensors")
    one_line(error)


def test_other_suffixes_and_missing_files_are_named(tmp_path):
    for name in ("t.tsv", "t.pkl", "t.CSV", "t"):
        (tmp_path / name).write_text("name,a\nA,1\n")
        with pytest.raises(ValueError, match=r"must be one of \.parquet, \.csv, \.npz, \.safetensors"):
            read_table(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    for name in ("no.csv", "folder.csv"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_table(tmp_path / name)


@pytest.mark.parametrize(("suffix", "write"), WRITERS, ids=lambda part: getattr(part, "__name__", ""))
@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_NAMES", 4), ("MAX_VALUES", 14), ("MAX_FEATURES", 2), ("MAX_BYTES", 9)]
)
def test_tables_over_the_limits_are_refused(tmp_path, monkeypatch, suffix, write, limit, value):
    write(tmp_path / f"t{suffix}", NAMES, VALUES)
    read_table(tmp_path / f"t{suffix}")
    monkeypatch.setattr(feature_files, limit, value)
    with pytest.raises(ValueError, match=r"are read|not a readable"):
        read_table(tmp_path / f"t{suffix}")


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
    ],
)
def test_tables_that_are_none_are_refused(names, values, says):
    with pytest.raises(ValueError, match=says):
        FeatureTable("t", names, values)


def standard(some):
    centre, scale = some.centre_and_scale()
    assert centre.dtype == np.float32
    return (some.values - centre) * np.float32(scale)


@settings(max_examples=100)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.integers(-1000, 1000)))
def test_standard_columns_are_centred_and_their_values_have_a_mean_square_of_one(values):
    out = standard(table([f"G{i}" for i in range(len(values))], values))
    assert np.abs(out.mean(axis=0, dtype=float)).max() < 1e-4
    constant = (values == values[0]).all(axis=0)
    assert (out[:, constant] == 0).all()
    square = np.mean([x * x for row in out.astype(float).tolist() for x in row])
    np.testing.assert_allclose(square, 0.0 if constant.all() else 1.0, atol=1e-4)


@pytest.mark.parametrize("n", range(1, 40))
def test_what_rounding_leaves_of_a_constant_column_is_not_scaled_up(n):
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
    found = some.places(["Stat1", "Irf1", "IRF1", "irf1", "STRASSE", "X", "stat", "STAT1"])
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


def expression(n_cells, n_genes, seed=0):
    """Cells of a few programmes, counts and log1p, mostly zeros."""
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, 1, (n_cells, 4)) @ rng.gamma(0.3, 1, (4, n_genes))
    return np.log1p(rng.poisson(rates)).astype(np.float32)


def dense_correlations(X):
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.corrcoef(X.astype(float).T))


@pytest.mark.parametrize("shape", [(300, 20), (60, 90), (700, 600), (600, 700)])
def test_loadings_are_those_of_a_dense_svd(shape):
    X = expression(*shape)
    X[:, 3], X[:, 5] = 0.0, 0.7  # constant
    genes = [f"G{i}" for i in range(shape[1])]
    found = coexpression_table(sparse.csr_matrix(X), genes, 10)
    assert (found.name, found.names) == ("coexpression", tuple(genes))
    correlations = dense_correlations(X)
    roots, vectors = np.linalg.eigh(correlations)
    roots, vectors = roots[::-1][:10], vectors[:, ::-1][:, :10]
    best = (vectors * roots) @ vectors.T  # the nearest matrix of rank 10
    np.testing.assert_allclose(found.values.astype(float) @ found.values.T, best, atol=1e-5)
    np.testing.assert_allclose(np.square(found.values).sum(axis=0), roots, rtol=1e-4)
    np.testing.assert_allclose(np.abs(found.values[:, 0]), np.abs(vectors[:, 0]) * np.sqrt(roots[0]), atol=1e-4)
    assert (found.values[[3, 5]] == 0).all()
    assert (found.values.max(axis=0) >= -found.values.min(axis=0) - 1e-6).all()


def test_with_all_components_inner_products_are_correlations():
    X = expression(200, 15)
    found = coexpression_table(sparse.csr_matrix(X), [f"G{i}" for i in range(15)], 100)
    assert found.values.shape == (15, 14)
    rest = dense_correlations(X) - found.values.astype(float) @ found.values.T
    assert np.linalg.norm(rest, 2) < np.linalg.eigvalsh(dense_correlations(X))[0] + 1e-5
    few_cells = coexpression_table(sparse.csr_matrix(X[:6]), [f"G{i}" for i in range(15)], 100)
    assert few_cells.values.shape == (15, 5)
    np.testing.assert_allclose(few_cells.values @ few_cells.values.T, dense_correlations(X[:6]), atol=1e-5)


@pytest.mark.parametrize("shape", [(50, 30), (900, 600)])
def test_the_same_cells_give_the_same_bits_in_any_order_of_storage(shape):
    X = sparse.csr_matrix(expression(*shape))
    genes = [f"G{i}" for i in range(shape[1])]
    once = coexpression_table(X, genes, 8).values
    X_before = X.copy()
    np.testing.assert_array_equal(coexpression_table(X, genes, 8).values, once)
    assert (abs(X - X_before).max(), X.dtype) == (0, np.float32)
    halves = sparse.csr_matrix((np.repeat(X.data / 2, 2), np.repeat(X.indices, 2), 2 * X.indptr), shape)
    assert halves.nnz == 2 * X.nnz
    np.testing.assert_array_equal(coexpression_table(halves, genes, 8).values, once)


def test_components_without_variance_are_zero():
    rng = np.random.default_rng(0)
    one = rng.poisson(1.0, (40, 1)).astype(np.float32)
    X = sparse.csr_matrix(np.hstack([one, 2 * one, np.zeros((40, 3), np.float32), one.max() - one]))
    found = coexpression_table(X, list("abcdef"), 4).values
    np.testing.assert_allclose(found[:, 0], [1, 1, 0, 0, 0, -1], atol=1e-6)
    assert (found[:, 1:] == 0).all()
    nothing = coexpression_table(sparse.csr_matrix((5, 4), dtype=np.float32), list("abcd"), 2).values
    np.testing.assert_array_equal(nothing, np.zeros((4, 2)))


@pytest.mark.parametrize(
    ("X", "genes", "n"),
    [
        (np.ones((1, 3)), "abc", 2), (np.ones((3, 1)), "a", 2), (np.ones((3, 3)), "ab", 2), (np.ones((3, 3)), "abc", 0),
        (np.array([[np.nan, 1], [0, 1]]), "ab", 1), (np.eye(3), "aab", 1),
    ],
)  # fmt: skip
def test_expression_without_loadings_is_refused(X, genes, n):
    with pytest.raises(ValueError, match=r"co-expression|same name"):
        coexpression_table(sparse.csr_matrix(X), list(genes), n)


DRUGS = {"ethanol": "CCO", "aspirin": "CC(=O)Oc1ccccc1C(=O)O", "salt": "[Na+].[Cl-]", "ethanol again": "OCC"}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_fingerprints_are_those_of_rdkit(tmp_path, suffix):
    Chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem import rdFingerprintGenerator

    frame = pd.DataFrame({"dose": 1.0, "smiles": DRUGS.values(), "name": DRUGS.keys()})
    path = tmp_path / f"drugs{suffix}"
    frame.to_csv(path) if suffix == ".csv" else frame.to_parquet(path)  # with row numbers, and a column beside
    for radius, n_bits in ((2, 1024), (3, 300)):
        found = morgan_table(path, radius=radius, n_bits=n_bits)
        assert (found.name, found.values.shape) == ("drugs", (4, n_bits))
        assert set(np.unique(found.values)) == {0, 1}
        generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_bits)
        for name, smiles in DRUGS.items():
            on = list(generator.GetFingerprint(Chem.MolFromSmiles(smiles)).GetOnBits())
            assert np.flatnonzero(found.rows([name])[0]).tolist() == on
    np.testing.assert_array_equal(found.rows(["ethanol"]), found.rows(["ethanol again"]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,smiles\nA,CCO\nB,CC(\n", "SMILES 'CC\\(' of B is not one"),
        ("name,smiles\nA,\n", "SMILES '' of A"),
        ("name,smiles\nA,C1\n", "of A is not one"),
        ("name,smiles\nA,CCO\nA,C\n", "same name: A;"),
        ("name,SMILES\nA,CCO\n", "one column 'smiles', not 0; found name, SMILES"),
        ("name,smiles,smiles\nA,CCO,C\n", "one column 'smiles', not 2"),
        ("name,smiles\nA,CCO,1\n", "Expected 2 columns, got 3"),
        ("name,smiles\n", "at least one name"),
        ("name,smiles\nA," + "C" * 6000 + "\n", "6,000 bytes"),
    ],
)
def test_structures_that_are_wrong_are_refused_in_one_line(tmp_path, capfd, text, says):
    pytest.importorskip("rdkit")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        morgan_table(tmp_path / "t.csv")
    one_line(error)
    assert capfd.readouterr() == ("", "")


def test_fingerprints_of_no_radius_or_size_are_refused(tmp_path):
    pytest.importorskip("rdkit")
    (tmp_path / "t.csv").write_text("name,smiles\nA,CCO\n")
    for wrong in ({"radius": -1}, {"radius": 17}, {"n_bits": 0}, {"n_bits": 1 << 21}):
        with pytest.raises(ValueError, match="radius must be 0 to 16"):
            morgan_table(tmp_path / "t.csv", **wrong)
    for name, kind in (("no.csv", FileNotFoundError), ("t.npz", ValueError)):
        if kind is ValueError:
            np.savez(tmp_path / name, A=np.ones(2))
        with pytest.raises(kind, match=r"\.csv, \.parquet"):
            morgan_table(tmp_path / name)


def test_without_rdkit_fingerprints_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "rdkit":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"perturbdiff\[chem\]"):
        morgan_table(Path("t.csv"))


def test_loadings_of_a_file_are_directions_of_its_log1p_genes_and_survive_a_file(tmp_path):
    adata = counts_screen(n_genes=60)
    X = adata.X.toarray()
    X[:, 7] = 0
    X[:3, 7] = 1  # seen in three cells
    adata.X = sparse.csr_matrix(X)
    made = loadings_of_file(written(adata, tmp_path / "ref.h5ad"), n_components=50, min_cells=10)
    seen = [i for i in range(60) if (X[:, i] > 0).sum() >= 10]
    assert 7 not in seen
    assert made.names == tuple(adata.var_names[seen])
    correlation = np.corrcoef(np.asarray(log1p_cp10k(adata.X))[:, seen].T)
    top = np.linalg.eigh(correlation)
    vectors = (
        top.eigenvectors[:, ::-1][:, : made.values.shape[1]]
        * np.sqrt(np.maximum(top.eigenvalues[::-1], 0))[: made.values.shape[1]]
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(made.values @ made.values.T, vectors @ vectors.T, atol=1e-4)
    write_table(made, tmp_path / "new" / "ref.parquet")
    again = read_table(tmp_path / "new" / "ref.parquet")
    assert again.names == made.names
    np.testing.assert_array_equal(again.values, made.values)


def test_loadings_need_genes_that_are_seen(tmp_path):
    with pytest.raises(ValueError, match="0 genes are seen in 100000 cells"):
        loadings_of_file(written(counts_screen(), tmp_path / "ref.h5ad"), min_cells=100_000)
