"""The report of a run: its scores, pictures, data and provenance as one HTML file that needs nothing else.

The same run folder gives the same bytes. What a run lacks is left out, and the report says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml  # type: ignore[import-untyped]
from anndata import AnnData
from omegaconf import OmegaConf

from perturbdiff.config import load_config
from perturbdiff.data.conditions import ConditionIndex, ControlMatch, resolve_control_match
from perturbdiff.data.h5ad import read_h5ad_parts
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import read_split
from perturbdiff.evaluation import plots
from perturbdiff.evaluation.fair import Condition, group, halves_of, held_out_rows, start_rows
from perturbdiff.evaluation.html import as_svg, bullets, drawing, facts, figure, number, page, section, table, text
from perturbdiff.evaluation.metrics import METRICS
from perturbdiff.evaluation.populations import batch_means
from perturbdiff.files import read_json, sha256, short, typed, write_text
from perturbdiff.hub.records import Calibration
from perturbdiff.inference.calibration import MEANS, read_means
from perturbdiff.inference.intervals import covered

PAPER = "https://arxiv.org/abs/2602.19685"
FIRST = 4  # metrics that are shown first
N_PICTURED = 6  # conditions with figures of their cells
CURVE_POINTS = 400
LABEL = 60  # characters of a label in the table
MAX_JSON = 1 << 28  # bytes
LABELS = ["perturbation", "cell_type", "batch"]
NAMES = {"perturbation": "perturbation", "cell_type": "cell type", "batch": "batch"}
NO_MATPLOTLIB = "There are no figures: they need matplotlib (pip install 'perturbdiff[plot]')."


@dataclass(frozen=True)
class Cells:
    """Measured cells of the held-out conditions, in the genes that were predicted; X log1p."""

    screen: Screen
    predicted: AnnData
    rows: Mapping[Condition, np.ndarray]  # of the screen
    controls: Mapping[tuple[str, str], np.ndarray]  # of the screen
    found: Mapping[Condition, np.ndarray]  # of the predicted cells
    starts: np.ndarray | None

    def of(self, condition: Condition) -> tuple[AnnData, AnnData, AnnData, AnnData]:
        """Measured and predicted cells, and control cells that measure the true change and that predictions start
        from."""
        own = self.found[condition]
        used = None if self.starts is None else self.starts[own]
        start, truth, fair = halves_of(self.screen, self.controls[condition[1:]], used)
        own = own[fair]
        measured, true_control, control = (self._adata(rows) for rows in (self.rows[condition], truth, start))
        return measured, self.predicted[own], true_control, control

    def _adata(self, rows: np.ndarray) -> AnnData:
        names = pd.Index(self.screen.expression.genes.names)
        return AnnData(self.screen.expression.log1p(rows), self.screen.obs.iloc[rows], pd.DataFrame(index=names))


@dataclass(frozen=True)
class Results:
    """What a run folder holds; empty where it does not.

    conditions
        One row a (method, condition), or nothing.
    metrics
        Name -> which way is better.
    summary
        scores.json.
    """

    folder: Path
    settings: dict[str, Any]
    split: dict[str, Any]
    training: dict[str, Any]
    log: list[dict[str, Any]]
    conditions: pd.DataFrame
    metrics: dict[str, str]
    summary: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Raises FileNotFoundError where it is no run folder, ValueError where a file of it is damaged."""
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"{folder} holds no config.yaml: give the folder of a run (train --out).")
        try:
            settings: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / 'config.yaml'} is not yaml ({short(error)}); get it again.") from error
        summary, conditions = _json(folder / "scores.json"), _conditions(folder)
        names = list(conditions.columns)
        of_table = names[names.index("batch") + 1 : names.index("n_pred")] if names else []
        stated = {str(name): str(direction) for name, direction in (summary.get("metrics") or {}).items()}
        metrics = stated or {name: str(METRICS.get(name, "")) for name in of_table}
        if names:
            metrics = {name: direction for name, direction in metrics.items() if name in of_table}
        log = []
        if (folder / "metrics.jsonl").is_file():
            for line in (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    log.append(dict(json.loads(line)))
                except (ValueError, TypeError):
                    continue  # a line that a kill cut short
        return cls(
            folder,
            settings if isinstance(settings, dict) else {},
            _json(folder / "split.json"),
            _json(folder / "model" / "training.json"),
            log,
            conditions,
            metrics,
            summary,
        )

    @property
    def methods(self) -> list[str]:
        found = list(dict.fromkeys(self.conditions["method"])) if len(self.conditions) else []
        return found or [str(method) for method in self.summary.get("mean") or {}]

    @property
    def model(self) -> str:
        return str(self.summary.get("model", self.methods[0]))

    @property
    def ceiling(self) -> str:
        return str(self.summary.get("ceiling", next((m for m in self.methods if m.startswith("ceiling")), "")))

    def mean(self, method: str, metric: str) -> float:
        given = (self.summary.get("mean") or {}).get(method)
        if isinstance(given, dict) and metric in given:
            value = given[metric]
            return float(value) if isinstance(value, int | float) else math.nan
        if not len(self.conditions):
            return math.nan
        return float(self.conditions.loc[self.conditions["method"] == method, metric].mean())

    def interval(self, method: str, metric: str) -> tuple[float, float] | None:
        found = ((self.summary.get("interval") or {}).get(method) or {}).get(metric)
        return (found[0], found[1]) if isinstance(found, list) and len(found) == 2 else None

    def loss(self, metric: str) -> Callable[[float], float]:
        """How far a score is from the best, up to a constant; infinite where it is undefined."""
        direction = self.metrics[metric]
        if direction.startswith("ideal "):
            best = float(direction.removeprefix("ideal "))
            return lambda x: math.inf if x != x else abs(x - best)
        sign = -1.0 if direction == "higher" else 1.0
        return lambda x: math.inf if x != x else sign * x

    def best(self, metric: str, methods: list[str]) -> str | None:
        """Which of some methods has the best mean, of those that say as much as any; None where it is undefined for
        all."""
        defined = [method for method in methods if not math.isnan(self.mean(method, metric))]
        lacking = {method: self.n_undefined(method, metric) for method in defined}
        defined = [method for method in defined if lacking[method] == min(lacking.values())]
        return min(defined, key=lambda method: self.loss(metric)(self.mean(method, metric)), default=None)

    def n_undefined(self, method: str, metric: str) -> int:
        """On how many conditions a metric of a method is undefined."""
        of_method = (self.summary.get("n_undefined") or {}).get(method)
        return int(of_method.get(metric) or 0) if isinstance(of_method, dict) else 0

    def worst_first(self) -> list[Condition]:
        """Conditions of the model by the first metric; those where it is undefined at the end."""
        if not len(self.conditions) or not self.metrics:
            return []
        own = self.conditions[self.conditions["method"] == self.model]
        metric = next(iter(self.metrics))
        loss = self.loss(metric)
        keyed = [
            (-loss(float(value)) if value == value else math.inf, (p, c, b))
            for p, c, b, value in own[[*LABELS, metric]].itertuples(index=False)
        ]
        return [condition for _, condition in sorted(keyed)]


def write_report(
    run: str | Path, out: str | Path, screen: str | Path | None = None, figures: str | Path | None = None
) -> Path:
    """Write the report of a run folder as one HTML file; the same folder gives the same bytes.

    Parameters
    ----------
    run
        Folder of `train`, `finetune` or `demo`; scores and predicted cells where it has them.
    out
        File to write; replaced if it exists.
    screen
        The measured cells; by default those of the run's settings, if they are still there.
    figures
        Folder for each figure as an SVG file besides.

    Returns
    -------
    `out`.

    Raises
    ------
    FileNotFoundError
        No run folder, or the given screen is not there.
    ValueError
        A file of the run is damaged, or the given screen is not the run's.
    """
    try:
        return _write_report(Path(run), Path(out), screen, figures)
    except (AttributeError, IndexError, OverflowError, RecursionError, TypeError) as error:  # JSON of another shape
        raise ValueError(
            f"a file of {run} does not hold what a run writes there ({type(error).__name__}: {short(error)}); take the "
            "folder as the run left it."
        ) from error


def _write_report(run: Path, out: Path, screen: str | Path | None, figures: str | Path | None) -> Path:
    results = Results.read(run)
    notes: list[str] = []
    cells = _cells(results, screen, notes)
    svgs: dict[str, str] = {}
    pictures, curves = "", ""
    if find_spec("matplotlib") is None:
        notes.append(NO_MATPLOTLIB)
    else:
        with drawing():
            pictures = _pictures(results, cells, svgs, notes)
            curves = _curves(results, svgs)
    name = results.folder.resolve().name
    body = "".join([
        f"<h1>Held-out responses, predicted: {text(name, 80)}</h1>\n",
        section("Verdict", f'<p class="verdict">{text(_verdict(results), 2000)}</p>\n'),
        section("Scores", _means(results)) if results.methods else "",
        section("Conditions, worst first", _worst(results)) if results.worst_first() else "",
        section("Predicted beside measured", pictures) if pictures else "",
        section("Data and split", _data(results, cells)),
        section("Notes", bullets(_all_notes(results, cells, notes)) or "<p>None.</p>\n"),
        section("Training", curves) if curves else "",
        section("Calibration", _calibration(results)),
        section("Provenance", _provenance(results)),
        f'<p class="faint">The method: <a href="{PAPER}">Yuan et al. 2026</a>.</p>\n',
    ])  # fmt: skip
    write_text(out, page(f"{name}: held-out responses", body))
    if figures is not None:
        for file, svg in svgs.items():
            write_text(Path(figures) / f"{file}.svg", f'<?xml version="1.0" encoding="utf-8"?>\n{svg}\n')
    return out


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, MAX_JSON) if path.is_file() else {}


def _conditions(folder: Path) -> pd.DataFrame:
    """The rows of scores.parquet or scores.csv; no rows and columns where there is neither."""
    path = folder / "scores.parquet"
    try:
        if path.is_file():
            found = pd.read_parquet(path)
        elif (path := folder / "scores.csv").is_file():
            found = pd.read_csv(path, dtype=str, keep_default_na=False)  # "NA" is a label
        else:
            return pd.DataFrame()
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole table ({short(error)}); perturbdiff evaluate makes it anew."
        ) from error
    if missing := [name for name in ("method", *LABELS, "n_pred") if name not in found]:
        raise ValueError(f"{path} lacks the columns {missing}; perturbdiff evaluate makes it anew.")
    labels = ["method", *LABELS]
    numbers = found.drop(columns=labels).apply(pd.to_numeric, errors="coerce")
    return pd.concat([found[labels].astype(str), numbers], axis=1)[list(found.columns)]


def _cells(results: Results, given: str | Path | None, notes: list[str]) -> Cells | None:
    # A screen that was given must fit; one that the settings name may have moved.
    try:
        config = load_config(results.folder / "config.yaml").data
        path = given if given is not None else config.screen
        if path is None:
            raise ValueError("the run was trained on atlases; --screen names the cells that were held out")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is not there; --screen says where it is")
        lacking = [name for name in ("predicted.h5ad", "split.json") if not (results.folder / name).is_file()]
        if lacking:
            raise ValueError(f"the run has no {' and no '.join(lacking)}")
        screen = Screen.read(path, config)
        split = read_split(results.folder / "split.json", screen)
        rows, controls = held_out_rows(screen, split.test, _match(results, screen))
        X, obs, var = read_h5ad_parts(results.folder / "predicted.h5ad")
        labels = obs["perturbation"].astype(str)
        canonical = {label: screen.notation.canonical(label) for label in labels.unique()}
        predicted = AnnData(X, obs.assign(perturbation=labels.map(canonical)), var)
        found = group(predicted.obs, np.ones(len(obs), dtype=bool), _match(results, screen))
        return Cells(screen, predicted, rows, controls, found, start_rows(predicted.obs, screen))
    except (ValueError, KeyError, OSError) as error:
        if given is not None:
            raise
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        notes.append(f"Figures of cells are left out: {message.rstrip('.')}.")
        return None


def _match(results: Results, screen: Screen) -> ControlMatch:
    stated = results.training.get("control_match")
    if stated in ("batch", "cell_type"):
        return stated
    everything = ConditionIndex.build(screen, np.ones(len(screen), dtype=bool))
    return resolve_control_match(everything, screen.config.control_match)


def _verdict(results: Results) -> str:
    if results.summary.get("verdict"):
        return str(results.summary["verdict"])
    if not results.methods or not results.metrics:
        return "There are no scores: how well this model predicts is not known."
    metric = next(iter(results.metrics))
    simple = results.best(metric, [m for m in results.methods if m not in (results.model, results.ceiling)])
    beside = "" if simple is None else f"; the best simple method, {simple}, {number(results.mean(simple, metric))}"
    n = results.summary.get("n_conditions", len(results.worst_first()))
    own = number(results.mean(results.model, metric))
    return f"By {metric}, {results.model} has {own} on {_count(n, 'held-out condition')}{beside}."


def _means(results: Results) -> str:
    metrics = list(results.metrics)
    n = results.summary.get("n_conditions") or len(results.worst_first())
    what = f"Means over {_count(n, 'condition')}, with 95 % intervals where they are known"
    shown = table(what, *_of_methods(results, metrics[:FIRST]))
    note = (
        "<p class='faint'>Bold: the best of a column, besides the ceiling, which has half of the measured cells.</p>\n"
    )
    if metrics[FIRST:]:
        more = table("The other metrics", *_of_methods(results, metrics[FIRST:]))
        shown += f"{note}<details><summary>{len(metrics) - FIRST} more metrics</summary>\n{more}</details>\n"
        return shown
    return shown + note


def _of_methods(results: Results, metrics: list[str]) -> tuple[list[tuple[str, str]], list[list[str]]]:
    head = [("method", ""), *((f"{metric} ({results.metrics[metric]})", "n") for metric in metrics)]
    best = {metric: results.best(metric, [m for m in results.methods if m != results.ceiling]) for metric in metrics}
    rows = []
    for method in results.methods:
        row = [text(method, LABEL)]
        for metric in metrics:
            mean, found = number(results.mean(method, metric)), results.interval(method, metric)
            beside = "" if found is None else f"<small>{number(found[0])} to {number(found[1])}</small>"
            if lacking := results.n_undefined(method, metric):
                beside += f"<small>undefined on {lacking}</small>"
            row.append((f"<b>{mean}</b>" if best[metric] == method else mean) + beside)
        rows.append(row)
    return head, rows


def _worst(results: Results) -> str:
    found, metrics, first = results.conditions, list(results.metrics), next(iter(results.metrics))
    labels = [name for name in LABELS if name != "batch" or set(found["batch"]) != {"all"}]
    own = found[found["method"] == results.model].set_index(LABELS)
    own_values: Any = own[~own.index.duplicated()].to_dict("index")
    simple = found[~found["method"].isin([results.model, results.ceiling]) & found[first].notna()]
    loss = simple[first].map(results.loss(first))
    simple = simple[~simple.assign(loss=loss).sort_values("loss", kind="stable").duplicated(LABELS).sort_index()]
    other = {(row[0], row[1], row[2]): row[3:] for row in simple[[*LABELS, "method", first]].itertuples(index=False)}
    cells = [name for name in ("n_real", "n_pred", "n_control") if name in found]
    shown = {"n_real": "cells measured", "n_pred": "cells predicted", "n_control": "control cells"}
    head = [(NAMES[name], "l") for name in labels]
    head += [(f"{metric} ({results.metrics[metric]})", "n") for metric in metrics]
    head += [("best simple method", ""), (f"its {first}", "n"), *((shown[name], "n") for name in cells)]
    rows = []
    for condition in results.worst_first():
        values, (method, score) = own_values[condition], other.get(condition, ("–", math.nan))
        known = dict(zip(LABELS, condition, strict=True))
        rows.append(
            [text(known[name], LABEL) for name in labels]
            + [number(values[metric]) for metric in metrics]
            + [text(method, LABEL), number(score), *(number(values[name], 0) for name in cells)]
        )
    caption = f"{_count(len(rows), 'condition')} of {results.model}, worst {first} first"
    return table(caption, head, rows, sortable=True)


def _pictures(results: Results, cells: Cells | None, svgs: dict[str, str], notes: list[str]) -> str:
    """Heat map of conditions and methods; embedding, violins and changes of the worst, median and best conditions."""
    order, parts = results.worst_first(), []
    if order:
        first = next(iter(results.metrics))
        position = {condition: i for i, condition in enumerate(order)}
        place = [position.get(c, len(order)) for c in results.conditions[LABELS].itertuples(index=False, name=None)]
        ranked = results.conditions.iloc[np.argsort(place, kind="stable")]
        try:
            drawn = plots.scores(ranked, first)
            alt = f"{first} of each condition and method, the worst conditions of {results.model} first"
            svgs["scores"] = as_svg(drawn, "scores", alt)
            parts.append(figure(svgs["scores"], f"{alt}."))
        except ValueError as error:
            notes.append(f"There is no figure of {first}: {error}")
    if cells is None:
        return "".join(parts) + ("<p>Figures of cells are left out; see below why.</p>\n" if parts else "")
    means = _predicted_means(results, notes)
    pictured = [c for c in order or cells.rows if c in cells.rows and c in cells.found]
    for n, (which, condition) in enumerate(_some(pictured, bool(order)), start=1):
        label = plots.condition_name(condition, 80)
        drawings = []
        for kind, draw, alt in (*_of_condition(cells, condition), *_of_populations(cells, condition, means)):
            try:
                drawn, caption = draw(), f"{alt}, {label}"
            except ValueError as error:
                notes.append(f"There is no {kind} of {label}: {error}")
                continue
            name = f"{n:02d}-{kind}"
            svgs[name] = as_svg(drawn, f"f{n}{kind[0]}", caption)
            drawings.append(figure(svgs[name], f"{alt}."))
        parts.append(f'<h3>{text(which)}: {text(label)}</h3>\n<div class="figures">{"".join(drawings)}</div>\n')
    if len(pictured) > N_PICTURED:
        parts.insert(1, f"<p>Cells of {N_PICTURED} of {len(pictured):,} conditions: worst, median and best.</p>\n")
    return "".join(parts)


def _some(conditions: list[Condition], ordered: bool) -> list[tuple[str, Condition]]:
    """All of few conditions; else the two worst, median and best."""
    n = len(conditions)
    if n <= N_PICTURED or not ordered:
        names = ["Worst", *["Between"] * (n - 2), "Best"] if ordered and n > 1 else ["Condition"] * n
        return list(zip(names, conditions, strict=True))[:N_PICTURED]
    places = [("Worst", 0), ("Second worst", 1), ("Median", (n - 1) // 2), ("Next to the median", (n - 1) // 2 + 1),
              ("Second best", n - 2), ("Best", n - 1)]  # fmt: skip
    return [(name, conditions[i]) for name, i in places]


def _of_condition(cells: Cells, condition: Condition) -> Iterator[tuple[str, Callable[[], Any], str]]:
    measured, predicted, true_control, control = cells.of(condition)
    yield (
        "embedding",
        lambda: plots.embedding(measured, predicted, true_control),
        "Principal components of control and measured cells, and where predicted cells lie",
    )
    yield (
        "violins",
        lambda: plots.violin(measured, predicted, control=true_control),
        "Expression of the genes that respond most, in control, measured and predicted cells; a dot is the mean",
    )
    yield (
        "delta",
        lambda: plots.delta(measured, predicted, true_control, predicted_control=control),
        "Predicted against measured mean change of each predicted gene, from different control cells",
    )


def _of_populations(
    cells: Cells, condition: Condition, means: pd.DataFrame
) -> Iterator[tuple[str, Callable[[], Any], str]]:
    perturbation, cell_type, batch = condition
    own = means[(means["perturbation"] == perturbation) & (means["cell_type"] == cell_type)]
    if batch == "all" and len(own):  # controls of all batches: each batch is predicted from the same cells
        batch = own["batch"].iloc[0]
    own = own[own["batch"] == batch]
    if not len(own):
        return
    others = batch_means(cells.screen, perturbation, cell_type, batch)
    yield (
        "populations",
        lambda: plots.populations(own, others),
        f"Mean expression of the genes that respond most, batch {batch[:LABEL]}: each predicted population and each "
        "measured batch is a mark",
    )


def _predicted_means(results: Results, notes: list[str]) -> pd.DataFrame:
    if (results.folder / MEANS).is_file():
        return read_means(results.folder / MEANS)
    notes.append(f"Predicted populations are not drawn: the run has no {MEANS}.")
    return pd.DataFrame(columns=LABELS)


def _data(results: Results, cells: Cells | None) -> str:
    split, training = results.split, results.training
    parts = split.get("conditions") or {}
    sizes = {
        name: f"{sum(c.get('n_cells', 0) for c in of):,} perturbed cells of {_count(len(of), 'condition')}"
        if of
        else "nothing"
        for name, of in parts.items()
    }
    screen = None if cells is None else cells.screen
    atlases = ", ".join(str(atlas) for atlas in (results.settings.get("data") or {}).get("atlases") or ())
    genes = training.get("measured_genes")
    n_model = len((_json(results.folder / "model" / "genes.json") or {}).get("names", ())) or None
    return facts([
        ("screen", results.summary.get("data") or training.get("screen")),
        ("atlases", atlases),
        ("cells", None if screen is None else f"{len(screen):,}, of which {screen.is_control.sum():,} are controls"),
        ("genes", None if genes is None else f"{genes:,} measured"),
        ("genes of the model", None if n_model is None else f"{n_model:,}"),
        ("controls matched by", _words(training.get("control_match"))),
        ("held out", ", ".join(map(str, split.get("hold_out") or ())) or "nothing"),
        ("trained on", sizes.get("train")),
        ("validated on", sizes.get("validation")),
        ("tested on", sizes.get("test")),
    ])  # fmt: skip


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


def _words(match: object) -> str | None:
    return {"batch": "cell type and batch", "cell_type": "cell type"}.get(str(match))


def _all_notes(results: Results, cells: Cells | None, notes: list[str]) -> list[str]:
    summary, lines = results.summary, [str(note) for note in results.summary.get("notes") or ()]
    n_left_out, n_genes, kept = (summary.get(name) for name in ("n_left_out", "n_genes", "kept_response"))
    if n_left_out and n_genes and not any("genes" in line for line in lines):
        lines.append(f"{n_left_out:,} of {n_genes:,} genes are not in the predictions and count as no change.")
    if isinstance(kept, int | float) and kept < 1 and not any("squared response" in line for line in lines):
        lines.append(f"The model's genes hold {kept:.0%} of the squared measured response.")
    if len(results.conditions):
        own = results.conditions[results.conditions["method"] == results.model]
        scored = {*own[LABELS].itertuples(index=False, name=None)}
        tested = {(c["perturbation"], c["cell_type"], c["batch"]) for c in _test(results)}
        if any(batch == "all" for *_, batch in scored):
            tested = {(p, c, "all") for p, c, _ in tested}
        if lacking := sorted(tested - scored):
            named = "; ".join(plots.condition_name(c, 60) for c in lacking[:10])
            lines.append(
                f"{len(lacking):,} held-out conditions were not scored: {named}{', …' if lacking[10:] else ''}"
            )
    elif results.methods:
        lines.append("Scores by condition are not in the run folder (scores.parquet).")
    if cells is not None:
        lines += cells.screen.notes
    return [*lines, *notes]


def _test(results: Results) -> list[dict[str, Any]]:
    found = (results.split.get("conditions") or {}).get("test") or []
    return [condition for condition in found if isinstance(condition, dict) and {*LABELS} <= condition.keys()]


def _curves(results: Results, svgs: dict[str, str]) -> str:
    from matplotlib.figure import Figure

    drawings = []
    for name, title, columns in (
        ("loss", "loss", ("loss", "mmd", "mse")),
        ("validation-loss", "validation loss", ("validation_loss",)),
        ("validation", "energy distance of validated cells",
         ("validation_energy_distance", "validation_energy_distance_no_change")),
    ):  # fmt: skip
        ax = Figure(figsize=(3.6, 2.5), layout="constrained").subplots()
        ax.spines[["top", "right"]].set_visible(False)
        styles = zip(columns, (plots.MEASURED_COLOUR, plots.PREDICTED_COLOUR, plots.CONTROL_COLOUR), strict=False)
        for (column, colour), line in zip(styles, ("-", "--", ":"), strict=False):
            steps, values = _series(results.log, column)
            if len(steps):
                marker = "o" if len(steps) < 30 else ""
                label = column.removeprefix("validation_").replace("_", " ")
                ax.plot(steps, values, line, color=colour, linewidth=1.3, marker=marker, markersize=3, label=label)
        if not ax.lines:
            continue
        ax.set_xlabel("step")
        ax.set_ylabel(title)
        if len(ax.lines) > 1:
            ax.legend(frameon=False, fontsize=plots.SMALL)
        svgs[name] = as_svg(ax, name[0] + str(len(svgs)), f"{title} by training step")
        drawings.append(figure(svgs[name], f"{title[0].upper()}{title[1:]} by training step."))
    return f'<div class="figures">{"".join(drawings)}</div>\n' if drawings else ""


def _series(log: list[dict[str, Any]], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a logged name, means of equal numbers of them where there are many."""
    found = [(row["step"], row[column]) for row in log if isinstance(row.get(column), int | float) and "step" in row]
    steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
    if len(steps) > CURVE_POINTS:
        steps, values = (np.array([part.mean() for part in np.array_split(of, CURVE_POINTS)]) for of in (steps, values))
    return steps, values


def _calibration(results: Results) -> str:
    found = results.training.get("calibration")
    if not found:
        return (
            "<p>The model is not calibrated: it gives no intervals. That takes two or more validation conditions "
            "(split.validation).</p>\n"
        )
    if "factor" in found:
        return "<p>The model was calibrated by an older version: perturbdiff calibrate does it anew.</p>\n"
    calibration: Calibration = typed(Calibration, found, str(results.folder / "model/training.json: calibration"))
    level, change = f"{calibration.level:.0%}", calibration.change
    whose = (
        f", apart for genes whose predicted mean changes by {number(change)} or more (log1p) and the others"
        if change
        else ""
    )
    widths = {"responding": calibration.responding, **({"others": calibration.others} if change else {})}
    return (
        f"<p>Intervals meant to hold {level} of the measured gene means hold {text(covered(calibration.coverage))}. "
        f"They were made of {_count(calibration.n_conditions, 'validation condition')}{whose}.</p>\n"
    ) + facts(
        [(f"factor and floor, {name}", f"{number(of.factor)}, {number(of.floor)}") for name, of in widths.items()]
    )


def _provenance(results: Results) -> str:
    folder, settings, training = results.folder, results.settings, results.training
    start = training.get("init_from") or {}
    hashed = ("model/config.json", "scores.parquet", "scores.csv", "predicted.h5ad")
    optional = [(f"sha256 of {name}", sha256(folder / name)) for name in hashed if (folder / name).is_file()]
    return facts([
        ("trained with", f"perturbdiff {training.get('library_version') or '(unknown)'}"),
        ("scored with", _after("perturbdiff", results.summary.get("library_version"))),
        ("steps", training.get("steps")),
        ("cells seen", training.get("cells_seen")),
        ("seed", (settings.get("training") or {}).get("seed")),
        ("started from", " ".join(str(start[key]) for key in ("name", "revision", "sha256") if start.get(key))),
        ("sha256 of the split", results.split.get("sha256")),
        *optional,
    ]) + (
        "<details><summary>All settings (config.yaml)</summary>\n"
        f"<pre tabindex='0'>{text((folder / 'config.yaml').read_text(encoding='utf-8'), 50_000)}</pre></details>\n"
    )  # fmt: skip


def _after(word: str, version: object) -> str | None:
    return None if version is None else f"{word} {version}"
