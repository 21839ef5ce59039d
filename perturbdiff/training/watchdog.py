"""A watch over the other processes of a run: one that waits for them too long says which is behind, and ends."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from accelerate import Accelerator
from torch import distributed as dist

HUNG = 3  # exit status of a process that gave up waiting
WAITING = "waiting for the others"


class Watchdog:
    """Ends this process when it has waited for others too long, and says which of them is behind.

    A thread tells the others, every few seconds, that this process lives and what it is doing. Once the process itself
    has stood still for `timeout` seconds, it reads what the others said last: one that has fallen silent, or else one
    that is not waiting for anybody, holds up all. A collective that hangs cannot be interrupted, so the process exits
    at once.
    """

    def __init__(self, accelerator: Accelerator, timeout: float, advice: Callable[[], str]) -> None:
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._timeout, self._advice = timeout, advice
        self._interval = min(timeout / 5, 10.0)
        self._doing, self._since = "starting", time.monotonic()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=f, name="watchdog", daemon=True) for f in (self._watch, self._guard)]

    def __enter__(self) -> Watchdog:
        if self._world_size > 1:
            self._store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
            self._since = time.monotonic()
            self._beat(0)
            dist.barrier()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self._interval)  # it may wait for a node that cannot be reached

    def doing(self, what: str) -> None:
        """Say what this process begins to do; "waiting for the others" is the one that holds nobody up."""
        self._doing, self._since = what, time.monotonic()

    def _beat(self, number: int) -> None:
        self._store.set(str(self._rank), f"{number}\n{socket.gethostname()}\n{self._doing}")

    def _watch(self) -> None:
        number = 1
        while not self._ended.wait(self._interval):
            try:
                self._beat(number)
                number += 1
                if time.monotonic() - self._since > self._timeout:
                    self._give_up(number)
            except dist.DistError as error:
                if not self._ended.is_set():
                    self._exit(f"the first node, which holds the rendezvous, has failed or cannot be reached ({error})")
                return

    def _guard(self) -> None:
        # `_watch` needs an answer of the first node; where the network is broken, it may wait for it for ever.
        while not self._ended.wait(self._interval):
            if time.monotonic() - self._since > self._timeout + 7 * self._interval:
                self._exit("the first node does not answer: its network or it may have failed")

    def _give_up(self, number: int) -> None:
        def messages() -> list[list[str]]:
            return [beat.decode().split("\n") for beat in self._store.multi_get(ranks)]

        ranks = [str(rank) for rank in range(self._world_size)]
        before = messages()
        for _ in range(3):
            time.sleep(self._interval)
            number += 1
            self._beat(number)
        if time.monotonic() - self._since < self._timeout or self._ended.is_set():
            return
        after = messages()
        silent = [rank for rank in range(self._world_size) if before[rank][0] == after[rank][0]]
        busy = [rank for rank in range(self._world_size) if rank not in silent and after[rank][2] != WAITING]
        heard = [rank for rank in range(self._world_size) if rank not in silent]
        if self._rank != heard[0]:  # one of them says it
            time.sleep(self._interval)
            os._exit(HUNG)
        named = [f"rank {rank} ({after[rank][1]}) has fallen silent, last seen {after[rank][2]}" for rank in silent]
        named = named or [f"rank {rank} ({after[rank][1]}) is {after[rank][2]}" for rank in busy]
        self._exit("; ".join(named[:8]) or "all ranks wait for each other")

    def _exit(self, reason: str) -> None:
        what = f"no progress for {self._timeout:g} s (training.timeout): {reason}. {self._advice()}"
        print(f"\nperturbdiff: error (rank {self._rank}): {what}", file=sys.stderr, flush=True)
        os._exit(HUNG)
