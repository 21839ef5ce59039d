"""Labels of the cells of one file: read from obs once, checked, parsed to conditions, written in one way."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from perturbdiff.config import DataConfig
from perturbdiff.data.dialects import (
    COLUMNS,
    CONTROL_WORDS,
    DOSE_COLUMNS,
    NO_PERTURBATION,
    UNIT_COLUMNS,
    understood,
)
from perturbdiff.data.notation import NO_LABEL, Notation, Parts, one_unit, plain_unit, split_dose
from perturbdiff.data.selectors import GRAMMAR, LABELS, Selectors
from perturbdiff.data.vocab import nearest
from perturbdiff.files import few

MISSING = "nan"  # what a cell without a label is called by selectors of data.drop
ALL = "all"  # the only label of a column that is null
MAX_LABEL = 1000  # characters
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
AMOUNT = re.compile(r"\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*((?:[^\W\d_]|%)[\w/%^-]*)?\s*")  # a number, its unit
DOSE = "@"  # stands before a dose where nothing else is asked for


@dataclass(frozen=True, repr=False)
class CellLabels:
    """What is known of the cells by their labels.

    obs
        `perturbation`, `cell_type`, `batch` (str) of the cells that stay.
    kept
        (n_obs,) bool: cells that stay.
    notation
        What the perturbations' labels mean.
    config
        The settings that they were read by, columns of a known kind of file filled in.
    notes
        What was found, for people.
    """

    obs: pd.DataFrame
    kept: np.ndarray
    notation: Notation
    config: DataConfig
    notes: tuple[str, ...]


def read_labels(obs: pd.DataFrame, config: DataConfig, path: str, names: Collection[str] = ()) -> CellLabels:
    """The conditions of cells.

    Parameters
    ----------
    names
        Besides labels that stand alone, names of perturbations that a combination may be of: genes.

    Raises
    ------
    KeyError
        Obs columns are missing; the message names all of them, and those that are there.
    ValueError
        A label or dose is missing or cannot be; no cell has the control label; data.drop names no cell.
    """
    config, dialect = understood(config, obs)
    _refuse_missing_columns(obs, config, path)
    notes = [dialect] if dialect else []
    for name in LABELS:
        own = getattr(config, f"{name}_col")
        if own != name and name in obs.columns:
            what = "are of one" if own is None else f"is that of obs column {own!r}"
            notes.append(f"obs column {name!r} is not read: the {name} of cells {what} (data.{name}_col)")
    raw = {name: _Column.read(obs, getattr(config, f"{name}_col")) for name in LABELS}
    for column in raw.values():
        check_texts(column.texts, column.name, path)
    controls = tuple(dict.fromkeys((config.control_label, *config.other_control_labels)))
    _refuse_missing_controls(raw["perturbation"], controls, config, path)
    perturbations, notation, kept = _conditions(raw, controls, obs, config, path, names)
    table = pd.DataFrame({"perturbation": perturbations, **{name: raw[name].values for name in LABELS[1:]}})
    for name in LABELS:
        _refuse_missing(raw[name], name, kept, obs, path)
    if (n := int((~kept).sum())) and kept.any():
        notes.append(f"{n:,} cells are left out by data.drop={list(config.drop)}")
    if not kept.any():
        raise ValueError(f"data.drop {list(config.drop)} leaves no cell of {path}; drop less.")
    table = table[kept].reset_index(drop=True)
    notes += [
        f"no cell has the control label {label!r}" for label in controls if label not in raw["perturbation"].texts
    ]
    notes += label_notes(set(table["perturbation"].unique()), notation)
    for name, kinds in (("cell_type", "cell types"), ("batch", "batches")):
        if words := sorted(label for label in table[name].unique() if label.strip().lower() in NO_LABEL):
            notes.append(
                f"{few([repr(word) for word in words])} are taken for {kinds}; data.drop leaves such cells out"
            )
    if config.dose_col is None and notation.dose_separator is None:
        notes += _pooled_doses(obs[kept], table["perturbation"].to_numpy() != controls[0])
    return CellLabels(table, kept, notation, config, tuple(notes))


def check_texts(labels: Iterable[str], column: str | None, path: str) -> None:
    """Refuse labels that are no names: with control characters, or very long. Raises ValueError."""
    for label in labels:
        if len(label) > MAX_LABEL or CONTROL_CHARACTER.search(label):
            what = f"has {len(label):,} characters" if len(label) > MAX_LABEL else "holds a control character"
            raise ValueError(
                f"obs column {column!r} of {path}: label {label[:40]!r} {what}; rename it, names have at most "
                f"{MAX_LABEL:,} characters that can be shown."
            )


@dataclass(frozen=True)
class _Column:
    # Labels of all cells as codes; code -1 has none.
    name: str | None
    codes: np.ndarray
    texts: np.ndarray

    @classmethod
    def read(cls, obs: pd.DataFrame, name: str | None) -> _Column:
        if name is None:
            return cls(None, np.zeros(len(obs), np.int64), np.array([ALL], dtype=object))
        codes, texts = pd.factorize(obs[name])
        return cls(name, codes, pd.Index(texts).astype(str).to_numpy(dtype=object))

    @property
    def values(self) -> np.ndarray:
        return np.append(self.texts, MISSING)[self.codes]


def _conditions(
    raw: Mapping[str, _Column],
    controls: Sequence[str],
    obs: pd.DataFrame,
    config: DataConfig,
    path: str,
    names: Collection[str],
) -> tuple[np.ndarray, Notation, np.ndarray]:
    """(n_obs,) the one way to write each cell's perturbation, the notation it is written in, and which cells stay."""
    column = raw["perturbation"]
    texts = [*column.texts.tolist(), MISSING]
    used = [texts[i] for i in np.unique(column.codes)]
    in_labels = None if config.dose_col else config.dose_separator
    notation, pairs = learned(used, config.combination_separator, in_labels, controls, names)
    parsed = [pairs.get(text) or notation.parse(text) for text in texts]
    codes = np.where(column.codes < 0, len(texts) - 1, column.codes)
    if config.dose_col is not None:
        is_control = np.array([not parts for parts in parsed])[codes]
        undosed = np.array([notation.text(parts) for parts in parsed], dtype=object)[codes]
        kept = _kept(raw, undosed, notation, obs, config, path, certain=False)
        doses, unit = _doses(obs, config.dose_col, kept & ~is_control & (column.codes >= 0), column.values, path)
        notation = replace(notation, dose_unit=one_unit({notation.dose_unit, unit}, path))
        keys, codes = np.unique(np.stack([codes, doses]), axis=1, return_inverse=True)
        parsed = [at_dose(parsed[int(code)], dose) if dose else parsed[int(code)] for code, dose in keys.T]
        codes = codes.ravel()
    if any(dose is not None for parts in parsed for _, dose in parts):
        notation = replace(notation, dose_separator=config.dose_marker or DOSE)
    written = np.array([notation.text(parts) for parts in parsed], dtype=object)[codes]
    return written, notation, _kept(raw, written, notation, obs, config, path)


def learned(
    labels: Collection[str],
    combination_separator: str | None,
    dose_separator: str | None,
    controls: Sequence[str],
    names: Collection[str],
) -> tuple[Notation, dict[str, Parts]]:
    """`Notation.learned` of labels, and what those stand for that are Tahoe-100M's lists of drugs with doses."""
    found = {text: parts for text in labels if text not in controls and (parts := _tuples(text)) is not None}
    unit = one_unit({plain_unit(unit) for triples in found.values() for *_, unit in triples}, "these labels")
    pairs: dict[str, Parts] = {
        text: tuple((name, dose) for name, dose, _ in triples) for text, triples in found.items()
    }
    others = [text for text in labels if text not in pairs]
    named = {name for parts in pairs.values() for name, _ in parts}
    notation = Notation.learned(others, combination_separator, dose_separator, controls, {*names, *named})
    return replace(notation, dose_unit=unit), pairs


def _tuples(text: str) -> tuple[tuple[str, float, str], ...] | None:
    # "[('A', 0.5, 'uM')]", as Tahoe-100M writes drugs with their doses.
    if not text.startswith("[("):
        return None
    try:
        found = [(str(name), float(dose), str(unit)) for name, dose, unit in ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    for name, dose, _ in found:
        split_dose(f"{name}@{dose!r}", "@")  # refuses one that cannot be
    return tuple(sorted(set(found)))


def at_dose(parts: Parts, dose: float) -> Parts:
    """The parts at a dose; those of a combination get the same."""
    return tuple((name, float(dose)) for name, _ in parts)


def _doses(
    obs: pd.DataFrame, column: str, perturbed: np.ndarray, labels: np.ndarray, path: str
) -> tuple[np.ndarray, str | None]:
    """(n_obs,) float64 doses, 0 for the others, and their unit."""
    beside = unit_column(column, obs.columns)
    values, units = amounts(
        obs_column(obs, column, "data.dose_col", path), None if beside is None else obs_column(obs, beside, "", path)
    )
    unit = one_unit(set(units[perturbed].tolist()), f"obs column {column!r} of {path}")
    if bad := np.flatnonzero(perturbed & ~(np.isfinite(values) & (values > 0))).tolist():
        raise ValueError(
            f"obs column {column!r} holds {obs[column].iloc[bad[0]]!r} in cell {obs.index[bad[0]]!r}, which received "
            f"{labels[bad[0]]!r}; doses must be finite and greater than 0."
        )
    return np.where(perturbed, values, 0.0), unit


def unit_column(dose_col: str, columns: Collection[str]) -> str | None:
    """The obs column that says the units of another, by its name."""
    return next((name for name in (f"{dose_col}_unit", f"{dose_col}_units", *UNIT_COLUMNS) if name in columns), None)


def amounts(column: pd.Series, units: pd.Series | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(n,) float64 numbers of a column that may have units behind them, as "0.2 uM", and these; NaN where is none.

    Of float32 the number that is shown: 0.1 is meant, and not the nearest float32. A column of `units` says those of
    numbers that have none.
    """
    codes, texts = pd.factorize(column.astype(str))
    found = [AMOUNT.fullmatch(text) for text in texts]
    values = pd.to_numeric(pd.Series([match[1] if match else "nan" for match in found]), errors="coerce").to_numpy()
    behind = np.array([plain_unit((match and match[2]) or "") for match in found], dtype=object)[codes]
    if units is None:
        return values[codes], behind
    of, texts = pd.factorize(units.astype(str))
    return values[codes], np.where(
        behind == "", np.array([plain_unit(text) for text in texts], dtype=object)[of], behind
    )


def obs_column(obs: pd.DataFrame, column: str, setting: str, path: str) -> pd.Series:
    """An obs column. Raises KeyError where it is missing; the message lists those there."""
    if column not in obs.columns:
        raise KeyError(f"obs column {column!r} not in {path}; found {sorted(map(str, obs.columns))}. Set {setting}.")
    return obs[column]


def _kept(
    raw: Mapping[str, _Column],
    perturbations: np.ndarray,
    notation: Notation,
    obs: pd.DataFrame,
    config: DataConfig,
    path: str,
    certain: bool = True,
) -> np.ndarray:
    """(n_obs,) True for cells that data.drop leaves; a selector that names none is an error where that is `certain`."""
    kept = np.ones(len(perturbations), dtype=bool)
    if not config.drop:
        return kept
    others = obs.drop(columns=[name for name in LABELS if name in obs.columns]).reset_index(drop=True)
    named = {"perturbation": perturbations, **{name: raw[name].values for name in LABELS[1:]}}
    selectors = Selectors(others.assign(**named), notation)
    for selector in config.drop:
        dropped = selectors.rows(selector)
        if certain and not dropped.any():
            raise ValueError(f"data.drop {selector!r} names no cell of {path}. {GRAMMAR}")
        kept &= ~dropped
    return kept


def _refuse_missing_columns(obs: pd.DataFrame, config: DataConfig, path: str) -> None:
    wanted = {name: getattr(config, name) for name in COLUMNS}
    missing = {name: column for name, column in wanted.items() if column is not None and column not in obs.columns}
    if missing:
        settings = " ".join(f"data.{name}=..." for name in missing)
        alike = [name for name in missing if name != "perturbation_col"]
        kind = f"; {' and '.join(alike)} are null where all cells are alike" if alike else ""
        raise KeyError(
            f"obs column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing.values()))} not in {path}; "
            f"found {sorted(map(str, obs.columns))}. Set {settings}{kind}."
        )


def _refuse_missing_controls(column: _Column, controls: Sequence[str], config: DataConfig, path: str) -> None:
    present = set(column.texts.tolist())
    if not present & set(controls):
        likely = sorted(label for label in present if label.lower() in CONTROL_WORDS)
        hint = f"data.control_label={likely[0]}" if likely else "data.control_label"
        hint += f" {shlex.quote(f'data.other_control_labels={json.dumps(likely[1:])}')}" if likely[1:] else ""
        raise ValueError(
            f"no cell of {path} has the control label {config.control_label!r} in obs column "
            f"{config.perturbation_col!r}; {nearest(config.control_label, present)}. Set {hint}."
        )


def _refuse_missing(column: _Column, role: str, kept: np.ndarray, obs: pd.DataFrame, path: str) -> None:
    missing = kept & (column.codes < 0)
    if missing.any():
        selector = "*:" * LABELS.index(role) + MISSING
        raise ValueError(
            f"obs column {column.name!r} of {path} has {missing.sum()} missing values, the first in cell "
            f"{obs.index[int(missing.argmax())]!r}; every cell needs a label: fill them, or leave the cells "
            f"out with data.drop=['{selector}']."
        )


def _pooled_doses(obs: pd.DataFrame, perturbed: np.ndarray) -> list[str]:
    notes = []
    for name in DOSE_COLUMNS:
        if name in obs.columns:
            doses = np.unique(amounts(obs[name])[0][perturbed])
            if (n := int((doses > 0).sum())) > 1:
                notes.append(
                    f"{n} doses of obs column {name!r} are one condition; data.dose_col={name} tells them apart"
                )
    return notes


def odd_labels(labels: Collection[str], notation: Notation) -> tuple[list[str], list[str]]:
    """Labels of perturbed cells that are hardly perturbations, and such that mostly mark controls."""
    perturbed = sorted(label for label in labels if notation.parse(label))
    return tuple(  # type: ignore[return-value]
        [label for label in perturbed if label.strip().lower() in words] for words in (NO_PERTURBATION, CONTROL_WORDS)
    )


def label_notes(labels: Collection[str], notation: Notation, section: str = "data") -> list[str]:
    """What looks wrong about perturbations, with the settings of a section that would mend it."""
    perturbed = sorted(label for label in labels if notation.parse(label))
    notes = []
    for words, setting, does in zip(
        odd_labels(labels, notation), ("drop", "other_control_labels"),
        ("leaves such cells out", "makes controls of them"), strict=True,
    ):  # fmt: skip
        if words:
            word = shlex.quote(f"{section}.{setting}={json.dumps(words)}")
            notes.append(f"{few([repr(w) for w in words])} are taken for perturbations; {word} {does}")
    separator = notation.combination_separator
    whole = [label for label in perturbed if separator and any(separator in name for name, _ in notation.parse(label))]
    if whole:
        notes.append(f"{few([repr(label) for label in whole])} are taken for single perturbations: not all parts stand "
                     "alone elsewhere")  # fmt: skip
    return notes
