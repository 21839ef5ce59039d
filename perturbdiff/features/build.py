"""Files that anyone can have -> tables of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perturbdiff.config import DataConfig
from perturbdiff.data.screen import Screen
from perturbdiff.features.annotations import (
    WITHOUT_EVIDENCE,
    Annotations,
    first_line,
    read_columns,
    read_gaf,
    read_gmt,
    read_org_db,
)
from perturbdiff.features.coexpression import loadings_of_file
from perturbdiff.features.components import component_table
from perturbdiff.features.fingerprints import morgan_table
from perturbdiff.features.tables import FeatureTable
from perturbdiff.files import printable, sha256

SQLITE, HDF5 = b"SQLite format 3\0", b"\x89HDF\r\n\x1a\n"
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Choices:
    """What is taken of a source; each is of some kinds of file, and of no meaning for others.

    n_components
        Of all but drugs; None: 256 of annotations, 64 of cells.
    screen
        An .h5ad whose perturbations the components shall tell apart: see `component_table`.
    aspect, without_evidence, obo
        Of GO: see `read_gaf`.
    min_genes, max_share
        Terms of fewer genes, or of a larger share of all, are left out.
    pairs_in, sets_in
        Of tables: see `read_columns`.
    min_cells
        Of cells: genes that fewer of them express are left out.
    license, date
        What the file does not say of itself.
    """

    n_components: int | None = None
    screen: DataConfig | None = None
    aspect: str = "P"
    without_evidence: Sequence[str] = WITHOUT_EVIDENCE
    obo: Path | None = None
    min_genes: int = 2
    max_share: float = 0.05
    pairs_in: Sequence[str] | None = None
    sets_in: Sequence[str] | None = None
    min_cells: int = 10
    license: str | None = None
    date: str | None = None


def build_table(path: Path, name: str, choices: Choices) -> FeatureTable:
    """A table of features from a file, by what is in it, with what is known of its origin.

    An .h5ad gives loadings of genes, a table of drugs fingerprints; GO annotations (GAF or sqlite), gene sets (.gmt or
    columns) and pairs give components.

    Raises
    ------
    FileNotFoundError, ValueError, KeyError
        As the readers; the screen cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file.")
    with open(path, "rb") as file:
        begin = file.read(16)
    if begin.startswith(HDF5):
        table = loadings_of_file(path, 64 if choices.n_components is None else choices.n_components, choices.min_cells)
        table = replace(table, about={"kind": "loadings of genes in cells"})
    elif begin != SQLITE and (path.suffix == ".parquet" or "smiles" in first_line(path).casefold()):
        table = morgan_table(path)
        table = replace(table, about={"kind": "Morgan fingerprints"})
    else:
        known = _annotations(path, begin, choices)
        perturbed = None if choices.screen is None else perturbed_in(choices.screen)
        n_components = 256 if choices.n_components is None else choices.n_components
        try:
            known = known.with_terms(choices.min_genes, choices.max_share)
            table = component_table(known, n_components, name, perturbed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        counted = {"genes": f"{len(known.genes):,}", "terms": f"{len(known.terms):,}"}
        table = replace(table, about={**table.about, **counted})
    about = {
        **table.about,
        "source": path.name,
        "sha256": sha256(path),
        "date": choices.date or table.about.get("date", NOT_STATED),
        "license": choices.license or NOT_STATED,
    }
    return replace(table, name=name, about={key: printable(value) for key, value in about.items()})


def _annotations(path: Path, begin: bytes, choices: Choices) -> Annotations:
    if begin == SQLITE:
        return read_org_db(path, choices.aspect, choices.without_evidence, choices.obo)
    line = first_line(path)
    if line.startswith("!"):
        return read_gaf(path, choices.aspect, choices.without_evidence, choices.obo)
    if ".gmt" in path.suffixes:
        return read_gmt(path)
    return read_columns(path, choices.pairs_in, choices.sets_in)


def perturbed_in(config: DataConfig) -> list[str]:
    """Names of the single perturbations of a screen."""
    assert config.screen is not None, "a screen is given"
    screen = Screen.read(config.screen, config)
    labels = screen.obs["perturbation"][~screen.is_control].unique()
    return sorted({name for label in labels for name, _ in screen.notation.parse(label)})
