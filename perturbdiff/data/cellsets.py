"""Cell sets: which cells of which condition form a set, with which controls, in which step, on which rank.

Everything is a pure function of (seed, epoch, step, rank, world size); a resumed run needs no more than those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from perturbdiff.data.screen import LABELS, Screen
from perturbdiff.data.seeds import numpy_generator

ControlMatch = Literal["batch", "cell_type"]


@dataclass(frozen=True)
class ConditionIndex:
    """Cells grouped by condition.

    codes
        (n_conditions, 3) int32 codes of (perturbation, cell_type, batch) in `names`.
    names
        The labels of each code.
    first, n_cells
        (n_conditions,) int64: a condition's cells are `rows[first : first + n_cells]`.
    is_control
        (n_conditions,) bool.
    rows
        Row of the screen of each indexed cell, grouped by condition.
    """

    codes: np.ndarray
    names: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    first: np.ndarray
    n_cells: np.ndarray
    is_control: np.ndarray
    rows: np.ndarray

    @classmethod
    def build(cls, screen: Screen, cells: np.ndarray) -> ConditionIndex:
        """Index the cells of a screen where `cells` (n_cells,) is True."""
        rows = np.flatnonzero(cells)
        factors = [np.unique(screen.obs[name].to_numpy(dtype=str)[rows], return_inverse=True) for name in LABELS]
        names = tuple(tuple(map(str, labels)) for labels, _ in factors)
        perturbation, cell_type, batch = (inverse for _, inverse in factors)
        n_perturbations, n_batches = len(names[0]), len(names[2])
        # One integer a condition, in the screen's order.
        key = (cell_type.astype(np.int64) * n_batches + batch) * n_perturbations + perturbation
        order = np.argsort(key, kind="stable")
        unique, first, n_cells = np.unique(key[order], return_index=True, return_counts=True)
        context, codes_p = np.divmod(unique, n_perturbations)
        codes_c, codes_b = np.divmod(context, n_batches)
        codes = np.stack([codes_p, codes_c, codes_b], axis=1).astype(np.int32)
        is_control = np.array([name == screen.control_label for name in names[0]], dtype=bool)[codes_p]
        return cls(codes, names, first.astype(np.int64), n_cells.astype(np.int64), is_control, rows[order])  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.codes)

    def labels(self, condition: int) -> tuple[str, str, str]:
        """(perturbation, cell_type, batch) of a condition."""
        p, c, b = self.codes[condition]
        return self.names[0][p], self.names[1][c], self.names[2][b]

    def cells(self, condition: int) -> np.ndarray:
        """Rows of the screen."""
        return self.rows[self.first[condition] : self.first[condition] + self.n_cells[condition]]


@dataclass(frozen=True)
class ControlPools:
    """The control cells each perturbed condition may draw from.

    of
        Condition -> its control conditions; empty for control conditions.
    """

    of: tuple[tuple[int, ...], ...]
    index: ConditionIndex

    def rows(self, condition: int) -> np.ndarray:
        """Rows of the screen of the controls of a condition."""
        return np.concatenate([self.index.cells(c) for c in self.of[condition]])


def resolve_control_match(index: ConditionIndex, how: Literal["auto", "batch", "cell_type"]) -> ControlMatch:
    """What `auto` means for all cells of a screen.

    It is `batch`, unless no perturbed condition at all has a control in its batch: perturbation and batch are then
    the same thing in this screen, so that batch says nothing and cell type decides.
    """
    if how != "auto":
        return how
    control_batches = set(index.codes[index.is_control, 2].tolist())
    perturbed_batches = set(index.codes[~index.is_control, 2].tolist())
    return "cell_type" if perturbed_batches and not control_batches & perturbed_batches else "batch"


def match_controls(index: ConditionIndex, by: ControlMatch) -> ControlPools:
    """Find the controls of each perturbed condition: those of its cell type and batch, or of its cell type.

    Raises
    ------
    ValueError
        A condition has no matching control; names it.
    """
    pools_of: dict[tuple[int, ...], list[int]] = {}
    for condition in map(int, np.flatnonzero(index.is_control)):
        _, cell_type, batch = index.codes[condition].tolist()
        pools_of.setdefault((cell_type, batch), []).append(condition)
        pools_of.setdefault((cell_type,), []).append(condition)
    pools: list[tuple[int, ...]] = [()] * len(index)
    for condition in map(int, np.flatnonzero(~index.is_control)):
        _, cell_type, batch = index.codes[condition].tolist()
        found = pools_of.get((cell_type, batch) if by == "batch" else (cell_type,))
        if not found:
            perturbation, name, batch_name = index.labels(condition)
            where = f"cell type {name!r}" + (f" and batch {batch_name!r}" if by == "batch" else "")
            remedy = (
                "Set data.control_match=cell_type to take controls of any batch, or drop these cells."
                if (cell_type,) in pools_of
                else "Add control cells of it, or drop these cells."
            )
            raise ValueError(
                f"condition (perturbation {perturbation!r}, cell type {name!r}, batch {batch_name!r}; "
                f"{index.n_cells[condition]} cells) has no control cells of {where}. {remedy}"
            )
        pools[condition] = tuple(found)
    return ControlPools(tuple(pools), index)


@dataclass(frozen=True)
class CellSet:
    """At most S cells of one condition, and as many controls.

    key
        (epoch, set number) for keyed randomness; the same on any world size.
    rows, control_rows
        Rows of the screen, (n,) each.
    """

    key: tuple[int, int]
    condition: int
    rows: np.ndarray
    control_rows: np.ndarray


class CellSetSampler:
    """Deals every perturbed cell exactly once per epoch.

    Each epoch the cells of each condition are permuted and cut into sets of at most `set_size`, the last one short;
    all sets are shuffled together and dealt, `sets_per_batch` a step over all ranks.
    """

    def __init__(
        self, index: ConditionIndex, pools: ControlPools, set_size: int, sets_per_batch: int, seed: int
    ) -> None:
        self.index = index
        self.pools = pools
        self.set_size = set_size
        self.sets_per_batch = sets_per_batch
        self.seed = seed
        perturbed = np.flatnonzero(~index.is_control)
        per_condition = -(-index.n_cells[perturbed] // set_size)
        self._condition_of_set = np.repeat(perturbed, per_condition)
        starts = np.cumsum(per_condition) - per_condition
        self._place_in_condition = np.arange(per_condition.sum()) - np.repeat(starts, per_condition)
        self._shuffled: tuple[int, np.ndarray] | None = None

    @property
    def n_sets(self) -> int:
        """Sets in an epoch."""
        return len(self._condition_of_set)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_sets // self.sets_per_batch)

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> list[CellSet]:
        """The sets of one rank in one step; the last step of an epoch has fewer, perhaps none on some ranks."""
        return [self.cell_set(epoch, int(number)) for number in self._dealt(epoch, step)[rank::world_size]]

    def n_cells(self, epoch: int, step: int) -> int:
        """Perturbed cells of a step over all ranks."""
        numbers = self._dealt(epoch, step)
        left = self.index.n_cells[self._condition_of_set[numbers]] - self._place_in_condition[numbers] * self.set_size
        return int(np.minimum(left, self.set_size).sum())

    def _dealt(self, epoch: int, step: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = numpy_generator(self.seed, "set order", epoch).permutation(self.n_sets)
            self._shuffled = (epoch, order)  # one epoch's order is kept: it is the same for all its steps
        return self._shuffled[1][step * self.sets_per_batch : (step + 1) * self.sets_per_batch]

    def cell_set(self, epoch: int, number: int) -> CellSet:
        """Set `number` (0..n_sets-1) of an epoch."""
        condition = int(self._condition_of_set[number])
        place = int(self._place_in_condition[number])
        cells = self.index.cells(condition)
        permuted = numpy_generator(self.seed, "cells of a condition", epoch, condition).permutation(len(cells))
        rows = cells[permuted[place * self.set_size : (place + 1) * self.set_size]]
        controls = draw_controls(self.pools.rows(condition), len(rows), self.seed, epoch, number)
        return CellSet((epoch, number), condition, rows, controls)


def draw_controls(pool: np.ndarray, n: int, seed: int, *key: int) -> np.ndarray:
    """`n` control rows, without repeats while the pool lasts, then in further passes over it."""
    generator = numpy_generator(seed, "controls", *key)
    if n <= len(pool):
        return generator.choice(pool, n, replace=False, shuffle=True)
    passes = [generator.permutation(pool) for _ in range(-(-n // len(pool)))]
    return np.concatenate(passes)[:n]
