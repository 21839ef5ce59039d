"""A batch of cell sets: sparse until it is on the device, dense and normalised there.

B = sets, S = cells per set, G = genes. Labels belong to the set, not to the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from perturbdiff.config import Preprocessing
from perturbdiff.data.cellsets import CellSet, ConditionIndex
from perturbdiff.data.screen import Expression
from perturbdiff.data.vocab import LabelVocab, split_label

NULL = -1  # id of an absent, hidden or unknown label


@dataclass(frozen=True)
class Labels:
    """Conditions of B sets; ids of the vocabularies, -1 = null.

    perturbation
        (B, P) the perturbations a cell received together, padded with -1.
    cell_type, batch
        (B,)
    hidden
        (B,) True where the whole condition is hidden; none if None.
    """

    perturbation: Tensor
    cell_type: Tensor
    batch: Tensor
    hidden: Tensor | None = None

    def to(self, device: torch.device | str) -> Labels:
        hidden = None if self.hidden is None else self.hidden.to(device)
        return Labels(self.perturbation.to(device), self.cell_type.to(device), self.batch.to(device), hidden)

    def select(self, sets: Tensor) -> Labels:
        """The conditions of some sets."""
        hidden = None if self.hidden is None else self.hidden[sets]
        return Labels(self.perturbation[sets], self.cell_type[sets], self.batch[sets], hidden)


@dataclass(frozen=True)
class Vocabularies:
    """The labels a model knows. A perturbation label "A+B" is the perturbations A and B together."""

    perturbations: LabelVocab
    cell_types: LabelVocab
    batches: LabelVocab
    combination_separator: str | None

    @classmethod
    def of(cls, index: ConditionIndex, separator: str | None, with_batches: bool) -> Vocabularies:
        """The labels of the perturbed conditions of an index: those that training gives a meaning.

        `with_batches` False leaves the batch out, as where batch and perturbation are confounded.
        """
        perturbed = [index.labels(int(condition)) for condition in np.flatnonzero(~index.is_control)]
        seen = [sorted({labels[i] for labels in perturbed}) for i in range(3)]
        parts = sorted({part for label in seen[0] for part in split_label(label, separator)})
        return cls(
            LabelVocab("perturbation", tuple(parts)),
            LabelVocab("cell_type", tuple(seen[1])),
            LabelVocab("batch", tuple(seen[2]) if with_batches else ()),
            separator,
        )

    def encode(self, conditions: Sequence[tuple[str | None, str | None, str | None]]) -> Labels:
        """Ids of (perturbation, cell_type, batch) names. None is null; so are unknown cell types and batches.

        Raises
        ------
        KeyError
            An unknown perturbation; the message lists the nearest. Never a silent null.
        """
        parts = [
            [] if name is None else [self.perturbations.id(part) for part in self.parts(name)]
            for name, _, _ in conditions
        ]
        width = max([1, *(len(ids) for ids in parts)])
        padded = [ids + [NULL] * (width - len(ids)) for ids in parts]
        return Labels(
            torch.tensor(padded, dtype=torch.int64).reshape(len(conditions), width),
            torch.tensor([self.cell_types.ids.get(c or "", NULL) for _, c, _ in conditions], dtype=torch.int64),
            torch.tensor([self.batches.ids.get(b or "", NULL) for _, _, b in conditions], dtype=torch.int64),
        )

    def parts(self, label: str) -> list[str]:
        """ "A+B" -> A, B; a label that is known as a whole stays whole."""
        return [label] if label in self.perturbations else split_label(label, self.combination_separator)


@dataclass(frozen=True)
class SparseCells:
    """Cells of B sets in CSR form, at their places among the B * S.

    place
        (n,) int64 place b * S + s of each cell.
    indptr, genes, values
        CSR over the n cells; values are counts (uint16, uint32) or log1p values (float32).
    library_size
        (n,) float32.
    """

    place: Tensor
    indptr: Tensor
    genes: Tensor
    values: Tensor
    library_size: Tensor

    def to(self, device: torch.device | str) -> SparseCells:
        return SparseCells(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))

    def dense(self, n_sets: int, set_size: int, n_genes: int, how: Preprocessing) -> Tensor:
        """(B, S, G) float32 in model units, log1p(count * target_sum / library_size) / scale; empty places are 0."""
        per_cell = self.indptr.diff()
        values = self.values.float()
        if how.input_kind == "counts":
            factor = torch.where(self.library_size > 0, how.target_sum / self.library_size, 0.0)
            values = torch.log1p(values * factor.repeat_interleave(per_cell))
        flat = torch.zeros(n_sets * set_size * n_genes, device=values.device)
        start = (self.place * n_genes).repeat_interleave(per_cell)
        flat[start + self.genes] = values / how.scale
        return flat.view(n_sets, set_size, n_genes)


@dataclass(frozen=True)
class CellSetBatch:
    """B cell sets with their controls and conditions.

    mask
        (B, S) True where there is a cell; cells and controls stand at the same places.
    keys
        (epoch, set number) of each set.
    conditions
        Index of each set's condition, for messages.
    """

    cells: SparseCells
    controls: SparseCells
    mask: Tensor
    labels: Labels
    n_genes: int
    preprocessing: Preprocessing
    keys: tuple[tuple[int, int], ...]
    conditions: tuple[int, ...]

    def to(self, device: torch.device | str) -> CellSetBatch:
        return replace(
            self,
            cells=self.cells.to(device),
            controls=self.controls.to(device),
            mask=self.mask.to(device),
            labels=self.labels.to(device),
        )

    def dense(self) -> tuple[Tensor, Tensor]:
        """x0 and control, each (B, S, G) in model units, on the batch's device."""
        n_sets, set_size = self.mask.shape
        x0 = self.cells.dense(n_sets, set_size, self.n_genes, self.preprocessing)
        return x0, self.controls.dense(n_sets, set_size, self.n_genes, self.preprocessing)


def make_batch(sets: Sequence[CellSet], set_size: int, expression: Expression, labels: Labels) -> CellSetBatch:
    """Gather the cells of some sets. `labels` are those of all conditions of the index, by condition.

    An empty list gives a batch without sets.
    """
    mask = torch.zeros(len(sets), set_size, dtype=torch.bool)
    for b, cell_set in enumerate(sets):
        mask[b, : len(cell_set.rows)] = True
    place = mask.flatten().nonzero()[:, 0]
    conditions = torch.tensor([s.condition for s in sets], dtype=torch.int64)
    return CellSetBatch(
        cells=_gather(expression, [s.rows for s in sets], place),
        controls=_gather(expression, [s.control_rows for s in sets], place),
        mask=mask,
        labels=labels.select(conditions),
        n_genes=len(expression.genes),
        preprocessing=expression.preprocessing,
        keys=tuple(s.key for s in sets),
        conditions=tuple(s.condition for s in sets),
    )


def _gather(expression: Expression, rows: Sequence[np.ndarray], place: Tensor) -> SparseCells:
    chosen = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    X = expression.X[chosen]
    return SparseCells(
        place=place,
        indptr=torch.from_numpy(X.indptr.astype(np.int64)),
        genes=torch.from_numpy(X.indices),
        values=torch.from_numpy(X.data),
        library_size=torch.from_numpy(expression.library_size[chosen]),
    )
