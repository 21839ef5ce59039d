"""How a mean response differs from batch to batch: random effects of batches, drawn once for a whole population.

Of a perturbation p in a cell type c and a batch b, the mean over finitely many cells is

    y_pcb = m_pc + u_pcb + e_pcb,   u ~ N(0, S_p),   e of variance noise_pcb in each gene                           (1)

With nu_p residuals that are free (the batches of each cell type less one), R_p their matrix around the means of their
cell types, and noise_p the noise within it,

    S_p = w_p D_p (R_p' R_p / nu_p) D_p + (1 - w_p) the same of all perturbations together,                         (2)
    D_p = sqrt(max(0, 1 - noise_p / diag(R_p' R_p / nu_p)))

so that the variance of each gene is without the noise of finitely many cells. A variance of nu_p normal residuals has a
relative variance of 2 / nu_p; with tau^2 the relative variance that those of perturbations have beyond it,
w_p = tau^2 / (tau^2 + 2 / nu_p) (linear empirical Bayes; Robbins 1983, Annals of Statistics 11:713).

n = conditions, G = genes, K = populations. log1p space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import ndtri

from perturbdiff.data.notation import Parts
from perturbdiff.data.rng import numpy_generator

SOBOL_BITS = 30  # of a point, which is between 0 and 1


@dataclass(frozen=True)
class _Residuals:
    """rows: (m, G) around the means of cell types. free: nu. noise: (G,) of finitely many cells in the variance."""

    rows: np.ndarray
    free: int
    noise: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """(G,) of batches and of finitely many cells together."""
        variance: np.ndarray = np.square(self.rows).sum(axis=0) / self.free
        return variance

    @property
    def between(self) -> np.ndarray:
        """(G,) variance of batches alone."""
        return np.maximum(self.variance - self.noise, 0)

    @cached_property
    def axes(self) -> np.ndarray:
        """(r, G) principal axes of Eq. 2's covariance, the longest first: their products sum to it."""
        variance = self.variance
        part = np.divide(self.between, variance, out=np.zeros(len(variance)), where=variance > 0)
        rows = self.rows * np.sqrt(part / self.free)
        if len(rows) <= rows.shape[1]:
            axes = np.linalg.eigh(rows @ rows.T)[1].T[::-1] @ rows
        else:
            squares, directions = np.linalg.eigh(rows.T @ rows)
            axes = (directions * np.sqrt(np.maximum(squares, 0))).T[::-1]
        largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1)
        signed: np.ndarray = axes * np.where(largest < 0, -1, 1)  # which of two signs an axis has, libraries choose
        return signed


class BatchVariation:
    """Eq. 2 of training conditions.

    Parameters
    ----------
    perturbation, cell_type
        (n,) what each condition is of; each has another batch than the others of its perturbation and cell type.
    mean, noise
        (n, G) a mean over cells, and its variance as far as cells are finitely many.

    Attributes
    ----------
    known
        Whether a perturbation has two batches of a cell type anywhere: else nobody knows how batches differ.
    weight
        By perturbation, w_p. Those without two batches of a cell type have none, and vary as all together do.
    """

    def __init__(
        self, perturbation: Sequence[Parts], cell_type: Sequence[str], mean: np.ndarray, noise: np.ndarray
    ) -> None:
        groups: dict[Parts, dict[str, list[int]]] = {}
        for i, (parts, where) in enumerate(zip(perturbation, cell_type, strict=True)):
            groups.setdefault(parts, {}).setdefault(where, []).append(i)
        self._of: dict[Parts, _Residuals] = {}
        for parts, by_type in groups.items():
            several = [rows for rows in by_type.values() if len(rows) > 1]
            if free := sum(len(rows) - 1 for rows in several):
                residuals = np.concatenate([mean[rows] - mean[rows].mean(axis=0) for rows in several])
                # A residual of m batches holds 1 - 1/m of its own noise, and of the others the rest.
                within = sum(noise[rows].sum(axis=0) * (1 - 1 / len(rows)) for rows in several)
                self._of[parts] = _Residuals(residuals, free, np.asarray(within) / free)
        self.known = bool(self._of)
        self.weight: dict[Parts, float] = {}
        if not self.known:
            return
        of_all, free = list(self._of.values()), sum(own.free for own in self._of.values())
        noise_of_all = np.sum([own.noise * own.free for own in of_all], axis=0) / free
        self._all = _Residuals(np.concatenate([own.rows for own in of_all]), free, noise_of_all)
        pooled = self._all.variance
        scale = float(np.square(pooled).sum())
        beyond = [
            (np.square(own.variance - pooled).sum() / scale - 2 / own.free * (1 - own.free / free)) if scale > 0 else 0
            for own in of_all
        ]
        between = max(float(np.mean(beyond)), 0.0)  # tau^2
        self.weight = {parts: between / (between + 2 / own.free) for parts, own in self._of.items()}

    def variance(self, parts: Parts) -> np.ndarray:
        """(G,) of what `draw` gives."""
        weight = self.weight.get(parts, 0.0)
        own = self._of[parts].between if weight > 0 else 0.0
        return (1 - weight) * self._all.between + weight * own

    def draw(self, parts: Parts, n: int, seed: int) -> np.ndarray:
        """(n, G) how the means of populations differ from that over batches: normal, of the covariance of Eq. 2.

        Raises ValueError where `known` is False. A draw depends on seed and its number alone. Those of one seed are the
        points of a scrambled Sobol sequence along the principal axes: each one is normal, and together they lie evenly,
        so that the mean of a few is near that of all, and their mean square around it the variance of all (Owen 1997,
        Annals of Statistics 25:1541).
        """
        if not self.known:
            raise ValueError("no perturbation has two batches of a cell type: how batches differ is not known.")
        weight = self.weight.get(parts, 0.0)
        axes = np.sqrt(1 - weight) * self._all.axes
        if weight > 0:
            axes = np.concatenate([axes, np.sqrt(weight) * self._of[parts].axes])
        axes = axes[np.argsort(-np.square(axes).sum(axis=1), kind="stable")]
        from scipy.stats import qmc  # a third of what a prediction imports

        sequence = qmc.Sobol(len(axes), scramble=True, seed=numpy_generator(seed, "populations"))
        points = sequence.random_base2((n - 1).bit_length())[:n]  # in whole powers of two they lie evenly
        drawn: np.ndarray = ndtri(points + 0.5 ** (SOBOL_BITS + 1)) @ axes
        return drawn
