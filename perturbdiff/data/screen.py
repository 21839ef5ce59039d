"""A screen: one .h5ad (or AnnData) in memory, its cells in condition order, X sparse, everything checked."""

from __future__ import annotations

import json
import shlex
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from perturbdiff.config import DataConfig, ObsColumns, Preprocessing
from perturbdiff.data.dialects import CONTROL_WORDS, PERTURBATION_COLUMNS
from perturbdiff.data.expression import CellRows, as_csr, library_sizes, log1p_normalised, one_count
from perturbdiff.data.guides import Guides, gene_rows
from perturbdiff.data.h5ad import read_h5ad_parts, values_of
from perturbdiff.data.labels import ALL, obs_column, odd_labels, read_labels
from perturbdiff.data.notation import Notation, dose_text
from perturbdiff.data.rng import cell_order_key
from perturbdiff.data.selectors import ANY, LABELS, Selectors
from perturbdiff.data.space import RAW_COUNTS, SAME, found, renormalised, space_of
from perturbdiff.data.vocab import ENSEMBL_ID, GeneVocab, nearest
from perturbdiff.files import few, hanging, printable

IN_MEMORY = "screen in memory"  # in place of a path
READ_BY = (
    "perturbation_col",
    "cell_type_col",
    "batch_col",
    "control_label",
    "other_control_labels",
    "drop",
    "combination_separator",
    "dose_col",
    "dose_separator",
)  # settings of labels
MAX_PANEL, FEW_COUNTS = 2000, 10  # genes; times that the counts of a cell are less than what they are normalised to
ENSEMBL_COLUMNS = ("ensembl_id", "gene_ids", "gene_id", "feature_id")
SYMBOL_COLUMNS = (
    "gene_symbol", "gene_symbols", "symbol", "gene_name", "gene_names", "feature_name", "gene_short_name"
)  # fmt: skip


@dataclass(frozen=True)
class Expression:
    """Cells by genes with what is needed to normalise them.

    X
        (n_cells, G) CSR: raw counts (uint16, or uint32 where one needs it) or log1p values (float32).
    library_size
        (n_cells,) float32 total counts per cell over all genes of the file; ones for log1p input.
    note
        What was found or changed in X, for people; empty where it was what it should be.
    n_measured
        Genes of the file, over which library sizes are sums.
    """

    X: sparse.csr_matrix
    genes: GeneVocab
    library_size: np.ndarray
    preprocessing: Preprocessing
    note: str = ""
    n_measured: int = 0

    def __len__(self) -> int:
        return self.X.shape[0]

    def with_genes(self, genes: GeneVocab, columns: np.ndarray) -> Expression:
        """The columns of `genes`, in their order; -1 is a gene the file lacks (all zeros). Library sizes stay."""
        present = columns >= 0
        X = self.X[:, columns[present]]
        if not present.all():  # the present columns go to their positions in the wider matrix
            positions = np.flatnonzero(present).astype(np.int32)
            X = sparse.csr_matrix((X.data, positions[X.indices], X.indptr), (X.shape[0], len(columns)))
        X.sort_indices()
        return replace(self, X=X, genes=genes)

    def take(self, rows: np.ndarray) -> CellRows:
        """The cells of these rows, as `expression.Cells`."""
        X = self.X[rows]
        return CellRows(X.indptr.astype(np.int64), X.indices, X.data, self.library_size[rows])

    def one_count(self, rows: np.ndarray) -> np.ndarray:
        """As `expression.one_count`, of some cells."""
        return one_count(self.take(rows), self.preprocessing)

    def log1p(self, rows: np.ndarray | slice = slice(None)) -> sparse.csr_matrix:
        """log1p values of some cells, (n, G) float32: the space scores and predictions live in."""
        return log1p_normalised(self.X[rows], self.library_size[rows], self.preprocessing)


@dataclass(frozen=True, repr=False)
class Screen:
    """Cells of a perturbation screen sorted by (cell_type, batch, perturbation).

    obs
        One row a cell, index = the file's obs_names: `perturbation`, `cell_type`, `batch` as str, then the file's
        other columns under their names.
    """

    path: str
    expression: Expression
    obs: pd.DataFrame
    control_label: str
    notes: tuple[str, ...]  # what was found or changed on reading, for people
    notation: Notation  # what the labels of perturbations mean
    config: DataConfig  # the settings it was read by, columns of a known kind of file filled in

    @classmethod
    def read(cls, path: str | Path | AnnData, config: DataConfig | None = None) -> Screen:
        """Read an .h5ad, or take an AnnData: X dense, CSR or CSC, compressed or not; only X, obs and var are read.

        With `config.layer` those values in place of X.

        Raises
        ------
        FileNotFoundError, ValueError, KeyError
            No such file; not an .h5ad; a column, the control label or X is not as configured (see `from_parts`).
        """
        config = config or DataConfig()
        if isinstance(path, AnnData):
            X, var = values_of(path, config.layer)
            return cls.from_parts(X, path.obs, var, config, IN_MEMORY)
        X, obs, var = read_h5ad_parts(path, config.layer)
        return cls.from_parts(X, obs, var, config, str(path))

    @classmethod
    def from_parts(cls, X: Any, obs: pd.DataFrame, var: pd.DataFrame, config: DataConfig, path: str) -> Screen:
        """Check and sort the parts of an AnnData.

        Raises
        ------
        KeyError
            An obs column is missing; the message lists those there.
        ValueError
            X is neither counts nor logarithms, or not what was declared; duplicate genes; missing labels; no cell has
            the control label.
        """
        symbols = _first_of(var, SYMBOL_COLUMNS)
        known = {*var.index.astype(str), *(() if symbols is None else symbols.astype(str))}
        labels = read_labels(obs, config, path, known)
        config, notes, control_label = labels.config, [*labels.notes], labels.config.control_label
        if not labels.kept.all():
            X, obs = _cells_by_genes(X, len(obs), len(var), path)[labels.kept], obs[labels.kept]
        perturbations = pd.Categorical(labels.obs["perturbation"])
        guides = Guides.of_labels(var.index.astype(str), perturbations.categories, labels.notation)
        if guides:
            X = _cells_by_genes(X, len(obs), len(var), path)
            guides.look(X, perturbations)
        if (left_out := guides.found()).any():
            notes.append(
                f"{few(var.index[left_out].astype(str).tolist())} are counted in cells of their own perturbation "
                "alone: guides or transgenes, which are left out"
            )
            X, var = X[:, ~left_out], var[~left_out]
        expression = read_expression(X, obs, var, config.input_kind, config, path)
        if expression.note:
            notes.append(expression.note)
        if config.target_sum is None:  # a panel of few genes has few counts; 1e4 would stretch them
            is_control = (labels.obs["perturbation"] == control_label).to_numpy()
            expression = _with_median_of(expression, is_control, path)
        order_key = cell_order_key(obs.index.astype(str).to_numpy(), seed=0)
        if not obs.index.is_unique:
            notes.append(f"{obs.index.duplicated().sum()} repeated obs_names got a suffix")
            obs = obs.set_axis(unique_names(obs.index.astype(str)), axis=0)
        others = obs.drop(columns=[c for c in LABELS if c in obs.columns])
        columns = {name: labels.obs[name].to_numpy(dtype=object) for name in LABELS}
        order = np.lexsort([order_key, columns["perturbation"], columns["batch"], columns["cell_type"]])
        sorted_obs = pd.DataFrame({name: columns[name][order] for name in LABELS}, index=obs.index[order].astype(str))
        sorted_obs = sorted_obs.join(others.iloc[order].set_axis(sorted_obs.index, axis=0))
        if (empty := int((expression.library_size <= 0).sum())) and expression.preprocessing.input_kind == "counts":
            notes.append(f"{empty} cells have no counts at all; they stay all zeros")
        return cls(
            path=path,
            expression=replace(expression, X=expression.X[order], library_size=expression.library_size[order]),
            obs=sorted_obs,
            control_label=control_label,
            notes=tuple(notes),
            notation=labels.notation,
            config=config,
        )

    def __len__(self) -> int:
        return len(self.obs)

    def __repr__(self) -> str:
        return self.summary()

    @property
    def is_control(self) -> np.ndarray:
        return (self.obs["perturbation"] == self.control_label).to_numpy()

    @property
    def n_cells(self) -> np.ndarray:
        """(n_cells,) ones: the cells of each row, as of a `Labelled`."""
        return np.ones(len(self), np.int64)

    def adata(self, rows: np.ndarray) -> AnnData:
        """Some cells, X as in the file."""
        var = pd.DataFrame(index=pd.Index(self.expression.genes.names))
        return AnnData(X=self.expression.X[rows], obs=self.obs.iloc[rows], var=var)

    def with_cells(self, rows: np.ndarray) -> Screen:
        """Only these cells, in this order."""
        X, library_size = self.expression.X[rows], self.expression.library_size[rows]
        return replace(
            self, expression=replace(self.expression, X=X, library_size=library_size), obs=self.obs.iloc[rows]
        )

    def with_genes(self, columns: np.ndarray) -> Screen:
        """Only these genes."""
        genes = self.expression.genes.select(columns)
        return replace(self, expression=self.expression.with_genes(genes, columns))

    def train_command(self) -> str:
        """The command line that would train on this screen and hold out a context of one perturbation."""
        words = ["perturbdiff", "train", "--screen", self.path]
        if (selector := self._left_out()) is not None:
            words += ["--hold-out", selector]
        words += ["--out", f"runs/{Path(self.path).stem}"]
        default, config = DataConfig(), self.config
        dropped, controls = odd_labels(set(self.obs["perturbation"]), self.notation)
        config = replace(
            config,
            drop=[*config.drop, *dropped],
            other_control_labels=[*config.other_control_labels, *controls],
        )
        for name in (*READ_BY, "input_kind", "layer", "library_size_col", "target_sum"):
            if (value := getattr(config, name)) != getattr(default, name):
                shown = "null" if value is None else json.dumps(list(value)) if isinstance(value, list) else value
                words.append(f"data.{name}={shown}")
        return shlex.join(map(str, words))

    def _left_out(self) -> str | None:
        # A condition of a perturbation that others train: in another cell type, or else in another batch.
        odd = {label for words in odd_labels(set(self.obs["perturbation"]), self.notation) for label in words}
        odd |= {label for label in self.obs["perturbation"].unique() if ANY in label}
        perturbed = self.obs[~self.is_control & ~self.obs["perturbation"].isin(odd).to_numpy()]
        for column, form in (("cell_type", "{}:{}"), ("batch", "{}:*:{}")):
            sizes = perturbed.groupby(["perturbation", column], observed=True).size()
            several = sizes[sizes.groupby(level=0).transform("size") > 1]
            if len(several):
                return form.format(*several.index[int(several.to_numpy().argmax())])
        return None

    def summary(self) -> str:
        """What was found, for a person, several lines."""
        X, preprocessing = self.expression.X, self.expression.preprocessing
        control = self.is_control
        sizes = self.obs[~control].groupby(list(LABELS), observed=True).size()
        top = f"largest value {X.data.max():g}" if X.nnz else "all zeros"
        lines = [
            f"screen      {self.path}",
            f"cells       {len(self):,}: {(~control).sum():,} perturbed, {control.sum():,} {self.control_label!r}",
            f"genes       {len(self.expression.genes):,}",
            f"X           {_kind(preprocessing)}, {X.nnz / max(X.shape[0] * X.shape[1], 1):.1%} not zero, {top}",
        ]
        if preprocessing.input_kind == "counts":
            column = preprocessing.library_size_col
            source = "row sums of X" if column is None else f"obs column {column!r}"
            lines.append(
                f"library     median {np.median(self.expression.library_size):,.0f} counts a cell, from {source}"
            )
        for name, plural in (("perturbation", "perturbations"), ("cell_type", "cell types"), ("batch", "batches")):
            found = self.obs[name][~control] if name == "perturbation" else self.obs[name]
            counts = found.value_counts()
            shown = ", ".join(f"{printable(str(label)) or repr('')} ({n:,})" for label, n in counts.head(6).items())
            lines.append(f"{plural:<11} {len(counts)}: {shown}{', ...' if len(counts) > 6 else ''}")
        if self.notation.dose_separator is not None:
            doses: dict[str, set[float]] = {}
            for label in self.obs["perturbation"].unique():
                for name, dose in self.notation.parse(label):
                    doses.setdefault(name, set()).update(() if dose is None else (dose,))
            known = [f"{name} ({', '.join(map(dose_text, sorted(doses[name]))) or 'none'})" for name in sorted(doses)]
            unit = f", in {self.notation.dose_unit}" if self.notation.dose_unit else ""
            lines.append(f"doses       {few(known)}{unit}")
        if len(sizes):
            lines.append(
                f"conditions  {len(sizes)} (perturbation, cell type, batch) of {sizes.min():,} to {sizes.max():,} "
                f"cells, median {sizes.median():,.0f}"
            )
        notes = [f"note        {note}" for note in self.notes]
        return "\n".join([lines[0], *(hanging(line, 12) for line in [*lines[1:], *notes])])  # not the path

    def panel_note(self) -> str:
        """What to set for a panel of genes, whose counts are a part of a cell's; may be nothing."""
        how, n_genes = self.expression.preprocessing, len(self.expression.genes)
        if how.input_kind != "counts" or how.library_size_col is not None or self.config.target_sum is None:
            return ""
        sums = self.expression.library_size
        median = float(np.median(sums))
        if n_genes > MAX_PANEL or not 0 < median * FEW_COUNTS < self.config.target_sum:
            return ""
        whole = [
            str(name)
            for name, values in self.obs.items()
            if pd.api.types.is_numeric_dtype(values) and (values >= sums).all() and values.median() > 2 * median
        ]
        column = f"{whole[0]}, if that is" if whole else "COLUMN, if there is one of"
        return (
            f"a panel of {n_genes:,} genes? A cell has {median:,.0f} counts, and is normalised to "
            f"{self.config.target_sum:g}. Set data.library_size_col={column} all counts of a cell, or "
            "data.target_sum=null, the median of the controls"
        )


def _kind(preprocessing: Preprocessing) -> str:
    if preprocessing.input_kind == "counts":
        return "raw counts"
    known = preprocessing.target_sum
    return "log1p values" if known is None else f"log1p values of {known:,.6g} counts a cell"


def control_cells(
    path: str | Path, obs: ObsColumns, cell_type: str | None, batch: str | None, layer: str | None = None
) -> AnnData:
    """The control cells of an .h5ad, of one cell type or batch if given; warns where all cells are taken for such.

    Raises
    ------
    FileNotFoundError, ValueError
        Not a readable .h5ad, or no such cell in it (the message lists what is there); as `warn_of_missing_columns`.
    """
    return _read_cells(path, obs, layer, cell_type, batch).controls


def controls_and_perturbed(path: str | Path, obs: ObsColumns, most: int) -> tuple[AnnData, AnnData]:
    """`control_cells` of an .h5ad, and its perturbed cells in the same genes: of each label in each cell type at most
    so many, evenly taken; none where no column says which are perturbed."""
    cells = _read_cells(path, obs, None, None, None)
    table = cells.table[~cells.is_control]
    kinds = [column for column in (obs.perturbation, obs.cell_type) if column in table.columns]
    chosen = np.zeros(len(table), dtype=bool)
    if obs.perturbation in kinds:
        for rows in table.reset_index(drop=True).groupby(kinds, observed=True).groups.values():
            chosen[rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(np.int64)]] = True
    return cells.controls, cells.take(np.flatnonzero(~cells.is_control)[chosen])


@dataclass(frozen=True)
class _Cells:
    # Of a file, X cells by genes; a cell is no control as soon as any of its labels is not the one asked for.
    X: sparse.csr_matrix
    table: pd.DataFrame
    var: pd.DataFrame
    is_control: np.ndarray

    @property
    def controls(self) -> AnnData:
        return self.take(np.flatnonzero(self.is_control))

    def take(self, rows: np.ndarray) -> AnnData:
        table = self.table.iloc[rows]
        return AnnData(X=self.X[rows], obs=table.set_axis(unique_names(table.index)), var=self.var)


def _read_cells(
    path: str | Path, obs: ObsColumns, layer: str | None, cell_type: str | None, batch: str | None
) -> _Cells:
    X, table, var = read_h5ad_parts(path, layer)
    genes_of(var[gene_rows(var)])  # refuses duplicates before AnnData merely warns of them
    matrix = _cells_by_genes(X, len(table), len(var), str(path))
    warn_of_missing_columns(table, obs, cell_type, batch)
    controls = [obs.control_label, *obs.other_control_labels]
    if obs.perturbation in table.columns:  # "ctrl+ctrl" too
        perturbations = pd.Categorical(table[obs.perturbation].astype(str))
        controls += control_labels(perturbations.categories, obs)
        if (dropped := dropped_cells(table, obs)).any():
            warnings.warn(
                f"{int(dropped.sum()):,} cells are left out, as training left them out (data.drop={list(obs.drop)})",
                UserWarning,
                stacklevel=4,
            )
            matrix, table, perturbations = matrix[~dropped], table[~dropped], perturbations[~dropped]
        guides = Guides.of_labels(var.index.astype(str), perturbations.categories, _plain(obs))
        guides.look(matrix, perturbations)
        if (left_out := guides.found()).any():  # their counts would be a part of library sizes
            matrix, var = matrix[:, ~left_out], var[~left_out]
    wanted = ((obs.perturbation, controls), (obs.cell_type, [cell_type]), (obs.batch, [batch]))
    chosen = np.ones(len(table), dtype=bool)
    for column, values in wanted:
        if column is None or values == [None] or column not in table.columns:
            continue
        labels = table[column].astype(str)
        named = labels.isin(values).to_numpy()
        if not (chosen & named).any():
            there = nearest(str(values[0]), set(labels[chosen]))
            word = "; set data.control_label" if column == obs.perturbation else ""
            raise ValueError(f"{path} has no control cell with {column} {values[0]!r}; {there}{word}.")
        chosen &= named
    return _Cells(matrix, table, var, chosen)


def dropped_cells(table: pd.DataFrame, obs: ObsColumns) -> np.ndarray:
    """(n_cells,) True for cells that training would have left out. Warns of selectors whose column is not there."""
    columns = dict(zip(LABELS, (obs.perturbation, obs.cell_type, obs.batch), strict=True))
    named = {name: table[of] if of in table else pd.Series(ALL, table.index) for name, of in columns.items()}
    others = table.drop(columns=[name for name in LABELS if name in table])
    selectors = Selectors(others.assign(**named).reset_index(drop=True), _plain(obs))
    dropped = np.zeros(len(table), dtype=bool)
    for selector in obs.drop:
        dropped |= selectors.rows(selector)
        column, equals, _ = selector.rpartition(":")[2].partition("=")
        if equals and column not in {*others.columns, *LABELS}:
            warnings.warn(
                f"training left cells out by data.drop={selector}, and no obs column {column!r} tells them",
                UserWarning,
                stacklevel=3,
            )
    return dropped


def control_labels(labels: Iterable[str], obs: ObsColumns) -> list[str]:
    """Those of the labels that mark control cells, or are made of such labels alone."""
    notation = _plain(obs)
    return [label for label in labels if not notation.parse(label)]


def _plain(obs: ObsColumns) -> Notation:
    return Notation((), "+", None, (obs.control_label, *obs.other_control_labels))


def warn_of_missing_columns(obs: pd.DataFrame, columns: ObsColumns, cell_type: str | None, batch: str | None) -> None:
    """Warn of what all cells are taken for, because no column says of each what it is.

    Raises ValueError where no column has the name of the perturbations, but one holds the control label: then cells are
    perturbed that nobody would know of.
    """
    taken = {
        columns.perturbation: "controls",
        columns.cell_type: None if cell_type is None else f"cells of type {cell_type!r}",
        columns.batch: None if batch is None else f"cells of batch {batch!r}",
    }
    for own, given, kinds in ((columns.cell_type, cell_type, "cell types"), (columns.batch, batch, "batches")):
        if own is None and given not in (None, ALL):
            raise ValueError(
                f"this model was trained without {kinds}: it cannot choose cells of {given!r}; leave it out."
            )
    for column, what in taken.items():
        if column is None or what is None or column in obs.columns:
            continue
        if column == columns.perturbation:
            texts = obs.select_dtypes(include=["object", "string", "category"])
            for name in texts:
                words = CONTROL_WORDS if name in PERTURBATION_COLUMNS else ()
                labels = texts[name].astype(str).unique()
                if holds := [label for label in labels if label == columns.control_label or label.lower() in words]:
                    raise ValueError(
                        f"no obs column {column!r} says which cells are controls, but {name} holds {holds[0]!r}; set "
                        f"data.perturbation_col={name} data.control_label={shlex.quote(holds[0])}, or give the "
                        "control cells alone."
                    )
        warnings.warn(
            f"no obs column {column!r}: all {len(obs):,} cells are taken for {what}", UserWarning, stacklevel=4
        )


def read_expression(
    X: Any, obs: pd.DataFrame, var: pd.DataFrame, declared: str, config: DataConfig | Preprocessing, path: str
) -> Expression:
    """Check X, find its space and the library sizes; cells keep their order. Raises as `Screen.from_parts`.

    Logarithms become log1p values of `config.target_sum` counts a cell where X says of how many they are, and else stay
    what they are; `target_sum` is then None.
    """
    matrix, left_out = _cells_by_genes(X, len(obs), len(var), path), ""
    is_gene = gene_rows(var)
    if not is_gene.all():
        matrix, others, var = matrix[:, is_gene], [str(name) for name in var.index[~is_gene]], var[is_gene]
        left_out = f"{len(others):,} columns of X are no genes and are left out: {few(others)}"
    genes = genes_of(var)
    space = space_of(matrix, genes.names, declared, path)
    known = space.total is not None
    target_sum = (config.target_sum or space.total) if known else None
    values = matrix
    if space is not RAW_COUNTS:
        values = renormalised(matrix, space, target_sum, lambda row: f"cell {str(obs.index[row])!r}")
    if known or (space.bases and not space.whole):
        same = np.array_equal(values.data, matrix.data.astype(np.float32))
        preprocessing = Preprocessing("log1p", target_sum, config.scale, config.library_size_col)
        if config.library_size_col is not None:
            obs_column(obs, config.library_size_col, "data.library_size_col", path)
            left_out += "; " * bool(left_out) + (
                f"X holds logarithms, of which obs column {config.library_size_col!r} says nothing: it is not used"
            )
        values, library = values.astype(np.float32), np.ones(len(obs), np.float32)
    else:
        same = space is RAW_COUNTS
        preprocessing = Preprocessing("counts", config.target_sum or 1e4, config.scale, config.library_size_col)
        if preprocessing.library_size_col is None:
            library = library_sizes(values if space.bases else matrix)
        else:
            library = _library_column(obs, preprocessing.library_size_col, path)
            refuse_small_libraries(library, values, preprocessing.library_size_col, path)
        largest = values.data.max(initial=0)
        if largest >= 2**32:
            raise ValueError(f"X of {path} holds a count of {largest:.0f}; counts must be under 2**32.")
        values = values.astype(np.uint16 if largest < 2**16 else np.uint32)
    known |= space is RAW_COUNTS
    notes = [left_out, "" if known and same else found(space, target_sum, same)]
    return Expression(values, genes, library, preprocessing, "; ".join(filter(None, notes)), len(genes))


def expression_of(adata: AnnData, preprocessing: Preprocessing) -> Expression:
    """Cells of an AnnData prepared as a model's training cells were.

    Raises
    ------
    ValueError
        X as in `read_expression`; counts given to a model trained on log1p values of nobody knows how many counts.
    """
    expression = read_expression(adata.X, adata.obs, adata.var, "auto", preprocessing, "the given AnnData")
    if preprocessing.input_kind == "log1p" and expression.preprocessing.input_kind == "counts":
        if preprocessing.target_sum is None:
            raise ValueError(
                "X holds counts, but this model was trained on log1p values of nobody knows how many counts a cell; "
                "normalise X as its training data were."
            )
        ones = np.ones(len(expression), np.float32)
        return replace(expression, X=expression.log1p(), library_size=ones, preprocessing=preprocessing)
    return expression


def genes_of(var: pd.DataFrame) -> GeneVocab:
    """Gene names and, where var has such columns, Ensembl ids, or symbols of names that are such ids.

    Raises ValueError on duplicate names.
    """
    names = tuple(var.index.astype(str))
    ids = _first_of(var, ENSEMBL_COLUMNS)
    ensembl = None if ids is None else tuple("" if pd.isna(name) else str(name) for name in ids)
    if 2 * sum(ENSEMBL_ID.fullmatch(name) is not None for name in names[:100]) <= len(names[:100]):
        return GeneVocab(names, ensembl)
    symbols = _first_of(var, SYMBOL_COLUMNS)
    if symbols is None:
        return GeneVocab(names, ensembl)
    of_several = symbols.duplicated(keep=False) | symbols.isna()
    return GeneVocab(names, ensembl or names, tuple(symbols.astype(str).where(~of_several, "")))


def _first_of(var: pd.DataFrame, columns: Sequence[str]) -> pd.Series | None:
    return next((var[column] for column in columns if column in var.columns), None)


def _cells_by_genes(X: Any, n_obs: int, n_vars: int, path: str) -> sparse.csr_matrix:
    matrix = as_csr(X)
    if matrix.shape != (n_obs, n_vars):
        raise ValueError(f"X of {path} is {matrix.shape}; it must be {(n_obs, n_vars)}, cells by genes.")
    return matrix


def _with_median_of(expression: Expression, is_control: np.ndarray, path: str) -> Expression:
    """Normalised to the median library size of the control cells, which always train."""
    if expression.preprocessing.input_kind == "log1p":
        return expression
    median = float(np.median(expression.library_size[is_control]))
    if median <= 0:
        raise ValueError(f"most control cells of {path} have no counts; set data.target_sum to a number.")
    return replace(expression, preprocessing=replace(expression.preprocessing, target_sum=median))


def _library_column(obs: pd.DataFrame, column: str, path: str) -> np.ndarray:
    of_cells = obs_column(obs, column, "data.library_size_col", path)
    values = pd.to_numeric(of_cells, errors="coerce").to_numpy(dtype=np.float64)
    if not (np.isfinite(values) & (values >= 0)).all():
        bad = int(np.argmin(np.isfinite(values) & (values >= 0)))
        raise ValueError(
            f"obs column {column!r} holds {obs[column].iloc[bad]!r} in cell {obs.index[bad]!r}; library sizes must be "
            "finite and not negative."
        )
    return values.astype(np.float32)


def refuse_small_libraries(library: np.ndarray, counts: sparse.csr_matrix, column: str, path: str) -> None:
    """Raises ValueError where library sizes are smaller than the counts of which they are a total."""
    sums = library_sizes(counts)
    if (small := library < sums * (1 - SAME)).any():
        row = int(np.argmax(np.where(small, sums - library, -np.inf)))
        raise ValueError(
            f"obs column {column!r} of {path} is no total of counts: it is smaller than the counts of X in "
            f"{int(small.sum()):,} cells, as {library[row]:g} for {sums[row]:g}. Name the column of all counts of a "
            "cell, or leave it out."
        )


def unique_names(names: pd.Index) -> pd.Index:
    taken, seen, unique = set(names), Counter[str](), []
    for name in names:
        candidate = name
        while seen[name] and candidate in taken:  # "a-1" may be another cell's own name
            candidate = f"{name}-{seen[name]}"
            seen[name] += candidate in taken
        taken.add(candidate)
        seen[name] += 1
        unique.append(candidate)
    return pd.Index(unique)
