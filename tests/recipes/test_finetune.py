"""Every recipe of a fine-tuning loads and tunes a tiny checkpoint on a tiny screen."""

from pathlib import Path

import anndata
import pytest

from perturbdiff.training.loop import fit
from perturbdiff.training.run import finetune
from tests.simulated import tiny_config, write_screen

pytestmark = pytest.mark.slow

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "finetune").glob("*.yaml"))
SMALL = ["training.device=cpu", "training.n_steps=2", "data.sets_per_batch=4", "training.validate_every=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A screen whose perturbations are of genes, and a checkpoint of a part of it."""
    folder = tmp_path_factory.mktemp("finetune")
    write_screen(folder)
    adata = anndata.read_h5ad(folder / "screen.h5ad")
    genes = {f"pert_{i}": adata.var_names[i] for i in range(3)}
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace(genes)
    adata.write_h5ad(folder / "screen.h5ad")
    adata[adata.obs["cell_type"] == "type_1", :30].copy().write_h5ad(folder / "part.h5ad")
    fit(tiny_config(folder / "part.h5ad", folder / "run", "training.n_steps=2", hold_out=()))
    return folder


def test_the_recipes_are_those_that_are_promised():
    names = {"new_screen", "few_shot", "lora", "unseen_perturbations", "cross_cell_type"}
    assert {path.stem for path in RECIPES} == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_states_hardware_and_use_and_runs(path, folder, tmp_path):
    hardware, use = path.read_text().splitlines()[:2]
    assert hardware.startswith("# One CPU core or any GPU: ")
    assert use.startswith("# Use: perturbdiff finetune ")
    assert use.endswith(f"--recipe {path.stem}")
    unseen = path.stem == "unseen_perturbations"
    gene = str(anndata.read_h5ad(folder / "screen.h5ad").var_names[2])
    held_out = gene if unseen else f"{gene}:type_0"
    result = finetune(
        folder / "screen.h5ad",
        folder / "run" / "model",
        tmp_path / "run",
        hold_out=[held_out],
        recipe=path,
        overrides=SMALL,
    )
    assert result.scores.n_conditions == (4 if unseen else 2)
    assert (tmp_path / "run" / "adapter").is_dir() == (path.stem == "lora")
