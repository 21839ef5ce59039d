"""Cells that come twice: compared by the hash of their content (`data.identity`), whatever they are called.

Studies are downloaded twice, and integrated objects hold the cells of others under other labels, perhaps cut to their
variable genes: cells are compared by the genes that all sources have. Cells of a few genes are alike by chance and not
compared. Memory is that of PART cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PART = 1 << 24  # cells compared together, about
MOST_CONDITIONS = 100  # of one content that are noted with each of its conditions
HASHED = np.dtype([("content", "<u8"), ("condition", "<i4")])


@dataclass(frozen=True)
class Repeats:
    """Cells whose content another cell has.

    within
        Cells beside the first of a content in the same condition.
    across
        Contents that come in two conditions or more.
    pairs
        (n, 3) int64: two conditions, the first one smaller, and how many contents they share; each pair once.
    """

    within: int
    across: int
    pairs: np.ndarray


def find_repeats(files: Sequence[Path], n_cells: int, part: int = PART) -> Repeats:
    """Compare all cells whose hashes and conditions (HASHED) lie in these files, a range of hashes at a time."""
    n_parts = max(-(-n_cells // part), 1)
    within = across = 0
    found = [np.zeros((0, 3), dtype=np.int64)]
    for i in range(n_parts):
        own = []
        for file in files:
            cells = np.load(file, allow_pickle=False)
            own.append(cells if n_parts == 1 else cells[cells["content"] % np.uint64(n_parts) == i])
        cells = np.concatenate(own) if own else np.zeros(0, HASHED)
        cells = cells[np.lexsort((cells["condition"], cells["content"]))]
        same = cells["content"][1:] == cells["content"][:-1]
        alike = same & (cells["condition"][1:] == cells["condition"][:-1])
        within += int(alike.sum())
        # One cell of each content and condition, and of those the contents that come in several.
        cells = cells[np.flatnonzero(np.append(True, ~alike))[: len(cells)]]
        begins = np.flatnonzero(np.append(True, cells["content"][1:] != cells["content"][:-1]))[: len(cells)]
        sizes = np.diff(begins, append=len(cells))
        across += int((sizes > 1).sum())
        found += _pairs(cells["condition"].astype(np.int64), begins[sizes > 1], sizes[sizes > 1])
    return Repeats(within, across, _summed(found))


def _pairs(condition: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Pairs of the conditions of each content, which lie at begin, begin + 1, ...; by how far the two lie apart."""
    pairs = []
    for k in range(min(int(sizes.max(initial=0)), MOST_CONDITIONS) - 1):
        longer = sizes > k + 1
        lengths = (sizes - k - 1)[longer]
        second = np.repeat(begins[longer] + k + 1, lengths) + _counted(lengths)
        first = second - k - 1
        pairs.append(_summed([np.stack([condition[first], condition[second], np.ones(len(first), np.int64)], axis=1)]))
    return pairs


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ..., n - 1 for each length n."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _summed(parts: Sequence[np.ndarray]) -> np.ndarray:
    rows = np.concatenate(parts)
    pairs, of = np.unique(rows[:, :2], axis=0, return_inverse=True)
    return np.column_stack([pairs, np.bincount(of.reshape(-1), rows[:, 2], len(pairs)).astype(np.int64)])
