"""Open the .h5ad of a stranger: it lies in its own file and does not grow when it is read.

HDF5 lets a file name parts of any other file of its reader (links, external storage, virtual data sets), store one text
that a million cells point at, and claim arrays that nobody wrote. Files that AnnData writes do none of this.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem

from perturbdiff.files import few, memory_bytes, short

PARTS = ("X", "obs", "var")
MAX_OBJECTS = 100_000  # groups and arrays in what is read
MAX_TEXT = 10_000  # bytes of one name, label or other text
MAX_RATIO = 2_000  # of what is read to the size of the file; gzip reaches 1,030
MAX_REMEMBERED = 256  # files that need not be looked at again
ALWAYS_READ = 64 << 20  # bytes that are read whatever the size of the file


@contextmanager
def open_h5ad(path: str | Path, parts: tuple[str, ...] = PARTS) -> Iterator[h5py.File]:
    """The file, looked at before anything is read of these parts; all that opens an .h5ad does it here.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        It is not HDF5 or damaged, or what a part holds lies elsewhere or grows beyond all measure when it is read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file; give the path of an .h5ad.")
    with ExitStack() as opened:
        try:
            file = opened.enter_context(_open(path))
            _looked_at(file, str(path), parts)
        except _Refused:
            raise
        except Exception as error:  # on a damaged file h5py raises what comes, types of its own among it
            raise _damaged(path, error) from error
        try:
            yield file
        except RuntimeError as error:  # h5py's, of parts of a damaged file that nobody has looked at yet
            raise _damaged(path, error) from error


def _open(path: str | Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "unable to lock file" not in str(error):
            raise
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _Refused(f"{path} is open in another program that may write to it; close it there.") from error
        return h5py.File(path, "r", locking=False)  # some network file systems have no locks


def unpacked_bytes(path: str | Path, parts: tuple[str, ...] = PARTS) -> int:
    """Memory that these parts take once they are read, at least. Raises as `open_h5ad`."""
    with open_h5ad(path, parts) as file:
        return _looked_at(file, str(path), parts)


def parts_of(layer: str | None, file: h5py.File | AnnData) -> tuple[str, str, str]:
    """Names of values, obs and var: of X, of a layer, or of .raw, which "raw" is where no layer has that name.

    Raises KeyError where there is none, with those that are there.
    """
    if layer is None:
        return PARTS
    layers, raw = _values_beside_x(file)
    if layer in layers:
        return f"layers/{layer}", "obs", "var"
    if layer == "raw" and raw:
        return "raw/X", "obs", "raw/var"
    raise KeyError(f"there is no layer {layer!r}; {_beside(layers, raw) or 'there are none, and no .raw'}.")


def values_of(adata: AnnData, layer: str | None) -> tuple[Any, pd.DataFrame]:
    """X and var of an AnnData; of a layer or .raw as `parts_of`, which says what is raised."""
    name = parts_of(layer, adata)[0]
    if name == "X":
        return adata.X, adata.var
    return (adata.raw.X, adata.raw.var) if name == "raw/X" else (adata.layers[layer], adata.var)


def read_h5ad_parts(path: str | Path, layer: str | None = None) -> tuple[Any, pd.DataFrame, pd.DataFrame]:
    """X, obs and var of an .h5ad, and nothing else of it; with a layer, its values as X, and "raw" is .raw.

    Raises
    ------
    FileNotFoundError, KeyError, ValueError
        As `open_h5ad`, `parts_of`; without X, obs or var, or without genes; more than this machine's memory.
    """
    parts = PARTS
    if layer is not None:
        with open_h5ad(path, ()) as file:
            parts = parts_of(layer, file)
    with open_h5ad(path, parts) as file:
        missing = [name for name in parts if name not in file]
        needed, memory = _looked_at(file, str(path), parts), memory_bytes()
        if needed > memory:
            raise ValueError(
                f"{path} takes {needed / 1e9:,.0f} GB of memory and this machine has {memory / 1e9:,.0f}; build an "
                "atlas of it, which is read in parts (perturbdiff atlas build), or take fewer cells."
            )
        try:
            X, obs, var = (None if missing else read_elem(file[name]) for name in parts)
        except Exception as error:  # as above, and AnnData's own
            raise _damaged(path, error) from error
        if missing:
            raise ValueError(f"{path} is not an .h5ad: it has no {', '.join(missing)}. Write it with AnnData.")
        if not (isinstance(obs, pd.DataFrame) and isinstance(var, pd.DataFrame)):
            raise ValueError(f"{path} is not an .h5ad: obs and var must be tables. Write it with AnnData.")
        if not len(var):
            beside = _beside(*_values_beside_x(file)) or "give a file with genes as columns of X"
            raise ValueError(f"{parts[0]} of {path} has no genes; {beside}.")
    return X, obs, var


def _damaged(path: str | Path, error: Exception) -> ValueError:
    under = error.__context__
    while under is not None:  # a signal that comes while h5py calls us back ends as an error of h5py's
        if not isinstance(under, Exception):
            raise under
        under = under.__context__
    return ValueError(f"{path} is not a readable .h5ad ({short(error)}); write it with AnnData.")


def _values_beside_x(file: h5py.File | AnnData) -> tuple[list[str], bool]:
    if isinstance(file, AnnData):
        return sorted(map(str, file.layers)), file.raw is not None
    layers = file.get("layers", getlink=True)
    names = file["layers"] if isinstance(layers, h5py.HardLink) else []
    layers = sorted(name for name in names if isinstance(name, str))  # bytes that are no text nobody can give
    raw = file.get("raw", getlink=True)
    return layers, isinstance(raw, h5py.HardLink) and isinstance(file["raw"], h5py.Group) and "X" in file["raw"]


def _beside(layers: list[str], raw: bool) -> str:
    return f"name other values that it holds: {few([*layers, *['raw'] * raw])}" if layers or raw else ""


class _Refused(ValueError):
    """Of what was found in a file that HDF5 can read."""


def _looked_at(file: h5py.File, path: str, parts: tuple[str, ...]) -> int:
    # Once: a source of an atlas is opened for each of its chunks.
    stat = os.stat(path)
    key = (path, stat.st_size, stat.st_mtime_ns, parts)
    if key not in _SIZES:
        if len(_SIZES) == MAX_REMEMBERED:
            _SIZES.clear()
        _SIZES[key] = _look(file, path, stat.st_size, parts)
    return _SIZES[key]


_SIZES: dict[tuple[str, int, int, tuple[str, ...]], int] = {}


def _look(file: h5py.File, path: str, size: int, parts: tuple[str, ...]) -> int:
    total = texts = 0
    if size <= ALWAYS_READ:
        _refuse_endless_heaps(file, path)
    for part in parts:
        for name, dataset in _datasets(file, part, path):
            created = dataset.id.get_create_plist()
            if created.get_layout() == h5py.h5d.VIRTUAL or created.get_external_count():
                raise _elsewhere(name, path)
            kind = dataset.dtype
            total += (dataset.size or 0) * kind.itemsize
            if h5py.check_string_dtype(kind) is not None:
                lengths = _text_lengths(dataset, path, size)
                texts += int(lengths.sum())
                if lengths.max(initial=0) > MAX_TEXT:
                    raise _Refused(
                        f"{name} of {path} holds a text of {lengths.max():,} bytes; at most {MAX_TEXT:,} are read. "
                        "Leave it out, or shorten it."
                    )
            elif kind.names:
                raise _Refused(
                    f"{name} of {path} is a table as AnnData wrote it before 0.7; open it with anndata.read_h5ad "
                    "and write it again."
                )
            elif kind.hasobject:
                raise _Refused(f"{name} of {path} is of a type that AnnData does not write; write it with AnnData.")
            # Texts of any length are never compressed.
            if total > max(ALWAYS_READ, MAX_RATIO * size) or texts > max(ALWAYS_READ, size):
                raise _Refused(
                    f"{name} of {path} grows beyond all measure: the file has {size:,} bytes, and "
                    f"{max(total, texts):,} are to be read; write it with AnnData."
                )
    return total + texts


def _refuse_endless_heaps(file: h5py.File, path: str) -> None:
    # A heap of texts is objects, one after the other; at one that takes no room the library stays for ever.
    width = file.id.get_create_plist().get_sizes()[1]
    content = Path(path).read_bytes()
    for found in re.finditer(rb"GCOL\x01", content):
        at = found.start() + 8 + width
        end = found.start() + int.from_bytes(content[at - width : at], "little")
        while at + 8 + width <= min(end, len(content)):
            length = int.from_bytes(content[at + 8 : at + 8 + width], "little")
            is_free = content[at : at + 2] == b"\0\0"
            step = length if is_free else (8 + width + 7) // 8 * 8 + (length + 7) // 8 * 8
            if not step % (1 << 8 * width):
                raise _Refused(f"{path} has a heap of texts that never ends; write it with AnnData.")
            at += step


def _datasets(file: h5py.File, part: str, path: str) -> Iterator[tuple[str, h5py.Dataset]]:
    # Links are named, and followed where they are names in this file: to each once.
    names: list[bytes] = []

    def keep(name: bytes, info: h5py.h5l.LinkInfo) -> _Refused | None:  # what the walk below ends with
        if info.type != h5py.h5l.TYPE_HARD:
            return _elsewhere(_text(name), path)
        names.append(name)
        if len(names) > MAX_OBJECTS:
            return _Refused(f"{part} of {path} holds more than {MAX_OBJECTS:,} parts; write it with AnnData.")
        return None

    refused = None
    for name in accumulate(part.encode().split(b"/"), lambda above, name: above + b"/" + name):
        if not file.id.links.exists(name):
            return
        if refused := keep(name, file.id.links.get_info(name)):
            raise refused
    if isinstance(group := h5py.h5o.open(file.id, part.encode()), h5py.h5g.GroupID):
        refused = group.links.visit(lambda name, info: keep(part.encode() + b"/" + name, info), info=True)
    if refused is not None:
        raise refused
    for name in names:
        if isinstance(item := h5py.h5o.open(file.id, name), h5py.h5d.DatasetID):
            yield _text(name), h5py.Dataset(item)


def _text(name: bytes) -> str:
    return few([name.decode(errors="replace")])


def _elsewhere(name: str, path: str) -> _Refused:
    return _Refused(f"{name} of {path} points to somewhere else; write the file with AnnData, which copies.")


def _text_lengths(dataset: h5py.Dataset, path: str, file_size: int) -> np.ndarray:
    """Bytes of each text, known without reading many: as many cells as there are may point at one long text."""
    n = dataset.size or 0
    if not dataset.dtype.hasobject:
        return np.array([dataset.dtype.itemsize])
    if n * file_size <= ALWAYS_READ:
        return np.array([len(text) for text in np.ravel(dataset[()])], dtype=np.int64)
    if n <= 256:  # also those that lie in a header
        return np.array([len(dataset[where]) for where in np.ndindex(dataset.shape)], dtype=np.int64)
    # A text is stored as its length, 4 bytes, the address of its heap and 4 bytes more.
    record = np.dtype(f"V{8 + dataset.file.id.get_create_plist().get_sizes()[0]}")
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        if offset is None:
            return np.zeros(1, dtype=np.int64)  # never written
        stored = np.fromfile(path, dtype=record, count=dataset.size, offset=offset)
    else:
        stored = _records(dataset, record)
    return np.frombuffer(stored.tobytes(), dtype="<u4").reshape(dataset.size, -1)[:, 0].astype(np.int64)


def _records(dataset: h5py.Dataset, record: np.dtype) -> np.ndarray:
    # The same chunks and filters in a file in memory; the library unpacks them.
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_chunk(dataset.chunks)
    filters = dataset.id.get_create_plist()
    for i in range(filters.get_nfilters()):
        code, flags, values, _ = filters.get_filter(i)
        created.set_filter(code, flags, values)
    with h5py.File("records", "w", driver="core", backing_store=False) as memory:
        space = h5py.h5s.create_simple(dataset.shape)
        copy = h5py.h5d.create(memory.id, b"records", h5py.h5t.py_create(record), space, created)
        for i in range(dataset.id.get_num_chunks()):
            chunk = dataset.id.get_chunk_info(i)
            mask, data = dataset.id.read_direct_chunk(chunk.chunk_offset)
            copy.write_direct_chunk(chunk.chunk_offset, data, mask)
        return np.asarray(h5py.Dataset(copy)[...])


def check_columns(path: str | Path, settings: Sequence[str]) -> None:
    """Raises KeyError where the file lacks an obs column that one of the words, as "data.cell_type_col=NAME", names."""
    with open_h5ad(path, ("obs",)) as file:
        there = {str(name) for name in file["obs"]} if isinstance(file.get("obs"), h5py.Group) else set()
    for word in settings:
        key, _, name = word.partition("=")
        if key.endswith("_col") and there and name not in there:
            found = sorted(there - {"_index", "__categories"})
            raise KeyError(f"{word}: obs of {path} has no column {name!r}; found {found}.")
