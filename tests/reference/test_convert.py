"""Converted weights and checkpoints against published outputs, and the published formula written out here."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

from perturbdiff.config import load_config
from perturbdiff.data.vocab import Labels
from perturbdiff.diffusion.sampling import sample
from perturbdiff.diffusion.schedule import Schedule
from perturbdiff.hub.records import ConversionRecord
from perturbdiff.model import PerturbDiff
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.reference.convert import convert_checkpoint, covariate_encoder_from_reference, denoiser_from_reference
from tests.conftest import GOLDEN

pytestmark = pytest.mark.slow

DEAD = re.compile(r"control_final_layer|gene_embedding\.(gene_embedding|layer_norm)")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Published outputs.


def test_denoiser_equals_the_published_one(golden, agree):
    numbers = golden("cross_dit_tiny")
    denoiser = denoiser_from_reference(part(numbers, "model."), n_heads=4)
    x_t, t, control, cov, previous = (
        numbers[f"in.{name}"] for name in ("x_t", "t", "cont_emb", "batch_emb", "prev_pred")
    )
    with torch.no_grad():
        agree(denoiser(x_t, t, control, cov, previous), numbers["out.cond.x"], "cond")
        agree(denoiser(x_t, t, control, None, previous), numbers["out.uncond.x"], "uncond")
        agree(denoiser(x_t, t, control, cov, None), numbers["out.cond_noprev.x"], "cond_noprev")
        agree(denoiser(x_t, t, control, cov, torch.zeros_like(x_t)), numbers["out.cond_noprev.x"], "zeros")


def test_embedders_by_name_are_refused_as_a_whole(golden):
    with pytest.raises(KeyError, match=re.escape("x_embedder.weight")):
        denoiser_from_reference(part(golden("cross_dit_tiny_byname"), "model."), n_heads=4)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_dose_that_is_not_there_is_an_error(golden, index):
    state = part(golden("cov_encoder_tiny"), "chemberta.")
    state["dose_indices"] = torch.tensor([0, 1, 2, 3, 1, 2, index], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"dose_indices must be rows of dose_encoder\.weight, which has 4"):
        covariate_encoder_from_reference(state)


# The published formula, block by block, on concatenated inputs (float64).


def published_state(
    n_genes: int, width: int, depth: int, n_heads: int, ratio: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights under all names of a published Cross_DiT."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (width, 2 * n_genes),
        "x_embedder.bias": (width,),
        "x_control_embedder.weight": (width, 2 * n_genes),
        "x_control_embedder.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "gene_embedding.gene_embedding.weight": (width, 5120),
        "gene_embedding.gene_embedding.bias": (width,),
        "gene_embedding.null_emb.weight": (1, width),
        "gene_embedding.layer_norm.weight": (width,),
        "gene_embedding.layer_norm.bias": (width,),
        "class_embedding.emb.weight": (width, n_genes),
        "class_embedding.emb.bias": (width,),
        "class_embedding.null_emb.weight": (1, width),
    }
    for i in range(depth):
        block = f"blocks.{i}.block."
        shapes[f"{block}attn.qkv.weight"] = (6 * width, 2 * width)
        shapes[f"{block}attn.qkv.bias"] = (6 * width,)
        shapes[f"{block}attn.q_norm.weight"] = (2 * width // n_heads,)
        shapes[f"{block}attn.k_norm.weight"] = (2 * width // n_heads,)
        shapes[f"{block}attn.proj.weight"] = (2 * width, 2 * width)
        shapes[f"{block}attn.proj.bias"] = (2 * width,)
        for mlp in ("mlp", "control_mlp"):
            shapes[f"{block}{mlp}.fc1.weight"] = (ratio * width, width)
            shapes[f"{block}{mlp}.fc1.bias"] = (ratio * width,)
            shapes[f"{block}{mlp}.fc2.weight"] = (width, ratio * width)
            shapes[f"{block}{mlp}.fc2.bias"] = (width,)
        for modulation in ("adaLN_modulation", "control_adaLN_modulation"):
            shapes[f"{block}{modulation}.1.weight"] = (6 * width, width)
            shapes[f"{block}{modulation}.1.bias"] = (6 * width,)
    for head in ("final_layer", "control_final_layer"):
        shapes[f"{head}.linear.weight"] = (n_genes, width)
        shapes[f"{head}.linear.bias"] = (n_genes,)
        shapes[f"{head}.adaLN_modulation.1.weight"] = (2 * width, width)
        shapes[f"{head}.adaLN_modulation.1.bias"] = (2 * width,)
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def published_forward(
    state: dict[str, Tensor], n_heads: int, x_in: Tensor, control_in: Tensor, t: Tensor, cov: Tensor | None
) -> Tensor:
    """x_in = cat([x_t, previous x0]), control_in = cat([control, zeros])."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def layer_norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rms_norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}.fc1"), approximate="tanh"), f"{name}.fc2")

    frequencies = torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)]).double()
    angles = t[:, None, None].double() * frequencies
    temb = linear(silu(linear(torch.cat([angles.cos(), angles.sin()], -1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    cls = w["class_embedding.null_emb.weight"][None] if cov is None else linear(silu(cov), "class_embedding.emb")
    c = temb + cls
    h = linear(x_in, "x_embedder") + w["gene_embedding.null_emb.weight"]
    hc = linear(control_in, "x_control_embedder") + w["gene_embedding.null_emb.weight"]
    n_sets, n_cells, width = h.shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        b = f"blocks.{i}.block"
        m = linear(silu(c), f"{b}.adaLN_modulation.1").chunk(6, -1)
        mc = linear(silu(c), f"{b}.control_adaLN_modulation.1").chunk(6, -1)
        z = torch.cat([layer_norm(h) * (1 + m[1]) + m[0], layer_norm(hc) * (1 + mc[1]) + mc[0]], -1)
        qkv = linear(z, f"{b}.attn.qkv").reshape(n_sets, n_cells, 3, n_heads, 2 * width // n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rms_norm(q, f"{b}.attn.q_norm"), rms_norm(k, f"{b}.attn.k_norm")
        attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        dx, dxc = linear(attention.transpose(1, 2).reshape(n_sets, n_cells, -1), f"{b}.attn.proj").chunk(2, -1)
        h, hc = (
            h + m[2] * dx + m[5] * mlp(layer_norm(h) * (1 + m[4]) + m[3], f"{b}.mlp"),
            hc + mc[2] * dxc + mc[5] * mlp(layer_norm(hc) * (1 + mc[4]) + mc[3], f"{b}.control_mlp"),
        )
    shift, scale = linear(silu(c), "final_layer.adaLN_modulation.1").chunk(2, -1)
    return linear(layer_norm(h) * (1 + scale) + shift, "final_layer.linear").clamp_min(0)


@pytest.mark.parametrize(
    ("n_genes", "width", "depth", "n_heads", "ratio", "n_cells"),
    [(5, 8, 1, 1, 4, 4), (7, 12, 3, 2, 4, 6), (16, 6, 1, 3, 2, 1), (1, 10, 3, 1, 3, 5), (33, 16, 2, 8, 4, 9)],
)
def test_denoiser_equals_the_published_formula_on_fresh_weights(n_genes, width, depth, n_heads, ratio, n_cells):
    state = published_state(n_genes, width, depth, n_heads, ratio, seed=n_genes)
    generator = torch.Generator().manual_seed(1)
    x_t, previous, control, cov = (torch.randn(4, n_cells, n_genes, generator=generator) for _ in range(4))
    t = torch.tensor([0, 12, 430, 999])
    denoiser = denoiser_from_reference(state, n_heads)
    zeros = torch.zeros_like(x_t)
    for cov_given, previous_given in ((cov, previous), (None, previous), (cov, None), (cov[:, :1], previous)):
        expected = published_forward(
            state,
            n_heads,
            torch.cat([x_t, zeros if previous_given is None else previous_given], -1).double(),
            torch.cat([control, zeros], -1).double(),
            t,
            None if cov_given is None else cov_given.double(),
        )
        with torch.no_grad():
            actual = denoiser(x_t, t, control, cov_given, previous_given)
        assert (expected > 0.01).any()
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_dead_published_weights_may_be_absent():
    state = published_state(5, 8, 2, 2)
    dead = {name for name in state if DEAD.match(name) or name.startswith("blocks.1.block.control_mlp.")}
    assert len(dead) == 12
    whole = denoiser_from_reference(state, 2).state_dict()
    without = denoiser_from_reference({name: tensor for name, tensor in state.items() if name not in dead}, 2)
    assert all(torch.equal(whole[name], tensor) for name, tensor in without.state_dict().items())


# Errors.

WHOLE = published_state(5, 8, 2, 2)
LIVE = [name for name in WHOLE if not DEAD.match(name) and not name.startswith("blocks.1.block.control_mlp.")]


def test_a_missing_tensor_is_an_error():
    for missing in LIVE:
        with pytest.raises(KeyError, match="missing"):
            denoiser_from_reference({name: tensor for name, tensor in WHOLE.items() if name != missing}, 2)


def test_a_tensor_of_another_shape_is_an_error_and_never_cut_or_broadcast():
    for name in LIVE:
        shape = list(WHOLE[name].shape)
        for axis, own in enumerate(shape):
            for size in {own + 2, 1} - {own}:
                other = torch.zeros(*shape[:axis], size, *shape[axis + 1 :])
                with pytest.raises(ValueError, match=r"shape|twice the number of genes|n_heads"):
                    denoiser_from_reference({**WHOLE, name: other}, 2)


@pytest.mark.parametrize("name", ["x_embedder.scale", "blocks.0.block.norm.weight", "blocks.0.attn.qkv.weight", "y"])
def test_an_unexpected_tensor_is_an_error_that_names_it(name):
    with pytest.raises(KeyError, match=rf"unexpected \['{re.escape(name.replace('.block.', '.'))}'\]"):
        denoiser_from_reference({**WHOLE, name: torch.zeros(3)}, 2)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"x_embedder\.weight.*missing"),
        ({**WHOLE, "x_embedder.weight": torch.zeros(8, 9)}, r"has 9 inputs; it must be twice the number of genes"),
        ({name: tensor for name, tensor in WHOLE.items() if not name.startswith("blocks.")}, r"blocks\.0"),
        ({**WHOLE, "blocks.999999999.block.mlp.fc1.bias": torch.zeros(32)}, r"blocks\.0"),  # asks for a billion
        ({name: t for name, t in WHOLE.items() if not name.startswith("blocks.0.block.a")}, r"missing \['blocks\.0\."),
    ],
    ids=str.split("nothing odd no-blocks many-blocks missing-block"),
)
def test_what_is_no_published_state_dict_is_an_error(state, message):
    with pytest.raises((KeyError, ValueError), match=message):
        denoiser_from_reference(state, 2)


@pytest.mark.parametrize("n_heads", [1, 3, 4])
def test_another_number_of_heads_is_an_error(n_heads):
    with pytest.raises(ValueError, match=r"n_heads|q_norm|k_norm"):
        denoiser_from_reference(WHOLE, n_heads)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("celltype_encoder.weight", (3, 5)),
        ("batch_encoder.weight", (2, 3)),
        ("transform.weight", (9, 8)),
        ("transform.bias", (1,)),
        ("dose_encoder.weight", (3, 4)),
    ],
)
def test_an_encoder_with_a_tensor_missing_unexpected_or_of_another_shape_is_an_error(name, shape):
    state = {
        "pert_encoder.weight": torch.zeros(6, 4), "celltype_encoder.weight": torch.zeros(3, 4),
        "batch_encoder.weight": torch.zeros(2, 4), "transform.weight": torch.zeros(9, 12),
        "transform.bias": torch.zeros(9),
    }  # fmt: skip
    with pytest.raises((KeyError, ValueError), match=r"shape|unexpected \['dose_encoder\.weight'\]"):
        covariate_encoder_from_reference({**state, name: torch.zeros(shape)})
    if name in state:
        with pytest.raises(KeyError if name != "batch_encoder.weight" else ValueError, match=r"missing|shape"):
            covariate_encoder_from_reference({key: tensor for key, tensor in state.items() if key != name})


# Checkpoints.

LABELS = {"pert_dict": 7, "cell_type_dict": 4, "batch_dict": 3}  # of the golden covariate encoders


def write_checkpoint(
    path: Path,
    encoder: dict[str, Tensor],
    model: dict[str, Tensor] | None = None,
    changes: dict[str, Any] | None = None,
    raw: dict[str, Tensor] | None = None,
) -> Path:
    """A checkpoint as the published code writes it; `changes` are settings by "section.key", or top-level values."""
    model = published_state(48, 8, 2, 2) if model is None else model
    hyper: dict[str, Any] = {
        "cov_encoding_cfg": {
            "pert_encoding": "onehot", "celltype_encoding": "onehot", "drug_encoding": "onehot",
            "replogle_gene_encoding": "onehot", "batch_encoding": "onehot", "gather_strategy": "concat",
            "pert_embedding_path": "/home/someone/secret/pert.pkl",
            **{name: {f"{name[:-5]} {9 - i}": i for i in reversed(range(n))} for name, n in LABELS.items()},
        },
        "model_cfg": {
            "model_type": "Cross_DiT", "Block_type": "MM_DiT", "qk_norm": True, "output_fn": "relu", "steps": 1000,
            "noise_schedule": "linear", "noise_schedule_gamma": 0.3, "p_drop_cond": 0.5, "dit_num_heads": 2,
            "separate_embedder": False, "dataset_dict": ["tiny_pbmc"], "cutoff": 1e-4, "predict_xstart": True,
        },
        "optimizer_cfg": {"MMD_loss": True, "MMD_loss_factor": 1.0, "log": {"where": "C:\\Users\\someone"}},
        "trainer_cfg": {"default_root_dir": "/home/someone/secret", "precision": "32-true", "lr": math.nan},
    }  # fmt: skip
    top: dict[str, Any] = {"epoch": 3, "global_step": 77}
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        if name:
            hyper[section][name] = value
        else:
            top[section] = value
    state = OrderedDict(
        {f"cov_encoder.{k}": v for k, v in encoder.items()} | {f"model.{k}": v for k, v in model.items()}
    )
    saved_hyper = {section: OmegaConf.create(values) for section, values in hyper.items()}
    content = {"state_dict": state, "hyper_parameters": {**saved_hyper, "py_logger": logging.getLogger("x")}, **top}
    if raw is not None:
        content["current_model_state"] = OrderedDict({**state, **raw})
    torch.save(content, path)
    return path


def onehot(golden) -> dict[str, Tensor]:
    return part(golden("cov_encoder_tiny"), "onehot.")


def reopened(path: Path, folder: Path, **arguments: Any) -> PerturbDiff:
    """Converted, saved and loaded again."""
    PerturbDiff(**vars(convert_checkpoint(path, **arguments))).save_pretrained(folder)
    return PerturbDiff.from_pretrained(folder, device="cpu")


def ids_of_names(model: PerturbDiff, names: dict[str, list[str]], ids: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The ids that the model gives to the names which have `ids` in the checkpoint."""
    known = model.vocabularies
    flat = [[names[kind][i] for i in tensor.flatten().tolist()] for kind, tensor in ids.items()]
    labels = known.encode(list(zip(*flat, strict=True)))
    shape = next(iter(ids.values())).shape
    return tuple(t.reshape(shape) for t in (labels.perturbation, labels.cell_type, labels.batch))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_published_checkpoint_computes_the_published_outputs(golden, agree, tmp_path, weights):
    numbers = golden("ckpt_tiny")
    hyper = json.loads((GOLDEN / "ckpt_tiny.json").read_text())["hyper_parameters"]["cov_encoding_cfg"]
    names = {
        kind: sorted(hyper[f"{kind}_dict"], key=hyper[f"{kind}_dict"].get) for kind in ("pert", "cell_type", "batch")
    }
    model = reopened(GOLDEN / "tiny_official.ckpt", tmp_path / "model", weights=weights)
    ids = {"pert": "in.cov_pert", "cell_type": "in.cov_celltype", "batch": "in.cov_batch"}
    ids = ids_of_names(model, names, {kind: numbers[name] for kind, name in ids.items()})
    x_t, t, control, previous = (numbers[f"in.{name}"] for name in ("x_t", "t", "cont_emb", "prev_pred"))
    with torch.no_grad():
        cov = model.denoiser.conditioning.encoder(*ids)  # each cell of the golden sets has labels of its own
        agree(cov, numbers[f"{weights}.batch_emb"], "cov")
        agree(model.denoiser(x_t, t, control, cov, previous), numbers[f"{weights}.x"], "cond")
        agree(model.denoiser(x_t, t, control, None, previous), numbers[f"{weights}.uncond_x"], "uncond")
        schedule = Schedule(model.config.diffusion.schedule, model.config.diffusion.n_timesteps)
        sampled = sample(model.denoiser, x_t, control, cov, model.config.sampling, schedule)
        agree(sampled, numbers[f"{weights}.ddim100_sample"], "100 steps")
        # Sets with one label each, by way of Labels.
        labels = Labels(ids[0][:, :1], ids[1][:, 0], ids[2][:, 0])
        agree(model.denoiser(x_t, t, control, labels), model.denoiser(x_t, t, control, cov[:, :1]), "labels")
    other = numbers[f"{'raw' if weights == 'ema' else 'ema'}.x"]
    assert (other - numbers[f"{weights}.x"]).abs().max() > 1e-4


def test_the_final_published_checkpoint_converts_and_has_no_raw_weights(golden, tmp_path):
    golden("ckpt_tiny")
    path = GOLDEN / "tiny_official_final_weights_only.ckpt"
    model = reopened(path, tmp_path / "model", genes=[f"G{i}" for i in range(48)])
    assert model.genes.names[:2] == ("G0", "G1")
    assert model.vocabularies.perturbations.names == ("C5a", "G-CSF", "IFN-beta", "IL-2", "IL-4", "PBS")
    assert model.vocabularies.batches.names[0] == "tiny_pbmc_Donor1"
    with pytest.raises(ValueError, match="has no raw weights beside its state_dict"):
        convert_checkpoint(path, weights="raw")


def test_a_converted_model_predicts(golden, tmp_path):
    golden("ckpt_tiny")
    model = reopened(GOLDEN / "tiny_official.ckpt", tmp_path / "model")
    counts = np.random.default_rng(0).poisson(3, (5, 48)).astype(np.float32)
    obs = pd.DataFrame({"cell_type": ["B"] * 5, "batch": ["tiny_pbmc_Donor1"] * 5}, index=[f"c{i}" for i in range(5)])
    controls = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"gene_{i}" for i in range(48)]))
    controls.obs[model.config.obs.perturbation] = model.config.obs.control_label
    predicted = model.predict(controls, perturbation="IL-4")
    assert predicted.shape == (5, 48)
    assert predicted.uns["perturbdiff"]["n_steps"] == 100
    assert list(predicted.uns["perturbdiff"]["unseen"]) == []


def test_what_a_checkpoint_says_is_kept_and_what_its_author_would_not_say_is_not(golden, tmp_path):
    path = write_checkpoint(tmp_path / "mine.ckpt", onehot(golden), changes={"model_cfg.steps": 500})
    converted = convert_checkpoint(path)
    training = converted.training
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert training.converted_from == ConversionRecord("mine.ckpt", sha256, "ema", 77, 3, None)
    assert training.settings["model_cfg"]["steps"] == 500
    assert training.settings["trainer_cfg"] == {"precision": "32-true"}
    text = json.dumps(asdict(training), allow_nan=False)
    assert "someone" not in text
    assert str(tmp_path) not in text
    assert "cell_type 9" not in text
    assert vars(converted.preprocessing) == {
        "input_kind": "counts", "target_sum": 1e4, "scale": 10.0, "library_size_col": None
    }  # fmt: skip
    sampling, diffusion = converted.config.sampling, converted.config.diffusion
    assert (sampling.sampler, sampling.spacing, sampling.start_time) == ("ddim", "reference", 100)
    assert (sampling.guidance_scale, sampling.eta, sampling.cutoff) == (1.0, 0.0, 1e-4)
    assert (diffusion.n_timesteps, diffusion.schedule, diffusion.p_drop_cond) == (500, "linear", 0.5)
    assert (diffusion.p_drop_label, converted.config.set_size) == (0.0, 256)
    assert converted.vocabularies.combination_separator is None
    assert converted.genes.names == tuple(f"gene_{i}" for i in range(48))


VARIANTS = {
    "onehot": {},
    "non": {"pert_encoding": "non"},
    "onehot_nobatch": {"batch_encoding": None},
    "llm_celltype": {"celltype_encoding": "llm"},
    "genept_llm": {"replogle_gene_encoding": "genept", "celltype_encoding": "llm"},
    "chemberta": {"drug_encoding": "chemberta_cls"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_encoding_of_labels_gives_the_published_covariates_after_saving(golden, agree, tmp_path, variant):
    numbers = golden("cov_encoder_tiny")
    changes = {f"cov_encoding_cfg.{key}": value for key, value in VARIANTS[variant].items()}
    path = write_checkpoint(tmp_path / "x.ckpt", part(numbers, f"{variant}."), changes=changes)
    model = reopened(path, tmp_path / "model")
    names = {
        kind: [f"{kind} {9 - i}" for i in range(LABELS[f"{kind}_dict"])] for kind in ("pert", "cell_type", "batch")
    }
    used = numbers[f"pert_used.{variant}"]
    perturbation, cell_type, batch = (used, numbers["in.celltype"], numbers["in.batch"])
    if variant == "non":
        assert model.vocabularies.perturbations.names == ()  # none may seem to be known
    else:
        given = {"pert": used.clamp_min(0), "cell_type": cell_type, "batch": batch}
        ids = ids_of_names(model, names, given)
        if variant == "onehot_nobatch":
            assert (ids[2] == -1).all()
        perturbation, cell_type = torch.where(used < 0, used, ids[0]), ids[1]
    cov = model.denoiser.conditioning.encoder(perturbation, cell_type, batch)
    agree(cov, numbers[f"out.{variant}"], variant)


def test_absent_labels_of_frozen_tables_are_the_mean_of_their_rows(golden, tmp_path):
    encoder = covariate_encoder_from_reference(part(golden("cov_encoder_tiny"), "chemberta."))
    of_each = encoder(torch.arange(7), torch.ones(7, dtype=torch.int64), torch.zeros(7, dtype=torch.int64))
    absent = encoder(torch.tensor(-1), torch.tensor(1), torch.tensor(0))
    torch.testing.assert_close(absent, of_each.mean(0))


def test_covariates_may_be_wider_than_the_genes(golden, tmp_path):
    # As where a fine-tuned checkpoint has other input and output layers than the one it was made from.
    model = published_state(20, 8, 2, 2)
    model["class_embedding.emb.weight"] = torch.randn(8, 48, generator=torch.Generator().manual_seed(1))
    path = write_checkpoint(tmp_path / "x.ckpt", onehot(golden), model)
    converted = reopened(path, tmp_path / "model")
    assert (len(converted.genes), converted.config.denoiser.published_encoding.covariates) == (20, 48)
    inputs = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(2))
    cov = covariate_encoder_from_reference(onehot(golden))(*(torch.tensor([1, 2]),) * 3)[:, None]
    state, t = {**model}, torch.tensor([3, 800])
    zeros = torch.zeros_like(inputs)
    expected = published_forward(
        state, 2, torch.cat([inputs, zeros], -1).double(), torch.cat([inputs, zeros], -1).double(), t, cov.double()
    )
    labels = Labels(torch.tensor([[1], [2]]), torch.tensor([1, 2]), torch.tensor([1, 2]))
    with torch.no_grad():
        actual = converted.denoiser(inputs, t, inputs, labels)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dataset", "sets"), [("pbmc", [0, 2]), ("tahoe100m", [1]), ("my_Tahoe_screen", [1]), ("PBMC 10k", [0, 2])]
)
def test_embedders_of_one_data_set_are_taken_by_its_name(golden, agree, tmp_path, dataset, sets):
    numbers = golden("cross_dit_tiny_byname")
    changes = {"model_cfg.dit_num_heads": 4, "model_cfg.separate_embedder": "by_name"}
    path = write_checkpoint(tmp_path / "x.ckpt", onehot(golden), part(numbers, "model."), changes)
    model = reopened(path, tmp_path / "model", dataset=dataset)
    x_t, t, control, cov, previous = (
        numbers[f"in.{name}"][sets] for name in ("x_t", "t", "cont_emb", "batch_emb", "prev_pred")
    )
    with torch.no_grad():
        agree(model.denoiser(x_t, t, control, cov, previous), numbers["out.cond.x"][sets], dataset)
    assert model.training.converted_from.dataset == ("pbmc" if 0 in sets else "tahoe100m")


@pytest.mark.parametrize("dataset", [None, "replogle", "norman", ""])
def test_a_data_set_without_embedders_is_an_error_that_lists_those_that_have_some(golden, tmp_path, dataset):
    model = part(golden("cross_dit_tiny_byname"), "model.")
    path = write_checkpoint(tmp_path / "x.ckpt", onehot(golden), model, {"model_cfg.dit_num_heads": 4})
    with pytest.raises(ValueError, match=r"embedders.*: pbmc, tahoe100m\."):
        convert_checkpoint(path, dataset=dataset)


def test_a_data_set_of_shared_embedders_must_be_that_of_the_checkpoint(golden, tmp_path):
    path = write_checkpoint(tmp_path / "x.ckpt", onehot(golden))
    for dataset in ("tiny_pbmc", "pbmc"):
        assert convert_checkpoint(path, dataset=dataset).training.converted_from.dataset == dataset
    with pytest.raises(ValueError, match=r"'tahoe100m' is not among those of this checkpoint \(tiny_pbmc\)"):
        convert_checkpoint(path, dataset="tahoe100m")


def test_raw_weights_are_those_beside_the_average(golden, tmp_path):
    bias = torch.arange(48.0)
    path = write_checkpoint(tmp_path / "x.ckpt", onehot(golden), raw={"model.final_layer.linear.bias": bias})
    assert torch.equal(convert_checkpoint(path, weights="raw").denoiser.head.bias.detach(), bias)
    assert not torch.equal(convert_checkpoint(path).denoiser.head.bias.detach(), bias)
    with pytest.raises(ValueError, match=r"weights \('best'\) must be"):
        convert_checkpoint(path, weights="best")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_cfg.use_gene_embedding", True), ("model_cfg.use_class_silu", True), ("model_cfg.qk_norm", False),
        ("model_cfg.learn_sigma", True), ("model_cfg.sigma_small", True), ("model_cfg.predict_xstart", False),
        ("model_cfg.rescale_timesteps", True), ("model_cfg.use_kl", True), ("model_cfg.output_fn", "softplus"),
        ("model_cfg.Block_type", "DiT"), ("model_cfg.model_type", "MLP"), ("model_cfg.noise_schedule", "sqrt"),
        ("model_cfg.class_emb_gather_strategy", "mean"), ("cov_encoding_cfg.gather_strategy", "sum"),
        ("cov_encoding_cfg.pert_encoding", "esm2"), ("cov_encoding_cfg.celltype_encoding", "ontology"),
        ("cov_encoding_cfg.drug_encoding", "logdose"), ("cov_encoding_cfg.batch_encoding", "llm"),
    ],
)  # fmt: skip
def test_a_setting_that_computes_something_else_is_an_error_that_names_it(golden, tmp_path, key, value):
    path = write_checkpoint(tmp_path / "x.ckpt", onehot(golden), changes={key: value})
    with pytest.raises(ValueError, match=rf"{re.escape(key)} \({value!r}\) must be"):
        convert_checkpoint(path)


def test_the_exponent_of_the_power_cosine_schedule_must_be_the_published_one(golden, tmp_path):
    changes = {"model_cfg.noise_schedule": "power_cosine", "model_cfg.noise_schedule_gamma": 0.5}
    with pytest.raises(ValueError, match=r"noise_schedule_gamma \(0\.5\) must be 0\.3"):
        convert_checkpoint(write_checkpoint(tmp_path / "x.ckpt", onehot(golden), changes=changes))
    changes["model_cfg.noise_schedule_gamma"] = 0.3
    path = write_checkpoint(tmp_path / "x.ckpt", onehot(golden), changes=changes)
    assert convert_checkpoint(path).config.diffusion.schedule == "power_cosine"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cov_encoding_cfg.pert_dict", {"a": 0}, r"the 1 perturbation ids must be 0 to 6"),
        ("cov_encoding_cfg.pert_dict", {f"p{i}": i + 1 for i in range(7)}, r"perturbation ids must be 0 to 6"),
        ("cov_encoding_cfg.pert_dict", {f"p{i}": str(i) for i in range(7)}, r"perturbation ids must be 0 to 6"),
        ("cov_encoding_cfg.cell_type_dict", {f"c{i}": min(i, 2) for i in range(4)}, r"cell_type ids must be 0 to 3"),
        ("cov_encoding_cfg.batch_dict", None, r"no batch names, and the weights have 3"),
        ("model_cfg.steps", 0, r"setting steps \(0\) must be a number between 1"),
        ("model_cfg.steps", 10**12, r"setting steps \(10+\) must be a number between 1"),
        ("model_cfg.steps", "${oc.env:HOME}", r"setting steps \('\$\{oc\.env:HOME\}'\) must be a number"),
        ("model_cfg.cutoff", -1.0, r"setting cutoff \(-1\.0\) must be"),
        ("model_cfg.dit_num_heads", 3, r"n_heads \(3\) must divide"),
        ("model_cfg.dit_num_heads", True, r"setting dit_num_heads \(True\) must be"),
        ("state_dict", {}, r"x\.ckpt has no state_dict"),
        ("state_dict", {"model.x": 1}, r"holds what is no tensor: 'model\.x'"),
        ("state_dict", {"critic.x": torch.zeros(1)}, r"1 unknown tensors: critic\.x"),
        ("hyper_parameters", {}, r"has no hyper_parameters\.cov_encoding_cfg"),
    ],
)
def test_what_does_not_fit_together_is_an_error(golden, tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(write_checkpoint(tmp_path / "x.ckpt", onehot(golden), changes={key: value}))


def test_tensors_that_are_missing_unknown_or_not_finite_are_errors_that_name_them(golden, tmp_path):
    encoder, model = onehot(golden), published_state(48, 8, 2, 2)
    path = tmp_path / "x.ckpt"
    with pytest.raises(ValueError, match=r"x\.ckpt: .*unexpected \['conditioning\.encoder\.dose_encoder\.weight'\]"):
        convert_checkpoint(write_checkpoint(path, {**encoder, "dose_encoder.weight": torch.zeros(3, 4)}))
    with pytest.raises(ValueError, match=r"x\.ckpt: .*unexpected \['x_embedder\.scale'\]"):
        convert_checkpoint(write_checkpoint(path, encoder, {**model, "x_embedder.scale": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"x\.ckpt: tensor 'transform\.weight' is missing"):
        convert_checkpoint(write_checkpoint(path, {k: v for k, v in encoder.items() if k != "transform.weight"}))
    broken = {**model, "final_layer.linear.bias": torch.full((48,), math.nan)}
    with pytest.raises(ValueError, match=r"1 tensors hold NaN or infinity: head\.bias"):
        convert_checkpoint(write_checkpoint(path, encoder, broken))


def test_dead_tensors_are_dropped_without_a_word(golden, tmp_path):
    model = published_state(48, 8, 2, 2)
    model["gene_embedding.gene_embedding.weight"] = torch.full((8, 5120), math.nan)
    assert convert_checkpoint(write_checkpoint(tmp_path / "x.ckpt", onehot(golden), model)).denoiser.n_genes == 48


@pytest.mark.parametrize(
    ("genes", "message"), [(["a", "b"], "2 genes were given, x.ckpt has 48"), (["a"] * 48, "1 duplicate gene names")]
)
def test_genes_that_do_not_fit_are_an_error(golden, tmp_path, genes, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(write_checkpoint(tmp_path / "x.ckpt", onehot(golden)), genes=genes)


def test_a_small_file_cannot_ask_for_a_large_model(golden, tmp_path):
    model = published_state(48, 8, 2, 2)
    model["x_embedder.weight"] = torch.zeros(1 << 16, 2)  # 512 kB that would be 12 * 2 ** 34 bytes of one layer
    with pytest.raises(ValueError, match="shape"):
        convert_checkpoint(write_checkpoint(tmp_path / "x.ckpt", onehot(golden), model))


@pytest.mark.parametrize("conditioning", ["labels", "reference"])
@pytest.mark.parametrize(
    "word",
    ["published_encoding.covariates=9", "published_encoding.cell_type_features=5", "perturbation_encoding=features"],
)
def test_encodings_of_converted_models_are_refused_for_training_in_one_line(conditioning, word):
    words = [f"denoiser.{word}", f"denoiser.conditioning={conditioning}", "data.screen=x", "out=x"]
    with pytest.raises(ValueError, match="converted") as error:
        load_config(None, words)
    assert "\n" not in str(error.value)


def test_settings_of_a_converted_model_build_without_memory(golden, tmp_path):
    path = write_checkpoint(
        tmp_path / "x.ckpt",
        part(golden("cov_encoder_tiny"), "chemberta."),
        changes={"cov_encoding_cfg.drug_encoding": "chemberta_cls"},
    )
    converted = convert_checkpoint(path)
    encoder = converted.config.denoiser.published_encoding
    assert vars(encoder) == {"perturbation_features": 12, "doses": 4, "cell_type_features": 0, "covariates": 0}
    sizes = [len(v) for v in (converted.vocabularies.perturbations, converted.vocabularies.cell_types)]
    with torch.device("meta"):
        built = Denoiser(converted.config.denoiser, 48, VocabSizes(*sizes, len(converted.vocabularies.batches)))
    own = converted.denoiser.state_dict()
    assert {name: t.shape for name, t in built.state_dict().items()} == {name: t.shape for name, t in own.items()}
