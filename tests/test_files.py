import json
import re
from dataclasses import dataclass
from typing import Any, Literal, Optional

import pytest

from perturbdiff import files
from perturbdiff.files import hanging, progress, replace_folder, restore_folder, typed, write_json


@dataclass
class Inner:
    a: int
    b: Optional[float]

    def __post_init__(self) -> None:
        if self.a > 9:
            raise ValueError(f"a ({self.a}) is more than 9\x1b")


@dataclass
class Outer:
    inner: tuple[Inner, ...]
    word: Literal["x", "y"]
    text: str | None
    flags: dict[str, bool]
    free: Any


GOOD = {"inner": [{"a": 1, "b": 2}, {"a": 9, "b": None}], "word": "x", "text": None, "flags": {"f": True}, "free": [1]}


def test_json_becomes_the_dataclass_that_it_says():
    found = typed(Outer, GOOD, "it")
    assert found == Outer((Inner(1, 2.0), Inner(9, None)), "x", None, {"f": True}, [1])
    assert type(found.inner[0].b) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "it lacks nothing and has unknown keys more."),
        ({"word": "z"}, "it.word (z) must be one of x, y."),
        ({"word": ["x"]}, "it.word (['x']) must be one of x, y."),
        ({"text": 3}, "it.text (3) must be a text."),
        ({"flags": {"f": 1}}, "it.flags.f (1) must be true or false."),
        ({"flags": []}, "it.flags ([]) must be a JSON object."),
        ({"inner": {}}, "it.inner ({}) must be a list."),
        ({"inner": [5]}, "it.inner[0] (5) must be a JSON object."),
        ({"inner": [{"a": 1}]}, "it.inner[0] lacks b and has unknown keys nothing."),
        ({"inner": [{"a": -1, "b": 0}]}, "it.inner[0].a (-1) must be a whole number, not negative."),
        ({"inner": [{"a": 1.0, "b": 0}]}, "it.inner[0].a (1.0) must be a whole number, not negative."),
        ({"inner": [{"a": True, "b": 0}]}, "it.inner[0].a (True) must be a whole number, not negative."),
        ({"inner": [{"a": 1, "b": False}]}, "it.inner[0].b (False) must be a number."),
        ({"inner": [{"a": 10, "b": 0}]}, "it.inner[0]: a (10) is more than 9\\x1b"),
    ],
)
def test_a_value_of_another_kind_is_never_made_to_fit(change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        typed(Outer, {**GOOD, **change}, "it")
    assert str(error.value) == message


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_json(path, {"a": "\ud800"})  # fails while the file is being written
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_long_lines_hang_below_their_first_word():
    text = hanging("name          " + "word " * 30 + "\n\nb", 14)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:14].strip() for line in lines] == ["name", "", "", "", "b"]
    assert " ".join(text.split()) == "name " + "word " * 30 + "b"


@pytest.mark.parametrize(("what", "unit"), [("verify " + "x" * 90, "cell"), ("train", "step")])
def test_a_bar_keeps_its_bar_at_80_columns(what, unit):
    with progress(100_000, what, unit, shown=True) as bar:
        bar.n, bar.ncols = 50_000, 80
        bar.set_postfix_str("" if unit == "cell" else "loss 0.0211 12,319 cells/s", refresh=False)
        text = str(bar)
    assert len(text) <= 80
    assert len(text.split("|")[1]) >= 5


def folder_of(path, text):
    path.mkdir()
    (path / "file").write_text(text)
    return path


def unremovable(path):
    raise OSError(39, "Directory not empty")


def test_a_folder_is_replaced_though_the_old_one_cannot_be_removed_and_goes_the_next_time(tmp_path, monkeypatch):
    final = folder_of(tmp_path / "model", "1")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", unremovable)
        with pytest.warns(UserWarning, match=r"-old-.* no longer needed but could not be removed"):
            replace_folder(folder_of(tmp_path / "new", "2"), final)
    assert (final / "file").read_text() == "2"
    assert len(list(tmp_path.iterdir())) == 2
    replace_folder(folder_of(tmp_path / "new", "3"), final)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (final / "file").read_text() == "3"


def test_a_folder_that_a_kill_left_under_no_name_is_put_back(tmp_path):
    final = folder_of(tmp_path / "model", "1")
    files.set_aside(final)
    assert not final.exists()
    restore_folder(final)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (final / "file").read_text() == "1"
    files.set_aside(final)
    folder_of(final, "2")  # somebody wrote a new one
    restore_folder(final)
    assert (final / "file").read_text() == "2"


def test_a_folder_that_cannot_be_replaced_is_as_it_was(tmp_path, monkeypatch):
    final, new, rename = folder_of(tmp_path / "model", "1"), folder_of(tmp_path / "new", "2"), files.Path.rename

    def refused(path, target):
        if path == new:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(files.Path, "rename", refused)
    with pytest.raises(OSError, match="Input/output error"):
        replace_folder(new, final)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
    assert (final / "file").read_text() == "1"


def test_what_is_read_is_not_written_over(tmp_path):
    screen, link, new = tmp_path / "s.h5ad", tmp_path / "link.h5ad", tmp_path / "new.h5ad"
    screen.write_text("cells")
    link.symlink_to(screen)
    files.refuse_inputs([new, None], [screen, None])
    for out in (screen, link):
        with pytest.raises(FileExistsError, match="is an input"):
            files.refuse_inputs([new, out], [None, screen])
