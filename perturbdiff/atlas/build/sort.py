"""Sorting cells that do not fit in memory: chunks of the sources are spilled by bucket, buckets merged into shards.

A bucket is a range of (condition, hash of the cell's name), so that buckets one after another are the sorted atlas, and
what a bucket becomes depends on its cells alone: not on chunks, processes, memory, or what was done in which run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from perturbdiff.atlas.build.repeats import HASHED
from perturbdiff.atlas.build.sources.base import Source
from perturbdiff.atlas.build.sources.checks import coded_as
from perturbdiff.atlas.format import ROW_GROUP, SORTED_BY, gene_type, parquet_options, shard_schema
from perturbdiff.data.identity import content_hashes, gene_keys
from perturbdiff.data.rng import cell_order_key
from perturbdiff.files import sha256, write_json, written

CELL_BYTES = 64  # what a cell takes beside its values, in memory and in a spill file
_CELL = np.dtype(
    [
        ("condition", "<i4"), ("n_values", "<i4"), ("name_bytes", "<i4"), ("library_size", "<f4"), ("hash", "<u8"),
        ("row", "<i8"),
    ]
)  # fmt: skip
_OFFSETS = np.dtype("<i8")
_LEAST_READ = 1 << 18  # bytes of a spill file that are worth opening it


@dataclass(frozen=True)
class Conditions:
    """All conditions in the order of the atlas, and the buckets of their cells.

    names
        Sorted cell types, batches and perturbations.
    keys
        (n,) int64, rising: the position of a condition's three names as one number.
    n_cells
        (n,) int64.
    first_bucket, n_parts
        (n,) int64: a condition's cells are in this bucket, or cut by hash among `n_parts` from it.
    sources
        (n, n_sources) bool, True where a condition has cells of a source.
    """

    names: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    keys: np.ndarray
    n_cells: np.ndarray
    first_bucket: np.ndarray
    n_parts: np.ndarray
    sources: np.ndarray

    @classmethod
    def from_counts(
        cls, counts: dict[tuple[str, str, str], np.ndarray], cell_bytes: np.ndarray, bucket: int
    ) -> Conditions:
        """Conditions and buckets of about `bucket` bytes.

        Parameters
        ----------
        counts
            (cell type, batch, perturbation) -> cells in each source.
        cell_bytes
            (n_sources,) bytes of a cell, as estimated.
        """
        names = tuple(tuple(sorted({labels[i] for labels in counts})) for i in range(3))
        ids = [{name: i for i, name in enumerate(column)} for column in names]
        table = np.array([[ids[i][labels[i]] for i in range(3)] for labels in counts], dtype=np.int64).reshape(-1, 3)
        keys = (table[:, 0] * len(names[1]) + table[:, 1]) * len(names[2]) + table[:, 2]
        order = np.argsort(keys)
        n_cells = np.array(list(counts.values()), dtype=np.int64).reshape(len(counts), -1)[order]
        first_bucket, n_parts = np.zeros(len(order), np.int64), np.ones(len(order), np.int64)
        here, filled = 0, 0.0
        for i, size in enumerate((n_cells @ cell_bytes).tolist()):
            parts = -(-int(size) // bucket)
            if filled and filled + size > bucket:
                here, filled = here + 1, 0.0
            first_bucket[i], n_parts[i] = here, max(parts, 1)
            if parts > 1:
                here, filled = here + parts, 0.0
            else:
                filled += size
        return cls(names, keys[order], n_cells.sum(axis=1), first_bucket, n_parts, n_cells > 0)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def n_buckets(self) -> int:
        return int((self.first_bucket + self.n_parts).max(initial=0))

    @cached_property
    def _ids(self) -> list[dict[str, int]]:
        return [{name: i for i, name in enumerate(names)} for names in self.names]

    def of_cells(self, labels: pd.DataFrame) -> np.ndarray:
        """(n,) int64 condition of each row of the labels of a source."""
        key = np.zeros(len(labels), dtype=np.int64)
        for name, ids in zip(SORTED_BY, self._ids, strict=True):
            codes, found = pd.factorize(labels[name])
            key = key * len(ids) + np.array([ids.get(label, -1) for label in found], dtype=np.int64)[codes]
        positions = np.minimum(np.searchsorted(self.keys, key), len(self) - 1)
        if (self.keys[positions] != key).any():
            raise ValueError("a source changed while it was read: it holds a condition that it did not hold before.")
        return positions

    def bucket(self, condition: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """(n,) bucket of cells; it never falls as (condition, hash) rises."""
        part = (hashes >> np.uint64(32)) * self.n_parts[condition].astype(np.uint64) >> np.uint64(32)
        return self.first_bucket[condition] + part.astype(np.int64)

    def labels(self, conditions: np.ndarray) -> list[list[str]]:
        """Cell type, batch and perturbation of some conditions, a list each."""
        rest, perturbation = np.divmod(self.keys[conditions], len(self.names[2]))
        cell_type, batch = np.divmod(rest, len(self.names[1]))
        columns = zip(self.names, (cell_type, batch, perturbation), strict=True)
        return [[names[i] for i in positions.tolist()] for names, positions in columns]


@dataclass(frozen=True)
class Sort:
    """What every process needs to know of the sort.

    sources, columns
        The inputs and, for each, the position of its genes in the atlas (-1: left out).
    gene_names
        Of the atlas.
    chunks
        (n_chunks, 4) int64: source number, cells that are kept, and where its pieces begin and end in `pieces`.
    pieces
        (n, 2) int64 first row and end of what is read of a source at a time; those of a chunk follow each other.
    perturbations
        Of each source: how the atlas writes its labels.
    dose_separator
        Stands before the doses in them; None where there are none.
    dose_unit
        Of these; None where no source says one.
    value_type
        "uint16", "uint32" or "float32" (log1p).
    """

    folder: Path
    sources: tuple[Source, ...]
    columns: tuple[np.ndarray, ...]
    gene_names: tuple[str, ...]
    conditions: Conditions
    chunks: np.ndarray
    pieces: np.ndarray
    perturbations: tuple[dict[str, str], ...]
    dose_separator: str | None
    dose_unit: str | None
    value_type: str
    seed: int
    shard_bytes: int

    @property
    def gene_type(self) -> str:
        return gene_type(len(self.gene_names))

    @property
    def value_bytes(self) -> int:
        """Of a gene and its value."""
        return np.dtype(self.gene_type).itemsize + np.dtype(self.value_type).itemsize

    @property
    def schema(self) -> pa.Schema:
        """Of a shard; the values are its last column."""
        return shard_schema(self.gene_type, "log1p" if self.value_type == "float32" else "counts", self.value_type)

    def chunk_file(self, chunk: int) -> Path:
        return self.folder / "spill" / f"chunk-{chunk:06d}"

    def bucket_file(self, bucket: int) -> Path:
        """Says which shards a bucket became; a bucket is done when it is there."""
        return self.folder / "shards" / f"bucket-{bucket:06d}.json"

    def hash_file(self, bucket: int) -> Path:
        """Content and condition of the cells of a bucket that are compared, HASHED; not there without any."""
        return self.folder / "shards" / f"bucket-{bucket:06d}.npy"

    def shard_file(self, bucket: int, i: int) -> Path:
        return self.folder / "shards" / f"bucket-{bucket:06d}-{i:03d}.parquet"


# --------------------------------------------------------------------------------------------- partition


def spill_chunk(sort: Sort, chunk: int) -> int:
    """Read a chunk of a source and write its cells sorted, to be found by bucket. Returns the number of cells.

    Raises
    ------
    ValueError
        A value does not fit the type of the atlas; or as `Source.read` and `Source.labels`.
    """
    number, n_kept, *pieces = sort.chunks[chunk].tolist()
    ranges = sort.pieces[slice(*pieces)]
    source = sort.sources[number]
    labels = source.labels(int(ranges[0, 0]), int(ranges[-1, 1]))
    if len(labels) != n_kept:
        raise ValueError(f"source {source.name!r} changed while it was read; delete {sort.folder} and build again.")
    known, own = sort.perturbations[number], labels["perturbation"].array
    texts = [known.get(label, label) for label in own.categories]
    labels = labels.assign(perturbation=coded_as(texts, own.codes))
    rows, names = labels["row"].to_numpy(), labels["cell"].to_numpy(dtype=object)
    condition, hashes = sort.conditions.of_cells(labels), cell_order_key(names, sort.seed)
    order = np.lexsort((rows, hashes, condition))
    genes, values, n_values, library_size = _read_chunk(sort, number, ranges, rows)
    starts = _starts(n_values)
    genes, values = gathered(genes, starts, order), gathered(values, starts, order)
    cells = np.zeros(len(order), dtype=_CELL)
    encoded = [names[i].encode() for i in order.tolist()]
    cells["condition"], cells["hash"], cells["row"] = condition[order], hashes[order], rows[order]
    cells["n_values"], cells["library_size"] = n_values[order], library_size[order]
    cells["name_bytes"] = np.fromiter(map(len, encoded), dtype=np.int32, count=len(encoded))
    if sort.value_type != "float32" and values.max(initial=0) > np.iinfo(sort.value_type).max:
        position = int(values.argmax())
        cell = int(np.searchsorted(_starts(cells["n_values"]), position, side="right")) - 1
        raise ValueError(
            f"count {values[position]} of gene {sort.gene_names[genes[position]]!r} in cell {names[order[cell]]!r} "
            f"of source {source.name!r} does not fit {sort.value_type}; give count_type=uint32."
        )
    values = values.astype(sort.value_type, copy=False)
    bucket = sort.conditions.bucket(condition[order], hashes[order])
    begins = np.searchsorted(bucket, np.arange(sort.conditions.n_buckets + 1))
    offsets = np.zeros((len(begins), 3), dtype=_OFFSETS)  # of cells, bytes of names, values
    offsets[:, 0] = begins
    for column, name in ((1, "name_bytes"), (2, "n_values")):
        offsets[:, column] = _starts(cells[name])[begins]
    with written(sort.chunk_file(chunk)) as temporary, open(temporary, "wb") as file:
        file.write(offsets.tobytes() + cells.tobytes() + b"".join(encoded))
        file.write(genes.data)
        file.write(values.data)
    return len(order)


def _read_chunk(
    sort: Sort, number: int, ranges: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Genes, values, their number and library size of these rows of a source, read piece by piece."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for first, last in ranges.tolist():
        here = rows[slice(*np.searchsorted(rows, (first, last)))]
        if not len(here):
            continue
        first, last = int(here[0]), int(here[-1]) + 1
        X, library_size = sort.sources[number].read(first, last)
        if len(here) < last - first:
            X, library_size = X[here - first], library_size[here - first]
        parts.append((*_atlas_genes(X, sort, number), library_size))
    genes, values, n_values, library_size = (np.concatenate(part) for part in zip(*parts, strict=True))
    return genes, values, n_values, library_size


def _atlas_genes(X: sparse.csr_matrix, sort: Sort, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Genes (rising within a cell), values and their number of some cells of a source, in the genes of the atlas."""
    columns = sort.columns[number]
    if np.array_equal(columns, np.arange(len(columns))):
        return X.indices.astype(sort.gene_type), X.data, np.diff(X.indptr)
    kept = np.flatnonzero(columns >= 0)
    if (np.diff(columns[kept]) > 0).all():
        position = columns.astype(sort.gene_type)  # -1 becomes some gene, and is left out below
        genes, values, indptr = position[X.indices], X.data, X.indptr
        if len(kept) < len(columns):
            present = (columns >= 0)[X.indices]
            indptr = _starts(present)[indptr]
            genes, values = genes[present], values[present]
        return genes, values, np.diff(indptr)
    order = kept[np.argsort(columns[kept])]  # columns of the source as the atlas orders them
    X = X.tocsc()[:, order].tocsr()  # linear in the number of values, unlike sorting each row
    return columns[order].astype(sort.gene_type)[X.indices], X.data, np.diff(X.indptr)


def _starts(lengths: np.ndarray) -> np.ndarray:
    """(n + 1,) int64 where each of n pieces starts, and the end of the last."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def gathered(values: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The lists of these rows, one after another; `starts` (n + 1,) are those of all rows in `values`."""
    size = values.itemsize
    total = int((starts[rows + 1] - starts[rows]).sum())
    if total == 0:
        return values[:0]
    buffers = [None, pa.py_buffer(starts * size), pa.py_buffer(np.ascontiguousarray(values))]
    lists = pa.Array.from_buffers(pa.large_binary(), len(starts) - 1, buffers)
    taken = lists.take(pa.array(rows))  # a memcpy a row, which indexing by value is not
    return np.frombuffer(taken.buffers()[2], dtype=values.dtype, count=total)


# ------------------------------------------------------------------------------------------------- merge


@dataclass(frozen=True)
class _Run:
    """The cells of a bucket in one spill file: where they start in it, by kind, and how much there is."""

    path: Path
    source: int
    n_cells: int
    positions: tuple[int, int, int, int]  # bytes: cells, names, genes, values
    n_name_bytes: int

    @classmethod
    def open(cls, sort: Sort, chunk: int, bucket: int) -> _Run | None:
        path, n_buckets = sort.chunk_file(chunk), sort.conditions.n_buckets
        with open(path, "rb") as file:
            (cell, name, value), end = _read(file, bucket * 3 * _OFFSETS.itemsize, _OFFSETS, 6).reshape(2, 3).tolist()
            if end[0] == cell:
                return None
            all_cells, all_names, all_values = _read(file, n_buckets * 3 * _OFFSETS.itemsize, _OFFSETS, 3).tolist()
        cells = (n_buckets + 1) * 3 * _OFFSETS.itemsize
        names = cells + all_cells * _CELL.itemsize
        genes = names + all_names
        gene_bytes, value_bytes = np.dtype(sort.gene_type).itemsize, np.dtype(sort.value_type).itemsize
        values = genes + all_values * gene_bytes
        positions = (
            cells + cell * _CELL.itemsize, names + name, genes + value * gene_bytes, values + value * value_bytes
        )  # fmt: skip
        return cls(path, int(sort.chunks[chunk, 0]), end[0] - cell, positions, end[1] - name)


def merge_bucket(sort: Sort, bucket: int, memory: int) -> int:
    """Write the shards of a bucket, of whose values about `memory` bytes are held at once. Returns the cells."""
    runs = [run for chunk in range(len(sort.chunks)) if (run := _Run.open(sort, chunk, bucket)) is not None]
    parts, names = [], []
    for run in runs:
        with open(run.path, "rb") as spill:
            parts.append(_read(spill, run.positions[0], _CELL, run.n_cells))
            names.append(_read(spill, run.positions[1], np.dtype(np.uint8), run.n_name_bytes))
    cells = np.concatenate(parts) if parts else np.zeros(0, _CELL)
    run_of = np.repeat(np.arange(len(runs)), [run.n_cells for run in runs])
    source = np.array([run.source for run in runs], dtype=np.int64)[run_of] if runs else run_of
    order = np.lexsort((cells["row"], source, cells["hash"], cells["condition"]))
    name_starts = _starts(cells["name_bytes"])
    all_names = np.concatenate(names) if names else np.zeros(0, np.uint8)
    schema, shards = sort.schema, []
    in_all = [np.isin(np.arange(len(sort.gene_names)), columns) for columns in sort.columns]
    keys, hashed = gene_keys(len(sort.gene_names), np.logical_and.reduce(in_all)), list[np.ndarray]()
    reader = _Values(sort, runs, run_of, cells["n_values"], memory)
    sizes = cells["n_values"][order].astype(np.int64) * sort.value_bytes
    for i, (first, last) in enumerate(cuts(sizes, cells["condition"][order], sort.shard_bytes)):
        path = sort.shard_file(bucket, i)
        options = parquet_options(schema.names[-1])
        with written(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
            groups = [order[start : min(start + ROW_GROUP, last)] for start in range(first, last, ROW_GROUP)]
            for rows, genes, values in reader.groups(groups):
                starts = _starts(cells["n_values"][rows]).astype(np.int32)
                part = np.zeros(len(rows), dtype=HASHED)
                part["content"], compared = content_hashes(keys, genes, values, starts)
                part["condition"] = cells["condition"][rows]
                hashed.append(part[compared])
                found, position = np.unique(cells["condition"][rows], return_inverse=True)
                labels = dict(zip(SORTED_BY, sort.conditions.labels(found), strict=True))
                columns = {
                    **{name: pa.array(labels[name], pa.string()).take(pa.array(position)) for name in SORTED_BY},
                    "source": pa.array([s.name for s in sort.sources], pa.string()).take(pa.array(source[rows])),
                    "cell": _text(gathered(all_names, name_starts, rows), cells["name_bytes"][rows]),
                    "library_size": pa.array(cells["library_size"][rows]),
                    "genes": pa.ListArray.from_arrays(starts, genes, type=schema.field("genes").type),
                    schema.names[-1]: pa.ListArray.from_arrays(starts, values, type=schema.types[-1]),
                }
                table = pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
                writer.write_table(table, row_group_size=ROW_GROUP)
        shards.append({"file": path.name, "n_cells": last - first, "sha256": sha256(path), "size": path.stat().st_size})
    if n_compared := sum(map(len, hashed)):
        with written(sort.hash_file(bucket)) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(hashed))
    write_json(sort.bucket_file(bucket), {"n_cells": len(order), "n_compared": n_compared, "shards": shards})
    return len(order)


class _Values:
    """Genes and values of the cells of a bucket, read in the order of the merge.

    Within a run the cells lie in that order already, so that what any stretch of the merged cells needs of a run is one
    piece of its file, read once.
    """

    def __init__(self, sort: Sort, runs: Sequence[_Run], run_of: np.ndarray, n_values: np.ndarray, memory: int) -> None:
        self.runs, self.run_of, self.memory = runs, run_of, memory
        self.types = np.dtype(sort.gene_type), np.dtype(sort.value_type)
        self.starts = _starts(n_values)
        self.first = _starts(np.array([run.n_cells for run in runs], dtype=np.int64))
        self.next = self.first[:-1].copy()  # the first cell of each run that was not read
        self.buffers = [
            np.zeros(0, dtype=kind) for kind in self.types
        ]  # used again: fresh memory costs more than a copy

    def groups(self, groups: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(rows, genes, values) of each group of cells; as many are read together as memory allows."""
        width = sum(kind.itemsize for kind in self.types)
        sizes = [int((self.starts[rows + 1] - self.starts[rows]).sum()) * width for rows in groups]
        most = min(self.memory, len(self.runs) * _LEAST_READ)
        here = 0
        while here < len(groups):
            end = here + 1
            while end < len(groups) and sum(sizes[here : end + 1]) <= most:
                end += 1
            together = np.concatenate(groups[here:end])
            genes, values, starts, shift = self._read(together, sum(sizes[here:end]) // width)
            for rows in groups[here:end]:
                local = rows - shift[self.run_of[rows]]
                yield rows, gathered(genes, starts, local), gathered(values, starts, local)
            here = end

    def _read(self, rows: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Genes, values and starts of `rows`, run by run, and what to take off a cell's number to find it there."""
        counts = np.bincount(self.run_of[rows], minlength=len(self.runs))
        if len(self.buffers[0]) < total:
            self.buffers = [np.empty(total, dtype=kind) for kind in self.types]
        lists = self.buffers
        starts, at = [np.zeros(1, np.int64)], 0
        shift = self.next - (np.cumsum(counts) - counts)
        for i in np.flatnonzero(counts).tolist():
            run, cell, end = self.runs[i], int(self.next[i]), int(self.next[i] + counts[i])
            skipped, n = int(self.starts[cell] - self.starts[self.first[i]]), int(self.starts[end] - self.starts[cell])
            with open(run.path, "rb") as file:
                for values, position in zip(lists, run.positions[2:], strict=True):
                    _read_into(file, position + skipped * values.itemsize, values[at : at + n])
            starts.append(self.starts[cell + 1 : end + 1] - self.starts[cell] + at)
            at += n
        self.next = self.next + counts
        return lists[0], lists[1], np.concatenate(starts), shift


def cuts(sizes: np.ndarray, groups: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Cut items into as few ranges of at most `most` as fit, of like size, where a group ends if one does nearby."""
    ends = _starts(sizes)
    borders = np.append(np.flatnonzero(np.diff(groups)) + 1, len(sizes))
    ranges, first = [], 0
    while first < len(sizes):
        rest = int(ends[-1] - ends[first])
        if rest <= most:
            ranges.append((first, len(sizes)))
            break
        ideal = rest / -(-rest // most)
        latest = max(int(np.searchsorted(ends, ends[first] + most, side="right")) - 1, first + 1)
        middle = min(max(int(np.searchsorted(ends, ends[first] + ideal, side="right")) - 1, first + 1), latest)
        near = borders[(borders <= latest) & (ends[borders] - ends[first] >= ideal / 2) & (borders > first)]
        last = int(near[np.argmin(np.abs(ends[near] - ends[first] - ideal))]) if len(near) else middle
        ranges.append((first, last))
        first = last
    return ranges


def _text(encoded: np.ndarray, lengths: np.ndarray) -> pa.Array:
    buffers = [None, pa.py_buffer(_starts(lengths).astype(np.int32)), pa.py_buffer(encoded)]
    return pa.Array.from_buffers(pa.string(), len(lengths), buffers)


# ------------------------------------------------------------------------------------------------- files


def _read(file: BinaryIO, position: int, kind: np.dtype, n: int) -> np.ndarray:
    values = np.empty(n, dtype=kind)
    _read_into(file, position, values)
    return values


def _read_into(file: BinaryIO, position: int, values: np.ndarray) -> None:
    if not values.nbytes:
        return
    file.seek(position)
    if file.readinto(values.data.cast("B")) != values.nbytes:  # type: ignore[attr-defined]
        raise ValueError(f"{file.name} is cut short; delete the folder of the interrupted build and build again.")
