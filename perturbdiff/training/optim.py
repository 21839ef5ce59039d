"""AdamW with weight decay on matrices only, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Container

import torch
from torch import nn

from perturbdiff.config import OptimConfig


def make_optimizer(
    denoiser: nn.Module, config: OptimConfig, new_parts: Container[str] | None = None, lr_ratio: float = 1.0
) -> torch.optim.AdamW:
    """Groups of what trains: matrices of linear layers decay; norms, biases, embeddings and null vectors do not.

    With an `lr_ratio` other than 1, parameters whose names are not in `new_parts` are in groups of their own; a group's
    "lr_ratio" says by what part of the learning rate it moves.
    """
    embeddings = {id(m.weight) for m in denoiser.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in denoiser.named_parameters():
        if p.requires_grad:
            decay = config.weight_decay if p.ndim >= 2 and id(p) not in embeddings else 0.0
            ratio = 1.0 if new_parts is None or name in new_parts else lr_ratio
            groups.setdefault((ratio, decay), []).append(p)
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": decay, "lr_ratio": ratio, "lr": config.lr * ratio}
            for (ratio, decay), params in sorted(groups.items(), key=lambda group: group[0], reverse=True)
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,  # one pass over the weights: a quarter of the time also on CPU
    )


def learning_rate(step: int, n_steps: int, config: OptimConfig) -> float:
    """Linear warm-up, plateau, then a cosine down to min_lr_ratio * lr at the last step; `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    plateau_end = config.warmup_steps + config.plateau_ratio * n_steps
    if step < plateau_end:
        return config.lr
    progress = (step - plateau_end) / max(n_steps - 1 - plateau_end, 1)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
