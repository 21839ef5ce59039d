"""Control cells of an .h5ad file for the app: taken and checked; and the files that the app keeps."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from anndata import AnnData

from perturbdiff.app.upload import Limits, count_cells, read_upload
from perturbdiff.data.screen import control_cells, genes_of
from perturbdiff.model import PerturbDiff

MIN_GENE_OVERLAP = 0.5  # of the model's genes


@dataclass(frozen=True)
class Controls:
    """Control cells that fit a model.

    cells
        The controls of the file, X as it was there.
    cell_types
        What can be chosen: the cells' own labels, or those the model knows where the file has none.
    cell_type_column
        The obs column that says the cell type of each cell; None where the file has none.
    """

    name: str
    cells: AnnData
    cell_types: tuple[str, ...]
    cell_type_column: str | None
    n_in_file: int
    n_genes: int  # of the model
    n_genes_matched: int
    matched_by: str

    def select(self, cell_type: str | None) -> AnnData:
        """Those of one cell type; all if None, or where the file has no such labels."""
        if cell_type is None or self.cell_type_column is None:
            return self.cells
        return self.cells[(self.cells.obs[self.cell_type_column].astype(str) == cell_type).to_numpy()].copy()


def read_controls(path: str | Path, name: str, model: PerturbDiff, limits: Limits | None) -> Controls:
    """Controls of an .h5ad, as `perturbdiff predict` takes them: perturbed cells in it are left out.

    Parameters
    ----------
    path, name
        The file, and what to call it in messages.
    limits
        Of an uploaded file; None for one that is trusted, which is read in this process.

    Raises
    ------
    ValueError
        Not an .h5ad, beyond the limits, no controls, X neither counts nor log1p values, too few of the model's genes.
    """
    if limits is None:
        cells, n_in_file = control_cells(path, model.config.obs, None, None), count_cells(path, None)
    else:
        cells, n_in_file = read_upload(path, name, model.config.obs, limits)
    column, cells = model.config.obs.cell_type, model.in_own_space(cells)
    if not cells.n_obs:
        raise ValueError(f"{name} has no cells; give control cells.")
    alignment = model.genes.align(genes_of(cells.var), MIN_GENE_OVERLAP)
    labelled = column in cells.obs.columns
    found = sorted(set(cells.obs[column].astype(str))) if labelled else model.vocabularies.cell_types.names
    return Controls(
        name,
        cells,
        tuple(found),
        column if labelled else None,
        n_in_file,
        len(model.genes),
        alignment.n_matched,
        alignment.matched_by,
    )


def remove_old_files(folder: Path, seconds: float, most_bytes: int) -> None:
    """Remove the files under a folder that nobody has written to for so long, and the oldest of more than so much:
    answers, uploads that nobody used or that were broken off."""
    found = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # taken by its owner in this moment
            if path.is_file():
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    kept = 0
    for written, size, path in sorted(found, reverse=True):
        if kept + size > most_bytes or time.time() - written > seconds:
            path.unlink(missing_ok=True)
        else:
            kept += size
