"""Starts the app on a Space, whose variables say what to serve: MODEL, and CONTROLS if there are such cells."""

import os
import sys

from perturbdiff.cli.main import main

if not os.environ.get("MODEL"):
    sys.exit("app: error: no model; give the variable MODEL a model folder, a repo id or a known name.")
words = ["app", os.environ["MODEL"]]
words += ["--controls", os.environ["CONTROLS"]] if os.environ.get("CONTROLS") else []
main(
    [
        *words,
        "--host",
        os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
        "--port",
        os.environ.get("GRADIO_SERVER_PORT", "7860"),
    ]
)
