"""How long scoring takes: many conditions of a screen of random counts, without a network.

python scripts/bench/scores.py [--conditions 2000] [--cells 100] [--genes 2000]
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from perturbdiff.config import DataConfig, SplitConfig
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import make_split
from perturbdiff.evaluation.scores import score_conditions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conditions", type=int, default=2000)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--genes", type=int, default=2000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    labels = ["control", *(f"P{i}" for i in range(args.conditions))]
    sizes = [10 * args.cells] + [args.cells] * args.conditions
    parts = []
    for batch in ("held_out", "trained"):
        obs = pd.DataFrame({"perturbation": np.repeat(labels, sizes), "cell_type": "T", "batch": batch})
        # By condition: a single draw permutes all entries, and would be the peak of memory.
        drawn = [sparse.random(n, args.genes, 0.08, "csr", np.float32, rng, rng.standard_exponential) for n in sizes]
        X = sparse.vstack(drawn, "csr")
        X.data = np.ceil(X.data)
        parts.append(anndata.AnnData(X, obs=obs.set_axis([f"{batch}_{i}" for i in range(len(obs))])))
    screen = Screen.read(anndata.concat(parts), DataConfig(screen="x"))
    split = make_split(screen, SplitConfig(["batch=held_out"], [], 0.0), 0)
    rows = np.flatnonzero(split.test)
    predicted = anndata.AnnData(screen.expression.log1p(rows), screen.obs.iloc[rows])
    predicted.var_names = list(screen.expression.genes.names)
    before = time.process_time()
    scores = score_conditions(predicted, screen, "batch", split)
    found = {
        "conditions": args.conditions, "cells": args.cells, "genes": args.genes, "methods": len(scores.methods),
        "cpu_s": round(time.process_time() - before, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
