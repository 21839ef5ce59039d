"""What pretraining gives where few treated cells were measured: scores on a held-out cell type, fine-tuned or not.

    python scripts/bench/few_shot.py --data FOLDER          # minutes on one core; FOLDER has the two real screens

Pretrains on unperturbed cells (stoeckius2018, and the controls of kang2018), then trains on 1, 10 and 100 % of the
IFN-beta treated cells of kang2018 without CD4T, once from random weights and once from the pretrained ones, and scores
the predicted CD4T. Everything goes through atlases, recipes and calls that users have. Prints JSON lines; CPU-seconds
are those of training and scoring.
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
UNPERTURBED, SCREEN = "stoeckius2018_pbmc_hto_unperturbed.h5ad", "kang2018_pbmc_ifnb.h5ad"
HELD_OUT = "IFN-beta:CD4T"
N_GENES = 2000
SHOWN = ("pearson_delta", "energy_distance", "variance_ratio", "mse_of_means")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--percent", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--pretrained", type=Path, metavar="FOLDER", help="model folder: kept there, and used again")
    parser.add_argument("--pretrain-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of fine-tuning and training from scratch")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        kang = anndata.read_h5ad(options.data / SCREEN)
        kang.obs["batch"] = "kang"  # its two runs are its two conditions
        kang.obs["n_counts"] = np.asarray(kang.X.sum(1)).ravel()
        treated = (kang.obs["perturbation"] != "control").to_numpy()
        trained = ~(treated & (kang.obs["cell_type"] == "CD4T").to_numpy())
        kang = kang[:, genes_of(kang[trained])].copy()
        started = time.process_time()
        pretrained = options.pretrained or folder / "model"
        if not pretrained.is_dir():
            pretrain(folder, options.data / UNPERTURBED, kang[~treated], options).save_pretrained(pretrained)
            report("pretrained", options, time.process_time() - started)
        for percent in options.percent:
            screen = folder / f"kang_{percent:g}.h5ad"
            kept = fraction_of(treated & trained, percent / 100, options.seed)
            kang[~treated | ~trained | kept].write_h5ad(screen)
            words = ["data.library_size_col=n_counts", f"training.seed={options.seed}", *options.settings]
            for start in ("random weights", "pretrained"):
                out, started = folder / f"{start.split()[0]}_{percent:g}", time.process_time()
                if start == "pretrained":
                    scores = finetune(
                        screen, pretrained, out, hold_out=[HELD_OUT], recipe=FINE_TUNING, overrides=words
                    ).scores
                else:
                    scores = train_and_score(
                        screen, out, hold_out=[HELD_OUT], recipe=FROM_SCRATCH, overrides=words
                    ).scores
                assert scores is not None, "no signal stops a benchmark"
                mean = scores.means().loc["PerturbDiff"]
                said = {name: round(float(mean[name]), 4) for name in SHOWN}
                seconds = time.process_time() - started
                report(start, options, seconds, percent=percent, treated_cells=int(kept.sum()), **said)


def genes_of(cells: anndata.AnnData) -> np.ndarray:
    """Places of the genes that vary most between some cells."""
    config = load_config(None, [], {"out": "unused", "data": {"screen": "memory"}})
    X = Screen.from_parts(cells.X, cells.obs, cells.var, config.data, "memory").expression.log1p()
    moments = GeneMoments(X.shape[1])
    moments.add(X)
    return best_genes(N_GENES, moments.variance())


def pretrain(folder: Path, unperturbed: Path, controls: anndata.AnnData, options: argparse.Namespace) -> PerturbDiff:
    """A model of marginal sets of both sources."""
    controls.write_h5ad(folder / "controls.h5ad")
    (folder / "genes.txt").write_text("\n".join(controls.var_names))
    sources = [
        {"path": str(unperturbed), "perturbation_col": None, "cells": "all"},
        {"path": str(folder / "controls.h5ad"), "library_size_col": "n_counts"},
    ]
    given = {"out": str(folder / "atlas"), "genes": str(folder / "genes.txt"), "sources": sources}
    build(load_build_config([], given=given), 4 << 30, 1, None)
    atlases = [{"path": str(folder / "atlas"), "sets": "marginal"}]
    given = {"out": str(folder / "pretrained"), "data": {"atlases": atlases, "n_hvg": None}}
    words = [f"training.n_steps={options.pretrain_steps}", f"training.seed={options.seed}"]
    return fit(load_config(FROM_SCRATCH, words, given)).model


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
