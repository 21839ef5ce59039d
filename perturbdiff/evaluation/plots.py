"""Figures of predicted beside measured cells, of rankings and of scores; `perturbdiff.pl`.

Each draws into `ax`, or into a new figure, and returns the axes: `.figure.savefig(path)` keeps it. A notebook shows new
figures, being those of pyplot; in a script it does not know them and holds none. Expression is log1p; colours are
those of Okabe & Ito 2008, which people with any colour vision tell apart.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, svds

from perturbdiff.data.expression import as_csr, gene_means
from perturbdiff.data.space import check_values
from perturbdiff.evaluation.fair import measured as had_by_controls
from perturbdiff.evaluation.html import ON_PAGE
from perturbdiff.evaluation.metrics import METRICS
from perturbdiff.files import few

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTROL = "control"  # the label
CONTROL_COLOUR, MEASURED_COLOUR, PREDICTED_COLOUR = "#8C8C8C", "#0072B2", "#D55E00"
N_GENES = 6  # of violins, by default
N_NAMED = 8  # genes with a name in `delta`
N_RANKED = 20  # perturbations of a ranking
MAX_ROWS = 40  # conditions of a heat map; more are dots
RASTER = 400  # points from which a scatter becomes pixels in a vector file
SMALL = 8  # pt


def violin(
    measured: AnnData,
    predicted: AnnData,
    genes: Sequence[str] | str | None = None,
    perturbation: str | None = None,
    cell_type: str | None = None,
    control: AnnData | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Distributions of single genes in control, measured and predicted cells; a dot is the mean.

    Parameters
    ----------
    measured, predicted
        X log1p; obs `perturbation` and `cell_type` where they are chosen by.
    genes
        By default those with the largest measured change of the mean, which needs control cells.
    perturbation, cell_type
        Only these cells; the cell type is that of the controls too.
    control
        Control cells; by default those of `measured` whose perturbation is "control", if there are any.

    Raises
    ------
    ValueError, KeyError
        No cells are left, no gene is in all, X is not log1p, a gene or a column is unknown.
    ImportError
        matplotlib is missing.
    """
    if perturbation is not None:
        control = _controls(measured) if control is None else control
        measured = _of(measured, "perturbation", perturbation, "measured")
        predicted = _of(predicted, "perturbation", perturbation, "predicted")
    groups = _groups(measured, predicted, control, cell_type)
    names, X = _in_common_genes(groups)
    if genes is None:
        if "control" not in X:
            raise ValueError("genes are chosen by their change from control cells; give control, or genes.")
        change = np.abs(gene_means(X["measured"]) - gene_means(X["control"]))
        columns = np.argsort(-change, kind="stable")[:N_GENES].tolist()
    else:
        columns = [names.index(gene) for gene in _known([genes] if isinstance(genes, str) else list(genes), names)]
    ax = _axes(ax, (max(3.6, 0.6 * len(columns)), 2.9))
    width = 0.8 / len(X)
    for i, (name, values) in enumerate(X.items()):
        colour = _COLOURS[name]
        dense = [values[:, [column]].toarray().ravel().astype(np.float64) for column in columns]
        places = np.arange(len(columns)) + (i - (len(X) - 1) / 2) * width
        drawn: Any = ax.violinplot(dense, places, widths=0.92 * width, showextrema=False, points=60)
        for body in drawn["bodies"]:
            body.set(facecolor=colour, edgecolor=colour, alpha=0.65, linewidth=0.6)
        means = [cells.mean() for cells in dense]
        ax.plot(places, means, "o", color=colour, markersize=4, label=f"{name} ({values.shape[0]:,})")
    labels = [_name(names[column], 16) for column in columns]
    ax.set_xticks(np.arange(len(columns)), labels, rotation=35, ha="right", rotation_mode="anchor", parse_math=False)
    ax.set_ylabel("expression (log1p)")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    _legend(ax, len(X))
    return ax


def embedding(measured: AnnData, predicted: AnnData, control: AnnData | None = None, ax: Axes | None = None) -> Axes:
    """The first two principal components of measured and control cells, with predicted cells projected onto them.

    Parameters as of `violin`, and so are errors.
    """
    groups = _groups(measured, predicted, control, None)
    _, X = _in_common_genes(groups)
    known = sparse.vstack([X[name] for name in X if name != "predicted"], format="csr")
    mean, axes, shares = principal_axes(known)
    ax = _axes(ax, (3.6, 3.3))
    n_cells = sum(values.shape[0] for values in X.values())
    size = float(np.clip(3000 / n_cells, 3, 16))
    for name, values in X.items():
        places = np.asarray(values @ axes) - mean @ axes
        points = ax.scatter(places[:, 0], places[:, 1], s=size, color=_COLOURS[name], alpha=0.65, linewidths=0)
        points.set_label(f"{name} ({values.shape[0]:,})")
        points.set_rasterized(n_cells > RASTER)
    ax.set_xlabel(f"PC1 ({shares[0]:.0%} of variance)")
    ax.set_ylabel(f"PC2 ({shares[1]:.0%} of variance)")
    ax.set_xticks([])
    ax.set_yticks([])
    _legend(ax, len(X))
    return ax


def delta(
    measured: AnnData,
    predicted: AnnData,
    control: AnnData,
    ax: Axes | None = None,
    predicted_control: AnnData | None = None,
) -> Axes:
    """Predicted against measured mean change of each gene, the strongest named, with their Pearson correlation.

    Parameters
    ----------
    control, predicted_control
        Control cells that the measured and the predicted change are counted from. Where they are the same cells, as by
        default, their noise is in both changes and raises the correlation.

    Otherwise as `violin`.
    """
    groups = _groups(measured, predicted, control, None)
    if predicted_control is not None:
        groups["predicted control"] = predicted_control
    names, X = _in_common_genes(groups)
    mean = {name: gene_means(values) for name, values in X.items()}
    x = mean["measured"] - mean["control"]
    y = mean["predicted"] - mean.get("predicted control", mean["control"])
    ax = _axes(ax, (3.6, 3.3))
    points = ax.scatter(x, y, s=9, color=MEASURED_COLOUR, alpha=0.7, linewidths=0)
    points.set_rasterized(len(x) > RASTER)
    low, high = min(x.min(), y.min(), 0.0), max(x.max(), y.max(), 0.0)
    pad = 0.12 * (high - low) or 0.1
    ax.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad))
    ax.axline((0, 0), slope=1, color=CONTROL_COLOUR, linewidth=1, linestyle=(0, (4, 3)))
    ax.axhline(0, color=CONTROL_COLOUR, linewidth=0.5)
    ax.axvline(0, color=CONTROL_COLOUR, linewidth=0.5)
    constant = x.std() == 0 or y.std() == 0
    r = "undefined" if constant else f"{np.corrcoef(x, y)[0, 1]:.2f}"
    ax.set_title(f"{len(x):,} genes, Pearson r {r}", fontsize=SMALL + 1, loc="left")
    ax.set_xlabel("measured mean change (log1p)")
    ax.set_ylabel("predicted mean change (log1p)")
    name_points(ax, x, y, names)
    return ax


def populations(means: pd.DataFrame, batches: pd.DataFrame | None = None, ax: Axes | None = None) -> Axes:
    """Means of the genes that respond most, of one condition: each predicted population and measured batch is a mark.

    Parameters
    ----------
    means
        One row a gene, log1p: `gene`, `control_mean`, `population_0`, ... and perhaps `measured`, `lower` and `upper`,
        as `inference.calibration.held_out_means` and the means.parquet of a run have them.
    batches
        (batches, genes) measured means of other batches of the condition; columns are genes.

    Raises
    ------
    ValueError, KeyError
        No rows; a column is missing.
    """
    own = [name for name in means if str(name).startswith("population_")]
    if missing := [name for name in ("gene", "control_mean") if name not in means] or ["population_0"][: not own]:
        raise KeyError(f"columns {missing} not in the means ({few(sorted(map(str, means)))}); give means.parquet.")
    if not len(means):
        raise ValueError("the means (0 rows) must be of at least one gene.")
    predicted, control = means[own].to_numpy(dtype=float), means["control_mean"].to_numpy(dtype=float)
    truth = means["measured"].to_numpy(dtype=float) if "measured" in means else predicted.mean(axis=1)
    chosen = np.argsort(-np.abs(truth - control), kind="stable")[:N_GENES]
    genes = means["gene"].astype(str).to_numpy()[chosen]
    ax, x = _axes(ax, (max(3.6, 0.7 * len(chosen)), 2.9)), np.arange(len(chosen))
    marks: dict[str, Any] = {"linestyle": "", "markersize": 4.5, "markeredgewidth": 0.9}
    ax.hlines(control[chosen], x - 0.3, x + 0.3, color=CONTROL_COLOUR, linewidth=1.6, label="controls")
    if {"lower", "upper"} <= {*means} and means[["lower", "upper"]].notna().all(axis=None):
        low, high = (means[name].to_numpy(dtype=float)[chosen] for name in ("lower", "upper"))
        ax.bar(x - 0.12, high - low, 0.2, low, color=PREDICTED_COLOUR, alpha=0.25, label="interval")
    places = np.repeat(x[:, None] - 0.12, len(own), axis=1)
    ax.plot(places.ravel(), predicted[chosen].ravel(), "o", color=PREDICTED_COLOUR, markerfacecolor="none", **marks,
            label=f"predicted populations ({len(own)})")  # fmt: skip
    if batches is not None and len(batches):
        others = batches.reindex(columns=genes).to_numpy(dtype=float)
        ax.plot(np.tile(x + 0.14, len(others)), others.ravel(), "o", color=MEASURED_COLOUR, markerfacecolor="none",
                **marks, label=f"other measured batches ({len(others)})")  # fmt: skip
    if "measured" in means:
        ax.plot(x + 0.14, truth[chosen], "D", color=MEASURED_COLOUR, label="measured", **marks)
    ax.set_xticks(x, [_name(gene, 16) for gene in genes], rotation=35, ha="right", rotation_mode="anchor",
                  parse_math=False)  # fmt: skip
    ax.set_ylabel("mean expression (log1p)")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    _legend(ax, 2)
    return ax


def ranking(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The first perturbations of a table of `rank_perturbations`: score and its spread between populations.

    A hollow dot is a perturbation that training knew by features only. Raises ValueError where there are no rows,
    KeyError where columns are missing.
    """
    if missing := [name for name in ("perturbation", "score") if name not in table]:
        raise KeyError(f"columns {missing} not in the table ({few(sorted(map(str, table)))}); give one of screen rank.")
    if not len(table):
        raise ValueError("the table of screen rank (0 rows) must not be empty.")
    table = table.iloc[:N_RANKED]
    y, score = np.arange(len(table)), table["score"].to_numpy(dtype=float)
    ax = _axes(ax, (3.8, 0.8 + 0.22 * len(table)))
    if "sd" in table:
        ax.errorbar(
            score, y, xerr=np.nan_to_num(table["sd"].to_numpy(dtype=float)), fmt="none",
            ecolor=PREDICTED_COLOUR, elinewidth=1.2, label="± sd of populations",
        )  # fmt: skip
    only = table["features_only"].to_numpy(dtype=bool) if "features_only" in table else np.zeros(len(table), dtype=bool)
    for of, face, label in ((~only, PREDICTED_COLOUR, "trained"), (only, "none", "by features only")):
        if of.any():
            ax.scatter(score[of], y[of], s=26, facecolors=face, edgecolors=PREDICTED_COLOUR, label=label, zorder=3)
    ax.axvline(0, color=CONTROL_COLOUR, linewidth=1)
    ax.set_yticks(y, [_name(str(label), 28) for label in table["perturbation"]], parse_math=False)
    ax.invert_yaxis()
    ax.set_xlabel("score (0 is no change)")
    _legend(ax, 2)
    return ax


def scores(table: pd.DataFrame, metric: str, ax: Axes | None = None) -> Axes:
    """One metric by condition and method: a heat map, or dots with a bar at the mean for more than 40 conditions.

    Parameters
    ----------
    table
        `Scores.conditions`, or the rows of scores.parquet; conditions stand in the order of the table.

    Raises
    ------
    KeyError, ValueError
        A column is missing; no value of the metric is defined.
    """
    needed = ["method", "perturbation", "cell_type", "batch", metric]
    if missing := [name for name in needed if name not in table]:
        raise KeyError(f"columns {missing} not in the table ({few(sorted(map(str, table)))}); give scores.parquet.")
    keys = list(table[needed[1:4]].astype(str).itertuples(index=False, name=None))
    of_method = table["method"].astype(str).tolist()
    row = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    column = {method: j for j, method in enumerate(dict.fromkeys(of_method))}
    grid = np.full((len(row), len(column)), np.nan)
    grid[[row[key] for key in keys], [column[method] for method in of_method]] = table[metric].to_numpy(dtype=float)
    if not np.isfinite(grid).any():
        raise ValueError(f"{metric} is undefined on all {len(row)} conditions; choose another metric.")
    title = metric + (f" ({METRICS[metric]})" if metric in METRICS else "")
    draw = _heat_map if len(row) <= MAX_ROWS else _dots
    return draw(grid, [condition_name(key) for key in row], [_name(method, 28) for method in column], title, ax)


def condition_name(condition: Sequence[str], most: int = 36) -> str:
    """A condition on one line; without a batch where controls of all batches count."""
    perturbation, cell_type, batch = condition
    return _name(", ".join([perturbation, cell_type, *([] if batch == "all" else [batch])]), most)


def _heat_map(grid: np.ndarray, conditions: list[str], methods: list[str], title: str, ax: Axes | None) -> Axes:
    ax = _axes(ax, (2.6 + 0.48 * len(methods), 1.8 + 0.24 * len(conditions)))
    image = ax.imshow(grid, aspect="auto", cmap="cividis", interpolation="nearest")
    low, high = np.nanmin(grid), np.nanmax(grid)
    for i, j in np.ndindex(grid.shape):
        known = np.isfinite(grid[i, j])
        light = known and grid[i, j] > low + 0.5 * (high - low)
        shown, colour = (f"{grid[i, j]:.2f}", "#111111" if light else "#ffffff") if known else ("–", _ink())
        ax.text(j, i, shown, ha="center", va="center", fontsize=SMALL, color=colour)
    ax.set_xticks(range(len(methods)), methods, rotation=35, ha="right", rotation_mode="anchor", parse_math=False)
    ax.set_yticks(range(len(conditions)), conditions, parse_math=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    assert ax.figure is not None, "axes lie in a figure"
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL)
    ax.set_title(title, fontsize=SMALL + 1, loc="left", parse_math=False)
    return ax


def _dots(grid: np.ndarray, conditions: list[str], methods: list[str], title: str, ax: Axes | None) -> Axes:
    ax = _axes(ax, (3.8, 1.0 + 0.4 * len(methods)))
    spread = ((np.arange(len(grid)) * 0.618034) % 1 - 0.5) * 0.5  # even, and the same every time
    for j in range(len(methods)):
        points = ax.scatter(grid[:, j], j + spread, s=6, color=MEASURED_COLOUR, alpha=0.4, linewidths=0)
        points.set_rasterized(grid.size > RASTER)
        if np.isfinite(grid[:, j]).any():
            ax.plot([np.nanmean(grid[:, j])] * 2, [j - 0.38, j + 0.38], color=PREDICTED_COLOUR, linewidth=2)
    ax.set_yticks(range(len(methods)), methods, parse_math=False)
    ax.invert_yaxis()
    ax.set_xlabel(f"{title}: {len(conditions):,} conditions, bar at the mean", parse_math=False)
    return ax


def _controls(measured: AnnData) -> AnnData | None:
    is_control = _is_control(measured)
    return measured[is_control] if is_control.any() and not is_control.all() else None


def _is_control(cells: AnnData) -> np.ndarray:
    if "perturbation" not in cells.obs:
        return np.zeros(cells.n_obs, dtype=bool)
    return (cells.obs["perturbation"].astype(str) == CONTROL).to_numpy()


def _groups(
    measured: AnnData, predicted: AnnData, control: AnnData | None, cell_type: str | None
) -> dict[str, AnnData]:
    # In drawing order, each with cells.
    control = _controls(measured) if control is None else control
    if control is not None and not _is_control(measured).all():
        measured = measured[~_is_control(measured)]
    groups = {**({} if control is None else {"control": control}), "measured": measured, "predicted": predicted}
    if cell_type is not None:
        groups = {name: _of(cells, "cell_type", cell_type, name) for name, cells in groups.items()}
    if empty := [name for name, cells in groups.items() if not cells.n_obs]:
        raise ValueError(f"there are no {' and no '.join(empty)} cells; choose a condition that has some.")
    return groups


def _of(cells: AnnData, column: str, label: str, name: str) -> AnnData:
    if column not in cells.obs:
        raise KeyError(f"obs column {column!r} not in the {name} cells; found {few(sorted(map(str, cells.obs)))}.")
    labels = cells.obs[column].astype(str)
    chosen = (labels == str(label)).to_numpy()
    if not chosen.any():
        raise ValueError(f"no {name} cell has {column} {label!r:.80}; there are {few(sorted(labels.unique()))}.")
    return cells[chosen]


def _in_common_genes(groups: Mapping[str, AnnData]) -> tuple[list[str], dict[str, sparse.csr_matrix]]:
    """Genes that all have, in the order of the first, and X in these columns; a gene without data is none of them."""
    known = {name: cells.var_names.astype(str) for name, cells in groups.items()}
    known["predicted"] = known["predicted"][had_by_controls(groups["predicted"].var)]
    first, *rest = known.values()
    common = first[np.logical_and.reduce([first.isin(other) for other in rest])]
    if not len(common):
        listed = "; ".join(f"{name}: {few(list(names))}" for name, names in known.items())
        raise ValueError(f"no gene is in all of {', '.join(known)} ({listed}); name genes alike in all.")
    X = {}
    for name, cells in groups.items():
        columns = cells.var_names.astype(str).get_indexer_for(common)
        if len(columns) != len(common):
            raise ValueError(f"genes of the {name} cells are named twice; var_names_make_unique() renames them.")
        X[name] = as_csr(cells.X)[:, columns]
        if check_values(X[name], list(common)) and X[name].nnz:
            raise ValueError(
                f"X of the {name} cells holds raw counts; figures are of log1p values at the depth of predicted cells "
                "(sc.pp.normalize_total(adata, target_sum=1e4), or the model's own, then sc.pp.log1p)."
            )
    return list(common), X


def _known(genes: list[str], names: list[str]) -> list[str]:
    known = set(names)
    if unknown := [gene for gene in genes if gene not in known]:
        raise KeyError(f"genes {few(unknown)} are not in all of the cells; there are {few(names)}.")
    if not genes:
        raise ValueError("genes (none) must name at least one.")
    return genes


def principal_axes(X: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(G,) mean, (G, 2) axes and (2,) their shares of the variance; zeros where there is no second or no variance."""
    mean, (n, n_genes) = gene_means(X), X.shape
    total = float(X.multiply(X).sum() - n * (mean**2).sum())
    if total <= 1e-9:
        return mean, np.zeros((n_genes, 2)), np.zeros(2)
    if min(n, n_genes) <= 50:  # too few for ARPACK, and quick
        _, values, rows = np.linalg.svd(X.toarray() - mean, full_matrices=False)
    else:
        centred = LinearOperator(
            X.shape,
            matvec=lambda v: X @ v.ravel() - mean @ v.ravel(),
            rmatvec=lambda u: X.T @ u.ravel() - mean * u.sum(),
            dtype=np.float64,
        )
        start = np.random.default_rng(0).normal(size=min(n, n_genes))  # for the same picture every time
        _, values, rows = svds(centred, k=2, v0=start, solver="arpack")
    axes, shares = np.zeros((n_genes, 2)), np.zeros(2)
    for i, j in enumerate(np.argsort(-values, kind="stable")[:2]):
        if values[j] ** 2 > 1e-12 * total:
            axes[:, i] = rows[j] * np.sign(rows[j][np.abs(rows[j]).argmax()])  # one sign for one picture
            shares[i] = values[j] ** 2 / total
    return mean, axes, shares


def name_points(ax: Axes, x: np.ndarray, y: np.ndarray, names: list[str]) -> None:
    """Write the names of the strongest genes where they cover neither each other nor a named dot."""
    assert ax.figure is not None, "axes lie in a figure"
    strongest = np.argsort(-np.maximum(np.abs(x), np.abs(y)), kind="stable")[: 2 * N_NAMED]
    strongest = strongest[np.maximum(np.abs(x), np.abs(y))[strongest] > 0]
    places = ax.transData.transform(np.column_stack([x, y])[strongest]) * 72 / ax.figure.dpi  # pt
    size = ax.get_window_extent()
    left, right = size.x0 * 72 / ax.figure.dpi, size.x1 * 72 / ax.figure.dpi
    taken = [(px - 2, py - 2, px + 2, py + 2) for px, py in places[:N_NAMED]]
    n_named = 0
    for (px, py), i in zip(places, strongest, strict=True):
        name = _name(names[i], 12)
        width, height = 0.62 * SMALL * len(name), 1.1 * SMALL
        for dx, dy in ((4, -3), (-4 - width, -3), (-width / 2, 4), (-width / 2, -4 - height)):
            box = (px + dx, py + dy, px + dx + width, py + dy + height)
            apart = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
            if apart and left < box[0] and box[2] < right and n_named < N_NAMED:
                at = (x[i], y[i])
                ax.annotate(name, at, (dx, dy), textcoords="offset points", fontsize=SMALL, parse_math=False)
                taken.append(box)
                n_named += 1
                break


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is None:
        ax = _figure(size).subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=SMALL)
    ax.xaxis.label.set_fontsize(SMALL + 1)
    ax.yaxis.label.set_fontsize(SMALL + 1)
    return ax


def _figure(size: tuple[float, float]) -> Figure:
    """One of pyplot's in IPython or where `plt.ion()` was called; else, and for a page, one that pyplot does not keep.

    A page has its own settings, in which pyplot must not begin: a notebook would show no figure from there on.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib; pip install 'perturbdiff[plot]'.") from error
    ipython: Any = sys.modules.get("IPython")
    shown = matplotlib.is_interactive() or (ipython is not None and ipython.get_ipython() is not None)
    if shown and not ON_PAGE.get():
        import matplotlib.pyplot as plt

        return plt.figure(figsize=size, layout="constrained")
    return Figure(figsize=size, layout="constrained")


def _legend(ax: Axes, n_columns: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if not handles:
        return
    legend = ax.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(-0.14, 1.0), ncols=n_columns, frameon=False, fontsize=SMALL,
        borderpad=0.2, borderaxespad=0.1, handletextpad=0.1, columnspacing=0.8, handlelength=1.4,
    )  # fmt: skip
    of_legend: list[Any] = legend.legend_handles
    for handle in of_legend:
        if hasattr(handle, "set_sizes"):  # dots of a scatter, perhaps too small to see their colour
            handle.set_alpha(1)
            handle.set_sizes([24])


def _ink() -> Any:
    from matplotlib import rcParams

    return rcParams["text.color"]


def _name(text: str, most: int) -> str:
    """On one line of at most so many characters, without what a figure cannot hold."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else text[: most - 1] + "…"


_COLOURS = {"control": CONTROL_COLOUR, "measured": MEASURED_COLOUR, "predicted": PREDICTED_COLOUR}
