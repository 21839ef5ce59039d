"""Populations that a trained model draws vary as the batches of its screen do, whatever the number of their cells."""

from __future__ import annotations

import anndata
import numpy as np
import pytest

from perturbdiff.data.screen import Screen
from perturbdiff.data.simulate import SimulationConfig, simulate
from perturbdiff.evaluation.populations import population_scores
from perturbdiff.inference.predictions import predict_request
from perturbdiff.inference.requests import Request
from perturbdiff.means.populations import NOT_ASKED, NOT_KNOWN, OF_BATCHES, OF_ITS_BATCH, OF_RESPONSES
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from tests.simulated import tiny_config

pytestmark = pytest.mark.slow

WORDS = ("training.n_steps=40", "split.validation_fraction=0", "optim.warmup_steps=5")


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """The cells, and the genes that pert_0 moves."""
    path = tmp_path_factory.mktemp("populations") / "screen.h5ad"
    truth = simulate(
        SimulationConfig(
            n_genes=30, n_cell_types=1, n_batches=40, n_perturbations=2, cells_per_condition=30, n_effect_genes=10,
            control_cells_per_context=12, batch_variability=0.8, mean_library_size=1500.0, seed=1,
        ),
        path,
    )  # fmt: skip
    return path, np.array(sorted(truth.effect_genes[0]))


def trained(screen, out, *words):
    config = tiny_config(screen, out, *WORDS, *words, hold_out=("pert_0:type_0:batch_39",))
    return fit(config, Screen.read(screen, config.data)).model


@pytest.fixture(scope="module")
def without_batches(screen):
    return trained(screen[0], screen[0].parent / "without", "data.control_match=cell_type")


@pytest.fixture(scope="module")
def with_batches(screen):
    return trained(screen[0], screen[0].parent / "with")


def controls_of(screen, *batches):
    cells = anndata.read_h5ad(screen[0])
    here = (cells.obs["perturbation"] == "control") & (cells.obs["batch"].isin(batches) if batches else True)
    return cells[here].copy()


def populations(predicted, genes):
    X, number = predicted.X.toarray(), predicted.obs["population"].to_numpy()
    return [X[number == k][:, genes] for k in np.unique(number)]


@pytest.mark.parametrize("model", ["without_batches", "with_batches"])
@pytest.mark.parametrize("n_cells", [24, 200])
def test_population_means_vary_as_those_of_batches(model, n_cells, screen, request):
    model = request.getfixturevalue(model)
    cells = anndata.read_h5ad(screen[0])
    of = cells[(cells.obs["perturbation"] == "pert_0").to_numpy()].copy()
    X = model.control_rows(of, model.predict(controls_of(screen), perturbation="pert_0", n_cells=1)).X.toarray()
    measured = [X[(of.obs["batch"] == name).to_numpy()][:, screen[1]] for name in sorted(set(of.obs["batch"]))]
    made = {
        varied: model.predict(
            controls_of(screen), perturbation="pert_0", n_cells=n_cells, n_populations=32, varied=varied
        )
        for varied in (True, False)
    }
    assert made[True].uns["perturbdiff"]["populations_differ"] == OF_BATCHES
    assert made[False].uns["perturbdiff"]["populations_differ"] == NOT_ASKED
    drawn, mean = (population_scores(populations(made[varied], screen[1]), measured) for varied in (True, False))
    assert 0.7 < drawn.variance_ratio < 1.35
    assert mean.variance_ratio < 0.1
    assert drawn.coverage > 0.75 > 0.5 > mean.coverage
    assert drawn.two_level < mean.two_level / 3
    assert drawn.mean_error < 0.2


def test_a_trained_batch_is_itself_and_a_new_one_leaves_its_response_open(with_batches, screen):
    own = with_batches.predict(controls_of(screen, "batch_03"), perturbation="pert_0", n_populations=4)
    assert own.uns["perturbdiff"]["populations_differ"] == OF_ITS_BATCH
    same = with_batches.predict(controls_of(screen, "batch_03"), perturbation="pert_0", n_populations=4, varied=False)
    # of the same controls, but for which of two counts a value becomes
    assert list(own.obs["source_control"]) == list(same.obs["source_control"])
    assert np.abs(own.X.toarray().mean(axis=0) - same.X.toarray().mean(axis=0)).mean() < 0.1
    new = with_batches.predict(controls_of(screen, "batch_39"), perturbation="pert_0", n_populations=16)
    assert new.uns["perturbdiff"]["populations_differ"] == OF_RESPONSES
    spread = [np.var([p.mean(0) for p in populations(of, screen[1])], axis=0).sum() for of in (own, new)]
    assert spread[1] > 10 * spread[0]


def test_populations_are_the_same_by_seed_and_number_and_after_saving(without_batches, screen):
    controls = controls_of(screen)
    asked = {"perturbation": "pert_0", "n_cells": 5, "seed": 4}
    three = without_batches.predict(controls, n_populations=3, **asked).X.toarray()
    np.testing.assert_allclose(
        without_batches.predict(controls, n_populations=2, **asked).X.toarray(), three[:10], atol=1e-4
    )
    again = PerturbDiff.from_pretrained(screen[0].parent / "without/model")
    np.testing.assert_allclose(again.predict(controls, n_populations=3, **asked).X.toarray(), three, atol=1e-4)
    assert "do not vary as batches" not in (screen[0].parent / "without/model/README.md").read_text()


def test_one_draw_says_that_it_is_one(without_batches, screen, tmp_path):
    done = predict_request(without_batches, controls_of(screen), Request("pert_0", n_cells=1), tmp_path / "one.h5ad")
    assert "populations 1, one draw of how batches differ (--average: their mean)" in done.text()
    mean = predict_request(
        without_batches, controls_of(screen), Request("pert_0", n_cells=1), tmp_path / "mean.h5ad", varied=False
    )
    assert f"populations 1, differing {NOT_ASKED}" in mean.text()


def test_one_batch_does_not_tell_how_batches_differ(screen, tmp_path):
    one = anndata.read_h5ad(screen[0])
    one = one[(one.obs["batch"] == "batch_00").to_numpy()].copy()
    one.write_h5ad(tmp_path / "one.h5ad")
    config = tiny_config(tmp_path / "one.h5ad", tmp_path / "run", *WORDS, hold_out=())
    model = fit(config, Screen.read(config.data.screen, config.data)).model
    predicted = model.predict(controls_of(screen, "batch_00"), perturbation="pert_0", n_populations=2)
    assert predicted.uns["perturbdiff"]["populations_differ"] == NOT_KNOWN
    assert "do not vary as batches of one condition do" in (tmp_path / "run/model/README.md").read_text()


def test_genes_that_controls_lack_do_not_differ(without_batches, screen):
    controls = controls_of(screen)[:, 3:].copy()
    with pytest.warns(UserWarning, match="the controls lack 3"):
        made = without_batches.predict(
            controls, perturbation="pert_0", n_cells=20, n_populations=8, all_genes=True, varied=True
        )
    means = np.stack([p.mean(0) for p in populations(made, np.arange(30))])
    assert (means[:, :3].std(axis=0) <= means[:, 3:].std(axis=0).max() / 2).all()
