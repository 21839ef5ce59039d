"""Which recipe a screen is trained by: candidates, each scored on training conditions that are left out.

Every candidate is a run within the folder of the final one, so that a command that was killed goes on with those that
are not finished. A candidate trains for a part of its steps; its weights are scored with several settings of sampling.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from perturbdiff.config import Config, DataConfig, SplitConfig
from perturbdiff.data.conditions import ConditionIndex, ControlMatch, resolve_control_match
from perturbdiff.data.identity import screen_identity
from perturbdiff.data.rng import cell_order_key
from perturbdiff.data.screen import READ_BY, Screen
from perturbdiff.data.selectors import LABELS
from perturbdiff.data.splits import Split, make_split, read_split
from perturbdiff.evaluation.fair import NO_CHANGE, Condition, group
from perturbdiff.evaluation.held_out import predict_held_out
from perturbdiff.evaluation.scores import MODEL, score_conditions
from perturbdiff.files import few, progress, short, write_json
from perturbdiff.means.newness import New, axes
from perturbdiff.model import PerturbDiff
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.design import Design, most, newness
from perturbdiff.training.loop import TrainingResult, fit
from perturbdiff.training.run_folder import check_resumable, lasting_settings, leave_marker
from perturbdiff.training.start import checkpoint_metadata, prepare
from perturbdiff.training.state import saved_states

CANDIDATES, CHOICE, SCORED = "candidates", "choice.json", "scored.json"
FOLDS = 2  # where no budget says otherwise
PART_OF_STEPS = 1 / 2  # that a candidate trains: two in two folds cost twice what one does whole
MOST_CONDITIONS = 24  # scored in a fold
MOST_CELLS = 300  # of a condition that are scored in a fold
FEW = 2  # perturbations, where batches are those of across_patients

Made = Callable[[str, Sequence[str]], Config]
"""The settings of the run by a recipe and words over it."""


@dataclass(frozen=True)
class Candidate:
    """A recipe, words that win over it, and settings of sampling that its weights are scored with."""

    recipe: str
    words: tuple[str, ...] = ()
    samplings: tuple[tuple[str, ...], ...] = ((),)

    @property
    def name(self) -> str:
        return " ".join([self.recipe, *self.words])


HALF, NONE = ("sampling.network_weight=0.5",), ("sampling.network_weight=0",)  # the rest is of simple methods
GUIDED = ("sampling.guidance_scale=0.5",)
FROM_CONTROLS, FROM_MEANS = ("diffusion.start=controls",), ("diffusion.start=mean",)
NEW_PLACE = ("diffusion.p_drop_label=1",)  # what a cell type or batch that was not trained is, its controls say


def candidates(new: New, n_perturbations: int) -> tuple[Candidate, ...]:
    """What may be best for conditions that are new in this way, of a screen of so many perturbations."""
    what, *place = axes(new)
    elsewhere = NEW_PLACE if place else ()
    if what == "cell type":
        return Candidate("cross_cell_type", (), ((), HALF)), Candidate("cross_cell_type", FROM_MEANS, ((), NONE))
    if what == "perturbation":
        recipe, on_means = "unseen_perturbations", (*elsewhere, *FROM_MEANS)
        return Candidate(recipe, elsewhere, ((), GUIDED, HALF)), Candidate(recipe, on_means, ((), NONE))
    # A combination starts from the mean that its parts tell, as what is new to a batch does from that of other batches.
    recipe = "across_patients" if n_perturbations <= FEW and what != "combination" else "new_batch"
    return Candidate(recipe, (), ((), NONE)), Candidate(recipe, FROM_CONTROLS, ((), HALF))


def tuned(new: New, n_perturbations: int) -> tuple[Candidate, ...]:
    """What may be best with a checkpoint: as it is, tuned, or its screen alone, which knows no other perturbation."""
    what = axes(new)[0]
    named = {"cell type": "cross_cell_type", "perturbation": "unseen_perturbations"}
    recipe, alone = f"finetune/{named.get(what, 'new_screen')}", candidates(new, n_perturbations)[0]
    with_it = Candidate(recipe, ("training.n_steps=0",), ((), HALF)), Candidate(recipe, (), ((), HALF))
    if what in ("perturbation", "combination"):
        return with_it
    return *with_it, replace(alone, recipe=f"train/{alone.recipe}")


@dataclass(frozen=True)
class Choice:
    """What was chosen: a recipe, words that win over it, and what everything that was tried scored.

    n_new
        Held-out conditions by what is new of them.
    left_out
        How training conditions that were left out are new.
    scores
        One row a `candidate`, number of steps and sampling: `energy_distance`, `pearson_delta` and the `sum` of losses,
        means over folds, and `sums` of each fold; none where nothing could be left out.
    cpu_s
        CPU-seconds of all candidates, those of an earlier call too.
    failed
        Why candidates that could not be trained to the end were not scored, by name.
    """

    recipe: str
    words: list[str]
    n_new: dict[str, int]
    left_out: str
    scores: list[dict[str, Any]]
    cpu_s: float
    failed: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """For a person, several lines."""
        lines = ["held out    " + ", ".join(f"{n:,} of a new {kind}" for kind, n in self.n_new.items())]
        if self.scores:
            times, recipes = len(self.scores[0]["sums"]), {row["recipe"] for row in self.scores}
            of_one = f" of {recipes.pop()}" if len(recipes) == 1 else ""
            how_often = "once" if times == 1 else f"{times} times"
            lines += [
                f"choosing    on training conditions of a new {self.left_out}, left out {how_often},",
                "            by energy_distance over that of no change and its error, plus 1 - pearson;",
                "            another candidate than the usual (u) must be better each time; * is chosen",
                f"     sum  energy  pearson  candidate{of_one}",
            ]
            for row in sorted(self.scores, key=lambda row: float(row["sum"])):
                words = " ".join(word.partition(".")[2] for word in row["words"])
                chosen = (row["recipe"], row["words"]) == (self.recipe, self.words)
                mark = ("u" if row["candidate"] == self.scores[0]["candidate"] else " ") + ("*" if chosen else " ")
                columns = f"{mark}{row['sum']:6.3f}{row['energy_distance']:8.3f}{row['pearson_delta']:9.3f}"
                lines.append(f"{columns}  {words if of_one else row['recipe'] + ' ' + words}")
        else:
            lines.append("choosing    by what is new alone: no training condition can be left out to be as new")
            if NONE[0] in self.words:
                lines.append("            so what the network changes of a mean response is not known to be right")
        lines += [f"failed      {name}: {why}" for name, why in self.failed.items()]
        return "\n".join([*lines, f"chosen      {' '.join(['--recipe', self.recipe, *self.words])}"])


def choose(
    config: Config,
    screen: Screen,
    made: Made,
    check: Callable[[TrainingSet], None] | None = None,
    budget: float | None = None,
) -> Choice | TrainingResult:
    """Score the candidates; take the best of those that beat the first in every fold, or else that one at its best.

    Where nothing can be left out it is the first, and if that starts from the mean of simple methods, this mean alone:
    nobody knows whether a network makes cells of it that are more like measured ones.
    Of a run that was begun it is the one that was taken then.

    Parameters
    ----------
    config
        Of the run, without a recipe: where it is, what it reads and holds out, and whether it starts from a checkpoint.
    screen
        With all its cells; those that are held out, and controls that measure their truth, are not looked at.
    made
        The settings of the run by a candidate. What a user gave wins there.
    check
        Called with what the run would read, before anything is written; what it raises ends the call.
    budget
        Seconds for all candidates together: as many folds as they suffice for, one at least. By default FOLDS.

    Returns
    -------
    Of a candidate that a signal stopped, what `fit` said; the same call goes on.

    Raises
    ------
    ValueError
        The folder has candidates of other settings or data, or a run that had a recipe; as `fit`.
    FloatingPointError
        No candidate could be trained.
    """
    out = Path(config.out)
    if saved_states(out / "states"):
        if not (out / CHOICE).is_file():
            why = f"has lost its {CHOICE}" if (out / CANDIDATES).is_dir() else "holds a run whose recipe was given"
            raise ValueError(
                f"run folder {out} {why}; give its settings (--recipe {out / 'config.yaml'}) to go on, or choose "
                "another --out."
            )
        return Choice(**json.loads((out / CHOICE).read_text()))
    check_resumable(out, config)
    everything = ConditionIndex.build(screen, np.ones(len(screen), dtype=bool))
    match = resolve_control_match(everything, config.data.control_match)
    known = LABELS if match == "batch" else LABELS[:2]
    split = make_split(screen, config.split, config.training.seed, known=known)
    asked, others = (_sizes(screen, cells, match) for cells in (split.test, ~split.test))
    new = most(newness(asked, others, screen.notation).values())
    kinds = candidates if config.adapt.init_from is None else tuned
    tried = _different(kinds(new, len({perturbation for perturbation, _, _ in others})), made)
    own = made(tried[0].recipe, tried[0].words)
    start = prepare(own, replace(screen, config=as_read(screen, own.data)), out, resuming=False)
    if check is not None:
        check(start.data)
    described = {name for table in start.data.tables for name in table.names}
    if own.adapt.init_from is not None:
        described |= {*checkpoint_metadata(own.adapt.init_from)[2].vocabularies.labelled}
    train = start.data.split.train
    design = Design.of(asked, _sizes(screen, train, match), screen.notation, own.training.seed, described)
    n_new: dict[str, int] = {str(kind): n for kind, n in design.n_new.items()}
    records = _tried(tried, design, screen, train, match, made, out, budget)
    if isinstance(records, TrainingResult):
        return records
    failed = {
        tried[i].name: of["failed"] for records_of in records for i, of in enumerate(records_of) if "failed" in of
    }
    if records and len(failed) == len(tried):
        raise FloatingPointError(f"no candidate could be trained: {next(iter(failed.values()))}")
    scores = _over_folds(tried, records) if records else []
    recipe, words = tried[0].recipe, list(tried[0].words)
    if scores:
        usual = scores[0]["candidate"]
        first = min((row for row in scores if row["candidate"] == usual), key=lambda row: float(row["sum"]))
        better = [row for row in scores if all(np.less(row["sums"], first["sums"]))]
        best = min(better, key=lambda row: float(row["sum"]), default=first)
        recipe, words = best["recipe"], best["words"]
    elif NONE in tried[0].samplings and made(recipe, [*words, *NONE]) != own:  # what a user gave stays
        words += NONE
    cpu_s = sum(float(record["cpu_s"]) for of_fold in records for record in of_fold)
    choice = Choice(recipe, words, n_new, design.left_out, scores, cpu_s, failed)
    write_json(out / CHOICE, asdict(choice))
    return choice


def _sizes(screen: Screen, cells: np.ndarray, match: ControlMatch) -> dict[Condition, int]:
    """Cells of each perturbed condition."""
    return {condition: len(rows) for condition, rows in group(screen.obs, cells & ~screen.is_control, match).items()}


def _different(tried: Sequence[Candidate], made: Made) -> list[Candidate]:
    """Those that what a user gave leaves different."""
    settings = [made(candidate.recipe, candidate.words) for candidate in tried]
    return [candidate for i, candidate in enumerate(tried) if settings[i] not in settings[:i]]


def _tried(
    tried: Sequence[Candidate], design: Design, screen: Screen, train: np.ndarray, match: ControlMatch, made: Made,
    out: Path, budget: float | None,
) -> list[list[dict[str, Any]]] | TrainingResult:  # fmt: skip
    """What each candidate scored in each fold."""
    records: list[list[dict[str, Any]]] = []
    folds = design.folds[: FOLDS if budget is None else None]
    longest = spent = 0.0
    with progress(len(folds) * len(tried), "choose", "run", shown=bool(folds)) as bar:
        for number, fold in enumerate(folds):
            if budget is not None and number and spent + longest * len(tried) > budget:
                break
            here, scored = _without(screen, train, fold, match)
            records.append([])
            for candidate in tried:
                folder = out / CANDIDATES / re.sub(r"\W+", "_", candidate.name) / str(number)
                record = _score(candidate, here, scored, match, made, folder)
                if isinstance(record, TrainingResult):
                    leave_marker(out, str(record.stopped_by), 0)
                    print(f"stopped     by {record.stopped_by} while choosing; the same command goes on", flush=True)
                    return record
                records[-1].append(record)
                spent, longest = spent + record["wall_s"], max(longest, record["wall_s"])
                bar.update()
    return records


def as_read(screen: Screen, data: DataConfig) -> DataConfig:
    """Settings of data with those that a screen was read by, columns of a known kind of file filled in."""
    return replace(data, **{name: getattr(screen.config, name) for name in READ_BY})


def _without(
    screen: Screen, train: np.ndarray, fold: Sequence[Condition], match: ControlMatch
) -> tuple[Screen, list[Condition]]:
    """The training cells, of a fold those that are scored, by a hash; and which of its conditions are scored."""
    rows = group(screen.obs, train & ~screen.is_control, match)
    scored = [fold[i] for i in np.unique(np.linspace(0, len(fold) - 1, MOST_CONDITIONS).astype(int))]
    kept = train.copy()
    for condition in fold:
        cells = rows[condition]
        order = cells[np.argsort(cell_order_key(screen.obs.index[cells].to_numpy(), seed=1), kind="stable")]
        kept[order[MOST_CELLS if condition in scored else 0 :]] = False
    return screen.with_cells(np.flatnonzero(kept)), scored


def _score(
    candidate: Candidate, screen: Screen, fold: Sequence[Condition], match: ControlMatch, made: Made, folder: Path
) -> dict[str, Any] | TrainingResult:
    """Train a candidate without a fold and score it there, unless that is done; what `fit` said of one that stopped."""
    config = made(candidate.recipe, candidate.words)
    n_steps = config.training.n_steps
    least = min(1, n_steps)  # none of a checkpoint as it is
    part, fewer = max(least, round(n_steps * PART_OF_STEPS)), max(least, n_steps // 2)
    names = [":".join(condition if match == "batch" else condition[:2]) for condition in fold]
    data = as_read(screen, config.data)
    config = replace(
        config,
        out=str(folder),
        data=data,
        split=SplitConfig(hold_out=names, validation_fraction=0.0),
        training=replace(config.training, n_steps=part, trackers=[]),
    )
    screen = replace(screen, config=data)
    made_of = json.loads(json.dumps({**lasting_settings(config), "screen": screen_identity(screen)}))
    if (folder / SCORED).is_file():
        record: dict[str, Any] = json.loads((folder / SCORED).read_text())
        then = record["made_of"]
        if changed := [key for key in {**then, **made_of} if then.get(key) != made_of.get(key)]:
            raise ValueError(
                f"the candidate in {folder} was trained with other settings or data ({few(changed)}); give those to go "
                "on, or choose another --out."
            )
        return record
    cpu, wall = time.process_time(), time.monotonic()
    scores, seen, failed = [], list[Config](), dict[str, str]()
    # A model of half the steps stands for one of all, and what it was halfway for one of half as many, if it trained.
    halfway = (part // 2, fewer) if part // 2 > config.optim.warmup_steps else (part, n_steps)
    for steps, stands_for in (halfway, (part, n_steps)):
        variants = []
        for sampling in candidate.samplings:
            words = [f"training.n_steps={stands_for}", *sampling]
            variant = made(candidate.recipe, [*candidate.words, *words])
            known = variant in seen or variant.training.n_steps != stands_for  # what a user gave stays
            if steps >= least and not known:
                variants.append((words, variant.sampling))
                seen.append(variant)
        if not variants:
            continue
        try:
            with redirect_stdout(StringIO()):  # what it says of data and settings, the run says
                result = fit(config, screen, stop_at=steps)
        except FloatingPointError as error:  # the others may do
            failed = {"failed": short(error)}
            break
        if result.stopped_by is not None and result.step < steps:
            return result
        split = read_split(folder / "split.json", screen)
        for words, of_variant in variants:
            result.model.config = replace(result.model.config, sampling=of_variant)
            scores.append({"words": words, **_scores(result.model, screen, split, match, config.training.seed)})
    cost = {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall}
    record = {"made_of": made_of, "scores": scores, **cost, **failed}
    write_json(folder / SCORED, record)
    for name in ("states", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return record


def _scores(model: PerturbDiff, screen: Screen, split: Split, match: ControlMatch, seed: int) -> dict[str, float]:
    """Means over the held-out conditions, and the most that the energy distance of no change may be."""
    predicted = predict_held_out(model, screen, split, match, seed)
    scores = score_conditions(predicted, screen, match)
    means = scores.means()
    energy, pearson = (float(means[metric][MODEL]) for metric in ("energy_distance", "pearson_delta"))
    rows = scores.conditions[scores.conditions["method"] == NO_CHANGE]
    # What few cells make of it: where hardly anything answers, a ratio of distances would be noise.
    error = float(np.nan_to_num(rows["error energy_distance"].mean()))
    nothing = float(means["energy_distance"][NO_CHANGE]) + 2 * error
    if not np.isfinite([energy, nothing]).all():
        raise ValueError(
            "a recipe is chosen by training conditions that are left out, and those of this screen have too few cells "
            "to be scored; give one (--recipe new_batch)."
        )
    return {"energy_distance": energy, "pearson_delta": 0.0 if np.isnan(pearson) else pearson, "no_change": nothing}


def _over_folds(tried: Sequence[Candidate], records: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    trained = [i for i in range(len(tried)) if not any("failed" in of_fold[i] for of_fold in records)]
    # One scale for all folds.
    scale = float(np.mean([of_fold[trained[0]]["scores"][0]["no_change"] for of_fold in records]))
    rows = []
    for i in trained:
        candidate = tried[i]
        for j, first in enumerate(records[0][i]["scores"]):
            of_folds = [record[i]["scores"][j] for record in records]
            energy, pearson = (np.array([of[key] for of in of_folds]) for key in ("energy_distance", "pearson_delta"))
            sums = energy / (scale if scale > 0 else 1.0) + 1 - pearson
            words = list(dict.fromkeys([*candidate.words, *first["words"]]))
            row = {"candidate": i, "recipe": candidate.recipe, "words": words, "sums": sums.tolist()}
            means = {"sum": sums.mean(), "energy_distance": energy.mean(), "pearson_delta": pearson.mean()}
            rows.append({**row, **{name: float(mean) for name, mean in means.items()}})
    return rows
