"""One process at a time, whatever became of the one before: it ended, was killed, or its host failed."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from perturbdiff import lock as rooms
from perturbdiff.lock import Lock, alone
from tests.processes import PATIENCE


@pytest.fixture
def quick(monkeypatch):
    """Beats that are short, so that tests are."""
    monkeypatch.setattr(rooms, "BEAT", 0.05)
    monkeypatch.setattr(rooms, "SILENCE", 1.0)


def of_another_host(path, **more):
    path.write_text(json.dumps({"host": "node7", "machine": "another", "pid": 12, "job": "345", "token": "x", **more}))


def test_the_lock_says_who_has_it_and_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with alone(tmp_path / "lock", "training"):
        said = json.loads((tmp_path / "lock").read_text())
        assert (said["pid"], said["job"]) == (os.getpid(), "77")
        with pytest.raises(
            FileExistsError, match=rf"is training: host .*, process {os.getpid()}, job 77, by .*lock\. W"
        ):
            Lock(tmp_path / "lock", "training").take()
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys
from pathlib import Path
from perturbdiff.lock import alone
with alone(Path(sys.argv[1]), "training"):
    print(1, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_of_this_machine_that_is_gone_holds_nothing(tmp_path, ending):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(FileExistsError, match=f"process {other.pid}"):
            Lock(tmp_path / "lock", "training").take()
        other.send_signal(ending)
        other.wait(PATIENCE)
    assert (tmp_path / "lock").exists()
    with alone(tmp_path / "lock", "training"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_number_that_another_process_got_since_holds_nothing(tmp_path):
    with alone(tmp_path / "lock", "training"):
        content = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps({**content, "began": "1"}))
    with alone(tmp_path / "lock", "training"):
        pass


@pytest.mark.parametrize("content", [None, "", "[1]", "{}"])
def test_a_lock_of_another_host_that_falls_silent_is_taken_over(tmp_path, quick, content, capsys):
    path = tmp_path / "lock"
    of_another_host(path) if content is None else path.write_text(content)
    with alone(path, "training"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    named = "host node7, process 12, job 345" if content is None else "a process that has not said its name"
    assert f"{path} is of {named}; until it is 1 s silent" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_host_that_beats_is_respected(tmp_path, quick):
    path, ended = tmp_path / "lock", threading.Event()
    of_another_host(path)

    def beat():
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FileExistsError, match="host node7, process 12, job 345"):
            Lock(path, "training").take()
    finally:
        ended.set()
        thread.join()
    assert json.loads(path.read_text())["token"] == "x"


def test_a_holder_beats(tmp_path, quick):
    with alone(tmp_path / "lock", "training"):
        os.utime(tmp_path / "lock", (0, 0))
        deadline = rooms.time.monotonic() + PATIENCE
        while (tmp_path / "lock").stat().st_mtime == 0:
            assert rooms.time.monotonic() < deadline
            rooms.time.sleep(0.01)


def test_who_was_taken_for_dead_is_told_so_and_leaves_the_lock_alone(tmp_path):
    with alone(tmp_path / "lock", "training") as held:
        held.check()
        of_another_host(tmp_path / "lock")
        with pytest.raises(FileExistsError, match="host node7, process 12, job 345 is training too: it took this one"):
            held.check()
    assert json.loads((tmp_path / "lock").read_text())["token"] == "x"


def test_a_lock_that_is_new_is_not_put_away_for_the_dead_one_before_it(tmp_path):
    of_another_host(tmp_path / "lock", token="new")
    Lock(tmp_path / "lock", "training")._put_away({"token": "dead"})
    assert json.loads((tmp_path / "lock").read_text())["token"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
