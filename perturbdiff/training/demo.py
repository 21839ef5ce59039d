"""The whole way once: screen -> train -> model folder -> reload -> predict what was held out -> scores."""

from __future__ import annotations

from pathlib import Path

from perturbdiff.config import Config
from perturbdiff.data.screen import Screen
from perturbdiff.data.simulate import SimulationConfig, simulate
from perturbdiff.evaluation.held_out import DemoResult, score_held_out
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.loop import train

SIMULATION = SimulationConfig()
HELD_OUT_OF_SIMULATION = ["pert_0:type_0", "pert_3:type_2"]


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
