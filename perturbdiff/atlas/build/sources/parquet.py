"""Parquet files of a source, in a folder or on the Hub, and rows of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from perturbdiff.atlas.build.sources.checks import reading, row_of
from perturbdiff.atlas.format import footer_of
from perturbdiff.files import short
from perturbdiff.hub_client import asked_again

_ROWS = 1024  # decoded together: larger batches cost more memory and no less time


class ParquetFiles(Protocol):
    """Where the files of a data set lie."""

    @property
    def names(self) -> tuple[str, ...]:
        """Relative paths, sorted."""

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def local(self, name: str) -> Path:
        """The file on this machine, fetched if need be."""

    def footer(self, name: str) -> pq.FileMetaData:
        """What a Parquet file says of itself (`footer_of`); the file is not fetched for it."""


def _is_passing(path: PurePath) -> bool:
    """Whether a file is none of the data: a hidden copy, a notebook's checkpoint, part of a job that has not ended."""
    return any(part.startswith((".", "_")) for part in path.parts)


@dataclass(frozen=True)
class LocalFiles:
    """Files of a folder."""

    folder: Path
    names: tuple[str, ...]

    @classmethod
    def open(cls, folder: str | Path) -> LocalFiles:
        found = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
        return cls(Path(folder), tuple(sorted(path.as_posix() for path in found if not _is_passing(path))))

    @property
    def fingerprint(self) -> dict[str, Any]:
        stats = [(name, self.local(name).stat()) for name in self.names if name.endswith(".parquet")]
        listed = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        return {
            "file": self.folder.resolve().name,
            "size": sum(stat.st_size for _, stat in stats),
            "files_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        }

    def local(self, name: str) -> Path:
        return self.folder / name

    def footer(self, name: str) -> pq.FileMetaData:
        with reading(self.local(name)), open(self.local(name), "rb") as file:
            return footer_of(file)


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set repo at one commit, each fetched into the Hub's cache when it is first read."""

    repo: str
    commit: str
    names: tuple[str, ...]

    @classmethod
    def open(cls, repo: str) -> HubFiles:
        import httpx2
        import huggingface_hub  # only those who read from the Hub wait for it
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            found = asked_again(lambda: huggingface_hub.HfApi().dataset_info(repo))
        except (HfHubHTTPError, HFValidationError, httpx2.TransportError, OSError) as error:
            raise FileNotFoundError(
                f"{repo} is no local path, and no data set of that name could be read on the Hub ({short(error)})."
            ) from error
        names = (file.rfilename for file in found.siblings or ())
        return cls(repo, str(found.sha), tuple(sorted(n for n in names if not _is_passing(PurePosixPath(n)))))

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"file": self.repo, "commit": self.commit}

    def local(self, name: str) -> Path:
        import huggingface_hub

        return Path(huggingface_hub.hf_hub_download(self.repo, name, repo_type="dataset", revision=self.commit))

    def footer(self, name: str) -> pq.FileMetaData:
        import huggingface_hub

        remote = huggingface_hub.HfFileSystem().open(f"datasets/{self.repo}@{self.commit}/{name}", block_size=1 << 16)
        with reading(f"{self.repo}/{name}"), remote as file:
            return footer_of(file)


@dataclass(frozen=True)
class RowGroups:
    """Row groups of the Parquet files of a source, in order.

    file, rows, values
        (n_groups,) position of the file in `names`, number of rows and of list elements of each.
    """

    names: tuple[str, ...]
    file: np.ndarray
    rows: np.ndarray
    values: np.ndarray

    @classmethod
    def open(cls, files: ParquetFiles, names: Sequence[str], column: str) -> RowGroups:
        with ThreadPoolExecutor(8) as pool:
            footers = list(pool.map(files.footer, names))
        groups = []
        for position, (name, footer) in enumerate(zip(names, footers, strict=True)):
            leaves = [footer.schema.column(i).path.split(".")[0] for i in range(footer.num_columns)]
            if column not in leaves:
                raise KeyError(f"column {column!r} not in {name}; found {sorted(set(leaves))}.")
            leaf = leaves.index(column)
            for i in range(footer.num_row_groups):
                group = footer.row_group(i)
                groups.append((position, group.num_rows, group.column(leaf).num_values))
        table = np.array(groups, dtype=np.int64).reshape(-1, 3)
        return cls(tuple(names), table[:, 0], table[:, 1], table[:, 2])

    @cached_property
    def first(self) -> np.ndarray:
        """(n_files + 1,) first row of each file."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.file, self.rows, len(self.names)))]).astype(np.int64)

    def chunks(self, max_values: int) -> list[tuple[int, int]]:
        """Row ranges within a file: whole row groups where they fit."""
        ranges: list[tuple[int, int]] = []
        row, begin, held, file = 0, 0, 0, -1
        for position, rows, values in zip(self.file.tolist(), self.rows.tolist(), self.values.tolist(), strict=True):
            if row > begin and (position != file or held + values > max_values):
                ranges.append((begin, row))
                begin, held = row, 0
            file = position
            parts = min(-(-values // max_values), rows)
            if parts > 1:  # a row group that is larger than a chunk
                cuts = [row + rows * i // parts for i in range(parts + 1)]
                ranges += list(pairwise(cuts))
                begin, held = row + rows, 0
            row, held = row + rows, held + values if parts <= 1 else 0
        return [*ranges, (begin, row)] if row > begin else ranges

    def parts(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(file, first row in it, end row in it) of each file that holds some of these rows."""
        for position in range(int(np.searchsorted(self.first, first, side="right")) - 1, len(self.names)):
            start, stop = int(self.first[position]), int(self.first[position + 1])
            if start >= last:
                return
            if stop > start:
                yield position, max(first, start) - start, min(last, stop) - start


def batches(
    path: Path, columns: Sequence[str], first: int, last: int, dictionary: Iterable[str] = ()
) -> Iterator[pa.RecordBatch]:
    """Rows first..last - 1 of a Parquet file; only the row groups that hold them are read."""
    with reading(path), pq.ParquetFile(path, read_dictionary=list(dictionary)) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        groups = [i for i in range(len(ends)) if ends[i] > first and (ends[i - 1] if i else 0) < last]
        row = int(ends[groups[0] - 1]) if groups and groups[0] else 0
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=list(columns)):
            start, stop = max(first - row, 0), min(last - row, len(batch))
            if stop > start:
                batch.validate(full=True)  # pyarrow keeps numbers of words as the file has them
                yield batch.slice(start, stop - start)
            row += len(batch)


def lists(column: pa.Array, what: str, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends (n + 1,) and elements of a column of lists. Raises ValueError on a missing list or element."""
    if not pa.types.is_list(column.type):  # views and lists of one size
        ends = np.append(0, np.cumsum(pc.list_value_length(column).fill_null(0).to_numpy())).astype(np.int32)
        column = pa.ListArray.from_arrays(pa.array(ends), column.flatten(), mask=column.is_null())
    offsets = column.offsets.to_numpy().astype(np.int64)
    elements = column.values[offsets[0] : offsets[-1]]
    if column.null_count or elements.null_count:
        missing = column.is_null().to_numpy(zero_copy_only=False)
        if not column.null_count:
            position = int(elements.is_null().to_numpy(zero_copy_only=False).argmax())
            missing[row_of(position, offsets - offsets[0])] = True
        raise ValueError(
            f"{what} has a missing list or value in row {row + int(missing.argmax())}; give every cell both."
        )
    return offsets - offsets[0], elements.to_numpy(zero_copy_only=False)
