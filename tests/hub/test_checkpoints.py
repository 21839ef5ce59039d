"""The checkpoints of the package: they open without a network, their cards tell all, and one is scored again."""

import re
from pathlib import Path
from runpy import run_path

import pytest
import yaml

from perturbdiff.data.simulate import SimulationConfig, simulate
from perturbdiff.evaluation.held_out import reproduce
from perturbdiff.hub.card import check_card
from perturbdiff.hub.registry import REGISTRY, read_registry
from perturbdiff.model import PerturbDiff

ROOT = Path(__file__).parents[2]
CHECKPOINTS = REGISTRY.parent / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())
MAX_BYTES = 15 << 20


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PERTURBDIFF_REGISTRY", raising=False)


def test_the_registry_has_them_and_is_the_one_in_hub():
    assert len(NAMES) == 3
    assert list(read_registry()) == NAMES
    assert (ROOT / "hub" / "registry.yaml").resolve() == REGISTRY.resolve()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_opens_offline_with_scores_split_and_license(name):
    model = PerturbDiff.from_pretrained(name, device="cpu")  # every hash and the golden output
    entry = read_registry()[name]
    assert model.training.license == "mit"
    assert model.evaluation is not None
    for metric, value in entry.metrics.items():
        assert model.evaluation.scores[metric] == pytest.approx(value, abs=1e-4)
    assert (CHECKPOINTS / name / "split.json").is_file()
    assert sum(path.stat().st_size for path in (CHECKPOINTS / name).rglob("*")) <= MAX_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_the_commands_that_the_script_runs(name):
    made = run_path(str(ROOT / "scripts" / "checkpoints.py"))["MADE"]
    assert sorted(made) == NAMES
    card = (CHECKPOINTS / name / "README.md").read_text()
    check_card(card)
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert "\n".join(made[name].commands) in card
    assert made[name].about in card


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_a_path_of_the_machine_that_made_it(name):
    for path in CHECKPOINTS.joinpath(name).rglob("*.*"):
        if path.suffix in (".json", ".md"):
            assert not re.search(r"\"/|[( `]/(?:home|root|tmp|work|data)", path.read_text()), path


@pytest.mark.slow
def test_the_simulated_one_is_scored_again_as_its_card_says(tmp_path):
    simulate(SimulationConfig(), tmp_path / "screen.h5ad")
    found = reproduce("simulated-screen", tmp_path / "screen.h5ad")
    assert not found.differing()
    assert len(found.then.scores) >= 8
