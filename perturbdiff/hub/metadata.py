"""Everything of a model but its tensors, as our own types; from strangers, so nothing is believed. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perturbdiff._version import __version__
from perturbdiff.config import (
    MAX_FEATURES,
    DenoiserConfig,
    DiffusionConfig,
    ModelConfig,
    ObsColumns,
    Preprocessing,
    SamplingConfig,
    check_bounds,
    check_denoiser,
    check_sampling,
)
from perturbdiff.data.vocab import GeneVocab, LabelVocab, Vocabularies
from perturbdiff.files import few, short, typed
from perturbdiff.hub.model_folder import CONFIG, EVALUATION, MEANS, SPLIT, ModelFolder
from perturbdiff.hub.records import EvaluationRecord, MeansRecord, TrainingRecord, read_evaluation

CLASS = "PerturbDiff"
_PARTS = {"denoiser": DenoiserConfig, "diffusion": DiffusionConfig, "sampling": SamplingConfig, "obs": ObsColumns}
_NAMES = ("genes.json", "perturbations.json", "cell_types.json", "batches.json")
MAX_MLP_VALUES = 1 << 38  # weights in the first layers of all MLPs: a terabyte
_KEYS = {"format_version", "library_version", "class", "set_size", "sha256", *_PARTS}


@dataclass(frozen=True)
class ModelMetadata:
    """Everything of a model but its tensors; as the attributes of `PerturbDiff`."""

    genes: GeneVocab
    vocabularies: Vocabularies
    preprocessing: Preprocessing
    config: ModelConfig
    training: TrainingRecord
    evaluation: EvaluationRecord | None = None
    split: dict[str, Any] | None = None
    trained: MeansRecord | None = None

    def as_json(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """The content of config.json, and of the other JSON files by name."""
        parts = {name: asdict(getattr(self.config, name)) for name in _PARTS}
        config = {"library_version": __version__, "class": CLASS, **parts, "set_size": self.config.set_size}
        names = self.vocabularies
        files: dict[str, dict[str, Any]] = {
            "genes.json": {
                "names": self.genes.names,
                "ensembl": self.genes.ensembl or (),
                "symbols": self.genes.symbols or (),
            },
            "perturbations.json": {
                "names": names.perturbations.names,
                "combination_separator": names.combination_separator,
                "dose_separator": names.dose_separator,
                "n_by_features": names.n_by_features,
                "tables": names.tables,
                "control_labels": names.control_labels,
                "doses": dict(names.doses),
                "dose_unit": names.dose_unit,
            },
            "cell_types.json": {"names": names.cell_types.names},
            "batches.json": {"names": names.batches.names},
            "preprocessing.json": asdict(self.preprocessing),
            "training.json": asdict(self.training),
        }
        if self.evaluation is not None:
            files[EVALUATION] = self.evaluation.as_json()
        if self.split is not None:
            files[SPLIT] = self.split
        if self.trained is not None:
            files[MEANS] = asdict(self.trained)
        return config, files


def parse_metadata(folder: ModelFolder) -> ModelMetadata:
    """Raises ValueError where a key is missing or unknown, or a value cannot be."""
    where, config, files = folder.path, folder.config, folder.json
    if config.keys() != _KEYS:
        raise ValueError(
            f"{where}: {CONFIG} lacks {few(sorted(_KEYS - config.keys()))} and has unknown keys "
            f"{few(sorted(config.keys() - _KEYS))}; update perturbdiff, or get the folder again."
        )
    if config["class"] != CLASS:
        raise ValueError(f"{where}: {CONFIG} is of class {str(config['class'])[:80]!r}; this reads {CLASS!r}.")
    preprocessing = typed(Preprocessing, files["preprocessing.json"], f"{where}: preprocessing.json")
    parts = {name: typed(schema, config[name], f"{where}: {name}") for name, schema in _PARTS.items()}
    model = ModelConfig(**parts, set_size=typed(int, config["set_size"], f"{where}: set_size"))
    try:
        names = {file: typed(tuple[str, ...], files[file]["names"], f"names of {file}") for file in _NAMES}
        others = [typed(tuple[str, ...], files["genes.json"][key], key) or None for key in ("ensembl", "symbols")]
        genes, labels = GeneVocab(names["genes.json"], *others), files["perturbations.json"]
        vocabularies = Vocabularies(
            LabelVocab("perturbation", names["perturbations.json"]),
            LabelVocab("cell_type", names["cell_types.json"]),
            LabelVocab("batch", names["batches.json"]),
            typed(str | None, labels["combination_separator"], "combination_separator"),
            typed(str | None, labels["dose_separator"], "dose_separator"),
            _at_most(len(names["perturbations.json"]), labels["n_by_features"], "n_by_features"),
            _tables(labels["tables"]),
            typed(tuple[str, ...], labels["control_labels"], "control_labels"),
            _doses(labels["doses"], names["perturbations.json"]),
            typed(str | None, labels["dose_unit"], "dose_unit"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: names are missing or not as they should be ({short(error)}).") from error
    if not len(genes):
        raise ValueError(f"{where}: genes.json names no genes; get the folder again.")
    check_bounds(preprocessing, "preprocessing.")
    _refuse_unbelievable(where, model)
    separators = (vocabularies.combination_separator, vocabularies.dose_separator)
    obs = asdict(model.obs)
    others = [*obs.pop("other_control_labels"), *obs.pop("drop")]
    for text in (*obs.values(), *others, *separators, preprocessing.library_size_col):
        if text is not None and "${" in text:  # where it becomes a setting it would be resolved, as of the environment
            raise ValueError(f"{where}: {text[:40]!r} is an interpolation, and not plain text; get the folder again.")
    training = typed(TrainingRecord, files["training.json"], f"{where}: training.json")
    scores = read_evaluation(files[EVALUATION], f"{where}: {EVALUATION}") if EVALUATION in files else None
    trained = typed(MeansRecord, files[MEANS], f"{where}: {MEANS}") if MEANS in files else None
    if trained is None and model.diffusion.start != "controls":
        raise ValueError(f"{where}: {MEANS} must be there where diffusion.start is target or mean; get it again.")
    return ModelMetadata(genes, vocabularies, preprocessing, model, training, scores, files.get(SPLIT), trained)


def _refuse_unbelievable(where: Path, model: ModelConfig) -> None:
    # Beyond these bounds even shapes without memory are a burden.
    bounds: dict[str, tuple[float, int]] = {
        "set_size": (model.set_size, 1 << 20),
        "denoiser.depth": (model.denoiser.depth, 1 << 8),
        "denoiser.width": (model.denoiser.width, 1 << 16),
        "denoiser.covariate_dim": (model.denoiser.covariate_dim, 1 << 16),
        "denoiser.mlp_ratio": (model.denoiser.mlp_ratio, 1 << 8),
        "diffusion.n_timesteps": (model.diffusion.n_timesteps, 1 << 20),
    }
    for key, (value, most) in bounds.items():
        if not 0 < value <= most:
            raise ValueError(f"{where}: {key} ({value!r}) must be greater than 0 and at most {most}.")
    depth, width, ratio = model.denoiser.depth, model.denoiser.width, model.denoiser.mlp_ratio
    if not 0 < round(width * ratio) * width * depth <= MAX_MLP_VALUES:
        raise ValueError(
            f"{where}: denoiser.width ({width}) * width * mlp_ratio ({ratio}) * depth ({depth}) must be greater than "
            f"0 and at most {MAX_MLP_VALUES:,}."
        )
    check_denoiser(model.denoiser)
    check_sampling(model.sampling, model.diffusion)


def _tables(values: Any) -> tuple[tuple[str, int], ...]:
    if not isinstance(values, list) or not all(isinstance(table, list) and len(table) == 2 for table in values):
        raise TypeError("tables must be a list of names with widths")
    return tuple((typed(str, name, "table"), _at_most(MAX_FEATURES, width, "width")) for name, width in values)


def _doses(values: Any, names: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    doses: dict[str, tuple[float, ...]] = typed(dict[str, tuple[float, ...]], values, "doses")
    for name, known in doses.items():
        if name not in names or not all(0 < dose < math.inf for dose in known) or list(known) != sorted(set(known)):
            raise ValueError(f"doses of {few([name])} must be of a known perturbation, greater than 0 and rising")
    return doses


def _at_most(most: int, value: Any, where: str) -> int:
    number: int = typed(int, value, where)
    if number > most:
        raise ValueError(f"{where} ({number}) must be at most {most}")
    return number
