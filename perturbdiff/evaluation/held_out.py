"""What a finished run held out: predicted, scored beside baselines, and calibrated on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData, concat

from perturbdiff.config import Config, load_config
from perturbdiff.data.conditions import ConditionIndex, ControlMatch
from perturbdiff.data.notation import one_unit
from perturbdiff.data.screen import Screen
from perturbdiff.data.selectors import LABELS
from perturbdiff.data.splits import Split, control_halves, read_split, split_of
from perturbdiff.evaluation.fair import Condition, held_out_rows
from perturbdiff.evaluation.metrics import METRICS
from perturbdiff.evaluation.report import write_report
from perturbdiff.evaluation.scores import MODEL, Scores, evaluate, read_measured, score_conditions
from perturbdiff.files import few, progress, short
from perturbdiff.generation import Wanted
from perturbdiff.hub.download import own_folder
from perturbdiff.hub.model_folder import SPLIT
from perturbdiff.hub.records import Calibration, EvaluationRecord
from perturbdiff.inference.calibration import MEANS, calibrate, coverage_on_test, held_out_means, write_means
from perturbdiff.inference.output import write_predicted
from perturbdiff.model import PerturbDiff

RUN_FILES = ("config.yaml", "split.json", "predicted.h5ad")
SAME_SCORE = 0.01  # of the larger of two scores and 1, that processors and versions of libraries may differ by


@dataclass(frozen=True)
class Reproduction:
    """Scores made again, beside those of the card."""

    now: Scores
    then: EvaluationRecord

    def differing(self) -> dict[str, tuple[float, float]]:
        """Metric -> the model's score then and now, of those that differ by more than SAME_SCORE."""
        means, found = self.now.means(), {}
        for metric, before in self.then.scores.items():
            after: float = means[metric].to_dict()[MODEL]
            if not abs(after - before) <= SAME_SCORE * max(abs(before), 1.0):
                found[metric] = (before, after)
        return found


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
    scores = score_conditions(predicted, screen, match, split, tables=model.feature_tables())
    if len(ConditionIndex.build(screen, validated := _untrained(screen, split))) >= 2:
        calibrate(model, screen, validated, match, seed=config.training.seed)
    tested = _cover_test(model, screen, split, match, seed=config.training.seed)
    write_means(tested, out / MEANS)
    model.evaluation = scores.record()
    model.save_pretrained(out / "model")  # scores and card; the weights stay as they are
    names = ("config.yaml", "split.json", "metrics.jsonl", "model", "predicted.h5ad", MEANS)
    return Scored(scores, [*(out / name for name in names), *scores.save(out), *_report(out)])


def refuse_trained(name: str, trained_by: dict[str, Any] | None, screen: Screen, held_out: np.ndarray) -> None:
    """Cells `held_out` may be what a model was trained on by another split, `trained_by`: a ValueError then.

    On another screen, or of a model that keeps no split, nobody can tell.
    """
    if trained_by is None:
        return
    try:
        own = split_of(trained_by, screen, f"split.json of {name}")
    except ValueError:
        return
    if (trained := held_out & own.train & ~screen.is_control).any():
        raise ValueError(
            f"{name} was trained on {trained.sum():,} of the {held_out.sum():,} cells that the split holds out: "
            "scores and coverage would be of known answers. Give the split.json of its own run (--split)."
        )


def _untrained(screen: Screen, split: Split) -> np.ndarray:
    """(n_cells,) validation cells of conditions of which training saw none (split.validation_cells takes others)."""
    condition = pd.MultiIndex.from_frame(screen.obs[list(LABELS)])
    found: np.ndarray = split.validation & ~condition.isin(condition[split.train & ~screen.is_control].unique())
    return found


def _cover_test(
    model: PerturbDiff, screen: Screen, split: Split, match: ControlMatch, n_populations: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Populations of the test conditions beside what was measured; a calibrated model then knows its coverage there."""
    tested = held_out_means(model, screen, split.test, match, n_populations, seed)
    if (found := model.training.calibration) is not None and len(tested):
        found = replace(found, coverage=coverage_on_test(found, tested))
        model.training = replace(model.training, calibration=found)
    return tested


def _report(out: Path) -> list[Path]:
    try:  # a picture that cannot be drawn must not cost a run its scores
        return [write_report(out, out / "report.html")]
    except (ArithmeticError, LookupError, OSError, ValueError) as error:
        warnings.warn(f"no report was written ({short(error)}); perturbdiff report {out}", UserWarning, stacklevel=2)
        return []


def predict_held_out(model: PerturbDiff, screen: Screen, split: Split, match: ControlMatch, seed: int) -> AnnData:
    """Predict each held-out condition from one half of its own control cells, each at most once (`one_a_control`), and
    no more cells than were measured.

    `screen` has all genes of the file: library sizes are sums over them. Raises as `PerturbDiff.predict`.
    """
    real, controls = held_out_rows(screen, split.test, match)
    starts = {context: control_halves(screen, controls[context])[0] for context in {of[1:] for of in real}}
    n_cells = {condition: min(len(rows), len(starts[condition[1:]])) for condition, rows in real.items()}
    in_context: dict[tuple[str, str], list[Condition]] = {}
    for condition in real:
        in_context.setdefault(condition[1:], []).append(condition)
    made: dict[Condition, AnnData] = {}
    with progress(sum(n_cells.values()), "predict", "cell") as bar:
        for context, conditions in in_context.items():
            wanted = [Wanted(of[0], n_cells[of]) for of in conditions]
            # Scores are of one prediction: of the mean over batches, from which a draw would differ at random.
            predicted = model.generate_each(
                screen.adata(starts[context]), wanted, *context, seed=seed, bar=bar, varied=False
            )
            made |= zip(conditions, predicted, strict=True)
    predictions, done = [made[condition] for condition in real], 0
    for own in predictions:
        own.obs_names = pd.Index([f"predicted_{done + i}" for i in range(own.n_obs)])
        done += own.n_obs
    return concat(predictions, merge="same", uns_merge="first")


def evaluate_model(
    model: str | Path | PerturbDiff,
    screen: str | Path | AnnData,
    split: str | Path | None = None,
    *,
    field: bool = False,
    overrides: Sequence[str] = (),
    **settings: Any,
) -> Scores:
    """Predict the held-out conditions of a split with a model, and score them.

    Parameters
    ----------
    model
        Also a folder, name or repo id of one.
    screen
        The measured cells and their controls, read as the model's own were, where overrides and settings (as of
        `train`) say nothing else.
    split
        split.json of the run folder; the one that travels with the model by default.
    field
        Also ask cell-eval (extra `eval`).

    Raises
    ------
    FileNotFoundError, ValueError, KeyError
        As `PerturbDiff.from_pretrained` and `evaluate`; no split is given and none travels with the model; the screen
        lacks cells of the split, or has them with other values.
    """
    if not isinstance(model, PerturbDiff):
        model = PerturbDiff.from_pretrained(model)
    measured, match, chosen = read_measured(screen, split, _read_as(model), overrides, settings)
    one_unit({model.vocabularies.dose_unit, measured.notation.dose_unit}, f"{model.name} and {measured.path}")
    if chosen is None:
        if model.split is None:
            raise ValueError(f"no split.json travels with {model.name}; give the one of its run folder (--split).")
        chosen = split_of(model.split, measured, f"split.json of {model.name}")
    refuse_trained(model.name, model.split, measured, chosen.test | chosen.validation)
    match = model.training.control_match or match
    seed = (model.training.settings.get("training") or {}).get("seed", 0)
    predicted = predict_held_out(model, measured, chosen, match, seed if isinstance(seed, int) else 0)
    return score_conditions(predicted, measured, match, chosen, field=field, tables=model.feature_tables())


def evaluate_run(
    run: str | Path,
    screen: str | Path | AnnData | None = None,
    *,
    field: bool = False,
    overrides: Sequence[str] = (),
) -> Scores:
    """Score what a finished run predicted of its held-out conditions; `screen` is that of the run by default.

    Raises FileNotFoundError where the folder lacks predicted.h5ad, split.json or config.yaml; as `evaluate`.
    """
    run = Path(run)
    if missing := [name for name in RUN_FILES if not (run / name).is_file()]:
        raise FileNotFoundError(f"{run} lacks {few(missing)}: no run that held out anything finished there.")
    data = load_config(run / "config.yaml").data
    screen = screen if screen is not None else data.screen
    if screen is None:
        raise ValueError(f"{run} was trained on atlases; give the screen whose cells were held out (--screen).")
    known = data.perturbation_features and (run / "model").is_dir()  # the files may have moved
    tables = PerturbDiff.from_pretrained(run / "model").feature_tables() if known else []
    return evaluate(run / "predicted.h5ad", screen, run / "split.json", field=field, tables=tables, overrides=overrides)


def reproduce(
    model: str | Path, screen: str | Path | AnnData, *, overrides: Sequence[str] = (), **settings: Any
) -> Reproduction:
    """Score a model again as its card says it scored, on the cells that its split.json names.

    Raises as `evaluate_model`, and ValueError where the model has no scores, or of metrics that are no longer made.
    """
    loaded = PerturbDiff.from_pretrained(model)
    then = loaded.evaluation
    if then is None:
        raise ValueError(f"{loaded.name} has no scores to reproduce; `perturbdiff evaluate` makes them.")
    if then.metrics != METRICS:
        raise ValueError(
            f"the scores of {loaded.name} were made by perturbdiff {then.library_version} with other metrics "
            f"({few(sorted(then.metrics))}); take that version, or make them anew (perturbdiff evaluate)."
        )
    return Reproduction(evaluate_model(loaded, screen, overrides=overrides, **settings), then)


def _read_as(model: PerturbDiff) -> dict[str, Any]:
    """Settings of data.* by which a model's own screen was read."""
    columns, preprocessing, labels = model.config.obs, model.preprocessing, model.vocabularies
    return {
        "target_sum": preprocessing.target_sum, "library_size_col": preprocessing.library_size_col,
        "perturbation_col": columns.perturbation, "cell_type_col": columns.cell_type, "batch_col": columns.batch,
        "control_label": columns.control_label, "other_control_labels": list(columns.other_control_labels),
        "dose_col": columns.dose, "drop": list(columns.drop), "combination_separator": labels.combination_separator,
        **({"dose_separator": labels.dose_separator} if columns.dose is None else {}),
    }  # fmt: skip


def calibrate_model(
    folder: str | Path,
    screen: str | Path | AnnData,
    split: str | Path | None = None,
    n_populations: int = 5,
    seed: int = 0,
    *,
    overrides: Sequence[str] = (),
    **settings: Any,
) -> Calibration:
    """`calibrate` a model folder, which is replaced, on the validation conditions of a split, by default its own;
    coverage is that of the test conditions, where there are some.

    The screen is read as the model's own was, where overrides and settings (as of `train`) say nothing else. Raises as
    `calibrate`, `evaluate` and `PerturbDiff.from_pretrained`, and FileNotFoundError where there is no split.
    """
    folder = own_folder(folder)
    if split is None and not (split := folder / SPLIT).is_file():
        raise FileNotFoundError(f"{folder} has no {SPLIT}; say which conditions were held out (--split).")
    model = PerturbDiff.from_pretrained(folder)
    measured, match, chosen = read_measured(screen, split, _read_as(model), overrides, settings)
    assert chosen is not None, "there is a split"
    refuse_trained(model.name, model.split, measured, chosen.test | chosen.validation)
    match = model.training.control_match or match
    calibrate(model, measured, _untrained(measured, chosen), match, n_populations, seed=seed)
    _cover_test(model, measured, chosen, match, n_populations, seed)
    model.save_pretrained(folder)
    assert model.training.calibration is not None, "it was calibrated"
    return model.training.calibration
