"""All that is random in the loss of a batch: timesteps, noise, hidden labels; keyed by set.

B = sets, S = cells per set, G = genes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perturbdiff.config import DiffusionConfig
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.data.rng import torch_generator
from perturbdiff.data.vocab import NULL, Labels


@dataclass(frozen=True)
class Draws:
    """All that is random in the loss of a batch.

    t
        (B,) timesteps.
    noise
        (B, S, G) standard normal.
    self_cond
        (B,) True where a set sees its own first estimate.
    labels
        Conditions after dropout.
    rounding
        (B, S, G) uniform, with diffusion.whole_counts.
    """

    t: Tensor
    noise: Tensor
    self_cond: Tensor
    labels: Labels
    rounding: Tensor | None = None


def training_draws(batch: CellSetBatch, config: DiffusionConfig, seed: int, with_features: bool = False) -> Draws:
    """Draws keyed by (seed, epoch, set number): the same after a resume and on any number of processes.

    `with_features` also draws the sets whose perturbations are known by their features alone.
    """
    n_sets, set_size = batch.mask.shape
    device = batch.mask.device
    t = torch.empty(n_sets, dtype=torch.int64, device=device)
    uniform = torch.empty(n_sets, 5, device=device)
    noise = torch.empty(n_sets, set_size, batch.n_genes, device=device)
    for b, key in enumerate(batch.keys):
        generator = torch_generator(device, seed, "training draws", *key)
        torch.randint(config.n_timesteps, (), generator=generator, out=t[b])
        torch.rand(5, generator=generator, out=uniform[b])
        torch.randn(set_size, batch.n_genes, generator=generator, out=noise[b])
    of_context = config.p_drop_label
    of_perturbation = of_context if config.p_drop_perturbation is None else config.p_drop_perturbation
    p_drop = torch.tensor([of_perturbation, of_context, of_context], device=device)
    hide_perturbation, hide_cell_type, hide_batch = (uniform[:, :3] < p_drop).unbind(1)
    labels = replace(
        batch.labels,
        perturbation=batch.labels.perturbation.masked_fill(hide_perturbation[:, None], NULL),
        cell_type=batch.labels.cell_type.masked_fill(hide_cell_type, NULL),
        batch=batch.labels.batch.masked_fill(hide_batch, NULL),
        hidden=uniform[:, 3] < config.p_drop_cond,
    )
    if with_features:  # a draw of its own, so that the others are those of a model without features
        draws = [torch_generator(device, seed, "unlabelled", *key) for key in batch.keys]
        chosen = [torch.rand((), generator=generator, device=device) < config.p_features_only for generator in draws]
        labels = replace(labels, features_only=torch.stack(chosen) if chosen else hide_batch)
    return Draws(t, noise, uniform[:, 4] < config.p_self_cond, labels, _rounding(batch, config, seed))


def _rounding(batch: CellSetBatch, config: DiffusionConfig, seed: int) -> Tensor | None:
    return uniform_draws(batch, seed, "rounding") if config.whole_counts else None


def uniform_draws(batch: CellSetBatch, seed: int, purpose: str) -> Tensor:
    """(B, S, G) uniform numbers, keyed by set."""
    drawn = torch.empty(*batch.mask.shape, batch.n_genes, device=batch.mask.device)
    for b, key in enumerate(batch.keys):
        torch.rand(drawn.shape[1:], generator=torch_generator(drawn.device, seed, purpose, *key), out=drawn[b])
    return drawn


def validation_draws(batch: CellSetBatch, config: DiffusionConfig, seed: int, n_t: int = 8) -> Draws:
    """Fixed draws: t from an even grid over the schedule, noise by set, no dropout, no self-conditioning."""
    n_sets, set_size = batch.mask.shape
    device = batch.mask.device
    grid = [int((k + 0.5) / n_t * config.n_timesteps) for k in range(n_t)]
    noise = torch.empty(n_sets, set_size, batch.n_genes, device=device)
    for b, key in enumerate(batch.keys):
        generator = torch_generator(device, seed, "validation noise", *key)
        torch.randn(set_size, batch.n_genes, generator=generator, out=noise[b])
    t = torch.tensor([grid[number % n_t] for _, number in batch.keys], dtype=torch.int64, device=device)
    never = torch.zeros(n_sets, dtype=torch.bool, device=device)
    return Draws(t, noise, never, batch.labels, _rounding(batch, config, seed))
