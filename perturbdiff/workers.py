"""Processes that share work, and end with the one that started them however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import Lock
from types import TracebackType
from typing import Any, Generic, TypeVar

import pyarrow as pa

Job = TypeVar("Job")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Crew(Generic[Job]):
    """Calls functions of (job, item) in `n_workers` processes, which get the job once; 1 calls them in this one.

    Processes are spawned: HDF5 does not survive a fork. A script that starts them needs `if __name__ == "__main__":`.
    """

    def __init__(self, job: Job, n_workers: int) -> None:
        self.job = job
        self._pool: ProcessPoolExecutor | None = None
        if n_workers > 1:
            context = get_context("spawn")
            # Nothing is ever sent. Workers see the end of it when this process closes it, or dies of whatever.
            there, self._alive = context.Pipe(duplex=False)
            # Each worker takes the job from a pipe when it is up. As an argument, this process would write it while a
            # worker starts, one after the other, and for ever where one dies meanwhile.
            self._jobs, sender = context.Pipe(duplex=False)
            handing = (sender, ForkingPickler.dumps(job), n_workers)
            threading.Thread(target=_hand_out, args=handing, name="jobs", daemon=True).start()
            given = (there, self._jobs, context.Lock())
            self._pool = ProcessPoolExecutor(n_workers, context, initializer=_start, initargs=given)

    def __enter__(self) -> Crew[Job]:
        if self._pool is None:
            self._memory = memory_kept()
            self._memory.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            self._memory.__exit__(None, None, None)
            return
        if error is not None:  # work in progress is worth nothing any more
            self._alive.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._alive.close()
        self._jobs.close()

    def run(self, function: Callable[[Job, Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Each item with its result, as they are done.

        Raises
        ------
        OSError
            A process was killed or could not start; else the first error of any.
        """
        if self._pool is None:
            for item in items:
                yield item, function(self.job, item)
            return
        try:
            with _deaf():
                futures = {self._pool.submit(_call, function, item): item for item in items}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, perhaps for want of memory (give fewer of them, or less max_memory), or "
                'could not start, and said why (a script needs `if __name__ == "__main__":`); the same command goes '
                "on where it was."
            ) from error


@contextmanager
def memory_kept() -> Iterator[None]:
    """Freed arrays are used again instead of being given back: fresh memory is a fifth of the time of a build.

    Of the whole process, until the end of the context.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of the GNU C library
    pool = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    try:
        yield
    finally:
        pa.set_memory_pool(pool)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 1 << 16)  # as they were
            mallopt(_M_TRIM_THRESHOLD, 1 << 17)
            ctypes.CDLL(None).malloc_trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h

_job: Any = None  # of a worker process
_memory = memory_kept()  # dropped, it would end


@contextmanager
def _deaf() -> Iterator[None]:
    # Processes that are started within do not hear Ctrl-C before `_start`: each would show where it was.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _hand_out(sender: Connection, job: memoryview, n_workers: int) -> None:
    with sender, suppress(OSError):  # the crew ended before all took theirs
        for _ in range(n_workers):
            sender.send_bytes(job)


def _start(alive: Connection, jobs: Connection, one_by_one: Lock) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    try:
        with one_by_one:
            job = jobs.recv_bytes()
    except (EOFError, OSError):  # the first process is gone
        os._exit(1)
    _job = ForkingPickler.loads(job)
    _memory.__enter__()  # until the process ends


def _end_with(alive: Connection) -> None:
    try:
        alive.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _call(function: Callable[[Any, Item], Result], item: Item) -> Result:
    return function(_job, item)
