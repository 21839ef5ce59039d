from __future__ import annotations

import tracemalloc
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from perturbdiff.atlas.build.sources import h5ad as source_h5ad
from perturbdiff.atlas.build.sources.base import Selection, open_source
from perturbdiff.atlas.build.sources.parquet import LocalFiles, RowGroups, batches, lists
from perturbdiff.config import DataConfig, SourceConfig
from perturbdiff.data.screen import LABELS, Screen
from tests.atlases import atlas_of_screen, odd_histogram, words_beyond, write_atlas
from tests.screens import counts_screen, real_screen, written
from tests.spaces import SPACES, counts

pytestmark = pytest.mark.slow


def open_h5ad(path: Path, **given_settings):
    return open_source(SourceConfig(path=str(path), **given_settings))


def whole(source, max_values: int = 64):
    """Labels, X and library sizes of a source read chunk by chunk."""
    labels, X, library, at = [], [], [], 0
    for first, last in source.chunks(max_values):
        assert first == at
        assert last > first
        at = last
        matrix, sizes = source.read(first, last)
        assert matrix.has_sorted_indices
        assert (matrix.data > 0).all()
        assert sizes.dtype == np.float32
        labels.append(source.labels(first, last))
        X.append(matrix)
        library.append(sizes)
    assert at == source.n_cells
    frame = pd.concat([part.astype(dict.fromkeys(LABELS, str)) for part in labels], ignore_index=True)
    return frame, sparse.vstack(X, format="csr"), np.concatenate(library)


def same_as_screen(source, path: Path, max_values: int = 64, **data_settings) -> None:
    screen = Screen.read(path, DataConfig(screen=str(path), **data_settings))
    labels, X, library = whole(source, max_values)
    at = screen.obs.index.get_indexer(labels["cell"])
    assert (at >= 0).all()
    assert len(labels) == len(screen)
    assert source.input_kind == screen.expression.preprocessing.input_kind
    assert source.genes == screen.expression.genes
    assert np.array_equal(X.toarray(), screen.expression.X[at].toarray())
    assert np.array_equal(library, screen.expression.library_size[at])
    for name in LABELS:
        assert labels[name].tolist() == screen.obs[name].iloc[at].tolist()


# ------------------------------------------------------------------------------------------------- .h5ad


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(["dense", "csr", "unsorted"]),
    dtype=st.sampled_from(["float32", "float64", "int32", "int64", "uint8"]),
    compression=st.sampled_from([None, "gzip", "lzf"]),
    log1p=st.booleans(),
    max_values=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_chunks_of_an_h5ad_hold_what_a_screen_reads(tmp_path, form, dtype, compression, log1p, max_values, seed):
    adata = counts_screen(n_genes=9, n=2, seed=seed)
    dense = adata.X.toarray()
    dense[seed % 7] = 0  # a cell without counts
    dense = (
        np.log1p(dense * 0.7).astype("float64" if dtype == "float64" else "float32") if log1p else dense.astype(dtype)
    )
    adata.X = dense if form == "dense" else sparse.csr_matrix(dense)
    if form == "unsorted":
        adata.X = adata.X[:, ::-1]  # scipy leaves the indices of such a matrix unsorted
        adata.X.has_sorted_indices = False
    path = written(adata, tmp_path / "a.h5ad", compression)
    same_as_screen(open_h5ad(path), path, max_values)


@pytest.mark.parametrize(
    "name", ["kang2018_pbmc_ifnb", "gasperini2019_k562_highmoi_crispri", "scp1884_crohn_gut_unperturbed_1k"]
)
def test_real_screens_read_in_parts_are_what_a_screen_reads(name):
    path = real_screen(f"{name}.h5ad")
    same_as_screen(open_h5ad(path), path, 1 << 20)


@pytest.mark.parametrize("dense", [False, True])
def test_chunks_hold_at_most_max_values_unless_they_are_one_cell(tmp_path, dense):
    adata = counts_screen(n_genes=30, n=5)
    if dense:
        adata.X = adata.X.toarray()
    source = open_h5ad(written(adata, tmp_path / "a.h5ad", None))
    stored = np.full(len(adata), 30) if dense else np.diff(adata.X.indptr)
    for max_values in (1, 29, 100, 10**6):
        chunks = source.chunks(max_values)
        assert [first for first, _ in chunks] == [0, *(last for _, last in chunks[:-1])]
        for first, last in chunks:
            assert stored[first:last].sum() <= max_values or last - first == 1
        full = [(stored[a:b].sum() + stored[b]) > max_values for a, b in chunks[:-1]]
        assert dense or all(full)


def test_a_compressed_block_of_a_dense_file_is_not_cut(tmp_path):
    adata = counts_screen(n_genes=8, n=30)
    path = written(adata, tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", data=adata.X.toarray(), chunks=(32, 8), compression="gzip")
    assert {first % 32 for first, _ in open_h5ad(path).chunks(100 * 8)} == {0}
    assert open_h5ad(path).chunks(8)[1] == (1, 2)


def test_empty_cells_do_not_make_one_chunk_of_a_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(source_h5ad, "_MAX_ROWS", 10)
    adata = counts_screen()
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
    source = open_h5ad(written(adata, tmp_path / "a.h5ad"))
    assert max(last - first for first, last in source.chunks(10**6)) == 10
    assert source.input_kind == "counts"
    assert whole(source)[1].nnz == 0


def test_a_chunk_is_read_without_the_rest_of_the_file(tmp_path):
    n, genes = 20_000, 400
    X = sparse.random_array((n, genes), density=0.5, format="csr", random_state=0, dtype=np.float32)
    X.data[:] = np.repeat(1 + np.arange(n) % 7, np.diff(X.indptr))
    path = tmp_path / "a.h5ad"
    obs = pd.DataFrame(dict.fromkeys(LABELS, "a"), index=[f"c{i}" for i in range(n)])
    anndata.AnnData(sparse.csr_matrix(X), obs=obs).write_h5ad(path)  # 32 MB
    source = open_h5ad(path, control_label="a")
    assert source.input_kind == "counts"
    tracemalloc.start()
    for first, last in source.chunks(100_000)[:5]:
        source.read(first, last)
        source.labels(first, last)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.parametrize(
    "values",
    [
        pd.Categorical(["a", "b", "a", "b"]),
        np.array(["x", "yy", "x", ""], dtype=object),
        np.array([3, 1, 2, 3]),
        np.array([0.5, 1.0, 2.0, 1.0], dtype=np.float32),
        np.array([True, False, True, True]),
        pd.array([1, 2, 3, 1], dtype="Int64"),
        pd.array([True, False, True, True], dtype="boolean"),
        pd.Categorical([3, 1, 3, 2]),
    ],
    ids=["categorical", "text", "int", "float", "bool", "Int64", "boolean", "categorical int"],
)
def test_labels_of_every_type_read_as_a_screen_reads_them(tmp_path, values):
    obs = pd.DataFrame({"perturbation": ["control", "A", "A", "control"], "cell_type": "T"}, index=list("wxyz"))
    obs["batch"] = values
    path = written(anndata.AnnData(np.ones((4, 2), np.float32), obs=obs), tmp_path / "a.h5ad")
    same_as_screen(open_h5ad(path), path, 4)


def test_categoricals_as_anndata_0_7_wrote_them_are_read(tmp_path):
    path = written(counts_screen(), tmp_path / "a.h5ad")
    expected = whole(open_h5ad(path))[0]
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        for name in LABELS:
            codes, categories = obs[name]["codes"][:], obs[name]["categories"].asstr()[:]
            del obs[name]
            obs[f"__categories/{name}"] = categories.astype(object)
            obs[name] = codes
            obs[name].attrs["categories"] = obs[f"__categories/{name}"].ref
    assert whole(open_h5ad(path))[0].equals(expected)


@pytest.mark.parametrize(
    "values",
    [pd.Categorical(["a", None, "b", "a"]), np.array([1.0, np.nan, 1, 1]), pd.array([1, None, 2, 1], dtype="Int64")],
    ids=["code -1", "NaN", "masked"],
)
def test_a_missing_label_is_an_error_that_names_the_cell(tmp_path, values):
    obs = pd.DataFrame({"perturbation": "control", "cell_type": "T"}, index=list("wxyz"))
    obs["batch"] = values
    source = open_h5ad(written(anndata.AnnData(np.ones((4, 2), np.float32), obs=obs), tmp_path / "a.h5ad"))
    with pytest.raises(ValueError, match=r"'batch' of .* has 1 missing values .*, the first in cell 'x'"):
        source.labels(0, 4)
    assert len(source.labels(2, 4)) == 2


def test_labels_left_out_are_one_label_of_the_whole_source(tmp_path):
    path = written(counts_screen(), tmp_path / "blood.h5ad")
    source = open_h5ad(path, perturbation_col=None, cell_type_col=None, batch_col=None)
    labels = whole(source)[0]
    assert [labels[name].unique().tolist() for name in LABELS] == [["control"], ["blood"], ["blood"]]
    assert open_h5ad(path, name="cord").labels(0, 1).columns.tolist() == ["row", *LABELS, "cell"]


def test_the_control_label_is_renamed_and_another_control_refused(tmp_path):
    adata = counts_screen()
    expected = adata.obs["perturbation"].astype(str).replace({"A": "control", "control": "B2"}).tolist()
    renamed = adata[:, :].copy()
    renamed.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace("control", "B2")
    source = open_h5ad(written(renamed, tmp_path / "a.h5ad"), control_label="A")
    assert whole(source)[0]["perturbation"].tolist() == expected
    source = open_h5ad(written(adata, tmp_path / "b.h5ad"), control_label="A")
    cell = adata.obs_names[(adata.obs["perturbation"] == "control").to_numpy().argmax()]
    with pytest.raises(ValueError, match=f"cell '{cell}' of .* has the perturbation 'control', but the control label"):
        source.labels(0, source.n_cells)


def test_library_sizes_come_from_a_column(tmp_path):
    adata = counts_screen()
    adata.obs["n"] = np.asarray(adata.X.sum(axis=1)).ravel() + np.arange(len(adata)) + 0.5
    path = written(adata, tmp_path / "a.h5ad")
    source = open_h5ad(path, library_size_col="n")
    assert whole(source)[2].tolist() == adata.obs["n"].tolist()
    assert source.library_size == "column 'n'"
    adata.obs.loc["cell_7", "n"] = -1
    source = open_h5ad(written(adata, path), library_size_col="n")
    with pytest.raises(ValueError, match=r"'n' of .* holds np.float64\(-1.0\) in cell 'cell_7'; .* not negative"):
        whole(source)
    with pytest.raises(KeyError, match=r"obs column 'm' not in .*; found .* Set source\.library_size_col"):
        open_h5ad(path, library_size_col="m")


def test_a_source_goes_to_other_processes_and_changes_its_fingerprint_with_the_file(tmp_path):
    path = written(counts_screen(), tmp_path / "a.h5ad")
    source = open_h5ad(path)
    sent = ForkingPickler.loads(ForkingPickler.dumps(source))
    assert whole(sent)[0].equals(whole(source)[0])
    assert sent.fingerprint == source.fingerprint
    assert str(tmp_path) not in str(source.fingerprint)
    written(counts_screen(n=7), path)
    assert open_h5ad(path).fingerprint != source.fingerprint


# ------------------------------------------------------------------------------------------- what X holds


def damaged(tmp_path: Path, array: str, place: int, value: float, **given_settings):
    """A source whose file holds `value` at a place of X/data, X/indices or X/indptr."""
    path = written(counts_screen(), tmp_path / "a.h5ad", None)
    with h5py.File(path, "r+") as file:
        file["X"][array][place] = value
    return open_h5ad(path, **given_settings)


@pytest.mark.parametrize(
    ("array", "place", "value", "message"),
    [
        ("data", 40, np.nan, "taken for counts .* holds nan for gene 'gene_.*' in cell 'cell_.*, which is not finite"),
        ("data", 40, np.inf, "holds inf for gene .* which is not finite"),
        ("data", 40, -3, "holds -3 for gene .* which is negative"),
        ("data", 40, 2.0**33, r"holds 8589934592 for gene .* too large: counts must be under 2\*\*32"),
        ("indices", 40, 12, r"has the gene index 12 in cell 'cell_\d+' \(row \d+\), of 12 genes"),
        ("indices", 40, -1, "has the gene index -1 in cell"),
        ("indices", 0, -1, r"has the gene index -1 in cell .cell_0. "),
        ("indices", -1, 12, r"has the gene index 12 in cell"),
        ("indptr", 5, 0, "damaged"),
        ("indptr", 5, 10**6, "damaged"),
        ("indptr", 0, 3, "row pointers from 3 to"),
        ("indptr", -1, 3, "row pointers from 0 to 3"),
    ],
)
def test_a_damaged_value_is_refused_with_its_place(tmp_path, array, place, value, message):
    with pytest.raises(ValueError, match=message) as raised:
        whole(damaged(tmp_path, array, place, value))
    assert "a.h5ad" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_cell_of_a_bad_value_is_the_one_that_holds_it(tmp_path):
    adata = counts_screen()
    row, column = 17, int(adata.X[17].indices[2])
    adata.X[row, column] = -2
    source = open_h5ad(written(adata, tmp_path / "a.h5ad"), input_kind="counts")
    with pytest.raises(ValueError, match=rf"-2 for gene 'gene_{column}' in cell '{adata.obs_names[row]}' \(row 17\)"):
        whole(source)


def test_scaled_data_are_refused_before_the_work_begins(tmp_path):
    adata = counts_screen()
    adata.X = adata.X.toarray() - 3
    source = open_h5ad(written(adata, tmp_path / "a.h5ad"))
    with pytest.raises(ValueError, match=r"is negative \(z-scored or scaled data\?\)"):
        assert source.input_kind


def test_repeated_indices_are_summed_and_stored_zeros_left_out(tmp_path):
    obs = pd.DataFrame(dict.fromkeys(LABELS, "control"), index=["a", "b"])
    path = written(anndata.AnnData(sparse.csr_matrix(np.ones((2, 3), np.float32)), obs=obs), tmp_path / "a.h5ad", None)
    with h5py.File(path, "r+") as file:
        file["X/indices"][:] = [0, 1, 1, 2, 1, 0]
        file["X/data"][:] = [1, 2, 3, 4, 0, 5]
    assert whole(open_h5ad(path))[1].toarray().tolist() == [[1, 5, 0], [5, 0, 4]]


@pytest.mark.parametrize("log1p", [False, True])
def test_stored_zeros_are_left_out(tmp_path, log1p):
    adata = counts_screen()
    adata.X.data[[0, 30, 31]] = 0
    adata.X = adata.X.log1p() * 0.9 if log1p else adata.X  # some logarithms of nobody knows what
    X = whole(open_h5ad(written(adata, tmp_path / "a.h5ad")))[1]
    assert X.nnz == adata.X.nnz - 3
    assert np.array_equal(X.toarray(), adata.X.toarray())


def test_log1p_values_are_not_taken_for_counts_because_the_first_cells_are_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(source_h5ad, "_PROBE_VALUES", 30)
    monkeypatch.setattr(source_h5ad, "_MAX_ROWS", 4)
    adata = counts_screen(n=20)
    dense = np.zeros(adata.shape, np.float32)
    dense[20, 2] = 0.5  # in no chunk of the sample
    adata.X = sparse.csr_matrix(dense)
    assert open_h5ad(written(adata, tmp_path / "a.h5ad")).input_kind == "log1p"


def test_fractions_in_a_file_taken_for_counts_are_an_error_with_the_setting_to_change(tmp_path, monkeypatch):
    monkeypatch.setattr(source_h5ad, "_PROBE_VALUES", 30)
    adata = counts_screen(n=40)
    chunks = open_h5ad(written(adata, tmp_path / "a.h5ad")).chunks(30)
    sampled = {chunks[i] for i in np.linspace(0, len(chunks) - 1, source_h5ad._PROBES).astype(int)}
    first, _ = next(chunk for chunk in chunks if chunk not in sampled)
    adata.X.data[adata.X.indptr[first]] = 0.5
    source = open_h5ad(written(adata, tmp_path / "a.h5ad"))
    assert source.input_kind == "counts"
    message = rf"taken for counts by a sample .* holds 0.5 for gene .* in cell .* \(row {first}\).* input_kind: log1p"
    with pytest.raises(ValueError, match=message):
        whole(source)


def test_raw_counts_among_log1p_values_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(source_h5ad, "_PROBE_VALUES", 3000)
    adata = counts_screen(n_genes=40, n=40)
    half = len(adata) // 2
    dense = np.minimum(adata.X.toarray(), 9)
    dense[:half] = np.log1p(dense[:half])
    adata.X = sparse.csr_matrix(dense)
    path = written(adata, tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"only whole numbers from cell 'cell_.*' \(row .*, fractions elsewhere"):
        whole(open_h5ad(path), 3000)
    assert whole(open_h5ad(path, input_kind="log1p"), 3000)[1].dtype == np.float32


def test_whole_log1p_values_of_few_cells_pass(tmp_path):
    adata = counts_screen()
    dense = np.log1p(adata.X.toarray())
    dense[:4] = dense[:4] > 0
    adata.X = sparse.csr_matrix(dense)
    path = written(adata, tmp_path / "a.h5ad")
    assert np.array_equal(whole(open_h5ad(path), 12)[1].toarray(), dense)


@pytest.mark.parametrize(
    ("declared", "change", "message"),
    [
        ("log1p", lambda X: X * 20, "was declared as log1p but holds raw counts"),
        ("counts", SPACES["log2"], r"was declared as counts but holds log2\(1 \+ x\) of 10,000"),
    ],
)
def test_a_wrong_declaration_is_refused(tmp_path, declared, change, message):
    adata = counts_screen()
    adata.X = sparse.csr_matrix(change(adata.X.toarray()))
    with pytest.raises(ValueError, match=message):
        whole(open_h5ad(written(adata, tmp_path / "a.h5ad"), input_kind=declared))


@pytest.mark.parametrize("form", sorted(SPACES))
@pytest.mark.parametrize("dense", [True, False])
def test_values_of_every_known_space_are_read_as_one(tmp_path, monkeypatch, form, dense):
    monkeypatch.setattr(source_h5ad, "_PROBE_VALUES", 200)
    X = counts(0, n_cells=600, n_genes=30)
    values = SPACES[form](X).astype(np.float32)
    obs = pd.DataFrame({name: ["control"] * 600 for name in LABELS}, index=[f"c{i}" for i in range(600)])
    var = pd.DataFrame(index=[f"g{i}" for i in range(30)])
    path = written(anndata.AnnData(values if dense else sparse.csr_matrix(values), obs, var), tmp_path / "a.h5ad")
    source = open_h5ad(path)
    _, found, library = whole(source, 3000)
    counted = found.toarray() / library[:, None] * 1e4
    logged = np.log1p(counted) if source.input_kind == "counts" else found.toarray()
    np.testing.assert_allclose(logged, np.log1p(X / X.sum(1, keepdims=True) * 1e4), atol=1e-4)
    assert source.target_sum == (None if source.input_kind == "counts" else 1e4)
    assert source.values.startswith("X holds ") or form == "log1p of 10,000"


def test_logarithms_of_some_genes_stay_and_are_called_unchecked(tmp_path):
    X = counts(0, n_cells=60, n_genes=160)
    values = np.log1p(X / X.sum(1, keepdims=True) * 1e4)[:, :80].astype(np.float32)
    obs = pd.DataFrame({name: ["control"] * 60 for name in LABELS}, index=[f"c{i}" for i in range(60)])
    adata = anndata.AnnData(sparse.csr_matrix(values), obs, pd.DataFrame(index=[f"g{i}" for i in range(80)]))
    source = open_h5ad(written(adata, tmp_path / "a.h5ad"))
    np.testing.assert_array_equal(whole(source, 3000)[1].toarray(), values)
    assert (source.input_kind, source.target_sum) == ("log1p", None)
    assert "of how many counts a cell cannot be checked" in source.values


def test_a_count_over_65535_makes_the_chunk_uint32(tmp_path):
    adata = counts_screen()
    adata.X.data[:] = 65535
    adata.X.data[: adata.X.indptr[1]] = 9
    assert open_h5ad(written(adata, tmp_path / "a.h5ad")).read(0, 9)[0].dtype == np.uint16
    adata.X.data[-1] = 65536
    X = open_h5ad(written(adata, tmp_path / "b.h5ad")).read(0, len(adata))[0]
    assert X.dtype == np.uint32
    assert X.data[-1] == 65536


# --------------------------------------------------------------------------------------- not as it must be


def test_what_is_no_h5ad_is_refused_in_one_line(tmp_path):
    path = written(counts_screen(), tmp_path / "a.h5ad")
    short = tmp_path / "short.h5ad"
    short.write_bytes(path.read_bytes()[:-3000])
    text = tmp_path / "text.h5ad"
    text.write_text("gene,cell\n" * 1000)
    other = tmp_path / "other.h5ad"
    with h5py.File(other, "w") as file:
        file["Y"] = 1
    for bad in (short, text, other):
        with pytest.raises(ValueError, match=bad.name) as raised:
            open_h5ad(bad)
        assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"does not exist"):
        open_h5ad(tmp_path / "no.h5ad")


def test_damage_inside_a_compressed_block_is_refused_when_it_is_read(tmp_path):
    path = written(counts_screen(n_genes=60, n=30), tmp_path / "a.h5ad", "gzip")
    with h5py.File(path) as file:
        place, size = file["X/data"].id.get_chunk_info(0)[2:4]
    content = bytearray(path.read_bytes())
    content[place : place + size] = b"\xff" * size
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.h5ad is damaged or not of its kind"):
        whole(open_h5ad(path))


def test_lists_that_would_end_the_process_are_refused(tmp_path):
    pq.write_table(pa.table({"drug": ["a"], "genes": [[1, 2]]}), tmp_path / "a.parquet")
    files = LocalFiles.open(tmp_path)
    assert RowGroups.open(files, files.names, "genes").values.tolist() == [2]
    odd_histogram(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet is damaged or not of its kind .*histogram size mismatch"):
        RowGroups.open(files, files.names, "genes")


def test_numbers_of_labels_that_are_not_there_are_refused(tmp_path):
    pq.write_table(pa.table({"drug": ["a", "b", "c"] * 5}), tmp_path / "a.parquet")
    assert len(list(batches(tmp_path / "a.parquet", ["drug"], 0, 15, ["drug"]))) == 1
    words_beyond(tmp_path / "a.parquet", "drug")
    with pytest.raises(ValueError, match=r"a.parquet is damaged or not of its kind .*out of bounds"):
        list(batches(tmp_path / "a.parquet", ["drug"], 0, 15, ["drug"]))


def test_csc_is_refused_with_the_way_out(tmp_path):
    adata = counts_screen()
    adata.X = adata.X.tocsc()
    with pytest.raises(ValueError, match=r"CSC.*adata.X = adata.X.tocsr\(\)"):
        open_h5ad(written(adata, tmp_path / "a.h5ad"))


def test_missing_columns_and_repeated_genes_are_refused(tmp_path):
    adata = counts_screen()
    path = written(adata, tmp_path / "a.h5ad")
    with pytest.raises(KeyError, match=r"obs column 'drug' not in .*; found \['batch', 'cell_type', 'perturbation'\]"):
        open_h5ad(path, perturbation_col="drug")
    with h5py.File(path, "r+") as file:
        names = file["var/_index"].asstr()[:]
        names[1] = names[0]
        file["var/_index"][:] = names
    with pytest.raises(ValueError, match=r"a.h5ad: 1 duplicate gene names"):
        open_h5ad(path)


# ----------------------------------------------------------------------------------------------- filters


def test_filters_leave_the_cells_that_a_row_by_row_look_leaves(tmp_path):
    adata = counts_screen()
    path = written(adata, tmp_path / "a.h5ad")
    keep, drop = ["A", "*:NK:b1", "control"], ["A:T", "*:*:b2"]
    for cells in ("all", "perturbed", "unperturbed"):
        expected = []
        for cell, (p, c, b) in zip(adata.obs_names, adata.obs[list(LABELS)].itertuples(index=False), strict=True):
            wanted = p in ("A", "control") or (c, b) == ("NK", "b1")
            dropped = (p, c) == ("A", "T") or b == "b2"
            right = cells == "all" or (p == "control") == (cells == "unperturbed")
            if wanted and not dropped and right:
                expected.append(cell)
        source = open_h5ad(path, cells=cells, keep=keep, drop=drop)
        labels = whole(source)[0]
        assert labels["cell"].tolist() == expected
        assert expected
        assert labels["row"].tolist() == adata.obs_names.get_indexer(expected).tolist()


def planned(source) -> Selection:
    chosen = Selection(source.config)
    for first, last in source.chunks(100):
        part = Selection(source.config)  # as passes in several processes
        assert part.labels(source, first, last).equals(source.labels(first, last))
        chosen.merge(part)
    return chosen


def test_the_pass_over_all_labels_counts_the_cells_left(tmp_path):
    source = open_h5ad(written(counts_screen(), tmp_path / "a.h5ad"), keep=["A", "control:T"], drop=["A:T"])
    chosen = planned(source)
    chosen.check()
    assert chosen.n_cells == len(whole(source)[0])


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"keep": ["a"]}, "selector 'a' of .*: no cell has perturbation 'a'; did you mean A"),
        ({"drop": ["A:t"]}, "selector 'A:t' of .*: no cell has cell_type 't'; did you mean T"),
        ({"keep": ["A"], "drop": ["*"]}, "no cell of .* is left by cells: all"),
        ({"control_label": "DMSO", "perturbation_col": "batch", "cells": "unperturbed"}, "control label 'DMSO'"),
    ],
)
def test_selectors_that_name_nothing_and_a_missing_control_are_found_at_planning(tmp_path, given_settings, message):
    adata = counts_screen()
    with pytest.raises(ValueError, match=message):
        planned(open_h5ad(written(adata, tmp_path / "a.h5ad"), **given_settings)).check()


def test_a_source_of_perturbed_cells_only_needs_no_control(tmp_path):
    adata = counts_screen()
    adata = adata[adata.obs["perturbation"] != "control"].copy()
    path = written(adata, tmp_path / "a.h5ad")
    planned(open_h5ad(path, cells="perturbed")).check()
    planned(open_h5ad(path, perturbation_col=None)).check()
    with pytest.raises(ValueError, match=r"no cell of a has the control label 'control'.*cells: perturbed"):
        planned(open_h5ad(path)).check()


# ------------------------------------------------------------------------------------------------ Tahoe


TOKENS = [3, 4, 7, 5]  # of genes a, b, c, d; not in order, with a gap
GENES = pd.DataFrame({"gene_symbol": list("abcd"), "ensembl_id": [f"ENSG{i}" for i in range(4)], "token_id": TOKENS})


def tahoe_cells(n: int = 40, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows in Tahoe-100M's schema, and their counts (n, 4) in order of tokens: a, b, d, c."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (n, 4))
    ordered = np.sort(TOKENS)
    frame = pd.DataFrame({"genes": [[1, *ordered[row > 0]] for row in counts]})
    frame["expressions"] = [[-2.0, *row[row > 0]] for row in counts.astype(np.float32)]
    frame["drug"] = rng.choice(["DMSO_TF", "Dinaciclib", "Trametinib"], n)
    samples = {"DMSO_TF": ["smp_0", "smp_3"], "Dinaciclib": ["smp_1"], "Trametinib": ["smp_2"]}
    frame["sample"] = [rng.choice(samples[drug]) for drug in frame["drug"]]
    frame["BARCODE_SUB_LIB_ID"] = [f"bc_{i}" for i in range(n)]
    frame["cell_line_id"] = rng.choice(["CVCL_1", "CVCL_2"], n)
    frame["moa-fine"], frame["canonical_smiles"], frame["pubchem_cid"] = "x", "C", "1"
    frame["plate"] = rng.choice(["plate1", "plate2"], n)
    return frame, counts


LISTS = [("genes", pa.list_(pa.int64())), ("expressions", pa.list_(pa.float32()))]
TEXTS = ["drug", "sample", "BARCODE_SUB_LIB_ID", "cell_line_id", "moa-fine", "canonical_smiles", "pubchem_cid", "plate"]
TAHOE_SCHEMA = pa.schema([*LISTS, *((name, pa.string()) for name in TEXTS)])


def tahoe_folder(folder: Path, frame: pd.DataFrame, files: int = 3, row_group: int = 7) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "metadata" / "pseudobulk").mkdir(parents=True)
    for i, part in enumerate(np.array_split(np.arange(len(frame)), files)):
        table = pa.Table.from_pandas(frame.iloc[part], schema=TAHOE_SCHEMA, preserve_index=False)
        pq.write_table(table, folder / "data" / f"train-{i:05d}-of-{files:05d}.parquet", row_group_size=row_group)
    GENES.to_parquet(folder / "metadata" / "gene_metadata.parquet")
    pd.DataFrame({"x": [1]}).to_parquet(folder / "metadata" / "pseudobulk" / "a.parquet")
    dosed = [("DMSO_TF", 0.0), ("Dinaciclib", 0.5), ("Trametinib", 0.5), ("DMSO_TF", 0.0)]
    table = pd.DataFrame({"sample": [f"smp_{i}" for i in range(4)]})
    table["drugname_drugconc"] = [f"[('{drug}', {dose}, 'uM')]" for drug, dose in dosed]
    table.to_parquet(folder / "metadata" / "sample_metadata.parquet")
    return folder


@pytest.mark.parametrize("max_values", [1, 10, 30, 10**6])
def test_tahoe_parquet_is_read_without_its_markers(tmp_path, max_values):
    frame, counts = tahoe_cells()
    source = open_source(SourceConfig(path=str(tahoe_folder(tmp_path / "tahoe", frame))))
    labels, X, library = whole(source, max_values)
    assert source.genes.names == ("a", "b", "d", "c")
    assert source.genes.ensembl == ("ENSG0", "ENSG1", "ENSG3", "ENSG2")
    assert np.array_equal(X.toarray(), counts)
    assert library.tolist() == counts.sum(axis=1).tolist()
    assert labels["perturbation"].tolist() == frame["drug"].replace("DMSO_TF", "control").tolist()
    assert labels["cell_type"].tolist() == frame["cell_line_id"].tolist()
    assert labels["batch"].tolist() == frame["plate"].tolist()
    assert labels["cell"].tolist() == frame["BARCODE_SUB_LIB_ID"].tolist()
    ends = source.groups.first
    assert all(
        np.searchsorted(ends, a, "right") == np.searchsorted(ends, b, "left") for a, b in source.chunks(max_values)
    )
    assert max_values > 1 or source.chunks(1) == [(i, i + 1) for i in range(40)]
    planned(source).check()
    assert ForkingPickler.loads(ForkingPickler.dumps(source)).fingerprint == source.fingerprint


def test_selectors_may_call_unperturbed_cells_as_the_source_does(tmp_path):
    frame, _ = tahoe_cells()
    folder = str(tahoe_folder(tmp_path / "tahoe", frame))
    for selector in ("DMSO_TF", "control"):
        source = open_source(SourceConfig(path=folder, keep=[selector]))
        planned(source).check()
        assert whole(source)[0]["row"].tolist() == np.flatnonzero(frame["drug"] == "DMSO_TF").tolist()


def test_a_range_over_files_of_tahoe_is_read_as_one(tmp_path):
    frame, counts = tahoe_cells()
    source = open_source(SourceConfig(path=str(tahoe_folder(tmp_path / "t", frame)), kind="tahoe"))
    assert np.array_equal(source.read(5, 33)[0].toarray(), counts[5:33])
    assert source.labels(5, 33)["cell"].tolist() == [f"bc_{i}" for i in range(5, 33)]


def test_a_perturbation_of_the_sample_table_is_a_drug_at_a_dose(tmp_path):
    frame, _ = tahoe_cells()
    folder = tahoe_folder(tmp_path / "tahoe", frame)
    source = open_source(SourceConfig(path=str(folder), perturbation_col="drugname_drugconc"))
    dosed = frame["drug"].map(lambda drug: "control" if drug == "DMSO_TF" else f"[('{drug}', 0.5, 'uM')]")
    assert whole(source)[0]["perturbation"].tolist() == dosed.tolist()
    with pytest.raises(KeyError, match=r"'dose' not in .* or its sample table; found .*'drugname_drugconc'"):
        open_source(SourceConfig(path=str(folder), perturbation_col="dose"))


def test_a_symbol_of_several_tahoe_genes_gives_way_to_their_ids(tmp_path):
    folder = tahoe_folder(tmp_path / "tahoe", tahoe_cells()[0])
    GENES.assign(gene_symbol=["a", "a", "c", None]).to_parquet(folder / "metadata" / "gene_metadata.parquet")
    assert open_source(SourceConfig(path=str(folder))).genes.names == ("ENSG0", "ENSG1", "ENSG3", "c")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("genes", [1, 6], "gene token 6 of data/train-00001-of-00003.parquet is in no row of gene_metadata"),
        ("genes", [1, -5], "gene token -5 of data/train-00001"),
        ("genes", [1, 9_000_000], "gene token 9000000 of data/train-00001"),
        ("genes", [1, 3, 4], "row 6 of data/train-00001.* different lengths"),
        ("genes", None, "genes of data/train-00001.* missing list or value in row 6"),
        ("expressions", [-2.0, -2.0], "holds -2 for gene 'a' in cell 'bc_20' .*negative"),
        ("expressions", [-2.0, 1.5], "holds 1.5 for gene 'a' in cell 'bc_20' .*no whole number"),
        ("expressions", [-2.0, None], "missing list or value in row 6"),
    ],
)
def test_a_bad_cell_of_tahoe_is_named(tmp_path, column, value, message):
    frame, _ = tahoe_cells()
    frame.at[20, "genes"], frame.at[20, "expressions"] = [1, 3], [-2.0, 2.0]
    frame.at[20, column] = value
    source = open_source(SourceConfig(path=str(tahoe_folder(tmp_path / "tahoe", frame))))
    with pytest.raises(ValueError, match=message):
        whole(source, 10**6)


def test_a_cell_of_tahoe_without_a_marker_keeps_its_first_gene(tmp_path):
    frame, _ = tahoe_cells()
    frame.at[20, "genes"], frame.at[20, "expressions"] = [1, 3], [-2.0, 2.0]
    _, marked, _ = whole(open_source(SourceConfig(path=str(tahoe_folder(tmp_path / "marked", frame)))), 10**6)
    frame.at[20, "genes"], frame.at[20, "expressions"] = [3], [2.0]
    _, plain, _ = whole(open_source(SourceConfig(path=str(tahoe_folder(tmp_path / "plain", frame)))), 10**6)
    assert plain[20].nnz == 1
    assert (marked != plain).nnz == 0


@pytest.mark.parametrize("stray", [".train-00000.parquet", ".ipynb_checkpoints/a.parquet", "_temporary/0/a.parquet"])
def test_hidden_and_unfinished_files_are_no_data(tmp_path, stray):
    frame, _ = tahoe_cells()
    folder = tahoe_folder(tmp_path / "tahoe", frame)
    source = open_source(SourceConfig(path=str(folder)))
    copy = folder / "data" / stray
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(next((folder / "data").glob("train*")).read_bytes())
    again = open_source(SourceConfig(path=str(folder)))
    assert again.n_cells == source.n_cells
    assert again.fingerprint == source.fingerprint


@pytest.mark.parametrize("kind", [pa.list_view, lambda element: pa.list_(element, 2)], ids=["view", "fixed"])
def test_lists_of_other_kinds_are_lists(kind):
    plain = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64()))
    other = pa.array(plain.to_pylist(), kind(pa.int64()))
    for at in (0, 1):
        for found, expected in zip(lists(other[at:], "x", 0), lists(plain[at:], "x", 0), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_an_incomplete_tahoe_folder_is_refused(tmp_path):
    frame, _ = tahoe_cells()
    folder = tahoe_folder(tmp_path / "tahoe", frame)
    with pytest.raises(ValueError, match=r"leave (layer, )?input_kind"):
        open_source(SourceConfig(path=str(folder), input_kind="log1p"))
    with pytest.raises(KeyError, match=r"column 'line' not in .*; found .*Set cell_type_col"):
        open_source(SourceConfig(path=str(folder), cell_type_col="line"))
    shard = folder / "data" / "train-00000-of-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"train-00000-of-00003.parquet is damaged"):
        open_source(SourceConfig(path=str(folder)))
    (folder / "metadata" / "gene_metadata.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no gene_metadata.parquet"):
        open_source(SourceConfig(path=str(folder)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no Parquet files of cells"):
        open_source(SourceConfig(path=str(tmp_path / "empty")))


def test_a_data_set_of_the_hub_is_read_a_file_at_a_time_at_one_commit(tmp_path, monkeypatch):
    import httpx2
    import huggingface_hub

    frame, counts = tahoe_cells()
    folder = tahoe_folder(tmp_path / "tahoe", frame)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
    fetched = []

    def unreachable(api, repo):
        raise httpx2.ConnectError("no route")

    class Api:
        def dataset_info(self, repo):
            return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in names])

    class FileSystem:
        def open(self, path, block_size):
            return (folder / path.removeprefix("datasets/owner/tahoe@abc/")).open("rb")

    def download(repo, name, *, repo_type, revision):
        assert (repo, repo_type, revision) == ("owner/tahoe", "dataset", "abc")
        fetched.append(name)
        return str(folder / name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(FileNotFoundError, match=r"owner/tahoe is no local path, .* on the Hub \(no route\)"):
        open_source(SourceConfig(path="owner/tahoe"))
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    source = open_source(SourceConfig(path="owner/tahoe"))
    assert source.name == "tahoe"
    assert source.fingerprint == {"file": "owner/tahoe", "commit": "abc"}
    assert fetched == ["metadata/gene_metadata.parquet"]
    first, last = source.chunks(10**6)[1]
    assert np.array_equal(source.read(first, last)[0].toarray(), counts[first:last])
    assert fetched[1:] == ["data/train-00001-of-00003.parquet"]


# --------------------------------------------------------------------------------------------- an atlas


@pytest.mark.parametrize("log1p", [False, True])
@pytest.mark.parametrize("max_values", [1, 60, 10**6])
def test_an_atlas_is_a_source_with_the_cells_of_its_screen(tmp_path, log1p, max_values):
    adata = counts_screen()
    if log1p:
        adata.X = adata.X.log1p()
    path = written(adata, tmp_path / "a.h5ad")
    screen = Screen.read(path, DataConfig())
    source = open_source(SourceConfig(path=str(atlas_of_screen(tmp_path / "atlas", screen))))
    same_as_screen(source, path, max_values)
    assert whole(source, max_values)[0]["cell"].tolist() == screen.obs.index.tolist()
    assert source.read(10, 30)[1].tolist() == screen.expression.library_size[10:30].tolist()
    planned(source).check()
    sent = ForkingPickler.loads(ForkingPickler.dumps(source))
    assert sent.fingerprint == source.fingerprint
    assert whole(sent)[0].equals(whole(source)[0])
    left = open_source(replace(source.config, cells="unperturbed", drop=["*:NK"]))
    assert set(whole(left)[0]["perturbation"]) == {"control"}
    assert set(whole(left)[0]["cell_type"]) == {"T"}


def test_a_changed_shard_is_refused_before_it_is_read(tmp_path):
    folder = write_atlas(tmp_path / "atlas")
    source = open_source(SourceConfig(path=str(folder)))
    shard = folder / "data" / "cells-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    source.read(0, 10)
    with pytest.raises(ValueError, match=r"cells-00001.parquet"):
        source.labels(17, 18)
    with pytest.raises(ValueError, match=r"cells-00001.parquet"):
        source.read(0, 30)


def test_settings_that_mean_nothing_for_an_atlas_are_refused(tmp_path):
    folder = str(write_atlas(tmp_path / "atlas"))
    with pytest.raises(ValueError, match=r"batch_col \('plate'\) has no meaning for the atlas"):
        open_source(SourceConfig(path=folder, batch_col="plate"))
    with pytest.raises(ValueError, match=r"holds counts, not log1p"):
        open_source(SourceConfig(path=folder, input_kind="log1p"))
