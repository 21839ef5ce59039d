"""What is new in the conditions that a screen holds out, and training conditions that can be left out to be as new."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from perturbdiff.data.notation import Notation
from perturbdiff.data.rng import numpy_generator
from perturbdiff.means.newness import Known, New, axes

Condition = tuple[str, str, str]  # perturbation, cell type, batch

MOST_FOLDS = 8
MOST_LEFT_OUT = 1 / 4  # of what could be left out, in one fold
LEAST_CELLS = 20  # in what is left out whole, if there is anything as large


@dataclass(frozen=True)
class Design:
    """How most held-out conditions are new, and folds of training conditions that are so without the rest of theirs.

    new
        As `means.newness` says.
    n_new
        Of the held-out conditions, how many are new in which way.
    left_out
        How conditions of the folds are new: as `new`, or as the next that can be had.
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
        place = _PLACE.get(axes(new)[-1])
        whole = place is not None and not {c[place] for c in wanted} & {c[place] for c in trained}
        for left_out in (new, *_INSTEAD.get(new, ())):
            if folds := _folds(left_out, whole, wanted, trained, notation, seed, described):
                break
        return cls(new, dict(n_new), left_out, folds)


_PLACE = {"cell type": 1, "batch": 2}  # in a condition
_INSTEAD: dict[New, tuple[New, ...]] = {
    "batch": ("cell type",),
    "cell type": ("batch",),
    "perturbation and cell type": ("perturbation and batch", "perturbation"),
    "perturbation and batch": ("perturbation and cell type", "perturbation"),
    "combination and cell type": ("combination and batch", "combination"),
    "combination and batch": ("combination and cell type", "combination"),
}


def _folds(
    new: New,
    whole: bool,
    wanted: Mapping[Condition, int],
    trained: Mapping[Condition, int],
    notation: Notation,
    seed: int,
    described: Collection[str],
) -> tuple[tuple[Condition, ...], ...]:
    """Training conditions that are left out together and then `new`, as many times as that can be done.

    Of two axes that are new, conditions of one and of the other are left out, and those that are both make the fold.
    """
    of_axes = [
        _left_out(axis, whole or len(axes(new)) > 1, wanted, trained, notation, seed, described) for axis in axes(new)
    ]
    found = []
    for number in range(max(map(len, of_axes)) if all(of_axes) else 0):
        out = {condition for of_axis in of_axes for condition in of_axis[number % len(of_axis)]}
        rest = trained.keys() - out
        known = {name for condition in rest for name in _names(condition, notation)} | {*described}
        kinds = newness(sorted(out), rest, notation).items()
        fold = tuple(of for of, kind in kinds if kind == new and _names(of, notation) <= known)
        if fold and rest:
            found.append(fold)
    return tuple(found[:MOST_FOLDS])


def _left_out(
    axis: str,
    whole: bool,
    wanted: Mapping[Condition, int],
    trained: Mapping[Condition, int],
    notation: Notation,
    seed: int,
    described: Collection[str],
) -> list[list[Condition]]:
    """`whole` contexts, as of those that are wanted nothing is trained, those most like them in their number of cells
    first; else as many perturbations, or conditions, as are wanted, at random."""
    unit = _unit(axis, whole, trained, notation)
    units: dict[Hashable, list[Condition]] = {}
    for condition in sorted(trained):
        units.setdefault(unit(condition), []).append(condition)
    units.pop(None, None)
    if axis == "perturbation":
        units = {names: of for names, of in units.items() if _names(of[0], notation) <= {*described}}
    at_once = max(1, min(len({unit(condition) for condition in wanted}), int(len(units) * MOST_LEFT_OUT)))
    order = _in_order(units, trained, wanted, unit, seed)
    starts = range(0, len(order) - at_once + 1, at_once)
    return [[condition for key in order[start : start + at_once] for condition in units[key]] for start in starts]


def most(kinds: Iterable[New]) -> New:
    """The most frequent, the last by name of equals."""
    n_of = Counter(kinds)
    return max(n_of, key=lambda kind: (n_of[kind], kind))


def newness(asked: Iterable[Condition], trained: Iterable[Condition], notation: Notation) -> dict[Condition, New]:
    """How each asked condition is new to the trained ones."""
    known = Known((_names(condition, notation), *condition[1:]) for condition in trained)
    return {condition: known.new(_names(condition, notation), *condition[1:]) for condition in asked}


def _names(condition: Condition, notation: Notation) -> frozenset[str]:
    return frozenset(name for name, _ in notation.parse(condition[0]))


def _unit(axis: str, whole: bool, trained: Iterable[Condition], notation: Notation) -> Callable[[Condition], Hashable]:
    """What of a condition is left out together; None for conditions that are no such thing."""
    if axis == "dose":
        doses = Counter((_names(condition, notation), condition[0]) for condition in trained)
        several = Counter(names for names, _ in doses)
        return lambda condition: condition[0] if several[_names(condition, notation)] != 1 else None
    if axis in ("perturbation", "combination"):
        several_parts = axis == "combination"
        return lambda of: names if (len(names := _names(of, notation)) > 1) == several_parts else None
    if whole:
        return lambda condition: condition[_PLACE[axis]]
    return (lambda of: (_names(of, notation), of[1])) if axis == "cell type" else (lambda of: of)


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
