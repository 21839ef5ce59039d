"""The genes of an atlas: which gene of each source is which, and which of them are kept."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perturbdiff.data.vocab import ENSEMBL_ID, GeneVocab, stable_id
from perturbdiff.files import few, short

SELECT = re.compile(r"merge-then-select:([1-9]\d*)")
MIN_FOUND = 0.5  # of the genes of a file


@dataclass(frozen=True)
class GeneSpace:
    """Genes of an atlas, and where each gene of each source lies among them.

    columns
        One array a source: (genes of the source,) int32 position in `genes`, -1 for a gene that is not kept.
    """

    genes: GeneVocab
    columns: tuple[np.ndarray, ...]

    def n_kept(self, source: int) -> int:
        """Genes of a source that are kept."""
        return int((self.columns[source] >= 0).sum())

    def select(self, positions: np.ndarray) -> GeneSpace:
        """Only the genes at these positions, in this order."""
        new = np.full(len(self.genes) + 1, -1, dtype=np.int32)  # the last entry is where -1 points
        new[positions] = np.arange(len(positions), dtype=np.int32)
        return GeneSpace(self.genes.select(positions), tuple(new[columns] for columns in self.columns))

    def among(self, chosen: Sequence[np.ndarray]) -> GeneSpace:
        """Only the genes that are among the chosen columns of any source."""
        positions = np.concatenate([columns[c] for columns, c in zip(self.columns, chosen, strict=True)])
        return self.select(np.unique(positions[positions >= 0]))


def n_selected(rule: str) -> int | None:
    """N of "merge-then-select:N"; None for another rule. Raises ValueError on one that is misspelt."""
    if match := SELECT.fullmatch(rule):
        return int(match[1])
    if rule.startswith("merge-then-select"):
        raise ValueError(f"genes ({rule!r}) must be merge-then-select:N with N at least 1, as merge-then-select:2000.")
    return None


def read_gene_table(path: str | Path) -> dict[str, str]:
    """The user's table: name (or Ensembl id) in a source -> name in the atlas, "" for a gene to leave out.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; columns other than `from` and `to`; one gene with two names.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"gene_table {str(path)!r} does not exist; give a .csv with the columns from,to.")
    table: dict[str, str] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            fields = [field.strip() for field in row]
            if number == 1:
                if fields != ["from", "to"]:
                    raise ValueError(f"the first line of gene_table {path} is {','.join(row)!r}; it must be from,to.")
            elif fields and (len(fields) != 2 or not fields[0]):
                raise ValueError(
                    f"line {number} of gene_table {path} is {','.join(row)!r}; it must hold a name in a source, a "
                    "comma and a name in the atlas (nothing after the comma leaves the gene out)."
                )
            elif fields and table.setdefault(fields[0], fields[1]) != fields[1]:
                raise ValueError(
                    f"line {number} of gene_table {path} maps {fields[0]!r} to {fields[1]!r}, an earlier one to "
                    f"{table[fields[0]]!r}; keep one of them."
                )
    return table


def read_gene_file(path: str | Path) -> tuple[str, ...]:
    """Gene names of a text file, one a line, or of the genes.parquet of an atlas.

    Raises FileNotFoundError, and ValueError where a name comes twice or there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"genes ({str(path)!r}) must be union, intersection, merge-then-select:N, or a file of names, one a line, "
            "or the genes.parquet of an atlas; there is no such file."
        )
    if Path(path).suffix == ".parquet":
        try:
            lines = pq.read_table(path, columns=["name"])["name"].to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"genes file {path} is no genes.parquet of an atlas ({short(error)}).") from error
    else:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    names = GeneVocab(tuple(line.strip() for line in lines if line.strip())).names
    if not names:
        raise ValueError(f"genes file {path} is empty; write the names of the genes, one a line.")
    return names


def merge_genes(
    sources: Mapping[str, GeneVocab],
    rule: str,
    table: Mapping[str, str] | None = None,
) -> GeneSpace:
    """The gene space of all sources.

    Genes are one where their names are (after the table), or their Ensembl ids (whatever the version); a gene the table
    renames is known by its new name alone. Genes that are named by ids get their symbols, where these are of one.

    Parameters
    ----------
    sources
        Genes of each source by its name, in order.
    rule
        "union": the first source's genes, then the others' new ones in order; "intersection": those of the first
        source that all have; or a file of names (or Ensembl ids), whose order is kept. For "merge-then-select:N" it is
        the union, of which `GeneSpace.among` keeps the genes that vary most.

    Raises
    ------
    ValueError
        Two sources give one name different Ensembl ids; two genes of a source are one gene; no gene is left; under
        half of the genes of a file are in any source.
    """
    union = _union(sources, dict(table or {}))
    if rule != "intersection":  # which is empty then
        _refuse_strangers(sources, union)
    if rule == "union" or n_selected(rule) is not None:
        space = union
    elif rule == "intersection":
        present = np.ones(len(union.genes), dtype=bool)
        for columns in union.columns:
            present &= np.isin(np.arange(len(present)), columns)
        space = union.select(np.flatnonzero(present))
    else:
        space = _listed(union, rule)
    if not len(space.genes):
        raise ValueError(f"no gene is left with genes={rule} of {', '.join(sources)}; map their names in gene_table.")
    return space


def _refuse_strangers(sources: Mapping[str, GeneVocab], union: GeneSpace) -> None:
    # Names of another kind or species: nothing of such a source would be comparable with the others.
    n_sources = np.bincount(np.concatenate([columns[columns >= 0] for columns in union.columns]))
    for (source, genes), columns in zip(sources.items(), union.columns, strict=True):
        if len(sources) > 1 and (columns >= 0).any() and (n_sources[columns[columns >= 0]] == 1).all():
            other, others = next((name, of) for name, of in sources.items() if name != source)
            raise ValueError(
                f"no gene of source {source!r} ({few(list(genes.names))}) is in another one, as {other!r} "
                f"({few(list(others.names))}); give names of one kind and species, var columns of symbols or Ensembl "
                "ids, or map them in gene_table."
            )


def _listed(union: GeneSpace, path: str) -> GeneSpace:
    """The genes of a file; one that no source has stays, without values, so that atlases can share a gene space."""
    names = read_gene_file(path)
    ids = union.genes.ensembl or ()
    position = {stable_id(gene): i for i, gene in enumerate(ids) if gene}
    position.update({name: i for i, name in enumerate(union.genes.names)})
    found = np.array([position.get(name, position.get(stable_id(name), -1)) for name in names], dtype=np.int64)
    missing = [name for name, i in zip(names, found, strict=True) if i < 0]
    if len(missing) > (1 - MIN_FOUND) * len(names):
        raise ValueError(
            f"only {len(names) - len(missing)} of the {len(names)} genes of {path} are in any source; missing are "
            f"{', '.join(missing[:5])}, ... Give the names the sources use, or map theirs in gene_table."
        )
    known = found[found >= 0]
    if len(np.unique(known)) < len(known):
        first, second = _twice(names, found)
        raise ValueError(f"{first!r} and {second!r} of {path} are one gene of the sources; keep one of them.")
    new = np.full(len(union.genes) + 1, -1, dtype=np.int32)
    new[known] = np.flatnonzero(found >= 0)
    genes = GeneVocab(names, tuple(ids[i] if i >= 0 and ids else "" for i in found) if ids else None)
    return GeneSpace(genes, tuple(new[columns] for columns in union.columns))


def _union(sources: Mapping[str, GeneVocab], table: dict[str, str]) -> GeneSpace:
    names: list[str] = []
    ids: list[str] = []
    givers: list[str] = []  # the source an id comes from
    by_name: dict[str, int] = {}
    by_id: dict[str, int] = {}
    renamed: dict[int, str] = {}  # ids of genes that the table renamed: taken where nobody gives another
    used: set[str] = set()
    all_columns = []
    for source, genes in sources.items():
        columns = np.full(len(genes), -1, dtype=np.int32)
        taken: dict[int, str] = {}
        owned = set(genes.names)
        none = ("",) * len(genes)
        for g, (own, given, symbol) in enumerate(
            zip(genes.names, genes.ensembl or none, genes.symbols or none, strict=True)
        ):
            gene_id = given or (own if ENSEMBL_ID.fullmatch(own) else "")
            name, by_table = own, False
            if symbol and symbol not in owned:  # what other sources may call it
                known = by_id.get(stable_id(gene_id))
                at = by_name.get(symbol)
                if known is not None:
                    name = names[known]
                elif at is None or (at not in taken and stable_id(ids[at]) in ("", stable_id(gene_id))):
                    name = symbol
            for key in (own, gene_id, stable_id(gene_id)):
                if key and key in table:
                    used.add(key)
                    name, by_table = table[key], True
                    break
            if not name:
                continue
            match_id = "" if by_table else gene_id
            position = by_name.get(name)
            if position is not None and match_id and ids[position] and stable_id(match_id) != stable_id(ids[position]):
                raise ValueError(
                    f"gene {name!r} is {ids[position]} in source {givers[position]!r} and {match_id} in source "
                    f"{source!r}; "
                    "say which is meant with a line 'from,to' in gene_table: an Ensembl id or name, and the name it "
                    "gets in the atlas (or nothing, to leave it out)."
                )
            if position is None and match_id:
                position = by_id.get(stable_id(match_id))
            if position is None:
                position = len(names)
                names.append(name)
                ids.append("")
                givers.append("")
                by_name[name] = position
            elif ENSEMBL_ID.fullmatch(names[position]):
                by_name.setdefault(name, position)
            if match_id and not ids[position] and (other := by_id.get(stable_id(match_id), position)) != position:
                raise ValueError(
                    f"gene {name!r} ({match_id}) of source {source!r} is two genes of the sources before it: "
                    f"{names[position]!r} by name and {names[other]!r} by Ensembl id; rename one in gene_table."
                )
            if match_id and not ids[position]:
                ids[position], givers[position] = match_id, source
                by_id[stable_id(match_id)] = position
            if by_table and gene_id:
                renamed.setdefault(position, gene_id)
            if position in taken:
                raise ValueError(
                    f"genes {taken[position]!r} and {own!r} of source {source!r} are both {names[position]!r} in the "
                    "atlas; "
                    "give one another name, or leave it out, with a line 'from,to' in gene_table."
                )
            taken[position] = own
            columns[g] = position
        all_columns.append(columns)
    if table and not used:
        raise ValueError(
            f"no gene of gene_table is in any source, {next(iter(table))!r} among them; column 'from' must hold names "
            "or Ensembl ids of the sources."
        )
    for position, gene_id in renamed.items():
        if not ids[position] and stable_id(gene_id) not in by_id:
            ids[position] = gene_id
            by_id[stable_id(gene_id)] = position
    return GeneSpace(GeneVocab(tuple(names), tuple(ids) if any(ids) else None), tuple(all_columns))


def _twice(names: Sequence[str], positions: np.ndarray) -> tuple[str, str]:
    seen: dict[int, str] = {}
    for name, position in zip(names, positions.tolist(), strict=True):
        if position >= 0 and position in seen:
            return seen[position], name
        seen[position] = name
    raise AssertionError("called where a position comes twice")
