import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perturbdiff.atlas.store import Atlas
from perturbdiff.config import load_build_config, load_config, reference_denoiser
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from tests.screens import counts_screen, written

RECIPES = Path(__file__).parents[2] / "recipes"
GIVEN = {"out": "unused", "data": {"screen": "unused.h5ad"}}


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("train/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_a_training_states_its_hardware_resolves_and_builds(path):
    assert path.read_text().startswith("# ")
    config = load_config(path, [], GIVEN)
    with torch.device("meta"):
        Denoiser(config.denoiser, 2000, VocabSizes(90, 18, 12))


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("atlas/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_an_atlas_states_its_hardware_and_resolves(path):
    assert path.read_text().startswith("# ")
    assert load_build_config([], path, [], {"out": "unused"}).sources


def test_every_recipe_is_of_a_kind_that_is_tested():
    kinds = {"train", "pretrain", "finetune", "atlas", "accelerate", "slurm"}
    assert {path.relative_to(RECIPES).parts[0] for path in RECIPES.rglob("*") if path.is_file()} == kinds


@pytest.mark.slow
def test_the_job_script_builds_an_atlas_in_array_tasks_and_one_merge(tmp_path):
    paths = [written(counts_screen(seed=seed), tmp_path / f"{seed}.h5ad") for seed in (0, 1)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sources:\n" + "".join(f"- path: {path}\n" for path in paths))
    allotted = {"SLURM_CPUS_PER_TASK": "1", "SLURM_MEM_PER_NODE": "3000"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def job(**task):
        return subprocess.run(
            ["bash", RECIPES / "slurm" / "build_atlas.sbatch", recipe, tmp_path / "atlas"],
            env={**os.environ, "PATH": path, **allotted, **task},
            capture_output=True,
            text=True,
        )

    for i in ("1", "2"):
        done = job(SLURM_ARRAY_TASK_ID=i, SLURM_ARRAY_TASK_COUNT="2")
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "atlas").exists()
    done = job()
    assert done.returncode == 0, done.stderr
    Atlas.open(tmp_path / "atlas").verify()


def test_the_reference_recipe_is_the_published_architecture():
    assert load_config(RECIPES / "train" / "reference.yaml", [], GIVEN).denoiser == reference_denoiser()
