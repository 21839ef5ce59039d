"""Training state on disk: one folder a step, whole or absent, verified by hash; safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perturbdiff.training.ema import EMA

TENSOR_FILES = ("denoiser.safetensors", "ema.safetensors", "optimizer.safetensors", "best.safetensors")


@dataclass
class Progress:
    """Where training stands, besides weights. Randomness needs no state: every draw is keyed by epoch and set."""

    step: int = 0  # optimizer steps done
    cells_seen: int = 0
    ema_updates: int = 0
    best_validation: float | None = None
    best_step: int = 0
    window: dict[str, float] = field(default_factory=dict)  # sums since the last logged step


@dataclass
class TrainingState:
    """What a run needs to go on as if it had never stopped. `best` is the EMA's weights at the best validation."""

    denoiser: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    progress: Progress
    best: dict[str, Tensor] | None = None


def save_state(folder: Path, state: TrainingState, keep: int) -> None:
    """Write `folder`/step_NNNNNNNN under a temporary name, flush it, rename it; only the `keep` newest stay."""
    folder.mkdir(parents=True, exist_ok=True)
    state.progress.ema_updates = state.ema.n_updates
    tensors = {
        "denoiser.safetensors": state.denoiser.state_dict(),
        "ema.safetensors": state.ema.module.state_dict(),
        "optimizer.safetensors": _optimizer_tensors(state.optimizer),
        "best.safetensors": state.best or {},
    }
    final = folder / f"step_{state.progress.step:08d}"
    temporary = Path(tempfile.mkdtemp(prefix=".state-", dir=folder))
    try:
        hashes = {}
        for name in TENSOR_FILES:
            save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors[name].items()}, temporary / name)
            hashes[name] = _flushed_hash(temporary / name)
        (temporary / "state.json").write_text(json.dumps({"progress": asdict(state.progress), "sha256": hashes}))
        _flushed_hash(temporary / "state.json")
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in saved_states(folder)[keep:]:
        shutil.rmtree(old)


def saved_states(folder: Path) -> list[Path]:
    """State folders, newest first."""
    return sorted(folder.glob("step_*"), reverse=True) if folder.is_dir() else []


def load_latest(folder: Path, state: TrainingState) -> bool:
    """Load the newest state that verifies into `state`; False if there is none. Says which it had to pass over."""
    for saved in saved_states(folder):
        try:
            meta = json.loads((saved / "state.json").read_text())
            damaged = [name for name in TENSOR_FILES if _flushed_hash(saved / name) != meta["sha256"][name]]
        except (OSError, ValueError, KeyError) as error:
            print(f"state {saved.name} is damaged ({error}); trying the one before.", file=sys.stderr)
            continue
        if damaged:
            print(f"state {saved.name} is damaged ({', '.join(damaged)}); trying the one before.", file=sys.stderr)
            continue
        state.progress = Progress(**meta["progress"])
        state.denoiser.load_state_dict(load_file(saved / "denoiser.safetensors"))
        state.ema.module.load_state_dict(load_file(saved / "ema.safetensors"))
        state.ema.n_updates = state.progress.ema_updates
        _fill_optimizer(state.optimizer, load_file(saved / "optimizer.safetensors"))
        state.best = load_file(saved / "best.safetensors") or None
        return True
    return False


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    # AdamW keeps tensors only (step, exp_avg, exp_avg_sq); parameters are numbered as in state_dict().
    return {
        f"{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _fill_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flushed_hash(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
