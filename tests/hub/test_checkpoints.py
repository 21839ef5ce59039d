"""What hub/ says of the checkpoints we publish."""

import json
from pathlib import Path

import pytest

from perturbdiff.config import load_config
from perturbdiff.hub.card import check_card
from perturbdiff.hub.records import read_evaluation
from perturbdiff.hub.registry import REGISTRY, read_registry

HUB = Path(__file__).parents[2] / "hub"
CHECKPOINTS = sorted(path.parent for path in HUB.glob("*/recipe.yaml"))


def test_there_is_a_checkpoint_and_the_registry_of_the_package_is_the_one_in_hub():
    assert CHECKPOINTS
    assert (HUB / "registry.yaml").resolve() == REGISTRY.resolve()


def test_every_registered_checkpoint_has_a_folder():
    assert set(read_registry()) <= {folder.name for folder in CHECKPOINTS}


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_checkpoint_has_a_card_a_recipe_and_scores_that_agree(folder):
    lines = (folder / "recipe.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert f"--recipe hub/{folder.name}/recipe.yaml" in lines[1]
    load_config(folder / "recipe.yaml", [], {"out": "unused", "data": {"screen": "screen.h5ad"}})
    scores = json.loads((folder / "scores.json").read_text())
    read_evaluation(scores)
    card = (folder / "README.md").read_text()
    check_card(card)
    for method, row in scores["mean"].items():
        line = next(line for line in card.splitlines() if line.startswith("| ") and f"{method}" in line)
        assert f"{row['energy_distance']:.3f}" in line
    for selector in scores["split"]["hold_out"]:
        assert f"--hold-out {selector}" in lines[1]
