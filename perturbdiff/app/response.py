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
    """

    predicted: AnnData
    control: sparse.csr_matrix
    matched: np.ndarray
    cell_type: str | None

    @property
    def populations(self) -> list[sparse.csr_matrix]:
        """(cells, G) log1p values of each draw of the response distribution."""
        population = self.predicted.obs["population"].to_numpy()
        return [self.predicted.X[population == i] for i in np.unique(population)]

    def changes(self, n: int) -> pd.DataFrame:
        """The `n` genes with the largest predicted mean change, largest first.

        Columns: gene, position (in model order), controls, predicted and change (means, log1p), lowest and highest
        (change of single populations).
        """
        control = _mean(self.control)
        change = np.stack([_mean(cells) - control for cells in self.populations])  # (populations, G)
        predicted = _mean(self.predicted.X)
        size = np.where(self.matched, np.abs(predicted - control), -1.0)
        position = np.argsort(-size, kind="stable")[: min(n, int(self.matched.sum()))]
        return pd.DataFrame(
            {
                "gene": self.predicted.var_names.to_numpy()[position],
                "position": position,
                "controls": control[position],
                "predicted": predicted[position],
                "change": (predicted - control)[position],
                "lowest": change.min(axis=0)[position],
                "highest": change.max(axis=0)[position],
            }
        )

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
    return Response(predicted, control, columns >= 0, cell_type)


def _mean(X: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(X.mean(axis=0)).ravel()
