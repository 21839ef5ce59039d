import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.screens import quality_file, real_screen

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


def test_the_scaling_benchmark_runs_one_and_two_processes_and_says_what_they_cost():
    model = ("--sets", 2, "--set-size", 16, "--genes", 200, "--width", 32, "--depth", 1)
    report = run("scaling", "--steps", 2, 6, "--repeats", 1, *model)
    assert report["engine"] == "ddp"
    assert report["processes"].keys() == {"1", "2"}
    for figures in report["processes"].values():
        assert figures["cells_per_s"] > 0
        assert 0 <= figures["data_wait"] <= 1
    assert report["processes"]["1"]["efficiency"] == 1


@pytest.mark.parametrize("fold", [(), ("--fold", "PW030")])
def test_the_quality_benchmark_predicts_what_the_protocol_scores(fold):
    tasks = quality_file("score.py").parent
    line = run("quality", "--tasks", tasks, "T3", *fold, "training.n_steps=2", "training.log_every=1")
    assert (line["task"], line["steps"], line["fold"]) == ("T3", 2, "PW030" if fold else None)
    assert -1 <= line["pearson_delta"] <= 1
    assert line["energy_u"] > 0
    assert line["cpu_s"] > 0


def test_a_fold_of_a_quality_task_hides_training_cells_and_looks_at_no_test_cell():
    sys.path.insert(0, str(BENCH))
    try:
        from quality import task_cells
    finally:
        sys.path.remove(str(BENCH))
    folder = quality_file("T3")
    every, _ = task_cells(folder, "cell_type", None)
    train_cells, real = task_cells(folder, "cell_type", "PW030")
    treated = every.obs["perturbation"] != "control"
    held = every.obs_names[treated & (every.obs["cell_type"] == "PW030")]
    assert set(train_cells.obs_names) == set(every.obs_names) - set(held)
    assert set(real.obs_names[real.obs["perturbation"] != "control"]) <= set(held)
    assert set(real.obs_names) <= set(every.obs_names)


def test_the_few_shot_benchmark_pretrains_and_compares():
    data = real_screen("stoeckius2018_pbmc_hto_unperturbed.h5ad").parent
    lines = run("few_shot", "--data", data, "--percent", 10, "--pretrain-steps", 2, "training.n_steps=2", lines=True)
    assert [line["start"] for line in lines] == ["pretrained", "random weights", "pretrained"]
    assert lines[1]["treated_cells"] == lines[2]["treated_cells"] == 141
    assert all(np.isfinite(line["energy_distance"]) for line in lines[1:])
