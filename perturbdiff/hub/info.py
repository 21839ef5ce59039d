"""What a model expects and where it comes from, and how two models differ; loads neither weights nor torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from perturbdiff.data.vocab import Vocabularies
from perturbdiff.files import few, hanging, inside, printable
from perturbdiff.hub.download import ModelSource
from perturbdiff.hub.metadata import ModelMetadata
from perturbdiff.hub.model_folder import (
    GOLDEN,
    MEANS_TENSORS,
    NOISE_TENSORS,
    OVERDISPERSION,
    ModelFolder,
    tensor_header,
)
from perturbdiff.hub.records import EvaluationRecord, TrainingRecord

MAX_LINE = 1000  # characters


def _doses(names: Vocabularies) -> str:
    if not names.dose_separator:
        return "not an input"
    return f"as A{names.dose_separator}0.5" + (f", in {names.dose_unit}" if names.dose_unit else "")


def model_info(source: ModelSource) -> str:
    """Some twenty lines. Raises as `ModelSource.read`."""
    folder, said = source.read()
    how, config, training = said.preprocessing, said.config, said.training
    names = said.vocabularies
    counts = f"raw counts: log1p(count * {how.target_sum or 0:g} / library size) / {how.scale:g} is done for you"
    lines = {
        "model": source.name
        + ("" if source.commit is None else f" at commit {source.commit}")
        + (", an adapter: merged with its base when it is loaded" if folder.is_adapter else ""),
        "sha256": folder.sha256,
        "format": f"{folder.config['format_version']}, written by perturbdiff {folder.config['library_version']}",
        "license": training.license or "not stated",
        "X": counts if how.target_sum is not None else "log1p values, normalised as the training data were",
        "library": f"obs column {how.library_size_col}" if how.library_size_col else "row sums of X",
        "genes": _shown(said.genes.names) + (", with Ensembl ids" if said.genes.ensembl else ""),
        "perturbations": _shown(names.perturbations.names),
        "cell types": _shown(names.cell_types.names),
        "batches": _shown(names.batches.names),
        "combinations": f"A{names.combination_separator}B" if names.combination_separator else "not split",
        "doses": _doses(names),
        "features": _features(names),
        "obs columns": f"{config.obs.perturbation} (controls: "
        f"{', '.join((config.obs.control_label, *config.obs.other_control_labels))}), "
        f"{config.obs.cell_type or 'no cell type'}, {config.obs.batch or 'no batch'}",
        "denoiser": f"{_size(source, folder)}; width {config.denoiser.width}, depth "
        f"{config.denoiser.depth}, {config.denoiser.conditioning} conditioning",
        "sets": f"{config.set_size} cells"
        + ("" if said.trained is None else f", means of {len(said.trained.n_cells):,} trained conditions"),
        "sampling": f"{config.sampling.sampler}, {config.sampling.n_calls} steps, guidance "
        f"{config.sampling.guidance_scale:g}",
        "trained on": _origin(training),
        "held out": "not stated" if training.hold_out is None else ", ".join(training.hold_out) or "nothing",
    }
    text = [hanging(f"{name:<14}{printable(str(value))[:MAX_LINE]}", 14) for name, value in lines.items()]
    return "\n".join([*text, *_scores(said.evaluation)])


def model_summary(said: ModelMetadata) -> str:
    """The same in six lines, without where it comes from."""
    training, scores = said.training, said.evaluation.scores if said.evaluation else {}
    held_out = f"; held out {few(list(training.hold_out))}" if training.hold_out else ""
    lines = {
        "X": "raw counts" if said.preprocessing.input_kind == "counts" else "log1p values",
        "genes": _shown(said.genes.names),
        "perturbations": _shown(said.vocabularies.perturbations.names),
        "cell types": _shown(said.vocabularies.cell_types.names),
        "trained on": _origin(training) + held_out,
        "scores": ", ".join(f"{name} {value:.3g}" for name, value in scores.items()) or "none",
    }
    return "\n".join(f"  {name:<14}{printable(text)[:MAX_LINE]}" for name, text in lines.items())


def difference(a: ModelSource, b: ModelSource) -> str:
    """A line for everything that differs; raises as `model_info`."""
    (folder_a, said_a), (folder_b, said_b) = a.read(), b.read()
    lines = []
    flat_a, flat_b = (_flat(_settings(folder)) for folder in (folder_a, folder_b))
    for key in sorted(flat_a.keys() | flat_b.keys()):
        one, other = (str(flat.get(key, "(none)")) for flat in (flat_a, flat_b))
        if one != other:
            lines.append(f"{key.replace('.json', '')}: {one[:80]} -> {other[:80]}")
    vocabularies = {
        "genes": (said_a.genes.names, said_b.genes.names),
        "perturbations": (said_a.vocabularies.perturbations.names, said_b.vocabularies.perturbations.names),
        "cell types": (said_a.vocabularies.cell_types.names, said_b.vocabularies.cell_types.names),
        "batches": (said_a.vocabularies.batches.names, said_b.vocabularies.batches.names),
    }
    for name, (one_names, other_names) in vocabularies.items():
        new, gone = set(other_names) - set(one_names), set(one_names) - set(other_names)
        if new:
            lines.append(f"{name}: new {_shown(sorted(new))}")
        if gone:
            lines.append(f"{name}: gone {_shown(sorted(gone))}")
        if not new and not gone and one_names != other_names:
            lines.append(f"{name}: the same in another order")
    one_scores, other_scores = (
        {} if said.evaluation is None else {m: f"{v:.4g}" for m, v in said.evaluation.scores.items()}
        for said in (said_a, said_b)
    )
    for metric in sorted(one_scores.keys() | other_scores.keys()):
        if (one := one_scores.get(metric, "-")) != (other := other_scores.get(metric, "-")):
            lines.append(f"score {metric}: {one} -> {other}")
    weights = [{**folder.tensor_files, GOLDEN: ""} for folder in (folder_a, folder_b)]
    lines.append("weights: the same files" if weights[0] == weights[1] else "weights: differ")
    return "\n".join(printable(line) for line in lines)


def _size(source: ModelSource, folder: ModelFolder) -> str:
    # Counted from the headers of the weights; of a repo, whose weights are not fetched for it, what the Hub lists.
    files = [name for name in folder.tensor_files if name != GOLDEN]
    if all((folder.path / name).is_file() for name in files):
        headers = [tensor_header(inside(folder.path, name)).items() for name in files]
        not_weights = (*MEANS_TENSORS, *NOISE_TENSORS, OVERDISPERSION)
        sizes = [math.prod(shape) for of in headers for name, (shape, _) in of if name not in not_weights]
        return f"{sum(sizes):,} parameters"
    return f"{size:,} bytes of weights" if (size := source.listed_bytes(files)) else "weights that are not here"


def _settings(folder: ModelFolder) -> dict[str, Any]:
    config = {key: value for key, value in folder.config.items() if key != "sha256"}
    return {"config": config, **{name: folder.json[name] for name in ("preprocessing.json", "training.json")}}


def _origin(training: TrainingRecord) -> str:
    if training.converted_from is not None:
        return f"{training.converted_from.file}, a published checkpoint"
    atlases = [f"{atlas.name} at {(atlas.commit or atlas.sha256)[:12]}" for atlas in training.atlases]
    data = ", ".join(atlases) or (training.screen or "not stated").replace("\\", "/").rsplit("/", 1)[-1]
    start = training.init_from
    after = "" if start is None else f", from {start.name} ({start.method})"
    steps, cells = ("?" if n is None else n for n in (training.steps, training.cells_seen))
    return f"{data}; {steps} steps, {cells} cells seen{after}"


def _features(names: Vocabularies) -> str:
    tables = ", ".join(f"{name} ({width})" for name, width in names.tables)
    return f"{tables}; {names.n_by_features:,} perturbations by them alone" if tables else "none"


def _scores(evaluation: EvaluationRecord | None) -> list[str]:
    if evaluation is None:
        return [f"{'scores':<14}not evaluated"]
    lines = [f"{'scores':<14}mean over {evaluation.n_conditions} held-out conditions of {evaluation.data}"]
    for metric, direction in evaluation.metrics.items():
        known = evaluation.comparable(metric)
        best = min(known, key=lambda method: evaluation.distance(method, metric), default=None)
        own, other = (None if name is None else evaluation.mean[name][metric] for name in (evaluation.model, best))
        beside = "no baseline" if other is None else f"best baseline {other:.3f}"
        lines.append(f"  {metric:<24}{'-' if own is None else f'{own:.3f}'} ({beside}; {direction})")
    return [hanging(printable(line), 14) for line in lines]


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _shown(names: Sequence[str]) -> str:
    return f"{len(names):,}" + (f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "")
