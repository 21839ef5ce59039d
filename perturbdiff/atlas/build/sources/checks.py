"""What all sources of an atlas share: checks of values, tables of labels, selectors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from scipy import sparse

from perturbdiff.atlas.format import CONTROL_LABEL
from perturbdiff.config import SourceConfig
from perturbdiff.data.expression import as_csr
from perturbdiff.data.labels import MISSING, amounts, at_dose, check_texts, learned, unit_column
from perturbdiff.data.notation import Notation, Parts, one_unit
from perturbdiff.data.selectors import LABELS, Selectors, plain_fields
from perturbdiff.data.space import LOG1P_MAX, InputKind
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.files import short

DOSE_MARK = "\x1f"  # between a label of a source and its dose
BLOCK = 1 << 17  # values checked together: they stay in the processor's cache
_MIN_WHOLE = 1000  # as many values that are all whole numbers are no log1p values


def checked(
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, genes: GeneVocab, kind: InputKind, detected: bool,
    where: str, cell: Callable[[int], str],
) -> sparse.csr_matrix:  # fmt: skip
    """Rows of a source as CSR with sorted indices and no stored zeros, after one look at every value.

    Unsorted or repeated indices are sorted and summed, as AnnData understands them; stored zeros are left out.

    Parameters
    ----------
    kind, detected
        What the values must be, and whether that was detected on other cells rather than declared.
    where, cell
        For messages: the source, and what the cell of a row is called.

    Returns
    -------
    (n, G), uint16 or uint32 counts, or float32 log1p values.

    Raises
    ------
    ValueError
        Names source, cell, gene and value.
    """
    n_genes = len(genes)
    if not _in_order(indptr, indices, n_genes):
        if len(indices) and not 0 <= indices.min() <= indices.max() < n_genes:
            bad = int(np.argmax((indices < 0) | (indices >= n_genes)))
            raise ValueError(
                f"{where} has the gene index {indices[bad]} in {cell(row_of(bad, indptr))}, of {n_genes} genes; get "
                "or write the file again."
            )
        csr = as_csr(sparse.csr_matrix((values, indices, indptr), (len(indptr) - 1, n_genes)))
        indptr, indices, values = csr.indptr, csr.indices, csr.data
    clean = _counts(values) if kind == "counts" else _log1p(values, detected)
    if clean is None and not values.all():
        csr = as_csr(sparse.csr_matrix((values, indices, indptr), (len(indptr) - 1, n_genes)))
        indptr, indices, values = csr.indptr, csr.indices, csr.data
        clean = _counts(values) if kind == "counts" else _log1p(values, detected)
    if clean is None:
        _refuse(indptr, indices, values, genes, kind, where, cell)
    index_type = np.int32 if len(values) < 2**31 else np.int64
    X = sparse.csr_matrix((len(indptr) - 1, n_genes), dtype=clean.dtype)
    X.data, X.indices, X.indptr = clean, indices.astype(index_type, copy=False), indptr.astype(index_type, copy=False)
    X.has_sorted_indices = X.has_canonical_format = True
    return X


def _in_order(indptr: np.ndarray, indices: np.ndarray, n_genes: int) -> bool:
    """Whether the indices of each row rise and lie within the genes."""
    if len(indices) == 0:
        return True
    starts = indptr[:-1][np.diff(indptr) > 0]
    rises = indices[1:] > indices[:-1]
    rises[starts[1:] - 1] = True  # from one row to the next
    ends = np.append(starts[1:], len(indices)) - 1
    return bool(rises.all() and indices[starts].min() >= 0 and indices[ends].max() < n_genes)


def _counts(values: np.ndarray) -> np.ndarray | None:
    """The values as uint16, or uint32, if all are whole numbers over 0 and under 2**32."""
    if len(values) == 0:
        return values.astype(np.uint16)
    lowest, highest = values.min(), values.max()
    if not (lowest > 0 and highest < 2**32):  # also for NaN
        return None
    counts = np.empty(len(values), np.uint16 if highest < 2**16 else np.uint32)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        whole = counts[start : start + BLOCK]
        np.copyto(whole, block, casting="unsafe")
        if values.dtype.kind == "f" and not np.array_equal(whole, block):
            return None
    return counts


def _log1p(values: np.ndarray, detected: bool) -> np.ndarray | None:
    """The values as float32, if they are over 0, under LOG1P_MAX and, where that was detected, not all whole."""
    if len(values) == 0:
        return values.astype(np.float32)
    if not (values.min() > 0 and values.max() < LOG1P_MAX):
        return None
    if detected and len(values) >= _MIN_WHOLE and (values == np.rint(values)).all():
        return None
    return values.astype(np.float32, copy=False)


def _refuse(
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, genes: GeneVocab, kind: InputKind, where: str,
    cell: Callable[[int], str],
) -> NoReturn:  # fmt: skip
    """Raise ValueError for the first value that is not as it must be."""
    tests = [(~np.isfinite(values), "is not finite"), (values < 0, "is negative (z-scored or scaled data?)")]
    if kind == "counts":
        tests.append((values != np.rint(values), "is no whole number: counts are. Set the source's input_kind: log1p"))
        tests.append((values >= 2**32, "is too large: counts must be under 2**32"))
    else:
        what = f"is too large for a log1p value (under {LOG1P_MAX:g}). Are these counts, or not log-transformed"
        tests.append((values >= LOG1P_MAX, what))
    for wrong, what in tests:
        if wrong.any():
            bad = int(wrong.argmax())
            raise ValueError(
                f"{where} holds {values[bad]:.10g} for gene {genes.names[indices[bad]]!r} in "
                f"{cell(row_of(bad, indptr))}, which {what}; give raw counts or log1p values."
            )
    raise ValueError(
        f"{where} holds only whole numbers from {cell(0)} to {cell(len(indptr) - 2)}, fractions elsewhere; raw counts "
        "and log1p values must not be mixed. Set the source's input_kind if these are log1p values."
    )


def row_of(position: int, indptr: np.ndarray) -> int:
    return int(np.searchsorted(indptr, position, side="right")) - 1


def library_text(kind: InputKind, column: str | None) -> str:
    if kind == "log1p":
        return "none (log1p values)"
    return "row sums" if column is None else f"column {column!r}"


def label_table(
    config: SourceConfig,
    source: str,
    first: int,
    found: Mapping[str, pd.Categorical | None],
    names: np.ndarray,
    extra: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The table of `Source.labels`; a label without a column is that of the whole source."""
    constant = {"perturbation": CONTROL_LABEL, "cell_type": source, "batch": source}
    table: dict[str, Any] = {"row": np.arange(first, first + len(names), dtype=np.int64)}
    for name in LABELS:
        labels = found[name]
        if labels is None:
            labels = coded_as([constant[name]], np.zeros(len(names), np.int32))
        elif name == "perturbation" and (controls := {config.control_label, *config.other_control_labels}) != {
            CONTROL_LABEL
        }:
            taken = labels.categories.get_indexer(pd.Index([CONTROL_LABEL]))[0]
            if taken >= 0 and CONTROL_LABEL not in controls and (codes := labels.codes == taken).any():
                raise ValueError(
                    f"cell {names[int(np.argmax(codes))]!r} of {config.path} has the perturbation {CONTROL_LABEL!r}, "
                    f"but the control label is {config.control_label!r}; {CONTROL_LABEL!r} marks unperturbed cells in "
                    "an atlas: rename the label or set control_label."
                )
            texts = [CONTROL_LABEL if text in controls else text for text in labels.categories]
            labels = coded_as(texts, labels.codes)
        table[name] = labels
    return pd.DataFrame({**table, "cell": names, **(extra or {})})


def categorical(values: Any, column: str, path: str) -> pd.Categorical:
    """Labels as a categorical of str; a missing one is MISSING. Raises ValueError where one is no name."""
    if isinstance(values, pd.Categorical):
        codes, categories = values.codes, values.categories
    else:
        codes, categories = pd.factorize(values)
    texts = pd.Series(categories).astype(str).tolist()
    check_texts(texts, column, path)
    if not (missing := codes < 0).any():
        return coded_as(texts, codes)
    return coded_as([*texts, MISSING], np.where(missing, len(texts), codes))  # `selected` refuses what is left of it


def coded_as(texts: Sequence[str], codes: np.ndarray) -> pd.Categorical:
    """Label `texts[code]` of each code; a text may come twice."""
    merged, unique = pd.factorize(np.array(texts, dtype=object))
    return pd.Categorical.from_codes(merged.astype(np.int32)[codes], pd.Index(unique, dtype=object))


def selector_fields(selector: str, config: SourceConfig) -> dict[str, str]:
    """What a selector asks for, by label; the source's own control label is "control"."""
    wanted = plain_fields(selector)
    if wanted.get("perturbation") == config.control_label:
        wanted["perturbation"] = CONTROL_LABEL
    return wanted


def selector_matches(labels: pd.DataFrame, selector: str, config: SourceConfig) -> np.ndarray:
    """Rows that a selector names: parts in any order, control parts apart."""
    return Selectors(labels, _plain(config)).rows(selector)


def _plain(config: SourceConfig) -> Notation:
    # Every label taken apart, whether its parts stand alone or not: for comparing, all are.
    return Notation((), config.combination_separator, config.dose_separator, _controls(config))


def _controls(config: SourceConfig) -> tuple[str, ...]:
    # That of the atlas first: what control cells are called from `label_table` on.
    return tuple(dict.fromkeys((CONTROL_LABEL, config.control_label, *config.other_control_labels)))


def selected(labels: pd.DataFrame, config: SourceConfig) -> pd.DataFrame:
    """The rows that `cells`, `keep`, `drop` and `where` leave, each perturbation with its dose (`dosed`)."""
    selected = np.ones(len(labels), dtype=bool)
    if config.cells != "all":
        perturbation, notation = labels["perturbation"].array, _plain(config)
        is_control = np.array([not notation.parse(label) for label in perturbation.categories], dtype=bool)
        selected = is_control[perturbation.codes] == (config.cells == "unperturbed")
    if config.keep:
        selected &= np.logical_or.reduce([selector_matches(labels, selector, config) for selector in config.keep])
    for selector in config.drop:
        selected &= ~selector_matches(labels, selector, config)
    if "where" in labels:
        selected &= labels["where"].to_numpy()
    left = labels if selected.all() else labels[selected]
    for name in LABELS:
        if (missing := (left[name] == MISSING).to_numpy()).any():
            raise ValueError(
                f"column {getattr(config, f'{name}_col')!r} of {config.path} has {missing.sum():,} missing values or "
                f"labels {MISSING!r}, the first in cell {left['cell'].iloc[int(missing.argmax())]!r}; every cell needs "
                f"a label: leave the cells out with source.drop=['{'*:' * LABELS.index(name)}{MISSING}'], or fill them."
            )
    return _dosed(left) if "dose" in left else left


def _dosed(labels: pd.DataFrame) -> pd.DataFrame:
    # The dose is a part of the label from here on, behind a mark that no label has.
    perturbation = labels["perturbation"].array
    doses = np.where(perturbation == CONTROL_LABEL, 0.0, labels["dose"].to_numpy())
    if (bad := ~(np.isfinite(doses) & ((doses > 0) | (perturbation == CONTROL_LABEL)))).any():
        row = int(bad.argmax())
        raise ValueError(
            f"cell {labels['cell'].iloc[row]!r} received {perturbation[row]!r} at dose {labels['dose'].iloc[row]}; "
            "doses must be finite and greater than 0."
        )
    unit_codes, units = pd.factorize(labels["dose_unit"].to_numpy())
    unit_codes = np.where(perturbation == CONTROL_LABEL, 0, unit_codes)
    triples, codes = np.unique(np.stack([perturbation.codes, doses, unit_codes]), axis=1, return_inverse=True)
    written = []
    for code, dose, unit in triples.T.tolist():
        text = str(perturbation.categories[int(code)])
        behind = f"{DOSE_MARK}{dose!r}{DOSE_MARK}{units[int(unit)]}"
        written.append(text if text == CONTROL_LABEL else text + behind)
    return labels.assign(perturbation=coded_as(written, codes.ravel()))


def parsed(
    labels: Collection[str], config: SourceConfig, names: Collection[str]
) -> tuple[dict[str, Parts], str | None]:
    """What each label of a source stands for, as `labels` gives them, and the unit of the doses that it holds itself.

    `names` are perturbations that a combination may be of, besides those that stand alone here.
    """
    split = {label: label.partition(DOSE_MARK) for label in labels}
    texts = {text for text, _, _ in split.values()}
    notation, lists = learned(texts, config.combination_separator, config.dose_separator, _controls(config), names)
    parts = {text: lists.get(text) or notation.parse(text) for text in texts}
    doses = {label: dose.partition(DOSE_MARK) for label, (_, _, dose) in split.items() if dose}
    unit = one_unit({notation.dose_unit, *(unit for _, _, unit in doses.values())}, config.path)
    return {
        label: at_dose(parts[text], float(doses[label][0])) if label in doses else parts[text]
        for label, (text, _, _) in split.items()
    }, unit


def extra_columns(config: SourceConfig, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Of the rows: `dose` and its unit, and whether `where` holds; from the obs columns of `extra_names`."""
    extra: dict[str, Any] = {}
    if config.dose_col is not None:
        beside = unit_column(config.dose_col, columns)
        units = None if beside is None else pd.Series(columns[beside])
        extra["dose"], extra["dose_unit"] = amounts(pd.Series(columns[config.dose_col]), units)
    if config.where:
        extra["where"] = np.logical_and.reduce(
            [
                (pd.Series(columns[name]).astype(str) == value).to_numpy()
                for name, value in map(_condition, config.where)
            ]
        )
    return extra


def extra_names(config: SourceConfig, there: Collection[str]) -> set[str]:
    """Obs columns that are read besides those of labels, of a file that has those that are `there`."""
    of_doses = set() if config.dose_col is None else {config.dose_col, unit_column(config.dose_col, there)}
    return {name for name, _ in map(_condition, config.where)} | {name for name in of_doses if name is not None}


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"where {text!r} must be COLUMN=VALUE, as is_primary_data=True.")
    return column, value


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns what readers raise on a damaged file, types of their own among it, into a ValueError of one line."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged or not of its kind ({short(error)}); get or write it again.") from error


def naming(path: Path, make: Any) -> Any:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
