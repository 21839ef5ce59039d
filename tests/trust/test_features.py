"""Feature tables of strangers: refused in one line of ValueError, soon, within memory, without running anything."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from tests.trust.attacks import ESCAPES, MEMORY, SECONDS, TERABYTE

MIB = 1 << 20
NAMES = [f"GENE{i}" for i in range(20)]
VALUES = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)

# Each request is a list of files, read by a fork with limits.
READER = r"""
import json, os, resource, signal, sys
from perturbdiff.data.features import morgan_table, read_table
import importlib.util

if importlib.util.find_spec("rdkit"):
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdFingerprintGenerator

for path in sys.argv[1:]:
    read_table(path)  # what is imported late is imported now

def read(path):
    noted = []
    sys.addaudithook(lambda event, arguments: noted.append(event)
                     if event in ("exec", "os.system", "subprocess.Popen", "pickle.find_class") else None)
    try:
        table = (morgan_table if "drugs" in path else read_table)(path)
        said = {"type": "table", "names": list(table.names), "shape": table.values.shape}
    except Exception as error:
        said = {"type": type(error).__name__, "text": str(error)}
    return {**said, "noted": noted}

for line in sys.stdin:
    request = json.loads(line)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + request["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))
        signal.alarm(600)  # of the clock: a guard against hanging
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = {"answers": [read(path) for path in request["paths"]]}
        said["taken"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(said))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(said if status == 0 else json.dumps({"status": status}), flush=True)
"""


class TableReader:
    """Reads tables in processes with little memory and time."""

    def __init__(self, paths: list[Path]) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "MALLOC_ARENA_MAX": "2",
        }
        command = [sys.executable, "-W", "error", "-c", READER, *map(str, paths)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def read(self, *paths: Path) -> list[dict[str, Any]]:
        """What came of each file; all within the limits."""
        request = {"paths": [str(path) for path in paths], "memory": MEMORY, "seconds": SECONDS}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        assert "status" not in said, said
        assert said["taken"] < MEMORY
        assert not [answer for answer in said["answers"] if answer["noted"]]
        return said["answers"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def write_good(folder: Path) -> dict[str, Path]:
    """One table of each kind, all with the same content."""
    rows = [f"{name},{','.join(map(str, row))}\n" for name, row in zip(NAMES, VALUES.tolist(), strict=True)]
    (folder / "t.csv").write_text(f"name,{','.join('abcdef')}\n{''.join(rows)}")
    table = pa.table({"name": NAMES, **{f"f{i}": column for i, column in enumerate(VALUES.T)}})
    pq.write_table(table, folder / "t.parquet")
    np.savez(folder / "matrix.npz", names=np.array(NAMES), values=VALUES)
    np.savez_compressed(folder / "named.npz", **dict(zip(NAMES, VALUES, strict=True)))
    safetensors.numpy.save_file({"values": VALUES}, folder / "matrix.safetensors", {"names": json.dumps(NAMES)})
    safetensors.numpy.save_file(dict(zip(NAMES, VALUES, strict=True)), folder / "named.safetensors")
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def reader(good: dict[str, Path]) -> Iterator[TableReader]:
    reader = TableReader(list(good.values()))
    yield reader
    reader.close()


def assert_refused(answer: dict[str, Any], says: str = "") -> None:
    assert answer["type"] == "ValueError", answer
    assert 20 < len(answer["text"]) < 1000
    assert answer["text"].isprintable(), answer["text"][:300]
    assert says in answer["text"], answer["text"]


def npy(array: np.ndarray | None = None, **header: Any) -> bytes:
    """The bytes of an array; those of the header may say something else."""
    file = io.BytesIO()
    if header:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2,), **header})
    if array is not None and not header:
        np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue() + (b"" if array is None or not header else array.tobytes())


def npy_text(header: str) -> bytes:
    text = header.encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


def zipped(how: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def lying(content: bytes, size: int) -> bytes:
    """The archive, its directory stating another unpacked size for every entry."""
    start, *entries = content.split(b"PK\1\2")
    return b"PK\1\2".join([start, *(entry[:20] + struct.pack("<I", size) + entry[24:] for entry in entries)])


class Runs:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("true",)


ONE = np.ones(2, dtype=np.float32)
OBJECTS = np.array([Runs()], dtype=object)
ZEROS = bytes(64 * MIB)


def bomb(how: int) -> bytes:
    """64 MB of zeros, as an array that is stated as it is."""
    return zipped(how, A=npy(**{"shape": (len(ZEROS) // 4,)}) + ZEROS)


NPZ: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"name,a\nA,1\n",
    "an .npy": lambda: npy(VALUES),
    "a pickle": lambda: b"\x80\x04K\x01.",
    "an object array": lambda: zipped(A=npy(OBJECTS)),
    "names as objects": lambda: zipped(names=npy(OBJECTS), values=npy(VALUES)),
    "values as objects": lambda: zipped(names=npy(np.array(NAMES)), values=npy(OBJECTS)),
    "objects inside": lambda: zipped(A=npy(ONE, descr=[("a", "|O")])),
    "a record": lambda: zipped(A=npy(ONE, descr=[("a", "<f4"), ("b", "<f4")], shape=(1,))),
    "no array": lambda: zipped(A=b"\x93NUMPY"),
    "another file": lambda: zipped(A=b"import os"),
    "version 9": lambda: zipped(A=b"\x93NUMPY\x09\0" + npy(ONE)[8:]),
    "version 2 with a header of 4 GB": lambda: zipped(A=b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(100)),
    "a header that calls": lambda: zipped(A=npy_text("__import__('os').system('true')")),
    "a header of brackets": lambda: zipped(A=npy_text("(" * 9000)),
    "a header of minus": lambda: zipped(A=npy_text("-" * 9000 + "1")),
    "a header of 60 KB": lambda: zipped(A=npy_text("[" + "1," * 30000 + "]")),
    "a shape of terabytes": lambda: zipped(A=npy(ONE, shape=(TERABYTE,))),
    "a shape of 2**70": lambda: zipped(A=npy(ONE, shape=(1 << 70,))),
    "a matrix of terabytes": lambda: zipped(names=npy(np.array(NAMES)), values=npy(ONE, shape=(1 << 20, 1 << 20))),
    "a negative shape": lambda: zipped(A=npy(ONE, shape=(-2,))),
    "a true shape": lambda: zipped(A=npy(ONE, shape=(True,))),
    "a longer shape": lambda: zipped(A=npy(ONE, shape=(3,))),
    "a shorter shape": lambda: zipped(A=npy(ONE, shape=(1,))),
    "names without letters": lambda: zipped(names=npy(ONE, descr="<U0", shape=(TERABYTE,)), values=npy(VALUES)),
    "names of a gigabyte": lambda: zipped(names=npy(ONE, descr="<U300000000", shape=(1,)), values=npy(VALUES)),
    "names that are no letters": lambda: zipped(names=npy(ONE, descr="<U2", shape=(1,)), values=npy(VALUES[:1])),
    "names that upset terminals": lambda: zipped(**{"A": npy(ONE), ESCAPES: npy(OBJECTS)}),
    "values stated as terabytes": lambda: lying(zipped(A=npy(ONE)), 0xFFFFFFF0),
    "a bomb that lies": lambda: lying(bomb(zipfile.ZIP_DEFLATED), 200),
    "a bomb of bzip2": lambda: bomb(zipfile.ZIP_BZIP2),
    "a bomb of lzma": lambda: bomb(zipfile.ZIP_LZMA),
    "a bomb": lambda: bomb(zipfile.ZIP_DEFLATED),
    "three entries stated as 4 GB": lambda: lying(zipped(A=npy(ONE), B=npy(ONE), C=npy(ONE)), 0xFFFFFFF0),
    "a name of 60 KB": lambda: zipped(**{"A" * 60_000: npy(ONE)}),
    "an encrypted entry": lambda: encrypted(zipped(A=npy(ONE))),
    "a directory of 4 GB": lambda: zipped(A=npy(ONE))[:-10] + struct.pack("<IIH", 0xFFFFFFF0, 100, 0),
    "a comment": lambda: zipped(A=npy(ONE))[:-2] + struct.pack("<H", 5) + b"hello",
    "truncated": lambda: zipped(A=npy(ONE))[:-30],
    "a directory before the file": lambda: zipped(A=npy(ONE))[:-6] + struct.pack("<IH", 1 << 30, 0),
    "an entry before the file": lambda: zipped(A=npy(ONE), B=npy(ONE))[:-6] + struct.pack("<IH", 1000, 0),
    "a wrong checksum": lambda: zipped(A=npy(ONE)).replace(ONE.tobytes(), (2 * ONE).tobytes()),
}  # fmt: skip


def encrypted(content: bytes) -> bytes:
    local, central = content.index(b"PK\3\4") + 6, content.index(b"PK\1\2") + 8
    changed = bytearray(content)
    changed[local] |= 1
    changed[central] |= 1
    return bytes(changed)


SAYS = {
    "an object array": "must be numbers", "names as objects": "must be text", "objects inside": "must be numbers",
    "a header that calls": "no readable array", "version 2 with a header of 4 GB": "of another version",
    "a bomb": "features", "a bomb that lies": "Bad CRC-32", "a bomb of bzip2": "packed or encrypted",
    "three entries stated as 4 GB": "unpacks to 12,8", "a directory of 4 GB": "directory must have at most",
    "a wrong checksum": "Bad CRC-32", "names that are no letters": "no letters", "a shape of terabytes": "features",
}  # fmt: skip


@pytest.mark.parametrize("kind", NPZ)
def test_an_npz_of_a_stranger_is_refused(reader, tmp_path, kind):
    (tmp_path / "t.npz").write_bytes(NPZ[kind]())
    assert_refused(reader.read(tmp_path / "t.npz")[0], SAYS.get(kind, ""))


def tensor_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(shape: Any, dtype: str = "F32", end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def twins() -> bytes:
    text = json.dumps({"A": one([2])})
    return tensor_file((text[:-1] + ", " + text[1:]).encode(), bytes(8))


TENSORS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "a header of 2**63": lambda: tensor_file(b"{}", length=1 << 63),
    "a header of 100 MB": lambda: tensor_file(b"{" * 100_000_000),
    "a header of 30 MB": lambda: tensor_file(b"{" * 30_000_000),
    "a header of lists": lambda: tensor_file(b"[" * 30_000_000),
    "no JSON": lambda: tensor_file(b"\xff" * 100),
    "a list": lambda: tensor_file([]),
    "outside": lambda: tensor_file({"A": one([2], end=1 << 40)}, bytes(8)),
    "terabytes": lambda: tensor_file({"A": one([TERABYTE])}, bytes(8)),
    "a shape of 2**64 and nothing": lambda: tensor_file({"values": one([1 << 40, 0], end=0)}),
    "many axes": lambda: tensor_file({"A": one([1] * 100_000 + [2])}, bytes(8)),
    "twice": twins,
    "true and false": lambda: tensor_file({"A": one([8], "BOOL")}, bytes(8)),
    "eight bits": lambda: tensor_file({"A": one([8], "F8_E4M3")}, bytes(8)),
    "complex": lambda: tensor_file({"A": one([1], "C64")}, bytes(8)),
    "an unknown type": lambda: tensor_file({"A": one([2], ESCAPES)}, bytes(8)),
    "a name that upsets terminals": lambda: tensor_file({ESCAPES: one([2, 1])}, bytes(8)),
    "a name of 1 MB": lambda: tensor_file({"A" * MIB: one([2])}, bytes(8)),
    "names nested": lambda: tensor_file({"__metadata__": {"names": "[" * 100_000}, "values": one([1, 2])}, bytes(8)),
    "names of a long number": lambda: tensor_file(
        {"__metadata__": {"names": f"[{'1' * 10_000}]"}, "values": one([1, 2])}, bytes(8)
    ),
    "names of 30 MB": lambda: tensor_file(
        {"__metadata__": {"names": "[" + "[]," * 10_000_000 + "[]]"}, "values": one([1, 2])}, bytes(8)
    ),
    "metadata a list": lambda: tensor_file({"__metadata__": [], "values": one([1, 2])}, bytes(8)),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_safetensors_of_a_stranger_are_refused(reader, tmp_path, kind):
    (tmp_path / "t.safetensors").write_bytes(TENSORS[kind]())
    assert_refused(reader.read(tmp_path / "t.safetensors")[0])


def parquet(columns: Any, metadata: dict[str, str] | None = None, **how: Any) -> bytes:
    file = io.BytesIO()
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **(metadata or {})}), file, **how)
    return file.getvalue()


def footer(content: bytes, length: int) -> bytes:
    return content[:-8] + struct.pack("<I", length) + content[-4:]


GOOD = {"name": ["A"], "a": [1.0]}
PARQUET: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "only its mark": lambda: b"PAR1",
    "a footer of 4 GB": lambda: footer(parquet(GOOD), 0xFFFFFFFF),
    "a footer longer than the file": lambda: footer(parquet(GOOD), 100_000),
    "a footer of nothing": lambda: footer(parquet(GOOD), 0),
    "truncated": lambda: parquet(GOOD)[:-20],
    "encrypted": lambda: parquet(GOOD)[:-4] + b"PARE",
    "ten million rows of nothing": lambda: parquet({"name": pa.nulls(10_000_000), "a": pa.nulls(10_000_000)}),
    "five million rows": lambda: parquet({"name": pa.repeat("A", 5 * MIB), "a": pa.nulls(5 * MIB, pa.int8())}),
    "a long name a million times": lambda: parquet(
        {"name": pa.DictionaryArray.from_arrays(np.zeros(MIB, np.int32), ["A" * MIB]), "a": np.zeros(MIB, "i1")},
        store_schema=False,
    ),
    "names that upset terminals": lambda: parquet({"name": [ESCAPES, ESCAPES], "a": [1, 2]}),
    "a column that upsets terminals": lambda: parquet({"name": ["A"], ESCAPES: ["x"]}),
    "nested columns": lambda: parquet({"name": ["A"], "a": [{"b": {"c": [1]}}]}),
    "an index nested": lambda: parquet({"name": ["A"], "a": ["x"]}, {"pandas": "[" * 100_000}),
    "an index of lists": lambda: parquet(
        {"key": ["A"], "a": ["x"]}, {"pandas": json.dumps({"index_columns": [["a"], {}, 3]})}
    ),
    "an index that is not there": lambda: parquet(
        {"key": ["A"], "a": [1.0]}, {"pandas": json.dumps({"index_columns": [ESCAPES]})}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARQUET)
def test_parquet_of_a_stranger_is_refused(reader, tmp_path, kind):
    (tmp_path / "t.parquet").write_bytes(PARQUET[kind]())
    assert_refused(reader.read(tmp_path / "t.parquet")[0])


CSV: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: bytes(100),
    "a line of 100 MB": lambda: b"name,a\nA," + b"1" * 100 * MIB,
    "a header of 100 MB": lambda: b"name," + b"a" * 100 * MIB,
    "a header of a million titles": lambda: b"name" + b",a" * (3 * MIB) + b"\nA,1\n",
    "a quote that does not end": lambda: b'name,a\n"A,1\n' + b"B,1\n" * MIB,
    "a header that does not end": lambda: b'name,"a\n' + b"B,1\n" * MIB,
    "names that upset terminals": lambda: f"name,a\n{ESCAPES},1\n{ESCAPES},1\n".replace("\n\u202e", "").encode(),
    "titles that upset terminals": lambda: b"\x1b[2J;\x07\nA;1\n",
    "values that upset terminals": lambda: b"name,a\nA,\x1b[2J\x07\n",
    "a formula": lambda: b"name,a\nA,=cmd()\n",
    "five million names": lambda: b"name,a\n" + b"A,1\n" * (5 * MIB),
}


@pytest.mark.parametrize("kind", CSV)
def test_a_csv_of_a_stranger_is_refused(reader, tmp_path, kind):
    (tmp_path / "t.csv").write_bytes(CSV[kind]())
    assert_refused(reader.read(tmp_path / "t.csv")[0])


SMILES = {
    "nested": "C" + "(C" * 2000 + ")" * 900,
    "deep": "(" * 4900,
    "rings": "C1" * 2400,
    "large numbers": "[" + "9" * 4000 + "C]",
    "a charge": "[C+" + "9" * 4000 + "]",
    "escapes": "\x1b[2J\x07",
    "zeros": "\0\0",
    "too long": "C" * 100_000,
}


@pytest.mark.parametrize("kind", SMILES)
def test_structures_of_a_stranger_are_refused(reader, tmp_path, kind):
    pytest.importorskip("rdkit")
    pq.write_table(pa.table({"name": ["A"], "smiles": [SMILES[kind]]}), tmp_path / "drugs.parquet")
    assert_refused(reader.read(tmp_path / "drugs.parquet")[0])


def test_structures_as_long_as_is_read_are_bearable(reader, tmp_path):
    pytest.importorskip("rdkit")
    chains = {"chain": "C" * 5000, "branches": "C" + "(C)" * 1600, "deep": "C(" * 1600 + "C" + ")" * 1600}
    chains["rings"] = "c1ccccc1" * 600
    for name, smiles in chains.items():
        pq.write_table(pa.table({"name": [name], "smiles": [smiles]}), tmp_path / f"drugs{name}.parquet")
    for answer in reader.read(*sorted(tmp_path.iterdir())):
        assert answer["type"] in ("table", "ValueError"), answer


@pytest.mark.parametrize(
    "kind", ["t.csv", "t.parquet", "matrix.npz", "named.npz", "matrix.safetensors", "named.safetensors"]
)
def test_with_any_bytes_changed_it_is_a_table_or_refused(reader, good, tmp_path, kind):
    content = good[kind].read_bytes()
    rng = np.random.default_rng(len(content))
    paths = []
    for i in range(200):
        changed = bytearray(content)
        if i % 4 == 0:
            changed = changed[: rng.integers(len(changed))]
        elif i % 4 == 1:
            at = rng.integers(len(changed))
            changed[at:at] = rng.bytes(rng.integers(1, 9))
        else:
            for at in rng.integers(len(changed), size=rng.integers(1, 5)):
                changed[at] = rng.integers(256)
        paths.append(tmp_path / f"{i}{good[kind].suffix}")
        paths[-1].write_bytes(changed)
    answers = [answer for i in range(0, 200, 50) for answer in reader.read(*paths[i : i + 50])]
    refused = [answer for answer in answers if answer["type"] != "table"]
    assert len(refused) > 20
    for answer in refused:
        assert_refused(answer)
    for answer in answers:
        assert answer["type"] != "table" or answer["shape"][0] == len(answer["names"]) == len(set(answer["names"]))


def test_the_tables_themselves_are_read(reader, good):
    for answer in reader.read(*good.values()):
        assert (answer["type"], sorted(answer["names"]), answer["shape"]) == ("table", sorted(NAMES), [20, 6])
