"""Checkpoints by name: registry.yaml, or a cluster's own file of that form ($PERTURBDIFF_REGISTRY)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from perturbdiff.data.vocab import nearest
from perturbdiff.files import few
from perturbdiff.hub_client import REPO_ID

REGISTRY = Path(__file__).with_name("registry.yaml")
MAX_BYTES = 1 << 22
MAX_DEPTH = 8
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEYS = {"repo", "revision", "sha256", "recipe", "metrics"}


@dataclass(frozen=True)
class RegistryEntry:
    """A published model folder.

    repo, revision
        Repo id on the Hub, or a folder (relative to the registry's); the tag or commit, None for a folder.
    sha256
        Of config.json, which states the hash of every other file.
    recipe
        What it was trained with.
    metrics
        Name -> value, to choose by.
    """

    name: str
    repo: str
    revision: str | None
    sha256: str
    recipe: str | None
    metrics: dict[str, float]


def read_registry() -> dict[str, RegistryEntry]:
    """Every known checkpoint by name.

    Raises
    ------
    FileNotFoundError, ValueError
        $PERTURBDIFF_REGISTRY is no file; it is not of the form of registry.yaml.
    """
    path = Path(os.environ.get("PERTURBDIFF_REGISTRY") or REGISTRY)
    if not path.is_file():
        raise FileNotFoundError(f"PERTURBDIFF_REGISTRY ({path}) is not a file; unset it, or give a registry.yaml.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read.")
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:  # either can stand for far more than it takes
                raise ValueError(f"{path} has an alias, or is nested deeper than {MAX_DEPTH}; write values out.")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())[:160]}).") from error
    checkpoints = content.get("checkpoints") if isinstance(content, dict) else None
    if not isinstance(checkpoints, dict) or set(content) != {"checkpoints"}:
        raise ValueError(f"{path} must hold one key, checkpoints, with an entry for each name ({{}} for none).")
    return {name: _entry(path, name, entry) for name, entry in checkpoints.items()}


def find_entry(name: str) -> RegistryEntry:
    """A checkpoint by name; FileNotFoundError lists the nearest."""
    known = read_registry()
    if name not in known:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a registered checkpoint ({nearest(name, known)}); give a folder, "
            "owner/name of a repo on the Hub, or a name that `perturbdiff hub list` shows."
        )
    return known[name]


def entry_of(name: str, repo: str, revision: str, sha256: str, recipe: str | None, metrics: dict[str, float]) -> str:
    """The lines of an entry, to be put into a registry."""
    entry = {"repo": repo, "revision": revision, "sha256": sha256, "recipe": recipe, "metrics": metrics}
    return yaml.safe_dump({name: entry}, sort_keys=False, allow_unicode=True)


def _entry(path: Path, name: Any, entry: Any) -> RegistryEntry:
    where = f"{path}, checkpoint {str(name)[:80]!r}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{where}: a name is letters, digits, '.', '_' and '-'.")
    if not isinstance(entry, dict) or not {"repo", "sha256"} <= set(entry) <= _KEYS:
        found = few(sorted(map(str, entry))) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{where} must have repo and sha256, and may have revision, recipe, metrics; found {found}.")
    texts = {key: entry.get(key) for key in ("repo", "revision", "sha256", "recipe")}
    if odd := sorted(key for key, value in texts.items() if not isinstance(value, str | None)):
        raise ValueError(f"{where}: {few(odd)} must be text (write digits in quotes).")
    if not re.fullmatch("[0-9a-f]{64}", texts["sha256"] or ""):
        raise ValueError(f"{where}: sha256 must be the 64 hex digits that `perturbdiff hub info` prints.")
    metrics = entry.get("metrics") or {}
    named = isinstance(metrics, dict) and all(isinstance(metric, str) for metric in metrics)
    if not named or not all(isinstance(value, int | float) and abs(value) <= 1e12 for value in metrics.values()):
        raise ValueError(f"{where}: metrics must be finite numbers by name.")
    repo = texts["repo"] or ""
    local = path.parent / repo
    if repo and os.path.isdir(local):  # False too of a name that no file can have
        return RegistryEntry(name, str(local), None, texts["sha256"] or "", texts["recipe"], metrics)
    if not REPO_ID.fullmatch(repo):
        raise ValueError(f"{where}: repo must be owner/name or a folder beside the registry, not {repo[:80]!r}.")
    if not texts["revision"]:
        raise ValueError(f"{where}: revision is missing; give the tag or commit that is meant.")
    return RegistryEntry(name, repo, texts["revision"], texts["sha256"] or "", texts["recipe"], metrics)
