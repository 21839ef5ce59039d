"""Weights of the published implementation (DeepGraphLearning/PerturbDiff, March 2026) in our modules."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from perturbdiff.config import DenoiserConfig
from perturbdiff.model.conditioning import CovariateEncoder, VocabSizes
from perturbdiff.model.denoiser import Denoiser

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
_DEAD = re.compile(r"control_final_layer\.|gene_embedding\.(gene_embedding|layer_norm)\.")


class ReferenceDenoiser(nn.Module):
    """A denoiser called as in the published code: the condition is `cov`, its covariate embedding."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self, x_t: Tensor, t: Tensor, control: Tensor, cov: Tensor | None = None, self_cond: Tensor | None = None
    ) -> Tensor:
        """(B, S, G) x0_pred; `t` (B,), `cov` (B, 1 or S, G) or None for the null condition."""
        return self.denoiser(x_t, t, control, cov, self_cond)


def denoiser_from_reference(state_dict: Mapping[str, Tensor], n_heads: int) -> ReferenceDenoiser:
    """The published denoiser with its weights.

    Parameters
    ----------
    state_dict
        Tensors named as in the published `Cross_DiT`, with or without a leading `model.`; sizes are read from them.
    n_heads
        Attention heads; a number that does not fit the query norms is refused.

    Raises
    ------
    KeyError
        A tensor is missing, or one is not known.
    ValueError
        A tensor has a shape that does not fit the others.
    """
    published = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
    width, n_inputs = _get(published, "x_embedder.weight").shape
    if n_inputs % 2:
        raise ValueError(f"x_embedder.weight has {n_inputs} inputs; it must be twice the number of genes.")
    n_genes = n_inputs // 2
    depth = 1 + max((int(m[1]) for name in published if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    if not 0 < depth <= len(published):  # a block has many tensors; a name alone must not ask for a billion blocks
        raise KeyError(
            "no tensors 'blocks.0...', 'blocks.1...', ... in the state dict; give that of a published Cross_DiT."
        )
    hidden = _get(published, "blocks.0.block.mlp.fc1.weight").shape[0]
    config = DenoiserConfig(
        width=width, depth=depth, n_heads=n_heads, mlp_ratio=hidden / width,
        attention="paired", parallel_block=True, output="direct", out_activation="relu", conditioning="reference",
    )  # fmt: skip
    denoiser = Denoiser(config, n_genes, sizes=None)
    _load(denoiser, _rename_denoiser(published, n_genes, depth))
    return ReferenceDenoiser(denoiser)


def covariate_encoder_from_reference(state_dict: Mapping[str, Tensor]) -> CovariateEncoder:
    """The published covariate encoder with learned one-hot embeddings; its `batch_encoder` may be absent.

    Weights do not tell whether the model ignores perturbations (`pert_encoding: non`): set
    `perturbation_encoding = "none"` on the result for such a model. Raises as `denoiser_from_reference`.
    """
    published = {name.removeprefix("cov_encoder."): tensor for name, tensor in state_dict.items()}
    perturbations, covariate_dim = _get(published, "pert_encoder.weight").shape
    batches = published.get("batch_encoder.weight")
    config = DenoiserConfig(covariate_dim=covariate_dim, batch_encoding="none" if batches is None else "onehot")
    sizes = VocabSizes(
        perturbations=perturbations - 1,  # row 0 is "no perturbation"
        cell_types=_get(published, "celltype_encoder.weight").shape[0],
        batches=0 if batches is None else batches.shape[0],
    )
    encoder = CovariateEncoder(sizes, config, n_genes=_get(published, "transform.weight").shape[0])
    names = {"pert_encoder": "perturbation", "celltype_encoder": "cell_type", "batch_encoder": "batch"}
    _load(encoder, {_replace_prefix(name, names): tensor for name, tensor in published.items()})
    return encoder


def _rename_denoiser(published: Mapping[str, Tensor], n_genes: int, depth: int) -> dict[str, Tensor]:
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
        if _DEAD.match(name) or name.startswith(f"{last}control_mlp."):
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


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"tensor {name}: shape {tuple(tensor.shape)} must be {shape}.")


def _load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise KeyError(f"published state dict: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}.")
    for name, tensor in own.items():
        _check_shape(name, tensors[name], tuple(tensor.shape))
    with torch.no_grad():
        module.load_state_dict(dict(tensors), strict=True)
