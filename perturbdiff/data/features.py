"""What is known of perturbations, as numbers: a vector for each gene or drug, from a file, a structure, or expression.

n = names of a table, F = features, G = genes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, eigsh

from perturbdiff.config import MAX_FEATURES, DataConfig
from perturbdiff.data.feature_files import MAX_LETTERS, MAX_VALUES, read_texts, read_vectors
from perturbdiff.data.screen import read_expression, read_h5ad_parts
from perturbdiff.data.vocab import LabelVocab, Vocabularies
from perturbdiff.files import few, write_whole

MAX_RADIUS = 16  # of Morgan fingerprints, in bonds
DENSE = 512  # cells or genes up to which all eigenvectors are computed: Lanczos is inexact where rank is lacking
NOISE = 1e-10  # of the largest eigenvalue: what rounding leaves of an eigenvalue that is 0


@dataclass(frozen=True)
class FeatureTable:
    """What is known of each of some entities (genes, drugs): one vector a name.

    name
        "esm2": what people call it.
    names
        (n,) unique.
    values
        (n, F) float32, finite.

    Raises ValueError where they are not such.
    """

    name: str
    names: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if not self.names or self.values.ndim != 2 or not self.values.shape[1]:
            raise ValueError(
                f"feature table {self.name!r} has {len(self.names)} names and values of shape {self.values.shape}; it "
                "must have at least one name and one feature."
            )
        if len(self.names) != len(self.values) or self.values.dtype != np.float32:
            raise ValueError(
                f"feature table {self.name!r} has {len(self.names)} names and values of shape {self.values.shape} of "
                f"type {self.values.dtype}; give a row of float32 for each."
            )
        wrong = [name for name in self.names if not 0 < len(name) <= MAX_LETTERS or not _is_unicode(name)]
        if wrong:
            raise ValueError(
                f"feature table {self.name!r}: {wrong[0][:80]!r} is no name of 1 to {MAX_LETTERS} letters."
            )
        if len(set(self.names)) < len(self.names):
            seen: set[str] = set()
            twice = [name for name in self.names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
            raise ValueError(f"feature table {self.name!r} has rows of the same name: {few(twice)}; keep one of each.")
        finite = np.isfinite(self.values).all(axis=1)
        if not finite.all():
            bad = [self.names[i] for i in np.flatnonzero(~finite)]
            raise ValueError(
                f"feature table {self.name!r}: values of {few(bad)} are missing, not numbers or too large for float32; "
                "fill them in or leave these names out."
            )

    def centre_and_scale(self) -> tuple[np.ndarray, float]:
        """(F,) means over the rows, and the number that makes the mean square of a centred value 1.

        One number for all columns: principal components stay what they are. Without any variation it is 0.
        """
        centre = self.values.mean(axis=0, dtype=np.float64)  # exact where a column is constant
        spread = np.sqrt(np.square(self.values - centre).mean())
        return centre.astype(np.float32), float(1 / spread) if spread > 0 else 0.0

    def directions(self) -> FeatureTable:
        """Rows of length 1, so that inner products are cosines; rows of zeros stay."""
        norm = np.linalg.norm(self.values.astype(np.float64), axis=1, keepdims=True)
        values = np.divide(self.values, norm, out=np.zeros(self.values.shape), where=norm > 0)
        return replace(self, values=values.astype(np.float32))

    def places(self, entities: Sequence[str]) -> np.ndarray:
        """(len(entities),) int64 row of each entity, -1 for one that the table does not have.

        An entity is the name that equals it; without one, the only name that does so but for upper and lower case.
        """
        places = [self._places.get(name, self._folded.get(name.casefold(), -1)) for name in entities]
        return np.array(places, dtype=np.int64)

    def rows(self, entities: Sequence[str]) -> np.ndarray:
        """(len(entities), F) float32; zeros where the table does not have an entity (see `places`)."""
        places = self.places(entities)
        rows = self.values[places]
        rows[places < 0] = 0.0
        return rows

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def _folded(self) -> dict[str, int]:
        folded: dict[str, int] = {}
        for i, name in enumerate(self.names):
            folded[name.casefold()] = -1 if name.casefold() in folded else i  # -1: it could be either
        return folded


def with_tables(vocabularies: Vocabularies, tables: Sequence[FeatureTable]) -> Vocabularies:
    """With the perturbations that have features but no row of their own."""
    known = set(vocabularies.labelled)
    described = {name: None for table in tables for name in table.names if name not in known}  # in this order
    return replace(
        vocabularies,
        perturbations=LabelVocab("perturbation", (*vocabularies.labelled, *described)),
        n_described=len(described),
        tables=tuple((table.name, table.values.shape[1]) for table in tables),
    )


def read_table(path: str | Path, name: str | None = None) -> FeatureTable:
    """A table from a file; `name` is the file's stem where it is not given.

    Formats
    -------
    .csv, .parquet
        One row an entity. Its name is the column `name`; without one, the index that pandas wrote, or else the first
        column. All other columns are numbers.
    .npz
        Arrays `names` (n,) of text and `values` (n, F); or an array (F,) under each name.
    .safetensors
        A tensor `values` (n, F) with the metadata {"names": a JSON list}; or a tensor (F,) under each name.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; another suffix; not such a file; larger than is read; names that come twice; values that are not
        finite.
    """
    path = Path(path)
    names, values = read_vectors(path)
    return _table_of(path, name, names, values)


def morgan_table(path: str | Path, name: str | None = None, radius: int = 2, n_bits: int = 1024) -> FeatureTable:
    """Morgan fingerprints, zeros and ones, of the structures in a .csv or .parquet file with columns name and smiles.

    Parameters
    ----------
    radius, n_bits
        Bonds around each atom; F. Radius 2 makes what is also called ECFP4.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_table`; rdkit is not installed; a SMILES is not one.

    Notes
    -----
    Rogers & Hahn 2010, doi:10.1021/ci100050t; computed by rdkit.
    """
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdFingerprintGenerator
    except ImportError as error:
        raise ValueError("fingerprints of SMILES need rdkit; install it: pip install 'perturbdiff[chem]'.") from error
    if not (0 <= radius <= MAX_RADIUS and 1 <= n_bits <= MAX_FEATURES):
        raise ValueError(
            f"Morgan fingerprints of radius {radius} with {n_bits} bits: the radius must be 0 to {MAX_RADIUS}, the "
            f"bits 1 to {MAX_FEATURES}."
        )
    path = Path(path)
    names, smiles = read_texts(path, ("name", "smiles"))
    if len(names) * n_bits > MAX_VALUES:
        raise ValueError(f"{path}: {len(names):,} fingerprints of {n_bits:,} bits are too many; take fewer bits.")
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_bits)
    values = np.zeros((len(names), n_bits), dtype=np.float32)
    with rdBase.BlockLogs():  # it would write of a wrong SMILES to the terminal
        for i, (entity, text) in enumerate(zip(names, smiles, strict=True)):
            molecule = Chem.MolFromSmiles(text)
            if molecule is None or not molecule.GetNumAtoms():
                raise ValueError(
                    f"{path}: SMILES {text[:80]!r} of {few([entity])} is not one; correct or leave it out."
                )
            values[i] = generator.GetFingerprintAsNumPy(molecule)
    return _table_of(path, name, names, values)


def coexpression_table(
    X: sparse.csr_matrix, genes: Sequence[str], n_components: int = 32, name: str = "coexpression"
) -> FeatureTable:
    """Loadings of genes on the principal components of standardised expression.

    Inner products of rows are gene-gene correlations, as well as F components can give them.

    Parameters
    ----------
    X
        (cells, G) log1p values, of training cells only. Never made dense where both sides are large.
    genes
        (G,) names.
    n_components
        F; at most min(cells, G) - 1. Components without variance are zero.

    Returns
    -------
    Rows of right singular vectors times singular values / sqrt(cells), largest first, each column with its largest
    entry positive; zeros for a gene that is constant over the cells. The same X gives the same table.
    """
    n_cells, n_genes = X.shape
    if len(genes) != n_genes or min(X.shape) < 2 or n_components < 1:
        raise ValueError(
            f"co-expression of X {X.shape} with {len(genes)} names and {n_components} components: it needs 2 cells, 2 "
            "genes, a name for each, and 1 component."
        )
    X = X.astype(np.float64)
    X.sum_duplicates()
    if not np.isfinite(X.data).all():
        raise ValueError("co-expression of values that are not finite; give log1p values.")
    mean = np.asarray(X.mean(axis=0)).ravel()
    varies = X.max(axis=0).toarray().ravel() > X.min(axis=0).toarray().ravel()
    zeros = n_cells - np.bincount(X.indices, minlength=n_genes)  # cells in which a gene has no value stored
    squares = np.bincount(X.indices, weights=np.square(X.data - mean[X.indices]), minlength=n_genes)
    variance = squares + zeros * np.square(mean)  # times cells
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)

    def by_cell(v: np.ndarray) -> np.ndarray:
        """A v, with A (cells, G) the standardised X / sqrt(cells); v (G, ...)."""
        scaled = (v.T * scale).T
        return X @ scaled - mean @ scaled

    def by_gene(u: np.ndarray) -> np.ndarray:
        """A' u; u (cells, ...)."""
        return ((X.T @ u - np.multiply.outer(mean, u.sum(axis=0))).T * scale).T

    n_components = min(n_components, min(X.shape) - 1)
    if n_genes <= n_cells:
        roots, vectors = _largest(lambda v: by_gene(by_cell(v)), n_genes, n_components)
        loadings = vectors * np.sqrt(roots)
    else:
        roots, vectors = _largest(lambda u: by_cell(by_gene(u)), n_cells, n_components)
        loadings = by_gene(vectors)
    loadings[:, roots <= NOISE * max(roots[0], NOISE)] = 0.0
    loadings[~varies] = 0.0
    size = np.abs(loadings)
    first = np.argmax(size >= (1 - 1e-6) * size.max(axis=0), axis=0)  # of entries that are equal but for rounding
    loadings *= np.where(np.take_along_axis(loadings, first[None], axis=0) < 0, -1.0, 1.0)
    return FeatureTable(name, tuple(genes), loadings.astype(np.float32))


def loadings_of_file(path: str | Path, n_components: int = 64, min_cells: int = 10) -> FeatureTable:
    """Directions of the genes of an .h5ad in its principal components: what is known of a gene from other cells.

    Genes that are seen in few cells have no direction but noise.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_h5ad_parts`, `read_expression`; no two genes are in `min_cells` cells.
    """
    config = DataConfig(screen=str(path))
    expression = read_expression(*read_h5ad_parts(path), config.input_kind, config, str(path))
    seen = np.flatnonzero(expression.X.getnnz(axis=0) >= min_cells)
    if len(seen) < 2:
        raise ValueError(f"{path}: {len(seen)} genes are seen in {min_cells} cells or more; give more cells.")
    genes = expression.genes.select(seen)
    X = expression.with_genes(genes, seen).log1p()
    return coexpression_table(X, genes.names, n_components, Path(path).stem).directions()


def write_table(table: FeatureTable, path: Path) -> None:
    """Write a .parquet that `read_table` reads, whole or not at all."""
    columns = {"name": pa.array(table.names)}
    columns |= {f"f{i}": pa.array(values) for i, values in enumerate(np.ascontiguousarray(table.values.T))}
    write_whole(path, lambda temporary: pq.write_table(pa.table(columns), temporary))


def coverage(tables: Sequence[FeatureTable], entities: Sequence[str]) -> str:
    """Lines for people: how many of the entities each table has, some that it lacks, and which no table has."""
    entities = list(dict.fromkeys(entities))
    known = np.zeros(len(entities), dtype=bool)
    lines = []
    for table in tables:
        places = table.places(entities)
        found = places >= 0
        known |= found
        line = f"{table.name}: {found.sum()} of {len(entities)}"
        other_case = sum(table.names[i] != name for i, name in zip(places, entities, strict=True) if i >= 0)
        if other_case:
            line += f", {other_case} of them in other upper and lower case"
        lacking = [name for name, has in zip(entities, found, strict=True) if not has]
        lines.append(f"{line}; lacks {few(lacking)}" if lacking else line)
    unknown = [name for name, has in zip(entities, known, strict=True) if not has]
    return "\n".join([*lines, f"in no table: {few(unknown)}"])


def _table_of(path: Path, name: str | None, names: Sequence[str], values: np.ndarray) -> FeatureTable:
    try:
        return FeatureTable(path.stem if name is None else name, tuple(names), values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # halves of characters
        return False
    return True


def _largest(apply: Callable[[np.ndarray], np.ndarray], n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest eigenvalues, from the largest down, and eigenvectors (n, k) of a positive operator."""
    if n <= DENSE:
        roots, vectors = np.linalg.eigh(apply(np.eye(n)))
    else:
        operator = LinearOperator((n, n), matvec=apply, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(n)  # the same each time
        roots, vectors = eigsh(operator, k, v0=start, tol=1e-10)
    order = np.argsort(roots)[::-1][:k]
    return np.maximum(roots[order], 0.0), vectors[:, order]
