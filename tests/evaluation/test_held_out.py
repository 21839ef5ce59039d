"""A model scored again: by its run folder, by its own split, by what its card says."""

import json
from dataclasses import replace

import anndata
import pandas as pd
import pytest

from perturbdiff.cli.main import main
from perturbdiff.config import DataConfig, SplitConfig
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import make_split, read_split, write_split
from perturbdiff.evaluation.held_out import evaluate_model, evaluate_run, reproduce
from perturbdiff.evaluation.scores import MODEL
from perturbdiff.hub import model_folder
from perturbdiff.hub.model_folder import read_folder
from perturbdiff.model import PerturbDiff
from perturbdiff.training import run as training_run
from tests.simulated import tiny_config, write_screen


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(write_screen(folder), folder / "out", hold_out=("pert_0:type_0", "pert_2:type_1:batch_1"))
    training_run.run(config)
    return folder


@pytest.fixture
def refused(capsys):
    """The one line with which a command ends."""

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        assert end.value.code == 2
        return [line for line in capsys.readouterr().err.splitlines() if "error" in line][-1]

    return run


def test_the_split_travels_with_the_model_and_is_all_that_scoring_it_again_needs(run, tmp_path):
    model, screen = run / "out" / "model", run / "screen.h5ad"
    folder = read_folder(model)
    assert folder.json["split.json"] == json.loads((run / "out" / "split.json").read_text())
    first = evaluate_run(run / "out")
    again = evaluate_model(model, anndata.read_h5ad(screen))
    pd.testing.assert_frame_equal(first.conditions, again.conditions, rtol=1e-6)
    saved = json.loads((run / "out" / "scores.json").read_text())
    assert again.record().mean[MODEL] == pytest.approx(saved["mean"][MODEL], rel=1e-6)
    PerturbDiff.from_pretrained(model, device="cpu").save_pretrained(tmp_path / "again")
    assert read_folder(tmp_path / "again").json["split.json"] == folder.json["split.json"]


def test_what_the_model_was_trained_on_is_not_scored_as_held_out(run, tmp_path):
    model = run / "out" / "model"
    screen = Screen.read(run / "screen.h5ad", DataConfig(screen=str(run / "screen.h5ad")))
    other = make_split(screen, SplitConfig(["pert_2:type_1"], [], 0.0), 0)
    write_split(other, screen, tmp_path / "other.json")
    n = int((other.test & read_split(run / "out" / "split.json", screen).train).sum())
    with pytest.raises(ValueError, match=rf"was trained on {n:,} of the {other.test.sum():,} cells that the split"):
        evaluate_model(model, run / "screen.h5ad", tmp_path / "other.json")


def test_scores_of_a_card_are_reproduced_or_said_to_differ(run, tmp_path, capsys, refused):
    model, screen = run / "out" / "model", run / "screen.h5ad"
    main(["hub", "reproduce", str(model), "--screen", str(screen)])
    assert "reproduced  all" in capsys.readouterr().out
    claimed = PerturbDiff.from_pretrained(model, device="cpu")
    mean = {**claimed.evaluation.mean, MODEL: {**claimed.evaluation.mean[MODEL], "pearson_delta": 0.99}}
    claimed.evaluation = replace(claimed.evaluation, mean=mean)
    claimed.save_pretrained(tmp_path / "claimed")
    said = refused("hub", "reproduce", tmp_path / "claimed", "--screen", screen)
    assert "the scores of" in said
    assert "pearson_delta 0.99 on the card and" in said


def test_other_cells_and_other_metrics_are_refused(run, tmp_path, refused):
    model, adata = run / "out" / "model", anndata.read_h5ad(run / "screen.h5ad")
    held_out_cells = json.loads((run / "out" / "split.json").read_text())["cells"]["test"]
    lacking = adata[~adata.obs_names.isin(held_out_cells[:3])].copy()
    with pytest.raises(ValueError, match=r"split.json of .* lacks 3 of them \(") as raised:
        reproduce(model, lacking)
    assert all(name in str(raised.value) for name in held_out_cells[:3])
    changed = adata.copy()
    changed.X = changed.X.toarray()
    X = changed.X
    X[changed.obs_names.get_loc(held_out_cells[0])] += 1
    changed.X = X
    with pytest.raises(ValueError, match=r"other values"):
        reproduce(model, changed)
    loaded = PerturbDiff.from_pretrained(model, device="cpu")
    old = {"metrics": {"r2": "higher"}, "mean": {MODEL: {"r2": 0.5}}, "n_undefined": {MODEL: {"r2": 0}}}
    loaded.evaluation = replace(loaded.evaluation, interval={}, **old)
    loaded.save_pretrained(tmp_path / "old")
    with pytest.raises(ValueError, match=r"were made by perturbdiff .* with other metrics"):
        reproduce(tmp_path / "old", adata)
    loaded.evaluation = loaded.split = None
    loaded.save_pretrained(tmp_path / "none")
    assert "has no scores to reproduce" in refused(
        "hub", "reproduce", tmp_path / "none", "--screen", run / "screen.h5ad"
    )
    said = refused("evaluate", tmp_path / "none", "--screen", run / "screen.h5ad")
    assert "no split.json travels with" in said


def test_evaluate_takes_a_run_a_model_and_predictions(run, tmp_path, capsys, refused):
    screen, split = run / "screen.h5ad", run / "out" / "split.json"
    said = []
    for words in (
        [run / "out"],
        [run / "out" / "model", "--screen", screen],
        [run / "out" / "predicted.h5ad", "--screen", screen, "--split", split, "--out", tmp_path / "scores"],
    ):
        main(["evaluate", *map(str, words)])
        said.append(capsys.readouterr().out.split("written")[0].strip())
    assert len(set(said)) == 1
    assert (tmp_path / "scores" / "scores.parquet").is_file()
    assert "--screen is missing" in refused("evaluate", run / "out" / "predicted.h5ad")


def test_a_split_that_is_too_large_stays_behind(run, monkeypatch):
    assert model_folder.travelling_split(run / "out" / "split.json") is not None
    monkeypatch.setattr(model_folder, "MAX_JSON_BYTES", 100)
    assert model_folder.travelling_split(run / "out" / "split.json") is None
