"""A model folder: which files it has, and its JSON, read and checked (README, "Model folder"). Needs no torch.

Everything read here is untrusted: JSON and safetensors only, names, sizes and hashes checked before memory is taken.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from perturbdiff.files import few, inside, json_sha256, memory_bytes, parse_json, read_json, short

FORMAT_VERSION = 6
CONFIG = "config.json"
CARD = "README.md"
EVALUATION = "evaluation.json"
SPLIT = "split.json"  # which cells were held out, where it is not too large to travel
JSON_FILES = (
    "genes.json",
    "perturbations.json",
    "cell_types.json",
    "batches.json",
    "preprocessing.json",
    "training.json",
)
MEANS = "means.json"  # conditions whose means say where predictions start; the means are tensors
MEANS_TENSORS = ("means_control", "means_perturbed")  # (conditions, genes)
OVERDISPERSION = "overdispersion"  # (genes,), with them
NOISE_TENSORS = ("means_control_noise", "means_perturbed_noise")  # their variances, where means.json says so
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # which shard has which tensor, for readers other than this one
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
FEATURES = "features.safetensors"  # frozen tables: the tensors whose name ends in .features
GOLDEN = "checks/golden.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # names of the peft library
# What in a repo belongs to a model: of these, what a push does not bring is deleted.
OWN_FILES = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|"
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|features\.safetensors|(evaluation|split|means)\.json|"
    r"\.eval_results/.+"
)
MAX_JSON_BYTES = 1 << 24  # takes up to twenty times as much memory
MAX_SHARDS = 1000
MAX_HEADER_BYTES = 1 << 23  # of a file of tensors: some 50,000 of them


@dataclass(frozen=True)
class ModelFolder:
    """The JSON of a model folder, as its hashes state it, and the hashes of its files of tensors.

    config, json
        config.json, and the other JSON files by name; of the newest format version.
    tensor_files
        Name -> sha256.
    sha256
        Of config.json, which states every other file's: the identity of the model.
    """

    path: Path
    config: dict[str, Any]
    json: dict[str, dict[str, Any]]
    tensor_files: dict[str, str]
    sha256: str

    @property
    def files(self) -> list[str]:
        """Every file that belongs to the model, but the card."""
        index = [WEIGHTS_INDEX] if WEIGHTS_INDEX in self.config["sha256"] else []
        return [CONFIG, *self.json, *index, *self.tensor_files]

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are a change of another model's (`perturbdiff.hub.adapter`)."""
        return ADAPTER_CONFIG in self.json


def read_folder(path: str | Path) -> ModelFolder:
    """The JSON files of a model folder; its tensors and its card are not looked at.

    Raises
    ------
    FileNotFoundError, ValueError
        No such folder; not a model folder; a file is missing, leads out of the folder or does not have the hash that
        config.json states; a format version that this version does not read.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"model folder {str(path)!r} does not exist; give a folder made by save_pretrained.")
    if not (path / CONFIG).is_file():
        found = sorted(p.name for p in path.iterdir())[:8]
        raise FileNotFoundError(f"{path} is not a model folder: it has no {CONFIG}; found {found or 'nothing'}.")
    content = _read(path, CONFIG, MAX_JSON_BYTES)
    config = parse_json(content, str(path / CONFIG))
    version = config.get("format_version")
    if type(version) is not int or version not in (*_MIGRATIONS, FORMAT_VERSION):
        raise ValueError(
            f"{path} has format_version {few([str(version)])}; this version of perturbdiff reads 1 to "
            f"{FORMAT_VERSION}. Update perturbdiff, or get the folder again."
        )
    stated = _stated_hashes(path, config)
    if config_hash(config) != stated.pop(CONFIG):
        raise ValueError(f"{path / CONFIG} does not have the sha256 that it states: it was changed. Get it again.")
    tensor_files = {name: digest for name, digest in stated.items() if name.endswith(".safetensors")}
    texts = {name: read_verified(path, name, stated[name], MAX_JSON_BYTES) for name in stated.keys() - tensor_files}
    names = [name for name in (*JSON_FILES, EVALUATION, SPLIT, MEANS, ADAPTER_CONFIG) if name in stated]
    json_files = {name: parse_json(texts[name], str(path / name)) for name in names}
    try:
        while config["format_version"] < FORMAT_VERSION:
            config, json_files = _MIGRATIONS[config["format_version"]](config, json_files)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / CONFIG} is not of format_version {version} ({short(error)}).") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return ModelFolder(path, config, json_files, tensor_files, hashlib.sha256(content).hexdigest())


def travelling_split(path: Path) -> dict[str, Any] | None:
    """What the split.json of a run holds, if a model folder takes files as large."""
    return read_json(path, MAX_JSON_BYTES) if path.stat().st_size <= MAX_JSON_BYTES // 2 else None


def read_verified(folder: Path, name: str, digest: str, max_bytes: int) -> bytes:
    """The content of a file, in memory: what was verified is what is used, whatever becomes of the file.

    Raises
    ------
    FileNotFoundError, ValueError
        The file is missing, leads out of the folder, has more than `max_bytes` or than there is memory for, or does not
        have the hash.
    """
    content = _read(folder, name, max_bytes)
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(
            f"{folder / name} does not have the sha256 stated in {CONFIG}: the file is truncated or was changed. "
            "Get the model folder again."
        )
    return content


def _read(folder: Path, name: str, max_bytes: int) -> bytes:
    path = inside(folder, name)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} lacks {name}; the model folder is incomplete: get it again.")
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(
            f"{path} has {size:,} bytes, and such a file of this model at most {max_bytes:,}; they do not belong "
            "together: get the model folder again."
        )
    if size > memory_bytes():
        raise ValueError(f"{path} has {size:,} bytes, more than this machine's memory; use a larger machine.")
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except MemoryError as error:
        raise ValueError(f"{path} has {size:,} bytes, more than there is memory left; free some.") from error


def config_hash(config: dict[str, Any]) -> str:
    """Hash of all of config.json but its `sha256` entry."""
    return json_sha256({key: value for key, value in config.items() if key != "sha256"})


def tensor_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor; the library refuses ranges that overlap, leave gaps or lead out of the file."""
    with open(path, "rb") as start:
        if (length := int.from_bytes(start.read(8), "little")) > MAX_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read.")
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({short(error)}).") from error


def folder_identity(folder: str | Path) -> tuple[int, int] | None:
    """What changes when a folder is replaced by another of that name; None where there is none."""
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_ino, stat.st_ctime_ns  # numbers of removed folders are given again


def is_replaced_now(folder: str | Path) -> bool:
    """True in the moment between two renames, when the old folder is gone and the new one not there yet."""
    folder = Path(folder)
    return not folder.exists() and any(folder.parent.glob(f".{folder.name}-*"))


def _stated_hashes(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    # Only the names of a model folder's files, whole sets of shards, and hashes that are hashes.
    stated = config.get("sha256")
    if not isinstance(stated, dict) or not all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in stated.values()):
        raise ValueError(f"{folder / CONFIG}: sha256 must give the sha256 of every file.")
    shards = [name for name in stated if SHARD.fullmatch(name)]
    weights = {f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)} or {WEIGHTS}
    if ADAPTER_CONFIG in stated:
        weights = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    needed = {CONFIG, *JSON_FILES, GOLDEN, *weights}
    allowed = needed | {EVALUATION, SPLIT, MEANS, FEATURES} | ({WEIGHTS_INDEX} if shards else set())
    missing, unexpected = sorted(needed - stated.keys()), sorted(stated.keys() - allowed)
    if missing or unexpected or len(shards) > MAX_SHARDS:
        raise ValueError(
            f"{folder / CONFIG}: sha256 must name the files of a model folder; missing {few(missing)}, unexpected "
            f"{few(unexpected)}. Get the model folder again."
        )
    return dict(stated)


def _from_version_1(config: dict[str, Any], files: JsonFiles) -> tuple[dict[str, Any], JsonFiles]:
    # Labels of its conditioning=reference were learned rows.
    none = {"perturbation_features": 0, "doses": 0, "cell_type_features": 0, "covariates": 0}
    denoiser = _with_new(config["denoiser"], {"cell_type_encoding": "onehot", "published_encoding": none})
    return {**config, "format_version": 2, "denoiser": denoiser}, files


def _from_version_2(config: dict[str, Any], files: JsonFiles) -> tuple[dict[str, Any], JsonFiles]:
    # Perturbations had rows only, and a combination was the sum of its parts.
    new: JsonFiles = {
        "denoiser": {"interaction": False, "control_weight": 1.0, "mean_effect": False},
        "diffusion": {
            "unbiased": False, "mean_weight": 0.0, "whole_counts": False, "p_drop_perturbation": None,
            "p_unlabelled": 0.0,
        },
        "sampling": {"whole_counts": False},
    }  # fmt: skip
    config = {**config, "format_version": 3, **{name: _with_new(config[name], keys) for name, keys in new.items()}}
    tables: dict[str, Any] = {"dose_separator": None, "n_described": 0, "tables": []}
    return config, {**files, "perturbations.json": _with_new(files["perturbations.json"], tables)}


def _from_version_3(config: dict[str, Any], files: JsonFiles) -> tuple[dict[str, Any], JsonFiles]:
    # Values that no recipe used went, and with them the settings that had no other left.
    denoiser, diffusion = {**config["denoiser"]}, {**config["diffusion"]}
    for key, value, known in (
        ("denoiser.attention", denoiser.pop("attention"), ("paired",)),
        ("denoiser.out_activation", denoiser["out_activation"], ("relu", "none")),
        ("diffusion.kernel", diffusion.pop("kernel"), ("energy",)),
        ("diffusion.mean_weight", diffusion.pop("mean_weight"), (0.0,)),
    ):
        if value not in known:
            raise ValueError(
                f"{key} ({few([str(value)])}) is no longer known, only {' and '.join(map(str, known))}; train the "
                f"model anew, or use the perturbdiff that wrote it ({few([str(config['library_version'])])})."
            )
    diffusion = _with_new(diffusion, {"p_features_only": diffusion.pop("p_unlabelled")})
    # training.json had no fixed form: keys were left out, and those of a conversion lay beside the others.
    training, perturbations = dict(files["training.json"]), dict(files["perturbations.json"])
    perturbations["n_by_features"] = perturbations.pop("n_described")
    training["license"] = training.get("licence")
    if "converted_from" in training:
        conversion = {key: training.get(key) for key in ("sha256", "weights", "global_step", "epoch", "dataset")}
        training["converted_from"] = {"file": training["converted_from"], **conversion}
    new: dict[str, Any] = {
        "library_version": None, "screen": None, "atlases": [], "steps": None, "cells_seen": None,
        "control_match": None, "hold_out": None, "init_from": None, "converted_from": None, "license": None,
        "calibration": None, "settings": {},
    }  # fmt: skip
    training = {key: training.get(key, none) for key, none in new.items()}
    files = {**files, "training.json": training, "perturbations.json": perturbations}
    return {**config, "format_version": 4, "denoiser": denoiser, "diffusion": diffusion}, files


def _from_version_4(config: dict[str, Any], files: JsonFiles) -> tuple[dict[str, Any], JsonFiles]:
    # Of log1p values nobody had looked of how many counts a cell they are; the setting's value stood there.
    preprocessing = files["preprocessing.json"]
    if preprocessing["input_kind"] == "log1p":
        preprocessing = {**preprocessing, "target_sum": None}
    training = _with_new(files["training.json"], {"control_sums": None, "measured_genes": None})
    # Only one label was that of controls, and nobody knew which doses were trained.
    labels = _with_new(files["perturbations.json"], {"control_labels": [], "doses": {}, "dose_unit": None})
    config = {
        **config,
        "format_version": 5,
        "diffusion": _with_new(config["diffusion"], {"start": "controls"}),
        "sampling": _with_new(config["sampling"], {"network_weight": 1.0, "draw_counts": False}),
        "obs": _with_new(config["obs"], {"other_control_labels": [], "dose": None, "drop": []}),
    }
    genes = _with_new(files["genes.json"], {"symbols": []})
    new = {"preprocessing.json": preprocessing, "training.json": training, "perturbations.json": labels}
    return config, {**files, **new, "genes.json": genes}


def _from_version_5(config: dict[str, Any], files: JsonFiles) -> tuple[dict[str, Any], JsonFiles]:
    # All genes had intervals of one width, and coverage was that of conditions left out of the calibration alone.
    training = dict(files["training.json"])
    if (old := training["calibration"]) is not None:
        width = {"factor": old["factor"], "floor": old["floor"]}
        coverage = {"conditions": "validation", "n_conditions": old["n_conditions"], "of_all": old["coverage"]}
        training["calibration"] = {
            "level": old["level"], "change": 0.0, "others": width, "responding": width,
            "n_conditions": old["n_conditions"], "coverage": {**coverage, "of_responding": None},
        }  # fmt: skip
    return {**config, "format_version": 6}, {**files, "training.json": training}


def _with_new(content: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if there := sorted(content.keys() & new.keys()):
        raise KeyError(f"{few(there)} came later")
    return {**content, **new}


JsonFiles = dict[str, dict[str, Any]]
_MIGRATIONS: dict[int, Callable[[dict[str, Any], JsonFiles], tuple[dict[str, Any], JsonFiles]]] = {
    1: _from_version_1,
    2: _from_version_2,
    3: _from_version_3,
    4: _from_version_4,
    5: _from_version_5,
}
