"""Scores of predicted cells on held-out conditions, beside simple predictors and the ceiling of split halves.

Fair by construction: over all measured genes, on real controls of which one half makes predictions and the other
measures the truth, with as many cells and the same whole counts for every method (`evaluation.fair`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem
from scipy import sparse

from perturbdiff._version import __version__
from perturbdiff.config import load_config, sections
from perturbdiff.data.conditions import ConditionIndex, ControlMatch, resolve_control_match
from perturbdiff.data.expression import as_csr
from perturbdiff.data.h5ad import open_h5ad, read_h5ad_parts
from perturbdiff.data.notation import one_unit
from perturbdiff.data.screen import IN_MEMORY, READ_BY, Screen, genes_of, unique_names
from perturbdiff.data.space import RAW_COUNTS, SAME, UNKNOWN, check_values, find_space, totals
from perturbdiff.data.splits import Split, read_split
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.evaluation.doubt import (
    ALIKE,
    COMPARED,
    ENOUGH_CONDITIONS,
    Jackknife,
    compare,
    folds_of,
    interval,
    spread_of_responses,
    standard_error,
)
from perturbdiff.evaluation.fair import (
    CONDITION,
    NO_CHANGE,
    Condition,
    ControlChoices,
    Response,
    SimpleMethods,
    group,
    halves_of,
    held_out_rows,
    in_genes_of,
    measured,
    one_a_control,
    relative_spread,
    some,
    start_rows,
    with_no_change,
)
from perturbdiff.evaluation.field import FieldScores, cell_eval_scores
from perturbdiff.evaluation.metrics import (
    METRICS,
    Measured,
    in_own_order,
    mean_scores,
    split_half_ceiling,
)
from perturbdiff.features.tables import FeatureTable
from perturbdiff.files import progress, write_json, written
from perturbdiff.hub.records import EvaluationRecord, SplitRecord, loss
from perturbdiff.inference.output import read_predicted
from perturbdiff.means.trust import Verdict

MODEL = "PerturbDiff"
OTHER = "predictions"  # of another tool, whose name is not in its files
CEILING = "ceiling (half predicts half)"
SHOWN = 4  # metrics in the terminal
WIDTH = 80  # of the terminal
FAR = 1.5  # sums of predicted cells over those of measured ones, if they are of one kind
MANY = 3.0  # times less, as those of mean profiles may be


UNKNOWN_TRUST = "unknown"
DRAWN = (
    "The predicted populations are draws of how batches differ, and simple methods tell the mean over batches: predict "
    "with --average (varied=False) to compare means."
)


@dataclass(frozen=True)
class Scores:
    """Scores of every method on every held-out condition.

    conditions
        One row a (method, condition): `method`, `perturbation`, `cell_type`, `batch`, the metrics, numbers of cells;
        then the standard error of each compared metric, `error NAME`, and of its difference to the model's,
        `difference error NAME`.
    data
        File name of the screen whose measured cells these are; None if unknown.
    hold_out
        Selectors of the held-out conditions; None where nothing was held out, but all that was measured is scored.
    split_sha256
        Of the split.json; None if unknown.
    n_genes, n_left_out
        Scored genes, and those of them that were not predicted: they are scored as no change.
    kept_response
        Part of the squared measured response that lies in the predicted genes, of all conditions together; None where
        there is no response.
    spread
        Between the perturbations of a context, predicted over measured; None where there are too few.
    notes
        What a reader has to know, for people.
    field
        What cell-eval says of the same cells; None where it was not asked.
    model
        The method that is compared with the simple ones.
    """

    conditions: pd.DataFrame
    data: str | None = None
    hold_out: tuple[str, ...] | None = None
    split_sha256: str | None = None
    n_genes: int | None = None
    n_left_out: int = 0
    kept_response: float | None = None
    spread: float | None = None
    notes: tuple[str, ...] = ()
    field: FieldScores | None = None
    model: str = MODEL

    @property
    def n_conditions(self) -> int:
        return int(self.conditions.groupby("method").size().max())

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(self.conditions["method"]))

    def means(self) -> pd.DataFrame:
        """Unweighted mean over conditions by method (rows) and metric (columns)."""
        return self._by_method("mean")

    def undefined(self) -> pd.DataFrame:
        """On how many conditions a metric is undefined (NaN), by method and metric."""
        return self._by_method("n_nan")

    def interval(self, method: str, metric: str) -> tuple[float, float] | None:
        """95 % interval of a mean (`doubt.interval`)."""
        rows = self.conditions[self.conditions["method"] == method]
        defined = rows[metric].notna()
        errors = rows.loc[defined, f"error {metric}"].to_numpy() if metric in COMPARED else None
        return interval(rows.loc[defined, metric].to_numpy(), errors)

    def best_simple(self, metric: str) -> str | None:
        """The simple method with the best mean, by these very conditions; None without any but no change."""
        means = self.means()[metric].drop([self.model, CEILING], errors="ignore").dropna()
        complete = means[self.undefined().loc[means.index, metric] <= self.undefined().loc[self.model, metric]]
        if not len(complete):
            return None
        return str(complete.index[int(np.argmin(loss(METRICS[metric])(complete.to_numpy())))])

    def compared(self, metric: str) -> tuple[str, dict[str, int]] | None:
        """The best simple method, and on how many conditions the model is better or worse (`doubt.compare`)."""
        best = self.best_simple(metric)
        return None if best is None else (best, compare(*self._beside(best, metric), loss(METRICS[metric])))

    def difference(self, metric: str) -> tuple[float, tuple[float, float]] | None:
        """How much better the model is than the best simple method, mean over conditions, and its 95 % interval; None
        without such a method or with too few conditions (`doubt.interval`)."""
        best = self.best_simple(metric)
        if best is None:
            return None
        own, other, errors = self._beside(best, metric)
        gain = loss(METRICS[metric])(other) - loss(METRICS[metric])(own)
        known = np.isfinite(gain)
        # Differences over many conditions spread by the noise of their cells too: it counts once.
        found = interval(gain[known], None if known.sum() >= ENOUGH_CONDITIONS else errors[known])
        return None if found is None else (float(gain[known].mean()), found)

    def _beside(self, method: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(C,) scores of the model, of another method, and standard errors of their difference."""
        own, other = (self.conditions[self.conditions["method"] == name] for name in (self.model, method))
        paired = own.merge(other, on=CONDITION, suffixes=("", " of other"))
        columns = metric, f"{metric} of other", f"difference error {metric} of other"
        return tuple(paired[column].to_numpy() for column in columns)  # type: ignore[return-value]

    def verdict(self) -> str:
        """Whether the model is better than the best simple method, condition by condition and over all of them."""
        said = []
        for metric in ("energy_distance", "pearson_delta"):
            found = self.compared(metric)
            if found is None:
                continue
            best, counts = found
            n = sum(counts.values())
            rest = [f"{word} on {of}" for word, of in counts.items() if of and word != "better"]
            better = f"better than the best simple method ({best}) on {counts['better']} of {n}"
            conditions = f"condition{'s' if n > 1 else ''}"
            over_all = ""
            if n > 1 and (difference := self.difference(metric)) is not None:
                gain, (low, high) = difference
                word = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
                over_all = f"; over all it is {word} (by {gain:.3f}, 95 % {low:.3f} to {high:.3f})"
            said.append(f"By {metric}, {self.model} is {', '.join([f'{better} {conditions}', *rest])}{over_all}.")
        return " ".join(said)

    def _by_method(self, column: str) -> pd.DataFrame:
        groups = self.conditions.groupby("method", sort=False)
        return pd.DataFrame({method: mean_scores(rows)[column] for method, rows in groups}).T

    def table(self) -> str:
        """The first metrics as text of 80 columns, with intervals; a number in brackets says on how many conditions a
        metric was undefined."""
        means, undefined = self.means(), self.undefined()
        signs = {"higher": "+", "lower": "-", "ideal 1": "1", "ideal 0.5": ".5"}
        shown = pd.DataFrame(index=means.index)
        for metric in list(METRICS)[:SHOWN]:
            lacking = [f" [{n:.0f}]" if n else "" for n in undefined[metric]]
            shown[f"{_SHORT.get(metric, metric)} ({signs[METRICS[metric]]})"] = [
                f"{mean:.3f}{nan}" for mean, nan in zip(means[metric], lacking, strict=True)
            ]
        own = [
            f"{metric} {found[0]:.3f} to {found[1]:.3f}"
            for metric in list(METRICS)[:SHOWN]
            if (found := self.interval(self.model, metric)) is not None
        ]
        n, kind = self.n_conditions, "measured" if self.hold_out is None else "held-out"
        nowhere = ", [n] undefined on n conditions" if undefined[list(METRICS)[:SHOWN]].to_numpy().any() else ""
        texts = [
            f"mean over {n} {kind} condition{'s' if n > 1 else ''}, log1p space; + higher is better, - lower is "
            f"better, 1 ideal is 1{nowhere}; the ceiling, a half of the cells predicting the other, is a lower bound "
            "of what can be reached",
            f"95 % intervals of {self.model}: {', '.join(own)}" if own else "",
            self.verdict(),
            *self.notes,
        ]
        lines = [shown.to_string(), *(line for text in texts for line in textwrap.wrap(text, WIDTH))]
        return "\n".join(lines if self.field is None else [*lines, "", _field_table(self.field)])

    def record(self) -> EvaluationRecord:
        """The means, as a model's folder and card keep them."""
        means: Any = self.means().astype(object).where(self.means().notna(), None).to_dict("index")
        undefined: Any = self.undefined().astype(int).to_dict("index")
        return EvaluationRecord(
            library_version=__version__,
            model=self.model,
            ceiling=CEILING,
            data=self.data,
            split=None if self.hold_out is None else SplitRecord(self.hold_out, self.split_sha256),
            n_conditions=self.n_conditions,
            metrics=dict(METRICS),
            mean=means,
            n_undefined=undefined,
            interval={method: {name: self.interval(method, name) for name in METRICS} for method in self.methods},
            verdict=self.verdict(),
            n_genes=self.n_genes,
            n_left_out=self.n_left_out,
            kept_response=self.kept_response,
            notes=self.notes,
        )

    def save(self, folder: Path) -> list[Path]:
        """Write scores.parquet (method x condition) and scores.json (`record`); returns their paths."""
        table, as_json = folder / "scores.parquet", folder / "scores.json"
        with written(table) as temporary:
            self.conditions.to_parquet(temporary, index=False)
        write_json(as_json, self.record().as_json())
        if self.field is None:
            return [table, as_json]
        with written(folder / "cell_eval.csv") as temporary:
            self.field.scores.to_csv(temporary, index=False)
        return [table, as_json, folder / "cell_eval.csv"]


_SHORT = {"pearson_delta": "pearson", "energy_distance": "energy", "mse_of_means": "mse", "variance_ratio": "var"}
"""Names in the terminal."""


def score_conditions(
    predicted: AnnData,
    screen: Screen,
    match: ControlMatch,
    split: Split | None = None,
    seed: int = 0,
    *,
    field: bool = False,
    tables: Sequence[FeatureTable] = (),
    model: str = MODEL,
) -> Scores:
    """Score predicted cells against the measured ones of the same conditions, over all genes of the screen.

    Parameters
    ----------
    predicted
        X log1p values; obs perturbation, cell_type and (unless controls match by cell type alone) batch. Genes that it
        lacks, or has with var `measured` False, are scored as no change: as the control cells that predictions started
        from (obs `source_control`, where it says so).
    screen
        The measured cells, normalised as the model's training data were.
    match
        Whether batch is part of a condition; see `resolve_control_match`.
    split
        Its test cells are the measured ones and its training cells make the simple predictors. Without, all perturbed
        cells are measured ones, and only `no change` stands beside the model.
    field
        Also ask cell-eval (extra `eval`), on the same cells, genes and controls.
    tables
        What the model was told of perturbations besides their names, for the simple predictors too.
    model
        What the method that predicted is called in the scores.

    Raises
    ------
    ValueError, KeyError
        A measured gene of `predicted` is not in the screen, an obs column is missing, or no condition is in both.
    ModuleNotFoundError
        `field` without the extra.
    """
    if missing := [name for name in CONDITION if name not in predicted.obs.columns]:
        raise KeyError(
            f"obs columns {missing} not in the predictions; found {sorted(predicted.obs.columns)}. Name them so."
        )
    screen = _in_order_of_names(screen)  # no score depends on the order of genes
    values, kept = in_genes_of(predicted, screen)
    real, controls = held_out_rows(screen, ~screen.is_control if split is None else split.test, match)
    labels = predicted.obs["perturbation"].astype(str)
    canonical = {label: screen.notation.canonical(label) for label in labels.unique()}
    obs = predicted.obs.assign(perturbation=labels.map(canonical))
    found = group(obs, np.ones(predicted.n_obs, dtype=bool), match)
    common = [condition for condition in real if condition in found]
    if not common:
        raise ValueError(
            f"no predicted condition was measured: predicted are {_shown(found)}, measured {_shown(real)}. "
            "Perturbation, cell type and batch must be the same words in both."
        )
    starts, log1p = start_rows(predicted.obs, screen), screen.expression.log1p
    simple = None if split is None else SimpleMethods(screen, split, match, tables)
    choices = ControlChoices(screen.expression, seed)
    rows: list[dict[str, object]] = []
    told: dict[str, list[float]] = {}  # Pearson delta of the model, by verdict
    responses: dict[tuple[str, str], list[Response]] = {}
    n_single = 0
    squared = np.zeros(2)  # measured response, of the predicted genes and of all
    sides: list[tuple[Condition, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    with progress(len(common), "evaluate", "condition") as bar:
        for condition in common:
            context, chosen = condition[1:], found[condition]
            if starts is not None:
                chosen = one_a_control(predicted.obs_names, chosen, starts)
            chosen = some(predicted.obs_names, chosen)
            of_cells = None if starts is None else starts[chosen]
            start, truth, fair = halves_of(screen, controls[context], of_cells)
            chosen, of_cells = chosen[fair], None if of_cells is None else of_cells[fair]
            cells = with_no_change(values[chosen], kept, screen.expression, start, of_cells, choices)
            true, control, other = (
                log1p(some(screen.obs.index, of)).toarray().astype(np.float64) for of in (real[condition], start, truth)
            )
            n_equal = min(len(cells), len(true), len(control))
            n_single += min(len(cells), len(true)) == 1
            made = {NO_CHANGE: control} if simple is None else simple.cells(condition, start, len(true), choices, seed)
            reference = None if simple is None else simple.others(*context)
            against = Measured(true, control, other, reference)
            response = (true.mean(axis=0) - other.mean(axis=0)) ** 2
            known = dict(zip(CONDITION, condition, strict=True))
            own = None
            made = {model: cells, **made}
            jackknife = Jackknife(against, folds_of(len(true), *map(len, made.values())))
            unknown = {"pearson_delta": np.nan} if len(controls[context]) == 1 else {}  # of what is in both changes
            for method, of_method in made.items():
                of_method = in_own_order(of_method)
                distances = against.distances(of_method)
                scores = against.scores(of_method, n_equal, distances)
                without = jackknife.scores(of_method, distances)
                if own is None and simple is not None:
                    trust = simple.trust(condition, start)
                    unknown_how = trust.verdict == "cannot tell" and not trust.n_left_out
                    key = UNKNOWN_TRUST if unknown_how else trust.verdict
                    told.setdefault(key, []).append(scores["pearson_delta"])
                own = without if own is None else own
                rows.append({"method": method, **known, **scores, **_errors(without, own), **unknown})
            ceiling = split_half_ceiling(true, control, other, max(n_equal // 2, 1), reference)
            rows.append({"method": CEILING, **known, **ceiling, **unknown})
            squared += response[kept].sum(), response.sum()
            responses.setdefault(context, []).append(Response.of(condition[0], cells, true))
            if field:
                sides.append((condition, cells, some(screen.obs.index, real[condition]), start, truth))
            bar.update()
    asked = _ask_cell_eval(screen, sides) if field else None
    spread, n_left_out = relative_spread(responses, spread_of_responses), int((~kept).sum())
    share = float(squared[0] / squared[1]) if squared[1] > 0 else None
    notes = []
    measured_rows = np.concatenate([some(screen.obs.index, real[condition]) for condition in common])
    if (ratio := _sums_beside(values, log1p(measured_rows)[:, kept])) is not None:
        notes.append(
            f"Predicted cells sum to {ratio:.2g} times what measured ones do, once the logarithm is undone: are they "
            "log1p of as many counts a cell?"
        )
    if alone := sum(len(controls[condition[1:]]) == 1 for condition in common):
        notes.append(
            f"{alone} of {len(common)} conditions have one control cell: the change from it cannot be scored, as it "
            "would be in the prediction and in the truth."
        )
    if n_single:
        notes.append(
            f"{n_single} of {len(common)} conditions have one cell, measured or predicted: how cells differ cannot be "
            "scored there."
        )
    if len(common) < len(real):
        notes.append(f"{len(real) - len(common)} of {len(real)} measured conditions were not predicted.")
    if shown := [_of_verdict(verdict, told[verdict]) for verdict in get_args(Verdict) if verdict in told]:
        notes.append(f"By training conditions left out, {', '.join(shown)}.")
    if n_unknown := len(told.get(UNKNOWN_TRUST, [])):
        notes.append(
            f"How well {n_unknown} of the responses can be told is not known: no training condition that was left "
            "out is as new."
        )
    if n_left_out:
        lost = "" if share is None else f", which hold {1 - share:.0%} of the squared response"
        notes.append(f"{n_left_out:,} of {len(kept):,} genes are not predicted and scored as no change{lost}.")
    if spread is not None and spread < ALIKE:
        notes.append(f"Predictions of different perturbations look alike: {spread:.0%} of the measured spread.")
    hold_out, sha256 = (None, None) if split is None else (tuple(split.config.hold_out), split.sha256)
    table, data = _complete(pd.DataFrame(rows)), Path(screen.path).name
    return Scores(table, data, hold_out, sha256, len(kept), n_left_out, share, spread, tuple(notes), asked, model)


def _of_verdict(verdict: Verdict, pearson: Sequence[float]) -> str:
    known = [r for r in pearson if np.isfinite(r)]
    mean = f" (mean pearson_delta {np.mean(known):.2f})" if known else ""
    if verdict == "cannot tell":
        return f"of {len(pearson)} nobody can tell more than what all perturbations do{mean}"
    how = "can be told" if verdict == "known" else f"{'is' if len(pearson) == 1 else 'are'} trained"
    return f"{len(pearson)} {how}{mean}"


def _ask_cell_eval(
    screen: Screen, sides: Sequence[tuple[Condition, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
) -> FieldScores:
    """Of predicted cells and the rows of the screen that were scored with them: measured cells and both controls."""
    labels = [condition for condition, cells, *_ in sides for _ in range(len(cells))]
    predicted = AnnData(
        sparse.csr_matrix(np.concatenate([cells for _, cells, *_ in sides]).astype(np.float32)),
        obs=pd.DataFrame(labels, columns=CONDITION, index=[f"predicted_{i}" for i in range(len(labels))]),
        var=pd.DataFrame(index=list(screen.expression.genes.names)),
    )

    def of_screen(which: int) -> AnnData:
        # Each cell once, under the labels of the conditions, which may know no batches.
        context = (
            {side[0][1:]: side[which] for side in sides} if which > 2 else {side[0]: side[which] for side in sides}
        )
        rows = np.concatenate(list(context.values()))
        labels = [label if which == 2 else ("control", *label) for label, own in context.items() for _ in own]
        obs = pd.DataFrame(labels, columns=CONDITION, index=screen.obs.index[rows])
        return AnnData(screen.expression.log1p(rows), obs=obs, var=predicted.var.copy())

    return cell_eval_scores(predicted, of_screen(2), of_screen(3), of_screen(4))


def _in_order_of_names(screen: Screen) -> Screen:
    order = np.argsort(np.array(screen.expression.genes.names, dtype=object), kind="stable")
    return screen if (np.diff(order) == 1).all() else screen.with_genes(order)


def _sums_beside(predicted: sparse.csr_matrix, measured: sparse.csr_matrix) -> float | None:
    """What predicted cells sum to once log1p is undone, over what measured ones do in the same genes; None where they
    hardly differ, or nobody can know."""
    own, other = (np.median(totals(np.expm1(X.data.astype(np.float64)), X.indptr)) for X in (predicted, measured))
    if not own > 0 < other or 1 / MANY < own / other < FAR:
        return None
    return float(own / other)


def _field_table(field: FieldScores) -> str:
    lines = [
        f"{name:<40}{mean:>10.3f}" + (f"  [{n_nan:.0f} NaN]" if n_nan else "")
        for name, mean, n_nan in field.means().itertuples()
    ]
    said = ", ".join(f"{name} {number}" for name, number in field.versions.items())
    return "\n".join(
        [
            f"{said}, on the same cells and controls:",
            *lines,
            *(line for note in field.notes for line in textwrap.wrap(note, WIDTH)),
        ]
    )


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """With a row of NaN for each condition of which a method said nothing: means are over others then, and say so."""
    everything = pd.MultiIndex.from_tuples(
        [(m, *c) for m in table["method"].unique() for c in table[CONDITION].drop_duplicates().itertuples(index=False)],
        names=["method", *CONDITION],
    )
    return table.set_index(["method", *CONDITION]).reindex(everything).reset_index()


def _errors(without: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]) -> dict[str, float]:
    errors = {f"error {metric}": standard_error(without[metric]) for metric in COMPARED}
    for metric in COMPARED:
        paired = len(without[metric]) == len(own[metric])
        difference = standard_error(without[metric] - own[metric]) if paired else float("nan")
        errors[f"difference error {metric}"] = difference
    return errors


def evaluate(
    predictions: str | Path | AnnData,
    screen: str | Path | AnnData,
    split: str | Path | None = None,
    *,
    field: bool = False,
    tables: Sequence[FeatureTable] = (),
    overrides: Sequence[str] = (),
    **settings: Any,
) -> Scores:
    """Score predicted cells beside baselines and the ceiling of split halves.

    Parameters
    ----------
    predictions
        What `PerturbDiff.predict` returned, or an .h5ad or .parquet of it: X log1p values; obs perturbation,
        cell_type and batch. Genes that its controls lacked (uns["perturbdiff"]["genes_absent"]), which the screen has,
        are scored as no change, whether they were kept or not.
    screen
        The measured cells and their controls: an .h5ad, or its AnnData. They are normalised as the predictions say
        they were (uns["perturbdiff"]).
    split
        split.json of the run folder: its test cells are the measured ones and its training cells make the baselines.
        Without, all perturbed cells are measured ones, and only `no change` stands beside the model.
    field
        Also ask cell-eval (extra `eval`): all metrics of the field, by its own library.
    tables
        What the model was told of perturbations besides their names (`PerturbDiff.feature_tables`), for the simple
        methods too.
    overrides, **settings
        Words and values as of `train`, which win over the predictions' own: data={"batch_col": "donor"}.

    Returns
    -------
    `scores`, one row a method and condition; `means()`, over conditions; `table()`, the same as text; `save(folder)`.

    Raises
    ------
    FileNotFoundError, ValueError, KeyError
        A file is missing or not what it should be; no condition was both predicted and measured; a predicted gene is
        not in the screen.
    """
    if isinstance(predictions, str | Path) and Path(predictions).suffix == ".parquet":
        predictions = read_predicted(predictions)
    if isinstance(predictions, AnnData):
        X, obs, var, name = predictions.X, predictions.obs, predictions.var, "the AnnData"
        uns = predictions.uns.get("perturbdiff", {})
    else:
        (X, obs, var), name = read_h5ad_parts(predictions), str(predictions)
        with open_h5ad(predictions, ("uns/perturbdiff",)) as file:
            uns = read_elem(file["uns/perturbdiff"]) if "uns/perturbdiff" in file else {}
    known = {}
    if "target_sum" in uns:  # files of others say nothing
        known = {
            "target_sum": float(uns["target_sum"]) or None,
            "library_size_col": str(uns["library_size_col"]) or None,
        }
    screened, match, chosen = read_measured(screen, split, known, overrides, settings)
    values, genes = as_csr(X), genes_of(var)
    one_unit({str(uns.get("dose_unit", "")), screened.notation.dose_unit}, f"{name} and {screened.path}")
    _refuse_other_space(values, genes, known, screened, name)
    kept = set(genes.names)
    left_out = [str(name) for name in uns.get("genes_absent", ()) if str(name) not in kept]
    var = pd.DataFrame({"measured": [*measured(var), *[False] * len(left_out)]}, index=[*genes.names, *left_out])
    values = sparse.csr_matrix((values.data, values.indices, values.indptr), (len(obs), len(var)))
    predicted = AnnData(X=values, obs=obs.set_axis(unique_names(obs.index)), var=var)
    model = MODEL if uns else OTHER
    scores = score_conditions(predicted, screened, match, chosen, field=field, tables=tables, model=model)
    if "one draw" in str(uns.get("populations_differ", "")):
        scores = replace(scores, notes=(DRAWN, *scores.notes))
    return scores


def _refuse_other_space(
    X: sparse.csr_matrix, genes: GeneVocab, known: Mapping[str, Any], measured: Screen, name: str
) -> None:
    whole = check_values(X, genes.names) and X.nnz > 0
    space = RAW_COUNTS if whole else find_space(_different_cells(X))
    found, wanted = space.total, measured.expression.preprocessing.target_sum
    if space.bases != UNKNOWN.bases or space.whole:
        raise ValueError(f"{name} holds {space}; predictions are log1p values, as `perturbdiff predict` writes them.")
    stated = known.get("target_sum", found)
    differ = stated is not None and wanted is not None and abs(stated / wanted - 1) > SAME
    if differ or ("target_sum" in known and (stated is None) != (wanted is None)):
        raise ValueError(
            f"{name} holds log1p values of {_counts(stated)}, and the measured cells become such of {_counts(wanted)}; "
            "they cannot be compared. Leave data.target_sum out, or predict and measure in one space."
        )


def _different_cells(X: sparse.csr_matrix) -> sparse.csr_matrix:
    # One profile for many cells has one sum, whatever it is.
    keys = (X @ np.random.default_rng(0).normal(size=X.shape[1])).round(9)
    return X[np.sort(np.unique(keys, return_index=True)[1])]


def _counts(target_sum: float | None) -> str:
    return "nobody knows how many counts a cell" if target_sum is None else f"{target_sum:,.6g} counts a cell"


def read_measured(
    screen: str | Path | AnnData,
    split: str | Path | None,
    known: Mapping[str, Any],
    overrides: Sequence[str],
    settings: Mapping[str, Any],
) -> tuple[Screen, ControlMatch, Split | None]:
    """Measured cells by settings of which `known` are those of data that may be overridden; whose controls a condition
    has; the split. Raises as `evaluate`."""
    origin = IN_MEMORY if isinstance(screen, AnnData) else str(screen)
    base = {"out": "unused", "data": {"screen": origin, **_of_run(split), **known}}
    config = load_config(None, overrides, sections(settings), base=base)
    measured = Screen.read(screen, config.data)
    everything = ConditionIndex.build(measured, np.ones(len(measured), dtype=bool))
    match = resolve_control_match(everything, config.data.control_match)
    return measured, match, None if split is None else read_split(split, measured)


def _of_run(split: str | Path | None) -> dict[str, Any]:
    """How the labels of a run's screen were read, of the run folder that a split lies in."""
    recipe = None if split is None else Path(split).parent / "config.yaml"
    if recipe is None or not recipe.is_file():
        return {}
    try:
        data = load_config(recipe).data
    except ValueError:  # of a version with other settings
        return {}
    return {name: getattr(data, name) for name in READ_BY}


def _shown(conditions: Iterable[Condition]) -> str:
    return ", ".join(":".join(condition) for condition in sorted(conditions)[:3])
