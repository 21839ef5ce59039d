"""Perturbations that no training cell received: known by features, at other doses, in new combinations."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from perturbdiff import PerturbDiff
from perturbdiff.data.screen import Screen, control_cells
from perturbdiff.data.simulate import SimulationConfig, simulate
from perturbdiff.features.coexpression import coexpression_table
from perturbdiff.features.tables import FeatureTable
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.loop import fit
from tests.simulated import tiny_config, write_screen

pytestmark = pytest.mark.slow

NEW = "pert_9"


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return write_screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "esm2.csv"
    values = np.random.default_rng(0).normal(size=(4, 6))
    pd.DataFrame(values, index=["pert_0", "pert_1", "pert_2", NEW]).rename_axis("name").to_csv(path)
    return path


@pytest.fixture(scope="module")
def config(screen, table, tmp_path_factory):
    words = [f"data.perturbation_features=[{table},coexpression]", "training.n_steps=40", "optim.lr=0.01"]
    return tiny_config(screen, tmp_path_factory.mktemp("run"), *words)


@pytest.fixture(scope="module")
def model(config):
    return PerturbDiff.from_pretrained(fit(config).folder / "model", device="cpu")


@pytest.fixture
def controls(screen, model):
    return control_cells(screen, model.config.obs, None, None)


def cells(predicted):
    return predicted.X.toarray()


def test_a_perturbation_with_features_alone_is_predicted_and_said_to_be_unseen(model, controls):
    assert model.vocabularies.labelled == ("pert_0", "pert_1", "pert_2")
    new, known = model.predict(controls, perturbation=NEW), model.predict(controls, perturbation="pert_1")
    assert list(new.uns["perturbdiff"]["unseen"]) == [f"perturbation {NEW}"]
    assert list(known.uns["perturbdiff"]["unseen"]) == []
    gene = model.genes.names[3]  # known by its loadings
    for other in (
        known,
        model.predict(controls, perturbation=gene),
        model.predict(controls, perturbation=f"{NEW}+pert_1"),
    ):
        assert np.abs(cells(new).mean(0) - cells(other).mean(0)).max() > 1e-3


def test_features_survive_saving_and_lie_in_a_file_of_their_own(model, controls, tmp_path):
    model.save_pretrained(tmp_path / "model")
    again = PerturbDiff.from_pretrained(tmp_path / "model", device="cpu")
    assert (tmp_path / "model" / "features.safetensors").is_file()
    assert again.vocabularies == model.vocabularies
    np.testing.assert_array_equal(
        cells(again.predict(controls, perturbation=NEW)), cells(model.predict(controls, perturbation=NEW))
    )


def test_a_perturbation_by_features_later_is_predicted_as_one_described_at_training(config, controls, table):
    model = PerturbDiff.from_pretrained(f"{config.out}/model", device="cpu")
    features = pd.read_csv(table, index_col="name")
    later = FeatureTable("esm2", ("twin",), features.loc[[NEW]].to_numpy(np.float32))
    assert model.add_features([later]) == ["twin"]
    np.testing.assert_allclose(
        cells(model.predict(controls, perturbation="twin", n_cells=20)).mean(0),
        cells(model.predict(controls, perturbation=NEW, n_cells=20)).mean(0),
        atol=1e-4,
    )
    assert model.add_features([later]) == []
    for wrong in (FeatureTable("other", ("z",), later.values), FeatureTable("esm2", ("z",), later.values[:, :2])):
        with pytest.raises(ValueError, match=r"is not one of this model's, which were trained as 'esm2' \(6\)"):
            model.add_features([wrong])


def test_what_has_neither_row_nor_features_is_an_error(model, controls):
    with pytest.raises(KeyError, match="'pert_7' is not known to this model; did you mean"):
        model.predict(controls, perturbation="pert_7")


def test_loadings_are_of_training_cells_and_the_models_genes(screen, config):
    read = Screen.read(screen, config.data)
    data = TrainingSet.from_screen(read, config)
    assert [table.name for table in data.tables] == ["esm2", "coexpression"]
    X = data.cells.log1p(np.flatnonzero(data.split.train))
    expected = coexpression_table(X, data.cells.genes.names).directions()
    np.testing.assert_allclose(data.tables[1].values, expected.values, atol=1e-5)
    assert "esm2: 3 of 3" in data.summary()


def test_tables_of_a_checkpoint_stand_in_place_of_new_loadings(screen, config):
    known = FeatureTable("coexpression", ("gene_0",), np.ones((1, 5), np.float32))
    data = TrainingSet.from_screen(Screen.read(screen, config.data), config, [known])
    assert data.tables[1] is known


def test_two_tables_of_one_name_are_refused(screen, table, tmp_path):
    config = tiny_config(screen, tmp_path / "run", f"data.perturbation_features=[{table},{table}]")
    with pytest.raises(ValueError, match="must have different names"):
        TrainingSet.from_screen(Screen.read(screen, config.data), config)


def test_a_dose_between_known_ones_acts_between_them(tmp_path):
    """Three doses of a drug, the middle one never trained on."""
    simulation = SimulationConfig(
        n_genes=30, n_cell_types=1, n_batches=1, n_perturbations=2, doses=(0.1, 0.4, 1.6), cells_per_condition=60,
        control_cells_per_context=80, n_effect_genes=15, effect_size=1.5,
    )  # fmt: skip
    simulate(simulation, tmp_path / "screen.h5ad")
    words = ["data.dose_col=dose", "training.n_steps=250", "optim.lr=0.003", "diffusion.p_drop_label=0"]
    hold_out = ("pert_0@0.4", "pert_1@0.4")
    config = tiny_config(tmp_path / "screen.h5ad", tmp_path / "run", *words, hold_out=hold_out)
    model = fit(config).model
    assert model.vocabularies.perturbations.names == ("pert_0", "pert_1")
    controls = control_cells(tmp_path / "screen.h5ad", model.config.obs, None, None)
    measured = anndata.read_h5ad(tmp_path / "screen.h5ad")
    base = np.log1p(1e4 * controls.X.toarray() / controls.X.sum(1)).mean(0)
    for drug in ("pert_0", "pert_1"):
        low, middle, high = (
            np.linalg.norm(cells(model.predict(controls, perturbation=f"{drug}@{dose}", n_cells=80)).mean(0) - base)
            for dose in (0.1, 0.4, 1.6)
        )
        assert low < middle < high
        own = measured[(measured.obs["perturbation"] == drug) & (measured.obs["dose"] == 0.4)].X.toarray()
        effect = np.log1p(1e4 * own / own.sum(1, keepdims=True)).mean(0) - base
        predicted = cells(model.predict(controls, perturbation=f"{drug}@0.4", n_cells=80)).mean(0) - base
        assert np.corrcoef(effect, predicted)[0, 1] > 0.5
    with pytest.raises(ValueError, match="has no dose"):
        model.predict(controls, perturbation="pert_0")


def test_resuming_a_run_with_features_changes_no_bit(screen, table, tmp_path):
    words = [f"data.perturbation_features=[{table}]", "data.combination_separator=+"]
    straight = fit(tiny_config(screen, tmp_path / "straight", *words)).model
    stopped = tiny_config(screen, tmp_path / "stopped", *words)
    assert fit(stopped, stop_at=3).step == 3
    resumed = fit(stopped).model
    expected, found = straight.denoiser.state_dict(), resumed.denoiser.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
