"""The folder of a run: whether a run may begin or go on in it, what it writes there, and what its model says of it."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from perturbdiff._version import __version__
from perturbdiff.config import COEXPRESSION, Config, ModelConfig, ObsColumns, as_dict, load_config, save_config
from perturbdiff.data.identity import screen_identity
from perturbdiff.data.screen import Screen
from perturbdiff.features.tables import FeatureTable
from perturbdiff.files import json_sha256, parse_json, remove, restore_folder, write_json
from perturbdiff.hub.model_folder import CONFIG
from perturbdiff.hub.records import AtlasRecord, TrainingRecord
from perturbdiff.lock import Lock, alone
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.signals import Stopped, StopRequest
from perturbdiff.training.start import Start
from perturbdiff.training.state import TENSOR_FILES, remove_left_over, saved_states

STOPPED, DATA, LOCK = "stopped.json", "data.json", "run.lock"
# Settings that may change between a run and its resumption: they move no number, or only its last digits.
FREE_ON_RESUME = {
    "out",
    "data.decoding_threads",
    "data.prefetch",
    "data.atlases.expected",
    "training.accumulation_steps",
    "training.compile",
    "training.device",
    "training.keep_last_state",
    "training.keep_states",
    "training.log_every",
    "training.profile_steps",
    "training.save_every",
    "training.save_minutes",
    "training.timeout",
    "training.trackers",
    # They say where data are and how to read them; what they are is compared (`check_same_data`, `find_checkpoint`).
    "adapt.init_from",
    "data.atlases.path",
    "data.atlases.revision",
    "data.input_kind",
    "data.layer",
    "data.perturbation_features",
    "data.screen",
}
FREE_WITHOUT_EARLY_STOPPING = {"training.validate_every", "training.validate_sets"}  # which chooses weights by them
_N_STEPS, _SCHEDULE = "training.n_steps", "optim.schedule_steps"
_WHAT = {
    "n_cells": "number of cells", "n_genes": "number of genes", "genes": "genes", "cells": "names of cells",
    "labels": "labels", "expression": "X",
}  # fmt: skip


def with_streams(config: Config, out: Path) -> Config:
    """With the streams that a run was started with, so that more or fewer processes go on with the same sets."""
    if not config.data.streamed or config.data.n_streams is not None:
        return config
    streams = int(os.environ.get("WORLD_SIZE", "1"))
    if saved_states(out / "states"):
        streams = load_config(out / "config.yaml").data.n_streams or streams
    return replace(config, data=replace(config.data, n_streams=streams))


def with_commits(config: Config, out: Path) -> Config:
    """With the commits that a run was started with, so that it goes on with them after its owner pushed others."""
    recorded = _recorded(out).get("atlases", [])
    atlases = [
        replace(atlas, revision=started["commit"])
        if atlas.revision is None and atlas.path == started["name"] and not Path(atlas.path).is_dir()
        else atlas
        for atlas, started in zip(config.data.atlases, recorded, strict=False)
    ]
    atlases += config.data.atlases[len(recorded) :]
    return replace(config, data=replace(config.data, atlases=atlases))


def check_resumable(out: Path, config: Config) -> None:
    """A folder with states belongs to the settings that made them. Raises ValueError, FileExistsError."""
    if not saved_states(out / "states"):
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"out ({out}) is a file; choose another run folder.")
        if (out / CONFIG).is_file():
            raise FileExistsError(f"out ({out}) is a model folder; choose another run folder.")
        return
    before, now = _flat(as_dict(load_config(out / "config.yaml"))), _flat(as_dict(config))
    free = FREE_ON_RESUME | (set() if config.training.early_stop_patience else FREE_WITHOUT_EARLY_STOPPING)
    if (before["adapt.init_from"] is None) != (now["adapt.init_from"] is None):
        free -= {"adapt.init_from"}
    # More steps change no earlier one as long as the learning rate falls over as many as before.
    given = now[_SCHEDULE]
    asked = {_SCHEDULE} if before.get(_SCHEDULE) else set()
    for flat in (before, now):
        flat[_SCHEDULE] = flat.get(_SCHEDULE) or flat[_N_STEPS]
    if now[_N_STEPS] > before[_N_STEPS]:
        free |= {_N_STEPS}
        if not (saved_states(out / "states")[0] / TENSOR_FILES[0]).exists():
            raise ValueError(
                f"training in {out} is done and kept no state that more steps could follow (training.keep_last_state); "
                f"start from its model in another --out (perturbdiff finetune --init-from {out / 'model'})."
            )
    elif now[_N_STEPS] < before[_N_STEPS] and given is None:
        free |= {_SCHEDULE}
    keys = [*now, *(key for key in before if key not in now)]
    changed = [key for key in keys if not _is_free(key, free) and before.get(key) != now.get(key)]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed[:3])
        words = [key for key in keys if key in changed or (key in asked and _N_STEPS in changed)]
        more = ""
        if now[_N_STEPS] > before[_N_STEPS] and _SCHEDULE in changed:
            more = (
                f"with {_N_STEPS}={now[_N_STEPS]} the learning rate would have been another all along, and with "
                f"{_SCHEDULE}={before[_SCHEDULE]} besides it stays at its lowest in the new steps; "
            )
        give = " ".join(_word(key, before.get(key)) for key in words if "[" not in key)
        raise ValueError(
            f"run folder {out} was made with other settings ({shown}); {more}to go on give {give or 'the same'} "
            f"({out / 'config.yaml'} is a recipe of all), or choose another --out."
        )


def lasting_settings(config: Config) -> dict[str, Any]:
    """By key, the settings that a run has from its start to its end."""
    free = FREE_ON_RESUME | FREE_WITHOUT_EARLY_STOPPING
    return {key: value for key, value in _flat(as_dict(config)).items() if not _is_free(key, free)}


def data_record(data: TrainingSet) -> dict[str, Any]:
    """data.json: what a run is trained on, by content, and the names under which it was found; with the split.

    Feature tables made of the training cells follow from those and have no hash.
    """
    if isinstance(data.origin, Screen):
        origin: dict[str, Any] = {"screen": {"path": data.origin.path, **screen_identity(data.origin)}}
    else:
        origin = {"atlases": [{"name": a.name, "commit": a.commit, "sha256": a.sha256} for a in data.atlases]}
    tables = [
        {"name": table.name, "sha256": None if table.name == COEXPRESSION else _table_sha256(table)}
        for table in data.tables
    ]
    return {**origin, "features": tables, "split": data.split.as_json(data.origin)}


def check_same_data(out: Path, now: dict[str, Any]) -> None:
    """A run goes on with the content it was started with, whatever it is called by now: a ValueError where it differs.

    `now` is of `data_record`. Of a run that an older version started there is no more than its split.json.
    """
    if not saved_states(out / "states") or not (out / "split.json").is_file():
        return
    before = _recorded(out)
    names = {"screen", "atlases", "sha256"} if before else {"screen", "sha256"}
    before = {**(before or now), "split": _json(out / "split.json")}
    if changed := _differences(before, now, names):
        raise ValueError(
            f"the data of run folder {out} are not those it was started with ({'; '.join(changed)}); give those to go "
            "on, or choose another --out to train on these."
        )


def _differences(before: dict[str, Any], now: dict[str, Any], names: set[str]) -> list[str]:
    if ("screen" in before) != ("screen" in now):
        return ["a screen instead of atlases" if "screen" in now else "atlases instead of a screen"]
    found, then, has = [], before.get("screen", {}), now.get("screen", {})
    if sizes := [key for key in ("n_cells", "n_genes") if then.get(key) != has.get(key)]:
        found += [f"{_WHAT[key]} was {then[key]:,}, is {has[key]:,}" for key in sizes]
    elif parts := [what for key, what in _WHAT.items() if then.get(key) != has.get(key)]:
        # The order of cells follows from their names and labels, so that theirs says nothing beside those.
        first = [part for part in parts if part == "genes"] + [part for part in parts if part != "genes"][:1]
        than = f" than in {then['path']}" if then["path"] != has["path"] else ""
        found.append(f"other {' and '.join(first)} in {has['path']}{than}")
    for i, (atlas, opened) in enumerate(zip(before.get("atlases", []), now.get("atlases", []), strict=False)):
        if atlas["sha256"] != opened["sha256"]:
            at = f" at commit {atlas['commit']}: path: {atlas['name']}, revision: {atlas['commit']}"
            was = f"{atlas['name']} of sha256 {atlas['sha256'][:12]}{at if atlas['commit'] else ''}"
            found.append(f"data.atlases[{i}] is {opened['name']} of sha256 {opened['sha256'][:12]}, was {was}")
    if before["features"] != now["features"]:
        was, other = (", ".join(table["name"] for table in of["features"]) or "none" for of in (before, now))
        values = "have other values" if was == other else f"are {other}"
        found.append(f"data.perturbation_features were {was}, {values}")
    split = [key for key in before["split"] if key not in names and before["split"][key] != now["split"].get(key)]
    return found or ([f"{', '.join(split)} of split.json"] if split else [])


def _table_sha256(table: FeatureTable) -> str:
    return json_sha256([table.names, hashlib.sha256(table.values.astype("<f4").tobytes()).hexdigest()])


def _recorded(out: Path) -> dict[str, Any]:
    """data.json of a run that can go on; empty where there is none."""
    there = saved_states(out / "states") and (out / DATA).is_file()
    return _json(out / DATA) if there else {}


def _json(path: Path) -> dict[str, Any]:
    return parse_json(path.read_bytes(), str(path))


@contextmanager
def alone_in(out: Path) -> Iterator[Lock]:
    """Keep other runs out of a folder, and put back its model where a kill amid a save left none.

    Raises FileExistsError where another process trains there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with alone(out / LOCK, f"training in {out}") as lock:
        restore_folder(out / "model")
        yield lock


def begin_folder(out: Path, config: Config, data: dict[str, Any]) -> None:
    """Write what a run begins with, `data` as of `data_record`, and remove what an earlier one left half-done."""
    save_config(config, out / "config.yaml")
    write_json(out / "split.json", data["split"])
    if not _recorded(out):  # of the start, whatever the data are called when it goes on
        write_json(out / DATA, {key: value for key, value in data.items() if key != "split"})
    (out / STOPPED).unlink(missing_ok=True)
    for left in (*out.glob(".model-*"), *out.glob(".adapter-*")):  # by a kill during a save
        remove(left)
    remove_left_over(out / "states")


def leave_marker(folder: Path, stopped_by: str, step: int) -> None:
    """Say in the run folder that training stopped in order and goes on if started again: job scripts look for it."""
    write_json(folder / STOPPED, {"stopped_by": stopped_by, "step": step})


@contextmanager
def stoppable(out: Path) -> Iterator[None]:
    """A signal ends what is done within at once and in order (`Stopped`), where nothing is there yet that saves.

    As while data are read: a job script finds the marker, and the same command begins again.
    """
    try:
        with StopRequest(at_once=True):
            yield
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            saved = [int(state.name.removeprefix("step_")) for state in saved_states(out / "states")]
            leave_marker(out, stop.signal_name, max(saved, default=0))
            print(f"stopped     by {stop.signal_name} outside of training; the same command goes on", flush=True)
        raise


def model_config(config: Config) -> ModelConfig:
    """What a model folder keeps of the settings of its run."""
    data = config.data
    others = tuple(data.other_control_labels)
    columns = data.perturbation_col, data.cell_type_col, data.batch_col
    obs = ObsColumns(*columns, data.control_label, others, data.dose_col, tuple(data.drop))
    return ModelConfig(config.denoiser, config.diffusion, config.sampling, obs, data.set_size)


def training_record(config: Config, start: Start, steps: int, cells_seen: int) -> TrainingRecord:
    """training.json of the model of a run; without paths of this machine, since it may be published."""
    settings, data = as_dict(config), start.data
    del settings["out"]
    if config.split.file is not None:
        settings["split"]["file"] = Path(config.split.file).name
    given = settings["data"]["perturbation_features"]
    settings["data"]["perturbation_features"] = [Path(path).name for path in given]
    if data.tables:  # where they come from
        settings["features"] = {table.name: dict(table.about) for table in data.tables}
    if config.data.screen is not None:
        settings["data"]["screen"] = Path(config.data.screen).name
    for atlas in settings["data"]["atlases"]:
        atlas["path"] = Path(atlas["path"]).name if Path(atlas["path"]).is_dir() else atlas["path"]
    if config.adapt.init_from is not None and Path(config.adapt.init_from).is_dir():
        settings["adapt"]["init_from"] = Path(config.adapt.init_from).resolve().name
    return TrainingRecord(
        library_version=__version__,
        screen=settings["data"]["screen"],
        atlases=tuple(
            AtlasRecord(atlas["path"], opened.commit, opened.sha256)
            for atlas, opened in zip(settings["data"]["atlases"], data.atlases, strict=True)
        ),
        steps=steps,
        cells_seen=cells_seen,
        control_match=data.match,
        hold_out=tuple(data.split.config.hold_out),
        init_from=start.origin(),
        control_sums=data.control_sums,
        measured_genes=data.measured_genes,
        settings=settings,
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by key, data.atlases[0].weight of a list of sections."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and any(isinstance(part, dict) for part in value):
            value = {f"[{i}]": part for i, part in enumerate(value)}
            flat.update({k.replace(".[", "["): v for k, v in _flat(value, f"{prefix}{key}.").items()})
        else:
            flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _is_free(key: str, free: set[str]) -> bool:
    name = re.sub(r"\[\d+\]", "", key)
    return name in free or name.startswith("data.atlases.expected.")


def _word(key: str, value: Any) -> str:
    """The word of the command line that sets it."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
    return shlex.quote(f"{key}={text}")
