import re
from dataclasses import replace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata.io import write_elem
from scipy import sparse

from perturbdiff.atlas.build.sources.h5ad import H5adSource
from perturbdiff.config import DataConfig, ObsColumns, Preprocessing, SourceConfig
from perturbdiff.data.h5ad import read_h5ad_parts
from perturbdiff.data.screen import Screen, control_cells, expression_of
from perturbdiff.data.vocab import GeneVocab
from tests.screens import counts_screen, log1p_cp10k, read, real_screen, shared, written

CONFIG = DataConfig(screen="unused")
LABELS = ["perturbation", "cell_type", "batch"]


@pytest.fixture
def adata():
    return counts_screen()


def assert_equal(a: Screen, b: Screen):
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(a.expression.X, name), getattr(b.expression.X, name))
    assert a.expression.X.dtype == b.expression.X.dtype
    np.testing.assert_array_equal(a.expression.library_size, b.expression.library_size)
    assert a.expression.genes == b.expression.genes
    assert a.expression.preprocessing == b.expression.preprocessing
    pd.testing.assert_frame_equal(a.obs, b.obs)
    assert (a.control_label, a.notes) == (b.control_label, b.notes)


def edited(adata, path, change):
    """The .h5ad of `adata` after `change(file)`."""
    with h5py.File(written(adata, path), "r+") as file:
        change(file)
    return path


# ---------------------------------------------------------------- forms of the same screen


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix], ids=["dense", "csr", "csc"])
@pytest.mark.parametrize("kind", ["counts", "log1p"])
def test_the_same_cells_are_read_from_any_form_of_x(adata, tmp_path, form, compression, kind):
    dense = adata.X.toarray() if kind == "counts" else log1p_cp10k(adata.X).astype(np.float32)
    adata.X = sparse.csr_matrix(dense)
    expected = read(adata)
    adata.X = form(dense)
    path = written(adata, tmp_path / "screen.h5ad", compression)
    assert_equal(Screen.read(path, CONFIG), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int64, np.uint16])
def test_counts_of_any_number_type_are_the_same_screen(adata, tmp_path, dtype):
    expected = read(adata)
    adata.X = adata.X.astype(dtype)
    assert_equal(Screen.read(written(adata, tmp_path / "screen.h5ad"), CONFIG), expected)


def test_only_x_obs_and_var_are_read(adata, tmp_path):
    adata.layers["scaled"] = -adata.X.toarray()
    adata.uns["what"] = {"ever": np.arange(3)}
    adata.obsm["X_pca"] = np.full((adata.n_obs, 2), np.nan)

    def spoil(file):
        file["layers/scaled"].attrs["encoding-type"] = "of another program"

    path = edited(adata, tmp_path / "screen.h5ad", spoil)
    assert_equal(Screen.read(path, CONFIG), read(counts_screen()))


@pytest.mark.parametrize("kind", ["counts", "log1p"])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix], ids=["dense", "csr", "csc"])
def test_the_callers_anndata_is_never_changed(adata, form, kind):
    dense = adata.X.toarray() if kind == "counts" else log1p_cp10k(adata.X)
    X = form(dense.astype(np.float32))
    if sparse.issparse(X):
        X.data[::3] = 0  # stored zeros
        X.indices[:2] = X.indices[:2][::-1].copy()  # unsorted
        X.data[:2] = X.data[:2][::-1].copy()
    arrays = [X] if isinstance(X, np.ndarray) else [X.data, X.indices, X.indptr]
    before = [array.copy() for array in arrays]
    obs, var = adata.obs.copy(), adata.var.copy()
    given = anndata.AnnData(X, obs=adata.obs, var=adata.var)
    screen = read(given)
    screen.with_genes(np.array([3, 1])).expression.log1p()
    expression_of(given, screen.expression.preprocessing).with_genes(GeneVocab(("new",)), np.array([-1]))
    for array, original in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, original)
    pd.testing.assert_frame_equal(given.obs, obs)
    pd.testing.assert_frame_equal(given.var, var)


# ---------------------------------------------------------------- obs


def test_cells_are_sorted_by_condition_and_rows_still_match_their_obs(adata):
    adata.obs["number"] = np.arange(adata.n_obs)
    screen = read(adata)
    keys = list(zip(screen.obs["cell_type"], screen.obs["batch"], screen.obs["perturbation"], strict=True))
    assert keys == sorted(keys)
    assert sorted(screen.obs["number"]) == list(range(adata.n_obs))
    source = screen.obs["number"].to_numpy()
    assert screen.obs.index.tolist() == adata.obs_names[source].tolist()
    np.testing.assert_array_equal(screen.expression.X.toarray(), adata.X.toarray()[source])
    np.testing.assert_array_equal(screen.expression.library_size, adata.X.toarray().sum(1)[source])
    for name in LABELS:
        assert screen.obs[name].tolist() == adata.obs[name].iloc[source].tolist()


def test_columns_and_control_label_may_have_other_names(adata, tmp_path):
    expected = read(adata)
    adata.obs = adata.obs.rename(columns={"perturbation": "gene", "cell_type": "line", "batch": "lane"})
    adata.obs["gene"] = adata.obs["gene"].replace("control", "non-targeting")
    adata.obs["batch"] = "another meaning"
    config = DataConfig(
        screen="unused", perturbation_col="gene", cell_type_col="line", batch_col="lane", control_label="non-targeting"
    )
    screen = Screen.read(written(adata, tmp_path / "screen.h5ad"), config)
    assert screen.is_control.sum() == expected.is_control.sum()
    pd.testing.assert_series_equal(screen.obs["cell_type"], screen.obs["line"].astype(str), check_names=False)
    pd.testing.assert_series_equal(screen.obs["batch"], screen.obs["lane"].astype(str), check_names=False)
    assert set(screen.obs["perturbation"]) == {"A", "B", "A+B", "non-targeting"}


def test_one_column_may_serve_as_cell_type_and_batch(adata):
    screen = read(adata, cell_type_col="batch")
    assert screen.obs["cell_type"].tolist() == screen.obs["batch"].tolist()


def test_numbers_booleans_and_categories_become_text_labels(adata):
    adata.obs["batch"] = pd.Categorical([1, 2] * (adata.n_obs // 2))
    adata.obs["cell_type"] = adata.obs["cell_type"] == "T"
    screen = read(adata)
    assert set(screen.obs["batch"]) == {"1", "2"}
    assert set(screen.obs["cell_type"]) == {"True", "False"}


@pytest.mark.parametrize("names", [["x"] * 4, ["x", "x", "x-1", "x-1"], ["x-1", "x", "x", "y"]])
def test_repeated_obs_names_are_made_unique_and_said(adata, names):
    obs = adata.obs.set_axis([*names, *adata.obs_names[4:]], axis=0)
    obs["number"] = np.arange(len(obs))
    screen = Screen.from_parts(adata.X, obs, adata.var, CONFIG, "memory")
    assert len(screen) == adata.n_obs
    assert screen.obs.index.is_unique
    np.testing.assert_array_equal(screen.expression.X.toarray(), adata.X.toarray()[screen.obs["number"]])
    (note,) = screen.notes
    assert re.search(r"\d repeated obs_names got a suffix", note)
    assert note in screen.summary()


def test_a_missing_column_is_an_error_that_lists_those_there(adata):
    for setting, column in (("data.perturbation_col", "gene"), ("data.cell_type_col", "line"), ("data.batch_col", "x")):
        with pytest.raises(KeyError) as error:
            read(adata, **{setting.removeprefix("data."): column})
        assert f"obs column {column!r} not in memory" in error.value.args[0]
        assert "found ['batch', 'cell_type', 'perturbation']" in error.value.args[0]
        assert f"Set {setting}=..." in error.value.args[0]


def test_a_missing_label_is_an_error_that_names_a_cell(adata):
    adata.obs["batch"] = adata.obs["batch"].astype(object)
    adata.obs.iloc[[7, 9], 2] = None
    with pytest.raises(ValueError, match="'batch' of memory has 2 missing values, the first in cell 'cell_7'"):
        read(adata)


def test_an_absent_control_label_is_an_error_with_the_nearest_labels(adata):
    with pytest.raises(ValueError, match=r"control label 'Contrl'.*did you mean control\?.*Set data.control_label"):
        read(adata, control_label="Contrl")


# ---------------------------------------------------------------- X


def test_counts_and_log1p_are_told_apart_and_may_be_declared(adata):
    assert read(adata).expression.preprocessing == Preprocessing("counts", 1e4, 10.0, None)
    logged = adata.copy()
    logged.X = log1p_cp10k(adata.X)
    screen = read(logged)
    assert screen.expression.preprocessing.input_kind == "log1p"
    assert screen.expression.X.dtype == np.float32
    np.testing.assert_array_equal(screen.expression.library_size, 1)
    with pytest.raises(ValueError, match="declared as counts"):
        read(logged, input_kind="counts")
    adata.X = adata.X.minimum(9)
    assert read(adata, input_kind="log1p").expression.preprocessing.input_kind == "log1p"


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, np.uint16), (65_536, np.uint32), (2**32 - 1, np.uint32)])
def test_counts_are_stored_in_the_smallest_type_that_holds_them(adata, largest, dtype):
    X = adata.X.astype(np.float64).tolil()
    X[3, 5] = largest
    adata.X = X.tocsr()
    screen = read(adata)
    assert screen.expression.X.dtype == dtype
    assert screen.expression.X.max() == largest


def test_a_count_that_no_storage_holds_is_refused_by_its_value(adata):
    X = adata.X.astype(np.float64).tolil()
    X[3, 5] = 2**32
    adata.X = X.tocsr()
    with pytest.raises(ValueError, match="a count of 4294967296; counts must be under"):
        read(adata)


def test_duplicate_genes_are_refused(adata):
    var = adata.var.set_axis(["same", "same", *adata.var_names[2:]], axis=0)
    with pytest.raises(ValueError, match="1 duplicate gene names, for example same"):
        Screen.from_parts(adata.X, adata.obs, var, CONFIG, "memory")


@pytest.mark.parametrize("column", ["ensembl_id", "gene_ids", "gene_id", "feature_id"])
def test_ensembl_ids_are_kept_in_order_and_missing_ones_are_empty(adata, tmp_path, column):
    ids = [f"ENSG{i:05}" for i in range(adata.n_vars)]
    adata.var[column] = [*ids[:-1], None]
    screen = Screen.read(written(adata, tmp_path / "screen.h5ad"), CONFIG)
    assert screen.expression.genes == GeneVocab(tuple(adata.var_names), (*ids[:-1], ""))
    assert screen.with_genes(np.array([4, 2])).expression.genes.ensembl == (ids[4], ids[2])


def test_cells_without_counts_are_kept_and_said(adata):
    X = adata.X.tolil()
    X[[1, 5]] = 0
    adata.X = X.tocsr()
    screen = read(adata)
    assert len(screen) == adata.n_obs
    assert screen.notes == ("2 cells have no counts at all; they stay all zeros",)
    empty = screen.expression.library_size == 0
    assert empty.sum() == 2
    assert screen.expression.log1p()[empty].nnz == 0


def test_x_that_does_not_fit_obs_and_var_is_refused(adata):
    with pytest.raises(ValueError, match=re.escape("X of memory is (57, 12); it must be (108, 12)")):
        Screen.from_parts(adata.X[:57], adata.obs, adata.var, CONFIG, "memory")


# ---------------------------------------------------------------- library size


def test_library_size_comes_from_the_obs_column_where_one_is_named(adata):
    adata.obs["total"] = np.arange(adata.n_obs) * 10 + 500
    screen = read(adata, library_size_col="total", target_sum=1e3)
    np.testing.assert_array_equal(screen.expression.library_size, screen.obs["total"])
    counts = screen.expression.X.toarray()
    expected = np.log1p(counts * 1e3 / screen.obs["total"].to_numpy()[:, None])
    np.testing.assert_allclose(screen.expression.log1p().toarray(), expected, rtol=1e-6)


def test_library_size_is_of_the_whole_file_also_after_genes_were_chosen(adata):
    screen = read(adata)
    panel = screen.with_genes(np.array([2, 7]))
    np.testing.assert_array_equal(panel.expression.library_size, screen.expression.X.toarray().sum(1))
    np.testing.assert_array_equal(panel.expression.log1p().toarray(), screen.expression.log1p().toarray()[:, [2, 7]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, "many"])
def test_a_library_size_that_is_no_size_is_refused_with_value_and_cell(adata, bad):
    adata.obs["total"] = pd.Series(500.0, index=adata.obs_names).astype(object)
    adata.obs.loc["cell_4", "total"] = bad
    with pytest.raises(ValueError, match=rf"'total' holds '?{bad}'? in cell 'cell_4'"):
        read(adata, library_size_col="total")


def test_a_missing_library_size_column_is_an_error_that_lists_those_there(adata):
    with pytest.raises(KeyError, match=r"obs column 'total' not in memory; found \['batch'.*Set data.library_size_col"):
        read(adata, library_size_col="total")


# ---------------------------------------------------------------- genes of a model


def test_genes_are_brought_into_the_models_order_with_zeros_for_missing_ones(adata):
    screen = read(adata)
    dense = screen.expression.X.toarray()
    columns = np.array([5, -1, 0, 11, -1])
    genes = GeneVocab(tuple("vwxyz"))
    aligned = screen.expression.with_genes(genes, columns)
    expected = np.where(columns >= 0, dense[:, columns], 0)
    np.testing.assert_array_equal(aligned.X.toarray(), expected)
    assert aligned.X.has_sorted_indices
    assert aligned.genes is genes
    np.testing.assert_array_equal(aligned.library_size, dense.sum(1))


def test_counts_and_log1p_values_may_be_given_to_a_model_of_either_unless_nobody_knows_its_space(adata):
    logged = adata.copy()
    logged.X = log1p_cp10k(adata.X)
    of_counts = Preprocessing("counts", 1e4, 10.0)
    of_log1p, of_unknown = replace(of_counts, input_kind="log1p"), Preprocessing("log1p", None, 10.0)
    from_counts = expression_of(adata, of_counts).log1p().toarray()
    for cells, preprocessing in ((logged, of_counts), (logged, of_log1p), (adata, of_log1p), (logged, of_unknown)):
        np.testing.assert_allclose(expression_of(cells, preprocessing).log1p().toarray(), from_counts, rtol=1e-6)
    with pytest.raises(ValueError, match="X holds counts, but this model was trained on log1p values of nobody knows"):
        expression_of(adata, of_unknown)


# ---------------------------------------------------------------- rows that are no genes, columns that are not there


def with_guides(adata):
    """Guide counts, which tell the perturbation, beside the genes, one of them under the name of a gene."""
    guides = np.stack([(adata.obs["perturbation"] == name) * 50 for name in ("A", "B")], axis=1)
    X = sparse.csr_matrix(np.hstack([guides[:, :1], adata.X.toarray(), guides[:, 1:]]).astype(np.float32))
    types = ["CRISPR Guide Capture", *["Gene Expression"] * adata.n_vars, "Antibody Capture"]
    var = pd.DataFrame({"feature_types": pd.Categorical(types)}, index=["gene_1", *adata.var_names, "B-guide"])
    return anndata.AnnData(X, obs=adata.obs, var=var)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("in_memory", [True, False])
def test_guides_and_antibodies_are_no_genes(adata, tmp_path, in_memory):
    guided = with_guides(adata)
    source = guided if in_memory else written(guided, tmp_path / "x.h5ad")
    screen, expected = Screen.read(source, CONFIG), Screen.read(adata, CONFIG)
    assert_equal(replace(screen, path=expected.path, notes=()), expected)
    assert screen.notes == ("2 columns of X are no genes and are left out: gene_1, B-guide",)
    if not in_memory:
        controls = control_cells(source, ObsColumns(), None, None)
        assert controls.n_vars == adata.n_vars + 2
        atlas = H5adSource.open(SourceConfig(path=str(source)))
        X, library = atlas.read(0, adata.n_obs)
        assert (X != adata.X).nnz == 0
        np.testing.assert_array_equal(library, np.asarray(adata.X.sum(1)).ravel())
        assert atlas.values == "raw counts; 2 columns of X are no genes"


def test_types_that_nobody_knows_are_genes(adata):
    adata.var["feature_types"] = "protein"
    assert read(adata).expression.genes.names == tuple(adata.var_names)


def test_cells_that_no_column_calls_controls_are_controls_with_a_word(adata, tmp_path):
    path = written(adata, tmp_path / "x.h5ad")
    renamed = ObsColumns(perturbation="condition")
    with pytest.raises(ValueError, match=r"no obs column 'condition' says .* but perturbation holds 'control'; set"):
        control_cells(path, renamed, None, None)
    alone = adata[adata.obs["perturbation"] == "control"].copy()
    alone.obs = alone.obs[[]]
    path = written(alone, tmp_path / "alone.h5ad")
    with pytest.warns(UserWarning, match="cells are taken for") as warned:
        assert control_cells(path, ObsColumns(), "NK", None).n_obs == alone.n_obs
    assert [str(warning.message) for warning in warned] == [
        f"no obs column 'perturbation': all {alone.n_obs} cells are taken for controls",
        f"no obs column 'cell_type': all {alone.n_obs} cells are taken for cells of type 'NK'",
    ]


# ---------------------------------------------------------------- files that are none


def test_a_missing_file_and_a_folder_are_not_found(tmp_path):
    for path in (tmp_path / "no.h5ad", tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
            read_h5ad_parts(path)


@pytest.mark.parametrize("content", [b"", b"gene,cell\n1,2\n", b"\x89HDF\r\n\x1a\n"])
def test_what_is_not_hdf5_is_refused(tmp_path, content):
    path = tmp_path / "table.h5ad"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table.h5ad is not a readable .h5ad"):
        read_h5ad_parts(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(adata, tmp_path, part):
    path = written(adata, tmp_path / "screen.h5ad")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=r"screen.h5ad is not a readable .h5ad"):
        read_h5ad_parts(path)


def zeroed_chunk(file):
    offset = file["X/data"].id.get_chunk_info(0).byte_offset
    name = file.filename
    file.close()
    with open(name, "r+b") as raw:
        raw.seek(offset)
        raw.write(bytes(32))


def without(name):
    def change(file):
        del file[name]

    return change


def with_attribute(name, key, value):
    def change(file):
        file[name].attrs[key] = value

    return change


def with_short_column(file):
    codes = file["obs/batch/codes"][:5]
    del file["obs/batch/codes"]
    file["obs/batch/codes"] = codes


def with_foreign_code(file):
    file["obs/batch/codes"][2] = 77


def with_index_outside(file):
    file["X/indices"][3] = 10**6


def with_pointer_outside(file):
    file["X/indptr"][3] = 10**6


def with_text_as_x(file):
    del file["X"]
    write_elem(file, "X", np.array(["a", "b"]))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(zeroed_chunk, id="zeroed chunk"),
        pytest.param(without("X"), id="no X"),
        pytest.param(without("var"), id="no var"),
        pytest.param(without("X/indices"), id="no indices"),
        pytest.param(without("obs/cell_type"), id="a column lost"),
        pytest.param(with_attribute("X", "encoding-version", "9.9"), id="newer encoding"),
        pytest.param(with_attribute("obs", "encoding-type", "of another program"), id="foreign encoding"),
        pytest.param(with_short_column, id="short column"),
        pytest.param(with_foreign_code, id="code without category"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_with_its_path(adata, tmp_path, change):
    path = edited(adata, tmp_path / "screen.h5ad", change)
    with pytest.raises(ValueError, match=rf"{path} is not a(n| readable) \.h5ad"):
        Screen.read(path, CONFIG)


@pytest.mark.parametrize(
    "change",
    [with_index_outside, with_pointer_outside, with_attribute("X", "shape", [5, 5]), with_text_as_x],
    ids=["index", "pointer", "shape", "text"],
)
def test_a_damaged_x_is_refused_before_it_is_used(adata, tmp_path, change):
    with pytest.raises(ValueError, match=r"X is a damaged sparse matrix|it must be a dense, CSR or CSC matrix"):
        Screen.read(edited(adata, tmp_path / "screen.h5ad", change), CONFIG)


def test_an_adata_is_read_as_its_file(adata, tmp_path):
    path = written(adata, tmp_path / "screen.h5ad")
    in_memory = Screen.read(adata, CONFIG)
    assert_equal(in_memory, Screen.read(path, CONFIG))
    assert (in_memory.path, Screen.read(path, CONFIG).path) == ("screen in memory", str(path))


def test_obs_that_is_no_table_is_refused(tmp_path):
    with h5py.File(tmp_path / "arrays.h5ad", "w") as file:
        for name, shape in (("X", (3, 2)), ("obs", 3), ("var", 2)):
            write_elem(file, name, np.ones(shape))
    with pytest.raises(ValueError, match="obs and var must be tables"):
        read_h5ad_parts(tmp_path / "arrays.h5ad")


# ---------------------------------------------------------------- summary


def test_the_summary_says_what_was_found(adata):
    screen = read(adata)
    text = screen.summary()
    assert f"cells       {adata.n_obs:,}: 72 perturbed, 36 'control'" in text
    assert repr(screen) == text
    assert "genes       12\n" in text
    assert "raw counts" in text
    assert f"largest value {adata.X.max():g}" in text
    assert f"median {np.median(adata.X.toarray().sum(1)):,.0f} counts a cell, from row sums of X" in text
    assert "conditions  12 (perturbation, cell type, batch) of 6 to 6 cells, median 6" in text
    assert re.search(r"^perturbations 3: ", text, re.MULTILINE)


def test_the_summary_of_a_screen_of_controls_alone_can_be_written(adata):
    screen = read(adata[adata.obs["perturbation"] == "control"].copy())
    assert "perturbations 0:\n" in screen.summary()


# ---------------------------------------------------------------- real screens

REAL = {
    "papalexi2021_thp1_eccite_crisprko.h5ad": "n_counts_panel",
    "schraivogel2020_k562_tapseq_crispri.h5ad": "n_counts_panel",
    "gasperini2019_k562_highmoi_crispri.h5ad": None,
    "norman2019_mcfaline2023_crispr_devel.h5ad": None,
    "datlinger2021_jurkat_scifi_crisprko_sparse.h5ad": "nCount_originalexp",
    "zhao2021_glioblastoma_panobinostat.h5ad": "n_counts_panel",
    "kang2018_pbmc_ifnb.h5ad": "n_counts_panel",
    "stoeckius2018_pbmc_hto_unperturbed.h5ad": "n_counts",
    "scp1884_crohn_gut_unperturbed_1k.h5ad": None,
}


def stated(name):
    """Cells, genes, perturbations, controls, cell types and batches that the data's README gives for a file."""
    table = shared("PERTURBDIFF_REAL_DATA", "data", "README.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    _, _, shape, _, perturbations, controls, contexts, *_ = (field.replace(",", "").strip() for field in row.split("|"))
    numbers = re.findall(r"\d+", f"{shape} {perturbations} {controls} {contexts.replace('(s)', '')}")
    return tuple(map(int, numbers))


@pytest.mark.parametrize(("name", "total"), REAL.items(), ids=[name.split("_")[0] for name in REAL])
def test_a_real_screen_is_read_as_its_readme_says(name, total):
    screen = Screen.read(real_screen(name), CONFIG)
    control, obs = screen.is_control, screen.obs
    found = (
        len(screen),
        len(screen.expression.genes),
        obs["perturbation"][~control].nunique(),
        int(control.sum()),
        obs["cell_type"].nunique(),
        obs["batch"].nunique(),
    )
    assert found == stated(name)
    assert screen.expression.preprocessing.input_kind == "counts"
    assert screen.expression.X.dtype == np.uint16
    assert [note for note in screen.notes if "not all parts stand alone" not in note] == []
    if total is not None:  # obs says how many counts a cell has in these genes
        np.testing.assert_array_equal(screen.expression.library_size, obs[total])


def test_gasperini_is_normalised_by_its_full_transcriptome_counts():
    config = DataConfig(screen="unused", library_size_col="n_counts_total")
    screen = Screen.read(real_screen("gasperini2019_k562_highmoi_crispri.h5ad"), config)
    np.testing.assert_array_equal(screen.expression.library_size, screen.obs["n_counts_total"].astype(np.float32))
    assert (screen.expression.library_size > screen.expression.X.sum(1).A1).all()


def with_doses(adata, doses):
    adata = adata.copy()
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    adata.obs["dose"] = np.where(is_control, 0.0, doses)
    return adata


def test_a_column_of_doses_becomes_part_of_the_labels(adata):
    dosed = with_doses(adata, np.tile([0.5, 10.0], adata.n_obs)[: adata.n_obs])
    screen = read(dosed, dose_col="dose")
    for name, row in screen.obs.iterrows():
        label, dose = adata.obs.loc[name, "perturbation"], dosed.obs.loc[name, "dose"]
        parts = [f"{part}@{dose:g}" for part in label.split("+")]
        assert row["perturbation"] == ("control" if label == "control" else "+".join(parts))
    assert read(dosed, dose_col="dose", dose_separator=" at ").obs["perturbation"].str.contains(" at ").any()


@pytest.mark.parametrize("dose", [0.0, -1.0, np.nan, np.inf])
def test_a_perturbed_cell_without_a_dose_is_an_error_that_names_it(adata, dose):
    doses = np.ones(adata.n_obs)
    perturbed = np.flatnonzero((adata.obs["perturbation"] != "control").to_numpy())
    doses[perturbed[2]] = dose
    with pytest.raises(ValueError, match=f"{adata.obs_names[perturbed[2]]!r}.*finite and greater than 0"):
        read(with_doses(adata, doses), dose_col="dose")


def test_an_absent_column_of_doses_is_an_error(adata):
    with pytest.raises(KeyError, match=r"'dose' not in.*Set data\.dose_col"):
        read(adata, dose_col="dose")


def test_target_sum_may_be_the_median_of_the_controls(adata):
    counts = adata.X.toarray().sum(1)
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    expected = np.median(counts[is_control])
    assert expected != np.median(counts)
    how = read(adata, target_sum=None).expression.preprocessing
    assert how.target_sum == pytest.approx(expected)


def test_labels_made_of_control_labels_alone_are_controls(adata, tmp_path):
    labels = adata.obs["perturbation"].astype(str).replace({"A": "NT", "B": "control+NT"})
    adata.obs["perturbation"] = labels
    path = written(adata, tmp_path / "x.h5ad")
    columns = ObsColumns(other_control_labels=("NT",))
    found = control_cells(path, columns, None, None)
    assert set(found.obs["perturbation"].astype(str)) == {"control", "NT", "control+NT"}
    assert found.n_obs == labels.isin(["control", "NT", "control+NT"]).sum()


def test_cells_of_a_type_cannot_be_chosen_for_a_model_without_types(adata, tmp_path):
    path = written(adata, tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="trained without cell types: it cannot choose cells of 'NK'"):
        control_cells(path, ObsColumns(cell_type=None), "NK", None)
    assert control_cells(path, ObsColumns(cell_type=None), "all", None).n_obs


# ---------------------------------------------------------------- what deceives


def test_controls_that_training_left_out_are_no_controls(adata, tmp_path):
    adata.obs["qc"] = np.where(np.arange(adata.n_obs) % 3 == 0, "fail", "pass")
    path = written(adata, tmp_path / "x.h5ad")
    everything = control_cells(path, ObsColumns(), None, None)
    with pytest.warns(UserWarning, match="cells are left out, as training left them out"):
        kept = control_cells(path, ObsColumns(drop=("qc=fail",)), None, None)
    assert list(kept.obs_names) == list(everything.obs_names[everything.obs["qc"] == "pass"])
    del adata.obs["qc"]
    path = written(adata, tmp_path / "y.h5ad")
    with pytest.warns(UserWarning, match=r"left cells out by data.drop=qc=fail, and no obs column 'qc'"):
        assert control_cells(path, ObsColumns(drop=("qc=fail",)), None, None).n_obs == everything.n_obs


def test_library_sizes_smaller_than_their_counts_are_refused(adata):
    adata.obs["n"] = np.log1p(np.asarray(adata.X.sum(1)).ravel())
    with pytest.raises(ValueError, match="obs column 'n' of memory is no total of counts: it is smaller than"):
        read(adata, library_size_col="n")
    logged = anndata.AnnData(log1p_cp10k(adata.X), obs=adata.obs, var=adata.var)
    assert any("of which obs column 'n' says nothing" in note for note in read(logged, library_size_col="n").notes)
    with pytest.raises(KeyError, match="obs column 'm' not in memory"):
        read(logged, library_size_col="m")


def test_marks_bins_and_scaled_counts_are_no_counts():
    adata = counts_screen(n_genes=60)
    X = adata.X.toarray()
    marks = anndata.AnnData((X > 0).astype(np.float32), obs=adata.obs, var=adata.var)
    with pytest.raises(ValueError, match="the largest of which is 1 in every cell: marks of genes"):
        read(marks)
    assert read(marks, input_kind="counts").expression.X.max() == 1
    with pytest.raises(ValueError, match="they were scaled"):
        read(anndata.AnnData(X * np.float32(0.1), obs=adata.obs, var=adata.var))


def test_labels_that_say_nothing_and_hidden_columns_are_said(adata):
    adata.obs["plate"], adata.obs["cell_type"] = adata.obs["batch"], "nan"
    notes = "\n".join(read(adata, batch_col="plate").notes)
    assert "obs column 'batch' is not read: the batch of cells is that of obs column 'plate'" in notes
    assert "'nan' are taken for cell types" in notes


def test_a_panel_is_told_what_to_set():
    adata = counts_screen(n_genes=12)
    assert "a panel of 12 genes? A cell has" in read(adata).panel_note()
    assert "Set data.library_size_col=COLUMN" in read(adata).panel_note()
    sums = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.obs["half"], adata.obs["all_counts"] = sums / 2, 10 * sums + 1
    assert "Set data.library_size_col=all_counts, if that is all counts" in read(adata).panel_note()
    assert read(adata, library_size_col="all_counts").panel_note() == ""
    assert read(adata, target_sum=None).panel_note() == ""
    assert read(adata, target_sum=float(np.median(sums))).panel_note() == ""
