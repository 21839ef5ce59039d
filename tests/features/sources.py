"""Files that say things of genes, as people find them: GO annotations, ontologies, an annotation database."""

from __future__ import annotations

import sqlite3
from pathlib import Path

Row = tuple[str, str, str]  # symbol, term, evidence


def gaf(rows: list[Row], qualifier: str = "involved_in", aspect: str = "P", synonyms: str = "") -> str:
    """Text of a GAF 2.2 file."""
    lines = ["!gaf-version: 2.2", "!date-generated: 2024-01-17", "!generated-by: GOC"]
    for i, (symbol, term, evidence) in enumerate(rows):
        fields = ["UniProtKB", f"P{i:05}", symbol, qualifier, term, "PMID:1", evidence, "", aspect, "a name", synonyms,
                  "protein", "taxon:9606", f"2023{i % 12 + 1:02}01", "UniProt", "", ""]  # fmt: skip
        lines.append("\t".join(fields))
    return "\n".join(lines) + "\n"


def org_db(path: Path, rows: list[Row], aliases: list[tuple[str, str]] = (), script: str = "") -> Path:
    """A database with the tables of org.Hs.eg.sqlite that hold GO; `script` is run last."""
    symbols = {symbol: i for i, symbol in enumerate(sorted({row[0] for row in rows}))}
    with sqlite3.connect(path) as database:
        database.executescript(
            "CREATE TABLE gene_info (_id INTEGER, gene_name TEXT, symbol TEXT);"
            "CREATE TABLE go_bp (_id INTEGER, go_id TEXT, evidence TEXT);"
            "CREATE TABLE alias (_id INTEGER, alias_symbol TEXT); CREATE TABLE ensembl (_id INTEGER, ensembl_id TEXT);"
            "CREATE TABLE metadata (name TEXT, value TEXT);"
            "INSERT INTO metadata VALUES ('GOEGSOURCEDATE', '2022-Sep12'), ('ORGANISM', 'Homo sapiens');"
        )
        database.executemany("INSERT INTO gene_info VALUES (?, '', ?)", [(i, s) for s, i in symbols.items()])
        database.executemany("INSERT INTO go_bp VALUES (?, ?, ?)", [(symbols[s], t, e) for s, t, e in rows])
        database.executemany("INSERT INTO alias VALUES (?, ?)", [(symbols[s], alias) for alias, s in aliases])
        database.executescript(script)
    database.close()
    return path


OBO = """\
format-version: 1.2
data-version: releases/2024-01-17

[Term]
id: GO:1
name: root

[Term]
id: GO:2
is_a: GO:1 ! root

[Term]
id: GO:3
alt_id: GO:33
is_a: GO:2 {source="x"} ! two
relationship: part_of GO:4 ! four
relationship: regulates GO:5 ! no ancestor

[Term]
id: GO:4
is_a: GO:1

[Term]
id: GO:5

[Typedef]
id: part_of
is_a: GO:5
"""
