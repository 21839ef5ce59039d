"""Repos and servers of strangers: nothing is fetched or written but the model's own files, in the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

from perturbdiff.hub.model_folder import CONFIG, GOLDEN, WEIGHTS
from tests.localhub.server import Fault, LocalHub, Repo
from tests.trust.attacks import NAME, assert_refused, load_bytes

pytestmark = pytest.mark.slow


@pytest.fixture
def repo(hub: LocalHub, folder: Path) -> Repo:
    hub.models[NAME] = Repo()
    hub.models[NAME].commit(folder)
    return hub.models[NAME]


def tree_of(path: Path) -> set[str]:
    return {str(inner.relative_to(path)) for inner in path.rglob("*")}


def test_files_that_lead_out_of_a_repo_are_not_asked_for(reader, hub, repo, tmp_path):
    files = next(iter(repo.commits.values()))
    names = ["../../x", "../config.json", "/etc/x", "a\nb.json", "genes.json\n", "\u202e.json", "checks/../genes.json"]
    files |= dict.fromkeys(names, b"hostile")
    said = reader.load(NAME, cache_dir=str(tmp_path / "cache"))
    assert said["type"] == "done", said
    assert not {request.path for request in hub.log} & set(names)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "model"}


@pytest.mark.parametrize("size", [10**15, 10**30])
def test_weights_larger_than_the_settings_allow_are_not_downloaded(reader, hub, repo, tmp_path, size):
    repo.sizes[WEIGHTS] = size
    assert_refused(reader.load(NAME, cache_dir=str(tmp_path / "cache")), "nothing was downloaded")
    assert hub.gets(CONFIG)
    assert not hub.gets(WEIGHTS)
    assert not hub.gets(GOLDEN)


@pytest.mark.parametrize("name", [CONFIG, "genes.json"])
def test_small_files_that_are_large_are_not_downloaded(reader, hub, repo, tmp_path, name):
    repo.sizes[name] = 10**12
    assert_refused(reader.load(NAME, cache_dir=str(tmp_path / "cache")), name)
    assert not hub.gets(name)


@pytest.mark.parametrize("size", [0, -1, -(10**15), 5])
@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN, "genes.json"])
def test_sizes_that_are_wrong_end_in_a_line(reader, hub, repo, tmp_path, size, name):
    repo.sizes[name] = size
    said = reader.load(NAME, cache_dir=str(tmp_path / "cache"))
    assert said["type"] == "done" or said["mild"], said
    if "text" in said:
        assert_refused(said)


def test_a_negative_size_does_not_make_room_for_another(reader, hub, repo, tmp_path):
    repo.sizes |= {WEIGHTS: 10**15, GOLDEN: -(10**15)}
    assert_refused(reader.load(NAME, cache_dir=str(tmp_path / "cache")))
    assert not hub.gets(WEIGHTS)


@pytest.mark.parametrize(
    "sha",
    [
        "../../../../outside",
        "/absolute/outside",
        "",
        "main",
        "a" * 39,
        "A" * 40,
        "0" * 40 + "\n",
    ],
)
def test_a_commit_that_is_no_hash_is_refused_and_writes_nothing_elsewhere(reader, hub, repo, tmp_path, sha):
    cache = tmp_path / "deep" / "down" / "cache"
    (files,) = repo.commits.values()
    repo.commits[sha] = files
    repo.branches["main"] = sha or repo.branches["main"]
    answer = {"id": NAME, "sha": sha, "siblings": [{"rfilename": name, "size": len(files[name])} for name in files]}
    hub.faults["info", NAME] = Fault(content=json.dumps(answer).encode())
    said = reader.load(NAME, cache_dir=str(cache))
    assert said["type"] == "done" or said["mild"], said
    written = {path for path in tree_of(tmp_path) if not path.startswith(("model", "deep/down/cache"))}
    assert written <= {"deep", "deep/down"}
    assert not Path("/absolute/outside").exists()


class Unread(Repo):
    """A repo whose card the server does not read."""

    def info(self, name: str, sha: str, blobs: bool) -> dict[str, Any]:
        return {"id": name, "sha": sha, "siblings": [{"rfilename": n, "size": len(self.commits[sha][n])}
                                                     for n in self.commits[sha]]}  # fmt: skip


class Lying(Repo):
    """A repo whose files have hashes that are paths."""

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {**super().entry(path, content), "oid": "../../../outside"}
        return {key: value for key, value in entry.items() if key != "lfs"}


def test_a_hash_that_is_a_path_writes_nothing_elsewhere(reader, hub, repo, tmp_path):
    cache = tmp_path / "deep" / "down" / "cache"
    hub.models[NAME] = Lying(commits=repo.commits, branches=repo.branches)
    reader.load(NAME, cache_dir=str(cache))
    written = {path for path in tree_of(tmp_path) if not path.startswith(("model", "deep/down/cache"))}
    assert written <= {"deep", "deep/down"}


@pytest.mark.parametrize("operation", ["info", "tree"])
@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b"1", b'"x"', b"\xff", b"[" * 100_000, b'[{"type": "file"}]', b"[1]"]
)
def test_answers_that_make_no_sense_end_in_a_line(reader, hub, repo, tmp_path, operation, content):
    hub.faults[operation, NAME] = Fault(content=content)
    said = reader.load(NAME, cache_dir=str(tmp_path / "cache"))
    assert_refused(said)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        (CONFIG, "file:///etc/passwd"),
        (WEIGHTS, "file:///etc/passwd"),
        (WEIGHTS, "ftp://127.0.0.1/x"),
        (CONFIG, "javascript:alert(1)"),
        (WEIGHTS, "//"),
    ],
)
def test_a_file_that_leads_to_no_web_address_ends_in_a_line(reader, hub, repo, tmp_path, address, name):
    hub.faults[name] = Fault(location=address)
    said = reader.load(NAME, cache_dir=str(tmp_path / "cache"))
    assert_refused(said)
    assert "root:" not in said["text"]


def test_a_file_that_leads_to_another_host_must_still_have_its_hash(reader, hub, repo, tmp_path):
    with LocalHub() as elsewhere:
        elsewhere.models[NAME] = Repo()
        elsewhere.models[NAME].add({"genes.json": b'{"names": ["away"], "ensembl": []}'})
        address = f"{elsewhere.url}/{NAME}/resolve/main/genes.json"
        hub.faults |= {"genes.json": Fault(location=address), ("head", "genes.json"): Fault(location=address)}
        said = reader.load(NAME, cache_dir=str(tmp_path / "cache"))
        assert_refused(said, "genes.json")
        assert {request.token for request in elsewhere.log} <= {None}


def test_a_branch_that_moves_while_it_is_read_gives_one_commit(reader, hub, repo, saved, tmp_path):
    """Small files of one commit and weights of another are never put together, whatever the branch means meanwhile."""
    good = reader.load(saved)["sum"]
    files = dict(repo.commits[repo.branches["main"]])
    weights = {name: tensor + 1 for name, tensor in load_bytes(files[WEIGHTS]).items()}
    hub.faults[WEIGHTS] = Fault(content=save(weights))
    said = reader.load(NAME, cache_dir=str(tmp_path / "other"))
    assert_refused(said)
    del hub.faults[WEIGHTS]
    first = repo.branches["main"]
    repo.add({**files, WEIGHTS: save(weights)})
    assert reader.load(NAME, revision=first, cache_dir=str(tmp_path / "cache"))["sum"] == good
