"""An .h5ad as a source of an atlas, read in parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse

from perturbdiff.atlas.build.sources.checks import (
    BLOCK,
    categorical,
    checked,
    extra_columns,
    extra_names,
    label_table,
    library_text,
    naming,
    parsed,
    reading,
    selected,
)
from perturbdiff.atlas.format import PREPROCESSING
from perturbdiff.config import SourceConfig
from perturbdiff.data.dialects import COLUMNS, understood
from perturbdiff.data.expression import as_csr, library_sizes
from perturbdiff.data.guides import Guides, gene_rows
from perturbdiff.data.h5ad import open_h5ad, parts_of
from perturbdiff.data.screen import genes_of, refuse_small_libraries
from perturbdiff.data.selectors import LABELS
from perturbdiff.data.space import RAW_COUNTS, UNKNOWN, InputKind, Space, found, renormalised, space_of
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.files import few

_PROBES = 8  # positions of a file looked at to tell counts from log1p values
_PROBE_VALUES = 1 << 18  # values of each
_GUIDE_VALUES = 1 << 21  # read together to find guides
_MAX_ROWS = 1 << 18  # cells read together, however empty: their labels need memory too


@dataclass(frozen=True)
class H5adSource:
    """An .h5ad whose X is dense or CSR, compressed or not. CSC is refused: it has no cells to read, only genes."""

    config: SourceConfig
    name: str
    n_cells: int
    genes: GeneVocab
    fingerprint: dict[str, Any]
    is_sparse: bool
    parts: tuple[str, str, str]  # names of values, obs and var in the file
    is_gene: np.ndarray  # (columns of X,); guides and antibodies are none
    dialect: str = ""  # the known kind of file whose columns are taken, for people
    guides: str = ""  # names of those that the values gave away, for people

    @classmethod
    def open(cls, config: SourceConfig) -> H5adSource:
        path = Path(config.path)
        with open_h5ad(path, ()) as file:
            parts = parts_of(config.layer, file)
        with open_h5ad(path, parts) as file, reading(path):
            stat = path.stat()
            missing = [name for name in parts if name not in file]
            tables = not missing and all(isinstance(file[name], h5py.Group) for name in parts[1:])
            var = read_elem(file[parts[2]]) if tables else None
            columns = _column_names(file["obs"]) if tables else []
            dialect = ""
            if tables and any(getattr(config, name) not in (None, *columns) for name in COLUMNS):
                config, dialect = understood(config, read_elem(file[parts[1]]), "source")
            index = _index(file["obs"]) if tables else None
            n_obs = len(index) if isinstance(index, h5py.Dataset) else 0
            X = file.get(parts[0])
            form, shape, dtype = _form(X)
            lengths = [X[name].shape for name in ("data", "indices", "indptr")] if form == "csr" else []
            ends = [int(X["indptr"][i]) for i in (0, -1)] if form == "csr" and lengths[2] != (0,) else [0, 0]
        if missing or not isinstance(var, pd.DataFrame) or index is None:
            what = f"it has no {', '.join(missing)}" if missing else "obs and var must be tables"
            raise ValueError(f"{path} is not an .h5ad that can be read in parts: {what}. Write it with AnnData.")
        is_gene = gene_rows(var)
        genes = naming(path, lambda: genes_of(var[is_gene]))
        if form == "csc":
            raise ValueError(
                f"X of {path} is CSC, stored by genes, so that cells cannot be read in parts; write it by cells "
                "(adata.X = adata.X.tocsr())."
            )
        if form not in ("csr", "dense") or dtype.kind not in "biuf":
            raise ValueError(f"X of {path} is {form} of {dtype}; it must be a dense or CSR matrix of numbers.")
        if shape != (n_obs, len(var)):
            raise ValueError(f"X of {path} is {shape}; it must be {(n_obs, len(var))}, cells by genes.")
        n_values = [length[0] for length in lengths[:2]]
        if form == "csr" and (lengths[2] != (n_obs + 1,) or ends != [0, n_values[0]] or n_values[1] != n_values[0]):
            raise ValueError(
                f"X of {path} is a damaged sparse matrix: {n_values[0]} values, {n_values[1]} indices, {lengths[2][0]} "
                f"row pointers from {ends[0]} to {ends[1]} for {n_obs} cells; get or write the file again."
            )
        settings = {f"{name}_col": getattr(config, f"{name}_col") for name in (*LABELS, "library_size", "dose")}
        settings |= {f"where={column}": column for column in sorted(extra_names(config, columns) - {config.dose_col})}
        if absent := {name: column for name, column in settings.items() if column not in (None, *columns)}:
            raise KeyError(
                f"obs column{'s' if len(absent) > 1 else ''} {', '.join(map(repr, absent.values()))} not in {path}; "
                f"found {sorted(columns)}. Set {', '.join(f'source.{name}' for name in absent)}; inputs that differ go "
                "into a recipe."
            )
        fingerprint = {"file": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        name = config.name or path.stem
        return cls(config, name, n_obs, genes, fingerprint, form == "csr", parts, is_gene, dialect)._without_guides()

    def _without_guides(self) -> H5adSource:
        """Without the rows of var that their counts give away for guides; most files need one look at few cells."""
        config, column = self.config, self.config.perturbation_col
        if column is None:
            return self
        with open_h5ad(config.path, self.parts) as file, reading(config.path):
            labels = categorical(_column(file["obs"], column, 0, self.n_cells), column, config.path)
        meanings, _ = parsed(labels.categories, config, self.genes.names)
        controls = {config.control_label, *config.other_control_labels}
        received = {label: {name for name, _ in parts} or controls for label, parts in meanings.items()}
        guides = Guides(self.genes.names, received)
        for first, last in self.chunks(_GUIDE_VALUES) if guides else ():
            rows = self.labels(first, last)["row"].to_numpy()
            guides.look(self._matrix(first, last)[rows - first], labels[rows])
            if not guides:
                return self
        if not (guide := guides.found()).any():
            return self
        is_gene = self.is_gene.copy()
        is_gene[is_gene] = ~guide
        names = [self.genes.names[i] for i in np.flatnonzero(guide)]
        return replace(self, genes=self.genes.select(np.flatnonzero(~guide)), is_gene=is_gene, guides=few(names))

    @cached_property
    def space(self) -> Space:
        """Found from a sample of the cells, within what was declared; `read` checks that the others agree."""
        chunks = self.chunks(_PROBE_VALUES)
        probed = [chunks[i] for i in np.unique(np.linspace(0, len(chunks) - 1, _PROBES).astype(int)) if chunks]
        sample = [self._matrix(*chunk) for chunk in probed]
        if not any(X.nnz for X in sample):  # empty cells say nothing: look on
            sample = list(islice((X for X in (self._matrix(*chunk) for chunk in chunks) if X.nnz), 1))
        X = sparse.vstack([sparse.csr_matrix((0, len(self.genes)), dtype=np.float32), *sample], format="csr")
        return space_of(X, self.genes.names, self.config.input_kind, str(self.config.path))

    @property
    def input_kind(self) -> InputKind:
        """Of what `read` gives."""
        return "counts" if self.space.counts else "log1p"

    @property
    def target_sum(self) -> float | None:
        """Counts a cell of what `read` gives, of log1p values; None where nobody knows."""
        return None if self.space.total is None else PREPROCESSING.target_sum

    @property
    def values(self) -> str:
        left_out = f"; {n:,} columns of X are no genes" if (n := int((~self.is_gene).sum())) else ""
        left_out += f", {self.guides} counted in cells of their own perturbation alone" if self.guides else ""
        left_out += f"; {self.dialect}" if self.dialect else ""
        if self.space is RAW_COUNTS:
            return f"raw counts{left_out}"
        return found(self.space, self.target_sum, self.space.bases == UNKNOWN.bases) + left_out

    @property
    def library_size(self) -> str:
        return library_text(self.input_kind, self.config.library_size_col)

    def chunks(self, max_values: int) -> list[tuple[int, int]]:
        if not self.is_sparse:
            with open_h5ad(self.config.path, self.parts) as file, reading(self.config.path):
                block = (file[self.parts[0]].chunks or (1,))[0]
            rows = min(max(max_values // max(len(self.genes), 1), 1), _MAX_ROWS)
            rows -= rows % block if rows > block else 0  # a compressed block is not read twice
            return [(first, min(first + rows, self.n_cells)) for first in range(0, self.n_cells, rows)]
        with open_h5ad(self.config.path, self.parts) as file, reading(self.config.path):
            indptr = file[f"{self.parts[0]}/indptr"][:]  # 8 bytes a cell
        if (np.diff(indptr) < 0).any():
            bad = int(np.argmax(np.diff(indptr) < 0))
            raise ValueError(
                f"X of {self.config.path} is a damaged sparse matrix: row {bad} goes from value {indptr[bad]} to "
                f"{indptr[bad + 1]}; get or write the file again."
            )
        ranges, first = [], 0
        while first < self.n_cells:
            end = int(np.searchsorted(indptr, indptr[first] + max_values, side="right")) - 1
            end = min(max(end, first + 1), first + _MAX_ROWS)  # one row at least, however large
            ranges.append((first, end))
            first = end
        return ranges

    def all_labels(self, first: int, last: int) -> pd.DataFrame:
        columns = {name: getattr(self.config, f"{name}_col") for name in LABELS}
        with open_h5ad(self.config.path, self.parts) as file, reading(self.config.path):
            names = _names(_index(file["obs"]), first, last)
            wanted = {column for column in columns.values() if column is not None} | extra_names(
                self.config, file["obs"].keys()
            )
            values = {column: _column(file["obs"], column, first, last) for column in wanted}
        found = {
            name: None if column is None else categorical(values[column], column, self.config.path)
            for name, column in columns.items()
        }
        return label_table(self.config, self.name, first, found, names, extra_columns(self.config, values))

    def labels(self, first: int, last: int) -> pd.DataFrame:
        return selected(self.all_labels(first, last), self.config)

    def read(self, first: int, last: int) -> tuple[sparse.csr_matrix, np.ndarray]:
        X = self._checked(first, last)
        if self.input_kind == "log1p":
            return X, np.ones(X.shape[0], np.float32)
        if self.config.library_size_col is None:
            return X, library_sizes(X)
        library = self._library_column(self.config.library_size_col, first, last)
        refuse_small_libraries(library, X, self.config.library_size_col, self.config.path)
        return X, library

    def _checked(self, first: int, last: int) -> sparse.csr_matrix:
        if self.space is RAW_COUNTS:
            return self._as("counts", *self._of_genes(*self._raw(first, last)), first)
        X = self._matrix(first, last)
        X = renormalised(X, self.space, self.target_sum, lambda row: self._cell(first + row))
        return self._as(self.input_kind, X.indptr, X.indices, X.data, first)

    def _matrix(self, first: int, last: int) -> sparse.csr_matrix:
        # Values of any kind; what can be of none is refused with its cell.
        indptr, indices, values = self._of_genes(*self._raw(first, last))
        n_genes, whole = len(self.genes), bool((values[np.isfinite(values)] % 1 == 0).all())
        inside = not len(indices) or 0 <= indices.min() <= indices.max() < n_genes
        if not (inside and np.isfinite(values).all() and values.min(initial=0) >= 0):
            self._as("counts" if whole else "log1p", indptr, indices, values, first)
        return as_csr(sparse.csr_matrix((values, indices, indptr), (last - first, n_genes)))

    def _as(
        self, kind: InputKind, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, first: int
    ) -> sparse.csr_matrix:
        detected = self.config.input_kind == "auto"
        where = f"X of {self.config.path}" + (f" (taken for {kind} by a sample of its cells)" if detected else "")
        return checked(indptr, indices, values, self.genes, kind, detected, where, lambda row: self._cell(first + row))

    def _of_genes(
        self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.is_gene.all() or (len(indices) and not 0 <= indices.min() <= indices.max() < len(self.is_gene)):
            return indptr, indices, values
        kept = self.is_gene[indices]
        ends = np.append(0, np.cumsum(kept))[indptr]
        return ends, (np.cumsum(self.is_gene) - 1)[indices[kept]], values[kept]

    def _raw(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with open_h5ad(self.config.path, self.parts) as file, reading(self.config.path):
            X = file[self.parts[0]]
            if not self.is_sparse:
                parts = []
                rows = max(BLOCK * 8 // max(len(self.genes), 1), (X.chunks or (1,))[0])
                for start in range(first, last, rows):  # the zeros of one part at a time
                    dense = X[start : min(start + rows, last)]
                    parts.append(sparse.csr_matrix(dense.astype(np.float32) if dense.dtype == np.float16 else dense))
                csr = sparse.vstack(parts, format="csr") if len(parts) > 1 else parts[0]
                return csr.indptr, csr.indices, csr.data
            indptr = X["indptr"][first : last + 1].astype(np.int64)
            begin, end = int(indptr[0]), int(indptr[-1])
            if not 0 <= begin <= end <= len(X["data"]) or (np.diff(indptr) < 0).any():
                raise ValueError(f"row pointers of rows {first} to {last} decrease")
            values = X["data"][begin:end]
            if values.dtype == np.float16:  # scipy has no sparse matrices of it
                values = values.astype(np.float32)
            return indptr - begin, X["indices"][begin:end], values

    def _cell(self, row: int) -> str:
        with open_h5ad(self.config.path, self.parts) as file, reading(self.config.path):
            return f"cell {_names(_index(file['obs']), row, row + 1)[0]!r} (row {row})"

    def _library_column(self, column: str, first: int, last: int) -> np.ndarray:
        with open_h5ad(self.config.path, self.parts) as file, reading(self.config.path):
            raw = _column(file["obs"], column, first, last)
            names = _names(_index(file["obs"]), first, last)
        values = pd.to_numeric(pd.Series(raw).astype(object), errors="coerce").to_numpy(dtype=np.float64)
        good = np.isfinite(values) & (values >= 0)
        if not good.all():
            bad = int(np.argmin(good))
            raise ValueError(
                f"obs column {column!r} of {self.config.path} holds {pd.Series(raw).iloc[bad]!r} in cell "
                f"{names[bad]!r}; library sizes must be finite and not negative."
            )
        return values.astype(np.float32)


def _form(X: h5py.Group | h5py.Dataset | None) -> tuple[str, tuple[int, ...], np.dtype[Any]]:
    """Encoding, shape and type of X in an .h5ad."""
    if isinstance(X, h5py.Dataset):
        return ("dense" if X.ndim == 2 else f"{X.ndim}-dimensional"), tuple(X.shape), X.dtype
    if X is None or "data" not in X:
        return "neither array nor sparse matrix", (), np.dtype("V")
    encoding = str(X.attrs.get("encoding-type", X.attrs.get("h5sparse_format", "")))
    shape = tuple(int(n) for n in X.attrs.get("shape", X.attrs.get("h5sparse_shape", ())))
    return encoding.removesuffix("_matrix"), shape, X["data"].dtype


def _column_names(obs: h5py.Group) -> list[str]:
    return [name for name in obs if name != "__categories" and name != obs.attrs.get("_index")]


def _index(obs: h5py.Group) -> h5py.Dataset | None:
    index = obs.get(str(obs.attrs.get("_index", "_index")))
    return index["values"] if isinstance(index, h5py.Group) and "values" in index else index


def _names(index: h5py.Dataset, first: int, last: int) -> np.ndarray:
    return _strings(index, first, last).astype(object)


def _strings(values: h5py.Dataset, first: int, last: int) -> np.ndarray:
    if h5py.check_string_dtype(values.dtype) is not None:
        return np.asarray(values.asstr()[first:last], dtype=object)
    return pd.Series(values[first:last]).astype(str).to_numpy(dtype=object)


def _column(obs: h5py.Group, name: str, first: int, last: int) -> pd.Categorical | np.ndarray:
    """Rows first..last - 1 of an obs column as AnnData 0.7 and later write them; missing values are None or NaN."""
    column = obs[name]
    if isinstance(column, h5py.Dataset) and "categories" in column.attrs:  # AnnData 0.7
        return _coded(column[first:last], obs.file[column.attrs["categories"]])
    if isinstance(column, h5py.Dataset):
        return _values(column, first, last)
    encoding = column.attrs.get("encoding-type")
    if encoding == "categorical":
        return _coded(column["codes"][first:last], column["categories"])
    if encoding in ("nullable-integer", "nullable-boolean", "nullable-string-array"):
        values = _values(column["values"], first, last).astype(object)
        values[column["mask"][first:last]] = None
        return values
    raise ValueError(f"obs column {name!r} is stored as {encoding}, which AnnData does not write for labels")


def _coded(codes: np.ndarray, categories: h5py.Dataset | h5py.Group) -> pd.Categorical:
    stored = categories["values"] if isinstance(categories, h5py.Group) else categories
    if len(codes) and not -1 <= codes.min() <= codes.max() < len(stored):
        raise ValueError(f"a code {codes.min() if codes.min() < -1 else codes.max()} for {len(stored)} categories")
    return pd.Categorical.from_codes(codes.astype(np.int32), pd.Index(_values(stored, 0, len(stored))))


def _values(stored: h5py.Dataset, first: int, last: int) -> np.ndarray:
    return _strings(stored, first, last) if h5py.check_string_dtype(stored.dtype) else stored[first:last]
