"""Figures of a predicted response as SVG text: single genes, mean changes, a volcano, cells, populations apart.

They have no ground, so that they lie on any page; where that is dark, the page inverts them. One colour is for what is
predicted; controls are grey, measured cells have the colour of the text.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import sparse

from perturbdiff.app.response import Response
from perturbdiff.evaluation.plots import name_points, principal_axes

CONTROL, PREDICTED, MEASURED = "#7d8998", "#0e7490", "#1e293b"
TEXT, FAINT = "#334155", "#cbd5e1"
N_BINS = 24
MAX_DOTS = 1000  # cells of a kind in `cells`
WIDTH = 4.2  # inches, of all but `distribution`


def distribution(response: Response, change: pd.Series) -> str:
    """One gene (a row of `Response.table`): its histogram in the controls, in each predicted population and in measured
    cells, and below it the mean of each."""
    position, gene = int(change["position"]), str(change["gene"])
    control = _values(response.control, position)
    measured = None if response.measured is None else _values(response.measured, position)
    populations = [_values(cells, position) for cells in response.populations]
    every = [control, *populations, *([] if measured is None else [measured])]
    edges = np.linspace(0, max(1e-3, *(values.max(initial=0) for values in every)) * 1.001, N_BINS + 1)
    figure = Figure(figsize=(2.9, 2.5), layout="constrained")
    axes, means = figure.subplots(2, height_ratios=(4, 1), sharex=True)
    axes.stairs(_shares(control, edges), edges, fill=True, color=CONTROL, alpha=0.75)
    for values in populations:
        axes.stairs(_shares(values, edges), edges, color=PREDICTED, linewidth=1.6 if len(populations) == 1 else 1.0)
    if measured is not None:
        axes.stairs(_shares(measured, edges), edges, color=MEASURED, linewidth=1.4, linestyle=(0, (3, 1.5)))
        means.plot(measured.mean(), 0, "|", color=MEASURED, markersize=12, markeredgewidth=1.6)
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
    """Bars of the mean change of genes (rows of `Response.table`), with a dot for each population, a line for the
    interval, and a mark where the measured change is."""
    figure, axes = _genes(changes)
    y = np.arange(len(changes))
    axes.barh(y, changes["change"], color=PREDICTED, height=0.7, alpha=0.35)
    _marks(axes, y, changes)
    if "measured_change" in changes:
        axes.plot(changes["measured_change"], y, "|", color=MEASURED, markersize=12, markeredgewidth=1.8)
    axes.set_xlabel("mean minus that of the controls (log1p)", fontsize=9, color=TEXT)
    return _svg(figure)


def populations(changes: pd.DataFrame) -> str:
    """The change of each population by its number, at each gene (rows of `Response.table`)."""
    figure, axes = _genes(changes)
    for number, name in enumerate(changes.filter(regex="^population_"), start=1):
        values = changes[name].to_numpy()
        axes.plot(values, np.arange(len(changes)), "o", color=PREDICTED, alpha=0.2, markersize=12, markeredgewidth=0)
        for row, value in enumerate(values):
            axes.annotate(str(number), (value, row), ha="center", va="center_baseline", fontsize=8, color=TEXT)
    axes.hlines(np.arange(len(changes)), *axes.get_xlim(), color=FAINT, linewidth=0.6, zorder=0)
    axes.set_xlabel("mean minus that of the controls (log1p)", fontsize=9, color=TEXT)
    return _svg(figure)


def volcano(table: pd.DataFrame) -> str:
    """Change of each gene and how clear it is among these cells, the strongest named; full dots where the interval
    excludes no change."""
    figure, axes = _square()
    x, y = table["change"].to_numpy(), -np.log10(table["p_welch"].to_numpy())
    sure = ((table["lower"] > 0) | (table["upper"] < 0)).to_numpy()
    for which, colour, alpha in ((~sure, CONTROL, 0.6), (sure, PREDICTED, 0.8)):
        dots = axes.scatter(x[which], y[which], s=16, color=colour, alpha=alpha, linewidths=0)
        dots.set_rasterized(len(table) > MAX_DOTS)
    axes.axvline(0, color=TEXT, linewidth=0.8)
    axes.set_xlabel("predicted mean change (log1p)", fontsize=9, color=TEXT)
    axes.set_ylabel("-log10 p (Welch)", fontsize=9, color=TEXT)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    _plain(axes)
    _name(axes, x, np.where(np.abs(x) > 0, y, 0.0), table["gene"])
    return _svg(figure)


def agreement(table: pd.DataFrame) -> str:
    """Predicted against measured change of each gene, the strongest named."""
    figure, axes = _square()
    x, y = table["measured_change"].to_numpy(), table["change"].to_numpy()
    dots = axes.scatter(x, y, s=10, color=PREDICTED, alpha=0.6, linewidths=0)
    dots.set_rasterized(len(table) > MAX_DOTS)
    axes.axline((0, 0), slope=1, color=CONTROL, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("measured mean change (log1p)", fontsize=9, color=TEXT)
    axes.set_ylabel("predicted mean change (log1p)", fontsize=9, color=TEXT)
    axes.margins(0.15)
    _plain(axes)
    _name(axes, x, y, table["gene"])
    return _svg(figure)


def cells(response: Response) -> str:
    """Cells on the first two principal components of the controls and the measured cells, or the predicted ones where
    nothing was measured."""
    kinds = [("control", response.control, CONTROL), ("predicted", response.predicted.X, PREDICTED)]
    if response.measured is not None:
        kinds.insert(1, ("measured", response.measured, MEASURED))
    kinds = [(name, _some(X), colour) for name, X, colour in kinds]
    mean, axes_of, shares = principal_axes(sparse.vstack([X for _, X, _ in kinds[:2]], format="csr"))
    figure, axes = _square()
    n_cells = sum(X.shape[0] for _, X, _ in kinds)
    for _, X, colour in kinds:
        places = np.asarray(X @ axes_of) - mean @ axes_of
        dots = axes.scatter(
            places[:, 0], places[:, 1], s=float(np.clip(3000 / n_cells, 4, 16)), color=colour, alpha=0.6
        )
        dots.set(linewidths=0, rasterized=n_cells > MAX_DOTS)
    axes.set_xlabel(f"PC1 ({shares[0]:.0%} of variance)", fontsize=9, color=TEXT)
    axes.set_ylabel(f"PC2 ({shares[1]:.0%} of variance)", fontsize=9, color=TEXT)
    _plain(axes)
    axes.set_xticks([])
    axes.set_yticks([])
    return _svg(figure)


def _genes(changes: pd.DataFrame) -> tuple[Figure, Axes]:
    # A row for each gene, and a line at no change.
    figure = Figure(figsize=(WIDTH, 0.6 + 0.24 * len(changes)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=TEXT, linewidth=0.8)
    axes.set_yticks(
        np.arange(len(changes)), labels=[short(str(gene), 18) for gene in changes["gene"]], parse_math=False
    )
    axes.invert_yaxis()
    _plain(axes)
    axes.tick_params(axis="y", labelsize=9, length=0)
    return figure, axes


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    return figure, figure.subplots()


def _name(axes: Axes, x: np.ndarray, y: np.ndarray, genes: pd.Series) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes lie in a figure"
    figure.draw_without_rendering()  # places of dots are known when the layout is
    name_points(axes, x, y, [short(str(gene), 12) for gene in genes])
    for text in axes.texts:
        text.set_color(TEXT)


def _some(X: sparse.csr_matrix) -> sparse.csr_matrix:
    n = X.shape[0]
    return X if n <= MAX_DOTS else X[np.linspace(0, n - 1, MAX_DOTS).round().astype(np.int64)]


def _marks(axes: Axes, y: np.ndarray, changes: pd.DataFrame, offset: float = 0.0) -> None:
    # A dot for each population and a line for the interval, where there is one, at each gene's height.
    axes.hlines(y, changes["lower"] + offset, changes["upper"] + offset, color=TEXT, linewidth=1.2)
    drawn = changes.filter(regex="^population_").to_numpy(dtype=float) + offset  # (genes, K)
    places = np.repeat(y, drawn.shape[1])
    axes.plot(drawn.ravel(), places, "o", color=PREDICTED, markerfacecolor="none", markersize=4, markeredgewidth=0.9)


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
    figure.savefig(buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode()
