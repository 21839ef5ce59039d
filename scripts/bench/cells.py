"""Do predicted cells look measured? The shape of their distribution, gene by gene, beside cells with the same mean.

    python scripts/bench/cells.py RUN [RUN ...] [--json]

Takes finished run folders of `perturbdiff train` on a screen and prints a row a method, means over their held-out
conditions of 40 cells and more. Wasserstein distances (order 1, over all genes of the model) are divided by those of
halves of the measured cells: the median over genes, and over the 50 genes that respond most. `zeros` is the mean
difference of the part of cells without a gene, `correlation` that of the correlations between genes, `auc` how well a
classifier tells the cells from measured ones (.5: not at all), `whole` the part of values that are whole counts, `sum`
and `sum sd` the sums of counts of a cell over those of its controls: mean and standard deviation.

Methods: the model; control cells moved to the mean that it predicts, and measured cells moved there, which show what
the mean alone gives away; and one half of the measured cells against the other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from perturbdiff.config import load_config
from perturbdiff.data.conditions import ConditionIndex, resolve_control_match
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import control_halves, read_split
from perturbdiff.evaluation import metrics
from perturbdiff.evaluation.fair import held_out_rows
from perturbdiff.means.shifts import shift_cells

LEAST_CELLS, RESPONDERS, SPLITS = 40, 50, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = pd.concat([shape(run) for run in options.runs], ignore_index=True)
    numbers = [name for name in rows if name not in ("run", "method", "condition")]
    means = rows.groupby(["run", "method"], sort=False)[numbers].mean().round(3).reset_index()
    means.insert(2, "conditions", rows.groupby(["run", "method"], sort=False).size().to_numpy())
    if options.json:
        print(json.dumps(means.to_dict("records"), indent=1))
        return
    lines = [list(means.columns), ["---"] * means.shape[1], *means.astype(str).to_numpy().tolist()]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def shape(run: Path) -> pd.DataFrame:
    """A row a held-out condition and method."""
    config = load_config(run / "config.yaml")
    screen = Screen.read(config.data.screen, config.data)
    split = read_split(run / "split.json", screen)
    predicted = anndata.read_h5ad(run / "predicted.h5ad")
    columns = pd.Index(screen.expression.genes.names).get_indexer(predicted.var_names)
    everything = ConditionIndex.build(screen, np.ones(len(screen), dtype=bool))
    match = resolve_control_match(everything, config.data.control_match)
    real, controls = held_out_rows(screen, split.test, match)
    of_cells, rows = predicted.obs[["perturbation", "cell_type", "batch"]].astype(str), []
    for condition, cells in real.items():
        own = (of_cells == list(condition)).all(axis=1).to_numpy()
        if min(own.sum(), len(cells)) < LEAST_CELLS:
            continue
        measured = screen.expression.log1p(cells)[:, columns].toarray().astype(np.float64)
        starts = control_halves(screen, controls[condition[1:]])[0]
        control = screen.expression.log1p(starts)[:, columns].toarray().astype(np.float64)
        X = predicted[own].X.toarray().astype(np.float64)
        rng = np.random.default_rng(0)
        order = rng.permutation(len(measured))
        half, other = measured[order[: len(order) // 2]], measured[order[len(order) // 2 :]]
        against = Measured(measured, control)
        # One half is moved and compared with the other: a cell must not be beside itself.
        moved = shift_cells(half, X.mean(axis=0) - half.mean(axis=0))
        named = {"run": str(run), "condition": ":".join(condition)}
        for method, made, truth in (
            ("PerturbDiff", X, measured),
            ("controls at its mean", shift_cells(control, X.mean(axis=0) - control.mean(axis=0)), measured),
            ("measured at its mean", moved, other),
            ("measured half", half, other),
        ):
            rows.append({**named, "method": method, **against.compare(made, truth, rng)})
        counts = predicted[own].layers["counts"].toarray() if "counts" in predicted.layers else None
        if counts is not None:
            one = screen.expression.one_count(starts)
            of_controls = (np.expm1(control) / np.expm1(one)[:, None]).sum(axis=1)
            sums = counts.sum(axis=1) / of_controls.mean()
            whole = float((counts == np.rint(counts)).mean())
            rows[-4] |= {"whole": whole, "sum": sums.mean(), "sum sd": sums.std()}
            rows[-1] |= {"sum": 1.0, "sum sd": (of_controls / of_controls.mean()).std()}
    return pd.DataFrame(rows)


class Measured:
    """Measured cells of a condition, and how far halves of them are apart."""

    def __init__(self, cells: np.ndarray, control: np.ndarray) -> None:
        self.responders = np.argsort(-np.abs(cells.mean(axis=0) - control.mean(axis=0)))[:RESPONDERS]
        self.n = len(cells) // 2
        rng = np.random.default_rng(1)
        orders = [rng.permutation(len(cells)) for _ in range(SPLITS)]
        halves = [(cells[order[: self.n]], cells[order[self.n : 2 * self.n]]) for order in orders]
        self.apart = np.mean([wasserstein(*pair) for pair in halves], axis=0)  # (G,)

    def compare(self, made: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
        """Scores of cells against measured ones."""
        n = min(self.n, len(made), len(truth))
        pairs = [[cells[rng.permutation(len(cells))[:n]] for cells in (made, truth)] for _ in range(SPLITS)]
        distance = np.mean([wasserstein(*pair) for pair in pairs], axis=0)
        seen = self.apart > 0
        strong = self.responders[seen[self.responders]]
        own, real = pairs[0]
        distances = metrics.Measured(real, real).distances(metrics.in_own_order(own))
        return {
            "wasserstein": float(np.median(distance[seen] / self.apart[seen])),
            "of responders": float(np.median(distance[strong] / self.apart[strong])),
            "zeros": metrics.zero_fraction(own, real),
            "correlation": metrics.correlation(own, real),
            "auc": metrics.classifier_auc(*(of.numpy() for of in distances)),
        }


def wasserstein(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(G,) between as many cells of both."""
    distance: np.ndarray = np.abs(np.sort(a, axis=0) - np.sort(b, axis=0)).mean(axis=0)
    return distance


if __name__ == "__main__":
    main()
