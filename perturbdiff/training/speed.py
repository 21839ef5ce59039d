"""How fast a run goes, how long it waits for data, and a trace of where its time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP_STEPS = 3


class Pace:
    """Cells per second over all processes, and the part of the time that the slowest of them waited for its data.

    Laps are from one logged step to the next; validation and saving do not count.
    """

    def __init__(self, cells_seen: int) -> None:
        self._begin, self._cells_at, self._slowest = time.perf_counter(), cells_seen, 0.0
        self.waited = 0.0  # seconds, for the batch of this step

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited = time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._begin += time.perf_counter() - start

    def add_wait(self, seconds: float) -> None:
        """What the slowest process waited in this step."""
        self._slowest += seconds

    def lap(self, cells_seen: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._begin, 1e-9)
        speed = {
            "cells_per_s": round((cells_seen - self._cells_at) / seconds, 1),
            "data_wait": round(min(self._slowest / seconds, 1.0), 4),
        }
        self._begin, self._cells_at, self._slowest = now, cells_seen, 0.0
        return speed


class Trace:
    """A torch.profiler trace of `n_steps` steps, after a few to warm up, for chrome://tracing or Perfetto.

    Written to `folder`/rank_NNNNN.json when they are done, or earlier if training ends.
    """

    def __init__(self, folder: Path, rank: int, n_steps: int) -> None:
        self._file = folder / f"rank_{rank:05d}.json"
        self._profiler: profile | None = None
        if n_steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=WARM_UP_STEPS, active=n_steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )

    def __enter__(self) -> Trace:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()

    def step(self) -> None:
        """One training step is done."""
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, profiler: profile) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._file))
