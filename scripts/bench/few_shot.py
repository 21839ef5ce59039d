"""What pretraining gives where few treated cells were measured: scores on a held-out cell type, fine-tuned or not.

    python scripts/bench/few_shot.py --data FOLDER          # minutes on one core; FOLDER has the three real files
    python scripts/bench/few_shot.py --data FOLDER --pretrain-steps 100 400 1500 --hold-out NK      # a learning curve

Pretrains on unperturbed cells (stoeckius2018, scp1884, and the controls of kang2018), then trains on 1, 10 and 100 % of
the IFN-beta treated cells of kang2018 without those of one cell type, once from random weights and once from those of
each pretraining, and scores the predicted cells of that type. Everything goes through atlases, recipes and calls that
users have. Prints JSON lines; CPU-seconds are those of training and scoring.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np

from perturbdiff.atlas.build.run import build
from perturbdiff.config import load_build_config, load_config
from perturbdiff.data.gene_choice import GeneMoments, best_genes
from perturbdiff.data.screen import Screen
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from perturbdiff.training.run import finetune
from perturbdiff.training.run import train as train_and_score

RECIPES = Path(__file__).parents[2] / "recipes"
FROM_SCRATCH, FINE_TUNING = RECIPES / "train" / "cross_cell_type.yaml", RECIPES / "finetune" / "few_shot.yaml"
UNPERTURBED = ("stoeckius2018_pbmc_hto_unperturbed.h5ad", "scp1884_crohn_gut_unperturbed_1k.h5ad")
SCREEN = "kang2018_pbmc_ifnb.h5ad"
N_GENES = 2000
SHOWN = ("pearson_delta", "energy_distance", "variance_ratio", "mse_of_means")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--percent", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--hold-out", default="CD4T", metavar="CELL_TYPE")
    parser.add_argument("--pretrained", type=Path, metavar="FOLDER", help="models are kept there, and used again")
    parser.add_argument("--pretrain-steps", type=int, nargs="+", default=[2000], help="of one pretraining each")
    parser.add_argument("--sets", choices=["marginal", "self_controlled"], default="self_controlled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of fine-tuning and training from scratch")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        kang = anndata.read_h5ad(options.data / SCREEN)
        kang.obs["batch"] = "kang"  # its two runs are its two conditions
        kang.obs["n_counts"] = np.asarray(kang.X.sum(1)).ravel()
        treated = (kang.obs["perturbation"] != "control").to_numpy()
        trained = ~(treated & (kang.obs["cell_type"] == options.hold_out).to_numpy())
        kang = kang[:, genes_of(kang[trained])].copy()
        held_out, models = f"IFN-beta:{options.hold_out}", options.pretrained or folder / "models"
        for steps in options.pretrain_steps:
            started = time.process_time()
            if not (models / str(steps)).is_dir():
                pretrain(folder, kang[~treated], steps, options).save_pretrained(models / str(steps))
                report("pretraining", options, time.process_time() - started, pretrain_steps=steps)
        for percent in options.percent:
            screen = folder / f"kang_{percent:g}.h5ad"
            kept = fraction_of(treated & trained, percent / 100, options.seed)
            kang[~treated | ~trained | kept].write_h5ad(screen)
            words = ["data.library_size_col=n_counts", f"training.seed={options.seed}", *options.settings]
            for steps in (0, *options.pretrain_steps):
                out, started = folder / f"{steps}_{percent:g}", time.process_time()
                if steps:
                    run = finetune(
                        screen, models / str(steps), out, hold_out=held_out, recipe=FINE_TUNING, overrides=words
                    )
                else:
                    run = train_and_score(screen, out, hold_out=held_out, recipe=FROM_SCRATCH, overrides=words)
                scores = run.scores
                start = "pretrained" if steps else "random weights"
                assert scores is not None, "no signal stops a benchmark"
                mean = scores.means().loc["PerturbDiff"]
                said = {name: round(float(mean[name]), 4) for name in SHOWN}
                seconds = time.process_time() - started
                cells = int(kept.sum())
                report(start, options, seconds, pretrain_steps=steps, percent=percent, treated_cells=cells, **said)


def genes_of(cells: anndata.AnnData) -> np.ndarray:
    """Places of the genes that vary most between some cells."""
    config = load_config(None, [], {"out": "unused", "data": {"screen": "memory"}})
    X = Screen.from_parts(cells.X, cells.obs, cells.var, config.data, "memory").expression.log1p()
    moments = GeneMoments(X.shape[1])
    moments.add(X)
    return best_genes(N_GENES, moments.variance())


def pretrain(folder: Path, controls: anndata.AnnData, steps: int, options: argparse.Namespace) -> PerturbDiff:
    """A model of all sources, without labels of perturbations."""
    if not (folder / "atlas").is_dir():
        controls.write_h5ad(folder / "controls.h5ad")
        (folder / "genes.txt").write_text("\n".join(controls.var_names))
        sources = [
            *({"path": str(options.data / name), "perturbation_col": None, "cells": "all"} for name in UNPERTURBED),
            {"path": str(folder / "controls.h5ad"), "library_size_col": "n_counts"},
        ]
        given = {"out": str(folder / "atlas"), "genes": str(folder / "genes.txt"), "sources": sources}
        build(load_build_config([], given=given), 4 << 30, 1, None)
    atlases = [{"path": str(folder / "atlas"), "sets": options.sets}]
    given = {"out": str(folder / f"pretrained_{steps}"), "data": {"atlases": atlases, "n_hvg": None}}
    words = [f"training.n_steps={steps}", f"training.seed={options.seed}"]
    result = fit(load_config(FROM_SCRATCH, words, given))
    if result.stopped_by is not None:
        raise SystemExit(f"pretraining was stopped by {result.stopped_by} after step {result.step}")
    return result.model


def fraction_of(cells: np.ndarray, part: float, seed: int) -> np.ndarray:
    """A random part of the cells, at least one."""
    rows = np.flatnonzero(cells)
    kept = np.zeros(len(cells), dtype=bool)
    kept[np.random.default_rng(seed).permutation(rows)[: max(1, round(part * len(rows)))]] = True
    return kept


def report(start: str, options: argparse.Namespace, seconds: float, **said: object) -> None:
    line = {"start": start, "seed": options.seed, "settings": options.settings, "cpu_s": round(seconds, 1), **said}
    print(json.dumps(line), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
