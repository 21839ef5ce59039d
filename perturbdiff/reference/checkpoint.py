"""A Lightning checkpoint (.ckpt): a zip archive made by torch.save, of a pickle and the bytes of its tensors.

A pickle is a program, and this one is a stranger's. It is not run: its opcodes move inert values about. Lists, tuples,
dicts, texts and numbers are what they are, a tensor is a note of where its bytes lie, and all else is an `Inert`: a
name with what it was given. Whatever is wrong is a ValueError, before it takes time or memory.

Why not torch.load(weights_only=True): what it allows can be added to, not taken from (torch 2.13). Two hundred bytes
keep it hashing or printing one tuple of 2 ** 40 parts, or encoding one text to any size; 36 ask for a bytearray as
large as they say; and tuples nested deep enough end the interpreter.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_READ = 1 << 24  # bytes at once, and so of the zip archive's list of entries
MAX_PICKLE_BYTES = 1 << 28
MAX_OPCODES = 3_000_000  # each makes at most some 200 bytes
MAX_DEPTH = 64  # of nested settings
MAX_VALUES = 1_000_000  # of settings, 16 letters counted as one: shared parts multiply

_STORAGES = {
    "torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_SCALARS = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
# Where OmegaConf's classes keep their value, by module.
_FIELDS = {"omegaconf.dictconfig": "_content", "omegaconf.listconfig": "_content", "omegaconf.nodes": "_val"}


@dataclass(eq=False, repr=False, slots=True)
class Inert:
    """A class, function or object that the file names: never looked up, never called."""

    name: str  # "module.name"
    args: Any = None  # None: only named
    state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name[:100]}>"


@dataclass(frozen=True)
class Storage:
    """The bytes of tensors: an entry of the archive."""

    entry: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor that is still in the file; offset and stride in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[LightningFile]:
    """A checkpoint, open while its tensors are read.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not such a file; a truncated or inconsistent one; one that would take more memory than its size explains.
    """
    with _BoundedFile(path) as file:
        yield LightningFile(file, Path(path).name)


class _BoundedFile(io.FileIO):
    """Refuses to read much at once: zipfile takes the size of its list of entries from the file itself."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_READ:
            raise ValueError(f"its list of entries has {size:,} bytes, and at most {MAX_READ:,} are read")
        return super().read(size) or b""


class LightningFile:
    """What was saved.

    Attributes
    ----------
    content
        Inert values: usually a dict with "state_dict" and "hyper_parameters".
    """

    def __init__(self, file: _BoundedFile, name: str) -> None:
        self.name = name
        self._n_bytes = file.seek(0, os.SEEK_END)
        try:
            self._archive = zipfile.ZipFile(file)
            self._check_entries()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
            raise ValueError(
                f"{name} is not a zip archive of torch.save ({error}); get it again, or save it again with the program "
                "that wrote it: files of older formats are bare pickles, which are not opened."
            ) from error
        entries = self._archive.namelist()
        pickles = [entry for entry in entries if entry.count("/") == 1 and entry.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{name} has {len(pickles)} entries data.pkl; a file of torch.save has one.")
        self._root = pickles[0].removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in entries and self._read(order) != b"little":
            raise ValueError(f"{name} is not little-endian; save it again on an ordinary machine.")
        if (n_bytes := self._archive.getinfo(pickles[0]).file_size) > MAX_PICKLE_BYTES:
            raise ValueError(f"{name}: its pickle has {n_bytes:,} bytes; at most {MAX_PICKLE_BYTES:,} are read.")
        program = bytes(self._read(pickles[0]))
        try:
            self.content: Any = _follow(program, self._storage)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name}: its pickle is none of torch.save ({str(error)[:200]}); get it again, or save it again."
            ) from error

    def tensors(self, refs: Mapping[str, TensorRef]) -> dict[str, Tensor]:
        """Read tensors into memory, contiguous, in their own type.

        Raises
        ------
        ValueError
            Together they are larger than the file (views of the same bytes); the bytes have another checksum.
        """
        n_bytes = sum(math.prod(ref.size) * ref.storage.dtype.itemsize for ref in refs.values())
        if n_bytes > self._n_bytes:
            raise ValueError(
                f"{self.name} has {self._n_bytes:,} bytes and describes tensors of {n_bytes:,}; each must have its own."
            )
        by_entry: dict[str, list[str]] = defaultdict(list)
        for name, ref in refs.items():
            by_entry[ref.storage.entry].append(name)
        found: dict[str, Tensor] = {}
        for entry, names in by_entry.items():
            data = self._read(entry)
            for name in names:
                ref, dtype = refs[name], refs[name].storage.dtype
                whole = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                view = whole.as_strided(ref.size, ref.stride, ref.offset)
                found[name] = view.clone(memory_format=torch.contiguous_format)
        return found

    def _check_entries(self) -> None:
        # Entries that lie in each other would be more bytes than the file has.
        entries = self._archive.infolist()
        for info in entries:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x61:  # encrypted, patched
                raise ValueError(f"its entry {info.filename[:100]!r} is compressed or encrypted")
            if info.file_size != info.compress_size or not 0 <= info.header_offset <= self._n_bytes:
                raise ValueError(f"its entry {info.filename[:100]!r} is not where it says")
        if (n_bytes := sum(info.file_size for info in entries)) > self._n_bytes:
            raise ValueError(f"its entries have {n_bytes:,} bytes, and the file {self._n_bytes:,}")

    def _read(self, entry: str) -> bytearray:
        data = bytearray()
        try:
            with self._archive.open(entry) as stream:
                while chunk := stream.read(MAX_READ):
                    data += chunk
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise ValueError(f"{self.name} is damaged ({error}); get it again.") from error
        return data

    def _storage(self, ident: Any) -> Any:
        _, kind, key, _, numel = ident
        if kind.name not in _STORAGES:
            return kind
        if type(key) is not str or type(numel) is not int:
            raise ValueError("a storage has a key or a size that is none")
        storage = Storage(f"{self._root}data/{key}", _STORAGES[kind.name], numel)
        there, stated = self._archive.getinfo(storage.entry).file_size, numel * storage.dtype.itemsize
        if there != stated:
            raise ValueError(f"storage {key!r} has {there:,} bytes, and {stated:,} are stated")
        return storage


def _follow(program: bytes, storage: Callable[[Any], Any]) -> Any:
    """The value that a pickle of protocol 2, that of torch.save, describes.

    Raises ValueError, LookupError, TypeError, AttributeError: another program.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # stacks under each MARK
    memo: dict[int, Any] = {}
    arg: Any
    for n, (opcode, arg, _) in enumerate(pickletools.genops(program)):
        if n >= MAX_OPCODES:
            raise ValueError(f"it has more than {MAX_OPCODES:,} opcodes")
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                break
            case "MARK":
                below.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_CONSTANTS[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(arg)
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if opcode.name == "EMPTY_LIST" else {})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n_items = int(opcode.name[-1])
                stack[-n_items:] = [tuple(stack[-n_items:])]
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "APPEND":
                _append(stack[-2], [stack.pop()])
            case "APPENDS":
                items, stack = stack, below.pop()
                _append(stack[-1], items)
            case "SETITEM":
                last, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, last])
            case "SETITEMS":
                items, stack = stack, below.pop()
                _set_items(stack[-1], items)
            case "GLOBAL":
                stack.append(Inert(arg.replace(" ", ".", 1)))
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack.append(_made(stack.pop(), args))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Inert):  # an OrderedDict's own attributes say nothing
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case other:
                raise ValueError(f"it uses the opcode {other}")
    (value,) = stack
    return value


def _append(target: Any, items: list[Any]) -> None:
    if not isinstance(target, Inert):  # what an unknown object holds is not needed
        target.extend(items)


def _set_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, Inert):
        return
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing a nested tuple has no bound on its time and depth, and large whole numbers can be made to collide.
        if not (isinstance(key, str | Inert) or (isinstance(key, int | float) and abs(key) < 1 << 60) or key is None):
            raise ValueError(f"a {type(key).__name__} is a key")
        target[key] = value


def _made(function: Any, args: Any) -> Any:
    if not isinstance(function, Inert) or not isinstance(args, tuple):
        raise ValueError("it calls what is no name")
    match function.name, args:
        case ("collections.OrderedDict", ()) | ("collections.defaultdict", _):
            return {}  # its items follow
        case "torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, size, stride, *_):
            return _tensor_ref(storage, offset, tuple(size), tuple(stride))
    return Inert(function.name, args)


def _tensor_ref(storage: Storage, offset: Any, size: tuple[Any, ...], stride: tuple[Any, ...]) -> TensorRef:
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in (offset, *size, *stride)):
        raise ValueError("a tensor has an offset, size or stride that is none")
    numel = math.prod(size)
    end = offset + (1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else 0)
    too_large = len(size) > 64 or math.prod(max(n, 1) for n in size) >= 1 << 62
    if too_large or max(end, numel) > storage.numel:
        raise ValueError(f"a tensor of size {size} and stride {stride} does not fit its {storage.numel:,} elements")
    return TensorRef(storage, offset, size, stride)


def unwrap(value: Any) -> Any:
    """Settings as dicts, lists and scalars: without OmegaConf's nodes and NumPy's scalars, tuples as lists.

    Interpolations stay text; what has no plain form stays inert.

    Raises
    ------
    ValueError
        Nested deeper than 64 (or within itself); more than 1,000,000 values; text that is not Unicode; two equal keys.
    """
    try:
        return _unwrap(value, 0, [0])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the settings of the checkpoint cannot be read ({str(error)[:200]}).") from error


def _unwrap(value: Any, depth: int, count: list[int]) -> Any:
    count[0] += 1
    if depth > MAX_DEPTH:
        raise ValueError(f"they are nested more than {MAX_DEPTH} deep, or within themselves")
    if count[0] > MAX_VALUES:
        raise ValueError(f"they have more than {MAX_VALUES:,} values")
    if isinstance(value, Inert):
        if field := _FIELDS.get(value.name.rpartition(".")[0]):
            return _unwrap(value.state[field], depth + 1, count)
        if value.name in _SCALARS:
            value = _scalar(value, count)
    if isinstance(value, dict):
        items = [(_unwrap(k, depth + 1, count), _unwrap(v, depth + 1, count)) for k, v in value.items()]
        if len(found := dict(items)) != len(items):
            raise ValueError("two of their keys are equal")
        return found
    if isinstance(value, list | tuple):
        return [_unwrap(item, depth + 1, count) for item in value]
    if isinstance(value, str):
        count[0] += len(value) // 16
        value.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return value


def _scalar(value: Inert, count: list[int]) -> Any:
    # numpy's scalar(dtype, bytes): the bytes are a text of one letter each, or bytes(); a text is UTF-32 padded with 0.
    dtype, encoded = value.args
    data = encoded.args[0].encode("latin-1") if encoded.args else b""
    count[0] += len(data) // 16
    code, big_endian = dtype.args[0], dtype.state[1] == ">"
    if code.startswith("U"):
        return data.decode("utf-32-be" if big_endian else "utf-32-le").rstrip("\0")
    if len(code) != 2 or code[0] not in "bfiu":  # float128, dates, objects
        return value
    (number,) = np.frombuffer(data, np.dtype(code).newbyteorder(">" if big_endian else "<"))
    return number.item()
