"""From control cells to predicted cells: sets dealt, denoised in chunks, gathered sparse.

B = sets, S = cells per set, G = genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbdiff.config import ModelConfig, SamplingConfig
from perturbdiff.data.batch import CellSetBatch, Labels, make_batch
from perturbdiff.data.cellsets import CellSet, draw_controls
from perturbdiff.data.screen import Expression
from perturbdiff.data.seeds import numpy_generator, torch_generator
from perturbdiff.diffusion.sampling import sample
from perturbdiff.diffusion.schedule import Schedule
from perturbdiff.model.denoiser import Denoiser

if TYPE_CHECKING:
    from tqdm import tqdm

MAX_VALUES_PER_CHUNK = 1 << 22  # cells x genes denoised at once: memory does not grow with the number of cells

Context = tuple[str | None, str | None]  # cell type and batch; None where nobody says


def deal_sets(
    contexts: Sequence[Context], n_cells: int | None, n_populations: int, set_size: int, seed: int
) -> tuple[list[CellSet], list[Context]]:
    """Give every cell to predict a source control, and make sets of cells of one context.

    Parameters
    ----------
    contexts
        Of each control cell.
    n_cells
        Cells of a population; each control once if None, otherwise without repeats while the controls last.

    Returns
    -------
    Sets with key (population, set number), whose rows and controls are the sources, and the context of each of the
    sets' condition numbers.
    """
    conditions = sorted(set(contexts), key=lambda c: (c[0] or "", c[1] or ""))
    number = {context: i for i, context in enumerate(conditions)}
    condition_of_control = np.array([number[context] for context in contexts])
    sets: list[CellSet] = []
    for population in range(n_populations):
        if n_cells is None:
            source = numpy_generator(seed, "prediction order", population).permutation(len(contexts))
        else:
            source = draw_controls(len(contexts), n_cells, seed, population)
        for condition in range(len(conditions)):
            rows = source[condition_of_control[source] == condition]
            for start in range(0, len(rows), set_size):
                chosen = rows[start : start + set_size]
                sets.append(CellSet((population, len(sets)), condition, chosen, chosen))
    return sets, conditions


def denoise_sets(
    denoiser: Denoiser,
    sets: Sequence[CellSet],
    expression: Expression,
    labels: Labels,
    config: ModelConfig,
    sampling: SamplingConfig,
    seed: int,
    bar: tqdm[Any],
) -> sparse.csr_matrix:
    """Predicted cells of all sets in their order, (cells, G) log1p; `labels` are by condition number."""
    schedule = Schedule(config.diffusion.schedule, config.diffusion.n_timesteps)
    device = next(denoiser.parameters()).device
    sets_per_chunk = max(1, MAX_VALUES_PER_CHUNK // (config.set_size * len(expression.genes)))
    blocks = []
    for start in range(0, len(sets), sets_per_chunk):
        chunk = sets[start : start + sets_per_chunk]
        batch = make_batch(chunk, config.set_size, expression, labels).to(device)
        x0 = sample_batch(denoiser, batch, sampling, schedule, seed)
        cells = x0[batch.mask].mul_(expression.preprocessing.scale).cpu().numpy()
        blocks.append(sparse.csr_matrix(cells))
        bar.update(len(cells))
    return sparse.vstack(blocks, format="csr")


def sample_batch(
    denoiser: Denoiser, batch: CellSetBatch, sampling: SamplingConfig, schedule: Schedule, seed: int
) -> Tensor:
    # Noise comes from one generator a set, so that a set's cells do not depend on its neighbours.
    _, control = batch.dense()
    generators = [torch_generator(control.device, seed, "prediction noise", *key) for key in batch.keys]

    def draw() -> Tensor:
        return torch.stack([torch.randn(control.shape[1:], generator=g, device=control.device) for g in generators])

    # Of the weights; trajectories are float32 whatever it is.
    dtype = next((weight.dtype for weight in denoiser.parameters()), torch.float32)

    def denoise(x_t: Tensor, t: Tensor, control: Tensor, cond: Labels | None, self_cond: Tensor | None) -> Tensor:
        self_cond = None if self_cond is None else self_cond.to(dtype)
        return denoiser(x_t.to(dtype), t, control.to(dtype), cond, self_cond, batch.mask, batch.mask).float()

    return sample(denoise, draw(), control, batch.labels, sampling, schedule, draw)
