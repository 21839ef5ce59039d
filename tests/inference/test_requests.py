import numpy as np
import pandas as pd
import pytest

import perturbdiff.inference.requests as requests_module
from perturbdiff.config import ObsColumns
from perturbdiff.inference.requests import Request, check_requests, context_rows, read_requests
from tests.untrained import untrained


def csv(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "requests.csv"
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return path


def test_empty_fields_and_missing_columns_take_the_defaults(tmp_path):
    text = "n_cells,perturbation,cell_type\n,A,NK\n\n12.0,B , \n3,A+B,T\n"
    default = Request("", "B cell", "b1", 7, 2, 9)
    assert read_requests(csv(tmp_path, text), default) == [
        Request("A", "NK", "b1", 7, 2, 9),
        Request("B", "B cell", "b1", 12, 2, 9),
        Request("A+B", "T", "b1", 3, 2, 9),
    ]
    assert [request.line for request in read_requests(csv(tmp_path, text))] == [2, 4, 5]


def test_what_pandas_writes_is_read_back(tmp_path):
    table = pd.DataFrame(
        {
            "perturbation": ["A", 'drug "x", 5 mg', "Ä"],
            "cell_type": [None, "T,reg", "NK"],
            "n_cells": [np.nan, 5, 12],
            "seed": [0, 2**62, 7],
        }
    )
    table.to_csv(tmp_path / "requests.csv", index=False)
    assert read_requests(tmp_path / "requests.csv") == [
        Request("A"),
        Request('drug "x", 5 mg', "T,reg", n_cells=5, seed=2**62),
        Request("Ä", "NK", n_cells=12, seed=7),
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    assert read_requests(csv(tmp_path, "perturbation\nA\n", "utf-8-sig")) == [Request("A")]


BAD = {
    "empty": ("", ["no column 'perturbation'"]),
    "only a header": ("perturbation\n", ["no line below its header"]),
    "no header": ("A,NK\n", ["no column 'perturbation'", "'A, NK'"]),
    "semicolons": ("perturbation;seed\nA;1\n", ["'perturbation;seed'", "between commas"]),
    "unknown column": ("perturbation,celltype\nA,NK\n", ["column 'celltype'", "did you mean cell_type"]),
    "column twice": ("perturbation,seed,seed\nA,1,1\n", ["2 columns 'seed'"]),
    "no name": ("perturbation,seed\nA,1\n,2\n", ["line 3", "names no perturbation"]),
    "too few fields": ("perturbation,seed\nA\n", ["line 2", "1 fields; the header has 2"]),
    "too many fields": ("perturbation\nA,1\n", ["line 2", "2 fields; the header has 1"]),
    "negative cells": ("perturbation,n_cells\nA,-3\n", ["line 2: n_cells (-3)", "at least 1"]),
    "no cells": ("perturbation,n_cells\nA,0\n", ["n_cells (0)", "at least 1"]),
    "half a cell": ("perturbation,n_cells\nA,1.5\n", ["n_cells (1.5)", "whole number"]),
    "NaN": ("perturbation,n_populations\nA,nan\n", ["n_populations (nan)", "at least 1"]),
    "infinite": ("perturbation,n_cells\nA,inf\n", ["n_cells (inf)"]),
    "not a number": ("perturbation,seed\nA,1\nA,one\n", ["line 3: seed (one)", "at least 0"]),
    "negative seed": ("perturbation,seed\nA,-1\n", ["seed (-1)", "at least 0"]),
    "huge seed": (f"perturbation,seed\nA,{1 << 63}\n", ["seed (9223372036854775808)"]),
    "binary": (b"perturbation\n\xff\xfe\x00A\n", ["is not a csv (", "UTF-8"]),
    "open quote": ('perturbation\n"A\n', ["is not a csv, line 2"]),
    "an hdf5 file": (b"\x89HDF\r\n\x1a\n" + bytes(99), ["is not a csv (", "UTF-8"]),
}


@pytest.mark.parametrize(("text", "pieces"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_by_line_and_value(tmp_path, text, pieces):
    with pytest.raises(ValueError, match=r"^requests ") as error:
        read_requests(csv(tmp_path, text))
    for piece in pieces:
        assert piece in str(error.value)


def test_a_large_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(requests_module, "MAX_FILE_BYTES", 20)
    with pytest.raises(ValueError, match="has 23 bytes; at most 20"):
        read_requests(csv(tmp_path, "perturbation\n" + "A\n" * 5))
    monkeypatch.undo()
    monkeypatch.setattr(requests_module, "MAX_REQUESTS", 4)
    with pytest.raises(ValueError, match="more than 4 lines"):
        read_requests(csv(tmp_path, "perturbation\n" + "A\n" * 5))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        read_requests(tmp_path / "none.csv")


def test_unknown_perturbations_are_named_with_the_nearest_and_the_lines(tmp_path):
    model = untrained(perturbations=("STAT1", "JAK2"))
    requests = read_requests(csv(tmp_path, "perturbation\nJAK2\nSTAT\nSTAT1+JAK2\nJAK9\nSTAT\n"))
    with pytest.raises(KeyError) as error:
        check_requests(model, requests)
    said = error.value.args[0]
    assert "line 3 of the requests: perturbation 'STAT' is not known" in said
    assert "did you mean STAT1" in said
    assert "2 more, lines 5, 6" in said
    check_requests(model, [Request("JAK2"), Request("STAT1+JAK2"), Request("JAK2")])


@pytest.mark.parametrize(
    "wrong", [Request("A", n_cells=0), Request("A", n_cells=-2), Request("A", n_populations=0), Request("A", seed=-1)]
)
def test_numbers_that_cannot_be_are_refused_in_python_too(wrong):
    with pytest.raises(ValueError, match="must be at least 1, 1 and 0"):
        check_requests(untrained(), [Request("A"), wrong])


def test_no_requests_are_refused():
    with pytest.raises(ValueError, match="no requests"):
        check_requests(untrained(), [])


OBS = pd.DataFrame({"cell": ["T", "T", "NK", "NK", "T"], "batch": ["x", "y", "x", "x", "x"]})
COLUMNS = ObsColumns(cell_type="cell", batch="batch")


@pytest.mark.parametrize(
    ("cell_type", "batch", "rows"),
    [(None, None, [0, 1, 2, 3, 4]), ("T", None, [0, 1, 4]), (None, "x", [0, 2, 3, 4]), ("T", "x", [0, 4])],
)
def test_controls_are_those_of_the_cell_type_and_batch(cell_type, batch, rows):
    (found,) = context_rows(OBS, COLUMNS, [Request("A", cell_type, batch)])
    assert found.tolist() == rows


def test_a_column_that_the_file_lacks_leaves_all_controls_with_a_word():
    with pytest.warns(UserWarning, match="all 5 control cells are taken for each cell_type of the requests, anything"):
        (found,) = context_rows(OBS[["batch"]], COLUMNS, [Request("A", "anything", "y")])
    assert found.tolist() == [1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [(Request("A", "nk", line=4), "line 4 .*no control cell has cell 'nk'; did you mean NK"),
     (Request("A", "NK", "y", line=4), "line 4 .*no control cell has batch 'y' with the cell type 'NK'; known: x")],
)  # fmt: skip
def test_a_context_without_controls_is_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        context_rows(OBS, COLUMNS, [Request("A", "T"), request_])
