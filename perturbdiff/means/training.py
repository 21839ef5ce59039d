"""What predictors of mean responses know: mean profiles of the training conditions, and the context that is asked for.

n = training conditions, G = genes. All means are of log1p values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from perturbdiff.data.notation import Notation, Parts
from perturbdiff.data.vocab import GeneVocab


@dataclass(frozen=True, eq=False)
class TrainingMeans:
    """Mean profiles of the n training conditions; condition i is entry i of every field.

    control_mean
        (n, G) of the controls that each condition is compared with.
    perturbed_mean
        (n, G) of its perturbed cells.
    n_cells
        (n,) perturbed cells.
    notation
        What labels mean.
    genes
        None where nobody says: then no perturbation is known to be of a gene.

    Raises ValueError if there is no condition, the lengths disagree or a value is not finite.
    """

    perturbation: list[str]
    cell_type: list[str]
    batch: list[str]
    control_mean: np.ndarray
    perturbed_mean: np.ndarray
    n_cells: np.ndarray
    notation: Notation
    genes: GeneVocab | None = None

    def __post_init__(self) -> None:
        n = len(self.perturbation)
        if n == 0:
            raise ValueError("training conditions (0) must be at least one; put perturbed cells in the training split.")
        for name in ("cell_type", "batch", "control_mean", "perturbed_mean", "n_cells"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} ({len(getattr(self, name))} entries) must have one per condition; pass {n}.")
        if self.perturbed_mean.ndim != 2 or self.perturbed_mean.shape != self.control_mean.shape:
            raise ValueError(
                f"perturbed_mean ({self.perturbed_mean.shape}) must be (conditions, genes) like control_mean; "
                f"pass {self.control_mean.shape}."
            )
        for name in ("control_mean", "perturbed_mean"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} (NaN or infinite) must be finite; drop conditions without matched controls.")

    @cached_property
    def effect(self) -> np.ndarray:
        """(n, G) change of the mean."""
        return self.perturbed_mean - self.control_mean

    @cached_property
    def parts(self) -> list[Parts]:
        """What each condition's perturbation stands for, whatever the order of its parts."""
        return [self.notation.parse(label) for label in self.perturbation]

    def in_context(self, cell_type: str, batch: str) -> np.ndarray:
        """(n,) True for the conditions of a context; where it has none, of its cell type; else all."""
        same_type = np.array([c == cell_type for c in self.cell_type])
        same_context = same_type & np.array([b == batch for b in self.batch])
        if same_context.any():
            return same_context
        return same_type if same_type.any() else np.ones(len(same_type), dtype=bool)


@dataclass(frozen=True, eq=False)
class Context:
    """A condition to predict, with the control cells that predictions start from: (k, G) log1p."""

    perturbation: str
    cell_type: str
    batch: str
    control: np.ndarray

    def __post_init__(self) -> None:
        if self.control.ndim != 2 or self.control.size == 0:
            raise ValueError(
                f"control ({self.control.shape}) must be a non-empty array (cells, genes); keep control cells."
            )

    @cached_property
    def control_mean(self) -> np.ndarray:
        """(G,)"""
        return self.control.mean(axis=0, dtype=np.float64)
