"""Recipes of pretraining: complete, as published where they say so, and runnable."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from perturbdiff import PerturbDiff
from perturbdiff.config import AtlasConfig, SplitConfig, as_dict, load_build_config, load_config, reference_denoiser
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.training.loop import fit
from tests.atlases import write_atlas
from tests.screens import ROOT

pytestmark = pytest.mark.slow

RECIPES = ROOT / "recipes"
PRETRAIN = sorted((RECIPES / "pretrain").glob("*.yaml"))
PUBLISHED = [path for path in PRETRAIN if path.stem != "tiny"]
HARDWARE = re.compile(r"# (?:(\d+) nodes? x (\d+) H100, time not measured|Two cores, half a minute): ")

# Yuan et al. 2026 and its code: cells a step of each of four GPUs, cells a set, learning rate, genes.
PAPER = {
    "pbmc": (2048, 256, 2e-4, 2000),
    "tahoe100m": (2048, 256, 2e-4, 2000),
    "replogle": (128, 32, 2e-3, 2000),
    "cellxgene_marginal": (2048, 256, 2e-4, 12626),
    "all_marginal": (2048, 256, 2e-4, 12626),
}


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def n_processes(path):
    nodes, gpus = HARDWARE.match(path.read_text()).groups()
    return 2 if nodes is None else int(nodes) * int(gpus)


@named(PRETRAIN)
def test_the_first_line_states_the_hardware_and_every_process_of_it_gets_as_many_sets(path):
    data = load_config(path).data
    assert data.sets_per_batch % n_processes(path) == 0
    assert not data.streamed or data.n_streams % n_processes(path) == 0


@named(PRETRAIN)
def test_the_launch_file_it_names_starts_as_many_processes_as_the_hardware(path):
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("# "))
    [launch] = re.findall(r"recipes/accelerate/(\w+)\.yaml", head)
    text = (RECIPES / "accelerate" / f"{launch}.yaml").read_text()
    assert f"num_processes: {n_processes(path)} " in text
    assert path.relative_to(ROOT).as_posix() in head


@named(PRETRAIN)
def test_it_is_complete(path):
    # A setting that only a default gives would change with the default.
    text, config = path.read_text(), as_dict(load_config(path))
    relevant = {
        key
        for section in ("denoiser", "diffusion", "optim", "training")
        for key in config[section]
        if key not in ("device", "profile_steps", "early_stop_patience", "covariate_dim", "schedule_steps")
        and not key.endswith("_encoding")
    }
    assert [key for key in sorted(relevant) if not re.search(rf"^  {key}: ", text, re.MULTILINE)] == []
    assert config["out"] == f"runs/{path.stem}"


@named(PRETRAIN)
def test_it_builds_with_the_sizes_it_expects(path):
    config = load_config(path)
    expected = [atlas.expected for atlas in config.data.atlases]
    assert len({size.genes for size in expected}) == 1
    names = ("perturbations", "cell_types", "batches")
    sizes = VocabSizes(**{name: sum(getattr(size, name) for size in expected) for name in names})
    with torch.device("meta"):
        denoiser = Denoiser(config.denoiser, expected[0].genes, sizes)
    assert sum(p.numel() for p in denoiser.parameters()) > 1e5


@named(PRETRAIN)
def test_its_atlases_are_built_by_recipes_it_names(path):
    head = path.read_text().split("\nout:")[0]
    for atlas in load_config(path).data.atlases:
        name = Path(atlas.path).name.removesuffix("_2000")
        recipe = RECIPES / "atlas" / f"{name}.yaml"
        assert load_build_config([], recipe, [], {"out": "unused"}).sources
        assert name in head
        assert f"--out {atlas.path}" in recipe.read_text()


@named(PUBLISHED)
def test_the_settings_are_the_published_ones(path):
    config = load_config(path)
    cells, set_size, lr, genes = PAPER[path.stem]
    marginal = {atlas.sets == "marginal" for atlas in config.data.atlases}
    assert marginal == {path.stem.endswith("_marginal")}
    hidden = {"perturbation_encoding": "none", "batch_encoding": "none"} if marginal == {True} else {}
    assert config.denoiser == replace(reference_denoiser(), **hidden)
    assert config.data.set_size == set_size
    assert config.data.n_hvg is None
    assert {atlas.expected.genes for atlas in config.data.atlases} == {genes}
    # The same cells in all, where the step is that of more GPUs.
    sets = config.data.sets_per_batch
    assert sets * set_size * config.training.n_steps == 4 * cells * 200_000
    if n_processes(path) == 8:
        assert config.training.n_steps == 200_000
    assert (config.optim.lr, config.optim.ema_decay, config.optim.ema_every) == (lr, 0.99, 10)
    reference = load_config(RECIPES / "train" / "reference.yaml", [], {"out": "unused", "data": {"screen": "unused"}})
    assert config.diffusion == reference.diffusion
    assert config.sampling == reference.sampling
    assert replace(config.optim, lr=reference.optim.lr) == reference.optim


def test_the_held_out_conditions_are_as_many_as_in_the_paper_and_never_pretrained_on():
    split = {path.stem: load_config(path).split for path in PUBLISHED}
    held_out = [selector.split(":") for selector in split["pbmc"].hold_out]
    validated = [selector.split(":") for selector in split["pbmc"].validation]
    donors = {donor for _, _, donor in held_out}
    assert (len(donors), len({cytokine for cytokine, _, _ in held_out}), len(held_out)) == (4, 62, 4 * 62)
    assert not {cytokine for cytokine, _, _ in held_out} & {cytokine for cytokine, _, _ in validated}
    assert {donor for _, _, donor in validated} == donors
    assert len(set(split["tahoe100m"].hold_out)) == 5
    assert split["replogle"].hold_out == ["*:hepg2"]
    everything = {s for name in ("pbmc", "tahoe100m", "replogle") for s in split[name].hold_out}
    assert set(split["all_marginal"].hold_out) == everything | set(split["pbmc"].validation)


@named(PUBLISHED)
def test_it_takes_a_step_when_it_is_shrunk(path, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = load_config(path)
    conditions = [(p, c, b, 9) for p in ("control", "A", "B") for c in ("NK", "T") for b in ("b1", "b2")]
    atlases = [
        AtlasConfig(str(write_atlas(tmp_path / f"atlas_{i}", conditions, seed=i)), weight=a.weight, sets=a.sets)
        for i, a in enumerate(config.data.atlases)
    ]
    n_streams = None if config.data.n_streams is None else 2
    config = replace(
        config,
        out=str(tmp_path / "run"),
        data=replace(config.data, atlases=atlases, set_size=4, sets_per_batch=4, n_streams=n_streams),
        split=SplitConfig(hold_out=["A:NK"], validation=["B:NK"] if config.split.validation else []),
        denoiser=replace(config.denoiser, width=8, depth=1, n_heads=2, covariate_dim=4),
        training=replace(config.training, n_steps=1, validate_every=1, compile=False, mixed_precision="no"),
    )
    assert fit(config).step == 1


def run(folder, *command):
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the recipes of tiny atlases find their file, with the atlases."""
    project = tmp_path_factory.mktemp("tiny")
    (project / "recipes").symlink_to(RECIPES)
    run(project, "perturbdiff", "simulate", "screen.h5ad")
    for name in ("tiny_perturbed", "tiny_unperturbed"):
        run(project, "perturbdiff", "atlas", "build", "--recipe", name, "--out", f"atlases/{name}")
    return project


def metrics(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_tiny_trains_on_one_process_and_predicts_better_than_no_change(folder):
    config = load_config(RECIPES / "pretrain" / "tiny.yaml")
    run(folder, "perturbdiff", "pretrain", "recipes/pretrain/tiny.yaml")
    lines = metrics(folder / config.out)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]  # cells of a condition differ: most of the loss is no mistake
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validated] == [50, 100, 150, 200]
    last = validated[-1]
    assert last["validation_energy_distance"] < 0.9 * last["validation_energy_distance_no_change"]
    states = [path.name for path in (folder / config.out / "states").iterdir() if path.is_dir()]
    assert len(states) == config.training.keep_states
    model = PerturbDiff.from_pretrained(folder / config.out / "model")
    assert model.vocabularies.perturbations.names == tuple(f"pert_{i}" for i in range(6))


def test_the_sizes_that_the_tiny_recipe_expects_are_those_of_its_atlases(folder):
    for atlas in load_config(RECIPES / "pretrain" / "tiny.yaml").data.atlases:
        conditions = pd.read_parquet(folder / atlas.path / "conditions.parquet")
        seen = conditions[~conditions["is_control"] | (atlas.sets != "perturbed")]
        genes = pd.read_parquet(folder / atlas.path / "genes.parquet")
        assert (seen["n_cells"].sum(), len(genes)) == (atlas.expected.cells, atlas.expected.genes)


def test_tiny_trains_on_two_processes_as_on_one(folder):
    words = ["training.n_steps=4", "training.log_every=1", "training.validate_every=4"]
    run(folder, "perturbdiff", "pretrain", "recipes/pretrain/tiny.yaml", "out=runs/one", *words)
    launch = ["accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu_ddp.yaml"]
    words.append("training.device=cpu")
    run(folder, *launch, "-m", "perturbdiff", "pretrain", "recipes/pretrain/tiny.yaml", "out=runs/two", *words)
    one, two = (metrics(folder / "runs" / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for alone, together in zip(one, two, strict=True):
        for name in alone.keys() & {"loss", "mse", "mmd", "validation_loss"}:
            assert together[name] == pytest.approx(alone[name], rel=1e-4)
