"""Figures of a predicted response as SVG text: distributions of single genes, and mean changes."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import sparse

from perturbdiff.app.response import Response

CONTROL, PREDICTED, DOWN = "#94a3b8", "#0e7490", "#b45309"
TEXT, FAINT = "#334155", "#e2e8f0"
N_BINS = 24


def distribution(response: Response, change: pd.Series) -> str:
    """One gene (a row of `Response.changes`): its histogram in the controls and in each predicted population, and below
    it the mean of each."""
    position, gene = int(change["position"]), str(change["gene"])
    control = _values(response.control, position)
    populations = [_values(cells, position) for cells in response.populations]
    top = max(1e-3, *(values.max(initial=0) for values in (control, *populations)))
    edges = np.linspace(0, top * 1.001, N_BINS + 1)
    figure = Figure(figsize=(2.9, 2.5), layout="constrained")
    axes, means = figure.subplots(2, height_ratios=(4, 1), sharex=True)
    axes.stairs(_shares(control, edges), edges, fill=True, color=CONTROL, alpha=0.75)
    for values in populations:
        axes.stairs(_shares(values, edges), edges, color=PREDICTED, linewidth=1.6 if len(populations) == 1 else 1.0)
    axes.set_title(short(gene, 22), parse_math=False, fontsize=10, color=TEXT)
    axes.set_ylabel("share of cells", fontsize=8, color=TEXT)
    _marks(means, np.zeros(1), pd.DataFrame([change]), offset=change["controls"])
    means.plot(change["controls"], 0, "D", color=CONTROL, markersize=4)
    means.set_ylim(-1, 1)
    means.set_yticks([0], labels=["means"])
    means.set_xlabel("log1p expression", fontsize=8, color=TEXT)
    for of in (axes, means):
        _plain(of)
    return _svg(figure)


def mean_changes(changes: pd.DataFrame) -> str:
    """Bars of the mean change of genes (rows of `Response.changes`), with a dot for each population and a line for the
    interval."""
    figure = Figure(figsize=(4.2, 0.6 + 0.24 * len(changes)), layout="constrained")
    axes = figure.subplots()
    y = np.arange(len(changes))
    change = changes["change"].to_numpy()
    axes.barh(y, change, color=np.where(change >= 0, PREDICTED, DOWN), height=0.7, alpha=0.45)
    _marks(axes, y, changes)
    axes.axvline(0, color=TEXT, linewidth=0.8)
    axes.set_yticks(y, labels=[short(str(gene), 18) for gene in changes["gene"]], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("predicted minus control mean (log1p)", fontsize=9, color=TEXT)
    _plain(axes)
    axes.tick_params(axis="y", labelsize=9, length=0)
    return _svg(figure)


def _marks(axes: Axes, y: np.ndarray, changes: pd.DataFrame, offset: float = 0.0) -> None:
    # A dot for each population and a line for the interval, where there is one, at each gene's height.
    axes.hlines(y, changes["lower"] + offset, changes["upper"] + offset, color=TEXT, linewidth=1.2)
    populations = changes.filter(regex="^population_").to_numpy(dtype=float) + offset  # (genes, K)
    places = np.repeat(y, populations.shape[1])
    axes.plot(
        populations.ravel(), places, "o", color=PREDICTED, markerfacecolor="none", markersize=4, markeredgewidth=0.9
    )


def short(name: str, most: int) -> str:
    """A name on one line of at most so many characters."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if len(name) <= most else name[: most - 1] + "…"


def _values(X: sparse.csr_matrix, position: int) -> np.ndarray:
    return X[:, [position]].toarray().ravel()


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values, edges)[0] / max(len(values), 1)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(CONTROL)
    axes.tick_params(labelsize=8, colors=TEXT)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode()
