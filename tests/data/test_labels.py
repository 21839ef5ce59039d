import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbdiff.config import DataConfig
from perturbdiff.data.labels import read_labels
from perturbdiff.data.screen import Screen
from tests.screens import read, screen_with_cells

TAHOE = [("DMSO_TF", 0.0), ("Bortezomib", 0.05), ("Bortezomib", 5.0), ("5'-Azacytidine", 0.5)]


def obs_of(**columns):
    n = max(len(values) for values in columns.values() if not isinstance(values, str))
    return pd.DataFrame({"cell_type": "T", "batch": "b", **columns}, index=[f"c{i}" for i in range(n)])


def labels_of(config=None, **columns):
    return read_labels(obs_of(**columns), config or DataConfig(), "memory")


def perturbations(config=None, **columns):
    return labels_of(config, **columns).obs["perturbation"].tolist()


def test_several_labels_are_those_of_controls():
    found = labels_of(DataConfig(other_control_labels=["NT", "mock"]), perturbation=["control", "NT", "A", "mock+A"])
    assert found.obs["perturbation"].tolist() == ["control", "control", "A", "A"]
    assert found.notes == ("no cell has the control label 'mock'",)
    assert perturbations(DataConfig(other_control_labels=["NT"]), perturbation=["NT", "A"]) == ["control", "A"]


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_cells_are_left_out_by_label_and_those_without_by_nan(missing):
    labels = ["control", "A", "nan", "", missing, "None", "doublet", "A"]
    config = DataConfig(drop=["nan", "", "None", "doublet"])
    found = labels_of(config, perturbation=labels)
    assert found.obs["perturbation"].tolist() == ["control", "A", "A"]
    assert found.kept.tolist() == [True, True, False, False, False, False, False, True]
    assert any("5 cells are left out" in note for note in found.notes)
    with pytest.raises(ValueError, match=r"1 missing values, the first in cell 'c4'.*data.drop=\['nan'\]"):
        labels_of(DataConfig(drop=["None"]), perturbation=labels)
    with pytest.raises(ValueError, match=r"data\.drop 'X' names no cell of memory"):
        labels_of(DataConfig(drop=["X"]), perturbation=["control", "A"])
    with pytest.raises(ValueError, match="leaves no cell"):
        labels_of(DataConfig(drop=["A", "control"]), perturbation=["control", "A"])


@pytest.mark.parametrize("label", ["A\x1b[2J", "A\nB", "\x00", "x" * 100_000])
@pytest.mark.parametrize("column", ["perturbation", "cell_type"])
def test_labels_that_are_no_names_are_refused_in_a_printable_line(label, column):
    columns = {"perturbation": ["control", "A"], "cell_type": ["T", "T"]}
    columns[column][1] = label
    with pytest.raises(ValueError, match=f"obs column '{column}' of memory: label .*rename it") as error:
        labels_of(**columns)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_a_missing_cell_type_is_dropped_by_its_place_in_a_selector():
    columns = {"perturbation": ["control", "A", "A"], "cell_type": ["T", "T", None]}
    with pytest.raises(ValueError, match=r"data.drop=\['\*:nan'\]"):
        labels_of(**columns)
    assert perturbations(DataConfig(drop=["*:nan"]), **columns) == ["control", "A"]


def test_words_that_are_no_perturbation_are_named_with_the_setting_that_mends_it():
    notes = "\n".join(labels_of(perturbation=["control", "A", "nan", "", "unassigned", "non-targeting"]).notes)
    assert (
        "'', 'nan', 'unassigned' are taken for perturbations; 'data.drop=[\"\", \"nan\", \"unassigned\"]' leaves"
        in notes
    )
    assert "'non-targeting' are taken for perturbations; 'data.other_control_labels=[\"non-targeting\"]' makes" in notes
    assert labels_of(perturbation=["control", "A", "B", "A+B"]).notes == ()


def test_a_label_that_holds_the_separator_and_is_not_split_is_named():
    (note,) = labels_of(perturbation=["control", "A", "(+)-JQ1"]).notes
    assert "'(+)-JQ1'" in note
    assert "not all parts stand alone" in note


@pytest.mark.parametrize("dtype", [np.float64, np.float32, str])
def test_doses_of_a_column_are_those_it_shows(dtype):
    doses = np.array([0, 0.1, 1e6, 0.1], dtype)
    found = labels_of(DataConfig(dose_col="dose"), perturbation=["control", "A", "A", "A+B"], dose=doses)
    assert found.obs["perturbation"].tolist() == ["control", "A@0.1", "A@1000000", "A+B@0.1"]
    both = labels_of(DataConfig(dose_col="dose"), perturbation=["control", "A", "B", "B+A"], dose=doses)
    assert both.obs["perturbation"].tolist() == ["control", "A@0.1", "B@1000000", "A@0.1+B@0.1"]


def test_doses_may_have_a_unit_and_no_two(tmp_path):
    config, labels = DataConfig(dose_col="dose"), ["control", "A", "A", "B"]
    found = perturbations(config, perturbation=labels, dose=["0", "0.2uM", "1e-1 uM", "3 uM"])
    assert found == ["control", "A@0.2", "A@0.1", "B@3"]
    with pytest.raises(ValueError, match="'dose' of memory: doses are in mg/ml, uM; write them in one unit"):
        perturbations(config, perturbation=labels, dose=["0", "0.2uM", "1", "3 mg/ml"])
    for wrong in ("high", "0", "-1", "nan", "1 2", "1+1"):
        with pytest.raises(ValueError, match="which received 'A'; doses must be finite and greater than 0"):
            perturbations(config, perturbation=labels, dose=["0", wrong, "1", "1"])


def test_units_of_doses_stand_behind_them_or_in_a_column_beside():
    config, labels = DataConfig(dose_col="dose"), ["control", "A", "A", "B"]
    for dose, unit in ((["0", "2 \u00b5M", "1 uM", "3"], "uM"), (["0", "2", "1", "3"], None)):
        assert labels_of(config, perturbation=labels, dose=dose).notation.dose_unit == unit
    numbers = [0.0, 2.0, 1.0, 3.0]
    found = labels_of(config, perturbation=labels, dose=numbers, dose_unit=["nan", "nM", "nM", "nM"])
    assert found.notation.dose_unit == "nM"
    assert found.obs["perturbation"].tolist() == ["control", "A@2", "A@1", "B@3"]
    with pytest.raises(ValueError, match="'dose' of memory: doses are in nM, uM; write them in one unit"):
        labels_of(config, perturbation=labels, dose=numbers, dose_unit=["", "nM", "nM", "uM"])


def test_lists_of_drugs_with_doses_are_drugs_at_doses():
    texts = [repr([(name, dose, "uM")]) for name, dose in TAHOE]
    config = DataConfig(control_label=texts[0])
    found = labels_of(config, perturbation=[*texts, repr([("X", 1.0, "uM"), ("Bortezomib", 0.05, "uM")])])
    assert found.obs["perturbation"].tolist() == [
        texts[0], "Bortezomib@0.05", "Bortezomib@5", "5'-Azacytidine@0.5", "Bortezomib@0.05+X@1"
    ]  # fmt: skip
    assert found.notation.dose_separator == "@"


@pytest.mark.parametrize("text", ["[('A', 1.0)]", "[('A', 'x', 'uM')]", "[(" + "[" * 900, "[(1).__class__]"])
def test_what_only_looks_like_such_a_list_is_a_name(text):
    assert perturbations(perturbation=["control", text]) == ["control", text]


def test_a_column_that_is_null_has_one_label():
    obs = pd.DataFrame({"perturbation": ["control", "A"]}, index=["x", "y"])
    found = read_labels(obs, DataConfig(cell_type_col=None, batch_col=None), "memory")
    assert found.obs["cell_type"].tolist() == found.obs["batch"].tolist() == ["all", "all"]


def test_all_missing_columns_are_named_at_once():
    with pytest.raises(KeyError) as error:
        read_labels(pd.DataFrame({"x": ["control"]}), DataConfig(), "memory")
    text = error.value.args[0]
    assert "obs columns 'perturbation', 'cell_type', 'batch' not in memory; found ['x']" in text
    assert (
        "Set data.perturbation_col=... data.cell_type_col=... data.batch_col=...; cell_type_col and batch_col" in text
    )


def test_a_control_label_that_no_cell_has_names_a_likely_one():
    with pytest.raises(ValueError, match=r"has the control label 'control'.*Set data\.control_label=non-targeting\."):
        labels_of(perturbation=["non-targeting", "A"])


def test_dropped_cells_are_not_read():
    adata = screen_with_cells([("control", "T", "b", 3), ("A", "T", "b", 3), ("doublet", "T", "b", 2)])
    rows = np.flatnonzero(adata.obs["perturbation"] == "doublet")
    X = adata.X.toarray()
    X[rows[0], 0] = -1.0
    adata.X = sparse.csr_matrix(X)
    screen = read(adata, drop=["doublet"])
    assert len(screen) == 6
    kept = adata[adata.obs["perturbation"] != "doublet"]
    np.testing.assert_array_equal(screen.expression.X.toarray(), kept[screen.obs.index].X.toarray())
    with pytest.raises(ValueError, match="negative"):
        read(adata)


DIALECTS = {
    "GEARS": ({"condition": ["ctrl", "A+ctrl"], "cell_type": ["K562"] * 2}, "condition", "ctrl", "cell_type", None),
    "Replogle": ({"gene": ["non-targeting", "A"], "gem_group": [1, 2]}, "gene", "non-targeting", None, "gem_group"),
    "Parse PBMC": ({"cytokine": ["PBS", "IL-2"], "donor": ["d1", "d2"], "cell_type": ["T", "T"]}, "cytokine", "PBS",
                   "cell_type", "donor"),
    "Virtual Cell Challenge": ({"target_gene": ["non-targeting", "A"], "guide_id": ["x", "y"], "batch": ["1", "2"]},
                               "target_gene", "non-targeting", None, "batch"),
    "STATE and cell-load": ({"target_gene": ["non-targeting", "A"], "cell_line": ["K562"] * 2, "batch_var": ["1", "2"]},
                            "target_gene", "non-targeting", "cell_line", "batch_var"),
    "Tahoe-100M": ({"drug": ["DMSO_TF", "A"], "cell_line": ["c"] * 2, "plate": ["p"] * 2},
                   "drug", "DMSO_TF", "cell_line",
                   "plate"),
    "scPerturb": ({"perturbation": ["control", "A"], "perturbation_type": ["drug"] * 2, "celltype": ["T"] * 2},
                  "perturbation", "control", "celltype", None),
    "sci-Plex": ({"product_name": ["Vehicle", "A"], "dose": [0.0, 10.0], "cell_type": ["A549"] * 2,
                  "replicate": ["1"] * 2},
                 "product_name", "Vehicle", "cell_type", "replicate"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_files_of_known_kinds_are_read_by_their_own_columns_and_that_is_said(name):
    columns, perturbation, control, cell_type, batch = DIALECTS[name]
    found = read_labels(pd.DataFrame(columns, index=["x", "y"]), DataConfig(), "memory")
    config = found.config
    assert (config.perturbation_col, config.control_label) == (perturbation, control)
    assert (config.cell_type_col, config.batch_col) == (cell_type, batch)
    assert found.obs["perturbation"].tolist() == [control, {"IL-2": "IL-2"}.get(columns[perturbation][1], "A" + (
        "@10" if name == "sci-Plex" else ""))]  # fmt: skip
    assert f"columns as of {name}: data." in found.notes[0]
    again = read_labels(pd.DataFrame(columns, index=["x", "y"]), config, "memory")
    assert again.config == config
    assert not [note for note in again.notes if "columns as of" in note]


def test_settings_that_were_given_are_not_changed():
    obs = pd.DataFrame({"condition": ["ctrl", "A"], "line": ["K", "K"], "cell_type": ["x", "y"]}, index=["a", "b"])
    config = read_labels(obs, DataConfig(cell_type_col="line"), "memory").config
    assert (config.perturbation_col, config.cell_type_col, config.batch_col) == ("condition", "line", None)


def test_a_file_with_all_three_columns_is_of_no_other_kind():
    adata = screen_with_cells([("control", "T", "b", 2), ("A", "T", "b", 2)])
    adata.obs["gene"] = "non-targeting"
    adata.obs["gem_group"] = 1
    assert Screen.read(adata).config == DataConfig()


def test_cells_are_dropped_before_their_doses_are_looked_at_and_by_any_column():
    columns = {"perturbation": ["control", "A", "nan", "unassigned", "A"], "dose": [0.0, 1.0, 0.0, np.nan, 0.0]}
    config = DataConfig(dose_col="dose", drop=["nan", "unassigned", "qc=fail"])
    found = labels_of(config, **columns, qc=["ok", "ok", "ok", "ok", "fail"])
    assert found.obs["perturbation"].tolist() == ["control", "A@1"]
    with pytest.raises(ValueError, match="in cell 'c4', which received 'A'; doses must be finite"):
        labels_of(DataConfig(dose_col="dose", drop=["nan", "unassigned"]), **columns)


def test_a_control_label_that_is_said_is_not_that_of_another_column():
    columns = {"gene": ["control", "A"], "condition": ["ctrl", "x"], "cell_type": ["T", "T"]}
    config = DataConfig(perturbation_col="gene", control_label="control")
    found = read_labels(pd.DataFrame(columns, index=["x", "y"]), config, "memory")
    assert found.obs["perturbation"].tolist() == ["control", "A"]


def test_a_float_column_is_named_by_its_numbers():
    columns = {"perturbation": ["control", "A", "B"], "day": [0.0, 10.0, 0.5]}
    assert perturbations(DataConfig(drop=["day=10"]), **columns) == ["control", "B"]
    assert perturbations(DataConfig(drop=["day=0.50"]), **columns) == ["control", "A"]


def test_lists_of_drugs_in_two_units_are_refused():
    texts = [repr([("DMSO_TF", 0.0, "uM")]), repr([("A", 0.5, "uM")]), repr([("A", 500.0, "nM")])]
    with pytest.raises(ValueError, match="these labels: doses are in nM, uM"):
        labels_of(DataConfig(control_label=texts[0]), perturbation=texts)


def test_doses_that_are_pooled_are_said():
    columns = {"perturbation": ["control", "A", "A"], "dose_value": [0.0, 10.0, 1e4]}
    (note,) = labels_of(**columns).notes
    assert note == "2 doses of obs column 'dose_value' are one condition; data.dose_col=dose_value tells them apart"
    assert labels_of(DataConfig(dose_col="dose_value"), **columns).notes == ()
