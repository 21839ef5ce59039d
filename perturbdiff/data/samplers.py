"""Cell sets: which cells of which condition form a set, with which controls, in which step, on which rank.

Everything is a pure function of (seed, epoch, step, rank, world size); a resumed run needs no more than those.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perturbdiff.data.conditions import ConditionIndex, ControlPools, Groups
from perturbdiff.data.rng import numpy_generator, permuted

RUNS_PER_SET = 16  # a set is this many runs of neighbouring cells: few enough for a disk, enough to mix


def draw_controls(pool: int, n: int, seed: int, *key: int, run: int = 1) -> np.ndarray:
    """Places of `n` controls in a pool of so many, without repeats while it lasts, then in further passes over it."""
    passes = [
        shuffled_positions(pool, 0, min(pool, n - start), run, seed, "controls", *key, start // pool)
        for start in range(0, n, pool)
    ]
    return np.concatenate(passes) if passes else np.zeros(0, np.int64)


def shuffled_positions(n: int, start: int, stop: int, run: int, seed: int, purpose: str, *key: int) -> np.ndarray:
    """Places `start` to `stop` of a keyed shuffle of 0..n-1 in which runs of `run` neighbours stay together.

    The runs start elsewhere for each key, so that the neighbours in a run change too.
    """
    n_runs = n // run
    positions = np.arange(start, stop)
    if n_runs > 1:
        slots = np.arange(start // run, min(-(-stop // run), n_runs))  # of the whole runs among them
        runs = permuted(n_runs, slots, seed, purpose, *key) if len(slots) else slots
        whole = positions < n_runs * run  # what is left over comes last
        positions[whole] = runs[positions[whole] // run - start // run] * run + positions[whole] % run
    if run > 1:
        positions = (positions + numpy_generator(seed, f"{purpose}, shift", *key).integers(n)) % n
    return positions


@dataclass(frozen=True)
class CellSet:
    """At most S cells of one condition, and as many controls, or none.

    key
        (epoch, set number) for keyed randomness; the same on any world size.
    condition
        The condition, or one of those that make up a marginal set.
    rows, control_rows
        Rows of the screen or atlas, (n,) each.
    """

    key: tuple[int, int]
    condition: int
    rows: np.ndarray
    control_rows: np.ndarray


@dataclass(frozen=True)
class SetSource:
    """How the cells of one source become sets.

    marginal
        All cells become sets, none as controls: unperturbed ones by cell type over all batches, perturbed ones by
        condition. Otherwise the perturbed ones, each set with controls.
    weight
        Share of an epoch's sets relative to the other sources; None in all of them: as many as each has.
    self_controlled
        Of a marginal one: sets have controls all the same, cells of their own kind drawn at random. To leave them as
        they are is right then, as it is nearly in a screen; without, the denoiser learns to make whole cells of noise.
    """

    marginal: bool = False
    weight: float | None = None
    self_controlled: bool = False


PERTURBED = SetSource()


class _Sets:
    """The sets of an index: groups of cells cut into sets of at most S, in the order of sources."""

    def __init__(
        self,
        index: ConditionIndex,
        pools: ControlPools,
        sources: Sequence[SetSource],
        set_size: int,
        min_set_size: int,
        seed: int,
    ) -> None:
        self.pools, self.sources = pools, sources
        self.set_size, self.min_set_size, self.seed = set_size, min_set_size, seed
        marginal = np.array([source.marginal for source in sources])[index.source]
        conditions = np.flatnonzero(marginal | ~index.is_control)
        pooled = (marginal & index.is_control)[conditions]
        # Sources apart; the conditions of a pooled cell type share the key of the first of them.
        cell_type = index.source[conditions].astype(np.int64) * len(index.names[1]) + index.codes[conditions, 1]
        _, first, of = np.unique(np.where(pooled, cell_type, -1), return_index=True, return_inverse=True)
        key = np.where(pooled, conditions[first[of]] if len(conditions) else conditions, conditions)
        self.groups = Groups.by(index, conditions, key)
        n_cells = self.groups.n_cells
        full, rest = np.divmod(n_cells, set_size)
        self.per_group = np.where(n_cells >= min_set_size, full + (rest > 0), 0)
        self.ends = np.cumsum(self.per_group)
        source_of_group = index.source[self.groups.members[self.groups.begin[:-1]]]
        self.per_source = np.bincount(source_of_group, self.per_group, len(sources)).astype(np.int64)
        self.first_of_source = np.cumsum(self.per_source) - self.per_source
        self.left_out = int(n_cells[n_cells < min_set_size].sum())

    def spans(self, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Group of each set, and the positions of its cells in the shuffled group, from start to stop."""
        group = np.searchsorted(self.ends, sets, "right")
        n_cells, per_group = self.groups.n_cells[group], self.per_group[group]
        position = sets - (self.ends[group] - per_group)
        start = position * self.set_size
        rest = n_cells - (per_group - 1) * self.set_size  # cells of the last set
        # Where the last set would be too short, it and the one before share their cells evenly.
        shared = (rest < self.min_set_size) & (per_group > 1)
        start = np.where(shared & (position == per_group - 1), n_cells - (rest + self.set_size) // 2, start)
        stop = np.where(position == per_group - 1, n_cells, start + self.set_size)
        stop = np.where(shared & (position == per_group - 2), n_cells - (rest + self.set_size) // 2, stop)
        return group, start, stop

    def make(self, epoch: int, numbers: np.ndarray, epochs: np.ndarray, sets: np.ndarray) -> list[CellSet]:
        """Sets that are assigned in an epoch under these numbers, each in an epoch of its source."""
        spans = zip(numbers.tolist(), epochs.tolist(), *(part.tolist() for part in self.spans(sets)), strict=True)
        return [self._cell_set((epoch, number), *span) for number, *span in spans]

    def _cell_set(self, key: tuple[int, int], epoch: int, group: int, start: int, stop: int) -> CellSet:
        groups, run = self.groups, max(1, self.set_size // RUNS_PER_SET)
        condition, n = int(groups.in_group(group)[0]), int(groups.n_cells[group])
        positions = shuffled_positions(n, start, stop, run, self.seed, "cells of a condition", epoch, group)
        rows = groups.rows(group, positions)
        source = self.sources[groups.index.source[condition]]
        if source.marginal and not source.self_controlled:
            return CellSet(key, condition, rows, np.zeros(0, np.int64))
        if source.self_controlled:
            drawn = draw_controls(n, len(rows), self.seed, *key, run=run)
            return CellSet(key, condition, rows, groups.rows(group, drawn))
        pool = self.pools.of[condition]
        drawn = draw_controls(int(self.pools.groups.n_cells[pool]), len(rows), self.seed, *key, run=run)
        return CellSet(key, condition, rows, self.pools.groups.rows(pool, drawn))


class CellSetSampler:
    """Deals every perturbed cell exactly once per epoch.

    Each epoch the cells of each condition are shuffled (`shuffled_positions`) and cut into sets of at most `set_size`,
    the last one short; all sets are shuffled together and assigned, `sets_per_batch` a step over all ranks. A last set
    under `min_set_size` shares the cells of the one before it; conditions with fewer cells than that are left out.

    With weights, an epoch holds as many sets as all sources have together, each source in its share of them: a source
    goes through its own epochs, one after the other, at its own pace.

    Raises
    ------
    ValueError
        Some but not all weights are given, or a source to be mixed has no sets.
    """

    def __init__(
        self,
        index: ConditionIndex,
        pools: ControlPools,
        set_size: int,
        sets_per_batch: int,
        seed: int,
        min_set_size: int = 1,
        sources: Sequence[SetSource] = (PERTURBED,),
    ) -> None:
        self.index = index
        self.set_size, self.sets_per_batch, self.seed = set_size, sets_per_batch, seed
        self._sets = _Sets(index, pools, sources, set_size, min_set_size, seed)
        self._dealt_of_source = _shares(self._sets.per_source, [source.weight for source in sources])
        self._ends = np.cumsum(self._dealt_of_source)

    @property
    def n_sets(self) -> int:
        """Sets in an epoch."""
        return int(self._ends[-1])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_sets // self.sets_per_batch)

    @property
    def left_out(self) -> int:
        """Cells of conditions under the minimum set size."""
        return self._sets.left_out

    def position(self, step: int) -> tuple[int, int]:
        """Epoch and step of that epoch of the run's step `step`."""
        return divmod(step, self.steps_per_epoch)

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> list[CellSet]:
        """The sets of one rank in one step; the last step of an epoch has fewer, perhaps none on some ranks."""
        return self.cell_sets(epoch, self._assigned(epoch, step, rank, world_size))

    def n_cells(self, epoch: int, step: int) -> int:
        """Cells of a step over all ranks, without controls."""
        _, sets = self._of_epoch(epoch, self._assigned(epoch, step))
        _, start, stop = self._sets.spans(sets)
        return int((stop - start).sum())

    def _assigned(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        first, end = step * self.sets_per_batch, (step + 1) * self.sets_per_batch
        positions = np.arange(first + rank, min(end, self.n_sets), world_size)
        return permuted(self.n_sets, positions, self.seed, "set order", epoch)

    def cell_sets(self, epoch: int, numbers: np.ndarray) -> list[CellSet]:
        """The sets with these numbers (0..n_sets-1) of an epoch."""
        return self._sets.make(epoch, numbers, *self._of_epoch(epoch, numbers))

    def _of_epoch(self, epoch: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # The source's own epoch, and the set, of each number.
        source = np.searchsorted(self._ends, numbers, "right")
        assigned, n_sets = self._dealt_of_source[source], self._sets.per_source[source]
        epochs, position = np.divmod(epoch * assigned + numbers - (self._ends[source] - assigned), n_sets)
        for i, e in set(zip(source[assigned != n_sets].tolist(), epochs[assigned != n_sets].tolist(), strict=True)):
            these = (source == i) & (epochs == e)  # a part of a source's epoch must not be the part that comes first
            position[these] = permuted(int(n_sets[these][0]), position[these], self.seed, "order of a source", i, e)
        return epochs, self._sets.first_of_source[source] + position


class StreamedSampler:
    """As `CellSetSampler` for shards that are read one after the other.

    Each epoch the shards are shuffled and assigned to `n_streams` streams, evenly by number of sets; a stream goes
    through its shards, and through the sets of each in shuffled order. Each step takes `sets_per_batch / n_streams`
    sets of each. A rank has the streams rank, rank + world size, ...: the sets of a step do not depend on the world
    size.
    Conditions are cut where a shard ends, and draw controls from their own shard where it has enough for a set. The
    index and pools are those of `index.cut(borders)`.

    Raises
    ------
    ValueError
        `n_streams` does not divide `sets_per_batch`, or weights are given.
    """

    def __init__(
        self,
        index: ConditionIndex,
        pools: ControlPools,
        borders: np.ndarray,
        n_streams: int,
        set_size: int,
        sets_per_batch: int,
        seed: int,
        min_set_size: int = 1,
        sources: Sequence[SetSource] = (PERTURBED,),
    ) -> None:
        if sets_per_batch % n_streams:
            raise ValueError(
                f"data.sets_per_batch ({sets_per_batch}) must be a multiple of data.n_streams ({n_streams})."
            )
        if any(source.weight is not None for source in sources):
            raise ValueError("data.streamed=true mixes atlases by their size; drop their weights or stream none.")
        self.index = index
        self.set_size, self.sets_per_batch, self.seed, self.n_streams = set_size, sets_per_batch, seed, n_streams
        # Each shard is a source of its own: its sets follow one another and nothing is pooled over shards.
        by_shard = index.by_shard(borders)
        source_of_shard = np.zeros(len(borders), np.int32)
        source_of_shard[by_shard.source] = index.source
        of_shard = [sources[source] for source in source_of_shard.tolist()]
        self._sets = _Sets(by_shard, pools, of_shard, set_size, min_set_size, seed)
        self._orders: dict[int, tuple[list[list[int]], list[np.ndarray]]] = {}  # of an epoch and its neighbours
        self._step_cells: tuple[int, np.ndarray] | None = None  # of one epoch
        self._first_steps = [0]  # of each epoch looked at so far

    @property
    def n_sets(self) -> int:
        """Sets in an epoch."""
        return int(self._sets.per_source.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; others may have a few more or fewer, as shards are assigned anew."""
        return self.n_steps(0)

    @property
    def left_out(self) -> int:
        """Cells of conditions under the minimum set size, in their shard."""
        return self._sets.left_out

    def n_steps(self, epoch: int) -> int:
        """Steps of an epoch: until the stream with the most sets is through."""
        longest = max((int(ends[-1]) for ends in self._streams(epoch)[1] if len(ends)), default=0)
        return -(-longest // (self.sets_per_batch // self.n_streams))

    def position(self, step: int) -> tuple[int, int]:
        """Epoch and step of that epoch of the run's step `step`."""
        while self._first_steps[-1] <= step:
            self._first_steps.append(self._first_steps[-1] + self.n_steps(len(self._first_steps) - 1))
        epoch = int(np.searchsorted(self._first_steps, step, "right")) - 1
        return epoch, step - self._first_steps[epoch]

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> list[CellSet]:
        """The sets of one rank in one step; fewer where one of its streams is through."""
        assigned = [self._assigned(epoch, step, stream) for stream in range(rank, self.n_streams, world_size)]
        sets = np.concatenate([np.zeros(0, np.int64), *assigned])  # a rank beyond the streams has none
        return self._sets.make(epoch, sets, np.full(len(sets), epoch), sets)

    def n_cells(self, epoch: int, step: int) -> int:
        """Cells of a step over all ranks, without controls."""
        if self._step_cells is None or self._step_cells[0] != epoch:
            self._step_cells = (epoch, self._cells_of_steps(epoch))
        return int(self._step_cells[1][step : step + 1].sum())

    def _cells_of_steps(self, epoch: int) -> np.ndarray:
        # Of all steps at once, stream by stream: a thousand of them, step by step, would take longer than making
        # batches.
        n_cells = np.zeros(self.n_steps(epoch), np.int64)
        for stream, ends in enumerate(self._streams(epoch)[1]):
            if len(ends):
                positions = np.arange(ends[-1])
                _, start, stop = self._sets.spans(self._sets_of_stream(epoch, stream, positions))
                steps = positions // (self.sets_per_batch // self.n_streams)
                n_cells[: steps[-1] + 1] += np.bincount(steps, stop - start).astype(np.int64)
        return n_cells

    def shards(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """The shards that a rank reads in a step, then those its streams come to next, if need be in the next epoch."""
        shards, ends = self._streams(epoch)
        position = step * (self.sets_per_batch // self.n_streams)
        now, later = [], []
        for stream in range(rank, self.n_streams, world_size):
            last = np.searchsorted(ends[stream], position + self.sets_per_batch // self.n_streams - 1, "right")
            at = int(np.searchsorted(ends[stream], position, "right"))
            now += shards[stream][at : int(last) + 1]
            later += shards[stream][int(last) + 1 : int(last) + 2] or self._streams(epoch + 1)[0][stream][:1]
        return list(dict.fromkeys(now + later))  # a stream may come to what another one reads now

    def _assigned(self, epoch: int, step: int, stream: int) -> np.ndarray:
        ends, n = self._streams(epoch)[1][stream], self.sets_per_batch // self.n_streams
        n_stream = int(ends[-1]) if len(ends) else 0
        return self._sets_of_stream(epoch, stream, np.arange(step * n, min((step + 1) * n, n_stream)))

    def _sets_of_stream(self, epoch: int, stream: int, positions: np.ndarray) -> np.ndarray:
        shards, ends = self._streams(epoch)
        at = np.searchsorted(ends[stream], positions, "right")
        found = np.zeros(len(positions), np.int64)
        for i in np.unique(at):
            shard = shards[stream][i]
            n_sets = int(self._sets.per_source[shard])
            inside = positions[at == i] - (int(ends[stream][i]) - n_sets)
            found[at == i] = self._sets.first_of_source[shard] + permuted(
                n_sets, inside, self.seed, "set order of a shard", epoch, shard
            )
        return found

    def _streams(self, epoch: int) -> tuple[list[list[int]], list[np.ndarray]]:
        # The shards of each stream and the sets up to and with each of them.
        if epoch not in self._orders:
            self._orders = {near: order for near, order in self._orders.items() if abs(near - epoch) == 1}
            n_sets = self._sets.per_source
            order = permuted(len(n_sets), np.arange(len(n_sets)), self.seed, "shard order", epoch)
            streams: list[list[int]] = [[] for _ in range(self.n_streams)]
            filled = [(0, stream) for stream in range(self.n_streams)]
            for shard in order[n_sets[order] > 0].tolist():
                load, stream = heapq.heappop(filled)
                streams[stream].append(shard)
                heapq.heappush(filled, (load + int(n_sets[shard]), stream))
            self._orders[epoch] = (streams, [np.cumsum(n_sets[shards]) for shards in streams])
        return self._orders[epoch]


def _shares(n_sets: np.ndarray, weights: Sequence[float | None]) -> np.ndarray:
    """How many sets of each source an epoch has."""
    if all(weight is None for weight in weights):
        return n_sets
    if any(weight is None for weight in weights):
        raise ValueError(f"weights {list(weights)} must be given to all atlases or to none.")
    if not n_sets.all():
        raise ValueError(f"atlas {int(np.argmin(n_sets))} has no sets to mix; drop it.")
    shares = np.array(weights, dtype=np.float64)
    return np.maximum(1, np.rint(shares / shares.sum() * n_sets.sum())).astype(np.int64)
