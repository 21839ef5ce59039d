"""cell-eval and scPertEval through our door: their own numbers, whatever order or labels the cells come with."""

import json
import os
import subprocess
import sys
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from perturbdiff.evaluation import field
from perturbdiff.evaluation.field import cell_eval_file, cell_eval_scores, scperteval_scores
from tests.conftest import GOLDEN
from tests.screens import log1p_cp10k

PREDICTIONS = ["self", "good", "mean", "random", "control"]
# Metrics of all perturbations together: cell-eval writes one number into every row.
TOGETHER = ["pearson_edistance", "clustering_agreement", "de_spearman_sig"]


@pytest.fixture
def library():
    """Of cell-eval and scPertEval, whose first call in a process compiles for half a minute."""
    pytest.importorskip("cell_eval")
    pytest.importorskip("scperteval")


def log1p_cells(rng, n, genes, up=(), factor=6.0, **obs):
    """n cells of Poisson counts, log1p; genes of the positions `up` are expressed `factor` times as much."""
    means = np.linspace(0.5, 3.0, len(genes))
    means[list(up)] *= factor
    X = sparse.csr_matrix(log1p_cp10k(rng.poisson(means, (n, len(genes)))).astype(np.float32))
    table = pd.DataFrame({name: [value] * n for name, value in obs.items()}, index=[f"c{i}" for i in range(n)])
    return AnnData(X, obs=table, var=pd.DataFrame(index=genes))


def a_screen(perturbations=("A", "B", "C", "D"), contexts=("T",), n=12, n_genes=40, seed=0, factor=6.0):
    """Predicted, measured and control cells of the same conditions; each perturbation has three genes of its own."""
    rng = np.random.default_rng(seed)
    genes = [f"gene_{i}" for i in range(n_genes)]
    made = []
    for _ in range(2):
        parts = [
            log1p_cells(rng, n, genes, range(3 * k, 3 * k + 3), factor, perturbation=name, cell_type=context)
            for context in contexts
            for k, name in enumerate(perturbations)
        ]
        made.append(joined(parts))
    parts = [log1p_cells(rng, 30, genes, cell_type=context) for context in contexts]
    return *made, joined(parts)


def joined(parts):
    cells = anndata.concat(parts, merge="same", keys=range(len(parts)), index_unique="-")
    cells.obs_names = [f"cell_{i}" for i in range(cells.n_obs)]
    return cells


def shuffled(cells, seed):
    return cells[np.random.default_rng(seed).permutation(cells.n_obs)].copy()


def of(cells, wanted):
    return cells[cells.obs["target_gene"].astype(str).eq("non-targeting").to_numpy() == wanted].copy()


def golden_scores(name):
    folder = GOLDEN / "cell_eval_tiny10"
    if not folder.is_dir():
        pytest.skip(f"no golden scores at {folder}; set PERTURBDIFF_GOLDEN to the folder that holds them")
    real, predicted = anndata.read_h5ad(folder / "real.h5ad"), anndata.read_h5ad(folder / f"pred_{name}.h5ad")
    sides = (of(predicted, False), of(real, False), of(predicted, True), of(real, True))
    found = cell_eval_scores(*sides, perturbation_col="target_gene", context=[])
    expected = pd.read_csv(folder / f"results_{name}.csv").set_index("perturbation")
    return found, expected, json.loads((folder / "golden_means.json").read_text())[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PREDICTIONS)
def test_scores_are_those_that_cell_eval_prints(library, name):
    found, expected, means = golden_scores(name)
    table = found.scores.set_index("perturbation").loc[expected.index]
    assert list(table.columns) == found.metrics
    assert set(found.metrics) == set(expected.columns)
    np.testing.assert_allclose(table[expected.columns], expected.astype(float), rtol=0, atol=1e-6)
    assert found.n_nan.loc[expected.columns].tolist() == expected.isna().sum().tolist()
    assert found.n_nan["de_spearman_lfc_sig"] == 1
    for metric, mean in means.items():  # of the library, NaN as soon as one condition is
        if not np.isnan(mean):
            assert found.means()["mean"][metric] == pytest.approx(mean, abs=1e-6)
    significant = found.n_significant().set_index("perturbation").loc[expected.index]
    assert significant["real"].tolist() == expected["de_nsig_counts_real"].tolist()
    assert significant["predicted"].tolist() == expected["de_nsig_counts_pred"].tolist()
    assert found.versions["cell-eval"] == "0.8.2"


@pytest.mark.slow
@pytest.mark.parametrize("score", [cell_eval_scores, scperteval_scores])
def test_the_order_of_cells_conditions_and_of_measured_genes_changes_nothing(library, score):
    predicted, measured, control = a_screen(contexts=("T", "NK"))
    options = {"dynamic_range": True, "min_cells": 8} if score is scperteval_scores else {}
    expected = score(predicted, measured, control, **options)
    genes = np.random.default_rng(1).permutation(measured.n_vars)
    again = score(shuffled(predicted, 2), shuffled(measured, 3)[:, genes].copy(), shuffled(control, 4), **options)
    pd.testing.assert_frame_equal(again.scores, expected.scores, check_exact=True)
    if options:
        assert expected.dynamic_range[expected.metrics].notna().any(axis=None)
        pd.testing.assert_frame_equal(again.dynamic_range, expected.dynamic_range, check_exact=True)


@pytest.mark.slow
def test_each_context_is_scored_as_if_it_were_alone(library):
    predicted, measured, control = a_screen(contexts=("T", "NK"))
    together = cell_eval_scores(predicted, measured, control).scores
    assert together.groupby("cell_type").size().to_dict() == {"NK": 4, "T": 4}
    for context in ("T", "NK"):
        own = [cells[cells.obs["cell_type"] == context].copy() for cells in (predicted, measured, control)]
        alone = cell_eval_scores(*own).scores
        here = together[together["cell_type"] == context].reset_index(drop=True)
        pd.testing.assert_frame_equal(here, alone, check_exact=True)


@pytest.mark.slow
def test_controls_of_the_truth_are_others_than_those_of_the_prediction(library):
    predicted, measured, control = a_screen()
    halves = control[::2].copy(), control[1::2].copy()
    found = cell_eval_scores(predicted, measured, *halves, profile="anndata").scores.set_index("perturbation")
    for name in "ABCD":  # the definition, in a loop of its own
        cells = [side[side.obs["perturbation"] == name].X.toarray().mean(0) for side in (predicted, measured)]
        shifts = [mean - half.X.toarray().mean(0) for mean, half in zip(cells, halves, strict=True)]
        assert found.loc[name, "pearson_delta"] == pytest.approx(np.corrcoef(*shifts)[0, 1], abs=1e-5)
        assert found.loc[name, "mae"] == pytest.approx(np.abs(cells[0] - cells[1]).mean(), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("score", [cell_eval_scores, scperteval_scores])
def test_labels_are_never_more_than_text(library, score, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = a_screen(perturbations=("A", "B", "C", "D"))
    hostile = ["", "../../x,\n\"'=1+1" + "y" * 5000, "a\x00", "control"]
    assert sorted(hostile) == hostile, "as A to D are: ties are broken by that order"
    renamed = dict(zip("ABCD", hostile, strict=True))
    predicted, measured, control = (cells.copy() for cells in plain)
    for cells in (predicted, measured):
        cells.obs["perturbation"] = cells.obs["perturbation"].astype(str).map(renamed)
    found, expected = score(predicted, measured, control), score(*plain)
    assert found.scores["perturbation"].tolist() == hostile
    pd.testing.assert_frame_equal(found.scores[found.metrics], expected.scores[found.metrics], check_exact=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_perturbation_s_own_gene_is_left_out_of_the_discrimination_as_cell_eval_does(library):
    # What is predicted of "gene_0" is like the truth of the others, but for gene_0.
    predicted, measured, control = a_screen(perturbations=("gene_0", "x", "y"), factor=1.0, n=40)
    first = (predicted.obs["perturbation"] == "gene_0").to_numpy()
    truth = measured.X.toarray()
    truth[first, 0] = 14.0
    measured.X = sparse.csr_matrix(truth)
    guess = truth[~first].mean(0, keepdims=True) + np.zeros((predicted.n_obs, 1), np.float32)
    guess[first, 0] = 14.0
    predicted.X = sparse.csr_matrix(guess)
    own = cell_eval_scores(predicted, measured, control, profile="pds").scores.set_index("perturbation")
    for cells in (predicted, measured):
        cells.obs["perturbation"] = cells.obs["perturbation"].astype(str).replace("gene_0", "drug")
    other = cell_eval_scores(predicted, measured, control, profile="pds").scores.set_index("perturbation")
    assert other.loc["drug", "discrimination_score_l1"] == 1.0
    assert own.loc["gene_0", "discrimination_score_l1"] < 1.0


@pytest.mark.slow
def test_one_perturbation_has_nothing_to_be_told_from(library):
    found = cell_eval_scores(*a_screen(perturbations=("A",)))
    assert len(found.scores) == 1
    undefined = {name for name, n in found.n_nan.items() if n}
    assert {*TOGETHER, "discrimination_score_l1", "discrimination_score_l2", "discrimination_score_cosine"} <= undefined
    assert found.scores["pearson_delta"].notna().all()
    assert any("nothing to compare it with" in note for note in found.notes)
    theirs = scperteval_scores(*a_screen(perturbations=("A",)))
    assert theirs.scores[theirs.metrics].isna().all(axis=None)
    assert "one perturbation" in theirs.notes[0]


@pytest.mark.slow
def test_no_significant_gene_gives_no_perfect_score(library):
    found = cell_eval_scores(*a_screen(factor=1.0, n=5, seed=3))
    significant = found.n_significant()
    assert (significant["real"] == 0).all()
    for name in ("de_spearman_sig", "de_spearman_lfc_sig", "de_direction_match", "pr_auc", "roc_auc"):
        assert found.n_nan[name] == len(found.scores), name
    assert any("no measured condition has a significant gene" in note for note in found.notes)


@pytest.mark.slow
def test_one_cell_a_condition_and_predictions_of_zeros_are_scored(library):
    predicted, measured, control = a_screen(n=1)
    predicted.X = sparse.csr_matrix(predicted.shape, dtype=np.float32)
    found = cell_eval_scores(predicted, measured, control)
    table = found.scores.set_index("perturbation")
    for name in "ABCD":  # zeros are zeros, and are not taken for counts
        cell = measured[measured.obs["perturbation"] == name].X.toarray()
        assert table.loc[name, "mse"] == pytest.approx((cell**2).mean(), rel=1e-5)
    theirs = scperteval_scores(predicted, measured, control, dynamic_range=True)
    assert len(theirs.scores) == 4
    assert theirs.dynamic_range[theirs.metrics].isna().all(axis=None)
    assert "4 of 4 conditions have fewer than 30 measured cells" in theirs.notes[-1]


@pytest.mark.slow
def test_scperteval_gives_what_its_own_door_gives_and_how_well_its_metrics_tell_apart(library):
    import scperteval

    predicted, measured, control = a_screen(n=40, n_genes=60)
    names = ["mse", "pearson_ctrl", "de_auprc", "rank"]
    found = scperteval_scores(predicted, measured, control, protocols=names, dynamic_range=True)
    assert found.metrics == names
    control.obs["perturbation"] = "control"
    own = scperteval.prepare(joined([measured, control]), names)
    warnings.simplefilter("ignore")  # of its own: a perturbation is a large part of the cells
    table, base = found.scores.set_index("perturbation"), control.X.toarray().mean(0)
    for name in names:
        score = scperteval.score(own, name, predicted).per_perturbation.set_index("perturbation")["score"]
        np.testing.assert_allclose(table[name], score, rtol=1e-9)
        drf = scperteval.calibrate(own, name).per_perturbation.set_index("perturbation")["drf"]
        np.testing.assert_allclose(found.dynamic_range.set_index("perturbation")[name], drf, rtol=1e-9)
    for name in "ABCD":  # the definitions, in a loop of its own
        ours, truth = (c[c.obs["perturbation"] == name].X.toarray().mean(0) for c in (predicted, measured))
        assert table.loc[name, "mse"] == pytest.approx(((ours - truth) ** 2).mean(), rel=1e-4)
        assert table.loc[name, "pearson_ctrl"] == pytest.approx(np.corrcoef(ours - base, truth - base)[0, 1], abs=1e-5)


@pytest.mark.slow
def test_a_metric_that_fails_is_nan_and_said(library, monkeypatch):
    import cell_eval

    def broken(data, **options):
        raise ValueError("no such thing")

    entry = cell_eval.metrics_registry.get_metric("mse")
    monkeypatch.setattr(entry, "func", broken)
    found = cell_eval_scores(*a_screen(), profile="anndata")
    assert found.n_nan["mse"] == 4
    assert found.notes == ("T: mse: no such thing",)
    assert found.n_nan["mae"] == 0
    with pytest.raises(KeyError, match="profile='full' or 'de'"):
        found.n_significant()


@pytest.mark.slow
def test_the_libraries_print_nothing_and_leave_nothing(library, tmp_path, capfd):
    code = (
        "import os; from tests.evaluation.test_field import *; screen = a_screen(); before = dict(os.environ)\n"
        "cell_eval_scores(*screen, profile='anndata'); scperteval_scores(*screen, protocols='mse')\n"
        "changed = set(os.environ.items()) ^ set(before.items()); assert not changed, changed"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment |= {"PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment |= {"TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
    assert list((tmp_path / "here").iterdir()) == []
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.slow
def test_what_one_side_lacks_is_said_and_never_scored(library):
    predicted, measured, control = a_screen(contexts=("T", "NK"))
    predicted = predicted[predicted.obs["perturbation"] != "D"].copy()
    measured = measured[measured.obs["perturbation"] != "A"].copy()
    only_t = control[control.obs["cell_type"] == "T"].copy()
    found = cell_eval_scores(predicted, measured, only_t, profile="anndata")
    assert found.scores.groupby(["cell_type", "perturbation"]).size().to_dict() == {
        (context, name): 1 for context in ("T", "NK") for name in ("B", "C")
    }
    values = found.scores.set_index("cell_type")[found.metrics]
    assert values.loc["NK"].isna().all(axis=None)
    assert values.loc["T"].notna().any(axis=None)
    assert [note.split(";")[0] for note in found.notes[:3]] == [
        "2 conditions were predicted and not measured", "2 conditions were measured and not predicted",
        "NK: no cells of control have this cell_type",
    ]  # fmt: skip


@pytest.mark.slow
def test_control_cells_among_predicted_and_measured_ones_are_no_perturbation(library):
    predicted, measured, control = a_screen()
    control.obs["perturbation"] = "non-targeting"
    expected = cell_eval_scores(predicted, measured, control, profile="anndata")
    both = [joined([cells, control]) for cells in (predicted, measured)]
    pd.testing.assert_frame_equal(cell_eval_scores(*both, control, profile="anndata").scores, expected.scores)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, m, c: (p, m[:, :30].copy(), c), ValueError, "10 of the 40 genes are not in measured: gene_30"),
        (lambda p, m, c: (p, raw(m), c), ValueError, "measured holds whole numbers"),
        (lambda p, m, c: (p, m, times(c, np.log2(np.e))), ValueError, r"control holds log2\(1 \+ x\)"),
        (lambda p, m, c: (times(p, -1), m, c), ValueError, "is negative"),
        (lambda p, m, c: (times(p, 9.0), m, c), ValueError, "which stay under 15"),
        (lambda p, m, c: (p[:0].copy(), m, c), ValueError, "predicted has no cells"),
        (lambda p, m, c: (without(p, "perturbation"), m, c), KeyError, "'perturbation' not in predicted"),
        (lambda p, m, c: (called(p, "X"), m, c), ValueError, "nothing was both predicted and measured"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_library_is_loaded(change, error, message):
    with pytest.raises(error, match=message):
        cell_eval_scores(*change(*a_screen()))


def raw(cells):
    cells.X.data = np.rint(cells.X.data)
    return cells


def times(cells, factor):
    cells.X = cells.X * np.float32(factor)
    return cells


def without(cells, column):
    del cells.obs[column]
    return cells


def called(cells, label):
    cells.obs["perturbation"] = label
    return cells


def test_a_context_of_too_many_values_is_refused(monkeypatch, library):
    monkeypatch.setattr(field, "MAX_VALUES", 1000)
    with pytest.raises(ValueError, match="156 cells of 40 genes are 6,240 values"):
        cell_eval_scores(*a_screen())


@pytest.mark.parametrize("score", [cell_eval_scores, scperteval_scores])
def test_without_the_libraries_the_command_that_installs_them_is_said(monkeypatch, score):
    for name in ("cell_eval", "scperteval"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'perturbdiff\[eval\]'"):
        score(*a_screen())


def test_threads_must_be_at_least_one():
    with pytest.raises(ValueError, match=r"num_threads \(0\)"):
        cell_eval_scores(*a_screen(), num_threads=0)


@pytest.mark.slow
def test_files_of_both_sides_are_what_cell_eval_run_takes(library, tmp_path):
    predicted, measured, control = a_screen()
    measured = measured[:, ::-1].copy()
    sides = {"p": predicted, "r": measured}
    for name, cells in sides.items():
        cell_eval_file(cells, control, tmp_path / f"{name}.h5ad", genes=predicted.var_names, control_label="ctrl")
    command = [
        sys.executable, "-m", "cell_eval", "run", "-ap", "p.h5ad", "-ar", "r.h5ad", "--pert-col", "perturbation",
        "--control-pert", "ctrl", "-o", "out", "--num-threads", "1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = pd.read_csv(tmp_path / "out" / "results.csv").set_index("perturbation").sort_index()
    ours = cell_eval_scores(predicted, measured, control).scores.set_index("perturbation")
    np.testing.assert_allclose(ours[theirs.columns].astype(float), theirs, rtol=0, atol=1e-6)


def test_a_file_for_cell_eval_is_whole_and_refuses_perturbed_cells_called_as_controls(tmp_path):
    predicted, measured, control = a_screen()
    path = cell_eval_file(measured, control, tmp_path / "r.h5ad", genes=predicted.var_names[:7])
    found = anndata.read_h5ad(path)
    assert list(found.var_names) == list(predicted.var_names[:7])
    assert found.obs["perturbation"].value_counts().to_dict() == {"control": 30, "A": 12, "B": 12, "C": 12, "D": 12}
    assert set(found.obs) == {"perturbation", "cell_type"}
    expected = sparse.vstack([measured.X, control.X]).toarray()[:, :7]
    np.testing.assert_array_equal(found.X.toarray(), expected)
    with pytest.raises(FileExistsError, match=r"r\.h5ad exists"):
        cell_eval_file(measured, control, path)
    with pytest.raises(ValueError, match="12 of the cells are called 'A'"):
        cell_eval_file(measured, control, tmp_path / "x.h5ad", control_label="A")
    assert [file.name for file in tmp_path.iterdir()] == ["r.h5ad"]
