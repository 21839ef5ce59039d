"""Splits that others wrote down, as selectors: of cell-load (TOML), of the reference (YAML), and our own split.json."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from perturbdiff.config import yaml_texts
from perturbdiff.data.selectors import ANY
from perturbdiff.files import parse_json, short

SOURCE = ":source="  # in a selector, before the data set
MAX_BYTES = 64 << 20
KINDS = "give a .toml of cell-load, a .yaml of the reference, or a split.json of a run"
_PARTS = {"test": "hold_out", "val": "validation", "validation": "validation"}

Selected = dict[str, list[str]]  # selectors by "hold_out" and "validation"


def read_split_file(path: str | Path) -> Selected:
    """What a split file holds out and validates on.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not one of the kinds, or it holds nothing out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"split file {path} does not exist; {KINDS}.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"split file {path} has {size:,} bytes; at most {MAX_BYTES:,} are read.")
    try:
        text = path.read_text(encoding="utf-8")
        match path.suffix:
            case ".toml":
                selected = _of_cell_load(tomllib.loads(text))
            case ".yaml" | ".yml":
                selected = _of_reference(yaml_texts(text))
            case ".json":
                selected = _of_run(parse_json(text, str(path)))
            case _:
                raise ValueError(f"its name ends in {path.suffix!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a split file ({short(error)}); {KINDS}.") from error
    if not any(selected.values()):
        raise ValueError(f"split file {path} holds nothing out; {KINDS}.")
    return selected


def _of_cell_load(content: Mapping[str, Any]) -> Selected:
    """`zeroshot` names whole cell types, "data set.cell type" = "test"; `fewshot` lists of perturbations of one."""
    selected: Selected = {"hold_out": [], "validation": []}
    known = {*content.get("datasets", {}), *content.get("training", {})}
    for context, part in content.get("zeroshot", {}).items():
        selected[_PARTS[part]].append(f"{ANY}:{_context(context, known)}")
    for context, lists in content.get("fewshot", {}).items():
        for part, perturbations in lists.items():
            if part in _PARTS:
                selected[_PARTS[part]] += [f"{name}:{_context(context, known)}" for name in _names(perturbations)]
    return selected


def _context(context: str, datasets: Collection[str]) -> str:
    """CELL_TYPE:source=DATA_SET of "DATA_SET.CELL_TYPE"; data sets may hold dots."""
    named = max((name for name in datasets if context.startswith(f"{name}.")), key=len, default="")
    dataset = named or context.partition(".")[0]
    if not (cell_type := context.removeprefix(dataset).removeprefix(".")):
        raise ValueError(f"{context!r} must be DATA_SET.CELL_TYPE")
    return f"{cell_type}{SOURCE}{dataset}"


def _of_reference(content: Any) -> Selected:
    """Perturbations of `holdout_pert`, in the cell types of `holdout_celltype` or the batches of `holdout_batches`."""
    found = _with_key(content, "holdout_pert")
    if len(found) != 1:
        raise ValueError(f"{len(found)} entries have holdout_pert, one must")
    lists, selected = found[0], Selected(hold_out=[], validation=[])
    contexts = [f":{name}" for name in _names(lists.get("holdout_celltype") or [])]
    batches = [f":{ANY}:{name}" for name in _names(lists.get("holdout_batches") or [])]
    if contexts and batches:
        raise ValueError("it has holdout_celltype and holdout_batches; keep one")
    contexts += batches
    for part, perturbations in lists["holdout_pert"].items():
        selected[_PARTS[part]] += [f"{name}{where}" for name in _names(perturbations) for where in contexts or [""]]
    return selected


def _with_key(content: Any, key: str, depth: int = 4) -> list[Mapping[str, Any]]:
    if not isinstance(content, Mapping) or not depth:
        return []
    if key in content:
        return [content]
    return [found for value in content.values() for found in _with_key(value, key, depth - 1)]


def _of_run(content: Any) -> Selected:
    """The conditions of a run, one by one."""
    conditions = {part: content["conditions"][part] for part in ("test", "validation")}
    return {
        _PARTS[part]: [
            ":".join(condition[name] for name in ("perturbation", "cell_type", "batch")) for condition in found
        ]
        for part, found in conditions.items()
    }


def _names(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise TypeError(f"{short(values)} must be a list of names")
    return values
