"""simulate: a screen with known truth, to try everything on."""

from __future__ import annotations

import argparse
from typing import Any

from perturbdiff.cli.command import add_command

# Option, field of SimulationConfig, its default (a test compares them: pandas would make --help slow), meaning.
OPTIONS: list[tuple[str, str, int | float, str]] = [
    ("--genes", "n_genes", 500, "genes"),
    ("--cell-types", "n_cell_types", 4, "cell types: type_0, type_1, ..."),
    ("--batches", "n_batches", 2, "batches: batch_0, batch_1, ..."),
    ("--perturbations", "n_perturbations", 6, "single perturbations: pert_0, pert_1, ..."),
    ("--pairs", "n_pairs", 0, "combinations of two of them, as pert_0+pert_1"),
    ("--cells", "cells_per_condition", 100, "cells of each perturbation, dose, cell type and batch"),
    ("--control-cells", "control_cells_per_context", 200, "control cells of each cell type and batch"),
    ("--effect-genes", "n_effect_genes", 40, "genes that a perturbation moves"),
    ("--effect-size", "effect_size", 1.0, "sd of the natural-log fold change of these"),
    ("--batch-variability", "batch_variability", 0.3, "relative sd of an effect between batches"),
    ("--counts", "mean_library_size", 3000.0, "mean counts of a cell"),
    ("--seed", "seed", 0, "another seed is another screen"),
]


def add_simulate_command(commands: Any) -> None:
    """Declare it."""
    parser = add_command(
        commands, "simulate", _simulate, "write a simulated screen, to try everything on",
        "Writes an .h5ad as a screen is: raw counts, control cells, and obs columns perturbation, cell_type, batch\n"
        "and dose. Its cells vary as real ones do: counts are negative binomial, some cells of a condition respond\n"
        "more than others, and a perturbation acts a little differently in each cell type and batch. The same\n"
        "options give the same cells. It shows how things work. How good a method is, only real screens tell.",
        "examples:\n"
        "  perturbdiff simulate screen.h5ad\n"
        "  perturbdiff simulate pairs.h5ad --perturbations 8 --pairs 12 --seed 1\n"
        "  perturbdiff simulate doses.h5ad --doses 0.1,1,10\n"
        "then, to predict a perturbation in a cell type that never received it:\n"
        "  perturbdiff train --screen screen.h5ad --hold-out pert_0:type_0 --out runs/screen\n",
    )  # fmt: skip
    parser.add_argument("out", metavar="FILE.h5ad", help="where to write it; a file there is replaced")
    for option, field, default, about in OPTIONS:
        parser.add_argument(
            option, dest=field, type=type(default), default=default, metavar="N", help=f"{about} (default: %(default)g)"
        )
    parser.add_argument(
        "--doses",
        type=_numbers,
        default=(1.0,),
        metavar="D,D,...",
        help="each perturbation is given at each (default: 1)",
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between them, as 0.1,1,10.") from None


def _simulate(arguments: argparse.Namespace) -> None:
    from perturbdiff.data.simulate import SimulationConfig, simulate

    config = SimulationConfig(doses=arguments.doses, **{field: getattr(arguments, field) for _, field, _, _ in OPTIONS})
    simulate(config, arguments.out)
    print(f"wrote       {arguments.out}: {config.n_cells:,} cells of {config.n_genes:,} genes, raw counts")
    print(f"look at it  perturbdiff screen info {arguments.out}")
