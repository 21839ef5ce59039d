"""Weak scaling: CPU-seconds a cell, cells per second and the share of time waited for data, from 1 to N processes.

    python scripts/bench/scaling.py                          # 1 and 2 processes on this machine's CPU, DDP, minutes
    python scripts/bench/scaling.py --engine zero1 --processes 1 2 4 --set training.mixed_precision=bf16

Simulates a screen, builds an atlas of it, and runs `perturbdiff pretrain` as users do: one process alone, several under
`accelerate launch` with recipes/accelerate/cpu_ENGINE.yaml. Every process has the same sets a step, whatever their
number. Each run is made twice, with few and with more steps; figures are of the difference, so that starting, indexing
and saving drop out. Medians of --repeats; one thread a process. `efficiency` is the CPU-seconds a cell of one process
over those of several: what communication and waiting for each other cost. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from perturbdiff.atlas.build.run import build
from perturbdiff.config import load_build_config
from perturbdiff.data.simulate import SimulationConfig, simulate

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--engine", choices=("ddp", "zero1", "zero2", "zero3"), default="ddp")
    parser.add_argument("--steps", type=int, nargs=2, default=(10, 40), metavar=("FEW", "MORE"))
    parser.add_argument("--sets", type=int, default=8, help="of each process a step")
    parser.add_argument("--set-size", type=int, default=64)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="more settings of the recipe")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        atlas = _atlas(Path(folder), options.genes)
        report = {n: _measured(n, atlas, options) for n in options.processes}
    first = report[options.processes[0]]["cpu_us_per_cell"]
    for figures in report.values():
        figures["efficiency"] = round(first / figures["cpu_us_per_cell"], 3)
    shape = {name: getattr(options, name) for name in ("sets", "set_size", "genes", "width", "depth")}
    print(json.dumps({"engine": options.engine, "cores": os.cpu_count(), **shape, "processes": report}, indent=1))


def _atlas(folder: Path, n_genes: int) -> Path:
    screen, atlas = folder / "screen.h5ad", folder / "atlas"
    size = {"n_perturbations": 20, "n_cell_types": 4, "cells_per_condition": 200, "control_cells_per_context": 400}
    simulate(SimulationConfig(n_genes=n_genes, **size), screen)
    with contextlib.redirect_stdout(sys.stderr):
        build(load_build_config([str(screen)], given={"out": str(atlas)}), 4 << 30, 1, None)
    return atlas


def _measured(n: int, atlas: Path, options: argparse.Namespace) -> dict[str, float]:
    cpu, laps = [], []
    for _ in range(options.repeats):
        (few_cpu, few), (more_cpu, more) = (_run(n, atlas, steps, options) for steps in options.steps)
        cpu.append((more_cpu - few_cpu) / (more[-1]["cells"] - few[-1]["cells"]))
        laps += more[1:]  # the first holds warming up
    return {
        "cpu_us_per_cell": round(1e6 * statistics.median(cpu), 1),
        "cells_per_s": statistics.median(lap["cells_per_s"] for lap in laps),
        "data_wait": statistics.median(lap["data_wait"] for lap in laps),
    }


def _run(n: int, atlas: Path, n_steps: int, options: argparse.Namespace) -> tuple[float, list[dict[str, float]]]:
    """CPU-seconds of all processes, and the lines of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(json.dumps(_recipe(n, atlas, n_steps, options)))  # JSON is yaml
        command = [sys.executable, "-m", "perturbdiff", "pretrain", str(recipe), "--out", f"{folder}/run", *options.set]
        if n > 1:
            launch_file = ROOT / "recipes" / "accelerate" / f"cpu_{options.engine}.yaml"
            launcher = ["-m", "accelerate.commands.launch", "--config_file", str(launch_file)]
            command[1:1] = [*launcher, "--num_processes", str(n)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return cpu, [json.loads(line) for line in lines]


def _recipe(n: int, atlas: Path, n_steps: int, options: argparse.Namespace) -> dict[str, object]:
    return {
        "data": {
            "atlases": [{"path": str(atlas)}],
            "n_hvg": None,
            "set_size": options.set_size,
            "min_set_size": options.set_size // 2,
            "sets_per_batch": n * options.sets,
        },
        "split": {"validation_fraction": 0.0},
        "denoiser": {"width": options.width, "depth": options.depth, "n_heads": 8},
        "training": {
            "n_steps": n_steps,
            "log_every": options.steps[0],
            "save_every": n_steps,
            "device": "cpu",
            "trackers": [],
        },
    }


if __name__ == "__main__":
    main()
