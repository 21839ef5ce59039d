"""Which genes were measured in which cells of atlases, whose sources differ in them: a gene without data is not 0.

G = genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class MeasuredGenes:
    """The genes that were measured in each stretch of rows.

    first
        (n,) int64 first row of each stretch, rising.
    panel
        (n,) the row of `table` that a stretch has.
    table
        (n_panels, G) bool.
    """

    first: np.ndarray
    panel: np.ndarray
    table: np.ndarray

    @property
    def by_all(self) -> np.ndarray:
        """(G,) True for the genes that were measured everywhere."""
        return np.logical_and.reduce(self.table)

    def in_all(self, rows: np.ndarray) -> np.ndarray:
        """(G,) True for the genes that were measured in all of these rows."""
        return np.logical_and.reduce(self.table[np.unique(self._panels(rows))])

    def complete(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows),) True for the rows in which all genes were measured."""
        return np.logical_and.reduce(self.table, axis=1)[self._panels(rows)]

    def parts(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """These rows in parts that share their measured genes, (G,)."""
        panels = self._panels(rows)
        for panel in np.unique(panels):
            yield rows[panels == panel], self.table[panel]

    def select(self, genes: np.ndarray) -> MeasuredGenes | None:
        """Of the genes at these positions; None where all of them were measured everywhere."""
        table = self.table[:, genes]
        return None if table.all() else replace(self, table=table)

    def _panels(self, rows: np.ndarray) -> np.ndarray:
        return self.panel[np.searchsorted(self.first, rows, "right") - 1]
