import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from anndata import AnnData
from scipy import sparse

import perturbdiff.inference.output as output
from perturbdiff.inference.output import join_predicted, read_metadata, read_predicted, write_predicted

READ = {"h5ad": anndata.read_h5ad, "parquet": read_predicted}


def predicted_of(n_cells, seed, ensembl=False, n_genes=7):
    rng = np.random.default_rng(seed)
    X = sparse.random(n_cells, n_genes, 0.4, format="csr", dtype=np.float32, random_state=rng)
    X.sort_indices()
    obs = pd.DataFrame(
        {
            "request": seed,
            "perturbation": pd.Categorical([f"p{seed}"] * n_cells),
            "source_control": [f"c{i}" for i in rng.integers(0, 5, n_cells)],
            "weight": rng.random(n_cells),
        },
        index=[f"{seed}-{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"gene_{g}" for g in range(n_genes)])
    if ensembl:
        var["ensembl_id"] = [f"ENSG{g}" for g in range(n_genes)]
    return AnnData(X, obs=obs, var=var, uns={"perturbdiff": {"model": "m", "seed": seed, "unseen": ["batch x"]}})


def parts_in(folder, predicted):
    parts = [folder / f"{number}.parquet" for number in range(len(predicted))]
    for cells, part in zip(predicted, parts, strict=True):
        write_predicted(cells, part)
    return parts


def assert_same_cells(one, other):
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())
    assert one.X.dtype == np.float32
    assert list(one.obs_names) == list(other.obs_names)
    assert list(one.var_names) == list(other.var_names)
    assert list(one.obs.columns) == list(other.obs.columns)
    for name, values in one.obs.items():
        assert list(values) == list(other.obs[name])
        numbers = pd.api.types.is_numeric_dtype(other.obs[name])
        assert values.dtype == (other.obs[name].dtype if numbers else "category")
    assert list(one.var.get("ensembl_id", [])) == list(other.var.get("ensembl_id", []))


@pytest.fixture(params=[1, 3, 1000])
def chunk(request, monkeypatch):
    monkeypatch.setattr(output, "CHUNK_CELLS", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("suffix", READ)
@pytest.mark.parametrize("ensembl", [False, True])
def test_a_file_gives_back_what_was_predicted(tmp_path, suffix, ensembl):
    path = tmp_path / f"p.{suffix}"
    write_predicted(predicted_of(2, 1), path)
    write_predicted(predicted_of(10, 3, ensembl), path)  # replaces it
    again = READ[suffix](path)
    assert_same_cells(again, predicted_of(10, 3, ensembl))
    said = again.uns["perturbdiff"]
    assert (said["model"], said["seed"], list(said["unseen"])) == ("m", 3, ["batch x"])
    assert list(tmp_path.iterdir()) == [path]


def test_pyarrow_and_pandas_read_it_without_us(tmp_path):
    predicted = predicted_of(10, 3)
    write_predicted(predicted, tmp_path / "p.parquet")
    genes = json.loads(pq.read_schema(tmp_path / "p.parquet").metadata[b"perturbdiff"])["genes"]
    table = pd.read_parquet(tmp_path / "p.parquet")
    assert list(table["perturbation"]) == ["p3"] * 10
    for row, values in zip(table.itertuples(), predicted.X.toarray(), strict=True):
        written = dict(zip((genes[g] for g in row.genes), row.log1p, strict=True))
        assert written == {name: v for name, v in zip(predicted.var_names, values, strict=True) if v}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("suffix", READ)
def test_parts_are_joined_in_their_order(tmp_path, suffix):
    predicted = [predicted_of(n, seed, ensembl=True) for seed, n in enumerate((4, 1, 9))]
    uns = {"model": "m", "requests": {"perturbation": ["p0", "p1", "p2"]}}
    join_predicted(parts_in(tmp_path, predicted), uns, tmp_path / f"all.{suffix}")
    joined = READ[suffix](tmp_path / f"all.{suffix}")
    assert_same_cells(joined, anndata.concat(predicted, merge="same"))
    assert joined.uns["perturbdiff"]["model"] == "m"
    assert list(joined.uns["perturbdiff"]["requests"]["perturbation"]) == ["p0", "p1", "p2"]


def test_small_parts_share_row_groups_and_compressed_chunks(tmp_path):
    parts = parts_in(tmp_path, [predicted_of(3, seed) for seed in range(6)])
    join_predicted(parts, {}, tmp_path / "all.parquet")
    assert pq.ParquetFile(tmp_path / "all.parquet").num_row_groups == 1
    join_predicted(parts, {}, tmp_path / "all.h5ad")
    with h5py.File(tmp_path / "all.h5ad") as file:
        for name in ("data", "indices"):
            assert (file["X"][name].compression, file["X"][name].id.get_num_chunks()) == ("gzip", 1)


@pytest.mark.parametrize("suffix", READ)
def test_an_output_is_whole_or_what_was_there_before(tmp_path, suffix):
    parts = [*parts_in(tmp_path, [predicted_of(4, 0)]), tmp_path / "1.parquet"]
    parts[1].write_bytes(b"PAR1")
    out = tmp_path / f"all.{suffix}"
    out.write_text("before")
    with pytest.raises(ValueError, match="arquet"):
        join_predicted(parts, {}, out)
    broken = predicted_of(4, 0)
    broken.uns["perturbdiff"]["cannot be written"] = object()
    with pytest.raises(Exception, match=r"No method registered for writing|is not JSON"):
        write_predicted(broken, out)
    assert out.read_text() == "before"
    assert sorted(tmp_path.iterdir()) == sorted([*parts, out])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"nonsense" * 99, None])
def test_something_else_is_refused(tmp_path, content):
    if content is None:
        pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "p.parquet")
    else:
        (tmp_path / "p.parquet").write_bytes(content)
    for read in (read_metadata, read_predicted):
        with pytest.raises(ValueError, match="not a whole file of predicted cells"):
            read(tmp_path / "p.parquet")
