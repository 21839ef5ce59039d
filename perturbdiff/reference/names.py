"""Tensors of the published implementation (DeepGraphLearning/PerturbDiff, March 2026) under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perturbdiff.config import DenoiserConfig, PublishedEncoding
from perturbdiff.nn.conditioning import VocabSizes

MAX_DEPTH, MAX_WIDTH = 1 << 10, 1 << 16

# Published name -> ours, for the tensors that move unchanged; block names get their index.
_NAMES = {
    "x_embedder.bias": "embed_x.bias",
    "x_control_embedder.bias": "embed_control.bias",
    "t_embedder.mlp.0": "embed_t.mlp.0",
    "t_embedder.mlp.2": "embed_t.mlp.2",
    "class_embedding.emb": "conditioning.linear",
    "final_layer.adaLN_modulation.1": "final_modulation.linear",
    "final_layer.linear": "head",
}
_BLOCK_NAMES = {
    "attn": "attention.attention",
    "mlp": "mlp",
    "control_mlp": "control_mlp",
    "adaLN_modulation.1": "modulation.linear",
    "control_adaLN_modulation.1": "control_modulation.linear",
}
# Weights that no output x depends on: the control head, the unused gene embedding, the last block's control MLP.
DEAD = re.compile(r"control_final_layer\.|gene_embedding\.(gene_embedding|layer_norm)\.")


def denoiser_config(published: Mapping[str, Tensor], n_heads: int) -> tuple[DenoiserConfig, int]:
    """The architecture that has these tensors (without their `model.`), and the number of genes.

    Raises KeyError, ValueError: no published denoiser.
    """
    width, n_inputs = _matrix(published, "x_embedder.weight")
    if n_inputs % 2 or n_inputs == 0:
        raise ValueError(f"x_embedder.weight has {n_inputs} inputs; it must be twice the number of genes.")
    depth = 1 + max((int(m[1]) for name in published if (m := re.match(r"blocks\.(\d{1,9})\.", name))), default=-1)
    if not 0 < depth <= min(len(published), MAX_DEPTH):  # a name alone must not ask for a billion blocks
        raise KeyError(
            "no tensors 'blocks.0...', 'blocks.1...', ... in the state dict; give that of a published Cross_DiT."
        )
    hidden = _matrix(published, "blocks.0.block.mlp.fc1.weight")[0]
    if not 0 < width <= MAX_WIDTH or not 0 < hidden <= MAX_WIDTH * 256:
        raise ValueError(f"the width ({width}) and that of the MLP ({hidden}) must be ordinary numbers.")
    config = DenoiserConfig(
        width=width, depth=depth, n_heads=n_heads, mlp_ratio=hidden / width,
        parallel_block=True, output="direct", out_activation="relu", conditioning="reference",
    )  # fmt: skip
    return config, n_inputs // 2


def rename_encoder(
    published: Mapping[str, Tensor], config: DenoiserConfig
) -> tuple[dict[str, Tensor], DenoiserConfig, VocabSizes]:
    """Our names of a covariate encoder's tensors (without their `cov_encoder.`).

    Returns them, `config` with their encodings, and the numbers of labels.
    Raises KeyError, ValueError: no published covariate encoder.
    """
    ours = dict(published)
    perturbations = "drug_encoder" if "drug_encoder.0.weight" in ours else "pert_encoder"
    names = {perturbations: "perturbation", "celltype_encoder": "cell_type", "batch_encoder": "batch"}
    encoding = PublishedEncoding(covariates=_matrix(ours, "transform.weight")[0])
    if perturbations == "drug_encoder":
        doses, indices = _get(ours, "dose_encoder.weight"), _get(ours, "dose_indices").long()
        if doses.ndim != 2 or indices.ndim != 1 or not 0 < indices.numel() * doses.shape[0] <= 1 << 28:
            raise ValueError(f"dose_encoder.weight {tuple(doses.shape)} must be rows, dose_indices numbers of them.")
        if not 0 <= int(indices.min()) <= int(indices.max()) < doses.shape[0]:
            raise ValueError(f"dose_indices must be rows of dose_encoder.weight, which has {doses.shape[0]}.")
        # A row is a one-hot feature times the matrix of all rows.
        ours["dose.features"] = F.one_hot(indices, doses.shape[0]).float()
        ours["dose.linear.weight"] = doses.T
        encoding.doses = doses.shape[0]
        del ours["dose_encoder.weight"], ours["dose_indices"]
    numbers: dict[str, int] = {}
    for old, new in ((perturbations, "perturbation"), ("celltype_encoder", "cell_type")):
        if f"{old}.0.weight" in ours:  # a frozen table, then a linear layer
            ours[f"{new}.features"] = ours.pop(f"{old}.0.weight")
            names = {f"{old}.1": f"{new}.linear", **names}  # before its shorter name
            numbers[new], n_features = _matrix(ours, f"{new}.features")
            setattr(encoding, f"{new}_features", n_features)
    if "perturbation" not in numbers:
        numbers["perturbation"] = _matrix(ours, "pert_encoder.weight")[0] - 1  # row 0 is "no perturbation"
    if "cell_type" in numbers:
        covariate_dim = _matrix(ours, "celltype_encoder.1.weight")[0]
    else:
        numbers["cell_type"], covariate_dim = _matrix(ours, "celltype_encoder.weight")
    has_batches = "batch_encoder.weight" in ours
    n_batches = _matrix(ours, "batch_encoder.weight")[0] if has_batches else 0
    sizes = VocabSizes(numbers["perturbation"], numbers["cell_type"], n_batches)
    config = replace(
        config,
        covariate_dim=covariate_dim,
        perturbation_encoding="features" if encoding.perturbation_features else "onehot",
        cell_type_encoding="features" if encoding.cell_type_features else "onehot",
        batch_encoding="onehot" if has_batches else "none",
        published_encoding=encoding,
    )
    if not 0 < covariate_dim <= MAX_WIDTH or sizes.perturbations < 0:
        raise ValueError(f"the covariate encoder has embeddings of width {covariate_dim}, {sizes}; that cannot be.")
    return {_replace_prefix(name, names): tensor for name, tensor in ours.items()}, config, sizes


def rename_denoiser(published: Mapping[str, Tensor], n_genes: int, depth: int) -> dict[str, Tensor]:
    """Our names of a denoiser's tensors, some cut or summed.

    Raises KeyError, ValueError: one is missing; one has another shape than the others ask for.
    """
    last = f"blocks.{depth - 1}.block."
    width = published["x_embedder.weight"].shape[0]
    # Tensors that are cut or summed below: afterwards their shapes tell nothing.
    shapes = {
        "x_embedder.bias": (width,),
        "x_control_embedder.weight": (width, 2 * n_genes),
        "x_control_embedder.bias": (width,),
        "class_embedding.null_emb.weight": (1, width),
        "gene_embedding.null_emb.weight": (1, width),
        f"{last}control_adaLN_modulation.1.weight": (6 * width, width),
        f"{last}control_adaLN_modulation.1.bias": (6 * width,),
    }
    for name, shape in shapes.items():
        _check_shape(name, _get(published, name), shape)
    ours: dict[str, Tensor] = {}
    for name, tensor in published.items():
        if DEAD.match(name) or name.startswith(f"{last}control_mlp."):
            continue
        if name == "x_embedder.weight":
            ours["embed_x.weight"], ours["embed_self_cond.weight"] = tensor[:, :n_genes], tensor[:, n_genes:]
        elif name == "x_control_embedder.weight":
            ours["embed_control.weight"] = tensor[:, :n_genes]  # its other half only ever meets zeros
        elif name == "class_embedding.null_emb.weight":
            ours["conditioning.null"] = tensor[0]
        elif name == "gene_embedding.null_emb.weight":
            continue  # added to the biases below
        elif match := re.match(r"blocks\.(\d+)\.block\.(.+)", name):
            ours[f"blocks.{match[1]}.{_replace_prefix(match[2], _BLOCK_NAMES)}"] = tensor
        else:
            ours[_replace_prefix(name, _NAMES)] = tensor
    # The published code adds one vector to both embedded streams; a bias does the same.
    shared = published["gene_embedding.null_emb.weight"][0]
    for bias in ("embed_x.bias", "embed_control.bias"):
        ours[bias] = ours[bias] + shared
    # Of the last block's control modulation only shift and scale before the attention reach x.
    modulation = f"blocks.{depth - 1}.control_modulation.linear"
    for kind in ("weight", "bias"):
        ours[f"{modulation}.{kind}"] = ours[f"{modulation}.{kind}"][: 2 * width]
    return ours


def _replace_prefix(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise KeyError(f"tensor {name!r} is missing from the published state dict; it has {len(tensors)} tensors.")
    return tensors[name]


def _matrix(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    tensor = _get(tensors, name)
    if tensor.ndim != 2:
        raise ValueError(f"tensor {name}: shape {tuple(tensor.shape)} must have two axes.")
    return tensor.shape[0], tensor.shape[1]


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"tensor {name}: shape {tuple(tensor.shape)} must be {shape}.")


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module of the meta device its tensors, as float32.

    Raises KeyError where names are missing or unexpected, ValueError where shapes differ.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise KeyError(
            f"published state dict: missing {missing[:20] or 'nothing'}, unexpected {unexpected[:20] or 'nothing'}."
        )
    for name, tensor in own.items():
        _check_shape(name, tensors[name], tuple(tensor.shape))
    whole = {
        name: tensor.detach().float().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    module.load_state_dict(whole, strict=True, assign=True)
