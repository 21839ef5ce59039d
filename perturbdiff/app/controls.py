"""Control cells of an .h5ad file for the app: looked at before it is read, its controls taken and checked."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from anndata import AnnData

from perturbdiff.data.h5ad import PARTS, open_h5ad, unpacked_bytes
from perturbdiff.data.screen import control_cells, genes_of
from perturbdiff.model import PerturbDiff

MIN_GENE_OVERLAP = 0.5  # of the model's genes


@dataclass(frozen=True)
class Limits:
    """What an uploaded file may take."""

    file_bytes: int = 500 << 20
    cells: int = 100_000  # in the file, perturbed ones included
    unpacked_bytes: int = 1 << 30  # X, obs and var: a compressed file may be a thousand times larger in memory


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
        None for a file that is trusted.

    Raises
    ------
    ValueError
        Not an .h5ad, beyond the limits, no controls, X neither counts nor log1p values, too few of the model's genes.
    """
    n_in_file = _look(path, limits)
    column = model.config.obs.cell_type
    cells = model.in_own_space(control_cells(path, model.config.obs, None, None))
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


def remove_old_files(folder: Path, seconds: float) -> None:
    """Remove the files under a folder that nobody has written to for so long: answers, and uploads broken off."""
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # taken by its owner in this moment
            if path.is_file() and time.time() - path.stat().st_mtime > seconds:
                path.unlink()


def _look(path: str | Path, limits: Limits | None) -> int:
    """Cells in the file, known without reading it. Raises ValueError for what must not be read."""
    if limits is not None and (size := Path(path).stat().st_size) > limits.file_bytes:
        raise ValueError(f"{path} has {_megabytes(size)}; the app takes at most {_megabytes(limits.file_bytes)}.")
    with open_h5ad(path) as file:
        if missing := [part for part in PARTS if part not in file]:
            raise ValueError(f"{path} is not an .h5ad: it has no {', '.join(missing)}. Write it with AnnData.")
        X = file["X"]
        shape = X.shape if isinstance(X, h5py.Dataset) else tuple(X.attrs.get("shape", ()))
    if len(shape) != 2:
        raise ValueError(f"X of {path} is not a matrix of cells by genes; write the file with AnnData.")
    n_cells = int(shape[0])
    if limits is not None and n_cells > limits.cells:
        raise ValueError(
            f"{path} has {n_cells:,} cells; the app takes at most {limits.cells:,}. Upload the control cells only, "
            "or fewer of them."
        )
    if limits is not None and (unpacked := unpacked_bytes(path)) > limits.unpacked_bytes:
        raise ValueError(
            f"{path} unpacks to {_megabytes(unpacked)}; the app takes at most {_megabytes(limits.unpacked_bytes)}. "
            "Upload fewer cells, or X as a sparse matrix."
        )
    return n_cells


def _megabytes(n_bytes: int) -> str:
    return f"{np.ceil(n_bytes / (1 << 20)):,.0f} MB"
