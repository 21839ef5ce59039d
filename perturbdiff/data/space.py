"""What the values of X are, found from the values: counts, or a logarithm of counts per so many.

Cells are normalised to one sum before the logarithm is taken. So the row sums of b^x - 1 are equal for the right base b
and for no other: base and sum are found exactly. Where genes were left out afterwards no sums are equal, but within a
cell the values of b^x - 1 still are whole multiples of the smallest, that of one count: the base alone is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import sparse

LOG1P_MAX = 15.0  # log1p of any normalised count stays under this; e**15 is 3.3 million
EQUAL = 2e-5  # relative difference of sums that are one sum: of rounding; genes left out differ by more
SAME = 1e-4  # relative difference of two totals that are the same number of counts
_CHUNK = 1 << 24  # values looked at together
_CELLS = 500  # looked at to find a space
_FEW = 5  # cells whose sums may be equal by chance, and which are no group normalised by itself
_MANY = 500  # values that say something
MOST_LOST = 0.1  # part of all counts that rounding may change
_MULTIPLES = 20  # up to which values are looked at as multiples of the smallest
_ENOUGH = 50  # multiples over one that tell a base

InputKind = Literal["counts", "log1p"]

# Bases of the logarithms to undo, the outermost first; the commonest first.
_CANDIDATES = ((math.e,), (2.0,), (10.0,), (), (math.e, math.e))
_NAMES = {
    (math.e,): "log1p", (2.0,): "log2(1 + x)", (10.0,): "log10(1 + x)", (): "", (math.e, math.e): "log1p of log1p",
}  # fmt: skip


@dataclass(frozen=True)
class Space:
    """The space that values are in.

    bases
        Of the logarithms, the outermost first; none for values that are no logarithms.
    whole
        They are counts once the logarithms are undone.
    total
        What cells sum to once the logarithms are undone, the median of all; None where their sums differ. Cells that
        were normalised in groups have one sum a group.
    certain
        Something in the values says so; otherwise they are taken for log1p values.
    """

    bases: tuple[float, ...]
    whole: bool
    total: float | None
    certain: bool

    @property
    def counts(self) -> bool:
        """Whether counts can be made of the values."""
        return self.whole or (not self.bases and self.total is None)

    def __str__(self) -> str:
        name = _NAMES[self.bases]
        if self.whole:
            return f"{name} of raw counts" if name else "raw counts"
        if self.total is not None:
            return f"{name or 'values without logarithm'} of {self.total:,.6g} counts a cell"
        return f"{name} values" if name else "counts with fractions"

    def undone(self, values: np.ndarray) -> np.ndarray:
        """The values without their logarithms, float64."""
        values = values.astype(np.float64)
        for base in self.bases:
            values = np.expm1(values * math.log(base))
        return values


RAW_COUNTS = Space((), whole=True, total=None, certain=True)
UNKNOWN = Space((math.e,), whole=False, total=None, certain=False)


def check_values(X: sparse.csr_matrix, genes: Sequence[str]) -> bool:
    """Whether all values are whole numbers. Raises ValueError on one that is not finite or negative: gene and value."""
    whole = True
    for start in range(0, X.nnz, _CHUNK):
        values = X.data[start : start + _CHUNK]
        for wrong, what in ((~np.isfinite(values), "is not finite"), (values < 0, "is negative")):
            if wrong.any():
                position = start + int(wrong.argmax())
                hint = " (z-scored or scaled data?)" if what == "is negative" else ""
                raise ValueError(
                    f"X of gene {genes[X.indices[position]]!r} holds {X.data[position]}, which {what}{hint}; X must be "
                    "raw counts or log1p values. Give the file before scaling, or name a layer that holds them "
                    "(data.layer=counts, data.layer=raw)."
                )
        whole = whole and bool((values == np.rint(values)).all())
    return whole


def find_space(X: sparse.csr_matrix) -> Space:
    """The space of values of which not all are whole numbers, from up to 500 cells.

    Parameters
    ----------
    X
        (n_cells, G) CSR, finite, not negative, without stored zeros; all measured genes, or some.
    """
    cells = np.flatnonzero(np.diff(X.indptr))
    sample = X[cells[np.linspace(0, len(cells) - 1, min(_CELLS, len(cells))).astype(int)]]
    top = float(sample.data.max(initial=0))
    possible = [Space(bases, False, None, True) for bases in _CANDIDATES if top < _largest(bases)]
    undone = {space.bases: space.undone(sample.data) for space in possible}
    sums = {bases: totals(values, sample.indptr) for bases, values in undone.items()}
    agreeing = [bases for bases in sums if _agree(sums[bases])]
    if agreeing:  # several only of values so small that a logarithm hardly changes them
        bases = min(agreeing, key=lambda bases: np.std(sums[bases]) / np.mean(sums[bases]))
        return Space(bases, False, float(np.median(sums[bases])), True)
    for space in sorted(possible, key=lambda space: len(space.bases)):
        if _are_whole(undone[space.bases]):
            return Space(space.bases, True, None, True)
    for space in possible:
        if _are_multiples(undone[space.bases], sample.indptr):
            return space
    return UNKNOWN if top < LOG1P_MAX else Space((), False, None, False)


def renormalised(
    X: sparse.csr_matrix, space: Space, total: float | None, cell: Callable[[int], str]
) -> sparse.csr_matrix:
    """Values of a space as counts, where they are, or else as float32 log1p values of `total` counts a cell.

    `total` is None, or the space's is, where nobody knows: then the number of counts a cell stays. Raises ValueError
    where some cells are in another space than the others, naming the first by `cell(row)`.
    """
    undone = space.undone(X.data)
    if space.counts:
        values = np.rint(undone)
    elif space.total is None:
        if space.bases == (math.e,):
            return X.astype(np.float32)
        values = np.log1p(undone).astype(np.float32)
    else:
        sums = totals(undone, X.indptr)
        _refuse_others(sums, space, cell)
        if total is None:
            total = space.total
        if space.bases == (math.e,) and (np.abs(sums[sums > 0] / total - 1) < SAME).all():
            return X.astype(np.float32)
        scaled = undone * np.repeat(np.divide(total, sums, out=np.zeros(len(sums)), where=sums > 0), np.diff(X.indptr))
        values = np.log1p(scaled).astype(np.float32)
    renewed = sparse.csr_matrix((values, X.indices, X.indptr), X.shape)
    if space.counts:
        renewed = renewed.copy()
        renewed.eliminate_zeros()
    return renewed


def space_of(X: sparse.csr_matrix, genes: Sequence[str], declared: str, path: str) -> Space:
    """What X is by its own values, within what was declared of it: "auto", "counts" or "log1p".

    Raises ValueError as `check_values`, and where the values contradict what was declared.
    """
    whole = check_values(X, genes)
    if whole and declared == "auto":
        _refuse_marks(X, path)
    space = RAW_COUNTS if whole else find_space(X)
    top = int(X.data.argmax()) if X.nnz else None
    if declared == "log1p" and not space.bases and top is not None:
        if X.data[top] >= LOG1P_MAX or (space.certain and not whole):
            raise ValueError(
                f"X of {path} was declared as log1p but holds {space}: gene {genes[X.indices[top]]!r} holds "
                f"{X.data[top]:.6g}. Set data.input_kind=counts, or give log1p values."
            )
        return UNKNOWN
    if declared == "counts" and space.bases and space.certain:
        raise ValueError(
            f"X of {path} was declared as counts but holds {space}. Set data.input_kind=log1p, or give the raw counts."
        )
    if declared == "counts" and not whole:
        _refuse_lost(X, path)
        return replace(RAW_COUNTS, whole=False)
    if not space.bases and not space.certain:
        _refuse_mixed(X, path)
    if not space.bases and not space.whole and space.total is None:
        _refuse_lost(X, path)
    return space


def _refuse_marks(X: sparse.csr_matrix, path: str) -> None:
    # Whole numbers that are no counts: whether a gene was seen, or which part of a cell's values one belongs to.
    n_values = np.diff(X.indptr)
    filled = n_values > 0
    tops = np.maximum.reduceat(X.data, X.indptr[:-1][filled])[n_values[filled] >= _FEW] if filled.any() else X.data[:0]
    if len(tops) >= _FEW and (tops == tops[0]).all() and len(X.data) >= _MANY:
        raise ValueError(
            f"X of {path} holds whole numbers, the largest of which is {tops[0]:g} in every cell: marks of genes that "
            "were seen, or bins, and no counts. Give raw counts or log1p values (data.layer), or set "
            "data.input_kind=counts if they are counts."
        )


def _refuse_lost(X: sparse.csr_matrix, path: str) -> None:
    # Counts with fractions are rounded; of counts that were scaled down little would be left.
    total, rounded = float(X.data.sum()), float(np.rint(X.data).sum())
    if total > 0 and abs(rounded / total - 1) > MOST_LOST:
        raise ValueError(
            f"X of {path} holds counts with fractions, of which rounding would change the total by "
            f"{rounded / total - 1:+.0%}: they were scaled. Give the raw counts, or log1p values."
        )


def _refuse_mixed(X: sparse.csr_matrix, path: str) -> None:
    # Cells of two files put together, of one the counts and of the other their logarithms.
    large = np.flatnonzero(np.diff(X.indptr) >= 20)
    n_whole = int((totals((X.data % 1 != 0).astype(np.float64), X.indptr)[large] == 0).sum())
    fractions = np.repeat(totals((X.data % 1 != 0).astype(np.float64), X.indptr) > 0, np.diff(X.indptr))
    few_raw = 0 < n_whole <= 0.01 * len(large) and X.data[fractions].max(initial=0) < LOG1P_MAX
    if 0.01 * len(large) < n_whole < 0.99 * len(large) or few_raw:
        raise ValueError(
            f"X of {path} holds whole numbers alone in {n_whole:,} of {len(large):,} cells and fractions in the "
            "others: counts and logarithms must not be mixed. Give the raw counts of all, or set "
            "data.input_kind=counts if these are counts with fractions."
        )


def found(space: Space, target_sum: float | None, same: bool) -> str:
    """What was found in X and made of it, for people; `same` where its values stay."""
    if space.whole:
        return f"X holds {space}; " + ("the logarithm is undone" if space.bases else "rounding is undone")
    if not space.bases and space.total is None:
        sure = "" if space.certain else " (set data.input_kind=log1p if they are logarithms)"
        return f"X holds counts with fractions, which are rounded{sure}; library sizes are their sums"
    if target_sum is not None:
        return f"X holds {space}; it becomes log1p values of {target_sum:,.6g} counts a cell"
    holds = f"X holds {space}" if space.certain else "X is taken for log1p values"
    changed = "" if same else ", which become log1p values"
    return (
        f"{holds}{changed}; of how many counts a cell cannot be checked, as cells sum to different numbers (were genes "
        "left out after normalising?)"
    )


def totals(undone: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """(n_cells,) float64 sums of values over the genes of each cell."""
    sums = np.zeros(len(indptr) - 1)
    filled = np.diff(indptr) > 0
    sums[filled] = np.add.reduceat(undone, indptr[:-1][filled]) if filled.any() else 0
    return sums


def _largest(bases: tuple[float, ...]) -> float:
    # A value of this space undone is at most some 10^9.
    largest = 1e9
    for base in reversed(bases):
        largest = math.log1p(largest) / math.log(base)
    return largest


def _agree(sums: np.ndarray) -> bool:
    """Whether cells have one sum, or one for each of some groups of cells that were normalised by themselves."""
    if len(sums) < _FEW:  # by chance, unless it is a round number
        round_number = 10.0 ** np.rint(np.log10(sums[0])) if len(sums) else 0.0
        return round_number >= 1e3 and bool((np.abs(sums / round_number - 1) < EQUAL).all())
    return len(_groups(sums)[1]) <= max(2, len(sums) // 50)


def _groups(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Of groups of cells with one sum: that of each cell, and how many cells each has.
    step = np.rint(np.log(sums) / EQUAL).astype(np.int64)
    return np.unique(step, return_inverse=True, return_counts=True)[1:]


def _refuse_others(sums: np.ndarray, space: Space, cell: Callable[[int], str]) -> None:
    filled = np.flatnonzero(sums > 0)
    if not len(filled) or (len(filled) < _CELLS and _agree(sums[filled])):
        return
    group, n = _groups(sums[filled])
    alone = n[group] < _FEW
    # A sum may be rounded to either side of the border between two steps.
    near = np.abs(sums[filled] / (space.total or 1) - 1) < SAME
    if (odd := alone & ~near).any() and near.mean() > 0.9:  # of cells normalised in groups nobody knows every group
        row = int(filled[np.argmax(odd)])
        raise ValueError(
            f"X is {space} in most cells, but that of {cell(row)} sums to {sums[row]:,.6g} "
            f"({int(odd.sum()):,} such cells); all cells must be normalised alike. Give raw counts."
        )


def _are_whole(undone: np.ndarray) -> bool:
    small = undone[undone < 1000]  # float32 cannot say it of larger ones
    return len(small) > 0 and bool((np.abs(small - np.rint(small)) < 1e-3).all() and (np.rint(small) > 0).all())


def _are_multiples(undone: np.ndarray, indptr: np.ndarray) -> bool:
    per_cell = np.diff(indptr)
    smallest = np.minimum.reduceat(undone, indptr[:-1]) if len(undone) else undone
    multiple = undone / np.repeat(smallest, per_cell)
    of_interest = (multiple > 1.5) & (multiple < _MULTIPLES)
    distance = np.abs(multiple - np.rint(multiple))[of_interest]
    return len(distance) >= _ENOUGH and float(np.mean(distance < 5e-3)) > 0.95
