"""Feature tables of strangers: refused in one line of ValueError, soon, within memory, without running anything."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from tests.trust.attacks import ESCAPES, TERABYTE, assert_refused

pytestmark = pytest.mark.slow

MIB = 1 << 20
COMMAND = "true # owned"
NAMES = [f"GENE{i}" for i in range(20)]
VALUES = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)


def good_tables() -> dict[str, bytes]:
    """One table of each kind, all with the same content."""
    rows = "".join(f"{name},{','.join(map(str, row))}\n" for name, row in zip(NAMES, VALUES.tolist(), strict=True))
    vectors = dict(zip(NAMES, VALUES, strict=True))
    matrix, named = io.BytesIO(), io.BytesIO()
    np.savez(matrix, names=np.array(NAMES), values=VALUES)
    np.savez_compressed(named, **vectors)
    return {
        "t.csv": f"name,{','.join('abcdef')}\n{rows}".encode(),
        "t.parquet": parquet({"name": NAMES, **{f"f{i}": column for i, column in enumerate(VALUES.T)}}),
        "matrix.npz": matrix.getvalue(),
        "named.npz": named.getvalue(),
        "matrix.safetensors": safetensors.numpy.save({"values": VALUES}, {"names": json.dumps(NAMES)}),
        "named.safetensors": safetensors.numpy.save(vectors),
    }


def parquet(columns: dict[str, Any], metadata: dict[str, str] | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    table = pa.table(columns)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **(metadata or {})})
    pq.write_table(table, file, **options)
    return file.getvalue()


def npy(array: np.ndarray, **header: Any) -> bytes:
    """The bytes of an array; those of the header may say something else."""
    file = io.BytesIO()
    if not header:
        np.lib.format.write_array(file, array, allow_pickle=True)
        return file.getvalue()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2,), **header})
    return file.getvalue() + array.tobytes()


def npy_text(header: str) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode()


def zipped(method: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def lying(content: bytes, size: int) -> bytes:
    """The archive, its directory stating another unpacked size for every entry."""
    start, *entries = content.split(b"PK\1\2")
    return b"PK\1\2".join([start, *(entry[:20] + struct.pack("<I", size) + entry[24:] for entry in entries)])


def large(content: bytes, size: int, position: int | None = None) -> bytes:
    """The archive with a zip64 directory that states a size, at a position where it may not be."""
    body, end = content[:-22], content[-22:]
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, int.from_bytes(end[16:20], "little"))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(body) if position is None else position, 1)
    return body + record + locator + end


def encrypted(content: bytes) -> bytes:
    changed = bytearray(content)
    for position in (content.index(b"PK\3\4") + 6, content.index(b"PK\1\2") + 8):
        changed[position] |= 1
    return bytes(changed)


class Runs:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (COMMAND,)


ONE = np.ones(2, dtype=np.float32)
OBJECTS = np.array([Runs()], dtype=object)
LIST = np.array(NAMES)


def bomb(method: int, name: str = "A", **other: bytes) -> bytes:
    """64 MB of zeros, as an array that is stated as it is."""
    return zipped(method, **{name: npy(np.zeros(16 * MIB, np.float32)), **other})


NPZ: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "no directory"),
    "a pickle": (lambda: b"\x80\x04K\x01.", "no directory"),
    "an object array": (lambda: zipped(A=npy(OBJECTS)), "'A' is object where numbers"),
    "objects inside": (lambda: zipped(A=npy(ONE, descr=[("a", "|O")])), "where numbers"),
    "version 2 with a header of 4 GB": (
        lambda: zipped(A=b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(100)), "of another version"
    ),
    "a header that calls": (lambda: zipped(A=npy_text(f"__import__('os').system({COMMAND!r})")), "not a readable"),
    "a header of brackets": (lambda: zipped(A=npy_text("(" * 9000)), "not a readable"),
    "a header of 60 KB": (lambda: zipped(A=npy_text("[" + "1," * 30000 + "]")), "not a readable"),
    "a shape of terabytes": (lambda: zipped(A=npy(ONE, shape=(TERABYTE,))), "does not have 136 bytes"),
    "a negative shape": (lambda: zipped(A=npy(ONE, shape=(-2, -1))), "'A' is (-2, -1)"),
    "a shorter shape": (lambda: zipped(A=npy(ONE, shape=(1,))), "does not have 136 bytes"),
    "names without letters": (
        lambda: zipped(names=npy(ONE[:0], descr="<U0", shape=(TERABYTE,)), values=npy(VALUES)), "must be a list"
    ),
    "names of a gigabyte": (
        lambda: zipped(names=npy(ONE, descr="<U300000000", shape=(1,)), values=npy(VALUES)), "does not have"
    ),
    "names that are no letters": (
        lambda: zipped(names=npy(ONE, descr="<U2", shape=(1,)), values=npy(VALUES[:1])), "no letters"
    ),
    "names that upset terminals": (lambda: zipped(**{"A": npy(ONE), ESCAPES: npy(OBJECTS)}), "where numbers"),
    "a bomb": (lambda: bomb(zipfile.ZIP_DEFLATED), "16,777,216 features"),
    "a bomb of values": (
        lambda: bomb(zipfile.ZIP_DEFLATED, "values", names=npy(LIST)), "is (16777216,) where"
    ),
    "a bomb that lies": (lambda: lying(bomb(zipfile.ZIP_DEFLATED), 200), "Bad CRC-32"),
    "a bomb of bzip2": (lambda: bomb(zipfile.ZIP_BZIP2), "packed in another way"),
    "entries stated as 4 GB": (lambda: lying(zipped(A=npy(ONE), B=npy(ONE), C=npy(ONE)), 0xFFFFFFF0), "12,884,901,840"),
    "an encrypted entry": (lambda: encrypted(zipped(A=npy(ONE))), "encrypted"),
    "an array twice": (lambda: zipped(A=npy(ONE), B=npy(ONE)).replace(b"B.npy", b"A.npy"), "twice"),
    "a directory of 4 GB": (lambda: zipped(A=npy(ONE))[:-10] + struct.pack("<IIH", 1 << 31, 100, 0), "2,147,483,648"),
    "a large directory of 1 TB": (lambda: large(zipped(A=npy(ONE)), TERABYTE), f"{TERABYTE:,}"),
    "a large directory elsewhere": (lambda: large(zipped(A=npy(ONE)), 51, 0), "no directory"),
    "a comment": (lambda: zipped(A=npy(ONE))[:-2] + struct.pack("<H", 5) + b"hello", "no directory"),
    "truncated": (lambda: zipped(A=npy(ONE))[:-30], "no directory"),
    "an entry before the file": (
        lambda: zipped(A=npy(ONE), B=npy(ONE))[:-6] + struct.pack("<IH", 1000, 0), "not a readable"
    ),
    "a wrong checksum": (lambda: zipped(A=npy(ONE)).replace(ONE.tobytes(), (2 * ONE).tobytes()), "Bad CRC-32"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NPZ)
def test_an_npz_of_a_stranger_is_refused(reader, tmp_path, kind):
    (tmp_path / "t.npz").write_bytes(NPZ[kind][0]())
    assert_refused(reader.read_tables(tmp_path / "t.npz", watched=COMMAND, most=16 * MIB)[0], NPZ[kind][1])


def tensors(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(shape: Any, dtype: str = "F32", end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def named(names: str) -> bytes:
    return tensors({"__metadata__": {"names": names}, "values": one([1, 2])})


def hidden_rows() -> bytes:
    """Ten million rows in a few bytes; the footer says one beside its parts."""
    content = parquet({"name": pa.array(["A"] * 10_000_000).dictionary_encode(), "a": np.zeros(10_000_000, "i1")})
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    assert content.count(b"\x80\xda\xc4\x09", start) == 1
    return content[:start] + content[start:].replace(b"\x80\xda\xc4\x09", b"\x82\x80\x80\x00", 1)


TWICE = json.dumps({"A": one([2])})
GOOD = {"name": ["A"], "a": [1.0]}
FILES: dict[str, Callable[[], bytes]] = {
    "empty.safetensors": lambda: b"",
    "a header of 2**63.safetensors": lambda: tensors(b"{}", length=1 << 63),
    "a header of 40 MB.safetensors": lambda: tensors(b"{" * 40_000_000),
    "a header of 30 MB.safetensors": lambda: tensors(b"{" * 30_000_000),
    "outside.safetensors": lambda: tensors({"A": one([2], end=1 << 40)}),
    "terabytes.safetensors": lambda: tensors({"A": one([TERABYTE])}),
    "many axes.safetensors": lambda: tensors({"A": one([1] * 100_000 + [2])}),
    "twice.safetensors": lambda: tensors(f"{TWICE[:-1]}, {TWICE[1:]}".encode()),
    "eight bits.safetensors": lambda: tensors({"A": one([8], "F8_E4M3")}),
    "an unknown type.safetensors": lambda: tensors({"A": one([2], ESCAPES)}),
    "a name of 1 MB.safetensors": lambda: tensors({"A" * MIB: one([2])}),
    "names nested.safetensors": lambda: named("[" * 100_000),
    "names of a long number.safetensors": lambda: named(f"[{'1' * 10_000}]"),
    "names of 30 MB.safetensors": lambda: named("[" + "[]," * 10_000_000 + "[]]"),
    "empty.parquet": lambda: b"",
    "a footer of 4 GB.parquet": lambda: parquet(GOOD)[:-8] + struct.pack("<I", 0xFFFFFFFF) + b"PAR1",
    "a footer longer than the file.parquet": lambda: parquet(GOOD)[:-8] + struct.pack("<I", 100_000) + b"PAR1",
    "truncated.parquet": lambda: parquet(GOOD)[:-20],
    "ten million rows.parquet": lambda: parquet({"name": pa.nulls(10_000_000), "a": pa.nulls(10_000_000, pa.int8())}),
    "ten million rows in secret.parquet": hidden_rows,
    "a long name a million times.parquet": lambda: parquet(
        {"name": pa.DictionaryArray.from_arrays(np.zeros(MIB, np.int32), ["A" * MIB]), "a": np.zeros(MIB, "i1")},
        store_schema=False,
    ),
    "names that upset terminals.parquet": lambda: parquet({"name": [ESCAPES, ESCAPES], "a": [1, 2]}),
    "a column that upsets terminals.parquet": lambda: parquet({"name": ["A"], ESCAPES: ["x"]}),
    "nested columns.parquet": lambda: parquet({"name": ["A"], "a": [{"b": {"c": [1]}}]}),
    "an index nested.parquet": lambda: parquet({"name": ["A"], "a": ["x"]}, {"pandas": "[" * 100_000}),
    "an index of lists.parquet": lambda: parquet(
        {"key": ["A"], "a": ["x"]}, {"pandas": json.dumps({"index_columns": [["a"], {}, 3]})}
    ),
    "an index that is not there.parquet": lambda: parquet(
        {"key": ["A"], "a": [1.0]}, {"pandas": json.dumps({"index_columns": [ESCAPES]})}
    ),
    "zeros.csv": lambda: bytes(100),
    "a line of 40 MB.csv": lambda: b"name,a\nA," + b"1" * 40 * MIB,
    "a header of 40 MB.csv": lambda: b"name," + b"a" * 40 * MIB,
    "a header of three million titles.csv": lambda: b"name" + b",a" * (3 * MIB) + b"\nA,1\n",
    "a quote that does not end.csv": lambda: b'name,a\n"A,1\n' + b"B,1\n" * MIB,
    "names that upset terminals.csv": lambda: b"name,a\n" + b"\x1b[2J\x07,1\n" * 2,
    "values that upset terminals.csv": lambda: b"name,a\nA,\x1b[2J\x07\n",
    "five million names.csv": lambda: b"name,a\n" + b"A,1\n" * (5 * MIB),
    "five million names of another system.csv": lambda: b"name,a\r" + b"A,1\r" * (5 * MIB),
}


SAYS = {
    "a header of 40 MB.safetensors": "40,000,000 bytes", "twice.safetensors": "twice",
    "a footer of 4 GB.parquet": "4,294,967,295 bytes", "ten million rows.parquet": "10,000,000 names",
    "ten million rows in secret.parquet": "10,000,000 names", "nested columns.parquet": "column a holds struct",
    "a long name a million times.parquet": "1,048,576 bytes", "five million names.csv": "5,242,880 names",
    "five million names of another system.csv": "5,242,880 names",
    "a header of three million titles.csv": "3,145,728 features",
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_another_file_of_a_stranger_is_refused(reader, tmp_path, kind):
    (tmp_path / kind).write_bytes(FILES[kind]())
    assert_refused(reader.read_tables(tmp_path / kind)[0], SAYS.get(kind, ""))


SMILES = {
    "nested": "C" + "(C" * 2000 + ")" * 900,
    "rings": "C1" * 2400,
    "large numbers": "[" + "9" * 4000 + "C]",
    "a charge": "[C+" + "9" * 4000 + "]",
    "escapes": "\x1b[2J\x07",
    "zeros": "\0\0",
    "too long": "C" * 100_000,
}
BEARABLE = {
    "chain": "C" * 5000, "branches": "C" + "(C)" * 1600, "deep": "C(" * 1600 + "C" + ")" * 1600,
    "aromatic": "c1ccccc1" * 600,
}  # fmt: skip


def test_structures_of_a_stranger_are_refused_or_bearable(reader, tmp_path):
    pytest.importorskip("rdkit")
    for name, smiles in (SMILES | BEARABLE).items():
        path = tmp_path / f"drugs {name}.parquet"
        pq.write_table(pa.table({"name": [name], "smiles": [smiles]}), path)
        answer = reader.read_tables(path)[0]
        if name in SMILES or "names" not in answer:
            assert_refused(answer)


@pytest.mark.parametrize("kind", good_tables())
def test_as_it_is_it_is_a_table_and_with_any_bytes_changed_a_table_or_refused(reader, tmp_path, kind):
    content = good_tables()[kind]
    (tmp_path / kind).write_bytes(content)
    answer = reader.read_tables(tmp_path / kind)[0]
    assert (sorted(answer["names"]), answer["shape"]) == (sorted(NAMES), [20, 6])
    rng = np.random.default_rng(len(content))
    paths = [tmp_path / f"{i}{Path(kind).suffix}" for i in range(200)]
    for i, path in enumerate(paths):
        changed = bytearray(content)
        position = rng.integers(len(changed))
        if i % 4 == 0:
            changed = changed[:position]
        elif i % 4 == 1:
            changed[position:position] = rng.bytes(rng.integers(1, 9))
        else:
            for position in rng.integers(len(changed), size=rng.integers(1, 5)):
                changed[position] = rng.integers(256)
        path.write_bytes(changed)
    answers = reader.read_tables(*paths)
    tables = [answer for answer in answers if "names" in answer]
    assert len(tables) < 180
    for answer in tables:
        assert answer["shape"][0] == len(answer["names"]) == len(set(answer["names"]))
    for answer in answers:
        if "names" not in answer:
            assert_refused(answer)
