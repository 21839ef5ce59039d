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
from html import escape
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import pandas as pd

from perturbdiff.app.controls import Controls, read_controls, remove_old_files
from perturbdiff.app.plots import CONTROL, PREDICTED, distribution, mean_changes, short
from perturbdiff.app.response import Response, find_positions, predict_response
from perturbdiff.app.upload import Limits
from perturbdiff.inference.output import write_predicted
from perturbdiff.model import PerturbDiff

USER_ERRORS = (ValueError, KeyError, OSError, FloatingPointError)
FROM_APP, UPLOADED = "of this app", "my own file"
N_PANELS, N_BARS, N_ROWS = 6, 12, 50  # genes shown as distributions, as bars, in the table
EVERY_CELL_TYPE = -1  # a place among the cell types; the others are 0, 1, ...
KEEP_FILES = 3600  # seconds that a predicted file can be downloaded, and that an upload may lie unused
KEEP_BYTES = 8 << 30  # of both together; the oldest go first
SWEEP_EVERY = 60  # seconds
MAX_WAITING = 32  # visitors who wait for a prediction or an upload; more are told to come back
MAX_SESSIONS = 16  # visitors whose uploaded controls are kept in memory

CSS = """
.gradio-container { max-width: 1160px !important; margin: 0 auto !important; width: 100%; min-width: 0; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container h1.title { font-size: clamp(20px, 5vw, 28px) !important; }
.facts { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 2px 0 0; font-size: 14px; }
.facts div { display: flex; gap: 6px; } .facts dt { opacity: .65; } .facts dd { margin: 0; font-weight: 600; }
.facts dt, .facts dd { overflow-wrap: anywhere; }
.status { border-left: 4px solid #0e7490; padding: 8px 12px; overflow-wrap: anywhere; line-height: 1.45;
  background: rgba(14, 116, 144, .08); border-radius: 4px; }
.status.error { border-color: #b91c1c; background: rgba(185, 28, 28, .08); }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; margin: 0 0 8px; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 10px; }
.panels img, .bars img { width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 4px;
  box-sizing: border-box; border: 1px solid #e2e8f0; }
.bars img { max-width: 560px; }
.table { max-height: 420px; overflow: auto; }
.table table { width: 100%; margin: 0; font-size: 13px; border-collapse: collapse; }
.table th { position: sticky; top: 0; background: var(--background-fill-secondary); }
.table th, .table td { padding: 5px 8px !important; text-align: right !important; white-space: nowrap;
  border-color: var(--border-color-primary) !important; }
.table th:first-child, .table td:first-child { text-align: left !important; }
"""


def build_page(model: PerturbDiff, name: str, given: Controls | None, limits: Limits) -> gr.Blocks:
    """The page of one model; `given` are the controls it can start from without an upload."""
    known = model.vocabularies
    perturbations = [*known.trained, *known.perturbations.names[len(known.labelled) :]]
    combine = model.vocabularies.combination_separator is not None
    sampling = model.config.sampling
    default_steps = sampling.n_calls
    origins = [(f"{given.name}, {FROM_APP}", FROM_APP)] if given else []

    with gr.Blocks(title=f"PerturbDiff: {short(name, 60)}", analytics_enabled=False) as page:
        uploaded = gr.State(None)
        gr.HTML(f'<h1 class="title">Predict a perturbation response</h1>{_facts(model, name)}')
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                perturbation = gr.Dropdown(
                    perturbations,
                    label="Perturbation",
                    info="Choose several for a combination." if combine else None,
                    multiselect=combine,
                    value=(perturbations if combine else perturbations[0]) if len(perturbations) == 1 else None,
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
                    label="Control cells (.h5ad)",
                    height=170,
                    visible=given is None,
                    elem_id="upload",
                )
                about = gr.HTML(_about(given, limits), elem_id="about")
                cell_type = gr.Dropdown(**_cell_types(given), label="Cell type", elem_id="cell-type")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    genes = gr.Textbox(
                        label="Genes to show first",
                        placeholder="A, B, C",
                        info="By default those that change most.",
                        elem_id="genes",
                    )
                    n_cells = gr.Slider(10, 2000, value=100, step=10, label="Cells in a population")
                    n_populations = gr.Slider(
                        1,
                        8,
                        value=5,
                        step=1,
                        label="Populations",
                        info="Independent draws of the response; intervals need two or more.",
                    )
                    guidance_scale = gr.Slider(
                        0,
                        max(5.0, sampling.guidance_scale),
                        value=sampling.guidance_scale,
                        step=0.1,
                        label="Guidance",
                        info="Weight w of (1 + w) conditional - w unconditional.",
                    )
                    most_steps = min(max(100, default_steps), model.config.diffusion.n_timesteps)
                    steps = gr.Slider(1, most_steps, value=default_steps, step=1, label="Steps")
                    seed = gr.Number(0, minimum=0, maximum=2**31 - 1, precision=0, label="Seed")
                predict = gr.Button("Predict", variant="primary", elem_id="predict")
            with gr.Column(scale=3, min_width=300):
                status = gr.HTML(
                    _status("Choose a perturbation and a cell type, then press Predict."), elem_id="status"
                )
                with gr.Column(visible=False) as results:
                    download = gr.DownloadButton("Download cells (.h5ad)", elem_id="download")
                    panels = gr.HTML(elem_id="panels")
                    bars = gr.HTML(elem_id="bars")
                    table = gr.HTML(elem_id="table")

        def take_upload(path: str | None) -> tuple[Any, ...]:
            # The file goes as soon as its control cells are in memory.
            if path is None:
                return gr.skip(), gr.skip(), gr.skip(), gr.skip()
            file_name = short(Path(path).name, 60)
            try:
                controls = read_controls(path, file_name, model, limits)
            except Exception as error:
                return (
                    None,
                    None,
                    _status(_message(error, path, file_name), error=True),
                    gr.Dropdown(**_cell_types(None)),
                )
            finally:
                Path(path).unlink(missing_ok=True)
            return controls, None, _about(controls, limits), gr.Dropdown(**_cell_types(controls))

        def take_origin(origin: str, uploaded: Controls | None) -> tuple[Any, ...]:
            controls = given if origin == FROM_APP else uploaded
            return gr.File(visible=origin == UPLOADED), _about(controls, limits), gr.Dropdown(**_cell_types(controls))

        def show_prediction(
            chosen: str | list[str] | None,
            origin: str,
            uploaded: Controls | None,
            position: int | None,
            named: str | None,
            *settings: float,
            progress: gr.Progress = gr.Progress(),  # noqa: B008 (how gradio finds it)
        ) -> dict[Any, Any]:
            names = [chosen] if isinstance(chosen, str) else list(chosen or ())
            began = time.monotonic()
            try:
                controls = given if origin == FROM_APP else uploaded
                if controls is None:
                    raise ValueError("There are no control cells; upload an .h5ad file of them first.")
                wanted = None if position is None or position == EVERY_CELL_TYPE else controls.cell_types[position]
                cells, populations, scale, n_steps, number = settings
                positions = find_positions(model, named or "")  # None of an empty box
                bar = _Bar(int(cells) * int(populations), progress)
                response = predict_response(
                    model, controls, names, wanted, int(cells), int(populations), scale, int(n_steps), int(number), bar
                )
                file = _predicted_file(response, Path(download.GRADIO_CACHE))
                changes = response.changes(N_ROWS, positions)
                shown = {
                    results: gr.Column(visible=True),
                    download: gr.DownloadButton(value=file),
                    panels: _panels(response, changes.head(N_PANELS)),
                    bars: _bars(mean_changes(changes.head(N_BARS)), response.certainty()),
                    table: _table(changes),
                    status: _status(f"{response.sentence()} {time.monotonic() - began:.1f} seconds."),
                }
            except Exception as error:
                return {status: _status(_message(error), error=True), results: gr.Column(visible=False)}
            return shown

        upload.upload(take_upload, upload, [uploaded, upload, about, cell_type], api_visibility="private")
        origin.change(
            take_origin,
            [origin, uploaded],
            [upload, about, cell_type],
            api_visibility="private",
            show_progress="hidden",
        )
        predict.click(
            show_prediction,
            [perturbation, origin, uploaded, cell_type, genes, n_cells, n_populations, guidance_scale, steps, seed],
            [status, results, download, panels, bars, table],
            api_visibility="private",
            show_progress_on=status,
        )
    return page


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
    kind = "raw counts or log1p" if model.preprocessing.target_sum is not None else "log1p values"
    facts = {
        "Model": short(name, 80),
        "Genes": f"{len(model.genes):,}",
        "Perturbations": f"{len(known.perturbations):,}",
        "Cell types": f"{len(known.cell_types):,}",
        "Set size": f"{model.config.set_size:,} cells",
        "Takes": kind,
        "License": short(model.training.license or "not stated", 60),
    }
    rows = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _about(controls: Controls | None, limits: Limits) -> str:
    if controls is None:
        return _status(
            f"No control cells yet. A file may have {limits.file_bytes >> 20} MB and {limits.cells:,} cells."
        )
    return _status(
        f"{controls.name}: {controls.cells.n_obs:,} control cells of {controls.n_in_file:,} cells in the file; "
        f"{controls.n_genes_matched:,} of the model's {controls.n_genes:,} genes matched by {controls.matched_by}."
    )


def _cell_types(controls: Controls | None) -> dict[str, Any]:
    if controls is None:
        return {"choices": [], "value": None, "info": "Named in the control cells.", "interactive": False}
    if controls.cell_type_column is None:
        choices = [("Not stated", EVERY_CELL_TYPE), *((name, i) for i, name in enumerate(controls.cell_types))]
        info = "The file does not say; these are the ones the model knows."
        return {"choices": choices, "value": EVERY_CELL_TYPE, "info": info, "interactive": True}
    count = controls.cells.obs[controls.cell_type_column].astype(str).value_counts()
    choices = [(f"{name} ({count[name]:,} cells)", i) for i, name in enumerate(controls.cell_types)]
    choices.append((f"Every cell type ({controls.cells.n_obs:,} cells)", EVERY_CELL_TYPE))
    return {"choices": choices, "value": 0, "info": None, "interactive": True}


def _status(text: str, error: bool = False) -> str:
    return (
        f'<div class="status{" error" if error else ""}" role="{"alert" if error else "status"}">{escape(text)}</div>'
    )


def _message(error: Exception, path: str = "", name: str = "") -> str:
    # One line for a person, without the places of this machine.
    if not isinstance(error, USER_ERRORS):
        logging.getLogger(__name__).error("unexpected", exc_info=error)
        return f"This did not work ({type(error).__name__}); the log of the app says more."
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return " ".join((text.replace(path, name) if path else text).split())


def _panels(response: Response, changes: pd.DataFrame) -> str:
    n_populations = response.predicted.uns["perturbdiff"]["n_populations"]
    predicted = f"{response.predicted.n_obs // n_populations:,} predicted cells"
    key = (
        f'<p class="key"><span><i style="background:{CONTROL}"></i>{response.control.shape[0]:,} control cells</span>'
        f'<span><i style="background:{PREDICTED}"></i>{predicted}'
        f"{f' in each of {n_populations} populations, a line and a dot each' * (n_populations > 1)}</span></p>"
    )
    images = "".join(
        _image(distribution(response, change), f"Distribution of {change['gene']}") for _, change in changes.iterrows()
    )
    return f'<h3>Single genes</h3>{key}<div class="panels">{images}</div>'


def _bars(svg: str, certainty: str) -> str:
    said = f'<p class="key">Dots are populations. {escape(certainty)}</p>'
    return f'<h3>Predicted mean change</h3>{said}<div class="bars">{_image(svg, "Bar chart of mean changes")}</div>'


def _image(svg: str, text: str) -> str:
    # As an image, a figure can neither run nor fetch anything.
    return f'<img alt="{escape(text)}" src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'


def _table(changes: pd.DataFrame) -> str:
    known = changes["lower"].notna().all()
    headers = ["Gene", "Controls", "Predicted", "Change", *(["Interval"] if known else [])]
    rows = []
    for row in changes.itertuples():
        cells = [short(str(row.gene), 40), f"{row.controls:.3f}", f"{row.predicted:.3f}", f"{row.change:+.3f}"]
        rows.append([*cells, f"{row.lower:+.3f} to {row.upper:+.3f}"][: len(headers)])
    head = "".join(f"<th>{header}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<h3>Means of {len(rows)} genes (log1p)</h3>"
        f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _predicted_file(response: Response, cache: Path) -> str:
    # In the folder of the app's files, from where gradio serves it.
    perturbation = str(response.predicted.obs["perturbation"].iloc[0])
    words = "_".join(["predicted", perturbation, response.cell_type or ""])
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-+.") else "_" for c in words).strip("_.")[:80]
    path = cache / secrets.token_hex(16) / f"{name}.h5ad"
    write_predicted(response.predicted[:, response.matched].copy(), path)
    return str(path)


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
    folder = Path(model_name)
    name = "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else str(model_name)
    page = build_page(model, name, given, limits)
    # One prediction at a time takes all cores.
    page.queue(default_concurrency_limit=1, max_size=MAX_WAITING, api_open=False)
    theme = gr.themes.Default(primary_hue="cyan", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(
        server_name=host,
        server_port=port,
        theme=theme.set(
            block_info_text_color="*neutral_500",
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
