"""CPU-seconds and peak memory of whole commands, from start to exit, on simulated screens.

    python scripts/bench/commands.py                       # start, screen, many: ten minutes on a core
    python scripts/bench/commands.py --parts start,large   # large: 100,000 cells x 6,000 genes, a quarter of an hour

Each command runs in a process of its own, of one thread, in a folder that is removed afterwards. Those of `start` are
medians of three. `many`: 1,000 perturbations of 20 cells in each of two batches, one of them held out. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

RUN = Path(sys.prefix) / "bin" / "perturbdiff"
ONE_STEP = ("--recipe", "new_batch", "--hold-out", "batch=batch_1", "training.n_steps=1")
START = {
    "simulate": ("simulate", "start.h5ad"),
    "--help": ("--help",),
    "hub info": ("hub", "info", "simulated-screen"),
    "plan": ("plan", "tahoe100m", "--gpus", "64", "--gpu", "h100"),
    "predict 100 cells": (
        "predict", "simulated-screen", "--controls", "start.h5ad", "--perturbation", "pert_0", "--cell-type", "type_0",
        "--n-cells", "100", "--out", "hundred.h5ad", "--overwrite",
    ),
}  # fmt: skip
SCREEN = {
    "simulate": ("simulate", "screen.h5ad"),
    "train, choosing": ("train", "--screen", "screen.h5ad", "--hold-out", "pert_0:type_0", "--out", "chosen"),
    "train by a recipe": (
        "train", "--screen", "screen.h5ad", "--recipe", "cross_cell_type", "--hold-out", "pert_0:type_0",
        "--out", "given",
    ),
    "predict 1,000 cells": (
        "predict", "given/model", "--controls", "screen.h5ad", "--perturbation", "pert_0", "--cell-type", "type_0",
        "--n-cells", "1000", "--out", "thousand.h5ad",
    ),
    "evaluate": ("evaluate", "given"),
    "report": ("report", "given", "--out", "report.html"),
}  # fmt: skip
MANY = {
    "simulate": (
        "simulate", "many.h5ad", "--perturbations", "1000", "--cell-types", "1", "--cells", "20",
        "--control-cells", "500",
    ),
    "train, no score": ("train", "--screen", "many.h5ad", *ONE_STEP, "--no-score", "--out", "many"),
    "evaluate": (
        "evaluate", "many/model", "--screen", "many.h5ad", "--split", "many/split.json", "--out", "scores",
    ),
    "rank": (
        "screen", "rank", "many/model", "--controls", "many.h5ad", "--up", "gene_100,gene_101", "--out", "ranking.csv",
    ),
}  # fmt: skip
LARGE = {
    "simulate": (
        "simulate", "large.h5ad", "--genes", "6000", "--perturbations", "50", "--cell-types", "4", "--cells", "200",
        "--control-cells", "2500",
    ),
    "train and score": (
        "train", "--screen", "large.h5ad", "--recipe", "cross_cell_type", "--hold-out", "*:type_0",
        "training.n_steps=10", "--out", "large",
    ),
    "predict": (
        "predict", "large/model", "--controls", "large.h5ad", "--perturbation", "pert_00", "--out", "all.h5ad",
    ),
    "evaluate": ("evaluate", "large"),
    "report": ("report", "large", "--out", "large.html"),
}  # fmt: skip


PARTS = {"start": START, "screen": SCREEN, "many": MANY, "large": LARGE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", metavar="A,B", default="start,screen,many", help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = {
            part: {
                name: _median(
                    [
                        _measured(words, Path(temporary))
                        for _ in range(3 if part == "start" and name != "simulate" else 1)
                    ]
                )
                for name, words in PARTS[part].items()
            }
            for part in args.parts.split(",")
        }
    print(json.dumps(found, indent=1))


def _measured(words: Sequence[str], folder: Path) -> dict[str, float]:
    """Of a command; RuntimeError with what it said where it fails."""
    print(f"perturbdiff {' '.join(words)}", file=sys.stderr, flush=True)
    with (folder / "said").open("w+") as said:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        files = [(os.POSIX_SPAWN_DUP2, said.fileno(), 1), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)]
        shell = f'cd "{folder}" && exec "$0" "$@"'
        process = os.posix_spawn("/bin/sh", ["sh", "-c", shell, str(RUN), *words], environment, file_actions=files)
        _, status, used = os.wait4(process, 0)
        if status:
            said.seek(0)
            raise RuntimeError(f"perturbdiff {' '.join(words)}: {said.read()[-2000:]}")
    return {"cpu_s": round(used.ru_utime + used.ru_stime, 2), "peak_gb": round(used.ru_maxrss / 2**20, 2)}


def _median(of: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in of) for key in of[0]}


if __name__ == "__main__":
    main()
