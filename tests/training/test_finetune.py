"""Training that starts from a checkpoint: what trains, what stays, and that it goes on bit for bit."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

import perturbdiff
from perturbdiff.config import PublishedEncoding, load_config
from perturbdiff.data.screen import Screen
from perturbdiff.data.simulate import simulate
from perturbdiff.hub.records import StartRecord
from perturbdiff.model import PerturbDiff
from perturbdiff.nn.denoiser import build_denoiser
from perturbdiff.nn.lora import BACKBONE, changed_layers
from perturbdiff.training.loop import fit
from perturbdiff.training.start import prepare, settings_of
from tests.localhub.client import led_to
from tests.localhub.server import LocalHub, Repo
from tests.screens import log1p_cp10k
from tests.simulated import DEFAULTS, SIMULATION, TINY, tiny_config, write_screen

pytestmark = pytest.mark.slow

RUN = [word for word in TINY if not word.startswith(("denoiser.", "sampling.", "data.set_size"))]
METHODS = ["full", "frozen", "lora"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The model of a short run on the first screen: pert_0 to pert_2, type_0 and type_1."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config(write_screen(folder), folder / "run", "training.n_steps=4", "optim.lr=0.01", hold_out=())
    return fit(config).folder / "model"


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Path:
    """Another screen: other cells, 30 of the 40 genes and 4 of its own, a new perturbation, cell type and batch."""
    path = tmp_path_factory.mktemp("screen") / "new.h5ad"
    simulate(replace(SIMULATION, seed=5), path)
    adata = anndata.read_h5ad(path)[:, [*range(39, 5, -1)]].copy()
    adata.var_names = [f"own_{i}" if i < 4 else name for i, name in enumerate(adata.var_names)]
    for column, old, new in (
        ("perturbation", "pert_2", "novel"), ("cell_type", "type_1", "monocyte"), ("batch", "batch_1", "day_9"),
    ):  # fmt: skip
        adata.obs[column] = adata.obs[column].astype(str).replace(old, new)
    adata.write_h5ad(path)
    return path


def tuned_config(screen, checkpoint, out, *words):
    given = {"out": str(out), "data": {"screen": str(screen)}, "adapt": {"init_from": str(checkpoint)}}
    return load_config(None, [*RUN, *words], given, base=settings_of(str(checkpoint)))


def tuned(screen, checkpoint, out, *words, hold_out=()):
    given = {"out": str(out), "data": {"screen": str(screen)}, "split": {"hold_out": list(hold_out)}}
    given["adapt"] = {"init_from": str(checkpoint)}
    return load_config(None, [*RUN, *words], given, base=settings_of(str(checkpoint)))


def weights(where) -> dict[str, torch.Tensor]:
    return PerturbDiff.from_pretrained(where, device="cpu").denoiser.state_dict()


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("cells_per_s", "data_wait")} for line in lines]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_takes_what_it_is_not_told_from_the_checkpoint(checkpoint, screen, tmp_path):
    config = tuned(screen, checkpoint, tmp_path, "sampling.n_steps=4")
    assert (config.denoiser.width, config.denoiser.depth, config.data.set_size) == (16, 2, 8)
    assert config.sampling.n_steps == 4


def test_the_model_has_the_genes_of_the_screen_and_the_labels_of_both(checkpoint, screen, tmp_path):
    result = fit(tuned(screen, checkpoint, tmp_path / "run"))
    model = PerturbDiff.from_pretrained(tmp_path / "run" / "model")
    assert set(model.genes.names) == set(anndata.read_h5ad(screen).var_names)
    assert model.vocabularies.perturbations.names == ("pert_0", "pert_1", "pert_2", "novel")
    assert model.vocabularies.cell_types.names == ("type_0", "type_1", "monocyte")
    assert model.vocabularies.batches.names == ("batch_0", "batch_1", "day_9")
    sha256 = hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    assert model.training.init_from == StartRecord("model", None, sha256, "full")
    assert str(checkpoint) not in str(model.training)
    assert same(result.model.denoiser.state_dict(), model.denoiser.state_dict())


def test_what_is_matched_and_new_is_said(checkpoint, screen, tmp_path, capsys):
    fit(tuned(screen, checkpoint, tmp_path / "run"))
    said = capsys.readouterr().out
    assert "30 of 34 genes matched by name; 4 new (own_0, own_1, own_2, own_3); 10 of the checkpoint's left out" in said
    for words in ("1 new perturbation labels: novel", "1 new cell type labels: monocyte", "1 new batch labels: day_9"):
        assert words in said


def test_without_steps_known_labels_are_predicted_as_the_checkpoint_does(checkpoint, tmp_path):
    """The screen of the checkpoint itself, a learning rate of nearly nothing: the same weights to rounding."""
    source = checkpoint.parents[1] / "screen.h5ad"
    fit(tuned(source, checkpoint, tmp_path / "run", "optim.lr=1e-12", "training.n_steps=1"))
    before, after = weights(checkpoint), weights(tmp_path / "run" / "model")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9, rtol=0) for name in before)


@pytest.mark.parametrize("lr", [0.3, 1e-12])
def test_where_tuning_does_harm_the_checkpoint_as_it_is_wins(lr, checkpoint, tmp_path):
    """A learning rate that ruins the weights, and cells of trained conditions that say so."""
    source = checkpoint.parents[1] / "screen.h5ad"
    words = ("split.validation_cells=0.4", "training.early_stop_patience=2", "training.validate_every=1")
    words = (*words, "training.n_steps=6", f"optim.lr={lr}", "optim.warmup_steps=0", "optim.ema_decay=0.0")
    result = fit(tuned(source, checkpoint, tmp_path / "run", *words))
    validated = [line for line in losses(tmp_path / "run") if "validation_energy_distance" in line]
    energy = {line["step"]: line["validation_energy_distance"] for line in validated}
    assert min(energy) == 0
    assert result.model.training.steps == min(energy, key=energy.get)
    before, after = weights(checkpoint), weights(tmp_path / "run" / "model")
    if lr == 0.3:
        assert result.step == 2
        assert same(before, after)
    assert all(torch.allclose(before[name], after[name], atol=1e-9, rtol=0) for name in before)


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_the_backbone_stays_bit_for_bit_and_the_rest_moves(method, checkpoint, screen, tmp_path):
    config = tuned(screen, checkpoint, tmp_path / "run", f"adapt.method={method}", "optim.lr=0.01")
    start = prepare(config, None, tmp_path / "run", resuming=False)
    begin = start.own_weights({name: p.detach().clone() for name, p in start.denoiser.named_parameters()})
    fit(config)
    after, before = weights(tmp_path / "run" / "model"), weights(checkpoint)
    changed = {f"{layer}.weight" for layer in changed_layers(PerturbDiff.from_pretrained(checkpoint).denoiser)}
    assert len(changed) == 14  # in each of two blocks qkv, proj, MLP, two modulations; in the first the MLP of controls
    for name, tensor in after.items():
        if name.startswith(BACKBONE) and not (method == "lora" and name in changed):
            assert torch.equal(tensor, before[name]), name
        elif name not in ("conditioning.interaction",):  # no combination in this screen
            assert not torch.equal(tensor, begin[name]), name


def test_what_does_not_train_has_no_gradient_and_no_moments(checkpoint, screen, tmp_path):
    from safetensors.torch import load_file

    fit(tuned(screen, checkpoint, tmp_path / "run", "adapt.method=frozen", "training.keep_last_state=true"))
    [state] = (tmp_path / "run" / "states").iterdir()
    moments = {name.split(".", 1)[-1] for name in load_file(state / "optimizer.safetensors")}
    assert not any(name.startswith(BACKBONE) for name in moments)
    assert "head.weight" in moments
    assert "conditioning.perturbation.weight" in moments


@pytest.mark.parametrize("method", METHODS)
def test_stopping_and_running_again_continues_bit_identically_without_the_checkpoint(
    method, checkpoint, screen, tmp_path
):
    words = (f"adapt.method={method}", "adapt.lr_ratio=0.3", "optim.lr=0.01", "split.validation=[novel:type_0]")
    own = tmp_path / "base"
    PerturbDiff.from_pretrained(checkpoint, device="cpu").save_pretrained(own)
    config = tuned(screen, own, tmp_path / "straight", *words)
    fit(config)
    stopped = replace(config, out=str(tmp_path / "stopped"))
    fit(stopped, stop_at=3)
    own.rename(tmp_path / "gone")
    assert fit(stopped).step == 6
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    assert same(weights(tmp_path / "straight" / "model"), weights(tmp_path / "stopped" / "model"))


def test_copied_parts_move_by_lr_ratio_and_new_ones_by_the_full_rate(checkpoint, screen, tmp_path):
    """AdamW's first step moves a weight by the learning rate, whatever its gradient."""
    words = ("training.n_steps=1", "adapt.lr_ratio=0.1")
    optim = ("lr=0.001", "weight_decay=0", "warmup_steps=0", "ema_decay=0", "eps=1e-20")
    config = tuned(screen, checkpoint, tmp_path / "run", *words, *(f"optim.{word}" for word in optim))
    start = prepare(config, None, tmp_path / "run", resuming=False)
    begin = {name: p.detach().clone() for name, p in start.denoiser.named_parameters()}
    fit(config)
    after = weights(tmp_path / "run" / "model")
    steps = {name: float((after[name] - begin[name]).abs().max()) for name in begin}
    assert {name for name in begin if "blocks" not in name and "embed_t" not in name} >= start.new_parts
    for name, step in steps.items():
        if step > 0:
            assert step == pytest.approx(1e-3 if name in start.new_parts else 1e-4, rel=0.02), name
    assert steps["head.weight"] > 0
    assert steps["blocks.0.mlp.fc2.bias"] > 0


def test_a_merged_adapter_is_the_model_of_the_run_and_another_base_is_refused(checkpoint, screen, tmp_path):
    fit(tuned(screen, checkpoint, tmp_path / "run", "adapt.method=lora", "optim.lr=0.01"))
    adapter = tmp_path / "run" / "adapter"
    merged = PerturbDiff.from_pretrained(adapter, base=checkpoint, device="cpu")
    own = PerturbDiff.from_pretrained(tmp_path / "run" / "model", device="cpu")
    for name, tensor in own.denoiser.state_dict().items():
        torch.testing.assert_close(merged.denoiser.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)
    assert (merged.genes, merged.vocabularies) == (own.genes, own.vocabularies)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert size < (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    with pytest.raises(ValueError, match=r"trained on model \(sha256 \w{12}\), and .* is another model, model"):
        PerturbDiff.from_pretrained(adapter, base=tmp_path / "run" / "model")
    with pytest.raises(FileNotFoundError, match="was a folder; say where it is"):
        PerturbDiff.from_pretrained(adapter)
    with pytest.raises(ValueError, match="adapter is an adapter, and adapters are of whole models"):
        fit(tuned(screen, adapter, tmp_path / "again", "adapt.method=lora"))


def test_a_label_of_a_batch_that_tells_nothing_stays_hidden(checkpoint, tmp_path):
    """Each treatment its own batch, named as batches of the checkpoint: their rows would give the answer away."""
    path = tmp_path / "confounded.h5ad"
    adata = anndata.read_h5ad(checkpoint.parents[1] / "screen.h5ad")
    adata.obs["batch"] = np.where(adata.obs["perturbation"] == "control", "batch_0", "batch_1")
    adata.write_h5ad(path)
    start = prepare(tuned(path, checkpoint, tmp_path / "run"), None, tmp_path / "run", resuming=False)
    assert start.data.match == "cell_type"
    assert start.data.vocabularies.batches.names == ("batch_0", "batch_1")
    assert (start.data.train.labels.batch == -1).all()


def test_nearest_gives_a_new_cell_type_the_row_of_the_one_with_the_most_similar_controls(checkpoint, tmp_path):
    path = tmp_path / "twin.h5ad"
    adata = anndata.read_h5ad(checkpoint.parents[1] / "screen.h5ad")
    twin = adata[adata.obs["cell_type"] == "type_1"].copy()
    twin.obs["cell_type"], twin.obs_names = "twin", [f"twin_{name}" for name in twin.obs_names]
    anndata.concat([adata, twin]).write_h5ad(path)
    config = tuned(path, checkpoint, tmp_path / "run", "adapt.new_labels=nearest")
    rows = prepare(config, None, tmp_path / "run", resuming=False).denoiser.conditioning.cell_type.weight
    assert torch.equal(rows[3], rows[2])
    assert not torch.equal(rows[3], rows[1])


def test_a_screen_in_memory_gives_the_run_of_its_file(checkpoint, screen, tmp_path):
    for name in ("file", "memory"):
        config = tuned(screen, checkpoint, tmp_path / name)
        fit(config, None if name == "file" else Screen.read(screen, config.data))
    assert losses(tmp_path / "file") == losses(tmp_path / "memory")


@pytest.mark.parametrize("method", METHODS)
def test_the_published_conditioning_is_tuned_too(method, checkpoint, screen, tmp_path):
    words = ("denoiser.conditioning=reference", "denoiser.output=direct", "denoiser.covariate_dim=4")
    source = tiny_config(checkpoint.parents[1] / "screen.h5ad", tmp_path / "base", *words, hold_out=())
    fit(source)
    config = tuned(screen, tmp_path / "base" / "model", tmp_path / "run", f"adapt.method={method}")
    assert config.denoiser == source.denoiser
    fit(config)
    model = PerturbDiff.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert model.denoiser.conditioning.encoder.transform.out_features == len(model.genes) == 34


# ---------------------------------------------------------------- refused


def test_another_architecture_is_refused_by_key_before_anything_is_written(checkpoint, screen, tmp_path):
    config = tuned(screen, checkpoint, tmp_path / "run", "denoiser.width=32")
    with pytest.raises(ValueError, match=r"denoiser\.width is 16 in the checkpoint and 32 in the settings"):
        fit(config)
    assert not (tmp_path / "run").exists()


def test_log1p_values_fit_a_checkpoint_of_counts_but_counts_none_of_nobody_knows_what(checkpoint, tmp_path):
    screen = checkpoint.parents[1] / "screen.h5ad"
    adata = anndata.read_h5ad(screen)
    adata.X = log1p_cp10k(adata.X).astype(np.float32)
    adata.write_h5ad(tmp_path / "log.h5ad")
    fit(tuned(tmp_path / "log.h5ad", checkpoint, tmp_path / "run"))
    model = PerturbDiff.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert (model.preprocessing.input_kind, model.preprocessing.target_sum) == ("log1p", 1e4)
    model.preprocessing = replace(model.preprocessing, target_sum=None)
    model.save_pretrained(tmp_path / "unknown")
    with pytest.raises(
        ValueError, match="X holds counts, and checkpoint unknown was trained on log1p values of nobody"
    ):
        fit(tuned(screen, tmp_path / "unknown", tmp_path / "other"))


def test_controls_that_sum_to_something_else_than_the_checkpoints_are_said(tmp_path):
    path = write_screen(tmp_path)
    of_some = fit(tiny_config(path, tmp_path / "some", "data.n_hvg=15", "training.n_steps=2")).folder / "model"
    names = json.loads((of_some / "genes.json").read_text())["names"]
    anndata.read_h5ad(path)[:, names].copy().write_h5ad(tmp_path / "few.h5ad")  # library sizes are sums over these
    said = [
        prepare(tuned_config(screen, of_some, tmp_path / "run"), None, tmp_path / "run", resuming=False).summary
        for screen in (path, tmp_path / "few.h5ad")
    ]
    assert "beside the checkpoint's training" not in said[0]
    assert "beside the checkpoint's training, the model's genes sum to" in said[1]


def test_a_converted_checkpoint_with_frozen_tables_is_refused(checkpoint, tmp_path):
    model = PerturbDiff.from_pretrained(checkpoint, device="cpu")
    published = PublishedEncoding(cell_type_features=3)
    words = {"conditioning": "reference", "cell_type_encoding": "features", "published_encoding": published}
    model.config = replace(model.config, denoiser=replace(model.config.denoiser, **words))
    model.denoiser = build_denoiser(model.config.denoiser, len(model.genes), model.vocabularies)
    model.save_pretrained(tmp_path / "converted")
    with pytest.raises(ValueError, match="converted checkpoint that knows labels by frozen tables"):
        settings_of(str(tmp_path / "converted"))


def test_a_state_of_another_adaptation_is_refused(checkpoint, screen, tmp_path):
    fit(tuned(screen, checkpoint, tmp_path / "run"), stop_at=2)
    with pytest.raises(ValueError, match=r"adapt\.method was 'full', is 'lora'"):
        fit(tuned(screen, checkpoint, tmp_path / "run", "adapt.method=lora"))


def test_a_state_that_another_process_saved_while_the_data_were_read_is_not_passed_over(screen, checkpoint, tmp_path):
    config = tuned(screen, checkpoint, tmp_path / "run")
    fit(config, stop_at=2)
    with pytest.raises(FileExistsError, match=r"another process has trained in .* meanwhile"):
        fit(config, check=lambda data: fit(config, stop_at=4) and None)
    assert fit(config).step == 6


# ---------------------------------------------------------------- the checkpoint of a run that goes on


def other_model(checkpoint, folder):
    model = PerturbDiff.from_pretrained(checkpoint, device="cpu")
    with torch.no_grad():
        model.denoiser.head.bias += 1
    model.save_pretrained(folder)


def go_on(screen, init_from, out, **words):
    words = {"overrides": [*RUN, "training.n_steps=4"], "score": False, **words}
    return perturbdiff.finetune(screen, init_from, out, **words)


@pytest.fixture
def stopped(checkpoint, screen, tmp_path):
    """A run that was stopped, and the folder of its checkpoint."""
    shutil.copytree(checkpoint, tmp_path / "base")
    fit(tuned(screen, tmp_path / "base", tmp_path / "run", "training.n_steps=4"), stop_at=2)
    return tmp_path / "run", tmp_path / "base"


def test_a_checkpoint_goes_on_under_another_name_with_scores_or_gone(stopped, checkpoint, screen, tmp_path):
    run, base = stopped
    said = json.loads((run / "adaptation.json").read_text())
    base.rename(tmp_path / "moved")
    model = PerturbDiff.from_pretrained(tmp_path / "moved", device="cpu")
    model.training = replace(model.training, license="mit")
    model.save_pretrained(tmp_path / "moved")  # other words about the same weights
    assert hashlib.sha256((tmp_path / "moved" / "config.json").read_bytes()).hexdigest() != said["base"]["sha256"]
    go_on(screen, tmp_path / "moved", run)
    go_on(screen, base, run)  # which is gone
    go_on(screen, None, run)
    assert json.loads((run / "adaptation.json").read_text()) == said
    fit(tuned(screen, checkpoint, tmp_path / "straight", "training.n_steps=4"))
    assert losses(run) == losses(tmp_path / "straight")


def test_another_checkpoint_is_refused_whatever_its_name_and_the_run_goes_on_without_it(stopped, checkpoint, screen):
    run, base = stopped
    shutil.rmtree(base)
    other_model(checkpoint, base)
    with pytest.raises(
        ValueError, match=r"was started from base .*, and \S+base is another model, .*leave init_from out"
    ):
        go_on(screen, base, run)
    assert go_on(screen, None, run).step == 4


def test_a_run_of_random_weights_and_one_of_a_checkpoint_do_not_go_on_as_each_other(stopped, screen, tmp_path):
    run, base = stopped
    with pytest.raises(ValueError, match=r"adapt\.init_from was '\S+base', is None"):
        fit(load_config(run / "config.yaml", [], {"adapt": {"init_from": None}}))
    fit(tiny_config(screen, tmp_path / "random", hold_out=()), stop_at=2)
    with pytest.raises(ValueError, match=r"adapt\.init_from was None, is '\S+base'"):
        fit(tuned(screen, base, tmp_path / "random"))


def test_a_run_goes_on_from_the_checkpoint_of_its_start_after_another_push(checkpoint, screen, tmp_path):
    other_model(checkpoint, tmp_path / "other")
    run = tmp_path / "run"
    with LocalHub() as hub, led_to(hub, tmp_path / "home"):
        repo = hub.models["lab/base"] = Repo()
        first = repo.commit(checkpoint)
        fit(tuned(screen, "lab/base", run, "training.n_steps=4"), stop_at=2)
        repo.commit(tmp_path / "other")
        n_asked = len(hub.log)
        go_on(screen, "lab/base", run)
        assert len(hub.log) == n_asked
        go_on(screen, f"lab/base@{first}", run)
        with pytest.raises(
            ValueError, match=rf"was started from lab/base at {first} .* lab/base@main is another model"
        ):
            go_on(screen, "lab/base@main", run)
    assert json.loads((run / "model" / "training.json").read_text())["init_from"]["revision"] == first


def test_scores_of_what_the_checkpoint_was_trained_on_are_refused(tmp_path):
    screen, words = write_screen(tmp_path), [*RUN, "training.n_steps=2"]
    own = fit(tiny_config(screen, tmp_path / "run", "training.n_steps=2")).folder  # pert_0:type_0 is held out
    known = {"init_from": own / "model", "recipe": DEFAULTS, "overrides": words}
    with pytest.raises(ValueError, match=r"was trained on 40 of the 40 cells that the split holds out"):
        perturbdiff.finetune(screen, out=tmp_path / "tuned", hold_out="pert_1:type_1", **known)
    assert not (tmp_path / "tuned").exists()
    perturbdiff.finetune(screen, out=tmp_path / "unscored", hold_out="pert_1:type_1", score=False, **known)
    scored = perturbdiff.finetune(screen, out=tmp_path / "tuned", hold_out="pert_0:type_0", **known)
    assert scored.scores is not None
