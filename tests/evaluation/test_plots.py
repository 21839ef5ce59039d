"""Figures: what is drawn equals what a reader would compute, whatever the labels; nothing stays behind."""

import os
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy import sparse
from sklearn.decomposition import PCA

from perturbdiff import pl
from perturbdiff.evaluation import plots

HOSTILE = "<script>alert('1')</script>\x1b[31m$_a^{$" + "long" * 100


def cells(n, n_genes=30, shift=0.0, seed=0, genes=None, **labels):
    """AnnData of log1p values: `shift` more in the first five genes."""
    rng = np.random.default_rng(seed)
    X = np.log1p(rng.poisson(2.0, (n, n_genes))).astype(np.float32)
    X[:, :5] += shift
    names = [f"g{i}" for i in range(n_genes)] if genes is None else genes
    obs = pd.DataFrame(labels, index=[f"{seed}_{i}" for i in range(n)])
    return AnnData(sparse.csr_matrix(X), obs=obs, var=pd.DataFrame(index=names))


@pytest.fixture
def groups():
    control = cells(40, seed=1, perturbation="control", cell_type="T")
    measured = cells(50, shift=1.5, seed=2, perturbation="A", cell_type="T")
    predicted = cells(30, shift=1.0, seed=3, perturbation="A", cell_type="T")
    return measured, predicted, control


def table_of(n, methods=("PerturbDiff", "ridge"), seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            {"method": m, "perturbation": f"p{i}", "cell_type": "T", "batch": "all", "pearson_delta": rng.normal()}
            for i in range(n)
            for m in methods
        ]
    )


def offsets(ax):
    return [np.asarray(collection.get_offsets()) for collection in ax.collections]


def test_violins_are_of_the_genes_with_the_largest_measured_change(groups):
    measured, predicted, control = groups
    ax = pl.violin(measured, predicted, control=control)
    change = measured.X.toarray().mean(axis=0) - control.X.toarray().mean(axis=0)
    expected = [f"g{i}" for i in sorted(range(30), key=lambda i: -abs(change[i]))[: plots.N_GENES]]
    assert [label.get_text() for label in ax.get_xticklabels()] == expected
    assert len(ax.collections) == 3 * plots.N_GENES
    assert [line.get_label() for line in ax.lines] == ["control (40)", "measured (50)", "predicted (30)"]
    for line, of in zip(ax.lines, (control, measured, predicted), strict=True):
        means = [np.mean([float(of.X[i, of.var_names.get_loc(gene)]) for i in range(of.n_obs)]) for gene in expected]
        np.testing.assert_allclose(line.get_ydata(), means, rtol=1e-5)
    assert "log1p" in ax.get_ylabel()


def test_violins_choose_cells_by_label_and_find_the_controls_among_the_measured(groups):
    measured, predicted, control = groups
    other = cells(7, seed=4, perturbation="B", cell_type="T")
    elsewhere = cells(9, seed=5, perturbation="A", cell_type="B")
    everything = anndata.concat([measured, control, other, elsewhere])
    ax = pl.violin(everything, predicted, ["g3", "g29"], perturbation="A", cell_type="T")
    assert [line.get_label() for line in ax.lines] == ["control (40)", "measured (50)", "predicted (30)"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["g3", "g29"]
    assert len(pl.violin(measured, predicted, "g1").lines) == 2


def test_embedding_projects_predicted_cells_onto_the_components_of_the_others(groups):
    measured, predicted, control = groups
    ax = pl.embedding(measured, predicted, control)
    pca = PCA(2).fit(np.vstack([control.X.toarray(), measured.X.toarray()]).astype(np.float64))
    for drawn, of in zip(offsets(ax), (control, measured, predicted), strict=True):
        np.testing.assert_allclose(np.abs(drawn), np.abs(pca.transform(of.X.toarray())), atol=1e-5)
    assert f"({pca.explained_variance_ratio_[0]:.0%} of variance)" in ax.get_xlabel()


@pytest.mark.parametrize("seed", range(3))
def test_embedding_of_many_genes_is_that_of_sklearn_too(seed):
    measured, control = cells(80, 120, 1.0, seed), cells(70, 120, 0.0, seed + 50)
    ax = pl.embedding(measured, cells(3, 120, 0.5, seed + 90), control)
    pca = PCA(2, svd_solver="full").fit(np.vstack([control.X.toarray(), measured.X.toarray()]).astype(np.float64))
    np.testing.assert_allclose(np.abs(offsets(ax)[1]), np.abs(pca.transform(measured.X.toarray())), atol=1e-4)
    again = pl.embedding(measured, cells(3, 120, 0.5, seed + 90), control)
    np.testing.assert_array_equal(offsets(ax)[2], offsets(again)[2])


@pytest.mark.parametrize(("n", "n_genes"), [(1, 1), (1, 30), (3, 1), (2, 2)])
def test_few_cells_and_genes_are_drawn(n, n_genes):
    measured, predicted, control = (cells(n, n_genes, 1.0, seed) for seed in range(3))
    for ax in (
        pl.embedding(measured, predicted, control),
        pl.embedding(measured, predicted),
        pl.violin(measured, predicted, control=control),
        pl.delta(measured, predicted, control),
    ):
        ax.figure.canvas.draw()


@pytest.mark.parametrize("n_genes", [3, 80])
def test_cells_without_any_counts_are_drawn(n_genes):
    empty = cells(60, n_genes)
    empty.X = sparse.csr_matrix(empty.X.shape, dtype=np.float32)
    for ax in (
        pl.embedding(empty, empty, empty),
        pl.violin(empty, empty, control=empty),
        pl.delta(empty, empty, empty),
    ):
        ax.figure.canvas.draw()
    assert "undefined" in pl.delta(empty, empty, empty).get_title(loc="left")


def test_delta_is_the_change_of_the_means_each_from_its_controls(groups):
    measured, predicted, control = groups
    other = cells(20, seed=9)
    for second in (None, other):
        ax = pl.delta(measured, predicted, control, predicted_control=second)
        mean = {
            name: of.X.toarray().mean(axis=0, dtype=np.float64)
            for name, of in (("m", measured), ("p", predicted), ("c", control))
        }
        from_ = mean["c"] if second is None else other.X.toarray().mean(axis=0, dtype=np.float64)
        x, y = mean["m"] - mean["c"], mean["p"] - from_
        np.testing.assert_allclose(offsets(ax)[0], np.column_stack([x, y]), atol=1e-6)
        assert f"r {np.corrcoef(x, y)[0, 1]:.2f}" in ax.get_title(loc="left")
        named = {annotation.get_text() for annotation in ax.texts}
        assert len(named) <= plots.N_NAMED
        assert {f"g{i}" for i in range(5)} & named


def test_names_of_genes_do_not_cover_each_other(groups):
    ax = pl.delta(*groups)
    ax.figure.canvas.draw()
    boxes = [annotation.get_window_extent() for annotation in ax.texts]
    assert len(boxes) > 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_genes_are_matched_by_name_and_those_without_data_are_left_out(groups):
    measured, predicted, control = groups
    mixed = predicted[:, predicted.var_names[::-1]].copy()
    mixed.var["measured"] = [name != "g7" for name in mixed.var_names]
    x = pl.delta(measured, predicted, control)
    ax = pl.delta(measured, mixed, control)
    np.testing.assert_allclose(offsets(ax)[0], np.delete(offsets(x)[0], 7, axis=0), atol=1e-6)


def means_of(n_genes=9, n_populations=4, **columns):
    rng = np.random.default_rng(5)
    numbers = {
        "control_mean": rng.random(n_genes),
        **{f"population_{k}": rng.random(n_genes) for k in range(n_populations)},
    }
    return pd.DataFrame({"gene": [f"g{i}" for i in range(n_genes)], **numbers} | columns)


def test_every_population_and_every_measured_batch_is_a_mark_beside_the_interval():
    measured = np.arange(9.0)
    table = means_of(measured=measured, lower=measured - 1, upper=measured + 2)
    batches = pd.DataFrame({f"g{i}": [10.0 + i, 20.0 + i] for i in range(8)}, index=["b1", "b2"])  # none has g8
    ax = pl.populations(table, batches)
    order = np.argsort(-np.abs(measured - table["control_mean"]))[: plots.N_GENES]
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"g{i}" for i in order]
    drawn = {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in ax.lines}
    own = table[[f"population_{k}" for k in range(4)]].to_numpy()[order]
    np.testing.assert_allclose(drawn["predicted populations (4)"], own.ravel())
    np.testing.assert_allclose(drawn["measured"], measured[order])
    others = np.array([[level + i if i < 8 else np.nan for i in order] for level in (10, 20)])
    np.testing.assert_allclose(drawn["other measured batches (2)"], others.ravel())
    bars = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in ax.patches]
    np.testing.assert_allclose(bars, np.column_stack([measured - 1, measured + 2])[order])
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"controls", "interval", *drawn}


def test_populations_without_a_calibration_or_measured_cells_have_neither_bar_nor_diamond():
    for table in (means_of(), means_of(lower=np.nan, upper=np.nan)):
        ax = pl.populations(table)
        assert not ax.patches
        assert [line.get_label() for line in ax.lines] == ["predicted populations (4)"]
    with pytest.raises(KeyError, match="population_0"):
        pl.populations(means_of(n_populations=0))
    with pytest.raises(KeyError, match="control_mean"):
        pl.populations(means_of().drop(columns="control_mean"))
    with pytest.raises(ValueError, match="0 rows"):
        pl.populations(means_of()[:0])


def test_ranking_shows_scores_spread_and_what_was_trained():
    table = pd.DataFrame({"perturbation": [f"p{i}" for i in range(30)], "score": np.linspace(2, -1, 30), "sd": 0.1,
                          "features_only": [False] * 5 + [True] * 25})  # fmt: skip
    ax = pl.ranking(table)
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"p{i}" for i in range(plots.N_RANKED)]
    drawn = np.vstack([of for of in offsets(ax) if len(of) and not np.array_equal(of, [[0, 0]])])
    np.testing.assert_allclose(np.sort(drawn[:, 0])[::-1], table["score"][: plots.N_RANKED])
    assert ax.yaxis_inverted()
    pl.ranking(table.assign(sd=np.nan)).figure.canvas.draw()  # of one population
    pl.ranking(table[["perturbation", "score"]])


def test_heat_map_holds_each_score_where_its_labels_are():
    table = table_of(5, ("PerturbDiff", "ridge", "no change"))
    table.loc[4, "pearson_delta"] = np.nan
    ax = pl.scores(table.sample(frac=1, random_state=0), "pearson_delta")
    rows, columns = ([label.get_text() for label in labels] for labels in (ax.get_yticklabels(), ax.get_xticklabels()))
    grid = ax.images[0].get_array()
    for _, row in table.iterrows():
        value = grid[rows.index(f"{row['perturbation']}, T"), columns.index(row["method"])]
        assert value is np.ma.masked or np.isnan(value) or value == row["pearson_delta"]
    assert "–" in {text.get_text() for text in ax.texts}
    assert "higher" in ax.get_title(loc="left")


def test_many_conditions_are_dots_with_a_bar_at_the_mean():
    table = table_of(plots.MAX_ROWS + 1)
    ax = pl.scores(table, "pearson_delta")
    assert not ax.images
    for line, (_, of) in zip(ax.lines, table.groupby("method", sort=False), strict=True):
        np.testing.assert_allclose(line.get_xdata(), of["pearson_delta"].mean())


def test_conditions_whose_long_names_begin_alike_are_not_one():
    table = table_of(3).assign(perturbation=lambda t: "x" * 90 + t["perturbation"])
    assert len(pl.scores(table, "pearson_delta").get_yticklabels()) == 3


def test_hostile_labels_are_drawn(tmp_path):
    genes = [HOSTILE + str(i) for i in range(4)]
    measured, predicted, control = (cells(9, 4, s, s, genes=genes) for s in (2, 1, 0))
    table = table_of(3).assign(
        perturbation=lambda t: HOSTILE + t["perturbation"], method=lambda t: HOSTILE + t["method"]
    )
    ranked = pd.DataFrame({"perturbation": [HOSTILE], "score": [1.0]})
    for i, ax in enumerate(
        [
            pl.violin(measured, predicted, control=control),
            pl.embedding(measured, predicted, control),
            pl.delta(measured, predicted, control),
            pl.scores(table, "pearson_delta"),
            pl.ranking(ranked),
            pl.populations(means_of(4, gene=genes)),
        ]
    ):
        path = tmp_path / f"{i}.svg"
        ax.figure.savefig(path)
        assert "\x1b" not in path.read_text()
        assert "<script" not in path.read_text()


def test_given_axes_are_drawn_into_and_returned(groups):
    measured, predicted, control = groups
    axes = Figure().subplots(1, 6)
    assert pl.violin(measured, predicted, control=control, ax=axes[0]) is axes[0]
    assert pl.embedding(measured, predicted, control, axes[1]) is axes[1]
    assert pl.delta(measured, predicted, control, axes[2]) is axes[2]
    assert pl.ranking(pd.DataFrame({"perturbation": ["a"], "score": [1.0]}), axes[3]) is axes[3]
    assert pl.scores(table_of(2), "pearson_delta", axes[4]) is axes[4]
    assert pl.populations(means_of(), ax=axes[5]) is axes[5]


def test_inputs_stay_as_they_are(groups):
    before = [of.copy() for of in groups]
    pl.violin(groups[0], groups[1], control=groups[2])
    pl.delta(*groups)
    for of, then in zip(groups, before, strict=True):
        assert (of.X != then.X).nnz == 0
        pd.testing.assert_frame_equal(of.obs, then.obs)


@pytest.mark.parametrize("ground", ["#ffffff", "#15181c"])
@pytest.mark.parametrize("colour", [plots.CONTROL_COLOUR, plots.MEASURED_COLOUR, plots.PREDICTED_COLOUR])
def test_colours_stand_out_from_light_and_dark(colour, ground):
    def luminance(of):  # WCAG 2.2
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(of))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted([luminance(colour), luminance(ground)])
    assert (high + 0.05) / (low + 0.05) >= 3


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda m, p, c: pl.delta(m, p[:0], c), ValueError, "no predicted cells"),
        (lambda m, p, c: pl.embedding(m[:0], p[:0]), ValueError, "no measured and no predicted cells"),
        (lambda m, p, c: pl.violin(m, p, perturbation="Z", control=c), ValueError, "'Z'; there are A"),
        (lambda m, p, c: pl.violin(m, p, cell_type="Z", control=c), ValueError, "no control cell has cell_type 'Z'"),
        (lambda m, p, c: pl.violin(m, p), ValueError, "give control, or genes"),
        (lambda m, p, c: pl.violin(m, p, ["g1", "none"], control=c), KeyError, "none"),
        (lambda m, p, c: pl.violin(m, p, [], control=c), ValueError, "at least one"),
        (lambda m, p, c: pl.delta(m, cells(3, genes=[f"x{i}" for i in range(30)]), c), ValueError, "no gene is in all"),
        (lambda m, p, c: pl.delta(AnnData(np.ones((3, 30)), var=m.var), p, c), ValueError, "holds raw counts"),
        (lambda m, p, c: pl.delta(AnnData(-m.X, m.obs, m.var), p, c), ValueError, "negative"),
        (lambda m, p, c: pl.ranking(pd.DataFrame({"perturbation": []})), KeyError, "score"),
        (lambda m, p, c: pl.ranking(pd.DataFrame({"perturbation": [], "score": []})), ValueError, "0 rows"),
        (lambda m, p, c: pl.scores(table_of(2), "none"), KeyError, "none"),
        (lambda m, p, c: pl.scores(table_of(2).assign(x=np.nan), "x"), ValueError, "undefined on all 2"),
    ],
)
def test_what_cannot_be_drawn_is_refused(groups, change, error, says):
    with pytest.raises(error, match=says):
        change(*groups)


def test_pyplot_is_not_touched_and_matplotlib_waits_until_a_figure_is_drawn():
    code = (
        "import sys, numpy, pandas\nfrom perturbdiff import pl\nassert 'matplotlib' not in sys.modules\n"
        "pl.ranking(pandas.DataFrame({'perturbation': ['a'], 'score': [1.0]})).figure.canvas.draw()\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "where",
    [
        "import matplotlib; matplotlib.interactive(True)",
        "from IPython.core.interactiveshell import InteractiveShell; InteractiveShell.instance()",
    ],
    ids=["plt.ion", "IPython"],
)
def test_where_pyplot_shows_figures_it_knows_new_ones_but_those_of_a_page(where):
    if "IPython" in where:
        pytest.importorskip("IPython")
    code = (
        f"{where}\nimport sys, pandas\nfrom perturbdiff import pl\n"
        "from perturbdiff.evaluation.html import as_svg, drawing\n"
        "table = pandas.DataFrame({'perturbation': ['a'], 'score': [1.0]})\n"
        "with drawing():\n    as_svg(pl.ranking(table), 'a', 'a')\nassert 'matplotlib.pyplot' not in sys.modules\n"
        "axes = pl.ranking(table)\nimport matplotlib.pyplot as plt\nassert plt.gcf() is axes.figure\n"
        "with drawing():\n    as_svg(pl.ranking(table), 'a', 'a')\nassert plt.get_fignums() == [1]\n"
    )
    environment = {**os.environ, "MPLBACKEND": "agg"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


def test_a_missing_matplotlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'perturbdiff\[plot\]'"):
        pl.ranking(pd.DataFrame({"perturbation": ["a"], "score": [1.0]}))
