"""A Lightning checkpoint (.ckpt): a zip archive made by torch.save, of a pickle and the bytes of its tensors.

Sizes, offsets and names come from a stranger: each is checked before memory is taken for it, and every refusal is a
ValueError. The pickle is never executed (`inert.py`); tensors are read when they are asked for.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perturbdiff.reference.inert import TensorRef, read_pickle_program

MAX_DIRECTORY_BYTES = 1 << 24  # of the zip archive's list of entries
MAX_PICKLE_BYTES = 1 << 28

_END = struct.Struct("<4s4H2LH")  # zip: end of central directory, without comment
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = 20
_LOCAL = struct.Struct("<4s5H3L2H")


class LightningFile:
    """An open checkpoint; use it in a `with` statement.

    Attributes
    ----------
    content
        What was saved, as inert values: usually a dict with "state_dict" and "hyper_parameters".

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not such a file; a truncated or inconsistent one; one that would take more memory than its size explains.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = Path(path).name
        self._file = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._entries, self._limits = self._directory()
            pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{self.name} has {len(pickles)} entries data.pkl; a file of torch.save has one.")
            self._root = pickles[0].removesuffix("data.pkl")
            if foreign := [name for name in self._entries if not name.startswith(self._root)]:
                raise ValueError(f"{self.name} has the entry {foreign[0][:100]!r} outside {self._root!r}.")
            order = self._entries.get(f"{self._root}byteorder")
            if order is not None and (order.file_size > 6 or self._read(order) != b"little"):
                raise ValueError(f"{self.name} is not little-endian; save it again on an ordinary machine.")
            program = self._entries[pickles[0]]
            if program.file_size > MAX_PICKLE_BYTES:
                raise ValueError(
                    f"{self.name}: data.pkl has {program.file_size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read."
                )
            try:
                self.content: Any = read_pickle_program(bytes(self._read(program)), self._storage_bytes)
            except ValueError as error:
                raise ValueError(f"{self.name} cannot be read: {error}") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> LightningFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tensors(self, refs: Mapping[str, TensorRef]) -> dict[str, Tensor]:
        """Read tensors into memory, contiguous, in their own type.

        Raises
        ------
        ValueError
            Together they are larger than the file (views of the same bytes); the bytes have another checksum.
        """
        n_bytes = sum(math.prod(ref.size) * ref.storage.dtype.itemsize for ref in refs.values())
        if n_bytes > self._size:
            raise ValueError(
                f"{self.name} has {self._size:,} bytes and describes tensors of {n_bytes:,}; each must have its own."
            )
        return {name: self._tensor(ref) for name, ref in refs.items()}

    def _tensor(self, ref: TensorRef) -> Tensor:
        if not ref.storage.numel:
            return torch.empty(ref.size, dtype=ref.storage.dtype)
        data = self._read(self._entries[f"{self._root}data/{ref.storage.key}"])
        whole = torch.frombuffer(data, dtype=ref.storage.dtype)
        return whole.as_strided(ref.size, ref.stride, ref.offset).clone(memory_format=torch.contiguous_format)

    def _storage_bytes(self, key: str) -> int | None:
        entry = self._entries.get(f"{self._root}data/{key}")
        return None if entry is None else entry.file_size

    def _directory(self) -> tuple[dict[str, zipfile.ZipInfo], dict[str, int]]:
        # Entries by name, and where each must end at the latest: at the next one's header.
        self._check_end()
        try:
            with zipfile.ZipFile(self._file) as archive:
                infos, end = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError) as error:
            raise ValueError(f"{self.name} is not a whole zip archive ({error}).") from error
        infos.sort(key=lambda info: info.header_offset)
        entries: dict[str, zipfile.ZipInfo] = {}
        limits: dict[str, int] = {}
        for info, after in zip(infos, [*(info.header_offset for info in infos[1:]), end], strict=True):
            name = info.orig_filename
            shown = f"{self.name}: entry {name[:100]!r}"
            if name in entries:
                raise ValueError(f"{shown} is there twice.")
            if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
                raise ValueError(f"{shown} is not a name inside the archive.")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"{shown} is compressed or encrypted; torch.save stores entries as they are.")
            if info.file_size != info.compress_size or not 0 <= info.header_offset <= after - 30 - info.file_size:
                raise ValueError(f"{shown} states {info.file_size:,} bytes, and does not have so many of its own.")
            entries[name], limits[name] = info, after
        return entries, limits

    def _check_end(self) -> None:
        # The size of the directory, before zipfile takes memory for it.
        tail_bytes = _END64.size + _LOCATOR64 + _END.size
        self._file.seek(max(0, self._size - tail_bytes))
        tail = self._file.read(tail_bytes).rjust(tail_bytes, b"\0")
        end = _END.unpack(tail[-_END.size :])
        if end[0] != b"PK\5\6" or end[7]:
            self._file.seek(0)
            zipped = self._file.read(4) == b"PK\3\4"
            raise ValueError(
                f"{self.name} is a truncated zip archive; get it again."
                if zipped
                else f"{self.name} is not a zip archive of torch.save; older formats of torch hold bare pickles, which "
                "are not opened: load it with the program that wrote it and save it again."
            )
        sizes = [end[5]]
        if tail[_END64.size :].startswith(b"PK\6\7"):
            sizes = [_END64.unpack(tail[: _END64.size])[8]] if tail.startswith(b"PK\6\6") else []
        if not sizes or sizes[0] > MAX_DIRECTORY_BYTES:
            raise ValueError(f"{self.name}: the zip directory must have at most {MAX_DIRECTORY_BYTES:,} bytes.")

    def _read(self, info: zipfile.ZipInfo) -> bytearray:
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL.size)
        if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
            raise ValueError(f"{self.name}: entry {info.orig_filename[:100]!r} is not where the directory says.")
        start = info.header_offset + _LOCAL.size + sum(_LOCAL.unpack(header)[-2:])
        if start + info.file_size > self._limits[info.orig_filename]:
            raise ValueError(f"{self.name}: entry {info.orig_filename[:100]!r} overlaps the next one.")
        self._file.seek(start)
        data = bytearray(info.file_size)
        if self._file.readinto(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise ValueError(f"{self.name}: entry {info.orig_filename[:100]!r} is damaged; get the file again.")
        return data
