"""Many predictions in one file: as each would be alone, whole, resumable, the same on any number of processes."""

import signal
import subprocess
import sys
import time
from copy import copy
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import perturbdiff.inference.predictions as predictions
from perturbdiff.config import ObsColumns
from perturbdiff.data.screen import control_cells
from perturbdiff.evaluation.scores import evaluate
from perturbdiff.hub.records import Calibration, Coverage, Width
from perturbdiff.inference.intervals import mean_expression, population_summary
from perturbdiff.inference.output import read_predicted
from perturbdiff.inference.predictions import predict_request, predict_requests
from perturbdiff.inference.requests import COLUMNS, Request
from perturbdiff.lock import Lock
from perturbdiff.means.training import Context, TrainingMeans
from perturbdiff.means.trust import trust
from perturbdiff.model import PerturbDiff
from tests.processes import PATIENCE
from tests.screens import ROOT, counts_screen, log1p_cp10k, written
from tests.untrained import untrained

REQUESTS = [
    Request("A", "NK"),
    Request("A+B", "T", "b2", n_cells=5, n_populations=2, seed=3),
    Request("B"),
    Request("A", "NK"),
    Request("B", "T", n_cells=1),
]
WIDTH = Width(factor=2.0, floor=0.1)
CALIBRATION = Calibration(0.9, 0.0, WIDTH, WIDTH, n_conditions=5, coverage=Coverage("test", 4, 0.91, 0.9))


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return written(counts_screen(), tmp_path_factory.mktemp("screen") / "screen.h5ad")


@pytest.fixture(scope="module")
def controls(screen):
    return control_cells(screen, ObsColumns(), None, None)


@pytest.fixture
def model():
    return untrained()


def read(path):
    return anndata.read_h5ad(path) if path.suffix == ".h5ad" else read_predicted(path)


def alone(model, controls, request, **sampling):
    return model.predict(controls, **{name: getattr(request, name) for name in COLUMNS}, **sampling)


def interrupt_after(monkeypatch, n):
    """The process stops in the prediction after the n-th; the list gets the numbers of those before."""
    write, done = predictions.write_predicted, []

    def stopping(cells, part):
        if len(done) == n:
            raise KeyboardInterrupt
        done.append(int(part.stem.removeprefix("part-")))
        write(cells, part)

    monkeypatch.setattr(predictions, "write_predicted", stopping)
    return done


@pytest.mark.parametrize("suffix", ["h5ad", "parquet"])
def test_a_single_prediction_is_a_file_of_what_the_model_predicts(model, screen, controls, tmp_path, suffix):
    model.training = replace(model.training, calibration=CALIBRATION)
    out, genes = tmp_path / f"one.{suffix}", tmp_path / "genes.csv"
    done = predict_request(model, screen, REQUESTS[1], out, summary=genes)
    expected = alone(model, controls, REQUESTS[1])
    found = read(out)
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
    assert list(found.obs_names) == list(expected.obs_names)
    pd.testing.assert_frame_equal(found.obs.astype(str), expected.obs.astype(str))
    assert found.uns["perturbdiff"].keys() == expected.uns["perturbdiff"].keys()
    width = pd.read_csv(genes).eval("(upper - lower)[(mean > 0) | (control_mean > 0)]").median()
    assert done.widths == pytest.approx([width], rel=1e-6)
    with pytest.raises(FileExistsError, match=f"one.{suffix} exists"):
        predict_request(model, screen, REQUESTS[1], out)


@pytest.mark.parametrize("suffix", ["h5ad", "parquet"])
def test_each_request_is_predicted_as_it_would_be_alone(model, screen, controls, tmp_path, suffix):
    out = tmp_path / "new" / f"all.{suffix}"
    done = predict_requests(model, screen, REQUESTS, out)
    found = read(out)
    assert done.n_cells == found.n_obs
    assert found.obs_names.is_unique
    assert list(found.var_names) == list(model.genes.names)
    for number, request in enumerate(REQUESTS):
        expected = alone(model, controls, request)
        own = found[found.obs["request"] == number]
        np.testing.assert_array_equal(own.X.toarray(), expected.X.toarray())
        for column in expected.obs:
            assert list(own.obs[column]) == list(expected.obs[column])
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("suffix", ["h5ad", "parquet"])
@pytest.mark.parametrize("requests", [REQUESTS[1:2], [REQUESTS[0], REQUESTS[4]], REQUESTS])
def test_control_cells_stand_behind_the_predicted_ones_each_once(model, screen, controls, tmp_path, suffix, requests):
    plain, out = tmp_path / f"plain.{suffix}", tmp_path / f"both.{suffix}"
    if len(requests) == 1:
        predict_request(model, screen, requests[0], plain)
        done = predict_request(model, screen, requests[0], out, with_controls=True)
    else:
        predict_requests(model, screen, requests, plain)
        done = predict_requests(model, screen, requests, out, with_controls=True)
    found, expected = read(out), read(plain)
    n = expected.n_obs
    np.testing.assert_array_equal(found[:n].X.toarray(), expected.X.toarray())
    pd.testing.assert_frame_equal(found.obs[:n].astype(str), expected.obs.astype(str))
    assert (found.obs["perturbation"][:n] != "control").all()
    rows = found[n:]
    wanted = controls.obs[["cell_type", "batch"]].astype(str)
    chosen = np.zeros(len(wanted), dtype=bool)  # a loop over what each request starts from
    for request in requests:
        chosen |= (wanted["cell_type"].isin([request.cell_type]) | (request.cell_type is None)) & (
            wanted["batch"].isin([request.batch]) | (request.batch is None)
        )
    assert sorted(rows.obs["source_control"]) == sorted(wanted.index[chosen])
    assert set(rows.obs["perturbation"]) == {"control"}
    assert set(rows.obs["population"]) == {-1}
    own = controls[list(rows.obs["source_control"])]
    np.testing.assert_allclose(rows.X.toarray(), log1p_cp10k(own.X), rtol=1e-5)
    for column in ("cell_type", "batch"):
        assert list(rows.obs[column]) == list(own.obs[column])
    assert found.obs_names.is_unique
    assert (done.n_cells, done.n_controls) == (n, chosen.sum())
    said = found.uns["perturbdiff"]
    assert (said["control_label"], said["n_controls"]) == ("control", chosen.sum())
    assert f"{n:,} cells and {chosen.sum():,} control cells" in done.text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, plain.name]


@pytest.mark.parametrize("all_genes", [False, True])
def test_control_cells_in_the_file_have_the_genes_of_the_predictions(model, controls, tmp_path, all_genes):
    fewer = controls[:, ["gene_7", *[f"gene_{i}" for i in range(3, 7)], *[f"gene_{i}" for i in range(8, 12)]]].copy()
    with pytest.warns(UserWarning, match="the controls lack 3"):
        predicted = model.predict(fewer, perturbation=["A", "B"], all_genes=all_genes, with_controls=True)
    rows = predicted[predicted.obs["perturbation"] == "control"]
    assert rows.n_obs == fewer.n_obs  # once, however many are predicted
    assert list(rows.var_names) == [f"gene_{i}" for i in range(0 if all_genes else 3, 12)]
    expected = pd.DataFrame(log1p_cp10k(fewer.X), columns=fewer.var_names)
    np.testing.assert_allclose(rows.X.toarray(), expected.reindex(columns=rows.var_names, fill_value=0.0), rtol=1e-5)
    assert "measured" in rows.var


def test_evaluation_takes_no_control_cell_for_a_prediction(model, screen, controls):
    # Cells that were measured: what random weights predict is in no space that evaluation takes.
    cells = anndata.read_h5ad(screen)
    cells = cells[cells.obs["perturbation"] == "A"].copy()
    cells.X = sparse.csr_matrix(log1p_cp10k(cells.X).astype(np.float32))
    cells.obs = cells.obs.assign(source_control="unknown", population=0)
    cells.uns["perturbdiff"] = {"target_sum": 1e4, "library_size_col": ""}
    both = model.add_controls(cells, controls)
    assert both.n_obs == cells.n_obs + controls.n_obs
    pd.testing.assert_frame_equal(evaluate(both, screen).conditions, evaluate(cells, screen).conditions)


@pytest.mark.parametrize("suffix", ["h5ad", "parquet"])
def test_the_file_says_what_was_asked_and_how_it_was_made(model, controls, tmp_path, suffix):
    model.training = replace(model.training, calibration=CALIBRATION)
    other = controls.copy()
    other.obs["cell_type"] = other.obs["cell_type"].astype(str).replace("T", "B cell")
    requests = [Request("A", "NK"), Request("B", "B cell", n_populations=3), Request("B", "B cell", seed=4)]
    done = predict_requests(model, other, requests, tmp_path / f"all.{suffix}")
    said = read(tmp_path / f"all.{suffix}").uns["perturbdiff"]
    assert (said["n_steps"], said["x_kind"], said["target_sum"]) == (2, "log1p", 1e4)
    assert "seed" not in said  # they differ
    assert list(said["unseen"]) == ["cell_type B cell"]
    assert {name: list(values) for name, values in said["requests"].items()} == {
        "perturbation": ["A", "B", "B"],
        "cell_type": ["NK", "B cell", "B cell"],
        "batch": ["", "", ""],
        "n_cells": ["", "", ""],
        "n_populations": ["1", "3", "1"],
        "seed": ["0", "0", "4"],
        "unseen": ["", "cell_type B cell", "cell_type B cell"],
        "verdict": ["", "", ""],  # nobody can know: it has no means of training conditions
        "expected_pearson": ["", "", ""],
    }
    assert done.unseen == {"cell_type B cell": [1, 2]}
    assert np.isnan(done.widths).tolist() == [True, False, True]


def test_the_summary_holds_each_gene_of_each_request(model, controls, tmp_path):
    model.training = replace(model.training, calibration=CALIBRATION)
    predict_requests(model, controls, REQUESTS, tmp_path / "all.parquet", summary=tmp_path / "genes.csv")
    table = pd.read_csv(tmp_path / "genes.csv")
    assert len(table) == len(REQUESTS) * len(model.genes)
    own = table[table["request"] == 1].reset_index(drop=True)
    assert set(own["perturbation"]) == {"A+B"}
    obs = controls.obs
    of_context = controls[(obs["cell_type"] == "T") & (obs["batch"] == "b2")]
    expected = population_summary(alone(model, controls, REQUESTS[1]), mean_expression(model, of_context))
    for name in ("mean", "control_mean", "delta", "spread"):
        np.testing.assert_allclose(own[name], expected[name], rtol=1e-6)
    np.testing.assert_allclose(own["upper"] - own["mean"], 2 * np.hypot(own["spread"], 0.1), rtol=1e-6)


@pytest.mark.parametrize("suffix", ["h5ad", "parquet"])
@pytest.mark.parametrize("all_genes", [False, True])
def test_genes_that_the_controls_lack_are_counted_and_never_numbers(model, controls, tmp_path, suffix, all_genes):
    names = np.array(model.gene_names)
    absent = sorted(np.random.default_rng().choice(12, 4, replace=False))
    fewer, lost = controls[:, np.delete(names, absent)].copy(), list(names[absent])
    paths = {"out": tmp_path / f"p.{suffix}", "summary": tmp_path / "genes.csv"}
    one = predict_request(model, fewer, REQUESTS[1], **paths, all_genes=all_genes)
    alone_table, alone_file = pd.read_csv(paths["summary"]), read(paths["out"])
    many = predict_requests(model, fewer, REQUESTS, **paths, all_genes=all_genes, overwrite=True)
    table, file = pd.read_csv(paths["summary"]), read(paths["out"])
    for done, found, of_genes in ((one, alone_file, alone_table), (many, file, table)):
        assert list(found.var_names) == list(names if all_genes else fewer.var_names)
        assert list(found.var["measured"]) == [name not in lost for name in found.var_names]
        assert list(found.uns["perturbdiff"]["genes_absent"]) == lost
        assert list(done.absent) == lost
        said = done.text()
        assert f"absent      4 genes that the controls lack, {'kept' if all_genes else 'left out'}" in said
        assert f"{paths['out']}: {found.n_obs} cells, {12 if all_genes else 8} genes" in said
        assert "NaN for the 4 absent ones" in said
        assert list(of_genes["gene"]) == list(names) * (len(of_genes) // 12)
        unknown = of_genes["gene"].isin(lost)
        assert of_genes.loc[unknown, ["mean", "control_mean", "delta", "spread"]].isna().all(axis=None)
        assert of_genes.loc[~unknown, ["mean", "control_mean", "delta"]].notna().all(axis=None)


def test_the_control_mean_is_that_of_log1p_counts(model, controls):
    X = controls.X.toarray().astype(float)
    expected = np.log1p(X / X.sum(1, keepdims=True) * 1e4).mean(0)
    np.testing.assert_allclose(mean_expression(model, controls), expected, rtol=1e-5)
    found = mean_expression(model, controls[:, 3:].copy())
    assert found[["gene_0", "gene_1", "gene_2"]].isna().all()
    X = X[:, 3:]
    np.testing.assert_allclose(found[3:], np.log1p(X / X.sum(1, keepdims=True) * 1e4).mean(0), rtol=1e-5)


@pytest.mark.parametrize("suffix", ["h5ad", "parquet"])
def test_a_run_that_was_stopped_goes_on_where_it_was(model, controls, tmp_path, suffix):
    undisturbed, out = tmp_path / f"undisturbed.{suffix}", tmp_path / f"all.{suffix}"
    predict_requests(model, controls, REQUESTS, undisturbed)
    with pytest.MonkeyPatch.context() as patch:
        first = interrupt_after(patch, 1)  # of two that are predicted together
        with pytest.raises(KeyboardInterrupt):
            predict_requests(model, controls, REQUESTS, out)
    assert not out.exists()
    (tmp_path / f"all.{suffix}.parts" / ".part-000003.parquet.partial").write_bytes(b"half")
    with pytest.MonkeyPatch.context() as patch:
        second = interrupt_after(patch, 99)
        done = predict_requests(model, controls, REQUESTS, out)
    assert (first, sorted(second)) == ([0], [1, 2, 3, 4])
    assert done.n_found == 1
    if suffix == "parquet":
        assert out.read_bytes() == undisturbed.read_bytes()
    one, other = read(out), read(undisturbed)
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())
    pd.testing.assert_frame_equal(one.obs, other.obs)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"all.{suffix}", f"undisturbed.{suffix}"]


def test_a_part_that_is_damaged_is_predicted_again(model, controls, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            predict_requests(model, controls, REQUESTS, tmp_path / "all.h5ad")
    part = tmp_path / "all.h5ad.parts" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    again = interrupt_after(monkeypatch, 99)
    predict_requests(model, controls, REQUESTS, tmp_path / "all.h5ad")
    assert again == [1, 2, 4]


def other_requests(model, controls):
    return model, controls, [*REQUESTS[:-1], Request("A", "T")], {}


def other_weights(model, controls):
    with torch.no_grad():
        next(model.denoiser.parameters())[0] += 1e-3
    return model, controls, REQUESTS, {}


def other_controls(model, controls):
    changed = controls.copy()
    changed.X[3, 4] += 1
    return model, changed, REQUESTS, {}


def other_means(model, controls):
    genes = len(model.genes)
    means = TrainingMeans(
        ["A"], ["B"], ["b"], np.ones((1, genes)), np.ones((1, genes)), np.ones(1, dtype=int), genes=model.genes,
        overdispersion=np.zeros(genes),
    )  # fmt: skip
    other = copy(model)
    other.means = means
    return other, controls, REQUESTS, {}


def other_settings(model, controls):
    return model, controls, REQUESTS, {"guidance_scale": 0.5}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_requests, "requests"),
        (other_weights, "model"),
        (other_means, "model"),
        (other_controls, "controls"),
        (other_settings, "settings"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Changing the sparsity structure.*")
def test_parts_of_another_run_are_never_mixed_in(model, controls, tmp_path, change, what):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            predict_requests(model, controls, REQUESTS, tmp_path / "all.h5ad")
    model, controls, requests, sampling = change(model, controls)
    with pytest.raises(ValueError, match=f"1 predictions of a run that had another {what}; give the same command"):
        predict_requests(model, controls, requests, tmp_path / "all.h5ad", **sampling)
    assert (tmp_path / "all.h5ad.parts" / "part-000000.parquet").exists()


BAD = {
    "unknown": ([Request("A"), Request("a", line=3)], {}, KeyError, "line 3 .*perturbation 'a'.*did you mean A"),
    "no controls": ([Request("A"), Request("A", "B", line=3)], {}, ValueError, "line 3 .*no control cell .* 'B'"),
    "too many": (
        [Request("A", n_cells=1 << 25, n_populations=9, line=2)],
        {},
        ValueError,
        "line 2 .*301,989,888 cells",
    ),
    "format": ([Request("A")], {"out": "all.csv"}, ValueError, "all.csv must end in .h5ad or .parquet"),
    "steps": ([Request("A")], {"steps": 2000}, ValueError, "between 1 and"),
    "overlap": ([Request("A")], {"min_gene_overlap": 2}, ValueError, "between 0 and 1"),
}


@pytest.mark.parametrize(("requests", "options", "error", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_and_nothing_is_left(model, controls, tmp_path, requests, options, error, message):
    options = {"out": "all.h5ad", **options}
    with pytest.raises(error, match=message):
        predict_requests(model, controls, requests, tmp_path / options.pop("out"), **options)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_replaced_only_on_request(model, controls, tmp_path):
    out, summary = tmp_path / "all.h5ad", tmp_path / "genes.csv"
    for path in (out, summary):
        path.write_text("mine")
        with pytest.raises(FileExistsError, match=f"{path.name} exists"):
            predict_requests(model, controls, REQUESTS, out, summary=summary)
        assert path.read_text() == "mine"
        if path is out:
            out.unlink()
    out.write_text("mine")
    predict_requests(model, controls, REQUESTS, out, summary=summary, overwrite=True)
    assert anndata.read_h5ad(out).n_obs > 0
    assert len(pd.read_csv(summary)) == 60


def test_files_of_others_in_the_folder_of_parts_stay(model, controls, tmp_path):
    folder = tmp_path / "all.h5ad.parts"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    predict_requests(model, controls, REQUESTS, tmp_path / "all.h5ad")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_second_run_beside_the_first_is_refused(model, controls, tmp_path):
    folder = tmp_path / "all.h5ad.parts"
    folder.mkdir()
    first = Lock(folder / "lock", "writing")
    first.take()
    try:
        with pytest.raises(FileExistsError, match="another process is writing"):
            predict_requests(model, controls, REQUESTS, tmp_path / "all.h5ad")
        with pytest.raises(FileExistsError, match="another process is writing"):
            predict_request(model, controls, REQUESTS[0], tmp_path / "all.h5ad")
    finally:
        first.release()


@pytest.mark.parametrize("many", [False, True])
def test_what_another_run_wrote_meanwhile_is_not_replaced(model, controls, tmp_path, monkeypatch, many):
    out, generate = tmp_path / "all.h5ad", PerturbDiff.generate_each

    def slow(*given, **options):
        out.write_text("of another")
        return generate(*given, **options)

    monkeypatch.setattr(PerturbDiff, "generate_each", slow)
    predict, what = (predict_requests, REQUESTS) if many else (predict_request, REQUESTS[0])
    with pytest.raises(FileExistsError, match=r"all\.h5ad exists"):
        predict(model, controls, what, out)
    assert out.read_text() == "of another"


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kept", ["out", "both"])
def test_after_a_kill_between_predictions_and_summary_the_same_call_goes_on(
    model, controls, tmp_path, monkeypatch, many, kept
):
    class Killed(BaseException):
        pass

    def kill(*given):
        raise Killed

    def unlink(path, unlink=Path.unlink, **options):
        return kill() if path.name == predictions.WRITTEN else unlink(path, **options)

    def predict(name):
        out, summary = tmp_path / f"{name}.h5ad", tmp_path / f"{name}.csv"
        if many:
            predict_requests(model, controls, REQUESTS, out, summary=summary)
        else:
            predict_request(model, controls, REQUESTS[0], out, summary=summary)
        return read(out).X, summary.read_text()

    X, summary = predict("straight")
    with monkeypatch.context() as patch:
        if kept == "out":
            patch.setattr(predictions, "to_disk", kill)
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            predict("killed")
    assert (tmp_path / "killed.h5ad").exists()
    assert (tmp_path / "killed.csv").exists() == (kept == "both")
    X_again, summary_again = predict("killed")
    assert (X_again != X).nnz == 0
    assert summary_again == summary
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".parts")] == []
    with pytest.raises(FileExistsError, match="exists"):
        predict("killed")


def test_small_requests_of_the_same_controls_and_seed_are_predicted_together():
    requests = [
        Request("A", "NK"),
        Request("A", "T"),
        Request("B", "NK"),
        Request("B", "NK", seed=1),
        Request("A", "NK"),
    ]
    assert predictions._blocks(requests, [6] * 5) == [[0, 2, 4], [1], [3]]
    many = predictions.BLOCK_CELLS
    assert predictions._blocks(requests, [6, 6, many, 6, 6]) == [[0, 2], [1], [3], [4]]
    assert predictions._blocks(requests, [many, 6, 6, 6, 6]) == [[0], [1], [2, 4], [3]]


def test_shares_are_assigned_once_and_evenly():
    n_cells = [5, 9, 3, 3, 8, 2, 2]
    shares = predictions._assigned(n_cells, 3)
    assert sorted(number for share in shares for number in share) == [*range(7)]
    loads = [sum(n_cells[number] for number in share) for share in shares]
    assert max(loads) - min(loads) <= 3
    assert predictions._assigned([], 2) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_several_processes_write_the_file_of_one(model, screen, controls, tmp_path, launcher):
    model.save_pretrained(tmp_path / "model")
    requests = tmp_path / "requests.csv"
    requests.write_text("perturbation,cell_type,n_cells,seed\n" + "A,NK,9,1\nA+B,,,2\nB,T,4,3\nB,,17,4\nA,T,,5\n")
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=3"],
        "accelerate": ["accelerate.commands.launch", f"--config_file={ROOT / 'recipes/accelerate/cpu_ddp.yaml'}"],
    }[launcher]
    predict = [
        "-m",
        "perturbdiff",
        "predict",
        tmp_path / "model",
        "--controls",
        screen,
        "--requests",
        requests,
        "--out",
    ]
    files = {}
    for name, before in (("one", []), ("many", ["-m", *start])):
        files[name] = tmp_path / f"{name}.parquet"
        command = list(map(str, [sys.executable, *before, *predict, files[name]]))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written ") == 1  # of the first process alone
    assert files["many"].read_bytes() == files["one"].read_bytes()
    assert not (tmp_path / "many.parquet.parts").exists()


@pytest.mark.slow
def test_a_killed_command_goes_on(model, screen, tmp_path):
    model.save_pretrained(tmp_path / "model")
    requests = tmp_path / "requests.csv"
    requests.write_text("perturbation,n_cells\n" + "A,200\n" * 80)
    out = tmp_path / "all.parquet"
    command = [sys.executable, "-m", "perturbdiff", "predict", tmp_path / "model", "--controls", screen]
    command = [str(word) for word in [*command, "--requests", requests, "--out", out]]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "all.parquet.parts"
    while running.poll() is None and len(list(folder.glob("part-*"))) < 5:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    n_done = len(list(folder.glob("part-*")))
    assert 5 <= n_done < 80
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"requests    80, {n_done} of them done before" in done.stdout
    assert read_predicted(out).n_obs == 80 * 200
    assert [path.name for path in tmp_path.glob("all*")] == ["all.parquet"]


def knowing(n_batches=4, noise=0.05):
    """A model that remembers the mean responses of A and B in batches of NK cells; of A strong ones, of B noise."""
    rng = np.random.default_rng()
    names, batches = ["A"] * n_batches + ["B"] * n_batches, [f"old{i}" for i in range(n_batches)] * 2
    control = np.tile(rng.random((n_batches, 12)) + 5.0, (2, 1))
    of_a = np.repeat([rng.normal(0, 1, 12), np.zeros(12)], n_batches, axis=0)
    perturbed = control + of_a + rng.normal(0, noise, control.shape)
    n = len(names)
    plain = untrained()
    means = TrainingMeans(names, ["NK"] * n, batches, control, perturbed, np.full(n, 50), plain.vocabularies.notation)
    return PerturbDiff(
        plain.denoiser, plain.genes, plain.vocabularies, plain.preprocessing, plain.config, plain.training, means=means
    )


def test_what_can_be_told_is_said_with_a_prediction(controls, tmp_path):
    model, own = knowing(), controls[controls.obs["cell_type"] == "NK"].copy()
    done = predict_request(model, own, Request("A", "NK", "b1"), tmp_path / "one.h5ad", steps=1)
    said = read(tmp_path / "one.h5ad").uns["perturbdiff"]["trust"]
    expression = model.in_own_space(own)
    control = log1p_cp10k(expression.X)[(own.obs["batch"] == "b1").to_numpy()].mean(axis=0)
    expected = trust(model.means, Context("A", "NK", "unknown", control[None]))
    assert (said["verdict"], said["new"], said["n_left_out"]) == ("known", "batch", 8)
    assert said["expected_pearson"] == pytest.approx(expected.expected_pearson, abs=1e-3)
    line = next(line for line in done.text().splitlines() if line.startswith("trust"))
    assert line.startswith("trust       known: ")


def test_of_many_requests_those_that_nobody_can_tell_are_named(controls, tmp_path):
    model = knowing()
    requests = [Request("A", "NK"), Request("A", "T"), Request("A+B", "T")]
    summary = tmp_path / "summary.csv"
    done = predict_requests(model, controls, requests, tmp_path / "all.h5ad", steps=1, summary=summary)
    table = read(tmp_path / "all.h5ad").uns["perturbdiff"]["requests"]
    # Nothing says how responses go to another cell type: training had one. No combination was trained.
    assert list(table["verdict"]) == ["known", "cannot tell", "cannot tell"]
    assert list(table["expected_pearson"])[1:] == ["", ""]
    assert float(table["expected_pearson"][0]) > 0.5
    verdicts = pd.read_csv(summary).groupby("request")["verdict"].unique()
    assert [list(of) for of in verdicts] == [["known"], ["cannot tell"], ["cannot tell"]]
    assert "1 new response can be told; of 2 (number 1, 2)" in done.text()
