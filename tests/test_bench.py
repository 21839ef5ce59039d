import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbdiff.config import find_recipe, load_config
from tests.processes import PATIENCE
from tests.screens import ROOT, real_screen
from tests.simulated import write_screen

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


def run(script: str, *options: object, folder: Path | None = None, lines: bool = False):
    command = [sys.executable, str(BENCH / f"{script}.py"), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCH.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()] if lines else json.loads(done.stdout)


def test_the_index_benchmark_says_times_and_memory_of_every_shape_and_order():
    report = run("index", "--cells", 5000, "--nested-cells", 3000, "--repeats", 1)
    for shape in ("pbmc", "tahoe"):
        assert report[shape]["cells"] == 5000
        for order in ("random", "sorted", "conditions"):
            case = report[shape][order]
            assert 0 < case["conditions"] <= 5000
            assert 0 < case["libraries_gb"] <= case["peak_gb"] < 2
            assert case["cpu_s"] >= 0
    assert report["nested masks"]["cpu_s"] > 0
    assert report["nested masks"]["times"] > 0


def test_nested_masks_find_the_cells_of_each_condition():
    sys.path.insert(0, str(BENCH))
    try:
        from index import _nested_masks
    finally:
        sys.path.remove(str(BENCH))
    rng = np.random.default_rng(0)
    labels = [pd.Categorical.from_codes(rng.integers(0, n, 200), list("abcde"[:n])) for n in (5, 3, 2)]
    frame = pd.DataFrame(dict(zip("pcb", labels, strict=True)))
    expected = {tuple(rows) for rows in frame.groupby(["p", "c", "b"], observed=True).indices.values()}
    assert {tuple(rows) for rows in _nested_masks(*labels)} == expected


SMALL = ("--cell-types", 3, "--batches", 8, "--perturbations", 12, "--set-size", 32, "--sets-per-batch", 48)


def test_the_scale_benchmark_checks_what_it_deals():
    report = run("sampler_scale", "--cells", 40_000, *SMALL, "--ranks", 16, "--shards", 20, "--check", "whole")
    dealt = report["dealt"]
    assert dealt["cells"] == 40_000
    assert dealt["conditions"] == 3 * 8 * 13
    assert dealt["check"] == "whole"
    assert dealt["sets"] * 32 >= dealt["perturbed_cells"] > dealt["sets"]
    assert dealt["steps"] == -(-dealt["sets"] // 48)
    assert dealt["resumed_at"]["ranks_after"] == 12
    assert report["streamed"]["sets"] >= dealt["sets"]
    assert report["streamed"]["shards"] == 20
    assert 0 < report["streamed"]["balance"] <= 1
    np.testing.assert_allclose(report["mixture"]["share_of_each"], [0.5, 0.3, 0.2], atol=0.01)
    for part in ("dealt", "streamed", "mixture"):
        assert report[part]["sets_looked_at"] > 0
        assert report[part]["batch_of_a_rank_cpu_ms"]["worst"] > 0


def test_the_loader_benchmark_builds_and_reads_in_every_way_and_runs_again_on_what_it_kept(tmp_path):
    tiny = ("--cells", 1500, "--genes", 300, "--set-size", 16, "--batches", 1, "--rows", 50, "--repeats", 1)
    tiny = (*tiny, "--shard-mb", 1, "--folder", tmp_path / "kept")
    report = run("loader", *tiny, folder=tmp_path)
    assert report["input"]["cells"] == 1500
    assert 0.06 < report["input"]["density"] < 0.1
    assert report["build"]["one process"]["cells_per_cpu_s"] > 0
    for made in report["build"].values():
        assert 0 < made["peak_gb_of_a_process"] <= made["max_memory_gb"]
    assert report["atlas"]["conditions"] == 21 * 4 * 2
    rates = report["cells/CPU-s"]
    with_controls = {"sparse batches", "dense log1p batches", "the sampler alone", "a screen in memory, sparse"}
    assert with_controls | {"streamed, a whole epoch", "slices by datasets", "rows by h5py"} < rates.keys()
    assert all(rate["cells"] > 0 for rate in rates.values())
    assert all(abs(rates[name]["cells"] - 2 * rates[name]["perturbed"]) <= 2 for name in with_controls)
    again = run("loader", *tiny, folder=tmp_path)
    assert again["build"] == "the atlas was there"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_whole_commands_are_timed():
    report = run("commands", "--parts", "start")
    assert set(report["start"]) == {"simulate", "--help", "hub info", "plan", "predict 100 cells"}
    for found in report["start"].values():
        assert found["cpu_s"] > 0
        assert 0 < found["peak_gb"] < 4


def test_the_scaling_benchmark_runs_one_and_two_processes_and_says_what_they_cost():
    model = ("--sets", 2, "--set-size", 16, "--genes", 200, "--width", 32, "--depth", 1)
    report = run("scaling", "--steps", 2, 6, "--repeats", 1, *model)
    assert report["engine"] == "ddp"
    assert report["processes"].keys() == {"1", "2"}
    for figures in report["processes"].values():
        assert figures["cells_per_s"] > 0
        assert 0 <= figures["data_wait"] <= 1
    assert report["processes"]["1"]["efficiency"] == 1


TASK = """
file: screen.h5ad
source: simulated
hold_out: ["pert_0:type_0:batch_0"]
recipe: new_batch
settings: [training.n_steps=20, training.save_every=4, training.device=cpu, data.set_size=8, data.sets_per_batch=4,
  denoiser.width=16, denoiser.n_heads=2]
looked_at: ["by this test"]
"""


@pytest.fixture
def quality(tmp_path):
    """A small task, and words that run it."""
    write_screen(tmp_path)
    (tmp_path / "small.yaml").write_text(TASK)
    return ["--data", tmp_path, "--out", tmp_path / "out", "--tasks", tmp_path / "small.yaml"]


def quality_process(*options: object) -> subprocess.Popen:
    command = [sys.executable, str(BENCH / "quality.py"), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def refused(*options: object) -> str:
    process = quality_process(*options)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert error.startswith("quality.py: error: ")
    assert error.count("\n") == 1
    return error


def test_the_quality_benchmark_goes_on_where_it_was_killed_and_runs_nothing_twice(quality, tmp_path):
    first, second = (tmp_path / "out/small/PerturbDiff" / seed for seed in "01")
    process = quality_process(*quality, "--seeds", "0,1")
    until = time.monotonic() + PATIENCE
    try:
        while not list(second.glob("run/states/step*")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert not (second / "run/scores.json").exists()
    before = {path: path.stat().st_mtime_ns for path in first.glob("run/*")}
    assert first / "run/scores.json" in before
    (record,) = run("quality", *quality, "--seeds", "0,1", "--json")
    assert re.search(r"resuming    from|training    is done", (second / "log.txt").read_text())
    assert len(json.loads((second / "cost.json").read_text())) == 2
    assert {path: path.stat().st_mtime_ns for path in first.glob("run/*")} == before
    assert record["seeds"] == [0, 1]
    assert record["cpu_s_at_least"] is True
    scores = [pd.read_parquet(folder / "run/scores.parquet").set_index("method") for folder in (first, second)]
    own = [of.loc["PerturbDiff", "pearson_delta"] for of in scores]
    assert record["pearson_delta"]["mean"] == pytest.approx(np.mean(own), abs=1e-4)
    # One condition: the error of its cells and of two seeds, by the t distribution of ten folds.
    error = np.mean([of.loc["PerturbDiff", "error pearson_delta"] for of in scores])
    half = 2.262157 * np.hypot(error, np.std(own, ddof=1) / np.sqrt(2))
    np.testing.assert_allclose(
        record["pearson_delta"]["interval"], [np.mean(own) - half, np.mean(own) + half], rtol=1e-5
    )


def test_the_quality_benchmark_shows_other_settings_and_other_tools_beside_ours(quality, tmp_path):
    run("quality", *quality, "--json")
    run("quality", *quality, "--set", "training.n_steps=4", "--label", "short", "--json")
    predicted = tmp_path / "out/small/PerturbDiff/0/run/predicted.h5ad"
    made = run("quality", *quality, "--predictions", f"again={predicted}", "--json")
    assert [record["method"] for record in made] == ["PerturbDiff", "again", "short"]
    assert made[1]["energy_distance"] == made[0]["energy_distance"] != made[2]["energy_distance"]
    assert json.loads((tmp_path / "out/quality.json").read_text()) == made
    assert made[0]["cpu_s"] > 0
    assert made[1]["cpu_s"] is None
    assert made[0]["looks"] == 1
    verdict = made[0]["pearson_delta"]["verdict"]
    assert sum(verdict.values()) == made[0]["n_conditions"]
    (tmp_path / "small.yaml").write_text(TASK.replace('["by this test"]', '["by this test", "twice"]'))
    assert [record["looks"] for record in run("quality", *quality, "--json")] == [2, 2, 2]
    (tmp_path / "small.yaml").write_text(TASK + "drop: [pert_1]\n")
    assert "was made with another task; give another --out" in refused(*quality)


def test_a_fold_of_a_quality_task_leaves_its_test_cells_out(quality, tmp_path):
    (record,) = run("quality", *quality, "--fold", "pert_1:type_1", "--json")
    split = json.loads((tmp_path / "out" / record["task"] / "PerturbDiff/0/run/split.json").read_text())
    labels = ("perturbation", "cell_type", "batch")
    conditions = {
        part: {tuple(of[name] for name in labels) for of in found} for part, found in split["conditions"].items()
    }
    assert conditions["test"] == {("pert_1", "type_1", "batch_0"), ("pert_1", "type_1", "batch_1")}
    trained = conditions["train"] | conditions["validation"]
    assert ("pert_0", "type_0", "batch_1") in trained
    assert ("pert_0", "type_0", "batch_0") not in trained
    assert record["looks"] == 0


@pytest.mark.parametrize(
    ("line", "options", "error"),
    [
        ("held_out: [pert_0]", (), "has held_out; the keys of a task are file, source, recipe, hold_out"),
        ("split: split.toml", (), "must have hold_out or split, and not both"),
        ("drop: pert_1", (), "drop ('pert_1') must be a list of texts"),
        ("loadings: other.h5ad", (), "needs other.h5ad, which is not in --data"),
        ("", ("--tasks", "kang"), "no task 'kang'; there are datlinger_unseen,"),
        ("", ("--set", "optim.lr=1"), "--set and --choose need --label"),
        ("", ("--predictions", "scgen"), "'scgen': give NAME"),
    ],
)
def test_the_quality_benchmark_refuses_in_one_line(quality, tmp_path, line, options, error):
    (tmp_path / "small.yaml").write_text(TASK + line)
    assert error in refused(*quality, *options)


def test_every_quality_task_can_be_read_and_its_settings_fit_its_recipe():
    sys.path.insert(0, str(BENCH))
    try:
        from quality import Task, task_names
    finally:
        sys.path.remove(str(BENCH))
    for name in task_names():
        task = Task.read(name)
        recipe = find_recipe(task.recipe, "train")
        load_config(recipe, task.settings, {"out": "unused", "data": {"screen": task.file}})
        assert task.source.strip()


def test_the_few_shot_benchmark_pretrains_and_compares():
    data = real_screen("stoeckius2018_pbmc_hto_unperturbed.h5ad").parent
    asked = ("training.n_steps=2", "--percent", 10, "--hold-out", "NK", "--pretrain-steps", 1, 2)
    lines = run("few_shot", "--data", data, *asked, lines=True)
    starts = ["pretraining", "pretraining", "random weights", "pretrained", "pretrained"]
    assert [line["start"] for line in lines] == starts
    assert [line["pretrain_steps"] for line in lines] == [1, 2, 0, 1, 2]
    assert {line["treated_cells"] for line in lines[2:]} == {211}
    assert all(np.isfinite(line["energy_distance"]) for line in lines[2:])
