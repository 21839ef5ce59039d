"""A batch of cell sets: sparse until it is on the device, dense and normalised there.

B = sets, S = cells per set, G = genes. Labels belong to the set, not to the cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbdiff.config import Preprocessing
from perturbdiff.data.cellsets import CellSet
from perturbdiff.data.conditions import ConditionIndex
from perturbdiff.data.expression import Cells
from perturbdiff.data.features import FeatureTable
from perturbdiff.data.vocab import LabelVocab, split_dose, split_label

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
    dose
        (B, P) log10 of the dose of each perturbation, 0 where there is none; None where the model knows no doses.
    unlabelled
        (B,) True where perturbations are known by their features alone, their own rows hidden; none if None.
    """

    perturbation: Tensor
    cell_type: Tensor
    batch: Tensor
    hidden: Tensor | None = None
    dose: Tensor | None = None
    unlabelled: Tensor | None = None

    def to(self, device: torch.device | str) -> Labels:
        return self._each(lambda values: values.to(device))

    def select(self, sets: Tensor) -> Labels:
        """The conditions of some sets."""
        return self._each(lambda values: values[sets])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Labels:
        values = (getattr(self, field.name) for field in fields(self))
        return Labels(*(None if value is None else change(value) for value in values))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Vocabularies:
    """The labels a model knows. A perturbation label "A+B" is the perturbations A and B together, "A@0.5" A at a dose.

    n_described
        The last so many perturbations have no row of their own: no training cell received them, and they are known by
        their features alone.
    tables
        Name and width of each table of perturbation features.
    """

    perturbations: LabelVocab
    cell_types: LabelVocab
    batches: LabelVocab
    combination_separator: str | None
    dose_separator: str | None = None
    n_described: int = 0
    tables: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(
        cls,
        index: ConditionIndex,
        separator: str | None,
        with_batches: bool,
        marginal: np.ndarray | None = None,
        dose_separator: str | None = None,
    ) -> Vocabularies:
        """The labels of the conditions of an index that are dealt: those that training gives a meaning.

        These are the perturbed ones, and all where `marginal` (n_conditions,), which have no perturbation then.
        `with_batches` False leaves the batch out, as where batch and perturbation are confounded.
        """
        marginal = np.zeros(len(index), dtype=bool) if marginal is None else marginal
        labelled = (~index.is_control & ~marginal, ~index.is_control | marginal, ~index.is_control)
        seen = [
            [index.names[i][code] for code in np.unique(index.codes[conditions, i])]
            for i, conditions in enumerate(labelled)
        ]
        parts = {split_dose(part, dose_separator)[0] for label in seen[0] for part in split_label(label, separator)}
        return cls(
            LabelVocab("perturbation", tuple(sorted(parts))),
            LabelVocab("cell_type", tuple(seen[1])),
            LabelVocab("batch", tuple(seen[2]) if with_batches else ()),
            separator,
            dose_separator,
        )

    @property
    def labelled(self) -> tuple[str, ...]:
        """The perturbations that training gave a row."""
        return self.perturbations.names[: len(self.perturbations) - self.n_described]

    def with_tables(self, tables: Sequence[FeatureTable]) -> Vocabularies:
        """With the perturbations that have features but no row of their own."""
        known = set(self.labelled)
        described = {name: None for table in tables for name in table.names if name not in known}  # in this order
        return replace(
            self,
            perturbations=LabelVocab("perturbation", (*self.labelled, *described)),
            n_described=len(described),
            tables=tuple((table.name, table.values.shape[1]) for table in tables),
        )

    def encode(self, conditions: Sequence[tuple[str | None, str | None, str | None]]) -> Labels:
        """Ids of (perturbation, cell_type, batch) names. None is null; so are unknown cell types and batches.

        Raises
        ------
        KeyError
            An unknown perturbation; the message lists the nearest. Never a silent null.
        ValueError
            A perturbation without a dose where the model was trained with doses.
        """
        parts = [
            [] if name is None else [(self.perturbations.id(part), dose) for part, dose in self.parts(name)]
            for name, _, _ in conditions
        ]
        width = max([1, *(len(ids) for ids in parts)])
        shape = len(conditions), width
        ids = [[i for i, _ in of] + [NULL] * (width - len(of)) for of in parts]
        doses = [[dose for _, dose in of] + [1.0] * (width - len(of)) for of in parts]
        return Labels(
            torch.tensor(ids, dtype=torch.int64).reshape(shape),
            torch.tensor([self.cell_types.ids.get(c or "", NULL) for _, c, _ in conditions], dtype=torch.int64),
            torch.tensor([self.batches.ids.get(b or "", NULL) for _, _, b in conditions], dtype=torch.int64),
            dose=None if self.dose_separator is None else torch.tensor(doses).reshape(shape).log10(),
        )

    def encode_conditions(self, index: ConditionIndex, marginal: np.ndarray) -> Labels:
        """Ids of the conditions of an index, one row each: controls have the null perturbation.

        So has every condition where `marginal` (n_conditions,); its controls, pooled over batches, have no batch.
        Raises as `encode`.
        """
        p, c, b = index.codes.astype(np.int64).T
        perturbed = ~index.is_control & ~marginal
        named = set(p[perturbed].tolist())
        of_perturbation = self.encode([(n if i in named else None, None, None) for i, n in enumerate(index.names[0])])
        of_cell_type = self.encode([(None, name, None) for name in index.names[1]]).cell_type
        of_batch = self.encode([(None, None, name) for name in index.names[2]]).batch
        perturbation, batch = of_perturbation.perturbation[p], of_batch[b]
        perturbation[torch.from_numpy(~perturbed)] = NULL
        batch[torch.from_numpy(index.is_control & marginal)] = NULL
        dose = None if of_perturbation.dose is None else of_perturbation.dose[p]
        return Labels(perturbation, of_cell_type[c], batch, dose=dose)

    def parts(self, label: str) -> list[tuple[str, float]]:
        """ "A+B" -> A, B, each with its dose; a label that is known as a whole stays whole. Raises as `encode`."""
        if label in self.perturbations and self.dose_separator is None:
            return [(label, 1.0)]
        parts = [split_dose(part, self.dose_separator) for part in split_label(label, self.combination_separator)]
        for name, dose in parts:
            if dose is None and self.dose_separator is not None and name in self.perturbations:
                raise ValueError(
                    f"perturbation {name!r} has no dose, and this model was trained with doses; "
                    f"give one, as '{name}{self.dose_separator}0.5'."
                )
        return [(name, 1.0 if dose is None else dose) for name, dose in parts]


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
        fill = self._filled_by_scipy if values.device.type == "cpu" else self._filled
        return fill(values / how.scale, n_sets * set_size, n_genes).view(n_sets, set_size, n_genes)

    def one_count(self, n_sets: int, set_size: int, how: Preprocessing) -> Tensor:
        """(B, S) model units: the value of a single count in each cell, 0 at empty places and in empty cells.

        Of log1p values, whose library sizes nobody knows, the smallest one that a cell has.
        """
        if how.input_kind == "counts":
            size = self.library_size
            values = torch.where(size > 0, torch.log1p(how.target_sum / size.clamp_min(1e-30)), 0.0)
        else:
            cell = torch.arange(len(self.place), device=self.place.device).repeat_interleave(self.indptr.diff())
            stored = torch.where(self.values > 0, self.values.float(), torch.inf)
            values = torch.full((len(self.place),), torch.inf, device=self.place.device)
            values = values.scatter_reduce(0, cell, stored, "amin")
            values = torch.where(values.isfinite(), values, 0.0)
        flat = torch.zeros(n_sets * set_size, device=values.device)
        flat[self.place] = values / how.scale
        return flat.view(n_sets, set_size)

    def _filled(self, values: Tensor, n_places: int, n_genes: int) -> Tensor:
        flat = torch.zeros(n_places * n_genes, device=values.device)
        start = (self.place * n_genes).repeat_interleave(self.indptr.diff())
        flat[start + self.genes.long()] = values
        return flat

    def _filled_by_scipy(self, values: Tensor, n_places: int, n_genes: int) -> Tensor:
        # On the CPU a third of the time: no index of each value, and numpy's memory comes in large pages.
        ends = torch.zeros(n_places + 1, dtype=torch.int64)
        ends[self.place + 1] = self.indptr.diff()
        csr = (values.numpy(), self.genes.numpy().astype(np.int64, copy=False), ends.cumsum(0).numpy())
        return torch.from_numpy(sparse.csr_matrix(csr, shape=(n_places, n_genes)).toarray())


@dataclass(frozen=True)
class CellSetBatch:
    """B cell sets with their controls and conditions.

    mask
        (B, S) True where there is a cell. Controls stand at the same places; marginal sets have none.
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

    def one_count(self) -> Tensor:
        """(B, S) a single count in each control, model units; 0 where there is none."""
        n_sets, set_size = self.mask.shape
        return self.controls.one_count(n_sets, set_size, self.preprocessing)


def make_batch(sets: Sequence[CellSet], set_size: int, cells: Cells, labels: Labels) -> CellSetBatch:
    """Gather the cells of some sets. `labels` are those of all conditions of the index, by condition.

    An empty list gives a batch without sets.
    """
    mask = torch.zeros(len(sets), set_size, dtype=torch.bool)
    has_control = mask.clone()
    for b, cell_set in enumerate(sets):
        mask[b, : len(cell_set.rows)] = True
        has_control[b, : len(cell_set.control_rows)] = True
    conditions = torch.tensor([s.condition for s in sets], dtype=torch.int64)
    return CellSetBatch(
        cells=_gather(cells, [s.rows for s in sets], mask),
        controls=_gather(cells, [s.control_rows for s in sets], has_control),
        mask=mask,
        labels=labels.select(conditions),
        n_genes=len(cells.genes),
        preprocessing=cells.preprocessing,
        keys=tuple(s.key for s in sets),
        conditions=tuple(s.condition for s in sets),
    )


def _gather(cells: Cells, rows: Sequence[np.ndarray], where: Tensor) -> SparseCells:
    taken = cells.take(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64))
    return SparseCells(
        place=where.flatten().nonzero()[:, 0],
        indptr=torch.from_numpy(taken.indptr),
        genes=torch.from_numpy(taken.genes),
        values=torch.from_numpy(taken.values),
        library_size=torch.from_numpy(taken.library_size),
    )
