"""Bad input at the command line: exit code 2, one line on stderr that names value and remedy, and nothing written."""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import anndata
import h5py
import numpy as np
import pytest

from perturbdiff.cli.command import HelpText
from perturbdiff.cli.main import _parser, main
from perturbdiff.hub.model_folder import config_hash
from tests.processes import PATIENCE
from tests.screens import ROOT, counts_screen, log1p_cp10k, written
from tests.simulated import DEFAULTS
from tests.trust.attacks import ESCAPES

TINY = [
    "training.device=cpu", "training.n_steps=2", "training.log_every=1", "data.set_size=8", "data.sets_per_batch=4",
    "denoiser.width=16", "denoiser.depth=1", "denoiser.n_heads=2", "sampling.n_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return written(counts_screen(n_genes=30, n=8), tmp_path_factory.mktemp("screen") / "screen.h5ad")


@pytest.fixture(scope="module")
def run(screen, tmp_path_factory):
    """The folder of a run with A:NK held out."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    main(["train", "--screen", str(screen), "--hold-out", "A:NK", "--out", str(folder), "--recipe", DEFAULTS, *TINY])
    return folder


@pytest.fixture(scope="module")
def predicted(run, screen, tmp_path_factory):
    path = tmp_path_factory.mktemp("predicted") / "predicted.h5ad"
    main(["predict", str(run / "model"), "--controls", str(screen), "--perturbation", "A", "--out", str(path)])
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Runs a command that must fail; gives its one line and checks that no file came, went or changed."""

    def check(*argv):
        before = contents(here)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        assert stop.value.code == 2
        assert contents(here) == before
        return only_line(capsys.readouterr().err)

    return check


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def only_line(stderr):
    assert re.fullmatch(r"perturbdiff: error: [^\n]+\n", stderr), stderr
    return stderr


def assert_says(line, *pieces):
    for piece in pieces:
        assert piece in line


# ---------------------------------------------------------------- screens


def with_value(value, gene=4):
    def change(adata):
        X = adata.X.toarray().astype(np.float64)
        X[3, gene] = value
        adata.X = X
        return adata

    return change


def with_x(function):
    def change(adata):
        adata.X = function(adata.X.toarray().astype(np.float64))
        return adata

    return change


def without_controls_of_nk(adata):
    return adata[~((adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "NK"))].copy()


def without_controls_of_nk_b2(adata):
    obs = adata.obs
    return adata[~((obs["perturbation"] == "control") & (obs["cell_type"] == "NK") & (obs["batch"] == "b2"))].copy()


BAD_SCREENS = {
    "negative": (with_value(-3), [], ["gene 'gene_4'", "-3.0", "negative", "raw counts or log1p"]),
    "NaN": (with_value(np.nan), [], ["gene 'gene_4'", "nan", "not finite", "raw counts or log1p"]),
    "infinite": (with_value(np.inf), [], ["gene 'gene_4'", "inf", "not finite", "raw counts or log1p"]),
    "z-scored": (with_x(lambda x: (x - x.mean(0)) / x.std(0)), [], ["gene 'gene_", " holds -", "z-scored or scaled"]),
    "log1p declared as counts": (
        with_x(log1p_cp10k),
        ["data.input_kind=counts"],
        ["declared as counts but holds log1p of 10,000 counts a cell", "data.input_kind=log1p"],
    ),
    "counts declared as log1p": (
        with_value(700),
        ["data.input_kind=log1p"],
        ["declared as log1p but holds raw counts: gene 'gene_4' holds 700", "data.input_kind=counts"],
    ),
    "missing column": (
        lambda adata: adata,
        ["data.perturbation_col=gene"],
        ["obs column 'gene'", "['batch', 'cell_type', 'perturbation']", "Set data.perturbation_col"],
    ),
    "missing library size": (
        lambda adata: adata,
        ["data.library_size_col=total"],
        ["obs column 'total'", "['batch', 'cell_type', 'perturbation']", "Set data.library_size_col"],
    ),
    "control label absent": (
        lambda adata: adata,
        ["data.control_label=contrl"],
        ["'contrl'", "obs column 'perturbation'", "did you mean control?", "Set data.control_label"],
    ),
    "no cells": (lambda adata: adata[:0].copy(), [], ["no cell", "'control'", "Set data.control_label"]),
    "controls alone": (
        lambda adata: adata[adata.obs["perturbation"] == "control"].copy(),
        [],
        ["there are control cells only"],
    ),
    "a cell type without controls": (
        without_controls_of_nk,
        [],
        ["cell type 'NK'", "8 cells", "no control cells", "Add control cells of it, or drop these cells"],
    ),
    "a batch without controls": (
        without_controls_of_nk_b2,
        [],
        ["cell type 'NK', batch 'b2'; 8 cells", "no control cells", "Set data.control_match=cell_type"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words", "pieces"), BAD_SCREENS.values(), ids=BAD_SCREENS)
def test_training_refuses_a_screen(refused, here, change, words, pieces):
    path = written(change(counts_screen(n_genes=30, n=8)), here / "screen.h5ad")
    assert_says(refused("train", "--screen", path, "--out", here / "out", *TINY, *words), *pieces)


def same_gene_twice(path):
    with h5py.File(path, "r+") as file:
        file["var/_index"][1] = file["var/_index"][0]


def half_of_it(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def indices_outside(path):
    with h5py.File(path, "r+") as file:
        file["X/indptr"][2] = 10**6


BAD_FILES = {
    "no file": (lambda path: path.unlink(), ["screen.h5ad does not exist", "give the path of an .h5ad"]),
    "a text file": (lambda path: path.write_text("gene,cell\n"), ["screen.h5ad is not a readable .h5ad", "AnnData"]),
    "an empty file": (lambda path: path.write_bytes(b""), ["screen.h5ad is not a readable .h5ad", "AnnData"]),
    "truncated": (half_of_it, ["screen.h5ad is not a readable .h5ad", "truncated", "AnnData"]),
    "duplicate genes": (same_gene_twice, ["1 duplicate gene names", "gene_0", "var_names_make_unique"]),
    "damaged indices": (indices_outside, ["damaged sparse matrix", "again"]),
}


@pytest.mark.parametrize("command", ["train", "screen info", "predict"])
@pytest.mark.parametrize("kind", BAD_FILES)
# anndata says so too, before we do
@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
def test_a_file_that_cannot_be_used_is_refused_by_every_command(refused, here, screen, run, command, kind):
    damage, pieces = BAD_FILES[kind]
    path = here / "screen.h5ad"
    shutil.copy(screen, path)
    damage(path)
    argv = {
        "train": ["train", "--screen", path, "--out", here / "out", *TINY],
        "screen info": ["screen", "info", path],
        "predict": ["predict", run / "model", "--controls", path, "--perturbation", "A", "--out", here / "p.h5ad"],
    }
    assert_says(refused(*argv[command]), *pieces)


def test_a_message_of_several_lines_becomes_one(refused):
    assert_says(refused("screen", "info", "two\nlines.h5ad"), "two lines.h5ad does not exist")


# ---------------------------------------------------------------- settings


BAD_SETTINGS = {
    "unknown key": (["training.n_stps=5"], ["'n_stps'", "Did you mean: 'n_steps'", "training.n_stps"]),
    "bad value": (["training.n_steps=many"], ["'many'", "Integer", "training.n_steps"]),
    "out of range": (["training.n_steps=-1"], ["training.n_steps (-1)", "not be negative"]),
    "not a choice": (["data.input_kind=raw"], ["'raw'", "['auto', 'counts', 'log1p']", "data.input_kind"]),
    "not a pair": (["training.n_steps"], ["'training.n_steps'", "key=value"]),
    "bad yaml": (["split.hold_out=[@x]"], ["'[@x]'", "quote it"]),
    "negative seed": (["training.seed=-1"], ["training.seed (-1)", "must not be negative"]),
    "heads": (["denoiser.n_heads=5"], ["denoiser.n_heads (5) must divide", "twice denoiser.width (16)"]),
    "no recipe": (["--recipe", "none.yaml"], ["'none.yaml' is neither a file nor a name", "give the path of a .yaml"]),
    "unknown hold-out": (["--hold-out", "a+b:T"], ["'a+b'", "did you mean A+B", "PERTURBATION[:CELL_TYPE[:BATCH]]"]),
    "unknown cell type": (["--hold-out", "A:nk"], ["cell_type 'nk'", "did you mean NK?"]),
    "unknown validation": (["split.validation=[C]"], ["perturbation 'C'", "known: A, A+B, B"]),
    "all held out": (["--hold-out", "*"], ["['*']", "hold out less"]),
}


@pytest.mark.parametrize(("words", "pieces"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_training_refuses_settings(refused, here, screen, words, pieces):
    assert_says(refused("train", "--screen", screen, "--out", here / "out", *TINY, *words), *pieces)


def test_a_broken_recipe_is_refused(refused, here, screen):
    (here / "recipe.yaml").write_text("training: [")
    line = refused("train", "--screen", screen, "--out", here / "out", "--recipe", here / "recipe.yaml")
    assert_says(line, "recipe.yaml' is not yaml")


@pytest.mark.parametrize(
    "argv",
    [
        "train training.n_stps=1 --screen SCREEN --out out",
        "train --screen SCREEN training.n_stps=1 --out out",
        "train --screen SCREEN --out out training.n_stps=1",
        "train training.seed=1 --screen SCREEN optim.lr=0.1 --out out training.n_stps=1",
        "evaluate SCREEN training.n_stps=1 --screen SCREEN",
        "evaluate SCREEN --screen SCREEN training.n_stps=1",
        "screen info SCREEN training.n_stps=1",
        "demo --out out training.n_stps=1 --screen SCREEN",
    ],
)
def test_settings_may_stand_anywhere_among_the_options(refused, screen, argv):
    assert_says(refused(*argv.replace("SCREEN", str(screen)).split()), "'n_stps'")


@pytest.mark.parametrize(
    "argv",
    [
        "predict m --controls c --perturbation A --out o training.n_steps=1",
        "train --screen s --out o --learning-rate 1",
        "train --out o",
        "screen",
    ],
)
def test_words_that_no_command_knows_end_with_code_2(here, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv.split())
    assert stop.value.code == 2
    assert "perturbdiff" in capsys.readouterr().err
    assert contents(here) == {}


# ---------------------------------------------------------------- run folders and the demo


def test_a_run_folder_of_other_settings_is_refused_and_left_as_it_is(refused, here, screen, run):
    shutil.copytree(run, here / "run")
    words = ["--recipe", DEFAULTS, *TINY, "optim.lr=0.1"]
    line = refused("train", "--screen", screen, "--hold-out", "A:NK", "--out", "run", *words)
    assert_says(line, "run folder run was made with other settings", "optim.lr was 0.0005, is 0.1", "another --out")


def test_a_run_folder_that_is_a_file_is_refused(refused, here, screen):
    (here / "out").write_text("mine")
    assert_says(
        refused("train", "--screen", screen, "--out", "out", *TINY), "out (out) is a file", "another run folder"
    )


def test_the_demo_refuses_a_perturbation_that_is_held_out_everywhere(refused, screen):
    line = refused("demo", "--screen", screen, "--hold-out", "A", "--hold-out", "A+B", "--out", "out", *TINY)
    assert_says(line, "perturbation 'A' is held out in every context", "A:CELL_TYPE or batch=NAME")


def test_the_demo_on_a_screen_of_ones_own_asks_for_something_to_hold_out(refused, screen):
    line = refused("demo", "--screen", screen, "--out", "out", *TINY)
    assert_says(line, "nothing is held out; give --hold-out")


# ---------------------------------------------------------------- predict


def predict(run, screen, *words):
    return ["predict", run / "model", "--controls", screen, "--perturbation", "A", "--out", "p.h5ad", *words]


BAD_PREDICTIONS = {
    "unknown perturbation": (["--perturbation", "a"], ["perturbation 'a'", "did you mean A?", "2 known"]),
    "unknown part": (["--perturbation", "A+C"], ["perturbation 'C'", "known: A, B (2)"]),
    "no perturbation": (["--perturbation", ""], ["perturbation ''", "known: A, B (2)"]),
    "unknown cell type": (["--cell-type", "nk"], ["no control cell with cell_type 'nk'", "did you mean NK?"]),
    "unknown batch": (["--batch", "c"], ["no control cell with batch 'c'", "known: b1, b2 (2)"]),
    "no cells": (["--n-cells", "0"], ["n_cells (0)", "at least 1"]),
    "no populations": (["--n-populations", "0"], ["n_populations (0)", "at least 1"]),
    "too many steps": (["--steps", "1001"], ["n_steps (1001)", "between 1 and", "1000"]),
    "guidance": (["--guidance-scale", "nan"], ["guidance_scale (nan)", "finite"]),
    "negative seed": (["--seed", "-1"], ["seed (-1)", "must not be negative"]),
    "overlap": (["--min-gene-overlap", "nan"], ["min_gene_overlap (nan)", "between 0 and 1"]),
}


@pytest.mark.parametrize(("words", "pieces"), BAD_PREDICTIONS.values(), ids=BAD_PREDICTIONS)
def test_predicting_refuses(refused, run, screen, words, pieces):
    assert_says(refused(*predict(run, screen, *words)), *pieces)


def test_predicting_refuses_controls_with_too_few_of_the_models_genes(refused, here, run):
    adata = counts_screen(n_genes=30)
    adata.var_names = [*adata.var_names[:10], *(f"other_{g}" for g in range(20))]
    line = refused(*predict(run, written(adata, here / "controls.h5ad")))
    assert_says(line, "only 10 of the model's 30 genes (33%)", "min_gene_overlap (50%)", "gene_10", "or lower")


@pytest.mark.parametrize("change", ["negative", "NaN", "z-scored"])
def test_predicting_refuses_controls_as_training_does(refused, here, run, change):
    function, _, pieces = BAD_SCREENS[change]
    adata = function(counts_screen(n_genes=30))
    adata.obs["perturbation"] = "control"  # the spoiled cell too
    assert_says(refused(*predict(run, written(adata, here / "controls.h5ad"))), *pieces)


def test_an_existing_output_is_refused_before_the_work_and_replaced_only_on_request(refused, here, run, screen):
    (here / "p.h5ad").write_text("mine")
    assert_says(refused(*predict(run, screen)), "p.h5ad exists", "--overwrite")
    main([str(word) for word in predict(run, screen, "--overwrite")])
    assert anndata.read_h5ad(here / "p.h5ad").n_vars == 30
    assert [path.name for path in here.iterdir()] == ["p.h5ad"]  # nothing half-written stays beside it


# ---------------------------------------------------------------- model folders

HASHED = [
    "batches.json", "cell_types.json", "checks/golden.safetensors", "genes.json", "means.json", "model.safetensors",
    "perturbations.json", "evaluation.json", "preprocessing.json", "split.json", "training.json",
]  # fmt: skip


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-20]), ["sha256", "truncated or was changed"]),
    "one bit": (flip_a_bit, ["sha256", "truncated or was changed", "again"]),
    "empty": (lambda path: path.write_bytes(b""), ["sha256", "truncated or was changed", "again"]),
    "missing": (lambda path: path.unlink(), ["lacks", "incomplete", "again"]),
}


@pytest.fixture
def folder(here, run):
    """A run folder of which the model may be damaged."""
    shutil.copytree(run / "model", here / "run" / "model")
    return here / "run"


def test_every_file_of_a_model_folder_but_its_card_is_damaged_in_these_tests(run):
    files = {str(path.relative_to(run / "model")) for path in (run / "model").rglob("*") if path.is_file()}
    assert files == {*HASHED, "config.json", "README.md"}


@pytest.mark.parametrize(("damage", "pieces"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", HASHED)
def test_a_damaged_model_folder_is_refused(refused, folder, screen, name, damage, pieces):
    damage(folder / "model" / name)
    assert_says(refused(*predict(folder, screen)), name, *pieces)


def changed(path, value):
    def change(config):
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        config[last] = value

    return change


BAD_CONFIGS = {
    "newer format": (changed("format_version", 7), ["format_version 7", "reads 1 to 6", "Update perturbdiff"]),
    "no format": (lambda config: config.pop("format_version"), ["format_version None", "reads 1"]),
    "other width": (changed("denoiser.width", 32), ["does not fit its config.json", "(16, 30) (must be (32, 30))"]),
    "deeper": (changed("denoiser.depth", 3), ["does not fit its config.json", "blocks.1.", "missing"]),
    "absurd depth": (changed("denoiser.depth", 10**9), ["denoiser.depth (1000000000)", "at most 256"]),
    "no heads": (changed("denoiser.n_heads", 0), ["denoiser.n_heads (0)", "greater than 0"]),
    "unknown key": (changed("denoiser.layers", 3), ["unknown keys layers"]),
    "unknown choice": (changed("denoiser.output", "cross"), ["(cross)", "one of direct, control_residual"]),
    "interpolation": (changed("obs.batch", "${oc.env:HOME}"), ["is an interpolation"]),
    "unknown column": (changed("obs.donor", "x"), ["donor"]),
    "no sampling": (lambda config: config.pop("sampling"), ["lacks sampling"]),
    "no hashes": (changed("sha256", {}), ["sha256 must name the files", "missing"]),
    "fewer hashes": (lambda config: config["sha256"].pop("genes.json"), ["sha256 must name the files", "missing"]),
    "other steps": (changed("sampling.n_steps", 0), ["sampling.n_steps (0)", "greater than 0"]),
}


@pytest.mark.parametrize(("change", "pieces"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_json_that_does_not_fit_its_folder_is_refused(refused, folder, screen, change, pieces):
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    if "config.json" in config["sha256"]:
        config["sha256"]["config.json"] = config_hash(config)
    path.write_text(json.dumps(config))
    assert_says(refused(*predict(folder, screen)), *pieces)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff", "[" * 100_000])
def test_a_config_json_that_is_no_settings_is_refused(refused, folder, screen, content):
    (folder / "model" / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_says(refused(*predict(folder, screen)), "config.json")


def test_what_is_no_model_folder_is_refused_with_what_it_holds(refused, here, run, screen):
    line = refused(*predict(here / "nowhere", screen))
    assert_says(line, "no such folder here", "nowhere/model); give a folder made by save_pretrained")
    line = refused("predict", run / "states", "--controls", screen, "--perturbation", "A", "--out", "p.h5ad")
    assert_says(line, "is not a model folder: it has no config.json", "step_")


def test_the_folder_of_a_run_stands_for_its_model(here, run, screen):
    for i, model in enumerate((run, run / "model")):
        main(["predict", str(model), "--controls", str(screen), "--perturbation", "A", "--out", f"{i}.h5ad"])
    one, other = (anndata.read_h5ad(f"{i}.h5ad") for i in range(2))
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())


# ---------------------------------------------------------------- evaluate


def with_obs(column, value):
    def change(adata):
        adata.obs[column] = value

    return change


def without_batch(adata):
    del adata.obs["batch"]


def with_other_genes(adata):
    adata.var_names = [f"other_{g}" for g in range(adata.n_vars)]


BAD_EVALUATIONS = {
    "nothing in common": (
        with_obs("perturbation", "Z"),
        ["no predicted condition was measured", "Z:NK:b1", "A:NK:b1", "same words in both"],
    ),
    "no batch column": (
        without_batch,
        ["['batch']", "['cell_type', 'one_count', 'perturbation', 'population', 'source_control']"],
    ),
    "other genes": (with_other_genes, ["30 of the 30 predicted genes are not in", "other_0"]),
}


@pytest.mark.parametrize(("change", "pieces"), BAD_EVALUATIONS.values(), ids=BAD_EVALUATIONS)
def test_evaluating_refuses_predictions(refused, here, predicted, screen, change, pieces):
    adata = anndata.read_h5ad(predicted)
    change(adata)
    path = written(adata, here / "predicted.h5ad")
    assert_says(refused("evaluate", path, "--screen", screen, "--out", "scores"), *pieces)


def test_evaluating_refuses_counts_as_predictions(refused, screen):
    line = refused("evaluate", screen, "--screen", screen, "--out", "scores")
    assert_says(line, "holds raw counts", "log1p values, as `perturbdiff predict` writes them")


def test_evaluating_refuses_a_split_that_was_changed(refused, here, predicted, screen, run):
    content = json.loads((run / "split.json").read_text())
    content["cells"]["test"].pop()
    (here / "split.json").write_text(json.dumps(content))
    line = refused("evaluate", predicted, "--screen", screen, "--split", "split.json", "--out", "scores")
    assert_says(line, "split.json does not match its own sha256", "Take the one of the run folder")


def test_evaluating_refuses_a_split_of_another_screen(refused, here, predicted, run):
    adata = counts_screen(n_genes=30, n=8)
    adata.obs_names = [f"other_{name}" for name in adata.obs_names]
    other = written(adata, here / "other.h5ad")
    line = refused("evaluate", predicted, "--screen", other, "--split", run / "split.json", "--out", "scores")
    assert_says(line, "names 8 validation cells", "lacks 8 of them", "the screen the split was made for")


def test_evaluating_refuses_a_missing_split_and_a_file_as_output_folder(refused, here, predicted, screen):
    line = refused("evaluate", predicted, "--screen", screen, "--split", "none.json", "--out", "scores")
    assert_says(line, "none.json does not exist", "run folder")
    (here / "scores").write_text("mine")
    line = refused("evaluate", predicted, "--screen", screen, "--out", "scores")
    assert_says(line, "--out scores is a file", "give a folder")


# ---------------------------------------------------------------- the real command


def command(folder, *argv):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "perturbdiff", *map(str, argv)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_ends_with_code_2_and_one_line(tmp_path):
    done = command(tmp_path, "train", "--screen", "none.h5ad", "--out", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert_says(only_line(done.stderr), "none.h5ad does not exist")
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_the_command_refuses_a_damaged_model_with_code_2_and_one_line(tmp_path, run, screen):
    shutil.copytree(run / "model", tmp_path / "model")
    flip_a_bit(tmp_path / "model" / "genes.json")
    before = contents(tmp_path)
    done = command(tmp_path, "predict", "model", "--controls", screen, "--perturbation", "A", "--out", "p.h5ad")
    assert (done.returncode, done.stdout) == (2, "")
    assert_says(only_line(done.stderr), "genes.json", "sha256")
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path, here):
    done = command(tmp_path, "train", "--debug", "--screen", "none.h5ad", "--out", "out")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "FileNotFoundError: none.h5ad does not exist" in done.stderr
    with pytest.raises(FileNotFoundError):
        main(["screen", "info", "none.h5ad", "--debug"])


@pytest.mark.slow
def test_a_good_command_ends_with_code_0_and_a_clean_stderr(tmp_path, screen):
    done = command(tmp_path, "screen", "info", screen)
    assert (done.returncode, done.stderr) == (0, "")
    assert "140: 96 perturbed, 44 'control'" in done.stdout


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 3.6 TiB"), "there is not enough memory (Unable to allocate 3.6 TiB)"),
        (OverflowError("int too large to convert to float"), "a number is too large (int too large to"),
        (RecursionError("maximum recursion depth exceeded"), "what was read is nested too deeply"),
        (ValueError("model 'https://me:hf_secret@host/a' \x1b[2J"), r"model 'https://host/a' \x1b[2J"),
    ],
)
def test_what_a_file_brings_about_that_nobody_foresaw_is_one_line(refused, monkeypatch, error, said):
    def fails(name):
        raise error

    monkeypatch.setattr("perturbdiff.config.find_recipe", fails)
    assert said in refused("recipes", "x")


def test_names_of_strangers_do_nothing_to_a_terminal(here, capsys, monkeypatch):
    cells = counts_screen(n_genes=30, n=8)
    cells.obs[ESCAPES] = ESCAPES
    cells.var_names = [f"{ESCAPES}{i}" for i in range(cells.n_vars)]
    main(["screen", "info", str(written(cells, here / "loud.h5ad"))])
    main(["train", "--screen", "loud.h5ad", "--out", "loud", "--recipe", DEFAULTS, *TINY])
    main(["predict", "loud", "--controls", "loud.h5ad", "--perturbation", "B", "--out", "loud_predicted.h5ad"])
    main(["check", "loud", "loud.h5ad"])
    (here / "loud.csv").write_text(f"name,x\n{ESCAPES.replace(chr(13), '')},1\nB,2\n", encoding="utf-8")
    main(["features", "info", "loud.csv"])
    main(["hub", "info", "loud"])
    monkeypatch.setattr("perturbdiff.config.find_recipe", lambda name: here / "loud.csv")
    main(["recipes", "loud"])
    said = capsys.readouterr()
    assert said.out.count(r"\x1b[2J") >= 2
    assert all(line.isprintable() for line in said.out.split("\n"))
    assert all(line.isprintable() for line in re.split(r"[\n\r]", said.err))


@pytest.mark.parametrize(
    "words",
    [
        ["hub", "info", "ADDRESS"],
        ["hub", "pull", "ADDRESS", "--out", "x"],
        ["atlas", "info", "ADDRESS"],
        ["atlas", "pull", "ADDRESS", "--out", "x"],
        ["predict", "ADDRESS", "--controls", "x.h5ad", "--out", "o.h5ad", "--perturbation", "A"],
        ["train", "--atlas", "ADDRESS", "--out", "secret"],
        ["finetune", "--screen", "SCREEN", "--init-from", "ADDRESS", "--out", "secret"],
    ],
    ids=" ".join,
)
def test_an_address_with_a_password_is_refused_and_repeated_nowhere(refused, here, screen, words):
    address = "https://someone:hf_Secret123@huggingface.co/owner/name"
    said = refused(*(address if word == "ADDRESS" else str(screen) if word == "SCREEN" else word for word in words))
    assert "owner/name of a repo on the Hub" in said
    assert "Secret123" not in said
    assert "someone" not in said
    assert not [path for path in here.rglob("*") if path.is_file() and b"Secret123" in path.read_bytes()]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "--screen", "a", "--out", "b", "--holdout", "x"], "--holdout; did you mean --hold-out?"),
        (
            ["predict", "m", "--controls", "c", "--perturbation", "A", "--out", "o.h5ad", "--cell_type=B"],
            "--cell-type?",
        ),
        (["demo", "--xyzzy"], "unrecognized arguments: --xyzzy\n"),
    ],
)
def test_a_mistyped_option_names_the_nearest_of_its_command(capsys, words, meant):
    with pytest.raises(SystemExit) as end:
        main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith(f"usage: perturbdiff {words[0]} ")
    assert meant in error


def every_parser(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                yield from every_parser(child)


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal_and_loses_no_word(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for parser in every_parser(_parser()):
        text = parser.format_help()
        assert [line for line in text.splitlines() if len(line) > columns and " " in line.strip()] == []
        said = [word for word in text.split() if word != "\\"]
        for whole in (parser.description, parser.epilog):
            words = [word for word in (whole or "").split() if word != "\\"]
            assert any(said[i : i + len(words)] == words for i in range(len(said))), parser.prog


def test_commands_in_help_go_on_behind_a_backslash():
    text = HelpText("perturbdiff", width=30)._fill_text(
        "examples:\n  perturbdiff train --screen a.h5ad --out b\nA paragraph of words\nthat flows.", 30, ""
    )
    assert text == (
        "examples:\n  perturbdiff train \\\n      --screen a.h5ad \\\n      --out b\nA paragraph of words that\nflows."
    )


def test_perturbdiff_alone_prints_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    said = capsys.readouterr()
    assert stop.value.code == 0
    assert said.out.startswith("usage: perturbdiff")
    assert said.err == ""


def test_an_option_in_help_stays_with_its_value():
    command = "  perturbdiff train --screen a.h5ad --hold-out A:T 'split.validation=[B:T, C:T]' --out runs/a"
    for width in range(30, 100):
        text = HelpText("perturbdiff", width=width)._fill_text(command, width, "")
        for kept in ("--screen a.h5ad", "--hold-out A:T", "'split.validation=[B:T, C:T]'", "--out runs/a"):
            assert kept in text
        assert " ".join(text.replace("\\\n", " ").split()) == command.strip()


FAULTS = """
import resource
import numpy as np
from perturbdiff.cli.main import main

try:
    main(["recipes"])
except SystemExit:
    pass
def work():
    for _ in range(20):
        arrays = [np.ones(1 << 20) for _ in range(8)]
        del arrays
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_commands_use_freed_memory_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert int(done.stdout.splitlines()[-1]) < 4000  # pages; 80,000 where each array is given back


@pytest.mark.slow
@pytest.mark.parametrize("where", [">&3", ">&-", ">&3 2>&3", ">&- 2>&-"])
def test_a_command_ends_well_though_nobody_reads_what_it_says(where):
    read, write = os.pipe()
    os.close(read)
    words = 'exec 3>&"$1"; "$0" -m perturbdiff recipes ' + where
    done = subprocess.run(
        ["bash", "-c", words, sys.executable, str(write)], pass_fds=[write], cwd=ROOT,
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
