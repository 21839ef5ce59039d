"""CPU-seconds and peak memory of the condition index, from the labels of cells and from an atlas's conditions.

    OMP_NUM_THREADS=1 python scripts/bench/index.py

Labels are random pandas categoricals of the shapes of PBMC (90 cytokines and a control, 18 cell types, 12 donors; 9M
cells) and Tahoe-100M (1137, 50, 14; 100M cells), in random order and in the order of an atlas. Each case runs in a
process of its own, whose peak memory holds its libraries and the labels. `nested masks` is the published code's way,
one mask over all cells for each perturbation, cell type and batch, on 100k cells: `times` is what it takes more than
ours on the same labels. Prints JSON. Times are CPU-seconds on one core; medians over --repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import pandas as pd

from perturbdiff.data.conditions import ConditionIndex

CONTROL = "p00000"


@dataclass(frozen=True)
class Shape:
    """How many perturbations (with the control), cell types and batches, and how many cells at full size."""

    perturbations: int
    cell_types: int
    batches: int
    n_cells: int


SHAPES = {"pbmc": Shape(91, 18, 12, 9_000_000), "tahoe": Shape(1137, 50, 14, 100_000_000)}
BUDGETS = {"pbmc": {"cpu_s": 3.0}, "tahoe": {"cpu_s": 60.0, "peak_gb": 8.0}}
REFERENCE = {"cpu_s_100k_cells": 0.83, "cpu_s_9M_cells": 349.0}
ORDERS = ("random", "sorted", "conditions")  # "conditions": from a table with one row a condition


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, help="at most so many")
    parser.add_argument("--nested-cells", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    report: dict[str, object] = {"reference": REFERENCE, "load_average": os.getloadavg()}
    for shape, sizes in SHAPES.items():
        n_cells = min(sizes.n_cells, args.cells or sizes.n_cells)
        cases = {order: _in_own_process(shape, order, n_cells, args.repeats) for order in ORDERS}
        report[shape] = {"cells": n_cells, "budget": BUDGETS[shape], **cases}
    masks = _in_own_process("pbmc", "nested", args.nested_cells, 1)
    ours = _in_own_process("pbmc", "random", args.nested_cells, args.repeats)
    report["nested masks"] = {"cells": args.nested_cells, **masks, "ours_cpu_s": ours["cpu_s"]}
    report["nested masks"] |= {"times": round(masks["cpu_s"] / max(ours["cpu_s"], 1e-4), 1)}  # type: ignore[operator]
    print(json.dumps(report, indent=1))


def _in_own_process(shape: str, order: str, n_cells: int, repeats: int) -> dict[str, float]:
    with get_context("fork").Pool(1) as pool:  # forked, it has this process's libraries and nothing else
        return pool.apply(_measure, (SHAPES[shape], order, n_cells, repeats))


def _measure(shape: Shape, order: str, n_cells: int, repeats: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    before_gb = _peak_gb()
    if order == "conditions":
        sizes, labels = _conditions(shape, n_cells, rng)
        is_control = np.asarray(labels[0] == CONTROL)

        def work() -> ConditionIndex:
            return ConditionIndex.from_conditions(labels[0], labels[1], labels[2], is_control, sizes)
    else:
        labels = _labels(shape, order, n_cells, rng)

        def work() -> ConditionIndex:
            return ConditionIndex.from_labels(labels[0], labels[1], labels[2], CONTROL)

    report: dict[str, float] = {"label_gb": round(sum(label.codes.nbytes for label in labels) / 1e9, 3)}
    if order == "nested":
        found: list[np.ndarray] = []
        report["cpu_s"] = _cpu_seconds(lambda: found.extend(_nested_masks(*labels)), 1)
        assert len(found) == len(work()), "the masks find the conditions that the index finds"
        return report
    report["cpu_s"] = _cpu_seconds(work, repeats)
    index = work()
    assert index.n_cells.sum() == n_cells, "every cell has a condition"
    report |= {"conditions": len(index), "libraries_gb": before_gb, "peak_gb": _peak_gb()}
    return report


def _labels(shape: Shape, order: str, n_cells: int, rng: np.random.Generator) -> list[Any]:
    """Perturbation, cell type and batch of each cell."""
    counts = {"p": shape.perturbations, "c": shape.cell_types, "b": shape.batches}
    if order == "sorted":  # by cell type, batch, perturbation
        key = np.arange(n_cells, dtype=np.int64) * (shape.perturbations * shape.cell_types * shape.batches) // n_cells
        codes = [
            (key % shape.perturbations).astype(np.int16),
            (key // (shape.perturbations * shape.batches)).astype(np.int16),
            (key // shape.perturbations % shape.batches).astype(np.int16),
        ]
    else:
        codes = [rng.integers(0, n, n_cells, dtype=np.int16) for n in counts.values()]
    return [_categorical(letter, n, code) for (letter, n), code in zip(counts.items(), codes, strict=True)]


def _conditions(shape: Shape, n_cells: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Any]]:
    """Cells of each condition, and its labels, as in an atlas."""
    n = min(shape.perturbations * shape.cell_types * shape.batches, n_cells)
    sizes = 1 + rng.multinomial(n_cells - n, np.full(n, 1 / n))
    return sizes, _labels(shape, "sorted", n, rng)


def _categorical(letter: str, n: int, codes: np.ndarray) -> Any:
    return pd.Categorical.from_codes(codes, pd.Index([f"{letter}{i:05d}" for i in range(n)]))


def _nested_masks(perturbation: Any, cell_type: Any, batch: Any) -> list[np.ndarray]:
    """The cells of each condition, found as the published code does."""
    p, c, b = (np.asarray(labels.codes) for labels in (perturbation, cell_type, batch))
    found = []
    for this_p in np.unique(p):
        of_p = p == this_p
        for this_c in np.unique(c[of_p]):
            of_pc = of_p & (c == this_c)
            for this_b in np.unique(b[of_pc]):
                found.append(np.where(of_pc & (b == this_b))[0])
    return found


def _cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return round(statistics.median(seconds), 4)


def _peak_gb() -> float:
    """Of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


if __name__ == "__main__":
    main()
