"""A predicted response beside its control cells, as the app shows it: cells, genes that change, one line of words.

G = genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from perturbdiff.app.controls import MIN_GENE_OVERLAP, Controls
from perturbdiff.data.screen import expression_of
from perturbdiff.data.vocab import nearest
from perturbdiff.hub.records import Calibration
from perturbdiff.inference.intervals import calibration_for, covered, population_means, population_summary
from perturbdiff.inference.ranking import find_genes
from perturbdiff.model import PerturbDiff

MAX_PREDICTED = 10_000  # cells of one prediction over all populations


@dataclass(frozen=True)
class Response:
    """Predicted cells and the controls they are compared with.

    predicted
        Of `PerturbDiff.predict`.
    control
        (n_controls, G) log1p values of all controls of the chosen cell type, genes in model order.
    matched
        (G,) whether the controls' file has the gene; others are zero for the model and say nothing.
    calibration
        Of the model; None where it has none.
    """

    predicted: AnnData
    control: sparse.csr_matrix
    matched: np.ndarray
    cell_type: str | None
    calibration: Calibration | None = None

    @property
    def populations(self) -> list[sparse.csr_matrix]:
        """(cells, G) log1p values of each draw of the response distribution."""
        population = self.predicted.obs["population"].to_numpy()
        return [self.predicted.X[population == i] for i in np.unique(population)]

    def changes(self, n: int, first: Sequence[int] = ()) -> pd.DataFrame:
        """Genes by their place in model order: those of `first`, then the `n` with the largest predicted mean change.

        Columns: gene, position, controls, predicted and change (means, log1p), lower and upper (calibrated interval of
        the change; NaN where there is none), population_0, ... (change of each population). Raises ValueError where the
        controls lack a gene of `first`.
        """
        names = self.predicted.var_names
        if absent := [names[i] for i in first if not self.matched[i]]:
            raise ValueError(f"The control cells lack the gene {absent[0][:60]!r}; name one that they have.")
        control = pd.Series(_mean(self.control), index=names)
        summary = population_summary(self.predicted, control, self.calibration)
        size = np.where(self.matched, summary["delta"].abs().to_numpy(), -1.0)
        largest = np.argsort(-size, kind="stable")[: min(n, int(self.matched.sum()))]
        position = np.array(list(dict.fromkeys([*first, *largest.tolist()])), dtype=np.int64)
        populations = population_means(self.predicted)[:, position] - control.to_numpy()[position]  # (K, genes)
        summary = summary.iloc[position].reset_index(drop=True)
        shown = {"gene": "gene", "control_mean": "controls", "mean": "predicted", "delta": "change"}
        changes = summary[list(shown)].rename(columns=shown)
        changes.insert(1, "position", position)
        for name in ("lower", "upper"):
            changes[name] = summary[name] - summary["control_mean"]
        return changes.assign(**{f"population_{k}": of for k, of in enumerate(populations)})

    def certainty(self) -> str:
        """What the intervals are worth, or why there are none."""
        if self.calibration is None:
            return "No intervals: the model is not calibrated (perturbdiff calibrate), or not for these settings."
        held = f"such intervals covered {covered(self.calibration.coverage)}"
        if self.predicted.uns["perturbdiff"]["n_populations"] == 1:
            return f"Intervals need two or more populations; {held}."
        return f"Lines are {self.calibration.level:.0%} intervals; {held}."

    def sentence(self) -> str:
        """What was done, and what was unseen."""
        settings = self.predicted.uns["perturbdiff"]
        n_populations = settings["n_populations"]
        n_cells = self.predicted.n_obs // n_populations
        cells = f"{n_cells:,} cells" + (f" in each of {n_populations} populations" if n_populations > 1 else "")
        context = f"{self.cell_type} " if self.cell_type else ""
        text = (
            f"Predicted {cells} under {self.predicted.obs['perturbation'].iloc[0]} from {self.control.shape[0]:,} "
            f"{context}control cells. {settings['n_genes_matched']:,} of {self.predicted.n_vars:,} genes matched by "
            f"{settings['genes_matched_by']}. {settings['sampler'].upper()}, {settings['n_steps']} steps, guidance "
            f"{settings['guidance_scale']:g}, seed {settings['seed']}. Populations differ "
            f"{settings['populations_differ']}."
        )
        if settings["trust"]["verdict"] == "cannot tell":
            text += " Training conditions that are as new, left out, were not told well: do not rely on this response."
        if len(settings["unseen"]):
            text += f" Not seen in training: {', '.join(settings['unseen'])}; predicted from the control cells alone."
        return text


def predict_response(
    model: PerturbDiff,
    controls: Controls,
    perturbations: Sequence[str],
    cell_type: str | None,
    n_cells: int,
    n_populations: int,
    guidance_scale: float,
    steps: int,
    seed: int,
    bar: Any = None,
) -> Response:
    """Predict cells of one cell type (each control's own if None) under a perturbation or a combination of them.

    Raises
    ------
    ValueError, KeyError
        No perturbation; too many cells; as `PerturbDiff.predict`.
    """
    if not perturbations:
        raise ValueError("No perturbation is chosen; choose one.")
    separator = model.vocabularies.combination_separator
    if len(perturbations) > 1 and separator is None:
        raise ValueError("This model knows no combinations; choose one perturbation.")
    if n_cells * n_populations > MAX_PREDICTED:
        raise ValueError(
            f"{n_cells:,} cells in {n_populations} populations are {n_cells * n_populations:,}; the app predicts at "
            f"most {MAX_PREDICTED:,} at a time."
        )
    cells = controls.select(cell_type)
    predicted = model.generate(
        cells,
        perturbation=(separator or "").join(perturbations),
        cell_type=cell_type,
        n_cells=n_cells,
        n_populations=n_populations,
        guidance_scale=guidance_scale,
        steps=steps,
        seed=seed,
        min_gene_overlap=MIN_GENE_OVERLAP,
        all_genes=True,
        bar=bar,
    )
    expression = expression_of(cells, model.preprocessing)
    columns = model.genes.align(expression.genes, MIN_GENE_OVERLAP).columns
    control = expression.with_genes(model.genes, columns).log1p()
    calibration = calibration_for(model, guidance_scale, steps)
    return Response(predicted, control, columns >= 0, cell_type, calibration)


def find_positions(model: PerturbDiff, text: str) -> list[int]:
    """Places in model order of genes that a visitor names, between commas; by name, Ensembl id or symbol.

    Raises KeyError for one that is not in the model, with the nearest names.
    """
    found, missing = find_genes(model.genes, [name.strip() for name in text.split(",") if name.strip()])
    if missing:
        raise KeyError(f"The model has no gene {missing[0][:60]!r}; {nearest(missing[0], model.genes.names)}.")
    return found


def _mean(X: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(X.mean(axis=0)).ravel()
