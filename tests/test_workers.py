"""Processes that share work: how they start and end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import perturbdiff
from perturbdiff.workers import Crew
from tests.processes import PATIENCE, alive_with

ROOT = Path(perturbdiff.__file__).parents[1]
LARGE = 1 << 22  # of a job, in bytes: more than a pipe holds
RUN = f"""
from time import sleep
from perturbdiff.workers import Crew

def waited(job, item):
    sleep(item)

def run():
    with Crew(bytes({LARGE}), 2) as crew:
        list(crew.run(waited, [600, 600]))
"""
GUARDED = f'{RUN}\nif __name__ == "__main__":\n    run()\n'


def size(job, item):
    return len(job) + item


def killed(job, item):
    os.kill(os.getpid(), signal.SIGKILL)


def started(script, tmp_path, **environment):
    path = tmp_path / "script.py"
    path.write_text(script)
    return subprocess.Popen(
        [sys.executable, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_all_items_are_called_with_the_job(n_workers):
    with Crew(bytes(LARGE), n_workers) as crew:
        assert sorted(crew.run(size, range(3))) == [(item, LARGE + item) for item in range(3)]
        assert list(crew.run(size, [7])) == [(7, LARGE + 7)]


def test_a_worker_that_is_killed_is_an_error_whenever_it_is_seen():
    with Crew(None, 2) as crew:
        for items in ([1], [1, 2]):  # then of a pool that is broken already
            with pytest.raises(OSError, match="a worker process was killed"):
                list(crew.run(killed, items))


def test_workers_that_cannot_start_are_no_reason_to_wait(tmp_path):
    process = started(f"{RUN}\nrun()\n", tmp_path)  # each runs the script anew
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1
    assert "could not start, and said why" in said.splitlines()[-1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_that_start_end_with_the_first_process(tmp_path, how):
    mark = f"{tmp_path.name}-{how.name}"
    process = started(GUARDED, tmp_path, MARK=mark)
    deadline = time.monotonic() + PATIENCE
    while len(alive_with(f"MARK={mark}")) < 4:  # this one, two workers, and one that counts semaphores
        assert time.monotonic() < deadline
        assert process.poll() is None
    if how == signal.SIGINT:  # as a terminal does
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode != 0
    while alive_with(f"MARK={mark}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert said.count("KeyboardInterrupt") == (how == signal.SIGINT)  # of the first process alone
