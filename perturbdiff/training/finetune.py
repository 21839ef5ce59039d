"""From a checkpoint and a new screen to a model of that screen, in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anndata import AnnData

from perturbdiff.config import Config, load_config
from perturbdiff.data.screen import Screen
from perturbdiff.evaluation.held_out import score_held_out
from perturbdiff.evaluation.report import Report
from perturbdiff.model import PerturbDiff
from perturbdiff.training.demo import refuse_unpredictable
from perturbdiff.training.loop import train
from perturbdiff.training.start import prepare, settings_of
from perturbdiff.training.state import saved_states

IN_MEMORY = "screen in memory"  # in place of a path


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning leaves behind.

    report
        Scores of the held-out conditions beside baselines; None where nothing was held out, the data are atlases, or
        this is not the first of several processes.
    stopped_by
        None when training is complete; else the signal that stopped it, and the same call goes on.
    """

    model: PerturbDiff
    report: Report | None
    written: list[Path]
    stopped_by: str | None


def finetune(
    screen: str | Path | AnnData | None,
    init_from: str | Path | None,
    out: str | Path,
    hold_out: Sequence[str] = (),
    recipe: str | Path | None = None,
    settings: Sequence[str] = (),
) -> FineTuned:
    """Adapt a checkpoint to a screen's genes and labels and train it on; predict and score what is held out.

    Parameters
    ----------
    screen
        Path of an .h5ad, or its AnnData; None where the recipe names atlases.
    init_from
        Model folder, registered name or owner/name[@REVISION]; None where the recipe names it.
    out
        Run folder; the model is in its model/. The same call goes on with a run that was stopped.
    hold_out
        Conditions never trained on, as "PERTURBATION:CELL_TYPE".
    settings
        Words, as "training.n_steps=1000". What neither they nor the recipe say of architecture, preprocessing,
        diffusion and sampling is as in the checkpoint.

    Raises
    ------
    FileNotFoundError, ValueError, KeyError, OSError
        No such model; too few genes are shared; settings contradict the checkpoint; as `train`.
    """
    given: dict[str, Any] = {"out": str(out), "data": {}}
    if screen is not None:
        given["data"]["screen"] = IN_MEMORY if isinstance(screen, AnnData) else str(screen)
    if hold_out:
        given["split"] = {"hold_out": list(hold_out)}
    config = finetune_config(init_from, recipe, settings, given)
    return run_finetuning(config, screen if isinstance(screen, AnnData) else None)


def finetune_config(
    init_from: str | Path | None, recipe: str | Path | None, settings: Sequence[str], given: Mapping[str, Any]
) -> Config:
    """Settings of a fine-tuning: defaults, then the checkpoint's, then as `load_config`. Raises as it."""
    start = str(init_from) if init_from is not None else load_config(recipe, settings, given).adapt.init_from
    if start is None:
        raise ValueError("there is nothing to start from; give --init-from MODEL, or adapt.init_from in the recipe.")
    return load_config(recipe, settings, {**given, "adapt": {"init_from": start}}, base=settings_of(start))


def preview(config: Config) -> str:
    """What a fine-tuning finds and would do: data, split, genes and labels matched. Writes nothing."""
    out = Path(config.out)
    start = prepare(config, None, out, resuming=bool(saved_states(out / "states")))
    n_train = sum(p.numel() for p in start.denoiser.parameters() if p.requires_grad)
    n_all = sum(p.numel() for p in start.denoiser.parameters())
    sampler = start.data.train.sampler(config)
    steps = config.training.n_steps
    return (
        f"{start.data.summary()}\n{start.summary}\n"
        f"denoiser    {n_all:,} parameters, of which {n_train:,} train\n"
        f"training    {steps:,} steps of {sampler.sets_per_batch} sets of {sampler.set_size} cells, "
        f"{steps / sampler.steps_per_epoch:.1f} epochs"
    )


def run_finetuning(config: Config, adata: AnnData | None = None) -> FineTuned:
    """Train from config.adapt.init_from, then score what is held out. `adata` is the screen, if it is in memory."""
    screen = None
    if adata is not None:
        screen = Screen.from_parts(adata.X, adata.obs, adata.var, config.data, IN_MEMORY)
    elif config.data.screen is not None:
        screen = Screen.read(config.data.screen, config.data)
    check = None if screen is None else lambda data: refuse_unpredictable(screen, data, nothing=True)
    result = train(config, screen, check=check)
    folder = result.folder / "model"
    first = os.environ.get("RANK", "0") == "0"
    if result.stopped_by is not None or screen is None or not config.split.hold_out or not first:
        return FineTuned(result.model, None, [folder], result.stopped_by)
    scored = score_held_out(config, screen)
    return FineTuned(PerturbDiff.from_pretrained(folder), scored.report, scored.written, None)
