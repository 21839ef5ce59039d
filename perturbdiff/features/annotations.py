"""What people wrote down of genes: GO annotations, gene sets, complexes, pairs. Files of strangers, read with bounds.

n = genes, T = terms: GO terms, sets, partners.
"""

from __future__ import annotations

import csv
import gzip
import re
import sqlite3
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import sparse

from perturbdiff.features.files import Unfit
from perturbdiff.files import few, printable, short

MAX_BYTES = 1 << 31  # of a file, and of what it unpacks to: GO annotations of all of UniProt are another matter
MAX_LINE = 1 << 22  # bytes; the largest gene sets have a tenth
MAX_PAIRS = 1 << 24  # of a gene and a term, or of a term and an ancestor
MAX_LETTERS = 400  # of the name of a gene or a term
MAX_STEPS = 500  # of a query, in millions of SQLite's instructions; that of the human genome takes 20
WITHOUT_EVIDENCE = ("IEA", "ND")
"""GO evidence codes that are left out: put there by a program, and "nothing is known"."""
ASPECTS = {"P": "biological_process", "F": "molecular_function", "C": "cellular_component"}
ORG_TABLES = {"P": "go_bp", "F": "go_mf", "C": "go_cc"}
GZIP = b"\x1f\x8b"
BETWEEN = re.compile(r"[;,|\s]+")  # the members of a set in one field
PARTNERS = re.compile(r"[;,|_\s]+")  # those of a complex that is one side of a pair: ITGA4_ITGB1
PAIR_COLUMNS = (
    ("source_genesymbol", "target_genesymbol"), ("ligand", "receptor"), ("gene1", "gene2"), ("gene_a", "gene_b"),
)  # fmt: skip
SET_COLUMNS = (("name", "genes"), ("complexname", "subunits(gene name)"), ("complex_name", "subunits_gene_name"))
"""Titles of columns that say what a table holds, in lower case; others are named by who reads it."""


@dataclass(frozen=True, eq=False)
class Annotations:
    """Which genes have which terms.

    has
        (n, T) CSR of ones.
    aliases
        Other names of genes that name one gene alone, to that gene; no name in `genes` is among them.
    about
        What the file says of itself, for people.
    """

    genes: tuple[str, ...]
    terms: tuple[str, ...]
    has: sparse.csr_matrix
    aliases: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def with_terms(self, least: int, most_share: float) -> Annotations:
        """Only terms that `least` genes or more have, and no more than this share of all genes.

        Raises ValueError where none is left.
        """
        n = np.asarray(self.has.sum(axis=0)).ravel()
        kept = np.flatnonzero((n >= least) & (n <= most_share * len(self.genes)))
        if not len(kept):
            raise ValueError(
                f"of {len(self.terms):,} terms none is that of {least} genes or more and of at most {most_share:.0%} "
                f"of the {len(self.genes):,} genes; lower --min-genes or raise --max-share."
            )
        has = self.has[:, kept]
        some = np.flatnonzero(np.diff(has.indptr))
        genes = tuple(self.genes[i] for i in some)
        return Annotations(genes, tuple(self.terms[i] for i in kept), has[some], self.aliases, self.about)


class _Pairs:
    """Genes with terms as they are read, each pair once."""

    def __init__(self) -> None:
        self.genes: dict[str, int] = {}
        self.terms: dict[str, int] = {}
        self._rows, self._columns = array("i"), array("i")

    def add(self, gene: str, term: str) -> None:
        for name in (gene, term):
            if not 0 < len(name) <= MAX_LETTERS:
                raise Unfit(f"{name[:80]!r} is no name of 1 to {MAX_LETTERS} letters.")
        if len(self._rows) >= MAX_PAIRS:
            raise Unfit(f"it has more than {MAX_PAIRS:,} pairs of a gene and a term, as many as are read.")
        self._rows.append(self.genes.setdefault(gene, len(self.genes)))
        self._columns.append(self.terms.setdefault(term, len(self.terms)))

    def done(self, aliases: dict[str, set[str]], about: dict[str, str]) -> Annotations:
        """In the order of names, whatever that of the file."""
        if not self.genes:
            raise Unfit("it says nothing of any gene; is it the file that was meant, with these settings?")
        genes, terms = sorted(self.genes), sorted(self.terms)
        row, column = np.empty(len(genes), np.int32), np.empty(len(terms), np.int32)
        row[[self.genes[name] for name in genes]] = np.arange(len(genes))
        column[[self.terms[name] for name in terms]] = np.arange(len(terms))
        at = row[np.frombuffer(self._rows, np.int32)], column[np.frombuffer(self._columns, np.int32)]
        has = sparse.csr_matrix((np.ones(len(at[0]), np.float32), at), (len(genes), len(terms)))
        has.data[:] = 1.0  # a pair that came again was added up
        known = {alias: next(iter(of)) for alias, of in aliases.items() if len(of) == 1 and alias not in self.genes}
        return Annotations(tuple(genes), tuple(terms), has, {a: g for a, g in known.items() if g in self.genes}, about)


# GO


def read_gaf(
    path: Path, aspect: str = "P", without: Sequence[str] = WITHOUT_EVIDENCE, obo: Path | None = None
) -> Annotations:
    """GO annotations of genes, of a GAF 2.x file, plain or gzip: by symbol, without those that say NOT.

    Parameters
    ----------
    aspect
        P, F or C: biological process, molecular function, cellular component.
    without
        Evidence codes that do not count.
    obo
        An ontology: whoever has a term has its ancestors by is_a and part_of too. Without, annotations are direct.

    Raises
    ------
    ValueError
        Not such a file; larger than is read; another version of the format; nothing is left.

    Notes
    -----
    https://geneontology.org/docs/go-annotation-file-gaf-format-2.2/
    """
    with _one_line(path):
        terms_of, ontology = _with_ancestors(obo)
        pairs, aliases = _Pairs(), dict[str, set[str]]()
        said, newest, counted, aspects = dict[str, str](), "", set[str](), set[str]()
        for number, line in enumerate(_lines(path), 1):
            if line.startswith("!"):
                key, _, value = line[1:].partition(":")
                if key.strip() in ("gaf-version", "date-generated", "generated-by", "go-version") and value.strip():
                    said.setdefault(key.strip(), value.strip()[:MAX_LETTERS])
                continue
            if not line.strip():
                continue
            parts = line.split("\t")
            if len(parts) < 15 or not parts[2] or not re.fullmatch(r"[A-Z]+:\d+", parts[4]):
                raise Unfit(
                    f"line {number} is no annotation of GAF 2.x: fields between tabs, a symbol in the third and a GO "
                    f"id in the fifth; found {len(parts)} fields, {line.strip()[:60]!r}."
                )
            for alias in filter(None, parts[10].split("|")):
                aliases.setdefault(alias, set()).add(parts[2])
            aspects.add(parts[8])
            if parts[8] == aspect and parts[6] not in without and "NOT" not in parts[3].split("|"):
                for term in terms_of(parts[4]):
                    pairs.add(parts[2], term)
                counted.add(parts[6])
                newest = max(newest, parts[13] if re.fullmatch(r"\d{8}", parts[13]) else "")
        if not said.get("gaf-version", "2").startswith("2"):
            raise Unfit(f"it is of GAF version {said['gaf-version']}; only 2.x is read.")
        if aspects and aspect not in aspects:
            raise Unfit(
                f"it has no annotation of aspect {aspect} ({ASPECTS[aspect]}), only of {few(sorted(aspects))}; "
                "name one of these (--aspect)."
            )
        date = said.get("date-generated") or (f"newest annotation {newest}" if newest else "")
        about = {"kind": f"GO {ASPECTS[aspect]}", **_evidence(counted, without), **ontology}
        about |= {"date": date} if date else {}
        about |= {key: said[key] for key in ("go-version", "generated-by") if key in said}
        return pairs.done(aliases, about)


def read_org_db(
    path: Path, aspect: str = "P", without: Sequence[str] = WITHOUT_EVIDENCE, obo: Path | None = None
) -> Annotations:
    """GO annotations of the genes in an org.*.eg.sqlite of Bioconductor (Debian: r-bioc-org.hs.eg.db), by symbol.

    Other symbols and Ensembl ids of a gene are its aliases. Parameters and errors as `read_gaf`; the file is opened
    for reading alone, and a query that takes too long is ended.
    """
    with _one_line(path), closing(_open(path)) as database:
        terms_of, ontology = _with_ancestors(obo)
        pairs, counted, aliases = _Pairs(), set[str](), dict[str, set[str]]()
        query = f"SELECT symbol, go_id, evidence FROM {ORG_TABLES[aspect]} JOIN gene_info USING (_id)"
        for symbol, go, evidence in _rows(database, query):
            if evidence not in without:
                counted.add(evidence)
                for term in terms_of(go):
                    pairs.add(symbol, term)
        for table, column in (("alias", "alias_symbol"), ("ensembl", "ensembl_id")):
            query = f"SELECT {column}, symbol FROM {table} JOIN gene_info USING (_id)"
            for alias, symbol in _rows(database, query):
                aliases.setdefault(alias, set()).add(symbol)
        said = {name: value for name, value in _rows(database, "SELECT name, value FROM metadata")}  # noqa: C416
        known = (("date", "GOEGSOURCEDATE"), ("go-version", "GOSOURCEDATE"), ("organism", "ORGANISM"))
        about = {"kind": f"GO {ASPECTS[aspect]}", **_evidence(counted, without), **ontology}
        about |= {key: said[name][:MAX_LETTERS] for key, name in known if said.get(name)}
        return pairs.done(aliases, about)


def _evidence(counted: Iterable[str], without: Sequence[str]) -> dict[str, str]:
    return {"evidence": " ".join(sorted(counted)), "left out": " ".join(sorted(without)) or "none"}


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    database.execute("PRAGMA trusted_schema=OFF")  # nothing that the file defines is called
    database.execute("PRAGMA cell_size_check=ON")
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1 << 20)  # bytes of a value
    steps = iter(range(MAX_STEPS))
    database.set_progress_handler(lambda: next(steps, None) is None, 1_000_000)  # a view may never end
    return database


def _rows(database: sqlite3.Connection, query: str) -> Iterator[tuple[str, ...]]:
    for row in database.execute(f"{query} LIMIT {MAX_PAIRS}"):
        if not all(isinstance(value, str) for value in row):
            raise Unfit(f"a row of {query!r} is {row!r:.80}, no text.")
        yield row


def _with_ancestors(obo: Path | None) -> tuple[Callable[[str], Iterable[str]], dict[str, str]]:
    """What a term stands for, and what the ontology says of itself."""
    if obo is None:
        return lambda term: (term,), {"ancestors": "none: direct annotations"}
    ontology, version = read_obo(obo)
    return lambda term: ontology.get(term, (term,)), {"ancestors": f"by {obo.name} ({version})"}


def read_obo(path: Path) -> tuple[dict[str, tuple[str, ...]], str]:
    """Each term of an ontology, by its ids, with itself and all its ancestors by is_a and part_of; its version.

    Raises ValueError where it is no such file, or terms are their own ancestors.
    """
    with _one_line(path):
        parents: dict[str, list[str]] = {}
        others: dict[str, str] = {}
        version, stanza, term = "version not stated", "", ""
        for line in _lines(path):
            tag, _, value = line.partition(":")
            value = value.split("!")[0].strip()
            if line.startswith("["):
                stanza, term = line.strip(), ""
            elif not stanza and tag == "data-version":
                version = value[:MAX_LETTERS]
            elif stanza == "[Term]":
                if tag == "id":
                    term = value
                    parents[term] = []
                elif term and tag == "alt_id":
                    others[value] = term
                elif term and tag == "is_a":
                    parents[term].append(value.split("{")[0].strip())
                elif term and tag == "relationship" and value.startswith("part_of "):
                    parents[term].append(value.split()[1])
        if not parents:
            raise Unfit("it has no [Term]; give an ontology in OBO format, as go-basic.obo.")
        found: dict[str, frozenset[str]] = {}
        n = 0
        for start in parents:
            path_to, waiting = dict[str, None](), [start]  # by hand: chains may be deeper than calls can be
            while waiting:
                here = waiting[-1]
                open_parents = [p for p in parents.get(here, ()) if p not in found]
                if here in found:
                    waiting.pop()
                elif not open_parents:
                    found[here] = frozenset((here,)).union(*(found[p] for p in parents.get(here, ())))
                    if (n := n + len(found[here])) > MAX_PAIRS:
                        raise Unfit(f"its terms have more than {MAX_PAIRS:,} ancestors together; is it an ontology?")
                    path_to.pop(here, None)
                    waiting.pop()
                else:
                    path_to[here] = None
                    if circle := [p for p in open_parents if p in path_to]:
                        raise Unfit(f"term {circle[0][:80]!r} is its own ancestor.")
                    waiting += open_parents
        every = {term: tuple(sorted(found[term])) for term in parents}
        return every | {other: every[term] for other, term in others.items() if other not in every}, version


# Sets and pairs


def read_gmt(path: Path) -> Annotations:
    """Gene sets of a .gmt file, plain or gzip: on each line a name, a description and genes between tabs.

    Raises ValueError as `read_gaf`.
    """
    with _one_line(path):
        pairs = _Pairs()
        for number, line in enumerate(_lines(path), 1):
            parts = line.rstrip("\r\n").split("\t")
            if not line.strip():
                continue
            if len(parts) < 3 or not parts[0]:
                raise Unfit(f"line {number} is no set: a name, a description and genes between tabs are expected.")
            for gene in filter(None, map(str.strip, parts[2:])):
                pairs.add(gene, parts[0])
        return pairs.done({}, {"kind": "gene sets"})


def read_columns(
    path: Path, pairs_in: Sequence[str] | None = None, sets_in: Sequence[str] | None = None
) -> Annotations:
    """Genes of a table with titles, .csv or .tsv, plain or gzip: pairs of genes, or sets with their members.

    Parameters
    ----------
    pairs_in
        Titles of two columns of genes. What one has of a pair is its partner: genes with the same ligand are alike. A
        complex on one side, as ITGA4_ITGB1, is each of its genes.
    sets_in
        Titles of the names of sets and of their members, one or several in a field.

    Without either, the titles of `PAIR_COLUMNS` and `SET_COLUMNS` say which it is. Raises ValueError as `read_gaf`,
    and where neither is found.
    """
    with _one_line(path):
        lines = _lines(path)
        first = next(lines, "").removeprefix("\ufeff")
        comma = "\t" if "\t" in first else ","
        titles = [title.strip() for title in next(csv.reader([first], delimiter=comma), [])]
        one, other, of_pairs = _columns_of(titles, pairs_in, sets_in)
        pairs = _Pairs()
        for row in csv.reader(lines, delimiter=comma):
            if len(row) <= max(one, other):
                if any(row):
                    raise Unfit(f"a row has {len(row)} fields where the first line names {len(titles)}: {few(row)}.")
                continue
            if of_pairs:
                sides = [[gene for gene in PARTNERS.split(row[i].strip()) if gene] for i in (one, other)]
                for gene in sides[0]:
                    for partner in sides[1]:
                        pairs.add(gene, f"with {partner}")
                        pairs.add(partner, f"of {gene}")
            elif row[one].strip():
                for gene in filter(None, BETWEEN.split(row[other].strip())):
                    pairs.add(gene, row[one].strip()[:MAX_LETTERS])
        return pairs.done({}, {"kind": "pairs of genes" if of_pairs else "gene sets"})


def first_line(path: Path) -> str:
    """Of a text file, plain or gzip. Raises ValueError where it is none, FileNotFoundError."""
    with _one_line(path):
        return next(_lines(path), "")


def _columns_of(
    titles: list[str], pairs_in: Sequence[str] | None, sets_in: Sequence[str] | None
) -> tuple[int, int, bool]:
    for given, of_pairs in ((pairs_in, True), (sets_in, False)):
        if given is not None:
            if lacking := [title for title in given if titles.count(title) != 1]:
                raise Unfit(f"there must be one column {few(lacking)}; found {few(titles)}.")
            return titles.index(given[0]), titles.index(given[1]), of_pairs
    folded = [title.casefold() for title in titles]
    found = [
        (folded.index(a), folded.index(b), of_pairs)
        for columns, of_pairs in ((PAIR_COLUMNS, True), (SET_COLUMNS, False))
        for a, b in columns
        if folded.count(a) == folded.count(b) == 1
    ]
    if len(found) != 1:
        raise Unfit(
            f"its columns ({few(titles)}) do not say what it holds; name two of genes (--pairs LIGAND,RECEPTOR), or "
            "those of sets and their members (--sets NAME,GENES)."
        )
    return found[0]


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What is wrong with a file as one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are read.")
    try:
        yield
    except Unfit as error:
        raise ValueError(f"{path}: {printable(str(error)[:500])}") from None
    except (sqlite3.Error, EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged, or not what it seems ({short(error)}); get it again.") from error


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file, plain or gzip, each and all of bounded size."""
    with open(path, "rb") as start:
        packed = start.read(2) == GZIP
    n = 0
    with gzip.open(path, "rb") if packed else open(path, "rb") as file:
        while line := file.readline(MAX_LINE):
            n += len(line)
            if len(line) == MAX_LINE or n > MAX_BYTES:
                raise Unfit(f"a line has {MAX_LINE:,} bytes or more, or all have over {MAX_BYTES:,}; is it a text?")
            yield line.decode("utf-8")
