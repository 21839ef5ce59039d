"""Several tables of features: weights by training perturbations, what is told of them, what travels with a model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from perturbdiff import PerturbDiff
from perturbdiff.data.screen import Screen, control_cells
from perturbdiff.evaluation.held_out import evaluate_model, evaluate_run
from perturbdiff.features.tables import FeatureTable, write_table
from perturbdiff.means.described import FeatureFit
from perturbdiff.means.predictors import start_shift
from perturbdiff.means.training import Context
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.run import run
from tests.screens import screen_with_cells
from tests.simulated import tiny_config

pytestmark = pytest.mark.slow

NAMES = [f"p{i}" for i in range(13)]
HELD_OUT, NEW = "p12", "p99"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A screen whose perturbations do what the table `true` says of them, and a table that says nothing."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    adata = screen_with_cells([("control", "T", "b", 150), *((name, "T", "b", 40) for name in NAMES)], n_genes=30)
    values, directions = rng.normal(size=(14, 3)), rng.normal(size=(3, 30))
    effect = dict(zip([*NAMES, NEW], np.exp(0.5 * values @ directions), strict=True)) | {"control": np.ones(30)}
    rates = adata.X.toarray().mean(axis=0) * np.stack([effect[name] for name in adata.obs["perturbation"]])
    adata.X = sparse.csr_matrix(rng.poisson(rates).astype(np.float32))
    adata.write_h5ad(folder / "screen.h5ad")
    about = {"kind": "made up", "date": "2020", "license": "CC0"}
    write_table(FeatureTable("true", (*NAMES, NEW), values.astype(np.float32), about), folder / "true.parquet")
    noise = pd.DataFrame(rng.normal(size=(14, 20)), index=[*NAMES, NEW])
    noise.rename_axis("name").to_csv(folder / "noise.csv")
    return folder


def config_of(folder, out, *tables, start="controls"):
    given = ",".join(str(folder / name) for name in tables)
    words = [f"data.perturbation_features=[{given}]", f"diffusion.start={start}", "denoiser.output=control_residual"]
    return tiny_config(folder / "screen.h5ad", out, *words, hold_out=(HELD_OUT,))


@pytest.fixture(scope="module")
def trained(folder):
    """A run that starts from means, and its scores."""
    return run(config_of(folder, folder / "run", "noise.csv", "true.parquet", start="mean"))


def test_what_tables_count_is_said(folder):
    config = config_of(folder, folder / "unused", "noise.csv", "true.parquet", start="mean")
    data = TrainingSet.from_screen(Screen.read(config.data.screen, config.data), config)
    assert "\nweights     noise 0, true 1; training perturbations that are left out have 0." in data.description
    config = config_of(folder, folder / "unused", "noise.csv", start="mean")
    data = TrainingSet.from_screen(Screen.read(config.data.screen, config.data), config)
    assert "\nweights     none: no table foretells" in data.description


def test_the_tables_of_a_model_are_those_that_were_given(trained, folder):
    known = {table.name: table for table in trained.model.feature_tables()}
    given = pd.read_csv(folder / "noise.csv", index_col="name")
    np.testing.assert_allclose(known["noise"].rows([*NAMES, NEW]), given.to_numpy(np.float32), atol=1e-4)


def test_a_saved_model_tells_the_same_means_of_what_was_never_trained(trained, folder):
    config = config_of(folder, folder / "unused", "noise.csv", "true.parquet", start="mean")
    means = TrainingSet.from_screen(Screen.read(config.data.screen, config.data), config).means
    context = Context(NEW, "T", "b", means.control_mean[:1])
    expected = start_shift(means, context, "mean")
    np.testing.assert_allclose(start_shift(trained.model.means, context, "mean"), expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(start_shift(replace(means, tables=()), context, "mean"), expected, atol=1e-2)


def test_perturbations_that_are_added_later_start_from_their_features(trained, folder):
    model = PerturbDiff.from_pretrained(folder / "run" / "model", device="cpu")
    true = next(table for table in model.feature_tables() if table.name == "true")
    later = FeatureTable("true", ("twin",), true.rows([NEW]))
    noise = FeatureTable("noise", ("twin",), np.zeros((1, 20), np.float32))
    assert model.add_features([later, noise]) == ["twin"]
    control = model.means.control_mean[:1]
    twin, new = (start_shift(model.means, Context(name, "T", "b", control), "mean") for name in ("twin", NEW))
    np.testing.assert_allclose(twin, new, atol=0.02)  # noise has no weight
    controls = control_cells(folder / "screen.h5ad", model.config.obs, None, None)
    with torch.no_grad():
        assert np.isfinite(model.predict(controls, perturbation="twin", n_cells=5).X.toarray()).all()


def test_the_simple_predictor_has_the_tables_of_the_model(trained, folder):
    scores = trained.scores
    means = scores.means()["pearson_delta"]
    assert means["features"] > means["context mean"] + 0.2
    for again in (evaluate_run(folder / "run"), evaluate_model(folder / "run" / "model", folder / "screen.h5ad")):
        pd.testing.assert_series_equal(again.means()["pearson_delta"], means, rtol=1e-3)


def test_origin_date_and_license_travel_with_the_model_and_paths_do_not(trained, folder):
    text = (folder / "run" / "model" / "training.json").read_text()
    settings = json.loads(text)["settings"]
    assert settings["features"]["true"]["license"] == "CC0"
    assert settings["features"]["noise"] == {}
    assert settings["data"]["perturbation_features"] == ["noise.csv", "true.parquet"]
    assert str(folder) not in text
    card = (folder / "run" / "model" / "README.md").read_text()
    assert "true: kind made up; date 2020; license CC0" in card


def test_weights_are_those_of_the_predictor(folder):
    config = config_of(folder, folder / "unused", "noise.csv", "true.parquet", start="mean")
    means = TrainingSet.from_screen(Screen.read(config.data.screen, config.data), config).means
    fit = FeatureFit(means.tables, means.seen, means.effect - means.effect.mean(axis=0))
    np.testing.assert_allclose(means.feature_fit.weights, fit.weights, rtol=1e-6)
