"""Files of feature vectors, one a name: .csv, .parquet, .npz, .safetensors. Sizes are checked before memory is taken.

n = names, F = features. Whether names are unique and values finite is for `features.FeatureTable` to say.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open

from perturbdiff.config import MAX_FEATURES
from perturbdiff.files import MAX_BRACKETS, few, short

SUFFIXES = (".parquet", ".csv", ".npz", ".safetensors")
MAX_BYTES = 1 << 33  # of a file, and of what it unpacks to
MAX_HEADER_BYTES = 1 << 25  # of what a file says of itself: takes up to twenty times as much memory
MAX_NAMES = 1 << 22
MAX_VALUES = 1 << 29  # 2 GB in float32: 100,000 genes with 5,000 features
MAX_LETTERS = 5000  # of one name or one SMILES
CSV_BLOCK = 1 << 24  # bytes read at a time; a line is never longer
BATCH_VALUES = 1 << 24  # converted at a time
NUMBERS = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8"}  # of safetensors

_END = struct.Struct("<4s4H2LH")  # of a zip archive
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = 20
_NOT_READABLE = (
    pa.ArrowException, SafetensorError, zipfile.BadZipFile, zlib.error, struct.error, csv.Error, UnicodeError, EOFError,
    NotImplementedError, RecursionError, OverflowError, MemoryError,
)  # fmt: skip


def read_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    """Names and their vectors, (n, F) float32; values that float32 cannot hold become infinite.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; another suffix; not readable as what the suffix says; larger than is read; columns, tensors or
        arrays that are not numbers, or of different lengths; no names, or none with values.
    """
    with _reading(path):
        if path.suffix == ".parquet":
            return _parquet_vectors(path)
        if path.suffix == ".csv":
            return _csv_vectors(path)
        return _npz_vectors(path) if path.suffix == ".npz" else _safetensors_vectors(path)


def read_texts(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The texts of some columns of a .csv or .parquet file, one list a column; other columns are not looked at.

    Raises FileNotFoundError and ValueError as `read_vectors`, and where a column is missing or no text.
    """
    with _reading(path, (".csv", ".parquet")):
        if path.suffix == ".csv":
            header = _csv_header(path)
            places = [_only(path, header, column) for column in columns]
            batches = _csv_batches(path, len(header), dict.fromkeys(places, pa.string()))
        else:
            schema = _parquet_schema(path)[0]
            places = [_only(path, schema.names, column) for column in columns]
            batches = _parquet_batches(path, 1 << 16, list(columns))
        texts: list[list[str]] = [[] for _ in columns]
        for batch in batches:
            for i, column in enumerate(columns):
                texts[i] += _texts(path, batch.column(i if path.suffix == ".csv" else column))
            _check_size(path, len(texts[0]), 1)
        return texts


@contextmanager
def _reading(path: Path, suffixes: Sequence[str] = SUFFIXES) -> Iterator[None]:
    """What a reader says of a broken file as one line."""
    if not path.is_file():
        raise FileNotFoundError(f"feature table {str(path)!r} does not exist; give a file ({', '.join(suffixes)}).")
    if path.suffix not in suffixes:
        raise ValueError(f"feature table {str(path)!r} must be one of {', '.join(suffixes)}; save it as such.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are read.")
    try:
        yield
    except _NOT_READABLE as error:
        raise ValueError(f"{path} is not a readable {path.suffix} file ({short(error)}); save it again.") from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # of Arrow about what is in the file; of a place before its start
            raise ValueError(f"{path} is not a readable {path.suffix} file ({short(error)}).") from error
        raise


def _check_size(path: Path, n: int, width: int) -> None:
    if not (n <= MAX_NAMES and width <= MAX_FEATURES and n * width <= MAX_VALUES):
        raise ValueError(
            f"{path} has {n:,} names with {width:,} features; at most {MAX_NAMES:,} names, {MAX_FEATURES:,} features "
            f"and {MAX_VALUES:,} values are read."
        )


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


def _only(path: Path, names: Sequence[str], column: str) -> int:
    """The place of a column that must be there once."""
    if names.count(column) != 1:
        raise ValueError(
            f"{path} must have one column {column!r}, not {names.count(column)}; found {few(list(names))}."
        )
    return names.index(column)


def _texts(path: Path, column: pa.Array | pa.ChunkedArray) -> list[str]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: names and SMILES must be text, not {short(TypeError(kind))}; save them as text.")
    words = column.dictionary if pa.types.is_dictionary(column.type) else column
    if column.null_count or words.null_count:
        raise ValueError(f"{path}: a name or SMILES is missing; give one in every row.")
    longest = pc.max(pc.binary_length(words)).as_py() or 0  # bytes, of letters of one to four
    if longest > MAX_LETTERS:
        raise ValueError(f"{path}: a name or SMILES has {longest:,} bytes; at most {MAX_LETTERS:,} are read.")
    return column.to_pylist()


# .csv


def _csv_header(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        line = file.readline(CSV_BLOCK)
    if len(line) == CSV_BLOCK:
        raise ValueError(f"{path}: the first line has over {CSV_BLOCK:,} letters; it must name the columns.")
    header = next(csv.reader([line]), [])
    if len(header) < 2:
        raise ValueError(
            f"{path}: the first line is {line.strip()[:80]!r}; it must name columns separated by commas: name, and "
            "one or more others."
        )
    return header


def _csv_batches(path: Path, n_columns: int, types: dict[int, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """The rows below the header in parts, with the columns of `types` in its order."""
    every = [str(i) for i in range(n_columns)]
    columns = [every[i] for i in types]
    reader = pyarrow.csv.open_csv(
        path,
        pyarrow.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK, skip_rows=1, column_names=every),
        pyarrow.csv.ParseOptions(),
        pyarrow.csv.ConvertOptions(
            column_types=dict(zip(columns, types.values(), strict=True)),
            include_columns=columns,
            null_values=[],  # a gene may be called NA
            strings_can_be_null=False,
        ),
    )
    with reader:
        yield from reader


def _csv_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    header = _csv_header(path)
    at = _only(path, header, "name") if "name" in header else 0
    features = [i for i in range(len(header)) if i != at]
    titles = [header[i].strip() for i in features]
    if "" in titles:
        raise ValueError(f"{path}: a column beside {header[at]!r} has no title; leave row numbers out (index=False).")
    width = len(features)
    counted = titles == [str(i) for i in range(width)] or titles == [str(i + 1) for i in range(width)]
    if not counted and all(map(_is_number, titles)):
        raise ValueError(f"{path}: the first line holds values ({few(titles)}); it must name the columns.")
    _check_size(path, 1, width)
    names: list[str] = []
    parts: list[np.ndarray] = []
    types = {at: pa.string(), **dict.fromkeys(features, pa.float64())}
    for batch in _csv_batches(path, len(header), types):
        names += _texts(path, batch.column(0))
        _check_size(path, len(names), width)
        part = np.empty((len(batch), width), dtype=np.float32)
        for i in range(width):
            part[:, i] = _float32(batch.column(i + 1).to_numpy(zero_copy_only=False))
        parts.append(part)
    return names, np.concatenate([np.empty((0, width), dtype=np.float32), *parts])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# .parquet


def _parquet_schema(path: Path) -> tuple[pa.Schema, int]:
    """The columns and the number of rows that a file states."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        length = int.from_bytes(file.read(4), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{path} has a footer of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read.")
    with _parquet_file(path, None) as file:
        about = file.metadata
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        n, stated = sum(group.num_rows for group in groups), sum(abs(group.total_byte_size) for group in groups)
        if n != about.num_rows or any(group.num_rows < 0 for group in groups):
            raise ValueError(f"{path} states {about.num_rows:,} rows, its parts others; save it again.")
        if stated > MAX_BYTES:
            raise ValueError(f"{path} unpacks to {stated:,} bytes; at most {MAX_BYTES:,} are read.")
        _check_size(path, n, 1)
        return file.schema_arrow, n


def _parquet_file(path: Path, texts: list[str] | None) -> pq.ParquetFile:
    # Texts come as a dictionary, so that one that is repeated takes its memory once.
    limits = {"thrift_string_size_limit": MAX_HEADER_BYTES, "thrift_container_size_limit": MAX_FEATURES + 2}
    return pq.ParquetFile(path, read_dictionary=texts, pre_buffer=False, **limits)


def _parquet_batches(path: Path, n_rows: int, texts: list[str], all_columns: bool = False) -> Iterator[pa.RecordBatch]:
    with _parquet_file(path, texts) as file:
        yield from file.iter_batches(n_rows, columns=None if all_columns else texts, use_threads=False)


def _parquet_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    schema, n = _parquet_schema(path)
    index = _pandas_index(schema)
    if "name" in schema.names:
        at = _only(path, schema.names, "name")
    elif len(index) > 1:
        raise ValueError(f"{path} has an index of {len(index)} columns; give the names in one column, 'name'.")
    else:
        at = _only(path, schema.names, index[0]) if index else 0
    features = [i for i, field in enumerate(schema.names) if i != at and field not in index]
    width = len(features)
    if not width:
        raise ValueError(f"{path} has no columns of numbers beside the names; found {few(schema.names)}.")
    _check_size(path, n, width)
    for field in map(schema.field, features):
        if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
            raise ValueError(
                f"{path}: column {few([field.name])} holds {short(TypeError(field.type))}; all but the names must be "
                "columns of numbers, one a feature."
            )
    names: list[str] = []
    values = np.empty((n, width), dtype=np.float32)
    rows = max(1, min(1 << 16, BATCH_VALUES // width))
    for batch in _parquet_batches(path, rows, [schema.names[at]], all_columns=True):
        start = len(names)
        names += _texts(path, batch.column(at))
        if len(names) > n:
            break
        for i, column in enumerate(features):
            values[start : len(names), i] = _float32(batch.column(column).to_numpy(zero_copy_only=False))
    if len(names) != n:
        raise ValueError(f"{path} states {n:,} rows and holds others; save it again.")
    return names, values


def _pandas_index(schema: pa.Schema) -> list[str]:
    """Columns that pandas wrote as the index of its frame: no features."""
    try:
        about = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
    except (ValueError, RecursionError):
        return []
    index = about.get("index_columns", []) if isinstance(about, dict) else []
    return [column for column in index if isinstance(column, str)] if isinstance(index, list) else []


# .npz


def _npz_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    with open(path, "rb") as file:
        _check_zip_directory(path, file)
        with zipfile.ZipFile(file) as archive:
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(infos) != len(archive.infolist()):
                raise ValueError(f"{path} holds an array twice; save it again.")
            if (stated := sum(info.file_size for info in infos.values())) > MAX_BYTES:
                raise ValueError(f"{path} unpacks to {stated:,} bytes; at most {MAX_BYTES:,} are read.")
            if not {"names", "values"} <= infos.keys():
                _check_size(path, len(infos), 1)
                vectors = ((name, _npy(path, archive, info, "fiu", 1)) for name, info in infos.items())
                return _stacked(path, len(infos), vectors)
            if len(infos) > 2:
                raise ValueError(f"{path} holds names, values and {len(infos) - 2} other arrays; keep the two.")
            names = _npy(path, archive, infos["names"], "U", 1)
            values = _npy(path, archive, infos["values"], "fiu", 2)
            if names.view(f"{names.dtype.byteorder}u4").max() > sys.maxunicode:  # texts of them would be broken objects
                raise ValueError(f"{path}: names hold numbers that are no letters; save them again.")
            return _named(path, names.tolist(), values)


def _named(path: Path, names: list[str], values: np.ndarray) -> tuple[list[str], np.ndarray]:
    if len(names) != len(values):
        raise ValueError(f"{path} has {len(names):,} names for {len(values):,} rows of values; give one a row.")
    return names, _float32(values)


def _stacked(path: Path, n: int, vectors: Iterator[tuple[str, np.ndarray]]) -> tuple[list[str], np.ndarray]:
    """One row a name, from vectors that must be of one length."""
    names: list[str] = []
    values = np.empty((0, 0), dtype=np.float32)
    for name, vector in vectors:
        if not names:
            _check_size(path, n, len(vector))
            values = np.empty((n, len(vector)), dtype=np.float32)
        if len(vector) != values.shape[1]:
            raise ValueError(
                f"{path}: {few([name])} has {len(vector):,} features, {few(names[:1])} {values.shape[1]:,}; give all "
                "names as many."
            )
        values[len(names)] = _float32(vector)
        names.append(name)
    return names, values


def _check_zip_directory(path: Path, file: BinaryIO) -> None:
    """Refuse a directory that zipfile would take much memory for."""
    n_bytes = _END64.size + _LOCATOR64 + _END.size
    file.seek(max(0, path.stat().st_size - n_bytes))
    tail = file.read(n_bytes).rjust(n_bytes, b"\0")
    end = _END.unpack(tail[-_END.size :])
    if end[0] != b"PK\5\6" or end[7]:
        raise ValueError(f"{path} is not a whole .npz file; save it again with numpy.savez.")
    sizes = [end[5]]
    if tail[_END64.size :].startswith(b"PK\6\7"):
        sizes = [_END64.unpack(tail[: _END64.size])[8]] if tail.startswith(b"PK\6\6") else []
    if not sizes or sizes[0] > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: the zip directory must have at most {MAX_HEADER_BYTES:,} bytes.")


def _npy(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str, n_axes: int) -> np.ndarray:
    """An array of an .npz file, of one of the kinds of dtype; its shape must be that of its bytes."""
    where = f"{path}: array {few([info.filename.removesuffix('.npy')])}"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise ValueError(f"{where} is packed or encrypted in another way than numpy's; save it with numpy.savez.")
    with archive.open(info) as file:
        try:
            if npy.read_magic(file) != (1, 0):  # others are for structured arrays
                raise ValueError("of another version")
            shape, fortran, dtype = npy.read_array_header_1_0(file)
        except (ValueError, SyntaxError, TypeError, tokenize.TokenError, RecursionError) as error:
            raise ValueError(f"{where} is no readable array ({short(error)}); save it with numpy.savez.") from error
        if dtype.kind not in kinds or dtype.hasobject:
            raise ValueError(
                f"{where} is of type {short(TypeError(dtype))}; it must be "
                + ("text: save numpy.asarray(names, dtype=str)." if kinds == "U" else "numbers.")
            )
        if len(shape) != n_axes or min(shape, default=0) < 1:
            raise ValueError(f"{where} of shape {few([str(shape)])} must have {n_axes} axes, and something in it.")
        _check_size(path, shape[0] if n_axes == 2 or kinds == "U" else 1, shape[-1] if kinds != "U" else 1)
        if kinds == "U" and not 0 < dtype.itemsize <= 4 * MAX_LETTERS:
            raise ValueError(f"{where} has room for {dtype.itemsize // 4:,} letters; 1 to {MAX_LETTERS:,} are read.")
        n_bytes = math.prod(shape) * dtype.itemsize
        if info.file_size != file.tell() + n_bytes:
            raise ValueError(f"{where} of shape {shape} does not have {info.file_size:,} bytes; save it again.")
        data = file.read(n_bytes)
        if len(data) != n_bytes:
            raise ValueError(f"{where} is cut off; save it again.")
    return np.ndarray(shape, dtype, data, order="F" if fortran else "C")


# .safetensors


def _safetensors_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    with open(path, "rb") as start:
        if (length := int.from_bytes(start.read(8), "little")) > MAX_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read.")
        header = start.read(length)
    with safe_open(path, framework="pt") as file:  # numpy has no bfloat16
        json.loads(header, object_pairs_hook=_names_once)  # of two tensors of one name it reads the last
        parts = {name: file.get_slice(name) for name in sorted(file.keys())}
        shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
        whole = list(shapes) == ["values"] and len(shapes["values"]) == 2
        for name, part in parts.items():
            if (len(shapes[name]) != 1 and not whole) or min(shapes[name], default=0) < 1:
                raise ValueError(
                    f"{path}: tensor {few([name])} of shape {few([str(shapes[name])])} must have one axis and "
                    "entries; or give one tensor alone, values of two axes, with the names in the metadata."
                )
            if part.get_dtype() not in NUMBERS:
                raise ValueError(f"{path}: tensor {few([name])} is of type {few([part.get_dtype()])}, not of numbers.")
        if whole:
            _check_size(path, *shapes["values"])
            names = _metadata_names(path, file.metadata())
            return _named(path, names, file.get_tensor("values").float().numpy())
        vectors = ((name, file.get_tensor(name).float().numpy()) for name in shapes)
        return _stacked(path, len(shapes), vectors)


def _names_once(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise SafetensorError(f"a name stands twice among {few([name for name, _ in pairs])}")


def _metadata_names(path: Path, metadata: dict[str, str] | None) -> list[str]:
    text = (metadata or {}).get("names", "null")
    try:
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise ValueError(f"more than {MAX_BRACKETS:,} brackets")
        names = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: names in the metadata are no JSON ({short(error)}); save it again.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: the metadata must have names, a JSON list of one text for each row of values.")
    return names
