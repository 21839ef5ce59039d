"""Signals in real processes that read files."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from perturbdiff.cli.interrupts import heard
from perturbdiff.data.h5ad import ALWAYS_READ
from tests.processes import PATIENCE
from tests.screens import never_returns
from tests.simulated import write_screen

pytestmark = pytest.mark.slow
READING = """
import sys, time
from perturbdiff.cli.main import main
from perturbdiff.data import h5ad
{before}
look = h5ad._look
def begun(*given):
    print("reading", flush=True)
    return look(*given)
h5ad._look = begun
main(["screen", "info", sys.argv[1]])
"""
SLOW = "h5ad._refuse_endless_heaps = lambda *given: time.sleep(1000)"  # a call of Python's own


@pytest.mark.parametrize(
    ("before", "said"),
    [("", "perturbdiff: interrupted; the HDF5 library did not come back\n"), (SLOW, "perturbdiff: interrupted\n")],
    ids=["never returns", "slow"],
)
def test_ctrl_c_ends_a_command_while_a_file_is_read(tmp_path, before, said):
    path = write_screen(tmp_path)
    if before == "":
        never_returns(path)
        os.truncate(path, ALWAYS_READ + 1)  # in larger files nobody looks for that
    command = [sys.executable, "-c", READING.format(before=before), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "reading\n"
        time.sleep(3)  # until the library is where it stays; on a busy machine it may not be yet
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130
    assert told in (said, "perturbdiff: interrupted\n")  # of a signal that comes before Python hears


def test_a_job_ends_though_the_library_stays_in_a_file(tmp_path):
    """Training notes SIGTERM and SIGUSR1, to end in order."""
    path = write_screen(tmp_path)
    never_returns(path)
    os.truncate(path, ALWAYS_READ + 1)
    reading = READING.format(before="from perturbdiff.cli import interrupts\ninterrupts.LATER = 1.0")
    command = ["train", "--screen", str(path), "--out", str(tmp_path / "run"), "--recipe", "cross_cell_type"]
    reading = reading.replace('["screen", "info", sys.argv[1]]', "sys.argv[1:]")
    with subprocess.Popen(
        [sys.executable, "-c", reading, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "reading\n"
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=PATIENCE)[1]
    assert (process.returncode, told) in (
        (143, "perturbdiff: ended by SIGTERM; the HDF5 library did not come back\n"),
        (0, ""),  # where it came before the library was where it stays
    )


@pytest.mark.parametrize(("number", "what"), [(signal.SIGSEGV, "Segmentation fault"), (signal.SIGABRT, "Aborted")])
def test_a_library_that_crashes_says_where(tmp_path, number, what):
    reading = READING.format(before="import signal").replace("print(", f"signal.raise_signal({number:d}); print(")
    command = [sys.executable, "-c", reading, str(write_screen(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == -number
    assert done.stderr.startswith(f"Fatal Python error: {what}\n")
    assert "h5ad.py" in done.stderr


def test_nothing_is_left_where_nothing_was_interrupted():
    def listening():
        return [thread for thread in threading.enumerate() if thread.name == "interrupts"]

    with heard():
        (thread,) = listening()
    thread.join(PATIENCE)
    assert not listening()
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_python_hears_is_python_s():
    with pytest.raises(KeyboardInterrupt), heard():
        signal.raise_signal(signal.SIGINT)
