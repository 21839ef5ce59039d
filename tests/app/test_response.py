"""A prediction beside its controls: genes that change, what is said, and the figures."""

from dataclasses import replace
from xml.etree import ElementTree

import anndata
import numpy as np
import pytest

from perturbdiff.app.controls import Limits, read_controls
from perturbdiff.app.page import _predicted_file
from perturbdiff.app.plots import distribution, mean_changes, short
from perturbdiff.app.response import predict_response


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
        np.testing.assert_allclose([row.lowest, row.highest], [min(each), max(each)], atol=1e-5)
        np.testing.assert_allclose(row.change, np.mean(each), atol=1e-5)
        assert row.gene == model.genes.names[row.position]


@pytest.mark.filterwarnings("ignore:X has")
def test_genes_that_the_file_lacks_are_not_said_to_change(screen, model, tmp_path):
    path = tmp_path / "fewer.h5ad"
    anndata.read_h5ad(screen)[:, 5:30].copy().write_h5ad(path)
    response = respond(model, read_controls(path, "a file", model, Limits()))
    assert set(response.changes(40)["position"]) == set(range(5, 30))
    assert "25 of 40 genes matched by name" in response.sentence()
    file = anndata.read_h5ad(_predicted_file(response, tmp_path))  # what a visitor takes along has none of them
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
    for svg in (distribution(response, 3), mean_changes(response.changes(5))):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
        assert "path" in tags
        assert not tags & {"script", "text", "image", "b", "foreignObject"}


def test_short_names_are_one_line_of_at_most_so_many_characters():
    assert short("a\n b\x00\u202ec", 20) == "a b c"
    assert short("x" * 30, 10) == "x" * 9 + "…"
