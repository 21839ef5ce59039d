"""Low-rank changes of a denoiser's blocks, W + (alpha / rank) B A (LoRA, Hu et al. 2022), by the peft library.

peft is needed to train them only: merging is the formula above.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from torch import Tensor, nn

from perturbdiff.nn.denoiser import Denoiser

LAYERS = r"blocks\.\d+\..*\b(qkv|kv|proj|fc1|fc2|linear)"  # linear: of the modulations
A, B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
# Parts that stay as they are: what says when and how cells are mixed, but not which genes and labels there are.
BACKBONE = ("blocks.", "embed_t.", "final_modulation.")


def freeze_backbone(denoiser: nn.Module) -> None:
    """Leave only gene layers, label rows, features and null vectors to train."""
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(not name.startswith(BACKBONE))


def inject_lora(denoiser: Denoiser, rank: int, alpha: float) -> None:
    """Freeze the backbone and add trainable low-rank changes to the linear layers of its blocks; no output changes yet.

    Draws from torch's global generator. Raises ValueError where peft is missing.
    """
    if find_spec("peft") is None:
        raise ValueError("adapt.method=lora needs the peft package; pip install 'perturbdiff[lora]'.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional packages that peft looks for
        from peft import LoraConfig, inject_adapter_in_model
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=LAYERS, lora_dropout=0.0, bias="none"),  # type: ignore[arg-type]
        denoiser,
    )
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(".lora_" in name or not name.startswith(BACKBONE))


def merged(weights: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Weights under a denoiser's own names, low-rank changes added; `scaling` is alpha / rank."""
    own = {name.replace(BASE, "."): tensor for name, tensor in weights.items() if ".lora_" not in name}
    for layer, a, b in low_rank(weights):
        own[f"{layer}.weight"] = own[f"{layer}.weight"] + scaling * (b @ a)
    return own


def low_rank(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer, A (rank, in) and B (out, rank) of each low-rank change."""
    for name, a in weights.items():
        if name.endswith(A):
            layer = name.removesuffix(A)
            yield layer, a, weights[layer + B]


def changed_layers(denoiser: nn.Module) -> list[str]:
    """Layers of a denoiser that `inject_lora` changes."""
    linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if re.fullmatch(LAYERS, name)]
