"""From a denoiser of some genes and labels to one of others: by name, never by position.

D = width, G = genes, n = cells. What is known is copied bit for bit, what is new starts from what is known by a stated
rule, what is not wanted leaves. With nothing new, outputs are the same bits.

New genes start as the mean of known ones, as inputs and as outputs. Of a residual head a new gene gets the mean of its
neighbours' changes on top of its own control, and no change where the head is zero. A direct head predicts it at their
mean level, which may be far from its own until it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from perturbdiff.config import DenoiserConfig
from perturbdiff.data.notation import one_unit
from perturbdiff.data.vocab import GeneVocab, LabelVocab, Vocabularies
from perturbdiff.features.tables import FeatureTable
from perturbdiff.files import few
from perturbdiff.nn.conditioning import FeatureEmbedding, LabelConditioning
from perturbdiff.nn.denoiser import Denoiser, build_denoiser

# What each axis of a parameter is indexed by; every other parameter must have the same shape on both sides.
GENE, PERTURBATION, CELL_TYPE, BATCH = "gene", "perturbation", "cell_type", "batch"
INDEXED_BY: dict[str, tuple[str | None, ...]] = {
    "embed_x.weight": (None, GENE),
    "embed_self_cond.weight": (None, GENE),
    "embed_control.weight": (None, GENE),
    "head.weight": (GENE, None),
    "head.bias": (GENE,),
    "effect.weight": (GENE, None),
    "conditioning.perturbation.weight": (PERTURBATION, None),
    "conditioning.cell_type.weight": (CELL_TYPE, None),
    "conditioning.batch.weight": (BATCH, None),
    "conditioning.encoder.perturbation.weight": (PERTURBATION, None),
    "conditioning.encoder.cell_type.weight": (CELL_TYPE, None),
    "conditioning.encoder.batch.weight": (BATCH, None),
}
# Of conditioning=reference, whose covariate embedding has one value a gene (unless published_encoding.covariates).
INDEXED_BY_COVARIATE: dict[str, tuple[str | None, ...]] = {
    "conditioning.encoder.transform.weight": (GENE, None),
    "conditioning.encoder.transform.bias": (GENE,),
    "conditioning.linear.weight": (None, GENE),
}
# Their row 0 is the null label; the published code has one for perturbations only.
WITH_NULL_ROW = {
    "conditioning.perturbation.weight",
    "conditioning.cell_type.weight",
    "conditioning.batch.weight",
    "conditioning.encoder.perturbation.weight",
}
# A checkpoint may lack these: they start at zero, and change nothing then.
ZERO_AT_START = ("conditioning.interaction", "conditioning.dose.", "effect.")
TABLES = "conditioning.tables."
MIN_SHARED = 0.1  # part of the wanted genes that the checkpoint must have
N_NEIGHBOURS = 5
GENES_AT_ONCE = 1024


@dataclass(frozen=True)
class Names:
    """What the inputs and conditions of a denoiser are called."""

    genes: GeneVocab
    vocabularies: Vocabularies


@dataclass(frozen=True)
class Rules:
    """How what is new starts, and what it is told from.

    new_labels
        mean: of the rows that were trained. nearest: the row of the known label whose control profile is closest, where
        `profiles` has both. A new perturbation with features that the checkpoint understands starts from the null row,
        as an unseen perturbation with features was trained; others from the mean.
    expression
        (n, G) log1p values of cells, of the wanted genes: a new gene is the mean of the five shared genes that it
        correlates most with. Constant ones, and all without `expression`, are the mean of all shared genes.
    profiles
        By kind ("cell_type", "batch") and label: (G,) mean log1p expression of control cells.
    tables
        Features of perturbations, by table.
    """

    new_labels: Literal["mean", "nearest"] = "mean"
    expression: np.ndarray | None = None
    profiles: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    tables: Sequence[FeatureTable] = ()


@dataclass(frozen=True)
class Adaptation:
    """What was known, what is new, and what left.

    new_labels
        By kind, those that the checkpoint has no row for.
    new_parts
        Parameters with anything that is not a copy.
    """

    n_shared: int
    matched_by: str
    new_genes: tuple[str, ...]
    dropped_genes: tuple[str, ...]
    new_labels: Mapping[str, tuple[str, ...]]
    new_parts: frozenset[str]

    def summary(self) -> str:
        """For a person, several lines."""
        n_genes = self.n_shared + len(self.new_genes)
        matched = f"{self.n_shared:,} of {n_genes:,} genes matched by {self.matched_by}"
        new = f"{len(self.new_genes):,} new" + (f" ({few(list(self.new_genes))})" if self.new_genes else "")
        lines = [f"adapted     {matched}; {new}; {len(self.dropped_genes):,} of the checkpoint's left out"]
        for kind, names in self.new_labels.items():
            if names:
                lines.append(f"            {len(names)} new {kind.replace('_', ' ')} labels: {few(list(names))}")
        return "\n".join(lines)


def adapt(
    denoiser: Denoiser, known: Names, wanted: Names, rules: Rules | None = None, config: DenoiserConfig | None = None
) -> tuple[Denoiser, Adaptation]:
    """A denoiser for the wanted genes and labels that knows what `denoiser` knows of them.

    Parameters
    ----------
    denoiser
        On the CPU; stays as it is. `known` names what it is indexed by.
    wanted
        Labels, genes and tables of the result. A table of the checkpoint that has the same name and width goes on as it
        is centred and scaled there, so that its weights keep their meaning; its perturbations are found by name.
    config
        Architecture of the result: `denoiser`'s, or with the interaction that it lacks.

    Raises
    ------
    ValueError
        Too few genes are shared; another architecture.

    Notes
    -----
    Parts that nothing known tells anything about are drawn from torch's global generator, as in a fresh denoiser.
    """
    rules, config = rules or Rules(), config or denoiser.config
    check_architecture(denoiser.config, config)
    genes, matched_by = _genes(known.genes, wanted.genes, rules)
    result = build_denoiser(config, len(wanted.genes), wanted.vocabularies)
    # Features first: whether a new perturbation has any decides where its row starts.
    goes_on = _tables(denoiser, result, known, wanted, rules.tables)
    old, new = denoiser.state_dict(), result.state_dict()
    new_parts = {f"conditioning.tables.{i}.weight" for i in range(len(wanted.vocabularies.tables)) if i not in goes_on}
    described = _described(goes_on, wanted.vocabularies)
    sources = {
        GENE: genes,
        PERTURBATION: _perturbations(known.vocabularies, wanted.vocabularies, described),
        CELL_TYPE: _contexts(known.vocabularies.cell_types, wanted.vocabularies.cell_types, rules),
        BATCH: _contexts(known.vocabularies.batches, wanted.vocabularies.batches, rules),
    }
    indexed_by = {**INDEXED_BY, **({} if config.published_encoding.covariates else INDEXED_BY_COVARIATE)}
    for name in new.keys() | old.keys():
        if name.startswith(TABLES):
            continue
        if name not in old and name.startswith(ZERO_AT_START):
            new_parts.add(name)
        elif name not in old or name not in new:
            raise ValueError(
                f"the checkpoint {'lacks' if name not in old else 'has'} {name}; "
                "data.dose_col and data.dose_separator must be as in its training."
            )
        elif name in indexed_by:
            for axis, kind in enumerate(indexed_by[name]):
                if kind is not None and _move(old[name], new[name], axis, sources[kind], name):
                    new_parts.add(name)
        elif old[name].shape != new[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(old[name].shape)} in the checkpoint and {tuple(new[name].shape)} here; the "
                "denoiser settings must be the checkpoint's."
            )
        else:
            new[name].copy_(old[name])
    return result, _adaptation(known, wanted, sources, matched_by, frozenset(new_parts))


def check_architecture(checkpoint: DenoiserConfig, asked: DenoiserConfig) -> None:
    """Refuse another architecture than the checkpoint's; only what starts at zero may come. Raises ValueError."""
    for setting in fields(DenoiserConfig):
        has, wants = getattr(checkpoint, setting.name), getattr(asked, setting.name)
        if has != wants and not (setting.name in ("interaction", "mean_effect") and wants):
            raise ValueError(
                f"denoiser.{setting.name} is {has} in the checkpoint and {wants} in the settings; leave it out, or "
                "start from another checkpoint."
            )


def extended(known: Vocabularies, data: Vocabularies) -> Vocabularies:
    """The labels of the data behind those of a checkpoint, which keeps its own; the separators are the data's.

    Raises ValueError where their doses are in different units.

    Perturbations that have no row of their own come last, tables of the data behind those of the checkpoint; of one
    name and two widths the data's is taken.
    """
    labelled = _joined(known.labelled, data.labelled)
    has_row = set(labelled)
    every = _joined(known.perturbations.names, data.perturbations.names)
    described = tuple(name for name in every if name not in has_row)
    widths = dict(known.tables) | dict(data.tables)
    return Vocabularies(
        LabelVocab("perturbation", labelled + described),
        LabelVocab("cell_type", _joined(known.cell_types.names, data.cell_types.names)),
        LabelVocab("batch", _joined(known.batches.names, data.batches.names)),
        data.combination_separator,
        data.dose_separator,
        len(described),
        tuple(widths.items()),
        data.control_labels,
        {
            name: tuple(sorted({*known.doses.get(name, ()), *data.doses.get(name, ())}))
            for name in (*known.doses, *data.doses)
        },
        one_unit({known.dose_unit, data.dose_unit}, "the checkpoint and the data"),
    )


@dataclass(frozen=True)
class Sources:
    """Where the entries of an axis come from.

    positions
        (n_wanted,) position of each among the known, -1 where it is new.
    new
        Of each group of new entries: their positions among the wanted, and (len or 1, k) known positions whose mean
        they start as; k = 0 leaves them as in a fresh denoiser, known position -1 is the null row.
    """

    positions: np.ndarray
    new: tuple[tuple[np.ndarray, np.ndarray], ...]


def _genes(known: GeneVocab, wanted: GeneVocab, rules: Rules) -> tuple[Sources, str]:
    alignment = wanted.align(known, 0.0)
    positions = alignment.columns
    if alignment.n_matched == 0 or alignment.overlap < MIN_SHARED:
        missing = [name for name, position in zip(wanted.names, positions, strict=True) if position < 0]
        raise ValueError(
            f"only {alignment.n_matched} of the {len(wanted):,} genes to train on are among the checkpoint's "
            f"{len(known):,} (at least {MIN_SHARED:.0%} must be); it lacks {few(missing)} and has "
            f"{few(list(known.names))}. Are both named by symbol, or by Ensembl id?"
        )
    new, shared = np.flatnonzero(positions < 0), np.flatnonzero(positions >= 0)
    mean = positions[shared][None]
    if rules.expression is None or not len(new):
        return Sources(positions, ((new, mean),)), alignment.matched_by
    neighbours, defined = nearest_by_correlation(rules.expression, new, shared)
    groups = (new[defined], positions[neighbours[defined]]), (new[~defined], mean)
    return Sources(positions, groups), alignment.matched_by


def nearest_by_correlation(
    expression: np.ndarray, genes: np.ndarray, among: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the genes of `among` that correlate most with each of `genes`, (len(genes), k), and (len(genes),)
    whether that is defined; k is five, or all where there are fewer. Constant genes correlate with nothing."""
    centred = expression - expression.mean(0, dtype=np.float64)
    norms = np.sqrt(np.square(centred).sum(0))
    unit = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    among = among[norms[among] > 0]
    k = min(N_NEIGHBOURS, len(among))
    found = np.zeros((len(genes), k), np.int64)
    for start in range(0, len(genes), GENES_AT_ONCE):
        part = slice(start, start + GENES_AT_ONCE)
        correlation = unit[:, genes[part]].T @ unit[:, among]  # (part, among)
        found[part] = among[np.argsort(-correlation, axis=1, kind="stable")[:, :k]]
    return found, (norms[genes] > 0) & (k > 0)


def _perturbations(known: Vocabularies, wanted: Vocabularies, described: np.ndarray) -> Sources:
    # Rows of perturbations; `described` (n_labelled,) are those with features that the checkpoint understands.
    positions = _positions(known.labelled, wanted.labelled)
    new = positions < 0
    by_features, by_mean = np.flatnonzero(new & described), np.flatnonzero(new & ~described)
    mean = np.arange(len(known.labelled))[None]
    return Sources(positions, ((by_features, np.array([[-1]])), (by_mean, mean)))


def _contexts(known: LabelVocab, wanted: LabelVocab, rules: Rules) -> Sources:
    positions, profiles = _positions(known.names, wanted.names), rules.profiles.get(known.kind, {})
    told = [position for position, name in enumerate(known.names) if name in profiles]
    by_profile, nearest, by_mean = [], [], []
    for i in np.flatnonzero(positions < 0):
        if rules.new_labels == "nearest" and told and wanted.names[i] in profiles:
            own = profiles[wanted.names[i]]
            distances = [np.linalg.norm(profiles[known.names[position]] - own) for position in told]
            by_profile.append(i)
            nearest.append([told[int(np.argmin(distances))]])
        else:
            by_mean.append(i)
    of_profiles = np.array(by_profile, int), np.array(nearest, int).reshape(-1, 1)
    return Sources(positions, (of_profiles, (np.array(by_mean, int), np.arange(len(known))[None])))


def _move(old: Tensor, new: Tensor, axis: int, sources: Sources, name: str) -> bool:
    """Fill `new` along an axis; True where anything is not a copy. Other axes have the same size."""
    first = int(name in WITH_NULL_ROW)
    old, new = old.movedim(axis, 0), new.movedim(axis, 0)  # views
    new[:first] = old[:first]
    known = np.flatnonzero(sources.positions >= 0)
    new[torch.from_numpy(known + first)] = old[torch.from_numpy(sources.positions[known] + first)]
    for entries, positions in sources.new:
        if len(entries) and positions.shape[1]:
            new[torch.from_numpy(entries + first)] = old[torch.from_numpy(positions + first)].mean(1)
    return len(known) < len(sources.positions)


def _tables(
    denoiser: Denoiser, result: Denoiser, known: Names, wanted: Names, given: Sequence[FeatureTable]
) -> dict[int, FeatureEmbedding]:
    """Fill the tables of features of `result`; returns those that go on, by position among the wanted."""
    names, own = wanted.vocabularies.perturbations.names, tables_of(result)
    before = dict(zip(known.vocabularies.tables, tables_of(denoiser), strict=True))
    positions = _positions(known.vocabularies.perturbations.names, names)
    here, there = torch.from_numpy(np.flatnonzero(positions >= 0)), torch.from_numpy(positions[positions >= 0])
    goes_on: dict[int, FeatureEmbedding] = {}
    for i, (embedding, (table, width)) in enumerate(zip(own, wanted.vocabularies.tables, strict=True)):
        raw = next((raw for raw in given if raw.name == table), None)
        was = before.get((table, width))
        if was is None:
            if raw is not None:
                embedding.fill(raw, names)
            continue
        goes_on[i] = embedding
        embedding.weight.data.copy_(was.weight.data)
        embedding.centre, embedding.scale = was.centre.clone(), was.scale.clone()
        embedding.features[here] = was.features[there]
        if raw is not None:
            rows = FeatureEmbedding(0, width, 1)
            rows.centre, rows.scale = was.centre, was.scale
            rows.append(raw, names)
            lacking = ~embedding.features.any(1)
            embedding.features[lacking] = rows.features[lacking]
    return goes_on


def tables_of(denoiser: Denoiser) -> list[FeatureEmbedding]:
    """The tables of perturbation features, in the order of the vocabularies'."""
    conditioning = denoiser.conditioning
    if not isinstance(conditioning, LabelConditioning):
        return []
    return [table for table in conditioning.tables if isinstance(table, FeatureEmbedding)]


def _described(goes_on: Mapping[int, FeatureEmbedding], wanted: Vocabularies) -> np.ndarray:
    """(n_labelled,) True where a table that goes on has features of a perturbation."""
    described = torch.zeros(len(wanted.labelled), dtype=torch.bool)
    for embedding in goes_on.values():
        described |= embedding.features[: len(described)].any(1)
    return described.numpy()


def _adaptation(
    known: Names, wanted: Names, sources: Mapping[str, Sources], matched_by: str, new_parts: frozenset[str]
) -> Adaptation:
    positions = sources[GENE].positions
    left = sorted(set(range(len(known.genes))) - set(positions.tolist()))
    labels = wanted.vocabularies
    new = {
        kind: tuple(names[i] for i in np.flatnonzero(sources[kind].positions < 0))
        for kind, names in (
            (PERTURBATION, labels.labelled),
            (CELL_TYPE, labels.cell_types.names),
            (BATCH, labels.batches.names),
        )
    }
    return Adaptation(
        int((positions >= 0).sum()),
        matched_by,
        tuple(wanted.genes.names[i] for i in np.flatnonzero(positions < 0)),
        tuple(known.genes.names[i] for i in left),
        new,
        new_parts,
    )


def _positions(known: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    at = {name: i for i, name in enumerate(known)}
    return np.array([at.get(name, -1) for name in wanted], dtype=np.int64)


def _joined(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))
