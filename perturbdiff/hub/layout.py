"""A model folder: which files it has, how they are written, checked and read (README, "Model folder").

Everything read here is untrusted: JSON and safetensors only, hashes and sizes checked before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perturbdiff.data.batch import Labels

FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GOLDEN = "checks/golden.safetensors"
JSON_FILES = (
    "genes.json",
    "perturbations.json",
    "cell_types.json",
    "batches.json",
    "preprocessing.json",
    "training.json",
)
HASHED_FILES = (*JSON_FILES, WEIGHTS, GOLDEN)
MAX_JSON_BYTES = 1 << 28
GOLDEN_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ModelFiles:
    """The content of a model folder: settings as JSON values, tensors by name, and the text of the card."""

    config: dict[str, Any]
    json: dict[str, dict[str, Any]]
    weights: dict[str, Tensor]
    golden: dict[str, Tensor]
    card: str


def write_model_folder(folder: str | Path, files: ModelFiles) -> None:
    """Write a model folder whole or not at all; an older model folder of that name is replaced.

    Raises
    ------
    FileExistsError
        `folder` exists and is not a model folder.
    OSError
        It could not be written; an older one is as it was.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not a model folder; choose another name or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (temporary / GOLDEN).parent.mkdir()
        for name in JSON_FILES:
            _write_json(temporary / name, files.json[name])
        try:
            save_file(_contiguous(files.weights), temporary / WEIGHTS, metadata={"format": "pt"})
            save_file(_contiguous(files.golden), temporary / GOLDEN)
        except SafetensorError as error:  # the disk is full
            raise OSError(f"{folder} could not be written ({error}).") from error
        (temporary / "README.md").write_text(files.card)
        config = {"format_version": FORMAT_VERSION, **files.config}
        hashes = {name: _sha256(temporary / name) for name in HASHED_FILES}
        _write_json(temporary / CONFIG, {**config, "sha256": {CONFIG: config_hash(config), **hashes}})
        temporary.chmod(0o755)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(new: Path, final: Path) -> None:
    """Move `new` to `final`; what stood there is removed last."""
    if not final.exists():
        new.rename(final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
    final.rename(old / "folder")
    new.rename(final)
    shutil.rmtree(old)


def folder_identity(folder: str | Path) -> tuple[int, int] | None:
    """What changes when a folder is replaced by another of that name; None where there is none."""
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_ino, stat.st_ctime_ns  # numbers of removed folders are given again


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises
    ------
    FileNotFoundError, ValueError
        No such folder; not a model folder; a format version that this version does not read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {str(folder)!r} does not exist; give a folder made by save_pretrained.")
    if not (folder / CONFIG).is_file():
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {CONFIG}; found {found or 'nothing'}.")
    config = _read_json(folder / CONFIG)
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version {version!r}; this version of perturbdiff reads {FORMAT_VERSION}. "
            "Update perturbdiff, or convert the folder with the version that wrote it."
        )
    return config


def read_json_files(folder: str | Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The other JSON files, after every file's hash was checked.

    Raises
    ------
    FileNotFoundError, ValueError
        A file is missing; a file does not have the hash that config.json states.
    """
    folder = Path(folder)
    stated = config.get("sha256")
    if not isinstance(stated, dict) or set(stated) != {CONFIG, *HASHED_FILES}:
        raise ValueError(f"{folder / CONFIG}: sha256 must name exactly {CONFIG}, {', '.join(HASHED_FILES)}.")
    if config_hash(config) != stated[CONFIG]:
        raise ValueError(f"{folder / CONFIG} does not have the sha256 that it states: it was changed. Get it again.")
    for name in HASHED_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; the model folder is incomplete: get it again.")
        if _sha256(folder / name) != stated[name]:
            raise ValueError(
                f"{folder / name} does not have the sha256 stated in {CONFIG}: the file is truncated or was changed. "
                "Get the model folder again."
            )
    return {name: _read_json(folder / name) for name in JSON_FILES}


def load_weights(folder: str | Path, denoiser: nn.Module) -> None:
    """Fill a denoiser that was built on the meta device; strict.

    Raises
    ------
    ValueError
        Missing or unexpected tensors, other shapes than the architecture's, other types than float; all listed.
    """
    path = Path(folder) / WEIGHTS
    own = denoiser.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}).") from error
    missing, unexpected = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"{path} does not fit its {CONFIG}: missing {_few(missing)}; unexpected {_few(unexpected)}.")
    wrong = [f"{n} {shapes[n]} (must be {tuple(t.shape)})" for n, t in own.items() if shapes[n] != tuple(t.shape)]
    if wrong:
        raise ValueError(f"{path} does not fit its {CONFIG}: {_few(wrong)}.")
    tensors = load_file(path)
    if foreign := sorted(n for n, t in tensors.items() if not t.is_floating_point()):
        raise ValueError(f"{path} holds weights that are not floating point: {_few(foreign)}.")
    denoiser.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True, assign=True)


def config_hash(config: dict[str, Any]) -> str:
    """Hash of all of config.json but its `sha256` entry."""
    content = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_golden(denoiser: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tiny input and the output it must give; `inputs` are the denoiser's arguments by name."""
    return {**inputs, "x0_pred": _golden_forward(denoiser, inputs)}


def check_golden(folder: str | Path, denoiser: nn.Module) -> float:
    """Run the golden input; returns the largest difference.

    Raises
    ------
    ValueError
        Inputs are missing, or the output differs by more than 1e-4 (relative to its largest value).
    """
    golden = load_file(Path(folder) / GOLDEN)
    if "x0_pred" not in golden:
        raise ValueError(f"{folder}/{GOLDEN} has no x0_pred; get the model folder again.")
    expected = golden.pop("x0_pred")
    got = _golden_forward(denoiser, golden)
    difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
    if not difference <= GOLDEN_TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"{folder} fails its golden check: the stored input gives outputs that differ by {difference:.2g} from the "
            f"stored ones (allowed {GOLDEN_TOLERANCE:g}); weights and code do not belong together."
        )
    return difference


def _golden_forward(denoiser: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    labels = Labels(inputs["perturbation"], inputs["cell_type"], inputs["batch"])
    with torch.inference_mode():
        return denoiser(inputs["x_t"], inputs["t"], inputs["control"], labels, inputs["self_cond"], inputs["mask"])


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read.")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({str(error)[:100]}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _few(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "nothing"
