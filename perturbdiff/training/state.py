"""Training state on disk: one folder a step, whole or absent, verified by hash; safetensors and JSON only.

Its tensors are whole and named, so that a run goes on under another engine or on another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from perturbdiff.files import json_sha256, remove, set_aside, to_disk

TENSOR_FILES = ("denoiser.safetensors", "ema.safetensors", "optimizer.safetensors", "best.safetensors")


@dataclass
class Progress:
    """Where training stands, besides weights. Randomness needs no state: every draw is keyed by epoch and set."""

    step: int = 0  # optimizer steps done
    cells_seen: int = 0
    ema_updates: int = 0
    best_energy_distance: float | None = None  # of cells generated for the validation conditions
    best_step: int = 0
    window: dict[str, float] = field(default_factory=dict)  # sums since the last logged step
    finished: bool = False  # of a run that is done, and then the state has no tensors


@dataclass(frozen=True)
class SavedState:
    """A state on disk that was whole when it was looked at."""

    folder: Path
    progress: Progress

    def tensors(self, file: str) -> dict[str, Tensor]:
        # Copies: what a process has mapped cannot be removed from NFS.
        return {name: tensor.clone() for name, tensor in load_file(self.folder / file).items()}


def save_state(folder: Path, progress: Progress, tensors: Mapping[str, Mapping[str, Tensor]], keep: int) -> None:
    """Write `folder`/step_NNNNNNNN under a temporary name, flush it, rename it; only the `keep` newest stay.

    Parameters
    ----------
    tensors
        The whole tensors of each of TENSOR_FILES, on the CPU, none a view of another; of a finished run none.

    Raises
    ------
    OSError
        Earlier states are as they were. One that cannot be removed afterwards is a warning only.
    """
    temporary, aside, final = None, None, folder / f"step_{progress.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_left_over(folder)
        temporary = Path(tempfile.mkdtemp(prefix=".state-", dir=folder))
        hashes = {}
        for name, of_file in tensors.items():
            try:
                save_file(dict(of_file), temporary / name)
            except SafetensorError as error:  # the disk is full
                what = f"the state of step {progress.step} could not be written"
                raise OSError(f"{what} to {folder} ({error})") from error
            hashes[name] = _flushed_hash(temporary / name)
        content = {"progress": asdict(progress), "sha256": hashes}
        (temporary / "state.json").write_text(json.dumps({**content, "own_sha256": json_sha256(content)}))
        _flushed_hash(temporary / "state.json")
        aside = set_aside(final) if final.exists() else None  # damaged, or the run would have gone on from there
        temporary.rename(final)
        to_disk(folder)  # the new name itself must outlive a power cut before the old states go
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if aside is not None:
        remove(aside)
    # Later ones were damaged, or the run would have gone on from there.
    _remove([saved for saved in saved_states(folder) if saved.name > final.name])
    keep_newest(folder, keep)


def keep_newest(folder: Path, n: int) -> None:
    """Remove all but the newest `n` states; where that fails, a warning."""
    _remove(saved_states(folder)[n:])


def _remove(states: list[Path]) -> None:
    for old in states:
        try:
            remove(set_aside(old))
        except OSError as error:
            warnings.warn(f"state {old} could not be removed ({error}); it is tried again later", stacklevel=3)


def remove_left_over(folder: Path) -> None:
    """What a kill amid a save left, or what could not be removed then."""
    for left in (*folder.glob(".state-*"), *folder.glob(".step_*")):
        remove(left)


def saved_states(folder: Path) -> list[Path]:
    """State folders, newest first."""
    return sorted(folder.glob("step_*"), reverse=True) if folder.is_dir() else []


def latest_state(folder: Path) -> SavedState | None:
    """The newest state that verifies. Says which it had to pass over."""
    for saved in saved_states(folder):
        try:
            meta = json.loads((saved / "state.json").read_text())
            if meta.pop("own_sha256") != json_sha256(meta):
                raise ValueError("state.json changed")
            progress = Progress(**meta["progress"])
            files = () if progress.finished else TENSOR_FILES
            if damaged := [name for name in files if _flushed_hash(saved / name) != meta["sha256"][name]]:
                raise ValueError(f"{', '.join(damaged)} changed")
            return SavedState(saved, progress)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"state {saved.name} is damaged ({error}); trying the one before.", file=sys.stderr)
    return None


def open_state(folder: Path, step: int) -> SavedState:
    """A state that another process found whole."""
    saved = folder / f"step_{step:08d}"
    return SavedState(saved, Progress(**json.loads((saved / "state.json").read_text())["progress"]))


def _flushed_hash(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
