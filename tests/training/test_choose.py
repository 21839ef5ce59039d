"""A recipe is chosen by training conditions that are left out, never by those that are held out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import anndata
import numpy as np
import pytest
import torch

from perturbdiff.config import load_config
from perturbdiff.data.simulate import simulate
from perturbdiff.means.newness import New
from perturbdiff.model import PerturbDiff
from perturbdiff.training.choose import CANDIDATES, CHOICE, SCORED, Choice, candidates
from perturbdiff.training.loop import fit
from perturbdiff.training.run import finetune, train
from tests.processes import PATIENCE
from tests.simulated import SIMULATION, TINY

pytestmark = pytest.mark.slow

HELD_OUT = "batch=batch_2"
FAST = ["training.device=cpu", "data.set_size=8", "data.sets_per_batch=4", "optim.warmup_steps=0"]


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("choose") / "screen.h5ad"
    simulate(replace(SIMULATION, n_batches=3), path)
    return path


@pytest.fixture(scope="module")
def run(screen, tmp_path_factory):
    return train(screen, tmp_path_factory.mktemp("choose") / "run", hold_out=HELD_OUT, overrides=TINY)


def choice_of(folder: Path) -> dict:
    return json.loads((folder / CHOICE).read_text())


def test_every_recipe_and_word_of_a_candidate_is_known(screen):
    for new in get_args(New):
        for n_perturbations in (1, 2, 3, 100):
            for of in candidates(new, n_perturbations):
                for sampling in of.samplings:
                    load_config(of.recipe, [*of.words, *sampling], {"out": "unused", "data": {"screen": str(screen)}})


def test_the_best_by_left_out_conditions_is_trained(run):
    choice = choice_of(run.folder)
    assert choice["n_new"] == {"batch": 6}
    assert choice["left_out"] == "batch"
    assert {len(row["sums"]) for row in choice["scores"]} == {2}
    # from the ladder's mean with the network or without, and from controls with two weights of it
    assert len(choice["scores"]) == 4
    usual = min((row for row in choice["scores"] if row["candidate"] == 0), key=lambda row: row["sum"])
    better = [row for row in choice["scores"] if all(a < b for a, b in zip(row["sums"], usual["sums"], strict=True))]
    best = min(better, key=lambda row: row["sum"]) if better else usual
    assert (choice["recipe"], choice["words"]) == (best["recipe"], best["words"])
    config = load_config(run.folder / "config.yaml")
    assert config == load_config(
        choice["recipe"], [*choice["words"], *TINY],
        {"out": str(run.folder), "data": {"screen": config.data.screen}, "split": {"hold_out": [HELD_OUT]}},
    )  # fmt: skip
    assert run.model.config.sampling == config.sampling
    assert run.scores is not None
    assert run.scores.n_conditions == 6
    assert run.folder / CHOICE in run.written


def test_each_candidate_left_out_a_training_batch_and_kept_no_weights(run):
    folders = sorted((run.folder / CANDIDATES).glob("*/*"))
    assert len(folders) == 4
    for folder in folders:
        split = json.loads((folder / "split.json").read_text())
        assert len({condition["batch"] for condition in split["conditions"]["test"]}) == 1
        assert "batch_2" not in {condition["batch"] for of in split["conditions"].values() for condition in of}
        assert load_config(folder / "config.yaml").training.n_steps == 3  # of the six that the user asked for
        assert not (folder / "states").exists()
        assert not (folder / "model").exists()


def test_scores_are_those_of_the_model_and_the_fold_alone(run, screen, tmp_path):
    """What was held out, and the controls that measure its truth, may hold anything."""
    adata = anndata.read_h5ad(screen)
    reserved = json.loads((run.folder / "split.json").read_text())["cells"]
    others = adata.obs_names.isin([*reserved["test"], *reserved["controls"]])
    assert others.sum() > 6 * 20
    generator = np.random.default_rng(1)
    X = adata.X.toarray() if hasattr(adata.X, "toarray") else np.asarray(adata.X)
    X[others] = generator.permuted(X[others], axis=1) + generator.integers(0, 3, X[others].shape)
    adata.X = X
    other = train(adata, tmp_path / "run", hold_out=HELD_OUT, overrides=TINY)
    assert choice_of(other.folder)["scores"] == choice_of(run.folder)["scores"]
    assert (
        other.scores.means().loc["no change", "energy_distance"]
        != run.scores.means().loc["no change", "energy_distance"]
    )


def test_the_same_command_takes_what_was_chosen_and_trains_no_candidate_again(run, screen, capsys):
    before = {path: path.stat().st_mtime_ns for path in (run.folder / CANDIDATES).rglob("*")}
    again = train(screen, run.folder, hold_out=HELD_OUT, overrides=TINY)
    said = capsys.readouterr().out
    assert "chosen      --recipe new_batch" in said
    assert {path: path.stat().st_mtime_ns for path in (run.folder / CANDIDATES).rglob("*")} == before
    for x, y in zip(again.model.denoiser.parameters(), run.model.denoiser.parameters(), strict=True):
        assert torch.equal(x, y)


def test_other_settings_are_refused_by_name(run, screen, tmp_path):
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.0007, is 0\.5"):
        train(screen, run.folder, hold_out=HELD_OUT, overrides=[*TINY, "optim.lr=0.5"])
    half = tmp_path / "half"
    done = next((run.folder / CANDIDATES).glob("new_batch/0"))
    (half / CANDIDATES / "new_batch" / "0").mkdir(parents=True)
    (half / CANDIDATES / "new_batch" / "0" / SCORED).write_bytes((done / SCORED).read_bytes())
    with pytest.raises(ValueError, match=r"trained with other settings or data \(optim.lr\)"):
        train(screen, half, hold_out=HELD_OUT, overrides=[*TINY, "optim.lr=0.5"])


def test_a_run_whose_recipe_was_given_is_not_taken_for_one_that_chose(screen, tmp_path):
    train(screen, tmp_path / "run", hold_out=HELD_OUT, recipe="new_batch", overrides=TINY, score=False)
    with pytest.raises(ValueError, match="whose recipe was given; give its settings"):
        train(screen, tmp_path / "run", hold_out=HELD_OUT, overrides=TINY)
    assert not (tmp_path / "run" / CANDIDATES).exists()


def test_what_a_user_gives_wins_and_leaves_fewer_candidates(screen, tmp_path):
    words = [*TINY, "diffusion.start=controls", "sampling.guidance_scale=0.25", "training.n_steps=4"]
    run = train(screen, tmp_path / "run", hold_out=HELD_OUT, overrides=words, score=False)
    assert len(choice_of(run.folder)["scores"]) == 2  # one start: network weights alone differ
    assert run.model.config.diffusion.start == "controls"
    assert run.model.config.sampling.guidance_scale == 0.25
    assert run.step == 4


def test_a_candidate_that_cannot_be_trained_is_left_out_and_named(screen, tmp_path, monkeypatch, capsys):
    def diverges(config, *args, **kwargs):
        if config.diffusion.start == broken and CANDIDATES in Path(config.out).parts:
            raise FloatingPointError("the loss is not finite at step 3")
        return fit(config, *args, **kwargs)

    monkeypatch.setattr("perturbdiff.training.choose.fit", diverges)
    for broken, kept in (("controls", "mean"), ("mean", "controls")):
        run = train(screen, tmp_path / broken, hold_out=HELD_OUT, overrides=TINY, score=False)
        assert run.model.config.diffusion.start == kept
        assert "the loss is not finite at step 3" in capsys.readouterr().out
        (why,) = choice_of(run.folder)["failed"].values()
        assert why == "the loss is not finite at step 3"
    broken = "mean"
    with pytest.raises(FloatingPointError, match="no candidate could be trained: the loss is not finite"):
        train(screen, tmp_path / "none", hold_out=HELD_OUT, overrides=[*TINY, "diffusion.start=mean"], score=False)


def test_a_budget_buys_folds(screen, tmp_path):
    run = train(screen, tmp_path / "little", hold_out="pert_0:type_0", overrides=TINY, score=False, budget=1e-9)
    assert {len(row["sums"]) for row in choice_of(run.folder)["scores"]} == {1}
    run = train(screen, tmp_path / "much", hold_out="pert_0:type_0", overrides=TINY, score=False, budget=60)
    assert {len(row["sums"]) for row in choice_of(run.folder)["scores"]} == {4}  # pert_1, pert_2, in two


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_a_budget_of_no_time_is_refused_before_anything_is_written(screen, tmp_path, budget):
    with pytest.raises(ValueError, match=r"budget \(.+\) must be more than 0 minutes"):
        train(screen, tmp_path / "run", hold_out="pert_0:type_0", overrides=TINY, score=False, budget=budget)
    assert not (tmp_path / "run").exists()


def test_a_budget_where_nothing_is_chosen_is_refused(screen, tmp_path):
    for words in ({"recipe": "new_batch", "hold_out": HELD_OUT}, {}):
        with pytest.raises(ValueError, match=r"budget \(3\) is for choosing a recipe, and none is chosen where"):
            train(screen, tmp_path / "run", overrides=TINY, budget=3, **words)
    assert not (tmp_path / "run").exists()


def test_nothing_to_leave_out_is_said(screen, tmp_path, capsys):
    adata = anndata.read_h5ad(screen)
    adata = adata[(adata.obs["cell_type"] == "type_0") & (adata.obs["batch"] != "batch_1")].copy()
    run = train(adata, tmp_path / "run", hold_out=HELD_OUT, overrides=TINY, score=False)
    said = capsys.readouterr().out
    assert "no training condition can be left out" in said
    assert "what the network changes of a mean response is not known" in said
    assert (choice_of(run.folder)["recipe"], choice_of(run.folder)["words"]) == (
        "new_batch",
        ["sampling.network_weight=0"],
    )
    assert run.model.config.sampling.network_weight == 0
    words = [*TINY, "sampling.network_weight=1"]
    run = train(adata, tmp_path / "own", hold_out=HELD_OUT, overrides=words, score=False)
    assert (choice_of(run.folder)["words"], run.model.config.sampling.network_weight) == ([], 1)
    assert "what the network changes" not in capsys.readouterr().out


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {}])
def test_choosing_is_for_one_screen_on_one_process(screen, tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    origin = {"screen": screen} if environment else {"atlases": tmp_path}
    with pytest.raises(ValueError, match=r"give --recipe: cross_cell_type"):
        train(out=tmp_path / "run", hold_out=HELD_OUT, overrides=TINY, **origin)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_predicted_is_refused_before_anything_is_tried(screen, tmp_path):
    with pytest.raises(ValueError, match="features of perturbations"):
        train(screen, tmp_path / "run", hold_out="pert_0", overrides=TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_at_any_point_the_same_command_goes_on(screen, run, tmp_path, number):
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "perturbdiff", "train", "--screen", str(screen), "--hold-out", HELD_OUT,
        "--out", str(out), *TINY,
    ]  # fmt: skip
    for awaited in ("new_batch/0/metrics.jsonl", "new_batch_diffusion_start_controls/0/scored.json"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        deadline = time.monotonic() + PATIENCE
        while not (out / CANDIDATES / awaited).exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=PATIENCE)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert choice_of(out)["scores"] == choice_of(run.folder)["scores"]
    model = PerturbDiff.from_pretrained(out / "model", device="cpu")
    for x, y in zip(model.denoiser.parameters(), run.model.denoiser.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_checkpoint_that_tuning_spoils_is_not_tuned(screen, tmp_path):
    words = [*FAST, "diffusion.start=controls"]  # a mean that is told cannot be spoilt
    run = train(screen, tmp_path / "run", hold_out=HELD_OUT, recipe="new_batch", overrides=[*TINY, *words], score=False)
    tuned = finetune(
        screen, run.folder / "model", tmp_path / "tuned", hold_out=HELD_OUT, overrides=["optim.lr=0.3", *words]
    )
    choice = choice_of(tuned.folder)
    assert {row["recipe"].split("/")[0] for row in choice["scores"]} == {"finetune", "train"}
    best: dict[tuple[str, bool], float] = {}
    for row in choice["scores"]:
        kind = row["recipe"].split("/")[0], "training.n_steps=0" in row["words"]
        best[kind] = min(row["sum"], best.get(kind, np.inf))
    assert best["finetune", True] < best["finetune", False]
    assert (choice["recipe"] == "finetune/new_screen") <= ("training.n_steps=0" in choice["words"])
    kept = finetune(
        screen, run.folder / "model", tmp_path / "kept", hold_out=HELD_OUT, recipe="new_screen",
        overrides=["training.n_steps=0", *words],
    )  # fmt: skip
    assert kept.step == 0
    assert kept.scores is not None
    for name, weights in kept.model.denoiser.state_dict().items():
        assert torch.equal(weights, run.model.denoiser.state_dict()[name])


def test_the_table_marks_what_is_usual_and_what_was_chosen():
    def row(candidate, total, *words):
        numbers = {"sum": total, "sums": [total], "energy_distance": 0.5, "pearson_delta": 0.9}
        return {"candidate": candidate, "recipe": "new_batch", "words": list(words), **numbers}

    scores = [row(0, 0.3, "training.n_steps=9"), row(0, 0.4), row(1, 0.2, "diffusion.start=mean")]
    choice = Choice("new_batch", ["training.n_steps=9"], {"batch": 1}, "batch", scores, 1.0)
    assert [line[:8] for line in choice.text().splitlines()[5:8]] == ["   0.200", "u* 0.300", "u  0.400"]
