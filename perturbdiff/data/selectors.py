"""Selectors: which rows of a table of labels `PERTURBATION[:CELL_TYPE[:BATCH]]` and `COLUMN=VALUE` name.

`*` is any. A perturbation without a dose is meant at every dose; `A+*` is every condition that has A, alone or with
others. Fields with a column's name may follow, as in `A:T1:source=study`. Labels may hold colons themselves: a label
that is there is found whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import pandas as pd

from perturbdiff.data.notation import Notation, Parts
from perturbdiff.data.vocab import nearest

LABELS = ("perturbation", "cell_type", "batch")
ANY = "*"
GRAMMAR = "Selectors are PERTURBATION[:CELL_TYPE[:BATCH]], * is any, or COLUMN=VALUE with a column of obs."


class Selectors:
    """Selectors over the rows of `obs` where `among` (n_rows,) is True; all rows without.

    By the notation `B+A` names A+B and `A` every dose of A.
    """

    def __init__(self, obs: pd.DataFrame, notation: Notation, among: np.ndarray | None = None) -> None:
        self._obs, self._notation = obs, notation
        self._among = np.ones(len(obs), dtype=bool) if among is None else among
        self._columns: dict[str, tuple[np.ndarray, dict[str, int]]] = {}

    def rows(self, selector: str) -> np.ndarray:
        """(n_rows,) True where the selector names a row; all False where it names none."""
        fields = next(self._readings(selector.split(":"), 0), None)
        chosen = self._among if fields is not None else np.zeros_like(self._among)
        for column, value in (fields or {}).items():
            codes, ids = self._column(column)
            wanted = self._perturbations(value) if column == "perturbation" else [value]
            chosen = chosen & np.isin(codes, [ids[label] for label in wanted])
        return chosen

    def explain(self, selector: str) -> str:
        """Why a selector names no row."""
        column, equals, value = selector.partition("=")
        wanted = plain_fields(selector)
        if equals and column in self._obs.columns:
            wanted = {column: value}
        for name, value in wanted.items():
            if not self._known(name, value):
                there = nearest(value, self._column(name)[1])
                return f"{selector!r}: no perturbed cell has {name} {value!r}; {there}. {GRAMMAR}"
        return f"{selector!r} matches no perturbed cell: no cell has all of {wanted}."

    def _readings(self, words: Sequence[str], position: int) -> Iterator[dict[str, str]]:
        # Values by column; the longest label first.
        if not words:
            yield {}
        for n in range(len(words), 0, -1):
            text = ":".join(words[:n])
            column, equals, value = text.partition("=")
            if equals and column in self._obs.columns and pd.api.types.is_float_dtype(self._obs[column].dtype):
                value = _number(value)
            if position < len(LABELS) and (text == ANY or self._known(LABELS[position], text)):
                own = {} if text == ANY else {LABELS[position]: text}
                yield from ({**own, **rest} for rest in self._readings(words[n:], position + 1))
            elif equals and column in self._obs.columns and self._known(column, value):
                yield from ({column: value, **rest} for rest in self._readings(words[n:], len(LABELS)))

    def _known(self, column: str, value: str) -> bool:
        return bool(self._perturbations(value)) if column == "perturbation" else value in self._column(column)[1]

    def _column(self, name: str) -> tuple[np.ndarray, dict[str, int]]:
        # Codes of the rows, and of each label among the rows that may be chosen.
        if name not in self._columns:
            values = self._obs[name]
            if pd.api.types.is_float_dtype(values.dtype):  # 10 and 10.0 are one
                values = values.map(lambda number: f"{number:.15g}")
            codes, labels = pd.factorize(values.astype(str))
            here = np.unique(codes[self._among])
            self._columns[name] = codes, {str(labels[i]): int(i) for i in here}
        return self._columns[name]

    @cached_property
    def _by_names(self) -> dict[frozenset[str], list[tuple[str, Parts]]]:
        found: dict[frozenset[str], list[tuple[str, Parts]]] = {}
        for label in self._column("perturbation")[1]:
            parts = self._notation.parse(label)
            found.setdefault(frozenset(name for name, _ in parts), []).append((label, parts))
        return found

    def _perturbations(self, text: str) -> list[str]:
        end = f"{self._notation.combination_separator}{ANY}"
        others = self._notation.combination_separator is not None and text.endswith(end)
        try:
            wanted = self._notation.parse(text.removesuffix(end) if others else text)
        except ValueError:  # a dose that cannot be
            return []
        names = frozenset(name for name, _ in wanted)
        groups = [found for key, found in self._by_names.items() if names <= key] if others else []
        groups = groups or [self._by_names.get(names, [])]
        return [label for found in groups for label, parts in found if _same_doses(dict(parts), wanted)]


def plain_fields(selector: str) -> dict[str, str]:
    """What a selector of positions asks for, by label, whatever is there; for messages."""
    words = zip(LABELS, selector.split(":", maxsplit=len(LABELS) - 1), strict=False)
    return {name: word for name, word in words if word != ANY}


def _number(text: str) -> str:
    try:
        return f"{float(text):.15g}"
    except ValueError:
        return text


def _same_doses(has: dict[str, float | None], wanted: Parts) -> bool:
    return all(dose is None or ((own := has[name]) is not None and math.isclose(own, dose)) for name, dose in wanted)
