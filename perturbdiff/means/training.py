"""What predictors of mean responses know: means of training conditions, and the context that is asked for.

n = training conditions, G = genes, k = control cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from perturbdiff.data.notation import Notation, Parts
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.features.tables import FeatureTable
from perturbdiff.means.described import FeatureFit
from perturbdiff.means.log_space import LogSpaceFit, log_expression
from perturbdiff.means.newness import Condition, Known
from perturbdiff.means.ridge import RidgeFit
from perturbdiff.means.signal import signal
from perturbdiff.means.variation import BatchVariation

EXPRESSED = 0.05  # mean log1p value in controls from which on a target says what a knock-down leaves of it
TARGET_EPS = 0.01  # added to expm1 of means before their logarithm: what is 0 in all cells is not infinitely less


@dataclass(frozen=True, eq=False)
class TrainingMeans:
    """Means of the n training conditions, log1p space; condition i is entry i of every field.

    genes
        Names of the G columns, where perturbations may be named after genes; None where nobody knows.
    tables
        What is known of perturbations besides their names.
    table_weights
        What each table counts (`FeatureFit`), where other conditions taught that; None: these do.
    overdispersion
        (G,) of the perturbed cells, as of `expression.overdispersion`; None where nobody knows.
    control_noise, perturbed_noise
        The variance of `control_mean` and `perturbed_mean` that finitely many cells make: that between cells over their
        number. That of controls is 0 where all batches share them. None where nobody looked: then how batches differ is
        not known.
    notation
        What labels mean; by default "A+B" is A and B.

    Raises ValueError if there is no condition, lengths disagree, a value is not finite or a condition has no cells.
    """

    perturbation: list[str]
    cell_type: list[str]
    batch: list[str]
    control_mean: np.ndarray  # (n, G) mean of the matched controls
    perturbed_mean: np.ndarray  # (n, G) mean of the perturbed cells
    n_cells: np.ndarray  # (n,) perturbed cells
    notation: Notation = field(default_factory=lambda: Notation(()))
    genes: GeneVocab | None = None
    tables: Sequence[FeatureTable] = ()
    table_weights: np.ndarray | None = None
    overdispersion: np.ndarray | None = None
    control_noise: np.ndarray | None = None  # (n, G)
    perturbed_noise: np.ndarray | None = None  # (n, G)

    def __post_init__(self) -> None:
        n = len(self.perturbation)
        if n == 0:
            raise ValueError("training conditions (0) must be at least one; put perturbed cells in the training split.")
        for name in ("cell_type", "batch", "control_mean", "perturbed_mean", "n_cells"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} ({len(getattr(self, name))} entries) must have one per condition; pass {n}.")
        shape = self.control_mean.shape
        if self.perturbed_mean.ndim != 2 or self.perturbed_mean.shape != shape:
            raise ValueError(
                f"perturbed_mean ({self.perturbed_mean.shape}) must be (conditions, genes) like control_mean; "
                f"pass {shape}."
            )
        if self.genes is not None and len(self.genes) != shape[1]:
            raise ValueError(f"genes ({len(self.genes)}) must be those of control_mean; pass {shape[1]}.")
        for name in ("control_noise", "perturbed_noise"):
            noise = getattr(self, name)
            if noise is not None and not (noise.shape == shape and np.isfinite(noise).all() and (noise >= 0).all()):
                raise ValueError(
                    f"{name} ({noise.shape}) must be variances, finite and not negative, of the {shape} means; leave "
                    "it out where nobody knows."
                )
        for name in ("control_mean", "perturbed_mean"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} (NaN or infinite) must be finite; drop conditions without matched controls.")
        phi = self.overdispersion
        if phi is not None and not (phi.shape == shape[1:] and np.isfinite(phi).all() and (phi >= 0).all()):
            raise ValueError(f"overdispersion ({phi.shape}) must be (genes,), finite and at least 0; pass {shape[1:]}.")
        if not (self.n_cells >= 1).all():
            raise ValueError(f"n_cells ({self.n_cells.min()}) must be at least 1; drop conditions without cells.")

    @cached_property
    def effect(self) -> np.ndarray:
        """(n, G) mean of the perturbed cells minus that of their controls."""
        return self.perturbed_mean - self.control_mean

    def parts(self, perturbation: str) -> Parts:
        """What a label stands for, whatever the order of its parts."""
        return self.notation.parse(perturbation)

    @cached_property
    def seen(self) -> list[Parts]:
        """(n,) what the labels of the conditions stand for."""
        parsed = {label: self.parts(label) for label in set(self.perturbation)}
        return [parsed[label] for label in self.perturbation]

    def condition(self, i: int) -> Condition:
        """What condition i is, whatever its dose."""
        return frozenset(_names(self.seen[i])), self.cell_type[i], self.batch[i]

    @cached_property
    def known(self) -> Known:
        """What others may be new to."""
        return Known(map(self.condition, range(len(self.perturbation))))

    @cached_property
    def _at_doses(self) -> dict[tuple[str, ...], dict[Parts, list[int]]]:
        """Conditions of each set of names, by doses."""
        found: dict[tuple[str, ...], dict[Parts, list[int]]] = {}
        for i, parts in enumerate(self.seen):
            found.setdefault(_names(parts), {}).setdefault(parts, []).append(i)
        return found

    def of_perturbation(self, parts: Parts) -> np.ndarray:
        """Conditions of this perturbation or combination, at the nearest dose that was seen; none if never seen."""
        doses = self._at_doses.get(_names(parts), {})
        if not doses:
            return np.zeros(0, dtype=np.int64)
        return np.array(doses[min(doses, key=lambda seen: (_distance(seen, parts), seen))])

    def of_context(self, cell_type: str, batch: str) -> np.ndarray:
        """Conditions of this (cell_type, batch); if it has none, of the cell type in any batch; if none either, all."""
        same_type = np.array([c == cell_type for c in self.cell_type])
        same_context = same_type & np.array([b == batch for b in self.batch])
        chosen = next((rows for rows in (same_context, same_type) if rows.any()), ~same_type)
        return np.flatnonzero(chosen)

    def context_means(self, cell_type: str, batch: str) -> tuple[np.ndarray, np.ndarray]:
        """(G,) mean effect of the conditions `of_context`, and (G,) mean of their cells; computed once a context."""
        if (cell_type, batch) not in self._context_means:
            rows = self.of_context(cell_type, batch)
            cells = np.average(self.perturbed_mean[rows], axis=0, weights=self.n_cells[rows])
            self._context_means[cell_type, batch] = self.effect[rows].mean(axis=0), cells
        return self._context_means[cell_type, batch]

    @cached_property
    def _context_means(self) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        return {}

    def control_of(self, context: Context) -> np.ndarray:
        """(G,) mean of the control cells of a context. Raises ValueError if its genes are others, or not finite."""
        mean, genes = context.control_mean, self.control_mean.shape[1]
        if len(mean) != genes:
            raise ValueError(f"control cells of {len(mean)} genes must have those of the training means; pass {genes}.")
        if not np.isfinite(mean).all():
            raise ValueError("control cells hold NaN or infinite values; give log1p values.")
        return mean

    def unseen(self, parts: Parts) -> Parts:
        """Those that no condition has, alone or in a combination."""
        return tuple(part for part in parts if part[0] not in self.known.names)

    def targets(self, parts: Parts) -> np.ndarray:
        """Columns of the genes that parts are named after, by name or symbol, rising; none where none is."""
        return np.array(sorted({self._columns[name] for name, _ in parts if name in self._columns}), dtype=np.int64)

    @cached_property
    def _columns(self) -> dict[str, int]:
        if self.genes is None:
            return {}
        symbols = {symbol: i for i, symbol in enumerate(self.genes.symbols or ()) if symbol}
        return symbols | {name: i for i, name in enumerate(self.genes.names)}

    def target_log_ratio(self, gene: int, cell_type: str) -> float | None:
        """Log-ratio of perturbed to control expression that the perturbation of a gene, by its column, has in it.

        Of expm1 of means, in the mean over the conditions of a target. In the cell type the gene's own, else the mean
        over its targets, since a screen may lower genes in one cell type and raise them in another; where it has none,
        the same of all cell types. None where no training perturbation is named after a gene that its controls express.
        """
        for ratios in (self._target_log_ratios.get(cell_type), self._target_log_ratios.get(None)):
            if ratios:
                return ratios.get(gene, float(np.mean(list(ratios.values()))))
        return None

    @cached_property
    def _target_log_ratios(self) -> dict[str | None, dict[int, float]]:
        """Of each target, by cell type; None is all of them."""
        found: dict[str | None, dict[int, list[float]]] = {}
        for i, parts in enumerate(self.seen):
            for gene in self.targets(parts).tolist():
                control, perturbed = self.control_mean[i, gene], self.perturbed_mean[i, gene]
                if control >= EXPRESSED:
                    change = log_expression(perturbed, TARGET_EPS) - log_expression(control, TARGET_EPS)
                    for cell_type in (self.cell_type[i], None):
                        found.setdefault(cell_type, {}).setdefault(gene, []).append(float(change))
        return {c: {gene: float(np.mean(of_gene)) for gene, of_gene in of.items()} for c, of in found.items()}

    @cached_property
    def ridge_fit(self) -> RidgeFit:
        """The model behind `ridge`, fitted once for all contexts."""
        return RidgeFit(self.seen, self.control_mean, self.effect)

    @cached_property
    def feature_fit(self) -> FeatureFit:
        """The model behind `features`, fitted once for all contexts."""
        contexts = zip(self.cell_type, self.batch, strict=True)
        of_contexts = np.stack([self.context_means(*context)[0] for context in contexts])
        return FeatureFit(self.tables, self.seen, self.effect - of_contexts, self.table_weights)

    @cached_property
    def fit_across_batches(self) -> LogSpaceFit:
        """The model behind `log_space`, for a batch or donor in which the perturbation was not seen."""
        contexts = list(zip(self.cell_type, self.batch, strict=True))
        return LogSpaceFit(self.seen, contexts, self.control_mean, self.perturbed_mean)

    @cached_property
    def fit_across_cell_types(self) -> LogSpaceFit:
        """The model behind `log_space`, for a cell type in which the perturbation was not seen."""
        return LogSpaceFit(self.seen, self.cell_type, self.control_mean, self.perturbed_mean)

    @cached_property
    def signal(self) -> dict[Parts, np.ndarray] | None:
        """(G,) of each perturbation: the part of its mean effect that is no noise; None where that is not known."""
        if self.control_noise is None or self.perturbed_noise is None:
            return None
        return signal(self.seen, self.effect, self.control_noise + self.perturbed_noise)

    @cached_property
    def perturbed_variation(self) -> BatchVariation | None:
        """How perturbed cells of batches differ, controls and response together; None where that is not known."""
        return self._variation(self.perturbed_mean, self.perturbed_noise)

    @cached_property
    def effect_variation(self) -> BatchVariation | None:
        """How responses of batches differ beyond what their controls do; None where that is not known."""
        if self.control_noise is None or self.perturbed_noise is None:
            return None
        return self._variation(self.effect, self.control_noise + self.perturbed_noise)

    def _variation(self, mean: np.ndarray, noise: np.ndarray | None) -> BatchVariation | None:
        found = None if noise is None else BatchVariation(self.seen, self.cell_type, mean, noise)
        return found if found is not None and found.known else None

    @cached_property
    def learned(self) -> dict[str, Any]:
        """What predictors learned of these conditions, by what it is; kept for the next context."""
        return {}


@dataclass(frozen=True, eq=False)
class Context:
    """What is asked for: a perturbation, where, and the control cells there. Raises ValueError if there is no cell."""

    perturbation: str
    cell_type: str
    batch: str
    control: np.ndarray  # (k, G) log1p values of the control cells that predictions start from

    def __post_init__(self) -> None:
        if self.control.ndim != 2 or len(self.control) == 0:
            raise ValueError(
                f"control ({self.control.shape}) must be a non-empty array (cells, genes); keep control cells."
            )

    @cached_property
    def control_mean(self) -> np.ndarray:
        """(G,) float64."""
        mean: np.ndarray = self.control.mean(axis=0, dtype=np.float64)
        return mean


Predictor = Callable[[TrainingMeans, Context], np.ndarray | None]
"""(G,) shift of the mean in log1p space, or None where it says nothing of such a context."""


def _names(parts: Parts) -> tuple[str, ...]:
    return tuple(name for name, _ in parts)


def _distance(parts: Parts, others: Parts) -> float:
    """Between the doses of the same names, on a log scale; no dose is dose 1."""
    return sum(abs(math.log((a or 1.0) / (b or 1.0))) for (_, a), (_, b) in zip(parts, others, strict=True))
