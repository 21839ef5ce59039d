"""report: the scores and pictures of a run as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from perturbdiff.cli.command import add_command


def add_report_command(commands: Any) -> None:
    """Declare it."""
    report = add_command(
        commands, "report", _report, "scores and pictures of a run as one HTML file",
        "Writes what a run predicted of its held-out conditions beside what was measured: verdict, means of the\n"
        "methods, the worst conditions first, figures of cells and genes, data, loss, calibration, provenance. The\n"
        "file needs no network. Figures need the extra: pip install 'perturbdiff[plot]'.",
        "examples:\n  perturbdiff report runs/kang\n"
        "  perturbdiff report runs/kang -o kang.html --screen kang.h5ad --figures figures\n",
    )  # fmt: skip
    report.add_argument("folder", metavar="RUN", help="run folder of train, finetune or demo")
    report.add_argument("-o", "--output", metavar="FILE.html", help="file to write (default: RUN/report.html)")
    report.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    report.add_argument("--screen", metavar="FILE.h5ad", help="the measured cells (default: those of the run)")
    report.add_argument("--figures", metavar="FOLDER", help="write each figure as an SVG file too")


def _report(arguments: argparse.Namespace) -> None:
    from perturbdiff.evaluation.report import write_report
    from perturbdiff.files import check_output

    own = arguments.output is None
    out = Path(arguments.folder) / "report.html" if own else arguments.output
    out = check_output(out, ".html", overwrite=own or arguments.overwrite)
    print(f"written     {write_report(arguments.folder, out, arguments.screen, arguments.figures)}")
