"""check: whether a file fits a model."""

from __future__ import annotations

import argparse
from typing import Any

from perturbdiff.cli.command import add_command, refuse_missing
from perturbdiff.cli.predict import add_columns


def add_check_command(commands: Any) -> None:
    """Declare it."""
    check = add_command(
        commands, "check", _check, "whether a file fits a model, before anything is predicted",
        "Reads an .h5ad as `predict` would and says which of the model's genes it has, what X holds, whether its\n"
        "library sizes are like those of training, which cells are controls, and which labels the model knows.\n"
        "Exits 0 where `predict` would take it, and 2 with one line where it would not.",
        "example:\n  perturbdiff check runs/kang/model kang.h5ad\n",
    )  # fmt: skip
    check.add_argument("model", metavar="MODEL", help="model folder, name, or owner/name[@REVISION] on the Hub")
    check.add_argument("file", metavar="FILE.h5ad", help="X raw counts or log1p; control cells, perhaps others too")
    check.add_argument("--layer", metavar="NAME", help="read X from this layer, or from .raw (raw)")
    check.add_argument(
        "--min-gene-overlap", type=float, default=0.5, metavar="PART",
        help="refuse files with fewer of the model's genes (default: %(default)s)",
    )  # fmt: skip
    add_columns(check)


def _check(arguments: argparse.Namespace) -> None:
    refuse_missing(arguments.model)
    from perturbdiff.config import given_columns
    from perturbdiff.data.h5ad import check_columns
    from perturbdiff.inference.check import check_file
    from perturbdiff.model import PerturbDiff

    model = PerturbDiff.from_pretrained(arguments.model, device="cpu")
    model.config.obs, model.preprocessing = given_columns(model.config.obs, model.preprocessing, arguments.settings)
    check_columns(arguments.file, arguments.settings)
    print(check_file(model, arguments.file, arguments.layer, arguments.min_gene_overlap).text())
