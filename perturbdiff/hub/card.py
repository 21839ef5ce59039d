"""The model card: README.md of a model folder, generated from its metadata and its scores.

A card is text: it is checked before it is pushed, and never read to load a model. Everything shown may come from a
stranger: names are escaped, lists cut, front matter is written by a YAML library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from perturbdiff.cards import CITATION, MARKER, MAX_LISTED, card_text, escaped, front_text, license_fields, listed
from perturbdiff.config import COEXPRESSION, ModelConfig, ObsColumns, Preprocessing
from perturbdiff.data.vocab import Vocabularies
from perturbdiff.hub.metadata import ModelMetadata
from perturbdiff.hub.records import EvaluationRecord, TrainingRecord
from perturbdiff.hub_client import REPO_ID

LIBRARY = "perturbdiff"
TAGS = ["single-cell", "perturbation", "diffusion", "biology", "transcriptomics"]
HERE = "."  # the name of a folder that is opened where it lies
TASK = "perturbation-response-prediction"  # no pipeline of the Hub fits, so there is no pipeline_tag
REFERENCE_ONLY = (
    "covariate_dim",
    "perturbation_encoding",
    "cell_type_encoding",
    "batch_encoding",
    "published_encoding",
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
HTML = re.compile(r"</?[a-zA-Z!?]")
LINK = re.compile(r"\]\((?!https://)")
ARROWS = {"higher": "↑", "lower": "↓", "ideal 1": "→ 1", "ideal 0.5": "→ .5"}


def write_card(model: ModelMetadata, n_parameters: int, name: str | None = None, is_adapter: bool = False) -> str:
    """Markdown with the Hub's front matter.

    Parameters
    ----------
    n_parameters
        Of the denoiser.
    name
        What `from_pretrained` in the card opens: a repo id or a folder; the folder itself if None.
    is_adapter
        Of a folder that holds a change of another model's weights.
    """
    perturbations, license = model.vocabularies.perturbations.names, model.training.license
    title = "PerturbDiff model" if name in (None, HERE) else escaped(name)
    stated = f"License: {escaped(license, 400)}." if license else "The license of the weights is not stated."
    sections = {
        "Summary": f"# {title}\n\n{_what(perturbations)} {stated}{_adapter(model.training) if is_adapter else ''}",
        "Intended use": _intended_use(model.vocabularies),
        "How to load": _how_to_load(perturbations, name or HERE),
        "What it expects": _expects(model),
        "Training data": _training_data(model.training),
        "Preprocessing": _preprocessing(model.preprocessing),
        "Architecture": _architecture(model.config, n_parameters),
        "Evaluation": "Not evaluated." if model.evaluation is None else _evaluation(model.evaluation),
        "Limits": _limits(model),
        "Citation": CITATION.rstrip(),
    }
    front_matter = f"{_front_matter(model.training, model.evaluation, name, is_adapter)}\n"
    first = next(iter(sections))
    parts = {part: text if part == first else f"## {part}\n\n{text}" for part, text in sections.items()}
    return card_text(front_matter, parts)


def check_card(text: str) -> None:
    """Refuse to show what could run in a reader's browser: a guard behind the escaping of names.

    Raises
    ------
    ValueError
        No front matter between two lines of --- at the top; HTML outside of code blocks; a link that is not to https; a
        control character.
    """
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if front is None:
        raise ValueError("the card must begin with front matter between two lines of ---.")
    body = MARKER.sub("", re.sub(r"^```.*?^```$", "", text[front.end() :], flags=re.DOTALL | re.MULTILINE))
    for odd, shown in ((CONTROL, text), (HTML, front[0]), (HTML, body), (LINK, body)):
        if found := odd.search(shown):
            raise ValueError(f"the card has {shown[found.start() :][:40]!r}, which may not be shown; change that name.")


def eval_results_files(
    evaluation: EvaluationRecord, benchmark: str | None, revision: str | None = None, source_url: str | None = None
) -> dict[str, str]:
    """The Hub's `.eval_results/*.yaml`: its text by path; nothing without a benchmark.

    The Hub shows such results only where `benchmark` is a data set with an eval.yaml that names the tasks, so a screen
    that is not published has none. The names of the metrics are the task ids.

    Parameters
    ----------
    benchmark, revision
        Repo id and commit of the data set.
    source_url
        Where the results come from.

    Raises
    ------
    ValueError
        `benchmark` is no repo id.

    Notes
    -----
    https://huggingface.co/docs/hub/eval-results
    """
    if benchmark is None:
        return {}
    if not REPO_ID.fullmatch(benchmark):
        raise ValueError(f"benchmark {benchmark!r} is no repo id; give OWNER/NAME of a data set on the Hub.")
    notes = front_text(f"{evaluation.data or 'screen'}: mean over {evaluation.n_conditions} held-out conditions", 200)
    entries = [
        EvalResultEntry(benchmark, metric, value, dataset_revision=revision, source_url=source_url, notes=notes)
        for metric, value in evaluation.scores.items()
    ]
    text = yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return {f".eval_results/{benchmark.replace('/', '--')}.yaml": text} if entries else {}


def _front_matter(
    training: TrainingRecord, evaluation: EvaluationRecord | None, name: str | None, is_adapter: bool
) -> str:
    base = None
    if (start := training.init_from) is not None and start.revision is not None and REPO_ID.fullmatch(start.name):
        base = start.name
    results = None
    if evaluation is not None:
        held_out = evaluation.split.hold_out if evaluation.split else ()
        results = [
            EvalResult(
                task_type=TASK,
                task_name="Perturbation response prediction",
                dataset_type="screen",
                dataset_name=front_text(_base_name(evaluation.data or "unnamed screen")),
                dataset_split="held-out conditions",
                dataset_args={"hold_out": [front_text(word) for word in held_out[:MAX_LISTED]]},
                metric_type=metric,
                metric_name=f"{metric} ({_direction(evaluation.metrics[metric])})",
                metric_value=value,
            )
            for metric, value in evaluation.scores.items()
        ]
    license = license_fields(training.license)
    return ModelCardData(
        license=license.get("license"),
        license_name=license.get("license_name"),
        library_name=LIBRARY,
        tags=TAGS,
        datasets=sorted({name for name, on_hub in map(_atlas, training.atlases[:MAX_LISTED]) if on_hub}) or None,
        base_model=base,
        base_model_relation=base and ("adapter" if is_adapter else "finetune"),
        model_name=front_text((name or "").rstrip("/").split("/")[-1].strip(".")) or "PerturbDiff" if results else None,
        eval_results=results or None,
    ).to_yaml()


def _what(perturbations: Sequence[str]) -> str:
    if not perturbations:
        return "Trained on unperturbed cells, without perturbations: a start for training; it predicts no response."
    return (
        "Predicts how single cells respond to a perturbation: from unperturbed control cells it draws the "
        "distribution of cells that the perturbation makes of them, a functional diffusion model of sets of cells."
    )


def _adapter(training: TrainingRecord) -> str:
    base = training.init_from
    assert base is not None, "an adapter names its base"
    return (
        f"\n\nAn adapter: low-rank changes (LoRA) and newly trained layers, of no use without its base, "
        f"{escaped(base.name, 200)} with config.json of sha256 {escaped(base.sha256)}. It is merged when it is loaded; "
        "`base=` says where the base is, if it is not on the Hub."
    )


def _intended_use(known: Vocabularies) -> str:
    if not known.perturbations.names:
        return "Research: the start of a model of perturbation responses. It is not meant to predict anything itself."
    beyond = " and that no features describe" if known.tables else ""
    return f"""\
Research: to predict the cells of a condition that was not measured, in a context (cell type, batch) of which there are
control cells, for example to choose the next experiment.

Out of scope: decisions about patients; perturbations that it was not trained on{beyond}; contexts without control
cells."""


def _how_to_load(perturbations: Sequence[str], name: str) -> str:
    lines = ["from perturbdiff import PerturbDiff", "", f"model = PerturbDiff.from_pretrained({_literal(name)})"]
    after = ""
    if perturbations:
        short = [p for p in perturbations[:1000] if len(p) <= 200]
        first = _literal(short[0]) if short else "model.perturbations[0]"
        lines = ["import anndata", *lines]
        lines.append('controls = anndata.read_h5ad("controls.h5ad")  # control cells of the context to predict')
        lines.append(f"predicted = model.predict(controls, perturbation={first})")
        after = """

`predicted` is an AnnData of log1p values with the model's gene names; `n_populations=3` draws three populations,
and `predicted.uns["perturbdiff"]` says how it was made and what was unseen."""
    return "```python\n" + "\n".join(lines) + "\n```" + after


def _expects(model: ModelMetadata) -> str:
    how, obs, known = model.preprocessing, model.config.obs, model.vocabularies
    perturbations = known.perturbations.names
    if how.target_sum is not None:
        values = f"raw counts, or logarithms of any known number of counts: log1p of {how.target_sum:g} is made of them"
    else:
        values = "log1p values, normalised as the training data were; counts are refused"
    by = "name or Ensembl id" if model.genes.ensembl else "name"
    rows = [
        ("`X` of the control cells", values),
        ("genes", f"{len(model.genes):,}, matched by {by}: {listed(model.genes.names)}"),
        ("obs columns", _columns(obs)),
        ("perturbations", _number_and_names(perturbations) or "none"),
    ]
    if perturbations:
        separator = known.combination_separator
        several = separator and len(perturbations) > 1
        rows.append(("combinations", f"of these, joined as A{escaped(separator)}B" if several else "none"))
        if known.tables:
            tables = listed([f"{name} ({width:,})" for name, width in known.tables])
            rows.append(("features", f"{tables}; {known.n_by_features:,} of the perturbations by them alone"))
        if known.dose_separator:
            unit = f", in {escaped(known.dose_unit)}" if known.dose_unit else ""
            rows.append(("doses", f"written behind the name, as A{escaped(known.dose_separator)}0.5{unit}"))
    rows.append(("cell types seen", _number_and_names(known.cell_types.names) or "not an input"))
    rows.append(("batches seen", _number_and_names(known.batches.names) or "not an input"))
    rows.append(("cells of a set", f"up to {model.config.set_size:,}"))
    return _table(("what", "value"), rows)


def _columns(obs: ObsColumns) -> str:
    named = [escaped(name) for name in (obs.cell_type, obs.batch) if name is not None]
    return f"{' and '.join(named)}, or `cell_type=` and `batch=`" if named else "none: cells are of one type and batch"


def _number_and_names(names: Sequence[str]) -> str:
    return f"{len(names):,}: {listed(names)}" if names else ""


def _training_data(training: TrainingRecord) -> str:
    settings = training.settings
    rows = []
    if training.screen is not None:
        rows.append(("screen", escaped(_base_name(training.screen))))
    for i, atlas in enumerate(training.atlases[:MAX_LISTED]):
        name, on_hub = _atlas(atlas)
        given = {word: _setting(settings, "data", "atlases", i, word) for word in ("revision", "sets", "weight")}
        facts = {"commit": atlas.commit if on_hub else None, "sha256": atlas.sha256, **given}
        link = f"[{name}](https://huggingface.co/datasets/{name})" if on_hub else escaped(name)
        more = [f"{word} {escaped(value)}" for word, value in facts.items() if value is not None]
        rows.append(("atlas", ", ".join([link, *more])))
    if (start := training.init_from) is not None:
        revision = f" at {escaped(start.revision)}" if start.revision else ""
        rows.append(("started from", f"{escaped(start.name, 200)}{revision} (adapt.method={escaped(start.method)})"))
    if (conversion := training.converted_from) is not None:
        rows.append(("converted from", escaped(_base_name(conversion.file), 200)))
        rest = {key: value for key, value in asdict(conversion).items() if key != "file" and value is not None}
        rows += [(key.replace("_", " "), escaped(value)) for key, value in rest.items()]
    rows += [("features", f"{escaped(name)}: {text}") for name, text in _origins(settings)]
    for what, number in (("steps", training.steps), ("cells seen", training.cells_seen)):
        if number is not None:
            rows.append((what, f"{number:,}"))
    if training.hold_out is not None:
        rows.append(("held out", listed(training.hold_out) or "nothing"))
    if isinstance(validation := _setting(settings, "split", "validation"), list):
        rows.append(("validated on", listed(validation) or "nothing"))
    if training.control_match is not None:
        matched = "cell type" if training.control_match == "cell_type" else "cell type and batch"
        rows.append(("controls matched by", matched))
    if (seed := _setting(settings, "training", "seed")) is not None:
        rows.append(("seed", escaped(seed)))
    if training.library_version is not None:
        rows.append(("perturbdiff", escaped(training.library_version)))
    return _table(("what", "value"), rows) + "\n\nEvery setting of the run is in `training.json`."


def _preprocessing(how: Preprocessing) -> str:
    if how.target_sum is None:
        return f"The model's units are log1p values / {how.scale:g}; the division is done for you."
    column = how.library_size_col
    library = f"obs column {escaped(column)}" if column else "row sums of `X`, over all genes that are given"
    return f"""\
log1p(count * {how.target_sum:g} / library size) / {how.scale:g}, done for you. The library size is the {library}.
Genes that the control cells lack are taken as zero."""


def _architecture(config: ModelConfig, n_parameters: int) -> str:
    rows = [("parameters", f"{n_parameters:,}")]
    silent = REFERENCE_ONLY if config.denoiser.conditioning == "labels" else ()
    for part in ("denoiser", "diffusion", "sampling"):
        settings = asdict(getattr(config, part))
        rows += [(escaped(f"{part}.{key}"), escaped(value)) for key, value in settings.items() if key not in silent]
    return _table(("setting", "value"), rows)


def _evaluation(scores: EvaluationRecord) -> str:
    rows = []
    for method in (scores.model, *scores.baselines, *([scores.ceiling] if scores.ceiling in scores.mean else [])):
        cells = []
        for metric in scores.metrics:
            value, lacking = scores.mean[method][metric], scores.n_undefined[method][metric]
            doubt = scores.interval.get(method, {}).get(metric)
            shown = (
                "-"
                if value is None
                else f"{value:.3f}" + ("" if doubt is None else f" [{doubt[0]:.3f}, {doubt[1]:.3f}]")
            )
            cells.append(shown + (f" ({lacking} undefined)" if lacking else ""))
        rows.append((f"**{escaped(method)}**" if method == scores.model else escaped(method), *cells))
    where = f"of {escaped(_base_name(scores.data))}" if scores.data else "of a screen"
    if scores.split is not None:
        where += f": {listed(scores.split.hold_out)}" if scores.split.hold_out else ""
        where += f"; split {scores.split.sha256}" if scores.split.sha256 else ""
    head = ("method", *(f"{escaped(metric)} {ARROWS[direction]}" for metric, direction in scores.metrics.items()))
    beaten = [f"on {escaped(metric)}: {listed(names)}" for metric in scores.metrics if (names := scores.better(metric))]
    said = "\n\n".join(escaped(text, 2000) for text in (scores.verdict, *scores.notes) if text)
    mean = "Mean over" if scores.n_conditions > 1 else "Scores of"
    return f"""\
{mean} {_conditions(scores)} {where}, with 95 % intervals where they are known.
log1p values, measured control cells on both sides. ↑ higher is better, ↓ lower is better, → ideal.

{_table(head, rows)}

{said}

{f"Better than the model {'; '.join(beaten)}." if beaten else "No baseline is better than the model on any metric."}"""


def _conditions(scores: EvaluationRecord) -> str:
    return f"{scores.n_conditions:,} held-out condition{'s' if scores.n_conditions > 1 else ''}"


def _limits(model: ModelMetadata) -> str:
    known = model.vocabularies
    if not known.perturbations.names:
        return "- It knows no perturbation and predicts no response before it was trained further."
    names = known.perturbations.names
    which = f"the {len(names):,} perturbations of `perturbations.json`" if len(names) > 1 else escaped(names[0])
    first = f"- It knows {which}; any other is an error"
    first += " without features." if known.tables else "."
    if known.n_by_features:
        last = f"the last {known.n_by_features:,}" if known.n_by_features > 1 else "the last one"
        first += f" Training saw no cell of {last}: judge that with care."
    if known.combination_separator and len(names) > 1:
        first += " Combinations of them are predicted also where training saw no combination: judge these with care."
    lines = [first]
    if known.tables:
        lines.append(
            "- What its tables of features know of a perturbation may come from later than the screens that it is "
            "measured on: a table that is newer than a screen may hold what that screen found, and scores of "
            'perturbations that nobody trained on flatter then. Dates and licenses: "Training data".'
        )
    if model.config.denoiser.conditioning == "labels":
        alike = "" if known.tables else ": each label is one perturbation, with no notion of a similar one"
        if known.dose_separator:
            lines.append("- Doses outside the range of those in training are guesses. Time is not an input.")
        else:
            lines.append(f"- Dose and time are not inputs{alike}.")
    lines.append(
        "- A cell type or batch that training saw with no perturbation is an unknown one to the model: the prediction "
        'then rests on the control cells, and `predicted.uns["perturbdiff"]["unseen"]` says so.'
    )
    if model.trained is None or not model.trained.tells_batches_apart:
        lines.append(
            "- Its populations do not vary as batches of one condition do: it does not know how these differ. Several "
            "are repeats of one mixture of cells."
        )
    lines.append(
        "- Fewer than half of its genes in the control cells are an error; of the others nothing is predicted."
    )
    if model.evaluation is None:
        lines.append("- How well it predicts is not known: it was not evaluated.")
    else:
        lines.append(f"- The scores are of {_conditions(model.evaluation)} of one screen; other screens may differ.")
    return "\n".join(lines)


def _origins(settings: Any) -> list[tuple[str, str]]:
    """Name of each table of features, and what it says of where it comes from, escaped."""
    tables = _setting(settings, "features")
    found = []
    for name, about in list(tables.items())[:MAX_LISTED] if isinstance(tables, dict) else []:
        said = about if isinstance(about, dict) else {}
        if not said:
            text = "of the training cells" if name == COEXPRESSION else "origin, date and license are not stated"
        else:
            text = "; ".join(
                f"{escaped(key, 40)} {escaped(value, 120)}" for key, value in list(said.items())[:MAX_LISTED]
            )
        found.append((name, text))
    return found


def _atlas(atlas: Any) -> tuple[str, bool]:
    # Its name without the folders of the trainer's machine, and whether that is a repo id.
    on_hub = atlas.commit is not None and REPO_ID.fullmatch(atlas.name) is not None
    return (atlas.name if on_hub else _base_name(atlas.name)), on_hub


def _setting(settings: Any, *keys: str | int) -> Any:
    # A value of the run's settings, which have no fixed form; None where there is none.
    for key in keys:
        try:
            settings = settings[key]
        except (KeyError, IndexError, TypeError):
            return None
    return settings


def _base_name(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").split("/")[-1]


def _literal(text: str) -> str:
    """A Python literal on one line, in double quotes where it can be."""
    literal = repr(text)
    return f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal and "\\'" not in literal else literal


def _direction(word: str) -> str:
    return word if word.startswith("ideal") else f"{word} is better"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
