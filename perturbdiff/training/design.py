"""What is new in the conditions that a screen holds out, and training conditions that can be left out to be as new."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perturbdiff.data.notation import Notation
from perturbdiff.data.rng import numpy_generator

Condition = tuple[str, str, str]  # perturbation, cell type, batch
New = Literal["perturbation", "combination", "cell type", "batch", "dose"]

MOST_FOLDS = 8
MOST_LEFT_OUT = 1 / 4  # of what could be left out, in one fold
LEAST_CELLS = 20  # in what is left out whole, if there is anything as large


@dataclass(frozen=True)
class Design:
    """How most held-out conditions are new, and folds of training conditions that are so without the rest of theirs.

    new
        perturbation: never seen. combination: of perturbations, never seen. cell type: seen in others. batch: seen in
        the cell type, in others. dose: seen there at others.
    n_new
        Of the held-out conditions, how many are new in which way.
    left_out
        How conditions of the folds are new: as `new`, or as the next that can be had of one batch or cell type.
    folds
        Conditions to leave out together, at most MOST_FOLDS times.
    """

    new: New
    n_new: dict[New, int]
    left_out: New
    folds: tuple[tuple[Condition, ...], ...]

    @classmethod
    def of(
        cls,
        asked: Mapping[Condition, int],
        trained: Mapping[Condition, int],
        notation: Notation,
        seed: int,
        described: Collection[str] = (),
    ) -> Design:
        """Of held-out and training conditions, with their numbers of cells.

        Nothing is known of a perturbation that is left out everywhere, unless it is `described` by features.
        """
        kinds = newness(asked, trained, notation)
        n_new = Counter(kinds.values())
        new = most(kinds.values())
        wanted = {condition: asked[condition] for condition, kind in kinds.items() if kind == new}
        place = {"cell type": 1, "batch": 2}.get(new)
        whole = place is not None and not {c[place] for c in wanted} & {c[place] for c in trained}
        for left_out in (new, *_INSTEAD.get(new, ())):
            if folds := _folds(left_out, whole, wanted, trained, notation, seed, described):
                break
        return cls(new, dict(n_new), left_out, folds)


_INSTEAD: dict[New, tuple[New, ...]] = {"batch": ("cell type",), "cell type": ("batch",)}


def _folds(
    new: New,
    whole: bool,
    wanted: Mapping[Condition, int],
    trained: Mapping[Condition, int],
    notation: Notation,
    seed: int,
    described: Collection[str],
) -> tuple[tuple[Condition, ...], ...]:
    """`whole` contexts, as of those that are wanted nothing is trained, those most like them in their number of cells
    first; else as many perturbations, or conditions, as are wanted, at random."""
    unit = _unit(new, whole, trained, notation)
    units: dict[Hashable, list[Condition]] = {}
    for condition in sorted(trained):
        units.setdefault(unit(condition), []).append(condition)
    units.pop(None, None)
    if new == "perturbation":
        units = {names: of for names, of in units.items() if _names(of[0], notation) <= {*described}}
    at_once = max(1, min(len({unit(condition) for condition in wanted}), int(len(units) * MOST_LEFT_OUT)))
    order = _in_order(units, trained, wanted, unit, seed)
    found = []
    for start in range(0, len(order) - at_once + 1, at_once):
        out = [condition for key in order[start : start + at_once] for condition in units[key]]
        rest = trained.keys() - {*out}
        known = {name for condition in rest for name in _names(condition, notation)} | {*described}
        kinds = newness(out, rest, notation).items()
        fold = tuple(of for of, kind in kinds if kind == new and _names(of, notation) <= known)
        if fold and rest:
            found.append(fold)
    return tuple(found[:MOST_FOLDS])


def most(kinds: Iterable[New]) -> New:
    """The most frequent, the last by name of equals."""
    n_of = Counter(kinds)
    return max(n_of, key=lambda kind: (n_of[kind], kind))


def newness(asked: Iterable[Condition], trained: Iterable[Condition], notation: Notation) -> dict[Condition, New]:
    """How each asked condition is new to the trained ones."""
    seen: dict[frozenset[str], list[Condition]] = {}
    for condition in trained:
        seen.setdefault(_names(condition, notation), []).append(condition)
    return {
        condition: _new(condition, seen.get(names := _names(condition, notation), []), len(names))
        for condition in asked
    }


def _new(condition: Condition, seen: list[Condition], n_parts: int) -> New:
    _, cell_type, batch = condition
    if not seen:
        return "combination" if n_parts > 1 else "perturbation"
    if cell_type not in {c for _, c, _ in seen}:
        return "cell type"
    return "dose" if (cell_type, batch) in {(c, b) for _, c, b in seen} else "batch"


def _names(condition: Condition, notation: Notation) -> frozenset[str]:
    return frozenset(name for name, _ in notation.parse(condition[0]))


def _unit(new: New, whole: bool, trained: Iterable[Condition], notation: Notation) -> Callable[[Condition], Hashable]:
    """What of a condition is left out together; None for conditions that are no such thing."""
    if new == "dose":
        doses = Counter((_names(condition, notation), condition[0]) for condition in trained)
        several = Counter(names for names, _ in doses)
        return lambda condition: condition[0] if several[_names(condition, notation)] != 1 else None
    if new in ("perturbation", "combination"):
        several_parts = new == "combination"
        return lambda of: names if (len(names := _names(of, notation)) > 1) == several_parts else None
    place = 1 if new == "cell type" else 2
    if whole:
        return lambda condition: condition[place]
    return (lambda of: (_names(of, notation), of[1])) if new == "cell type" else (lambda of: of)


def _in_order(
    units: Mapping[Hashable, list[Condition]],
    trained: Mapping[Condition, int],
    wanted: Mapping[Condition, int],
    unit: Callable[[Condition], Hashable],
    seed: int,
) -> list[Hashable]:
    keys = sorted(units, key=str)
    order = [keys[i] for i in numpy_generator(seed, "folds of training conditions").permutation(len(keys))]
    if not all(isinstance(key, str) for key in keys):  # perturbations and single conditions
        return order
    n_cells = {key: sum(trained[condition] for condition in units[key]) for key in keys}
    if large := [key for key in order if n_cells[key] >= LEAST_CELLS]:
        order = large
    asked: Counter[Hashable] = Counter()
    for condition, n in wanted.items():
        asked[unit(condition)] += n
    typical = float(np.mean(np.log(list(asked.values()))))
    return sorted(order, key=lambda key: abs(math.log(n_cells[key]) - typical))
