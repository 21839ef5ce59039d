"""Exponential moving average of the weights, of which each process keeps its own stretch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from perturbdiff.training.partition import joined, own_stretch, stretch


class EMA:
    """Follows the weights of a module; what `full` gives is validated and published.

    Process r of N keeps the r-th of N equal stretches of each parameter, under every engine: averaging takes an N-th of
    the time and memory, and ZeRO-3, where that stretch is all a process has, is no special case.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over its updates n: without, short runs would be averaged
    with their random start.
    """

    def __init__(self, module: nn.Module, decay: float, rank: int = 0, world_size: int = 1) -> None:
        self.decay, self.rank, self.world_size = decay, rank, world_size
        self.n_updates = 0
        self._shapes = {name: p.shape for name, p in module.named_parameters()}
        stretches = {name: (own_stretch(p, rank, world_size), p.requires_grad) for name, p in module.named_parameters()}
        # What does not train is its own average: a view, as far as the engine lets it be one.
        self._own = {name: own.clone() if trains else own for name, (own, trains) in stretches.items()}
        self._trained = [name for name, (_, trains) in stretches.items() if trains]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        new = [own_stretch(p, self.rank, self.world_size) for p in module.parameters() if p.requires_grad]
        torch._foreach_lerp_([self._own[name] for name in self._trained], new, 1 - decay)
        self.n_updates += 1

    def full(self) -> dict[str, Tensor]:
        """The averaged weights by name; all processes must call it. Views where there is one."""
        return {name: joined(own, self._shapes[name], self.world_size) for name, own in self._own.items()}

    def load(self, weights: Mapping[str, Tensor], n_updates: int) -> None:
        """Take up what `full` gave, perhaps to another number of processes."""
        for name, own in self._own.items():
            own.copy_(stretch(weights[name], self.rank, self.world_size))
        self.n_updates = n_updates
