"""screen loadings: features of genes from the cells of any .h5ad."""

from __future__ import annotations

import argparse
from typing import Any

from perturbdiff.cli.command import add_command


def add_loadings_command(screen_commands: Any) -> None:
    """Declare it."""
    loadings = add_command(
        screen_commands, "loadings", _loadings, "features of genes: how they go together in the cells of an .h5ad",
        "Principal components of the standardised log1p expression of a file, perturbed or not, and the direction of\n"
        "each gene in them: a table that lets a model predict genes that were never perturbed\n"
        "(data.perturbation_features). Cells other than those trained on say more of genes that few of those express.",
        "example:\n  perturbdiff screen loadings pbmc.h5ad --out pbmc.parquet\n"
        "  perturbdiff train --screen knockouts.h5ad --hold-out STAT1 --out runs/ko "
        "'data.perturbation_features=[pbmc.parquet]'\n",
    )  # fmt: skip
    loadings.add_argument("file", metavar="FILE.h5ad", help="X raw counts or log1p")
    loadings.add_argument("--out", required=True, metavar="TABLE.parquet", help="file to write")
    loadings.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    loadings.add_argument(
        "--n-components", type=int, default=64, metavar="N", help="features of a gene (default: %(default)s)"
    )
    loadings.add_argument(
        "--min-cells", type=int, default=10, metavar="N",
        help="leave out genes seen in fewer cells (default: %(default)s)",
    )  # fmt: skip


def _loadings(arguments: argparse.Namespace) -> None:
    from perturbdiff.features.coexpression import loadings_of_file
    from perturbdiff.features.tables import write_table
    from perturbdiff.files import check_output

    out = check_output(arguments.out, ".parquet", overwrite=arguments.overwrite)
    table = loadings_of_file(arguments.file, arguments.n_components, arguments.min_cells)
    write_table(table, out)
    print(f"written     {out}: {len(table.names):,} genes, {table.values.shape[1]} features")
