"""Which genes a model has, where a file has more: those that vary most and those that respond most, and some by name.

G = genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse

from perturbdiff.data.conditions import ConditionIndex, ControlMatch, match_controls
from perturbdiff.data.expression import gene_means
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import Labelled
from perturbdiff.data.vocab import GeneVocab, nearest
from perturbdiff.files import few


class GeneMoments:
    """Mean and variance of each gene over cells that come in parts."""

    def __init__(self, n_genes: int) -> None:
        self.n_cells = np.zeros(n_genes, dtype=np.int64)  # that measured the gene
        self.total = np.zeros(n_genes)
        self.total_square = np.zeros(n_genes)

    def add(self, X: sparse.csr_matrix, measured: np.ndarray | None = None) -> None:
        """(n, G) log1p values of some more cells, which measured these genes (G,); all if None."""
        values = X.data.astype(np.float64)
        if measured is not None:
            values *= measured[X.indices]
        self.n_cells += X.shape[0] if measured is None else X.shape[0] * measured
        self.total += np.bincount(X.indices, weights=values, minlength=X.shape[1])
        self.total_square += np.bincount(X.indices, weights=values * values, minlength=X.shape[1])

    def variance(self) -> np.ndarray:
        """(G,) of log1p values; 0 where no cell measured the gene."""
        n_cells = np.maximum(self.n_cells, 1)
        return np.maximum(self.total_square / n_cells - (self.total / n_cells) ** 2, 0.0)


def best_genes(n: int, *scores: np.ndarray) -> np.ndarray:
    """Columns of the `n` genes that come first by any of some scores (G,), in column order.

    Each score names its best gene in turn, then its second best, and so on; of equal ones the first column. Genes of
    which it says nothing, 0, it names last.
    """
    ranks = [np.where(s > 0, np.argsort(np.argsort(-s, kind="stable"), kind="stable"), len(s)) for s in scores]
    return np.sort(np.argsort(np.min(ranks, axis=0), kind="stable")[:n])


def kept_genes(genes: GeneVocab, origin: Labelled, known: GeneVocab | None, asked: Sequence[str]) -> np.ndarray:
    """(G,) genes that stay whatever they do: those of a checkpoint, which would be forgotten otherwise, those that are
    perturbed, and those that are asked for. Raises ValueError where one of these is not there."""
    known_names = (genes.symbols or (), genes.ensembl or (), genes.names)  # the last win
    position = {name: i for names in known_names for i, name in enumerate(names) if name}
    if lacking := [name for name in asked if name not in position]:
        raise ValueError(f"data.keep_genes names {few(lacking)}, which the data lack; {nearest(lacking[0], position)}.")
    labels = origin.obs["perturbation"].unique()
    perturbed = {name for label in labels for name, _ in origin.notation.parse(str(label))}
    kept = np.zeros(len(genes), dtype=bool)
    kept[[position[name] for name in (*asked, *perturbed) if name in position]] = True
    if known is not None:
        columns = known.align(genes, min_overlap=0.0).columns
        kept[columns[columns >= 0]] = True
    return kept


def left_out(chosen: np.ndarray, scores: Mapping[str, np.ndarray]) -> str:
    """How much of each score (G,) the genes hold that were not chosen."""
    lost = [f"{1 - of[chosen].sum() / of.sum():.1%} of the {what}" for what, of in scores.items() if of.sum() > 0]
    n_genes = len(next(iter(scores.values())))
    hold = f", which hold {' and '.join(lost)} of training cells" if lost else ""
    return f"\nleft out    {n_genes - len(chosen):,} of {n_genes:,} genes{hold} (data.n_hvg)"


def squared_response(screen: Screen, cells: np.ndarray, match: ControlMatch) -> np.ndarray:
    """(G,) squared changes of the mean log1p value from its controls, summed over the conditions of some `cells`.

    Without what noise of both means adds on average; conditions and controls of one cell are left out. Never under 0.

    Parameters
    ----------
    cells
        (n_cells,) bool; control cells among them.
    """
    log1p = screen.expression.log1p
    index = ConditionIndex.build(screen, cells)
    pools = match_controls(index, match, np.zeros(len(index), dtype=bool))
    total = np.zeros(len(screen.expression.genes))
    controls: dict[int, tuple[np.ndarray, np.ndarray] | None] = {}
    for condition in np.flatnonzero((pools.of >= 0) & (index.n_cells > 1)).tolist():
        if (pool := int(pools.of[condition])) not in controls:
            controls[pool] = _mean_and_noise(log1p(pools.rows(condition)))
        own, theirs = _mean_and_noise(log1p(index.cells(condition))), controls[pool]
        if own is not None and theirs is not None:
            total += (own[0] - theirs[0]) ** 2 - own[1] - theirs[1]
    return np.maximum(total, 0.0)


def _mean_and_noise(X: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray] | None:
    """(G,) mean over cells and the variance of that mean; None of one cell."""
    n = X.shape[0]
    if n < 2:
        return None
    mean = gene_means(X)
    return mean, (gene_means(X.multiply(X).tocsr()) - mean**2) / (n - 1)
