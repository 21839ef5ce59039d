"""Simulated perturbation screens with known ground truth, streamed to an .h5ad.

A cell of type t, batch b and perturbation p at dose d has negative-binomial counts (mean mu, variance
mu + dispersion * mu**2) with

    mu = library * softmax(baseline + cell_type_offset[t] + batch_offset[b] + strength * response(d) * effect[p, t, b])

where `library` (lognormal) and `strength` (a Beta with mean 1) differ between the cells of one condition, and `effect`
differs between the batches of one perturbation: a response is a random distribution, not a fixed mean shift.

P = single perturbations, Q = pairs, T = cell types, K = batches, G = genes, E = genes that a perturbation moves,
N = cells.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from numpy.typing import NDArray
from scipy.special import roots_jacobi, softmax

from perturbdiff.files import progress, written

CONTROL = "control"

BASELINE_SD = 1.5  # of log expression between genes: about three decades from rare to abundant
MARKER_FRACTION, MARKER_SD = 0.1, 1.0  # of the genes, those that set a cell type apart, and by how much in log
BATCH_SD = 0.1  # of the batch's log offset of every gene
LIBRARY_LOG_SD = 0.4  # of log library size between cells
STRENGTH_SHAPE = 2.0  # strength = 2 * Beta(shape, shape): mean 1, sd 0.45, between 0 (no response) and 2
CELL_TYPE_SHARE = 0.25  # of the effect's variance that is specific to the cell type
INTERACTION_FRACTION, INTERACTION_SD = 0.25, 0.3  # of E, and relative to effect_size

BLOCK_CELLS = 64  # cells that share a random generator; never changes with chunk_cells, so the counts do not either
HDF5_CHUNK = 1 << 16  # elements
STREAMS = ("context", "effects", "pairs", "order", "counts")  # purposes with a random generator of their own


@dataclass(frozen=True)
class SimulationConfig:
    """Size, effects and noise of a simulated screen; ValueError where a value makes no sense."""

    n_genes: int = 500
    n_cell_types: int = 4
    n_batches: int = 2
    n_perturbations: int = 6  # single perturbations, besides control
    cells_per_condition: int = 100  # per (perturbation, dose, cell_type, batch)
    control_cells_per_context: int = 200  # per (cell_type, batch)
    n_pairs: int = 0  # "A+B" combinations of two single perturbations
    doses: tuple[float, ...] = (1.0,)  # every perturbation is measured at each of them; control has dose 0
    n_effect_genes: int = 40  # genes a perturbation moves
    effect_size: float = 1.0  # sd of the natural-log fold change on those genes, at dose 1, mean over batches
    batch_variability: float = 0.3  # relative sd of a perturbation's effect between batches
    mean_library_size: float = 3000.0  # expected counts per cell
    dispersion: float = 0.3  # var = mu + dispersion * mu**2; 0 is Poisson
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("n_genes", "n_cell_types", "n_batches", "n_perturbations", "cells_per_condition")
        for name in (*sizes, "control_cells_per_context", "n_effect_genes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1; ask for one or more.")
        if self.n_effect_genes > self.n_genes:
            raise ValueError(
                f"n_effect_genes ({self.n_effect_genes}) must not exceed n_genes ({self.n_genes}); lower it."
            )
        if not 0 <= self.n_pairs <= math.comb(self.n_perturbations, 2):
            raise ValueError(
                f"n_pairs ({self.n_pairs}) must be between 0 and {math.comb(self.n_perturbations, 2)}, the pairs "
                f"of {self.n_perturbations} perturbations; lower it or raise n_perturbations."
            )
        if not self.doses or len(set(self.doses)) < len(self.doses) or not all(0 < d < math.inf for d in self.doses):
            raise ValueError(
                f"doses ({self.doses}) must be positive, finite and distinct; control has dose 0 by itself."
            )
        for name in ("effect_size", "batch_variability", "dispersion", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be finite and not negative; use 0 or more.")
        if not 0 < self.mean_library_size < math.inf:
            raise ValueError(f"mean_library_size ({self.mean_library_size}) must be positive and finite; try 3000.")

    @property
    def n_cells(self) -> int:
        """Of the whole screen, control cells included."""
        treatments = (self.n_perturbations + self.n_pairs) * len(self.doses)
        contexts = self.n_cell_types * self.n_batches
        return contexts * (treatments * self.cells_per_condition + self.control_cells_per_context)


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """What a simulated screen was drawn from; its size does not depend on the number of cells.

    `perturbations` is control, then the singles, then the pairs. All expression is natural log.
    """

    config: SimulationConfig
    genes: tuple[str, ...]
    perturbations: tuple[str, ...]
    cell_types: tuple[str, ...]
    batches: tuple[str, ...]
    baseline: NDArray[np.float64]  # (G,)
    cell_type_offset: NDArray[np.float64]  # (T, G)
    batch_offset: NDArray[np.float64]  # (K, G)
    effect_genes: NDArray[np.intp]  # (P, E)
    effect: NDArray[np.float64]  # (P, T, E) at dose 1, mean over batches
    batch_factor: NDArray[np.float64]  # (P, K, E) multiplies effect; mean 1
    singles: NDArray[np.intp]  # (1 + P + Q, 2) the single perturbations in each label, -1 for none
    interaction_genes: NDArray[np.intp]  # (Q, I)
    interaction: NDArray[np.float64]  # (Q, I)

    def log_fold_change(self, perturbation: str, cell_type: str, batch: str, dose: float = 1.0) -> NDArray[np.float64]:
        """Expected log fold change over control of the same cell type and batch, before a cell's rates are normalised.

        Parameters
        ----------
        perturbation, cell_type, batch
            labels of the screen; KeyError otherwise.
        dose
            any dose >= 0, also one that was not simulated; ignored for control.

        Returns
        -------
        (G,) natural log, zero off the moved genes. The fold change of *measured* fractions,
        `log(mean_fraction(p, ...) / mean_fraction("control", ...))`, is this up to a constant over genes (a cell's
        fractions sum to 1) and the convexity of exp over the cells' strengths.
        """
        if not 0 <= dose < math.inf:
            raise ValueError(f"dose ({dose}) must be finite and not negative; the screen has {self.config.doses}.")
        return _dose_response(dose) * self._full_effect(*self._codes(perturbation, cell_type, batch))[0]

    def mean_fraction(self, perturbation: str, cell_type: str, batch: str, dose: float = 1.0) -> NDArray[np.float64]:
        """Expected fraction of a cell's counts in each gene; times `mean_library_size` the expected counts.

        Parameters
        ----------
        perturbation, cell_type, batch, dose
            as in `log_fold_change`.

        Returns
        -------
        (G,) sums to 1. The mean over a cell's strength is a Gauss-Jacobi quadrature.
        """
        change = self.log_fold_change(perturbation, cell_type, batch, dose)
        # The Jacobi weight (1-x)^(a-1) (1+x)^(a-1) on [-1, 1] is the Beta(a, a) density at strength = 1 + x.
        nodes, weights = roots_jacobi(32, STRENGTH_SHAPE - 1, STRENGTH_SHAPE - 1)
        _, t, k = self._codes(perturbation, cell_type, batch)
        fraction = softmax(self._context(t, k) + (1 + nodes)[:, None] * change, axis=1)  # (nodes, G)
        return (weights / weights.sum()) @ fraction

    def _context(self, t: NDArray[np.integer], k: NDArray[np.integer]) -> NDArray[np.float64]:
        """(N, G) log expression of untreated cells, up to a constant per cell, from (N,) cell types and batches."""
        return self.baseline + self.cell_type_offset[t] + self.batch_offset[k]

    def _full_effect(
        self, p: NDArray[np.integer], t: NDArray[np.integer], k: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """(N, G) log fold change at dose 1 and strength 1 from (N,) positions in perturbations, cell_types, batches."""
        change = np.zeros((len(p), len(self.genes)))
        for single in self.singles[p].T:  # (N,)
            rows = np.flatnonzero(single >= 0)
            s = single[rows]
            # The genes of one row are distinct, so += loses nothing.
            change[rows[:, None], self.effect_genes[s]] += self.effect[s, t[rows]] * self.batch_factor[s, k[rows]]
        rows = np.flatnonzero(p > self.config.n_perturbations)
        q = p[rows] - self.config.n_perturbations - 1
        change[rows[:, None], self.interaction_genes[q]] += self.interaction[q]
        return change

    def _codes(self, perturbation: str, cell_type: str, batch: str) -> list[NDArray[np.intp]]:
        codes = []
        for name, label, labels in (
            ("perturbation", perturbation, self.perturbations),
            ("cell_type", cell_type, self.cell_types),
            ("batch", batch, self.batches),
        ):
            if label not in labels:
                raise KeyError(f"{name} ({label!r}) is not in the screen; use one of {list(labels)}.")
            codes.append(np.array([labels.index(label)]))
        return codes


def ground_truth(config: SimulationConfig) -> GroundTruth:
    """Draw the parameters of a screen, without any cell: what `simulate` returns, for the price of a few arrays."""
    n_single, n_genes, n_moved = config.n_perturbations, config.n_genes, config.n_effect_genes
    n_types, n_batches = config.n_cell_types, config.n_batches

    rng = _rng(config.seed, "context")
    baseline = rng.normal(0, BASELINE_SD, n_genes)
    marker = rng.random((n_types, n_genes)) < MARKER_FRACTION
    cell_type_offset = marker * rng.normal(0, MARKER_SD, (n_types, n_genes))
    batch_offset = rng.normal(0, BATCH_SD, (n_batches, n_genes))

    rng = _rng(config.seed, "effects")
    effect_genes = np.stack([rng.choice(n_genes, n_moved, replace=False) for _ in range(n_single)])
    shared = math.sqrt(1 - CELL_TYPE_SHARE) * rng.normal(size=(n_single, 1, n_moved))
    specific = math.sqrt(CELL_TYPE_SHARE) * rng.normal(size=(n_single, n_types, n_moved))
    # A batch changes the strength of a response (all genes alike) and its direction (each gene) in equal parts.
    deviation = rng.normal(size=(n_single, n_batches, 1)) + rng.normal(size=(n_single, n_batches, n_moved))

    rng = _rng(config.seed, "pairs")
    pairs = np.empty((config.n_pairs, 2), dtype=np.intp)
    n_interacting = math.ceil(INTERACTION_FRACTION * n_moved)
    interaction_genes = np.empty((config.n_pairs, n_interacting), dtype=np.intp)
    ranks = np.sort(rng.choice(math.comb(n_single, 2), config.n_pairs, replace=False))
    for q, rank in enumerate(map(int, ranks)):
        second = (1 + math.isqrt(1 + 8 * rank)) // 2  # the pairs in order: 0+1, 0+2, 1+2, 0+3, ...
        pairs[q] = rank - math.comb(second, 2), second
        interaction_genes[q] = rng.choice(np.unique(effect_genes[pairs[q]]), n_interacting, replace=False)

    names = _labels("pert", n_single)
    alone = np.stack([np.arange(n_single), np.full(n_single, -1)], axis=1)
    return GroundTruth(
        config=config,
        genes=_labels("gene", n_genes),
        perturbations=(CONTROL, *names, *(f"{names[a]}+{names[b]}" for a, b in pairs)),
        cell_types=_labels("type", n_types),
        batches=_labels("batch", n_batches),
        baseline=baseline,
        cell_type_offset=cell_type_offset,
        batch_offset=batch_offset,
        effect_genes=effect_genes,
        effect=config.effect_size * (shared + specific),
        batch_factor=1 + config.batch_variability * deviation / math.sqrt(2),
        singles=np.concatenate([[[-1, -1]], alone, pairs]),
        interaction_genes=interaction_genes,
        interaction=config.effect_size * INTERACTION_SD * rng.normal(size=(config.n_pairs, n_interacting)),
    )


def simulate(config: SimulationConfig, path: str | Path, chunk_cells: int = 4096) -> GroundTruth:
    """Draw a screen into an .h5ad whose cells are shuffled, and return what it was drawn from.

    Parameters
    ----------
    config
        the screen; the same config gives the same cells, whatever `chunk_cells` is.
    path
        of the .h5ad, replaced if there; it appears only when complete. Missing folders are made.
    chunk_cells
        cells per write, rounded down to a multiple of 64 (at least 64). Memory is that many cells' non-zero counts,
        64 dense cells and the obs table.

    Returns
    -------
    The ground truth. The file has X (CSR of int32 raw counts), obs (perturbation, cell_type, batch, dose), gene names
    in var, and in uns `x_kind` and `simulation` (the config).
    """
    truth = ground_truth(config)
    draw_cells(truth, path, chunk_cells)
    return truth


def draw_cells(truth: GroundTruth, path: str | Path, chunk_cells: int = 4096) -> None:
    """The cells of a ground truth, also of one that was changed; path and chunk_cells as of `simulate`."""
    if chunk_cells < 1:
        raise ValueError(f"chunk_cells ({chunk_cells}) must be at least 1; 4096 is the default.")
    with written(Path(path)) as temporary, h5py.File(temporary, "w") as file:
        _write_screen(file, truth, chunk_cells)


def _write_screen(file: h5py.File, truth: GroundTruth, chunk_cells: int) -> None:
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    obs = _cells(truth)
    write_elem(file, "obs", obs)
    write_elem(file, "var", pd.DataFrame(index=pd.Index(truth.genes)))
    simulation = dataclasses.asdict(truth.config) | {"doses": np.array(truth.config.doses)}
    write_elem(file, "uns", {"x_kind": "raw_counts", "simulation": simulation})
    for name in ("obsm", "varm", "obsp", "varp", "layers"):
        write_elem(file, name, {})

    x = file.create_group("X")
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    x.attrs["shape"] = np.array([len(obs), len(truth.genes)])
    for name in ("data", "indices"):
        x.create_dataset(name, shape=(0,), maxshape=(None,), dtype=np.int32, chunks=(HDF5_CHUNK,))
    indptr = np.zeros(len(obs) + 1, dtype=np.int64)

    step = BLOCK_CELLS * max(1, chunk_cells // BLOCK_CELLS)
    with progress(len(obs), "simulate", "cell") as bar:
        for start in range(0, len(obs), step):
            stop = min(start + step, len(obs))
            blocks = [_block(truth, obs, first) for first in range(start, stop, BLOCK_CELLS)]
            data, indices, row_lengths = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
            written = x["data"].shape[0]
            for name, values in (("data", data), ("indices", indices)):
                x[name].resize(written + len(values), axis=0)
                x[name][written:] = values
            indptr[start + 1 : stop + 1] = written + np.cumsum(row_lengths)
            bar.update(stop - start)
    # Of one type with the indices where that can be: scipy refuses to work with two.
    x.create_dataset("indptr", data=indptr.astype(np.int32) if indptr[-1] <= np.iinfo(np.int32).max else indptr)


def _cells(truth: GroundTruth) -> pd.DataFrame:
    """obs, in the order of the file: shuffled, so that a reader which relies on sorted conditions fails early."""
    config = truth.config
    t0, k0 = np.indices((config.n_cell_types, config.n_batches)).reshape(2, -1)
    n_treatments = len(truth.perturbations) - 1
    p, d, t, k = np.indices((n_treatments, len(config.doses), config.n_cell_types, config.n_batches)).reshape(4, -1)
    conditions = pd.DataFrame(
        {
            "perturbation": pd.Categorical.from_codes(np.append(0 * t0, p + 1), pd.Index(truth.perturbations)),
            "cell_type": pd.Categorical.from_codes(np.append(t0, t), pd.Index(truth.cell_types)),
            "batch": pd.Categorical.from_codes(np.append(k0, k), pd.Index(truth.batches)),
            "dose": np.append(0.0 * t0, np.array(config.doses)[d]),
        }
    )
    sizes = np.repeat([config.control_cells_per_context, config.cells_per_condition], [len(t0), len(t)])
    condition = _rng(config.seed, "order").permutation(np.repeat(np.arange(len(sizes)), sizes))  # (N,)
    return conditions.iloc[condition].set_axis(pd.Index([f"cell_{i:08d}" for i in range(len(condition))]))


def _block(
    truth: GroundTruth, obs: pd.DataFrame, first: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Counts of the cells first .. first + BLOCK_CELLS as CSR (data, indices, row lengths)."""
    config, cells = truth.config, obs.iloc[first : first + BLOCK_CELLS]
    p, t, k = (cells[column].cat.codes.to_numpy() for column in ("perturbation", "cell_type", "batch"))
    rng = _rng(config.seed, "counts", first // BLOCK_CELLS)
    strength = 2 * rng.beta(STRENGTH_SHAPE, STRENGTH_SHAPE, len(cells))
    library = config.mean_library_size * rng.lognormal(-(LIBRARY_LOG_SD**2) / 2, LIBRARY_LOG_SD, len(cells))

    response = strength * _dose_response(cells["dose"].to_numpy())  # (N,)
    fraction = softmax(truth._context(t, k) + response[:, None] * truth._full_effect(p, t, k), axis=1)
    mu = library[:, None] * fraction  # (N, G)
    if config.dispersion:
        mu *= rng.gamma(1 / config.dispersion, config.dispersion, mu.shape)
    counts = rng.poisson(mu)  # gamma-Poisson: negative binomial
    if counts.max() > np.iinfo(np.int32).max:
        raise ValueError(f"count ({counts.max()}) must fit in int32; lower mean_library_size or dispersion.")
    rows, columns = np.nonzero(counts)
    return counts[rows, columns].astype(np.int32), columns.astype(np.int32), np.count_nonzero(counts, axis=1)


def _dose_response(dose: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Saturating: 0 at dose 0, 1 at dose 1, at most 1.58."""
    return np.expm1(-np.asarray(dose)) / np.expm1(-1.0)


def _labels(prefix: str, n: int) -> tuple[str, ...]:
    width = len(str(n - 1))  # zero-padded, so that labels sort like numbers
    return tuple(f"{prefix}_{i:0{width}d}" for i in range(n))


def _rng(seed: int, stream: str, block: int = 0) -> np.random.Generator:
    """Independent generator of one purpose: asking for more cells or pairs leaves the other draws as they are."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS.index(stream), block)))
