"""What a set is conditioned on: perturbation, cell type and batch labels -> one vector per set.

Every label has a null row (id -1: absent, hidden by dropout, or unknown), and the whole condition has a null vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perturbdiff.config import DenoiserConfig
from perturbdiff.data.batch import Labels


@dataclass(frozen=True)
class VocabSizes:
    """How many labels of each kind a denoiser knows."""

    perturbations: int
    cell_types: int
    batches: int


class LabelConditioning(nn.Module):
    """Sum of label embeddings, (B, 1, D). A combination of perturbations is the sum of its parts."""

    def __init__(self, sizes: VocabSizes, width: int) -> None:
        super().__init__()
        # Row 0 is the null label.
        self.perturbation = nn.Embedding(sizes.perturbations + 1, width)
        self.cell_type = nn.Embedding(sizes.cell_types + 1, width)
        self.batch = nn.Embedding(sizes.batches + 1, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, labels: Labels) -> Tensor:
        present = labels.perturbation >= 0  # (B, P)
        parts = (self.perturbation(labels.perturbation + 1) * present[..., None]).sum(1)  # (B, D)
        nothing = ~present.any(1, keepdim=True)
        parts = torch.where(nothing, self.perturbation.weight[0], parts)
        c = parts + self.cell_type(labels.cell_type + 1) + self.batch(labels.batch + 1)
        if labels.hidden is not None:
            c = torch.where(labels.hidden[:, None], self.null.to(c.dtype), c)
        return c[:, None]


class CovariateEncoder(nn.Module):
    """The published covariate embedding: one-hot rows concatenated, then linear to G. `cov` of the golden files.

    With perturbation_encoding "none" every set reads row 0, the row of "no perturbation"; with batch_encoding "none"
    there is no batch part. ValueError if there are no batches to encode.
    """

    def __init__(self, sizes: VocabSizes, config: DenoiserConfig, n_genes: int) -> None:
        super().__init__()
        if config.batch_encoding == "onehot" and sizes.batches == 0:
            raise ValueError(
                "denoiser.batch_encoding=onehot needs batch labels, and this data has none (marginal sets, or controls "
                "matched by cell type); set denoiser.batch_encoding=none."
            )
        dim = config.covariate_dim
        self.perturbation_encoding = config.perturbation_encoding
        self.perturbation = nn.Embedding(sizes.perturbations + 1, dim)  # row 0: no perturbation
        self.cell_type = nn.Embedding(sizes.cell_types, dim)
        self.batch = nn.Embedding(sizes.batches, dim) if config.batch_encoding == "onehot" else None
        self.transform = nn.Linear(dim * (3 if self.batch is not None else 2), n_genes)

    def forward(self, perturbation: Tensor, cell_type: Tensor, batch: Tensor) -> Tensor:
        """Ids of any shape (...), -1 = no perturbation, to (..., G)."""
        row = perturbation + 1 if self.perturbation_encoding == "onehot" else torch.zeros_like(perturbation)
        parts = [self.perturbation(row), _embed_or_mean(self.cell_type, cell_type)]
        if self.batch is not None:
            parts.append(_embed_or_mean(self.batch, batch))
        return self.transform(torch.cat(parts, dim=-1))


class ReferenceConditioning(nn.Module):
    """The published conditioning, (B, 1 or S, D): Linear(SiLU(cov)), or a null embedding without `cov`."""

    def __init__(self, width: int, n_genes: int, encoder: CovariateEncoder | None) -> None:
        super().__init__()
        self.encoder = encoder  # None: `cov` is given (converted reference weights without their encoder)
        self.linear = nn.Linear(n_genes, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, labels: Labels) -> Tensor:
        if self.encoder is None:
            raise ValueError("this denoiser has no covariate encoder; give it `cov`, the covariate embedding.")
        if labels.perturbation.shape[1] != 1:
            raise ValueError(
                f"conditioning=reference knows one perturbation a set, got {labels.perturbation.shape[1]}; "
                "set data.combination_separator=null or denoiser.conditioning=labels."
            )
        cov = self.encoder(labels.perturbation[:, 0], labels.cell_type, labels.batch)  # (B, G)
        c = self.from_covariates(cov[:, None])
        if labels.hidden is not None:
            c = torch.where(labels.hidden[:, None, None], self.null.to(c.dtype), c)
        return c

    def from_covariates(self, cov: Tensor) -> Tensor:
        return self.linear(F.silu(cov))


def _embed_or_mean(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    # The published code has no row for an absent cell type or batch; the mean of the rows stands for it.
    rows = embedding(ids.clamp(min=0))
    return torch.where((ids < 0)[..., None], embedding.weight.mean(0), rows)
