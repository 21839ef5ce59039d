"""Several predictors of means as one, weighted by how they predict training conditions that are left out.

n = training conditions, P = predictors, G = genes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perturbdiff.data.rng import numpy_generator
from perturbdiff.means.newness import Condition, Known
from perturbdiff.means.shifts import others_mean
from perturbdiff.means.training import Context, Predictor, TrainingMeans

MOST_FOLDS = 8  # of contexts
MOST_PERTURBATIONS = 32  # left out one by one: they differ more than contexts do
MOST_CONDITIONS = 200  # that weights are learned from: those of some perturbations, drawn by a fixed seed
RIDGE = 1e-6  # of the mean square of a prediction: predictors that say the same share their weight


@dataclass(frozen=True, eq=False)
class LeftOut:
    """What was said of a condition that was left out, and what was measured: sums over genes of products.

    fold
        That it was left out with.
    said
        Predictors that said something; the shifts of the others are 0.
    gram, cross
        (P, P) of shifts with each other, (P,) with the measured effect.
    centred
        (P + 2, P + 2) of the shifts, the measured effect and the reference (`others_mean`), less their gene means.
    n_genes
        That sums are over.
    n_cells
        That measured it.
    """

    fold: int
    said: frozenset[str]
    gram: np.ndarray
    cross: np.ndarray
    centred: np.ndarray
    n_genes: int
    n_cells: int


@dataclass(frozen=True, eq=False)
class Stack:
    """Predictions of conditions that were left out, and the weights that make the best of them.

    Notes
    -----
    Weights that are not negative, by least squares on left-out predictions (Breiman 1996, "Stacked regressions"),
    divided by their sum (van der Laan et al. 2007, "Super learner"): least squares alone shrinks what is noisy, and the
    mean response of a new context with it. Of perturbations and combinations that are new there is little to be known,
    and a sum of effects has the noise of all its parts: with `shrinks`, a sum under 1 stays, and the rest to 1 is no
    change.
    """

    names: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    shrinks: bool = False

    @classmethod
    def fit(
        cls,
        training: TrainingMeans,
        predictors: Mapping[str, Predictor],
        left_out: Sequence[Hashable],
        asked: Callable[[Known, Condition], bool],
        most_folds: int = MOST_FOLDS,
        shrinks: bool = False,
        place: Sequence[Hashable] | None = None,
    ) -> Stack | None:
        """Leave out conditions of the same `left_out` (n,) together, and predict those of them that are `asked`.

        The own genes of parts that the others lack are left out: a rule of its own is for these.

        Parameters
        ----------
        asked
            Whether a condition is to the known ones what is asked for: as new as that.
        place
            (n,) where conditions are, if that is to be new as well: everything there is left out with the others, and
            what is both is predicted.

        Returns
        -------
        None where there is no condition to learn from, or nobody says anything of any.
        """
        rows = _some(training)
        training = _rows(training, rows)
        labels = [(left_out[i], None if place is None else place[i]) for i in rows]
        conditions = [training.condition(i) for i in range(len(rows))]
        folds = []
        for label, where in sorted({*labels}, key=str):
            out = np.array([of == label or (where is not None and at == where) for of, at in labels])
            known = Known(conditions[i] for i in np.flatnonzero(~out))
            of_fold = [i for i, own in enumerate(labels) if own == (label, where) and asked(known, conditions[i])]
            if of_fold and not out.all():
                folds.append((out, of_fold))
        names = tuple(predictors)
        found = []
        for number in np.unique(np.linspace(0, len(folds) - 1, min(most_folds, len(folds))).astype(int)):
            out, of_fold = folds[number]
            rest = _rows(training, np.flatnonzero(~out))
            found += [_predicted(int(number), rest, predictors, training, i) for i in of_fold]
        found = [of for of in found if of.said]
        return cls(names, tuple(found), shrinks) if found else None

    def weights(self, among: Collection[str], without: int | None = None) -> dict[str, float]:
        """Of predictors that are `among` these, adding up to 1 or less; none where nothing predicts at all.

        Learned of the conditions of which all of them said something, but for a fold `without` which; where there is
        none, of those of which most of them did, and the others get no weight.
        """
        used = [of for of in self.left_out if of.fold != without]
        together = max((of.said & {*among} for of in used), key=lambda of: (len(of), sorted(of)), default=frozenset())
        chosen = [i for i, name in enumerate(self.names) if name in together]
        of_all = [of for of in used if together <= of.said]
        if not chosen:
            return {}
        gram = np.sum([of.gram for of in of_all], axis=0)[np.ix_(chosen, chosen)]
        cross = np.sum([of.cross for of in of_all], axis=0)[chosen]
        if not gram.any():
            return {}
        from scipy.optimize import nnls  # a sixth of a second that predictions from controls do without

        # |L' w - L^-1 cross|^2 has the minimum of w' gram w - 2 w' cross.
        root = np.linalg.cholesky(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)))
        best = nnls(root.T, np.linalg.solve(root, cross))[0]
        total = max(best.sum(), 1.0) if self.shrinks else best.sum()
        return {self.names[i]: float(w / total) for i, w in zip(chosen, best, strict=True) if w > 0} if total else {}


def _predicted(
    fold: int, rest: TrainingMeans, predictors: Mapping[str, Predictor], training: TrainingMeans, i: int
) -> LeftOut:
    """Condition i of `training`, that `rest` lacks."""
    context = Context(training.perturbation[i], training.cell_type[i], training.batch[i], training.control_mean[[i]])
    said = {name: predict(rest, context) for name, predict in predictors.items()}
    told = {name: shift for name, shift in said.items() if shift is not None}
    nothing = np.zeros(len(training.effect[i]))
    every = np.stack(
        [*(told.get(name, nothing) for name in predictors), training.effect[i], others_mean(rest, context)]
    )
    every = np.delete(every, rest.targets(rest.unseen(training.seen[i])), axis=1)
    gram = every @ every.T
    centred = every - every.mean(axis=1, keepdims=True) if every.shape[1] else every
    n = len(predictors)
    n_cells = int(training.n_cells[i])
    return LeftOut(fold, frozenset(told), gram[:n, :n], gram[:n, n], centred @ centred.T, every.shape[1], n_cells)


def _rows(training: TrainingMeans, rows: np.ndarray) -> TrainingMeans:
    return replace(
        training,
        perturbation=[training.perturbation[i] for i in rows],
        cell_type=[training.cell_type[i] for i in rows],
        batch=[training.batch[i] for i in rows],
        control_mean=training.control_mean[rows],
        perturbed_mean=training.perturbed_mean[rows],
        n_cells=training.n_cells[rows],
        control_noise=None if training.control_noise is None else training.control_noise[rows],
        perturbed_noise=None if training.perturbed_noise is None else training.perturbed_noise[rows],
    )


def _some(training: TrainingMeans) -> np.ndarray:
    """Rows of some perturbations, and of the parts of combinations among them."""
    if len(training.perturbation) <= MOST_CONDITIONS:
        return np.arange(len(training.perturbation))
    of_label: dict[str, list[int]] = {}
    for i, label in enumerate(training.perturbation):
        of_label.setdefault(label, []).append(i)
    labels = sorted(of_label)
    chosen: set[int] = set()
    for k in numpy_generator(0, "stacked means").permutation(len(labels)).tolist():
        rows = {*of_label[labels[k]]}
        for part in training.parts(labels[k]):
            rows |= {*training.of_perturbation((part,)).tolist()}
        if len(chosen | rows) > MOST_CONDITIONS and chosen:
            break
        chosen |= rows
    return np.array(sorted(chosen))
