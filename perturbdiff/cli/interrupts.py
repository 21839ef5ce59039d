"""Signals while the HDF5 library reads: Python hears of them once the library comes back, in some files never."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 3.0  # seconds
LATER = 20.0  # of a job: it ends in order where the library comes back, and Slurm kills it 30 s after a SIGTERM
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGUSR1: "ended by SIGUSR1"}
READERS = (f"{os.sep}h5py{os.sep}", f"{os.sep}data{os.sep}h5ad.py")


@contextmanager
def heard() -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGUSR1 end the process also where its main thread stays in one call of HDF5.

    Without a handler of Python's, SIGTERM and SIGUSR1 do so at once.
    """
    if threading.current_thread() is not threading.main_thread():  # only there signals are dealt with
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(read, threading.get_ident()), name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)  # which ends the thread


def _listen(read: int, main: int) -> None:
    # Of each signal the number comes, whatever the main thread is in: h5py lets other threads run meanwhile.
    with os.fdopen(read, "rb", buffering=0) as signals:
        while number := signals.read(1):
            call = _hdf5_call(main)
            if number[0] not in SAID or call is None:
                continue
            time.sleep(PATIENCE if number[0] == signal.SIGINT else LATER)
            if call == _hdf5_call(main):
                said = SAID[signal.Signals(number[0])]
                print(f"perturbdiff: {said}; the HDF5 library did not come back", file=sys.stderr, flush=True)
                os._exit(128 + number[0])


def _hdf5_call(thread: int) -> tuple[FrameType, int] | None:
    """Where a thread is, if that is a call of HDF5."""
    frame = sys._current_frames().get(thread)
    if frame is None or not any(reader in frame.f_code.co_filename for reader in READERS):
        return None
    return frame, frame.f_lasti
