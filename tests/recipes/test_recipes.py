from pathlib import Path

import pytest
import torch

from perturbdiff.config import load_config, reference_denoiser
from perturbdiff.model.conditioning import VocabSizes
from perturbdiff.model.denoiser import Denoiser

RECIPES = Path(__file__).parents[2] / "recipes"
GIVEN = {"out": "unused", "data": {"screen": "unused.h5ad"}}


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_recipe_states_its_hardware_resolves_and_builds(path):
    assert path.read_text().startswith("# ")
    config = load_config(path, [], GIVEN)
    with torch.device("meta"):
        Denoiser(config.denoiser, 2000, VocabSizes(90, 18, 12))


def test_the_reference_recipe_is_the_published_architecture():
    assert load_config(RECIPES / "train" / "reference.yaml", [], GIVEN).denoiser == reference_denoiser()
