import json
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturbdiff.config import DataConfig, SplitConfig
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import control_halves, make_split, write_split
from perturbdiff.diffusion.generate import choose_controls
from perturbdiff.evaluation.doubt import COMPARED
from perturbdiff.evaluation.fair import CONDITION, ControlChoices, SimpleMethods
from perturbdiff.evaluation.held_out import predict_held_out
from perturbdiff.evaluation.metrics import METRICS, score_condition
from perturbdiff.evaluation.scores import (
    CEILING,
    MODEL,
    Scores,
    evaluate,
    score_conditions,
)
from perturbdiff.hub.records import SplitRecord
from perturbdiff.inference.output import write_predicted
from perturbdiff.model import PerturbDiff
from perturbdiff.training import run as training_run
from perturbdiff.training.loop import fit
from tests.simulated import tiny_config, write_screen


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(write_screen(folder), folder / "out", hold_out=("pert_0:type_0", "pert_2:type_1:batch_1"))
    fit(config)
    return config


@pytest.fixture(scope="module")
def screen(run):
    return Screen.read(run.data.screen, run.data)


@pytest.fixture(scope="module")
def split(run, screen):
    return make_split(screen, run.split, run.training.seed)


def truth_as_prediction(screen, rows):
    return anndata.AnnData(
        screen.expression.log1p(rows), screen.obs.iloc[rows], pd.DataFrame(index=list(screen.expression.genes.names))
    )


@pytest.fixture
def truth(screen, split):
    """What was measured of the held-out conditions, as a prediction."""
    return truth_as_prediction(screen, np.flatnonzero(split.test))


@pytest.fixture(scope="module")
def report(screen, split):
    return score_conditions(truth_as_prediction(screen, np.flatnonzero(split.test)), screen, "batch", split)


def test_held_out_conditions_are_predicted_from_each_control_at_most_once(run, screen, split):
    model = PerturbDiff.from_pretrained(f"{run.out}/model", device="cpu")
    predicted = predict_held_out(model, screen, split, "batch", seed=0)
    labels = ["perturbation", "cell_type", "batch"]
    measured = screen.obs[split.test].groupby(labels).size()
    start = screen.obs[screen.is_control].groupby(["cell_type", "batch"]).size() // 2
    wanted = {condition: min(n, start[condition[1:]]) for condition, n in measured.items()}
    assert predicted.obs.astype(str).groupby(labels).size().to_dict() == wanted
    assert not predicted.obs.duplicated([*labels, "source_control"]).any()
    assert predicted.obs_names.is_unique
    source = screen.obs.loc[predicted.obs["source_control"]]
    assert set(source["perturbation"]) == {"control"}
    for column in ("cell_type", "batch"):
        assert list(source[column]) == list(predicted.obs[column].astype(str))


def test_every_method_is_scored_on_every_held_out_condition(screen, split, report):
    conditions = {(p, c, b) for p, c, b in screen.obs[split.test][["perturbation", "cell_type", "batch"]].to_numpy()}
    for _, rows in report.conditions.groupby("method"):
        assert {tuple(row) for row in rows[["perturbation", "cell_type", "batch"]].to_numpy()} == conditions
    assert list(report.means().index) == [
        MODEL, "no change", "context mean", "perturbed mean", "perturbation mean", "ridge", "log space", "shrunk",
        "stacked", "transplant", CEILING,
    ]  # fmt: skip


def test_scores_say_how_many_conditions_could_be_told(screen, split, report):
    simple = SimpleMethods(screen, split, "batch")
    own = report.conditions[report.conditions["method"] == MODEL]
    of_verdict = {}
    for _, row in own.iterrows():
        condition = row["perturbation"], row["cell_type"], row["batch"]
        here = np.all(screen.obs[["cell_type", "batch"]].astype(str) == condition[1:], axis=1).to_numpy()
        start, _ = control_halves(screen, np.flatnonzero(here & screen.is_control))
        of_verdict.setdefault(simple.trust(condition, start).verdict, []).append(row["pearson_delta"])
    note = next(note for note in report.notes if note.startswith("By training conditions"))
    for verdict, pearson in of_verdict.items():
        shown = f"of {len(pearson)} nobody can tell" if verdict == "cannot tell" else f"{len(pearson)} "
        assert shown in note
        assert f"{np.mean(pearson):.2f}" in note


def test_the_truth_scores_perfectly_and_beats_every_baseline(report):
    means = report.means()
    assert means.loc[MODEL, "pearson_delta"] > means["pearson_delta"].drop(MODEL).max()
    assert means.loc[MODEL, "mse_of_means"] == pytest.approx(0.0, abs=1e-12)
    assert means.loc[MODEL, "variance_ratio"] == pytest.approx(1.0)
    assert (means.loc[MODEL, "energy_distance"] < means["energy_distance"].drop([MODEL, CEILING])).all()


def test_scores_are_those_of_the_matched_real_cells(screen, split):
    # An independent selection by pandas, with shifted cells as the prediction.
    obs = screen.obs
    rows = np.flatnonzero(((obs["perturbation"] == "pert_1") & (obs["cell_type"] == "type_0")).to_numpy() & split.train)
    predicted = truth_as_prediction(screen, rows)
    predicted.obs["perturbation"] = "pert_0"
    report = score_conditions(predicted, screen, "batch", split)
    for batch in ("batch_0", "batch_1"):
        here = (obs["cell_type"] == "type_0") & (obs["batch"] == batch)

        def cells(rows):
            return screen.expression.log1p(rows).toarray()

        def rows(label, here=here):
            return np.flatnonzero((here & (obs["perturbation"] == label)).to_numpy())

        start, truth = control_halves(screen, rows("control"))
        others = [np.flatnonzero((here & (obs["perturbation"] == label)).to_numpy() & split.train)
                  for label in obs["perturbation"].unique() if label != "control"]  # fmt: skip
        halves = [cells(of).mean(axis=0) for of in control_halves(screen, np.concatenate(others))]
        expected = score_condition(
            cells(rows("pert_1")), cells(rows("pert_0")), cells(start), cells(truth), len(start), tuple(halves)
        )
        row = report.conditions[(report.conditions["method"] == MODEL) & (report.conditions["batch"] == batch)].iloc[0]
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_of_more_cells_than_are_scored_their_order_does_not_choose(screen, split, truth, monkeypatch):
    monkeypatch.setattr("perturbdiff.evaluation.fair.MAX_CELLS", 5)
    reverse = truth[::-1].copy()
    one, other = (score_conditions(cells, screen, "batch", split).conditions for cells in (truth, reverse))
    pd.testing.assert_frame_equal(one, other)


def test_held_out_cells_do_not_reach_the_baselines(screen, split, truth, report):
    X = screen.expression.X.copy()
    X.data[np.repeat(split.test, np.diff(X.indptr))] += 50  # other measured cells, same training cells
    changed = replace(screen, expression=replace(screen.expression, X=X))
    a, b = (SimpleMethods(of, split, "batch").training for of in (screen, changed))
    np.testing.assert_array_equal(a.effect, b.effect)
    after = score_conditions(truth, changed, "batch", split)
    assert not np.allclose(report.means()["mse_of_means"].loc["ridge"], after.means()["mse_of_means"].loc["ridge"])


def test_conditions_choose_as_each_would_alone(screen):
    choices, controls = ControlChoices(screen.expression, 3), np.flatnonzero(screen.is_control)
    for rows, n_cells in ((controls[:30], 12), (controls[30:60], 12), (controls[:30], 7), (controls[:30], 12)):
        X, library_size = screen.expression.X[rows], screen.expression.library_size[rows]
        alone = choose_controls(replace(screen.expression, X=X, library_size=library_size), n_cells, 3, population=0)
        np.testing.assert_array_equal(choices(rows, n_cells), alone)


def test_genes_that_the_controls_lacked_are_scored_as_no_change(run, screen, truth, tmp_path):
    names, rng = list(truth.var_names), np.random.default_rng()
    absent = sorted(rng.choice(40, 15, replace=False))
    truth = anndata.concat([truth] * 3, index_unique="-")  # 60 cells a condition: each of 30 controls twice
    flagged = truth.copy()
    flagged.var["measured"] = ~np.isin(np.arange(40), absent)
    X = flagged.X.toarray()
    X[:, absent] = rng.random((len(X), 15)) * 5  # whatever a network says of them
    flagged.X = X
    found = score_conditions(flagged, screen, "batch")
    assert (found.n_genes, found.n_left_out) == (40, 15)
    # Squared errors of means add up: none of the genes that are the truth, and those of no change of the others.
    kept, everything = 0.0, 0.0
    for (p, c, b), row in found.conditions[found.conditions["method"] == MODEL].set_index(CONDITION).iterrows():
        obs, rows = screen.obs, {}
        for label in (p, "control"):
            chosen = (obs["perturbation"] == label) & (obs["cell_type"] == c) & (obs["batch"] == b)
            rows[label] = np.flatnonzero(chosen.to_numpy())
        halves = control_halves(screen, rows["control"])
        real, start, other = (screen.expression.log1p(of).toarray().mean(axis=0) for of in (rows[p], *halves))
        assert row["mse_of_means"] == pytest.approx(((real - start)[absent] ** 2).sum() / 40, rel=0.3, abs=2e-3)
        kept += (np.delete(real - other, absent) ** 2).sum()
        everything += ((real - other) ** 2).sum()
    assert found.kept_response == pytest.approx(kept / everything, rel=1e-4)
    lost = f"{1 - kept / everything:.0%} of the squared response"
    assert f"15 of 40 genes are not predicted and scored as no change, which hold {lost}" in found.notes[-1]

    # Left out, the same genes are scored the same; those that the screen lacks too are not scored.
    left_out = truth[:, flagged.var["measured"].to_numpy()].copy()
    left_out.uns["perturbdiff"] = {"genes_absent": [names[g] for g in absent]}
    write_predicted(left_out, tmp_path / "p.parquet")
    flagged.write_h5ad(tmp_path / "p.h5ad")
    measured = anndata.read_h5ad(run.data.screen)
    means = found.means().sort_index(axis=1)
    for predicted in (left_out, tmp_path / "p.parquet", flagged, tmp_path / "p.h5ad"):
        again = evaluate(predicted, measured)
        assert again.n_left_out == 15
        scored = again.means().rename(index={again.model: MODEL}).sort_index(axis=1)
        pd.testing.assert_frame_equal(scored, means, rtol=1e-4)
    without = evaluate(flagged, measured[:, np.delete(names, absent)].copy())
    assert (without.n_genes, without.n_left_out) == (25, 0)
    assert "no change" not in without.table().splitlines()[-1]


def test_a_column_measured_of_something_else_is_refused(screen, truth):
    truth.var["measured"] = "yes"
    with pytest.raises(ValueError, match="'measured' of the predictions holds 'yes'; it must be true or false"):
        score_conditions(truth, screen, "batch")


def test_predictions_in_another_logarithm_are_said(screen, split, truth, report):
    other = truth.copy()
    other.X = other.X / np.log(2)
    said = " ".join(score_conditions(other, screen, "batch", split).notes)
    assert "Predicted cells sum to" in said
    assert "times what measured ones do" in said
    assert not any("sum to" in note for note in report.notes)


def test_undefined_scores_are_counted_and_shown(screen, split, truth, report):
    assert report.undefined().loc[MODEL, "pearson_perturbed"] == 0
    one = truth[[0, *np.flatnonzero(truth.obs["perturbation"] == "pert_2")]].copy()
    found = score_conditions(one, screen, "batch", split)
    n = found.n_conditions - 1
    assert found.undefined().loc[MODEL, "energy_distance"] == 1  # one cell
    assert "[1]" in found.table()
    assert n == 1
    assert "mean over 2 held-out conditions" in found.table()
    assert max(map(len, report.table().splitlines())) <= 80


def test_scores_are_saved_as_parquet_and_json(split, report, tmp_path):
    table, as_json = report.save(tmp_path)
    again = Scores(pd.read_parquet(table))
    pd.testing.assert_frame_equal(again.means(), report.means(), check_names=False)
    saved = json.loads(as_json.read_text())
    assert saved["mean"]["no change"]["pearson_delta"] == 0
    assert saved["n_undefined"]["no change"]["pearson_delta"] == 0
    assert set(saved["mean"][MODEL]) == set(METRICS)
    assert saved["metrics"] == METRICS
    assert (saved["format_version"], saved["n_conditions"], saved["n_genes"]) == (2, 3, 40)
    assert (saved["model"], saved["ceiling"]) == (MODEL, CEILING)
    assert {MODEL, CEILING} <= saved["mean"].keys()
    assert saved["data"] == "screen.h5ad"
    assert saved["split"] == {"hold_out": list(split.config.hold_out), "sha256": None}
    low, high = saved["interval"][MODEL]["energy_distance"]
    assert low < saved["mean"][MODEL]["energy_distance"] < high
    assert saved["verdict"].startswith("By energy_distance, PerturbDiff is better than the best simple method (")


def test_files_and_arrays_score_alike(run, screen, split, truth, report, tmp_path):
    truth.write_h5ad(tmp_path / "p.h5ad")
    write_split(split, screen, tmp_path / "split.json")
    measured = anndata.read_h5ad(run.data.screen)
    by_file = evaluate(tmp_path / "p.h5ad", run.data.screen, tmp_path / "split.json")
    in_memory = evaluate(truth, measured, tmp_path / "split.json")
    for found in (by_file, in_memory):
        own = report.conditions.replace({"method": {MODEL: "predictions"}})  # nothing says who predicted them
        pd.testing.assert_frame_equal(found.conditions, own, rtol=1e-9)
        assert found.verdict() == report.verdict().replace(MODEL, "predictions")
        assert found.record().model == "predictions"
        sha256 = json.loads((tmp_path / "split.json").read_text())["sha256"]
        assert found.record().split == SplitRecord(("pert_0:type_0", "pert_2:type_1:batch_1"), sha256)
    assert (by_file.data, in_memory.data) == ("screen.h5ad", "screen in memory")


def test_without_a_split_the_model_stands_beside_no_change_only(screen):
    rows = np.flatnonzero((screen.obs["perturbation"] == "pert_1").to_numpy())
    report = score_conditions(truth_as_prediction(screen, rows), screen, "batch")
    assert list(report.means().index) == [MODEL, "no change", CEILING]
    assert len(report.conditions) == 3 * 4
    assert report.record().split is None


def test_where_controls_match_by_cell_type_batches_are_one_condition(screen, split, truth):
    truth.obs["batch"] = "another name"
    report = score_conditions(truth, screen, "cell_type", split)
    assert set(report.conditions["batch"]) == {"all"}
    assert report.means().loc[MODEL, "mse_of_means"] == pytest.approx(0.0, abs=1e-12)


def test_predictions_that_cannot_be_compared_are_refused(screen, split, truth):
    with pytest.raises(KeyError, match="perturbation"):
        score_conditions(anndata.AnnData(truth.X, None, truth.var), screen, "batch", split)
    elsewhere = truth.copy()
    elsewhere.obs["cell_type"] = "type_9"
    with pytest.raises(ValueError, match="no predicted condition was measured"):
        score_conditions(elsewhere, screen, "batch", split)
    foreign = truth.copy()
    foreign.var_names = [f"other_{i}" for i in range(foreign.n_vars)]
    with pytest.raises(ValueError, match="40 of the 40 predicted genes are not in"):
        score_conditions(foreign, screen, "batch", split)


def test_counts_are_not_taken_for_predictions(run):
    with pytest.raises(ValueError, match=r"screen\.h5ad holds raw counts"):
        evaluate(run.data.screen, run.data.screen)
    with pytest.raises(ValueError, match="the AnnData holds raw counts"):
        evaluate(anndata.read_h5ad(run.data.screen), run.data.screen)


def test_the_measured_cells_are_normalised_as_the_predictions_were(run, tmp_path):
    config = tiny_config(Path(run.data.screen), tmp_path / "out", "data.target_sum=500")
    fit(config)
    screen = Screen.read(config.data.screen, config.data)
    split = make_split(screen, config.split, config.training.seed)
    model = PerturbDiff.from_pretrained(tmp_path / "out" / "model", device="cpu")
    predicted = predict_held_out(model, screen, split, "batch", seed=0)
    path = tmp_path / "split.json"
    predicted.write_h5ad(tmp_path / "p.h5ad")
    write_split(split, screen, path)
    expected = score_conditions(predicted, screen, "batch", split).means()
    write_predicted(predicted, tmp_path / "p.parquet")
    for given in (predicted, tmp_path / "p.h5ad", tmp_path / "p.parquet"):
        pd.testing.assert_frame_equal(evaluate(given, config.data.screen, path).means(), expected)
    for words, settings in (((), {"data.target_sum": 7}), (["data.target_sum=null"], {"data.target_sum": 500})):
        with pytest.raises(ValueError, match="holds log1p values of 500 counts a cell, and the measured cells become"):
            evaluate(predicted, config.data.screen, path, overrides=words, **settings)
    measured = anndata.read_h5ad(config.data.screen)
    X = measured.X.toarray().astype(np.float64)
    measured.X = np.log2(1 + X / X.sum(1, keepdims=True) * 500)
    with pytest.raises(ValueError, match=r"holds log2\(1 \+ x\) of 500 .*; predictions are log1p values"):
        evaluate(measured, config.data.screen, path)


def test_the_scores_of_a_demo_name_its_screen_and_split(run, tmp_path):
    training_run.run(replace(run, out=str(tmp_path)))
    split = json.loads((tmp_path / "split.json").read_text())
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["split"] == {"hold_out": split["hold_out"], "sha256": split["sha256"]}
    assert saved["data"] == "screen.h5ad"


@pytest.mark.slow
def test_cell_eval_is_asked_on_the_same_cells_and_both_halves_of_the_controls(screen, split, truth, tmp_path):
    pytest.importorskip("cell_eval")
    scores = score_conditions(truth, screen, "batch", split, field=True)
    own = scores.conditions[scores.conditions["method"] == MODEL].set_index(CONDITION)
    theirs = scores.field.scores.set_index(CONDITION)
    for condition, row in theirs.iterrows():
        assert row["mse"] == pytest.approx(0, abs=1e-12)
        assert row["pearson_delta"] == pytest.approx(own.loc[condition, "pearson_delta"], abs=1e-5)
    assert "on the same cells and controls:" in scores.table()
    assert scores.save(tmp_path)[-1] == tmp_path / "cell_eval.csv"


def null_screen(seed, n=60, n_genes=200, contexts=("T", "NK")):
    """Perturbed cells are drawn as the controls of their context are: nothing has an effect."""
    rng = np.random.default_rng(seed)
    parts = []
    for context in contexts:
        means = rng.gamma(1.0, 3.0, n_genes)
        for label in ("control", "A", "B", "C"):
            counts = rng.poisson(means * rng.lognormal(0, 0.3, (n, 1)))
            obs = pd.DataFrame(
                {"perturbation": label, "cell_type": context, "batch": "b"},
                index=[f"{context}_{label}_{i}" for i in range(n)],
            )
            parts.append(anndata.AnnData(counts.astype(np.float32), obs=obs))
    adata = anndata.concat(parts)
    adata.var_names = [f"g{i}" for i in range(n_genes)]
    return Screen.read(adata, DataConfig(screen="memory"))


def test_no_effect_scores_nothing_for_any_method():
    found = []
    for seed in range(6):
        screen = null_screen(seed)
        split = make_split(screen, SplitConfig(["A:T"], [], 0.0), 0)
        controls = np.flatnonzero(screen.is_control & (screen.obs["cell_type"] == "T"))
        start, _ = control_halves(screen, controls)
        predicted = truth_as_prediction(screen, start)
        predicted.obs = predicted.obs.assign(perturbation="A", source_control=screen.obs.index[start])
        found.append(score_conditions(predicted, screen, "batch", split).means()["pearson_delta"])
    means = pd.concat(found, axis=1).drop(index=MODEL).mean(axis=1)
    assert (means.abs() < 0.15).all(), means


def test_of_predictions_from_all_controls_those_of_the_half_that_measures_the_truth_are_left_out():
    screen = null_screen(int(np.random.default_rng().integers(1 << 30)))
    split = make_split(screen, SplitConfig(["A:T"], [], 0.0), 0)
    controls = np.flatnonzero(screen.is_control & (screen.obs["cell_type"] == "T"))
    start, truth = control_halves(screen, controls)

    def scores(rows):
        predicted = truth_as_prediction(screen, rows)
        predicted.obs = predicted.obs.assign(perturbation="A", source_control=screen.obs.index[rows])
        return score_conditions(predicted, screen, "batch", split).conditions

    pd.testing.assert_frame_equal(scores(controls), scores(start))
    swapped = scores(truth).set_index("method")  # from the other half alone: the halves change places
    assert swapped.loc[MODEL, "n_control"] == len(truth)


def test_the_change_from_one_control_cell_is_not_scored():
    screen = null_screen(0)
    alone = np.flatnonzero(screen.is_control & (screen.obs["cell_type"] == "T"))[1:]
    screen = Screen.read(screen.adata(np.setdiff1d(np.arange(len(screen)), alone)), DataConfig(screen="memory"))
    split = make_split(screen, SplitConfig(["A:T"], [], 0.0), 0)
    scores = score_conditions(truth_as_prediction(screen, np.flatnonzero(split.test)), screen, "batch", split)
    assert scores.conditions["pearson_delta"].isna().all()
    assert scores.conditions["energy_distance"].notna().any()
    assert "1 of 1 conditions have one control cell" in scores.notes[0]


def test_why_a_condition_of_one_cell_lacks_scores_is_said(screen, split, truth):
    rows = np.flatnonzero((truth.obs["perturbation"] == "pert_0").to_numpy())[1:]
    scores = score_conditions(truth[np.setdiff1d(np.arange(truth.n_obs), rows)].copy(), screen, "batch", split)
    said = [note for note in scores.notes if "have one cell" in note]
    own = scores.conditions[scores.conditions["method"] == MODEL]
    single = own["n_pred"] == 1
    assert own.loc[single, "variance_ratio"].isna().all()
    assert said[0].startswith(f"{single.sum()} of {len(own)} conditions have one cell, measured or predicted")


def test_the_order_of_genes_changes_no_score(screen, split, truth, report):
    order = np.random.default_rng().permutation(len(screen.expression.genes))
    other = score_conditions(truth[:, order].copy(), screen.with_genes(order), "batch", split)
    pd.testing.assert_frame_equal(other.conditions, report.conditions, rtol=1e-6, atol=1e-9)


def test_methods_compare_whatever_the_numbers_of_their_cells():
    screen = null_screen(1, n=30)  # simple methods have 15 cells
    split = make_split(screen, SplitConfig(["A:T", "B:NK"], [], 0.0), 0)
    scores = score_conditions(truth_as_prediction(screen, np.flatnonzero(split.test)), screen, "batch", split)
    assert "not comparable" not in scores.verdict()


def test_one_profile_for_many_cells_is_a_prediction(run, tmp_path, screen, split):
    truth = truth_as_prediction(screen, np.flatnonzero(split.test))
    truth.X = truth.X.toarray()
    for labels in truth.obs.groupby(CONDITION, observed=True).groups.values():
        rows = truth.obs.index.get_indexer(labels)
        truth.X[rows] = truth.X[rows].mean(axis=0)
    write_split(split, screen, tmp_path / "split.json")
    assert evaluate(truth, run.data.screen, tmp_path / "split.json").n_conditions == 3
    truth.X = truth.X * 0
    assert evaluate(truth, run.data.screen, tmp_path / "split.json").n_conditions == 3


def test_doses_in_another_unit_are_refused(run, truth):
    adata = anndata.read_h5ad(run.data.screen)
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    adata.obs["dose"] = np.where(is_control, "0", "1 nM")
    truth.uns["perturbdiff"] = {"dose_unit": "uM"}
    with pytest.raises(ValueError, match="doses are in nM, uM"):
        evaluate(truth, adata, data={"dose_col": "dose"})


def test_the_difference_over_all_conditions_is_that_of_pairs():
    """Its interval is the t interval of the paired differences, whatever the conditions differ by."""
    rng = np.random.default_rng(0)
    n, level, shift = 40, rng.normal(0, 5, 40), rng.normal(0.3, 0.5, 40)
    labels = {"perturbation": [f"p{i}" for i in range(n)], "cell_type": "T", "batch": "b"}
    rows = []
    for method, values in ((MODEL, level - shift), ("ridge", level), ("no change", level + 9)):
        of = pd.DataFrame({"method": method, **labels, **dict.fromkeys(METRICS, 0.0), "energy_distance": values})
        for metric in COMPARED:
            of[f"error {metric}"] = of[f"difference error {metric}"] = 3.0
        rows.append(of)
    scores = Scores(pd.concat(rows, ignore_index=True))
    gain, (low, high) = scores.difference("energy_distance")
    expected = stats.t.interval(0.95, n - 1, shift.mean(), stats.sem(shift))
    assert gain == pytest.approx(shift.mean())
    np.testing.assert_allclose([low, high], expected, atol=0.03)
    assert "on 0 of 40 conditions, not distinguishable on 40; over all it is better" in scores.verdict()


def test_cells_that_repeat_a_control_are_scored_once():
    screen = null_screen(int(np.random.default_rng().integers(1 << 30)))
    split = make_split(screen, SplitConfig(["A:T"], [], 0.0), 0)
    start, _ = control_halves(screen, np.flatnonzero(screen.is_control & (screen.obs["cell_type"] == "T")))

    def scores(rows):
        obs = screen.obs.iloc[rows].assign(perturbation="A", source_control=screen.obs.index[rows])
        obs.index = [f"predicted_{i}" for i in range(len(rows))]
        predicted = anndata.AnnData(screen.expression.log1p(rows), obs, truth_as_prediction(screen, rows[:1]).var)
        return score_conditions(predicted, screen, "batch", split).conditions

    pd.testing.assert_frame_equal(scores(np.repeat(start, 3)), scores(start))
