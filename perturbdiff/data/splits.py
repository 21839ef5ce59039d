"""Held-out conditions: which cells train, validate and test, written down with a hash.

A selector names perturbed cells: `PERTURBATION`, `PERTURBATION:CELL_TYPE`, `PERTURBATION:CELL_TYPE:BATCH` (`*` is
any), or `COLUMN=VALUE` with any obs column, as in `batch=rep_3`. Control cells always train. Of a screen cells are
split, of an atlas whole conditions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from perturbdiff.config import SplitConfig
from perturbdiff.data.rng import numpy_generator
from perturbdiff.data.screen import LABELS, Screen
from perturbdiff.data.vocab import nearest
from perturbdiff.files import json_sha256, write_json

PARTS = ("train", "validation", "test")
MIN_CONDITIONS_TO_VALIDATE = 10


class Labelled(Protocol):
    """What can be split, row by row: a screen by cells, atlases by conditions.

    obs
        Labels of each row, `perturbation`, `cell_type`, `batch` and perhaps others.
    is_control, n_cells
        (n_rows,)
    """

    @property
    def path(self) -> str: ...
    @property
    def obs(self) -> pd.DataFrame: ...
    @property
    def is_control(self) -> np.ndarray: ...
    @property
    def n_cells(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Split:
    """Which rows (cells of a screen, conditions of atlases) train, validate and test; boolean (n_rows,) each.

    sha256
        Of the split.json that it was read from; None for one that was made here.
    """

    config: SplitConfig
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    sha256: str | None = None

    def as_json(self, screen: Labelled) -> dict[str, Any]:
        """Selectors, conditions with their number of cells, a screen's held-out cells by name, and a hash of it all."""
        content: dict[str, Any] = {
            "format_version": 1,
            "screen" if isinstance(screen, Screen) else "atlases": screen.path,
            "hold_out": list(self.config.hold_out),
            "validation": list(self.config.validation),
            "conditions": {part: _conditions(screen, getattr(self, part)) for part in PARTS},
        }
        if isinstance(screen, Screen):
            content["cells"] = {part: screen.obs.index[getattr(self, part)].tolist() for part in ("validation", "test")}
        return {**content, "sha256": json_sha256(content)}


def make_split(screen: Labelled, config: SplitConfig, seed: int, marginal: np.ndarray | None = None) -> Split:
    """Apply the selectors of `config`; with none for validation, take a fraction of whole training conditions.

    Rows where `marginal` (n_rows,) train without labels: they may be held out but are never taken for validation.

    Raises
    ------
    ValueError
        A selector matches no perturbed cell (the message lists the nearest), all of `validation` is held out, or
        nothing is left to train on.
    """
    if screen.is_control.all() and marginal is None:
        raise ValueError("there are control cells only; give a screen that has perturbed cells too, or an atlas.")
    test = _any(screen, config.hold_out, "hold-out")
    validation = _any(screen, config.validation, "validation") & ~test
    if config.validation and not validation.any():
        raise ValueError(
            f"split.validation {list(config.validation)} is held out by split.hold_out {list(config.hold_out)}; "
            "validate on other conditions."
        )
    if not config.validation:
        candidates = ~test & ~screen.is_control & (True if marginal is None else ~marginal)
        validation = _random_conditions(screen, candidates, config.validation_fraction, seed)
    train = ~test & ~validation
    if not (train & (~screen.is_control if marginal is None else ~screen.is_control | marginal)).any():
        raise ValueError(
            f"split.hold_out {list(config.hold_out)} and validation leave no perturbed cell to train on; hold out less."
        )
    return Split(config, train, validation, test)


def write_split(split: Split, screen: Labelled, path: Path) -> None:
    write_json(path, split.as_json(screen))


def read_split(path: str | Path, screen: Screen) -> Split:
    """The split of a `split.json`, for the screen it was made for.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not a split, changed by hand, of another version, or with cells that the screen lacks.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; training writes it as split.json into the run folder.")
    try:
        stored = json.loads(Path(path).read_text())
        version, sha = stored["format_version"], stored.pop("sha256")
        if "cells" not in stored:
            raise ValueError("it was made for an atlas, whose cells are not listed; give one made for a screen")
        cells = {part: list(map(str, stored["cells"][part])) for part in ("validation", "test")}
        hold_out, chosen = list(stored["hold_out"]), list(stored["validation"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a split.json ({type(error).__name__}: {error}).") from error
    if version != 1:
        raise ValueError(f"{path} has format_version {version}; this version reads 1. Update perturbdiff.")
    if sha != json_sha256(stored):
        raise ValueError(f"{path} does not match its own sha256: it was changed. Take the one of the run folder.")
    parts = {}
    for part in ("validation", "test"):
        inside = screen.obs.index.isin(cells[part])
        if inside.sum() != len(cells[part]):
            raise ValueError(
                f"{path} names {len(cells[part])} {part} cells, {screen.path} has {inside.sum()} of them; "
                "give the screen the split was made for."
            )
        parts[part] = inside
    train = ~parts["validation"] & ~parts["test"]
    return Split(SplitConfig(hold_out=hold_out, validation=chosen), train, parts["validation"], parts["test"], sha)


def select_cells(screen: Labelled, selector: str, purpose: str = "hold-out") -> np.ndarray:
    """Perturbed cells that a selector names, boolean (n_cells,). Raises ValueError where there are none."""
    matches = ~screen.is_control
    column, equals, value = selector.partition("=")
    if equals and column in screen.obs.columns:
        wanted = {column: value}
    else:
        fields = selector.split(":", maxsplit=len(LABELS) - 1)
        wanted = {name: field for name, field in zip(LABELS, fields, strict=False) if field != "*"}
    for name, value in wanted.items():
        present = screen.obs[name].astype(str)
        matches &= (present == value).to_numpy()
        if not (present[~screen.is_control] == value).any():
            raise ValueError(
                f"{purpose} {selector!r}: no perturbed cell has {name} {value!r}; "
                f"{nearest(value, set(present[~screen.is_control]))}. Selectors are PERTURBATION[:CELL_TYPE[:BATCH]] "
                f"or COLUMN=VALUE with a column of obs."
            )
    if not matches.any():
        raise ValueError(f"{purpose} {selector!r} matches no perturbed cell: no cell has all of {wanted}.")
    return matches


def _any(screen: Labelled, selectors: Sequence[str], purpose: str) -> np.ndarray:
    chosen = np.zeros(len(screen.obs), dtype=bool)
    for selector in selectors:
        chosen |= select_cells(screen, selector, purpose)
    return chosen


def _random_conditions(screen: Labelled, candidates: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    # Whole conditions: cells of a trained condition would say nothing about transfer.
    groups = screen.obs.groupby(list(LABELS), observed=True).ngroup().to_numpy()
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


def _conditions(screen: Labelled, cells: np.ndarray) -> list[dict[str, Any]]:
    perturbed = cells & ~screen.is_control
    chosen = screen.obs.loc[perturbed, list(LABELS)].assign(n_cells=screen.n_cells[perturbed])
    sizes = chosen.groupby(list(LABELS), observed=True)["n_cells"].sum()
    return [{**dict(zip(LABELS, key, strict=True)), "n_cells": int(n)} for key, n in sizes.items()]
