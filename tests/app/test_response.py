"""A prediction beside its controls: genes that change, what is said, and the figures."""

from dataclasses import replace
from xml.etree import ElementTree

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturbdiff.app import plots
from perturbdiff.app.controls import read_controls
from perturbdiff.app.page import _files
from perturbdiff.app.response import before_predicting, predict_response
from perturbdiff.app.upload import Limits
from perturbdiff.hub.records import Calibration, Coverage, Width
from perturbdiff.inference.intervals import population_summary


@pytest.fixture(scope="module")
def controls(screen, model):
    return read_controls(screen, "a file", model, Limits())


def respond(model, controls, perturbations=("pert_0",), cell_type="type_0", n_cells=20, n_populations=1, seed=0):
    return predict_response(model, controls, perturbations, cell_type, n_cells, n_populations, 0.0, 3, seed)


def test_changes_are_the_differences_of_means_largest_first(model, controls):
    response = respond(model, controls, n_populations=3)
    X = controls.select("type_0").X.toarray()
    control = np.log1p(X * 1e4 / X.sum(axis=1, keepdims=True)).mean(axis=0)
    predicted = response.predicted.X.toarray()
    changes = response.changes(7)
    expected = sorted(range(40), key=lambda g: -abs(predicted[:, g].mean() - control[g]))[:7]
    assert list(changes["position"]) == expected
    for row in changes.itertuples():
        each = [predicted[i * 20 : i * 20 + 20, row.position].mean() - control[row.position] for i in range(3)]
        np.testing.assert_allclose([row.population_0, row.population_1, row.population_2], each, atol=1e-5)
        np.testing.assert_allclose(row.change, np.mean(each), atol=1e-5)
        assert row.gene == model.genes.names[row.position]
    assert changes[["lower", "upper"]].isna().all(axis=None)  # nobody calibrated this model
    assert "not calibrated" in response.certainty()
    named = response.of_genes([model.genes.names[9], model.genes.names[2]])
    assert list(named["position"]) == [9, 2]


def test_the_p_of_a_gene_is_that_of_welch(model, controls):
    response = respond(model, controls, n_populations=2)
    predicted, control = (X.toarray().astype(np.float64) for X in (response.predicted.X, response.control))
    expected = stats.ttest_ind(predicted, control, equal_var=False).pvalue
    some = np.isfinite(expected)
    assert some.sum() > 30
    np.testing.assert_allclose(response.table["p_welch"][some], expected[some], rtol=1e-4)


def test_measured_cells_of_the_file_stand_beside_predicted_ones(model, controls, screen):
    response = respond(model, controls)
    adata = anndata.read_h5ad(screen)
    own = (adata.obs["perturbation"] == "pert_0") & (adata.obs["cell_type"] == "type_0")
    X = adata.X[own.to_numpy()].toarray()
    log1p = np.log1p(X * 1e4 / X.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.sort(response.measured.toarray(), axis=0), np.sort(log1p, axis=0), atol=1e-4)
    measured = log1p.mean(axis=0) - response.control.toarray().mean(axis=0)
    np.testing.assert_allclose(response.table["measured_change"], measured, atol=1e-4)
    r = np.corrcoef(measured, response.table["change"])[0, 1]
    assert f"{own.sum()} measured cells" in response.agreement()
    assert f"changes {r:.2f}." in response.agreement()
    assert respond(model, controls, cell_type=None).measured is None  # a mixture of other shares than the controls'


def test_of_many_measured_cells_some_of_each_condition_are_kept(screen, model, monkeypatch):
    monkeypatch.setattr("perturbdiff.app.controls.MOST_MEASURED", 7)
    kept = read_controls(screen, "a file", model, None).measured.obs
    assert set(kept.groupby(["perturbation", "cell_type"], observed=True).size()) == {7}
    assert kept["perturbation"].nunique() == 3


def test_measured_cells_with_labels_that_cannot_be_read_leave_the_controls(screen, model, tmp_path):
    adata = anndata.read_h5ad(screen)
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace("pert_1", "a\nb")
    adata.write_h5ad(tmp_path / "odd.h5ad")
    found = read_controls(tmp_path / "odd.h5ad", "odd.h5ad", model, None)
    assert found.cells.n_obs == 120
    assert found.measured.n_obs == 0
    assert "control character" in found.note


def test_what_is_new_is_said_before_it_is_predicted(model, controls):
    said = {
        name: before_predicting(model, controls, [name], cell_type)
        for name in model.perturbations
        for cell_type in controls.cell_types
        if model.outlook(controls.select(cell_type), name, cell_type)[1].verdict == "trained"
    }
    assert said
    assert set(said.values()) == {("Training saw this perturbation in this context.", False)}
    new = replace(controls, cells=controls.cells.copy())
    new.cells.obs["cell_type"] = "new"
    said, warning = before_predicting(model, new, ["pert_0"], "new")
    assert "Not seen in training: cell_type new." in said
    assert warning
    response = respond(model, new, cell_type="new")
    unseen, trust = model.outlook(new.cells, "pert_0", "new")
    about = response.predicted.uns["perturbdiff"]
    assert (unseen, trust.as_uns()) == (about["unseen"], about["trust"])


def test_intervals_of_changes_are_the_calibrated_ones(model, controls, monkeypatch):
    coverage = Coverage("test", 3, 0.88, 0.86)
    calibration = Calibration(0.9, 0.3, Width(2.0, 0.1), Width(3.0, 0.2), 4, coverage)
    monkeypatch.setattr(model, "training", replace(model.training, calibration=calibration))
    response = respond(model, controls, n_populations=3)
    control = pd.Series(np.asarray(response.control.mean(axis=0)).ravel(), index=model.genes.names)
    summary = population_summary(response.predicted, control, calibration).set_index("gene")
    changes = response.changes(40).set_index("gene")
    for name in ("lower", "upper"):
        np.testing.assert_allclose(changes[name], (summary[name] - control)[changes.index], atol=1e-5)
    assert "Lines are 90% intervals; such intervals covered 88% of means, 86% of genes" in response.certainty()
    alone = respond(model, controls)
    assert alone.changes(5)[["lower", "upper"]].isna().all(axis=None)
    assert "Intervals need two or more populations" in alone.certainty()


@pytest.mark.filterwarnings("ignore:X has")
def test_genes_that_the_file_lacks_are_not_said_to_change(screen, model, tmp_path):
    path = tmp_path / "fewer.h5ad"
    anndata.read_h5ad(screen)[:, 5:30].copy().write_h5ad(path)
    response = respond(model, read_controls(path, "a file", model, Limits()))
    assert set(response.changes(40)["position"]) == set(range(5, 30))
    assert "25 of 40 genes matched by name" in response.sentence()
    with pytest.raises(ValueError, match="control cells lack <b>2"):
        response.of_genes([model.gene_names[2]])
    cells, table = _files(response, tmp_path)
    file = anndata.read_h5ad(cells)  # what a visitor takes along has none of them
    assert list(pd.read_csv(table)["gene"]) == list(model.gene_names[5:30])
    assert list(file.var_names) == list(model.gene_names[5:30])
    assert file.var["measured"].all()


def test_the_sentence_says_what_was_unseen(model, controls):
    assert "Not seen" not in respond(model, controls).sentence()
    controls = replace(controls, cells=controls.cells.copy())
    controls.cells.obs["cell_type"] = "new"
    assert "Not seen in training: cell_type new;" in respond(model, controls, cell_type="new").sentence()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"perturbations": ()}, "No perturbation is chosen"),
        ({"n_cells": 2000, "n_populations": 6}, "are 12,000; the app predicts at most 10,000"),
        ({"n_cells": 0}, "must be at least 1"),
        ({"cell_type": "absent"}, "no cells"),
    ],
)
def test_what_cannot_be_predicted_is_an_error(model, controls, given, message):
    with pytest.raises(ValueError, match=message):
        respond(model, controls, **given)


def test_a_model_without_combinations_refuses_one(model, controls, monkeypatch):
    monkeypatch.setattr(model, "vocabularies", replace(model.vocabularies, combination_separator=None))
    with pytest.raises(ValueError, match="knows no combinations"):
        respond(model, controls, ("pert_0", "pert_1"))


def test_an_unknown_perturbation_is_never_silent(model, controls):
    with pytest.raises(KeyError, match="did you mean pert_0"):
        respond(model, controls, ("pert_00",))


def test_figures_are_whole_images_and_hold_names_as_outlines_only(model, controls):
    response = respond(model, controls, n_populations=2)
    changes = response.changes(5)
    one, table = plots.distribution(response, changes.iloc[3]), response.table
    drawn = [one, plots.mean_changes(changes), plots.populations(changes), plots.volcano(table)]
    for svg in (*drawn, plots.agreement(table), plots.cells(response)):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
        assert "path" in tags
        assert not tags & {"script", "text", "image", "b", "foreignObject"}


def test_short_names_are_one_line_of_at_most_so_many_characters():
    assert plots.short("a\n b\x00\u202ec", 20) == "a b c"
    assert plots.short("x" * 30, 10) == "x" * 9 + "…"
