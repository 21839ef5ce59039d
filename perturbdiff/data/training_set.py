"""From a screen and its settings to what training reads: genes chosen, cells split, indexed, matched and labelled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perturbdiff.config import Config
from perturbdiff.data.batch import Labels, Vocabularies
from perturbdiff.data.cellsets import (
    CellSetSampler,
    ConditionIndex,
    ControlMatch,
    ControlPools,
    match_controls,
    resolve_control_match,
)
from perturbdiff.data.expression import highly_variable_genes
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import Split, make_split


@dataclass(frozen=True)
class IndexedCells:
    """The conditions of some cells of a screen, their controls and labels (one row a condition)."""

    index: ConditionIndex
    pools: ControlPools
    labels: Labels

    @classmethod
    def of(cls, index: ConditionIndex, match: ControlMatch, vocabularies: Vocabularies) -> IndexedCells:
        """Match and label an index that holds the controls too. Raises as `match_controls`, `encode`."""
        return cls(index, match_controls(index, match), vocabularies.encode(_conditions(index)))

    def sampler(self, config: Config) -> CellSetSampler:
        return CellSetSampler(
            self.index, self.pools, config.data.set_size, config.data.sets_per_batch, config.training.seed
        )


@dataclass(frozen=True)
class TrainingSet:
    """Everything training reads. `screen` holds the model's genes only."""

    screen: Screen
    split: Split
    match: ControlMatch
    vocabularies: Vocabularies
    train: IndexedCells
    validation: IndexedCells | None

    @classmethod
    def of(cls, screen: Screen, config: Config) -> TrainingSet:
        """Split, choose genes on training cells, match controls, collect labels.

        Raises
        ------
        ValueError
            A selector matches nothing; a condition has no controls; a validation condition's perturbation is never
            trained on.
        """
        split = make_split(screen, config.split, config.training.seed)
        everything = ConditionIndex.build(screen, np.ones(len(screen), dtype=bool))
        match = resolve_control_match(everything, config.data.control_match)
        match_controls(everything, match)  # held-out conditions need controls too: say so now
        if config.data.n_hvg is not None and config.data.n_hvg < len(screen.expression.genes):
            screen = screen.with_genes(highly_variable_genes(screen.expression.log1p(split.train), config.data.n_hvg))
        train_index = ConditionIndex.build(screen, split.train)
        # Where batch and perturbation are confounded, a batch label would give the answer away.
        vocabularies = Vocabularies.of(train_index, config.data.combination_separator, with_batches=match == "batch")
        train = IndexedCells.of(train_index, match, vocabularies)
        validation = None
        if split.validation.any():
            validation_index = ConditionIndex.build(screen, split.validation | screen.is_control)
            try:
                validation = IndexedCells.of(validation_index, match, vocabularies)
            except KeyError as error:
                raise ValueError(f"split.validation cannot be scored: {error.args[0]} Validate known ones.") from error
        return cls(screen, split, match, vocabularies, train, validation)

    def summary(self) -> str:
        """What will be trained on, for a person, several lines."""
        perturbed = ~self.screen.is_control
        known = self.vocabularies
        n_cells = {part: int((getattr(self.split, part) & perturbed).sum()) for part in ("train", "validation", "test")}
        lines = [
            f"genes       {len(self.screen.expression.genes):,} in the model",
            f"split       {n_cells['train']:,} perturbed cells to train on, {n_cells['validation']:,} to validate, "
            f"{n_cells['test']:,} held out",
            f"labels      {len(known.perturbations)} perturbations, {len(known.cell_types)} cell types, "
            f"{len(known.batches)} batches seen in training",
            "controls    matched by "
            + (
                "cell type and batch"
                if self.match == "batch"
                else "cell type only (asked for, or no batch holds both controls and perturbed cells); "
                "batch labels are left out"
            ),
        ]
        return "\n".join(lines)


def _conditions(index: ConditionIndex) -> list[tuple[str | None, str | None, str | None]]:
    conditions: list[tuple[str | None, str | None, str | None]] = []
    for condition in range(len(index)):
        perturbation, cell_type, batch = index.labels(condition)
        conditions.append((None if index.is_control[condition] else perturbation, cell_type, batch))
    return conditions
