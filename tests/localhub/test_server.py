"""The local Hub answers the unmodified client as the real one does, and goes wrong as it is told to."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.localhub.server import SIGNATURE, USER, Fault, LocalHub, Repo
from tests.processes import PATIENCE

# The client passes file objects in a way that its own HTTP library warns about.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")]

WRITE, READ = "hf_MayWrite", "hf_MayRead"
NAME = f"{USER}/thing"
CARD = "---\nlibrary_name: perturbdiff\ntags: [rna]\nlicense: mit\ndatasets: [lab/atlas]\n---\n# A thing\n"
FILES = {
    "README.md": CARD.encode(),
    "config.json": b"{}",
    "empty.npz": b"",
    "model.safetensors": random.Random(0).randbytes(300_000),
    "sub/folder/genes.json": b"[1]",
    "sub/shard.parquet": random.Random(1).randbytes(5_000),
}
LARGE = ("model.safetensors", "sub/shard.parquet")
PUSH = ["create", "validate", "validate", "preupload", "batch", "put", "verify", "put", "verify", "commit"]


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client of this process without Xet, with connections of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(write_token=WRITE, redirects=True) as hub:
        yield hub


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=WRITE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "folder", FILES)


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".gitattributes"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def raw(url: str, method: str, path: str, body: bytes = b"", token: str | None = WRITE) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request without the client."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    try:
        connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else {}
    finally:
        connection.close()


def status_of(call: Callable[..., object], *arguments: object, **named: object) -> tuple[int, str | None]:
    """What the client was refused with."""
    with pytest.raises(HfHubHTTPError) as error:
        call(*arguments, **named)
    return error.value.response.status_code, error.value.response.headers.get("X-Error-Code")


# ---------------------------------------------------------------- pushed and read


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file:UserWarning")
def test_what_is_pushed_comes_back_at_its_branch_tag_and_commit(hub, api, folder, tmp_path, kind):
    repo = {"repo_id": NAME, "repo_type": kind}
    assert api.create_repo(**repo, private=True).repo_id == NAME
    first = api.upload_folder(folder_path=folder, **repo, commit_message="first").oid
    assert sorted(hub.operations()) == sorted(PUSH)
    assert hub.operations()[-1] == "commit"
    puts = [request for request in hub.log if request.operation == "put"]
    assert {(put.server, put.token, put.status) for put in puts} == {("cdn", None, 200)}

    api.create_tag(**repo, tag="v1")
    changed = {path: content for path, content in FILES.items() if path != "sub/folder/genes.json"}
    changed["config.json"] = b'{"b": 1}'
    folder = written(tmp_path / "changed", changed)
    second = api.upload_folder(folder_path=folder, **repo, parent_commit=first, delete_patterns="*").oid
    assert hub.operations().count("put") == 2  # what the repo has is not sent again
    assert status_of(api.upload_file, path_or_fileobj=b"3", path_in_repo="c", **repo, parent_commit=first)[0] == 412

    where = {"endpoint": hub.url, "token": WRITE, "cache_dir": tmp_path / "cache"}
    for revision, expected in {"v1": FILES, first: FILES, "main": changed, second: changed}.items():
        assert read(snapshot_download(**repo, revision=revision, **where)) == expected
    assert read(snapshot_download(**repo, **where)) == changed
    assert {(r.server, r.token) for r in hub.gets("model.safetensors")} == {("cdn", None)}
    assert {(r.server, r.token) for r in hub.gets("config.json")} == {("hub", WRITE)}
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(**repo, revision="v2", **where)

    commits = api.list_repo_commits(**repo)
    assert [commit.commit_id for commit in commits][:2] == [second, first]
    assert [commit.title for commit in commits][1:] == ["first", "initial commit"]


def test_a_push_without_changes_is_no_commit(hub, api, folder):
    api.create_repo(NAME)
    first = api.upload_folder(folder_path=folder, repo_id=NAME, allow_patterns=["*.json", "*.safetensors"])
    hub.log.clear()
    again = api.upload_folder(folder_path=folder, repo_id=NAME, allow_patterns=["*.json", "*.safetensors"])
    assert hub.operations() == ["preupload", "batch", "info"]
    assert again.oid == first.oid == hub.models[NAME].branches["main"]


def test_a_larger_file_than_10_mib_is_large_whatever_its_name(hub, api, tmp_path):
    folder = written(tmp_path / "folder", {"at.bin": bytes(10 * 2**20), "above.bin": bytes(10 * 2**20 + 1)})
    api.create_repo(NAME)
    api.upload_folder(folder_path=folder, repo_id=NAME)
    assert {s.rfilename: s.lfs is not None for s in api.model_info(NAME, files_metadata=True).siblings} == {
        ".gitattributes": False,
        "at.bin": False,
        "above.bin": True,
    }


def test_branches_and_tags_are_made_listed_and_removed(hub, api):
    api.create_repo(NAME)
    start = api.model_info(NAME).sha
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a/b.txt", repo_id=NAME)
    api.create_branch(NAME, branch="try/one", revision=start)
    api.create_branch(NAME, branch="try/one", exist_ok=True)
    assert status_of(api.create_branch, NAME, branch="try/one") == (409, None)
    tried = api.upload_file(path_or_fileobj=b"2", path_in_repo="c.txt", repo_id=NAME, revision="try/one").oid
    api.create_tag(NAME, tag="v1", revision="try/one")
    api.create_tag(NAME, tag="v1", exist_ok=True)
    assert status_of(api.create_tag, NAME, tag="v1") == (409, None)
    assert status_of(api.create_tag, NAME, tag="v2", revision="no") == (404, "RevisionNotFound")
    refs = api.list_repo_refs(NAME)
    main = api.model_info(NAME).sha
    assert {(ref.ref, ref.target_commit) for ref in [*refs.branches, *refs.tags]} == {
        ("refs/heads/main", main),
        ("refs/heads/try/one", tried),
        ("refs/tags/v1", tried),
    }
    assert set(api.list_repo_files(NAME, revision="v1")) == {".gitattributes", "c.txt"}
    assert set(api.list_repo_files(NAME)) == {".gitattributes", "a/b.txt"}

    api.delete_tag(NAME, tag="v1")
    assert status_of(api.delete_tag, NAME, tag="v1") == (404, "RevisionNotFound")
    api.delete_branch(NAME, branch="try/one")
    refs = api.list_repo_refs(NAME)
    assert [ref.name for ref in [*refs.branches, *refs.tags]] == ["main"]
    api.delete_folder("a", NAME)
    assert api.list_repo_files(NAME) == [".gitattributes"]
    assert status_of(api.delete_file, "a/b.txt", NAME) == (404, "EntryNotFound")
    api.delete_repo(NAME)
    assert status_of(api.model_info, NAME) == (404, "RepoNotFound")
    api.delete_repo(NAME, missing_ok=True)


def test_files_are_listed_with_sizes_and_hashes(hub, api, folder, tmp_path):
    hub.models[NAME] = Repo()
    sha = hub.models[NAME].commit(folder)
    info = api.model_info(NAME, files_metadata=True)
    assert info.sha == sha
    assert {s.rfilename: s.size for s in info.siblings} == {path: len(content) for path, content in FILES.items()}
    large = {s.rfilename: (s.lfs.size, s.lfs.sha256) for s in info.siblings if s.lfs}
    assert large == {path: (len(FILES[path]), hashlib.sha256(FILES[path]).hexdigest()) for path in LARGE}
    assert all(s.size is None for s in api.model_info(NAME).siblings)

    (config,) = api.get_paths_info(NAME, ["config.json"])
    assert config.blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # of git hash-object
    assert {entry.path for entry in api.list_repo_tree(NAME)} == {p for p in FILES if "/" not in p} | {"sub"}
    assert {entry.path for entry in api.list_repo_tree(NAME, "sub")} == {"sub/folder", "sub/shard.parquet"}
    everything = set(FILES) | {"sub", "sub/folder"}
    assert {entry.path for entry in api.list_repo_tree(NAME, recursive=True)} == everything
    assert {entry.path for entry in api.get_paths_info(NAME, ["sub", "none"])} == {"sub"}
    assert status_of(lambda: list(api.list_repo_tree(NAME, "su"))) == (404, "EntryNotFound")

    assert api.file_exists(NAME, "sub/shard.parquet")
    assert not api.file_exists(NAME, "sub")
    for path in ("config.json", "model.safetensors"):
        local = hf_hub_download(NAME, path, endpoint=hub.url, token=WRITE, cache_dir=tmp_path / "cache")
        assert Path(local).read_bytes() == FILES[path]


def test_repos_are_found_by_author_words_and_the_tags_of_their_cards(hub, api, tmp_path):
    cards = {"lab/one": CARD, "lab/two": "no card\n", "other/three": CARD.replace("[rna]", "[atac]")}
    for repos in (hub.models, hub.datasets):
        for name, card in cards.items():
            repos[name] = Repo(private=name == "lab/two")
            repos[name].add({"README.md": card.encode()})
    for found in (api.list_models, api.list_datasets):

        def names(found=found, **asked: object) -> list[str]:
            return [info.id for info in found(**asked)]

        assert names() == ["lab/one", "lab/two", "other/three"]
        assert names(token=False) == ["lab/one", "other/three"]
        assert names(author="lab") == ["lab/one", "lab/two"]
        assert names(search="T") == ["lab/two", "other/three"]
        assert names(filter="perturbdiff") == ["lab/one", "other/three"]
        assert names(filter=["perturbdiff", "rna"]) == ["lab/one"]
        assert names(limit=1) == ["lab/one"]
        assert names(author="nobody") == []
    (info,) = api.list_models(filter="rna", cardData=True)
    assert info.library_name == "perturbdiff"
    assert set(info.tags) == {"perturbdiff", "rna", "license:mit", "dataset:lab/atlas"}
    assert info.card_data.license == "mit"
    (info,) = api.list_datasets(filter="rna", full=True)
    assert [sibling.rfilename for sibling in info.siblings] == ["README.md"]
    assert api.model_info("lab/two").card_data in (None, {})


def test_a_card_whose_head_is_not_yaml_is_refused(hub, api):
    api.create_repo(NAME)
    for head in ("a: [", "- a", "just words"):
        with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
            api.upload_file(path_or_fileobj=f"---\n{head}\n---\n".encode(), path_in_repo="README.md", repo_id=NAME)
    api.upload_file(path_or_fileobj=b"no head", path_in_repo="README.md", repo_id=NAME)
    assert hub.operations().count("commit") == 1


LOAD = """
import sys
from datasets import load_dataset
rows = load_dataset(sys.argv[1], split="train", streaming=True)
print(sorted(row["x"] for row in rows))
"""


@pytest.mark.parametrize("redirects", [True, False])
def test_a_pushed_data_set_is_streamed_by_its_id(tmp_path, redirects):
    folder = tmp_path / "folder"
    written(folder, {"README.md": b"---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n"})
    (folder / "data").mkdir()
    for i in range(2):
        pq.write_table(pa.table({"x": [10 * i, 10 * i + 1]}), folder / f"data/rows-{i}.parquet")
    with LocalHub(write_token=WRITE, redirects=redirects) as hub:
        api = HfApi(endpoint=hub.url, token=WRITE)
        api.create_repo(NAME, repo_type="dataset", private=True)
        api.upload_folder(folder_path=folder, repo_id=NAME, repo_type="dataset")
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITE}
        environment = os.environ | own | {"HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", LOAD, NAME], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "[0, 1, 10, 11]\n"
        assert {request.server for request in hub.gets("data/rows-1.parquet")} == {"cdn" if redirects else "hub"}


# ---------------------------------------------------------------- who may


def test_reading_may_be_public_while_writing_needs_the_token(hub, api):
    anonymous = HfApi(endpoint=hub.url, token=False)
    wrong = HfApi(endpoint=hub.url, token="hf_wrong")
    for name in ("lab/public", "lab/private"):
        api.create_repo(name, private=name == "lab/private")
    assert anonymous.model_info("lab/public").id == "lab/public"
    assert status_of(anonymous.model_info, "lab/private") == (401, "RepoNotFound")
    assert status_of(anonymous.model_info, "lab/nothing") == (401, "RepoNotFound")
    assert status_of(wrong.model_info, "lab/public") == (401, None)
    assert status_of(anonymous.create_repo, "lab/new") == (401, None)
    assert status_of(anonymous.create_tag, "lab/public", tag="v1") == (401, "RepoNotFound")
    assert status_of(wrong.whoami)[0] == 401
    assert api.whoami()["name"] == USER
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("lab/private", ".gitattributes", endpoint=hub.url, token=False)


def test_a_token_for_reading_does_not_write():
    with LocalHub(token=READ, write_token=WRITE) as hub:
        writer, reader = (HfApi(endpoint=hub.url, token=token) for token in (WRITE, READ))
        anonymous = HfApi(endpoint=hub.url, token=False)
        writer.create_repo(NAME, private=True)
        assert reader.model_info(NAME).private
        assert [info.id for info in reader.list_models()] == [NAME]
        assert status_of(anonymous.model_info, NAME) == (401, "RepoNotFound")
        assert status_of(lambda: list(anonymous.list_models())) == (401, None)
        assert status_of(reader.create_repo, "lab/new") == (403, None)
        assert status_of(reader.upload_file, path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME) == (403, None)
        assert status_of(reader.create_tag, NAME, tag="v1") == (403, None)
        assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
        assert list(hub.models[NAME].commits) == [hub.models[NAME].branches["main"]]


def test_one_token_does_for_both_and_none_for_an_open_hub():
    for token in (WRITE, None):
        with LocalHub(token=token) as hub:
            api = HfApi(endpoint=hub.url, token=token or False)
            api.create_repo(NAME, private=True)
            api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME)
            assert "a" in api.list_repo_files(NAME)


# ---------------------------------------------------------------- what the server checks


def test_only_announced_content_with_its_own_hash_is_stored(hub, api):
    api.create_repo(NAME)
    content = b"large"
    oid = hashlib.sha256(content).hexdigest()
    batch = json.dumps({"objects": [{"oid": oid, "size": len(content)}]}).encode()
    put = f"/lfs/models/{NAME}/{oid}?{SIGNATURE}"
    assert raw(hub.cdn_url, "PUT", put, content)[0] == 400  # never announced
    status, answer = raw(hub.url, "POST", f"/{NAME}.git/info/lfs/objects/batch", batch)
    assert (status, answer["objects"][0]["actions"]["upload"]["href"]) == (200, hub.cdn_url + put)
    assert raw(hub.cdn_url, "PUT", put, b"other")[0] == 400
    assert raw(hub.cdn_url, "PUT", put, b"larger")[0] == 400
    assert raw(hub.cdn_url, "PUT", put.split("?")[0], content)[0] == 403
    verify = json.dumps({"oid": oid, "size": len(content)}).encode()
    assert raw(hub.url, "POST", f"/{NAME}.git/info/lfs/verify", verify)[0] == 404
    assert oid not in hub.models[NAME].stored
    assert raw(hub.cdn_url, "PUT", put, content, token=None)[0] == 200
    assert raw(hub.url, "POST", f"/{NAME}.git/info/lfs/verify", verify)[0] == 200
    status, answer = raw(hub.url, "POST", f"/{NAME}.git/info/lfs/objects/batch", batch)
    assert "actions" not in answer["objects"][0]


def test_a_commit_takes_large_files_that_were_uploaded_and_nothing_by_halves(hub, api):
    api.create_repo(NAME)
    head = api.model_info(NAME).sha
    oid = hashlib.sha256(b"large").hexdigest()

    def commit(revision: str = "main", **value: object) -> int:
        file = {"key": "file", "value": {"path": "a", "content": "YQ==", "encoding": "base64"}}
        lines = [{"key": "header", "value": {"summary": "s"}}, file, {"key": "lfsFile", "value": value}]
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()
        return raw(hub.url, "POST", f"/api/models/{NAME}/commit/{revision}", body)[0]

    large = {"path": "b.npz", "algo": "sha256", "oid": oid, "size": 5}
    assert commit(**large) == 400
    hub.models[NAME].stored[oid] = b"large"
    assert commit(**large | {"size": 6}) == 400
    assert commit(head, **large) == 404  # a commit is no branch
    assert hub.models[NAME].branches["main"] == head
    assert commit(**large) == 200
    assert hub.models[NAME].commits[api.model_info(NAME).sha].keys() == {".gitattributes", "a", "b.npz"}


def test_addresses_of_the_other_origin_need_their_signature(hub, folder):
    hub.models[NAME] = Repo(private=True)
    hub.models[NAME].commit(folder)
    path = f"/{NAME}/resolve/main/model.safetensors"
    assert raw(hub.url, "HEAD", path, token=None)[0] == 401
    assert raw(hub.url, "HEAD", path)[0] == 302
    assert raw(hub.cdn_url, "HEAD", path)[0] == 403
    assert raw(hub.cdn_url, "HEAD", f"{path}?{SIGNATURE}", token=None)[0] == 200
    assert all(SIGNATURE not in request.path for request in hub.log)
    hub.faults["model.safetensors"] = Fault(times=1, status=503)  # of the file, not of the way to it
    assert raw(hub.url, "GET", path)[0] == 302
    assert raw(hub.cdn_url, "GET", f"{path}?{SIGNATURE}", token=None)[0] == 503


# ---------------------------------------------------------------- faults


def test_an_upload_that_breaks_is_sent_again(hub, api, tmp_path):
    content = random.Random(2).randbytes(20_000_000)  # more than lies in the buffers of a connection
    folder = written(tmp_path / "folder", {"model.safetensors": content})
    api.create_repo(NAME)
    hub.faults["put", NAME] = Fault(times=1, cut_after=1000)
    api.upload_folder(folder_path=folder, repo_id=NAME)
    assert [r.status for r in hub.log if r.operation == "put"] == [0, 200]
    files = hub.models[NAME].commits[hub.models[NAME].branches["main"]]
    assert files["model.safetensors"] == content


@pytest.mark.parametrize("operation", ["create", "validate", "preupload", "batch", "put", "verify", "commit", "tag"])
def test_any_step_of_a_push_can_be_refused(hub, api, folder, operation):
    def push() -> None:
        api.create_repo(NAME)
        api.upload_folder(folder_path=folder, repo_id=NAME, ignore_patterns=["*.parquet"])
        api.create_tag(NAME, tag="v1")

    hub.faults[operation, "*"] = Fault(times=1, status=418)  # which the client does not try again
    with pytest.raises((HfHubHTTPError, RuntimeError)) as error:
        push()
    refused = error.value if isinstance(error.value, HfHubHTTPError) else error.value.__cause__
    assert isinstance(refused, HfHubHTTPError)
    assert refused.response.status_code == 418
    assert hub.operations()[-1] == operation
    assert NAME not in hub.models or not hub.models[NAME].tags
    if operation != "create":
        assert (len(hub.models[NAME].commits) == 1) == (operation != "tag")
        api.delete_repo(NAME)
    push()
    assert hub.models[NAME].tags == {"v1": hub.models[NAME].branches["main"]}


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize(
    ("fault", "status"),
    [(Fault(drops=True), None), (Fault(cut_after=3), None), (Fault(status=500), 500)],
    ids=["drops", "cut", "status"],
)
def test_a_commit_breaks_before_or_after_it_was_done(hub, api, fault, status, done):
    api.create_repo(NAME)
    fault.done = done
    hub.faults["commit", NAME] = fault
    with pytest.raises((HfHubHTTPError, httpx2.RemoteProtocolError)) as error:
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME)
    if status is not None:
        assert error.value.response.status_code == status
    # An answer that is cut is one of something done.
    assert ("a" in api.list_repo_files(NAME)) == (done or fault.cut_after is not None)


@pytest.mark.parametrize("done", [True, False])
def test_a_commit_is_never_answered(done):
    with LocalHub() as hub, ThreadPoolExecutor(1) as pool:
        api = HfApi(endpoint=hub.url, token=False)
        api.create_repo(NAME)
        hub.faults["commit", NAME] = Fault(stalls=True, done=done)
        push = pool.submit(api.upload_file, path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME)
        while "commit" not in hub.operations():
            assert not push.done(), push.exception()
        assert hub.log[-1].status == 0
        assert ("a" in api.list_repo_files(NAME)) == done
        assert not push.done()
        hub.stop()
        assert isinstance(push.exception(timeout=PATIENCE), httpx2.TransportError)


def test_a_download_breaks_or_is_of_other_content_or_another_size(hub, api, folder, tmp_path):
    hub.models[NAME] = Repo()
    hub.models[NAME].commit(folder)
    where = {"endpoint": hub.url, "token": WRITE}
    hub.faults["model.safetensors"] = Fault(times=2, cut_after=1000)
    assert read(snapshot_download(NAME, **where, cache_dir=tmp_path / "1")) == FILES
    assert len(hub.gets("model.safetensors")) == 3

    other = bytes(len(FILES["model.safetensors"]))
    hub.faults["model.safetensors"] = Fault(content=other)
    assert read(snapshot_download(NAME, **where, cache_dir=tmp_path / "2"))["model.safetensors"] == other
    hub.faults["model.safetensors"] = Fault(content=b"short")
    with pytest.raises(OSError, match="file should be of size 300000 but has size 5"):
        snapshot_download(NAME, **where, cache_dir=tmp_path / "3")

    hub.faults["info", NAME] = Fault(content=b"not json")
    with pytest.raises(json.JSONDecodeError):
        api.model_info(NAME)


def test_a_server_may_lie_about_names_and_sizes(hub, api, tmp_path):
    names = ["../../x", "/etc/x", "a\nb.safetensors", "a/./b.npz", "é\u202e.npz"]
    sha = "0" * 39 + "1"
    repo = hub.models[NAME] = Repo(branches={"main": sha}, commits={sha: dict.fromkeys(names, b"1")})
    repo.sizes = {"/etc/x": 0, "../../x": 10**15, "a/./b.npz": 10**15}
    info = api.model_info(NAME, files_metadata=True)
    assert info.sha == sha
    assert [sibling.rfilename for sibling in info.siblings] == names
    listed = {entry.path: entry for entry in api.list_repo_tree(NAME, recursive=True) if hasattr(entry, "size")}
    assert set(listed) == set(names)
    assert [listed[name].size for name in names] == [10**15, 0, 1, 10**15, 1]
    assert listed["a/./b.npz"].lfs.size == 10**15
    for name in ("a\nb.safetensors", "é\u202e.npz"):
        local = hf_hub_download(NAME, name, endpoint=hub.url, token=WRITE, cache_dir=tmp_path / name[0])
        assert Path(local).read_bytes() == b"1"
    repo.commits[sha] = {"a.json": b"1", "a.npz": b"1"}
    repo.sizes = {"a.json": 10**15, "a.npz": 10**15}
    for name in repo.sizes:
        url = f"{hub.url}/{NAME}/resolve/main/{name}"
        assert huggingface_hub.get_hf_file_metadata(url, token=WRITE).size == 10**15


@pytest.mark.parametrize("key", ["config.json", ("head", "config.json")])
def test_a_file_may_lead_elsewhere(hub, tmp_path, key):
    with LocalHub() as elsewhere:
        for one, content in ((hub, b"here"), (elsewhere, b"away")):
            one.models[NAME] = Repo()
            one.models[NAME].add({"config.json": content})
        hub.faults[key] = Fault(location=f"{elsewhere.url}/{NAME}/resolve/main/config.json")
        where = {"endpoint": hub.url, "token": WRITE, "cache_dir": tmp_path}
        assert Path(hf_hub_download(NAME, "config.json", **where)).read_bytes() == b"away"
        assert [request.token for request in elsewhere.log] == [None]


def test_it_runs_by_hand():
    command = [sys.executable, "-m", "tests.localhub", "--port", "0", "--token", WRITE]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    exported = dict(re.findall(r"(\w+)=(\S+)", "".join(lines)))
    assert exported["HF_HUB_DISABLE_XET"] == "1"
    api = HfApi(endpoint=exported["HF_ENDPOINT"], token=exported["HF_TOKEN"])
    api.create_repo(NAME)
    assert HfApi(endpoint=exported["HF_ENDPOINT"], token=False).model_info(NAME).id == NAME
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "\n")
