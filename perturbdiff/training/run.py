"""From a screen to a model with its scores, in one call: train from scratch, or adapt a checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from anndata import AnnData

from perturbdiff.config import Config, find_recipe, load_config, sections
from perturbdiff.data.screen import IN_MEMORY, Screen
from perturbdiff.data.simulate import SimulationConfig, simulate
from perturbdiff.evaluation.held_out import refuse_trained, score_held_out
from perturbdiff.evaluation.scores import Scores
from perturbdiff.model import PerturbDiff
from perturbdiff.training import loop
from perturbdiff.training.choose import CHOICE, Made, as_read, choose
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.loop import TrainingResult
from perturbdiff.training.run_folder import stoppable, with_commits
from perturbdiff.training.start import (
    checkpoint_metadata,
    prepare,
    refuse_another,
    settings_at_start,
    settings_of,
    started_from,
)
from perturbdiff.training.state import saved_states

HELD_OUT_OF_SIMULATION = ("batch=batch_1",)  # all conditions of a batch, from another
RECIPE_OF_SIMULATION = "new_batch"


@dataclass(frozen=True)
class Run:
    """What a training leaves behind.

    model
        A candidate's, where a signal stopped the choice of a recipe.
    folder
        The run folder; the model is in its model/.
    scores
        Scores of the held-out conditions beside baselines; None where nothing was held out, the data are atlases, or
        this is not the first of several processes.
    stopped_by
        None when training is complete; else the signal that stopped it, and the same call goes on.
    """

    model: PerturbDiff
    folder: Path
    step: int
    scores: Scores | None
    written: tuple[Path, ...]
    stopped_by: str | None


def train(
    screen: str | Path | AnnData | None = None,
    out: str | Path | None = None,
    *,
    atlases: str | Path | Sequence[str | Path] = (),
    hold_out: str | Sequence[str] = (),
    recipe: str | Path | None = None,
    budget: float | None = None,
    overrides: Sequence[str] = (),
    score: bool = True,
    **settings: Any,
) -> Run:
    """Train on a screen or on atlases from scratch; predict and score what is held out of a screen.

    Parameters
    ----------
    screen
        Path of an .h5ad, or its AnnData.
    out
        Run folder; by default the recipe's. The same call goes on with a run that was stopped.
    atlases
        Folders or repo ids, one or several, instead of a screen.
    hold_out
        Conditions never trained on, as "PERTURBATION:CELL_TYPE" or "batch=NAME", one or several.
    recipe
        Name of one that ships with the package (`perturbdiff recipes`), or path of a yaml file. Without one, what is
        held out of a screen says which could be best, and training conditions that are left out which is
        (`choose.choose`).
    budget
        Minutes for that choice; by default about twice what the training costs.
    overrides
        Words of the command line, as "training.n_steps=1000".
    score
        False ends after the training.
    **settings
        Sections or single settings, as `training={"n_steps": 1000}` or `**{"training.n_steps": 1000}`; `perturbdiff
        settings` lists all. They win over the recipe, and overrides over them.

    Returns
    -------
    `model`; `folder`, of the run; `scores` of what was held out beside baselines, or None; `stopped_by`, the
    signal that stopped it, or None.

    Raises
    ------
    FileNotFoundError, ValueError, KeyError, OSError
        Bad settings or data; a held-out perturbation that nothing is known of; `out` holds a run of other settings; a
        state cannot be written.
    FloatingPointError
        The loss is not finite.
    """
    given = _given(screen, out, atlases, hold_out, settings)
    config = load_config(recipe, overrides, given)
    adata = screen if isinstance(screen, AnnData) else None
    if recipe is not None or not (config.split.hold_out or config.split.file):
        _refuse_budget(budget)
        return run(config, adata, score)
    return _chosen(config, lambda name, words: load_config(name, [*words, *overrides], given), adata, score, budget)


def finetune(
    screen: str | Path | AnnData | None = None,
    init_from: str | Path | None = None,
    out: str | Path | None = None,
    *,
    atlases: str | Path | Sequence[str | Path] = (),
    hold_out: str | Sequence[str] = (),
    recipe: str | Path | None = None,
    budget: float | None = None,
    overrides: Sequence[str] = (),
    score: bool = True,
    **settings: Any,
) -> Run:
    """Adapt a checkpoint to a screen's genes and labels and train it on; predict and score what is held out.

    Parameters
    ----------
    init_from
        Model folder, registered name or owner/name[@REVISION]; None where the recipe names it. What the recipe and the
        settings do not say of architecture, preprocessing, diffusion and sampling is as in that model.

    Otherwise as `train`. Without a recipe the checkpoint as it is and training from scratch are tried too.

    Raises
    ------
    FileNotFoundError, ValueError, KeyError, OSError
        No such model; too few genes are shared; settings contradict the checkpoint; as `train`.
    """
    given = _given(screen, out, atlases, hold_out, settings)
    config = finetune_config(init_from, recipe, overrides, given)
    adata = screen if isinstance(screen, AnnData) else None
    if recipe is not None or not (config.split.hold_out or config.split.file):
        _refuse_budget(budget)
        return run(config, adata, score)

    def made(name: str, words: Sequence[str]) -> Config:
        if name.startswith("train/"):  # from scratch, in the space of the checkpoint
            space = {"data": {"target_sum": config.data.target_sum, "scale": config.data.scale}}
            return load_config(name, [*words, *overrides], given, base=space)
        return finetune_config(init_from, name, [*words, *overrides], given)

    return _chosen(config, made, adata, score, budget)


def finetune_config(
    init_from: str | Path | None, recipe: str | Path | None, overrides: Sequence[str], given: Mapping[str, Any]
) -> Config:
    """Settings of a fine-tuning: defaults, then the checkpoint's, then as `load_config`. Raises as it.

    A run that goes on keeps those of the checkpoint it was started from, and need not be told its name.
    """
    recipe = None if recipe is None else find_recipe(recipe, "finetune")
    out = Path(given["out"]) if "out" in given else None
    recorded = None if out is None else started_from(out)
    base = {"adapt": {"init_from": recorded}}
    start = str(init_from) if init_from is not None else load_config(recipe, overrides, given, base).adapt.init_from
    if start is None:
        raise ValueError("there is nothing to start from; give --init-from MODEL, or adapt.init_from in the recipe.")
    given, settings = {**given, "adapt": {**given.get("adapt", {}), "init_from": start}}, None
    if out is not None and recorded is not None:
        if init_from is not None or start != recorded:
            refuse_another(start, out)
        settings = settings_at_start(out)
    return load_config(recipe, overrides, given, base=settings or settings_of(start))


def preview(
    screen: str | Path | None,
    init_from: str | Path | None,
    out: str | Path | None,
    *,
    overrides: Sequence[str] = (),
    recipe: str | Path | None = None,
    atlases: str | Path | Sequence[str | Path] = (),
    hold_out: str | Sequence[str] = (),
    **settings: Any,
) -> str:
    """What `finetune` finds and would do: data, split, genes and labels matched. Writes nothing; raises as it."""
    settings.pop("score", None)
    config = finetune_config(init_from, recipe, overrides, _given(screen, out, atlases, hold_out, settings))
    config = with_commits(config, Path(config.out))
    start = prepare(config, None, Path(config.out), resuming=bool(saved_states(Path(config.out) / "states")))
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


def demo(
    screen: str | Path | None = None,
    out: str | Path = "runs/demo",
    *,
    hold_out: str | Sequence[str] = (),
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """`train` on a screen that is simulated where none is given; something must be held out. Raises as `train`.

    Of a simulated screen a batch is held out by default, with the recipe for such.
    """
    if screen is None:
        screen = simulated_screen(Path(out))
        if not len(hold_out):
            hold_out, recipe = HELD_OUT_OF_SIMULATION, recipe or RECIPE_OF_SIMULATION
    config = load_config(recipe, overrides, _given(screen, out, (), hold_out, {}))
    if not (config.split.hold_out or config.split.file):
        raise ValueError("nothing is held out; give --hold-out, for example PERTURBATION:CELL_TYPE or batch=NAME.")
    return train(screen, out, hold_out=hold_out, recipe=recipe, overrides=overrides)


def simulated_screen(out: Path) -> Path:
    """The demo's own screen, written to `out`/screen.h5ad unless it is there."""
    path = out / "screen.h5ad"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        simulate(SimulationConfig(), path)
    return path


def run(config: Config, origin: AnnData | Screen | None = None, score: bool = True) -> Run:
    """Train by these settings, then score what is held out of the screen; `origin` is that, if it is in memory."""
    with stoppable(Path(config.out)):
        return _run(config, origin, score)


def _run(config: Config, origin: AnnData | Screen | None, score: bool) -> Run:
    screen = origin if isinstance(origin, Screen) else None
    if screen is None and (origin is not None or config.data.screen is not None):
        screen = Screen.read(origin if origin is not None else config.data.screen, config.data)
    score = score and screen is not None and bool(config.split.hold_out or config.split.file)
    result = loop.fit(config, screen, check=partial(_refuse_unscorable, config) if score else None)
    folder, written = result.folder, [result.folder / "model"]
    if not score or screen is None or result.stopped_by is not None or os.environ.get("RANK", "0") != "0":
        return Run(result.model, folder, result.step, None, tuple(written), result.stopped_by)
    scored = score_held_out(config, screen)
    model = PerturbDiff.from_pretrained(folder / "model")
    return Run(model, folder, result.step, scored.scores, tuple(scored.written), None)


def _refuse_budget(budget: float | None) -> None:
    if budget is not None:
        raise ValueError(
            f"budget ({budget:g}) is for choosing a recipe, and none is chosen where one is given or nothing is held "
            "out; leave it out."
        )


def _chosen(config: Config, made: Made, adata: AnnData | None, score: bool, budget: float | None) -> Run:
    """Choose a recipe for what is held out of the screen, and `run` it."""
    if budget is not None and not budget > 0:  # nor NaN, which no time is more than
        raise ValueError(f"budget ({budget}) must be more than 0 minutes; leave it out for about two trainings.")
    if config.data.screen is None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "a recipe is chosen for one screen on one process; give --recipe: cross_cell_type, new_batch, "
            "across_patients or unseen_perturbations, by what is held out (with an atlas and "
            "diffusion.start=controls), or another of `perturbdiff recipes`."
        )
    check = partial(_refuse_unscorable, config) if score else None
    with stoppable(Path(config.out)):
        screen = Screen.read(adata if adata is not None else config.data.screen, config.data)
        print(f"screen      {screen.path}: {len(screen):,} cells; choosing a recipe", flush=True)
        chosen = choose(config, screen, made, check, None if budget is None else 60 * budget)
    if isinstance(chosen, TrainingResult):
        return Run(chosen.model, Path(config.out), 0, None, (), chosen.stopped_by)
    print(chosen.text(), flush=True)
    cpu = time.process_time()
    config = made(chosen.recipe, chosen.words)
    done = run(config, replace(screen, config=as_read(screen, config.data)), score)
    if done.stopped_by is None:
        print(f"cost        {chosen.cpu_s:,.0f} CPU-s to choose, {time.process_time() - cpu:,.0f} to train and score")
        done = replace(done, written=(*done.written, done.folder / CHOICE))
    return done


def _given(
    screen: str | Path | AnnData | None,
    out: str | Path | None,
    atlases: str | Path | Sequence[str | Path],
    hold_out: str | Sequence[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    if screen is not None and not isinstance(screen, str | Path | AnnData):
        raise TypeError(f"screen ({type(screen).__name__}) must be an AnnData or the path of an .h5ad.")
    given = sections(settings)
    data = given.setdefault("data", {})
    if out is not None:
        given["out"] = str(out)
    if screen is not None:
        data["screen"] = IN_MEMORY if isinstance(screen, AnnData) else str(screen)
    if len(paths := [atlases] if isinstance(atlases, str | Path) else atlases):
        data["atlases"] = [{"path": str(path)} for path in paths]
    if len(names := [hold_out] if isinstance(hold_out, str) else hold_out):
        given.setdefault("split", {})["hold_out"] = [str(name) for name in names]
    return given


def _refuse_unscorable(config: Config, data: TrainingSet) -> None:
    # Before the training, not after it. A run that goes on needs its checkpoint no more.
    if config.adapt.init_from is not None and not saved_states(Path(config.out) / "states"):
        base, _, checkpoint = checkpoint_metadata(config.adapt.init_from)
        assert isinstance(data.origin, Screen), "scores are of a screen"
        refuse_trained(base.name, checkpoint.split, data.origin, data.split.test)
    # Labels alone say nothing of a perturbation that no trained cell received.
    held_out = set(data.origin.obs["perturbation"][data.split.test & ~data.origin.is_control])
    for perturbation in sorted(held_out):
        try:
            data.vocabularies.encode([(perturbation, None, None)])
        except KeyError as error:
            raise ValueError(
                f"perturbation {perturbation!r} is held out in every context, and a model of labels cannot predict "
                f"what it never saw; hold out contexts instead, for example {perturbation}:CELL_TYPE or batch=NAME, or "
                "give features of perturbations (data.perturbation_features)."
            ) from error
