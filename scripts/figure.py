"""The figures of README and docs: held-out cells of a run beside what was predicted, and the change of each gene.

    perturbdiff train --screen kang.h5ad --hold-out IFN-beta:CD4T --out runs/kang data.n_hvg=null
    python scripts/figure.py runs/kang docs/figures/kang.png
    perturbdiff train --screen screen.h5ad --hold-out pert_0:type_0 --out runs/screen
    python scripts/figure.py runs/screen docs/figures/screen.png

kang.h5ad is described in scripts/bench/tasks/kang_CD4T.yaml, screen.h5ad made in docs/start.md. X of either: counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import numpy as np
import yaml
from anndata import AnnData

import perturbdiff


def log_cp10k(counts: AnnData) -> AnnData:
    """log1p of counts per 10,000, as predicted cells are."""
    totals = np.asarray(counts.X.sum(axis=1))
    normalised = counts.copy()
    normalised.X = counts.X.multiply(1e4 / totals).tocsr().log1p()
    return normalised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    config = yaml.safe_load((arguments.run / "config.yaml").read_text())
    perturbation, cell_type = config["split"]["hold_out"][0].split(":")
    screen = log_cp10k(anndata.read_h5ad(config["data"]["screen"]))
    screen = screen[screen.obs["cell_type"] == cell_type]
    predicted = anndata.read_h5ad(arguments.run / "predicted.h5ad")

    control = screen[screen.obs["perturbation"] == "control"]
    started_from = control.obs_names.isin(predicted.obs["source_control"].astype(str))
    measured = screen[screen.obs["perturbation"] == perturbation]

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    perturbdiff.pl.embedding(measured, predicted, control[~started_from], ax=left)
    # From other control cells than the prediction, or their noise would be in both changes.
    perturbdiff.pl.delta(measured, predicted, control[~started_from], right, predicted_control=control[started_from])
    figure.suptitle(f"{perturbation} in {cell_type}, which training never saw", fontsize=10, x=0.01, ha="left")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
