from __future__ import annotations

import json
import re
import resource
import subprocess
import sys

import pytest

from perturbdiff.cli.main import main

pytestmark = pytest.mark.slow

RECIPE = """
data:
  n_hvg: null
  atlases:
  - path: nowhere/atlas
    expected: {cells: 1000000, genes: 300, genes_per_cell: 60, perturbations: 9, cell_types: 4, batches: 3}
  set_size: 16
  sets_per_batch: 64
denoiser: {width: 32, depth: 2, n_heads: 2}
training: {mixed_precision: bf16, n_steps: 1000}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_plan_prints_memory_by_engine_and_part_speed_and_limit(recipe, capsys):
    main(["plan", recipe, "--gpus", "16", "--gpu", "h200"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    header, *rows = (line.split() for line in said[said.index("     DDP") :].splitlines()[:10])
    assert header == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    parts = ["weights", "gradients", "optimizer", "ema", "buffers", "activations", "batch", "total", "fits"]
    assert [name for name, *_ in rows] == parts
    assert rows[-1][1:] == ["yes"] * 4
    said = " ".join(said.split())
    for pattern in (
        r"parameters [\d,]+ ", "1,000,000 cells, 300 genes, 60 values", "9 perturbations, 4 cell types, 3 batches",
        r"MFLOPs .* a perturbed cell", r"step .*DDP: compute .*network .*data", r"speed .*cells/s; .* for all steps",
        r"assumed 35% of the peak.* links of 50 GB/s", "memory: fits under DDP", "limit: launches",
    ):  # fmt: skip
        assert re.search(pattern, said), pattern


def test_plan_takes_settings_anywhere_and_gives_json(recipe, capsys):
    plans = []
    rest = ["--gpus=16", "--gpu", "h200", "--efficiency", "0.5"]
    for words in ([recipe, *rest, "--json"], [recipe, "denoiser.width=64", *rest, "--json", "training.n_steps=9"]):
        main(["plan", *words])
        plans.append(json.loads(capsys.readouterr().out))
    small, wide = plans
    assert wide["n_parameters"] > small["n_parameters"]
    assert small["cluster"]["efficiency"] == 0.5
    assert small["memory"]["DDP"]["weights"] == 4 * small["n_parameters"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8", "--gpu", "h1000"], "'h1000' is not known; known are a100"),
        (["--gpus", "0", "--gpu", "h100"], "--gpus (0) must be greater than 0"),
        (["--gpus", "8", "--gpu", "h100", "data.atlases=[{path: nowhere}]"], "data.atlases[0].expected"),
        (["--gpus", "8", "--gpu", "h100", "denoiser.widht=3"], "widht"),
    ],
)
def test_plan_answers_a_mistake_in_one_line(recipe, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(["plan", recipe, *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


def test_a_plan_of_a_large_model_needs_little_memory(recipe):
    large = ["denoiser.width=1024", "denoiser.depth=12", "denoiser.n_heads=16", "data.set_size=256"]
    genes = "data.atlases=[{path: x, expected: {cells: 9, genes: 12626, genes_per_cell: 1000}}]"
    words = ["plan", recipe, "--gpus", "8", "--gpu", "h200", *large, genes, "--json"]
    run = subprocess.run([sys.executable, "-m", "perturbdiff", *words], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["n_parameters"] > 200e6
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1_500_000  # kB; its weights alone are as much
