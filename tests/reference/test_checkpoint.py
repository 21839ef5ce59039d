"""Checkpoints read without running them: against torch's own reader, and hostile files that must do nothing."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from perturbdiff.reference import checkpoint as lightning
from perturbdiff.reference import inert
from perturbdiff.reference.checkpoint import LightningFile
from perturbdiff.reference.inert import Opaque, TensorRef, plain, read_pickle_program

GOLDEN = Path(os.environ.get("PERTURBDIFF_GOLDEN", Path(__file__).parents[2] / "../shared/golden"))
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden numbers at {GOLDEN}")


def archive(path: Path, program: bytes, entries: dict[str, bytes] | None = None, **settings: object) -> Path:
    """A zip archive as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", **settings) as file:
        file.writestr("archive/data.pkl", program)
        for name, content in {"archive/byteorder": b"little", **(entries or {})}.items():
            file.writestr(name, content)
    return path


def read(program: bytes, storages: dict[str, int] | None = None) -> object:
    return read_pickle_program(program, (storages or {}).get)


def content_of(path: Path) -> object:
    with LightningFile(path) as file:
        return file.content


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# What it reads.

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_that_torch_reads(tmp_path, protocol):
    generator = torch.Generator().manual_seed(protocol)
    whole = torch.randn(6, 4, 5, generator=generator)
    state = OrderedDict({str(dtype): (10 * torch.rand(3, 2, generator=generator)).to(dtype) for dtype in DTYPES})
    state |= {
        "whole": whole, "transposed": whole.transpose(0, 2), "strided": whole[1::2, :, ::3], "row": whole[5],
        "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "empty view": whole[2:2], "one": whole[3:4, 1:2],
    }  # fmt: skip
    state["parameter"] = torch.nn.Parameter(whole[0].clone())
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    # torch warns of other protocols than 2.
    expected = torch.load(tmp_path / "x.pt", weights_only=True) if protocol == 2 else state
    with LightningFile(tmp_path / "x.pt") as file:
        assert list(file.content) == list(expected)
        for name, ref in file.content.items():  # one by one: views of the same bytes are more than the file together
            tensor = file.tensors({name: ref})[name]
            assert tensor.dtype == expected[name].dtype
            assert tensor.is_contiguous()
            assert torch.equal(tensor, expected[name].detach()), name
    shared = {ref.storage.key for name, ref in file.content.items() if name in ("whole", "transposed", "row", "one")}
    assert len(shared) == 1


def test_plain_values_are_what_was_saved(tmp_path):
    content = {
        "numbers": [0, -1, 255, 65536, -(2**31), 2**40, -(2**100), 1.5, -0.0, True, False, None],
        "texts": ["", "a", "ü", "b" * 300, "\U0001f9ec"],
        "nested": {"a": {"b": [{"c": (1, (2,))}]}, 3: "x", None: 0, 2.5: 1},
        "bytes": b"\x00\xff" * 200,
    }
    for protocol in (2, 3, 4, 5):
        torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
        expected = {**content, "nested": {**content["nested"], "a": {"b": [{"c": [1, [2]]}]}}}
        assert plain(content_of(tmp_path / "x.pt")) == expected


def test_numpy_scalars_are_numbers_and_text(tmp_path):
    content = {
        np.str_("C5a"): np.int64(-3), np.str_("IL-2 \u03b2"): np.float32(0.5), "bool": np.bool_(True),
        "big": np.array(7, dtype=">i4")[()], "u": np.uint8(200), "empty": np.str_(""),
    }  # fmt: skip
    read_back = plain(content_of(saved(tmp_path / "x.pt", content)))
    assert read_back == {"C5a": -3, "IL-2 β": 0.5, "bool": True, "big": 7, "u": 200, "empty": ""}
    assert {type(value) for value in read_back.values()} == {int, float, bool, str}
    assert {type(key) for key in read_back} == {str}


def test_omegaconf_is_unwrapped_and_interpolations_stay_text(tmp_path):
    settings = {"a": 1, "b": {"c": [1, None, {"d": "x"}], "e": "${a}"}, "none": None, "missing": "???", "f": 0.5}
    content = content_of(saved(tmp_path / "x.pt", OmegaConf.create(settings)))
    assert isinstance(content, Opaque)
    assert plain(content) == settings


@needs_golden
@pytest.mark.parametrize("name", ["tiny_official.ckpt", "tiny_official_final_weights_only.ckpt"])
def test_every_global_of_a_published_checkpoint_stays_a_name(name):
    content = content_of(GOLDEN / name)
    logger = content["hyper_parameters"]["py_logger"]
    assert (logger.name, logger.args) == ("logging.getLogger", ("src.common.utils",))
    assert isinstance(content["state_dict"]["model.x_embedder.weight"], TensorRef)
    pert_dict = plain(content["hyper_parameters"]["cov_encoding_cfg"])["pert_dict"]
    assert pert_dict == {"C5a": 0, "G-CSF": 1, "IFN-beta": 2, "IL-2": 3, "IL-4": 4, "PBS": 5}


# Code in the file.


class Calls:
    """Pickles as a call of `function`, as malicious files are made."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function", [os.system, eval, exec])
def test_a_file_that_would_run_code_does_nothing(tmp_path, monkeypatch, protocol, function):
    marker = tmp_path / "ran"
    code = f"touch {marker}" if function is os.system else f"__import__('pathlib').Path({str(marker)!r}).touch()"
    program = pickle.dumps({"state_dict": Calls(function, code)}, protocol)
    value = content_of(archive(tmp_path / "x.ckpt", program))["state_dict"]
    assert isinstance(value, Opaque)
    assert value.args == (code,)
    assert plain(value) is value
    assert not marker.exists()
    pickle.loads(program)  # noqa: S301 (the test's own: the file is what it seems)
    assert marker.exists()


def test_what_is_named_is_not_even_imported(tmp_path):
    (tmp_path / "wicked.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    program = b"\x80\x02cwicked\nboom\n)R."
    assert repr(content_of(archive(tmp_path / "x.ckpt", program))) == "<wicked.boom>"
    assert not (tmp_path / "ran").exists()


def test_an_object_keeps_what_it_was_given_and_runs_no_method(tmp_path):
    assert read(pickle.dumps(OrderedDict(a=1), 2)) == {"a": 1}
    made = read(b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00x\x85R}X\x01\x00\x00\x00kK\x01sbX\x01\x00\x00\x00yK\x02s.")
    assert (made.name, made.args, made.state) == ("posix.system", ("x",), {"k": 1})


# Programs that are wrong.

WRONG = {
    "no STOP": b"\x80\x02}",
    "nothing": b"",
    "no value": b"\x80\x02.",
    "two values": b"\x80\x02}}.",
    "an open mark": b"\x80\x02(}.",
    "no mark": b"\x80\x02t.",
    "an empty stack": b"\x80\x02\x85.",
    "a value that was not stored": b"\x80\x02h\x00.",
    "nothing to store": b"\x80\x02q\x00.",
    "a text opcode": b"\x80\x02I7\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "INST": b"\x80\x02(X\x01\x00\x00\x00xios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00xo.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n)}\x92.",
    "a text id": b"\x80\x02Pabc\n.",
    "a set": b"\x80\x04\x8f.",
    "an out of band buffer": b"\x80\x05\x97.",
    "protocol 0": b"\x80\x00}.",
    "protocol 6": b"\x80\x06}.",
    "an unknown opcode": b"\x80\x02\xff.",
    "a call of a value": b"\x80\x02])R.",
    "a call of what was called": b"\x80\x02cos\nsystem\n)R)R.",
    "arguments that are none": b"\x80\x02cos\nsystem\n]R.",
    "a state of a number": b"\x80\x02K\x01}b.",
    "a state of a name": b"\x80\x02cos\nsystem\n}b.",
    "an append to a dict": b"\x80\x02}K\x01a.",
    "an item of a list": b"\x80\x02]K\x01K\x02s.",
    "a key without a value": b"\x80\x02}(K\x01u.",
    "a dict as a key": b"\x80\x02}}K\x01s.",
    "a tuple as a key": b"\x80\x02})K\x01s.",
    "a key of 64 bits": b"\x80\x02}\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00K\x01s.",
    "a huge number": b"\x80\x02\x8b" + struct.pack("<i", 100_000) + b"\x01" * 100_000 + b".",
    "a negative length": b"\x80\x02\x8b" + struct.pack("<i", -5) + b".",
    "text longer than the file": b"\x80\x02X\xff\xff\xff\x7fab.",
    "bytes longer than memory": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"ab.",
    "text that is not UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "a name by number": b"\x80\x04K\x01K\x02\x93.",
    "a storage by name": b"\x80\x02X\x01\x00\x00\x00aQ.",
}


@pytest.mark.parametrize("program", WRONG.values(), ids=WRONG.keys())
def test_a_program_that_is_wrong_is_a_value_error(tmp_path, program):
    with pytest.raises(ValueError, match=r"^x\.ckpt cannot be read: ") as error:
        LightningFile(archive(tmp_path / "x.ckpt", program))
    assert len(str(error.value)) < 300


def test_an_opcode_out_of_the_ordinary_is_named():
    with pytest.raises(ValueError, match="opcode INST"):
        read(WRONG["INST"])


def test_a_place_of_two_to_the_31_takes_no_memory():
    first, second = read(b"\x80\x02}r\xff\xff\xff\x7fj\xff\xff\xff\x7f\x86.")
    assert first is second == {}


def test_values_within_themselves_are_read_and_have_no_plain_form():
    of_list, of_dict = [], {}
    of_list.append(of_list)
    of_dict["me"] = of_dict
    for value in (of_list, of_dict):
        own = read(pickle.dumps(value, 2))
        assert (own[0] if isinstance(own, list) else own["me"]) is own
        with pytest.raises(ValueError, match="within themselves"):
            plain(own)


DEEP = 200_000
NESTED = {
    "tuples": b")" + b"\x85" * DEEP,
    "lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "dicts": b"}" + b"K\x01}" * DEEP + b"s" * DEEP,
    "calls": b"cx\ny\nq\x00" + b"h\x00" * DEEP + b")R" + b"\x85R" * DEEP,
    "states": b"cx\ny\n)R" * DEEP + b"b" * (DEEP - 1),
}


@pytest.mark.parametrize("nested", ["tuples", "lists", "dicts", "calls", "states"])
def test_values_nested_without_end_are_a_value_error_and_can_be_let_go(nested):
    value = read(b"\x80\x02](" + NESTED[nested] + b"e.")
    if nested in ("calls", "states"):
        assert plain(value) == value
    else:
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            plain(value)
    del value


def test_nodes_nested_without_end_are_a_value_error():
    # AnyNode whose _val is an AnyNode whose _val is ...
    inner, node = "x", None
    for _ in range(100):
        node = Opaque("omegaconf.nodes.AnyNode", (), {"_val": inner})
        inner = node
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        plain(node)


def test_shared_values_that_multiply_are_a_value_error():
    value: list = ["x"]
    for _ in range(40):
        value = [value, value]
    with pytest.raises(ValueError, match="more than 1,000,000 values"):
        plain(read(pickle.dumps(value, 2)))


def test_one_text_made_into_bytes_again_and_again_is_a_value_error():
    text = b"X" + struct.pack("<I", 1000) + b"a" * 1000
    latin = b"X\x06\x00\x00\x00latin1\x86q\x00"
    once = b"\x80\x02](c_codecs\nencode\nq\x01" + text + latin + b"R"
    assert read(once + b"e.") == [b"a" * 1000]
    with pytest.raises(ValueError, match="more bytes than it has"):
        read(once + b"h\x01h\x00R" * 5 + b"e.")


@pytest.mark.parametrize("kind", ["text", "number"])
def test_one_long_text_said_again_and_again_is_a_value_error(kind):
    text = "a" * 160_000
    scalar = Opaque("numpy.core.multiarray.scalar", (Opaque("numpy.dtype", ("U9",)), text.encode("utf-32-le")))
    said = text if kind == "text" else scalar
    assert plain([said]) == [text]
    with pytest.raises(ValueError, match="more than 1,000,000 values"):
        plain([said] * 101)


def test_one_list_made_into_dicts_again_and_again_takes_no_memory():
    pairs = read(b"\x80\x02](]K\x01K\x02\x86aq\x00ccollections\nOrderedDict\nq\x01h\x00\x85Rh\x01h\x00\x85Re.")
    assert pairs[0] == [(1, 2)]
    assert [repr(value) for value in pairs[1:]] == ["<collections.OrderedDict>"] * 2


def test_settings_with_keys_that_are_collections_are_a_value_error():
    key = Opaque("omegaconf.listconfig.ListConfig", (), {"_content": [1]})
    with pytest.raises(ValueError, match="one that is a collection"):
        plain({key: 1})


def test_a_program_of_too_many_opcodes_is_a_value_error(monkeypatch):
    monkeypatch.setattr(inert, "MAX_OPCODES", 1000)
    assert read(b"\x80\x02](" + b"}" * 990 + b"e.")
    with pytest.raises(ValueError, match="more than 1,000 opcodes"):
        read(b"\x80\x02](" + b"}" * 1000 + b"e.")


def test_settings_that_are_no_unicode_are_a_value_error():
    with pytest.raises(ValueError, match="surrogates"):
        plain(read(pickle.dumps(["\ud800"], 2)))
    number = b"\x80\x02cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00U1\x85R"
    text = b"c_codecs\nencode\nX\x05\x00\x00\x00\x00\xc3\x98\x00\x00X\x06\x00\x00\x00latin1\x86R\x86R."
    with pytest.raises(ValueError, match="utf-32"):
        plain(read(number + text))


def test_a_numpy_number_of_other_length_is_a_value_error():
    call = b"\x80\x02cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00f8\x85R"
    text = b"c_codecs\nencode\nX\x03\x00\x00\x00abcX\x06\x00\x00\x00latin1\x86R\x86R."
    with pytest.raises(ValueError, match="f8 has 3 bytes"):
        plain(read(call + text))


# Tensors that do not fit.


def tensor_program(
    numel: int, offset: int, size: tuple, stride: tuple, kind: str = "FloatStorage", key: str = "0"
) -> bytes:
    """A tensor as torch.save writes it."""
    out = io.BytesIO()

    class Storage:
        pass

    class Writer(pickle._Pickler):
        def persistent_id(self, obj):
            return ("storage", Global(f"ctorch\n{kind}\n"), key, "cpu", numel) if isinstance(obj, Storage) else None

        def save(self, obj, save_persistent_id=True):
            if isinstance(obj, Global):
                self.write(obj.name.encode())
            else:
                super().save(obj, save_persistent_id)

    writer = Writer(out, 2)
    rebuild = Global("ctorch._utils\n_rebuild_tensor_v2\n")
    writer.write(pickle.PROTO + b"\x02")
    writer.save(rebuild)
    writer.save((Storage(), offset, size, stride, False, OrderedDict()))
    writer.write(pickle.REDUCE + pickle.STOP)
    return out.getvalue()


class Global:
    def __init__(self, name: str) -> None:
        self.name = name


def test_a_tensor_written_by_the_test_is_read(tmp_path):
    values = np.arange(6, dtype=np.float32)
    path = archive(tmp_path / "x.ckpt", tensor_program(6, 1, (2, 2), (2, 1)), {"archive/data/0": values.tobytes()})
    with LightningFile(path) as file:
        assert torch.equal(file.tensors({"x": file.content})["x"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (6, 0, (10**12,), (0,)),  # expanded
        (6, 0, (7,), (0,)),
        (6, 0, (7,), (1,)),
        (6, 3, (2, 2), (2, 1)),
        (6, 7, (0,), (1,)),
        (6, 0, (2, 2), (5, 1)),
        (6, -1, (2,), (1,)),
        (6, 0, (-2,), (1,)),
        (6, 0, (2,), (-1,)),
        (6, 0, (2,), (1, 1)),
        (6, 0, (1,) * 65, (1,) * 65),
        (6, 0, (0, 2**61, 2**61), (1, 1, 1)),
        (6, 0, (2**80,), (0,)),
        (6, 0, (True,), (1,)),
        (6, 0, (2.0,), (1,)),
        (6, 0, [2], (1,)),
        (6, 0, None, None),
    ],
)
def test_a_tensor_outside_its_storage_is_a_value_error(tmp_path, numel, offset, size, stride):
    path = archive(tmp_path / "x.ckpt", tensor_program(numel, offset, size, stride), {"archive/data/0": bytes(24)})
    with pytest.raises(ValueError, match=r"a tensor (of size|has an offset)"):
        LightningFile(path)


@pytest.mark.parametrize(
    ("numel", "kind", "key"),
    [
        (5, "FloatStorage", "0"),
        (10**12, "FloatStorage", "0"),
        (6, "DoubleStorage", "0"),
        (6, "FloatStorage", "1"),
        (6, "FloatStorage", "../data/0"),
        (6, "FloatStorage", ""),
        (-1, "FloatStorage", "0"),
        (None, "FloatStorage", "0"),
        (6, "FloatStorage", 0),
    ],
)
def test_a_storage_that_is_not_what_the_file_has_is_a_value_error(tmp_path, numel, kind, key):
    program = tensor_program(numel, 0, (2,), (1,), kind, key)
    with pytest.raises(ValueError, match="storage"):
        LightningFile(archive(tmp_path / "x.ckpt", program, {"archive/data/0": bytes(24)}))


def test_an_unknown_storage_stays_inert(tmp_path):
    path = archive(tmp_path / "x.ckpt", tensor_program(6, 0, (2,), (1,), "QInt8Storage"), {"archive/data/0": bytes(6)})
    assert repr(content_of(path)) == "<torch._utils._rebuild_tensor_v2>"


def test_many_views_of_the_same_bytes_are_not_read_together(tmp_path):
    whole = torch.zeros(1000)
    path = saved(tmp_path / "x.pt", {str(i): whole.view(10, 100) for i in range(50)})
    with LightningFile(path) as file, pytest.raises(ValueError, match="each must have its own"):
        file.tensors(file.content)


# Archives that are wrong.


def test_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    bomb = archive(tmp_path / "x.ckpt", b"\0" * (1 << 27), compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 18
    monkeypatch.setattr(zipfile.ZipExtFile, "read", None)
    with pytest.raises(ValueError, match=r"'archive/data\.pkl' is compressed or encrypted"):
        LightningFile(bomb)


@pytest.mark.parametrize("name", ["/etc/x", "archive/../../x", "archive//x", "archive/./x", "..", "archive\\x", "a/"])
def test_a_name_that_leaves_the_archive_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is not a name inside the archive"):
        LightningFile(archive(tmp_path / "x.ckpt", b"\x80\x02}.", {name: b"1"}))


def test_entries_outside_the_folder_of_the_pickle_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"entry 'other/data/0' outside 'archive/'"):
        LightningFile(archive(tmp_path / "x.ckpt", b"\x80\x02}.", {"other/data/0": b"1"}))


def test_two_pickles_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has 2 entries data\.pkl"):
        LightningFile(archive(tmp_path / "x.ckpt", b"\x80\x02}.", {"b/data.pkl": b"\x80\x02}."}))


def test_an_entry_that_is_there_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = archive(tmp_path / "x.ckpt", b"\x80\x02}.", {"archive/data.pkl": b"\x80\x02]."})
    with pytest.raises(ValueError, match="is there twice"):
        LightningFile(path)


def test_big_endian_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not little-endian"):
        LightningFile(archive(tmp_path / "x.ckpt", b"\x80\x02}.", {"archive/byteorder": b"big"}))


def test_a_large_pickle_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lightning, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(ValueError, match="has 13 bytes; at most 10 are read"):
        LightningFile(archive(tmp_path / "x.ckpt", b"\x80\x02" + b"]0" * 5 + b"."))


def test_a_directory_of_a_million_entries_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = archive(tmp_path / "x.ckpt", b"\x80\x02}.", {f"archive/data/{i}": b"" for i in range(300)})
    content_of(path)
    monkeypatch.setattr(lightning, "MAX_DIRECTORY_BYTES", 10_000)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(ValueError, match="zip directory must have at most 10,000 bytes"):
        LightningFile(path)


def directory_field(path: Path, entry: str, at: int, form: str, change) -> None:
    """Change one field of an entry in the zip directory."""
    data = bytearray(path.read_bytes())
    place = data.rindex(entry.encode()) - 46 + at
    struct.pack_into(form, data, place, change(struct.unpack_from(form, data, place)[0]))
    path.write_bytes(data)


def test_an_entry_that_overlaps_another_is_refused(tmp_path):
    path = archive(tmp_path / "x.ckpt", b"\x80\x02}.", {"archive/data/0": bytes(24), "archive/data/1": bytes(24)})
    for at in (20, 24):  # compressed and plain size
        directory_field(path, "archive/data/0", at, "<I", lambda size: size + 60)
    with pytest.raises(ValueError, match=r"does not have so many of its own|Overlapped entries|overlaps"):
        content_of(path)


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    path = archive(tmp_path / "x.ckpt", b"\x80\x02}.", {"archive/data/0": bytes(24), "archive/data/1": bytes(24)})
    first = zipfile.ZipFile(path).getinfo("archive/data/0").header_offset
    directory_field(path, "archive/data/1", 42, "<I", lambda _: first)
    with pytest.raises(ValueError, match=r"does not have so many of its own|Overlapped entries"):
        content_of(path)


def test_bytes_that_would_begin_in_the_next_entry_are_refused(tmp_path):
    path = archive(tmp_path / "x.ckpt", tensor_program(6, 0, (2,), (1,)), {"archive/data/0": bytes(24)})
    data = bytearray(path.read_bytes())
    local = data.index(b"archive/data/0") - 30
    struct.pack_into("<H", data, local + 28, 40)  # the length of what stands between name and bytes
    path.write_bytes(data)
    with LightningFile(path) as file, pytest.raises(ValueError, match="overlaps the next one"):
        file.tensors({"x": file.content})


def test_damaged_bytes_are_a_value_error(tmp_path):
    path = saved(tmp_path / "x.pt", {"x": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<2f", 500, 501))] ^= 1
    path.write_bytes(data)
    with LightningFile(path) as file, pytest.raises(ValueError, match="is damaged"):
        file.tensors(file.content)


def test_a_file_cut_anywhere_is_a_value_error(tmp_path):
    whole = saved(tmp_path / "x.pt", {"x": torch.arange(50.0), "y": [1, 2]}).read_bytes()
    for n in range(0, len(whole), 7):
        (tmp_path / "cut.pt").write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"truncated zip archive|not a zip archive"):
            LightningFile(tmp_path / "cut.pt")


def test_older_formats_of_torch_are_refused_and_not_unpickled(tmp_path):
    marker = tmp_path / "ran"
    content = {"x": torch.zeros(2), "y": Calls(os.system, f"touch {marker}")}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="older formats of torch hold bare pickles"):
        LightningFile(tmp_path / "old.pt")
    assert not marker.exists()


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        LightningFile(tmp_path / "x.ckpt")


# Anything else.


def read_any(path: Path) -> None:
    """Whatever the bytes are, a ValueError is the worst."""
    with suppress(ValueError), LightningFile(path) as file:
        plain(file.content)
        for content in (file.content, *(file.content.values() if isinstance(file.content, dict) else ())):
            refs = content.items() if isinstance(content, dict) else ()
            file.tensors({str(key): value for key, value in refs if isinstance(value, TensorRef)})


@given(st.binary(max_size=400))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_a_value_error_at_worst(tmp_path, data):
    (tmp_path / "x.ckpt").write_bytes(data)
    read_any(tmp_path / "x.ckpt")
    read_any(archive(tmp_path / "y.ckpt", b"\x80\x02" + data + b"."))


OPCODES = [bytes([ord(opcode.code)]) for opcode in pickletools.opcodes]


@given(
    st.lists(st.sampled_from([*OPCODES, b"K\x01", b"X\x01\x00\x00\x00a", b"cx\ny\n", b"q\x00", b"h\x00"]), max_size=60)
)
@settings(deadline=None, max_examples=600)
def test_random_programs_are_a_value_error_at_worst(opcodes):
    with suppress(ValueError):
        plain(read(b"\x80\x02" + b"".join(opcodes) + b"."))


@needs_golden
@pytest.mark.parametrize("seed", range(4))
def test_a_published_checkpoint_with_changed_bytes_is_a_value_error_at_worst(tmp_path, seed):
    rng = random.Random(seed)
    source = GOLDEN / "tiny_official_final_weights_only.ckpt"
    with zipfile.ZipFile(source) as file:
        program = file.read("archive/data.pkl")
        entries = {name: file.read(name) for name in file.namelist() if name != "archive/data.pkl"}
    for _ in range(15):
        changed = bytearray(program)
        for _ in range(rng.choice([1, 3, 30])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        read_any(archive(tmp_path / "x.ckpt", bytes(changed), entries))
    whole = source.read_bytes()
    for _ in range(15):
        changed = bytearray(whole)
        for _ in range(3):
            changed[rng.randrange(len(changed) - 8000, len(changed))] = rng.randrange(256)  # the directory
        (tmp_path / "y.ckpt").write_bytes(changed)
        read_any(tmp_path / "y.ckpt")
