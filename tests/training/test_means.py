"""Sets that start from moved controls: what they start from, what a model folder keeps of it, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

from perturbdiff.config import load_config
from perturbdiff.data.screen import Screen
from perturbdiff.diffusion.generate import sample_batch
from perturbdiff.files import sha256
from perturbdiff.hub.download import find_model
from perturbdiff.hub.info import model_info
from perturbdiff.hub.model_folder import config_hash
from perturbdiff.means.predictors import response_kept, start_shift
from perturbdiff.means.shifts import shift_cells
from perturbdiff.means.training import Context
from perturbdiff.model import PerturbDiff
from perturbdiff.nn.denoiser import build_denoiser
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.loop import fit
from perturbdiff.training.run import finetune
from tests.simulated import tiny_config, write_screen

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("means")
    write_screen(folder)
    return folder


def config_of(folder, out, *words, **more):
    words = ("diffusion.start=mean", "denoiser.output=control_residual", "training.n_steps=2", *words)
    return tiny_config(folder / "screen.h5ad", out, *words, **more)


@pytest.fixture(scope="module")
def trained(folder):
    """The run folder of an untrained network (its head is zero), and its model as it was in memory."""
    config = config_of(folder, folder / "run", "training.n_steps=1", "optim.lr=1e-12", "sampling.whole_counts=false")
    return config, fit(config, Screen.read(config.data.screen, config.data)).model


def test_a_training_condition_starts_from_its_own_measured_mean(folder):
    config = config_of(folder, folder / "unused", hold_out=())
    screen = Screen.read(config.data.screen, config.data)
    data = TrainingSet.from_screen(screen, config)
    train, scale = data.train, data.cells.preprocessing.scale
    sampler = train.sampler(config)
    seen = 0
    for step in range(sampler.steps_per_epoch):
        batch = train.batch(sampler, 0, step, 0, 1)
        _, moved = batch.dense()
        sets = train.sets(sampler, 0, step, 0, 1)
        for row, own in enumerate(sets):
            labels = train.index.labels(own.condition)
            obs = screen.obs.reset_index(drop=True)
            is_of = (obs["cell_type"] == labels[1]) & (obs["batch"] == labels[2])
            log1p = {
                name: screen.expression.log1p(np.flatnonzero(is_of & (obs["perturbation"] == name))).toarray()
                for name in (labels[0], "control")
            }
            shift = log1p[labels[0]].mean(axis=0, dtype=float) - log1p["control"].mean(axis=0, dtype=float)
            every = shift_cells(log1p["control"].astype(float), shift)
            np.testing.assert_allclose(every.mean(axis=0), log1p[labels[0]].mean(axis=0), atol=1e-5)
            at = {name: i for i, name in enumerate(screen.obs.index[is_of & (obs["perturbation"] == "control")])}
            chosen = [at[name] for name in screen.obs.index[own.control_rows]]
            np.testing.assert_allclose(moved[row, : len(chosen)].numpy() * scale, every[chosen], atol=1e-4)
            assert (moved[row, len(chosen) :] == 0).all()
            seen += 1
    assert seen > 3


def test_a_network_that_changes_nothing_predicts_the_mean_that_simple_methods_tell(trained, folder):
    _, model = trained
    adata = anndata.read_h5ad(folder / "screen.h5ad")
    obs = adata.obs
    controls = adata[(obs["perturbation"] == "control") & (obs["cell_type"] == "type_0") & (obs["batch"] == "batch_0")]
    predicted = model.predict(controls.copy(), perturbation="pert_0", seed=1, varied=False)
    started = model.control_rows(controls.copy(), predicted).X.toarray().astype(float)
    asked = Context("pert_0", "type_0", "batch_0", started.mean(axis=0)[None])
    expected = shift_cells(started, start_shift(model.means, asked, "mean")).mean(axis=0)
    np.testing.assert_allclose(predicted.X.toarray().mean(axis=0), expected, atol=1e-3)


@pytest.mark.parametrize("start", ["controls", "target"])
def test_what_is_not_of_the_network_is_at_the_mean_that_simple_methods_tell(folder, tmp_path, start):
    words = (f"diffusion.start={start}", "sampling.whole_counts=false", "optim.lr=0.05")
    config = config_of(folder, tmp_path / "run", *words)
    model = fit(config, Screen.read(config.data.screen, config.data)).model
    adata = anndata.read_h5ad(folder / "screen.h5ad")
    controls = adata[(adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "type_1")].copy()
    cells = {}
    for weight in (1.0, 0.5, 0.0):
        model.config = replace(model.config, sampling=replace(model.config.sampling, network_weight=weight))
        made = model.predict(controls, perturbation="pert_0", cell_type="type_1", seed=1, varied=False)
        cells[weight] = made.X.toarray().astype(float)
    np.testing.assert_allclose(cells[0.5], (cells[0.0] + cells[1.0]) / 2, atol=1e-3)
    assert np.abs(cells[0.0] - cells[1.0]).max() > 0.1
    rows = model.control_rows(controls, made)
    started = rows.X.toarray().astype(float)
    for batch in ("batch_0", "batch_1"):
        assert len(rows) == len(made)
        here = (rows.obs["batch"] == batch).to_numpy()
        asked = Context("pert_0", "type_1", batch, started[here].mean(axis=0)[None])
        expected = shift_cells(started[here], start_shift(model.means, asked, "mean")).mean(axis=0)
        predicted = cells[0.0][(made.obs["batch"] == batch).to_numpy()]
        np.testing.assert_allclose(predicted.mean(axis=0), expected, atol=1e-3)


def test_a_network_that_starts_from_a_told_mean_keeps_it_and_changes_cells(folder, tmp_path):
    config = config_of(folder, tmp_path / "run", "diffusion.start=mean", "sampling.whole_counts=false", "optim.lr=0.05")
    model = fit(config, Screen.read(config.data.screen, config.data)).model
    adata = anndata.read_h5ad(folder / "screen.h5ad")
    controls = adata[(adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "type_1")].copy()
    cells = {}
    for weight in (1.0, 0.0):
        model.config = replace(model.config, sampling=replace(model.config.sampling, network_weight=weight))
        made = model.predict(controls, perturbation="pert_0", cell_type="type_1", seed=1, varied=False)
        cells[weight] = made.X.toarray().astype(float)
    assert np.abs(cells[1.0] - cells[0.0]).max() > 0.1
    for batch in made.obs["batch"].unique():
        here = (made.obs["batch"] == batch).to_numpy()
        np.testing.assert_allclose(cells[1.0][here].mean(axis=0), cells[0.0][here].mean(axis=0), atol=1e-4)


@pytest.mark.parametrize(("weight", "told"), [(0.0, True), (1.0, False)])
def test_cells_that_are_told_their_mean_add_up_to_one_number_that_keeps_it(folder, tmp_path, weight, told):
    words = ("diffusion.start=controls", f"sampling.network_weight={weight}", "optim.lr=0.05")
    config = config_of(folder, tmp_path / "run", *words)
    model = fit(config, Screen.read(config.data.screen, config.data)).model
    adata = anndata.read_h5ad(folder / "screen.h5ad")
    controls = adata[(adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "type_1")].copy()
    controls.obs["batch"] = "batch_0"  # one condition
    made = model.predict(controls, perturbation="pert_0", cell_type="type_1", seed=1, varied=False)
    sums, target = np.expm1(made.X.toarray().astype(float)).sum(axis=1), model.preprocessing.target_sum
    np.testing.assert_allclose(sums, sums.mean(), rtol=1e-4)
    model.config = replace(model.config, sampling=replace(model.config.sampling, whole_counts=False))
    estimate = model.predict(controls, perturbation="pert_0", cell_type="type_1", seed=1, varied=False)
    if told:
        assert sums.mean() != pytest.approx(target, rel=1e-3)
        assert made.X.toarray().mean() == pytest.approx(estimate.X.toarray().mean(), rel=1e-4)
    else:
        assert sums.mean() == pytest.approx(target, rel=1e-4)


def test_a_saved_model_predicts_the_same_cells(trained, folder):
    config, model = trained
    again = PerturbDiff.from_pretrained(config.out)
    for name in ("control_mean", "perturbed_mean", "n_cells", "control_noise", "perturbed_noise"):
        np.testing.assert_allclose(getattr(again.means, name), getattr(model.means, name), rtol=1e-6)
    adata = anndata.read_h5ad(folder / "screen.h5ad")
    controls = adata[adata.obs["perturbation"] == "control"].copy()
    cells = [of.predict(controls, perturbation="pert_1", seed=3).X.toarray() for of in (model, again)]
    np.testing.assert_allclose(cells[0], cells[1], atol=1e-5)
    text = model_info(find_model(config.out))
    assert f"{again.n_parameters:,} parameters" in text
    assert "8 cells, means of" in text
    assert not [name for name in again.denoiser.state_dict() if name.startswith("means")]
    again.save_pretrained(folder / "copy")
    third = PerturbDiff.from_pretrained(folder / "copy")
    np.testing.assert_array_equal(third.means.perturbed_mean, again.means.perturbed_mean)


def rehashed(folder, name):
    config = json.loads((folder / "config.json").read_text())
    config["sha256"][name] = sha256(folder / name)
    config["sha256"]["config.json"] = config_hash(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_means_that_cannot_be_are_refused(trained, tmp_path):
    model = PerturbDiff.from_pretrained(trained[0].out)
    for change, error in (
        (lambda labels: labels["batch"].pop(), "same number of labels"),
        (lambda labels: labels["n_cells"].__setitem__(0, 0), "same number of labels"),
        (
            lambda labels: [of.append(of[0]) for of in labels.values() if isinstance(of, list)],
            "does not fit its config",
        ),
        (lambda labels: labels.update(noise=False), "unexpected"),
        (lambda labels: labels.update(noise=1), "noise"),
        (lambda labels: labels.clear(), "lacks"),
    ):
        model.save_pretrained(tmp_path / "model")
        labels = json.loads((tmp_path / "model/means.json").read_text())
        change(labels)
        (tmp_path / "model/means.json").write_text(json.dumps(labels))
        rehashed(tmp_path / "model", "means.json")
        with pytest.raises(ValueError, match=error):
            PerturbDiff.from_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["means_control"][0, 0] = torch.nan
    save_file(weights, tmp_path / "model/model.safetensors")
    rehashed(tmp_path / "model", "model.safetensors")
    with pytest.raises(ValueError, match="must be finite"):
        PerturbDiff.from_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["sha256"]["means.json"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    rehashed(tmp_path / "model", "genes.json")
    with pytest.raises(ValueError, match=r"means\.json must be there where diffusion\.start is target or mean"):
        PerturbDiff.from_pretrained(tmp_path / "model")


def test_a_checkpoint_that_starts_from_means_is_tuned_on_those_of_the_new_screen(trained, folder, tmp_path):
    adata = anndata.read_h5ad(folder / "screen.h5ad")
    adata = adata[:, 5:].copy()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace({"type_1": "new"})
    adata.write_h5ad(tmp_path / "new.h5ad")
    words = ["training.n_steps=2", "training.device=cpu", "training.trackers=[]", "data.set_size=8"]
    base = f"{trained[0].out}/model"
    run = finetune(tmp_path / "new.h5ad", base, tmp_path / "run", hold_out="pert_0:new", overrides=words)
    assert set(run.model.means.cell_type) == {"type_0", "new"}
    assert run.model.means.control_mean.shape[1] == adata.n_vars
    assert run.scores is not None
    with pytest.raises(ValueError, match=r"diffusion\.start=mean is of screens, and not of low-rank"):
        finetune(tmp_path / "new.h5ad", base, tmp_path / "lora", overrides=["adapt.method=lora"])


@pytest.fixture(scope="module")
def knock_downs(folder):
    """The screen with its perturbations called after genes, whose counts are thinned to a share of its own."""
    adata = anndata.read_h5ad(folder / "screen.h5ad")
    rng = np.random.default_rng(0)
    genes = [str(adata.var_names[i]) for i in np.argsort(-np.asarray(adata.X.mean(axis=0)).ravel())[:3]]
    label = adata.obs["perturbation"].astype(str)
    counts = adata.X.toarray()
    for number, gene in enumerate(genes):
        cells, column = np.flatnonzero(label == f"pert_{number}"), adata.var_names.get_loc(gene)
        counts[cells, column] = rng.binomial(counts[cells, column].astype(int), (0.2, 0.4, 0.3)[number])
    adata.obs["perturbation"] = label.replace({f"pert_{i}": gene for i, gene in enumerate(genes)}).to_numpy()
    adata.X = sparse.csr_matrix(counts)
    adata.write_h5ad(folder / "knock_downs.h5ad")
    return folder / "knock_downs.h5ad", genes


def target_config(screen, out, *words, **more):
    words = ("diffusion.start=target", "denoiser.output=control_residual", "split.validation_fraction=0", *words)
    words = ("training.n_steps=2", "data.perturbation_features=[coexpression]", *words)
    return tiny_config(screen, out, *words, **more)


def test_with_target_the_genes_that_are_perturbed_are_moved_and_nothing_else(knock_downs, folder):
    path, genes = knock_downs
    config = target_config(path, folder / "unused", hold_out=())
    screen = Screen.read(path, config.data)
    train = TrainingSet.from_screen(screen, config).train
    sampler = train.sampler(config)
    log1p, obs = screen.expression.log1p().toarray().astype(float), screen.obs
    names = list(screen.expression.genes.names)
    seen = set()
    for step in range(sampler.steps_per_epoch):
        batch = train.batch(sampler, 0, step, 0, 1)
        plain = replace(batch, moves=None).dense()[1].numpy()
        moved = batch.dense()[1].numpy()
        for row, own in enumerate(train.sets(sampler, 0, step, 0, 1)):
            label, cell_type, _ = train.index.labels(own.condition)
            column = names.index(label)
            rest = np.arange(len(names)) != column
            np.testing.assert_array_equal(moved[row][:, rest], plain[row][:, rest])
            logs = []
            for of in np.unique(obs["batch"]):
                here = (obs["cell_type"] == cell_type) & (obs["batch"] == of)
                means = [log1p[here & (obs["perturbation"] == name), column].mean() for name in (label, "control")]
                logs.append(np.log((np.expm1(means[0]) + 0.01) / (np.expm1(means[1]) + 0.01)))
            here = (obs["cell_type"] == cell_type) & (obs["batch"] == train.index.labels(own.condition)[2])
            mean = log1p[here & (obs["perturbation"] == "control"), column].mean()
            kept = np.log1p(np.expm1(mean) * np.exp(np.mean(logs))) / mean
            assert 0 < kept < 0.9
            np.testing.assert_allclose(moved[row][:, column], plain[row][:, column] * kept, rtol=1e-4)
            seen.add(label)
    assert seen == set(genes)


def test_with_target_an_unseen_knock_down_lowers_its_own_gene_as_the_others_do(knock_downs, folder):
    path, genes = knock_downs
    words = ("training.n_steps=1", "optim.lr=1e-12", "sampling.whole_counts=false")  # the head is zero
    config = target_config(path, folder / "target", *words, hold_out=(genes[0],))
    model = fit(config, Screen.read(path, config.data)).model
    adata = anndata.read_h5ad(path)
    controls = adata[(adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "type_0")].copy()
    again = PerturbDiff.from_pretrained(config.out)
    assert again.config.diffusion.start == "target"
    made = {}
    for of in (model, again):
        for wanted in (genes[0], f"{genes[0]}+{genes[1]}"):
            predicted = of.generate(controls, wanted, varied=False)
            start = of.control_rows(controls, predicted).to_df().mean()
            left = np.expm1(predicted.to_df().mean()) / np.expm1(start)
            ratio = {
                gene: np.exp(of.means.target_log_ratio(list(of.gene_names).index(gene), "type_0")) for gene in genes
            }
            for gene in left.index:
                expected = ratio[gene] if gene in wanted.split("+") else 1.0
                assert left[gene] == pytest.approx(expected, rel=0.02), (wanted, gene)
            made.setdefault(wanted, []).append(predicted.X.toarray())
        assert ratio[genes[0]] == pytest.approx(np.sqrt(ratio[genes[1]] * ratio[genes[2]]), rel=1e-4)
        assert 0.15 < ratio[genes[0]] < 0.5
    for one, other in made.values():
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_an_estimate_is_kept_in_part_from_where_its_set_starts(knock_downs, folder):
    path, _ = knock_downs
    config = target_config(path, folder / "unused", hold_out=())
    screen = Screen.read(path, config.data)
    train = TrainingSet.from_screen(screen, config).train
    batch = train.batch(train.sampler(config), 0, 0, 0, 1)
    assert batch.response is None  # all were trained
    sampling = replace(config.sampling, n_steps=1, guidance_scale=0.5, whole_counts=False, cutoff=0.0)
    denoiser = untrained(screen, config)
    parts = torch.tensor([0.0, 0.3, 0.8, 1.0])[: len(batch.mask)]
    whole, part = (
        sample_batch(denoiser, of, sampling, config.diffusion, 0) for of in (batch, replace(batch, response=parts))
    )
    control = batch.dense()[1]
    assert (whole - control)[batch.mask].abs().mean() > 0.01
    torch.testing.assert_close(part, (control + parts[:, None, None] * (whole - control)).clamp_min(0))


def untrained(screen, config):
    vocabularies = TrainingSet.from_screen(screen, config).vocabularies
    denoiser = build_denoiser(config.denoiser, len(screen.expression.genes), vocabularies).eval()
    torch.nn.init.normal_(denoiser.head.weight, std=0.1)
    return denoiser


def test_predictions_of_an_unseen_knock_down_go_as_far_as_others_respond_alike(knock_downs, folder, monkeypatch):
    path, genes = knock_downs
    words = ("sampling.n_steps=1", "sampling.whole_counts=false", "sampling.cutoff=0.0")
    config = target_config(path, folder / "part", *words, hold_out=(genes[0],))
    model = fit(config, Screen.read(path, config.data)).model
    torch.nn.init.normal_(model.denoiser.head.weight, std=0.1)
    adata = anndata.read_h5ad(path)
    controls = adata[(adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "type_0")].copy()
    kept = response_kept(model.means, genes[0])
    assert 0 < kept < 1
    made = {}
    for part in (kept, 0.0, 1.0):
        monkeypatch.setattr("perturbdiff.generation.response_kept", lambda means, of, part=part: part)
        made[part] = model.generate(controls, genes[0], varied=False).X.toarray()
    np.testing.assert_allclose(made[kept], np.maximum(made[0.0] + kept * (made[1.0] - made[0.0]), 0), atol=1e-5)
    monkeypatch.undo()
    np.testing.assert_array_equal(model.generate(controls, genes[0], varied=False).X.toarray(), made[kept])


@pytest.mark.parametrize("start", ["target", "mean"])
def test_atlases_start_from_controls(start):
    given = {"out": "x", "data": {"atlases": [{"path": "a"}]}}
    with pytest.raises(ValueError, match=rf"diffusion\.start={start} is of screens"):
        load_config(None, [f"diffusion.start={start}"], given)
