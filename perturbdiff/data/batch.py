"""A batch of cell sets: sparse until it is on the device, dense and normalised there.

B = sets, S = cells per set, G = genes. Labels belong to the set, not to the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbdiff.config import Preprocessing
from perturbdiff.data.expression import Cells
from perturbdiff.data.measured import MeasuredGenes
from perturbdiff.data.samplers import CellSet
from perturbdiff.data.vocab import Labels


@dataclass(frozen=True)
class SparseCells:
    """Cells of B sets in CSR form, at their positions among the B * S.

    position
        (n,) int64 position b * S + s of each cell.
    indptr, genes, values
        CSR over the n cells; values are counts (uint16, uint32) or log1p values (float32).
    library_size
        (n,) float32.
    """

    position: Tensor
    indptr: Tensor
    genes: Tensor
    values: Tensor
    library_size: Tensor

    def to(self, device: torch.device | str) -> SparseCells:
        parts = [getattr(self, name) for name in self.__dataclass_fields__]
        if torch.device(device).type == "cuda":  # from other memory, a copy is slow and the host waits for it
            parts = [part.pin_memory() for part in parts]
        return SparseCells(*(part.to(device, non_blocking=True) for part in parts))

    def dense(self, n_sets: int, set_size: int, n_genes: int, preprocessing: Preprocessing) -> Tensor:
        """(B, S, G) float32 in model units, log1p(count * target_sum / library_size) / scale; empty positions are 0."""
        per_cell = self.indptr.diff()
        values = self.values.float()
        if preprocessing.target_sum is not None and preprocessing.input_kind == "counts":
            factor = torch.where(self.library_size > 0, preprocessing.target_sum / self.library_size, 0.0)
            values = torch.log1p(values * factor.repeat_interleave(per_cell, output_size=len(values)))
        fill = self._filled_by_scipy if values.device.type == "cpu" else self._filled
        return fill(values / preprocessing.scale, n_sets * set_size, n_genes).view(n_sets, set_size, n_genes)

    def one_count(self, n_sets: int, set_size: int, preprocessing: Preprocessing) -> Tensor:
        """(B, S) model units: the value of a single count in each cell, 0 at empty positions and in empty cells.

        Of log1p values, whose library sizes nobody knows, the smallest one that a cell has.
        """
        if preprocessing.target_sum is not None and preprocessing.input_kind == "counts":
            size = self.library_size
            values = torch.where(size > 0, torch.log1p(preprocessing.target_sum / size.clamp_min(1e-30)), 0.0)
        else:
            cell = torch.arange(len(self.position), device=self.position.device)
            cell = cell.repeat_interleave(self.indptr.diff(), output_size=len(self.values))
            stored = torch.where(self.values > 0, self.values.float(), torch.inf)
            values = torch.full((len(self.position),), torch.inf, device=self.position.device)
            values = values.scatter_reduce(0, cell, stored, "amin")
            values = torch.where(values.isfinite(), values, 0.0)
        flat = torch.zeros(n_sets * set_size, device=values.device)
        flat[self.position] = values / preprocessing.scale
        return flat.view(n_sets, set_size)

    def _filled(self, values: Tensor, n_positions: int, n_genes: int) -> Tensor:
        flat = torch.zeros(n_positions * n_genes, device=values.device)
        start = (self.position * n_genes).repeat_interleave(self.indptr.diff(), output_size=len(values))
        flat[start + self.genes.long()] = values
        return flat

    def _filled_by_scipy(self, values: Tensor, n_positions: int, n_genes: int) -> Tensor:
        # On the CPU a third of the time: no index of each value, and numpy's memory comes in large pages.
        ends = torch.zeros(n_positions + 1, dtype=torch.int64)
        ends[self.position + 1] = self.indptr.diff()
        csr = (values.numpy(), self.genes.numpy().astype(np.int64, copy=False), ends.cumsum(0).numpy())
        return torch.from_numpy(sparse.csr_matrix(csr, shape=(n_positions, n_genes)).toarray())


@dataclass(frozen=True)
class Moves:
    """Where sets start, and how far they go from there, by condition.

    controls
        (n_conditions, 2, G) float32 what is kept of each control value, and what comes to it; log1p values.
    response
        (n_conditions,) float32 part of the way from there to the denoiser's estimate that predictions go.
    rest
        As `controls`, of what predictions are besides the network's part; None: what they start from.
    """

    controls: np.ndarray
    response: np.ndarray
    rest: np.ndarray | None = None


@dataclass(frozen=True)
class CellSetBatch:
    """B cell sets with their controls and conditions.

    mask
        (B, S) True where there is a cell. Controls stand at the same positions; marginal sets have none.
    keys
        (epoch, set number) of each set.
    conditions
        Index of each set's condition, for messages.
    measured
        (B, G) True where a gene was measured in all cells and controls of a set; None where all were.
    moves
        (B, 2, G) what is kept of each control value, and what comes to it, model units; None where sets start from the
        controls as they are.
    response
        (B,) part of the way from there to the estimate that predictions go; None where they go all of it.
    rest
        As `moves`, of what predictions are besides the network's part; None: what they start from.
    """

    cells: SparseCells
    controls: SparseCells
    mask: Tensor
    labels: Labels
    n_genes: int
    preprocessing: Preprocessing
    keys: tuple[tuple[int, int], ...]
    conditions: tuple[int, ...]
    measured: Tensor | None = None
    moves: Tensor | None = None
    response: Tensor | None = None
    rest: Tensor | None = None

    def to(self, device: torch.device | str) -> CellSetBatch:
        return replace(
            self,
            cells=self.cells.to(device),
            controls=self.controls.to(device),
            mask=self.mask.to(device),
            labels=self.labels.to(device),
            measured=None if self.measured is None else self.measured.to(device),
            moves=None if self.moves is None else self.moves.to(device),
            response=None if self.response is None else self.response.to(device),
            rest=None if self.rest is None else self.rest.to(device),
        )

    def dense(self) -> tuple[Tensor, Tensor]:
        """x0 and control, each (B, S, G) in model units, on the batch's device; 0 for genes that were not measured.

        Controls are moved, where they are to be.
        """
        n_sets, set_size = self.mask.shape
        x0 = self.cells.dense(n_sets, set_size, self.n_genes, self.preprocessing)
        return self.of_measured(x0), self._moved_controls(self.moves)

    def besides(self, control: Tensor) -> Tensor:
        """(B, S, G) what predictions are besides the network's part, of sets that start from `control`."""
        return control if self.rest is None else self._moved_controls(self.rest)

    def _moved_controls(self, moves: Tensor | None) -> Tensor:
        n_sets, set_size = self.mask.shape
        control = self.controls.dense(n_sets, set_size, self.n_genes, self.preprocessing)
        if moves is not None:
            control = (control * moves[:, :1] + moves[:, 1:]) * self.mask[..., None]
        return self.of_measured(control)

    def of_measured(self, x: Tensor) -> Tensor:
        """x (B, S, G) with 0 for genes that were not measured, to which no gradient goes."""
        return x if self.measured is None else x.masked_fill(~self.measured[:, None], 0.0)

    def one_count(self) -> Tensor:
        """(B, S) a single count in each control, model units; 0 where there is none."""
        n_sets, set_size = self.mask.shape
        return self.controls.one_count(n_sets, set_size, self.preprocessing)


def make_batch(
    sets: Sequence[CellSet],
    set_size: int,
    cells: Cells,
    labels: Labels,
    measured: MeasuredGenes | None = None,
    moves: Moves | None = None,
) -> CellSetBatch:
    """Gather the cells of some sets. `labels` are those of all conditions of the index, by condition.

    `measured` tells the genes of the rows of `cells`; None: all. `moves` are of all conditions, and None where
    controls stay. An empty list gives a batch without sets.
    """
    mask = torch.zeros(len(sets), set_size, dtype=torch.bool)
    has_control = mask.clone()
    for b, cell_set in enumerate(sets):
        mask[b, : len(cell_set.rows)] = True
        has_control[b, : len(cell_set.control_rows)] = True
    conditions = torch.tensor([s.condition for s in sets], dtype=torch.int64)
    of_sets = conditions.numpy()
    return CellSetBatch(
        cells=_gather(cells, [s.rows for s in sets], mask),
        controls=_gather(cells, [s.control_rows for s in sets], has_control),
        mask=mask,
        labels=labels.select(conditions),
        n_genes=len(cells.genes),
        preprocessing=cells.preprocessing,
        keys=tuple(s.key for s in sets),
        conditions=tuple(s.condition for s in sets),
        measured=None if measured is None else _measured(sets, measured),
        moves=None if moves is None else _in_model_units(moves.controls[of_sets], cells.preprocessing),
        response=None if moves is None else _response(moves.response[of_sets]),
        rest=None if moves is None or moves.rest is None else _in_model_units(moves.rest[of_sets], cells.preprocessing),
    )


def _in_model_units(moves: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    return torch.from_numpy(moves * np.array([1, 1 / preprocessing.scale], dtype=np.float32)[:, None])


def _response(response: np.ndarray) -> Tensor | None:
    return None if (response == 1).all() else torch.from_numpy(response)


def _measured(sets: Sequence[CellSet], measured: MeasuredGenes) -> Tensor | None:
    of_sets = [measured.in_all(np.concatenate([s.rows, s.control_rows])) for s in sets]
    return None if all(genes.all() for genes in of_sets) else torch.from_numpy(np.stack(of_sets))


def _gather(cells: Cells, rows: Sequence[np.ndarray], where: Tensor) -> SparseCells:
    taken = cells.take(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64))
    return SparseCells(
        position=where.flatten().nonzero()[:, 0],
        indptr=torch.from_numpy(taken.indptr),
        genes=torch.from_numpy(taken.genes),
        values=torch.from_numpy(taken.values),
        library_size=torch.from_numpy(taken.library_size),
    )
