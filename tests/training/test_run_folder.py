"""Which runs go on in a folder: those of the same content and settings, whatever their data are called by now."""

import json
import os
import re
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

import perturbdiff
from perturbdiff.config import DataConfig, load_config
from perturbdiff.data.screen import Screen
from perturbdiff.files import set_aside
from perturbdiff.model import PerturbDiff
from perturbdiff.training import loop
from perturbdiff.training.loop import fit
from perturbdiff.training.run_folder import leave_marker
from tests.atlases import atlas_of_screen
from tests.localhub.client import led_to
from tests.localhub.server import LocalHub, Repo
from tests.simulated import DEFAULTS, TINY, tiny_config, write_screen

HOLD_OUT = ("pert_0:type_0",)


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return write_screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def straight(screen, tmp_path_factory):
    """A run that nothing stopped."""
    return fit(tiny_config(screen, tmp_path_factory.mktemp("straight") / "run")).folder


@pytest.fixture
def stopped(screen, tmp_path):
    fit(tiny_config(screen, tmp_path / "run"), stop_at=2)
    return tmp_path / "run"


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["lr"]) for line in lines if "loss" in line}


def same_weights(a, b):
    one, other = (PerturbDiff.from_pretrained(run / "model", device="cpu").denoiser.state_dict() for run in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_stopped_run_says_why_and_where_until_it_goes_on(tmp_path):
    config = tiny_config(write_screen(tmp_path), tmp_path / "run", "training.keep_last_state=true")
    fit(config, stop_at=2)
    marker = tmp_path / "run" / "stopped.json"
    assert json.loads(marker.read_text()) == {"stopped_by": "stop_at=2", "step": 2}
    (tmp_path / "run" / ".model-left").mkdir()  # by a kill during a save
    fit(config)
    assert not marker.exists()
    assert not (tmp_path / "run" / ".model-left").exists()
    set_aside(tmp_path / "run" / "states" / "step_00000002")  # by a kill when the last state was saved
    fit(config)
    assert [path.name for path in (tmp_path / "run" / "states").iterdir()] == ["step_00000006"]


def test_a_model_that_a_kill_amid_a_save_left_under_no_name_is_there_when_the_run_goes_on(stopped, screen, monkeypatch):
    set_aside(stopped / "model")
    seen, prepare = [], loop.prepare

    def looking(*given, **more):
        seen.append((stopped / "model" / "config.json").is_file())
        return prepare(*given, **more)

    monkeypatch.setattr(loop, "prepare", looking)
    assert fit(tiny_config(screen, stopped)).step == 6
    assert seen == [True]
    assert list(stopped.glob(".model*")) == []


@pytest.mark.parametrize("name", ["data.json", "split.json"])
def test_what_a_run_kept_of_its_data_is_named_where_it_is_damaged(screen, stopped, name):
    (stopped / name).write_text("")
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON"):
        fit(tiny_config(screen, stopped))


def test_a_model_folder_is_no_run_folder(screen, straight):
    before = sorted((straight / "model").iterdir())
    with pytest.raises(FileExistsError, match=r"out \(.*model\) is a model folder; choose another run folder"):
        fit(tiny_config(screen, straight / "model"))
    assert sorted((straight / "model").iterdir()) == before


def test_a_marker_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    leave_marker(tmp_path, "SIGTERM", 3)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        leave_marker(tmp_path, "SIGUSR1", 9)
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"stopped_by": "SIGTERM", "step": 3}


# ---------------------------------------------------------------- data, by content


@pytest.mark.slow
def test_a_screen_goes_on_under_another_name_in_another_order_and_from_memory(screen, straight, stopped, tmp_path):
    adata = anndata.read_h5ad(screen)
    moved = adata[np.random.default_rng().permutation(adata.n_obs)].copy()
    moved.layers["counts"], moved.X = moved.X.copy(), moved.X * 2
    moved.write_h5ad(tmp_path / "moved.h5ad")
    words = ["data.layer=counts", "data.input_kind=counts"]
    fit(tiny_config(tmp_path / "moved.h5ad", stopped, *words), stop_at=4)
    result = perturbdiff.train(adata, stopped, hold_out=HOLD_OUT, recipe=DEFAULTS, overrides=TINY, score=False)
    assert (result.step, result.stopped_by) == (6, None)
    assert losses(stopped) == losses(straight)
    assert same_weights(stopped, straight)


def reversed_x(adata):
    adata.X = adata.X.toarray()[::-1].copy()


def renamed_gene(adata):
    adata.var_names = ["other", *adata.var_names[1:]]


def fewer_cells(adata):
    adata._inplace_subset_obs(np.arange(adata.n_obs - 1))


def swapped_labels(adata):
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace({"pert_1": "pert_2", "pert_2": "pert_1"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (reversed_x, r"other X in .+ than in \S+screen\.h5ad"),
        (renamed_gene, r"other genes in .+ than in \S+"),
        (fewer_cells, r"number of cells was 360, is 359"),
        (swapped_labels, r"other labels in .+ than in \S+"),
    ],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_screen_of_other_content_is_refused_with_what_differs(screen, stopped, tmp_path, change, said, in_memory):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    adata = anndata.read_h5ad(screen)
    change(adata)
    adata.write_h5ad(tmp_path / "changed.h5ad")
    origin = adata if in_memory else tmp_path / "changed.h5ad"
    with pytest.raises(ValueError, match=rf"are not those it was started with \({said}\); give those .* another --out"):
        perturbdiff.train(origin, stopped, hold_out=HOLD_OUT, recipe=DEFAULTS, overrides=TINY, score=False)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_features_of_perturbations_are_compared_by_their_values(screen, tmp_path):
    def table(folder, values):
        folder.mkdir()
        rows = "".join(f"pert_{i},{value},1\n" for i, value in enumerate(values))
        (folder / "known.csv").write_text(f"name,a,b\n{rows}")
        return f"data.perturbation_features=[{folder / 'known.csv'}]"

    run = tmp_path / "run"
    fit(tiny_config(screen, run, table(tmp_path / "a", [1, 2, 3])), stop_at=2)
    with pytest.raises(ValueError, match=r"data\.perturbation_features were known, have other values"):
        fit(tiny_config(screen, run, table(tmp_path / "b", [1, 2, 4])))
    assert fit(tiny_config(screen, run, table(tmp_path / "c", [1, 2, 3]))).step == 6


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on_and_has_a_record_afterwards(screen, stopped):
    (stopped / "data.json").unlink()
    fit(tiny_config(screen, stopped), stop_at=4)
    assert json.loads((stopped / "data.json").read_text())["screen"]["n_cells"] == 360


# ---------------------------------------------------------------- atlases


@pytest.fixture
def atlas(screen, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    read = Screen.read(screen, DataConfig(screen=str(screen)))
    return atlas_of_screen(tmp_path / "atlas", read, rows_per_shard=97)


def on_atlas(out, path, stop_at=None, words=(), **settings):
    given = {"out": str(out), "data": {"atlases": [{"path": str(path), **settings}]}}
    return fit(load_config(None, [*TINY, "split.hold_out=[pert_0:type_0]", *words], given), stop_at=stop_at)


@pytest.mark.slow
def test_an_atlas_goes_on_under_another_path_and_with_what_plan_expects(atlas, tmp_path, monkeypatch):
    run, straight = tmp_path / "run", on_atlas(tmp_path / "straight", atlas).folder
    on_atlas(run, atlas, stop_at=2)
    monkeypatch.chdir(tmp_path)
    on_atlas(run, "atlas", stop_at=3)
    shutil.move(atlas, tmp_path / "moved")
    result = on_atlas(run, tmp_path / "moved", expected={"cells": 1, "genes": 40, "genes_per_cell": 3})
    assert result.step == 6
    assert losses(run) == losses(straight)
    with pytest.raises(ValueError, match=r"data\.atlases\[0\]\.sets was 'perturbed', is 'marginal'"):
        on_atlas(run, tmp_path / "moved", sets="marginal")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_a_repo_goes_on_at_the_commit_of_its_start_after_another_push(screen, atlas, tmp_path):
    straight = on_atlas(tmp_path / "straight", atlas).folder
    adata, repo, run = anndata.read_h5ad(screen), Repo(), tmp_path / "run"
    reversed_x(adata)
    other = atlas_of_screen(tmp_path / "other", Screen.read(adata, DataConfig(screen="unused")), rows_per_shard=97)
    with LocalHub() as hub, led_to(hub, tmp_path / "home"):
        hub.datasets["lab/atlas"] = repo
        first = repo.commit(atlas)
        repo.tags["v1"] = first
        on_atlas(run, "lab/atlas", stop_at=2)
        assert json.loads((run / "data.json").read_text())["atlases"][0]["commit"] == first
        second = repo.commit(other)
        on_atlas(run, "lab/atlas", stop_at=3)
        on_atlas(run, "lab/atlas", stop_at=4, revision="v1")
        on_atlas(run, atlas, stop_at=5)  # a folder of the same files
        with pytest.raises(ValueError, match=rf"at commit {first}: path: lab/atlas, revision: {first}\); give those"):
            on_atlas(run, "lab/atlas", revision="main")
        assert on_atlas(run, "lab/atlas").step == 6
        assert on_atlas(tmp_path / "new", "lab/atlas").step == 6
        assert json.loads((tmp_path / "new" / "data.json").read_text())["atlases"][0]["commit"] == second
    assert losses(run) == losses(straight)
    assert losses(tmp_path / "new") != losses(straight)


# ---------------------------------------------------------------- settings


@pytest.mark.slow
def test_settings_that_move_no_weight_may_change(screen, straight, stopped):
    words = ["training.validate_every=3", "training.validate_sets=5", "training.device=auto", "training.keep_states=3"]
    if torch.cuda.is_available():
        words.remove("training.device=auto")  # there the last digits move
    assert fit(tiny_config(screen, stopped, *words)).step == 6
    assert losses(stopped) == losses(straight)
    assert same_weights(stopped, straight)


@pytest.mark.slow
def test_where_validation_chooses_the_weights_its_settings_may_not_change(screen, tmp_path):
    words = ["training.early_stop_patience=9", "split.validation=[pert_1:type_1]"]
    fit(tiny_config(screen, tmp_path / "run", *words), stop_at=2)
    with pytest.raises(ValueError, match=r"to go on give training\.validate_every=2 \("):
        fit(tiny_config(screen, tmp_path / "run", *words, "training.validate_every=3"))


def words_to_go_on(error):
    return re.search(r"to go on give (.*) \(\S+config\.yaml is a recipe of all\), or choose another --out", str(error))[
        1
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["optim.lr=0.1"],
        ["optim.lr=0.1", "training.seed=3", "denoiser.mean_effect=true"],
        ["training.n_steps=4"],
        ["training.n_steps=9"],
        ["split.validation=[pert_1:type_1]"],
        ["training.early_stop_patience=3"],
    ],
)
def test_the_words_that_a_refusal_names_go_on(screen, stopped, words):
    with pytest.raises(ValueError, match="was made with other settings") as refused:
        fit(tiny_config(screen, stopped, *words))
    named = [word.strip("'") for word in words_to_go_on(refused.value).split(" ")]
    assert {word.split("=")[0] for word in named} >= {words[0].split("=")[0]} - {"training.n_steps"}
    assert fit(tiny_config(screen, stopped, *words, *named), stop_at=3).step == 3


@pytest.mark.slow
def test_the_settings_of_the_folder_are_a_recipe_that_goes_on(screen, straight, stopped):
    perturbdiff.train(screen, stopped, recipe=stopped / "config.yaml", score=False)
    assert same_weights(stopped, straight)


# ---------------------------------------------------------------- more steps


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [3, None])
def test_more_steps_are_those_of_a_run_that_had_them_from_the_start(screen, tmp_path, capsys, stop_at):
    """Wherever it was stopped: the first steps are as before, and the rate stays where it fell to."""
    run, once, words = tmp_path / "run", tmp_path / "once", ["training.n_steps=9", "optim.schedule_steps=6"]
    fit(tiny_config(screen, run, "optim.warmup_steps=2", "training.keep_last_state=true"), stop_at=stop_at)
    with pytest.raises(ValueError, match=r"with training\.n_steps=9 the learning rate would have been another") as no:
        fit(tiny_config(screen, run, "optim.warmup_steps=2", "training.n_steps=9"))
    assert words_to_go_on(no.value) == words[1]
    fit(tiny_config(screen, run, "optim.warmup_steps=2", *words), stop_at=8)
    assert "schedule    the learning rate falls over 6 steps; it is 5e-05 in the last one\n" in capsys.readouterr().out
    assert fit(tiny_config(screen, run, "optim.warmup_steps=2", *words)).step == 9
    fit(tiny_config(screen, once, "optim.warmup_steps=2", *words))
    assert losses(run) == losses(once)
    assert same_weights(run, once)
    rates = [lr for _, lr in losses(run).values()]
    assert rates[5:] == pytest.approx([0.1 * 5e-4] * 4)
    assert rates[4] > rates[5]
    with pytest.raises(ValueError, match=r"training\.n_steps was 9, is 6") as shorter:
        fit(tiny_config(screen, run, "optim.warmup_steps=2"))
    assert set(words_to_go_on(shorter.value).split()) == set(words)


def test_a_rate_that_stays_at_zero_is_refused():
    with pytest.raises(ValueError, match=r"optim\.schedule_steps \(3\) under training\.n_steps \(6\) must come with"):
        tiny_config(Path("x"), Path("y"), "optim.schedule_steps=3", "optim.min_lr_ratio=0")


def test_a_finished_run_keeps_its_model_and_no_state_that_could_go_on(tmp_path):
    screen = write_screen(tmp_path)
    first = fit(tiny_config(screen, tmp_path / "run", "training.save_every=2"))
    (state,) = (tmp_path / "run" / "states").iterdir()
    assert [path.name for path in state.iterdir()] == ["state.json"]
    again = fit(tiny_config(screen, tmp_path / "run"))
    assert (again.step, again.stopped_by) == (6, None)
    for own, other in zip(first.model.denoiser.parameters(), again.model.denoiser.parameters(), strict=True):
        assert torch.equal(own, other)
    (tmp_path / "run" / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="is done and its model is gone; put it back"):
        fit(tiny_config(screen, tmp_path / "run"))
    (tmp_path / "elsewhere").rename(tmp_path / "run" / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for words in (["training.n_steps=8"], ["training.n_steps=8", "optim.schedule_steps=6"]):
        with pytest.raises(ValueError, match=r"kept no state.*keep_last_state.*--init-from"):
            fit(tiny_config(screen, tmp_path / "run", *words))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
