"""app: a model as a page in the browser."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from perturbdiff.cli.command import add_command


def add_app_command(commands: Any) -> None:
    """Declare it."""
    app = add_command(
        commands, "app", _app, "a model as a page in the browser",
        "Serves one model: choose a perturbation and a cell type, give control cells, see the predicted distributions\n"
        "beside them, download the cells. Fetches nothing from other addresses. Ctrl-C ends it.",
        "examples:\n  perturbdiff app runs/kang --controls kang.h5ad\n  perturbdiff app owner/kang@v1 --host 0.0.0.0\n"
        "Needs the extra: pip install 'perturbdiff[app]'.",
    )  # fmt: skip
    app.add_argument("model", metavar="MODEL", help="model folder, run folder, name or owner/name[@REVISION]")
    app.add_argument("--controls", metavar="FILE.h5ad", help="control cells to start from, without an upload")
    app.add_argument("--host", default="127.0.0.1", help="0.0.0.0 shows it to others (default: %(default)s)")
    app.add_argument("--port", type=int, default=7860, metavar="N", help="(default: %(default)s)")
    app.add_argument("--max-upload", type=int, metavar="MB", default=500, help="(default: %(default)s)")
    app.add_argument("--max-cells", type=int, metavar="N", default=100_000, help="in an upload (default: %(default)s)")


def _app(arguments: argparse.Namespace) -> None:
    missing = [name for name in ("gradio", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(f"the app needs {' and '.join(missing)}; pip install 'perturbdiff[app]'.")
    from perturbdiff.app.page import serve
    from perturbdiff.app.upload import Limits

    limits = Limits(arguments.max_upload << 20, arguments.max_cells)
    serve(arguments.model, arguments.controls, arguments.host, arguments.port, limits)
