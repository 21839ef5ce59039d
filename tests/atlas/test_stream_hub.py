"""Atlases on the Hub: the unmodified client, in processes of its own, and a server on this machine that misbehaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perturbdiff.data.screen import Screen
from tests.atlases import atlas_of_screen, write_atlas
from tests.localhub.server import SIGNATURE, Fault, LocalHub, Repo
from tests.processes import PATIENCE
from tests.simulated import DEFAULTS, TINY, tiny_config, write_screen

pytestmark = pytest.mark.slow

REPO = "lab/atlas"
TOKEN = "hf_NobodyMayReadThis"
SHARDS = [f"data/cells-{i:05d}.parquet" for i in range(6)]
SHORT_WAITS = """
import perturbdiff.atlas.stream as stream
stream.LONGEST_WAIT = 0.02
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """360 cells of a simulated screen as an atlas of six shards."""
    path = tmp_path_factory.mktemp("atlas")
    screen = write_screen(path)
    config = tiny_config(screen, path / "unused")
    return atlas_of_screen(path / "atlas", Screen.read(screen, config.data), rows_per_shard=60)


@pytest.fixture
def hub(folder) -> Iterator[LocalHub]:
    """A private repo with the atlas, whose large files come from another origin."""
    with LocalHub(token=TOKEN, redirects=True) as hub:
        hub.datasets[REPO] = Repo()
        hub.datasets[REPO].commit(folder)
        yield hub


def start(hub, home, script, *arguments, **variables):
    """A process whose environment leads the Hub's client to the local one; all it says goes to one place."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PERTURBDIFF_"))}
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env=inherited | own | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    """What the process printed, after it ended with this code."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    assert TOKEN not in out + err
    assert SIGNATURE not in out + err
    return out, err


def run(*arguments, code=0, **variables):
    return finish(start(*arguments, **variables), code)


def shard_files(home):
    """Files under a folder as large as a shard: the small ones of an atlas have less than 9 kB."""
    return [path for path in home.rglob("*") if path.is_file() and path.stat().st_size > 9000]


def ranges(hub, shard):
    return [request.range for request in hub.gets(shard)]


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("cells_per_s", "data_wait")} for line in lines]


# ---------------------------------------------------------------- small files, revisions, the cache

COMMANDS = """
import json, sys
from perturbdiff.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
        code = 0
    except SystemExit as end:
        code = end.code
    print("=== exit", code, flush=True)
"""


def test_a_repo_is_described_and_verified_at_any_revision_and_then_offline(tmp_path):
    sizes = {
        "old": (("control", "T", "b", 5), ("A", "T", "b", 4)),
        "new": (("control", "T", "b", 6), ("A", "T", "b", 7)),
    }
    with LocalHub() as hub:
        repo = hub.datasets[REPO] = Repo()
        old, new = (repo.commit(write_atlas(tmp_path / name, cells)) for name, cells in sizes.items())
        repo.tags["v1"] = old
        assert len(old) == 40
        info, verify = (["atlas", word, REPO] for word in ("info", "verify"))
        commands = [info, [*info, "--revision", "v1"], [*info, "--revision", old], [*info, "--revision", "v2"]]
        commands += [["atlas", "info", "lab/nothing"], verify]
        out, err = run(hub, tmp_path / "home", COMMANDS, json.dumps(commands))
        said = out.split("=== exit ")
        assert [text.split()[0] for text in said[1:]] == ["0", "0", "0", "2", "2", "0"]
        assert f"{REPO} at commit {new}" in said[0]
        assert "13: 7 perturbed" in said[0]
        for text in said[1:3]:
            assert f"{REPO} at commit {old}" in text
            assert "9: 4 perturbed" in text
        assert "on the Hub only" in said[0]
        assert "at revision 'v2'" in err
        assert "no such folder here (lab/nothing), and atlas 'lab/nothing' is not on the Hub" in err
        assert "Traceback" not in err
        assert "verified" in said[5]
        assert hub.gets(SHARDS[0])

        hub.log.clear()
        commands = [info, verify, ["atlas", "info", "lab/nothing"]]
        out, err = run(hub, tmp_path / "home", COMMANDS, json.dumps(commands), HF_HUB_OFFLINE="1")
        assert [text.split()[0] for text in out.split("=== exit ")[1:]] == ["0", "0", "2"]
        assert new in out
        assert "not whole in the cache" in err
        assert not hub.log


# ---------------------------------------------------------------- shards

EQUAL = (
    SHORT_WAITS
    + """
import sys
from perturbdiff.atlas.store import Atlas
stream.SILENCE = 0.5
remote, local = Atlas.open(sys.argv[1]), Atlas.open(sys.argv[2])
for i in range(len(local.info.shards)):
    assert stream.read_shard(remote, i).equals(stream.read_shard(local, i)), i
    print(i)
"""
)


def test_a_broken_connection_loses_nothing_and_only_what_is_missing_is_asked_for_again(folder, hub, tmp_path):
    sizes = [(folder / shard).stat().st_size for shard in SHARDS]
    assert min(sizes) > 9000
    faults = {
        0: Fault(times=3, cut_after=1000),
        1: Fault(times=2, status=503),
        2: Fault(times=2, whole=True, cut_after=3000),
        3: Fault(times=1, stalls=True, cut_after=10),
        4: Fault(times=1, cut_after=0),
    }
    hub.faults = {SHARDS[i]: fault for i, fault in faults.items()}
    out, err = run(hub, tmp_path, EQUAL, REPO, folder)
    assert out.split() == [str(i) for i in range(6)]
    expected = {0: [0, 1000, 2000, 3000], 1: [0, 0, 0], 2: [0, 3000, 3000], 3: [0, 10], 4: [0, 0], 5: [0]}
    for i, starts in expected.items():
        assert ranges(hub, SHARDS[i]) == [f"bytes={start}-{sizes[i] - 1}" for start in starts]
    assert err.count("trying again") == 3 + 2 + 2 + 1 + 1
    assert not shard_files(tmp_path)
    # The token goes to the Hub, and with no request to where it sends large files.
    assert {request.token for request in hub.log if request.server == "hub" and request.path in SHARDS} == {TOKEN}
    assert {request.token for request in hub.log if request.server == "cdn"} == {None}
    assert {request.server for shard in SHARDS for request in hub.gets(shard)} == {"cdn"}


WAITS = """
import sys, threading
from perturbdiff.atlas.store import Atlas
import perturbdiff.atlas.stream as stream
class Clock(threading.Event):
    def wait(self, seconds):
        print(f"{seconds:g}")
atlas = Atlas.open(sys.argv[1])
stream.read_shard(atlas, 0, Clock())
print("connection")
stream.PIECE = 1000
stream.read_shard(atlas, 1, Clock())
print("status")
try:
    stream.read_shard(atlas, 2, Clock())
except ConnectionError as error:
    print(error)
"""


def test_waits_double_up_to_a_minute_and_start_anew_after_good_pieces(hub, tmp_path):
    hub.faults[SHARDS[0]] = Fault(times=9, cut_after=100)
    hub.faults[SHARDS[1]] = Fault(times=8, cut_after=500)
    hub.faults[SHARDS[2]] = Fault(status=500)
    out, _ = run(hub, tmp_path, WAITS, REPO)
    small, rest = out.split("connection\n")
    pieces, rest = rest.split("status\n")
    assert list(map(int, small.split())) == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert list(map(int, pieces.split())) == [1, 1, 2, 1, 2, 1, 2, 1]
    *waits, error = rest.splitlines()
    assert list(map(int, waits)) == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert sum(map(int, waits)) > 300  # a rate limit of the Hub lasts five minutes
    assert error.startswith(f"shard {SHARDS[2]} could not be read from {hub.url}/datasets/{REPO}/")


REFUSED = (
    SHORT_WAITS
    + """
import json, sys, tracemalloc
from perturbdiff.atlas.store import Atlas
atlas = Atlas.open(sys.argv[1])
stream.read_shard(atlas, 5)
tracemalloc.start()
for i in range(5):
    try:
        stream.read_shard(atlas, i)
    except (ValueError, ConnectionError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
print(tracemalloc.get_traced_memory()[1])
"""
)


def test_what_is_not_the_shard_is_refused_by_name_and_before_memory_is_taken(folder, hub, tmp_path):
    content = [(folder / shard).read_bytes() for shard in SHARDS]
    changed = bytearray(content[0])
    changed[len(changed) // 2] ^= 1
    hub.faults = {
        SHARDS[0]: Fault(content=bytes(changed)),
        SHARDS[1]: Fault(content=content[1][:5000]),
        SHARDS[2]: Fault(content=bytes(100_000_000), whole=True),
        SHARDS[3]: Fault(status=416),  # no bytes there
        SHARDS[4]: Fault(status=403),
    }
    out, err = run(hub, tmp_path, REFUSED, REPO)
    *errors, peak = map(json.loads, out.splitlines())
    kinds, messages = zip(*errors, strict=True)
    assert kinds == ("ValueError", "ValueError", "ValueError", "ValueError", "ConnectionError")
    words = ["has sha256", "has 5,000 bytes", f"has more than {len(content[2]):,} bytes", "has 0 bytes", "status 403"]
    for message, shard, text in zip(messages, SHARDS[:5], words, strict=True):
        assert shard in message
        assert text in message
        assert "\n" not in message
    assert peak < 10e6  # bytes, where one answer had a hundred million
    assert not err  # none of these is a broken connection
    assert all(len(hub.gets(shard)) == 1 for shard in SHARDS)


# ---------------------------------------------------------------- training

TRAIN = (
    SHORT_WAITS
    + """
import sys
from perturbdiff.cli.main import main
stream.RETRIES = 3
main(sys.argv[1:])
"""
)


def settings(path, out, *words):
    """Words of `perturbdiff train` on an atlas; with a validation, whose stream is another."""
    atlas = ["--hold-out", "pert_0:type_0", "--recipe", DEFAULTS, "data.n_hvg=null", "split.validation=[pert_1:type_1]"]
    return ["train", "--atlas", str(path), "--out", str(out), *atlas, *TINY, "data.n_streams=2", *words]


def test_a_server_that_is_gone_ends_training_with_one_line_that_names_the_shard(hub, tmp_path):
    for shard in SHARDS:
        hub.faults[shard] = Fault(cut_after=100, stalls=True)
    words = settings(REPO, tmp_path / "run", "data.streamed=true")
    process = start(hub, tmp_path / "home", TRAIN, *words)
    wait_for(lambda: any(hub.gets(shard) for shard in SHARDS), process)
    hub.stop()
    _, err = finish(process, code=2)
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("perturbdiff: error:")]
    asked = next(shard for shard in SHARDS if hub.gets(shard))
    assert line.startswith(f"perturbdiff: error: shard {asked} could not be read from {hub.url}")
    assert "the same command goes on" in line
    assert err.count("trying again") == 3


CLOSED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may be told to ignore it
from contextlib import closing
import numpy as np
import perturbdiff.atlas.stream as stream
from perturbdiff.config import Preprocessing
from perturbdiff.atlas.store import Atlas
cells = stream.StreamedCells([Atlas.open(sys.argv[1])], Preprocessing("counts", 1e4, 10.0), np.zeros((0, 2), int))
def make(number):
    cells.open([0, 1])
    return cells.take(np.arange(5))
try:
    with closing(stream.prefetched(make, 0, 9, 2, give_up=cells.close)) as batches:
        next(batches)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupted_process_ends_while_a_download_waits_to_try_again(hub, tmp_path):
    hub.faults[SHARDS[0]] = Fault(status=503)
    process = start(hub, tmp_path, CLOSED, REPO)
    wait_for(lambda: len(hub.gets(SHARDS[0])) >= 2, process)  # it would go on for five minutes
    process.send_signal(signal.SIGINT)
    out, err = finish(process)
    assert out == "interrupted\n"
    assert "Traceback" not in err
    assert not hub.gets(SHARDS[1])  # nor is the next one begun


KILLED = (
    SHORT_WAITS
    + """
import os, signal, sys
from perturbdiff.cli.main import main
from perturbdiff.training import loop
save = loop.save_state
def save_and_die(folder, progress, *rest, **named):
    save(folder, progress, *rest, **named)
    if progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
loop.save_state = save_and_die
main(sys.argv[1:])
"""
)
SEVERAL = (
    SHORT_WAITS
    + """
import json, sys
from perturbdiff.cli.main import main
for words in json.loads(sys.argv[1]):
    main(words)
"""
)


def test_runs_from_a_repo_equal_those_from_the_folder_also_after_a_kill(folder, hub, tmp_path):
    breaking = {shard: Fault(times=2, cut_after=4000) for shard in SHARDS}
    hub.faults |= breaking
    home = tmp_path / "home"
    streamed = ("data.streamed=true", "training.save_every=2", "training.save_minutes=0", "training.n_steps=10")
    killed = settings(REPO, tmp_path / "killed", *streamed)
    run(hub, home, KILLED, *killed, code=-signal.SIGKILL)
    assert [line["step"] for line in losses(tmp_path / "killed") if "loss" in line][:4] == [1, 2, 3, 4]
    hub.log.clear()
    hub.faults |= breaking
    out, err = run(hub, home, SEVERAL, json.dumps([killed]))
    assert "resuming    from step 4" in out
    assert "trying again" in err
    assert not any(request.path in SHARDS and request.status == 200 for request in hub.log)
    assert not shard_files(home)
    runs = {
        "folder streamed": settings(folder, tmp_path / "folder streamed", *streamed),
        "repo cached": settings(REPO, tmp_path / "repo cached"),
        "folder cached": settings(folder, tmp_path / "folder cached"),
    }
    run(hub, home, SEVERAL, json.dumps(list(runs.values())))
    assert losses(tmp_path / "killed") == losses(tmp_path / "folder streamed")
    assert losses(tmp_path / "repo cached") == losses(tmp_path / "folder cached")
    assert any("validation_loss" in line for line in losses(tmp_path / "killed"))
    assert losses(tmp_path / "killed") != losses(tmp_path / "repo cached")  # another order of cells


def wait_for(condition, process):
    """Until the condition holds; it fails with what the process said where that ended before."""
    while not condition():
        if process.poll() is not None:
            raise AssertionError("".join(process.communicate()))
        time.sleep(0.01)
