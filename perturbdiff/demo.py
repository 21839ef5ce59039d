"""The whole way once: screen -> train -> model folder -> reload -> predict what was held out -> scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perturbdiff.config import Config
from perturbdiff.data.conditions import ConditionIndex
from perturbdiff.data.screen import Screen, write_h5ad
from perturbdiff.data.simulate import SimulationConfig, simulate
from perturbdiff.data.splits import read_split
from perturbdiff.data.training_set import TrainingSet
from perturbdiff.evaluation.report import Report, evaluate, predict_held_out
from perturbdiff.pretrained import PerturbDiff
from perturbdiff.training.loop import train
from perturbdiff.uncertainty import calibrate

SIMULATION = SimulationConfig()
HELD_OUT_OF_SIMULATION = ["pert_0:type_0", "pert_3:type_2"]


@dataclass(frozen=True)
class DemoResult:
    """What a finished demo leaves behind."""

    report: Report
    written: list[Path]


def run_demo(config: Config) -> DemoResult | None:
    """Train on config.data.screen, predict its held-out conditions and score them.

    Returns None where a signal stopped training; the same call then goes on.

    Raises
    ------
    ValueError
        Nothing is held out, or a held-out perturbation is never trained on; and as `train`.
    """
    if config.data.screen is None:
        raise ValueError("a demo runs on a screen; set data.screen, not data.atlases.")
    screen = Screen.read(config.data.screen, config.data)
    result = train(config, screen, check=lambda data: refuse_unpredictable(screen, data, nothing=False))
    return None if result.stopped_by is not None else score_held_out(config, screen)


def score_held_out(config: Config, screen: Screen) -> DemoResult:
    """Predict the held-out conditions of a finished run and score them, for its folder and its model's card."""
    out = Path(config.out)
    model = PerturbDiff.from_pretrained(out / "model")
    split = read_split(out / "split.json", screen)
    match = model.training["control_match"]
    predicted = predict_held_out(model, screen, split, match, config.training.seed)
    write_h5ad(predicted, out / "predicted.h5ad")
    report = evaluate(predicted, screen, match, split)
    if len(ConditionIndex.build(screen, split.validation)) >= 2:
        calibrate(model, screen, split.validation, match, seed=config.training.seed)
    model.evaluation = report.as_json()
    model.save_pretrained(out / "model")  # scores and card; the weights stay as they are
    names = ("config.yaml", "split.json", "metrics.jsonl", "model", "predicted.h5ad")
    return DemoResult(report, [*(out / name for name in names), *report.save(out)])


def simulated_screen(out: Path) -> Path:
    """The demo's own screen, written to `out`/screen.h5ad unless it is there."""
    path = out / "screen.h5ad"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        simulate(SIMULATION, path)
    return path


def refuse_unpredictable(screen: Screen, data: TrainingSet, nothing: bool) -> None:
    """Before the training, not after it: labels alone say nothing of a perturbation that no trained cell received.

    Raises ValueError; also, unless `nothing` may be held out, where that is so.
    """
    if not data.split.test.any() and not nothing:
        raise ValueError("nothing is held out; give --hold-out, for example PERTURBATION:CELL_TYPE or batch=NAME.")
    held_out = set(screen.obs["perturbation"][data.split.test & ~screen.is_control])
    for perturbation in sorted(held_out):
        try:
            data.vocabularies.encode([(perturbation, None, None)])
        except KeyError as error:
            raise ValueError(
                f"perturbation {perturbation!r} is held out in every context, and a model of labels cannot predict "
                f"what it never saw; hold out contexts instead, for example {perturbation}:CELL_TYPE or batch=NAME, or "
                "give features of perturbations (data.perturbation_features)."
            ) from error
