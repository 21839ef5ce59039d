"""Whether a response can be told at all: how well those of training conditions that are as new were, left out.

A perturbation is known where more is told of it than what all perturbations do. So the mean response of the others
(`others_mean`) is taken out of what is predicted and of what was measured, and of what is left

    r = Pearson correlation over genes of predicted and measured                                               (1)

which is a partial correlation; in a screen of one perturbation nothing is taken out. What is predicted is what
`stacked` says; the own genes of parts that were never seen do not count. A shift that is only a part of the mean of the
others has r = 0: nothing is told of the perturbation itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from perturbdiff.means.newness import New
from perturbdiff.means.predictors import newness_of, stack_for, weighed
from perturbdiff.means.shifts import others_mean
from perturbdiff.means.stack import LeftOut, Stack
from perturbdiff.means.training import Context, TrainingMeans

LEVEL = 0.9  # of the range of r
LEAST_R = 0.1  # a hundredth of the variance: less is told by the noise of the others' mean, which predictors share
LEAST_CELLS = 20  # fewer measure a left-out condition too badly to say how it was told
FROM_SIZES = 8  # left-out conditions from which on the size of a response counts
NOTHING = 1e-6  # of the size of a shift, that is left beyond the mean of the others by rounding
MOST_R = 0.999  # whose atanh is finite

Verdict = Literal["trained", "known", "cannot tell"]


@dataclass(frozen=True)
class Trust:
    """What is expected of the prediction of a condition.

    verdict
        trained: this very condition was, at this dose. known: the lower end of the range of r is above LEAST_R. cannot
        tell: it is not, or nothing as new can be left out.
    new
        How it is new to the training conditions; None if it was trained.
    expected_pearson
        r of Eq. 1; NaN where nobody can say.
    low, high
        The range that holds r of a condition as new, and told to be as large, in LEVEL of cases.
    n_left_out
        Training conditions that say so.
    """

    verdict: Verdict
    new: New | None
    expected_pearson: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n_left_out: int = 0

    def as_uns(self) -> dict[str, str | float | int]:
        """What is known of its fields, for files that know neither None nor NaN."""
        return {name: of for name, of in asdict(self).items() if of is not None and of == of}


def trust(training: TrainingMeans, context: Context) -> Trust:
    """What is expected of the prediction of a condition, by training conditions that are left out.

    atanh(r) of these, normal by Fisher, is a line in the logarithm of the size of what was told beyond the others, from
    FROM_SIZES of them on: large responses are told better. With fewer it is their mean. The range is that of one
    further condition (Student's t). Of a combination with a part that nobody saw, nothing is said.
    """
    parts = training.parts(context.perturbation)
    same = zip(training.seen, training.cell_type, training.batch, strict=True)
    if (parts, context.cell_type, context.batch) in same:
        return Trust("trained", None)
    new = newness_of(training, context)
    stack = stack_for(training, new)
    in_part = 0 < len(training.unseen(parts)) < len(parts)
    if stack is None or in_part or (shift := weighed(training, context, stack)) is None:
        return Trust("cannot tell", new)
    if (known := f"told of {new}") not in training.learned:
        left_out = [of for of in stack.left_out if of.n_cells >= LEAST_CELLS]
        training.learned[known] = np.array([_told(stack, of) for of in left_out]).reshape(-1, 2)
    told = training.learned[known]
    sizes, found = told[told[:, 0] > 0].T  # of which something was told
    size = _size_beyond(training, context, shift)
    if size == 0:
        return Trust("cannot tell", new, 0.0, 0.0, 0.0, len(sizes))
    expected, low, high = expected_r(sizes, found, size)
    return Trust("known" if low > LEAST_R else "cannot tell", new, expected, low, high, len(sizes))


def expected_r(sizes: np.ndarray, r: np.ndarray, size: float) -> tuple[float, float, float]:
    """r of a prediction of this size, and its range, from (n,) sizes and r of others; NaN of fewer than two.

    Beyond the sizes of the others, r is that of the nearest.
    """
    n, z = len(r), np.arctanh(np.clip(r, -MOST_R, MOST_R))
    x = np.log(sizes)
    by_size = n >= FROM_SIZES and x.min() < x.max()
    design = np.stack([np.ones(n), x - x.mean()], axis=1) if by_size else np.ones((n, 1))
    degrees = n - design.shape[1]
    if degrees < 1:
        return math.nan, math.nan, math.nan
    here = np.array([1.0, np.clip(math.log(size), x.min(), x.max()) - x.mean()])[: design.shape[1]]
    inverse = np.linalg.inv(design.T @ design)
    line = inverse @ design.T @ z
    variance = np.square(z - design @ line).sum() / degrees
    half = stdtrit(degrees, (1 + LEVEL) / 2) * math.sqrt(variance * (1 + here @ inverse @ here))
    low, expected, high = np.tanh(here @ line + np.array([-half, 0, half])).tolist()
    return expected, low, high


def least(of_contexts: Sequence[Trust]) -> Trust:
    """Of a condition in several contexts, the one that is known least; at least one of them."""
    order: list[Verdict] = ["cannot tell", "known", "trained"]
    return min(of_contexts, key=lambda of: (order.index(of.verdict), of.low if math.isfinite(of.low) else -1.0))


def _told(stack: Stack, of: LeftOut) -> tuple[float, float]:
    """Size of what was told of a left-out condition beyond the mean of the others, and r; by weights without it."""
    weights = stack.weights(of.said, without=of.fold)
    shift = np.array([weights.get(name, 0.0) for name in stack.names])
    products = of.centred
    if (of_reference := products[-1, -1]) > 0:
        products = products - np.outer(products[-1], products[-1]) / of_reference
    n = len(shift)
    square, whole = shift @ products[:n, :n] @ shift, shift @ of.centred[:n, :n] @ shift
    if not square > NOTHING**2 * whole:
        return 0.0, 0.0
    measured = products[n, n]
    r = shift @ products[:n, n] / math.sqrt(square * measured) if measured > 0 else 0.0
    return math.sqrt(square / of.n_genes), float(r)


def _size_beyond(training: TrainingMeans, context: Context, shift: np.ndarray) -> float:
    """Root mean square over genes of a (G,) shift, less its mean, beyond the mean of the others."""
    both = np.stack([shift, others_mean(training, context)])
    both = np.delete(both, training.targets(training.unseen(training.parts(context.perturbation))), axis=1)
    told, others = both - both.mean(axis=1, keepdims=True)
    square = others @ others
    beyond = told - others * (told @ others / square) if square > 0 else told
    size = float(np.sqrt(np.square(beyond).mean()))
    return size if size > NOTHING * float(np.sqrt(np.square(told).mean())) else 0.0
