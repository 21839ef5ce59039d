"""The program with a fault in it, for a launcher: python -m tests.distributed.faulty COMMAND ...; FAULT says which.

FAULT is JSON: {"name": one of FAULTS, "step": N, ...}; without it the program is as it is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from perturbdiff.cli.main import main

RANK = int(os.environ.get("RANK", "0"))
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the program does before it imports torch; some faults do that


def hold(folder: str, step: int) -> None:
    """All processes wait before they take a step, until there is a file `go` or a signal came; they leave pids."""
    from perturbdiff.training.loop import _Run

    take = _Run._step

    def held(run, made):
        if run.progress.step + 1 == step:
            pid = Path(folder, f"pid{RANK}")
            pid.with_suffix(".tmp").write_text(str(os.getpid()))
            pid.with_suffix(".tmp").rename(pid)
            while run.stop.signal_name is None and not Path(folder, "go").exists():
                time.sleep(0.02)
            if run.stop.signal_name is not None:
                Path(folder, f"stopping{RANK}").touch()
        return take(run, made)

    _Run._step = held


def reading(folder: str) -> None:
    """All processes read their data for ever; they leave their names."""
    from perturbdiff.training.dataset import TrainingSet

    def read(*given):
        Path(folder, f"reading{RANK}").touch()
        threading.Event().wait()

    TrainingSet.from_atlases = read


def broken_data(step: int, rank: int) -> None:
    """One process cannot read its data from a step on."""

    def broken(parts, cells):
        raise OSError("shard 3 cannot be read")

    _change_batches(step, rank, broken)


def killed_in_save(file: str) -> None:
    """The process that writes dies in its first save, with a file of the state half written."""
    from perturbdiff.training import state

    write = state.save_file

    def killing(tensors, path):
        write(tensors, path)
        if path.name == file:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    state.save_file = killing


def poisoned(step: int, rank: int) -> None:
    """From a step on, the first set of one process has counts over a library size that are beyond float32."""

    def poison(parts, cells):
        part = parts[0]
        part.cells.library_size[part.cells.position < part.mask.shape[1]] = 1e-38
        return parts

    _change_batches(step, rank, poison)


def without_data(step: int, rank: int) -> None:
    """One process waits for its data for ever."""
    _change_batches(step, rank, lambda parts, cells: threading.Event().wait())


def _change_batches(step, rank, change):
    from perturbdiff.training.dataset import IndexedCells

    make = IndexedCells.batches

    def changed(cells, sampler, epoch, position, *rest):
        parts = make(cells, sampler, epoch, position, *rest)
        late = epoch * sampler.steps_per_epoch + position + 1 >= step
        return change(parts, cells) if late and rank == RANK else parts

    IndexedCells.batches = changed


FAULTS = {fault.__name__: fault for fault in (hold, reading, broken_data, killed_in_save, poisoned, without_data)}

if __name__ == "__main__":
    if "FAULT" in os.environ:
        settings = json.loads(os.environ["FAULT"])
        FAULTS[settings.pop("name")](**settings)
    main(sys.argv[1:])
