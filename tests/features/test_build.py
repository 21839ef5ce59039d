"""Tables of any source, told by its content, with what is known of where it comes from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perturbdiff.config import DataConfig
from perturbdiff.features.build import Choices, build_table
from perturbdiff.features.coexpression import loadings_of_file
from perturbdiff.features.tables import FeatureTable, read_table, write_table
from tests.features.sources import gaf, org_db
from tests.screens import counts_screen, written

ROWS = [("A", "GO:1", "IDA"), ("B", "GO:1", "IMP"), ("B", "GO:2", "IDA"), ("C", "GO:2", "IDA"), ("D", "GO:2", "IEA")]
ROWS += [(f"g{i}", f"GO:{3 + i % 4}", "IDA") for i in range(40)]


@pytest.fixture
def sources(tmp_path) -> dict[str, Path]:
    """A file of each kind, under a name that does not say which."""
    texts = {
        "go": gaf(ROWS),
        "sets.gmt": "one\t\tA\tB\ntwo\t\tB\tC\n",
        "columns": "name,genes\none,A;B\ntwo,B;C\n",
        "pairs": "ligand,receptor\nA,B\nC,B\nD,E\nF,E\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    written(counts_screen(n_genes=30), tmp_path / "cells")
    org_db(tmp_path / "base", ROWS)
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("go", "GO biological_process"), ("base", "GO biological_process"), ("sets.gmt", "gene sets"),
        ("pairs", "pairs of genes"), ("columns", "gene sets"), ("cells", "loadings of genes in cells"),
    ],
)  # fmt: skip
def test_what_a_file_is_is_told_by_its_content(sources, tmp_path, name, kind):
    table = build_table(sources[name], "mine", Choices(max_share=1.0, license="CC BY 4.0", date="2020"))
    assert table.name == "mine"
    about = {"kind": kind, "source": name, "license": "CC BY 4.0", "date": "2020"}
    about["sha256"] = hashlib.sha256(sources[name].read_bytes()).hexdigest()
    assert table.about.items() >= about.items()
    write_table(table, tmp_path / "mine.parquet")
    again = read_table(tmp_path / "mine.parquet")
    assert (again.name, again.names, again.about) == ("mine", table.names, table.about)
    np.testing.assert_array_equal(again.values, table.values)


def test_what_nobody_stated_is_said_to_be_so(sources):
    about = build_table(sources["sets.gmt"], "s", Choices(max_share=1.0)).about
    assert (about["date"], about["license"], about["genes"], about["terms"]) == ("not stated", "not stated", "3", "2")
    about = build_table(sources["go"], "s", Choices()).about
    assert (about["date"], about["left out"]) == ("2024-01-17", "IEA ND")


def test_cells_give_their_loadings(sources):
    expected = loadings_of_file(sources["cells"], 5)
    np.testing.assert_array_equal(build_table(sources["cells"], "s", Choices(5)).values, expected.values)


def test_components_are_those_of_the_screens_perturbations(sources):
    screen = DataConfig(screen=str(sources["cells"]))  # A, B and A+B
    table = build_table(sources["go"], "go", Choices(screen=screen, max_share=1.0))
    assert table.names == ("A", "B", "C")  # D by a program alone, g shares nothing
    a, b, c = table.values
    assert a @ b > 0.1
    assert abs(a @ c) < 1e-6


def test_drugs_are_told_by_their_smiles(tmp_path):
    pytest.importorskip("rdkit")
    (tmp_path / "d.csv").write_text("name,smiles\nethanol,CCO\nmethane,C\n")
    table = build_table(tmp_path / "d.csv", "drugs", Choices())
    assert (table.names, table.values.shape[1]) == (("ethanol", "methane"), 1024)
    assert table.about["kind"] == "Morgan fingerprints"


@pytest.mark.parametrize("about", ["[]", '{"a": 1}', "{", "[" * 100000, "\udcff"])
def test_an_origin_that_is_no_texts_is_refused(tmp_path, about):
    path = tmp_path / "t.parquet"
    table = pa.table({"name": ["A"], "x": [1.0]})
    pq.write_table(table.replace_schema_metadata({"perturbdiff.features": about.encode(errors="replace")}), path)
    with pytest.raises(ValueError, match=r"t\.parquet"):
        read_table(path)


def test_an_origin_that_is_too_long_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    text = json.dumps({"kind": "x" * (1 << 17)})
    pq.write_table(pa.table({"name": ["A"], "x": [1.0]}, metadata={"perturbdiff.features": text}), path)
    with pytest.raises(ValueError, match="states 131,0"):
        read_table(path)


def test_tables_of_other_files_say_nothing_of_their_origin(tmp_path):
    (tmp_path / "t.csv").write_text("name,x\nA,1\n")
    assert read_table(tmp_path / "t.csv").about == {}
    assert FeatureTable("t", ("A",), np.ones((1, 1), np.float32)).about == {}
