"""Files of one vector a name: .csv, .parquet, .npz, .safetensors. Sizes are checked before memory is taken.

n = names, F = features. Whether names are unique and values finite is for `tables.FeatureTable` to say.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.lib import format as npy
from safetensors import safe_open

from perturbdiff.config import MAX_FEATURES
from perturbdiff.files import MAX_BRACKETS, few, printable, short

SUFFIXES = (".parquet", ".csv", ".npz", ".safetensors")
MAX_BYTES = 1 << 33  # of a file, and of what it unpacks to
MAX_HEADER_BYTES = 1 << 25  # of what a file says of itself: takes up to twenty times as much memory
MAX_NAMES = 1 << 22
MAX_VALUES = 1 << 29  # 2 GB in float32: 100,000 genes with 5,000 features
MAX_LETTERS = 5000  # of one name or one SMILES
ABOUT = b"perturbdiff.features"  # key of what a .parquet file says of itself
MAX_ABOUT = 1 << 16  # bytes of it
CSV_BLOCK = 1 << 24  # bytes read at a time; a line is never longer
NUMBERS = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8"}  # of safetensors


class Unfit(ValueError):
    """Why a file is refused, without its path."""


def read_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    """Names and their vectors, (n, F) float32; values that float32 cannot hold become infinite.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; another suffix; not readable as what the suffix says; larger than is read; columns, tensors or
        arrays that are not numbers, or of different lengths.
    """
    with _reading(path, SUFFIXES):
        if path.suffix == ".npz":
            return _npz_vectors(path)
        return _safetensors_vectors(path) if path.suffix == ".safetensors" else _column_vectors(path)


def read_texts(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The texts of some columns of a .csv or .parquet file, one list a column; other columns are not looked at.

    Raises FileNotFoundError and ValueError as `read_vectors`, and where a column is missing or no text.
    """
    with _reading(path, (".csv", ".parquet")):
        titles = _titles(path)[0]
        return [_texts(column) for column in _columns(path, titles, [_only(titles, title) for title in columns], [])]


def read_titles(path: Path) -> list[str]:
    """The titles of the columns of a .csv or .parquet file. Raises as `read_vectors`."""
    with _reading(path, (".csv", ".parquet")):
        return _titles(path)[0]


def read_about(path: Path) -> dict[str, str]:
    """What a .parquet file of `write_table` says of where it comes from; of other files nothing. Raises as
    `read_vectors`."""
    with _reading(path, SUFFIXES):
        if path.suffix != ".parquet":
            return {}
        with _open_parquet(path, []) as file:
            text = (file.schema_arrow.metadata or {}).get(ABOUT, b"{}")
        _check_bytes(len(text), MAX_ABOUT)
        said = json.loads(text) if text.count(b"[") + text.count(b"{") <= MAX_BRACKETS else None
        if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
            raise Unfit(f"its metadata {ABOUT.decode()!r} must be a JSON object of texts.")
        return said


@contextmanager
def _reading(path: Path, suffixes: Sequence[str]) -> Iterator[None]:
    """What is wrong with a file as one line."""
    if not path.is_file():
        raise FileNotFoundError(f"feature table {str(path)!r} does not exist; give a file ({', '.join(suffixes)}).")
    if path.suffix not in suffixes:
        raise ValueError(f"feature table {str(path)!r} must be one of {', '.join(suffixes)}; save it as such.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are read.")
    try:
        yield
    except Unfit as error:
        raise ValueError(f"{path}: {printable(str(error)[:500])}") from None
    except Exception as error:  # on a damaged file the libraries raise what comes, types of their own among it
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the disk, not of the content
            raise
        raise ValueError(f"{path} is not a readable {path.suffix} file ({short(error)}); save it again.") from error


def _check_size(n: int, width: int) -> None:
    if not (n <= MAX_NAMES and width <= MAX_FEATURES and n * width <= MAX_VALUES):
        raise Unfit(
            f"{n:,} names with {width:,} features are too many; at most {MAX_NAMES:,} names, {MAX_FEATURES:,} features "
            f"and {MAX_VALUES:,} values are read."
        )


def _check_bytes(n_bytes: int, most: int) -> None:
    if n_bytes > most:
        raise Unfit(f"it states {n_bytes:,} bytes where at most {most:,} are read; is it what its suffix says?")


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


# .csv and .parquet: a row a name


def _column_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    titles, index = _titles(path)
    if "name" not in titles and len(index) > 1:
        raise Unfit(f"the index has {len(index)} columns; give the names in one column, 'name'.")
    key = _only(titles, "name" if "name" in titles else [*index, *titles][0])
    features = [i for i, title in enumerate(titles) if i != key and title not in index]
    if not features:
        raise Unfit(f"there are no columns of numbers beside the names; found {few(titles)}.")
    if path.suffix == ".csv":
        _check_titles([titles[i].strip() for i in features])
    column, *numbers = _columns(path, titles, [key], features)
    names = _texts(column)
    values = np.empty((len(names), len(features)), dtype=np.float32)
    for i, column in enumerate(numbers):
        values[:, i] = _float32(column.to_numpy())
    return names, values


def _titles(path: Path) -> tuple[list[str], list[str]]:
    """Titles of the columns, and of those among them that pandas wrote as the index of its frame: no features."""
    if path.suffix == ".parquet":
        with _open_parquet(path, []) as file:
            schema = file.schema_arrow
        index = None
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # where pandas did not write it
            index = schema.pandas_metadata["index_columns"]
        return schema.names, [title for title in index if isinstance(title, str)] if isinstance(index, list) else []
    with open(path, encoding="utf-8-sig", newline="") as text:
        line = text.readline(CSV_BLOCK)
    titles = next(csv.reader([line]), [])
    if len(line) == CSV_BLOCK or len(titles) < 2:
        raise Unfit(
            f"the first line is {line.strip()[:80]!r}; it must name columns separated by commas: name, and one or "
            f"more others, in fewer than {CSV_BLOCK:,} letters."
        )
    return titles, []


def _check_titles(titles: list[str]) -> None:
    """Refuse the titles of a .csv that hold row numbers or values."""
    if "" in titles:
        raise Unfit("a column beside the names has no title; leave row numbers out (index=False).")
    try:
        numbers = [float(title) for title in titles]
    except ValueError:
        return
    if numbers not in (list(range(len(titles))), list(range(1, len(titles) + 1))):  # as pandas and R number columns
        raise Unfit(f"the first line holds values ({few(titles)}); it must name the columns.")


def _only(titles: list[str], title: str) -> int:
    """The position of a column that must be there once."""
    if titles.count(title) != 1:
        raise Unfit(f"there must be one column {title!r}, not {titles.count(title)}; found {few(titles)}.")
    return titles.index(title)


def _columns(path: Path, titles: list[str], texts: list[int], numbers: list[int]) -> list[pa.ChunkedArray]:
    """The columns at the positions `texts`, then those at `numbers`."""
    if path.suffix == ".parquet":
        with _open_parquet(path, [titles[i] for i in texts]) as file:
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            _check_size(sum(abs(group.num_rows) for group in groups), len(numbers))  # the file's own sum is not read
            for field in map(file.schema_arrow.field, numbers):
                if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
                    raise Unfit(f"column {field.name[:80]} holds {field.type}; all but the names must be numbers.")
            wanted = [titles[i] for i in (*texts, *numbers)]
            table = file.read(wanted, use_threads=False)
            table.validate(full=True)  # pyarrow keeps numbers of words as the file has them, beyond the last one too
            return [table.column(title) for title in wanted]
    with open(path, "rb") as lines:
        blocks = iter(lambda: lines.read(CSV_BLOCK), b"")
        n_lines = sum(max(block.count(b"\n"), block.count(b"\r")) for block in blocks)
    _check_size(n_lines - 1, len(numbers))
    every = [str(i) for i in range(len(titles))]  # a title may be there twice
    types = {every[i]: pa.string() for i in texts} | {every[i]: pa.float64() for i in numbers}
    return pyarrow.csv.read_csv(
        path,
        pyarrow.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK, skip_rows=1, column_names=every),
        convert_options=pyarrow.csv.ConvertOptions(  # null_values: a gene may be called NA
            column_types=types, include_columns=list(types), null_values=[], strings_can_be_null=False
        ),
    ).columns


def _open_parquet(path: Path, texts: list[str]) -> pq.ParquetFile:
    """A file of a bearable size. Texts come as a dictionary, so that one that is repeated takes its memory once."""
    with open(path, "rb") as end:
        end.seek(max(0, path.stat().st_size - 8))
        _check_bytes(int.from_bytes(end.read(4), "little"), MAX_HEADER_BYTES)
    limits = {"thrift_string_size_limit": MAX_HEADER_BYTES, "thrift_container_size_limit": MAX_FEATURES + 2}
    file = pq.ParquetFile(path, read_dictionary=texts, pre_buffer=False, **limits)
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    _check_bytes(sum(abs(group.total_byte_size) for group in groups), MAX_BYTES)
    return file


def _texts(column: pa.ChunkedArray) -> list[str]:
    words = column.combine_chunks().dictionary if pa.types.is_dictionary(column.type) else column
    if not (pa.types.is_string(words.type) or pa.types.is_large_string(words.type)):
        raise Unfit(f"names and SMILES must be text, not {words.type}; save them as text.")
    if column.null_count or words.null_count:
        raise Unfit("a name or SMILES is missing; give one in every row.")
    longest = pc.max(pc.binary_length(words)).as_py() or 0  # bytes, of letters of one to four
    if longest > MAX_LETTERS:
        raise Unfit(f"a name or SMILES has {longest:,} bytes; at most {MAX_LETTERS:,} are read.")
    return column.to_pylist()


# .npz and .safetensors: an array (n, F) and names, or an array (F,) under each name


def _npz_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    with open(path, "rb") as file:
        _check_directory(file, path.stat().st_size)
        with zipfile.ZipFile(file) as archive:
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(infos) < len(archive.infolist()):
                raise Unfit("an array is there twice; save it again.")
            _check_bytes(sum(info.file_size for info in infos.values()), MAX_BYTES)
            headers = {name: _npy_header(archive, info) for name, info in infos.items()}

            def read(name: str) -> np.ndarray:
                return npy.read_array(archive.open(infos[name]), allow_pickle=False)

            names = None
            if {"names", "values"} <= headers.keys():
                shape, dtype = headers.pop("names")
                if dtype.kind != "U" or not 0 < dtype.itemsize <= 4 * MAX_LETTERS or len(shape) != 1:
                    raise Unfit(
                        f"names of type {dtype} and shape {shape} must be a list of text of at most {MAX_LETTERS:,} "
                        "letters; save numpy.asarray(names, dtype=str)."
                    )
                _check_size(shape[0], 1)
                letters = read("names")
                if letters.view(f"{dtype.byteorder}u4").max(initial=0) > sys.maxunicode:  # would be broken objects
                    raise Unfit("names hold numbers that are no letters; save them again.")
                names = letters.tolist()
            found = {name: shape if dtype.kind in "fiu" else str(dtype) for name, (shape, dtype) in headers.items()}
            return _array_vectors(found, names, read)


def _check_directory(file: BinaryIO, size: int) -> None:
    """Refuse a zip directory that zipfile would take much memory for: 56, 20 and 22 bytes at the end state its size."""
    file.seek(max(0, size - 98))
    end = file.read().rjust(98, b"\0")
    large = end[56:60] == b"PK\6\7"
    if (
        end[76:80] != b"PK\5\6"
        or end[-2:] != b"\0\0"
        or (large and (end[:4] != b"PK\6\6" or int.from_bytes(end[64:72], "little") != size - 98))
    ):
        raise Unfit("no directory of arrays is at its end; save it again with numpy.savez.")
    _check_bytes(int.from_bytes(end[40:48] if large else end[88:92], "little"), MAX_HEADER_BYTES)


def _npy_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, which are those of its bytes."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack more than is asked for
        raise Unfit(f"{info.filename[:80]} is packed in another way than numpy's; save it with numpy.savez.")
    with archive.open(info) as file:
        if npy.read_magic(file) != (1, 0):  # others are for structured arrays
            raise Unfit(f"{info.filename[:80]} is an array of another version; save it with numpy.savez.")
        shape, _, dtype = npy.read_array_header_1_0(file)
        if not dtype.hasobject and info.file_size != file.tell() + math.prod(shape) * dtype.itemsize:
            raise Unfit(f"{info.filename[:80]} of shape {shape} does not have {info.file_size:,} bytes; save it again.")
        return shape, dtype


def _safetensors_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    with open(path, "rb") as start:
        length = int.from_bytes(start.read(8), "little")
        _check_bytes(length, MAX_HEADER_BYTES)
        header = start.read(length)
    with safe_open(path, framework="pt") as file:  # numpy has no bfloat16
        titles = [title for title, _ in json.loads(header, object_pairs_hook=list)]
        if len(set(titles)) < len(titles):
            raise Unfit("a tensor is there twice; save it again.")
        parts = {name: file.get_slice(name) for name in sorted(file.keys())}
        found = {
            name: tuple(part.get_shape()) if part.get_dtype() in NUMBERS else part.get_dtype()
            for name, part in parts.items()
        }
        names = None
        if list(parts) == ["values"] and len(parts["values"].get_shape()) == 2:
            text = (file.metadata() or {}).get("names", "")
            with suppress(ValueError):
                names = json.loads(text) if text.count("[") + text.count("{") <= MAX_BRACKETS else None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise Unfit("the metadata must have names, a JSON list of one text for each row of values.")
        return _array_vectors(found, names, lambda name: file.get_tensor(name).float().numpy())


def _array_vectors(
    found: dict[str, Any], names: list[str] | None, read: Callable[[str], np.ndarray]
) -> tuple[list[str], np.ndarray]:
    """The array `values`, a row for each of the names; without names, all arrays, one a name.

    `found` has the shape of each array of numbers, the type of any other.
    """
    first = next(iter(found.values()), None)
    width = first[-1] if isinstance(first, tuple) and first else 0
    expected = (width,) if names is None else (len(names), width)
    for name, shape in found.items():
        if shape != expected or (names is not None and name != "values"):
            raise Unfit(
                f"array {name[:80]!r} is {shape} where numbers of shape {expected} are expected; give a vector for "
                "each name, all of one length, or names and values alone, a row for each."
            )
    _check_size(len(found) if names is None else len(names), width)
    if names is not None:
        return names, _float32(read("values"))
    return list(found), np.array([_float32(read(name)) for name in found], np.float32).reshape(len(found), width)
