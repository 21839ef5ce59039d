"""The record of speed: runs the benches of this folder, writes RESULTS.md and results.json beside them.

    python scripts/bench/results.py                      # all, an hour on a core
    python scripts/bench/results.py --only commands      # one anew; the others stay as they were recorded

A figure of another machine is not comparable: run all, on an idle one. Published figures stand beside ours where there
are some; they are of one core of such a machine, as the benches say.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import perturbdiff

HERE = Path(__file__).parent
RECORD, TABLE = HERE / "results.json", HERE / "RESULTS.md"
BENCHES = {
    "step": ("step.py", "a training step and sampling at the published size"),
    "loader": ("loader.py", "cells per CPU-second of a build and of every way to read it"),
    "index": ("index.py", "the condition index"),
    "scores": ("scores.py", "scoring 2,000 conditions beside all simple methods"),
    "commands": ("commands.py", "whole commands, from start to exit"),
    "large": ("commands.py --parts large", "whole commands on 100,000 cells of 6,000 genes"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHES, help="this one")
    args = parser.parse_args()
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    for name in [args.only] if args.only else BENCHES:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run([sys.executable, *_words(name)], env=environment, stdout=subprocess.PIPE, check=True)
        record[name] = {**_machine(), "found": json.loads(done.stdout)}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    TABLE.write_text(_table(record))


def _words(name: str) -> list[str]:
    script, *options = BENCHES[name][0].split()
    return [str(HERE / script), *options]


def _machine() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": f"perturbdiff {perturbdiff.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, NumPy {np.__version__}",
    }


def _table(record: dict[str, Any]) -> str:
    text = "# Speed, as measured\n\nBy `python scripts/bench/results.py`; `results.json` has the same for programs.\n"
    for name, (command, about) in BENCHES.items():
        if name not in record:
            continue
        own = record[name]
        text += f"\n## {about[0].upper()}{about[1:]}\n\n`scripts/bench/{command}`, {own['date']}: {own['machine']}; "
        text += f"{own['versions']}.\n\n"
        rows: dict[str, dict[str, str]] = {}
        for path, value in _leaves(own["found"]):
            rows.setdefault(" / ".join(path[:-1]), {})[path[-1]] = value
        columns = list(next(iter(rows.values())))
        if any(list(row) != columns for row in rows.values()):  # of different things: a line each
            rows = {f"{name} / {key}".removeprefix(" / "): {"": row[key]} for name, row in rows.items() for key in row}
            columns = [""]
        text += f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
        text += "".join(f"| {name} | {' | '.join(row.values())} |\n" for name, row in rows.items())
    return text


def _leaves(of: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(of, dict):
        for key, value in of.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(of, list):
        for i, value in enumerate(of):
            yield from _leaves(value, (*path, str(i + 1)))
    else:
        yield path, f"{round(of, 3):,}" if isinstance(of, int | float) and not isinstance(of, bool) else str(of)


if __name__ == "__main__":
    main()
