import threading
from dataclasses import replace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata.io import write_elem
from scipy import sparse

import perturbdiff.diffusion.generate as prediction
from perturbdiff import PerturbDiff
from perturbdiff.config import ObsColumns
from perturbdiff.data.screen import control_cells
from perturbdiff.diffusion.generate import sample_batch
from perturbdiff.generation import Wanted
from perturbdiff.hub import tensors
from perturbdiff.training.loop import fit
from tests.screens import log1p_cp10k
from tests.simulated import SIMULATION, tiny_config, write_screen


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return write_screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def model(screen, tmp_path_factory):
    # Enough steps that the condition matters.
    config = tiny_config(screen, tmp_path_factory.mktemp("run"), "training.n_steps=40", "optim.lr=0.01")
    return PerturbDiff.from_pretrained(fit(config).folder / "model", device="cpu")


@pytest.fixture
def controls(screen):
    return control_cells(screen, ObsColumns(), None, None)


def dense(predicted):
    return predicted.X.toarray()


def test_predictions_say_where_they_come_from(model, controls):
    predicted = model.predict(controls, perturbation="pert_1", seed=3)
    assert predicted.n_obs == controls.n_obs
    assert tuple(predicted.var_names) == model.genes.names
    assert set(predicted.obs["perturbation"]) == {"pert_1"}
    assert sorted(predicted.obs["source_control"]) == sorted(controls.obs_names)
    source = controls.obs.loc[predicted.obs["source_control"]]
    for column in ("cell_type", "batch"):
        assert list(predicted.obs[column].astype(str)) == list(source[column].astype(str))
    said = predicted.uns["perturbdiff"]
    assert (said["sampler"], said["n_steps"], said["seed"], said["x_kind"]) == ("ddim", 3, 3, "log1p")
    assert said["n_genes_matched"] == SIMULATION.n_genes
    assert list(said["unseen"]) == []


def test_values_are_log1p_finite_and_not_negative(model, controls):
    X = dense(model.predict(controls, perturbation="pert_1"))
    assert np.isfinite(X).all()
    assert X.min() >= 0
    assert 0 < X.max() < 15


def test_predictions_survive_a_file(model, controls, tmp_path):
    predicted = model.predict(controls, perturbation="pert_1", n_cells=5)
    predicted.write_h5ad(tmp_path / "p.h5ad")
    again = anndata.read_h5ad(tmp_path / "p.h5ad")
    np.testing.assert_array_equal(dense(again), dense(predicted))
    assert again.uns["perturbdiff"]["model"] == "model"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_same_seed_gives_the_same_cells_and_another_seed_others(model, controls, sampler):
    first, again, other = (model.predict(controls, perturbation="pert_1", sampler=sampler, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(dense(first), dense(again))
    assert not np.array_equal(dense(first), dense(other))


def test_the_result_does_not_depend_on_the_chunks(model, controls, monkeypatch):
    whole = model.predict(controls, perturbation="pert_2", guidance_scale=0.5)
    monkeypatch.setattr(prediction, "MAX_VALUES_PER_CHUNK", 1)  # one set at a time
    chunked = model.predict(controls, perturbation="pert_2", guidance_scale=0.5)
    np.testing.assert_allclose(dense(chunked), dense(whole), rtol=1e-4, atol=1e-4)
    assert list(chunked.obs["source_control"]) == list(whole.obs["source_control"])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_small_predictions_are_the_same_alone_and_together(model, controls, sampler, monkeypatch):
    # Without rounding to counts, which may fall on either side of a half.
    estimates = replace(model.config, sampling=replace(model.config.sampling, whole_counts=False))
    monkeypatch.setattr(model, "config", estimates)
    calls = []
    monkeypatch.setattr(prediction, "sample_batch", lambda *given: calls.append(given) or sample_batch(*given))
    wanted = [Wanted("pert_1", 3), Wanted("pert_2", 11), Wanted("pert_0"), Wanted("pert_1", 1)]
    settings = {"n_populations": 2, "sampler": sampler, "seed": 5}
    together = list(model.generate_each(controls, wanted, **settings))
    assert len(calls) == 2  # of cells whose mean is looked at, and of what is predicted
    for of, made in zip(wanted, together, strict=True):
        alone = model.generate(controls, of.perturbation, n_cells=of.n_cells, **settings)
        np.testing.assert_allclose(dense(made), dense(alone), rtol=1e-4, atol=1e-4)
        pd.testing.assert_frame_equal(made.obs, alone.obs)
        assert made.uns["perturbdiff"]["trust"] == alone.uns["perturbdiff"]["trust"]


def test_the_global_random_state_is_not_moved(model, controls):
    before = torch.get_rng_state()
    model.predict(controls, perturbation="pert_1", n_cells=3, sampler="ddpm")
    assert torch.equal(before, torch.get_rng_state())


def test_the_perturbation_matters(model, controls):
    one, two = (dense(model.predict(controls, perturbation=p)).mean(0) for p in ("pert_1", "pert_2"))
    assert np.abs(one - two).max() > 0.01


def test_guidance_moves_the_prediction_away_from_the_unconditional_one(model, controls):
    plain, guided = (dense(model.predict(controls, perturbation="pert_1", guidance_scale=w)) for w in (0.0, 2.0))
    assert np.abs(plain - guided).max() > 1e-3


def test_populations_are_distinct_draws_of_all_controls(model, controls):
    predicted = model.predict(controls, perturbation="pert_1", n_populations=3)
    assert predicted.n_obs == 3 * controls.n_obs
    cells = [dense(predicted[predicted.obs["population"] == k]) for k in range(3)]
    assert not np.array_equal(cells[0], cells[1])
    assert not np.array_equal(cells[1], cells[2])


@pytest.mark.parametrize("n_cells", [1, 7, 120, 250])
def test_any_number_of_cells_reusing_controls_only_when_they_run_out(model, controls, n_cells):
    predicted = model.predict(controls, perturbation="pert_1", n_cells=n_cells)
    assert predicted.n_obs == n_cells
    uses = predicted.obs["source_control"].value_counts()
    assert uses.max() == -(-n_cells // controls.n_obs)


def test_dense_and_sparse_controls_in_any_gene_order_give_the_same_cells(model, controls):
    expected = dense(model.predict(controls, perturbation="pert_1"))
    shuffled = controls[:, np.random.default_rng(0).permutation(controls.n_vars)].copy()
    shuffled.X = shuffled.X.toarray()
    np.testing.assert_allclose(dense(model.predict(shuffled, perturbation="pert_1")), expected, atol=1e-5)


def test_controls_are_not_changed(model, controls):
    controls.X = sparse.csr_matrix(controls.X.toarray())
    controls.X.data[0] = 0  # a stored zero, which reading drops from its own copy
    before = controls.copy()
    model.predict(controls, perturbation="pert_1", n_cells=3)
    assert controls.X.nnz == before.X.nnz
    np.testing.assert_array_equal(controls.X.toarray(), before.X.toarray())
    pd.testing.assert_frame_equal(controls.obs, before.obs)


def test_log1p_controls_give_what_their_counts_give(model, controls, monkeypatch):
    # One count of a cell is known exactly from counts alone.
    monkeypatch.setattr(model.config, "sampling", replace(model.config.sampling, whole_counts=False))
    counts = controls.X.toarray().astype(np.float64)
    logged = anndata.AnnData(
        np.log1p(1e4 * counts / counts.sum(1, keepdims=True)).astype(np.float32), controls.obs, controls.var
    )
    np.testing.assert_allclose(
        dense(model.predict(logged, perturbation="pert_1")),
        dense(model.predict(controls, perturbation="pert_1")),
        atol=1e-4,
    )


@pytest.mark.parametrize("kind", ["counts", "log1p"])
def test_predicted_cells_hold_whole_counts_that_add_up_as_measured_ones(model, controls, kind):
    depth = controls.X.toarray().sum(1)
    if kind == "log1p":
        X = np.log1p(model.preprocessing.target_sum * controls.X.toarray() / depth[:, None]).astype(np.float32)
        controls = anndata.AnnData(X, controls.obs, controls.var)
    predicted = model.predict(controls, perturbation="pert_1", with_controls=True, varied=False)
    own = predicted.obs["population"] >= 0
    assert own.sum() == len(depth)
    assert predicted.obs["perturbation"][~own].unique() == ["control"]
    counts, one = predicted.layers["counts"].toarray(), predicted.obs["one_count"].to_numpy()
    np.testing.assert_array_equal(counts, np.rint(counts))
    made = np.log1p(counts * np.expm1(one)[:, None])
    np.testing.assert_allclose(dense(predicted)[own], made[own], atol=1e-5)
    np.testing.assert_allclose(np.expm1(dense(predicted)).sum(1), model.preprocessing.target_sum, rtol=1e-4)
    drawn = model.predict(controls, perturbation="pert_1", n_cells=200)  # whose sums are part of the draw
    assert abs(np.expm1(dense(drawn)).sum(1).mean() / model.preprocessing.target_sum - 1) < 0.3
    if kind == "counts":  # of log1p values a single count is the smallest one
        sums = pd.Series(counts.sum(1), predicted.obs["source_control"])
        np.testing.assert_array_equal(sums[~own.to_numpy()][controls.obs_names], depth)
        assert np.median(np.abs(sums[own.to_numpy()][controls.obs_names] / depth - 1)) < 0.1


def test_contexts_that_the_model_cannot_tell_apart_share_sets(model, controls):
    """Cells of many unknown batches are predicted in whole sets, as cells whose batch nobody knows."""
    strange = controls.copy()
    strange.obs["batch"] = [f"plate {i % 7}" for i in range(controls.n_obs)]
    unknown = controls.copy()
    del unknown.obs["batch"]
    predicted, expected = (model.generate(cells, "pert_1", seed=1) for cells in (strange, unknown))
    np.testing.assert_array_equal(dense(predicted), dense(expected))
    assert set(predicted.obs["batch"]) == {f"plate {i}" for i in range(7)}
    assert [str(name) for name in predicted.uns["perturbdiff"]["unseen"]] == [f"batch plate {i}" for i in range(7)]


@pytest.mark.filterwarnings("ignore:no obs column")
def test_unseen_context_labels_become_null_and_are_said_once(model, controls):
    bare = controls.copy()
    bare.obs = bare.obs[[]]
    with pytest.warns(UserWarning, match="not seen in training: cell_type martian, batch unknown") as said:
        predicted = model.predict(bare, perturbation=["pert_1", "pert_2"], cell_type="martian", n_cells=4)
    assert sum("not seen" in str(warning.message) for warning in said) == 1
    assert list(predicted.uns["perturbdiff"]["unseen"]) == ["cell_type martian", "batch unknown"]
    assert set(predicted.obs["cell_type"]) == {"martian"}
    without = model.generate(bare, "pert_1", n_cells=4)
    assert list(without.uns["perturbdiff"]["unseen"]) == ["cell_type unknown", "batch unknown"]


def test_control_cells_of_the_context_are_chosen_and_others_refused(model, controls):
    own = controls[(controls.obs["cell_type"] == "type_1").to_numpy()].copy()
    chosen, expected = (model.predict(c, perturbation="pert_1", cell_type="type_1") for c in (controls, own))
    assert set(chosen.obs["source_control"]) == set(own.obs_names)
    np.testing.assert_array_equal(dense(chosen), dense(expected))
    with pytest.raises(ValueError, match=r"no control cell has cell_type 'type_11'; did you mean type_1"):
        model.predict(controls, perturbation="pert_1", cell_type="type_11")
    mixed = controls.copy()
    mixed.obs["perturbation"] = ["pert_2", *["control"] * (controls.n_obs - 1)]
    with pytest.raises(ValueError, match=rf"1 of {controls.n_obs} cells are no controls.*pert_2.*== 'control'"):
        model.predict(mixed, perturbation="pert_1")


def test_a_list_of_perturbations_is_predicted_one_after_the_other(model, controls):
    both = model.predict(controls, perturbation=["pert_1", "pert_2"], n_cells=5, seed=4)
    for i, name in enumerate(("pert_1", "pert_2")):
        alone = model.predict(controls, perturbation=name, n_cells=5, seed=4)
        part = both[i * 5 : (i + 1) * 5]
        np.testing.assert_array_equal(dense(part), dense(alone))
        assert list(part.obs["perturbation"]) == [name] * 5
        assert part.uns["perturbdiff"].keys() == alone.uns["perturbdiff"].keys()
    assert both.obs_names.is_unique
    with pytest.raises(ValueError, match="at least one"):
        model.predict(controls, perturbation=[])


def test_a_layer_stands_in_for_x(model, controls):
    layered = controls.copy()
    layered.layers["counts"], layered.X = layered.X.copy(), -layered.X
    expected = model.predict(controls, perturbation="pert_1", n_cells=5)
    np.testing.assert_array_equal(
        dense(model.predict(layered, perturbation="pert_1", n_cells=5, layer="counts")), dense(expected)
    )
    with pytest.raises(KeyError, match=r"there is no layer 'count'; name other values that it holds: counts"):
        model.predict(layered, perturbation="pert_1", layer="count")


@pytest.mark.parametrize("controls", ["controls.h5ad", np.zeros((3, 40)), None])
def test_what_is_no_anndata_is_a_type_error_that_says_what_to_give(model, controls):
    with pytest.raises(TypeError, match=r"must be an AnnData of control cells; read a file with"):
        model.predict(controls, perturbation="pert_1")


def test_a_model_says_what_it_knows_and_where_it_is(model):
    assert model.perturbations == model.vocabularies.perturbations.names
    assert model.cell_types == model.vocabularies.cell_types.names
    assert model.gene_names == model.genes.names
    assert model.device == torch.device("cpu")
    assert model.to(dtype=torch.float64).denoiser.embed_t is model.denoiser.embed_t
    assert model.to(dtype=torch.float32) is model
    with pytest.raises(ValueError, match="floating point"):
        model.to(dtype=torch.int64)
    first, *lines = repr(model).splitlines()
    assert first.startswith("PerturbDiff model: ")
    assert first.endswith(" parameters on cpu")
    assert [line[2:16].strip() for line in lines] == [
        "X", "genes", "perturbations", "cell types", "trained on", "scores",
    ]  # fmt: skip
    assert "3: pert_0, pert_1, pert_2" in repr(model)
    assert "held out pert_0:type_0" in repr(model)


def test_a_combination_of_known_perturbations_is_predicted(model, controls):
    pair = model.predict(controls, perturbation="pert_1+pert_2", n_cells=40)
    single = model.predict(controls, perturbation="pert_1", n_cells=40)
    assert np.abs(dense(pair).mean(0) - dense(single).mean(0)).max() > 1e-3
    assert set(pair.obs["perturbation"]) == {"pert_1+pert_2"}


def test_unknown_perturbation_lists_the_nearest(model, controls):
    with pytest.raises(KeyError, match=r"'prt_1'.*did you mean pert_1"):
        model.predict(controls, perturbation="prt_1")
    with pytest.raises(KeyError, match="'pert_9'"):
        model.predict(controls, perturbation="pert_1+pert_9")


@pytest.mark.filterwarnings("ignore:X has")
def test_genes_may_be_missing_up_to_the_allowed_overlap(model, controls):
    few = controls[:, :10].copy()
    with pytest.raises(ValueError, match=r"only 10 of the model's 40 genes \(25%\)"):
        model.predict(few, perturbation="pert_1")
    with pytest.warns(UserWarning, match="the controls lack 30 of the model's 40 genes"):
        assert model.predict(few, perturbation="pert_1", n_cells=3, min_gene_overlap=0.2).n_vars == 10


@pytest.mark.filterwarnings("ignore:X has")
def test_genes_that_the_controls_lack_are_left_out_or_flagged_and_the_others_stay_the_same(model, controls):
    names = np.array(model.gene_names)
    had = np.random.default_rng().permutation(40) < 30
    fewer = controls[:, names[had]].copy()
    zeroed = controls.copy()  # what the network gets of genes that it lacks
    zeroed.X = sparse.csr_matrix(controls.X.toarray() * had)
    expected = dense(model.predict(zeroed, perturbation="pert_1", n_cells=9))
    for all_genes, kept in ((False, had), (True, np.ones(40, dtype=bool))):
        with pytest.warns(UserWarning, match=r"lack 10 of the model's 40 genes: gene_\d+, .* and 5 more; they are"):
            predicted = model.predict(fewer, perturbation=["pert_1", "pert_2"], n_cells=9, all_genes=all_genes)
        assert list(predicted.var_names) == list(names[kept])
        assert predicted.var["measured"].dtype == bool
        assert list(predicted.var["measured"]) == list(had[kept])
        both = had[kept]  # of the others nobody knows anything
        np.testing.assert_array_equal(dense(predicted)[:9, both], expected[:, had])
        assert set(predicted.uns["perturbdiff"]["genes_absent"]) == set(names[~had])
    of_all = model.predict(controls, perturbation="pert_1", n_cells=9)  # without a warning
    assert of_all.var["measured"].all()
    assert list(of_all.uns["perturbdiff"]["genes_absent"]) == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"n_cells": 0}, "n_cells"),
        ({"n_cells": 10**14}, "at most"),
        ({"n_populations": 0}, "n_populations"),
        ({"steps": 0}, "n_steps"),
        ({"steps": 1001}, "n_steps"),
        ({"sampler": "magic"}, "sampler"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
    ],
)
def test_arguments_out_of_range_are_refused(model, controls, argument, message):
    with pytest.raises(ValueError, match=message):
        model.predict(controls, perturbation="pert_1", **argument)


def test_controls_with_bad_values_or_no_cells_are_refused(model, controls):
    bad = controls.copy()
    bad.X = bad.X.toarray().astype(np.float32)
    bad.X[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"gene_00.*nan"):
        model.predict(bad, perturbation="pert_1")
    with pytest.raises(ValueError, match="no cells"):
        model.predict(controls[:0].copy(), perturbation="pert_1")


def test_controls_without_a_count_are_warned_of(model, controls):
    empty = controls.copy()
    empty.X = empty.X * 0
    with pytest.warns(UserWarning, match=f"all {len(empty)} control cells are empty"):
        model.predict(empty, perturbation="pert_1")


def test_cells_from_a_part_of_the_controls_have_the_mean_that_all_of_them_give(screen, tmp_path):
    config = tiny_config(screen, tmp_path, "training.n_steps=1")
    model = PerturbDiff.from_pretrained(fit(config).folder / "model", device="cpu")
    controls = control_cells(screen, ObsColumns(), "type_0", "batch_0")
    assert model.config.denoiser.output == "control_residual"
    for parameter in model.denoiser.head.parameters():
        parameter.data.zero_()  # predicted cells are the controls
    logs = pd.DataFrame(log1p_cp10k(controls.X), controls.obs_names, controls.var_names)[list(model.genes.names)]
    off = []
    for n_cells in (11, 17):
        predicted = model.predict(controls, perturbation="pert_1", n_cells=n_cells, varied=False)
        chosen = logs.loc[predicted.obs["source_control"]].mean()
        off.append([np.abs(mean - logs.mean()).mean() for mean in (dense(predicted).mean(axis=0), chosen)])
    assert all(now < 0.6 * before for now, before in off), off
    # A draw is of cells that were not chosen by their mean, and all controls have the mean of all.
    whole = dense(model.predict(controls, perturbation="pert_1", varied=False))
    np.testing.assert_allclose(np.sort(whole.mean(axis=0)), np.sort(logs.mean()), atol=0.02)


def test_one_cell_and_one_step_are_enough(model, controls):
    predicted = model.predict(controls[:1].copy(), perturbation="pert_1", steps=1)
    assert predicted.shape == (1, 40)


def test_a_folder_that_is_away_between_two_renames_is_waited_for(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model-new")
    back = threading.Timer(0.3, (tmp_path / ".model-new").rename, [tmp_path / "model"])
    back.start()
    assert PerturbDiff.from_pretrained(tmp_path / "model", device="cpu").genes == model.genes
    back.join()


def test_a_folder_replaced_while_its_weights_are_read_is_read_again(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    read, left = tensors.read_verified, [3]

    def replaced_just_before(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            (tmp_path / "model").rename(tmp_path / f"moved_{left[0]}")
            try:
                return read(*args, **kwargs)
            finally:
                model.save_pretrained(tmp_path / "model")
        return read(*args, **kwargs)

    monkeypatch.setattr(tensors, "read_verified", replaced_just_before)
    loaded = PerturbDiff.from_pretrained(tmp_path / "model", device="cpu")
    assert left == [0]
    for name, tensor in model.denoiser.state_dict().items():
        assert torch.equal(loaded.denoiser.state_dict()[name], tensor.cpu()), name


def test_control_cells_of_a_screen_are_found_by_label(screen):
    chosen = control_cells(screen, ObsColumns(), "type_1", "batch_0")
    assert set(chosen.obs["perturbation"]) == {"control"}
    assert set(chosen.obs["cell_type"]) == {"type_1"}
    assert set(chosen.obs["batch"]) == {"batch_0"}
    assert chosen.n_obs == SIMULATION.control_cells_per_context
    with pytest.raises(ValueError, match=r"no control cell with cell_type 'type_7'.*type_"):
        control_cells(screen, ObsColumns(), "type_7", None)


def test_controls_whose_x_has_other_rows_than_obs_are_refused(screen, tmp_path):
    adata = anndata.read_h5ad(screen)
    path = tmp_path / "cut.h5ad"
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        write_elem(file, "X", sparse.csr_matrix(adata.X)[:-5])
    with pytest.raises(ValueError, match="cells by genes"):
        control_cells(path, ObsColumns(), None, None)


# ---------------------------------------------------------------- other controls than those of training


@pytest.fixture(scope="module")
def of_some_genes(screen, tmp_path_factory):
    """A model of the most variable genes of a screen, and the controls it was trained with."""
    config = tiny_config(screen, tmp_path_factory.mktemp("some"), "data.n_hvg=15", "training.n_steps=2", hold_out=())
    model = PerturbDiff.from_pretrained(fit(config).folder / "model", device="cpu")
    return model, control_cells(screen, ObsColumns(), None, None)


def with_x(adata, change):
    adata = adata.copy()
    adata.X = sparse.csr_matrix(change(adata.X.toarray().astype(np.float64)))
    return adata


def of_total(X, total):
    return X / X.sum(1, keepdims=True) * total


def test_what_training_controls_sum_to_is_kept_with_the_model(of_some_genes):
    model, controls = of_some_genes
    X = of_total(controls.X.toarray().astype(np.float64), 1e4)
    columns = [list(controls.var_names).index(name) for name in model.gene_names]
    expected = np.quantile([sum(row[i] for i in columns) for row in X], [0.01, 0.25, 0.5, 0.75, 0.99])
    np.testing.assert_allclose(model.training.control_sums, expected, rtol=1e-5)
    assert model.training.measured_genes == controls.n_vars


def test_controls_like_those_of_training_are_taken_without_a_word(of_some_genes):
    model, controls = of_some_genes
    model.predict(controls, perturbation="pert_1", n_cells=4)  # warnings are errors here
    model.predict(controls[:, ::-1].copy(), perturbation="pert_1", n_cells=4)


def test_controls_cut_to_the_genes_of_the_model_are_refused(of_some_genes):
    model, controls = of_some_genes
    cut = controls[:, list(model.gene_names)].copy()
    of_known_sum = with_x(cut, lambda X: np.log1p(of_total(np.maximum(X, 1e-9), 1e4)))
    for cells in (cut, of_known_sum):
        with pytest.raises(ValueError, match=r"sum to 10,000 normalised counts .*: X has 15 genes, .* training had 40"):
            model.predict(cells, perturbation="pert_1")


def test_logarithms_of_some_genes_are_compared_with_the_controls_of_training(of_some_genes):
    model, controls = of_some_genes
    genes = [*model.gene_names, *[name for name in controls.var_names if name not in model.gene_names][:5]]

    def logged(total, genes=genes):
        return with_x(controls, lambda X: np.log1p(of_total(X, total)))[:, genes].copy()

    with pytest.warns(UserWarning, match="log1p values; of how many counts a cell cannot be checked"):
        found = model.predict(logged(1e4), perturbation="pert_1", seed=1)
    of_all = model.predict(logged(1e4, controls.var_names), perturbation="pert_1", seed=1)
    np.testing.assert_allclose(dense(found), dense(of_all), atol=1e-4)
    for total in (1e6, 1e3):
        with pytest.raises(ValueError, match="in its training controls: X is normalised otherwise"):
            model.predict(logged(total), perturbation="pert_1")


def test_controls_of_another_tissue_are_taken_with_a_word(of_some_genes):
    model, controls = of_some_genes
    columns = [list(controls.var_names).index(name) for name in model.gene_names]

    def less(X):
        X[:, columns] = np.rint(X[:, columns] * 0.4)
        return X

    with pytest.warns(UserWarning, match=r"the model's genes sum to .* another tissue or protocol\?"):
        model.predict(with_x(controls, less), perturbation="pert_1", n_cells=4)


def test_counts_in_any_space_give_what_the_counts_give(of_some_genes):
    model, controls = of_some_genes
    of_counts = dense(model.predict(controls, perturbation="pert_1"))
    logged = with_x(controls, lambda X: np.log1p(of_total(X, 1e4)))  # nobody knows one count of these
    of_logged = dense(model.predict(logged, perturbation="pert_1"))
    for change, expected in (
        (np.log1p, of_counts), (lambda X: np.log1p(of_total(X, 1234.5)), of_logged),
        (lambda X: np.log2(1 + of_total(X, 1e4)), of_logged), (lambda X: of_total(X, 1.0), of_logged),
        (lambda X: np.log1p(np.log1p(of_total(X, 1e4))), of_logged),
    ):  # fmt: skip
        with pytest.warns(UserWarning, match="X holds "):
            found = model.predict(with_x(controls, change), perturbation="pert_1")
        np.testing.assert_allclose(dense(found), expected, atol=1e-4)
