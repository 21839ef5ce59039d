"""Cells per CPU-second from a build and from every way to read it, beside reading the same cells row by row with h5py.

    OMP_NUM_THREADS=1 python scripts/bench/loader.py                       # 60,000 cells, minutes, 2 GB of disk
    OMP_NUM_THREADS=1 python scripts/bench/loader.py --folder DIR          # keeps the .h5ad, the atlas and the cache

Synthetic counts of 12,626 genes at 8 % density, detection heavy-tailed over genes, in an uncompressed .h5ad (CSR,
float32), of several perturbations, cell types and batches with controls. It is built into an atlas (in a process of its
own and its workers), cached, and read in batches of 8 sets of 256 cells with as many controls, labels and mask
included. "cells" are perturbed cells with their controls, each of which is read as the other is: the budgets are on
these. `perturbed` counts one of the two. Everything is per CPU-second of all threads, medians of --repeats; one thread
each. `rows by h5py` reads two slices of each cell, values and genes; `as published` does for each cell what the
published loader does: looks its row up in the file too, lays it out over all genes, and finds the wanted genes by name
(68 cells/CPU-s is what that loader took, with its controls and labels). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from perturbdiff.atlas.store import Atlas
from perturbdiff.config import AtlasConfig, Config, DataConfig
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.data.screen import Screen
from perturbdiff.training.dataset import TrainingSet

GENES, DENSITY, SET_SIZE, SETS = 12_626, 0.08, 256, 8
PERTURBATIONS, CELL_TYPES, BATCHES, CONTROLS = 20, 4, 2, 0.2  # controls: part of the cells
BARCODE = "AACGTTGC"  # before the number of a cell in its name
CHUNK = 2000  # cells made at once
BUDGETS = {
    "sparse batches, cells/CPU-s": 100_000,
    "sparse batches, aim": 300_000,
    "dense batches, cells/CPU-s": 30_000,
    "build, cells/CPU-s": 20_000,
    "atlas, bytes/cell": 1600,
}
QUIET = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
PUBLISHED = {"CSR X, 12,626 genes, cells/CPU-s": 68}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=60_000)
    parser.add_argument("--genes", type=int, default=GENES)
    parser.add_argument("--set-size", type=int, default=SET_SIZE)
    parser.add_argument("--batches", type=int, default=20, help="timed together, of 8 sets each")
    parser.add_argument("--rows", type=int, default=2000, help="cells read by h5py in one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="kept, and used again; a temporary one if not given")
    parser.add_argument("--max-memory", type=float, default=2.0, help="of the build, GB")
    parser.add_argument("--workers", type=int, default=2, help="of the build")
    parser.add_argument("--shard-mb", type=int, default=64, help="genes and values of a shard; 512 is the default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    if args.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            args.folder = Path(folder)
            print(json.dumps(_report(args), indent=1))
    else:
        args.folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(_report(args), indent=1))


def _report(args: argparse.Namespace) -> dict[str, object]:
    report: dict[str, object] = {"load_average": os.getloadavg(), "budgets": BUDGETS, "published": PUBLISHED}
    if not (args.folder / "cells.h5ad").exists():
        write_h5ad(args.folder / "cells.h5ad", args.cells, args.genes)
    report["input"] = _input(args)
    if (args.folder / "atlas").exists():
        report["build"] = "the atlas was there"
    else:
        one, several = _built(args, "atlas", 1), _built(args, "again", args.workers)
        made = [(args.folder / name / "checksums.json").read_bytes() for name in ("atlas", "again")]
        assert made[0] == made[1], "the number of workers changes no byte"
        shutil.rmtree(args.folder / "again")
        report["build"] = {"one process": one, "several": several}
    atlas = Atlas.open(args.folder / "atlas")
    report["atlas"] = {
        "bytes_per_cell": round(sum(atlas.shard_size(i) for i in range(len(atlas.info.shards))) / len(atlas)),
        "shards": len(atlas.info.shards),
        "conditions": len(atlas.conditions),
    }
    rates, report["arrow_cache"] = _reading(atlas, args)
    report["cells/CPU-s"] = rates
    ours = {name: rate for name, rate in rates.items() if "h5py" not in name}
    for baseline in ("rows by h5py", "rows by h5py, as published"):
        by_row = rates[baseline]["cells"]
        report[f"times {baseline}"] = {name: round(rate["cells"] / by_row, 1) for name, rate in ours.items()}
    report["times the published figure"] = {
        name: round(rate["cells"] / PUBLISHED["CSR X, 12,626 genes, cells/CPU-s"], 1) for name, rate in ours.items()
    }
    report["peak_gb_of_this_process"] = _peak_gb(resource.RUSAGE_SELF)
    return report


def write_h5ad(path: Path, n_cells: int, n_genes: int) -> None:
    """Counts of cells in random order; perturbations, cell types and batches all met with one another and controls."""
    rng = np.random.default_rng(0)
    detection = np.minimum(rng.lognormal(-4, 1.7, n_genes), 0.98)
    for _ in range(30):  # the largest are cut, so that the mean takes some rounds
        detection = np.minimum(detection * DENSITY / detection.mean(), 0.98)
    detection = detection.astype(np.float32)
    names = np.array(["control", *(f"p{i:02d}" for i in range(PERTURBATIONS))])
    share = np.array([CONTROLS, *[(1 - CONTROLS) / PERTURBATIONS] * PERTURBATIONS])
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(rng.choice(names, n_cells, p=share)),
            "cell_type": pd.Categorical.from_codes(
                rng.integers(0, CELL_TYPES, n_cells), pd.Index([*"ABCDEFGH"[:CELL_TYPES]])
            ),
            "batch": pd.Categorical.from_codes(rng.integers(0, BATCHES, n_cells), pd.Index([*"abcdefgh"[:BATCHES]])),
        },
        index=[f"{BARCODE}{i:09d}-1" for i in range(n_cells)],
    )
    partial = path.with_suffix(".partial")
    with h5py.File(partial, "w") as file:
        empty = sparse.csr_matrix((0, n_genes), dtype=np.float32)
        adata = anndata.AnnData(empty, var=pd.DataFrame(index=[f"gene_{g}" for g in range(n_genes)]))
        write_elem(file, "/", adata)
        del file["X"]
        for first in range(0, n_cells, CHUNK):
            X = _counts(rng, detection, min(CHUNK, n_cells - first))
            if first == 0:  # the group's chunks are those that AnnData gives this one
                write_elem(file, "X", X)
            else:
                sparse_dataset(file["X"]).append(X)
        write_elem(file, "obs", obs)
    partial.rename(path)


def _counts(rng: np.random.Generator, detection: np.ndarray, n: int) -> sparse.csr_matrix:
    depth = rng.lognormal(0, 0.3, (n, 1)).clip(0.2, 3).astype(np.float32)
    found = rng.random((n, len(detection)), dtype=np.float32) < detection * depth
    X = sparse.csr_matrix(found, dtype=np.float32)
    X.data[:] = 1 + rng.poisson(rng.gamma(0.3, 1.5, X.nnz) * np.sqrt(detection[X.indices] * 10))
    return X


def _input(args: argparse.Namespace) -> dict[str, object]:
    with h5py.File(args.folder / "cells.h5ad") as file:
        n_values, n_cells = len(file["X/data"]), len(file["X/indptr"]) - 1
        n_genes, chunk = int(file["X"].attrs["shape"][1]), file["X/data"].chunks
    return {
        "cells": n_cells,
        "genes": n_genes,
        "density": round(n_values / (n_cells * n_genes), 4),
        "values_of_a_chunk": chunk[0] if chunk else None,
        "gb": round((args.folder / "cells.h5ad").stat().st_size / 1e9, 3),
    }


BUILD = """
import sys
from perturbdiff.config import BuildConfig, SourceConfig
from perturbdiff.atlas.build.run import build
path, out, bound, workers, shard_bytes = sys.argv[1:]
build(BuildConfig(out, [SourceConfig(path)]), int(bound), int(workers), shard_bytes=int(shard_bytes))
"""


def _built(args: argparse.Namespace, out: str, workers: int) -> dict[str, object]:
    """The cost of a build in a process of its own and its workers, and what of it is their start."""
    bound = round(args.max_memory * 1e9)
    words = [args.folder / "cells.h5ad", args.folder / out, bound, workers, args.shard_mb << 20]
    wall = time.perf_counter()
    cpu_s, peak_gb = _of_process(["-c", BUILD, *map(str, words)])
    wall = time.perf_counter() - wall
    start_s = _of_process(["-c", "import perturbdiff.atlas.build.run"])[0] * (1 if workers == 1 else workers + 1)
    n_cells = len(Atlas.open(args.folder / out))
    return {
        "workers": workers,
        "shard_mb": args.shard_mb,
        "cells_per_cpu_s": round(n_cells / cpu_s),
        "cells_per_cpu_s_without_start": round(n_cells / (cpu_s - start_s)),
        "cpu_s": round(cpu_s, 2),
        "start_cpu_s": round(start_s, 2),
        "wall_s": round(wall, 2),
        "max_memory_gb": round(bound / 1e9, 3),
        "peak_gb_of_a_process": peak_gb,
    }


def _of_process(words: Sequence[str]) -> tuple[float, float]:
    """CPU-seconds of a Python process and its children, and the most memory that one of them took, GB."""
    child = os.posix_spawn(sys.executable, [sys.executable, *words], os.environ, file_actions=QUIET)
    _, status, used = os.wait4(child, 0)
    assert status == 0, f"the process ended with {status}"
    return used.ru_utime + used.ru_stime, round(used.ru_maxrss * 1024 / 1e9, 3)


def _peak_gb(who: int) -> float:
    return round(resource.getrusage(who).ru_maxrss * 1024 / 1e9, 3)


def _reading(atlas: Atlas, args: argparse.Namespace) -> tuple[dict[str, dict[str, int]], dict[str, float]]:
    """Cells per CPU-second of each way to read, and what the Arrow cache took."""
    data = DataConfig(
        atlases=[AtlasConfig(path=str(args.folder / "atlas"))], n_hvg=None, set_size=args.set_size, sets_per_batch=SETS
    )
    config = Config(out="", data=data)
    config.split.validation_fraction = 0.0
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(args.folder / "cache")}  # before the import
    import datasets

    start = time.process_time()
    training = TrainingSet.from_atlases(config)
    cache_s = time.process_time() - start
    start = time.process_time()
    training = TrainingSet.from_atlases(config)
    again_s = time.process_time() - start
    cache = {"cpu_s": round(cache_s, 3), "cpu_s_when_there": round(again_s, 3)}
    cache["cells_per_cpu_s"] = round(len(atlas) / cache_s)
    rates = {
        "sparse batches": _of_batches(training, config, args, lambda batch: None),
        "dense log1p batches": _of_batches(training, config, args, CellSetBatch.dense, max(1, args.batches // 4)),
        "the sampler alone": _of_sampler(training, config, args),
        "slices by datasets": _of_slices(datasets, atlas, args),
    }
    config.data.streamed, config.data.decoding_threads = True, 1
    rates["streamed, a whole epoch"] = _of_stream(config, args)
    config.data.streamed = False
    config.data.atlases, config.data.screen = [], str(args.folder / "cells.h5ad")
    read = Screen.read(config.data.screen, config.data)
    screen = TrainingSet.from_screen(read, config)
    rates["a screen in memory, sparse"] = _of_batches(screen, config, args, lambda batch: None)
    sets = screen.train.sampler(config).batch(0, 0)
    names = read.obs.index[np.concatenate([rows for s in sets for rows in (s.rows, s.control_rows)])]
    rows = np.resize([int(name[len(BARCODE) : -2]) for name in names], args.rows)  # of the file
    del read, screen
    rates["rows by h5py"] = _of_rows(rows, args)
    rates["rows by h5py, as published"] = _as_published(rows[: len(rows) // 20], atlas.genes.names, args)
    return rates, cache


def _of_batches(
    training: TrainingSet,
    config: Config,
    args: argparse.Namespace,
    use: Callable[[CellSetBatch], object],
    n_batches: int | None = None,
) -> dict[str, int]:
    sampler = training.train.sampler(config)
    steps = iter(range(10**9))

    def work() -> tuple[int, int]:
        perturbed = controls = 0
        for _ in range(n_batches or args.batches):
            batch = training.train.batch(sampler, *sampler.position(next(steps)), 0, 1)
            use(batch)
            perturbed, controls = perturbed + len(batch.cells.position), controls + len(batch.controls.position)
        return perturbed, controls

    return _rate(work, args.repeats)


def _of_sampler(training: TrainingSet, config: Config, args: argparse.Namespace) -> dict[str, int]:
    sampler = training.train.sampler(config)
    steps = iter(range(10**9))

    def work() -> tuple[int, int]:
        sets = [s for _ in range(args.batches) for s in sampler.batch(*sampler.position(next(steps)))]
        return sum(len(s.rows) for s in sets), sum(len(s.control_rows) for s in sets)

    return _rate(work, args.repeats)


def _of_stream(config: Config, args: argparse.Namespace) -> dict[str, int]:
    # Each shard is read once an epoch, so that nothing less than an epoch says what a cell takes.
    def work() -> tuple[int, int]:
        training = TrainingSet.from_atlases(config)
        sampler = training.train.sampler(config)
        perturbed = controls = 0
        for step in range(sampler.steps_per_epoch):
            batch = training.train.batch(sampler, 0, step, 0, 1)
            perturbed, controls = perturbed + len(batch.cells.position), controls + len(batch.controls.position)
        return perturbed, controls

    return _rate(work, max(1, args.repeats // 2))


def _of_slices(datasets: object, atlas: Atlas, args: argparse.Namespace) -> dict[str, int]:
    """Slices of a set's size from the plain data set, as anyone can have them; no controls, no labels, no checks."""
    files = [str(args.folder / "atlas" / shard.file) for shard in atlas.info.shards]
    loaded = datasets.load_dataset(  # type: ignore[attr-defined]
        "parquet", data_files=files, split="train", columns=["library_size", "genes", atlas.info.value_column]
    ).with_format("arrow")
    rng = np.random.default_rng(0)

    def work() -> tuple[int, int]:
        n, n_values = 0, 0
        for first in rng.integers(0, max(1, len(loaded) - args.set_size), args.batches * SETS).tolist():
            table = loaded[first : first + args.set_size]
            for name in ("genes", atlas.info.value_column):
                n_values += len(table.column(name).combine_chunks().flatten().to_numpy())
            n += len(table)
        assert n_values > n, "cells have values"
        return n, 0

    return _rate(work, args.repeats)


def _of_rows(rows: np.ndarray, args: argparse.Namespace) -> dict[str, int]:
    """The values and genes of one cell after the other from the .h5ad."""
    with h5py.File(args.folder / "cells.h5ad") as file:
        data, indices, indptr = file["X/data"], file["X/indices"], file["X/indptr"][:]

        def work() -> tuple[int, int]:
            for row in rows.tolist():
                data[indptr[row] : indptr[row + 1]], indices[indptr[row] : indptr[row + 1]]
            return len(rows), 0

        return _rate(work, args.repeats)


def _as_published(rows: np.ndarray, wanted: Sequence[str], args: argparse.Namespace) -> dict[str, int]:
    """One dense cell after the other, its genes found by name each time."""
    with h5py.File(args.folder / "cells.h5ad") as file:
        names = np.array(wanted, dtype=object)

        def work() -> tuple[int, int]:
            for row in rows.tolist():
                first, last = int(file["X/indptr"][row]), int(file["X/indptr"][row + 1])
                genes, values = file["X/indices"][first:last], file["X/data"][first:last]
                cell = torch.zeros(1, len(names))
                cell[0, torch.from_numpy(genes.astype(np.int64))] = torch.from_numpy(values)
                place = {name: i for i, name in enumerate(names.tolist())}
                column = np.array([place.get(name, -1) for name in wanted])
                found = torch.zeros(1, len(wanted))
                found[:, column >= 0] = cell[:, column[column >= 0]]
            return len(rows), 0

        return _rate(work, args.repeats)


def _rate(work: Callable[[], tuple[int, int]], repeats: int) -> dict[str, int]:
    """Cells per CPU-second, with controls and without, of work that returns how many it read."""
    work()
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        perturbed, controls = work()
        seconds = max(time.process_time() - start, 1e-9)
        rates.append(((perturbed + controls) / seconds, perturbed / seconds))
    both = [round(statistics.median(rate)) for rate in zip(*rates, strict=True)]
    return {"cells": both[0], "perturbed": both[1]}


if __name__ == "__main__":
    main()
