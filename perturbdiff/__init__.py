"""PerturbDiff: functional diffusion models of single-cell perturbation responses.

train(screen, out, hold_out=[...])        from an .h5ad or AnnData to a model, scored on what was held out
finetune(screen, init_from, out)          the same from a checkpoint
PerturbDiff.from_pretrained(model)        a model from a folder, a run or the Hub; then .predict(controls, ...)
evaluate(predictions, screen)             scores of predicted cells beside baselines
rank_perturbations(model, controls, ...)  perturbations by where they push cells
pl                                        figures: pl.violin, embedding, delta, ranking, scores
Screen, Atlas, load_config                what these are made of
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from perturbdiff._version import __version__

if TYPE_CHECKING:
    from perturbdiff.atlas.store import Atlas
    from perturbdiff.config import load_config
    from perturbdiff.data.screen import Screen
    from perturbdiff.evaluation import plots as pl
    from perturbdiff.evaluation.scores import evaluate
    from perturbdiff.inference.ranking import rank_perturbations
    from perturbdiff.model import PerturbDiff
    from perturbdiff.training.run import finetune, train

__all__ = [
    "Atlas",
    "PerturbDiff",
    "Screen",
    "__version__",
    "evaluate",
    "finetune",
    "load_config",
    "pl",
    "rank_perturbations",
    "train",
]

# Lazy, so that `perturbdiff --help` does not wait for torch.
_MODULES = {
    "Atlas": "atlas.store",
    "PerturbDiff": "model",
    "Screen": "data.screen",
    "evaluate": "evaluation.scores",
    "finetune": "training.run",
    "load_config": "config",
    "rank_perturbations": "inference.ranking",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name == "pl":
        return import_module("perturbdiff.evaluation.plots")
    if name not in _MODULES:
        raise AttributeError(f"module 'perturbdiff' has no attribute {name!r}")
    return getattr(import_module(f"perturbdiff.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
