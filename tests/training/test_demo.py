import json
import os
from pathlib import Path

import pytest

from perturbdiff.config import load_config
from perturbdiff.evaluation.report import MODEL
from perturbdiff.model import PerturbDiff
from perturbdiff.training.demo import run_demo
from tests.simulated import tiny_config, write_screen

REAL_DATA = Path(os.environ.get("PERTURBDIFF_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))


def test_the_demo_leaves_what_it_says_and_runs_again_to_the_same_scores(tmp_path):
    config = tiny_config(write_screen(tmp_path), tmp_path / "run")
    first = run_demo(config)
    assert all(path.exists() for path in first.written)
    model = PerturbDiff.from_pretrained(tmp_path / "run" / "model")
    assert model.evaluation == json.loads((tmp_path / "run" / "scores.json").read_text())
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"{model.evaluation['mean'][MODEL]['energy_distance']:.3f}" in card
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert [c["perturbation"] for c in split["conditions"]["test"]] == ["pert_0", "pert_0"]
    scores = (tmp_path / "run" / "scores.csv").read_bytes()
    run_demo(config)
    assert (tmp_path / "run" / "scores.csv").read_bytes() == scores


def test_a_perturbation_held_out_everywhere_is_refused_before_training(tmp_path):
    config = tiny_config(write_screen(tmp_path), tmp_path / "run", hold_out=("pert_0",))
    with pytest.raises(ValueError, match="held out in every context"):
        run_demo(config)
    assert not (tmp_path / "run").exists()


def test_nothing_held_out_is_refused_before_training(tmp_path):
    config = tiny_config(write_screen(tmp_path), tmp_path / "run", hold_out=())
    with pytest.raises(ValueError, match="nothing is held out"):
        run_demo(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real screens at {REAL_DATA}; set PERTURBDIFF_REAL_DATA")
def test_interferon_response_of_an_unseen_cell_type_is_better_than_no_change(tmp_path):
    words = ["training.n_steps=80", "data.n_hvg=1000", "denoiser.width=96", "training.device=cpu"]
    given = {
        "out": str(tmp_path / "run"),
        "data": {"screen": str(REAL_DATA / "kang2018_pbmc_ifnb.h5ad")},
        "split": {"hold_out": ["IFN-beta:CD4T"]},
    }
    means = run_demo(load_config(None, words, given)).report.means()
    assert means.loc[MODEL, "pearson_delta"] > 0.7
    assert means.loc[MODEL, "energy_distance"] < 0.7 * means.loc["no change", "energy_distance"]
