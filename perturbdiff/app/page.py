"""A page that predicts with a model: choose a perturbation and a cell type, give control cells, see the response."""

from __future__ import annotations

import base64
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import numpy as np
import pandas as pd
from huggingface_hub.constants import ENDPOINT

from perturbdiff.app.controls import Controls, read_controls, remove_old_files
from perturbdiff.app.plots import (
    CONTROL,
    MEASURED,
    PREDICTED,
    agreement,
    cells,
    distribution,
    mean_changes,
    populations,
    short,
    volcano,
)
from perturbdiff.app.response import Response, before_predicting, predict_response
from perturbdiff.app.upload import Limits
from perturbdiff.files import few
from perturbdiff.hub.card import ARROWS
from perturbdiff.hub.download import find_model
from perturbdiff.hub.model_folder import CARD
from perturbdiff.hub.records import EvaluationRecord
from perturbdiff.inference.output import write_predicted
from perturbdiff.model import PerturbDiff

USER_ERRORS = (ValueError, KeyError, OSError, FloatingPointError)
FROM_APP, UPLOADED = "of this app", "my own file"
UNSEEN = "not seen in training"
N_PANELS, N_BARS, N_ROWS = 6, 12, 50  # genes shown as distributions, as bars, in the table
EVERY_CELL_TYPE = -1  # a place among the cell types; the others are 0, 1, ...
KEEP_FILES = 3600  # seconds that a predicted file can be downloaded, and that an upload may lie unused
KEEP_BYTES = 8 << 30  # of both together; the oldest go first
SWEEP_EVERY = 60  # seconds
MAX_CARD = 100_000  # characters
MAX_WAITING = 32  # visitors who wait for a prediction or an upload; more are told to come back
MAX_SESSIONS = 16  # visitors whose uploaded cells and last prediction are kept in memory

CSS = """
.gradio-container { --accent: #0e7490; --line: #cbd5e1; max-width: 1240px !important; margin: 0 auto !important;
  width: 100%; min-width: 0; }
.dark .gradio-container, .dark.gradio-container { --accent: #22d3ee; --line: #334155; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container h1.title { font-size: clamp(20px, 5vw, 28px) !important; }
.gradio-container h3 { margin: 14px 0 4px; } .gradio-container a { color: var(--accent); }
.facts { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 2px 0 0; font-size: 14px; }
.facts div { display: flex; gap: 6px; } .facts dt { opacity: .7; } .facts dd { margin: 0; font-weight: 600; }
.facts dt, .facts dd { overflow-wrap: anywhere; }
.status { border-left: 4px solid var(--accent); padding: 8px 12px; overflow-wrap: anywhere; line-height: 1.45;
  background: rgba(14, 116, 144, .1); border-radius: 4px; }
.status.warning { border-left-style: double; border-left-width: 8px; font-weight: 600; }
.status.error { border-color: #b91c1c; background: rgba(185, 28, 28, .1); }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; margin: 0 0 8px; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 10px; }
.figures.wide { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 10px 24px; }
.figures figure { margin: 0; min-width: 0; } .figures img { width: 100%; height: auto; display: block; }
.figures h3 { margin-top: 6px; } .figures p { margin: 0 0 6px; font-size: 13px; opacity: .85; }
.dark .figures img, .dark .key i { filter: invert(1) hue-rotate(180deg); }
.about summary { cursor: pointer; color: var(--accent); font-size: 14px; }
.about pre { white-space: pre-wrap; font-size: 12px; max-height: 420px; overflow: auto; }
.about p, .about li { font-size: 14px; margin: 4px 0; overflow-wrap: anywhere; } .about ol { padding-left: 20px; }
.table { max-height: 420px; overflow: auto; }
.table table { width: 100%; margin: 0; font-size: 13px; border-collapse: collapse; }
.table th { position: sticky; top: 0; background: var(--background-fill-secondary); }
.table th, .table td { padding: 5px 8px !important; text-align: right !important; white-space: nowrap;
  border-color: var(--border-color-primary) !important; }
.table th:first-child, .table td:first-child { text-align: left !important; white-space: normal; }
.table tr.own td { font-weight: 700; color: var(--accent); }
"""


def build_page(model: PerturbDiff, source: Source, given: Controls | None, limits: Limits) -> gr.Blocks:
    """The page of one model; `given` are the controls it can start from without an upload."""
    known = model.vocabularies
    described = known.perturbations.names[len(known.labelled) :]
    perturbations = [*((name, name) for name in known.trained), *((f"{name} ({UNSEEN})", name) for name in described)]
    combine = known.combination_separator is not None
    sampling = model.config.sampling
    default_steps = sampling.n_calls
    origins = [(f"{given.name}, {FROM_APP}", FROM_APP)] if given else []
    only = perturbations[0][1] if len(perturbations) == 1 else None

    with gr.Blocks(title=f"PerturbDiff: {short(source.name, 60)}", analytics_enabled=False) as page:
        uploaded, shown = gr.State(None), gr.State(None)
        gr.HTML(f'<h1 class="title">Predict a perturbation response</h1>{_facts(model, source.name)}')
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                perturbation = gr.Dropdown(
                    perturbations,
                    label="Perturbation",
                    info="Choose several for a combination." if combine else None,
                    multiselect=combine,
                    value=[only] if combine and only else only,
                    elem_id="perturbation",
                )
                origin = gr.Radio(
                    [*origins, (UPLOADED.capitalize(), UPLOADED)],
                    value=FROM_APP if given else UPLOADED,
                    label="Control cells",
                    visible=given is not None,
                    elem_id="origin",
                )
                upload = gr.File(
                    label="Control cells (.h5ad), measured ones too if you have them",
                    height=150,
                    visible=given is None,
                    elem_id="upload",
                )
                about = gr.HTML(_about(given, limits), elem_id="about")
                cell_type = gr.Dropdown(**_cell_types(given, model), label="Cell type", elem_id="cell-type")
                outlook = gr.HTML(elem_id="outlook")
                predict = gr.Button("Predict", variant="primary", elem_id="predict")
                with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                    n_populations = gr.Slider(
                        1, 8, value=5, step=1, label="Populations",
                        info="Replicates of the response, each as of a batch of its own; intervals need two or more.",
                    )  # fmt: skip
                    n_cells = gr.Slider(10, 2000, value=100, step=10, label="Cells in a population")
                    guidance_scale = gr.Slider(
                        0, max(5.0, sampling.guidance_scale), value=sampling.guidance_scale, step=0.1,
                        label="Emphasis of the perturbation",
                        info="Guidance; other values than the model's own have no calibrated intervals.",
                    )  # fmt: skip
                    most_steps = min(max(100, default_steps), model.config.diffusion.n_timesteps)
                    steps = gr.Slider(
                        1, most_steps, value=default_steps, step=1, label="Rounds of refinement",
                        info="Sampling steps, likewise.",
                    )  # fmt: skip
                    seed = gr.Number(0, minimum=0, maximum=2**31 - 1, precision=0, label="Random seed")
            with gr.Column(scale=3, min_width=300):
                status = gr.HTML(
                    _status("Choose a perturbation and a cell type, then press Predict."), elem_id="status"
                )
                with gr.Column(visible=False) as results:
                    with gr.Row():
                        download = gr.DownloadButton("Cells (.h5ad)", elem_id="download", min_width=120)
                        download_table = gr.DownloadButton("All genes (.csv)", elem_id="download-table", min_width=120)
                    genes = gr.Dropdown(
                        list(model.gene_names), value=[], multiselect=True, label="Genes to show", elem_id="genes",
                        info="Any gene of the model: type a part of its name. By default those that change most.",
                    )  # fmt: skip
                    panels = gr.HTML(elem_id="panels")
                    overview = gr.HTML(elem_id="overview")
                    table = gr.HTML(elem_id="table")
                with gr.Accordion("About this model: how well it predicts, and what it knows", elem_id="model") as fold:
                    gr.HTML(_of_model(model, source))

        def take_upload(path: str | None) -> tuple[Any, ...]:
            # The file goes as soon as its cells are in memory.
            if path is None:
                return gr.skip(), gr.skip(), gr.skip(), gr.skip()
            file_name = short(Path(path).name, 60)
            try:
                controls = read_controls(path, file_name, model, limits)
            except Exception as error:
                return (
                    None,
                    None,
                    _status(_message(error, path, file_name), "error"),
                    gr.Dropdown(**_cell_types(None, model)),
                )
            finally:
                Path(path).unlink(missing_ok=True)
            return controls, None, _about(controls, limits), gr.Dropdown(**_cell_types(controls, model))

        def take_origin(origin: str, uploaded: Controls | None) -> tuple[Any, ...]:
            controls = given if origin == FROM_APP else uploaded
            return (
                gr.File(visible=origin == UPLOADED),
                _about(controls, limits),
                gr.Dropdown(**_cell_types(controls, model)),
            )

        def look_ahead(
            chosen: str | list[str] | None, origin: str, uploaded: Controls | None, position: int | None
        ) -> str:
            # What is new to the model, before anything is predicted.
            controls, names = given if origin == FROM_APP else uploaded, _names(chosen)
            if controls is None or not names:
                return ""
            try:
                text, warning = before_predicting(model, controls, names, _cell_type(controls, position))
            except Exception as error:
                return _status(_message(error), "error")
            return _status(text, "warning" if warning else "")

        def show_prediction(
            chosen: str | list[str] | None,
            origin: str,
            uploaded: Controls | None,
            position: int | None,
            named: list[str] | None,
            *settings: float,
            progress: gr.Progress = gr.Progress(),  # noqa: B008 (how gradio finds it)
        ) -> dict[Any, Any]:
            began = time.monotonic()
            try:
                controls = given if origin == FROM_APP else uploaded
                if controls is None:
                    raise ValueError("There are no control cells; upload an .h5ad file of them first.")
                size, number, scale, rounds, start = settings
                bar = _Bar(int(size) * int(number), progress)
                response = predict_response(
                    model, controls, _names(chosen), _cell_type(controls, position), int(size), int(number), scale,
                    int(rounds), int(start), bar,
                )  # fmt: skip
                file, csv = _files(response, Path(download.GRADIO_CACHE))
                said = f"{response.sentence()} {response.agreement()} {time.monotonic() - began:.1f} seconds."
                return {
                    shown: response,
                    results: gr.Column(visible=True),
                    download: gr.DownloadButton(value=file),
                    download_table: gr.DownloadButton(value=csv),
                    panels: _chosen_panels(response, named),
                    overview: _overview(response),
                    table: _table(response.changes(N_ROWS), len(response.table)),
                    status: _status(said),
                    fold: gr.Accordion(open=False),
                }
            except Exception as error:
                return {status: _status(_message(error), "error"), results: gr.Column(visible=False)}

        def show_genes(response: Response | None, named: list[str] | None) -> Any:
            return gr.skip() if response is None else _chosen_panels(response, named)

        upload.upload(take_upload, upload, [uploaded, upload, about, cell_type], api_visibility="private")
        origin.change(
            take_origin,
            [origin, uploaded],
            [upload, about, cell_type],
            api_visibility="private",
            show_progress="hidden",
        )
        gr.on(
            [page.load, perturbation.change, origin.change, uploaded.change, cell_type.change],
            look_ahead,
            [perturbation, origin, uploaded, cell_type],
            outlook,
            api_visibility="private",
            show_progress="hidden",
            trigger_mode="always_last",
        )
        predict.click(
            show_prediction,
            [perturbation, origin, uploaded, cell_type, genes, n_cells, n_populations, guidance_scale, steps, seed],
            [shown, status, results, download, download_table, panels, overview, table, fold],
            api_visibility="private",
            show_progress_on=status,
        )
        genes.change(show_genes, [shown, genes], panels, api_visibility="private", show_progress="hidden")
    return page


def _names(chosen: str | list[str] | None) -> list[str]:
    return [chosen] if isinstance(chosen, str) else list(chosen or ())


def _cell_type(controls: Controls, position: int | None) -> str | None:
    return None if position is None or position == EVERY_CELL_TYPE else controls.cell_types[position]


@dataclass(frozen=True)
class Source:
    """Where a model is: what to call it; its page on the Hub, or else the text of its card."""

    name: str
    address: str | None = None
    card: str | None = None

    @classmethod
    def of(cls, model_name: str | Path) -> Source:
        found = find_model(model_name)
        if found.repo is not None:
            return cls(str(model_name), f"{ENDPOINT}/{found.repo}")
        name, card = "/".join(found.folder.resolve().parts[-2:]), found.folder / CARD
        return cls(name, card=card.read_text(errors="replace")[:MAX_CARD] if card.is_file() else None)


class _Bar:
    # What `PerturbDiff.predict` moves as a progress bar.
    def __init__(self, total: int, progress: Callable[..., Any]) -> None:
        self.total, self.done, self.progress = total, 0, progress
        self.update(0)

    def update(self, n: int) -> None:
        self.done += n
        self.progress((self.done, self.total), desc="Predicting", unit="cells")


def _facts(model: PerturbDiff, name: str) -> str:
    known = model.vocabularies
    facts = {
        "Model": short(name, 80),
        "Genes": f"{len(model.genes):,}",
        "Perturbations": f"{len(known.perturbations):,}",
        "Cell types": f"{len(known.cell_types):,}",
        "License": short(model.training.license or "not stated", 60),
    }
    rows = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _of_model(model: PerturbDiff, source: Source) -> str:
    # What a visitor can know before a prediction: what to do, what it was trained on, its scores, its card.
    kind = "raw counts, or their logarithms" if model.preprocessing.target_sum is not None else "log1p values"
    column = model.config.obs.perturbation
    said = [
        "<ol><li>Choose a perturbation that the model knows.</li>"
        f"<li>Give control cells: an .h5ad with {kind} in X. Perturbed cells in it (obs column {escape(column)}) are "
        "shown beside the predicted ones.</li>"
        "<li>Predict: what changes, how sure that is, single genes, and files to take along.</li></ol>"
    ]
    if model.training.screen is not None:
        held = f"; never trained on: {few(list(model.training.hold_out))}" if model.training.hold_out else ""
        said.append(f"<p>Trained on {escape(short(model.training.screen, 80))}{escape(held)}.</p>")
    said.append(f"<p>Cell types it knows: {escape(few(list(model.cell_types)))}.</p>" if model.cell_types else "")
    if model.evaluation is None:
        said.append("<p>Nobody measured how well it predicts: no scores come with it.</p>")
    else:
        said.append(f"<p>{escape(model.evaluation.verdict)}</p>{_scores(model.evaluation)}")
    if source.address is not None:
        said.append(
            f'<p><a href="{escape(source.address)}" target="_blank" rel="noopener noreferrer">Model card and scores'
            "</a></p>"
        )
    if source.card is not None:  # as text: a card of a stranger can fetch nothing
        said.append(f"<details><summary>Model card</summary><pre>{escape(source.card)}</pre></details>")
    return f'<div class="about">{"".join(said)}</div>'


def _scores(scores: EvaluationRecord) -> str:
    rows = []
    for method in (scores.model, *scores.baselines, *([scores.ceiling] if scores.ceiling in scores.mean else [])):
        values = (scores.mean[method][metric] for metric in scores.metrics)
        cells = "".join(f"<td>{'-' if value is None else f'{value:.3f}'}</td>" for value in values)
        own = ' class="own"' if method == scores.model else ""
        rows.append(f"<tr{own}><td>{escape(short(method, 60))}</td>{cells}</tr>")
    arrows = ((short(metric, 30), ARROWS[direction]) for metric, direction in scores.metrics.items())
    head = "".join(f"<th>{escape(name)} {arrow}</th>" for name, arrow in arrows)
    n = scores.n_conditions
    return (
        f"<p>Means over {n:,} held-out condition{'s' if n > 1 else ''}; {ARROWS['higher']} higher is better, "
        f"{ARROWS['lower']} lower.</p>"
        f'<div class="table"><table><thead><tr><th>Method</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div>"
    )


def _about(controls: Controls | None, limits: Limits) -> str:
    if controls is None:
        return _status(
            f"No control cells yet. A file may have {limits.file_bytes >> 20} MB and {limits.cells:,} cells."
        )
    measured = f" {controls.measured.n_obs:,} measured cells to compare with." if controls.measured.n_obs else ""
    return _status(
        f"{controls.name}: {controls.cells.n_obs:,} control cells of {controls.n_in_file:,} cells in the file; "
        f"{controls.n_genes_matched:,} of the model's {controls.n_genes:,} genes matched by {controls.matched_by}."
        f"{measured}{f' {controls.note}.' if controls.note else ''}"
    )


def _cell_types(controls: Controls | None, model: PerturbDiff) -> dict[str, Any]:
    if controls is None:
        return {"choices": [], "value": None, "info": "Named in the control cells.", "interactive": False}
    if controls.cell_type_column is None:
        choices = [("Not stated", EVERY_CELL_TYPE), *((name, i) for i, name in enumerate(controls.cell_types))]
        info = "The file does not say; these are the ones the model knows."
        return {"choices": choices, "value": EVERY_CELL_TYPE, "info": info, "interactive": True}
    count = controls.cells.obs[controls.cell_type_column].astype(str).value_counts()
    new = {name for name in controls.cell_types if name not in model.cell_types}
    choices = [
        (f"{name} ({count[name]:,} cells{f', {UNSEEN}' * (name in new)})", i)
        for i, name in enumerate(controls.cell_types)
    ]
    choices.append((f"Every cell type ({controls.cells.n_obs:,} cells)", EVERY_CELL_TYPE))
    return {"choices": choices, "value": 0, "info": None, "interactive": True}


def _status(text: str, kind: Literal["", "warning", "error"] = "") -> str:
    role = "alert" if kind == "error" else "status"
    return f'<div class="status{f" {kind}" if kind else ""}" role="{role}">{escape(text)}</div>'


def _message(error: Exception, path: str = "", name: str = "") -> str:
    # One line for a person, without the places of this machine.
    if not isinstance(error, USER_ERRORS):
        logging.getLogger(__name__).error("unexpected", exc_info=error)
        return f"This did not work ({type(error).__name__}); the log of the app says more."
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return " ".join((text.replace(path, name) if path else text).split())


def _chosen_panels(response: Response, named: list[str] | None) -> str:
    try:
        rows = response.of_genes(named) if named else response.changes(N_PANELS)
    except ValueError as error:
        return _status(_message(error), "error")
    return _panels(response, rows)


def _panels(response: Response, changes: pd.DataFrame) -> str:
    n_populations = response.predicted.uns["perturbdiff"]["n_populations"]
    predicted = f"{response.predicted.n_obs // n_populations:,} predicted cells"
    several = f" in each of {n_populations} populations, a line and a dot each" * (n_populations > 1)
    kinds = [(CONTROL, f"{response.control.shape[0]:,} control cells"), (PREDICTED, predicted + several)]
    if response.measured is not None:
        kinds.append((MEASURED, f"{response.measured.shape[0]:,} measured cells, dashed"))
    key = "".join(f'<span><i style="background:{colour}"></i>{text}</span>' for colour, text in kinds)
    images = "".join(
        _figure(distribution(response, change), f"Distribution of {change['gene']}") for _, change in changes.iterrows()
    )
    return f'<h3>Single genes</h3><p class="key">{key}</p><div class="figures">{images}</div>'


def _overview(response: Response) -> str:
    # What changes, how sure it is, and how populations differ.
    changes, n_populations = response.changes(N_BARS), response.predicted.uns["perturbdiff"]["n_populations"]
    strokes = ", strokes measured changes" if response.measured is not None else ""
    figures = [
        _figure(
            mean_changes(changes), "Bar chart of mean changes", "What changes most",
            f"Dots are populations{strokes}. {response.certainty()}",
        ),
        _figure(
            volcano(response.table), "Volcano plot", "All genes",
            "Coloured: the interval excludes no change. p is of the cells that were drawn: more cells, smaller p.",
        ),
    ]  # fmt: skip
    if response.measured is not None:
        svg = agreement(response.table)
        text = "A dot is a gene; on the dashed line they agree."
        figures.append(_figure(svg, "Predicted against measured changes", "Predicted and measured", text))
    text = "A dot is a cell; near each other are cells with alike expression."
    figures.append(_figure(cells(response), "Cells on two principal components", "Cells", text))
    if n_populations > 1:
        order = np.argsort(-response.table["spread"].fillna(0).to_numpy(), kind="stable")[:N_BARS]
        svg = populations(response.table.iloc[order])
        text = "Genes in which populations differ most, beyond the noise of few cells; a number is a population."
        figures.append(_figure(svg, "Changes of each population", "Populations apart", text))
    return f'<div class="figures wide">{"".join(figures)}</div>'


def _figure(svg: str, alt: str, title: str = "", text: str = "") -> str:
    # As an image, a figure can neither run nor fetch anything.
    image = f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'
    said = f"<h3>{escape(title)}</h3><p>{escape(text)}</p>" if title else ""
    return f"<figure>{said}{image}</figure>"


def _table(changes: pd.DataFrame, n_genes: int) -> str:
    columns = {"controls": "Controls", "predicted": "Predicted", "change": "Change"}
    columns |= {"measured_change": "Measured change"} if "measured_change" in changes else {}
    intervals = changes["lower"].notna().all()
    rows = []
    for _, row in changes.iterrows():
        cells = [short(str(row["gene"]), 40), *(f"{row[name]:{'+' * ('hange' in name)}.3f}" for name in columns)]
        rows.append([*cells, *([f"{row['lower']:+.3f} to {row['upper']:+.3f}"] if intervals else [])])
    head = "".join(f"<th>{name}</th>" for name in ("Gene", *columns.values(), *(["Interval"] if intervals else [])))
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<h3>Means of {len(rows)} of {n_genes:,} genes (log1p)</h3>"
        f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _files(response: Response, cache: Path) -> tuple[str, str]:
    # Cells and the table, in the folder of the app's files, from where gradio serves them.
    perturbation = str(response.predicted.obs["perturbation"].iloc[0])
    words = "_".join(["predicted", perturbation, response.cell_type or ""])
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-+.") else "_" for c in words).strip("_.")[:80]
    path = cache / secrets.token_hex(16) / f"{name}.h5ad"
    write_predicted(response.predicted[:, response.matched].copy(), path)
    table = path.with_suffix(".csv")
    response.table.drop(columns="position").to_csv(table, index=False)
    return str(path), str(table)


def serve(
    model: str | Path,
    controls: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    limits: Limits = Limits(),  # noqa: B008 (it cannot change)
) -> None:
    """Load a model and serve its page until SIGINT or SIGTERM.

    Parameters
    ----------
    model
        Model folder, run folder, name or owner/name[@REVISION].
    controls
        An .h5ad of control cells to start from, which is trusted; visitors may upload others.
    host
        127.0.0.1 shows the page to this machine only, 0.0.0.0 to others.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        No such model; one without perturbations; controls that do not fit it; the port is taken.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="perturbdiff-app-", ignore_cleanup_errors=True) as files:
        os.environ["GRADIO_TEMP_DIR"] = files  # each component reads it when it is made
        try:
            page = _launched(model, controls, host, port, limits)
        except OSError as error:
            if "port" not in str(error):
                raise
            raise OSError(f"port {port} of {host} is taken; give another (--port).") from error
        threading.Thread(target=_sweep, args=(Path(files),), daemon=True).start()
        print(f"serving {model} on {page.local_url}", flush=True)
        page.block_thread()


def _launched(model_name: str | Path, controls: str | Path | None, host: str, port: int, limits: Limits) -> gr.Blocks:
    model = PerturbDiff.from_pretrained(model_name)
    if not len(model.vocabularies.perturbations):
        raise ValueError(f"{model_name} was trained without perturbations: it predicts no response.")
    given = None if controls is None else read_controls(controls, Path(controls).name, model, limits=None)
    page = build_page(model, Source.of(model_name), given, limits)
    # One prediction at a time takes all cores.
    page.queue(default_concurrency_limit=1, max_size=MAX_WAITING, api_open=False)
    theme = gr.themes.Default(primary_hue="cyan", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(
        server_name=host,
        server_port=port,
        theme=theme.set(
            block_info_text_color="*neutral_500",
            checkbox_background_color_selected="*primary_700",
            checkbox_border_color_selected="*primary_700",
            button_primary_background_fill="*primary_700",
            button_primary_background_fill_hover="*primary_800",
        ),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size=limits.file_bytes,
        state_session_capacity=MAX_SESSIONS,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return page


def _sweep(files: Path) -> None:
    while True:
        time.sleep(SWEEP_EVERY)
        remove_old_files(files, KEEP_FILES, KEEP_BYTES)
