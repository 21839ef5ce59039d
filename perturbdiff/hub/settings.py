"""What a model folder's JSON files say, as our own types; from strangers, so nothing is believed."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from perturbdiff._version import __version__
from perturbdiff.config import (
    MAX_FEATURES,
    DenoiserConfig,
    DiffusionConfig,
    ModelConfig,
    ObsColumns,
    Preprocessing,
    SamplingConfig,
    as_dict,
    check_preprocessing,
    check_sampling,
    from_dict,
)
from perturbdiff.data.vocab import GeneVocab, LabelVocab, Vocabularies
from perturbdiff.files import few, printable, short
from perturbdiff.hub.card_check import check_evaluation
from perturbdiff.hub.model_folder import CONFIG, EVALUATION, Settings
from perturbdiff.nn.denoiser import Denoiser, build_denoiser

T = TypeVar("T")
CLASS = "PerturbDiff"
_PARTS = {"denoiser": DenoiserConfig, "diffusion": DiffusionConfig, "sampling": SamplingConfig, "obs": ObsColumns}
MAX_MLP_VALUES = 1 << 38  # weights in the first layers of all MLPs: a terabyte
_KEYS = {"format_version", "library_version", "class", "set_size", "sha256", *_PARTS}


@dataclass(frozen=True)
class ModelSettings:
    """Everything of a model but its tensors; as the attributes of `PerturbDiff`."""

    genes: GeneVocab
    vocabularies: Vocabularies
    preprocessing: Preprocessing
    config: ModelConfig
    training: dict[str, Any]
    evaluation: dict[str, Any] | None = None

    def shapes(self) -> Denoiser:
        """The denoiser on the meta device: what it needs, before memory is taken."""
        with torch.device("meta"):
            return build_denoiser(self.config.denoiser, len(self.genes), self.vocabularies)

    def as_json(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """The content of config.json, and of the other JSON files by name."""
        parts = {name: as_dict(getattr(self.config, name)) for name in _PARTS}
        config = {"library_version": __version__, "class": CLASS, **parts, "set_size": self.config.set_size}
        names = self.vocabularies
        files: dict[str, dict[str, Any]] = {
            "genes.json": {"names": self.genes.names, "ensembl": self.genes.ensembl or ()},
            "perturbations.json": {
                "names": names.perturbations.names,
                "combination_separator": names.combination_separator,
                "dose_separator": names.dose_separator,
                "n_described": names.n_described,
                "tables": names.tables,
            },
            "cell_types.json": {"names": names.cell_types.names},
            "batches.json": {"names": names.batches.names},
            "preprocessing.json": as_dict(self.preprocessing),
            "training.json": self.training,
        }
        return config, files if self.evaluation is None else {**files, EVALUATION: self.evaluation}


def parse_settings(folder: str | Path, settings: Settings) -> ModelSettings:
    """Raises ValueError where a key is missing or unknown, or a value cannot be."""
    config, files = settings.config, settings.json
    _check_keys(folder, CONFIG, config, _KEYS)
    if config["class"] != CLASS:
        raise ValueError(f"{folder}: {CONFIG} is of class {str(config['class'])[:80]!r}; this reads {CLASS!r}.")
    preprocessing = _part(folder, "preprocessing.json", Preprocessing, files["preprocessing.json"])
    model = ModelConfig(
        _part(folder, "denoiser", DenoiserConfig, config["denoiser"]),
        _part(folder, "diffusion", DiffusionConfig, config["diffusion"]),
        _part(folder, "sampling", SamplingConfig, config["sampling"]),
        _part(folder, "obs", ObsColumns, config["obs"]),
        config["set_size"],
    )
    try:
        genes = GeneVocab(_strings(files["genes.json"]["names"]), _strings(files["genes.json"]["ensembl"]) or None)
        perturbations = files["perturbations.json"]
        vocabularies = Vocabularies(
            LabelVocab("perturbation", _strings(perturbations["names"])),
            LabelVocab("cell_type", _strings(files["cell_types.json"]["names"])),
            LabelVocab("batch", _strings(files["batches.json"]["names"])),
            _separator(perturbations["combination_separator"]),
            _separator(perturbations["dose_separator"]),
            _whole_number(perturbations["n_described"], len(perturbations["names"])),
            _tables(perturbations["tables"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: names are missing or not as they should be ({short(error)}).") from error
    if not len(genes):
        raise ValueError(f"{folder}: genes.json names no genes; get the folder again.")
    check_preprocessing(preprocessing)
    _refuse_unbelievable(folder, model)
    if EVALUATION in files:
        try:
            check_evaluation(files[EVALUATION])
        except ValueError as error:
            raise ValueError(f"{folder}: {printable(str(error))}") from error
    return ModelSettings(genes, vocabularies, preprocessing, model, files["training.json"], files.get(EVALUATION))


def _part(folder: str | Path, where: str, schema: type[T], content: Any) -> T:
    # Every key is there, or a default that changes would change what older models mean; no value is made to fit.
    _check_keys(folder, where, content, {f.name for f in fields(schema)})  # type: ignore[arg-type]
    for field in fields(schema):  # type: ignore[arg-type]
        if is_dataclass(field.type):
            _part(folder, f"{where}.{field.name}", field.type, content[field.name])  # type: ignore[arg-type]
        elif isinstance(content[field.name], dict | list):
            raise ValueError(f"{folder}: {where}.{field.name} must be one value, not several.")
    try:
        part = from_dict(schema, content)
    except ValueError as error:
        raise ValueError(f"{folder}: {where}: {short(error)}") from error
    read = as_dict(part)
    odd = [
        f"{key} ({str(content[key])[:40]!r}, read as {str(value)[:40]!r})"
        for key, value in read.items()
        if value != content[key] or isinstance(value, bool) != isinstance(content[key], bool)
    ]
    if odd:
        raise ValueError(f"{folder}: {where} has values of the wrong kind: {few(odd)}.")
    return part


def _check_keys(folder: str | Path, where: str, content: Any, keys: set[str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{folder}: {where} must be a JSON object, not {few([str(content)])}.")
    if set(content) != keys:
        raise ValueError(
            f"{folder}: {where} lacks {few(sorted(keys - set(content)))} and has unknown keys "
            f"{few(sorted(set(content) - keys))}; update perturbdiff, or get the folder again."
        )


def _refuse_unbelievable(folder: str | Path, model: ModelConfig) -> None:
    # Beyond these bounds even shapes without memory are a burden.
    bounds: dict[str, tuple[Any, int]] = {
        "set_size": (model.set_size, 1 << 20),
        "denoiser.depth": (model.denoiser.depth, 1 << 8),
        "denoiser.width": (model.denoiser.width, 1 << 16),
        "denoiser.covariate_dim": (model.denoiser.covariate_dim, 1 << 16),
        "denoiser.mlp_ratio": (model.denoiser.mlp_ratio, 1 << 8),
        "diffusion.n_timesteps": (model.diffusion.n_timesteps, 1 << 20),
    }
    for key, (value, most) in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise ValueError(f"{folder}: {key} ({value!r}) must be greater than 0 and at most {most}.")
    if not isinstance(model.set_size, int):
        raise ValueError(f"{folder}: set_size ({model.set_size!r}) must be a whole number.")
    depth, width, ratio = model.denoiser.depth, model.denoiser.width, model.denoiser.mlp_ratio
    if not 0 < round(width * ratio) * width * depth <= MAX_MLP_VALUES:
        raise ValueError(
            f"{folder}: denoiser.width ({width}) * width * mlp_ratio ({ratio}) * depth ({depth}) must be greater than "
            f"0 and at most {MAX_MLP_VALUES:,}."
        )
    check_sampling(model.sampling, model.diffusion)


def _tables(values: Any) -> tuple[tuple[str, int], ...]:
    if not isinstance(values, list) or not all(isinstance(table, list) and len(table) == 2 for table in values):
        raise TypeError("tables must be a list of names with widths")
    return tuple((_strings([name])[0], _whole_number(width, MAX_FEATURES)) for name, width in values)


def _separator(value: Any) -> str | None:
    return None if value is None else _strings([value])[0]


def _whole_number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise TypeError(f"{str(value)[:40]!r} must be a whole number of at most {most}")
    return value


def _strings(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("names must be a list of strings")
    return tuple(values)
