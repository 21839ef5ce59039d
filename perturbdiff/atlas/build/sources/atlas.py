"""An atlas as a source of another one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

from perturbdiff.atlas.build.sources.checks import categorical, checked, label_table, selected
from perturbdiff.atlas.build.sources.parquet import LocalFiles, RowGroups, batches, lists
from perturbdiff.atlas.store import Atlas
from perturbdiff.config import SourceConfig
from perturbdiff.data.selectors import LABELS
from perturbdiff.data.space import InputKind
from perturbdiff.data.vocab import GeneVocab


@dataclass(frozen=True)
class OtherAtlas:
    """Another atlas, to merge, filter or cut anew. A shard's checksum is verified before it is first read."""

    config: SourceConfig
    name: str
    n_cells: int
    atlas: Atlas
    groups: RowGroups

    library_size: str = "library_size of the atlas"

    @classmethod
    def open(cls, config: SourceConfig) -> OtherAtlas:
        default = SourceConfig()
        fixed = ("perturbation_col", "cell_type_col", "batch_col", "control_label", "library_size_col", "layer")
        for setting in (*fixed, "other_control_labels", "combination_separator", "dose_col", "dose_separator", "where"):
            if getattr(config, setting) != getattr(default, setting):
                raise ValueError(
                    f"{setting} ({getattr(config, setting)!r}) has no meaning for the atlas {config.path}, whose "
                    "columns are fixed; leave it at its default."
                )
        atlas = Atlas.open(config.path)
        config = replace(config, dose_separator=atlas.info.dose_separator)
        kind = atlas.info.input_kind
        if config.input_kind not in ("auto", kind):
            raise ValueError(f"atlas {config.path} holds {kind}, not {config.input_kind}; leave input_kind.")
        atlas.download()  # nothing to do for a folder
        assert atlas.folder is not None, "download sets it"
        files = LocalFiles(atlas.folder, tuple(shard.file for shard in atlas.info.shards))
        groups = RowGroups.open(files, files.names, "genes")
        atlas = replace(atlas, conditions=atlas.conditions.slice(0, 0))  # labels are read from the shards
        return cls(config, config.name or Path(config.path).name, len(atlas), atlas, groups)

    @property
    def genes(self) -> GeneVocab:
        return self.atlas.genes

    @property
    def target_sum(self) -> float | None:
        return self.atlas.info.target_sum

    @property
    def values(self) -> str:
        return "raw counts" if self.input_kind == "counts" else "log1p values"

    @property
    def input_kind(self) -> InputKind:
        return self.atlas.info.input_kind

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"file": Path(self.config.path).resolve().name, "files_sha256": self.atlas.sha256}

    def chunks(self, max_values: int) -> list[tuple[int, int]]:
        return self.groups.chunks(max_values)

    def all_labels(self, first: int, last: int) -> pd.DataFrame:
        parts = [
            pa.Table.from_batches(batches(self._shard(position), [*LABELS, "cell"], start, stop, LABELS))
            for position, start, stop in self.groups.parts(first, last)
        ]
        frame = pa.concat_tables(parts).unify_dictionaries().to_pandas()
        names = frame["cell"].to_numpy(dtype=object)
        found = {name: categorical(frame[name].array, name, self.config.path) for name in LABELS}
        return label_table(self.config, self.name, first, found, names)

    def labels(self, first: int, last: int) -> pd.DataFrame:
        return selected(self.all_labels(first, last), self.config)

    def read(self, first: int, last: int) -> tuple[sparse.csr_matrix, np.ndarray]:
        value_column = self.atlas.info.value_column
        lengths, indices, values, library = [], [], [], []
        for position, start, stop in self.groups.parts(first, last):
            path, row = self._shard(position), start
            for batch in batches(path, ["genes", value_column, "library_size"], start, stop):
                ends, columns = lists(batch.column("genes"), f"genes of {path.name}", row)
                value_ends, part = lists(batch.column(value_column), f"{value_column} of {path.name}", row)
                if len(ends) != len(value_ends) or (ends != value_ends).any():
                    raise ValueError(f"{path.name} has lists of different lengths near row {row}; get the shard again.")
                lengths.append(np.diff(ends))
                indices.append(columns)
                values.append(part)
                library.append(batch.column("library_size").to_numpy(zero_copy_only=False))
                row += len(batch)
        indptr = np.concatenate([[0], *lengths]).cumsum()
        X = checked(
            indptr, np.concatenate(indices), np.concatenate(values), self.genes, self.input_kind, False,
            f"atlas {self.config.path}", lambda row: self._cell(first + row),
        )  # fmt: skip
        return X, np.concatenate(library).astype(np.float32, copy=False)

    def _cell(self, row: int) -> str:
        return f"cell {self.all_labels(row, row + 1)['cell'].iloc[0]!r} (row {row})"

    def _shard(self, position: int) -> Path:
        key = str(self.atlas.folder), position
        if key not in _verified:
            _verified[key] = self.atlas.check_shard(position)
        return _verified[key]


_verified: dict[tuple[str, int], Path] = {}  # shards whose checksum this process found right
