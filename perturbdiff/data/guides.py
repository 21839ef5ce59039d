"""Rows of var that are no genes: guides and antibodies, which a column says, or guides that the values give away.

A guide is counted in cells of the perturbation of its name alone, and would tell a model what it has to predict.
G = rows of var.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbdiff.data.notation import Notation

FEATURE_TYPES, GENE_EXPRESSION = ("feature_types", "feature_type"), "Gene Expression"  # columns of 10x, and genes
NO_GENES = re.compile(r"guide|grna|crispr|antibody|hashtag|hto|adt|multiplex|custom", re.IGNORECASE)
BEFORE = re.compile(r"^(sgrna|grna|guide|crispr|sg|g)[-_.: ]?(?=[^\d_.:-])", re.IGNORECASE)  # a name, of its guide
NUMBER = re.compile(  # behind a name, of its guide
    r"[-_.#: ]?(sg|g|guide|grna|sgrna|p)?[-_.#: ]?\d+([-_][ACGT]{8,})?$|[-_][+-][-_]\d.*$", re.IGNORECASE
)
AMBIENT = 0.1  # part of the cells of a row named as guides are that may be of other perturbations
LEAST_CELLS = 0.1  # part of a perturbation's cells that have its guide, of any that is captured
CELLS = 1 << 12  # looked at together: most names of genes are no guides by the first of them


def gene_rows(var: pd.DataFrame) -> np.ndarray:
    """(G,) True where a row of var is a gene, and none of the guides and antibodies that 10x files hold too."""
    column = next((name for name in FEATURE_TYPES if name in var), None)
    if column is None:
        return np.ones(len(var), dtype=bool)
    kinds = var[column].astype(str)
    of_genes = (kinds == GENE_EXPRESSION).to_numpy()
    return of_genes if of_genes.any() else ~kinds.str.contains(NO_GENES).to_numpy()


class Guides:
    """Finds guides among rows of var, in cells that may come in parts.

    Parameters
    ----------
    names
        Of the rows of var. A guide's number may stand behind the name of a perturbation, as in STAT1g2, STAT1_2 or
        sgSTAT1-2. Of such a row some of the cells may be of other perturbations: droplets hold stray counts.
    received
        What the cells of each label received, by name; of control cells their label, as controls have guides too.
    """

    def __init__(self, names: Iterable[str], received: Mapping[str, Collection[str]]) -> None:
        names = list(names)
        known = set[str]().union(*received.values())
        own = [name if name in known else _target(name, known) for name in names]
        ids = {name: i for i, name in enumerate(sorted(known))}
        self._n_rows = len(names)
        self._candidates = np.flatnonzero([name in known for name in own])
        self._target = np.array([ids[own[row]] for row in self._candidates], dtype=np.int64)
        self._ambient = np.array([AMBIENT * (names[row] not in known) for row in self._candidates])
        self._wrong = np.zeros(len(self._candidates), np.int64)
        self._label = {label: i for i, label in enumerate(received)}
        pairs = [(self._label[label], ids[name]) for label, of in received.items() for name in set(of)]
        of_label, of_name = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        self._received = sparse.csr_matrix((np.ones(len(pairs), bool), (of_label, of_name)), (len(received), len(ids)))
        self._counted = np.zeros(len(self._candidates), np.int64)  # cells that have it
        self._n_cells = np.zeros(len(ids), np.int64)  # of each name

    @classmethod
    def of_labels(cls, names: Iterable[str], labels: Iterable[str], notation: Notation) -> Guides:
        """By the perturbations that cells of these labels received."""
        received = {label: {name for name, _ in notation.parse(label)} for label in labels}
        return cls(names, {label: of or {label, *notation.controls} for label, of in received.items()})

    def __bool__(self) -> bool:
        """Whether some row of var may still be a guide."""
        return len(self._candidates) > 0

    def look(self, X: sparse.csr_matrix, labels: pd.Categorical[Any]) -> None:
        """Leave out what cells of another perturbation have: (n, G) values without stored zeros, and n labels."""
        of_category = np.array([self._label[label] for label in labels.categories], dtype=np.int64)
        own = of_category[labels.codes]
        for first in range(0, len(own) if self else 0, CELLS):
            part = own[first : first + CELLS]
            cells = X[first : first + CELLS][:, self._candidates].tocoo()
            n = len(self._candidates)
            if cells.nnz:
                right = self._received[part[cells.row], self._target[cells.col]]
                self._wrong += np.bincount(cells.col[~np.asarray(right).ravel()], minlength=n)
            self._counted += np.bincount(cells.col, minlength=n)
            wrong = (self._wrong > 0) & (
                (self._ambient == 0) | (self._wrong > self._ambient * self._counted + CELLS // 50)
            )
            self._n_cells += np.bincount(part, minlength=len(self._label)) @ self._received
            self._candidates, self._target, self._counted, self._ambient, self._wrong = (
                values[~wrong] for values in (self._candidates, self._target, self._counted, self._ambient, self._wrong)
            )

    def found(self) -> np.ndarray:
        """(G,) True for guides."""
        found = np.zeros(self._n_rows, dtype=bool)
        own = self._counted - self._wrong
        captured = own >= np.maximum(2, LEAST_CELLS * self._n_cells[self._target])
        captured &= self._wrong <= self._ambient * self._counted
        found[self._candidates[captured]] = True
        return found


def _target(name: str, known: Collection[str]) -> str:
    """The perturbation that a row of var may be a guide of, by its name; the name itself where there is none."""
    for text in (name, BEFORE.sub("", name)):
        for found in (text, NUMBER.sub("", text)):
            if found in known:
                return found
    return name
