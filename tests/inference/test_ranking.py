"""Orders of perturbations that a double loop confirms, and that the truth of a simulated screen does."""

import errno
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from perturbdiff import model as model_module
from perturbdiff.config import DataConfig, ObsColumns, find_recipe, load_config
from perturbdiff.data.screen import Screen, control_cells
from perturbdiff.data.simulate import SimulationConfig, simulate
from perturbdiff.hub.records import Calibration, Coverage, Width
from perturbdiff.inference import candidates, ranking
from perturbdiff.inference.intervals import population_summary
from perturbdiff.inference.ranking import find_genes, rank_perturbations
from perturbdiff.means.training import TrainingMeans
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from tests.screens import counts_screen, log1p_cp10k, shared, written
from tests.untrained import untrained

NAMES = ("A", "B", "C", "D")
UP, DOWN = ["gene_1", "gene_4", "gene_7"], ["gene_2", "gene_9"]


@pytest.fixture(scope="module")
def model():
    return untrained(perturbations=NAMES, std=0.5)


@pytest.fixture(scope="module")
def controls():
    adata = counts_screen(n=8)
    return adata[adata.obs["perturbation"] == "control"].copy()


def signature_by_hand(model, controls, name, up, down, n_cells, n_populations, seed):
    """Scores of each population, from a prediction of its own, by loops."""
    predicted = model.predict(controls, perturbation=name, n_cells=n_cells, n_populations=n_populations, seed=seed)
    control = pd.DataFrame(log1p_cp10k(controls.X), index=controls.obs_names, columns=controls.var_names)
    sd = control.std(ddof=0)
    floor = 0.5 * np.median(sd[sd > 0])
    cells = pd.DataFrame(predicted.X.toarray(), columns=predicted.var_names)
    scores = []
    for k in range(n_populations):
        own = (predicted.obs["population"] == k).to_numpy()
        start = control.loc[predicted.obs["source_control"][own]]
        z = {g: (cells[g][own].mean() - start[g].mean()) / max(sd[g], floor) for g in up + down}
        scores.append(np.mean([z[g] for g in up] or [0]) - np.mean([z[g] for g in down] or [0]))
    return np.array(scores)


@pytest.mark.parametrize(("up", "down"), [(UP, DOWN), (UP, []), ([], DOWN)])
def test_a_signature_score_is_that_of_a_double_loop(model, controls, up, down):
    table = rank_perturbations(model, controls, up=up, down=down, n_cells=9, n_populations=3, seed=4).set_index(
        "perturbation"
    )
    scores = {name: signature_by_hand(model, controls, name, up, down, 9, 3, 4) for name in NAMES}
    assert set(table.index) == set(NAMES)
    for name, own in scores.items():
        assert table.loc[name, "score"] == pytest.approx(own.mean(), rel=1e-4)
        assert table.loc[name, "sd"] == pytest.approx(own.std(ddof=1), rel=1e-3)
        one_more = own.mean() / (own.std(ddof=1) * np.sqrt(1 + 1 / 3))
        assert table.loc[name, "p_above"] == pytest.approx(stats.t(2).cdf(one_more), abs=1e-4)
    assert list(table.index) == sorted(NAMES, key=lambda name: -scores[name].mean())
    assert list(table["rank"]) == [1, 2, 3, 4]
    for name in NAMES:
        ranks = [1 + sum(scores[other][k] > scores[name][k] for other in NAMES) for k in range(3)]
        assert (table.loc[name, "rank_low"], table.loc[name, "rank_high"]) == (min(ranks), max(ranks))
    assert not table["features_only"].any()


@pytest.mark.parametrize("factor", [5.0, 1e-9])
def test_the_probability_of_a_calibrated_signature_is_that_of_the_intervals_of_its_genes(controls, factor):
    model = untrained(perturbations=NAMES, std=0.5)
    coverage = Coverage("test", 3, 0.9, None)
    calibration = Calibration(0.9, 0.2, Width(factor, 0.1), Width(2 * factor, 0.3), 4, coverage)
    plain = rank_perturbations(model, controls, up=UP, down=DOWN, n_cells=9, n_populations=3)
    model.training = replace(model.training, calibration=calibration)
    found = rank_perturbations(model, controls, up=UP, down=DOWN, n_cells=9, n_populations=3)
    assert found["calibrated"].all()
    assert not plain["calibrated"].any()
    pd.testing.assert_frame_equal(
        found.drop(columns=["p_above", "calibrated"]), plain.drop(columns=["p_above", "calibrated"])
    )
    control = log1p_cp10k(controls.X)
    sd = np.maximum(control.std(axis=0), 0.5 * np.median(control.std(axis=0)))
    for row in found.itertuples():
        predicted = model.predict(controls, perturbation=row.perturbation, n_cells=9, n_populations=3)
        mean = pd.Series(control.mean(axis=0), index=controls.var_names)
        summary = population_summary(predicted, mean, calibration).set_index("gene")
        square = 0.0
        for gene, n in [*((g, len(UP)) for g in UP), *((g, len(DOWN)) for g in DOWN)]:
            half = summary.loc[gene, "upper"] - summary.loc[gene, "mean"]
            square += (half / stats.norm.ppf(0.95) / sd[controls.var_names.get_loc(gene)] / n) ** 2
        error = max(np.sqrt(square), row.sd * np.sqrt(1 + 1 / 3))
        assert row.p_above == pytest.approx(stats.norm.cdf(row.score / error), abs=1e-4)
    reference = model.predict(controls, perturbation="C", n_cells=20, seed=9)
    assert not rank_perturbations(model, controls, towards=reference, n_cells=5)["calibrated"].any()


def distance(x, y):
    between = np.mean([np.linalg.norm(a - b) for a in x for b in y])
    within = [sum(np.linalg.norm(a - b) for a in z for b in z) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return 2 * between - sum(within)


def test_a_reference_score_is_the_part_of_the_distance_that_goes_away(controls):
    model = untrained(perturbations=NAMES, std=0.1)
    reference = model.predict(controls, perturbation="C", n_cells=20, seed=9)  # log1p values
    reference = reference[:, [f"gene_{g}" for g in (3, 0, 1, 2, 5, 6, 7, 8, 9)]].copy()
    with pytest.warns(UserWarning, match="log1p values; of how many counts a cell cannot be checked"):
        table = rank_perturbations(model, controls, towards=reference, n_cells=9, n_populations=2, seed=4)
    wanted = reference.X.toarray().astype(float)
    columns = [model.genes.names.index(name) for name in reference.var_names]
    apart = distance(log1p_cp10k(controls.X)[:, columns], wanted)
    by_hand = {}
    for name in NAMES:
        predicted = model.predict(controls, perturbation=name, n_cells=9, n_populations=2, seed=4)
        cells = predicted.X.toarray().astype(float)[:, columns]
        scores = [1 - distance(cells[predicted.obs["population"] == k], wanted) / apart for k in (0, 1)]
        by_hand[name] = np.mean(scores)
        assert table.set_index("perturbation").loc[name, "score"] == pytest.approx(by_hand[name], rel=1e-4)
    assert list(table["perturbation"]) == sorted(NAMES, key=lambda name: -by_hand[name])


def test_no_change_scores_nothing(controls):
    model = untrained(perturbations=NAMES)
    for name, parameter in model.denoiser.named_parameters():
        if name.startswith("head."):
            torch.nn.init.zeros_(parameter)
    predicted = model.predict(controls, perturbation="A")
    start = pd.DataFrame(log1p_cp10k(controls.X), index=controls.obs_names).loc[predicted.obs["source_control"]]
    np.testing.assert_allclose(predicted.X.toarray(), start, atol=2e-3)  # the model predicts no change
    table = rank_perturbations(model, controls, up=UP, down=DOWN, n_cells=7, n_populations=3)
    assert table["score"].abs().max() < 2e-3


def test_candidates_see_the_same_cells_and_noise(model, controls, monkeypatch):
    # The score of one candidate does not depend on the others, and two names of one label would tie.
    every = rank_perturbations(model, controls, up=UP, n_populations=2).set_index("perturbation")
    names = np.array(["C", "A+B", "C"])
    some = rank_perturbations(model, controls, up=np.array(UP), candidates=names, n_populations=2)
    assert sorted(some["perturbation"]) == ["A+B", "C"]
    assert some.set_index("perturbation").loc["C", "score"] == every.loc["C", "score"]
    seen = []
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda *a, **k: seen.append(predict(*a, **k)) or seen[-1])
    rank_perturbations(model, controls, up=UP, n_populations=2)
    for other in seen[1:]:
        assert list(other.obs["source_control"]) == list(seen[0].obs["source_control"])


def test_files_are_ranked_as_what_they_hold(model, controls, tmp_path, capsys):
    adata = counts_screen(n=8)
    screen = written(adata, tmp_path / "screen.h5ad")
    model.save_pretrained(tmp_path / "model")
    few = {"n_cells": 5, "n_populations": 2, "cell_type": "NK"}
    table = rank_perturbations(tmp_path / "model", screen, up="gene_1", down=["gene_2", "nothing"], **few)
    assert "note        1 of the down genes are not in the model: nothing" in capsys.readouterr().out
    of_type = controls[controls.obs["cell_type"] == "NK"].copy()
    pd.testing.assert_frame_equal(table, rank_perturbations(model, of_type, up=["gene_1"], down=["gene_2"], **few))
    pd.testing.assert_frame_equal(table, rank_perturbations(model, controls, up=["gene_1"], down=["gene_2"], **few))
    with pytest.raises(ValueError, match="are no controls"):
        rank_perturbations(model, adata, up=UP)
    reference = written(adata[adata.obs["perturbation"] == "A", :9], tmp_path / "reference.h5ad")
    by_file, by_cells = (
        rank_perturbations(model, controls, towards=towards, candidates="A", **few)
        for towards in (reference, anndata.read_h5ad(reference))
    )
    pd.testing.assert_frame_equal(by_file, by_cells)


def test_genes_that_the_controls_lack_do_not_count(model, controls, capsys):
    fewer = controls[:, [f"gene_{g}" for g in range(12) if g not in (4, 9)]].copy()
    options = {"n_cells": 5, "n_populations": 2}
    table = rank_perturbations(model, fewer, up=UP, down=DOWN, **options)
    said = capsys.readouterr().out
    assert "note        the controls lack 1 of the up genes: gene_4\n" in said
    assert "note        the controls lack 1 of the down genes: gene_9\n" in said
    present = {"up": ["gene_1", "gene_7"], "down": ["gene_2"]}
    pd.testing.assert_frame_equal(table, rank_perturbations(model, fewer, **present, **options))
    assert "lack" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"the controls have none of the up genes \(gene_4, gene_9\); name genes"):
        rank_perturbations(model, fewer, up=["gene_4", "gene_9"], down=["gene_2"], **options)
    with pytest.raises(ValueError, match="gene_4 must not be an up and a down gene"):
        rank_perturbations(model, fewer, up=UP, down=["gene_4", "gene_2"], **options)


def test_candidates_of_which_nobody_can_tell_are_flagged(controls):
    rng, plain = np.random.default_rng(), untrained(perturbations=NAMES, std=0.5)
    n_batches, n = 5, 15
    control = np.tile(rng.random((n_batches, 12)) + 5.0, (3, 1))
    effect = np.repeat([rng.normal(0, 1, 12), np.zeros(12), np.zeros(12)], n_batches, axis=0)
    means = TrainingMeans(
        list(np.repeat(["A", "B", "C"], n_batches)), ["NK"] * n, [f"old{i}" for i in range(n_batches)] * 3, control,
        control + effect + rng.normal(0, 0.1, control.shape), np.full(n, 50), plain.vocabularies.notation,
    )  # fmt: skip
    model = PerturbDiff(
        plain.denoiser, plain.genes, plain.vocabularies, plain.preprocessing, plain.config, plain.training, means=means
    )
    table = rank_perturbations(model, controls, up=UP, cell_type="NK", n_cells=2, n_populations=2, steps=1)
    said = table.set_index("perturbation")
    assert said["verdict"]["A"] == "known"
    assert said["expected_pearson"]["A"] > 0.5
    assert said["verdict"]["D"] == "cannot tell"  # it was not among the training conditions
    without = rank_perturbations(plain, controls, up=UP, cell_type="NK", n_cells=2, n_populations=2, steps=1)
    assert set(without["verdict"]) == {""}
    assert without["expected_pearson"].isna().all()


def test_one_population_says_nothing_of_uncertainty(model, controls, monkeypatch):
    # The untrained candidates differ by less than a count.
    monkeypatch.setattr(model.config, "sampling", replace(model.config.sampling, whole_counts=False))
    table = rank_perturbations(model, controls, up=UP, n_populations=1)
    assert table[["sd", "p_above"]].isna().all(axis=None)
    assert list(table["rank_low"]) == list(table["rank_high"]) == list(table["rank"])


def test_perturbations_that_score_the_same_have_the_same_rank():
    table = ranking._table(
        ["b", "a", "c", "d"], np.array([[1.0], [1.0], [2.0], [0.0]]), np.full(4, np.nan), [False] * 4,
        [{"verdict": ""}] * 4,
    )  # fmt: skip
    assert list(table["perturbation"]) == ["c", "a", "b", "d"]
    assert list(table["rank"]) == [1, 2, 2, 4]


def test_genes_are_found_by_name_or_ensembl_id(model):
    genes = model.genes.__class__(("a", "b", "c"), ("E1", "", "E3"))
    assert find_genes(genes, ["c", "E1", "zz", "a", ""]) == ([2, 0], ["zz", ""])


BAD = {
    "nothing wanted": ({}, ValueError, "give genes"),
    "both": ({"up": UP, "towards": "controls"}, ValueError, "one of them"),
    "unknown genes": ({"up": ["Gene_1", "zz"]}, KeyError, r"none of the 2 up genes.*did you mean gene_1"),
    "up and down": ({"up": UP, "down": ["gene_4"]}, ValueError, "gene_4 must not be an up and a down gene"),
    "unknown candidate": ({"up": UP, "candidates": ["A", "Q"]}, KeyError, "perturbation 'Q' is not known"),
    "no candidate": ({"up": UP, "candidates": []}, ValueError, "no candidates"),
    "reference is controls": ({"towards": "controls"}, ValueError, "no further from the reference"),
    "one cell": ({"towards": "one"}, ValueError, "has 1 cells"),
    "one predicted cell": ({"towards": "controls", "n_cells": 1}, ValueError, r"n_cells \(1\) must be at least 2"),
    "no cells": ({"up": UP, "n_cells": 0}, ValueError, r"n_cells \(0\)"),
    "no populations": ({"up": UP, "n_populations": 0}, ValueError, r"n_populations \(0\)"),
}


@pytest.mark.parametrize(("wanted", "error", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_ranked_is_refused(model, controls, wanted, error, message):
    towards = {"controls": controls, "one": controls[:1].copy()}.get(wanted.get("towards"))
    with pytest.raises(error, match=message):
        rank_perturbations(model, controls, **{**wanted, **({} if towards is None else {"towards": towards})})


def test_no_varying_gene_is_refused(model, controls):
    same = anndata.concat([controls[:1]] * 5, index_unique="-")
    with pytest.raises(ValueError, match="no gene varies"):
        rank_perturbations(model, same, up=UP)


@pytest.mark.slow
def test_the_ranking_recovers_the_true_order_of_a_simulated_screen(tmp_path):
    from perturbdiff import PerturbDiff
    from tests.simulated import tiny_config

    # Six perturbations; the signature is of the genes that pert_2 moves most. Training does not see the second cell
    # type under half of them, and the ranking is made there.
    simulation = SimulationConfig(
        n_genes=60, n_cell_types=2, n_batches=1, n_perturbations=6, cells_per_condition=80,
        control_cells_per_context=150, n_effect_genes=20, effect_size=1.2, batch_variability=0.0,
    )  # fmt: skip
    truth = simulate(simulation, tmp_path / "screen.h5ad")
    words = (
        "training.n_steps=250", "optim.lr=0.003", "data.set_size=16", "data.sets_per_batch=8", "denoiser.width=48",
        "training.validate_every=1000", "training.save_every=1000", "training.log_every=100", "sampling.n_steps=8",
    )  # fmt: skip
    held_out = ("pert_0:type_1", "pert_2:type_1", "pert_4:type_1")
    config = tiny_config(tmp_path / "screen.h5ad", tmp_path / "run", *words, hold_out=held_out)
    model = PerturbDiff.from_pretrained(fit(config).folder / "model", device="cpu")
    change = {p: truth.log_fold_change(p, "type_1", "batch_0") for p in truth.perturbations[1:]}
    order = np.argsort(change["pert_2"])
    names = np.array(truth.genes)
    controls = control_cells(tmp_path / "screen.h5ad", ObsColumns(), "type_1", None)
    screen = Screen.read(tmp_path / "screen.h5ad", DataConfig(screen="unused"))

    def measured(name):
        return screen.expression.log1p(
            ((screen.obs["perturbation"] == name) & (screen.obs["cell_type"] == "type_1")).to_numpy()
        ).toarray()

    control = measured("control")
    sd = np.maximum(control.std(0), 0.5 * np.median(control.std(0)))
    up, down = order[-8:], order[:8]
    z = {p: (measured(p).mean(0) - control.mean(0)) / sd for p in change}
    true_score = {p: z[p][up].mean() - z[p][down].mean() for p in change}
    table = rank_perturbations(model, controls, up=names[up], down=names[down], cell_type="type_1", n_populations=3)
    assert table["perturbation"][0] == "pert_2"
    assert table["p_above"][0] > 0.9
    assert stats.spearmanr(table["score"], [true_score[p] for p in table["perturbation"]]).statistic > 0.8

    is_reference = ((screen.obs["perturbation"] == "pert_4") & (screen.obs["cell_type"] == "type_1")).to_numpy()
    file = anndata.read_h5ad(tmp_path / "screen.h5ad")
    towards = file[screen.obs.index[is_reference]].copy()
    table = rank_perturbations(model, controls, towards=towards, cell_type="type_1", n_populations=3)
    assert table["perturbation"][0] == "pert_4"


@pytest.mark.slow
def test_what_lowers_a_gene_is_its_own_knock_down_also_where_no_cell_received_it(tmp_path):
    # A panel of 72 genes, each of which is a candidate; of 14 targets two are held out.
    path, held_out = (
        shared("PERTURBDIFF_REAL_DATA", "data", "schraivogel2020_k562_tapseq_crispri.h5ad"),
        ("RIPK2", "DSCC1"),
    )
    words = [
        "data.library_size_col=n_counts_panel", "data.target_sum=null", "training.n_steps=40", "training.trackers=[]",
        "training.device=cpu",
    ]  # fmt: skip
    given = {"out": str(tmp_path / "run"), "data": {"screen": str(path)}, "split": {"hold_out": list(held_out)}}
    config = load_config(find_recipe("unseen_perturbations", "train"), words, given)
    screen = Screen.read(path, config.data)
    model = fit(config, screen).model
    obs = ObsColumns(perturbation="perturbation", cell_type="cell_type", batch="batch")
    controls = control_cells(path, obs, None, "TAP1")[::20].copy()
    measured = {name: screen.expression.log1p((screen.obs["perturbation"] == name).to_numpy()) for name in held_out}
    control = screen.expression.log1p(screen.is_control)
    for gene in (*held_out, "STK3"):
        table = rank_perturbations(model, controls, down=gene, candidates="all", n_populations=2)
        assert len(table) > 60
        assert table["perturbation"][0] == gene
        assert table["features_only"][0] == (gene != "STK3")
    for gene in held_out:  # by about as much as it was measured to fall
        predicted = model.generate(controls, gene)
        start = model.control_rows(controls, predicted).to_df()[gene].mean()
        column = list(screen.expression.genes.names).index(gene)
        true = measured[gene][:, column].mean() - control[:, column].mean()
        assert 0.5 < (predicted.to_df()[gene].mean() - start) / true < 2


# Many candidates.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_processes_give_the_same_ranking(controls, dtype):
    model = untrained(perturbations=NAMES, std=0.5).to(dtype=dtype)
    asked = {"up": UP, "down": DOWN, "candidates": [*NAMES, "A+B"], "n_cells": 9, "n_populations": 2, "seed": 3}
    alone = rank_perturbations(model, controls, **asked)
    pd.testing.assert_frame_equal(rank_perturbations(model, controls, **asked, n_processes=2), alone, rtol=1e-4)


@pytest.mark.parametrize("towards", [False, True])
def test_a_ranking_that_was_ended_is_taken_up(model, controls, towards, tmp_path, monkeypatch, capsys):
    asked = {"towards": model.predict(controls, perturbation="C", n_cells=20)} if towards else {"up": UP}
    asked |= {"n_populations": 2, "n_cells": 4}
    whole, kept, seen = rank_perturbations(model, controls, **asked), tmp_path / "ranking.csv.part", []
    score = candidates._of_populations

    def ended(predicted, *others):
        seen.append(predicted)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return score(predicted, *others)

    monkeypatch.setattr(candidates, "_of_populations", ended)
    with pytest.raises(KeyboardInterrupt):
        rank_perturbations(model, controls, **asked, kept=kept)
    assert f"2 of 4 candidates in {kept}" in capsys.readouterr().out
    before = kept.read_text()
    again = rank_perturbations(model, controls, **asked, kept=kept)
    assert len(seen) == 3 + 2
    pd.testing.assert_frame_equal(again, whole, rtol=1e-4)

    kept.write_text(before)
    other = controls[1:].copy()
    rank_perturbations(model, other, **asked, kept=kept)  # other cells: nothing of them was done
    assert "is of another question" in capsys.readouterr().out
    assert len(seen) == 5 + 4


def test_what_was_kept_and_is_damaged_is_refused(model, controls, tmp_path):
    kept = tmp_path / "ranking.csv.part"
    for content in ("{}", "", '{"of": "x", "answers": {"A": 1}}'):
        kept.write_text(content)
        with pytest.raises(ValueError, match=r"part is not what a ranking has kept \(.*\); remove it to begin anew"):
            rank_perturbations(model, controls, up=UP, kept=kept)
    with pytest.raises(ValueError, match=r"n_processes \(0\) must be at least 1"):
        rank_perturbations(model, controls, up=UP, n_processes=0)


def test_what_was_done_can_be_kept_whatever_was_asked(controls, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "KEPT_EVERY", -1.0)
    model, kept = untrained(perturbations=NAMES, std=0.5), tmp_path / "new" / "ranking.csv.part"
    coverage = Coverage("test", 3, 0.9, None)
    calibration = Calibration(0.9, 0.2, Width(1.0, 0.1), Width(2.0, 0.3), 4, coverage)
    model.training = replace(model.training, calibration=calibration)
    odd = controls.copy()
    odd.obs["mixed"] = [b"\xff", "x", None, *[1.5] * (odd.n_obs - 3)]
    asked = {"up": UP, "n_cells": np.int64(5), "seed": np.int64(2), "n_populations": 1}  # one has no intervals
    whole = rank_perturbations(model, odd, **asked, kept=kept)
    monkeypatch.setattr(candidates, "_alone", None)  # all is there: nothing is predicted again
    pd.testing.assert_frame_equal(rank_perturbations(model, odd, **asked, kept=kept), whole)


def test_what_was_kept_is_of_the_weights_not_of_the_machine(controls, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(candidates, "KEPT_EVERY", -1.0)
    kept, asked = tmp_path / "ranking.csv.part", {"up": UP, "n_cells": 4, "n_populations": 2}
    rank_perturbations(untrained(perturbations=NAMES, std=0.5), controls, **asked, kept=kept)
    golden = model_module.make_golden

    def on_another(*given):
        made = golden(*given)
        return {**made, "x0_pred": made["x0_pred"] * (1 + 1e-6)}

    with monkeypatch.context() as other:
        other.setattr(model_module, "make_golden", on_another)
        rank_perturbations(untrained(perturbations=NAMES, std=0.5), controls, **asked, kept=kept)
    assert "resuming    4 of 4 candidates" in capsys.readouterr().out
    rank_perturbations(untrained(perturbations=NAMES, std=0.4), controls, **asked, kept=kept)
    assert "is of another question" in capsys.readouterr().out


def test_where_nothing_can_be_kept_is_refused_before_the_work(model, controls, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "_alone", None)
    (tmp_path / "ranking.csv.part").mkdir()
    with pytest.raises(FileExistsError, match=r"ranking\.csv\.part, where .* is not a file; remove it"):
        rank_perturbations(model, controls, up=UP, kept=tmp_path / "ranking.csv.part")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"nothing can be written in .*file .*choose another folder"):
        rank_perturbations(model, controls, up=UP, kept=tmp_path / "file" / "ranking.csv.part")


def test_a_disk_that_fills_up_does_not_end_the_work(model, controls, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(candidates, "KEPT_EVERY", -1.0)
    whole = rank_perturbations(model, controls, up=UP, n_cells=4)

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(candidates, "write_json", full)
    kept = tmp_path / "ranking.csv.part"
    pd.testing.assert_frame_equal(rank_perturbations(model, controls, up=UP, n_cells=4, kept=kept), whole)
    assert f"cannot be kept in {kept} ([Errno 28] No space left on device)" in capsys.readouterr().out
