import json
import os
from pathlib import Path

import anndata
import numpy as np
import pytest

import perturbdiff
from perturbdiff.config import load_config
from perturbdiff.evaluation.scores import MODEL
from perturbdiff.hub.records import read_evaluation
from perturbdiff.model import PerturbDiff
from perturbdiff.training.run import demo, run
from tests.simulated import TINY, tiny_config, write_screen

pytestmark = pytest.mark.slow

REAL_DATA = Path(os.environ.get("PERTURBDIFF_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))


def test_a_run_leaves_what_it_says_and_runs_again_to_the_same_scores(tmp_path):
    config = tiny_config(write_screen(tmp_path), tmp_path / "run")
    first = run(config)
    assert all(path.exists() for path in first.written)
    model = PerturbDiff.from_pretrained(tmp_path / "run" / "model")
    assert model.evaluation == read_evaluation(json.loads((tmp_path / "run" / "scores.json").read_text()))
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"{model.evaluation.mean[MODEL]['energy_distance']:.3f}" in card
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert [c["perturbation"] for c in split["conditions"]["test"]] == ["pert_0", "pert_0"]
    scores = (tmp_path / "run" / "scores.parquet").read_bytes()
    run(config)
    assert (tmp_path / "run" / "scores.parquet").read_bytes() == scores


def test_a_perturbation_held_out_everywhere_is_refused_before_training(tmp_path):
    config = tiny_config(write_screen(tmp_path), tmp_path / "run", hold_out=("pert_0",))
    with pytest.raises(ValueError, match="held out in every context"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_a_demo_without_anything_held_out_is_refused_before_training(tmp_path):
    screen = write_screen(tmp_path)
    with pytest.raises(ValueError, match="nothing is held out"):
        demo(screen, tmp_path / "run", overrides=TINY)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_scored_where_nothing_is_held_out_or_nobody_asks(tmp_path):
    screen = write_screen(tmp_path)
    whole = perturbdiff.train(screen, tmp_path / "whole", overrides=TINY)
    assert whole.scores is None
    assert whole.written == (tmp_path / "whole" / "model",)
    unscored = perturbdiff.train(screen, tmp_path / "unscored", hold_out=["pert_0"], overrides=TINY, score=False)
    assert unscored.scores is None
    assert "pert_0" not in unscored.model.perturbations


def test_training_from_python_is_the_same_as_by_words_and_files(tmp_path):
    """An AnnData and sections of settings, a path and words of the command line, single settings: the same weights."""
    screen = write_screen(tmp_path)
    adata, hold_out = anndata.read_h5ad(screen), "pert_0:type_1"
    sections: dict = {}
    for word in TINY:
        key, value = word.split("=")
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = int(value) if value.isdigit() else value
    runs = [
        perturbdiff.train(adata, tmp_path / "a", hold_out=[hold_out], **sections),
        perturbdiff.train(str(screen), str(tmp_path / "b"), hold_out=hold_out, overrides=TINY),
        perturbdiff.train(screen, tmp_path / "c", overrides=TINY, **{"split.hold_out": [hold_out]}),
        perturbdiff.train(screen, tmp_path / "d", hold_out=np.array([hold_out]), overrides=TINY),
    ]
    weights = [run.model.denoiser.state_dict() for run in runs]
    for other in weights[1:]:
        assert all((other[name] == weight).all() for name, weight in weights[0].items())
    assert len({run.scores.table() for run in runs}) == 1
    assert all((runs[0].folder / name).exists() for name in ("config.yaml", "scores.json", "predicted.h5ad"))


def test_what_is_no_screen_is_a_type_error(tmp_path):
    with pytest.raises(TypeError, match=r"screen \(int\) must be an AnnData or the path of an .h5ad"):
        perturbdiff.train(3, tmp_path / "run")


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real screens at {REAL_DATA}; set PERTURBDIFF_REAL_DATA")
def test_interferon_response_of_an_unseen_cell_type_is_better_than_no_change(tmp_path):
    words = ["training.n_steps=80", "data.n_hvg=null", "denoiser.width=96", "training.device=cpu"]
    given = {
        "out": str(tmp_path / "run"),
        "data": {"screen": str(REAL_DATA / "kang2018_pbmc_ifnb.h5ad")},
        "split": {"hold_out": ["IFN-beta:CD4T"]},
    }
    means = run(load_config(None, words, given)).scores.means()
    assert means.loc[MODEL, "pearson_delta"] > 0.7
    assert means.loc[MODEL, "energy_distance"] < 0.7 * means.loc["no change", "energy_distance"]
