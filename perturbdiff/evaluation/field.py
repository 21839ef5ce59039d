"""The field's metrics, computed by the field's own libraries: cell-eval (Arc Institute) and scPertEval.

No metric is computed here. Cells of a context, (cell_type, batch), are put together as a library wants them, it is run
on them, and what it returns is kept under its own names. Both come with the extra `eval`.

What the libraries would not say, the scores do:

- A metric that a library could not compute, or that is undefined, is NaN, counted by `FieldScores.n_nan`.
- Of one perturbation alone, cell-eval gives 1.0 to metrics that compare perturbations with each other, and where no
  measured condition has a significant gene, to `de_spearman_sig`. Both are NaN here; all else is what `cell-eval run`
  prints.
- cell-eval takes whole numbers for counts and normalises the one side that has them. Here X must be log1p, on both.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from perturbdiff.data.expression import as_csr
from perturbdiff.data.screen import genes_of
from perturbdiff.data.space import LOG1P_MAX, UNKNOWN, check_values, find_space
from perturbdiff.files import check_output, few, short, written

Profile = Literal["full", "minimal", "vcc", "de", "anndata", "pds"]

INSTALL = "pip install 'perturbdiff[eval]'"
CONTEXT = ("cell_type", "batch")
MAX_VALUES = 1 << 33  # cells x genes of both sides of a context: cell-eval makes them dense, 32 GiB of float32
N_SIGNIFICANT = ("de_nsig_counts_real", "de_nsig_counts_pred")
# Of cell-eval, metrics that compare perturbations with each other: of one alone they say nothing.
BETWEEN_PERTURBATIONS = (
    "discrimination_score_l1", "discrimination_score_l2", "discrimination_score_cosine", "pearson_edistance",
    "clustering_agreement", "de_spearman_sig",
)  # fmt: skip
_CONTROL = "control"  # what controls are called towards the libraries; every other label is a number there
_FAILED = re.compile(r"Error computing metric '(\w+)': (.*)", re.DOTALL)


@dataclass(frozen=True)
class FieldScores:
    """What a library of the field says of predictions.

    library, versions
        Its name, and the versions of it and of what finds its differentially expressed genes.
    scores
        One row a condition: `perturbation`, the context's columns, then the metrics under the library's names; NaN
        where one is undefined or could not be computed.
    dynamic_range
        One row a condition, as `scores`: scPertEval's dynamic range fraction of each metric, from 0, where the metric
        tells a technical duplicate from a bad prediction no better than two bad ones, to 1. None where nobody asked,
        and of cell-eval, which has none.
    notes
        What was left out or could not be scored, and why; for people.
    """

    library: str
    versions: dict[str, str]
    scores: pd.DataFrame
    context: tuple[str, ...]
    dynamic_range: pd.DataFrame | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def metrics(self) -> list[str]:
        """Columns of `scores` that are metrics."""
        return [str(name) for name in self.scores.columns.drop(["perturbation", *self.context])]

    @property
    def n_nan(self) -> pd.Series:
        """On how many conditions each metric is undefined."""
        return self.scores[self.metrics].isna().sum()

    def means(self) -> pd.DataFrame:
        """By metric: `mean` over the conditions where it is defined (NaN if none), `n_nan`, how many the others are.

        Means of two methods compare only where their `n_nan` agree.
        """
        return pd.DataFrame({"mean": self.scores[self.metrics].mean(), "n_nan": self.n_nan})

    def n_significant(self) -> pd.DataFrame:
        """Genes that differ from control cells (FDR < .05), by condition: columns `real`, `predicted`.

        Raises KeyError where the library was not asked for differential expression.
        """
        if missing := [name for name in N_SIGNIFICANT if name not in self.scores]:
            raise KeyError(f"{missing[0]!r} was not computed; run cell_eval_scores with profile='full' or 'de'.")
        names = dict(zip(N_SIGNIFICANT, ("real", "predicted"), strict=True))
        return self.scores[["perturbation", *self.context, *N_SIGNIFICANT]].rename(columns=names)


def cell_eval_scores(
    predicted: AnnData,
    measured: AnnData,
    control: AnnData,
    control_of_truth: AnnData | None = None,
    *,
    profile: Profile = "full",
    perturbation_col: str = "perturbation",
    context: Sequence[str] | None = None,
    num_threads: int = 1,
) -> FieldScores:
    """Scores of cell-eval, each context by itself; differential expression is pdex's, as cell-eval runs it.

    Parameters
    ----------
    predicted, measured
        X (n_cells, n_genes) log1p; obs `perturbation_col` and the columns of the context. Conditions that only one of
        them has are left out, and so are cells with a label that `control` gives its own.
    control
        Real control cells, X and the context's columns as above. They stand beside the predictions.
    control_of_truth
        Real control cells that stand beside the measured ones: others than `control`, or prediction and truth look
        alike because they share them; `control` if None.
    profile
        Of cell-eval: "full"; "anndata" and "pds" need no differential expression, which takes most of the time.
    context
        Columns of obs within which conditions are compared, by default those of cell_type and batch that all have.
        Where controls match by cell type alone: ["cell_type"].
    num_threads
        For differential expression and linear algebra.

    Returns
    -------
    `scores` with the metrics of the profile.

    Raises
    ------
    ModuleNotFoundError
        The extra `eval` is not installed.
    KeyError, ValueError
        An obs column or gene is missing, X is not log1p, nothing was both predicted and measured, or a context is too
        large for cell-eval, which makes all of its cells dense.

    Notes
    -----
    Genes are those of `predicted`, in their order. Cells are taken in the order of their names, so that the order of
    cells and conditions changes nothing; `pearson_edistance` of a file that has them in another order differs from what
    `cell-eval run` prints by what rounding makes of it, up to some 1e-4 where effects are small.
    """
    sides = _Sides.of(predicted, measured, control, control_of_truth, perturbation_col, context)
    with _quietly(num_threads, "cell_eval") as (folder, messages):
        cell_eval = _imported("cell_eval")
        tables, notes = [], list(sides.notes)
        for where in sides.contexts:
            before = len(messages)
            table = sides.conditions(where)
            if sides.has_controls(where):
                sides.refuse_too_large(where)
                found = _cell_eval(cell_eval, *sides.pair(where), profile, num_threads, folder)
                table = table.join(found.set_axis(table.index))
                failed = _failures(messages[before:])
                table = table.assign(**{name: np.nan for name in failed if name not in table})
                notes += [f"{sides.name(where)}{name}: {short(ValueError(why))}" for name, why in failed.items()]
                table, undefined = _without_pretence(table)
                notes += [f"{sides.name(where)}{why}" for why in undefined]
            tables.append(table)
    versions = {name: version(name) for name in ("cell-eval", "pdex")}
    return FieldScores("cell-eval", versions, _joined(tables), sides.context, None, tuple(notes))


def scperteval_scores(
    predicted: AnnData,
    measured: AnnData,
    control: AnnData,
    *,
    protocols: str | Sequence[str] = "all",
    dynamic_range: bool = False,
    min_cells: int = 30,
    perturbation_col: str = "perturbation",
    context: Sequence[str] | None = None,
    seed: int = 42,
    num_threads: int = 1,
) -> FieldScores:
    """Scores of scPertEval, each context by itself, and how well its metrics tell good predictions from bad ones.

    Parameters
    ----------
    predicted, measured, control, perturbation_col, context, num_threads
        As `cell_eval_scores`. scPertEval compares with the measured cells and their controls alone, also what was
        predicted: `control` are those.
    protocols
        Names of scPertEval (`scperteval list protocols`), "all" for those that are installed, or a group of them.
    dynamic_range
        Also calibrate each metric, between a bad prediction and a technical duplicate, which is half of the measured
        cells: of conditions with at least `min_cells` measured cells. It takes some twenty times as long as the scores.
    seed
        Of the halves, and of the sample that stands for all perturbed cells.

    Returns
    -------
    `scores` and `dynamic_range`. scPertEval compares each perturbation with the others of its context: of one alone all
    is NaN.

    Raises
    ------
    As `cell_eval_scores`.
    """
    sides = _Sides.of(predicted, measured, control, None, perturbation_col, context)
    with _quietly(num_threads, "scperteval") as (_, _):
        _imported("scperteval")
        from scperteval import api
        from scperteval.protocols.resolve import resolve_protocols

        names = [p.name for p in resolve_protocols([protocols] if isinstance(protocols, str) else list(protocols))]
        options: dict[str, Any] = {"control_label": _CONTROL, "workers": num_threads, "seed": seed}
        tables, ranges, notes = [], [], list(sides.notes)
        for where in sides.contexts:
            table = sides.conditions(where).assign(**dict.fromkeys(names, np.nan))
            of_metrics = table.copy()
            if len(table) < 2:
                notes.append(f"{sides.name(where)}one perturbation: scPertEval compares it with others; all is NaN")
            elif sides.has_controls(where):
                sides.refuse_too_large(where)
                guess, truth = sides.pair(where)
                every = api.prepare(truth, names, min_cells=1, **options)
                cells = guess[(guess.obs["perturbation"] != _CONTROL).to_numpy()].copy()
                for name in names:
                    try:
                        found = api.score(every, name, cells).per_perturbation.set_index("perturbation")["score"]
                        table[name] = found.reindex(_codes(len(table))).to_numpy()
                    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                        notes.append(f"{sides.name(where)}{name}: {short(error)}")
                if dynamic_range:
                    notes += _dynamic_range(api, truth, names, min_cells, options, of_metrics, sides.name(where))
            tables.append(table)
            ranges.append(of_metrics)
    calibrated = _joined(ranges) if dynamic_range else None
    versions = {name: version(name) for name in ("scperteval", "illico")}
    return FieldScores("scPertEval", versions, _joined(tables), sides.context, calibrated, tuple(notes))


def cell_eval_file(
    cells: AnnData,
    control: AnnData,
    path: str | Path,
    *,
    genes: Sequence[str] | None = None,
    control_label: str = "control",
    perturbation_col: str = "perturbation",
    overwrite: bool = False,
) -> Path:
    """Write cells and their controls as the .h5ad that `cell-eval run` takes for one of its two sides.

    Parameters
    ----------
    cells, control
        X log1p; obs `perturbation_col` (of `control` it is not read), and any of cell_type and batch, which are kept.
    path
        FILE.h5ad. `cell-eval run -ap predicted.h5ad -ar FILE.h5ad --pert-col perturbation --control-pert control`.
    genes
        Of the other side, in its order, as cell-eval wants the same in both; those of `cells` if None.
    control_label
        What controls are called in the file.

    Raises
    ------
    FileExistsError
        `path` is there, and not `overwrite`.
    KeyError, ValueError
        An obs column or gene is missing; X is not log1p; a cell under a perturbation has the label of controls.
    """
    path = check_output(path, ".h5ad", overwrite=overwrite)
    names = list(genes_of(cells.var).names if genes is None else genes)
    labels = _labels(cells, perturbation_col, "cells")
    if control_label in set(labels):
        raise ValueError(
            f"{int((labels == control_label).sum()):,} of the cells are called {control_label!r}, as the controls; "
            "leave them out, or give another control_label."
        )
    obs = pd.concat([_kept_columns(cells), _kept_columns(control)], ignore_index=True)
    obs.insert(0, perturbation_col, [*labels, *[control_label] * control.n_obs])
    obs = obs.astype(str).astype("category").set_axis([f"cell_{i}" for i in range(len(obs))])
    X = sparse.vstack([_values(cells, names, "cells"), _values(control, names, "control")], format="csr")
    with written(path) as temporary:
        AnnData(X=X, obs=obs, var=pd.DataFrame(index=pd.Index(names))).write_h5ad(temporary, compression="gzip")
    return path


# ---------------------------------------------------------------- two sides of a comparison


@dataclass(frozen=True)
class _Sides:
    # X of all in the order of one gene list; rows of each condition, and of the controls of each context.
    genes: list[str]
    context: tuple[str, ...]
    contexts: dict[tuple[str, ...], list[str]]  # perturbations, sorted
    X: dict[str, sparse.csr_matrix]
    rows: dict[str, dict[tuple[str, ...], np.ndarray]]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        predicted: AnnData,
        measured: AnnData,
        control: AnnData,
        control_of_truth: AnnData | None,
        perturbation_col: str,
        context: Sequence[str] | None,
    ) -> _Sides:
        truth = control if control_of_truth is None else control_of_truth
        given = {"predicted": predicted, "measured": measured, "control": control, "control_of_truth": truth}
        columns = tuple(CONTEXT if context is None else context)
        if context is None:
            columns = tuple(name for name in CONTEXT if all(name in cells.obs for cells in given.values()))
        genes = list(genes_of(predicted.var).names)
        X = {name: _values(cells, genes, name) for name, cells in given.items()}
        own = {  # what control cells are called is no perturbation
            label
            for cells in (control, truth)
            if perturbation_col in cells.obs
            for label in cells.obs[perturbation_col].astype(str).unique()
        }
        rows, notes = {}, []
        for name, cells in given.items():
            keys = [_labels(cells, column, name) for column in columns]
            kept = np.ones(cells.n_obs, dtype=bool)
            if name in ("predicted", "measured"):
                keys.append(_labels(cells, perturbation_col, name))
                kept = ~np.isin(keys[-1], list(own))
            rows[name] = _groups(keys, kept, cells.obs_names)
        both = rows["predicted"].keys() & rows["measured"].keys()
        for one, other in (("predicted", "measured"), ("measured", "predicted")):
            if alone := sorted(rows[one].keys() - both):
                shown = few([":".join((key[-1], *key[:-1])) for key in alone])
                notes.append(f"{len(alone):,} conditions were {one} and not {other}; they are left out: {shown}")
        if not both:
            raise ValueError(
                f"nothing was both predicted and measured. {'. '.join(notes) or 'There are no perturbed cells'}. "
                f"Perturbation, {', '.join(columns)} must be the same words in both."
            )
        contexts: dict[tuple[str, ...], list[str]] = {}
        for *context_of, perturbation in sorted(both):
            contexts.setdefault(tuple(context_of), []).append(perturbation)
        for where in contexts:
            for name in dict.fromkeys(("control", "control_of_truth" if truth is not control else "control")):
                if where not in rows[name]:
                    shown = ":".join(where)
                    notes.append(f"{shown}: no cells of {name} have this {', '.join(columns)}; all its scores are NaN")
        return cls(genes, columns, contexts, X, rows, tuple(notes))

    def name(self, where: tuple[str, ...]) -> str:
        return f"{':'.join(where)}: " if where else ""

    def conditions(self, where: tuple[str, ...]) -> pd.DataFrame:
        table = pd.DataFrame({"perturbation": self.contexts[where]})
        return table.assign(**dict(zip(self.context, where, strict=True)))

    def has_controls(self, where: tuple[str, ...]) -> bool:
        return where in self.rows["control"] and where in self.rows["control_of_truth"]

    def refuse_too_large(self, where: tuple[str, ...]) -> None:
        n_cells = sum(
            len(self.rows[name][key])
            for name, keys in (("predicted", None), ("measured", None), ("control", where), ("control_of_truth", where))
            for key in ([keys] if keys is not None else [(*where, label) for label in self.contexts[where]])
        )
        if (n := n_cells * len(self.genes)) > MAX_VALUES:
            raise ValueError(
                f"{self.name(where)}{n_cells:,} cells of {len(self.genes):,} genes are {n:,} values, which the library "
                f"makes dense; at most {MAX_VALUES:,} are given to it. Score fewer conditions, cells or genes."
            )

    def pair(self, where: tuple[str, ...]) -> tuple[AnnData, AnnData]:
        """Predicted and measured cells of a context, each with its controls; labels as numbers.

        Labels are text of strangers, and the libraries make arrays of the longest, files and keys of them. A gene that
        is called as a perturbation stays so: cell-eval leaves a perturbation's own gene out of its discrimination.
        """
        labels = self.contexts[where]
        codes = dict(zip(labels, _codes(len(labels)), strict=True))
        var = pd.DataFrame(index=pd.Index([codes.get(gene, f"gene {i}") for i, gene in enumerate(self.genes)]))
        made = []
        for cells, controls in (("predicted", "control"), ("measured", "control_of_truth")):
            parts = [self.rows[cells][(*where, label)] for label in labels]
            names = np.repeat(list(codes.values()), [len(part) for part in parts]).tolist()
            own = self.rows[controls][where]
            X = sparse.vstack([self.X[cells][np.concatenate(parts)], self.X[controls][own]], format="csr")
            obs = pd.DataFrame({"perturbation": pd.Categorical([*names, *[_CONTROL] * len(own)])})
            made.append(AnnData(X=X, obs=obs.set_axis(obs.index.astype(str)), var=var))
        return made[0], made[1]


def _codes(n: int) -> list[str]:
    # Sorted as the labels they stand for: ties are broken by that order.
    return [f"{i:09d}" for i in range(n)]


def _groups(keys: list[np.ndarray], kept: np.ndarray, names: pd.Index) -> dict[tuple[str, ...], np.ndarray]:
    # Cells by their names, so that the order they come in changes nothing: cell-eval's sums in float32 depend on it.
    # Numbered cells, cell_2 before cell_10, stay as they are in a file.
    rows = np.flatnonzero(kept)
    text = names.astype(str)[rows]
    rows = rows[sorted(range(len(rows)), key=lambda i: (len(text[i]), text[i]))]
    if not keys:
        return {(): rows} if len(rows) else {}
    table = pd.DataFrame({i: key[rows] for i, key in enumerate(keys)})
    return {
        key if isinstance(key, tuple) else (key,): rows[np.asarray(found)]
        for key, found in table.groupby(list(table.columns), sort=False).indices.items()
    }


def _labels(cells: AnnData, column: str, what: str) -> np.ndarray:
    if column not in cells.obs:
        raise KeyError(
            f"obs column {column!r} not in {what}; found {sorted(map(str, cells.obs.columns))}. Name the columns with "
            "perturbation_col and context."
        )
    return cells.obs[column].astype(str).to_numpy().astype(object)


def _kept_columns(cells: AnnData) -> pd.DataFrame:
    return cells.obs[[name for name in CONTEXT if name in cells.obs]].astype(str)


def _values(cells: AnnData, genes: list[str], what: str) -> sparse.csr_matrix:
    own = list(genes_of(cells.var).names)
    if cells.n_obs == 0:
        raise ValueError(f"{what} has no cells; give at least one.")
    X = as_csr(cells.X)
    if check_values(X, own) and X.nnz:
        raise ValueError(f"{what} holds whole numbers, as raw counts do; X must be log1p values, as predictions are.")
    # Only of real cells the space is found from what they sum to: all cells of a predicted mean are one cell.
    if what == "predicted" and X.data.max(initial=0) >= LOG1P_MAX:
        raise ValueError(f"predicted holds {X.data.max()}; X must be log1p values, which stay under {LOG1P_MAX:g}.")
    if what != "predicted" and X.nnz and (space := find_space(X)).bases != UNKNOWN.bases:
        raise ValueError(f"{what} holds {space}; X must be log1p values, as predictions are.")
    if own != genes:
        columns = pd.Index(own).get_indexer(pd.Index(genes))
        if lacking := [genes[i] for i in np.flatnonzero(columns < 0)]:
            raise ValueError(
                f"{len(lacking):,} of the {len(genes):,} genes are not in {what}: {few(lacking)}. All must have been "
                "measured on both sides; leave the others out of the predictions."
            )
        X = as_csr(X[:, columns])
    return X.astype(np.float32)


# ---------------------------------------------------------------- the libraries


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} needs {error.name}, which is not installed: {INSTALL}") from error


@contextmanager
def _quietly(num_threads: int, logger_name: str) -> Iterator[tuple[str, list[str]]]:
    """A folder for what a library writes, and the messages of its log; it prints and leaves behind nothing.

    Imported, scPertEval sets the numbers of threads and polars the allocator of every process started later: the
    environment is put back.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads ({num_threads}) must be at least 1.")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(logger_name)
    propagated, environment = logger.propagate, dict(os.environ)
    logger.addHandler(handler)
    logger.propagate = False
    os.environ.setdefault("POLARS_MAX_THREADS", str(num_threads))  # read when polars first works
    try:
        with (
            tempfile.TemporaryDirectory(prefix="perturbdiff-") as folder,
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield folder, messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _cell_eval(
    cell_eval: Any, predicted: AnnData, measured: AnnData, profile: str, num_threads: int, folder: str
) -> pd.DataFrame:
    # (conditions, metrics), sorted by their codes
    from threadpoolctl import threadpool_limits

    skip_de = profile in ("anndata", "pds")
    with threadpool_limits(num_threads):
        evaluator = cell_eval.MetricsEvaluator(
            predicted,
            measured,
            control_pert=_CONTROL,
            pert_col="perturbation",
            num_threads=num_threads,
            outdir=os.path.join(folder, "cell-eval"),
            allow_discrete=True,  # X is log1p; or a prediction of nothing but zeros would be taken for counts
            pdex_kwargs={"is_log1p": True},
            skip_de=skip_de,
        )
        table, _ = evaluator.compute(profile=profile, write_csv=False)
    by_condition = pd.DataFrame(table.to_dict(as_series=False)).set_index("perturbation").astype(float)
    codes = [code for code in measured.obs["perturbation"].cat.categories if code != _CONTROL]
    return by_condition.reindex(codes).reindex(columns=_columns(cell_eval, by_condition, profile))


def _columns(cell_eval: Any, table: pd.DataFrame, profile: str) -> list[str]:
    # cell-eval leaves out the column of a metric that no condition has.
    kinds = cell_eval.MetricType.DE, cell_eval.MetricType.ANNDATA_PAIR
    de, pair = (cell_eval.metrics_registry.list_metrics(kind) for kind in kinds)
    profiles = {"full": [*de, *pair], "de": de, "anndata": pair}
    there = [str(name) for name in table.columns]
    columns: list[str] = []
    for name in profiles.get(profile, there):
        columns += N_SIGNIFICANT if name == "de_nsig_counts" else [name]
    return columns


def _failures(messages: list[str]) -> dict[str, str]:
    # metric -> why, from the log: cell-eval leaves a metric that fails out of its table
    found = map(_FAILED.fullmatch, messages)
    return {match[1]: match[2] for match in found if match is not None}


def _without_pretence(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    # What cell-eval gives where there is nothing to compare.
    if len(table) == 1 and (there := [name for name in BETWEEN_PERTURBATIONS if name in table]):
        why = f"one perturbation: nothing to compare it with, so {', '.join(there)} are NaN"
        return table.assign(**dict.fromkeys(there, np.nan)), [why]
    if {"de_spearman_sig", N_SIGNIFICANT[0]} <= set(table) and not table[N_SIGNIFICANT[0]].any():
        why = "no measured condition has a significant gene, so de_spearman_sig is NaN"
        return table.assign(de_spearman_sig=np.nan), [why]
    return table, []


def _dynamic_range(
    api: Any, truth: AnnData, names: list[str], min_cells: int, options: dict[str, Any], into: pd.DataFrame, where: str
) -> list[str]:
    # Fills the columns of `into`; returns notes.
    sizes = truth.obs["perturbation"].value_counts().drop(_CONTROL)
    min_cells = max(2, min_cells)  # for two halves
    enough = int((sizes >= min_cells).sum())
    notes = []
    if enough < len(into):
        notes.append(
            f"{where}{len(into) - enough} of {len(into)} conditions have fewer than {min_cells} measured cells, too "
            "few for a dynamic range"
        )
    if enough < 2:
        return notes
    halves = api.prepare(truth, names, min_cells=min_cells, **options)
    for name in names:
        try:
            found = api.calibrate(halves, name).per_perturbation.set_index("perturbation")["drf"]
            into[name] = found.reindex(_codes(len(into))).to_numpy()
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            notes.append(f"{where}dynamic range of {name}: {short(error)}")
    return notes


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    rows = [row for table in tables for row in table.to_dict("records")]
    return pd.DataFrame(rows, columns=columns).sort_values(columns[0], kind="stable", ignore_index=True)
