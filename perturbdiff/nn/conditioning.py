"""What a set is conditioned on: perturbations, their features and doses, cell type, batch -> one vector per set.

Every label has a null row (id -1: absent, hidden by dropout, or unknown), and the whole condition has a null vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perturbdiff.config import DenoiserConfig
from perturbdiff.data.vocab import Labels, Vocabularies
from perturbdiff.features.tables import FeatureTable

# Small beside label rows (0.5), so that what features say is learned slowly: at 1, some hundred steps on twenty
# knock-outs follow chance likenesses of genes further than transfers.
FEATURE_SPREAD = 0.1


@dataclass(frozen=True)
class VocabSizes:
    """How many labels of each kind a denoiser knows, and what it knows of perturbations besides.

    by_features
        Perturbations without a row of their own, whose ids come after those that have one.
    tables
        Width of each table of perturbation features.
    """

    perturbations: int
    cell_types: int
    batches: int
    by_features: int = 0
    tables: tuple[int, ...] = ()
    doses: bool = False

    @classmethod
    def from_vocabularies(cls, vocabularies: Vocabularies) -> VocabSizes:
        return cls(
            len(vocabularies.labelled),
            len(vocabularies.cell_types),
            len(vocabularies.batches),
            vocabularies.n_by_features,
            tuple(width for _, width in vocabularies.tables),
            vocabularies.dose_separator is not None,
        )


class LabelConditioning(nn.Module):
    """Sum of the vectors of perturbation, cell type and batch, (B, 1, D).

    A perturbation is its row, plus its features made linear, plus what its dose changes. A combination is the sum of
    its parts and an interaction of each pair. What is new to a model without it starts at zero and changes nothing
    then: features (so that unknown directions of feature space say nothing), doses and interaction.
    """

    def __init__(self, sizes: VocabSizes, width: int, interaction: bool = True) -> None:
        super().__init__()
        # Row 0 is the null label; perturbations without a row of their own read it too.
        self.perturbation = nn.Embedding(sizes.perturbations + 1, width)
        self.cell_type = nn.Embedding(sizes.cell_types + 1, width)
        self.batch = nn.Embedding(sizes.batches + 1, width)
        self.null = nn.Parameter(torch.zeros(width))
        self.n_rows, n_entities = sizes.perturbations, sizes.perturbations + sizes.by_features
        self.tables = nn.ModuleList(FeatureEmbedding(n_entities, n_features, width) for n_features in sizes.tables)
        self.dose = DoseEffect(width) if sizes.doses else None
        self.interaction = nn.Parameter(torch.zeros(width, width)) if interaction else None

    def forward(self, labels: Labels) -> Tensor:
        c = self.of_perturbations(labels) + self.cell_type(labels.cell_type + 1) + self.batch(labels.batch + 1)
        if labels.hidden is not None:
            c = torch.where(labels.hidden[:, None], self.null.to(c.dtype), c)
        return c[:, None]

    def of_perturbations(self, labels: Labels) -> Tensor:
        """(B, D) of the perturbations of each set together; the null row where it has none."""
        present = labels.perturbation >= 0  # (B, P)
        parts = self._vectors(labels) * present[..., None]  # (B, P, D)
        together = parts.sum(1)  # (B, D)
        if self.interaction is not None:
            # Sum over pairs of v_i * v_j, from the square of the sum; nothing of a perturbation alone.
            pairs = (together.square() - parts.square().sum(1)) / 2
            together = together + pairs @ self.interaction
        nothing = ~present.any(1, keepdim=True)
        return torch.where(nothing, self.perturbation.weight[0], together)

    def _vectors(self, labels: Labels) -> Tensor:
        ids = labels.perturbation  # (B, P)
        rows = ids + 1
        features = [cast(FeatureEmbedding, table).features[ids.clamp(min=0)] for table in self.tables]  # (B, P, F) each
        if features:  # whose index has refused what is no id
            rows = torch.where(ids >= self.n_rows, 0, rows)
        if labels.features_only is not None and features:
            # A perturbation that no table has keeps its row: nothing else would be left of it.
            described = torch.stack([values.any(-1) for values in features]).any(0)
            rows = torch.where(labels.features_only[:, None] & described, 0, rows)
        vectors = self.perturbation(rows)
        for table, values in zip(self.tables, features, strict=True):
            vectors = vectors + table(values)
        if self.dose is not None:
            if labels.dose is None:
                raise ValueError("this denoiser was made for doses; give labels with a dose.")
            vectors = vectors + self.dose(vectors, labels.dose)
        return vectors


class FeatureEmbedding(nn.Module):
    """Rows of a table of features, centred and scaled, made linear to D; zero where the table lacks a perturbation.

    features
        (n, F) after centring and scaling; zeros are "not in the table".
    centre, scale
        (F,) and (1,): what was done to the table's own vectors v, (v - centre) * scale, for those that come later.
    """

    def __init__(self, n_entities: int, n_features: int, width: int) -> None:
        super().__init__()
        self.features: Tensor
        self.centre: Tensor
        self.scale: Tensor
        self.register_buffer("features", torch.zeros(n_entities, n_features))
        self.register_buffer("centre", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(1))
        self.weight = nn.Parameter(torch.zeros(width, n_features))

    def forward(self, features: Tensor) -> Tensor:
        """(..., F) to (..., D)."""
        return F.linear(features, self.weight)

    def fill(self, table: FeatureTable, names: Sequence[str]) -> None:
        """Take the rows of a table for the perturbations `names` (n), centred and scaled over the whole table.

        The root mean square of a value is FEATURE_SPREAD then.
        """
        centre, scale = table.centre_and_scale()
        self.centre, self.scale = torch.from_numpy(centre), torch.tensor([FEATURE_SPREAD * scale])
        self.features = self._rows(table, names)

    def append(self, table: FeatureTable | None, names: Sequence[str]) -> None:
        """Rows of further perturbations, prepared as those before; zeros without a table."""
        rows = torch.zeros(len(names), self.features.shape[1]) if table is None else self._rows(table, names)
        self.features = torch.cat([self.features, rows.to(self.features)])

    def _rows(self, table: FeatureTable, names: Sequence[str]) -> Tensor:
        rows = torch.from_numpy(table.rows(names))
        found = rows.any(1, keepdim=True)
        return torch.where(found, (rows - self.centre.to(rows)) * self.scale.to(rows), 0.0)


class DoseEffect(nn.Module):
    """What a dose changes of a perturbation's vector: an MLP of both, zero at start. Doses between known ones lie
    between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width + 1, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, vectors: Tensor, log_dose: Tensor) -> Tensor:
        """(B, P, D) and (B, P) to (B, P, D)."""
        return self.fc2(F.silu(self.fc1(torch.cat([vectors, log_dose[..., None].to(vectors.dtype)], dim=-1))))


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
