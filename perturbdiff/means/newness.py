"""How a condition is new to others: what of it none of them has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

New = Literal[
    "perturbation", "combination", "cell type", "batch", "dose",
    "perturbation and cell type", "perturbation and batch", "combination and cell type", "combination and batch",
]  # fmt: skip
"""perturbation: no part of it was seen. combination: of parts of which one was seen at least. Both in a context where
others were seen, or also in a new cell type, or a new batch of a cell type. cell type, batch: perturbations seen in
others. dose: seen in this context, at this dose or another."""

Names = frozenset[str]  # of the parts of a perturbation, whatever their doses
Condition = tuple[Names, str, str]  # names, cell type, batch


class Known:
    """Conditions that others are new to, or not."""

    def __init__(self, conditions: Iterable[Condition]) -> None:
        self._contexts_of: dict[Names, set[tuple[str, str]]] = {}
        for names, cell_type, batch in conditions:
            self._contexts_of.setdefault(names, set()).add((cell_type, batch))
        self.names = {name for names in self._contexts_of for name in names}
        self._contexts = {context for contexts in self._contexts_of.values() for context in contexts}
        self._cell_types = {cell_type for cell_type, _ in self._contexts}

    def new(self, names: Names, cell_type: str, batch: str) -> New:
        """How a condition is new to these."""
        if contexts := self._contexts_of.get(names):
            if cell_type not in {c for c, _ in contexts}:
                return "cell type"
            return "dose" if (cell_type, batch) in contexts else "batch"
        if len(names) > 1 and names & self.names:
            if cell_type not in self._cell_types:
                return "combination and cell type"
            return "combination" if (cell_type, batch) in self._contexts else "combination and batch"
        if cell_type not in self._cell_types:
            return "perturbation and cell type"
        return "perturbation" if (cell_type, batch) in self._contexts else "perturbation and batch"


def axes(new: New) -> tuple[str, ...]:
    """What is new, one word for each of perturbation (or combination, or dose) and place (cell type or batch)."""
    return tuple(new.split(" and "))
