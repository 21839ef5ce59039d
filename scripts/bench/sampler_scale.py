"""The sampler for 1,024 ranks over a billion cells in 5M conditions, without expression data: coverage, time, memory.

    OMP_NUM_THREADS=1 python scripts/bench/sampler_scale.py                  # minutes
    OMP_NUM_THREADS=1 python scripts/bench/sampler_scale.py --check whole    # deals all cells of an epoch: half an hour

Checked always: the sets of an epoch are dealt once each, and their spans make up every condition exactly; in --steps
random steps every rank's sets, cell by cell: on one rank only, of their condition, with controls of the same cell type
and batch; all sets of some conditions hold their cells once each; a run resumed at a random step on 3/4 of the ranks
gets the same sets. `--check whole` also counts each cell over all steps of an epoch. The same for streamed sets, and
for three atlases mixed by weight. A check that fails is an AssertionError. Prints JSON; times are CPU-seconds on one
core, memory is the peak of the process with its libraries so far.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from perturbdiff.data.conditions import ConditionIndex, match_controls
from perturbdiff.data.samplers import CellSet, CellSetSampler, SetSource, StreamedSampler

WEIGHTS, SHARES = (0.5, 0.3, 0.2), (0.6, 0.3, 0.1)  # of three atlases: weights, and parts of the cells
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10**9)
    parser.add_argument("--cell-types", type=int, default=50)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--perturbations", type=int, default=500)
    parser.add_argument("--set-size", type=int, default=256)
    parser.add_argument("--sets-per-batch", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=3, help="random steps looked at wholly")
    parser.add_argument("--check", choices=("sampled", "whole"), default="sampled")
    args = parser.parse_args()
    report: dict[str, object] = {"settings": vars(args), "load_average": os.getloadavg()}
    report["libraries_gb"] = _peak_gb()
    report["dealt"] = _dealt(args)
    report["streamed"] = _streamed(args)
    report["mixture"] = _mixture(args)
    print(json.dumps(report, indent=1))


def make_index(args: argparse.Namespace, share: float = 1.0, name: str = "") -> tuple[ConditionIndex, float]:
    """Conditions of heavy-tailed sizes, controls ten times as many in each context, and the CPU-seconds of it.

    The cells of `share` of the contexts, whose batches begin with `name`.
    """
    rng = np.random.default_rng(SEED)
    n_batches, per_context = max(1, round(args.batches * share)), args.perturbations + 1
    condition = np.arange(args.cell_types * n_batches * per_context)
    perturbation = _categorical("p", per_context, condition % per_context)
    cell_type = _categorical("c", args.cell_types, condition // (per_context * n_batches))
    batch = _categorical(f"{name}b", n_batches, condition // per_context % n_batches)
    is_control = condition % per_context == 0
    parts = np.cumsum(rng.lognormal(0, 1, len(condition)) * np.where(is_control, 10, 1))
    more = round(args.cells * share) - len(condition)  # than one a condition
    n_cells = 1 + np.diff(np.rint(parts / parts[-1] * more).astype(np.int64), prepend=0)
    start = time.process_time()
    index = ConditionIndex.from_conditions(perturbation, cell_type, batch, is_control, n_cells)
    return index, time.process_time() - start


def _dealt(args: argparse.Namespace) -> dict[str, object]:
    index, index_s = make_index(args)
    start = time.process_time()
    pools = match_controls(index, "batch")
    pools_s = time.process_time() - start
    start = time.process_time()
    sampler = CellSetSampler(index, pools, args.set_size, args.sets_per_batch, SEED)
    sampler_s = time.process_time() - start
    start = time.process_time()
    sampler.batch(0, 0, 0, args.ranks)
    first_s = time.process_time() - start
    sizes = index.n_cells[~index.is_control]
    report: dict[str, object] = {
        "cells": int(index.n_cells.sum()),
        "perturbed_cells": int(sizes.sum()),
        "conditions": len(index),
        "cells_of_a_condition": {"median": float(np.median(sizes)), "most": int(sizes.max())},
        "sets": sampler.n_sets,
        "steps": sampler.steps_per_epoch,
        "start_of_a_rank_cpu_s": _rounded(index=index_s, pools=pools_s, sampler=sampler_s, first_batch=first_s),
        "peak_gb": _peak_gb(),
    }
    report["spans_cpu_s"] = _check_spans(sampler)
    rng = np.random.default_rng(SEED + 1)
    steps = _some(rng, sampler.steps_per_epoch, args.steps)
    report |= _check_steps(sampler, steps, args)
    start = time.process_time()
    sampler.n_cells(0, 0)
    report["cells_of_a_step_cpu_s"] = round(time.process_time() - start, 4)
    conditions = np.append(_some(rng, len(index), 200), [np.where(index.is_control, 0, index.n_cells).argmax()])
    report["whole_conditions"] = _check_conditions(sampler, conditions[~index.is_control[conditions]])
    report["resumed_at"] = _check_resumed(sampler, make_index(args)[0], args, rng)
    report["check"] = args.check
    if args.check == "whole":
        report["whole_cpu_s"] = _check_whole(sampler)
    report["peak_gb_with_checks"] = _peak_gb()
    return report


def _streamed(args: argparse.Namespace) -> dict[str, object]:
    whole, _ = make_index(args)
    n_cells = int(whole.n_cells.sum())
    borders = np.linspace(0, n_cells, args.shards + 1)[:-1].astype(np.int64)
    start = time.process_time()
    index = whole.cut(borders)
    own = match_controls(index.by_shard(borders), "batch", np.zeros(len(index), dtype=bool))
    pools = match_controls(index, "batch").preferring(own, args.set_size)
    sampler = StreamedSampler(index, pools, borders, args.ranks, args.set_size, args.sets_per_batch, SEED)
    start_s = time.process_time() - start
    shards, ends = sampler._streams(0)
    per_lane = np.array([int(end[-1]) if len(end) else 0 for end in ends])
    read = np.sort(np.concatenate([np.array(lane, dtype=np.int64) for lane in shards]))
    assert np.array_equal(read, np.flatnonzero(sampler._sets.per_source)), "each shard is read once, by one lane"
    assert per_lane.sum() == sampler.n_sets, "each set is on one lane"
    rng = np.random.default_rng(SEED + 2)
    start = time.process_time()
    for lane in _some(rng, args.ranks, 4).tolist():  # all steps of it
        sets = np.concatenate([sampler._assigned(0, step, lane) for step in range(sampler.n_steps(0))])
        first, n = sampler._sets.first_of_source[shards[lane]], sampler._sets.per_source[shards[lane]]
        expected = [np.arange(a, a + b) for a, b in zip(first, n, strict=True)]
        assert np.array_equal(np.sort(sets), np.sort(np.concatenate([*expected, sets[:0]]))), "all sets of its shards"
    lanes_s = time.process_time() - start
    full = int(per_lane.min()) // (args.sets_per_batch // args.ranks)  # steps in which all lanes have sets
    report: dict[str, object] = {
        "shards": args.shards,
        "lanes": args.ranks,
        "conditions": len(index),
        "sets": sampler.n_sets,
        "steps": sampler.n_steps(0),
        "steps_with_all_lanes": full,
        "sets_of_a_lane": {"least": int(per_lane.min()), "mean": float(per_lane.mean()), "most": int(per_lane.max())},
        "balance": round(float(per_lane.mean() / per_lane.max()), 4),
        "start_of_a_rank_cpu_s": round(start_s, 3),
        "four_lanes_wholly_cpu_s": round(lanes_s, 3),
    }
    report |= _check_steps(sampler, _some(rng, max(full, 1), args.steps), args)
    start = time.process_time()
    sampler.n_cells(1, 0)  # counted for a whole epoch at once
    report["cells_of_all_steps_cpu_s"] = round(time.process_time() - start, 4)
    report["resumed_at"] = _check_resumed_batches(sampler, sampler, int(rng.integers(max(full, 1))), args)
    report["peak_gb_with_checks"] = _peak_gb()
    return report


def _mixture(args: argparse.Namespace) -> dict[str, object]:
    parts = [make_index(args, share, f"{i}") for i, share in enumerate(SHARES)]
    start = time.process_time()
    n_cells = [int(index.n_cells.sum()) for index, _ in parts]
    index = ConditionIndex.concat([index for index, _ in parts], np.cumsum([0, *n_cells[:-1]]).tolist())
    pools = match_controls(index, "batch")
    sources = [SetSource(weight=weight) for weight in WEIGHTS]
    sampler = CellSetSampler(index, pools, args.set_size, args.sets_per_batch, SEED, sources=sources)
    start_s = time.process_time() - start
    _check_spans(sampler)
    # Which set of which epoch of its own atlas each set is, over two epochs of the mixture.
    start = time.process_time()
    dealt = [
        sampler._of_epoch(epoch, sampler._assigned(epoch, step))
        for epoch in (0, 1)
        for step in range(sampler.steps_per_epoch)
    ]
    own, sets = (np.concatenate([pair[i] for pair in dealt]) for i in (0, 1))
    del dealt
    pairs = np.sort(own * sampler._sets.per_source.sum() + sets)
    assert (pairs[1:] != pairs[:-1]).all(), "no set twice in an epoch of its atlas"
    source = np.searchsorted(sampler._sets.first_of_source, sets, "right") - 1
    counts = np.bincount(source, minlength=len(WEIGHTS))
    n_sets = sampler._sets.per_source
    for i, n in enumerate(n_sets.tolist()):
        rounds = np.bincount(own[source == i])
        assert (rounds[:-1] == n).all(), "an atlas begins an epoch of its own when the one before is through"
        assert len(rounds) == -(-int(counts[i]) // n), "and not earlier"
    epochs_s = time.process_time() - start
    steps = _some(np.random.default_rng(SEED + 3), sampler.steps_per_epoch, args.steps)
    return {
        "weights": WEIGHTS,
        "sets_of_each": n_sets.tolist(),
        "share_of_each": [round(float(share), 4) for share in counts / counts.sum()],
        "own_epochs_in_two": [round(float(share), 3) for share in counts / n_sets],
        "start_of_a_rank_cpu_s": round(start_s, 3),
        "two_epochs_of_numbers_cpu_s": round(epochs_s, 3),
        **_check_steps(sampler, steps, args, weighted=True),
    }


def _check_spans(sampler: CellSetSampler) -> float:
    """The sets of an epoch are dealt once each, and make up each condition exactly; CPU-seconds of it."""
    start = time.process_time()
    numbers = np.concatenate([sampler._assigned(0, step) for step in range(sampler.steps_per_epoch)])
    assert np.array_equal(np.sort(numbers), np.arange(sampler.n_sets)), "each number of an epoch is dealt once"
    sets = sampler._sets
    total = int(sets.per_source.sum())
    group, begin, end = sets.spans(np.arange(total))
    first = np.concatenate([[True], group[1:] != group[:-1]])
    assert np.array_equal(begin, np.where(first, 0, np.concatenate([[0], end[:-1]]))), "sets follow one another"
    assert np.array_equal(end[np.append(first[1:], True)], sets.groups.n_cells[group[first]]), "to the last cell"
    assert (end > begin).all()
    assert (end - begin <= sampler.set_size).all()
    conditions = sets.groups.members
    assert np.array_equal(np.sort(conditions), np.flatnonzero(~sampler.index.is_control)), "every perturbed condition"
    return round(time.process_time() - start, 3)


def _check_steps(
    sampler: CellSetSampler | StreamedSampler, steps: np.ndarray, args: argparse.Namespace, weighted: bool = False
) -> dict[str, object]:
    """All ranks' sets of some steps of the first epoch, cell by cell, and what making them took.

    With weights a step may hold cells of an atlas in two of its own epochs.
    """
    seconds, n_sets, n_cells = [], 0, 0
    for step in steps.tolist():
        found: list[CellSet] = []
        for rank in range(args.ranks):
            start = time.process_time()
            found += sampler.batch(0, step, rank, args.ranks)
            seconds.append(time.process_time() - start)
        assert len({s.key for s in found}) == len(found), "no set on two ranks"
        _check_cells(sampler.index, found, once=not weighted)
        dealt = sum(len(cell_set.rows) for cell_set in found)
        assert dealt == sampler.n_cells(0, step), "the ranks have all cells of the step"
        n_sets, n_cells = n_sets + len(found), n_cells + dealt
    return {
        "steps_looked_at": len(steps),
        "sets_looked_at": n_sets,
        "cells_looked_at": n_cells,
        "batch_of_a_rank_cpu_ms": {
            "median": round(statistics.median(seconds) * 1e3, 3),
            "worst": round(max(seconds) * 1e3, 3),
        },
        "set_cpu_us": round(sum(seconds) / max(n_sets, 1) * 1e6, 1),
    }


def _check_cells(index: ConditionIndex, sets: Sequence[CellSet], once: bool) -> None:
    """No cell twice if `once`, all of the set's condition; as many controls, of its cell type, batch and atlas."""
    rows, controls = (np.concatenate([getattr(s, name) for s in sets]) for name in ("rows", "control_rows"))
    of = np.repeat([s.condition for s in sets], [len(s.rows) for s in sets])
    assert not once or len(np.unique(rows)) == len(rows), "no cell on two ranks"
    inside = rows - index.first[of]
    assert ((inside >= 0) & (inside < index.n_cells[of])).all(), "cells of the set's condition"
    assert not index.is_control[of].any()
    assert all(len(s.rows) == len(s.control_rows) for s in sets)
    order = np.argsort(index.first)
    drawn = order[np.searchsorted(index.first[order], controls, "right") - 1]
    assert (controls - index.first[drawn] < index.n_cells[drawn]).all()
    assert index.is_control[drawn].all()
    assert np.array_equal(index.codes[drawn, 1:], index.codes[of, 1:]), "controls of the same cell type and batch"


def _check_conditions(sampler: CellSetSampler, conditions: np.ndarray) -> int:
    """All sets of some conditions hold each of their cells once; how many conditions."""
    sets = sampler._sets
    group_of = np.argsort(sets.groups.members)  # each group is one condition here
    groups = group_of[np.searchsorted(sets.groups.members[group_of], conditions)]
    for condition, group in zip(conditions.tolist(), groups.tolist(), strict=True):
        last = int(sets.ends[group])
        found = sampler.cell_sets(0, np.arange(last - int(sets.per_group[group]), last))
        rows = np.sort(np.concatenate([s.rows for s in found]))
        assert np.array_equal(rows, sampler.index.cells(condition)), "every cell of the condition once"
    return len(conditions)


def _check_resumed(
    sampler: CellSetSampler, index: ConditionIndex, args: argparse.Namespace, rng: np.random.Generator
) -> dict[str, int]:
    """A sampler made anew, on fewer ranks, goes on with the same sets at a random step."""
    pools = match_controls(index, "batch")
    resumed = CellSetSampler(index, pools, args.set_size, args.sets_per_batch, SEED)
    return _check_resumed_batches(sampler, resumed, int(rng.integers(sampler.steps_per_epoch)), args)


def _check_resumed_batches(
    before: CellSetSampler | StreamedSampler,
    after: CellSetSampler | StreamedSampler,
    step: int,
    args: argparse.Namespace,
) -> dict[str, int]:
    n_ranks = max(1, args.ranks * 3 // 4)
    old, new = (
        sorted((s for rank in range(n) for s in sampler.batch(1, step, rank, n)), key=lambda cell_set: cell_set.key)
        for sampler, n in ((before, args.ranks), (after, n_ranks))
    )
    assert [s.key for s in old] == [s.key for s in new], "the same sets"
    for name in ("rows", "control_rows"):
        a, b = (np.concatenate([getattr(s, name) for s in sets]) for sets in (old, new))
        assert np.array_equal(a, b), "of the same cells"
    return {"epoch": 1, "step": step, "ranks_before": args.ranks, "ranks_after": n_ranks, "sets": len(new)}


def _check_whole(sampler: CellSetSampler) -> float:
    """Deal a whole epoch: each perturbed cell once, no control; CPU-seconds of it."""
    start = time.process_time()
    index = sampler.index
    seen = np.zeros(int(index.n_cells.sum()), dtype=bool)
    dealt = 0
    for step in range(sampler.steps_per_epoch):
        for cell_set in sampler.batch(0, step):
            seen[cell_set.rows] = True
            dealt += len(cell_set.rows)
    found = np.add.reduceat(seen, index.first, dtype=np.int64)
    assert np.array_equal(found, np.where(index.is_control, 0, index.n_cells)), "every perturbed cell, no control"
    assert dealt == found.sum(), "none twice"
    return round(time.process_time() - start, 1)


def _some(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """`k` of 0..n-1, or all."""
    return np.sort(rng.choice(n, min(n, k), replace=False))


def _categorical(letter: str, n: int, codes: np.ndarray) -> Any:
    return pd.Categorical.from_codes(codes, pd.Index([f"{letter}{i:05d}" for i in range(n)]))


def _rounded(**seconds: float) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()} | {"all": round(sum(seconds.values()), 3)}


def _peak_gb() -> float:
    """Of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


if __name__ == "__main__":
    main()
