"""All that is random in the loss of a batch: timesteps, noise, hidden labels; keyed by set.

B = sets, S = cells per set, G = genes.
"""

from __future__ import annotations

from collections.abc import Callable
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
        (n,) numbers of the sets that see their own first estimate.
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

    `with_features` also draws the sets whose perturbations are known by their features alone. All but the noise is
    drawn on the host, which needs not wait for a device to know how many sets are chosen.
    """
    n_sets, set_size = batch.mask.shape
    device = batch.mask.device
    t, uniform = torch.empty(n_sets, dtype=torch.int64), torch.empty(n_sets, 5)
    noise = torch.empty(n_sets, set_size, batch.n_genes, device=device)
    for b, key in enumerate(batch.keys):
        generator = torch_generator("cpu", seed, "training draws", *key)
        torch.randint(config.n_timesteps, (), generator=generator, out=t[b])
        torch.rand(5, generator=generator, out=uniform[b])
        if device.type != "cpu":
            generator = torch_generator(device, seed, "training draws", *key)
        torch.randn(set_size, batch.n_genes, generator=generator, out=noise[b])
    p_context, p_perturbation = config.p_drop_label, config.p_drop_perturbation
    p_drop = [p_context if p_perturbation is None else p_perturbation, p_context, p_context]
    chosen = uniform < torch.tensor([*p_drop, config.p_drop_cond, config.p_self_cond])
    hide_perturbation, hide_cell_type, hide_batch, hide = chosen[:, :4].to(device, non_blocking=True).unbind(1)
    labels = replace(
        batch.labels,
        perturbation=batch.labels.perturbation.masked_fill(hide_perturbation[:, None], NULL),
        cell_type=batch.labels.cell_type.masked_fill(hide_cell_type, NULL),
        batch=batch.labels.batch.masked_fill(hide_batch, NULL),
        hidden=hide,
    )
    if with_features:  # draws of their own, under the key they always had, so that no number moves
        labels = replace(
            labels, features_only=_keyed(torch.rand, batch, (), seed, "unlabelled") < config.p_features_only
        )
    t, self_cond = (of_host.to(device, non_blocking=True) for of_host in (t, chosen[:, 4].nonzero()[:, 0]))
    return Draws(t, noise, self_cond, labels, _rounding(batch, config, seed))


def validation_draws(batch: CellSetBatch, config: DiffusionConfig, seed: int, n_t: int = 8) -> Draws:
    """Fixed draws: t from an even grid over the schedule, noise by set, no dropout, no self-conditioning."""
    device = batch.mask.device
    grid = [int((k + 0.5) / n_t * config.n_timesteps) for k in range(n_t)]
    t = torch.tensor([grid[number % n_t] for _, number in batch.keys], dtype=torch.int64, device=device)
    noise = _keyed(torch.randn, batch, (batch.mask.shape[1], batch.n_genes), seed, "validation noise")
    return Draws(t, noise, t[:0], shown(batch.labels, config), _rounding(batch, config, seed))


def shown(labels: Labels, config: DiffusionConfig) -> Labels:
    """The labels of a batch that training showed, to validate and predict with.

    With p_drop_label=1 the rows of cell types and batches keep their random start. A denoiser gives such a row the more
    weight the longer it was trained, and what it says is noise.
    """
    if config.p_drop_label < 1:
        return labels
    hidden = torch.full_like(labels.cell_type, NULL)
    return replace(labels, cell_type=hidden, batch=hidden)


def uniform_draws(batch: CellSetBatch, seed: int, purpose: str, set_size: int | None = None) -> Tensor:
    """(B, S, G) uniform numbers, keyed by set: the first ones of sets of `set_size` cells, S by default."""
    n_cells, device = batch.mask.shape[1], batch.mask.device
    drawn = torch.empty(len(batch.keys), n_cells, batch.n_genes, device=device)
    for own, key in zip(drawn, batch.keys, strict=True):
        generator = torch_generator(device, seed, purpose, *key)
        own.copy_(torch.rand(set_size or n_cells, batch.n_genes, generator=generator, device=device)[:n_cells])
    return drawn


def _rounding(batch: CellSetBatch, config: DiffusionConfig, seed: int) -> Tensor | None:
    return uniform_draws(batch, seed, "rounding") if config.whole_counts else None


def _keyed(draw: Callable[..., Tensor], batch: CellSetBatch, shape: tuple[int, ...], seed: int, purpose: str) -> Tensor:
    """(B, *shape) numbers, each set's from a generator of its own."""
    drawn = torch.empty(len(batch.keys), *shape, device=batch.mask.device)
    for b, key in enumerate(batch.keys):
        draw(shape, generator=torch_generator(drawn.device, seed, purpose, *key), out=drawn[b])
    return drawn
