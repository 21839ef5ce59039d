"""Scores of predicted cells on held-out conditions, beside baselines and the ceiling of split halves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem
from scipy import sparse

from perturbdiff._version import __version__
from perturbdiff.config import load_config, sections
from perturbdiff.data.conditions import ConditionIndex, ControlMatch, resolve_control_match
from perturbdiff.data.expression import as_csr, gene_means
from perturbdiff.data.h5ad import open_h5ad, read_h5ad_parts
from perturbdiff.data.screen import IN_MEMORY, READ_BY, Expression, Screen, genes_of, unique_names
from perturbdiff.data.space import RAW_COUNTS, SAME, UNKNOWN, check_values, find_space
from perturbdiff.data.splits import Split, read_split
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.diffusion.generate import choose_controls
from perturbdiff.evaluation.metrics import METRICS, mean_scores, score_condition, split_half_ceiling
from perturbdiff.files import few, progress, write_json, written
from perturbdiff.hub.records import EvaluationRecord, SplitRecord
from perturbdiff.inference.output import read_predicted
from perturbdiff.means.shifts import BASELINES, TrainingEffects, shift_cells

MODEL = "PerturbDiff"
CEILING = "ceiling (half predicts half)"
CONDITION = ["perturbation", "cell_type", "batch"]
ALL_BATCHES = "all"  # the batch of every condition where controls match by cell type

Condition = tuple[str, str, str]


@dataclass(frozen=True)
class Scores:
    """Scores of every method on every held-out condition.

    scores
        One row a (method, condition): `method`, `perturbation`, `cell_type`, `batch`, the metrics, cell numbers.
    data
        File name of the screen whose measured cells these are; None if unknown.
    hold_out
        Selectors of the held-out conditions; None where nothing was held out, but all that was measured is scored.
    split_sha256
        Of the split.json; None if unknown.
    n_genes, n_absent
        Scored genes, and those of them that the controls of the predictions lacked: of these, the model predicts no
        change.
    """

    scores: pd.DataFrame
    data: str | None = None
    hold_out: tuple[str, ...] | None = None
    split_sha256: str | None = None
    n_genes: int | None = None
    n_absent: int = 0

    @property
    def n_conditions(self) -> int:
        return int(self.scores.groupby("method").size().max())

    def means(self) -> pd.DataFrame:
        """Unweighted mean over conditions by method (rows) and metric (columns)."""
        return self._by_method("mean")

    def undefined(self) -> pd.DataFrame:
        """On how many conditions a metric is undefined (NaN), by method and metric."""
        return self._by_method("n_nan")

    def _by_method(self, column: str) -> pd.DataFrame:
        groups = self.scores.groupby("method", sort=False)
        return pd.DataFrame({method: mean_scores(rows)[column] for method, rows in groups}).T

    def table(self) -> str:
        """The means as text; a number in brackets says on how many conditions a metric was undefined."""
        means, undefined = self.means(), self.undefined()
        n_conditions = self.n_conditions
        shown = pd.DataFrame(
            {
                metric: [
                    f"{means.loc[method, metric]:.3f}"
                    + (f" [{undefined.loc[method, metric]:.0f} NaN]" if undefined.loc[method, metric] else "")
                    for method in means.index
                ]
                for metric in METRICS
            },
            index=means.index,
        )
        absent = f"\n{self.n_absent:,} of {self.n_genes:,} genes, which its controls lacked, are scored as no change"
        direction = {"higher": "+", "lower": "-", "ideal 1": "1"}
        shown.columns = pd.Index([f"{name} ({direction[METRICS[name]]})" for name in METRICS])
        return (
            f"{shown.to_string()}\n"
            f"mean over {n_conditions} {'measured' if self.hold_out is None else 'held-out'} "
            f"condition{'s' if n_conditions > 1 else ''}, log1p space; "
            f"+ higher is better, - lower is better, 1 ideal is 1{absent if self.n_absent else ''}"
        )

    def record(self) -> EvaluationRecord:
        """The means, as a model's folder and card keep them."""
        means: Any = self.means().astype(object).where(self.means().notna(), None).to_dict("index")
        undefined: Any = self.undefined().astype(int).to_dict("index")
        return EvaluationRecord(
            library_version=__version__,
            model=MODEL,
            ceiling=CEILING,
            data=self.data,
            split=None if self.hold_out is None else SplitRecord(self.hold_out, self.split_sha256),
            n_conditions=self.n_conditions,
            metrics=dict(METRICS),
            mean=means,
            n_undefined=undefined,
        )

    def save(self, folder: Path) -> list[Path]:
        """Write scores.csv (by condition) and scores.json (`record`); returns their paths."""
        csv, as_json = folder / "scores.csv", folder / "scores.json"
        with written(csv) as temporary:
            self.scores.to_csv(temporary, index=False)
        write_json(as_json, self.record().as_json())
        return [csv, as_json]


def score_conditions(
    predicted: AnnData, screen: Screen, match: ControlMatch, split: Split | None = None, seed: int = 0
) -> Scores:
    """Score predicted cells against the measured ones of the same conditions.

    Parameters
    ----------
    predicted
        X log1p values; obs perturbation, cell_type and (unless controls match by cell type alone) batch. Genes with
        var `measured` False are scored as no change: as control cells of the screen whose mean is that of all. Those
        that the screen lacks too are left out.
    screen
        The measured cells, normalised as the model's training data were.
    match
        Whether batch is part of a condition; see `resolve_control_match`.
    split
        Its test cells are the measured ones and its training cells make the baselines. Without, all perturbed cells
        are measured ones, and only `no change` stands beside the model.

    Raises
    ------
    ValueError, KeyError
        A measured gene of `predicted` is not in the screen, an obs column is missing, or no condition is in both.
    """
    if missing := [name for name in CONDITION if name not in predicted.obs.columns]:
        raise KeyError(
            f"obs columns {missing} not in the predictions; found {sorted(predicted.obs.columns)}. Name them so."
        )
    genes, values = GeneVocab(tuple(predicted.var_names.astype(str))), as_csr(predicted.X)
    had = _measured(predicted.var)
    columns = genes.align(screen.expression.genes, min_overlap=0.0).columns
    if lacking := [genes.names[i] for i in np.flatnonzero(had & (columns < 0))]:
        raise ValueError(
            f"{len(lacking)} of the {len(genes)} predicted genes are not in {screen.path}, for example "
            f"{', '.join(lacking[:5])}; give the screen that was predicted."
        )
    if (columns < 0).any():  # neither the controls nor the screen have them
        scored = np.flatnonzero(columns >= 0)
        genes, values, had, columns = genes.select(scored), values[:, scored], had[scored], columns[scored]
    absent = np.flatnonzero(~had)
    if len(absent):
        print(
            f"note: {len(absent):,} of {len(genes):,} genes are scored as no change, as the predictions' controls "
            f"lacked them: {few([genes.names[i] for i in absent])}.",
            flush=True,
        )
    expression = screen.expression.with_genes(genes, columns)
    real, controls = held_out_rows(screen, ~screen.is_control if split is None else split.test, match)
    labels = predicted.obs["perturbation"].astype(str)
    written = {label: screen.notation.canonical(label) for label in labels.unique()}
    obs = predicted.obs.assign(perturbation=labels.map(written))
    found = _group(obs, np.ones(predicted.n_obs, dtype=bool), match)
    common = [condition for condition in real if condition in found]
    if not common:
        raise ValueError(
            f"no predicted condition was measured: predicted are {_shown(found)}, measured {_shown(real)}. "
            "Perturbation, cell type and batch must be the same words in both."
        )
    if len(common) < len(real):
        print(f"note: {len(real) - len(common)} of {len(real)} measured conditions were not predicted.", flush=True)
    effects = None if split is None else _training_effects(screen, expression, split, match)
    rows: list[dict[str, object]] = []
    with progress(len(common), "evaluate", "condition") as bar:
        for condition in common:
            perturbation, cell_type, batch = condition
            measured = expression.log1p(real[condition]).toarray()
            control = expression.log1p(controls[cell_type, batch]).toarray()
            cells = values[found[condition]].toarray()
            if len(absent):
                cells[:, absent] = _no_change(expression, controls[cell_type, batch], absent, len(cells), seed)
            methods = {MODEL: score_condition(cells, measured, control)}
            if effects is None:
                methods["no change"] = score_condition(control, measured, control)
            else:
                control_mean = control.mean(axis=0, dtype=np.float64)
                for name, baseline in BASELINES.items():
                    shift = baseline(effects, perturbation, cell_type, batch, control_mean)
                    methods[name] = score_condition(shift_cells(control, shift), measured, control)
            methods[CEILING] = split_half_ceiling(measured, control, seed)
            labels = dict(zip(CONDITION, condition, strict=True))
            rows += [{"method": name, **labels, **scores} for name, scores in methods.items()]
            bar.update()
    hold_out, sha256 = (None, None) if split is None else (tuple(split.config.hold_out), split.sha256)
    return Scores(pd.DataFrame(rows), Path(screen.path).name, hold_out, sha256, len(genes), len(absent))


def evaluate(
    predictions: str | Path | AnnData,
    screen: str | Path | AnnData,
    split: str | Path | None = None,
    *,
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
    measured, match, chosen = read_measured(screen, split, known, overrides, settings)
    values, genes = as_csr(X), genes_of(var)
    _refuse_other_space(values, genes, known, measured, name)
    kept = set(genes.names)
    left_out = [str(name) for name in uns.get("genes_absent", ()) if str(name) not in kept]
    var = pd.DataFrame({"measured": [*_measured(var), *[False] * len(left_out)]}, index=[*genes.names, *left_out])
    values = sparse.csr_matrix((values.data, values.indices, values.indptr), (len(obs), len(var)))
    predicted = AnnData(X=values, obs=obs.set_axis(unique_names(obs.index)), var=var)
    return score_conditions(predicted, measured, match, chosen)


def _no_change(expression: Expression, rows: np.ndarray, genes: np.ndarray, n_cells: int, seed: int) -> np.ndarray:
    # (n_cells, genes) of control cells, whose mean is that of all, as predictions start from.
    cells = replace(expression, X=expression.X[rows], library_size=expression.library_size[rows])
    cells = cells.with_genes(expression.genes.select(genes), genes)
    return cells.log1p(choose_controls(cells, n_cells, seed, population=0)).toarray()


def _measured(var: pd.DataFrame) -> np.ndarray:
    # (n_vars,) of predictions, whether their controls had the gene; files of others say nothing.
    if "measured" not in var:
        return np.ones(len(var), dtype=bool)
    if var["measured"].dtype != bool:
        raise ValueError(
            f"var column 'measured' of the predictions holds {var['measured'].iloc[0]!r}; it must be true or false, "
            "whether the controls had the gene. Give it another name if it says something else."
        )
    return var["measured"].to_numpy()


def _refuse_other_space(
    X: sparse.csr_matrix, genes: GeneVocab, known: Mapping[str, Any], measured: Screen, name: str
) -> None:
    space = RAW_COUNTS if check_values(X, genes.names) else find_space(X)
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


def held_out_rows(
    screen: Screen, cells: np.ndarray, match: ControlMatch
) -> tuple[dict[Condition, np.ndarray], dict[tuple[str, str], np.ndarray]]:
    # Rows of the screen of each condition among `cells`, and of the controls of each (cell type, batch).
    real = _group(screen.obs, cells & ~screen.is_control, match)
    if not real:
        raise ValueError("nothing is held out: give split.hold_out (--hold-out) conditions to predict and score.")
    controls = {(c, b): rows for (_, c, b), rows in _group(screen.obs, screen.is_control, match).items()}
    if lacking := [condition for condition in real if condition[1:] not in controls]:
        raise ValueError(
            f"condition {':'.join(lacking[0])} has no control cells of its cell type and batch in {screen.path}; "
            "data.control_match=cell_type takes those of any batch, data.other_control_labels names more controls."
        )
    return real, controls


def _group(obs: pd.DataFrame, cells: np.ndarray, match: ControlMatch) -> dict[Condition, np.ndarray]:
    labels = [obs[name].astype(str).to_numpy() for name in CONDITION]
    if match == "cell_type":
        labels[2] = np.full(len(obs), ALL_BATCHES)
    groups: dict[Condition, list[int]] = {}
    for row in np.flatnonzero(cells).tolist():
        groups.setdefault((labels[0][row], labels[1][row], labels[2][row]), []).append(row)
    return {condition: np.array(rows) for condition, rows in sorted(groups.items())}


def _training_effects(screen: Screen, expression: Expression, split: Split, match: ControlMatch) -> TrainingEffects:
    trained, controls = held_out_rows(screen, split.train, match)

    def mean(rows: np.ndarray) -> np.ndarray:
        return gene_means(expression.log1p(rows))

    control_mean = {context: mean(rows) for context, rows in controls.items()}
    matched = np.stack([control_mean[c, b] for _, c, b in trained])
    return TrainingEffects(
        perturbation=[p for p, _, _ in trained],
        cell_type=[c for _, c, _ in trained],
        batch=[b for _, _, b in trained],
        control_mean=matched,
        effect=np.stack([mean(rows) for rows in trained.values()]) - matched,
        n_cells=np.array([len(rows) for rows in trained.values()]),
        notation=screen.notation,
    )
