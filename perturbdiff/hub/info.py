"""What a model expects and where it comes from, and how two models differ, without loading weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perturbdiff.data.vocab import Vocabularies
from perturbdiff.files import printable
from perturbdiff.hub.download import ModelSource
from perturbdiff.hub.model_folder import EVALUATION, GOLDEN, Settings, read_settings
from perturbdiff.hub.settings import ModelSettings, parse_settings


def describe(source: ModelSource) -> str:
    """Some twenty lines. Raises as `read_settings` and `parse_settings`."""
    files, said = _read(source)
    how, config, training = said.preprocessing, said.config, said.training
    names = said.vocabularies
    counts = f"raw counts: log1p(count * {how.target_sum:g} / library size) / {how.scale:g} is done for you"
    n_parameters = sum(tensor.numel() for tensor in said.shapes().state_dict().values())
    lines = {
        "model": source.name
        + ("" if source.commit is None else f" at commit {source.commit}")
        + (", an adapter: merged with its base when it is loaded" if files.is_adapter else ""),
        "sha256": files.sha256,
        "format": f"{files.config['format_version']}, written by perturbdiff {files.config['library_version']}",
        "licence": training.get("licence") or "not stated",
        "X": counts if how.input_kind == "counts" else "log1p values, normalised as the training data were",
        "library": f"obs column {how.library_size_col}" if how.library_size_col else "row sums of X",
        "genes": _shown(said.genes.names) + (", with Ensembl ids" if said.genes.ensembl else ""),
        "perturbations": _shown(names.perturbations.names),
        "cell types": _shown(names.cell_types.names),
        "batches": _shown(names.batches.names),
        "combinations": f"A{names.combination_separator}B" if names.combination_separator else "not split",
        "doses": f"as A{names.dose_separator}0.5" if names.dose_separator else "not an input",
        "features": _features(names),
        "obs columns": f"{config.obs.perturbation} (controls: {config.obs.control_label}), {config.obs.cell_type}, "
        f"{config.obs.batch}",
        "denoiser": f"{n_parameters:,} parameters; width {config.denoiser.width}, depth "
        f"{config.denoiser.depth}, {config.denoiser.conditioning} conditioning",
        "sets": f"{config.set_size} cells",
        "sampling": f"{config.sampling.sampler}, {config.sampling.n_calls} steps, guidance "
        f"{config.sampling.guidance_scale:g}",
        "trained on": _origin(training),
        "held out": ", ".join(map(str, _list(training.get("hold_out")))) or "nothing",
    }
    text = [f"{name:<14}{printable(str(value))}" for name, value in lines.items()]
    return "\n".join([*text, *_scores(said.evaluation)])


def difference(a: ModelSource, b: ModelSource) -> str:
    """A line for everything that differs; raises as `describe`."""
    (files_a, said_a), (files_b, said_b) = _read(a), _read(b)
    lines = []
    config_a, config_b = ({k: v for k, v in files.config.items() if k != "sha256"} for files in (files_a, files_b))
    plain_a = {"config": config_a, **{name: files_a.json[name] for name in ("preprocessing.json", "training.json")}}
    plain_b = {"config": config_b, **{name: files_b.json[name] for name in ("preprocessing.json", "training.json")}}
    flat_a, flat_b = _flat(plain_a), _flat(plain_b)
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
    for metric, (one_score, other_score) in _paired_scores(files_a, files_b).items():
        lines.append(f"{metric}: {one_score} -> {other_score}")
    weights_a, weights_b = (
        {name: digest for name, digest in files.tensor_files.items() if name != GOLDEN} for files in (files_a, files_b)
    )
    lines.append("weights: the same files" if weights_a == weights_b else "weights: differ")
    return "\n".join(printable(line) for line in lines)


def _read(source: ModelSource) -> tuple[Settings, ModelSettings]:
    files = read_settings(source.folder)
    source.check_identity(files)
    return files, parse_settings(source.folder, files)


def _origin(training: dict[str, Any]) -> str:
    if "converted_from" in training:
        return f"{training['converted_from']}, a published checkpoint"
    atlases = [
        f"{atlas.get('name')} at {str(atlas.get('commit') or atlas.get('sha256'))[:12]}"
        for atlas in _list(training.get("atlases"))
        if isinstance(atlas, dict)
    ]
    data = ", ".join(atlases) or str(training.get("screen") or "not stated").replace("\\", "/").rsplit("/", 1)[-1]
    start = training.get("init_from")
    after = f", from {start.get('name')} ({start.get('method')})" if isinstance(start, dict) else ""
    return f"{data}; {training.get('steps', '?')} steps, {training.get('cells_seen', '?')} cells seen{after}"


def _features(names: Vocabularies) -> str:
    tables = ", ".join(f"{name} ({width})" for name, width in names.tables)
    return f"{tables}; {names.n_described:,} perturbations by them alone" if tables else "none"


def _scores(evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is None:
        return [f"{'scores':<14}not evaluated"]
    means, model, ceiling = evaluation["mean"], evaluation["model"], evaluation["ceiling"]
    lines = [f"{'scores':<14}mean over {evaluation['n_conditions']} held-out conditions of {evaluation['data']}"]
    for metric, direction in evaluation["metrics"].items():
        others = [
            row[metric] for name, row in means.items() if name not in (model, ceiling) and row[metric] is not None
        ]
        best = {"higher": max, "lower": min}.get(direction, lambda x: min(x, key=lambda v: abs(v - 1)))
        beside = f"best baseline {best(others):.3f}" if others else "no baseline"
        shown = "-" if means[model][metric] is None else f"{means[model][metric]:.3f}"
        lines.append(f"  {metric:<24}{shown} ({beside}; {direction})")
    return [printable(line) for line in lines]


def _paired_scores(a: Settings, b: Settings) -> dict[str, tuple[str, str]]:
    scores = [
        {} if EVALUATION not in files.json else files.json[EVALUATION]["mean"][files.json[EVALUATION]["model"]]
        for files in (a, b)
    ]
    texts = [{m: "-" if v is None else f"{v:.4g}" for m, v in score.items()} for score in scores]
    metrics = sorted(texts[0].keys() | texts[1].keys())
    pairs = {f"score {m}": (texts[0].get(m, "-"), texts[1].get(m, "-")) for m in metrics}
    return {metric: pair for metric, pair in pairs.items() if pair[0] != pair[1]}


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _shown(names: Sequence[str]) -> str:
    return f"{len(names):,}" + (f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "")
