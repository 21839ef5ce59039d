"""What a finished run held out: predicted, scored beside baselines, and calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData, concat

from perturbdiff.config import Config
from perturbdiff.data.conditions import ConditionIndex, ControlMatch
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import Split, read_split
from perturbdiff.evaluation.fair import control_halves, held_out_rows
from perturbdiff.evaluation.scores import Scores, read_measured, score_conditions
from perturbdiff.files import progress
from perturbdiff.hub.download import own_folder
from perturbdiff.inference.intervals import Calibration, calibrate
from perturbdiff.inference.output import write_predicted
from perturbdiff.model import PerturbDiff


@dataclass(frozen=True)
class Scored:
    """Scores of a run's held-out conditions, and the files of its folder."""

    scores: Scores
    written: list[Path]


def score_held_out(config: Config, screen: Screen) -> Scored:
    """Predict the held-out conditions of a finished run and score them, for its folder and its model's card."""
    out = Path(config.out)
    model = PerturbDiff.from_pretrained(out / "model")
    split = read_split(out / "split.json", screen)
    match = model.training.control_match
    assert match is not None, "the model of a run says whose controls it had"
    predicted = predict_held_out(model, screen, split, match, config.training.seed)
    write_predicted(predicted, out / "predicted.h5ad")
    report = score_conditions(predicted, screen, match, split)
    if len(ConditionIndex.build(screen, split.validation)) >= 2:
        calibrate(model, screen, split.validation, match, seed=config.training.seed)
    model.evaluation = report.record()
    model.save_pretrained(out / "model")  # scores and card; the weights stay as they are
    names = ("config.yaml", "split.json", "metrics.jsonl", "model", "predicted.h5ad")
    return Scored(report, [*(out / name for name in names), *report.save(out)])


def predict_held_out(model: PerturbDiff, screen: Screen, split: Split, match: ControlMatch, seed: int) -> AnnData:
    """Predict each held-out condition from one half of its own control cells, as many cells as were measured.

    `screen` has all genes of the file: library sizes are sums over them. Raises as `PerturbDiff.predict`.
    """
    real, controls = held_out_rows(screen, split.test, match)
    predictions, n_cells = [], 0
    with progress(sum(len(rows) for rows in real.values()), "predict", "cell") as bar:
        for (perturbation, cell_type, batch), rows in real.items():
            cells = screen.adata(control_halves(screen, controls[cell_type, batch])[0])
            predicted = model.generate(cells, perturbation, cell_type, batch, n_cells=len(rows), seed=seed, bar=bar)
            predicted.obs_names = pd.Index([f"predicted_{n_cells + i}" for i in range(len(rows))])
            n_cells += len(rows)
            predictions.append(predicted)
    return concat(predictions, merge="same", uns_merge="first")


def calibrate_model(
    folder: str | Path,
    screen: str | Path | AnnData,
    split: str | Path,
    n_populations: int = 5,
    seed: int = 0,
    *,
    overrides: Sequence[str] = (),
    **settings: Any,
) -> Calibration:
    """`calibrate` a model folder, which is replaced, on the validation conditions of a split.

    The screen is read as the model's own was, where overrides and settings (as of `train`) say nothing else. Raises as
    `calibrate`, `evaluate` and `PerturbDiff.from_pretrained`.
    """
    folder = own_folder(folder)
    model = PerturbDiff.from_pretrained(folder)
    columns, preprocessing = model.config.obs, model.preprocessing
    known = {
        "target_sum": preprocessing.target_sum, "library_size_col": preprocessing.library_size_col,
        "perturbation_col": columns.perturbation, "cell_type_col": columns.cell_type, "batch_col": columns.batch,
        "control_label": columns.control_label, "other_control_labels": list(columns.other_control_labels),
        "dose_col": columns.dose,
    }  # fmt: skip
    measured, match, chosen = read_measured(screen, split, known, overrides, settings)
    assert chosen is not None, "there is a split"
    match = model.training.control_match or match
    calibration = calibrate(model, measured, chosen.validation, match, n_populations, seed=seed)
    model.save_pretrained(folder)
    return calibration
