"""Ctrl-C in real processes that read files."""

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
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue
        told = process.stderr.read()
    # A signal that comes before is Python's to deal with, or h5py's, which makes an error of it.
    assert (process.returncode, told) in ((130, said), (130, "perturbdiff: interrupted\n")) or (
        process.returncode == 2 and "is not a readable .h5ad" in told and told.count("\n") == 1
    )


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
