"""Held-out conditions: which cells train, validate and test, written down with a hash.

`data.selectors` says how perturbed cells are named. Control cells always train. Of a screen cells are split, of an
atlas whole conditions.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from perturbdiff.config import SplitConfig
from perturbdiff.data.identity import cells_sha256
from perturbdiff.data.notation import Notation
from perturbdiff.data.rng import cell_order_key, numpy_generator
from perturbdiff.data.screen import Screen
from perturbdiff.data.selectors import ANY, LABELS, Selectors
from perturbdiff.data.split_files import SOURCE, read_split_file
from perturbdiff.files import few, json_sha256, read_json, short, write_json

PARTS = ("train", "validation", "test")
MAX_BYTES = 1 << 32  # of a split.json
MIN_CONDITIONS_TO_VALIDATE = 10


class Labelled(Protocol):
    """What can be split, row by row: a screen by cells, atlases by conditions.

    obs
        Labels of each row, `perturbation`, `cell_type`, `batch` and perhaps others.
    is_control, n_cells
        (n_rows,)
    notation
        What the labels of perturbations mean.
    """

    @property
    def path(self) -> str: ...
    @property
    def obs(self) -> pd.DataFrame: ...
    @property
    def is_control(self) -> np.ndarray: ...
    @property
    def n_cells(self) -> np.ndarray: ...
    @property
    def notation(self) -> Notation: ...


@dataclass(frozen=True)
class Split:
    """Which rows (cells of a screen, conditions of atlases) train, validate and test; boolean (n_rows,) each.

    train
        Of control cells, all but those that measure the truth of held-out conditions (`truth_controls`).
    sha256
        Of the split.json that it was read from; None for one that was made here.
    notes
        What may surprise, for people.
    """

    config: SplitConfig
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    sha256: str | None = None
    notes: tuple[str, ...] = ()

    def as_json(self, screen: Labelled) -> dict[str, Any]:
        """Selectors, conditions with their number of cells, a screen's held-out cells by name with what they are, and a
        hash of it all.
        """
        content: dict[str, Any] = {
            "format_version": 1,
            "screen" if isinstance(screen, Screen) else "atlases": screen.path,
            "hold_out": list(self.config.hold_out),
            "validation": list(self.config.validation),
            **({"train": list(self.config.train)} if self.config.train else {}),
            "conditions": {part: _conditions(screen, getattr(self, part)) for part in PARTS},
        }
        if isinstance(screen, Screen):
            cells = {part: screen.obs.index[getattr(self, part)].tolist() for part in ("validation", "test")}
            content["content"] = _content(screen, cells)
            content["cells"] = {**cells, "controls": screen.obs.index[screen.is_control & ~self.train].tolist()}
            content["n_cells"] = len(screen)
        return {**content, "sha256": json_sha256(content)}


def make_split(
    screen: Labelled,
    config: SplitConfig,
    seed: int,
    marginal: np.ndarray | None = None,
    known: Sequence[str] = LABELS,
) -> Split:
    """Apply the selectors of `config`, those for training last; with none for validation, take a fraction of whole
    training conditions. Then validate on a part of the cells of those that train, where that is asked for.

    Rows where `marginal` (n_rows,) train without labels: they may be held out but are never taken for validation.
    `known` are the labels that a model will know: cells that agree in these are validated together, as one that
    trained would give the others away.

    Raises
    ------
    ValueError
        A selector matches no perturbed cell (the message lists the nearest), all of `validation` is held out, or
        nothing is left to train on; cells are to be taken of atlases.
    """
    if screen.is_control.all() and marginal is None:
        raise ValueError("there are control cells only; give a screen that has perturbed cells too, or an atlas.")
    config, notes = _with_file(screen, config)
    kept_in = _any(screen, config.train, "split.train")
    test = _any(screen, config.hold_out, "hold-out") & ~kept_in
    validation = _any(screen, config.validation, "validation") & ~test & ~kept_in
    if config.hold_out and not test.any():
        raise ValueError(
            f"split.train {list(config.train)} leaves nothing held out of split.hold_out {list(config.hold_out)}."
        )
    if config.validation and not validation.any():
        raise ValueError(
            f"split.validation {list(config.validation)} is held out by split.hold_out {list(config.hold_out)}; "
            "validate on other conditions."
        )
    if not config.validation:
        candidates = ~test & ~kept_in & ~screen.is_control & (True if marginal is None else ~marginal)
        validation = _random_conditions(screen, candidates, config.validation_fraction, seed, known)
    train = ~test & ~validation
    apart = _random_cells(screen, train & ~kept_in & ~screen.is_control, config.validation_cells, seed, known)
    if isinstance(screen, Screen):
        train &= ~truth_controls(screen, test, known)
    if not (train & (~screen.is_control if marginal is None else ~screen.is_control | marginal)).any():
        raise ValueError(
            f"split.hold_out {list(config.hold_out)} and validation leave no perturbed cell to train on; hold out less."
        )
    for cells, what in ((test, "held out"), (validation, "for validation")):
        notes += _trained_in_part(screen, cells, train, what, known)
    train, validation = train & ~apart, validation | apart
    return Split(config, train, validation, test, notes=(*notes, *_left_combinations(screen, test, train)))


def control_halves(screen: Screen, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the controls of a context in two halves, by a hash of their names.

    Predictions start from the first one, and the true change is measured from the second, which nothing is trained on:
    noise of cells that are in both would look like a response. Both hold the same cell where there is only one.
    """
    if len(rows) == 1:
        return rows, rows
    order = rows[np.argsort(cell_order_key(screen.obs.index[rows].to_numpy(), seed=1), kind="stable")]
    return np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])


def truth_controls(screen: Screen, test: np.ndarray, known: Sequence[str] = LABELS) -> np.ndarray:
    """(n_cells,) the second of `control_halves` of each context that holds `test` cells; contexts by `known` labels."""
    context = [name for name in known if name != "perturbation"]
    groups = screen.obs.groupby(context, observed=True).ngroup().to_numpy()
    reserved = np.zeros(len(screen), dtype=bool)
    for group in np.unique(groups[test & ~screen.is_control]):
        rows = np.flatnonzero(screen.is_control & (groups == group))
        if len(rows) > 1:
            reserved[control_halves(screen, rows)[1]] = True
    return reserved


def write_split(split: Split, screen: Labelled, path: Path) -> None:
    write_json(path, split.as_json(screen))


def read_split(path: str | Path, screen: Screen) -> Split:
    """The split of a `split.json`, for the screen it was made for.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; as `split_of`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; training writes it as split.json into the run folder.")
    try:
        stored = read_json(Path(path), MAX_BYTES)
    except ValueError as error:
        raise ValueError(f"{path} is not a split.json ({short(error)}).") from error
    return split_of(stored, screen, str(path))


def split_of(stored: Any, screen: Screen, where: str) -> Split:
    """The split that the content of a split.json says.

    Raises
    ------
    ValueError
        Not a split, changed by hand, of another version, or with cells that the screen lacks or has with other values.

    Warns where the values cannot be compared, because they are log1p values of another number of counts a cell.
    """
    try:
        stored = dict(stored)
        version, sha = stored["format_version"], stored.pop("sha256")
        if "cells" not in stored:
            raise ValueError("it was made for an atlas, whose cells are not listed; give one made for a screen")
        cells = {part: list(map(str, stored["cells"][part])) for part in ("validation", "test")}
        reserved = list(map(str, stored["cells"].get("controls", ())))
        n_cells = int(stored.get("n_cells", len(screen)))
        hold_out, kept_in, chosen = (
            [str(s) for s in stored.get(key, ())] for key in ("hold_out", "train", "validation")
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is not a split.json ({type(error).__name__}: {error}).") from error
    if version != 1:
        raise ValueError(f"{where} has format_version {version}; this version reads 1. Update perturbdiff.")
    if sha != json_sha256(stored):
        raise ValueError(f"{where} does not match its own sha256: it was changed. Take the one of the run folder.")
    parts = {}
    for part in ("validation", "test"):
        parts[part] = screen.obs.index.isin(cells[part])
        if missing := sorted({*cells[part]} - {*screen.obs.index[parts[part]]}):
            raise ValueError(
                f"{where} names {len(cells[part])} {part} cells, {screen.path} lacks {len(missing):,} of them "
                f"({few(missing)}); give the screen the split was made for."
            )
    _refuse_other_values(stored.get("content"), _content(screen, cells), where, screen)
    if len(screen) > n_cells:
        raise ValueError(
            f"{screen.path} has {len(screen):,} cells and {where} was made of {n_cells:,}: of the others nobody knows "
            "whether they were held out. Give the screen of the run, read as there."
        )
    train = ~parts["validation"] & ~parts["test"] & ~(screen.obs.index.isin(reserved) & screen.is_control)
    config = SplitConfig(hold_out=hold_out, train=kept_in, validation=chosen)
    return Split(config, train, parts["validation"], parts["test"], sha)


def _content(screen: Screen, cells: dict[str, list[str]]) -> dict[str, Any]:
    """What the held-out cells are: hash of X with the library sizes, and of log1p values, of how many counts a cell."""
    preprocessing = screen.expression.preprocessing
    return {
        "n_genes": len(screen.expression.genes),
        "target_sum": preprocessing.target_sum if preprocessing.input_kind == "log1p" else None,
        "sha256": cells_sha256(screen, [*cells["validation"], *cells["test"]]),
    }


def _refuse_other_values(then: Any, now: dict[str, Any], path: str | Path, screen: Screen) -> None:
    if then is None or then == now:  # None: written before there was one
        return
    if not (
        isinstance(then, dict)
        and isinstance(then.get("n_genes"), int)
        and isinstance(then.get("target_sum", ""), int | float | None)
    ):
        raise ValueError(f"{path} does not say what its cells hold (content is {str(then)[:80]!r}); take it anew.")
    if None not in (then["target_sum"], now["target_sum"]) and then["target_sum"] != now["target_sum"]:
        warnings.warn(
            f"whether the cells of {screen.path} are those of {path} is not known: they became log1p values of "
            f"{now['target_sum']:,.6g} counts a cell, and were such of {then['target_sum']:,.6g} (data.target_sum)",
            UserWarning,
            stacklevel=3,
        )
        return
    differ = "X differs" if then["n_genes"] == now["n_genes"] else f"{now['n_genes']:,} genes, not {then['n_genes']:,}"
    raise ValueError(
        f"the held-out cells of {screen.path} have other values than those that {path} was made of ({differ}); give "
        "the screen of the run, read as there (data.layer, data.input_kind, data.library_size_col), or train on this "
        "one with another --out."
    )


def select_cells(screen: Labelled, selector: str, purpose: str = "hold-out") -> np.ndarray:
    """Perturbed cells that a selector names, boolean (n_cells,). Raises ValueError where there are none."""
    return _any(screen, [selector], purpose)


def _any(screen: Labelled, selectors: Sequence[str], purpose: str) -> np.ndarray:
    chosen = np.zeros(len(screen.obs), dtype=bool)
    perturbed = Selectors(screen.obs, screen.notation, ~screen.is_control)
    for selector in selectors:
        named = perturbed.rows(selector)
        if not named.any():
            raise ValueError(f"{purpose} {perturbed.explain(selector)}")
        chosen |= named
    return chosen


def _with_file(screen: Labelled, config: SplitConfig) -> tuple[SplitConfig, list[str]]:
    """The settings with the conditions of their split file that are there, and how many are not."""
    if config.file is None:
        return config, []
    perturbed, selected = Selectors(screen.obs, screen.notation, ~screen.is_control), read_split_file(config.file)
    sources = set(screen.obs["source"].astype(str)) if "source" in screen.obs else set[str]()
    for part, selectors in selected.items():  # of data that know no such source, the cell type alone counts
        selected[part] = [s if s.rpartition(SOURCE)[2] in sources else s.partition(SOURCE)[0] for s in selectors]
    here = {part: [s for s in selectors if perturbed.rows(s).any()] for part, selectors in selected.items()}
    absent = [s for part, selectors in selected.items() for s in sorted({*selectors} - {*here[part]})]
    if not here["hold_out"] and selected["hold_out"]:
        raise ValueError(
            f"{screen.path} has none of the {len(selected['hold_out']):,} conditions that {config.file} holds out; "
            f"{perturbed.explain(selected['hold_out'][0])}"
        )
    config = replace(
        config,
        hold_out=[*config.hold_out, *here["hold_out"]],
        validation=[*config.validation, *here["validation"]],
        file=None,
    )
    return config, [
        f"{len(absent):,} conditions of the split file are not in the data: {few(absent)}"
    ] if absent else []


def _left_combinations(screen: Labelled, test: np.ndarray, train: np.ndarray) -> list[str]:
    """Of each perturbation that is held out everywhere: combinations of it that train, for people."""
    perturbation = screen.obs["perturbation"].to_numpy(dtype=object)
    parse = screen.notation.parse
    trained = {label: {name for name, _ in parse(label)} for label in set(perturbation[train & ~screen.is_control])}
    alone = {names[0][0] for label in set(perturbation[test]) if len(names := parse(label)) == 1}
    alone -= {name for names in trained.values() if len(names) == 1 for name in names}
    notes = []
    for name in sorted(alone):
        if left := sorted(label for label, names in trained.items() if name in names):
            n_cells = int(screen.n_cells[train & np.isin(perturbation, left)].sum())
            notes.append(
                f"{name} is held out, but {n_cells:,} cells of {few(left)} train; "
                f"{name}{screen.notation.combination_separator}{ANY} holds out every condition that has it"
            )
    return notes


def _trained_in_part(
    screen: Labelled, cells: np.ndarray, train: np.ndarray, what: str, known: Sequence[str]
) -> list[str]:
    # Only batches can tell such conditions from those that train, where the model knows none.
    if set(known) == set(LABELS):
        return []
    groups = screen.obs.groupby(list(known), observed=True).ngroup().to_numpy()
    perturbed = ~screen.is_control
    shared = np.intersect1d(groups[cells & perturbed], groups[train & perturbed])
    if not len(shared):
        return []
    rows = [int(np.argmax(groups == group)) for group in shared[:5]]
    names = [":".join(screen.obs.iloc[row][list(known)].astype(str)) for row in rows]
    more = f" and {len(shared) - len(rows)} more" if len(shared) > len(rows) else ""
    return [
        f"{', '.join(names)}{more}: cells of some batches are {what}, and cells of others train; controls match by "
        "cell type, so the model knows no batches and has seen these conditions"
    ]


def _random_conditions(
    screen: Labelled, candidates: np.ndarray, fraction: float, seed: int, known: Sequence[str]
) -> np.ndarray:
    # Whole conditions: cells of a trained condition would say nothing about transfer. One that is held out in part is
    # not validated in another.
    groups = screen.obs.groupby(list(known), observed=True).ngroup().to_numpy()
    conditions = np.unique(groups[candidates])
    n = int(len(conditions) * fraction)
    if len(conditions) < MIN_CONDITIONS_TO_VALIDATE or n == 0:
        return np.zeros(len(screen.obs), dtype=bool)
    perturbation = screen.obs["perturbation"].to_numpy()[np.unique(groups, return_index=True)[1]]  # by group number
    left = Counter(perturbation[conditions])
    chosen: list[int] = []
    for condition in numpy_generator(seed, "validation conditions").permutation(conditions):
        if len(chosen) < n and left[perturbation[condition]] > 1:  # what was never trained could not be scored
            left[perturbation[condition]] -= 1
            chosen.append(condition)
    return candidates & np.isin(groups, chosen)


def _random_cells(screen: Labelled, candidates: np.ndarray, part: float, seed: int, known: Sequence[str]) -> np.ndarray:
    # Of each condition, of which some always train: what a few cells say of others like them, where no condition can be
    # spared.
    chosen = np.zeros(len(screen.obs), dtype=bool)
    if part == 0:
        return chosen
    if not isinstance(screen, Screen):
        raise ValueError(f"split.validation_cells ({part}) is of a screen; validate on conditions of atlases.")
    groups = screen.obs.groupby(list(known), observed=True).ngroup().to_numpy()
    generator = numpy_generator(seed, "validation cells")
    for group in np.unique(groups[candidates]):
        rows = generator.permutation(np.flatnonzero(candidates & (groups == group)))
        chosen[rows[: min(round(part * len(rows)), len(rows) - 1)]] = True
    return chosen


def _conditions(screen: Labelled, cells: np.ndarray) -> list[dict[str, Any]]:
    perturbed = cells & ~screen.is_control
    chosen = screen.obs.loc[perturbed, list(LABELS)].assign(n_cells=screen.n_cells[perturbed])
    sizes = chosen.groupby(list(LABELS), observed=True)["n_cells"].sum()
    return [{**dict(zip(LABELS, key, strict=True)), "n_cells": int(n)} for key, n in sizes.items()]
