"""Atlases go to the Hub and come back, row for row, and are read there without being downloaded."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from perturbdiff.atlas.card import atlas_card
from perturbdiff.atlas.format import CHECKSUMS
from perturbdiff.atlas.store import Atlas
from perturbdiff.atlas.stream import read_shard
from perturbdiff.cli.main import main
from perturbdiff.hub.atlases import pull_atlas, push_atlas
from tests.atlases import CONDITIONS, change_shard, write_atlas
from tests.localhub.client import (
    ROOT,
    TOKEN,
    environment,
    finish,
    led_to,
    no_secrets_in,
    refused,
    start,
    without_secrets,
)
from tests.localhub.server import Fault, LocalHub, Repo
from tests.processes import PATIENCE

# The client passes file objects in a way that its own HTTP library warns about.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:Use 'content=<...>':DeprecationWarning",
        "ignore:It seems that you are about to commit a data:UserWarning",
    ),
]

NAME = "lab/atlas"
CARD = "README.md"
SHARDS = [f"data/cells-{i:05}.parquet" for i in range(3)]
SMALL = ["atlas.json", "conditions.parquet", "genes.parquet"]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory) -> Path:
    """44 cells in three shards."""
    return write_atlas(tmp_path_factory.mktemp("atlas") / "tiny")


@pytest.fixture
def hub(tmp_path):
    with LocalHub(write_token=TOKEN, redirects=True) as hub, led_to(hub, tmp_path / "home"):
        yield hub


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def at(hub, revision="main") -> dict[str, bytes]:
    repo = hub.datasets[NAME]
    return {path: c for path, c in repo.commits[repo.resolve(revision)].items() if path != ".gitattributes"}


def on_hub(atlas) -> dict[str, bytes]:
    """The files of an atlas, and its card as it names the repo."""
    return files(atlas) | {CARD: atlas_card(Atlas.open(atlas).info, NAME).encode()}


def rows(table) -> list[dict]:
    return table.select(["genes", "counts", "library_size"]).to_pylist()


# ---------------------------------------------------------------- there and back


def test_an_atlas_is_pushed_read_from_its_id_pulled_and_verified(hub, atlas, tmp_path, capsys):
    before = files(atlas)
    main(["atlas", "push", str(atlas), NAME, "--tag", "v1", "--message", "First"])
    assert at(hub) == on_hub(atlas)
    assert files(atlas) == before
    repo = hub.datasets[NAME]
    assert repo.tags == {"v1": repo.branches["main"]}
    assert repo.notes[repo.branches["main"]].title == "First"
    assert not [request for shard in SHARDS for request in hub.gets(shard)]  # their listing is enough

    main(["atlas", "info", NAME, "--revision", "v1"])
    assert f"lab/atlas at commit {repo.branches['main']}" in capsys.readouterr().out
    assert not [request for shard in SHARDS for request in hub.gets(shard)]

    there = Atlas.open(NAME)
    for i, shard in enumerate(SHARDS):
        assert rows(read_shard(there, i)) == rows(pq.read_table(atlas / shard))
    main(["atlas", "verify", NAME])
    assert "verified    lab/atlas: 3 shards, 44 cells" in capsys.readouterr().out

    main(["atlas", "pull", NAME, "--revision", "v1", "--out", str(tmp_path / "deep/er")])
    assert files(tmp_path / "deep/er") == on_hub(atlas)
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep/er"]
    main(["atlas", "verify", str(tmp_path / "deep/er")])
    line = refused(capsys, "atlas", "pull", NAME, "--out", tmp_path / "deep/er")
    assert "exists; choose another name" in line
    assert "is a folder already" in refused(capsys, "atlas", "pull", atlas, "--out", tmp_path / "b")


LOAD = """
import sys
from datasets import load_dataset
rows = load_dataset(sys.argv[1], revision="v1", split="train", streaming=True)
for row in rows:
    print(row["cell"], row["perturbation"], row["cell_type"], sum(row["counts"]))
"""


def test_plain_datasets_streams_what_was_pushed(hub, atlas, tmp_path):
    push_atlas(atlas, NAME, private=True, tag="v1")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, NAME],
        cwd=ROOT,
        env=environment(hub.url, tmp_path / "fresh"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    without_secrets(done.stdout + done.stderr)
    table = [row for shard in SHARDS for row in pq.read_table(atlas / shard).to_pylist()]
    expected = [f"{r['cell']} {r['perturbation']} {r['cell_type']} {sum(r['counts'])}" for r in table]
    assert done.stdout.splitlines() == expected
    assert len(expected) == sum(n for *_, n in CONDITIONS)


def test_fewer_shards_replace_more_and_nothing_else_goes(hub, atlas, tmp_path):
    push_atlas(atlas, NAME, tag="v1")
    repo = hub.datasets[NAME]
    extra = {"notes.md": b"mine", "data/mine.parquet": b"PAR1", "other/cells-00000.parquet": b"PAR1"}
    repo.add({**at(hub), **extra})
    smaller = write_atlas(tmp_path / "smaller", rows_per_shard=30)
    done = push_atlas(smaller, NAME)
    assert at(hub, done.commit) == on_hub(smaller) | extra
    assert at(hub, "v1") == on_hub(atlas)
    again = push_atlas(smaller, NAME)
    assert again.commit == done.commit
    assert Atlas.open(NAME, "v1").commit == repo.tags["v1"]


def test_shards_that_are_there_are_not_sent_again(hub, atlas, capsys):
    hub.faults["commit", NAME] = Fault(times=1, status=500)
    line = refused(capsys, "atlas", "push", atlas, NAME, "--tag", "v1")
    assert "data" in line
    sent = [request.path for request in hub.log if request.operation == "put"]
    assert len(sent) == len([path for path in files(atlas) if path.endswith(".parquet")])
    assert hub.datasets[NAME].tags == {}
    main(["atlas", "push", str(atlas), NAME, "--tag", "v1"])
    assert [request.path for request in hub.log if request.operation == "put"] == sent
    assert at(hub, "v1") == on_hub(atlas)


# ---------------------------------------------------------------- refused


def test_what_is_not_to_be_is_refused_before_anything_is_sent(hub, atlas, capsys):
    hub.datasets[NAME] = Repo()
    hub.datasets[NAME].add({"a": b"1"})
    hub.datasets[NAME].tags["v1"] = head = hub.datasets[NAME].branches["main"]
    assert "has a tag 'v1' already" in refused(capsys, "atlas", "push", atlas, NAME, "--tag", "v1")
    assert "is public; make it private" in refused(capsys, "atlas", "push", atlas, NAME, "--private")
    assert "write owner/name" in refused(capsys, "atlas", "push", atlas, "atlas")
    assert not {"preupload", "batch", "put", "commit", "tag"} & set(hub.operations())
    assert hub.datasets[NAME].branches == {"main": head}


def test_a_damaged_atlas_asks_nothing_of_the_hub(hub, atlas, tmp_path, capsys):
    folder = shutil.copytree(atlas, tmp_path / "atlas")
    path = folder / SHARDS[1]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert SHARDS[1] in refused(capsys, "atlas", "push", folder, NAME)
    change_shard(folder, 1, lambda table: table.slice(1))
    refused(capsys, "atlas", "push", folder, NAME)
    assert "no-atlas" in refused(capsys, "atlas", "push", tmp_path / "no-atlas", NAME)
    assert hub.log == []


def test_only_a_folder_is_pushed(hub, atlas, capsys):
    push_atlas(atlas, NAME)
    assert "is on the Hub already; give the folder" in refused(capsys, "atlas", "push", NAME, "lab/copy")
    assert set(hub.datasets) == {NAME}


# ---------------------------------------------------------------- broken


@pytest.mark.parametrize("changed", ["size", "sha256", "gone"])
def test_shards_that_the_hub_lists_otherwise_are_named_and_not_tagged(hub, atlas, capsys, changed):
    done = push_atlas(atlas, NAME)
    listed = hub.datasets[NAME].tree(done.commit, "", recursive=True)
    listed = [entry for entry in listed if entry["type"] == "file"]
    (entry,) = [entry for entry in listed if entry["path"] == SHARDS[1]]
    if changed == "size":
        entry["size"] = entry["lfs"]["size"] = entry["size"] + 1
    elif changed == "sha256":
        entry["lfs"]["oid"] = "0" * 64
    else:
        listed.remove(entry)
    hub.faults["paths_info", NAME] = Fault(content=json.dumps(listed).encode())
    line = refused(capsys, "atlas", "push", atlas, NAME, "--tag", "v1")
    assert f"is not what was pushed: {SHARDS[1]} came back different" in line
    assert hub.datasets[NAME].tags == {}


@pytest.mark.parametrize("path", [*SMALL, CHECKSUMS, CARD])
def test_small_files_that_come_back_changed_are_named_and_not_tagged(hub, atlas, capsys, path):
    hub.faults[path] = Fault(content=bytes(len(on_hub(atlas)[path])))
    line = refused(capsys, "atlas", "push", atlas, NAME, "--tag", "v1")
    assert f"is not what was pushed: {path} came back different" in line
    assert hub.datasets[NAME].tags == {}


@pytest.mark.parametrize("path", [SHARDS[1], "genes.parquet", "atlas.json"])
def test_a_pull_of_what_does_not_match_leaves_nothing(hub, atlas, tmp_path, capsys, path):
    push_atlas(atlas, NAME)
    hub.faults[path] = Fault(content=bytes((atlas / path).stat().st_size))
    line = refused(capsys, "atlas", "pull", NAME, "--out", tmp_path / "out/tiny")
    assert path in line
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_what_does_not_match_in_size_is_one_line(hub, atlas, tmp_path, capsys):
    push_atlas(atlas, NAME)
    hub.faults[SHARDS[1]] = Fault(content=b"short")
    line = refused(capsys, "atlas", "pull", NAME, "--out", tmp_path / "out")
    assert "but has size 5" in line
    assert not (tmp_path / "out").exists()


def test_rows_are_looked_at_where_hashes_agree(hub, atlas, tmp_path, capsys):
    folder = shutil.copytree(atlas, tmp_path / "forged")
    change_shard(folder, 1, lambda table: table.take(np.arange(len(table))[::-1]))
    hub.datasets[NAME] = Repo()
    hub.datasets[NAME].commit(folder)
    refused(capsys, "atlas", "pull", NAME, "--out", tmp_path / "out/tiny")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_pull_that_is_killed_goes_on_with_the_same_command(hub, atlas, tmp_path):
    push_atlas(atlas, NAME)
    hub.log.clear()
    out = tmp_path / "out/tiny"
    hub.faults[SHARDS[1]] = Fault(times=1, cut_after=100, stalls=True)
    process = start(hub.url, tmp_path / "fresh", "atlas", "pull", NAME, "--out", out)
    while not hub.gets(SHARDS[1]):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    without_secrets("".join(process.communicate()))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".tiny.partial"]
    no_secrets_in(tmp_path / "out")
    pull_atlas(NAME, out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]
    assert files(out) == on_hub(atlas)


@pytest.mark.parametrize("broken", ["genes.parquet", "conditions.parquet", SHARDS[0]])
def test_an_address_with_a_signature_is_never_said(hub, atlas, tmp_path, capsys, broken):
    push_atlas(atlas, NAME)
    hub.faults[broken] = Fault(status=403)
    for command in ("info", "verify"):
        if command == "verify" or broken != SHARDS[0]:
            refused(capsys, "atlas", command, NAME)
    refused(capsys, "atlas", "pull", NAME, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_process_says_no_secret(hub, atlas, tmp_path):
    push_atlas(atlas, NAME)
    hub.faults[SHARDS[1]] = Fault(times=1, cut_after=100)
    _, err = finish(start(hub.url, tmp_path / "fresh", "atlas", "pull", NAME, "--out", tmp_path / "out"))
    assert "Trying to resume download" in err
    assert files(tmp_path / "out") == on_hub(atlas)
    hub.faults["genes.parquet"] = Fault(status=403)
    finish(start(hub.url, tmp_path / "fresh2", "atlas", "info", NAME, "--debug"), code=1)
