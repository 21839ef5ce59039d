"""A pickle, read without running or importing what it names.

A pickle is a program; here its opcodes move inert values about. Lists, tuples, dicts, texts, numbers and bytes are what
they are, a tensor is a note of where its bytes lie, and all else is an `Opaque`: a name with what it was given.
The program comes from a stranger: whatever is wrong with it is a ValueError, before it takes time or memory.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MAX_OPCODES = 3_000_000  # each makes at most some 200 bytes
MAX_INTEGER_BITS = 512
MAX_DEPTH = 64  # of nested plain values
MAX_VALUES = 1_000_000  # of one plain value, 16 letters counted as one: shared parts multiply

_STORAGES = {
    "torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip
_DICTS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict"}
_CONTAINERS = {"omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"}
_NODES = {
    f"omegaconf.nodes.{kind}Node"
    for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path", "Enum", "Union")
}
_SCALARS = {"numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


@dataclass(eq=False, repr=False, slots=True)
class Opaque:
    """A class, function or object that the file names: never looked up, never called."""

    name: str  # "module.name"
    args: Any = None  # None: only named
    state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name[:100]}>"


@dataclass(frozen=True)
class Storage:
    """The bytes of tensors: `numel` elements in the entry data/`key`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor that is still in the file; offset and stride in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle_program(program: bytes, storage_bytes: Callable[[str], int | None]) -> Any:
    """The value that a pickle of protocol 2 to 5 describes.

    Parameters
    ----------
    program
        The pickle.
    storage_bytes
        Gives the size of the storage of a key in the file, None where there is none.

    Raises
    ------
    ValueError
        An opcode that files of torch.save do not need; a program that is wrong or too long; a storage or a tensor that
        does not fit the file.
    """
    return _Machine(storage_bytes).run(program)


class _Machine:
    """The stack machine of the pickle protocols 2 to 5, with inert values."""

    def __init__(self, storage_bytes: Callable[[str], int | None]) -> None:
        self.storage_bytes = storage_bytes
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under each MARK
        self.memo: dict[int, Any] = {}
        self.n_bytes = self.encoded = 0  # of the program; of the texts that it turned into bytes

    def run(self, program: bytes) -> Any:
        self.n_bytes = len(program)
        for n, (opcode, arg, _) in enumerate(pickletools.genops(program)):
            if n >= MAX_OPCODES:
                raise ValueError(f"its pickle has more than {MAX_OPCODES:,} opcodes.")
            if opcode.name == "STOP":
                if len(self.stack) != 1 or self.below:
                    raise ValueError("its pickle ends with an unfinished value.")
                return self.stack[0]
            self.step(opcode.name, arg)
        raise ValueError("its pickle does not end.")

    def step(self, name: str, arg: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                if name == "PROTO" and not 2 <= arg <= 5:
                    raise ValueError(f"pickle protocol {arg} is not one of 2 to 5.")
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "BINGET" | "LONG_BINGET":
                if arg not in self.memo:
                    raise ValueError(f"its pickle asks for value {arg}, which was not stored.")
                self.stack.append(self.memo[arg])
            case "EMPTY_LIST" | "EMPTY_DICT":
                self.stack.append([] if name == "EMPTY_LIST" else {})
            case "TUPLE":
                items = self.to_mark()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = self.to_mark() if name == "APPENDS" else [self.pop()]
                self.append(self.top(), items)
            case "SETITEM" | "SETITEMS":
                items = self.to_mark() if name == "SETITEMS" else [self.pop(), self.pop()][::-1]
                self.set_items(self.top(), items)
            case "GLOBAL":
                self.stack.append(Opaque(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                what, module = self.pop(), self.pop()
                if not isinstance(module, str) or not isinstance(what, str):
                    raise ValueError("its pickle names something by what is not text.")
                self.stack.append(Opaque(f"{module}.{what}"))
            case "REDUCE" | "NEWOBJ":
                args, made = self.pop(), self.pop()
                self.stack.append(self.make(made, args))
            case "BUILD":
                state, target = self.pop(), self.top()
                if isinstance(target, Opaque) and target.args is not None:
                    target.state = state
                elif not isinstance(target, dict):  # an OrderedDict's own attributes say nothing
                    raise ValueError(f"its pickle gives a state to {_kind(target)}.")
            case "BINPERSID":
                self.stack.append(self.storage(self.pop()))
            case _ if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            case _ if name in _TUPLES:
                self.stack.append(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
            case _ if name in _LITERALS:
                if isinstance(arg, int) and arg.bit_length() > MAX_INTEGER_BITS:
                    raise ValueError(f"its pickle has a whole number of {arg.bit_length():,} bits.")
                self.stack.append(arg)
            case _:
                raise ValueError(f"its pickle uses the opcode {name}, which files of torch.save do not need.")

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle takes more values than it gave.")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def to_mark(self) -> list[Any]:
        if not self.below:
            raise ValueError("its pickle ends a collection that it did not begin.")
        items, self.stack = self.stack, self.below.pop()
        return items

    def append(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):  # what an unknown object holds is not needed
            raise ValueError(f"its pickle appends to {_kind(target)}.")

    def set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("its pickle has a key without a value.")
        if isinstance(target, Opaque):
            return
        if not isinstance(target, dict):
            raise ValueError(f"its pickle sets items of {_kind(target)}.")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested tuple has no bound on its depth, and large whole numbers can be made to collide.
            large = isinstance(key, int) and key.bit_length() > 60
            if large or not isinstance(key, str | int | float | Opaque | None):
                raise ValueError(f"its pickle has {_kind(key)} as a key.")
            target[key] = value

    def make(self, made: Any, args: Any) -> Any:
        if not isinstance(made, Opaque) or made.args is not None or not isinstance(args, tuple):
            raise ValueError(f"its pickle calls {_kind(made)}.")
        if made.name in _DICTS and (not args or made.name == "collections.defaultdict"):
            return {}  # its items follow
        if made.name == "_codecs.encode" and len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
            self.encoded += len(args[0])
            if self.encoded > self.n_bytes:
                raise ValueError("its pickle makes more bytes than it has.")
            return args[0].encode("latin-1")
        if made.name in ("__builtin__.bytes", "builtins.bytes") and not args:
            return b""
        if made.name == "torch._utils._rebuild_tensor_v2" and len(args) >= 4 and isinstance(args[0], Storage):
            return _tensor_ref(*args[:4])
        if made.name == "torch._utils._rebuild_parameter" and args and isinstance(args[0], TensorRef):
            return args[0]
        return Opaque(made.name, args)

    def storage(self, ident: Any) -> Any:
        if not isinstance(ident, tuple) or len(ident) != 5 or ident[0] != "storage" or not isinstance(ident[1], Opaque):
            raise ValueError("its pickle names a storage in an unknown way.")
        _, kind, key, _, numel = ident
        if kind.name not in _STORAGES:
            return Opaque(kind.name, ())
        if not isinstance(key, str) or not _is_size(numel):
            raise ValueError("its pickle names a storage in an unknown way.")
        storage = Storage(key, _STORAGES[kind.name], numel)
        stored, stated = self.storage_bytes(key), numel * storage.dtype.itemsize
        if stored != stated:
            there = "is not in the file" if stored is None else f"has {stored:,} bytes"
            raise ValueError(f"storage {key[:100]!r} {there}, and {stated:,} bytes are stated.")
        return storage


def _tensor_ref(storage: Storage, offset: Any, size: Any, stride: Any) -> TensorRef:
    shape_like = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 64
    if not shape_like or not all(_is_size(value) for value in (offset, *size, *stride)):
        raise ValueError("a tensor has an offset, size or stride that is none.")
    numel = math.prod(size)
    end = offset + (1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else 0)
    if end > storage.numel or numel > storage.numel or math.prod(max(n, 1) for n in size) >= 1 << 62:
        raise ValueError(f"a tensor of size {size} and stride {stride} does not fit its {storage.numel:,} elements.")
    return TensorRef(storage, offset, size, stride)


def plain(value: Any) -> Any:
    """Dicts, lists and scalars, with OmegaConf's nodes and NumPy's scalars unwrapped and tuples as lists.

    Interpolations stay text; what has no plain form stays inert.

    Raises
    ------
    ValueError
        Nested deeper than 64 (or within itself); more than 1,000,000 values; text that is not Unicode; two equal keys.
    """
    return _plain(value, 0, [0])


def _plain(value: Any, depth: int, count: list[int]) -> Any:
    scalar = isinstance(value, Opaque) and value.name in _SCALARS and value.args is not None
    text = value if isinstance(value, str | bytes) else value.args[-1] if scalar and value.args else None
    count[0] += 1 + (len(text) // 16 if isinstance(text, str | bytes) else 0)
    if depth > MAX_DEPTH:
        raise ValueError(f"values are nested more than {MAX_DEPTH} deep, or within themselves.")
    if count[0] > MAX_VALUES:
        raise ValueError(f"a setting has more than {MAX_VALUES:,} values.")
    if scalar:
        return _scalar(value)
    if isinstance(value, Opaque):
        field = "_content" if value.name in _CONTAINERS else "_val" if value.name in _NODES else None
        if field is None or not isinstance(value.state, dict) or field not in value.state:
            return value
        return _plain(value.state[field], depth + 1, count)
    if isinstance(value, dict):
        items = [(_plain(k, depth + 1, count), _plain(v, depth + 1, count)) for k, v in value.items()]
        if any(isinstance(k, dict | list) for k, _ in items) or len({k for k, _ in items}) != len(items):
            raise ValueError("a setting has two equal keys, or one that is a collection.")
        return dict(items)
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1, count) for item in value]
    if isinstance(value, str) and not value.isascii():
        value.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return value


def _scalar(value: Opaque) -> Any:
    # numpy's scalar(dtype, bytes); a text is UTF-32 padded with zeros.
    dtype, data = value.args if len(value.args) == 2 else (None, None)
    code = dtype.args[0] if isinstance(dtype, Opaque) and dtype.name == "numpy.dtype" and dtype.args else None
    state = dtype.state if isinstance(dtype, Opaque) else None
    big_endian = isinstance(state, tuple) and len(state) > 1 and state[1] == ">"
    if not isinstance(code, str) or not isinstance(data, bytes):
        return value
    if code[:1] == "U":
        return data.decode("utf-32-be" if big_endian else "utf-32-le").rstrip("\0")
    if code not in ("b1", "f2", "f4", "f8", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))):
        return value
    number = np.dtype(code).newbyteorder(">" if big_endian else "<")
    if len(data) != number.itemsize:
        raise ValueError(f"a NumPy number {code} has {len(data)} bytes.")
    return np.frombuffer(data, number)[0].item()


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, Opaque) else f"a {type(value).__name__}"
