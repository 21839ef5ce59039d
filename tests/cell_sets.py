"""Small sets of cells, and batches that hold exactly them."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbdiff.config import Preprocessing
from perturbdiff.data.batch import CellSetBatch, SparseCells
from perturbdiff.data.vocab import Labels


def cells(*shape: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    return scale * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_mask(sizes: list[int], width: int, seed: int = 0) -> Tensor:
    """Real cells at random positions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.rand(width, generator=generator).argsort() < n for n in sizes])


def numbered_labels(n_sets: int) -> Labels:
    number = torch.arange(n_sets)
    return Labels(number[:, None], number, number)


def batch_of(x0: Tensor, control: Tensor, labels: Labels, mask: Tensor | None = None) -> CellSetBatch:
    """A batch that gives exactly these cells where they are real."""
    n_sets, set_size, n_genes = x0.shape
    mask = torch.ones(n_sets, set_size, dtype=torch.bool) if mask is None else mask
    position = mask.flatten().nonzero()[:, 0]

    def sparse(dense: Tensor) -> SparseCells:
        return SparseCells(
            position=position,
            indptr=torch.arange(len(position) + 1) * n_genes,
            genes=torch.arange(n_genes).repeat(len(position)),
            values=dense[mask].flatten(),
            library_size=torch.ones(len(position)),
        )

    return CellSetBatch(
        cells=sparse(x0),
        controls=sparse(control),
        mask=mask,
        labels=labels,
        n_genes=n_genes,
        preprocessing=Preprocessing("log1p", target_sum=1e4, scale=1.0),
        keys=tuple((0, b) for b in range(n_sets)),
        conditions=tuple(range(n_sets)),
    )
