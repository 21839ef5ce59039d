"""The folder of a run: whether a run may begin or go on in it, what it writes there, and what its model says of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from perturbdiff._version import __version__
from perturbdiff.config import Config, ModelConfig, ObsColumns, as_dict, load_config, save_config
from perturbdiff.data.splits import write_split
from perturbdiff.files import write_json
from perturbdiff.hub.records import AtlasRecord, TrainingRecord
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.start import Start
from perturbdiff.training.state import saved_states

STOPPED = "stopped.json"
# Settings that may change between a run and its resumption: they move no number, or only its last digits.
FREE_ON_RESUME = {
    "out",
    "data.prefetch",
    "training.accumulation_steps",
    "training.keep_states",
    "training.log_every",
    "training.profile_steps",
    "training.save_every",
    "training.timeout",
    "training.trackers",
}


def with_streams(config: Config, out: Path) -> Config:
    """With the streams that a run was started with, so that more or fewer processes go on with the same sets."""
    if not config.data.streamed or config.data.n_streams is not None:
        return config
    streams = int(os.environ.get("WORLD_SIZE", "1"))
    if saved_states(out / "states"):
        streams = load_config(out / "config.yaml").data.n_streams or streams
    return replace(config, data=replace(config.data, n_streams=streams))


def check_resumable(out: Path, config: Config) -> None:
    """A folder with states belongs to the settings that made them. Raises ValueError, FileExistsError."""
    if not saved_states(out / "states"):
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"out ({out}) is a file; choose another run folder.")
        return
    before, now = _flat(as_dict(load_config(out / "config.yaml"))), _flat(as_dict(config))
    changed = [key for key in now if key not in FREE_ON_RESUME and before.get(key) != now[key]]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed[:3])
        raise ValueError(
            f"run folder {out} was made with other settings ({shown}); choose another --out, or give the same settings "
            "to go on."
        )


def check_same_data(out: Path, data: TrainingSet) -> None:
    """The same settings may name a file or atlas that has changed since: a ValueError."""
    if saved_states(out / "states") and (out / "split.json").is_file():
        before, now = json.loads((out / "split.json").read_text()), data.split.as_json(data.origin)
        if before["sha256"] != now["sha256"]:
            changed = [key for key in now if key != "sha256" and before.get(key) != now[key]]
            raise ValueError(
                f"the data of run folder {out} are not those it was started with ({', '.join(changed)} of split.json "
                "differ); choose another --out, or give the same data to go on."
            )


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock ends with its process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise FileExistsError(
            f"another process is training in {out}; wait for its end, or stop it and give the same command again."
        ) from error


def begin_folder(out: Path, config: Config, data: TrainingSet) -> None:
    """Write what a run begins with, and remove what an earlier one left half-done."""
    save_config(config, out / "config.yaml")
    write_split(data.split, data.origin, out / "split.json")
    (out / STOPPED).unlink(missing_ok=True)
    for left in out.glob(".model-*"):  # by a kill during a save
        shutil.rmtree(left)


def leave_marker(folder: Path, stopped_by: str, step: int) -> None:
    """Say in the run folder that training stopped in order and goes on if started again: job scripts look for it."""
    write_json(folder / STOPPED, {"stopped_by": stopped_by, "step": step})


def model_config(config: Config) -> ModelConfig:
    """What a model folder keeps of the settings of its run."""
    data = config.data
    others = tuple(data.other_control_labels)
    obs = ObsColumns(data.perturbation_col, data.cell_type_col, data.batch_col, data.control_label, others)
    return ModelConfig(config.denoiser, config.diffusion, config.sampling, obs, data.set_size)


def training_record(config: Config, start: Start, steps: int, cells_seen: int) -> TrainingRecord:
    """training.json of the model of a run; without paths of this machine, since it may be published."""
    settings, data = as_dict(config), start.data
    del settings["out"]
    if config.split.file is not None:
        settings["split"]["file"] = Path(config.split.file).name
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
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
