"""Inputs of an atlas: .h5ad files, Tahoe-100M-schema Parquet and other atlases, read in parts and checked.

A source holds no open file and no expression: it can be sent to other processes, and memory is that of one chunk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy import sparse

from perturbdiff.atlas.build.sources.atlas import OtherAtlas
from perturbdiff.atlas.build.sources.checks import selected, selector_fields, selector_matches
from perturbdiff.atlas.build.sources.h5ad import H5adSource
from perturbdiff.atlas.build.sources.parquet import HubFiles, LocalFiles, ParquetFiles
from perturbdiff.atlas.build.sources.tahoe import TahoeSource
from perturbdiff.atlas.format import CONTROL_LABEL
from perturbdiff.config import SourceConfig
from perturbdiff.data.selectors import LABELS
from perturbdiff.data.space import InputKind
from perturbdiff.data.vocab import GeneVocab, nearest


class Source(Protocol):
    """An input of an atlas: n_cells rows that are read in ranges.

    name
        What its cells are marked with.
    target_sum
        Counts a cell that log1p values are of; None where nobody knows, and of counts.
    values
        What the input holds and what is read of it, for people.
    library_size
        Where library sizes come from, for people.
    fingerprint
        Changes when the input does; plain JSON, without local paths.
    """

    @property
    def config(self) -> SourceConfig: ...

    @property
    def name(self) -> str: ...

    @property
    def n_cells(self) -> int: ...

    @property
    def genes(self) -> GeneVocab: ...

    @property
    def input_kind(self) -> InputKind: ...

    @property
    def target_sum(self) -> float | None: ...

    @property
    def values(self) -> str: ...

    @property
    def library_size(self) -> str: ...

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def chunks(self, max_values: int) -> list[tuple[int, int]]:
        """Row ranges (first, end) that cover the source in order, of about `max_values` stored values at most."""

    def all_labels(self, first: int, last: int) -> pd.DataFrame:
        """Labels of rows first..last - 1 before any filter; columns as `labels`."""

    def labels(self, first: int, last: int) -> pd.DataFrame:
        """Labels of those of the rows first..last - 1 that `cells`, `keep` and `drop` of the settings leave.

        Returns
        -------
        `row` (int64, in the source), `perturbation`, `cell_type`, `batch` (categorical, str; unperturbed cells are
        "control"), `cell` (str, the cell's name).

        Raises
        ------
        KeyError, ValueError
            No such column; a missing label; a perturbation that is called "control" and is not the control.
        """

    def read(self, first: int, last: int) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Expression of all rows first..last - 1, filters apart.

        Returns
        -------
        (n, G) CSR with sorted indices and no stored zeros, raw counts (uint16, or uint32 where one needs it) or log1p
        values (float32), and (n,) float32 library sizes (ones for log1p values).

        Raises
        ------
        ValueError
            X is damaged, holds what is neither counts nor log1p values, or not what `input_kind` says.
        """


def open_source(config: SourceConfig) -> Source:
    """The source that the settings name, its metadata read and checked.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    KeyError, ValueError
        Not of that kind; a column is missing; genes repeat.
    """
    path, kind = Path(config.path), config.kind
    on_hub = not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", config.path) and path.suffix != ".h5ad"
    if not path.exists() and (not on_hub or kind == "h5ad"):
        raise FileNotFoundError(f"{config.path} does not exist; give an .h5ad, a folder, or a data set OWNER/NAME.")
    if kind == "auto" and path.is_file():
        kind = "h5ad"
    config = replace(config, name=config.name or (path.stem if kind == "h5ad" else path.resolve().name))
    if kind == "h5ad":
        return H5adSource.open(config)
    files: ParquetFiles = HubFiles.open(config.path) if on_hub else LocalFiles.open(config.path)
    if kind == "atlas" or (kind == "auto" and "atlas.json" in files.names):
        return OtherAtlas.open(config)
    return TahoeSource.open(config, files)


@dataclass
class Selection:
    """One pass over the labels of a source, at planning: what it leaves, and whether each selector named something.

    Passes over parts are put together with `merge`; `check` is for the whole.
    """

    config: SourceConfig
    n_cells: int = 0  # cells left
    seen: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in LABELS})
    matched: set[str] = field(default_factory=set)

    def labels(self, source: Source, first: int, last: int) -> pd.DataFrame:
        """`source.labels`, noting what was found."""
        labels = source.all_labels(first, last)
        for name in LABELS:
            self.seen[name].update(labels[name].cat.categories[np.unique(labels[name].cat.codes)])
        for selector in {*self.config.keep, *self.config.drop} - self.matched:
            if selector_matches(labels, selector, self.config).any():
                self.matched.add(selector)
        left = selected(labels, self.config)
        self.n_cells += len(left)
        return left

    def merge(self, other: Selection) -> None:
        self.n_cells += other.n_cells
        self.matched |= other.matched
        for name in LABELS:
            self.seen[name] |= other.seen[name]

    def check(self) -> None:
        """Raises ValueError: no control cell, a selector that names no cell, or no cell left."""
        config, seen = self.config, self.seen
        if CONTROL_LABEL not in seen["perturbation"] and config.cells != "perturbed":
            raise ValueError(
                f"no cell of {config.name} has the control label {config.control_label!r} in column "
                f"{config.perturbation_col!r}; {nearest(config.control_label, seen['perturbation'])}. Set "
                "control_label, cells: perturbed if it has no controls, or perturbation_col: null if it has only those."
            )
        for selector in (*config.keep, *config.drop):
            if selector in self.matched:
                continue
            for name, value in selector_fields(selector, config).items():
                if value not in seen[name]:
                    raise ValueError(
                        f"selector {selector!r} of {config.name}: no cell has {name} {value!r}; "
                        f"{nearest(value, seen[name])}. Selectors are PERTURBATION[:CELL_TYPE[:BATCH]], * is any."
                    )
            wanted = selector_fields(selector, config)
            raise ValueError(f"selector {selector!r} of {config.name} matches no cell: none has all of {wanted}.")
        if self.n_cells == 0:
            raise ValueError(
                f"no cell of {config.name} is left by cells: {config.cells}, keep: {list(config.keep)}, drop: "
                f"{list(config.drop)}; select less narrowly."
            )
