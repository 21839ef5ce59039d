"""From control cells to predicted cells: sets assigned, denoised in chunks, gathered sparse.

B = sets, S = cells per set, G = genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from perturbdiff.config import DiffusionConfig, ModelConfig, SamplingConfig
from perturbdiff.data.batch import CellSetBatch, Moves, make_batch
from perturbdiff.data.rng import numpy_generator, torch_generator
from perturbdiff.data.samplers import CellSet, draw_controls
from perturbdiff.data.screen import Expression
from perturbdiff.data.space import totals
from perturbdiff.data.vocab import Labels
from perturbdiff.diffusion.counts import draw_counts, with_whole_counts
from perturbdiff.diffusion.draws import shown, uniform_draws
from perturbdiff.diffusion.sampling import sample
from perturbdiff.diffusion.schedule import Schedule
from perturbdiff.nn.denoiser import Denoiser

if TYPE_CHECKING:
    from tqdm import tqdm

FEW_COUNTS, OFF_GRID, MOST_OFF = 1e3, 0.02, 0.2  # a cell whose smallest value is two counts has some between them
WHOLE_LIBRARY = 1e-3  # what sums may be off by
EXCHANGES_PER_CELL = 4  # tried, of a part of the controls
MAX_EXCHANGE_WORK = 1 << 30  # stored values looked at: large pools need few exchanges
KEEP_MEAN = 3  # steps of Newton's method
MAX_VALUES_PER_CHUNK = 1 << 22  # cells x genes denoised at once: memory does not grow with the number of cells

Context = tuple[str | None, str | None]  # cell type and batch; None where nobody says


def choose_controls(
    expression: Expression, n_cells: int | None, seed: int, population: int, representative: bool = True
) -> np.ndarray:
    """The control that each cell to predict starts from, (n_cells,): all once if None, repeated when they run out.

    A part of the controls is chosen so that its mean is that of all: at random, then by exchanging cells as long as
    that brings the means together. By chance alone the means differ by more than weak perturbations do; where that
    difference is wanted, as between cells that were measured, `representative` is False.
    """
    n = len(expression)
    if n_cells is None:
        return numpy_generator(seed, "prediction order", population).permutation(n)
    drawn = draw_controls(n, n_cells, seed, population)
    whole, rest = n_cells // n * n, n_cells % n
    if rest == 0 or not representative:
        return drawn
    return np.concatenate([drawn[:whole], _representative(expression, drawn[whole:], seed, population)])


def _representative(expression: Expression, chosen: np.ndarray, seed: int, population: int) -> np.ndarray:
    exchanges = min(EXCHANGES_PER_CELL * len(chosen), MAX_EXCHANGE_WORK // max(expression.X.nnz, 1))
    if exchanges == 0:  # so many controls that chance does well enough
        return chosen
    X = expression.log1p().astype(np.float64)

    @cache  # cells leave and come several times
    def products(cell: int) -> np.ndarray:
        return X @ X[cell].toarray().ravel()

    n, generator = len(chosen), numpy_generator(seed, "prediction controls", population)
    off = np.asarray(X[chosen].mean(axis=0) - X.mean(axis=0)).ravel()  # (G,) of the chosen cells from all
    along = X @ off
    square = np.asarray(X.multiply(X).sum(axis=1)).ravel()
    outside = np.ones(len(expression), dtype=bool)
    outside[chosen] = False
    chosen = chosen.copy()
    for _ in range(exchanges):
        position = generator.integers(n)
        leaves = int(chosen[position])
        distance = square + square[leaves] - 2 * products(leaves)  # |x - leaving cell|^2
        change = 2 * n * (along - along[leaves]) + distance  # of n^2 |off|^2
        change[~outside] = np.inf
        if change[comes := int(change.argmin())] < 0:
            along += (products(comes) - products(leaves)) / n
            outside[[leaves, comes]] = True, False
            chosen[position] = comes
    return chosen


def assign_sets(
    contexts: Sequence[Context], sources: Sequence[np.ndarray], set_size: int
) -> tuple[list[CellSet], list[Context]]:
    """Make sets of cells of one context, as far as the model tells contexts apart.

    Parameters
    ----------
    contexts
        Of each control cell.
    sources
        Of each population, the controls that its cells start from.

    Returns
    -------
    Sets with key (population, set number), whose rows and controls are the sources, and the context of each of the
    sets' condition numbers.
    """
    conditions = sorted(set(contexts), key=lambda c: (c[0] or "", c[1] or ""))
    number = {context: i for i, context in enumerate(conditions)}
    condition_of_control = np.array([number[context] for context in contexts])
    sets: list[CellSet] = []
    for population, source in enumerate(sources):
        for condition in range(len(conditions)):
            rows = source[condition_of_control[source] == condition]
            for start in range(0, len(rows), set_size):
                chosen = rows[start : start + set_size]
                sets.append(CellSet((population, len(sets)), condition, chosen, chosen))
    return sets, conditions


@dataclass(frozen=True, eq=False)
class Change:
    """How the populations of a condition differ from what the denoiser makes.

    by
        (K, G) log1p, of each population, by how much its mean differs.
    kept
        (G,) part of the differences of cells from the mean of their set that is kept; None: all of it.
    drawn
        Whether `by` is a draw, which moves the sums of cells; else each still adds up to a library.
    """

    by: np.ndarray
    kept: np.ndarray | None = None
    drawn: bool = True


class ControlPool:
    """Control cells, and the denoiser that makes predicted cells of them.

    Parameters
    ----------
    overdispersion
        As of `draw_counts`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        expression: Expression,
        config: ModelConfig,
        sampling: SamplingConfig,
        overdispersion: np.ndarray | None = None,
    ) -> None:
        self._denoiser, self._expression, self._config, self._sampling = denoiser, expression, config, sampling
        self._overdispersion = overdispersion
        self._one = _one_count(expression) if sampling.whole_counts and sampling.draw_counts else None
        self._total, self._mean_is_told = None, config.diffusion.start == "mean" or sampling.network_weight == 0
        if self._one is not None:
            self._sampling = replace(sampling, whole_counts=False)  # which is in the draw
            self._total = _total(expression)

    def denoise(
        self,
        sets: Sequence[CellSet],
        labels: Labels,
        moves: Moves | None,
        changes: Sequence[Change | None],
        seed: int,
        bar: tqdm[Any],
        of_mean: bool = False,
    ) -> tuple[sparse.csr_matrix, np.ndarray | None]:
        """Predicted cells of all sets in their order, (cells, G) log1p; labels, moves, changes by condition number.

        Where they hold whole counts alone (sampling.draw_counts), also the (cells,) log1p value of one in each, else
        None. Log1p values are of the depth of the control, which keeps their means; where a population is not drawn,
        of the sum of a cell's own counts, as measured cells are, if the genes are all of a library; where their mean is
        that of simple methods, times one number for all cells that keeps the mean of all values.

        Sets are denoised together, and a set has the same cells, to rounding, whatever the others are; `of_mean`, where
        cells stand for a mean, whatever other populations and conditions are: counts are drawn for all cells of one.
        """
        device = next(self._denoiser.parameters()).device
        estimates = [np.zeros(0)] * len(sets)
        for numbers in _chunks([len(of.rows) for of in sets], len(self._expression.genes)):
            chunk = [sets[number] for number in numbers]
            batch = make_batch(chunk, len(chunk[0].rows), self._expression, labels, moves=moves).to(device)
            change = _change_of(chunk, changes, self._expression)
            x0 = sample_batch(
                self._denoiser, batch, self._sampling, self._config.diffusion, seed,
                None if change is None else change.to(device), self._config.set_size,
            )  # fmt: skip
            cells = x0[batch.mask].mul_(self._expression.preprocessing.scale).cpu().numpy()
            ends = np.cumsum([len(of.rows) for of in chunk])
            for number, own in zip(numbers, np.split(cells, ends[:-1]), strict=True):
                estimates[number] = own
            bar.update(len(cells))
        if self._one is None:
            return sparse.vstack([sparse.csr_matrix(cells) for cells in estimates], format="csr"), None
        together: dict[tuple[int, ...], list[int]] = {}
        for number, of in enumerate(sets):
            together.setdefault((of.condition, of.key[0], -1 if of_mean else number), []).append(number)
        blocks, units = [sparse.csr_matrix((0, 0))] * len(sets), [np.zeros(0)] * len(sets)
        for (condition, _, _), numbers in together.items():
            given = changes[condition]
            X, one = self._with_counts(
                np.concatenate([estimates[number] for number in numbers]),
                np.concatenate([sets[number].control_rows for number in numbers]),
                sets[numbers[0]].key, seed, given is None or not given.drawn, of_mean,
            )  # fmt: skip
            ends = np.cumsum([len(sets[number].rows) for number in numbers])[:-1]
            for number, own, unit in zip(numbers, np.split(X, ends), np.split(one, ends), strict=True):
                blocks[number], units[number], estimates[number] = sparse.csr_matrix(own), unit, np.zeros(0)
        return sparse.vstack(blocks, format="csr"), np.concatenate(units)

    def _with_counts(
        self, estimate: np.ndarray, rows: np.ndarray, key: Sequence[int], seed: int, by_own_sum: bool, of_mean: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(S, G) cells that start from controls `rows`, and (S,) one count in each."""
        assert self._one is not None, "counts are drawn"
        control, unit = self._expression.log1p(rows).toarray(), self._one[rows]
        counts = draw_counts(estimate.astype(np.float64), control, unit, self._overdispersion, seed, key, of_mean)
        one = np.expm1(unit)[:, None]
        sums = counts.sum(axis=1, keepdims=True)
        if self._total is not None and by_own_sum and sums.any():
            one = np.where(sums > 0, self._total / np.maximum(sums, 1), one)
            # Cells that differ less than measured ones have larger logarithms at the same sum. A network's own mean
            # says less of sums than that they are all the same.
            goal = estimate.mean(dtype=np.float64)
            for _ in range(KEEP_MEAN if self._mean_is_told else 0):
                value = counts * one
                one = one * np.exp((goal - np.log1p(value).mean()) / (value / (1 + value)).mean())
        return np.log1p(counts * one).astype(estimate.dtype), np.log1p(one[:, 0])


def _chunks(sizes: Sequence[int], n_genes: int) -> list[list[int]]:
    """Numbers of the sets that are denoised at once, those of a size together, the largest first in each."""
    chunks: list[list[int]] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        if chunks and (len(chunks[-1]) + 1) * sizes[chunks[-1][0]] * n_genes <= MAX_VALUES_PER_CHUNK:
            chunks[-1].append(number)
        else:
            chunks.append([number])
    return chunks


def _one_count(expression: Expression) -> np.ndarray | None:
    """(n,) of each control, log1p; of an empty one that of the others. None where all are empty, or where log1p values
    are no multiples of the smallest one of their cell: noise or smoothing left no counts."""
    one = expression.one_count(np.arange(len(expression)))
    if expression.preprocessing.input_kind == "log1p" and one.any():
        X = expression.X
        counts = np.expm1(X.data.astype(np.float64)) / np.repeat(np.expm1(one), np.diff(X.indptr))
        few = counts < FEW_COUNTS  # of many, float32 holds no fractions
        if few.any() and np.mean(np.abs(counts - np.rint(counts))[few] > OFF_GRID) > MOST_OFF:
            return None
    return np.where(one > 0, one, np.median(one[one > 0])) if one.any() else None


def _total(expression: Expression) -> float | None:
    """What the expm1 of each control adds up to, where its genes are all that a library size counts."""
    target, X = expression.preprocessing.target_sum, expression.X
    if expression.preprocessing.input_kind == "counts":
        sums, whole = np.asarray(X.sum(axis=1, dtype=np.float64)).ravel(), expression.library_size
    else:
        sums = totals(np.expm1(X.data.astype(np.float64)), X.indptr)
        whole = np.full(len(sums), target or 0.0)
    filled = sums > 0
    return target if np.allclose(sums[filled], whole[filled], rtol=WHOLE_LIBRARY) else None


def _change_of(sets: Sequence[CellSet], changes: Sequence[Change | None], expression: Expression) -> Tensor | None:
    # (B, 2, G) what is kept of differences within a set, and by what its mean moves, model units; None: all, nothing.
    if all(changes[own.condition] is None for own in sets):
        return None
    change = np.zeros((len(sets), 2, len(expression.genes)), dtype=np.float32)
    change[:, 0] = 1
    for row, own in zip(change, sets, strict=True):
        if (of := changes[own.condition]) is not None:
            row[1] = of.by[own.key[0]] / expression.preprocessing.scale
            row[0] = 1 if of.kept is None else of.kept
    return torch.from_numpy(change)


def changed_together(x: Tensor, mask: Tensor, change: Tensor) -> Tensor:
    """Cells (B, S, G) of each set, with less difference between them and another mean; mask (B, S).

    change
        (B, 2, G) the part of their differences from the mean of the set that stays, and by what that mean moves. It
        moves as `means.shifts.shift_cells` does: a gene that rises does so by as much in every cell, one that falls
        loses the same part of its value in every cell, and no more than all.
    """
    kept, by = change[:, :1], change[:, 1:]
    mean = _mean_of_sets(x, mask)
    x = torch.lerp(mean.expand_as(x), x, kept.expand_as(x))
    left = torch.where((by < 0) & (mean > 0), 1 + by / mean.clamp_min(1e-30), 1.0).clamp_min(0)
    return (x * left + by.clamp_min(0)) * mask[..., None]


def _mean_of_sets(x: Tensor, mask: Tensor) -> Tensor:
    """(B, 1, G) over the cells (B, S, G) that there are."""
    return ((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1))[:, None]


def sample_batch(
    denoiser: Denoiser,
    batch: CellSetBatch,
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    seed: int,
    change: Tensor | None = None,
    set_size: int | None = None,
) -> Tensor:
    """Cells of the batch's conditions from its controls, (B, S, G) model units; random by seed and the sets' keys.

    change
        (B, 2, G) how each set's population differs, as `changed_together` takes it.
    set_size
        Cells that random numbers are drawn for in each set, S or more; S by default. In a batch without empty positions
        at its end, sets keep the numbers that they had with them.
    """
    schedule = Schedule(diffusion.schedule, diffusion.n_timesteps)
    # Noise comes from one generator a key, so that a set's cells do not depend on its neighbours; equal keys share it.
    _, control = batch.dense()
    device, (_, n_cells, n_genes) = control.device, control.shape
    shape = set_size or n_cells, n_genes
    generators = {key: torch_generator(device, seed, "prediction noise", *key) for key in batch.keys}

    def draw() -> Tensor:
        of_key = {
            key: torch.randn(shape, generator=g, device=device)[:n_cells].clone() for key, g in generators.items()
        }
        return torch.stack([of_key[key] for key in batch.keys])

    # Of the weights; trajectories are float32 whatever it is.
    dtype = next((weight.dtype for weight in denoiser.parameters()), torch.float32)

    def denoise(x_t: Tensor, t: Tensor, control: Tensor, cond: Labels | None, self_cond: Tensor | None) -> Tensor:
        # A denoiser that never saw its own estimate in training would make nothing but noise of it.
        self_cond = None if self_cond is None or diffusion.p_self_cond == 0 else self_cond.to(dtype)
        x_t = batch.of_measured(x_t)  # as in training
        x0 = denoiser(x_t.to(dtype), t, control.to(dtype), cond, self_cond, batch.mask).float()
        if batch.response is not None:
            x0 = torch.lerp(control, x0, batch.response[:, None, None])
        return batch.of_measured(x0)

    weight = sampling.network_weight
    x0 = batch.besides(control) if weight < 1 else control
    if weight > 0:
        made = sample(denoise, draw(), control, shown(batch.labels, diffusion), sampling, schedule, draw)
        x0 = torch.lerp(x0, made, weight)
        if diffusion.start == "mean":  # it was told: a network that starts from it learns the shape of a response
            off = _mean_of_sets(control, batch.mask) - _mean_of_sets(x0, batch.mask)
            x0 = changed_together(x0, batch.mask, torch.cat([torch.ones_like(off), off], dim=1))
    if change is not None:
        x0 = changed_together(x0, batch.mask, change)
    if sampling.whole_counts:
        return with_whole_counts(x0, batch.one_count(), uniform_draws(batch, seed, "prediction counts", set_size))
    return x0
