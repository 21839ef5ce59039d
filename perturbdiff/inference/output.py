"""Predicted cells on disk: Parquet, one row a cell, and one file made of many without holding them in memory.

A Parquet file of predicted cells has the columns `cell` (name), those of obs as text or numbers, `genes` (places in
the gene list) and `log1p` (the values at these places; the others are zero). The gene list and how the cells were made
are JSON in the schema's metadata under b"perturbdiff": `genes`, `ensembl` (or null), `uns`. `read_predicted` turns it
into an AnnData; with pyarrow alone

    table = pyarrow.parquet.read_table(path)
    genes = json.loads(table.schema.metadata[b"perturbdiff"])["genes"]
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from anndata import AnnData
from anndata.io import write_elem
from scipy import sparse

from perturbdiff.files import short, write_whole

METADATA = b"perturbdiff"
CHUNK_CELLS = 4096  # cells handled at once, and rows of a row group
HDF5_CHUNK = 1 << 16  # elements


def write_parquet(predicted: AnnData, path: Path) -> None:
    """Write what `PerturbDiff.predict` returned, whole or not at all."""
    ensembl = predicted.var["ensembl_id"].tolist() if "ensembl_id" in predicted.var else None
    said = {"genes": predicted.var_names.tolist(), "ensembl": ensembl, "uns": predicted.uns["perturbdiff"]}
    tables = (_table(predicted[start : start + CHUNK_CELLS]) for start in range(0, predicted.n_obs, CHUNK_CELLS))
    write_whole(path, lambda temporary: _write_tables(tables, said, temporary))


def read_predicted(path: str | Path) -> AnnData:
    """A Parquet file of predicted cells as an AnnData: X CSR, obs, var, uns["perturbdiff"].

    Raises ValueError where it is something else.
    """
    said = read_said(path)
    blocks, tables = [], []
    for table in _chunks(path):
        blocks.append(_csr(table, len(said["genes"])))
        tables.append(_labels(table))
    X = sparse.vstack(blocks, format="csr") if blocks else sparse.csr_matrix((0, len(said["genes"])), dtype=np.float32)
    obs = _obs(tables) if tables else pd.DataFrame()
    return AnnData(X=X, obs=obs, var=_var(said), uns={"perturbdiff": said["uns"]})


def read_said(path: str | Path) -> dict[str, Any]:
    """`genes`, `ensembl` and `uns` of a Parquet file of predicted cells. Raises ValueError where it is none."""
    try:
        said = json.loads((pq.read_schema(path).metadata or {})[METADATA])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a whole file of predicted cells ({short(error)}); remove it.") from error
    return said


def join_parquet(parts: Sequence[Path], uns: dict[str, Any], path: Path) -> int:
    """All cells of the parts, in their order, as one Parquet file; memory is a row group's. Returns their number."""
    said = {**read_said(parts[0]), "uns": uns}
    return write_whole(path, lambda temporary: _write_tables(_regrouped(parts), said, temporary))


def join_h5ad(parts: Sequence[Path], uns: dict[str, Any], path: Path) -> int:
    """All cells of the parts, in their order, as one .h5ad; memory is that of obs. Returns their number."""
    return write_whole(path, lambda temporary: _write_h5ad(parts, uns, temporary))


def _write_h5ad(parts: Sequence[Path], uns: dict[str, Any], path: Path) -> int:
    said = read_said(parts[0])
    tables: list[pa.Table] = []
    ends = [np.zeros(1, np.int64)]
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        X = file.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        for name, dtype in (("data", np.float32), ("indices", np.int32)):
            X.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(HDF5_CHUNK,), compression="gzip")
        for table in _regrouped(parts):
            cells = _csr(table, len(said["genes"]))
            written = X["data"].shape[0]
            for name, values in (("data", cells.data), ("indices", cells.indices)):
                X[name].resize(written + len(values), axis=0)
                X[name][written:] = values
            ends.append(written + cells.indptr[1:].astype(np.int64))
            tables.append(_labels(table))
        indptr = np.concatenate(ends)
        X.create_dataset("indptr", data=indptr)
        X.attrs["shape"] = np.array([len(indptr) - 1, len(said["genes"])])
        write_elem(file, "obs", _obs(tables))
        write_elem(file, "var", _var(said))
        write_elem(file, "uns", {"perturbdiff": uns})
        for name in ("obsm", "varm", "obsp", "varp", "layers"):
            write_elem(file, name, {})
    return len(indptr) - 1


def _write_tables(tables: Iterator[pa.Table], said: dict[str, Any], path: Path) -> int:
    writer, n_cells = None, 0
    try:
        for table in tables:
            table = table.replace_schema_metadata({METADATA: json.dumps(said)})
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=CHUNK_CELLS)
            n_cells += len(table)
    finally:
        if writer is not None:
            writer.close()
    return n_cells


def _regrouped(parts: Sequence[Path]) -> Iterator[pa.Table]:
    # Small parts together: a row group of ten cells costs as much as one of thousands.
    waiting: list[pa.Table] = []
    for part in parts:
        for table in _chunks(part):
            waiting.append(table)
            if sum(map(len, waiting)) >= CHUNK_CELLS:
                yield pa.concat_tables(waiting)
                waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _chunks(path: str | Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK_CELLS, use_threads=False):
            yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


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


def _csr(table: pa.Table, n_genes: int) -> sparse.csr_matrix:
    genes, values = (table[name].combine_chunks() for name in ("genes", "log1p"))
    ends = np.concatenate([[0], np.cumsum(genes.value_lengths().to_numpy())])
    csr = (values.flatten().to_numpy(), genes.flatten().to_numpy(), ends)
    return sparse.csr_matrix(csr, shape=(len(table), n_genes))


def _labels(table: pa.Table) -> pa.Table:
    # Words as numbers of a dictionary: millions of rows wait for the last one.
    table = table.drop_columns(["genes", "log1p"])
    for place, field in enumerate(table.schema):
        if field.name != "cell" and pa.types.is_string(field.type):
            table = table.set_column(place, field.name, table[field.name].dictionary_encode())
    return table


def _obs(tables: Sequence[pa.Table]) -> pd.DataFrame:
    table = pa.concat_tables(tables).unify_dictionaries()
    return table.to_pandas().set_index("cell").rename_axis(None)


def _var(said: dict[str, Any]) -> pd.DataFrame:
    var = pd.DataFrame(index=pd.Index(said["genes"]))
    if said["ensembl"] is not None:
        var["ensembl_id"] = said["ensembl"]
    return var
