"""Tables of features from files: every format, and what is wrong with one in one line. Attacks are in tests/trust."""

import csv
import io
import json
import re
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from perturbdiff.features import files
from perturbdiff.features.tables import read_table
from tests.atlases import words_beyond

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


every_format = pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".csv", write_csv), (".parquet", write_parquet), (".npz", write_matrix_npz), (".npz", write_named_npz),
        (".safetensors", write_matrix_safetensors), (".safetensors", write_named_safetensors),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)  # fmt: skip


def assert_holds(path, names, values):
    """The same vector under each name, whatever the order of rows."""
    table = read_table(path)
    assert table.values.dtype == np.float32
    assert sorted(table.names) == sorted(names)
    for name, row in zip(names, values, strict=True):
        np.testing.assert_array_equal(table.values[table.names.index(name)], row)


@given(
    data=st.data(),
    names=st.lists(st.text("abcXYZ019 ,\"'β-_.", min_size=1, max_size=8), min_size=1, max_size=6, unique=True),
)
@every_format
def test_any_names_and_numbers_come_back(tmp_path_factory, suffix, write, data, names):
    shape = (len(names), data.draw(st.integers(1, 4)))
    values = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
    path = tmp_path_factory.mktemp("any") / f"t{suffix}"
    write(path, names, values)
    assert_holds(path, names, values)


def test_a_table_is_called_as_its_file_or_as_is_asked_for(tmp_path):
    write_csv(tmp_path / "esm2.csv", NAMES, VALUES)
    assert read_table(tmp_path / "esm2.csv").name == "esm2"
    assert read_table(str(tmp_path / "esm2.csv"), name="ESM-2").name == "ESM-2"


@pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", "i1", "i8", "u2"])
@pytest.mark.parametrize("write", [write_matrix_npz, write_named_npz])
def test_numbers_of_any_type_are_read_from_npz(tmp_path, dtype, write):
    values = np.arange(10).reshape(5, 2).astype(dtype)
    write(tmp_path / "t.npz", NAMES, values)
    assert_holds(tmp_path / "t.npz", NAMES, values.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_tensors_of_any_type_are_read(tmp_path, dtype):
    values = torch.arange(10).reshape(5, 2).to(dtype)
    safetensors.torch.save_file({"values": values}, tmp_path / "t.safetensors", {"names": json.dumps(NAMES)})
    assert_holds(tmp_path / "t.safetensors", NAMES, values.float().numpy())


def test_matrices_in_column_order_and_archives_with_a_large_directory_are_read(tmp_path, monkeypatch):
    np.savez(tmp_path / "t.npz", names=np.array(NAMES), values=np.asfortranarray(VALUES))
    assert_holds(tmp_path / "t.npz", NAMES, VALUES)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)  # as with over 65,535 arrays
    write_named_npz(tmp_path / "t.npz", NAMES, VALUES)
    assert b"PK\6\7" in (tmp_path / "t.npz").read_bytes()
    assert_holds(tmp_path / "t.npz", NAMES, VALUES)


def test_a_gene_may_be_called_values(tmp_path):
    for suffix, write in ((".npz", write_named_npz), (".safetensors", write_named_safetensors)):
        write(tmp_path / f"t{suffix}", ("values", "B"), VALUES[:2])
        assert_holds(tmp_path / f"t{suffix}", ("values", "B"), VALUES[:2])


def write_frame(frame, path, **options):
    frame.to_csv(path, **options) if path.suffix == ".csv" else frame.to_parquet(path)


@pytest.mark.parametrize("index_name", [None, "gene", "name"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_names_may_be_the_index_of_a_data_frame(tmp_path, suffix, index_name):
    index = pd.Index(NAMES, name=index_name)
    write_frame(pd.DataFrame(VALUES.astype(float), index, columns=["0", "1", "2"]), tmp_path / f"t{suffix}")
    assert_holds(tmp_path / f"t{suffix}", NAMES, VALUES)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_column_name_may_stand_anywhere(tmp_path, suffix):
    frame = pd.DataFrame({"x": VALUES[:, 0].astype(float), "name": NAMES, "y": VALUES[:, 1].astype(float)})
    write_frame(frame, tmp_path / f"t{suffix}", index=False)
    assert_holds(tmp_path / f"t{suffix}", NAMES, VALUES[:, :2])


def test_row_numbers_that_pandas_kept_are_no_feature(tmp_path):
    frame = pd.DataFrame({"name": NAMES, "x": VALUES[:, 0]}).iloc[[4, 1, 2]]  # its index is a column of the file
    frame.to_parquet(tmp_path / "t.parquet")
    assert "__index_level_0__" in pq.read_schema(tmp_path / "t.parquet").names
    assert_holds(tmp_path / "t.parquet", [NAMES[i] for i in (4, 1, 2)], VALUES[[4, 1, 2], :1])


def test_tables_of_many_blocks_and_row_groups_are_read_whole(tmp_path, monkeypatch):
    names = [f"G{i}" for i in range(1000)]
    values = np.random.default_rng(1).normal(size=(1000, 7)).astype(np.float32)
    monkeypatch.setattr(files, "CSV_BLOCK", 4000)
    write_csv(tmp_path / "t.csv", names, values)
    pd.DataFrame(values, names, columns=list("abcdefg")).to_parquet(tmp_path / "t.parquet", row_group_size=64)
    for suffix in (".csv", ".parquet"):
        table = read_table(tmp_path / f"t{suffix}")
        assert table.names == tuple(names)
        np.testing.assert_array_equal(table.values, values)


def test_csv_of_other_systems_are_read(tmp_path):
    text = "name,a,b\r\nSTAT1,1,-2e3\r\nIRF1,.5,4"
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert_holds(tmp_path / "t.csv", ("STAT1", "IRF1"), [[1, -2000], [0.5, 4]])


def test_numbers_of_names_that_are_not_there_are_refused(tmp_path):
    write_parquet(tmp_path / "t.parquet", NAMES, VALUES)
    words_beyond(tmp_path / "t.parquet", "name", last=3)
    with pytest.raises(ValueError, match=r"t\.parquet.*out of bounds"):
        read_table(tmp_path / "t.parquet")


def parquet(columns):
    file = io.BytesIO()
    columns.to_parquet(file) if isinstance(columns, pd.DataFrame) else pq.write_table(pa.table(columns), file)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def tensors(names=None, **arrays):
    return safetensors.numpy.save(arrays, None if names is None else {"names": names})


ONE, TWO = np.ones(2, dtype=np.float32), np.ones((2, 2), dtype=np.float32)
A, AB = np.array(["A"]), pd.MultiIndex.from_tuples([("A", "x"), ("B", "x")], names=["gene", "kind"])
WRONG = {
    "t.csv": [
        (b"", "must name columns"),
        (b"name,a\n", "at least one name"),
        (b"name\nA\n", "must name columns"),
        (b"name;a\nA;1\n", "separated by commas"),
        (b"A,0.5,1.25\nB,2,3\n", "holds values"),
        (b"name,a\nA,1\nB,high\n", "high"),
        (b"name,a\nA,\n", "conversion error"),
        (b"name,a\nA,1\nB,nan\n", "values of B"),
        (b"name,a\nA,inf\n", "values of A"),
        (b"name,a\nA,1e39\n", "too large for float32"),
        (b"name,a,b\nA,1,2\nB,1\n", "Expected 3 columns, got 2"),
        (b"name,a\nA,1\nB,1,2\n", "Expected 2 columns, got 3"),
        (b"name,a\nA,1\nB,1\nA,2\n", "same name: A;"),
        (b"name,a\n,1\n", "is no name"),
        (b",name,a\n0,A,1\n", "leave row numbers out"),
        (b"name,name,a\nA,A,1\n", "one column 'name', not 2"),
        (b"name,a\n" + b"A" * 6000 + b",1\n", "6,000 bytes"),
        (b"name,a\n\xff\xfe,1\n", "not a readable .csv"),
        ("name,a\nA,1\n".encode("utf-16"), "not a readable .csv"),
    ],
    "t.parquet": [
        (parquet({"name": pa.array([], pa.string()), "a": pa.array([], pa.float32())}), "at least one name"),
        (parquet({"name": ["A"]}), "no columns of numbers"),
        (parquet({"name": ["A"], "a": ["high"]}), "column a holds string"),
        (parquet({"name": ["A"], "a": [[1.0, 2.0]]}), "column a holds list"),
        (parquet({"name": ["A"], "a": [True]}), "column a holds bool"),
        (parquet({"name": ["A", "B"], "a": [1.0, None]}), "values of B"),
        (parquet({"name": ["A", "B"], "a": [1.0, float("nan")]}), "values of B"),
        (parquet({"name": ["A", None], "a": [1.0, 2.0]}), "name or SMILES is missing"),
        (parquet({"name": [1, 2], "a": [1.0, 2.0]}), "must be text, not int64"),
        (parquet({"name": ["A", "A"], "a": [1.0, 2.0]}), "same name: A;"),
        (parquet({"name": ["A" * 6000], "a": [1.0]}), "6,000 bytes"),
        (parquet(pd.DataFrame({"a": [1.0, 2.0]}, AB)), "index has 2 columns"),
    ],
    "t.npz": [
        (npz(names=A.astype(object), values=ONE[None]), "dtype=str"),
        (npz(A=np.array([1.0, None], dtype=object)), "'A' is object where numbers"),
        (npz(A=A), "'A' is <U1 where numbers"),
        (npz(A=np.array([1j])), "'A' is complex128 where numbers"),
        (npz(), "at least one name"),
        (npz(A=np.ones(2), B=np.ones(3)), "'B' is (3,) where numbers of shape (2,)"),
        (npz(A=TWO), "'A' is (2, 2)"),
        (npz(A=np.float64(1)), "'A' is ()"),
        (npz(A=np.ones(0)), "one feature"),
        (npz(A=np.ones(2), B=np.array([1, np.nan])), "values of B"),
        (npz(names=A, values=TWO), "'values' is (2, 2) where numbers of shape (1, 2)"),
        (npz(names=np.array([1, 2]), values=TWO), "must be a list of text"),
        (npz(names=A, values=ONE), "'values' is (2,) where"),
        (npz(names=A, values=ONE[None], x=ONE), "names and values alone"),
        (npz(names=np.array(["A", "A"]), values=TWO), "same name: A;"),
        (npz(names=np.array(["A" * 6000]), values=ONE[None]), "at most 5,000 letters"),
    ],
    "t.safetensors": [
        (tensors(), "at least one name"),
        (tensors(A=ONE, B=np.ones(3, dtype=np.float32)), "'B' is (3,) where numbers of shape (2,)"),
        (tensors(A=TWO), "'A' is (2, 2)"),
        (tensors(A=np.ones(())), "'A' is ()"),
        (tensors(A=ONE[:0]), "one feature"),
        (tensors(A=np.array([True])), "'A' is BOOL where numbers"),
        (tensors(A=ONE, B=np.array([1, np.inf])), "values of B"),
        (tensors(values=TWO), "metadata must have names"),
        (tensors("[A, B]", values=TWO), "metadata must have names"),
        (tensors('{"A": 1, "B": 2}', values=TWO), "metadata must have names"),
        (tensors("[1, 2]", values=TWO), "metadata must have names"),
        (tensors('["A", "B", "C"]', values=TWO), "'values' is (2, 2) where numbers of shape (3, 2)"),
        (tensors('["A", "A"]', values=TWO), "same name: A;"),
        (tensors('["\\ud800"]', values=ONE[None]), "is no name"),
        (tensors('["A"]', values=ONE[None], B=ONE), "'values' is (1, 2) where numbers of shape (2,)"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [(name, *wrong) for name, contents in WRONG.items() for wrong in contents],
    ids=[f"{name} {says}" for name, contents in WRONG.items() for _, says in contents],
)
def test_a_table_that_is_wrong_is_refused_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_table(tmp_path / name)
    text = str(error.value)
    assert text.isprintable()
    assert text.startswith(str(tmp_path / name))
    assert len(text) < len(str(tmp_path)) + 500


def test_other_suffixes_and_missing_files_are_named(tmp_path):
    for name in ("t.tsv", "t.pkl", "t.CSV", "t"):
        (tmp_path / name).write_text("name,a\nA,1\n")
        with pytest.raises(ValueError, match=r"must be one of \.parquet, \.csv, \.npz, \.safetensors"):
            read_table(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    for name in ("no.csv", "folder.csv"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_table(tmp_path / name)


@every_format
@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_NAMES", 4), ("MAX_VALUES", 14), ("MAX_FEATURES", 2), ("MAX_BYTES", 9)]
)
def test_tables_over_the_limits_are_refused(tmp_path, monkeypatch, suffix, write, limit, value):
    write(tmp_path / f"t{suffix}", NAMES, VALUES)
    read_table(tmp_path / f"t{suffix}")
    monkeypatch.setattr(files, limit, value)
    with pytest.raises(ValueError, match=r"are read|not a readable"):
        read_table(tmp_path / f"t{suffix}")
