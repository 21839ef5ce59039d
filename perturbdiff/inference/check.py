"""Whether a file fits a model, before anything is predicted: genes, space of X, library sizes, controls, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata.io import read_elem

from perturbdiff.config import DataConfig, Preprocessing
from perturbdiff.data.expression import as_csr
from perturbdiff.data.guides import gene_rows
from perturbdiff.data.h5ad import open_h5ad
from perturbdiff.data.labels import read_labels
from perturbdiff.data.notation import one_unit
from perturbdiff.data.screen import control_cells, expression_of, genes_of
from perturbdiff.data.space import Space, space_of
from perturbdiff.data.vocab import nearest
from perturbdiff.files import few
from perturbdiff.model import PerturbDiff


@dataclass(frozen=True)
class Labels:
    """Labels of one kind in a file, those that the model knows and the others; none of either without a column."""

    known: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ((self.known, "known"), (self.unknown, "unknown"))
        return "; ".join(f"{len(names):,} {what}: {few(list(names))}" for names, what in shown if names) or "none"


@dataclass(frozen=True)
class Fit:
    """What `check_file` found in a file that a model can predict from.

    n_genes, missing, matched_by
        The model's genes, those of them that the file lacks, and by what the others were matched.
    space, taken
        What X of the controls holds, and what the model takes.
    library
        Median counts of a control over all genes; None where X holds no counts.
    sums, trained_sums
        What the model's genes sum to in a control, in normalised counts: quantiles at 1, 50 and 99 %, here and in
        training; None where nobody knows.
    perturbations, cell_types, batches
        Of the perturbed cells, and of the control cells.
    remarks
        What `predict` would warn of, and what it would extrapolate.
    """

    path: str
    model: str
    n_cells: int
    n_controls: int
    n_file_genes: int
    n_genes: int
    missing: tuple[str, ...]
    matched_by: str
    space: Space
    taken: Preprocessing
    library: float | None
    sums: tuple[float, ...] | None
    trained_sums: tuple[float, ...] | None
    perturbations: Labels
    cell_types: Labels
    batches: Labels
    remarks: tuple[str, ...]

    def text(self) -> str:
        """For a person, several lines."""
        missing = f"; {len(self.missing):,} missing: {few(list(self.missing))}" if self.missing else ""
        matched, total = self.n_genes - len(self.missing), self.taken.target_sum
        taken = "log1p values" if total is None else f"log1p values of {total:,.6g} counts a cell"
        rows = [
            ("model", self.model),
            ("file", f"{self.path}: {self.n_cells:,} cells, {self.n_file_genes:,} genes"),
            ("controls", f"{self.n_controls:,} of {self.n_cells:,} cells"),
            ("genes", f"{matched:,} of the model's {self.n_genes:,} matched by {self.matched_by}{missing}"),
            ("X", f"{'' if self.space.certain else 'taken for '}{self.space}; the model predicts {taken}"),
        ]
        if self.library is not None:
            rows.append(("library", f"median {self.library:,.0f} counts a control"))
        if self.sums is not None:
            trained = "unknown" if self.trained_sums is None else _range(self.trained_sums)
            rows.append(("sums", f"{_range(self.sums)} in the model's genes, normalised; in training {trained}"))
        rows += [("perturbed", str(self.perturbations)), ("cell types", str(self.cell_types))]
        rows += [("batches", str(self.batches)), *(("remark", remark) for remark in self.remarks)]
        n = len(self.remarks)
        rows.append(("fits", "yes" + (f", with {n} remark{'s' if n > 1 else ''}" if n else "")))
        return "\n".join(f"{name:<11} {what}" for name, what in rows)


def check_file(model: PerturbDiff, path: str | Path, layer: str | None = None, min_gene_overlap: float = 0.5) -> Fit:
    """Read an .h5ad as `predict` would, and compare it with what the model was trained on.

    Parameters
    ----------
    path
        Control cells, or a screen that has some.
    layer, min_gene_overlap
        As `PerturbDiff.predict`.

    Raises
    ------
    FileNotFoundError, KeyError, ValueError
        Where `predict` would refuse the file: no controls, too few genes, X in no space that fits; and a model that was
        trained without perturbations.
    """
    known, columns = model.vocabularies, model.config.obs
    if not len(known.perturbations):
        raise ValueError(f"{model.name} was trained without perturbations: it predicts no response.")
    controls = control_cells(path, columns, None, None, layer)
    if not controls.n_obs:
        raise ValueError(f"{path} has no cells; give control cells.")
    is_gene = gene_rows(controls.var)
    genes = genes_of(controls.var[is_gene])
    space = space_of(as_csr(controls.X)[:, is_gene], genes.names, "auto", str(path))
    expression = expression_of(controls, model.preprocessing)
    remarks = [note for note in (expression.note, model.compare_sums(expression)) if note]
    alignment = model.genes.align(genes, min_gene_overlap)  # after what `predict` looks at first
    sums = model.sums_of(expression)
    counts = expression.preprocessing.input_kind == "counts"
    missing = tuple(model.genes.names[i] for i in np.flatnonzero(alignment.columns < 0))
    if missing:
        remarks.append(f"{len(missing):,} genes that the controls lack are left out of predictions, or flagged")
    with open_h5ad(path, ("obs",)) as file:
        obs = read_elem(file["obs"])
    perturbed: list[str] = []
    if columns.perturbation in obs.columns:
        perturbed = sorted({*perturbation_labels(model, obs, str(path))} - {columns.control_label})
    perturbations = Labels(*_parted(perturbed, [label for label in perturbed if known.knows(label)]))
    if perturbations.unknown:
        first = perturbations.unknown[0]
        names = few(list(perturbations.unknown))
        remarks.append(f"cannot be predicted: perturbation {names}; {nearest(first, known.perturbations.names)}")
    if beyond := [text for label in perturbations.known for text in known.extrapolated(label)]:
        remarks.append(f"extrapolated: {few(beyond)}")
    found = {}
    for kind, column, vocabulary in (
        ("cell type", columns.cell_type, known.cell_types), ("batch", columns.batch, known.batches),
    ):  # fmt: skip
        labels = _labels(controls.obs, column)
        found[kind] = Labels(*_parted(labels, vocabulary.names))
        if not len(vocabulary):
            continue
        if not labels and column is not None:
            remarks.append(f"extrapolated unless predict is told one: {kind}, which no obs column says")
        if found[kind].unknown and column is not None:
            names = few(list(found[kind].unknown))
            remarks.append(f"extrapolated: {kind} {names}, which training has not seen, as an average one")
        if alone := [label for label in _labels(obs, column) if label not in set(labels)]:
            remarks.append(f"no control cells to predict from: {kind} {few(alone)}")
    trained = model.training.control_sums
    return Fit(
        str(path), model.name, len(obs), controls.n_obs, len(genes), len(model.genes), missing, alignment.matched_by,
        space, model.preprocessing,
        float(np.median(expression.library_size)) if counts else None,
        tuple(np.quantile(sums, (0.01, 0.5, 0.99)).tolist()),
        None if trained is None else (trained[0], trained[2], trained[4]),
        perturbations, found["cell type"], found["batch"], tuple(remarks),
    )  # fmt: skip


def _labels(obs: pd.DataFrame, column: str | None) -> list[str]:
    # That occur in a column, sorted; those of no label are "unknown", as in predictions.
    if column is None or column not in obs.columns:
        return []
    values = obs[column]
    return sorted({*values.dropna().astype(str), *["unknown"] * bool(values.isna().any())})


def perturbation_labels(model: PerturbDiff, obs: pd.DataFrame, path: str) -> pd.Series:
    """Perturbation of each cell that has a label, as training would read it; controls have the model's control label.

    Raises as `read_labels`, and ValueError where doses have another unit than the model's.
    """
    known, columns = model.vocabularies, model.config.obs
    config = DataConfig(
        perturbation_col=columns.perturbation, cell_type_col=None, batch_col=None, control_label=columns.control_label,
        other_control_labels=list(columns.other_control_labels), combination_separator=known.combination_separator,
        dose_col=columns.dose if columns.dose in obs.columns else None, dose_separator=known.dose_separator,
    )  # fmt: skip
    named = obs[obs[columns.perturbation].notna()]
    labels = read_labels(named, config, path, known.perturbations.names)
    one_unit({known.dose_unit, labels.notation.dose_unit}, f"{model.name} and {path}")
    return labels.obs["perturbation"].set_axis(named.index)


def _parted(labels: Sequence[str], known: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    among = set(known)
    return tuple(name for name in labels if name in among), tuple(name for name in labels if name not in among)


def _range(quantiles: Sequence[float]) -> str:
    low, median, high = quantiles
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"
