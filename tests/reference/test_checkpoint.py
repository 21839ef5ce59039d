"""Checkpoints read without running them: against torch's own reader, and hostile files that must do nothing."""

from __future__ import annotations

import os
import pickle
import pickletools
import random
import re
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from perturbdiff.reference import checkpoint
from perturbdiff.reference.checkpoint import Inert, TensorRef, open_checkpoint, unwrap
from tests.conftest import GOLDEN

pytestmark = pytest.mark.slow

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden numbers at {GOLDEN}")
PROTO = b"\x80\x02"


def archive(path: Path, program: bytes, entries: dict[str, bytes] | None = None, **options: object) -> Path:
    """A zip archive as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", program)
        for name, content in {"archive/byteorder": b"little", **(entries or {})}.items():
            file.writestr(name, content)
    return path


def content_of(path: Path) -> object:
    with open_checkpoint(path) as file:
        return file.content


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def push(value: object) -> bytes:
    """Opcodes that put a value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(
    numel: object, offset: object, size: object, stride: object, kind: str = "FloatStorage", key: object = "0"
) -> bytes:
    """A tensor as torch.save writes it."""
    storage = b"(" + push("storage") + f"ctorch\n{kind}\n".encode() + push(key) + push("cpu") + push(numel) + b"tQ"
    arguments = storage + b"".join(map(push, (offset, size, stride, False, {})))
    return PROTO + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR."


# What it reads.

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def test_tensors_are_those_that_torch_reads(tmp_path):
    whole = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    state = OrderedDict({str(dtype): (10 * whole[0]).to(dtype) for dtype in DTYPES})
    views = {
        "whole": whole, "transposed": whole.transpose(0, 2), "strided": whole[1::2, :, ::3], "row": whole[5],
        "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "empty view": whole[2:2], "one": whole[3:4, 1:2],
    }  # fmt: skip
    path = saved(tmp_path / "x.pt", state | views)
    expected = torch.load(path, weights_only=True)
    with open_checkpoint(path) as file:
        assert list(file.content) == list(expected)
        together = file.tensors({name: file.content[name] for name in [*state, "strided", "row", "empty", "scalar"]})
        for name, ref in file.content.items():
            alone = file.tensors({name: ref})[name]
            assert alone.dtype == expected[name].dtype
            assert alone.is_contiguous()
            assert torch.equal(alone, expected[name]), name
            assert torch.equal(together.get(name, alone), alone)
        with pytest.raises(ValueError, match="each must have its own"):
            file.tensors({str(i): file.content["whole"] for i in range(50)})


def test_settings_are_what_was_saved(tmp_path):
    configs = {"a": 1, "b": {"c": [1, None, {"d": "x"}], "e": "${a}"}, "none": None, "missing": "???", "f": 0.5}
    content = {
        "numbers": [0, -1, 255, 65536, -(2**31), 2**40, -(2**100), 1.5, -0.0, True, False, None],
        "texts": ["", "a", "ü", "b" * 300, "\U0001f9ec"],
        "nested": {"a": {"b": [{"c": (1, (2,))}]}, 3: "x", None: 0, 2.5: 1},
        "omegaconf": OmegaConf.create(configs),
        "numpy": {np.str_("IL-2 β"): np.int64(-3), "f": np.float32(0.5), "b": np.bool_(True), "e": np.str_("")},
        "big-endian": np.array(7, dtype=">i4")[()],
    }
    read_back = unwrap(content_of(saved(tmp_path / "x.pt", content)))
    expected = {
        **content, "nested": {**content["nested"], "a": {"b": [{"c": [1, [2]]}]}}, "omegaconf": configs,
        "numpy": {"IL-2 β": -3, "f": 0.5, "b": True, "e": ""}, "big-endian": 7,
    }  # fmt: skip
    assert read_back == expected
    assert [type(value) for value in read_back["numpy"].values()] == [int, float, bool, str]


@needs_golden
@pytest.mark.parametrize("name", ["tiny_official.ckpt", "tiny_official_final_weights_only.ckpt"])
def test_every_global_of_a_published_checkpoint_stays_a_name(name):
    content = content_of(GOLDEN / name)
    logger = content["hyper_parameters"]["py_logger"]
    assert (logger.name, logger.args) == ("logging.getLogger", ("src.common.utils",))
    assert isinstance(content["state_dict"]["model.x_embedder.weight"], TensorRef)
    pert_dict = unwrap(content["hyper_parameters"]["cov_encoding_cfg"])["pert_dict"]
    assert pert_dict == {"C5a": 0, "G-CSF": 1, "IFN-beta": 2, "IL-2": 3, "IL-4": 4, "PBS": 5}


# Code in the file.


class Calls:
    """Pickles as a call of `function`, as malicious files are made."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr])
def test_a_file_that_would_run_code_does_nothing(tmp_path, function):
    marker = tmp_path / "ran"
    code = f"touch {marker}" if function is os.system else f"__import__('pathlib').Path({str(marker)!r}).touch()"
    args = (Calls(eval, code), "real") if function is getattr else (code,)
    program = pickle.dumps({"state_dict": Calls(function, *args)}, 2)
    value = content_of(archive(tmp_path / "x.ckpt", program))["state_dict"]
    assert isinstance(value, Inert)
    assert unwrap(value) is value
    assert not marker.exists()
    with suppress(AttributeError):
        pickle.loads(program)  # noqa: S301 (the test's own: the file is what it seems)
    assert marker.exists()


def test_what_is_named_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "wicked.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    assert repr(content_of(archive(tmp_path / "x.ckpt", PROTO + b"cwicked\nboom\n)R."))) == "<wicked.boom>"
    assert not (tmp_path / "ran").exists()


# Programs without end, of time, memory or stack.


def again(name: str, argument: bytes, call: bytes = b"h\x01\x85R") -> bytes:
    """One value given to a function again and again."""
    return PROTO + b"](c" + name.encode() + b"q\x00" + argument + b"q\x01" + (b"h\x00" + call) * 10**4 + b"e."


DEEP = 100_000
LATIN = b"h\x01" + push("latin1") + b"\x86R"
BOMBS = {
    "a bytearray": PROTO + b"c__builtin__\nbytearray\n" + push(10**12) + b"\x85R.",
    "bytes doubled": PROTO + b"c_codecs\nencode\n" * 40 + push("a") + b"X\x03\0\0\0hex\x86R" * 40 + b".",
    "one text encoded": again("_codecs\nencode\n", push("a" * 10**5), LATIN),
    "one list made a dict": again("collections\nOrderedDict\n", push([(i, i) for i in range(10**4)])),
    "one text as arguments": again("x\ny\n", push("a" * 10**5), b"h\x01R"),
    "a tuple in itself as a key": PROTO + b"})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "a list in itself called": PROTO + push([0]) + b"q\x00]h\x00ah\x00a" * 60 + b")R.",
    "tuples as a key": PROTO + b"})" + b"\x85" * DEEP + b"K\x01s.",
    "tuples": PROTO + b")" + b"\x85" * DEEP + b".",
    "lists": PROTO + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "dicts": PROTO + b"}" + b"K\x01}" * DEEP + b"s" * DEEP + b".",
    "calls": PROTO + b"cx\ny\nq\x00" + b"h\x00" * DEEP + b")R" + b"\x85R" * DEEP + b".",
    "states": PROTO + b"cx\ny\n)R" * DEEP + b"b" * (DEEP - 1) + b".",
    "a position of 2 ** 31": PROTO + b"}r\xff\xff\xff\x7f.",
    "a tensor of terabytes": tensor(10**12, 0, (10**12,), (1,)),
    "colliding keys": PROTO + b"}" + b"".join(push(i * (2**61 - 1)) + b"Ns" for i in range(1, 10**4)) + b".",
}


@pytest.mark.parametrize("program", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_takes_memory_in_proportion_to_its_size_and_is_one_line_at_worst(tmp_path, program):
    path = archive(tmp_path / "x.ckpt", program, {"archive/data/0": bytes(24)})
    message = ""
    tracemalloc.start()
    try:
        unwrap(content_of(path))
    except ValueError as error:
        message = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message == "" or re.fullmatch(r"(x\.ckpt: its pickle is none|the settings of).{,270}", message)
    assert peak < 5_000_000 + 300 * len(program)


def test_a_program_of_too_many_opcodes_is_a_value_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_OPCODES", 1000)
    assert content_of(archive(tmp_path / "x.ckpt", PROTO + b"](" + b"}" * 990 + b"e."))
    with pytest.raises(ValueError, match="more than 1,000 opcodes"):
        content_of(archive(tmp_path / "x.ckpt", PROTO + b"](" + b"}" * 1000 + b"e."))


def multiplied() -> list:
    value: list = ["x"]
    for _ in range(40):
        value = [value, value]
    return value


def within_itself() -> dict:
    value: dict = {}
    value["me"] = value
    return value


def numpy_scalar(code: str, text: str) -> Inert:
    dtype = Inert("numpy.dtype", (code, False, True), (3, "<"))
    return Inert("numpy.core.multiarray.scalar", (dtype, Inert("_codecs.encode", (text, "latin1"))))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (multiplied(), "more than 1,000,000 values"),
        (within_itself(), "nested more than 64 deep, or within themselves"),
        (["a" * 160_000] * 101, "more than 1,000,000 values"),
        ([numpy_scalar("U40000", "\0" * 160_000)] * 101, "more than 1,000,000 values"),
        (["\ud800"], "surrogates"),
        (numpy_scalar("U1", "\0\xd8\0\0"), "utf-32"),
        (numpy_scalar("f8", "abc"), "buffer size"),
        ({"a": 1, numpy_scalar("U1", "a\0\0\0"): 2}, "two of their keys are equal"),
        ({Inert("omegaconf.listconfig.ListConfig", (), {"_content": [1]}): 1}, "unhashable"),
        (Inert("omegaconf.nodes.AnyNode", ()), "NoneType"),
    ],
    ids=str.split("multiplied within-itself long-text long-scalar surrogate utf-32 f8 equal-keys list-key no-state"),
)
def test_settings_that_cannot_be_read_are_a_value_error(value, message):
    with pytest.raises(ValueError, match=rf"settings of the checkpoint cannot be read \(.*{message}") as error:
        unwrap(value)
    assert len(str(error.value)) < 300


# Programs and archives that are wrong.

WRONG = {
    "no STOP": PROTO + b"}",
    "nothing": b"",
    "no value": PROTO + b".",
    "two values": PROTO + b"}}.",
    "no mark": PROTO + b"t.",
    "a value that was not stored": PROTO + b"h\x00.",
    "INST": PROTO + b"(X\x01\x00\x00\x00xios\nsystem\n.",
    "protocol 4": pickle.dumps({"a": OrderedDict()}, 4),
    "an unknown opcode": PROTO + b"\xff.",
    "a call of a value": PROTO + b"])R.",
    "arguments that are none": PROTO + b"cos\nsystem\n]R.",
    "an append to a dict": PROTO + b"}K\x01a.",
    "a key without a value": PROTO + b"}(K\x01u.",
    "text longer than the file": PROTO + b"X\xff\xff\xff\x7fab.",
    "bytes longer than memory": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"ab.",
    "text that is not UTF-8": PROTO + b"X\x01\x00\x00\x00\xff.",
    "a long line": PROTO + b"S" + b"a" * 10**6 + b"\n.",
    "a storage by name": PROTO + b"X\x01\x00\x00\x00aQ.",
    **{
        f"a tensor {numbers}": tensor(6, *numbers)
        for numbers in [
            (0, (10**12,), (0,)), (0, (7,), (1,)), (3, (2, 2), (2, 1)), (7, (0,), (1,)), (0, (2, 2), (5, 1)),
            (-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2,), (-1,)), (0, (2,), (1, 1)), (0, (1,) * 65, (1,) * 65),
            (0, (0, 2**61, 2**61), (1, 1, 1)), (0, (1,), (2**80,)), (0, (2.0,), (1,)), (0, None, ()),
        ]
    },
    **{
        f"a storage {numel} {kind} {key}": tensor(numel, 0, (2,), (1,), kind, key)
        for numel, kind, key in [
            (5, "FloatStorage", "0"), (6, "DoubleStorage", "0"), (6, "FloatStorage", "1"), (6.0, "FloatStorage", "0"),
            (None, "FloatStorage", "0"), (6, "FloatStorage", 0),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("program", WRONG.values(), ids=WRONG.keys())
def test_a_program_that_is_wrong_is_one_line(tmp_path, program):
    with pytest.raises(ValueError, match=r"^x\.ckpt: its pickle is none of torch\.save \(.+\); get it again") as error:
        content_of(archive(tmp_path / "x.ckpt", program, {"archive/data/0": bytes(24)}))
    assert len(str(error.value)) < 300


def test_a_compressed_archive_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    bomb = archive(tmp_path / "x.ckpt", b"\0" * (1 << 27), compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 18
    monkeypatch.setattr(zipfile.ZipExtFile, "read", None)
    with pytest.raises(ValueError, match=r"'archive/data\.pkl' is compressed or encrypted"):
        content_of(bomb)


@pytest.mark.parametrize(
    ("entries", "message"),
    [({"b/data.pkl": PROTO + b"}."}, r"has 2 entries data\.pkl"), ({"archive/byteorder": b"big"}, "not little-endian")],
)
def test_an_archive_that_is_none_of_torch_save_is_refused(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        content_of(archive(tmp_path / "x.ckpt", PROTO + b"}.", entries))


def test_a_large_pickle_and_a_long_list_of_entries_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = archive(tmp_path / "x.ckpt", PROTO + b"}.", {f"archive/data/{i}": b"" for i in range(300)})
    assert content_of(path) == {}
    monkeypatch.setattr(checkpoint, "MAX_PICKLE_BYTES", 3)
    with pytest.raises(ValueError, match="its pickle has 4 bytes; at most 3 are read"):
        content_of(path)
    monkeypatch.setattr(checkpoint, "MAX_READ", 10_000)
    with pytest.raises(ValueError, match=r"its list of entries has 1\d,\d+ bytes, and at most 10,000 are read"):
        content_of(path)


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    path = archive(tmp_path / "x.ckpt", PROTO + b"}.", {f"archive/data/{i}": bytes(999) for i in range(2)})
    data = bytearray(path.read_bytes())
    position = data.rindex(b"archive/data/1") - 46  # of the entry in the list
    for field in (20, 24):  # compressed and plain size
        struct.pack_into("<I", data, position + field, 2000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"its entries have [\d,]+ bytes, and the file"):
        content_of(path)


def test_damaged_bytes_are_a_value_error(tmp_path):
    path = saved(tmp_path / "x.pt", {"x": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<2f", 500, 501))] ^= 1
    path.write_bytes(data)
    with open_checkpoint(path) as file, pytest.raises(ValueError, match=r"x\.pt is damaged \(Bad CRC-32"):
        file.tensors(file.content)


def test_a_file_cut_anywhere_is_a_value_error(tmp_path):
    whole = saved(tmp_path / "x.pt", {"x": torch.arange(50.0), "y": [1, 2]}).read_bytes()
    for n in range(0, len(whole), 7):
        (tmp_path / "cut.pt").write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"cut\.pt is not a zip archive of torch\.save"):
            content_of(tmp_path / "cut.pt")


def test_bare_pickles_are_refused_and_not_unpickled(tmp_path):
    marker = tmp_path / "ran"
    content = {"x": torch.zeros(2), "y": Calls(os.system, f"touch {marker}")}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(content["y"]))
    for name in ("old.pt", "bare.pt"):
        with pytest.raises(ValueError, match="files of older formats are bare pickles, which are not opened"):
            content_of(tmp_path / name)
    assert not marker.exists()


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        content_of(tmp_path / "x.ckpt")


# Anything else.


def read_any(path: Path) -> None:
    """Whatever the bytes are, a ValueError is the worst."""
    with suppress(ValueError), open_checkpoint(path) as file:
        unwrap(file.content)
        for content in (file.content, *(file.content.values() if isinstance(file.content, dict) else ())):
            refs = content.items() if isinstance(content, dict) else ()
            file.tensors({str(key): value for key, value in refs if isinstance(value, TensorRef)})


OPCODES = [bytes([ord(opcode.code)]) for opcode in pickletools.opcodes]
PIECES = [*OPCODES, b"K\x01", b"X\x01\x00\x00\x00a", b"cx\ny\n", b"q\x00", b"h\x00", tensor(6, 0, (2,), (1,))[2:-1]]


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=9), max_size=60))
@settings(max_examples=500)
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # pickletools reads text of protocol 0
def test_random_programs_are_a_value_error_at_worst(tmp_path_factory, pieces):
    program = PROTO + b"".join(pieces) + b"."
    read_any(archive(tmp_path_factory.getbasetemp() / "x.ckpt", program, {"archive/data/0": bytes(24)}))


@needs_golden
def test_a_published_checkpoint_with_changed_bytes_is_a_value_error_at_worst(tmp_path):
    rng = random.Random(0)
    source = GOLDEN / "tiny_official_final_weights_only.ckpt"
    with zipfile.ZipFile(source) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    program, whole = entries.pop("archive/data.pkl"), source.read_bytes()
    for _ in range(40):
        changed = bytearray(program)
        for _ in range(rng.choice([1, 3, 30])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        read_any(archive(tmp_path / "x.ckpt", bytes(changed), entries))
        changed = bytearray(whole)
        for _ in range(3):
            changed[rng.randrange(len(changed) - 8000, len(changed))] = rng.randrange(256)  # the list of entries
        (tmp_path / "y.ckpt").write_bytes(changed)
        read_any(tmp_path / "y.ckpt")
