"""Converted weights against published outputs, and against the published formula written out here."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perturbdiff.hub.convert import covariate_encoder_from_reference, denoiser_from_reference

DEAD = re.compile(r"control_final_layer|gene_embedding\.(gene_embedding|layer_norm)")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Published outputs.


def check_outputs(numbers: dict[str, Tensor], state: dict[str, Tensor], sets: list[int], agree, what: str) -> None:
    denoiser = denoiser_from_reference(state, n_heads=4)
    x_t, t, control, cov, previous = (
        numbers[f"in.{name}"][sets] for name in ("x_t", "t", "cont_emb", "batch_emb", "prev_pred")
    )
    with torch.no_grad():
        agree(denoiser(x_t, t, control, cov, previous), numbers["out.cond.x"][sets], f"{what}cond")
        agree(denoiser(x_t, t, control, None, previous), numbers["out.uncond.x"][sets], f"{what}uncond")
        agree(denoiser(x_t, t, control, cov, None), numbers["out.cond_noprev.x"][sets], f"{what}cond_noprev")
        agree(denoiser(x_t, t, control, cov, torch.zeros_like(x_t)), numbers["out.cond_noprev.x"][sets], f"{what}zeros")


def test_denoiser_equals_the_published_one(golden, agree):
    numbers = golden("cross_dit_tiny")
    check_outputs(numbers, part(numbers, "model."), [0, 1, 2], agree, "")


@pytest.mark.parametrize(("name", "sets"), [("pbmc", [0, 2]), ("tahoe100m", [1])])
def test_denoiser_of_one_data_set_equals_the_published_one_with_embedders_by_name(golden, agree, name, sets):
    numbers = golden("cross_dit_tiny_byname")
    of_this_set = re.compile(rf"(x_embedder|x_control_embedder)\.{name}\.")
    of_any_set = re.compile(r"x_(control_)?embedder\.\w+\.(weight|bias)$")
    state = {
        of_this_set.sub(r"\1.", key): tensor
        for key, tensor in part(numbers, "model.").items()
        if of_this_set.match(key) or not of_any_set.match(key)
    }
    check_outputs(numbers, state, sets, agree, f"{name} ")


def test_embedders_by_name_are_refused_as_a_whole(golden):
    with pytest.raises(KeyError, match=re.escape("x_embedder.weight")):
        denoiser_from_reference(part(golden("cross_dit_tiny_byname"), "model."), n_heads=4)


@pytest.mark.parametrize("variant", ["onehot", "non", "onehot_nobatch"])
def test_covariate_encoder_equals_the_published_one(golden, agree, variant):
    numbers = golden("cov_encoder_tiny")
    encoder = covariate_encoder_from_reference(part(numbers, f"{variant}."))
    if variant == "non":
        encoder.perturbation_encoding = "none"
    ids = (numbers["in.pert"], numbers["in.celltype"], numbers["in.batch"])
    agree(encoder(*ids), numbers[f"out.{variant}"], variant)


@pytest.mark.parametrize("variant", ["llm_celltype", "genept_llm", "chemberta"])
def test_encoders_with_frozen_features_are_refused(golden, variant):
    with pytest.raises(KeyError, match="is missing from the published state dict"):
        covariate_encoder_from_reference(part(golden("cov_encoder_tiny"), f"{variant}."))


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


def test_names_may_carry_the_prefix_of_the_module():
    state = published_state(5, 8, 2, 2)
    plain = denoiser_from_reference(state, 2).state_dict()
    prefixed = denoiser_from_reference({f"model.{name}": tensor for name, tensor in state.items()}, 2).state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in prefixed.items())
    covariates = encoder_state()
    encoder = covariate_encoder_from_reference({f"cov_encoder.{name}": tensor for name, tensor in covariates.items()})
    assert torch.equal(encoder.cell_type.weight, covariates["celltype_encoder.weight"])


def test_dead_published_weights_may_be_absent():
    state = published_state(5, 8, 2, 2)
    dead = {name for name in state if DEAD.match(name) or name.startswith("blocks.1.block.control_mlp.")}
    assert len(dead) == 12
    whole = denoiser_from_reference(state, 2).state_dict()
    without = denoiser_from_reference({name: tensor for name, tensor in state.items() if name not in dead}, 2)
    assert all(torch.equal(whole[name], tensor) for name, tensor in without.state_dict().items())


# Errors.

LIVE = [
    name
    for name in published_state(5, 8, 2, 2)
    if not DEAD.match(name) and not name.startswith("blocks.1.block.control_mlp.")
]


@pytest.mark.parametrize("name", LIVE)
def test_a_missing_tensor_is_an_error(name):
    state = published_state(5, 8, 2, 2)
    del state[name]
    with pytest.raises(KeyError, match="missing"):
        denoiser_from_reference(state, 2)


@pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name in LIVE for axis in range(published_state(5, 8, 2, 2)[name].ndim)]
)
def test_a_tensor_of_another_shape_is_an_error_and_never_cut_or_broadcast(name, axis):
    state = published_state(5, 8, 2, 2)
    shape = list(state[name].shape)
    for size in {shape[axis] + 2, 1} - {shape[axis]}:
        other = torch.zeros(*shape[:axis], size, *shape[axis + 1 :])
        with pytest.raises(ValueError, match=r"shape|twice the number of genes|n_heads"):
            denoiser_from_reference({**state, name: other}, 2)


@pytest.mark.parametrize("name", ["x_embedder.scale", "blocks.0.block.norm.weight", "blocks.0.attn.qkv.weight", "y"])
def test_an_unexpected_tensor_is_an_error_that_names_it(name):
    state = {**published_state(5, 8, 2, 2), name: torch.zeros(3)}
    with pytest.raises(KeyError, match=rf"unexpected \['{re.escape(name.replace('.block.', '.'))}'\]"):
        denoiser_from_reference(state, 2)


def test_an_odd_number_of_inputs_is_an_error():
    state = published_state(5, 8, 1, 2)
    state["x_embedder.weight"] = torch.zeros(8, 9)
    with pytest.raises(ValueError, match=r"x_embedder\.weight has 9 inputs; it must be twice the number of genes"):
        denoiser_from_reference(state, 2)


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(2)}])
def test_what_is_no_published_state_dict_is_an_error(state):
    with pytest.raises(KeyError, match=r"x_embedder\.weight.*missing"):
        denoiser_from_reference(state, 2)


def test_a_state_dict_without_blocks_is_an_error():
    state = {name: t for name, t in published_state(5, 8, 1, 2).items() if not name.startswith("blocks.")}
    with pytest.raises(KeyError, match=r"blocks\.0"):
        denoiser_from_reference(state, 2)


def test_a_name_alone_does_not_ask_for_a_billion_blocks():
    state = published_state(5, 8, 1, 2)
    state["blocks.999999999.block.mlp.fc1.bias"] = torch.zeros(32)
    with pytest.raises(KeyError, match=r"blocks\.0"):
        denoiser_from_reference(state, 2)


def test_a_missing_block_is_an_error():
    state = {name: t for name, t in published_state(5, 8, 3, 2).items() if not name.startswith("blocks.1.")}
    with pytest.raises(KeyError, match=r"missing \['blocks\.1\."):
        denoiser_from_reference(state, 2)


@pytest.mark.parametrize("n_heads", [1, 3, 4])
def test_another_number_of_heads_is_an_error(n_heads):
    with pytest.raises(ValueError, match=r"n_heads|q_norm|k_norm"):
        denoiser_from_reference(published_state(5, 8, 1, 2), n_heads)


def encoder_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "pert_encoder.weight": (6, 4),
        "celltype_encoder.weight": (3, 4),
        "batch_encoder.weight": (2, 4),
        "transform.weight": (9, 12),
        "transform.bias": (9,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "name", ["pert_encoder.weight", "celltype_encoder.weight", "transform.weight", "transform.bias"]
)
def test_a_missing_tensor_of_the_encoder_is_an_error(name):
    state = encoder_state()
    del state[name]
    with pytest.raises(KeyError, match="missing"):
        covariate_encoder_from_reference(state)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("celltype_encoder.weight", (3, 5)),
        ("batch_encoder.weight", (2, 3)),
        ("transform.weight", (9, 8)),
        ("transform.bias", (1,)),
    ],
)
def test_an_encoder_tensor_of_another_shape_is_an_error(name, shape):
    with pytest.raises(ValueError, match="shape"):
        covariate_encoder_from_reference({**encoder_state(), name: torch.zeros(shape)})


def test_an_unexpected_tensor_of_the_encoder_is_an_error_that_names_it():
    with pytest.raises(KeyError, match=r"unexpected \['dose_encoder\.weight'\]"):
        covariate_encoder_from_reference({**encoder_state(), "dose_encoder.weight": torch.zeros(3, 4)})
