"""What a set is conditioned on: perturbation, cell type and batch labels -> one vector per set.

Every label has a null row (id -1: absent, hidden by dropout, or unknown), and the whole condition has a null vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perturbdiff.config import DenoiserConfig
from perturbdiff.data.batch import Labels, Vocabularies


@dataclass(frozen=True)
class VocabSizes:
    """How many labels of each kind a denoiser knows."""

    perturbations: int
    cell_types: int
    batches: int

    @classmethod
    def of(cls, vocabularies: Vocabularies) -> VocabSizes:
        return cls(len(vocabularies.perturbations), len(vocabularies.cell_types), len(vocabularies.batches))


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


class FrozenFeatures(nn.Module):
    """What is known of each label, a frozen table (n_labels, F), made linear to C: in place of learned rows."""

    def __init__(self, n_labels: int, n_features: int, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.features: Tensor
        self.register_buffer("features", torch.zeros(n_labels, n_features))
        self.linear = nn.Linear(n_features, dim, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape (...) to (..., C)."""
        return self.linear(self.features[ids])

    def mean(self) -> Tensor:
        """(C,) mean over the labels."""
        return self.linear(self.features.mean(0))


class CovariateEncoder(nn.Module):
    """The published covariate embedding: one vector a label, concatenated, then linear to G. `cov` of the golden files.

    Labels are learned rows ("onehot"), or rows of a frozen table made linear ("features"); doses are one-hot features
    of a perturbation, concatenated as a part of their own. Row 0 of learned perturbations is "no perturbation", and
    with perturbation_encoding "none" every set reads it. Frozen tables have no such row, nor do cell types and batches:
    the published code cannot say "absent" there, and the mean of all rows stands for it. (Its own control label is a
    label as any other.) With batch_encoding "none" there is no batch part.

    Raises ValueError where labels are to be encoded and there are none.
    """

    def __init__(self, sizes: VocabSizes, config: DenoiserConfig, n_genes: int) -> None:
        super().__init__()
        if config.batch_encoding == "onehot" and sizes.batches == 0:
            raise ValueError(
                "denoiser.batch_encoding=onehot needs batch labels, and this data has none (marginal sets, or controls "
                "matched by cell type); set denoiser.batch_encoding=none."
            )
        dim, published = config.covariate_dim, config.published_encoding
        self.perturbation_encoding = config.perturbation_encoding
        self.perturbation: nn.Embedding | FrozenFeatures
        self.dose: FrozenFeatures | None = None
        if config.perturbation_encoding == "features":
            self.perturbation = FrozenFeatures(sizes.perturbations, published.perturbation_features, dim)
            if published.doses:
                self.dose = FrozenFeatures(sizes.perturbations, published.doses, dim, bias=False)
        else:
            self.perturbation = nn.Embedding(sizes.perturbations + 1, dim)  # row 0: no perturbation
        self.cell_type: nn.Embedding | FrozenFeatures
        if config.cell_type_encoding == "features":
            self.cell_type = FrozenFeatures(sizes.cell_types, published.cell_type_features, dim)
        else:
            self.cell_type = nn.Embedding(sizes.cell_types, dim)
        self.batch = nn.Embedding(sizes.batches, dim) if config.batch_encoding == "onehot" else None
        n_parts = 2 + (self.dose is not None) + (self.batch is not None)
        self.transform = nn.Linear(dim * n_parts, published.covariates or n_genes)

    def forward(self, perturbation: Tensor, cell_type: Tensor, batch: Tensor) -> Tensor:
        """Ids of any shape (...), -1 = absent, to (..., G)."""
        if isinstance(self.perturbation, FrozenFeatures):
            parts = [_embed_or_mean(self.perturbation, perturbation)]
            if self.dose is not None:
                parts.append(_embed_or_mean(self.dose, perturbation))
        else:
            row = perturbation + 1 if self.perturbation_encoding == "onehot" else torch.zeros_like(perturbation)
            parts = [self.perturbation(row)]
        parts.append(_embed_or_mean(self.cell_type, cell_type))
        if self.batch is not None:
            parts.append(_embed_or_mean(self.batch, batch))
        return self.transform(torch.cat(parts, dim=-1))


class ReferenceConditioning(nn.Module):
    """The published conditioning, (B, 1 or S, D): Linear(SiLU(cov)), or a null embedding without `cov`."""

    def __init__(self, width: int, n_covariates: int, encoder: CovariateEncoder | None) -> None:
        super().__init__()
        self.encoder = encoder  # None: `cov` is given (converted reference weights without their encoder)
        self.linear = nn.Linear(n_covariates, width)
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


def _embed_or_mean(embedding: nn.Embedding | FrozenFeatures, ids: Tensor) -> Tensor:
    # The published code has no row for an absent cell type or batch; the mean of the rows stands for it.
    mean = embedding.mean() if isinstance(embedding, FrozenFeatures) else embedding.weight.mean(0)
    return torch.where((ids < 0)[..., None], mean, embedding(ids.clamp(min=0)))
