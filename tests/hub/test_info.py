"""What is said of a model before its weights are loaded, to a person at a terminal."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perturbdiff.hub.download import find_model
from perturbdiff.hub.info import difference, model_info
from perturbdiff.hub.model_folder import GOLDEN, WEIGHTS, read_folder
from perturbdiff.hub.records import AtlasRecord, ConversionRecord, TrainingRecord
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from tests.hub.test_card import EVALUATION
from tests.simulated import tiny_config, write_screen

ODD = "\x1b[31mred\u202e\x07\nnext"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return fit(tiny_config(write_screen(folder), folder / "run")).folder / "model"


@pytest.fixture
def saved(model, tmp_path):
    """Writes the model with changes to a folder of this name."""

    def save(name: str, change=lambda model: None) -> Path:
        changed = PerturbDiff.from_pretrained(model, device="cpu")
        change(changed)
        changed.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def lines_of(folder) -> dict[str, str]:
    text = model_info(find_model(folder))
    assert max(map(len, text.splitlines())) <= 80
    whole = text.replace("\n" + " " * 14, " ")  # what goes on below
    return {line[:14].strip(): line[14:] for line in whole.splitlines()}


def differences(a, b) -> list[str]:
    return difference(find_model(a), find_model(b)).splitlines()


def test_a_model_says_what_it_expects_and_where_it_comes_from(model):
    said = lines_of(model)
    folder, training = read_folder(model), json.loads((model / "training.json").read_text())
    assert said["model"] == "model"
    assert said["sha256"] == folder.sha256
    assert said["license"] == "not stated"
    assert said["X"].startswith("raw counts: log1p(count * 10000 / library size) / 10")
    assert said["genes"] == "40: gene_00, gene_01, gene_02, gene_03, gene_04, ..."
    assert said["perturbations"] == "3: pert_0, pert_1, pert_2"
    assert said["cell types"] == "2: type_0, type_1"
    assert said["batches"] == "2: batch_0, batch_1"
    assert said["combinations"] == "A+B"
    n_values = sum(t.numel() for t in PerturbDiff.from_pretrained(model, device="cpu").denoiser.state_dict().values())
    assert said["denoiser"].startswith(f"{n_values:,} parameters; width 16, depth 2, labels conditioning")
    assert said["sets"] == "8 cells, means of 9 trained conditions"
    assert said["trained on"] == f"screen.h5ad; 6 steps, {training['cells_seen']} cells seen"
    assert said["held out"] == "pert_0:type_0"
    assert said["scores"] == "not evaluated"


def test_weights_are_needed_to_count_parameters_alone(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    said, here = lines_of(folder), lines_of(model)
    assert said.pop("denoiser") == "weights that are not here; width" + here.pop("denoiser").split("width")[1]
    assert said == here
    assert differences(folder, model) == ["weights: the same files"]


@pytest.mark.parametrize("command", ["info", "diff"])
def test_neither_torch_nor_a_table_of_cells_is_loaded(model, command):
    words = ["hub", command, str(model), *([str(model)] if command == "diff" else [])]
    check = "heavy = {'torch', 'anndata', 'pandas', 'scipy', 'pyarrow', 'huggingface_hub'} & set(sys.modules)"
    code = f"import sys\nfrom perturbdiff.cli.main import main\nmain({words})\n{check}\nassert not heavy, heavy"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert ("parameters; width 16" in run.stdout) == (command == "info")


def test_scores_stand_beside_the_best_baseline_and_not_the_ceiling(saved):
    text = model_info(find_model(saved("evaluated", lambda m: setattr(m, "evaluation", EVALUATION))))
    assert "mean over 3 held-out conditions of kang.h5ad" in text
    assert "pearson_delta           0.920 (best baseline 0.883; higher)" in text
    assert "energy_distance         0.250 (best baseline 0.125; lower)" in text
    assert "variance_ratio          0.800 (best baseline 1.050; ideal 1)" in text


def test_a_baseline_that_is_defined_on_fewer_conditions_is_not_beside_the_score(saved):
    fewer = {name: {**of, "pearson_delta": of["pearson_delta"] + (name == "ridge")} for name, of in
             EVALUATION.n_undefined.items()}  # fmt: skip
    partial = replace(EVALUATION, n_undefined=fewer)
    text = model_info(find_model(saved("partial", lambda m: setattr(m, "evaluation", partial))))
    assert EVALUATION.mean["ridge"]["pearson_delta"] == 0.883
    assert "pearson_delta           0.920 (best baseline 0.883; higher)" not in text


def test_names_of_strangers_do_not_reach_the_terminal_raw(saved, model):
    def change(model: PerturbDiff) -> None:
        model.training = replace(model.training, license=ODD, hold_out=(ODD,), screen=ODD, library_version=ODD)
        model.genes = type(model.genes)((ODD, *model.genes.names[1:]))
        model.name = ODD

    folder = saved("odd", change)
    for text in (model_info(find_model(folder)), difference(find_model(model), find_model(folder))):
        assert all(line.isprintable() for line in text.splitlines())
        assert r"\x1b[31mred\u202e\x07\nnext" in text


def test_a_model_of_atlases_and_a_converted_one_say_so(saved):
    commit = "0123456789abcdef" * 2
    atlases = (AtlasRecord("lab/atlas", commit, "e" * 64), AtlasRecord("b", None, "f" * 64))
    folder = saved("atlases", lambda model: setattr(model, "training", replace(model.training, atlases=atlases)))
    assert lines_of(folder)["trained on"].startswith("lab/atlas at 0123456789ab, b at ffffffffffff; 6 steps")
    conversion = ConversionRecord("pbmc.ckpt", "c" * 64, "ema", None, None, None)
    folder = saved("converted", lambda model: setattr(model, "training", TrainingRecord(converted_from=conversion)))
    assert lines_of(folder)["trained on"] == "pbmc.ckpt, a published checkpoint"
    assert lines_of(folder)["held out"] == "not stated"
    folder = saved("empty", lambda model: setattr(model, "training", TrainingRecord()))
    assert lines_of(folder)["trained on"] == "not stated; ? steps, ? cells seen"


def test_the_same_model_differs_in_nothing(model, saved):
    assert differences(model, saved("again")) == ["weights: the same files"]


def test_differences_are_named(model, saved):
    def change(model: PerturbDiff) -> None:
        model.training = replace(model.training, license="mit", steps=7)
        model.genes = type(model.genes)((*model.genes.names[:-1], "new_gene"))
        model.evaluation = EVALUATION
        with torch.no_grad():
            model.denoiser.get_parameter("head.bias").add_(0.5)

    lines = differences(model, saved("changed", change))
    assert "training.license: None -> mit" in lines
    assert "training.steps: 6 -> 7" in lines
    assert "genes: new 1: new_gene" in lines
    assert "genes: gone 1: gene_39" in lines
    assert "score pearson_delta: - -> 0.92" in lines
    assert lines[-1] == "weights: differ"


def test_a_vocabulary_in_another_order_is_a_difference(model, saved):
    def change(model: PerturbDiff) -> None:
        model.genes = type(model.genes)(model.genes.names[::-1])

    assert "genes: the same in another order" in differences(model, saved("turned", change))


def test_another_golden_output_of_the_same_weights_is_no_other_model(model, tmp_path):
    settings = read_folder(model)
    assert {WEIGHTS, GOLDEN} <= settings.tensor_files.keys()
    assert differences(model, model) == ["weights: the same files"]
