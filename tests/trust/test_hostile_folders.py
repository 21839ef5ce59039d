"""What lies in a folder besides a model, or in place of its files: never opened, never executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from perturbdiff.hub.model_folder import CONFIG, GOLDEN, JSON_FILES, WEIGHTS, WEIGHTS_INDEX
from perturbdiff.model import PerturbDiff
from tests.localhub.server import Repo
from tests.trust.attacks import ESCAPES, NAME, assert_refused, change_config, forge, put, stating

pytestmark = pytest.mark.slow


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def traps(mark: Path) -> dict[str, bytes]:
    """Files that run code when they are loaded or imported, by the names that other libraries load."""
    pickled, code = pickle.dumps(Trap(mark)), f"import os; os.mkdir({str(mark)!r})\n".encode()
    array = np.lib.format.magic(1, 0) + b"v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + b" " * 60
    names = {
        **dict.fromkeys(
            ["pytorch_model.bin", "model.pkl", "model.ckpt", "optimizer.pt", "training_args.bin", "adapter_model.bin"],
            pickled,
        ),
        **dict.fromkeys(["modeling.py", "__init__.py", "setup.py", "conftest.py", "checks/golden.py"], code),
        "genes.npy": array + b"\n" + pickled,
    }
    return names


def test_pickles_and_code_beside_a_model_are_neither_opened_nor_downloaded(reader, hub, folder, tmp_path):
    expected = reader.load(folder)["sum"]
    mark = tmp_path / "mark"
    for name, content in traps(mark).items():
        (folder / name).write_bytes(content)
    said = reader.load(folder)
    assert said["sum"] == expected, said
    opened = {line.rsplit("/model/")[-1] for line in said["noted"]}
    assert {CONFIG, *JSON_FILES} <= opened  # what is watched is seen
    assert not opened & set(traps(mark))
    hub.models[NAME] = Repo()
    hub.models[NAME].commit(folder)
    said = reader.load(NAME, cache_dir=str(tmp_path / "cache"))
    assert said.get("sum") == expected, said
    own = {CONFIG, *JSON_FILES, WEIGHTS, GOLDEN}
    assert {request.path for request in hub.log if request.operation in ("get", "head")} == own
    pickle.loads(traps(mark)["model.pkl"])  # noqa: S301
    assert mark.is_dir(), "the trap works"


@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN])
def test_a_pickle_in_place_of_tensors_is_not_opened(reader, folder, tmp_path, name):
    put(name, pickle.dumps(Trap(tmp_path / "mark")))(folder)
    assert_refused(reader.load(folder), name)
    torch.save({"head.bias": Trap(tmp_path / "mark")}, folder / name)
    forge(folder)
    assert_refused(reader.load(folder), name)
    assert not (tmp_path / "mark").exists()


HASH_TABLES = {
    **{
        f"states {name!r}": stating(name)
        for name in ("../x.json", "/etc/passwd", "..\\x", "checks/../genes.json", "README.md", "genes.json/", "", ".",
                     "model.pkl", "x.safetensors", "../../x.safetensors", "/dev/zero.safetensors", "GENES.JSON",
                     "genes.json\n", f"{ESCAPES}.json", "a" * 100_000, "config.json\0", "model.bin",
                     "model-00001-of-00002.safetensors", "model-\u0660\u0660\u0660\u0660\u0661-of-00001.safetensors",
                     "model-00000-of-00000.safetensors", "features.safetensors/../model.safetensors", WEIGHTS_INDEX)
    },
    "no table": change_config(lambda config: config.pop("sha256") and config.update(sha256={})),
    "an empty name": stating("genes.json", digest=""),
    "upper case": change_config(lambda config: config["sha256"].update({WEIGHTS: config["sha256"][WEIGHTS].upper()})),
    "a short digest": stating("genes.json", digest="0" * 63),
    "a digest and a line": stating("genes.json", digest="0" * 64 + "\n"),
    "a number": stating("genes.json", digest=int("1" * 64)),
    "nothing": stating("genes.json", digest=None),
    "a list": stating("genes.json", digest=["0" * 64]),
    "wrong": stating("genes.json", digest="0" * 64),
    "shards without the second": stating("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"),
    "a hundred thousand shards": stating(*(f"model-{i:05}-of-100000.safetensors" for i in range(1, 100_001))),
    "shards as many as fit": stating(*(f"model-{i:05}-of-09999.safetensors" for i in range(1, 10_000))),
    "evaluation that is not there": stating("evaluation.json"),
    "features that are not there": stating("features.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", HASH_TABLES)
def test_only_the_files_of_a_model_may_be_stated(no_waiting, folder, name):
    HASH_TABLES[name](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=r"config\.json|sha256|lacks") as error:
        PerturbDiff.from_pretrained(folder)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 2000


def test_the_table_itself_may_be_nothing_else(no_waiting, folder):
    config = json.loads((folder / CONFIG).read_text())
    for table in (None, [], "x", 1, {CONFIG: 1}, [["genes.json", "0" * 64]]):
        (folder / CONFIG).write_text(json.dumps({**config, "sha256": table}))
        with pytest.raises(ValueError, match="sha256 must"):
            PerturbDiff.from_pretrained(folder)


def link_to(target: Callable[[Path], str | Path]) -> Callable[[Path], None]:
    def attack(path: Path) -> None:
        path.unlink()
        path.symlink_to(target(path))

    return attack


def as_device(path: Path) -> None:
    path.unlink()
    try:
        os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero
    except OSError:
        pytest.skip("devices are made by root alone")


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


IN_PLACE = {
    "a link to itself": link_to(lambda path: path.name),
    "a link to nothing": link_to(lambda path: "nothing"),
    "a link to a device": link_to(lambda path: "/dev/zero"),
    "a link to a secret": link_to(lambda path: "/etc/passwd"),
    "a link through /proc": link_to(lambda path: "/proc/self/environ"),
    "a link to the folder": link_to(lambda path: "."),
    "a device": as_device,
    "a pipe": as_pipe,
    "a folder": as_folder,
}


@pytest.mark.parametrize("name", [*JSON_FILES, CONFIG, WEIGHTS, GOLDEN])
def test_what_is_no_file_within_the_folder_is_refused(no_waiting, saved, tmp_path, name):
    for what, attack in IN_PLACE.items():
        folder = shutil.copytree(saved, tmp_path / what)
        attack(folder / name)
        with pytest.raises((ValueError, OSError)) as error:
            PerturbDiff.from_pretrained(folder)
        assert str(error.value).isprintable(), what
        assert "root:" not in str(error.value)


def test_a_card_is_never_looked_at(reader, hub, saved, folder, tmp_path):
    card, n_values = folder / "README.md", reader.load(saved)["sum"]
    for what, attack in IN_PLACE.items():
        copy = shutil.copytree(saved, tmp_path / what)
        attack(copy / "README.md")
        assert reader.load(copy).get("sum") == n_values, what
    card.unlink()
    assert reader.load(folder)["sum"] == n_values
    for content in (b"", b"# Mine", b"---\na: &a [*a", b"\xff\xfe<script>alert(1)</script>\x1b[2J", bytes(100_000_000)):
        card.write_bytes(content)
        said = reader.load(folder)
        assert said["sum"] == n_values
        assert not [line for line in said["noted"] if line.endswith("README.md")]
        assert reader.ask(command=["hub", "verify", str(folder)])["type"] == "done"
    hub.models[NAME] = Repo()
    hub.models[NAME].commit(folder)  # with the last of them
    assert reader.load(NAME, cache_dir=str(tmp_path / "cache"))["sum"] == n_values
    assert "README.md" not in {request.path for request in hub.log}


def test_the_folder_may_be_a_link_and_a_name_like_the_caches_opens_no_more_than_a_repo(no_waiting, saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    assert PerturbDiff.from_pretrained(tmp_path / "link").genes.names[0] == "GENE0"
    secret = tmp_path / "secret.json"
    shutil.copy(saved / "genes.json", secret)
    folder = shutil.copytree(saved, tmp_path / "models--lab--x" / "snapshots" / "y")
    for inside_of, target in ((False, secret), (True, tmp_path / "models--lab--x" / "blobs" / "genes")):
        (folder / "genes.json").unlink()
        target.parent.mkdir(exist_ok=True)
        shutil.copy(saved / "genes.json", target)
        (folder / "genes.json").symlink_to(target)
        if inside_of:
            PerturbDiff.from_pretrained(folder)
        else:
            with pytest.raises(ValueError, match="leads out of the folder"):
                PerturbDiff.from_pretrained(folder)


def test_shards_hold_each_tensor_once_and_features_only_if_there_are_any(no_waiting, cut, folder, tmp_path):
    copy = shutil.copytree(cut, tmp_path / "cut")
    shards = sorted(path.name for path in copy.glob("model-*.safetensors"))
    PerturbDiff.from_pretrained(copy)
    (copy / shards[1]).rename(copy / "away")
    with pytest.raises(FileNotFoundError, match=shards[1]):
        PerturbDiff.from_pretrained(copy)
    (copy / "away").rename(copy / shards[1])
    first, second = load_file(copy / shards[0]), load_file(copy / shards[1])
    name = sorted(first)[0]
    save_file({**second, name: first[name]}, copy / shards[1])
    forge(copy)
    with pytest.raises(ValueError, match=rf"tensor {name} is in {shards[0]} and in {shards[1]}"):
        PerturbDiff.from_pretrained(copy)
    weights = load_file(folder / WEIGHTS)
    for extra, match in (("head.bias", "is in"), ("x.features", r"unexpected x\.features"), (ESCAPES, "unexpected")):
        save_file({extra: torch.zeros(12)}, folder / "features.safetensors")
        forge(folder, lambda config: config["sha256"].update({"features.safetensors": "0" * 64}))
        forge(folder)
        with pytest.raises(ValueError, match=match) as error:
            PerturbDiff.from_pretrained(folder)
        assert str(error.value).isprintable()
    assert "x.features" not in weights
