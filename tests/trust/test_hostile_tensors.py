"""Tensor files of strangers, and any bytes changed: one line of ValueError, soon, within memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from perturbdiff.hub.download import find_model
from perturbdiff.hub.model_folder import CONFIG, GOLDEN, JSON_FILES, WEIGHTS, read_folder, read_verified
from perturbdiff.model import PerturbDiff
from tests.trust.attacks import ESCAPES, TERABYTE, assert_refused, forge, load_bytes, nested, put

pytestmark = pytest.mark.slow


def tensor_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parts_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def one(shape: Any, dtype: Any = "F32", offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def changed(**change: Any) -> Callable[[bytes], bytes]:
    """The file with another description of its first tensor."""

    def attack(content: bytes) -> bytes:
        header, data = parts_of(content)
        name = sorted(name for name in header if name != "__metadata__")[0]
        header[name] = {**header[name], **change}
        return tensor_file(header, data)

    return attack


def with_metadata(metadata: Any) -> Callable[[bytes], bytes]:
    def attack(content: bytes) -> bytes:
        header, data = parts_of(content)
        return tensor_file({**header, "__metadata__": metadata}, data)

    return attack


def with_twin(content: bytes) -> bytes:
    """A tensor's name twice in the header."""
    length = struct.unpack("<Q", content[:8])[0]
    text, data = content[8 : 8 + length].rstrip(), content[8 + length :]
    header, _ = parts_of(content)
    name = sorted(name for name in header if name != "__metadata__")[0]
    return tensor_file(text[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:], data)


TENSOR_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda c: b"",
    "seven bytes": lambda c: c[:7],
    "length only": lambda c: c[:8],
    "header of 2**63": lambda c: struct.pack("<Q", 1 << 63) + c[8:],
    "header of 2**64-1": lambda c: struct.pack("<Q", (1 << 64) - 1) + c[8:],
    "header longer than the file": lambda c: struct.pack("<Q", 2 * len(c)) + c[8:],
    "header of 100 MB": lambda c: tensor_file(b"{" * 100_000_000),
    "header of 8 MB": lambda c: tensor_file(b"{" * 8_000_000),
    "header of lists": lambda c: tensor_file(b"[" * 8_000_000),
    "header no JSON": lambda c: tensor_file(b"\xff" * 100),
    "header a list": lambda c: tensor_file([]),
    "header a number": lambda c: tensor_file(b"1"),
    "no tensors": lambda c: tensor_file({}),
    "truncated": lambda c: c[:-1],
    "longer": lambda c: c + b"\0",
    "overlapping": lambda c: tensor_file({"a": one([1]), "b": one([1])}, b"\0" * 4),
    "gap": lambda c: tensor_file({"a": one([1]), "b": one([1], offsets=(8, 12))}, b"\0" * 12),
    "outside": changed(data_offsets=[1 << 40, (1 << 40) + 4]),
    "backwards": changed(data_offsets=[4, 0]),
    "negative": changed(data_offsets=[-4, 0]),
    "no offsets": changed(data_offsets=[]),
    "offsets of 2**64": changed(data_offsets=[0, 1 << 64]),
    "shape of 2**64": changed(shape=[1 << 32, 1 << 32]),
    "shape of 2**64 and nothing": changed(shape=[1 << 32, 1 << 32, 0]),
    "negative shape": changed(shape=[-1]),
    "a shape of a million dimensions": changed(shape=[1] * 1_000_000),
    "a shape of text": changed(shape="12"),
    "another shape": changed(shape=[3, 1, 1]),
    "no shape": changed(shape=[]),
    "unknown type": changed(dtype="F33"),
    "type of text": changed(dtype=ESCAPES),
    "integers": changed(dtype="I32"),
    "eight bits": lambda c: save({name: t.to(torch.float8_e4m3fn) for name, t in load_bytes(c).items()}),
    "whole numbers": lambda c: save({name: t.to(torch.int32) for name, t in load_bytes(c).items()}),
    "complex": lambda c: save({name: t.to(torch.complex64) for name, t in load_bytes(c).items()}),
    "nothing in them": lambda c: save({name: t[:0] for name, t in load_bytes(c).items() if t.dim()}),
    "one value each": lambda c: save({name: torch.zeros(()) for name in load_bytes(c)}),
    "a million": lambda c: many_tensors(1_000_000),
    "a hundred thousand": lambda c: many_tensors(100_000),
    "twin names": with_twin,
    "odd names": lambda c: save({f"{ESCAPES}{name}": t for name, t in load_bytes(c).items()}),
    "one more": lambda c: save({**load_bytes(c), "../../" + ESCAPES * 100: torch.zeros(1)}),
    "metadata a list": with_metadata([]),
    "metadata of numbers": with_metadata({"format": 1}),
    "metadata of 7 MB": with_metadata({"format": "x" * 7_000_000, ESCAPES: nested(10)}),
    "metadata nested": with_metadata({"format": {"a": [1]}}),
    "random": lambda c: np.random.default_rng(0).bytes(5000),
}
HARMLESS = {"metadata of 7 MB", "twin names"}  # what is never looked at; the same said twice


def many_tensors(n: int) -> bytes:
    return tensor_file({f"{i}": one([], "U8", (i, i + 1)) for i in range(n)}, bytes(n))


LARGE = [what for what in TENSOR_FILES if re.search("million|thousand|MB|of lists|gigabyte", what)]


@pytest.mark.parametrize("what", LARGE)
def test_tensor_files_that_lie_are_refused_within_memory(reader, folder, what):
    good = reader.load(folder)["sum"]
    put(WEIGHTS, TENSOR_FILES[what]((folder / WEIGHTS).read_bytes()))(folder)
    said = reader.load(folder)
    if what in HARMLESS:
        assert said.get("sum") == good, said
    else:
        assert_refused(said)


@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN])
@pytest.mark.parametrize("what", sorted(TENSOR_FILES.keys() - set(LARGE)))
def test_tensor_files_that_lie_are_refused(no_waiting, folder, name, what):
    put(name, TENSOR_FILES[what]((folder / name).read_bytes()))(folder)
    if what in HARMLESS:
        PerturbDiff.from_pretrained(folder)
    else:
        with pytest.raises(ValueError, match=r"safetensors|does not fit|golden") as error:
            PerturbDiff.from_pretrained(folder)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "change",
    [
        {"x_t": torch.zeros(0, 3, 12)}, {"x_t": torch.zeros(2, 0, 12)}, {"x_t": torch.zeros(2, 3, 0)},
        {"x_t": torch.zeros(2, 3, 12, dtype=torch.float64)}, {"x_t": torch.zeros(3, 12)},
        {"control": torch.zeros(2, 100_000, 12)}, {"control": torch.zeros(())}, {"mask": torch.zeros(2, 100_000) > 0},
        {"mask": torch.ones(2, 3)}, {"t": torch.zeros(100_000, dtype=torch.int64)}, {"t": torch.zeros(2)},
        {"perturbation": torch.zeros(2, 100_000, dtype=torch.int64)}, {"perturbation": torch.zeros(2)},
        {"perturbation": torch.full((2, 1), -7)}, {"cell_type": torch.tensor([1 << 62, 0])},
        {"batch": torch.tensor([-(1 << 63), 0])}, {"x0_pred": torch.zeros(2, 3, 12) > 0},
        {"x0_pred": torch.zeros(2, 3, 12).to(torch.float8_e4m3fn)}, {"x0_pred": torch.zeros(2, 3, 12).half()},
        {"x0_pred": torch.full((2, 3, 12), float("inf"))}, {"x_t": torch.full((2, 3, 12), float("nan"))},
        {"x_t": torch.zeros(0, 3, 12), "control": torch.zeros(0, 3, 12), "self_cond": torch.zeros(0, 3, 12),
         "x0_pred": torch.zeros(0, 3, 12), "mask": torch.zeros(0, 3) > 0, "t": torch.zeros(0, dtype=torch.int64)},
    ],
)  # fmt: skip
def test_a_golden_input_of_any_kind_is_run_only_if_it_fits(no_waiting, folder, change):
    save_file({**load_file(folder / GOLDEN), **change}, folder / GOLDEN)
    forge(folder)
    with pytest.raises(ValueError, match="golden") as error:
        PerturbDiff.from_pretrained(folder)
    assert str(error.value).isprintable()


def test_a_terabyte_is_refused_by_its_size_and_never_hashed(folder):
    found = read_folder(folder)
    for name in (WEIGHTS, GOLDEN):
        shutil.copy(folder / name, folder / "before")
        os.truncate(folder / name, TERABYTE)
        with pytest.raises(ValueError, match=rf"{name} has 1,099,511,627,776 bytes"):
            read_verified(folder, name, found.tensor_files[name], max_bytes=1 << 26)
        with pytest.raises(ValueError, match="more than this machine's memory"):
            read_verified(folder, name, found.tensor_files[name], max_bytes=TERABYTE)
        shutil.move(folder / "before", folder / name)
        read_verified(folder, name, found.tensor_files[name], max_bytes=1 << 26)


def test_weights_that_were_loaded_do_not_change_with_their_file(folder):
    model = PerturbDiff.from_pretrained(folder, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(folder) not in maps.read_text()
    for name in (WEIGHTS, GOLDEN):
        with open(folder / name, "r+b") as file:  # in place, as rsync --inplace does
            file.write(bytes(os.path.getsize(folder / name)))
        os.truncate(folder / name, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.denoiser.state_dict().items())


def test_what_is_replaced_after_its_hash_was_checked_is_not_used(folder, monkeypatch):
    """A file system on which each file is another one the second time it is read."""
    seen = set()
    weights = (folder / WEIGHTS).read_bytes()

    def swap(content, *words):
        if bytes(content) == weights:
            seen.add(WEIGHTS)
            (folder / WEIGHTS).write_bytes(b"")
        return digest(content, *words)

    digest = hashlib.sha256
    monkeypatch.setattr("perturbdiff.hub.model_folder.hashlib.sha256", swap)
    assert PerturbDiff._read(find_model(folder), golden_check=True).n_parameters
    assert seen == {WEIGHTS}


@pytest.mark.parametrize("name", ["genes.json", "training.json", CONFIG])
def test_a_terabyte_of_text_is_refused_by_its_size(reader, folder, name):
    os.truncate(folder / name, TERABYTE)
    assert_refused(reader.load(folder), name)


@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN])
def test_a_forged_terabyte_of_tensors_is_refused_soon(reader, folder, name):
    """With a header that agrees with the size."""
    content = tensor_file({"head.bias": one([TERABYTE // 4], offsets=(0, TERABYTE))})
    put(name, content)(folder)
    os.truncate(folder / name, len(content) + TERABYTE)
    assert_refused(reader.ask(load={"path_or_repo_id": str(folder)}, seconds=5), f"{name} has 1,099,511,")


@given(st.data())
@settings(max_examples=120, derandomize=True)
def test_any_bytes_changed_give_the_same_model_or_a_line(saved, tmp_path_factory, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perturbdiff.model.READ_AGAIN", 1)
        patch.setattr("perturbdiff.hub.download.READ_AGAIN", 1)
        patch.setattr("perturbdiff.hub.download.time.sleep", lambda seconds: None)
        folder = shutil.copytree(saved, tmp_path_factory.mktemp("mutated") / "model")
        name = data.draw(st.sampled_from([CONFIG, *JSON_FILES, WEIGHTS, GOLDEN, "README.md"]))
        content = bytearray((folder / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            # Half of the places in the first bytes: in long files those are the header.
            last = len(content) - 1 if data.draw(st.booleans()) else min(len(content) - 1, 400)
            place = data.draw(st.integers(0, last))
            new = data.draw(st.binary(min_size=0, max_size=4) | st.sampled_from(list(b'0123456789[]{}",:-e.')).map(
                lambda byte: bytes([byte])))  # fmt: skip
            content[place : place + data.draw(st.integers(0, 4))] = new
        (folder / name).write_bytes(content)
        forged = data.draw(st.booleans())
        if forged:
            try:
                forge(folder)
            except (ValueError, KeyError, TypeError, AttributeError):  # no forger can, either
                forged = False
        try:
            loaded = PerturbDiff.from_pretrained(folder, device="cpu")
        except (ValueError, OSError) as error:
            refusal = str(error)
        else:
            refusal = "none"
            same = (folder / name).read_bytes() == (saved / name).read_bytes()
            if name == CONFIG:  # its hash is that of what it says
                same = json.loads((folder / name).read_text()) == json.loads((saved / name).read_text())
            assert forged or same or name == "README.md"
            original = PerturbDiff.from_pretrained(saved, device="cpu").denoiser.state_dict()
            if name != WEIGHTS:
                found = loaded.denoiser.state_dict()
                assert all(torch.equal(found[key], tensor) for key, tensor in original.items())
        assert refusal.isprintable()
        shutil.rmtree(folder.parent)
