"""Train on the quality tasks, predict exactly the cells their protocol scores, and score them: JSON lines.

    python scripts/bench/quality.py --tasks FOLDER --features PBMC.parquet    # all four, some minutes on one core
    python scripts/bench/quality.py --tasks FOLDER T1 --fold NK training.n_steps=300

FOLDER holds score.py and, of each task, data.h5ad and real.h5ad. Each task is trained by the recipe that is meant for
such a screen; key=value words win over it. With --fold, training cells are held out instead (a cell type, a patient, a
batch, or knock-outs between commas) and the task's own test cells are not looked at: choose settings so. T2a needs what
is known of the knocked-out genes besides their names, as `perturbdiff screen loadings` makes it of any reference.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from perturbdiff.config import load_config
from perturbdiff.data.screen import Screen
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit

RECIPES = Path(__file__).parents[2] / "recipes" / "train"
TASKS = {  # recipe, and the obs column whose values a fold holds out
    "T1": ("cross_cell_type", "cell_type"),
    "T2a": ("unseen_perturbations", "perturbation"),
    "T2b": ("new_batch", "batch"),
    "T3": ("across_patients", "cell_type"),
}
CAP = 500  # scored cells of a condition of a fold, at most
MIN_DE = 5  # genes: what the protocol asks of a condition for the figures of T2b
SHOWN = ("pearson_delta", "energy_u", "var_ratio", "auprc", "direction", "mse", "delta_norm_ratio")
DATA = ["data.n_hvg=null", "data.input_kind=log1p", "training.trackers=[]", "training.save_every=1000000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--fold", metavar="VALUES", help="hold these out of the training cells instead")
    parser.add_argument("--features", metavar="TABLE", help="of T2a's genes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("words", nargs="*", metavar="TASK or key=value")
    options = parser.parse_intermixed_args()
    settings = [word for word in options.words if "=" in word]
    for task in [word for word in options.words if "=" not in word] or list(TASKS):
        for seed in options.seeds:
            print(json.dumps(run(task, options, [*settings, f"training.seed={seed}"])), flush=True)


def run(task: str, options: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    recipe, column = TASKS[task]
    train_cells, real = task_cells(options.tasks / task, column, options.fold)
    if task == "T2a" and options.features is not None:
        settings = [f"data.perturbation_features=[{options.features}]", *settings]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        given = {"out": f"{out}/run", "data": {"screen": task}}
        config = load_config(RECIPES / f"{recipe}.yaml", [*DATA, *settings], given)
        screen = Screen.from_parts(train_cells.X, train_cells.obs, train_cells.var, config.data, task)
        started = time.process_time()
        model = fit(config, screen).model
        trained = time.process_time()
        predicted = anndata.concat(predictions(model, real, config.training.seed), index_unique="-")
        done = time.process_time()
        mean, conditions = scorer(options.tasks / "score.py").score(predicted, real)
    line = {"task": task, "fold": options.fold, "settings": settings, "steps": config.training.n_steps}
    line |= {"cpu_s": round(trained - started, 1), "predict_cpu_s": round(done - trained, 1)}
    line |= {name: round(mean[name], 4) for name in SHOWN}
    with_de = [scores for scores in conditions.values() if scores["n_de_real"] >= MIN_DE]
    if 0 < len(with_de) < len(conditions):
        line["with_de"] = {name: round(float(np.mean([scores[name] for scores in with_de])), 4) for name in SHOWN[:4]}
    return line


def task_cells(folder: Path, column: str, fold: str | None) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Training cells, and the real cells to score with their controls."""
    cells = anndata.read_h5ad(folder / "data.h5ad")
    train_cells = cells[cells.obs["split"] == "train"].copy()
    if fold is None:
        return train_cells, anndata.read_h5ad(folder / "real.h5ad")
    obs = train_cells.obs.astype(str)
    control = (obs["perturbation"] == "control").to_numpy()
    held = obs[column].isin(fold.split(",")).to_numpy() & ~control
    if not held.any():
        raise ValueError(f"fold {fold!r} names no {column} of {folder.name}; there are {sorted(set(obs[column]))}.")
    generator, chosen = np.random.default_rng(0), []
    for rows in obs[held].groupby(["perturbation", "cell_type"]).groups.values():
        places = obs.index.get_indexer(rows)
        chosen.append(places if len(places) <= CAP else np.sort(generator.choice(places, CAP, replace=False)))
    rows = np.concatenate(chosen)
    contexts = set(zip(obs["cell_type"].to_numpy()[rows], obs["batch"].to_numpy()[rows], strict=True))
    own = np.array([context in contexts for context in zip(obs["cell_type"], obs["batch"], strict=True)])
    real = train_cells[np.concatenate([rows, np.flatnonzero(control & own)])].copy()
    return train_cells[~held].copy(), real


def predictions(model: PerturbDiff, real: anndata.AnnData, seed: int) -> Iterator[anndata.AnnData]:
    """As many cells of each condition and batch as are scored, from the controls of that context."""
    obs = real.obs.astype(str)
    control = (obs["perturbation"] == "control").to_numpy()
    for (perturbation, cell_type, batch), group in obs[~control].groupby(["perturbation", "cell_type", "batch"]):
        context = (obs["cell_type"] == cell_type).to_numpy() & (obs["batch"] == batch).to_numpy()
        made = model.predict(real[control & context].copy(), perturbation=perturbation, n_cells=len(group), seed=seed)
        labels = {"perturbation": perturbation, "cell_type": cell_type, "batch": batch}
        made.obs = pd.DataFrame(labels, index=made.obs_names)
        yield made


def scorer(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("score", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


if __name__ == "__main__":
    main()
