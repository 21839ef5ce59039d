"""What the populations of one prediction have of their own: each is of one batch, whose cells differ together.

What differs is drawn once a population, from what training saw of batches (`BatchVariation`), as far as the control
cells leave it open. K = populations, G = genes. log1p space.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

import numpy as np

from perturbdiff.data.notation import Parts
from perturbdiff.means.training import TrainingMeans

# How populations differ, for people.
NOT_ASKED = "only by their cells: each is of the mean over batches"
NOT_KNOWN = "only by their cells: how batches differ is not known"
OF_ITS_BATCH = "only by their cells: this batch was trained with the perturbation"
OF_BATCHES = "as batches do: each is one draw, not their mean"
OF_RESPONSES = "as responses of batches with such controls do: each is one draw, not their mean"


@dataclass(frozen=True, eq=False)
class PopulationDraws:
    """How the populations of one perturbation in one cell type differ.

    of_population
        (K, G) how each one's mean differs from their common mean; None where only their cells differ.
    effect
        (G,) that their common mean is from that of the controls, where populations are of trained batches; None where
        it is what the model predicts.
    within
        (G,) of what cells of all these batches mixed differ by from their mean, the part that those of one batch do:
        the square root of their share of the variance. None with `effect`.
    how
        In words.
    """

    how: str
    of_population: np.ndarray | None = None
    effect: np.ndarray | None = None
    within: np.ndarray | None = None

    def of_genes(self, genes: np.ndarray) -> PopulationDraws:
        """Those that differ in some genes alone, (G,) bool."""
        drawn = self.of_population
        return self if drawn is None else replace(self, of_population=np.where(genes, drawn, 0.0))


def population_draws(
    training: TrainingMeans | None,
    perturbation: Parts,
    cell_type: str,
    batches: Set[str | None],
    own_batches: Set[str],
    n_populations: int,
    seed: int,
) -> PopulationDraws:
    """Draws for control cells of these batches; None among them is of those whose batch nobody says.

    Of one batch that was trained with the perturbation, none: the prediction is of that batch. Of one other batch, what
    its controls leave open: how responses differ. Of several batches or an unsaid one, how perturbed cells of batches
    differ, around the mean of those that were trained.

    Parameters
    ----------
    own_batches
        Those that the model knows by name; none where it was trained without.
    """
    variation = None if training is None else training.perturbed_variation
    if training is None or variation is None:
        return PopulationDraws(NOT_KNOWN)
    same = training.of_perturbation(perturbation)
    here = np.array([i for i in same if training.cell_type[i] == cell_type], dtype=np.int64)
    seen = training.seen[same[0]] if len(same) else perturbation  # at the nearest dose
    how, effect, within = OF_BATCHES, None, None
    if len(batches) == 1 and (batch := next(iter(batches))) is not None:
        if batch in own_batches and batch in {training.batch[i] for i in here}:
            return PopulationDraws(OF_ITS_BATCH)
        how, variation = OF_RESPONSES, training.effect_variation or variation
    elif len(here):
        effect = training.effect[here].mean(axis=0)
        assert training.perturbed_noise is not None, "there is a variation of it"
        of_cells = (training.perturbed_noise[here] * training.n_cells[here, None]).mean(axis=0)
        both = of_cells + variation.variance(seen)
        within = np.sqrt(np.divide(of_cells, both, out=np.ones(len(both)), where=both > 0))
    return PopulationDraws(how, variation.draw(seen, n_populations, seed), effect, within)
