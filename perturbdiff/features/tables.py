"""What is known of perturbations, as numbers: a vector for each gene or drug.

n = names of a table, F = features.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perturbdiff.data.vocab import LabelVocab, Vocabularies
from perturbdiff.features.files import ABOUT, MAX_LETTERS, read_about, read_vectors
from perturbdiff.files import few, written


@dataclass(frozen=True)
class FeatureTable:
    """What is known of each of some entities (genes, drugs): one vector a name.

    name
        "esm2": what people call it.
    names
        (n,) unique.
    values
        (n, F) float32, finite.
    about
        Where it comes from, for people: kind, source, date, license, ...

    Raises ValueError where they are not such.
    """

    name: str
    names: tuple[str, ...]
    values: np.ndarray
    about: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        title, shape = f"feature table {self.name!r}", self.values.shape
        if self.values.dtype != np.float32 or len(shape) != 2 or len(self.names) != shape[0] or 0 in shape:
            raise ValueError(
                f"{title} has {len(self.names)} names and values of shape {shape} of type {self.values.dtype}; it must "
                "have at least one name and one feature, and a row of float32 for each name."
            )
        for name in self.names:
            if not 0 < len(name) <= MAX_LETTERS or name.encode(errors="ignore").decode() != name:
                raise ValueError(f"{title}: {name[:80]!r} is no name of 1 to {MAX_LETTERS} letters.")
        twice = [name for name, n in Counter(self.names).items() if n > 1]
        if twice:
            raise ValueError(f"{title} has rows of the same name: {few(twice)}; keep one of each.")
        finite = np.isfinite(self.values).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{title}: values of {few([self.names[i] for i in np.flatnonzero(~finite)])} are missing, not numbers "
                "or too large for float32; fill them in or leave these names out."
            )

    def centre_and_scale(self) -> tuple[np.ndarray, float]:
        """(F,) means over the rows, and the number that makes the mean square of a centred value 1.

        One number for all columns: principal components stay what they are. Without any variation it is 0.
        """
        centre = self.values.mean(axis=0, dtype=np.float64)  # exact where a column is constant
        spread = np.sqrt(np.square(self.values - centre).mean())
        return centre.astype(np.float32), float(1 / spread) if spread > 0 else 0.0

    def directions(self) -> FeatureTable:
        """Rows of length 1, so that inner products are cosines; rows of zeros stay."""
        norm = np.linalg.norm(self.values.astype(np.float64), axis=1, keepdims=True)
        values = np.divide(self.values, norm, out=np.zeros(self.values.shape), where=norm > 0)
        return replace(self, values=values.astype(np.float32))

    def positions(self, entities: Sequence[str]) -> np.ndarray:
        """(len(entities),) int64 row of each entity, -1 for one that the table does not have.

        An entity is the name that equals it; without one, the only name that does so but for upper and lower case.
        """
        exact, folded = self._positions
        return np.array([exact.get(name, folded.get(name.casefold(), -1)) for name in entities], dtype=np.int64)

    def rows(self, entities: Sequence[str]) -> np.ndarray:
        """(len(entities), F) float32; zeros where the table does not have an entity (see `positions`)."""
        positions = self.positions(entities)
        return np.where(positions[:, None] >= 0, self.values[positions], np.float32(0))

    @cached_property
    def _positions(self) -> tuple[dict[str, int], dict[str, int]]:
        folded: dict[str, int] = {}
        for i, name in enumerate(self.names):
            folded[name.casefold()] = -1 if name.casefold() in folded else i  # -1: it could be either
        return {name: i for i, name in enumerate(self.names)}, folded


def read_table(path: str | Path, name: str | None = None) -> FeatureTable:
    """A table from a file; `name` is the file's stem where it is not given.

    Formats
    -------
    .csv, .parquet
        One row an entity. Its name is the column `name`; without one, the index that pandas wrote, or else the first
        column. All other columns are numbers.
    .npz
        Arrays `names` (n,) of text and `values` (n, F); or an array (F,) under each name.
    .safetensors
        A tensor `values` (n, F) with the metadata {"names": a JSON list}; or a tensor (F,) under each name.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; another suffix; not such a file; larger than is read; names that come twice; values that are not
        finite.
    """
    names, values = read_vectors(Path(path))
    return table_of_file(Path(path), name, names, values, read_about(Path(path)))


def table_of_file(
    path: Path, name: str | None, names: Sequence[str], values: np.ndarray, about: Mapping[str, str] | None = None
) -> FeatureTable:
    """The table of what is in a file. Raises ValueError, which names the file."""
    try:
        return FeatureTable(path.stem if name is None else name, tuple(names), values, about or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_table(table: FeatureTable, path: Path) -> None:
    """Write a .parquet that `read_table` reads, whole or not at all; `about` is in the metadata of its schema."""
    columns = {"name": pa.array(table.names)}
    columns |= {f"f{i}": pa.array(values) for i, values in enumerate(np.ascontiguousarray(table.values.T))}
    with written(path) as temporary:
        pq.write_table(pa.table(columns, metadata={ABOUT: json.dumps(dict(table.about))}), temporary)


def with_tables(vocabularies: Vocabularies, tables: Sequence[FeatureTable]) -> Vocabularies:
    """With the perturbations that have features but no row of their own."""
    known = set(vocabularies.labelled)
    described = {name: None for table in tables for name in table.names if name not in known}  # in this order
    return replace(
        vocabularies,
        perturbations=LabelVocab("perturbation", (*vocabularies.labelled, *described)),
        n_by_features=len(described),
        tables=tuple((table.name, table.values.shape[1]) for table in tables),
    )


def coverage(tables: Sequence[FeatureTable], entities: Sequence[str]) -> str:
    """Lines for people: how many of the entities each table has, some that it lacks, and which no table has."""
    unknown = entities = list(dict.fromkeys(entities))
    lines = []
    for table in tables:
        row = dict(zip(entities, table.positions(entities).tolist(), strict=True))
        lacking = [name for name in entities if row[name] < 0]
        line = f"{table.name}: {len(entities) - len(lacking)} of {len(entities)}"
        if other_case := sum(row[name] >= 0 and table.names[row[name]] != name for name in entities):
            line += f", {other_case} of them in other upper and lower case"
        lines.append(f"{line}; lacks {few(lacking)}" if lacking else line)
        unknown = [name for name in unknown if row[name] < 0]
    return "\n".join([*lines, f"in no table: {few(unknown)}"])
