"""What makes scores fair: which control cells predict and which measure the truth, all genes, equal courtesies.

G = genes of the screen. Rows are those of the screen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from perturbdiff.data.conditions import ControlMatch
from perturbdiff.data.expression import as_csr, gene_means, gene_moments, noise_of_means
from perturbdiff.data.rng import cell_order_key, numpy_generator
from perturbdiff.data.screen import Expression, Screen
from perturbdiff.data.splits import Split, control_halves
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.diffusion.counts import with_whole_counts
from perturbdiff.diffusion.generate import choose_controls
from perturbdiff.features.tables import FeatureTable
from perturbdiff.files import few
from perturbdiff.means.predictors import PREDICTORS
from perturbdiff.means.shifts import shift_cells
from perturbdiff.means.training import Context, TrainingMeans
from perturbdiff.means.transplant import transplant_rows
from perturbdiff.means.trust import Trust, trust

CONDITION = ["perturbation", "cell_type", "batch"]
ALL_BATCHES = "all"  # the batch of every condition where controls match by cell type
NO_CHANGE, TRANSPLANT = "no change", "transplant"
MAX_CELLS = 2000  # of a condition that are scored: memory is that of as many times all genes
LEAST_OTHERS = 20  # cells of other perturbations, whose mean is a reference

Condition = tuple[str, str, str]


def group(obs: pd.DataFrame, cells: np.ndarray, match: ControlMatch) -> dict[Condition, np.ndarray]:
    """Rows of each condition among `cells`, (n,) bool; without batches where controls match by cell type."""
    labels = [obs[name].astype(str).to_numpy() for name in CONDITION]
    if match == "cell_type":
        labels[2] = np.full(len(obs), ALL_BATCHES)
    rows = np.flatnonzero(cells)
    table = pd.DataFrame({name: of[rows] for name, of in zip(CONDITION, labels, strict=True)})
    groups = table.groupby(CONDITION, sort=True).indices
    return {condition: rows[of] for condition, of in groups.items()}  # type: ignore[misc]


def held_out_rows(
    screen: Screen, cells: np.ndarray, match: ControlMatch
) -> tuple[dict[Condition, np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """Rows of each perturbed condition among `cells`, and of the controls of each (cell type, batch).

    Raises ValueError where there is none, or one has no controls.
    """
    real = group(screen.obs, cells & ~screen.is_control, match)
    if not real:
        raise ValueError("nothing is held out: give split.hold_out (--hold-out) conditions to predict and score.")
    controls = {(c, b): rows for (_, c, b), rows in group(screen.obs, screen.is_control, match).items()}
    if lacking := [condition for condition in real if condition[1:] not in controls]:
        raise ValueError(
            f"condition {':'.join(lacking[0])} has no control cells of its cell type and batch in {screen.path}; "
            "data.control_match=cell_type takes those of any batch, data.other_control_labels names more controls."
        )
    return real, controls


def halves_of(
    screen: Screen, controls: np.ndarray, starts: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | slice]:
    """`control_halves` of the controls of a context, and which predicted cells are scored with them.

    Parameters
    ----------
    starts
        (n,) the controls that predicted cells were started from, where that is known. Those that started from the half
        that measures the truth are left out; where all did, the halves change places.
    """
    start, truth = control_halves(screen, controls)
    if starts is None or len(controls) == 1:
        return start, truth, slice(None)
    if (fair := ~np.isin(starts, truth)).any():
        return start, truth, fair
    return truth, start, slice(None)


def start_rows(obs: pd.DataFrame, screen: Screen) -> np.ndarray | None:
    """(n,) the control of the screen that each predicted cell was started from, by its name; None where not all say
    one that is there."""
    if "source_control" not in obs:
        return None
    rows = screen.obs.index.get_indexer(pd.Index(obs["source_control"].astype(str)))
    return rows if (rows >= 0).all() and screen.is_control[rows].all() else None


def in_genes_of(predicted: AnnData, screen: Screen) -> tuple[sparse.csr_matrix, np.ndarray]:
    """(n, G) predicted values in the order of the screen's genes, and (G,) which of these were predicted.

    Raises ValueError where a predicted gene is not in the screen.
    """
    genes, values, had = GeneVocab(tuple(predicted.var_names.astype(str))), as_csr(predicted.X), measured(predicted.var)
    columns = genes.align(screen.expression.genes, min_overlap=0.0).columns
    if lacking := [genes.names[i] for i in np.flatnonzero(had & (columns < 0))]:
        raise ValueError(
            f"{len(lacking)} of the {len(genes)} predicted genes are not in {screen.path}, for example "
            f"{few(lacking)}; give the screen that was predicted."
        )
    taken = np.flatnonzero(had)
    n_genes = len(screen.expression.genes)
    place = sparse.csr_matrix((np.ones(len(taken)), (np.arange(len(taken)), columns[taken])), (len(taken), n_genes))
    kept = np.zeros(n_genes, dtype=bool)
    kept[columns[taken]] = True
    return sparse.csr_matrix(values[:, taken] @ place), kept


def measured(var: pd.DataFrame) -> np.ndarray:
    """(n_vars,) of predictions, whether their controls had the gene; files of others say nothing."""
    if "measured" not in var:
        return np.ones(len(var), dtype=bool)
    if var["measured"].dtype != bool:
        raise ValueError(
            f"var column 'measured' of the predictions holds {var['measured'].iloc[0]!r}; it must be true or false, "
            "whether the controls had the gene. Give it another name if it says something else."
        )
    return var["measured"].to_numpy()


class ControlChoices:
    """The control that each cell to predict starts from, chosen once for all conditions that choose from the same."""

    def __init__(self, expression: Expression, seed: int) -> None:
        self._expression, self._seed = expression, seed
        self._known: dict[tuple[bytes, int], np.ndarray] = {}

    def __call__(self, start: np.ndarray, n_cells: int) -> np.ndarray:
        """(n_cells,) positions in the rows `start`."""
        key = start.tobytes(), n_cells
        if key not in self._known:
            expression = self._expression
            pool = replace(expression, X=expression.X[start], library_size=expression.library_size[start])
            self._known[key] = choose_controls(pool, n_cells, self._seed, population=0)
        return self._known[key]


def with_no_change(
    values: sparse.csr_matrix, kept: np.ndarray, expression: Expression, start: np.ndarray, starts: np.ndarray | None,
    choices: ControlChoices,
) -> np.ndarray:  # fmt: skip
    """(n, G) predicted cells, with the values of the control that each started from in genes that are not `kept`."""
    cells = values.toarray().astype(np.float64)
    if kept.all():
        return cells
    if starts is None:
        starts = start[choices(start, len(cells))]
    cells[:, ~kept] = expression.log1p(starts)[:, ~kept].toarray()
    return cells


def some(names: pd.Index, rows: np.ndarray) -> np.ndarray:
    """These rows, at most MAX_CELLS, by a hash of their `names`."""
    if len(rows) <= MAX_CELLS:
        return rows
    return np.sort(rows[np.argsort(cell_order_key(names[rows].to_numpy(), seed=1), kind="stable")[:MAX_CELLS]])


def one_a_control(names: pd.Index, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of these rows of predicted cells one for each control, (n,) `starts`, by a hash of their `names`.

    Cells from one control are alike, however many there are: distances between them are not those of independent cells,
    and an energy distance that counts them is too large.
    """
    order = rows[np.argsort(cell_order_key(names[rows].to_numpy(), seed=2), kind="stable")]
    return np.sort(order[np.unique(starts[order], return_index=True)[1]])


class SimpleMethods:
    """Cells that simple predictors of means make of the control cells, with whole counts as the model's own have.

    Parameters
    ----------
    split
        Whose training cells they know.
    tables
        What the model knows of perturbations besides their names.
    """

    def __init__(self, screen: Screen, split: Split, match: ControlMatch, tables: Sequence[FeatureTable] = ()) -> None:
        expression = screen.expression
        trained, controls = held_out_rows(screen, split.train, match)
        of_training = {context: rows[split.train[rows]] for context, rows in controls.items()}
        of_controls = {c: gene_moments(expression.log1p(rows)) for c, rows in of_training.items() if len(rows)}
        self._screen, self._rows = screen, list(trained.values())
        control_mean, control_noise = _means([of_controls[c, b] for _, c, b in trained])
        perturbed_mean, perturbed_noise = _means([gene_moments(expression.log1p(rows)) for rows in self._rows])
        self.training = TrainingMeans(
            perturbation=[p for p, _, _ in trained],
            cell_type=[c for _, c, _ in trained],
            batch=[b for _, _, b in trained],
            control_mean=control_mean,
            perturbed_mean=perturbed_mean,
            n_cells=np.array([len(rows) for rows in self._rows]),
            notation=screen.notation,
            genes=expression.genes,
            tables=tables,
            control_noise=control_noise,
            perturbed_noise=perturbed_noise,
        )
        self._others: dict[tuple[str, str], tuple[np.ndarray, np.ndarray] | None] = {}

    def cells(
        self, condition: Condition, start: np.ndarray, n_cells: int, choices: ControlChoices, seed: int
    ) -> dict[str, np.ndarray]:
        """(n, G) log1p cells by method, of a condition whose controls are the rows `start`.

        As many as there are different controls, and at most `n_cells`, whose mean is that of all. A transplant is of
        training cells.
        """
        expression = self._screen.expression
        asked = Context(*condition, expression.log1p(start).toarray().astype(np.float64))
        chosen = choices(start, min(n_cells, len(start)))
        control, one = asked.control[chosen], expression.one_count(start[chosen])
        uniform = numpy_generator(seed, "simple methods").random(control.shape)
        made = {NO_CHANGE: asked.control}  # all of them: a part would have a mean of its own
        for name, predict in PREDICTORS.items():
            if name == NO_CHANGE or (shift := predict(self.training, asked)) is None:
                continue
            # The shift is from the mean of all controls, of which the chosen ones differ by a little.
            cells = shift_cells(control, shift + asked.control_mean - control.mean(axis=0))
            made[name] = _with_whole_counts(cells, one, uniform)
        if (conditions := transplant_rows(self.training, asked)) is not None:
            donors = np.concatenate([self._rows[i] for i in conditions])
            order = np.argsort(cell_order_key(self._screen.obs.index[donors].to_numpy(), seed=1), kind="stable")
            made[TRANSPLANT] = expression.log1p(donors[order[:n_cells]]).toarray().astype(np.float64)
        return made

    def trust(self, condition: Condition, start: np.ndarray) -> Trust:
        """What is expected of the prediction of a condition whose controls are the rows `start`."""
        return trust(self.training, Context(*condition, gene_means(self._screen.expression.log1p(start))[None]))

    def others(self, cell_type: str, batch: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(G,) means of two halves of the training cells of a context, of any perturbation; None where they are few or
        of one perturbation."""
        key = cell_type, batch
        if key not in self._others:
            here = [i for i, c in enumerate(zip(self.training.cell_type, self.training.batch, strict=True)) if c == key]
            rows = np.concatenate([self._rows[i] for i in here]) if len(here) > 1 else np.zeros(0, np.int64)
            halves = control_halves(self._screen, rows) if len(rows) >= LEAST_OTHERS else None
            log1p = self._screen.expression.log1p
            self._others[key] = None if halves is None else (gene_means(log1p(halves[0])), gene_means(log1p(halves[1])))
        return self._others[key]


@dataclass(frozen=True)
class Response:
    """Mean responses to one perturbation of a context, (G,), and the variance of each mean; for comparing them."""

    perturbation: str
    predicted: np.ndarray
    measured: np.ndarray
    noise: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, perturbation: str, predicted: np.ndarray, measured: np.ndarray) -> Response:
        noise = [cells.var(axis=0, ddof=min(1, len(cells) - 1)) / len(cells) for cells in (predicted, measured)]
        means = [cells.mean(axis=0).astype(np.float32) for cells in (predicted, measured)]
        return cls(perturbation, means[0], means[1], (noise[0].astype(np.float32), noise[1].astype(np.float32)))


def relative_spread(
    responses: Mapping[tuple[str, str], list[Response]],
    spread: Callable[..., tuple[float, float]],
) -> float | None:
    """Spread between the perturbations of each context, predicted over measured; None without three in any, or where
    what was measured does not differ beyond its noise."""
    found = [
        spread(
            {r.perturbation: r.predicted for r in of},
            {r.perturbation: r.measured for r in of},
            {r.perturbation: r.noise for r in of},
        )
        for of in responses.values()
        if len(of) >= 3
    ]
    if not found:
        return None
    predicted, true = np.sum(found, axis=0)
    return float(np.sqrt(max(predicted, 0.0) / true)) if true > 0 else None


def _means(moments: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray | None]:
    mean, variance, n_cells = zip(*moments, strict=True)
    return np.stack(mean), noise_of_means(np.stack(variance), np.array(n_cells))


def _with_whole_counts(cells: np.ndarray, one: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    tensors = (torch.from_numpy(np.ascontiguousarray(values))[None] for values in (cells, one, uniform))
    return with_whole_counts(*tensors)[0].numpy()
