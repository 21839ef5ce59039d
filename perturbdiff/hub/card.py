"""The model card: README.md of a model folder, generated from what the folder says and from its evaluation.

Everything shown may come from a stranger: names are escaped, lists cut, front matter is written by a YAML library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from perturbdiff.cards import CITATION, MAX_LISTED, escaped, front_text, licence_fields, listed
from perturbdiff.hub.card_check import check_evaluation
from perturbdiff.hub.model_folder import ADAPTER_CONFIG
from perturbdiff.hub_client import REPO_ID

LIBRARY = "perturbdiff"
TAGS = ["single-cell", "perturbation", "diffusion", "biology", "transcriptomics"]
HERE = "."  # the name of a folder that is opened where it lies
EVALUATION = "evaluation.json"
TASK = "perturbation-response-prediction"  # no pipeline of the Hub fits, so there is no pipeline_tag
REFERENCE_ONLY = (
    "covariate_dim",
    "perturbation_encoding",
    "cell_type_encoding",
    "batch_encoding",
    "published_encoding",
)
ARROWS = {"higher": "↑", "lower": "↓", "ideal 1": "→ 1"}
TOLD = {
    "screen", "atlases", "steps", "cells_seen", "control_match", "hold_out", "settings", "library_version", "licence",
    "init_from", "converted_from",
}  # fmt: skip


def write_card(
    config: dict[str, Any], json_files: dict[str, dict[str, Any]], n_parameters: int, name: str | None = None
) -> str:
    """Markdown with the Hub's front matter.

    Parameters
    ----------
    config
        config.json: denoiser, diffusion, sampling, obs, set_size.
    json_files
        The other JSON files of the folder by name; evaluation.json, as `Report.save` writes scores.json, may be there.
        training.json may say `licence`, `init_from` (name, revision, sha256 of a checkpoint, and the method of
        adapting it) and `converted_from` (a published file).
    n_parameters
        Of the denoiser.
    name
        What `from_pretrained` in the card opens: a repo id or a folder; the folder itself if None.

    Raises
    ------
    ValueError
        evaluation.json is not what `check_evaluation` takes.
    """
    training = json_files["training.json"]
    evaluation = json_files.get(EVALUATION)
    if evaluation is not None:
        check_evaluation(evaluation)
    perturbations = json_files["perturbations.json"]["names"]
    title = "PerturbDiff model" if name in (None, HERE) else escaped(name)
    licence = training.get("licence")
    stated = f"Licence: {escaped(licence, 400)}." if licence else "The licence of the weights is not stated."
    sections = {
        "": f"# {title}\n\n{_what(perturbations)} {stated}{_adapter(training) if ADAPTER_CONFIG in json_files else ''}",
        "Intended use": _intended_use(json_files["perturbations.json"]),
        "How to load": _how_to_load(perturbations, name or HERE),
        "What it expects": _expects(config, json_files),
        "Training data": _training_data(training),
        "Preprocessing": _preprocessing(json_files["preprocessing.json"]),
        "Architecture": _architecture(config, n_parameters),
        "Evaluation": "Not evaluated." if evaluation is None else _evaluation(evaluation),
        "Limits": _limits(config, json_files, evaluation),
        "Citation": CITATION.rstrip(),
    }
    text = "\n\n".join(f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items())
    return f"---\n{_front_matter(training, evaluation, name, ADAPTER_CONFIG in json_files)}\n---\n{text}\n"


def eval_results_files(
    evaluation: dict[str, Any], benchmark: str | None, revision: str | None = None, source_url: str | None = None
) -> dict[str, str]:
    """The Hub's `.eval_results/*.yaml`: its text by path; nothing without a benchmark.

    The Hub shows such results only where `benchmark` is a data set with an eval.yaml that names the tasks, so a screen
    that is not published has none. The names of the metrics are the task ids.

    Parameters
    ----------
    evaluation
        As evaluation.json.
    benchmark, revision
        Repo id and commit of the data set.
    source_url
        Where the results come from.

    Raises
    ------
    ValueError
        As `check_evaluation`; `benchmark` is no repo id.

    Notes
    -----
    https://huggingface.co/docs/hub/eval-results
    """
    check_evaluation(evaluation)
    if benchmark is None:
        return {}
    if not REPO_ID.fullmatch(benchmark):
        raise ValueError(f"benchmark {benchmark!r} is no repo id; give OWNER/NAME of a data set on the Hub.")
    notes = front_text(
        f"{evaluation['data'] or 'screen'}: mean over {evaluation['n_conditions']} held-out conditions", 200
    )
    entries = [
        EvalResultEntry(benchmark, metric, value, dataset_revision=revision, source_url=source_url, notes=notes)
        for metric, value in evaluation["mean"][evaluation["model"]].items()
        if value is not None
    ]
    text = yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return {f".eval_results/{benchmark.replace('/', '--')}.yaml": text} if entries else {}


def _front_matter(
    training: dict[str, Any], evaluation: dict[str, Any] | None, name: str | None, is_adapter: bool
) -> str:
    start = _inside(training, "init_from")
    on_hub = isinstance(start.get("revision"), str) and REPO_ID.fullmatch(str(start.get("name"))) is not None
    data_sets = sorted({atlas["name"] for atlas in _atlases(training) if atlas["commit"]})
    results = None
    if evaluation is not None:
        split = evaluation["split"] or {}
        results = [
            EvalResult(
                task_type=TASK,
                task_name="Perturbation response prediction",
                dataset_type="screen",
                dataset_name=front_text(_base_name(evaluation["data"] or "unnamed screen")),
                dataset_split="held-out conditions",
                dataset_args={"hold_out": [front_text(word) for word in split.get("hold_out", [])[:MAX_LISTED]]},
                metric_type=metric,
                metric_name=f"{metric} ({_direction(evaluation['metrics'][metric])})",
                metric_value=value,
            )
            for metric, value in evaluation["mean"][evaluation["model"]].items()
            if value is not None
        ]
    licence = licence_fields(training["licence"] if isinstance(training.get("licence"), str) else None)
    return ModelCardData(
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        library_name=LIBRARY,
        tags=TAGS,
        datasets=data_sets or None,
        base_model=start["name"] if on_hub else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if on_hub else None,
        model_name=front_text((name or "").rstrip("/").split("/")[-1].strip(".")) or "PerturbDiff" if results else None,
        eval_results=results or None,
    ).to_yaml()


def _what(perturbations: list[str]) -> str:
    if not perturbations:
        return "Trained on unperturbed cells, without perturbations: a start for training; it predicts no response."
    return (
        "Predicts how single cells respond to a perturbation: from unperturbed control cells it draws the "
        "distribution of cells that the perturbation makes of them, a functional diffusion model of sets of cells."
    )


def _adapter(training: dict[str, Any]) -> str:
    base = _inside(training, "init_from")
    return (
        f"\n\nAn adapter: low-rank changes (LoRA) and newly trained layers, of no use without its base, "
        f"{escaped(base.get('name'), 200)} with config.json of sha256 {escaped(base.get('sha256'))}. It is merged when "
        "it is loaded; `base=` says where the base is, if it is not on the Hub."
    )


def _intended_use(labels: dict[str, Any]) -> str:
    if not labels["names"]:
        return "Research: the start of a model of perturbation responses. It is not meant to predict anything itself."
    beyond = " and that no features describe" if labels.get("tables") else ""
    return f"""\
Research: to predict the cells of a condition that was not measured, in a context (cell type, batch) of which there are
control cells, for example to choose the next experiment.

Out of scope: decisions about patients; perturbations that it was not trained on{beyond}; contexts without control
cells."""


def _how_to_load(perturbations: list[str], name: str) -> str:
    lines = ["from perturbdiff import PerturbDiff", "", f"model = PerturbDiff.from_pretrained({_literal(name)})"]
    after = ""
    if perturbations:
        short = [p for p in perturbations[:1000] if len(p) <= 200]
        first = _literal(short[0]) if short else "model.perturbations[0]"
        lines = ["import anndata", *lines]
        lines.append('controls = anndata.read_h5ad("controls.h5ad")  # control cells of the context to predict')
        lines.append(f"predicted = model.predict(controls, perturbation={first})")
        after = """

`predicted` is an AnnData of log1p values with the model's gene names; `n_populations=3` draws the response three times,
and `predicted.uns["perturbdiff"]` says how it was made and what was unseen."""
    return "```python\n" + "\n".join(lines) + "\n```" + after


def _expects(config: dict[str, Any], files: dict[str, dict[str, Any]]) -> str:
    how, obs, labels = files["preprocessing.json"], config["obs"], files["perturbations.json"]
    ensembl = files["genes.json"].get("ensembl")
    if how["input_kind"] == "counts":
        values = f"raw counts, or log1p values of {how['target_sum']:g} counts a cell"
    else:
        values = "log1p values, normalised as the training data were; counts are refused"
    separator = labels.get("combination_separator")
    genes = files["genes.json"]["names"]
    rows = [
        ("`X` of the control cells", values),
        ("genes", f"{len(genes):,}, matched by name{' or Ensembl id' if ensembl else ''}: {listed(genes)}"),
        ("obs columns", f"{escaped(obs['cell_type'])} and {escaped(obs['batch'])}, or `cell_type=` and `batch=`"),
        ("perturbations", f"{len(labels['names']):,}: {listed(labels['names'])}" if labels["names"] else "none"),
    ]
    if labels["names"]:
        joined = f"of these, joined as A{escaped(separator)}B" if separator else "none"
        rows.append(("combinations", joined))
        if labels.get("tables"):
            tables = listed([f"{name} ({width:,})" for name, width in labels["tables"]])
            rows.append(("features", f"{tables}; {labels['n_described']:,} of the perturbations by them alone"))
        if dose := labels.get("dose_separator"):
            rows.append(("doses", f"written behind the name, as A{escaped(dose)}0.5"))
    for file, what in (("cell_types.json", "cell types"), ("batches.json", "batches")):
        names = files[file]["names"]
        rows.append((f"{what} seen", f"{len(names):,}: {listed(names)}" if names else "not an input"))
    rows.append(("cells of a set", f"up to {config['set_size']:,}"))
    return _table(("what", "value"), rows)


def _training_data(training: dict[str, Any]) -> str:
    settings = training.get("settings")
    split = _inside(settings, "split")
    rows = []
    if isinstance(screen := training.get("screen"), str):
        rows.append(("screen", escaped(_base_name(screen))))
    for atlas in _atlases(training):
        said = [f"{word} {escaped(atlas[word])}" for word in ("revision", "commit", "sha256") if atlas[word]]
        more = [f"{word} {escaped(atlas[word])}" for word in ("sets", "weight") if atlas[word] is not None]
        link = f"[{atlas['name']}](https://huggingface.co/datasets/{atlas['name']})" if atlas["commit"] else None
        rows.append(("atlas", ", ".join([link or escaped(atlas["name"]), *said, *more])))
    if isinstance(name := (start := _inside(training, "init_from")).get("name"), str):
        revision = f" at {escaped(start['revision'])}" if start.get("revision") else ""
        rows.append(("started from", f"{escaped(name, 200)}{revision} (adapt.method={escaped(start.get('method'))})"))
    if isinstance(value := training.get("converted_from"), str):
        rows.append(("converted from", escaped(_base_name(value), 200)))
    for key in ("steps", "cells_seen"):
        if isinstance(value := training.get(key), int):
            rows.append((key.replace("_", " "), f"{value:,}"))
    for what, names in (("held out", training.get("hold_out")), ("validated on", split.get("validation"))):
        if isinstance(names, list):
            rows.append((what, listed(names) or "nothing"))
    if isinstance(match := training.get("control_match"), str):
        rows.append(("controls matched by", "cell type" if match == "cell_type" else "cell type and batch"))
    if (seed := _inside(settings, "training").get("seed")) is not None:
        rows.append(("seed", escaped(seed)))
    other = {k: v for k, v in training.items() if k not in TOLD and isinstance(v, str | int | float)}
    rows += [(escaped(key), escaped(value, 200)) for key, value in list(other.items())[:MAX_LISTED]]
    if "library_version" in training:
        rows.append(("perturbdiff", escaped(training["library_version"])))
    return _table(("what", "value"), rows) + "\n\nEvery setting of the run is in `training.json`."


def _preprocessing(how: dict[str, Any]) -> str:
    if how["input_kind"] != "counts":
        return f"The model's units are log1p values / {how['scale']:g}; the division is done for you."
    column = how["library_size_col"]
    library = f"obs column {escaped(column)}" if column else "row sums of `X`, over all genes that are given"
    return f"""\
log1p(count * {how["target_sum"]:g} / library size) / {how["scale"]:g}, done for you. The library size is the {library}.
Genes that the control cells lack are taken as zero."""


def _architecture(config: dict[str, Any], n_parameters: int) -> str:
    rows = [("parameters", f"{n_parameters:,}")]
    silent = REFERENCE_ONLY if config["denoiser"].get("conditioning") == "labels" else ()
    for part in ("denoiser", "diffusion", "sampling"):
        rows += [(escaped(f"{part}.{key}"), escaped(value)) for key, value in config[part].items() if key not in silent]
    return _table(("setting", "value"), rows)


def _evaluation(evaluation: dict[str, Any]) -> str:
    metrics, mean, undefined = (evaluation[key] for key in ("metrics", "mean", "n_undefined"))
    n, model, ceiling = (evaluation[key] for key in ("n_conditions", "model", "ceiling"))
    order = [model, *(m for m in mean if m not in (model, ceiling)), *([ceiling] if ceiling in mean else [])]
    rows = []
    for method in order:
        cells = []
        for metric in metrics:
            value, lacking = mean[method][metric], undefined[method][metric]
            cells.append(("-" if value is None else f"{value:.3f}") + (f" ({lacking} undefined)" if lacking else ""))
        name = escaped(method)
        rows.append((f"**{name}**" if method == model else name, *cells))
    split = evaluation["split"] or {}
    where = f"of {escaped(_base_name(evaluation['data']))}" if evaluation["data"] else "of a screen"
    held = f": {listed(split['hold_out'])}" if split.get("hold_out") else ""
    sha = f"; split {split['sha256']}" if split.get("sha256") else ""
    head = ("method", *(f"{escaped(metric)} {ARROWS[metrics[metric]]}" for metric in metrics))
    beaten = _beaten(evaluation)
    return f"""\
Mean over {n:,} held-out condition{"s" if n > 1 else ""} {where}{held}{sha}. log1p values, with the measured control
cells on both sides. ↑ higher is better, ↓ lower is better, → 1 ideal is 1.

{_table(head, rows)}

{_sentence_of(beaten) if beaten else "No baseline is better than the model on any metric."}"""


def _beaten(evaluation: dict[str, Any]) -> dict[str, list[str]]:
    """The baselines that are better than the model, by metric."""
    mean, model = evaluation["mean"], evaluation["model"]
    found = {}
    for metric, direction in evaluation["metrics"].items():
        own = _loss(mean[model][metric], direction)
        better = [
            method for method in mean
            if method not in (model, evaluation["ceiling"]) and _loss(mean[method][metric], direction) < own
        ]  # fmt: skip
        if better:
            found[metric] = better
    return found


def _sentence_of(beaten: dict[str, list[str]]) -> str:
    parts = [f"on {escaped(metric)}: {listed(methods)}" for metric, methods in beaten.items()]
    return f"Better than the model {'; '.join(parts)}."


def _loss(value: float | None, direction: str) -> float:
    if value is None:
        return float("inf")
    return {"higher": -value, "lower": value, "ideal 1": abs(value - 1)}[direction]


def _limits(config: dict[str, Any], files: dict[str, dict[str, Any]], evaluation: dict[str, Any] | None) -> str:
    labels = files["perturbations.json"]
    if not labels["names"]:
        return "- It knows no perturbation and predicts no response before it was trained further."
    known = f"- It knows the {len(labels['names']):,} perturbations of `perturbations.json`; any other is an error"
    known += (
        f" without features. Training saw no cell of the last {labels['n_described']:,}: judge these with care."
        if labels.get("tables")
        else "."
    )
    if labels.get("combination_separator"):
        known += " Combinations of them are predicted also where training saw no combination: judge these with care."
    lines = [known]
    if config["denoiser"].get("conditioning") == "labels":
        alike = "" if labels.get("tables") else ": each label is one perturbation, with no notion of a similar one"
        if labels.get("dose_separator"):
            lines.append("- Doses outside the range of those in training are guesses. Time is not an input.")
        else:
            lines.append(f"- Dose and time are not inputs{alike}.")
    lines.append(
        "- A cell type or batch that training saw with no perturbation is an unknown one to the model: the prediction "
        'then rests on the control cells, and `predicted.uns["perturbdiff"]["unseen"]` says so.'
    )
    lines.append(
        "- Fewer than half of its genes in the control cells are an error; those that they lack count as zero."
    )
    if evaluation is None:
        lines.append("- How well it predicts is not known: it was not evaluated.")
    else:
        lines.append(
            f"- The scores are means over {evaluation['n_conditions']:,} held-out "
            f"condition{'s' if evaluation['n_conditions'] > 1 else ''} of one screen; other screens may differ."
        )
    return "\n".join(lines)


def _atlases(training: dict[str, Any]) -> list[dict[str, Any]]:
    """name, commit, sha256, revision, sets, weight of each; `commit` only where the name is a repo id of the Hub."""
    data = _inside(training.get("settings"), "data").get("atlases")
    given = data if isinstance(data, list) else []
    found = []
    entries = training.get("atlases")
    for i, entry in enumerate(entries[:MAX_LISTED] if isinstance(entries, list) else []):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            continue
        more = given[i] if i < len(given) and isinstance(given[i], dict) else {}
        said: dict[str, Any] = {key: more.get(key) for key in ("revision", "sets", "weight")}
        commit = entry.get("commit")
        on_hub = isinstance(commit, str) and REPO_ID.fullmatch(entry["name"]) is not None
        name = entry["name"] if on_hub else _base_name(entry["name"])
        found.append({**said, "name": name, "commit": commit if on_hub else None, "sha256": entry.get("sha256")})
    return found


def _inside(content: Any, key: str) -> dict[str, Any]:
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, dict) else {}


def _base_name(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").split("/")[-1]


def _literal(text: str) -> str:
    """A Python literal on one line, in double quotes where it can be."""
    literal = repr(text)
    return f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal and "\\'" not in literal else literal


def _direction(word: str) -> str:
    return word if word == "ideal 1" else f"{word} is better"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
