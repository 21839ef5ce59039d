"""Exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch

from perturbdiff.model.denoiser import Denoiser


class EMA:
    """A copy of a module that follows it; `module` is what is validated and published.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over its updates n: without, short runs would be averaged
    with their random start.
    """

    def __init__(self, module: Denoiser, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.n_updates = 0

    @torch.no_grad()
    def update(self, module: Denoiser) -> None:
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
        self.n_updates += 1
