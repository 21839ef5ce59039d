"""Predicted cells on disk, .h5ad or .parquet, and one file made of many without holding them in memory.

A Parquet file of predicted cells has one row a cell: `cell` (name), the columns of obs as text or numbers, `genes`
(positions in the gene list) and `log1p` (the values there; the others are zero). Counts are expm1 of these over expm1
of the column `one_count`, where there is one. The gene list and how the cells were made are JSON in the schema's
metadata under b"perturbdiff": `genes`, `ensembl` (or null), `uns`. `read_predicted` turns it into an AnnData; with
pyarrow alone

    table = pyarrow.parquet.read_table(path)
    genes = json.loads(table.schema.metadata[b"perturbdiff"])["genes"]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from anndata import AnnData
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from perturbdiff.data.expression import ONE_COUNT, counts_of
from perturbdiff.files import check_output, read_json, sha256, short, written

FORMATS = (".h5ad", ".parquet")
METADATA = b"perturbdiff"
CHUNK_CELLS = 4096  # cells handled at once, and rows of a row group
HDF5_CHUNK = 1 << 16  # elements
VALUES = ["genes", "log1p"]  # the columns of X
WRITTEN = "written.json"  # there too: hashes of `out` and `summary` while they are put in their places


def write_predicted(predicted: AnnData, path: Path) -> None:
    """Write what `PerturbDiff.predict` returned in the format of the name's ending, whole or not at all."""
    if path.suffix != ".parquet":
        with written(path) as temporary:
            predicted.write_h5ad(temporary, compression="gzip")
        return
    ensembl = predicted.var["ensembl_id"].tolist() if "ensembl_id" in predicted.var else None
    metadata = {"genes": predicted.var_names.tolist(), "ensembl": ensembl, "uns": predicted.uns["perturbdiff"]}
    starts = range(0, predicted.n_obs, CHUNK_CELLS)
    tables = (_table(predicted[start : start + CHUNK_CELLS]) for start in starts)
    with written(path) as temporary:
        _write_tables(tables, metadata, temporary)


def read_predicted(path: str | Path) -> AnnData:
    """A Parquet file of predicted cells as an AnnData: X CSR, layers["counts"], obs, var, uns["perturbdiff"].

    Raises ValueError where it is something else.
    """
    metadata = read_metadata(path)
    X = sparse.vstack([_csr(table, metadata) for table in _chunks([path], VALUES)], format="csr")
    obs = _obs([path])
    layers = {"counts": counts_of(X, obs[ONE_COUNT].to_numpy())} if ONE_COUNT in obs else {}
    return AnnData(X=X, obs=obs, var=_var(metadata), layers=layers, uns={"perturbdiff": metadata["uns"]})


def read_metadata(path: str | Path) -> dict[str, Any]:
    """`genes`, `ensembl` and `uns` of a Parquet file of predicted cells. Raises ValueError where it is none."""
    try:
        metadata: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {})[METADATA])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a whole file of predicted cells ({short(error)}); remove it.") from error
    return metadata


def join_predicted(parts: Sequence[Path], uns: dict[str, Any], path: Path) -> None:
    """All cells of Parquet files, in their order, as one file in the format of `path`, whole or not at all.

    Memory is that of some thousand cells, and for an .h5ad that of obs.
    """
    metadata = {**read_metadata(parts[0]), "uns": uns}
    with written(path) as temporary:
        if path.suffix == ".parquet":
            _write_tables(_chunks(parts), metadata, temporary)
        else:
            _join_h5ad(parts, metadata, temporary)


def _join_h5ad(parts: Sequence[Path], metadata: dict[str, Any], path: Path) -> None:
    # anndata.experimental.concat_on_disk opens all parts at once, and leaves uns and the compression out.
    with h5py.File(path, "w") as file:
        obs = _obs(parts)
        write_elem(file, "/", AnnData(obs=obs, var=_var(metadata), uns={"perturbdiff": metadata["uns"]}))
        no_cells = sparse.csr_matrix((0, len(metadata["genes"])), dtype=np.float32)
        storage = {"compression": "gzip", "chunks": (HDF5_CHUNK,), "indptr_dtype": np.int64}
        matrices, n_written = {}, 0
        for name in ("X", "layers/counts") if ONE_COUNT in obs else ("X",):
            write_elem(file, name, no_cells, dataset_kwargs=storage)
            matrices[name] = sparse_dataset(file[name])
        for table in _chunks(parts, VALUES):
            X = _csr(table, metadata)
            matrices["X"].append(X)
            if ONE_COUNT in obs:
                one = obs[ONE_COUNT].to_numpy()[n_written : n_written + X.shape[0]]
                matrices["layers/counts"].append(counts_of(X, one))
            n_written += X.shape[0]


def _write_tables(tables: Iterable[pa.Table], metadata: dict[str, Any], path: Path) -> None:
    tables = iter(tables)
    first = next(tables)
    schema = first.schema.with_metadata({METADATA: json.dumps(metadata)})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in chain([first], tables):
            writer.write_table(table, row_group_size=CHUNK_CELLS)


def _chunks(paths: Sequence[str | Path], columns: list[str] | None = None) -> Iterator[pa.Table]:
    # Small parts together: a row group of ten cells costs as much as one of thousands.
    waiting: list[pa.RecordBatch] = []
    for path in paths:  # one by one: a data set of pyarrow's keeps the metadata of every file in memory
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(CHUNK_CELLS, columns=columns, use_threads=False):
                waiting.append(batch)
                if sum(map(len, waiting)) >= CHUNK_CELLS:
                    yield pa.Table.from_batches(waiting)
                    waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)


def _table(cells: AnnData) -> pa.Table:
    X = cells.X.tocsr()
    columns: dict[str, Any] = {"cell": pa.array(cells.obs_names.astype(str), pa.string())}
    for name, values in cells.obs.items():
        numbers = pd.api.types.is_numeric_dtype(values.dtype)
        columns[str(name)] = pa.array(values) if numbers else pa.array(values.astype(str), pa.string())
    ends = pa.array(X.indptr.astype(np.int32))
    columns["genes"] = pa.ListArray.from_arrays(ends, pa.array(X.indices.astype(np.int32)))
    columns["log1p"] = pa.ListArray.from_arrays(ends, pa.array(X.data.astype(np.float32)))
    return pa.table(columns)


def _csr(table: pa.Table, metadata: dict[str, Any]) -> sparse.csr_matrix:
    genes, values = (table[name].combine_chunks() for name in VALUES)
    ends = np.concatenate([[0], np.cumsum(genes.value_lengths().to_numpy())])
    csr = (values.flatten().to_numpy(), genes.flatten().to_numpy(), ends)
    return sparse.csr_matrix(csr, shape=(len(table), len(metadata["genes"])))


def _obs(paths: Sequence[str | Path]) -> pd.DataFrame:
    columns = [name for name in pq.read_schema(paths[0]).names if name not in VALUES]
    tables = [table.replace_schema_metadata() for table in _chunks(paths, columns)]
    obs = pa.concat_tables(tables).to_pandas(strings_to_categorical=True)
    return obs.set_index(pd.Index(obs.pop("cell").astype(str).to_numpy()))


def _var(metadata: dict[str, Any]) -> pd.DataFrame:
    var = pd.DataFrame(index=pd.Index(metadata["genes"]))
    if metadata["ensembl"] is not None:
        var["ensembl_id"] = metadata["ensembl"]
    var["measured"] = ~var.index.isin(metadata["uns"].get("genes_absent", []))
    return var


def check_outputs(out: str | Path, summary: str | Path | None, overwrite: bool) -> tuple[Path, Path | None]:
    """As `files.check_output`; what a run has put in place before it was killed is not in the way of its repetition."""
    run = parts_of(Path(out)) / WRITTEN
    ours = read_json(run, 1 << 20) if run.is_file() else {}

    def checked(path: str | Path, *endings: str) -> Path:
        left = Path(path).is_file() and sha256(Path(path)) in ours.values()
        return check_output(path, *endings, overwrite=overwrite or left)

    return checked(out, *FORMATS), None if summary is None else checked(summary, ".csv")


def parts_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")
