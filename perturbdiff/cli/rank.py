"""screen rank: order perturbations by where they push cells."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbdiff.cards import plain
from perturbdiff.cli.command import add_command, refuse_missing
from perturbdiff.cli.interrupts import SAID
from perturbdiff.cli.predict import add_columns, add_sampling, load_model, sampling_of

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20  # lines of the printed table
MAX_NAME = 22  # characters of a perturbation in it
MAX_LIST_BYTES = 1 << 24


def add_rank_command(screen_commands: Any) -> None:
    """Declare it."""
    rank = add_command(
        screen_commands, "rank", _rank, "order perturbations by a target signature or reference population",
        "Predicts every candidate perturbation from the same control cells, with the same random draws, and orders\n"
        "them by their score: the mean change, in standard deviations of the control cells, of the genes that should\n"
        "rise minus that of those that should fall; or with --towards, how much of the energy distance between the\n"
        "controls and a reference population goes away. No change scores 0. The column verdict says of which\n"
        "candidates nobody can tell more than what all perturbations do, by training conditions left out.\n"
        "What is done is kept beside --out as it comes: the same command goes on where it was ended.",
        "examples:\n  perturbdiff screen rank runs/kang/model --controls kang.h5ad --up ISG15,IFIT1,MX1 "
        "--out ranking.csv\n"
        "  perturbdiff screen rank owner/name --controls sick.h5ad --towards healthy.h5ad --out ranking.csv\n"
        "lists are names between commas, or a file with one a line; what follows a space and # is left out\n",
    )  # fmt: skip
    rank.add_argument("model", metavar="MODEL", help="model folder, name, or owner/name[@REVISION] on the Hub")
    rank.add_argument("--controls", required=True, metavar="FILE.h5ad", help="X raw counts or log1p")
    rank.add_argument("--up", metavar="GENES", help="genes that should rise: A,B,C or a file")
    rank.add_argument("--down", metavar="GENES", help="genes that should fall")
    rank.add_argument("--towards", metavar="FILE.h5ad", help="cells of the reference population, instead of genes")
    rank.add_argument(
        "--candidates", default="trained", metavar="NAMES",
        help="perturbations, A,B,C or a file; trained, those that cells received; all, also those that only features "
        "describe, perhaps very many (default: %(default)s)",
    )  # fmt: skip
    rank.add_argument("--cell-type", metavar="NAME", help="only controls of this cell type (default: all)")
    rank.add_argument("--batch", metavar="NAME", help="only controls of this batch (default: all)")
    rank.add_argument("--out", required=True, metavar="FILE.csv", help="file to write")
    rank.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    rank.add_argument(
        "--n-cells", type=int, metavar="N", help="of a population (default: as many as controls, at most 256)"
    )
    rank.add_argument(
        "--n-populations", type=int, default=5, metavar="N",
        help="draws of each response distribution (default: %(default)s)",
    )  # fmt: skip
    rank.add_argument(
        "--n-processes", type=int, default=1, metavar="N",
        help="that share the candidates, at most one a core; each takes the memory of a prediction (default: "
        "%(default)s)",
    )  # fmt: skip
    add_sampling(rank)
    add_columns(rank)


def _rank(arguments: argparse.Namespace) -> None:
    from perturbdiff.files import check_output, few, hanging, refuse_inputs, written

    lists = (arguments.up, arguments.down, arguments.candidates)  # or names
    refuse_inputs([arguments.out], (arguments.controls, arguments.towards, *lists, *arguments.features))
    out = check_output(arguments.out, ".csv", overwrite=arguments.overwrite)
    refuse_missing(arguments.model)
    from perturbdiff.inference.ranking import rank_perturbations
    from perturbdiff.training.signals import Stopped, StopRequest

    up, down = _names(arguments.up, "--up"), _names(arguments.down, "--down")
    which = arguments.candidates
    model = load_model(arguments.model, arguments.features, arguments.settings, arguments.controls)
    knows = model.vocabularies.knows
    candidates = None if which == "trained" else which if which == "all" else _names(which, "--candidates", knows)
    kept = out.with_name(f"{out.name}.part")
    try:
        with StopRequest(at_once=True):  # SIGTERM and SIGUSR1 too: what is done is kept, and nothing is left in /tmp
            table = rank_perturbations(
                model,
                arguments.controls,
                up=up,
                down=down,
                towards=arguments.towards,
                candidates=candidates,
                cell_type=arguments.cell_type,
                batch=arguments.batch,
                layer=arguments.layer,
                n_cells=arguments.n_cells,
                n_populations=arguments.n_populations,
                seed=arguments.seed,
                n_processes=arguments.n_processes,
                kept=kept,
                **sampling_of(arguments),
            )
    except Stopped as stop:
        number = signal.Signals[stop.signal_name]
        print(f"perturbdiff: {SAID[number]}", file=sys.stderr)
        sys.exit(128 + number)
    with written(out) as temporary:
        table.to_csv(temporary, index=False)
    kept.unlink(missing_ok=True)
    print(_shown(table.head(SHOWN)))
    untold, known = table["verdict"] == "cannot tell", table["expected_pearson"].notna()
    if names := table["perturbation"][untold & known].tolist():
        text = f"trust       of {len(names):,} candidates nobody can tell more than what all perturbations do; "
        print(hanging(f"{text}their places are a guess: {few(names)}", 12))
    if names := table["perturbation"][untold & ~known].tolist():
        text = f"trust       how well {len(names):,} candidates can be told is not known: "
        print(hanging(f"{text}no training condition that was left out is as new: {few(names)}", 12))
    print(hanging(f"p_above     {_of_what(table, arguments.n_populations, arguments.towards is not None)}", 12))
    print(f"written     {out}: {len(table):,} perturbations; no change scores 0")


def _of_what(table: Any, n_populations: int, towards: bool) -> str:
    if table["calibrated"].any():
        return "by the calibrated intervals of the genes"
    if n_populations < 2:
        return "unknown: it needs --n-populations 2 or more"
    why = (
        "intervals are of genes" if towards else "the model is not calibrated (perturbdiff calibrate), or not for this"
    )
    return f"of the populations alone, which is too sure: {why}"


def _shown(table: pd.DataFrame) -> str:
    """A table of 80 columns; the file has more, and whole names."""
    ranks = [f"{low}-{high}" for low, high in zip(table["rank_low"], table["rank_high"], strict=True)]
    shown = table[["rank", "perturbation", "score", "sd", "p_above"]].assign(
        perturbation=[plain(name, MAX_NAME) for name in table["perturbation"]],
        ranks=ranks,
        verdict=table["verdict"],
        pearson=table["expected_pearson"],
    )
    return shown.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.3f}")


def _names(given: str | None, option: str, known: Callable[[str], bool] = lambda name: False) -> list[str]:
    if given is None:
        return []
    from perturbdiff.data.vocab import between_commas

    path = Path(given)
    if os.path.isfile(given):  # False, not an error, of a list that is too long for a name
        if (size := path.stat().st_size) > MAX_LIST_BYTES:
            raise ValueError(f"{option} {path} has {size:,} bytes; at most {MAX_LIST_BYTES:,} are read.")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{option} {path} is not a text file; write one name a line.") from error
        names = [re.split(r"(?:^|\s)#", line)[0].strip() for line in lines]  # guides are called STAT1#2
    else:
        if path.suffix in (".txt", ".csv", ".tsv"):
            raise FileNotFoundError(f"{option} {path} does not exist or is not a file; give names or a file of them.")
        names = between_commas(given, known)
    names = [name for name in names if name]
    if not names:
        raise ValueError(f"{option} {given} names nothing; give one name a line, or A,B,C.")
    return names
