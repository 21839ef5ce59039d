"""What pretraining on several perturbation screens gives one more: scores on perturbations that no cell received.

    python scripts/bench/many_screens.py                                  # minutes on one core
    python scripts/bench/many_screens.py --screens 8 --trained 5 10 20 --seed 1

Simulated, since the truth must be one that screens share: each perturbation has a vector of features, and its effect is
those of the programs of genes that they weigh, plus what is its own. The screens have their own cell lines, batches and
perturbations. A network learns from all but the last screen with their features; then from few perturbations of the
last one, once from random weights and once from those; the others of that screen are predicted from features. Features
hold noise. Prints JSON lines; simple methods know the last screen alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from perturbdiff.atlas.build.run import build
from perturbdiff.config import load_build_config, load_config
from perturbdiff.data.simulate import CONTROL, SimulationConfig, draw_cells, ground_truth
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from perturbdiff.training.run import finetune, train

RECIPES = Path(__file__).parents[2] / "recipes"
FROM_SCRATCH = RECIPES / "train" / "unseen_perturbations.yaml"
FINE_TUNING = RECIPES / "finetune" / "unseen_perturbations.yaml"
N_GENES, N_PERTURBATIONS = 300, 40  # of each screen
N_FEATURES, N_RESPONDING, PROGRAM_FRACTION = 8, 120, 0.35  # of the features, the genes, and the genes of a program
EFFECT, OWN_EFFECT, OWN_FRACTION, FEATURE_NOISE = 0.7, 0.3, 0.2, 0.3
SHOWN = ("pearson_delta", "energy_distance")


class Programs:
    """What the screens share: the baseline of genes, and which of them a feature moves."""

    def __init__(self, seed: int) -> None:
        self._rng, self._seed = np.random.default_rng(seed), seed
        self._truth = ground_truth(SimulationConfig(n_genes=N_GENES, n_effect_genes=N_RESPONDING, seed=seed))
        moved = self._rng.random((N_FEATURES, N_RESPONDING)) < PROGRAM_FRACTION
        self._programs = moved * self._rng.normal(size=moved.shape) / np.sqrt(N_FEATURES * PROGRAM_FRACTION)
        self._responding = np.sort(self._rng.choice(N_GENES, N_RESPONDING, replace=False))
        self.features: dict[str, np.ndarray] = {}

    def screen(self, name: str, path: Path) -> list[str]:
        """Draw one; returns its perturbations."""
        config = SimulationConfig(
            n_genes=N_GENES, n_cell_types=1, n_perturbations=N_PERTURBATIONS, cells_per_condition=60,
            control_cells_per_context=300, n_effect_genes=N_RESPONDING, seed=1000 * self._seed + len(self.features),
        )  # fmt: skip
        truth, rng = ground_truth(config), self._rng
        features = rng.normal(size=(N_PERTURBATIONS, N_FEATURES))
        size = (N_PERTURBATIONS, N_RESPONDING)
        own = OWN_EFFECT * rng.normal(size=size) * (rng.random(size) < OWN_FRACTION)
        names = [f"{name}_{i}" for i in range(N_PERTURBATIONS)]
        changed = replace(
            truth,
            baseline=self._truth.baseline,
            effect_genes=np.tile(self._responding, (N_PERTURBATIONS, 1)),
            effect=(EFFECT * features @ self._programs + own)[:, None, :],
            perturbations=(CONTROL, *names),
            cell_types=(f"line_{name}",),
            batches=(f"{name}_a", f"{name}_b"),
        )
        draw_cells(changed, path)
        noisy = features + FEATURE_NOISE * rng.normal(size=features.shape)
        self.features |= dict(zip(names, noisy, strict=True))
        return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", type=int, default=4, help="that are pretrained on (default: %(default)s)")
    parser.add_argument(
        "--trained",
        type=int,
        nargs="+",
        default=[5, 20],
        help=f"perturbations of the last screen, fewer than {N_PERTURBATIONS}",
    )
    parser.add_argument("--steps", type=int, default=800, help="of pretraining (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 0 < min(options.trained) <= max(options.trained) < N_PERTURBATIONS:
        parser.error(f"--trained must be 1 to {N_PERTURBATIONS - 1}: the others are predicted.")
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder, programs = Path(name), Programs(options.seed)
        sources = [folder / f"screen_{i}.h5ad" for i in range(options.screens)]
        for i, path in enumerate(sources):
            programs.screen(f"screen{i}", path)
        names = programs.screen("last", folder / "last.h5ad")
        table = folder / "features.csv"
        pd.DataFrame(programs.features).T.to_csv(table)
        words = [f'data.perturbation_features=["{table}"]', f"training.seed={options.seed}"]
        pretrain(folder, sources, options.steps, words).save_pretrained(folder / "pretrained")
        last = anndata.read_h5ad(folder / "last.h5ad")
        held_out = names[max(options.trained) :]
        for n in options.trained:
            screen, kept = folder / f"{n}.h5ad", {CONTROL, *names[:n], *held_out}
            last[last.obs["perturbation"].isin(kept)].write_h5ad(screen)
            common = {"hold_out": held_out, "overrides": words}
            runs = {
                "random weights": train(screen, folder / f"scratch_{n}", recipe=FROM_SCRATCH, **common),
                "pretrained": finetune(
                    screen, folder / "pretrained", folder / f"tuned_{n}", recipe=FINE_TUNING, **common
                ),
            }
            for start, run in runs.items():
                assert run.scores is not None, "no signal stops a benchmark"
                for metric, column in run.scores.means()[list(SHOWN)].items():
                    means = {method: round(float(mean), 3) for method, mean in column.items() if np.isfinite(mean)}
                    said = {"seed": options.seed, "screens": options.screens, "trained": n, "start": start}
                    print(json.dumps({**said, "metric": metric, **means}), file=sys.__stdout__, flush=True)


def pretrain(folder: Path, sources: list[Path], steps: int, words: list[str]) -> PerturbDiff:
    """A model of all screens but the last, of perturbations by their features."""
    given = {"out": str(folder / "atlas"), "sources": [{"path": str(path)} for path in sources]}
    build(load_build_config([], given=given), 4 << 30, 1, None)
    settings = {"out": str(folder / "run"), "data": {"atlases": [{"path": str(folder / "atlas")}], "n_hvg": None}}
    words = [*words, f"training.n_steps={steps}", "diffusion.start=controls"]
    result = fit(load_config(FROM_SCRATCH, words, settings))
    if result.stopped_by is not None:
        raise SystemExit(f"pretraining was stopped by {result.stopped_by} after step {result.step}")
    return result.model


if __name__ == "__main__":
    main()
