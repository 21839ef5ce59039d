"""Several predictors of means as one, weighted by how they predict training conditions that are left out.

n = training conditions, P = predictors, G = genes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perturbdiff.data.notation import Parts
from perturbdiff.data.rng import numpy_generator
from perturbdiff.means.training import Context, Predictor, TrainingMeans

MOST_FOLDS = 8  # of contexts
MOST_PERTURBATIONS = 32  # left out one by one: they differ more than contexts do
MOST_CONDITIONS = 200  # that weights are learned from: those of some perturbations, drawn by a fixed seed
RIDGE = 1e-6  # of the mean square of a prediction: predictors that say the same share their weight


@dataclass(frozen=True, eq=False)
class Stack:
    """Products of left-out predictions with each other and with what was measured, summed over conditions and genes.

    Notes
    -----
    Weights that are not negative, by least squares on left-out predictions (Breiman 1996, "Stacked regressions"),
    divided by their sum (van der Laan et al. 2007, "Super learner"): least squares alone shrinks what is noisy, and the
    mean response of a new context with it. Of perturbations that are new there is little to be known: with `shrinks`,
    a sum under 1 stays, and the rest to 1 is no change.
    """

    names: tuple[str, ...]
    products: dict[frozenset[str], tuple[np.ndarray, np.ndarray]]  # who said something -> (P, P) and (P,), 0 of others
    shrinks: bool = False

    @classmethod
    def fit(
        cls,
        training: TrainingMeans,
        predictors: Mapping[str, Predictor],
        left_out: Sequence[Hashable],
        asked: Callable[[TrainingMeans, Parts, str], bool],
        most_folds: int = MOST_FOLDS,
        shrinks: bool = False,
    ) -> Stack | None:
        """Leave out conditions of the same `left_out` (n,) together, and predict those of them that are `asked`.

        The own genes of parts that the others lack are left out: a rule of its own is for these.

        Parameters
        ----------
        asked
            Whether parts in a cell type are to the other conditions what is asked for: as new as that.

        Returns
        -------
        None where there is no condition to learn from, or nobody says anything of any.
        """
        training, left_out = _some(training, left_out)
        groups = sorted(set(left_out), key=str)
        chosen = [groups[i] for i in np.unique(np.linspace(0, len(groups) - 1, most_folds).astype(int))]
        names = tuple(predictors)
        products: dict[frozenset[str], tuple[np.ndarray, np.ndarray]] = {}
        for fold in chosen if len(groups) > 1 else ():
            out = np.array([label == fold for label in left_out])
            rest = _rows(training, np.flatnonzero(~out))
            for i in np.flatnonzero(out).tolist():
                if not asked(rest, training.seen[i], training.cell_type[i]):
                    continue
                context = Context(
                    training.perturbation[i], training.cell_type[i], training.batch[i], training.control_mean[[i]]
                )
                said = {name: predict(rest, context) for name, predict in predictors.items()}
                told = {name: shift for name, shift in said.items() if shift is not None}
                shifts = np.stack([told.get(name, np.zeros(len(training.effect[i]))) for name in names])
                effect = training.effect[i].copy()
                own = rest.targets(rest.unseen(training.seen[i]))
                shifts[:, own], effect[own] = 0, 0
                gram, cross = products.get(frozenset(told), (0, 0))
                products[frozenset(told)] = gram + shifts @ shifts.T, cross + shifts @ effect
        products.pop(frozenset(), None)
        return cls(names, products, shrinks) if products else None

    def weights(self, among: Sequence[str]) -> dict[str, float]:
        """Of predictors that are `among` these, adding up to 1 or less; none where nothing predicts at all.

        Learned of the conditions of which all of them said something; where there is none, of those of which most of
        them did, and the others get no weight.
        """
        together = max((said & {*among} for said in self.products), key=lambda of: (len(of), sorted(of)))
        chosen = [i for i, name in enumerate(self.names) if name in together]
        of_all = [of for said, of in self.products.items() if together <= said]
        gram = np.sum([gram for gram, _ in of_all], axis=0)[np.ix_(chosen, chosen)]
        cross = np.sum([cross for _, cross in of_all], axis=0)[chosen]
        if not chosen or not gram.any():
            return {}
        from scipy.optimize import nnls  # a sixth of a second that predictions from controls do without

        # |L' w - L^-1 cross|^2 has the minimum of w' gram w - 2 w' cross.
        root = np.linalg.cholesky(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)))
        found = nnls(root.T, np.linalg.solve(root, cross))[0]
        total = max(found.sum(), 1.0) if self.shrinks else found.sum()
        return {self.names[i]: float(w / total) for i, w in zip(chosen, found, strict=True) if w > 0} if total else {}


def _rows(training: TrainingMeans, rows: np.ndarray) -> TrainingMeans:
    return replace(
        training,
        perturbation=[training.perturbation[i] for i in rows],
        cell_type=[training.cell_type[i] for i in rows],
        batch=[training.batch[i] for i in rows],
        control_mean=training.control_mean[rows],
        perturbed_mean=training.perturbed_mean[rows],
        n_cells=training.n_cells[rows],
    )


def _some(training: TrainingMeans, left_out: Sequence[Hashable]) -> tuple[TrainingMeans, Sequence[Hashable]]:
    if len(left_out) <= MOST_CONDITIONS:
        return training, left_out
    labels = sorted(set(training.perturbation))
    order = numpy_generator(0, "stacked means").permutation(len(labels))
    chosen: set[str] = set()
    n_cells = dict(zip(*np.unique(training.perturbation, return_counts=True), strict=True))
    n = 0
    for i in order.tolist():
        if n + n_cells[labels[i]] > MOST_CONDITIONS and chosen:
            break
        chosen.add(labels[i])
        n += int(n_cells[labels[i]])
    rows = np.array([i for i, label in enumerate(training.perturbation) if label in chosen])
    return _rows(training, rows), [left_out[i] for i in rows]
