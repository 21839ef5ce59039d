"""Parquet in the schema of Tahoe-100M (Zhang et al. 2025) as a source of an atlas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from perturbdiff.atlas.build.sources.checks import (
    categorical,
    checked,
    coded_as,
    extra_columns,
    extra_names,
    label_table,
    naming,
    reading,
    selected,
)
from perturbdiff.atlas.build.sources.parquet import ParquetFiles, RowGroups, batches, lists
from perturbdiff.atlas.format import CONTROL_LABEL
from perturbdiff.config import SourceConfig
from perturbdiff.data.expression import library_sizes
from perturbdiff.data.labels import MISSING
from perturbdiff.data.selectors import LABELS
from perturbdiff.data.space import InputKind
from perturbdiff.data.vocab import GeneVocab

TAHOE_DEFAULTS = {
    "perturbation_col": ("perturbation", "drug"),
    "cell_type_col": ("cell_type", "cell_line_id"),
    "batch_col": ("batch", "plate"),
}
_TAHOE_DOSE = "drugname_drugconc"  # column of the sample table; a perturbation is then a drug at a dose
_TAHOE_CONTROL = {"drug": "DMSO_TF", _TAHOE_DOSE: "[('DMSO_TF', 0.0, 'uM')]"}
_TAHOE_CELL = "BARCODE_SUB_LIB_ID"
_MAX_TOKEN = 1 << 24


@dataclass(frozen=True)
class TahoeSource:
    """Parquet files with the columns of Tahoe-100M: `genes` (tokens) and `expressions` (counts), one row a cell.

    Where a cell's first expression is negative it is a marker, and left out with its gene. Settings that were left at
    their defaults become the data set's own (`drug`, `cell_line_id`, `plate`, "DMSO_TF"); `perturbation_col` may also
    be a column of the sample table, as `drugname_drugconc`.
    """

    config: SourceConfig
    name: str
    n_cells: int
    genes: GeneVocab
    fingerprint: dict[str, Any]
    files: ParquetFiles
    groups: RowGroups
    column_of: np.ndarray  # token -> column, -1 for a token that is no gene
    samples: dict[str, str] | None  # sample -> perturbation, when that is in the sample table

    input_kind: InputKind = "counts"
    library_size: str = "row sums"
    target_sum: float | None = None
    values: str = "raw counts"

    @classmethod
    def open(cls, config: SourceConfig, files: ParquetFiles) -> TahoeSource:
        if config.input_kind == "log1p" or config.library_size_col is not None or config.layer is not None:
            raise ValueError(
                f"{config.path} has the Tahoe-100M schema: whole counts; leave layer, input_kind and library_size_col."
            )
        config = tahoe_settings(config)
        tables = [name for name in files.names if name.split("/")[-1] == "gene_metadata.parquet"]
        data = [name for name in files.names if _is_tahoe_data(name)]
        if any(name.startswith("data/") for name in data):
            data = [name for name in data if name.startswith("data/")]
        if not tables or not data:
            raise FileNotFoundError(
                f"{config.path} has no {'gene_metadata.parquet' if data else 'Parquet files of cells'}; a folder in "
                "the schema of Tahoe-100M has data/*.parquet and metadata/gene_metadata.parquet."
            )
        genes, column_of = _tahoe_genes(files.local(min(tables, key=len)))
        groups = RowGroups.open(files, data, "expressions")
        columns = files.footer(data[0]).schema.to_arrow_schema().names
        samples = None
        if config.perturbation_col is not None and config.perturbation_col not in columns:
            samples = _tahoe_samples(files, config.perturbation_col, columns, config.path)
        for setting in ("cell_type_col", "batch_col"):
            column = getattr(config, setting)
            if column is not None and column not in columns:
                raise KeyError(f"column {column!r} not in {config.path}; found {sorted(columns)}. Set {setting}.")
        for column in ("genes", _TAHOE_CELL, *sorted(extra_names(config, ()))):
            if column not in columns:
                raise KeyError(f"column {column!r} not in {config.path}; found {sorted(columns)}.")
        return cls(
            config, config.name or "tahoe", int(groups.first[-1]), genes, files.fingerprint, files, groups, column_of,
            samples,
        )  # fmt: skip

    def chunks(self, max_values: int) -> list[tuple[int, int]]:
        return self.groups.chunks(max_values)

    def all_labels(self, first: int, last: int) -> pd.DataFrame:
        columns = {name: getattr(self.config, f"{name}_col") for name in LABELS}
        if self.samples is not None:
            columns["perturbation"] = "sample"
        more = extra_names(self.config, ())  # doses with units, if any, in one column
        wanted = sorted({_TAHOE_CELL, *(c for c in columns.values() if c is not None), *more})
        parts = []
        for position, start, stop in self.groups.parts(first, last):
            path = self.files.local(self.groups.names[position])
            table = pa.Table.from_batches(
                batches(path, wanted, start, stop, [c for c in wanted if c != _TAHOE_CELL and c not in more])
            )
            parts.append(table)
        table = pa.concat_tables(parts).unify_dictionaries() if parts else None
        frame = table.to_pandas() if table is not None else pd.DataFrame(columns=wanted)
        names = frame[_TAHOE_CELL].astype(str).to_numpy(dtype=object)
        found: dict[str, pd.Categorical | None] = {}
        for name, column in columns.items():
            values = None if column is None else frame[column]
            if values is None:
                found[name] = None
                continue
            raw = values.array if isinstance(values.dtype, pd.CategoricalDtype) else values.to_numpy()
            found[name] = categorical(raw, str(column), self.config.path)
        if self.samples is not None and (sample := found["perturbation"]) is not None:
            unknown = [s for s in sample.categories if s not in self.samples and s != MISSING]
            if unknown:
                raise ValueError(f"sample {unknown[0]!r} of {self.config.path} is not in its sample_metadata.parquet.")
            found["perturbation"] = coded_as([self.samples.get(name, name) for name in sample.categories], sample.codes)
        extra = extra_columns(self.config, {column: frame[column] for column in more})
        return label_table(self.config, self.name, first, found, names, extra)

    def labels(self, first: int, last: int) -> pd.DataFrame:
        return selected(self.all_labels(first, last), self.config)

    def read(self, first: int, last: int) -> tuple[sparse.csr_matrix, np.ndarray]:
        lengths: list[np.ndarray] = []
        indices: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for position, start, stop in self.groups.parts(first, last):
            name = self.groups.names[position]
            row = start
            for batch in batches(self.files.local(name), ["genes", "expressions"], start, stop):
                parts = self._decoded(batch, name, row)
                for held, part in zip((lengths, indices, values), parts, strict=True):
                    held.append(part)
                row += len(batch)
        indptr = np.concatenate([[0], *lengths]).cumsum()
        X = checked(
            indptr, np.concatenate(indices), np.concatenate(values), self.genes, "counts", False,
            f"expressions of {self.config.path}", lambda row: self._cell(first + row),
        )  # fmt: skip
        return X, library_sizes(X)

    def _cell(self, row: int) -> str:
        return f"cell {self.all_labels(row, row + 1)['cell'].iloc[0]!r} (row {row})"

    def _decoded(self, batch: pa.RecordBatch, name: str, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of genes of each cell, columns and values, without the markers."""
        token_ends, tokens = lists(batch.column("genes"), f"genes of {name}", row)
        ends, values = lists(batch.column("expressions"), f"expressions of {name}", row)
        if len(ends) != len(token_ends) or (ends != token_ends).any():
            bad = row + max(int(np.argmax(ends != token_ends)) - 1, 0)
            raise ValueError(f"row {bad} of {name} has lists genes and expressions of different lengths.")
        starts, lengths = ends[:-1], np.diff(ends)
        marked = lengths > 0
        marked[marked] = values[starts[marked]] < 0
        is_gene = np.ones(len(values), dtype=bool)
        is_gene[starts[marked]] = False
        tokens, values = tokens[is_gene], values[is_gene]
        known = len(tokens) == 0 or 0 <= tokens.min() <= tokens.max() < len(self.column_of)
        columns = self.column_of[tokens] if known else np.zeros(0, np.int32)
        if not known or columns.min(initial=0) < 0:
            genes = set(np.flatnonzero(self.column_of >= 0).tolist())
            bad = next(token for token in tokens.tolist() if token not in genes)
            raise ValueError(
                f"gene token {bad} of {name} is in no row of gene_metadata.parquet; take both from one release."
            )
        return lengths - marked, columns, values


def tahoe_settings(config: SourceConfig) -> SourceConfig:
    """The settings with Tahoe-100M's own columns and control label where they are those of an .h5ad by default."""
    config = replace(config)
    for setting, (default, own) in TAHOE_DEFAULTS.items():
        if getattr(config, setting) == default:
            setattr(config, setting, own)
    if config.control_label == CONTROL_LABEL:
        config.control_label = _TAHOE_CONTROL.get(config.perturbation_col or "", CONTROL_LABEL)
    return config


def _is_tahoe_data(name: str) -> bool:
    *folders, file = name.split("/")
    return file.endswith(".parquet") and not file.endswith("_metadata.parquet") and "metadata" not in folders


def _tahoe_genes(path: Path) -> tuple[GeneVocab, np.ndarray]:
    """Genes in order of their tokens, and the column of each token; a symbol of several genes gives way to ids."""
    with reading(path):
        table = pq.read_table(path).to_pandas()
    missing = [column for column in ("token_id", "gene_symbol", "ensembl_id") if column not in table.columns]
    if missing:
        raise KeyError(f"column {missing[0]!r} not in {path}; found {sorted(map(str, table.columns))}.")
    table = table.sort_values("token_id", kind="stable")
    tokens = table["token_id"].to_numpy(dtype=np.int64)
    if len(tokens) == 0 or tokens[0] < 0 or tokens[-1] >= _MAX_TOKEN or (np.diff(tokens) == 0).any():
        raise ValueError(f"token_id of {path} must be unique, not negative and under {_MAX_TOKEN}.")
    ensembl = table["ensembl_id"].fillna("").astype(str)
    symbols = table["gene_symbol"].fillna("").astype(str)
    names = symbols.mask((symbols.duplicated(keep=False) | (symbols == "")) & (ensembl != ""), ensembl)
    column_of = np.full(int(tokens[-1]) + 1, -1, dtype=np.int32)
    column_of[tokens] = np.arange(len(tokens))
    return naming(path, lambda: GeneVocab(tuple(names), tuple(ensembl))), column_of


def _tahoe_samples(files: ParquetFiles, column: str, columns: Sequence[str], path: str) -> dict[str, str]:
    tables = [name for name in files.names if name.split("/")[-1] == "sample_metadata.parquet"]
    table = pd.DataFrame()
    if tables:
        with reading(files.local(tables[0])):
            table = pq.read_table(files.local(tables[0])).to_pandas()
    if column not in table.columns or "sample" not in table.columns or "sample" not in columns:
        found = sorted({*columns, *map(str, table.columns)})
        raise KeyError(f"column {column!r} not in {path} or its sample table; found {found}. Set perturbation_col.")
    if table["sample"].duplicated().any() or table[["sample", column]].isna().any(axis=None):
        raise ValueError(f"sample_metadata.parquet of {path} has repeated samples or missing values of {column!r}.")
    return dict(zip(table["sample"].astype(str), table[column].astype(str), strict=True))
