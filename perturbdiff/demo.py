"""The whole way once: screen -> train -> model folder -> reload -> predict what was held out -> scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perturbdiff.config import Config
from perturbdiff.data.screen import Screen, write_h5ad
from perturbdiff.data.simulate import SimulationConfig, simulate
from perturbdiff.data.splits import make_split, read_split
from perturbdiff.data.vocab import split_label
from perturbdiff.evaluation.report import Report, evaluate, predict_held_out
from perturbdiff.pretrained import PerturbDiff
from perturbdiff.training.loop import train

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
    out = Path(config.out)
    if config.data.screen is None:
        raise ValueError("a demo runs on a screen; set data.screen, not data.atlases.")
    screen = Screen.read(config.data.screen, config.data)
    _refuse_unseen(screen, config)
    result = train(config, screen)
    if result.stopped_by is not None:
        return None
    model = PerturbDiff.from_pretrained(out / "model")
    split = read_split(out / "split.json", screen)
    match = model.training["control_match"]
    predicted = predict_held_out(model, screen, split, match, config.training.seed)
    write_h5ad(predicted, out / "predicted.h5ad")
    report = evaluate(predicted, screen, match, split)
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


def _refuse_unseen(screen: Screen, config: Config) -> None:
    # Before the training, not after it: labels alone say nothing of a perturbation that no trained cell received.
    split = make_split(screen, config.split, config.training.seed)
    if not split.test.any():
        raise ValueError("nothing is held out; give --hold-out, for example PERTURBATION:CELL_TYPE or batch=NAME.")
    separator = config.data.combination_separator
    labels = screen.obs["perturbation"]
    held_out, trained = (set(labels[cells & ~screen.is_control]) for cells in (split.test, split.train))
    parts = {part for label in trained for part in split_label(label, separator)}
    unseen = sorted(p for p in held_out - trained if not set(split_label(p, separator)) <= parts)
    if unseen:
        raise ValueError(
            f"perturbation {unseen[0]!r} is held out in every context, and a model of labels cannot predict what it "
            f"never saw; hold out contexts instead, for example {unseen[0]}:CELL_TYPE or batch=NAME."
        )
