"""Conditions: which cells belong to each, which are pooled, and whose controls a perturbed one may draw from.

Nothing here holds a number per cell, unless the cells of a condition lie apart: a billion cells cost as much as a
thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from perturbdiff.data.notation import Notation
from perturbdiff.data.screen import Screen
from perturbdiff.data.selectors import LABELS
from perturbdiff.data.vocab import NULL, Labels, LabelVocab, Vocabularies

ControlMatch = Literal["batch", "cell_type"]


@dataclass(frozen=True)
class ConditionIndex:
    """Cells grouped by condition.

    codes
        (n_conditions, 3) int32 codes of (perturbation, cell_type, batch) in `names`.
    names
        The labels of each code.
    first, n_cells
        (n_conditions,) int64: a condition's cells are the rows `first` to `first + n_cells`, looked up in `rows`.
    is_control
        (n_conditions,) bool.
    source
        (n_conditions,) int32: the screen or atlas a condition is of.
    rows
        Row of the screen of each indexed cell, grouped by condition; None where that is 0, 1, 2, ...
    """

    codes: np.ndarray
    names: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    first: np.ndarray
    n_cells: np.ndarray
    is_control: np.ndarray
    source: np.ndarray
    rows: np.ndarray | None = None

    @classmethod
    def build(cls, screen: Screen, cells: np.ndarray) -> ConditionIndex:
        """Index the cells of a screen where `cells` (n_cells,) is True."""
        perturbation, cell_type, batch = (screen.obs[name][cells] for name in LABELS)
        index = cls.from_labels(perturbation, cell_type, batch, screen.control_label)
        chosen = np.flatnonzero(cells)
        return replace(index, rows=chosen if index.rows is None else chosen[index.rows])

    @classmethod
    def from_labels(cls, perturbation: Any, cell_type: Any, batch: Any, control_label: str) -> ConditionIndex:
        """Index cells by their labels, (n,) each: strings, or pandas categoricals, which are faster."""
        (p, p_names), (c, c_names), (b, b_names) = (_codes(labels) for labels in (perturbation, cell_type, batch))
        n_perturbations, n_batches = max(len(p_names), 1), max(len(b_names), 1)
        # One integer a condition, in the order of cells in a screen and an atlas.
        key = (c * np.int64(n_batches) + b) * n_perturbations + p
        rows = None
        if (key[1:] < key[:-1]).any():
            rows = _order(key, max(len(c_names), 1) * n_batches * n_perturbations)
            key = key[rows]
        first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if len(key) else np.zeros(0, np.int64)
        context, codes_p = np.divmod(key[first], n_perturbations)
        codes_c, codes_b = np.divmod(context, n_batches)
        codes = np.stack([codes_p, codes_c, codes_b], axis=1).astype(np.int32)
        n_cells = np.diff(first, append=len(key))
        is_control = np.array([name == control_label for name in p_names], dtype=bool)[codes_p]
        return cls(codes, (p_names, c_names, b_names), first, n_cells, is_control, np.zeros(len(first), np.int32), rows)

    @classmethod
    def from_conditions(
        cls, perturbation: Any, cell_type: Any, batch: Any, is_control: np.ndarray, n_cells: np.ndarray
    ) -> ConditionIndex:
        """The index of cells that lie in the order of these conditions, (n_conditions,) each."""
        codes, names = zip(*map(_codes, (perturbation, cell_type, batch)), strict=True)
        first = np.cumsum(n_cells) - n_cells
        return cls(np.stack(codes, axis=1), names, first, n_cells, is_control, np.zeros(len(first), np.int32))

    @classmethod
    def concat(cls, indexes: Sequence[ConditionIndex], first_rows: Sequence[int]) -> ConditionIndex:
        """The conditions of several sources, whose rows start at `first_rows`; none may have `rows` of its own."""
        if len(indexes) == 1:
            return indexes[0]
        assert all(index.rows is None for index in indexes), "cells of an atlas lie in the order of its conditions"
        names = tuple(tuple(sorted({name for index in indexes for name in index.names[i]})) for i in range(3))
        positions = [{name: code for code, name in enumerate(known)} for known in names]
        codes = [
            np.stack(
                [np.array([positions[i][n] for n in index.names[i]], np.int32)[index.codes[:, i]] for i in range(3)], 1
            )
            for index in indexes
        ]
        return cls(
            np.concatenate(codes),
            names,  # type: ignore[arg-type]
            np.concatenate([index.first + first for index, first in zip(indexes, first_rows, strict=True)]),
            np.concatenate([index.n_cells for index in indexes]),
            np.concatenate([index.is_control for index in indexes]),
            np.concatenate([np.full(len(index), i, np.int32) for i, index in enumerate(indexes)]),
        )

    def __len__(self) -> int:
        return len(self.codes)

    def select(self, conditions: np.ndarray) -> ConditionIndex:
        """Only these conditions, a mask or their numbers."""
        names = ("codes", "first", "n_cells", "is_control", "source")
        return replace(self, **{name: getattr(self, name)[conditions] for name in names})

    def cut(self, borders: np.ndarray) -> ConditionIndex:
        """Conditions cut where a shard ends: each piece is a condition of its own. `borders` are first rows."""
        pieces = np.searchsorted(borders, self.first + self.n_cells - 1, "right")
        pieces -= np.searchsorted(borders, self.first, "right") - 1  # shards a condition lies in
        whole = self.select(np.repeat(np.arange(len(self)), pieces))
        position = np.arange(len(whole)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its condition
        shard = np.searchsorted(borders, whole.first, "right") - 1 + position
        first = np.maximum(whole.first, borders[shard])
        ends = np.append(borders[1:], np.iinfo(np.int64).max)[shard]
        return replace(whole, first=first, n_cells=np.minimum(whole.first + whole.n_cells, ends) - first)

    def by_shard(self, borders: np.ndarray) -> ConditionIndex:
        """With the shard of each condition, after `cut`, as its source."""
        return replace(self, source=(np.searchsorted(borders, self.first, "right") - 1).astype(np.int32))

    def labels(self, condition: int) -> tuple[str, str, str]:
        """(perturbation, cell_type, batch) of a condition."""
        p, c, b = self.codes[condition]
        return self.names[0][p], self.names[1][c], self.names[2][b]

    def cells(self, condition: int) -> np.ndarray:
        """Rows of the screen or atlas."""
        return self.rows_at(self.first[condition] + np.arange(self.n_cells[condition]))

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Rows of the screen or atlas of the indexed cells at `positions`."""
        return positions if self.rows is None else self.rows[positions]


@dataclass(frozen=True)
class Groups:
    """Conditions whose cells are assigned or drawn together.

    members
        Condition numbers, group after group; group g has those from `begin[g]` to `begin[g + 1]`.
    ends
        Cells of the group up to and with each member.
    """

    index: ConditionIndex
    members: np.ndarray
    begin: np.ndarray
    ends: np.ndarray

    @classmethod
    def by(cls, index: ConditionIndex, conditions: np.ndarray, key: np.ndarray) -> Groups:
        """Group `conditions` that share a `key` (one each), in the order of keys, then of conditions."""
        order = np.argsort(key, kind="stable")
        members, key = conditions[order], key[order]
        begin = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if len(key) else np.zeros(0, np.int64)
        ends = np.cumsum(index.n_cells[members])
        before = np.concatenate([[0], ends])[begin]
        begin = np.append(begin, len(members))
        return cls(index, members, begin, ends - np.repeat(before, np.diff(begin)))

    def __len__(self) -> int:
        return len(self.begin) - 1

    @cached_property
    def n_cells(self) -> np.ndarray:
        return self.ends[self.begin[1:] - 1]

    def in_group(self, group: int) -> np.ndarray:
        """Conditions of a group."""
        return self.members[self.begin[group] : self.begin[group + 1]]

    def rows(self, group: int, positions: np.ndarray) -> np.ndarray:
        """Rows of the screen or atlas of a group's cells at `positions`."""
        begin, end = self.begin[group], self.begin[group + 1]
        if end - begin == 1:
            return self.index.rows_at(self.index.first[self.members[begin]] + positions)
        member = begin + np.searchsorted(self.ends[begin:end], positions, "right")
        conditions = self.members[member]
        return self.index.rows_at(
            self.index.first[conditions] + positions - (self.ends[member] - self.index.n_cells[conditions])
        )


@dataclass(frozen=True)
class ControlPools:
    """The control cells each perturbed condition may draw from.

    of
        (n_conditions,) condition -> number of its group of control conditions; -1 for control conditions.
    """

    of: np.ndarray
    groups: Groups

    def preferring(self, local: ControlPools, at_least: int) -> ControlPools:
        """The pools of `local` for conditions that have `at_least` so many controls there, these for the others."""
        here, there = self.groups, local.groups
        groups = Groups(
            here.index,
            np.concatenate([here.members, there.members]),
            np.concatenate([here.begin, there.begin[1:] + here.begin[-1]]),
            np.concatenate([here.ends, there.ends]),
        )
        enough = local.of >= 0
        enough[enough] = there.n_cells[local.of[enough]] >= at_least
        return ControlPools(np.where(enough, local.of + len(here), self.of), groups)

    def rows(self, condition: int) -> np.ndarray:
        """Rows of the screen or atlas of the controls of a condition."""
        pool = self.of[condition]
        return self.groups.rows(pool, np.arange(self.groups.n_cells[pool]))


def resolve_control_match(index: ConditionIndex, preprocessing: Literal["auto", "batch", "cell_type"]) -> ControlMatch:
    """What `auto` means for all cells of a screen or atlas.

    It is `batch`, unless no perturbed condition at all has a control in its batch: perturbation and batch are then
    the same thing in this screen, so that batch says nothing and cell type decides.
    """
    if preprocessing != "auto":
        return preprocessing
    control_batches = np.unique(index.codes[index.is_control, 2])
    perturbed_batches = np.unique(index.codes[~index.is_control, 2])
    return "cell_type" if len(perturbed_batches) and not np.isin(perturbed_batches, control_batches).any() else "batch"


def control_note(screen: Screen) -> str:
    """What a screen's own controls leave open: conditions without any, batches without both; may be nothing."""
    index = ConditionIndex.build(screen, np.ones(len(screen), dtype=bool))
    match = resolve_control_match(index, screen.config.control_match)
    if not index.is_control.any() or index.is_control.all():
        return ""
    try:
        match_controls(index, match)
    except ValueError as error:
        return str(error)
    if match != screen.config.control_match and match == "cell_type":
        return "No batch holds both controls and perturbed cells: controls are those of the cell type, of any batch."
    return ""


def match_controls(index: ConditionIndex, by: ControlMatch, needed: np.ndarray | None = None) -> ControlPools:
    """Find the controls of each perturbed condition: those of its source, cell type and batch, or of any batch.

    `needed` (n_conditions,) says which perturbed conditions must have some; all of them if None.

    Raises
    ------
    ValueError
        A condition has no matching control; names it.
    """
    needed = ~index.is_control if needed is None else needed & ~index.is_control
    by_cell_type = index.source.astype(np.int64) * max(len(index.names[1]), 1) + index.codes[:, 1]
    key = by_cell_type * max(len(index.names[2]), 1) + index.codes[:, 2] if by == "batch" else by_cell_type
    controls = np.flatnonzero(index.is_control)
    groups = Groups.by(index, controls, key[controls])
    pool_keys = key[groups.members[groups.begin[:-1]]]
    of = np.searchsorted(pool_keys, key).astype(np.int32)
    found = np.isin(key, pool_keys)
    if (lacking := np.flatnonzero(needed & ~found)).size:
        condition = int(lacking[0])
        perturbation, name, batch_name = index.labels(condition)
        where = f"cell type {name!r}" + (f" and batch {batch_name!r}" if by == "batch" else "")
        remedy = (
            "Set data.control_match=cell_type to take controls of any batch, or drop these cells."
            if by_cell_type[condition] in by_cell_type[controls]
            else "Add control cells of it, or drop these cells."
        )
        others = f", nor have {lacking.size - 1:,} other conditions" if lacking.size > 1 else ""
        raise ValueError(
            f"condition (perturbation {perturbation!r}, cell type {name!r}, batch {batch_name!r}; "
            f"{index.n_cells[condition]} cells) has no control cells of {where}{others}. {remedy}"
        )
    of[~found | index.is_control] = -1
    return ControlPools(of, groups)


def _order(key: np.ndarray, n_keys: int) -> np.ndarray:
    """The order of keys 0 to n_keys - 1 that leaves equal ones as they are."""
    if n_keys > 4 * len(key):
        return np.argsort(key, kind="stable")
    # By counting, a fifth of the time of comparing: scipy sorts so when it turns rows into columns.
    cells = sparse.csr_matrix((np.zeros(len(key), np.int8), key, np.arange(len(key) + 1)), (len(key), n_keys))
    return cells.tocsc().indices


def _codes(labels: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes (n,) int32 of labels, and the labels that occur, sorted."""
    categorical = labels.array if isinstance(labels, pd.Series) else labels
    if not isinstance(categorical, pd.Categorical):
        categorical = pd.Categorical(np.asarray(labels, dtype=object))
    codes, found = categorical.codes, categorical.categories
    used = np.flatnonzero(np.bincount(codes, minlength=len(found)))
    names = [str(found[int(i)]) for i in used]
    order = sorted(range(len(used)), key=names.__getitem__)
    positions = np.zeros(len(found), np.int32)
    positions[used[order]] = np.arange(len(used))
    return positions[codes], tuple(names[i] for i in order)


def vocabularies_of(
    index: ConditionIndex, notation: Notation, with_batches: bool, marginal: np.ndarray | None = None
) -> Vocabularies:
    """The labels of the conditions of an index that become sets: those that training gives a meaning.

    These are the perturbed ones, and all where `marginal` (n_conditions,), which have no perturbation then.
    `with_batches` False leaves the batch out, as where batch and perturbation are confounded.
    """
    marginal = np.zeros(len(index), dtype=bool) if marginal is None else marginal
    labelled = (~index.is_control & ~marginal, ~index.is_control | marginal, ~index.is_control)
    seen = [
        [index.names[i][code] for code in np.unique(index.codes[conditions, i])]
        for i, conditions in enumerate(labelled)
    ]
    doses: dict[str, set[float]] = {}
    for label in seen[0]:
        for name, dose in notation.parse(label):
            doses.setdefault(name, set()).update(() if dose is None else (dose,))
    return Vocabularies(
        LabelVocab("perturbation", tuple(sorted(doses))),
        LabelVocab("cell_type", tuple(seen[1])),
        LabelVocab("batch", tuple(seen[2]) if with_batches else ()),
        notation.combination_separator,
        notation.dose_separator,
        control_labels=notation.controls,
        doses={} if notation.dose_separator is None else {name: tuple(sorted(doses[name])) for name in sorted(doses)},
        dose_unit=notation.dose_unit,
    )


def encode_conditions(vocabularies: Vocabularies, index: ConditionIndex, marginal: np.ndarray) -> Labels:
    """Ids of the conditions of an index, one row each: controls have the null perturbation.

    So has every condition where `marginal` (n_conditions,); its controls, pooled over batches, have no batch.
    Raises as `Vocabularies.encode`.
    """
    p, c, b = index.codes.astype(np.int64).T
    perturbed = ~index.is_control & ~marginal
    named = set(p[perturbed].tolist())
    of_perturbation = vocabularies.encode(
        [(n if i in named else None, None, None) for i, n in enumerate(index.names[0])]
    )
    of_cell_type = vocabularies.encode([(None, name, None) for name in index.names[1]]).cell_type
    of_batch = vocabularies.encode([(None, None, name) for name in index.names[2]]).batch
    perturbation, batch = of_perturbation.perturbation[p], of_batch[b]
    perturbation[torch.from_numpy(~perturbed)] = NULL
    batch[torch.from_numpy(index.is_control & marginal)] = NULL
    dose = None if of_perturbation.dose is None else of_perturbation.dose[p]
    return Labels(perturbation, of_cell_type[c], batch, dose=dose)
