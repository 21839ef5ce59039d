"""features build, info: what is known of genes and drugs as tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from perturbdiff.cli.command import add_command

WITHOUT = "IEA,ND"
EVERY = "none"
SOURCES = """
what a source may be, told by its content:
  GO annotations      a GAF 2.x file (goa_human.gaf.gz), or org.Hs.eg.sqlite of Bioconductor
                      (Debian: apt-get download r-bioc-org.hs.eg.db; dpkg-deb -x *.deb folder)
  gene sets           .gmt: pathways, complexes; or a .csv or .tsv with columns of names and members (--sets)
  pairs of genes      a .csv or .tsv with two columns of genes: ligands and receptors (--pairs)
  cells               any .h5ad, perturbed or not: how genes go together in them
  drugs               a .csv or .parquet with columns name and smiles: Morgan fingerprints
Annotations and sets become principal components. --screen makes them those of the genes that the screen perturbs: few
numbers then say exactly which of these are alike; genes that share nothing with any of them are left out. A table made
anew for another screen has other axes: train with it anew too.
Several tables at once say more than one: data.perturbation_features takes a list. How much each counts for the simple
methods "features" and "stacked" is learned from the training perturbations.
A source that is newer than a screen may hold what the screen found: its date and license stand in the table, in
`perturbdiff features info`, and in the card of each model that is trained with it.
"""


def add_features_commands(commands: Any) -> None:
    """Declare them."""
    about = "tables of what is known of genes and drugs, to predict perturbations that nobody measured"
    group = commands.add_parser("features", help=about, description=f"{about[0].upper()}{about[1:]}.")
    features = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
    build = add_command(
        features, "build", _build, "a table from GO, gene sets, ligand-receptor pairs, cells, or SMILES",
        "Makes a table name -> vector of a file that anyone can have. A model that is trained with such tables\n"
        "predicts genes or drugs that were never perturbed (data.perturbation_features).",
        "examples:\n"
        "  perturbdiff features build org.Hs.eg.sqlite --screen ko.h5ad --out go.parquet --license Artistic-2.0\n"
        "  perturbdiff features build pathways.gmt --screen ko.h5ad --out pathways.parquet\n"
        "  perturbdiff features build pairs.csv --pairs ligand,receptor --out pairs.parquet\n"
        "  perturbdiff features build pbmc.h5ad --out pbmc.parquet\n"
        "  perturbdiff train --screen ko.h5ad --hold-out STAT1 --out runs/ko --recipe unseen_perturbations \\\n"
        "    'data.perturbation_features=[go.parquet,pathways.parquet,pbmc.parquet]'\n" + SOURCES
        + "\nkey=value words are settings of --screen, as data.perturbation_col=gene\n",
    )  # fmt: skip
    build.add_argument("source", metavar="SOURCE", help="a file, as below")
    build.add_argument("--out", required=True, metavar="TABLE.parquet", help="file to write; its stem names the table")
    build.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    build.add_argument(
        "--screen", metavar="FILE.h5ad", help="whose perturbations components shall tell apart (not of cells, drugs)"
    )
    build.add_argument(
        "--n-components", type=int, metavar="N", help="features of a gene (default: 256, of cells 64; fewer if exact)"
    )
    build.add_argument("--license", metavar="TEXT", help="of the source, where it does not say so itself")
    build.add_argument("--date", metavar="TEXT", help="of the source, where it does not say so itself")
    go = build.add_argument_group("GO annotations")
    go.add_argument(
        "--aspect", choices=("P", "F", "C"), default="P",
        help="biological process, molecular function, cellular component (default: %(default)s)",
    )  # fmt: skip
    go.add_argument(
        "--without-evidence", default=WITHOUT, metavar="CODES",
        help=f"codes that do not count; {EVERY}: all count (default: %(default)s, by programs alone, and no data)",
    )  # fmt: skip
    go.add_argument("--obo", metavar="FILE.obo", help="count a term's ancestors too (default: direct annotations)")
    terms = build.add_argument_group("terms, sets and pairs")
    terms.add_argument(
        "--min-genes", type=int, default=2, metavar="N", help="leave out terms of fewer genes (default: %(default)s)"
    )
    terms.add_argument(
        "--max-share", type=float, default=0.05, metavar="P",
        help="leave out terms of a larger share of all genes (default: %(default)s)",
    )  # fmt: skip
    terms.add_argument("--pairs", metavar="COL,COL", help="columns of the two genes of a pair")
    terms.add_argument("--sets", metavar="COL,COL", help="columns of the name of a set, and of its genes")
    build.add_argument_group("cells").add_argument(
        "--min-cells", type=int, default=10, metavar="N",
        help="leave out genes seen in fewer cells (default: %(default)s)",
    )  # fmt: skip
    build.add_argument("settings", nargs="*", metavar="key=value", help=argparse.SUPPRESS)

    info = add_command(
        features, "info", _info, "what a table holds and where it comes from",
        "Says what a table of features holds and where it comes from; with --screen, which perturbations it knows.",
        "example:\n  perturbdiff features info go.parquet --screen ko.h5ad data.perturbation_col=gene\n",
    )  # fmt: skip
    info.add_argument("table", metavar="TABLE", help=".parquet, .csv, .npz or .safetensors")
    info.add_argument("--screen", metavar="FILE.h5ad", help="whose perturbations to look up")
    info.add_argument("settings", nargs="*", metavar="key=value", help=argparse.SUPPRESS)


def _build(arguments: argparse.Namespace) -> None:
    from perturbdiff.features.build import Choices, build_table
    from perturbdiff.features.tables import write_table
    from perturbdiff.files import check_output

    out = check_output(arguments.out, ".parquet", overwrite=arguments.overwrite)
    codes = arguments.without_evidence
    without = () if codes == EVERY else _words(codes, "--without-evidence") or ()
    choices = Choices(
        n_components=arguments.n_components,
        screen=_screen_settings(arguments),
        aspect=arguments.aspect,
        without_evidence=without,
        obo=None if arguments.obo is None else Path(arguments.obo),
        min_genes=arguments.min_genes,
        max_share=arguments.max_share,
        pairs_in=_words(arguments.pairs, "--pairs", 2),
        sets_in=_words(arguments.sets, "--sets", 2),
        min_cells=arguments.min_cells,
        license=arguments.license,
        date=arguments.date,
    )
    table = build_table(Path(arguments.source), out.stem, choices)
    write_table(table, out)
    print("\n".join(_lines(table)))
    print(f"written     {out}: {len(table.names):,} names, {table.values.shape[1]} features")


def _info(arguments: argparse.Namespace) -> None:
    from perturbdiff.features.build import perturbed_in
    from perturbdiff.features.fingerprints import read_features
    from perturbdiff.features.tables import coverage

    table, screen = read_features(arguments.table), _screen_settings(arguments)
    print(f"table       {table.name}: {len(table.names):,} names, {table.values.shape[1]} features")
    print("\n".join(_lines(table)))
    if screen is not None:
        for line in coverage([table], perturbed_in(screen)).splitlines():
            print(f"features    {line}")


def _lines(table: Any) -> list[str]:
    from perturbdiff.files import printable

    return [f"{printable(key):<11} {printable(value)}" for key, value in table.about.items()] or [
        "origin      not said"
    ]


def _screen_settings(arguments: argparse.Namespace) -> Any:
    from perturbdiff.config import load_config

    if arguments.screen is None:
        if arguments.settings:
            raise ValueError(f"{arguments.settings[0]!r} is a setting of --screen, which is not given; leave it out.")
        return None
    return load_config(None, arguments.settings, {"out": "-", "data": {"screen": arguments.screen}}).data


def _words(text: str | None, option: str, n: int | None = None) -> tuple[str, ...] | None:
    if text is None:
        return None
    words = tuple(word.strip() for word in text.split(","))
    if not all(words) or (n is not None and len(words) != n):
        raise ValueError(f"{option} {text!r} must be {n or 'some'} words with commas between them.")
    return words
