"""Several perturbations predicted from the same control cells: what they start from, how populations differ, the cells.

What all of them share is made once, and sets of several small ones are denoised together.
K = populations, G = genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from perturbdiff.config import ModelConfig, SamplingConfig
from perturbdiff.data.batch import Moves
from perturbdiff.data.expression import gene_means
from perturbdiff.data.samplers import CellSet
from perturbdiff.data.screen import Expression
from perturbdiff.data.vocab import Vocabularies
from perturbdiff.diffusion.generate import (
    MAX_VALUES_PER_CHUNK,
    Change,
    Context,
    ControlPool,
    assign_sets,
    choose_controls,
)
from perturbdiff.files import progress
from perturbdiff.means.populations import NOT_ASKED, PopulationDraws, population_draws
from perturbdiff.means.predictors import Start, response_kept, start_shift
from perturbdiff.means.shifts import moves
from perturbdiff.means.training import Context as Asked
from perturbdiff.means.training import TrainingMeans
from perturbdiff.means.trust import Trust, least, trust
from perturbdiff.nn.denoiser import Denoiser

if TYPE_CHECKING:
    from tqdm import tqdm

MAX_PILOT_CELLS = 128  # predicted to know their mean


@dataclass(frozen=True, eq=False)
class Wanted:
    """A perturbation, and how many cells of it; as many as there are controls if None."""

    perturbation: str
    n_cells: int | None = None


@dataclass(frozen=True, eq=False)
class Generated:
    """Cells of one perturbation.

    X
        (n, G) log1p values.
    one
        (n,) the log1p value of one count in each; None where they are not drawn as counts.
    source, population
        (n,) the control that each started from, and its population.
    differ
        How populations differ, in words.
    trust
        Of the context where it is known least, as `Trust.as_uns`.
    """

    X: sparse.csr_matrix
    one: np.ndarray | None
    source: np.ndarray
    population: np.ndarray
    differ: str
    trust: dict[str, Any]


class Generation:
    """Predictions from the same control cells.

    Parameters
    ----------
    means
        Of the training conditions; None where training left none.
    expression, contexts
        Of the controls, in the model's genes; their cell types and batches, whatever they are called.
    measured
        (G,) genes that the controls have.
    varied
        Whether populations are draws of batches.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        vocabularies: Vocabularies,
        config: ModelConfig,
        means: TrainingMeans | None,
        expression: Expression,
        contexts: Sequence[Context],
        measured: np.ndarray,
        sampling: SamplingConfig,
        n_populations: int,
        seed: int,
        varied: bool,
    ) -> None:
        self._vocabularies, self._config, self._means = vocabularies, config, means
        self._expression, self._contexts, self._measured = expression, contexts, measured
        self._denoiser, self._sampling, self._weight = denoiser, sampling, sampling.network_weight
        self._n_populations, self._seed, self._varied = n_populations, seed, varied
        # Older models keep what they predicted.
        self._to_mean = not varied and sampling.draw_counts and sampling.whole_counts
        cell_types, batches = vocabularies.cell_types.ids, vocabularies.batches.ids
        self._known = [(c if c in cell_types else None, b if b in batches else None) for c, b in contexts]
        _, self._conditions = assign_sets(self._known, [], config.set_size)
        self._sources: dict[tuple[int | None, int, bool], np.ndarray] = {}
        self._parts: dict[int | None, list[Change | None]] = {}
        self._pilots: dict[str | None, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def _pool(self) -> ControlPool:
        overdispersion = None if self._means is None else self._means.overdispersion
        return ControlPool(self._denoiser, self._expression, self._config, self._sampling, overdispersion)

    def trust(self, perturbation: str) -> Trust | None:
        """Of the context where it is known least; None where training left no means."""
        return self._trust(self._asked(perturbation))

    def each(self, wanted: Sequence[Wanted], bar: tqdm[Any]) -> Iterator[Generated]:
        """One perturbation after the other: each has the cells that it has alone, to rounding."""
        several: list[Wanted] = []
        for number, of in enumerate(wanted):
            several.append(of)
            n_values = sum(map(self._n_cells, several)) * len(self._expression.genes)
            if number + 1 == len(wanted) or n_values >= MAX_VALUES_PER_CHUNK:
                yield from self._together(several, bar)
                several = []

    def _n_cells(self, of: Wanted) -> int:
        return (of.n_cells or len(self._expression)) * self._n_populations

    def _together(self, wanted: Sequence[Wanted], bar: tqdm[Any]) -> Iterator[Generated]:
        # Condition i of what is denoised is perturbation i // n in context i % n.
        names, n = [of.perturbation for of in wanted], len(self._conditions)
        labels = self._vocabularies.encode([(name, *context) for name in names for context in self._conditions])
        asked = [self._asked(name) for name in names]
        moved = self._moves(asked)
        drawn = [self._draws(name) if self._varied else {} for name in names]
        pilots = self._pilot_sets(drawn)
        with progress(len(pilots), "predict", "cell", shown=False) as unseen:
            nothing = [Change(np.zeros((1, len(self._measured))))] * len(names) * n
            found = self._pool.denoise(pilots, labels, moved, nothing, 0, unseen)[0] if pilots else None
        if self._to_mean:
            changes = [change for of in wanted for change in self._to_mean_of_all(of)]
        else:
            changes = self._changes(drawn, pilots, found)
        sets = [self._sets(of, i, draws) for i, (of, draws) in enumerate(zip(wanted, drawn, strict=True))]
        X, one = self._pool.denoise(
            [own for of in sets for own in of], labels, moved, changes, self._seed, bar, self._to_mean
        )
        end = 0
        for own, draws, of in zip(sets, drawn, asked, strict=True):
            told = self._trust(of)
            start, end = end, end + sum(len(each.rows) for each in own)
            yield Generated(
                X[start:end],
                None if one is None else one[start:end],
                np.concatenate([each.rows for each in own]),
                np.concatenate([np.full(len(each.rows), each.key[0]) for each in own]),
                "; ".join(sorted({each.how for each in draws.values()})) or NOT_ASKED,
                {"verdict": ""} if told is None else told.as_uns(),
            )

    @cached_property
    def _control_means(self) -> list[np.ndarray]:
        """(G,) by condition of the controls."""
        return [
            gene_means(self._expression.log1p(np.flatnonzero([own == context for own in self._known])))
            for context in self._conditions
        ]

    def _asked(self, perturbation: str) -> list[Asked]:
        """In each context; none where training left no means."""
        if self._means is None:
            return []
        contexts = zip(self._conditions, self._control_means, strict=True)
        return [Asked(perturbation, c or "unknown", b or "unknown", mean[None]) for (c, b), mean in contexts]

    def _trust(self, asked: Sequence[Asked]) -> Trust | None:
        return None if self._means is None else least([trust(self._means, of) for of in asked])

    def _moves(self, asked: Sequence[Sequence[Asked]]) -> Moves | None:
        """Where sets of the conditions start; None where from controls as they are."""
        start = self._config.diffusion.start
        if self._means is None or (start == "controls" and self._weight == 1):
            return None
        starts: list[Start] = [start] if start == "mean" or self._weight == 1 else [start, "mean"]
        every = [of for several in asked for of in several]
        found = [[moves(of.control_mean, start_shift(self._means, of, name)) for of in every] for name in starts]
        kept = [response_kept(self._means, of.perturbation) if start == "target" else 1.0 for of in every]
        controls, *rest = (np.stack(of_start).astype(np.float32) for of_start in found)
        return Moves(controls, np.array(kept, dtype=np.float32), *rest)

    def _draws(self, perturbation: str) -> dict[str | None, PopulationDraws]:
        """Of each cell type that the model tells apart; nothing of genes that were not measured."""
        known, batches = self._vocabularies.cell_types.ids, dict[str | None, set[str | None]]()
        for cell_type, batch in self._contexts:
            batches.setdefault(cell_type if cell_type in known else None, set()).add(batch)
        parts, own = self._vocabularies.parts(perturbation), set(self._vocabularies.batches.names)
        return {
            cell_type: population_draws(
                self._means, parts, cell_type or "unknown", of, own, self._n_populations, self._seed
            ).of_genes(self._measured)
            for cell_type, of in batches.items()
        }

    def _sets(self, of: Wanted, number: int, draws: dict[str | None, PopulationDraws]) -> list[CellSet]:
        # A population that is measured is not of cells that were chosen by their mean.
        return self._assigned(self._chosen(of.n_cells, not _differ(draws)), number)

    def _chosen(self, n_cells: int | None, representative: bool) -> list[np.ndarray]:
        """The controls that each population starts from."""
        for k in range(self._n_populations):
            key = n_cells, k, representative
            if key not in self._sources:
                self._sources[key] = choose_controls(self._expression, n_cells, self._seed, k, representative)
        return [self._sources[n_cells, k, representative] for k in range(self._n_populations)]

    def _to_mean_of_all(self, of: Wanted) -> list[Change | None]:
        """By condition: what a part of its controls differs from all of them by, which predicted cells would too."""
        if of.n_cells not in self._parts:
            found: list[Change | None] = []
            for context, mean in zip(self._conditions, self._control_means, strict=True):
                here = np.array([own == context for own in self._known])
                by = np.zeros((self._n_populations, len(mean)))
                for k, source in enumerate(self._chosen(of.n_cells, True)):
                    if len(rows := source[here[source]]):
                        by[k] = mean - gene_means(self._expression.log1p(rows))
                found.append(Change(by, drawn=False) if by.any() else None)
            self._parts[of.n_cells] = found
        return self._parts[of.n_cells]

    def _assigned(self, sources: Sequence[np.ndarray], number: int) -> list[CellSet]:
        first = number * len(self._conditions)
        sets, _ = assign_sets(self._known, sources, self._config.set_size)
        return [replace(own, condition=first + own.condition) for own in sets]

    def _pilot(self, cell_type: str | None) -> tuple[np.ndarray, np.ndarray]:
        """Controls of a cell type that are predicted to know their mean, and (G,) the mean of all of them."""
        if cell_type not in self._pilots:
            here = np.flatnonzero([name == cell_type for name, _ in self._known])
            X, library_size = self._expression.X[here], self._expression.library_size[here]
            controls = replace(self._expression, X=X, library_size=library_size)
            chosen = here[choose_controls(controls, min(MAX_PILOT_CELLS, len(here)), 0, 0)]
            self._pilots[cell_type] = chosen, gene_means(controls.log1p())
        return self._pilots[cell_type]

    def _pilot_sets(self, drawn: Sequence[dict[str | None, PopulationDraws]]) -> list[CellSet]:
        """Cells that are predicted for their mean, always the same ones: of a population of any seed and number the
        move is one."""
        return [
            own
            for number, draws in enumerate(drawn)
            for cell_type, of in draws.items()
            if of.of_population is not None and of.effect is not None
            for own in self._assigned([self._pilot(cell_type)[0]], number)
        ]

    def _changes(
        self, drawn: Sequence[dict[str | None, PopulationDraws]], pilots: Sequence[CellSet], found: Any
    ) -> list[Change | None]:
        """By condition: the draws, and what takes the mean of predicted cells to where these are drawn around."""
        # Where training mixed batches, predicted cells do too, but those that start from the mean of their own.
        mixed = not len(self._vocabularies.batches) and self._config.diffusion.start != "mean" and self._weight == 1
        changes: list[Change | None] = []
        end = 0
        for draws in drawn:
            by_type: dict[str | None, Change] = {}
            for cell_type, of in draws.items():
                by = (
                    np.zeros((self._n_populations, len(self._measured)))
                    if of.of_population is None
                    else of.of_population
                )
                if of.of_population is not None and of.effect is not None:
                    chosen, control_mean = self._pilot(cell_type)
                    start, end = end, end + len(chosen)
                    wanted = np.maximum(control_mean + of.effect, 0)
                    by = by + np.where(self._measured, wanted - gene_means(found[start:end]), 0)
                by_type[cell_type] = Change(by, of.within if mixed else None)
            changes += [by_type[cell_type] if _differ(draws) else None for cell_type, _ in self._conditions]
        return changes


def _differ(draws: dict[str | None, PopulationDraws]) -> bool:
    return any(of.of_population is not None for of in draws.values())
