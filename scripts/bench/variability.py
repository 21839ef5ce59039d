"""Do predicted populations vary as measured ones do? Simulated screens with many batches, and real ones.

    python scripts/bench/variability.py                                   # minutes on one core
    python scripts/bench/variability.py --batches 30 --variability 0.3 --seed 7 diffusion.start=mean
    python scripts/bench/variability.py --screen FILE.h5ad --recipe new_batch        # batches are left out in turn

A simulated screen is trained without some of its batches, and predicted from the control cells of the others, pooled.
Scores are of `evaluation.populations`, over the genes that a perturbation moves, beside populations of the training
batches and of the new ones. Of a real screen every batch with a perturbation is left out in turn: the energy score of
its measured mean (E|X - y| - E|X - X'| / 2, less is better), by populations of the product, by the same without what
they have of their own, and by the mean of a training batch. Prints JSON lines, then the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from scipy import sparse

from perturbdiff.config import load_config
from perturbdiff.data.screen import Screen
from perturbdiff.data.simulate import SimulationConfig, simulate
from perturbdiff.evaluation.populations import population_scores
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit

SMALL = ("denoiser.width=64", "denoiser.depth=2", "denoiser.n_heads=4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screen", type=Path, metavar="FILE.h5ad", help="a real one; by default one is simulated")
    parser.add_argument("--recipe", metavar="NAME")
    parser.add_argument("--genes", type=int, default=60)
    parser.add_argument("--effect-genes", type=int, default=20)
    parser.add_argument("--perturbations", type=int, default=2)
    parser.add_argument("--batches", type=int, default=60, help="that are trained")
    parser.add_argument("--new-batches", type=int, default=30, help="that are not")
    parser.add_argument("--cells", type=int, default=64, help="of a perturbation in a batch")
    parser.add_argument("--variability", type=float, default=0.6, help="sd of an effect between batches, by its size")
    parser.add_argument("--populations", type=int, default=32)
    parser.add_argument("--predicted-cells", type=int, nargs="+", default=[64, 256, 1024], help="of a population")
    parser.add_argument("--own-controls", action="store_true", help="predict new batches of their own control cells")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of training")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        rows = real(options, Path(name)) if options.screen else simulated(options, Path(name))
        for row in rows:
            print(json.dumps(row), file=sys.__stdout__, flush=True)
    print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def simulated(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    config = SimulationConfig(
        n_genes=options.genes, n_cell_types=1, n_batches=options.batches + options.new_batches,
        n_perturbations=options.perturbations, cells_per_condition=options.cells, control_cells_per_context=32,
        n_effect_genes=options.effect_genes, batch_variability=options.variability, mean_library_size=1500.0,
        seed=options.seed,
    )  # fmt: skip
    truth = simulate(config, folder / "screen.h5ad")
    screen = anndata.read_h5ad(folder / "screen.h5ad")
    batch = screen.obs["batch"].astype(str).to_numpy()
    trained = np.isin(batch, truth.batches[: options.batches])
    words = ["data.n_hvg=null", "split.validation_fraction=0", *([] if options.own_controls else UNKNOWN)]
    model, seconds = train(screen[trained].copy(), options, folder, words)
    effect = np.array(sorted(truth.effect_genes[0]))
    by_batch = measured(model, screen, "pert_0")
    old, new = ([by_batch[name][:, effect] for name in by_batch if (name in olds) == known] for known in (True, False)
                for olds in [set(truth.batches[: options.batches])])  # fmt: skip
    rng = np.random.default_rng(options.seed)
    cells = np.concatenate(old)
    mixed = [cells[rng.choice(len(cells), options.cells, replace=False)] for _ in range(options.populations)]
    rows = [row("training batches", options.cells, old, new), row("their cells mixed", options.cells, mixed, new)]
    is_control = (screen.obs["perturbation"] == "control").to_numpy()
    for n_cells in options.predicted_cells:
        for varied in (False, True):
            started = time.process_time()
            if options.own_controls:
                made = []
                for number, name in enumerate(truth.batches[options.batches :]):
                    own = screen[is_control & (batch == name)].copy()
                    made.append(
                        model.generate(
                            own, "pert_0", batch=name, n_cells=n_cells, seed=number, varied=varied
                        ).X.toarray()
                    )
            else:
                predicted = model.generate(
                    screen[is_control & trained].copy(), "pert_0", n_cells=n_cells, n_populations=options.populations,
                    varied=varied,
                )  # fmt: skip
                X, number = predicted.X.toarray(), predicted.obs["population"].to_numpy()
                made = [X[number == k] for k in range(options.populations)]
            cost = round(time.process_time() - started, 1)
            name = "predicted" if varied else "predicted, no draw"
            rows.append(row(name, n_cells, [cells[:, effect] for cells in made], new) | {"cpu_s": cost})
    rows[0]["cpu_s"] = rows[1]["cpu_s"] = 0.0
    print(f"trained in {seconds:.0f} CPU-seconds")
    return rows


def row(name: str, n_cells: int, predicted: Sequence[np.ndarray], new: Sequence[np.ndarray]) -> dict[str, Any]:
    scores = asdict(population_scores(predicted[:24] if len(predicted) > 24 else predicted, new[:24]))
    whole = asdict(population_scores(predicted, new))
    scores = {**whole, "two_level": scores["two_level"]}
    return {"populations": name, "cells": n_cells, **{key: round(value, 3) for key, value in scores.items()}}


UNKNOWN = ["data.control_match=cell_type"]  # the model does not know batches by name


def train(
    screen: anndata.AnnData, options: argparse.Namespace, folder: Path, words: Sequence[str]
) -> tuple[PerturbDiff, float]:
    """A model of all cells, and the CPU-seconds it took."""
    started, path = time.process_time(), folder / "trained.h5ad"
    screen.write_h5ad(path)
    small = [] if options.recipe else SMALL
    given = {"out": str(folder / f"run{time.monotonic_ns()}"), "data": {"screen": str(path)}}
    config = load_config(options.recipe, [*small, *words, "training.trackers=[]", *options.settings], given)
    return fit(config, Screen.read(path, config.data)).model, time.process_time() - started


def measured(model: PerturbDiff, screen: anndata.AnnData, perturbation: str) -> dict[str, np.ndarray]:
    """Cells of each batch, log1p, in the genes of the model."""
    cells = screen[(screen.obs[model.config.obs.perturbation] == perturbation).to_numpy()].copy()
    X = model.control_rows(cells, anndata.AnnData(sparse.csr_matrix((0, len(model.genes))), var=names(model))).X
    batch = cells.obs[model.config.obs.batch].astype(str).to_numpy()
    return {name: X[batch == name].toarray() for name in sorted(set(batch))}


def names(model: PerturbDiff) -> Any:
    import pandas as pd

    return pd.DataFrame(index=pd.Index(model.gene_names))


def real(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    screen = anndata.read_h5ad(options.screen)
    with_controls = screen.obs["batch"][(screen.obs["perturbation"] == "control").to_numpy()].unique()
    screen = screen[screen.obs["batch"].isin(with_controls).to_numpy()].copy()
    batches = sorted(set(screen.obs["batch"].astype(str)))
    is_control = (screen.obs["perturbation"] == "control").to_numpy()
    found: dict[str, list[float]] = {}
    for left_out in batches:
        here = (screen.obs["batch"].astype(str) == left_out).to_numpy()
        model, _ = train(screen[~here].copy(), options, folder, ["split.validation_fraction=0"])
        controls = screen[is_control & here].copy()
        for perturbation in model.vocabularies.trained:
            of = measured(model, screen, perturbation)
            if left_out not in of or len(of) < 2 or len(of[left_out]) < 30:
                continue
            truth = of.pop(left_out).mean(axis=0)
            others = np.stack([cells.mean(axis=0) for cells in of.values()])
            own = measured(model, screen, "control")
            change = others - np.stack([own[name].mean(axis=0) for name in of]) + own[left_out].mean(axis=0)
            clouds = {"mean of a training batch": others, "change in a training batch": np.maximum(change, 0)}
            for name, varied in (("predicted, no draw", False), ("predicted", True)):
                made = model.generate(
                    controls, perturbation, n_cells=256, n_populations=options.populations, varied=varied
                )
                X, number = made.X.toarray(), made.obs["population"].to_numpy()
                clouds[name] = np.stack([X[number == k].mean(axis=0) for k in range(options.populations)])
            for name, means in clouds.items():
                found.setdefault(name, []).append(energy_score(means, truth))
    none = np.array(found["predicted, no draw"])
    return [
        {
            "populations": name, "conditions": len(scores), "energy_score": round(float(np.mean(scores)), 4),
            "by_no_draw": round(float(np.mean(np.array(scores) / none)), 3),
            "better_than_no_draw": round(float(np.mean(np.array(scores) < none)), 3),
        }
        for name, scores in found.items()
    ]  # fmt: skip


def energy_score(means: np.ndarray, truth: np.ndarray) -> float:
    """E|X - y| - E|X - X'| / 2 of (K, G) means X and the (G,) one y; pairs are of different populations."""
    to_truth = np.linalg.norm(means - truth, axis=1).mean()
    n = len(means)
    between = sum(np.linalg.norm(means - one, axis=1).sum() for one in means) / max(n * (n - 1), 1)
    return float(to_truth - between / 2)


if __name__ == "__main__":
    main()
