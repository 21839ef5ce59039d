"""A part of the attack, small enough for every run of the suite; the rest by hand (python -m tests.attack.fuzz)."""

from __future__ import annotations

from random import Random

import pytest

from tests.attack.fuzz import one, run
from tests.attack.mutate import VALUES, changed_json
from tests.attack.readers import READERS, Reader, write_seeds
from tests.screens import ROOT

pytestmark = pytest.mark.slow

INPUTS = {
    "json": 3000, "tensors": 500, "adapter": 500, "published": 300, "cards": 500, "run": 400, "registry": 1000,
    "splits": 500, "recipe": 300, "requests": 1500, "features": 800, "atlas": 500, "parquet": 500, "hdf5": 500,
}  # fmt: skip


def test_no_changed_file_is_believed_and_none_leaks_hangs_or_grows(tmp_path):
    write_seeds(tmp_path)
    found = run(tmp_path, [(name, 0, n) for name, n in INPUTS.items()])
    assert {name: of.wrong for name, of in found.items() if of.wrong} == {}
    assert {name: sum(of.counts.values()) for name, of in found.items()} == INPUTS
    assert all(of.counts["refused"] > 10 for of in found.values())
    assert all(of.counts["read"] > 10 for of in found.values())


@pytest.mark.parametrize("name", READERS)
def test_an_input_is_told_by_its_number_and_its_files_are_as_before(tmp_path, name):
    write_seeds(tmp_path, name)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    first = [one(name, tmp_path / name, i) for i in range(3)]
    assert first == [one(name, tmp_path / name, i) for i in range(3)]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_change_leaves_no_trace_in_the_next(tmp_path):
    before = repr(VALUES)
    for i in range(2000):
        changed_json(Random(i), '{"a": [1, {"b": 2}], "c": "d"}')
    assert repr(VALUES) == before


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "memory"),
        (ValueError("Unable to allocate 9 TB for an array"), "memory"),
        (KeyError("x"), "unclear"),
        (TypeError("a list has no keys"), "TypeError"),
        (AssertionError("a wrong file was accepted"), "AssertionError"),
        (ValueError("x.json is not valid JSON; get it again."), "refused"),
    ],
)
def test_what_a_reader_raises_is_told_apart(tmp_path, monkeypatch, error, kind):
    def read(folder, random, before):
        assert (folder / "x").read_text() == "1"
        raise error

    (tmp_path / "x").write_text("0")
    monkeypatch.setitem(READERS, "own", Reader(lambda folder: None, lambda folder, random: {"x": b"1"}, read))
    assert one("own", tmp_path, 0)[0] == kind
    assert (tmp_path / "x").read_text() == "0"


def test_after_a_process_that_ended_the_next_inputs_are_read(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("""
import signal
from random import Random
from tests.attack.readers import READERS, Reader
ends = {Random(f"own {i}").random(): end for i, end in ((1, signal.SIGABRT), (3, signal.SIGPROF))}
def read(folder, random, before):
    if (end := ends.get(random.random())) is not None:
        signal.raise_signal(end)
READERS["own"] = Reader(None, lambda folder, random: {}, read)
""")
    (tmp_path / "own").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    found = run(tmp_path, [("own", 0, 6)])["own"]
    assert [(wrong["i"], wrong["wrong"]) for wrong in found.wrong] == [(1, "signal 6"), (3, "time")]
    assert found.counts == {"read": 4, "signal 6": 1, "time": 1}
