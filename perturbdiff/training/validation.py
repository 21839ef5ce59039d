"""Validation: the loss on held-out conditions, and how close cells generated for them are to the measured ones.

B = sets, S = cells per set, G = genes, C = conditions looked at. Everything is drawn from fixed keys: the same weights
give the same numbers, on any number of processes up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from perturbdiff.config import Config
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.data.samplers import CellSet, CellSetSampler, StreamedSampler
from perturbdiff.diffusion.distances import NO_SPREAD, energy_distance
from perturbdiff.diffusion.draws import validation_draws
from perturbdiff.diffusion.generate import sample_batch
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.training.dataset import IndexedCells

Sampler = CellSetSampler | StreamedSampler


@torch.no_grad()
def validate(
    denoiser: Denoiser,
    cells: IndexedCells,
    sampler: Sampler,
    config: Config,
    rank: int,
    world_size: int,
    device: torch.device,
    total: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Score the first config.training.validate_sets sets of epoch 0: loss, and cells generated from their controls.

    Parameters
    ----------
    denoiser
        EMA weights in eval mode, on `device`. Memory is that of a training step's forward pass.
    rank, world_size
        This process scores its share of each step's sets, perhaps none. All processes must call.
    total
        Sums a float64 tensor over all processes and returns it. Called once, with the same shape everywhere.

    Returns
    -------
    validation_loss
        Mean over cells of the training loss, without dropout and self-conditioning, t on a grid.
    validation_energy_distance
        Of generated and measured cells, in log1p units: mean over the sets of a condition (U-statistic, each set
        weighted by its cells), then over conditions. Comparable with the energy distance of `evaluation`.
    validation_energy_distance_no_change
        The same with the controls in place of the generated cells: what must be undercut.
    validation_pearson_delta
        Correlation over genes of generated and measured mean, each minus the mean of the controls; mean over the
        conditions where it is defined. Of the genes that were measured.

    A score that nothing defines is NaN; so is one of cells that are not finite.
    """
    looked_at = _looked_at(sampler, config.training.validate_sets)
    row_of = _row_of_condition(cells, [s.condition for sets in looked_at for s in sets])
    # Of each condition: what _scores gives of its sets, summed.
    n_genes, n_profiles = len(cells.cells.genes), 3 if cells.measured is None else 4
    shape = max(row_of.values(), default=-1) + 1, 5 + n_profiles * n_genes
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    for batch in _batches(cells, sampler, looked_at, config, rank, world_size):
        scores = _scores(denoiser, batch.to(device), config, cells.measured is not None)
        for row, condition in zip(scores, batch.conditions, strict=True):
            sums[row_of[condition]] += row
    cells.release()
    sums = total(sums).cpu()
    n_cells, loss, n_scored, energy, no_change = sums[:, :5].unbind(1)  # (C,)
    # (C, G) each, and cells of each gene, or of all
    *profiles, of_cells = [*sums[:, 5:].chunk(n_profiles, dim=1), n_cells[:, None].expand(-1, n_genes)][:4]
    generated, measured, control = (profile / of_cells.clamp_min(1) for profile in profiles)
    pearson, defined = _pearson(generated - control, measured - control, of_cells > 0)
    return {
        "validation_loss": float(loss.sum() / n_cells.sum()),
        "validation_energy_distance": float((energy / n_scored)[n_scored > 0].mean()),
        "validation_energy_distance_no_change": float((no_change / n_scored)[n_scored > 0].mean()),
        "validation_pearson_delta": float(pearson[defined].mean()),
    }


def _looked_at(sampler: Sampler, n_sets: int) -> list[list[CellSet]]:
    """The first sets of epoch 0 over all ranks, step by step."""
    steps: list[list[CellSet]] = []
    for step in range(sampler.steps_per_epoch):
        if n_sets <= 0:
            break
        steps.append(sampler.batch(0, step)[:n_sets])
        n_sets -= len(steps[-1])
    return steps


def _row_of_condition(cells: IndexedCells, conditions: list[int]) -> dict[int, int]:
    # Streamed, a condition that lies in several shards is several of the index's; they are one here.
    index = cells.index
    labels = {condition: (index.source[condition], *index.codes[condition].tolist()) for condition in conditions}
    row_of = {label: row for row, label in enumerate(sorted(set(labels.values())))}
    return {condition: row_of[label] for condition, label in labels.items()}


def _batches(
    cells: IndexedCells, sampler: Sampler, looked_at: list[list[CellSet]], config: Config, rank: int, world_size: int
) -> Iterator[CellSetBatch]:
    """This rank's sets, in batches no larger than what it trains on at once."""
    at_once = -(-sampler.sets_per_batch // (world_size * config.training.accumulation_steps))
    for step, sets in enumerate(looked_at):
        keys = {s.key for s in sets}
        own = [s for s in cells.sets(sampler, 0, step, rank, world_size) if s.key in keys]
        for start in range(0, len(own), at_once):
            yield cells.batch_of(own[start : start + at_once], sampler)


def _scores(denoiser: Denoiser, batch: CellSetBatch, config: Config, by_gene: bool) -> Tensor:
    """(B, 5 + 3 G) float64 of each set, each to be summed over sets; `by_gene` (B, 5 + 4 G).

    Its cells; loss times cells; cells that have an energy distance; that of the generated cells and that of the
    controls times those; the sums over cells of the generated, measured and control expression; and `by_gene`, the
    cells that measured each gene.
    """
    seed, diffusion = config.training.seed, config.diffusion
    loss = DiffusionLoss(diffusion)(denoiser, batch, validation_draws(batch, diffusion, seed)).total
    measured, control = batch.dense()  # (B, S, G) each, 0 at empty positions
    generated = sample_batch(denoiser, batch, config.sampling, diffusion, seed).float()
    generated = generated.masked_fill(~batch.mask[..., None], 0.0)
    n_cells = batch.mask.sum(1).double()
    n_scored = torch.where(n_cells >= 2, n_cells, 0.0)
    scale = batch.preprocessing.scale  # model units -> log1p
    distances = [energy_distance(x, measured, batch.mask, batch.mask) * scale for x in (generated, control)]
    energies = [torch.where(n_scored > 0, distance * n_scored, 0.0) for distance in distances]
    scalars = [n_cells, loss * n_cells, n_scored, *energies]
    profiles = [x.sum(1, dtype=torch.float64) * scale for x in (generated, measured, control)]  # (B, G) each
    if by_gene:
        profiles.append(batch.of_measured(batch.mask[..., None].expand_as(measured).double()).sum(1))
    return torch.cat([torch.stack(scalars, dim=1), *profiles], dim=1)


def _pearson(a: Tensor, b: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation over `genes`, (C, G) each to (C,), and where it is defined: neither is constant."""

    def mean(x: Tensor) -> Tensor:  # (C, 1)
        return (x * genes).sum(1, keepdim=True) / genes.sum(1, keepdim=True).clamp_min(1)

    a, b = a - mean(a), b - mean(b)
    a_std, b_std = mean(a.square()).sqrt(), mean(b.square()).sqrt()
    return (mean(a * b) / (a_std * b_std))[:, 0], ~((a_std <= NO_SPREAD) | (b_std <= NO_SPREAD))[:, 0]
