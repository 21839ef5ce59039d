"""Obs columns and control labels as known kinds of files call them, found by the columns that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pandas as pd

from perturbdiff.config import DataConfig, SourceConfig

COLUMNS = ("perturbation_col", "cell_type_col", "batch_col")
TAHOE_CONTROL = "[('DMSO_TF', 0.0, 'uM')]"

NO_PERTURBATION = frozenset(
    {"", "nan", "none", "null", "na", "n/a", "<na>", "unassigned", "unknown", "undetermined", "negative", "doublet"}
    | {"multiplet", "multiple", "ambiguous", "low-quality", "filtered", "unmapped"}
)
"""Labels, in lower case, that are hardly those of perturbations."""

CONTROL_WORDS = frozenset(
    {"control", "ctrl", "non-targeting", "non_targeting", "nontargeting", "nt", "ntc", "neg", "negctrl", "neg_ctrl"}
    | {"neg-control", "scramble", "scrambled", "safe-targeting", "safe_targeting", "unperturbed", "untreated"}
    | {"unstimulated", "vehicle", "mock", "dmso", "dmso_tf", "pbs"}
)
"""Labels, in lower case, that mostly mark control cells."""


@dataclass(frozen=True)
class Dialect:
    """Settings of data.* for files of a kind; `has` are the columns by which it is known.

    Of several columns for one setting the first that is there is taken, and null where none is.
    """

    name: str
    has: tuple[str, ...]
    controls: tuple[str, ...]
    perturbation: tuple[str, ...]
    cell_type: tuple[str, ...] = ("cell_type", "celltype", "cell_line", "cell_name")
    batch: tuple[str, ...] = ("batch", "gem_group", "replicate")
    settings: Mapping[str, Any] | None = None


DIALECTS = (
    Dialect("Tahoe-100M", ("drugname_drugconc",), (TAHOE_CONTROL,), ("drugname_drugconc",),
            ("cell_line", "cell_name", "cell_line_id"), ("plate", "sample")),
    Dialect("Tahoe-100M", ("drug", "plate"), ("DMSO_TF",), ("drug",),
            ("cell_line", "cell_name", "cell_line_id"), ("plate", "sample")),
    Dialect("Parse PBMC", ("cytokine", "donor"), ("PBS",), ("cytokine",), batch=("donor",)),
    Dialect("sci-Plex", ("product_name", "dose"), ("Vehicle",), ("product_name",),
            batch=("replicate", "plate_oligo", "culture_plate", "batch"), settings={"dose_col": "dose"}),
    Dialect("GEARS", ("condition", "condition_name"), ("ctrl",), ("condition",)),
    Dialect("GEARS", ("condition", "dose_val"), ("ctrl",), ("condition",)),
    Dialect("GEARS", ("condition",), ("ctrl",), ("condition",)),
    Dialect("Virtual Cell Challenge", ("target_gene", "guide_id"), ("non-targeting",), ("target_gene",)),
    Dialect("STATE and cell-load", ("target_gene",), ("non-targeting",), ("target_gene",),
            batch=("batch_var", "batch", "gem_group")),
    Dialect("Replogle", ("gene", "gem_group"), ("non-targeting",), ("gene",), batch=("gem_group", "batch")),
    Dialect("STATE and cell-load", ("gene",), ("non-targeting",), ("gene",),
            batch=("batch_var", "batch", "gem_group")),
    Dialect("scPerturb", ("perturbation", "perturbation_type"), ("control",), ("perturbation",),
            ("celltype", "cell_type", "cell_line"), ("batch", "replicate", "gemgroup", "gem_group")),
)  # fmt: skip


DOSE_COLUMNS = ("dose", "dose_value", "dose_val", "drug_dose", "concentration")
UNIT_COLUMNS = ("dose_unit", "dose_units", "concentration_unit")

PERTURBATION_COLUMNS = {
    *(name for dialect in DIALECTS for name in dialect.perturbation), "treatment", "stimulation", "perturbation"
}  # fmt: skip

C = TypeVar("C", DataConfig, SourceConfig)


def understood(config: C, obs: pd.DataFrame, section: str = "data") -> tuple[C, str]:
    """The settings with the columns and the control label of a known kind of file, and what was found.

    Only where a column of the settings is missing, and only what is at its default.
    """
    named = [getattr(config, name) for name in COLUMNS]
    if all(column is None or column in obs.columns for column in named):
        return config, ""
    default = type(config)()
    for dialect in DIALECTS:
        wanted = _settings(dialect, obs)
        if wanted is None:
            continue
        changed = {
            name: value
            for name, value in wanted.items()
            if getattr(config, name) == getattr(default, name) != value
            and not (name in COLUMNS and getattr(config, name) in obs.columns)
        }
        if changed.get("perturbation_col", config.perturbation_col) != wanted["perturbation_col"]:
            changed.pop("control_label", None)  # of another column
        config = replace(config, **changed)
        said = " ".join(f"{section}.{name}={_word(value)}" for name, value in changed.items())
        return config, f"columns as of {dialect.name}: {said}"
    return config, ""


def _settings(dialect: Dialect, obs: pd.DataFrame) -> dict[str, Any] | None:
    if not set(dialect.has) <= set(obs.columns):
        return None
    columns = {f"{role}_col": next((name for name in getattr(dialect, role) if name in obs.columns), None)
               for role in ("perturbation", "cell_type", "batch")}  # fmt: skip
    labels = set(obs[columns["perturbation_col"]].astype(str).unique())
    control = next((label for label in dialect.controls if label in labels), None)
    if control is None:
        return None
    return {**columns, "control_label": control, **(dialect.settings or {})}


def _word(value: Any) -> str:
    return "null" if value is None else str(value)
