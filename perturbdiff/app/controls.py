"""Control and measured cells of an .h5ad file for the app: taken and checked; and the files that the app keeps."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from anndata import AnnData

from perturbdiff.app.upload import Limits, count_cells, read_upload
from perturbdiff.data.screen import controls_and_perturbed, genes_of
from perturbdiff.files import short
from perturbdiff.inference.check import perturbation_labels
from perturbdiff.model import PerturbDiff

MIN_GENE_OVERLAP = 0.5  # of the model's genes
MOST_MEASURED = 256  # cells of a perturbation in a cell type, kept to be shown beside predicted ones
PERTURBATION = "perturbation"  # obs column of these: as the model calls it


@dataclass(frozen=True, eq=False)  # gradio hashes what a session holds
class Controls:
    """Control cells that fit a model.

    cells
        The controls of the file, X as it was there.
    cell_types
        What can be chosen: the cells' own labels, or those the model knows where the file has none.
    cell_type_column
        The obs column that says the cell type of each cell; None where the file has none.
    measured
        Perturbed cells of the file, X in the model's space, obs `perturbation` as the model writes it; none where the
        file has none whose perturbation the model knows.
    note
        Why perturbed cells that are there cannot be shown; may be nothing.
    """

    name: str
    cells: AnnData
    cell_types: tuple[str, ...]
    cell_type_column: str | None
    n_in_file: int
    n_genes: int  # of the model
    n_genes_matched: int
    matched_by: str
    measured: AnnData
    note: str = ""

    def select(self, cell_type: str | None) -> AnnData:
        """Those of one cell type; all if None, or where the file has no such labels."""
        if cell_type is None or self.cell_type_column is None:
            return self.cells
        return self.cells[(self.cells.obs[self.cell_type_column].astype(str) == cell_type).to_numpy()].copy()

    def measured_under(self, perturbation: str, cell_type: str | None) -> AnnData:
        """Those of one perturbation in a cell type; none without one where the file has several, whose mixture would
        not be that of the controls."""
        cells = self.measured
        if cell_type is None and self.cell_type_column is not None and len(self.cell_types) > 1:
            return cells[:0]
        if not cells.n_obs:
            return cells
        wanted = (cells.obs[PERTURBATION] == perturbation).to_numpy()
        if cell_type is not None and self.cell_type_column is not None:
            wanted &= (cells.obs[self.cell_type_column].astype(str) == cell_type).to_numpy()
        return cells[wanted].copy()


def read_controls(path: str | Path, name: str, model: PerturbDiff, limits: Limits | None) -> Controls:
    """Controls of an .h5ad, as `perturbdiff predict` takes them, and some of its perturbed cells to compare with.

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
        n_in_file = count_cells(path, None)
        cells, perturbed = controls_and_perturbed(path, model.config.obs, MOST_MEASURED)
    else:
        cells, perturbed, n_in_file = read_upload(path, name, model.config.obs, limits, MOST_MEASURED)
    column, obs, cells = model.config.obs.cell_type, cells.obs, model.in_own_space(cells)
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
        *_measured(perturbed, obs, model, name),
    )


def _measured(perturbed: AnnData, controls: pd.DataFrame, model: PerturbDiff, name: str) -> tuple[AnnData, str]:
    """Cells whose perturbation the model knows, and why those that are there cannot be shown."""
    nothing = perturbed[:0].copy()
    if not perturbed.n_obs:
        return nothing, ""
    both = pd.concat([controls.reset_index(drop=True), perturbed.obs.reset_index(drop=True)], ignore_index=True)
    try:
        cells = model.in_own_space(perturbed).copy()
        labels = perturbation_labels(model, both, name).reindex(both.index[len(controls) :]).astype(object)
    except (ValueError, KeyError) as error:  # predictions need no measured cells
        return nothing, f"Its measured cells are not shown: {short(error)}"
    cells.obs[PERTURBATION] = labels.to_numpy()
    return cells[[isinstance(label, str) and model.vocabularies.knows(label) for label in labels]].copy(), ""


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
