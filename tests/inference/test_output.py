import json

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from anndata import AnnData
from scipy import sparse

import perturbdiff.inference.output as predicted_cells
from perturbdiff.inference.output import join_h5ad, join_parquet, read_predicted, read_said, write_parquet


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


def assert_same_cells(one, other):
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())
    assert list(one.obs_names) == list(other.obs_names)
    assert list(one.var_names) == list(other.var_names)
    assert list(one.obs.columns) == list(other.obs.columns)
    for name in one.obs:
        assert list(one.obs[name]) == list(other.obs[name])
    assert list(one.var.get("ensembl_id", [])) == list(other.var.get("ensembl_id", []))


@pytest.fixture(params=[1, 3, 1000])
def chunk(request, monkeypatch):
    monkeypatch.setattr(predicted_cells, "CHUNK_CELLS", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("ensembl", [False, True])
def test_parquet_gives_back_what_was_predicted(tmp_path, ensembl):
    predicted = predicted_of(10, 3, ensembl)
    write_parquet(predicted, tmp_path / "p.parquet")
    again = read_predicted(tmp_path / "p.parquet")
    assert_same_cells(again, predicted)
    assert again.uns["perturbdiff"] == predicted.uns["perturbdiff"]
    assert again.X.dtype == np.float32
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def test_pyarrow_and_pandas_read_it_without_us(tmp_path):
    predicted = predicted_of(10, 3)
    write_parquet(predicted, tmp_path / "p.parquet")
    genes = json.loads(pq.read_schema(tmp_path / "p.parquet").metadata[b"perturbdiff"])["genes"]
    table = pd.read_parquet(tmp_path / "p.parquet")
    assert list(table["perturbation"]) == ["p3"] * 10
    for row, values in zip(table.itertuples(), predicted.X.toarray(), strict=True):
        written = dict(zip((genes[g] for g in row.genes), row.log1p, strict=True))
        assert written == {name: v for name, v in zip(predicted.var_names, values, strict=True) if v}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("join", "read", "suffix"), [(join_h5ad, anndata.read_h5ad, "h5ad"),
                                                      (join_parquet, read_predicted, "parquet")])  # fmt: skip
def test_parts_are_joined_in_their_order(tmp_path, join, read, suffix):
    predicted = [predicted_of(n, seed, ensembl=True) for seed, n in enumerate((4, 1, 9))]
    parts = [tmp_path / f"{seed}.parquet" for seed in range(3)]
    for one, part in zip(predicted, parts, strict=True):
        write_parquet(one, part)
    uns = {"model": "m", "requests": {"perturbation": ["p0", "p1", "p2"]}}
    assert join(parts, uns, tmp_path / f"all.{suffix}") == 14
    joined = read(tmp_path / f"all.{suffix}")
    assert_same_cells(joined, anndata.concat(predicted, merge="same"))
    assert joined.uns["perturbdiff"]["model"] == "m"
    assert list(joined.uns["perturbdiff"]["requests"]["perturbation"]) == ["p0", "p1", "p2"]
    assert joined.obs["perturbation"].dtype == "category"


def test_small_parts_share_row_groups(tmp_path):
    parts = []
    for seed in range(6):
        parts.append(tmp_path / f"{seed}.parquet")
        write_parquet(predicted_of(3, seed), parts[-1])
    join_parquet(parts, {}, tmp_path / "all.parquet")
    assert pq.ParquetFile(tmp_path / "all.parquet").num_row_groups == 1


def test_an_output_is_whole_or_not_there(tmp_path, monkeypatch):
    write_parquet(predicted_of(4, 0), tmp_path / "0.parquet")
    (tmp_path / "1.parquet").write_bytes(b"PAR1")
    for join, name in ((join_h5ad, "all.h5ad"), (join_parquet, "all.parquet")):
        with pytest.raises(Exception, match="arquet"):
            join([tmp_path / "0.parquet", tmp_path / "1.parquet"], {}, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.parquet", "1.parquet"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"nonsense" * 99])
def test_something_else_is_refused(tmp_path, content):
    (tmp_path / "p.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="not a whole file of predicted cells"):
        read_said(tmp_path / "p.parquet")


def test_parquet_of_others_is_refused(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="not a whole file of predicted cells"):
        read_predicted(tmp_path / "p.parquet")
