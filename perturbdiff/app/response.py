"""A predicted response beside its control cells, as the app shows it: cells, genes that change, one line of words.

G = genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.special import stdtr

from perturbdiff.app.controls import MIN_GENE_OVERLAP, Controls
from perturbdiff.data.expression import gene_means
from perturbdiff.files import few
from perturbdiff.hub.records import Calibration
from perturbdiff.inference.intervals import calibration_for, covered, population_means, population_summary
from perturbdiff.model import PerturbDiff

MAX_PREDICTED = 10_000  # cells of one prediction over all populations
SMALLEST_P = 1e-300


@dataclass(frozen=True, eq=False)
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
    measured
        (n, G) log1p values of cells of the file under this very perturbation; None where it has none.
    """

    predicted: AnnData
    control: sparse.csr_matrix
    matched: np.ndarray
    cell_type: str | None
    calibration: Calibration | None = None
    measured: sparse.csr_matrix | None = None

    @property
    def populations(self) -> list[sparse.csr_matrix]:
        """(cells, G) log1p values of each draw of the response distribution."""
        population = self.predicted.obs["population"].to_numpy()
        return [self.predicted.X[population == i] for i in np.unique(population)]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a gene that the controls have, in model order.

        Columns: gene, position (in model order), controls, predicted and change (means, log1p), lower and upper
        (calibrated interval of the change; NaN where there is none), spread (between populations), p_welch (of Welch's
        t-test between predicted and control cells: it falls with the number of cells drawn), measured_change where
        there are measured cells, population_0, ... (change of each population).
        """
        control, variance = _moments(self.control)
        names = self.predicted.var_names
        summary = population_summary(self.predicted, pd.Series(control, index=names), self.calibration)
        found = pd.DataFrame(
            {
                "gene": names,
                "position": np.arange(len(names)),
                "controls": control,
                "predicted": summary["mean"].to_numpy(),
                "change": summary["delta"].to_numpy(),
                "lower": (summary["lower"] - summary["control_mean"]).to_numpy(),
                "upper": (summary["upper"] - summary["control_mean"]).to_numpy(),
                "spread": summary["spread"].to_numpy(),
                "p_welch": _welch(self.predicted.X, control, variance, self.control.shape[0]),
            }
        )
        if self.measured is not None:
            found["measured_change"] = _moments(self.measured)[0] - control
        populations = population_means(self.predicted) - control
        found = found.assign(**{f"population_{k}": of for k, of in enumerate(populations)})
        return found[self.matched].reset_index(drop=True)

    def changes(self, n: int) -> pd.DataFrame:
        """The rows of `table` of the `n` genes with the largest predicted mean change, largest first."""
        order = np.argsort(-self.table["change"].abs().to_numpy(), kind="stable")
        return self.table.iloc[order[:n]].reset_index(drop=True)

    def of_genes(self, genes: Sequence[str]) -> pd.DataFrame:
        """The rows of these genes, in their order. Raises ValueError where the controls lack one."""
        rows = pd.Index(self.table["gene"]).get_indexer(list(genes))
        if absent := [gene for gene, row in zip(genes, rows, strict=True) if row < 0]:
            raise ValueError(
                f"The control cells lack {few([gene[:60] for gene in absent])}; name genes that they have."
            )
        return self.table.iloc[rows].reset_index(drop=True)

    def agreement(self) -> str:
        """How predicted and measured changes agree; nothing where nothing was measured."""
        if self.measured is None:
            return ""
        x, y = self.table["measured_change"], self.table["change"]
        r = f"{np.corrcoef(x, y)[0, 1]:.2f}" if x.std() > 0 and y.std() > 0 else "undefined"
        return (
            f"The file has {self.measured.shape[0]:,} measured cells of this perturbation: Pearson correlation of "
            f"predicted and measured changes {r}. Both are counted from the same control cells, whose noise raises it."
        )

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
            f"{settings['genes_matched_by']}. Populations differ {settings['populations_differ']}. "
            f"Seed {settings['seed']}."
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
    named = _joined(model, perturbations)
    if n_cells * n_populations > MAX_PREDICTED:
        raise ValueError(
            f"{n_cells:,} cells in {n_populations} populations are {n_cells * n_populations:,}; the app predicts at "
            f"most {MAX_PREDICTED:,} at a time."
        )
    cells = controls.select(cell_type)
    predicted = model.generate(
        cells,
        perturbation=named,
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
    control, matched = _in_model_genes(model, cells)
    measured = controls.measured_under(str(predicted.obs["perturbation"].iloc[0]), cell_type)
    return Response(
        predicted, control, matched, cell_type, calibration_for(model, guidance_scale, steps),
        _in_model_genes(model, measured)[0] if measured.n_obs else None,
    )  # fmt: skip


def _in_model_genes(model: PerturbDiff, cells: AnnData) -> tuple[sparse.csr_matrix, np.ndarray]:
    """(n, G) log1p values, and which genes the cells have."""
    expression, alignment = model.in_own_genes(cells, MIN_GENE_OVERLAP)
    return expression.log1p(), alignment.columns >= 0


def before_predicting(
    model: PerturbDiff, controls: Controls, perturbations: Sequence[str], cell_type: str | None
) -> tuple[str, bool]:
    """What can be said of a prediction before it is made, and whether it is a warning. Raises as `predict_response`."""
    named = _joined(model, perturbations)
    unseen, trust = model.outlook(controls.select(cell_type), named, cell_type)
    text = f"Not seen in training: {few(unseen)}. " if unseen else ""
    if trust is None:
        return text + ("The prediction extrapolates." if unseen else "Training saw all of it."), bool(unseen)
    if trust.verdict == "cannot tell":
        return (
            f"{text}Responses as new as this one were not told well when they were left out: do not rely on it.",
            True,
        )
    if trust.verdict == "trained":
        return f"{text}Training saw this perturbation in this context.", bool(unseen)
    return (
        f"{text}New in this combination. Of {trust.n_left_out} training conditions as new, left out, the response was "
        f"told with a correlation of {trust.expected_pearson:.2f} ({trust.low:.2f} to {trust.high:.2f}).",
        bool(unseen),
    )


def _joined(model: PerturbDiff, perturbations: Sequence[str]) -> str:
    if not perturbations:
        raise ValueError("No perturbation is chosen; choose one.")
    separator = model.vocabularies.combination_separator
    if len(perturbations) > 1 and separator is None:
        raise ValueError("This model knows no combinations; choose one perturbation.")
    return (separator or "").join(perturbations)


def _moments(X: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """(G,) mean and variance over cells; of a single cell the variance is 0."""
    X, n = X.astype(np.float64), X.shape[0]
    mean, squares = gene_means(X), gene_means(X.multiply(X).tocsr())
    return mean, np.maximum(squares - mean**2, 0) * n / max(n - 1, 1)


def _welch(X: sparse.csr_matrix, control: np.ndarray, control_variance: np.ndarray, n_controls: int) -> np.ndarray:
    """(G,) two-sided p of Welch's t-test; 1 where neither varies and neither differs."""
    mean, variance = _moments(X)
    a, b = variance / X.shape[0], control_variance / n_controls
    error, change = a + b, np.abs(mean - control)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = error**2 / (a**2 / max(X.shape[0] - 1, 1) + b**2 / max(n_controls - 1, 1))
        p = 2 * stdtr(freedom, -change / np.sqrt(error))
    return np.where(error > 0, np.maximum(p, SMALLEST_P), np.where(change > 0, SMALLEST_P, 1.0))
