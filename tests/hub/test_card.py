import ast
import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import anndata
import datasets
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard, parse_eval_result_entries
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from perturbdiff.atlas.card import atlas_card, size_category
from perturbdiff.atlas.format import AtlasInfo, AtlasSource, Shard, read_info
from perturbdiff.config import DenoiserConfig, DiffusionConfig, ModelConfig, ObsColumns, Preprocessing, SamplingConfig
from perturbdiff.data.vocab import GeneVocab, LabelVocab, Vocabularies
from perturbdiff.hub.card import check_card, eval_results_files, write_card
from perturbdiff.hub.metadata import ModelMetadata, parse_metadata
from perturbdiff.hub.model_folder import read_folder
from perturbdiff.hub.records import (
    AtlasRecord,
    ConversionRecord,
    EvaluationRecord,
    MeansRecord,
    SplitRecord,
    StartRecord,
    TrainingRecord,
)
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from tests.atlases import write_atlas
from tests.simulated import tiny_config, write_screen

TRAINING = TrainingRecord(
    library_version="0.1.0", screen="kang.h5ad", steps=300, cells_seen=115200, control_match="batch",
    hold_out=("IFN-beta:CD4T",), settings={"split": {"validation": []}, "training": {"seed": 7}},
)  # fmt: skip
MODEL = ModelMetadata(
    GeneVocab(("GAPDH", "ACTB")),
    Vocabularies(LabelVocab("", ()), LabelVocab("", ()), LabelVocab("", ()), None),
    Preprocessing("counts", 1e4, 10.0),
    ModelConfig(
        DenoiserConfig(width=8, depth=1, n_heads=2), DiffusionConfig(), SamplingConfig(n_steps=3),
        ObsColumns(batch="donor"), set_size=8,
    ),
    TRAINING,
)  # fmt: skip
METHODS = ("no change", "PerturbDiff", "ridge", "ceiling")
EVALUATION = EvaluationRecord(
    library_version="0.1.0",
    model="PerturbDiff",
    ceiling="ceiling",
    data="kang.h5ad",
    split=SplitRecord(("IFN-beta:CD4T",), "c" * 64),
    n_conditions=3,
    metrics={"pearson_delta": "higher", "energy_distance": "lower", "variance_ratio": "ideal 1"},
    mean={
        "no change": {"pearson_delta": None, "energy_distance": 1.25, "variance_ratio": 1.05},
        "PerturbDiff": {"pearson_delta": 0.92, "energy_distance": 0.25, "variance_ratio": 0.8},
        "ridge": {"pearson_delta": 0.883, "energy_distance": 0.125, "variance_ratio": 1.1},
        "ceiling": {"pearson_delta": 0.97, "energy_distance": 0.001, "variance_ratio": 1.0},
    },
    n_undefined={
        method: {"pearson_delta": 3 * (method == "no change"), "energy_distance": 0, "variance_ratio": 0}
        for method in METHODS
    },
    interval={"PerturbDiff": {"pearson_delta": (0.91, 0.93), "energy_distance": None, "variance_ratio": None}},
    verdict="By energy_distance, PerturbDiff is better than the best simple method (ridge) on 0 of 3 conditions.",
    n_genes=4805,
    n_left_out=1000,
    kept_response=0.9,
    notes=("1,000 of 4,805 genes are not predicted and scored as no change.",),
)
START = StartRecord("owner/base", "e" * 40, "f" * 64, "lora")
HEAD = "---\nlicense: mit\n---\n"
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
MARKDOWN.validateLink = lambda url: True  # a renderer that believes everything
OWN_TAGS = {
    *("h1", "h2", "p", "a", "code", "pre", "ul", "li", "strong", "table", "thead", "tbody", "tr", "th", "td"),
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of the HTML: tags with their attributes, and the text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data):
        self.texts.append(data)


def metadata(training=None, evaluation=None, labels=None, **changed) -> ModelMetadata:
    """A model of two genes and two perturbations; `training`, `labels` and `changed` replace fields."""
    training = replace(TRAINING, **(training or {}))
    return replace(MODEL, training=training, evaluation=evaluation, vocabularies=vocabularies(labels or {}), **changed)


def vocabularies(labels) -> Vocabularies:
    names = {"perturbations": ("IFN-beta", "TNF"), "cell_types": ("CD4T", "B"), "batches": ("b1",)}
    names |= {kind: labels.get(kind, default) for kind, default in names.items()}
    rest = {key: value for key, value in labels.items() if key not in names}
    vocabs = {kind: LabelVocab(kind, tuple(dict.fromkeys(values))) for kind, values in names.items()}
    return Vocabularies(**vocabs, **{"combination_separator": "+", **rest})


def card(name="owner/model", **changed):
    return write_card(metadata(**changed), 5928, name)


def scored(**own) -> EvaluationRecord:
    """With other scores of the model."""
    mean = {**EVALUATION.mean, "PerturbDiff": {**EVALUATION.mean["PerturbDiff"], **own}}
    return replace(EVALUATION, mean=mean)


def body(text):
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def code_of(text):
    return re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]


def rows_of(text, heading):
    """The cells of the table of a section, as they are read on a page."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[html.unescape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]


# ---------------------------------------------------------------- what a card says


def test_the_front_matter_is_what_the_clients_own_parser_reads():
    atlases = (AtlasRecord("owner/atlas", "a" * 40, "b" * 64), AtlasRecord("/home/me/atlases/own", None, "d" * 64))
    text = card(training={"license": "CC-BY-4.0", "init_from": START, "atlases": atlases}, evaluation=EVALUATION)
    data = ModelCard(text).data
    assert (data.license, data.library_name) == ("cc-by-4.0", "perturbdiff")
    assert (data.base_model, data.base_model_relation) == ("owner/base", "finetune")
    assert data.datasets == ["owner/atlas"]
    assert {"single-cell", "perturbation", "diffusion"} <= set(data.tags)
    assert data.model_name == "model"
    assert {r.metric_type: r.metric_value for r in data.eval_results} == EVALUATION.mean["PerturbDiff"]
    assert {(r.dataset_name, r.dataset_args["hold_out"][0]) for r in data.eval_results} == {
        ("kang.h5ad", "IFN-beta:CD4T")
    }


def test_metrics_that_are_undefined_are_not_in_the_front_matter():
    data = ModelCard(card(evaluation=scored(pearson_delta=None))).data
    assert {r.metric_type for r in data.eval_results} == {"energy_distance", "variance_ratio"}
    undefined = scored(**dict.fromkeys(EVALUATION.metrics))
    assert "model-index" not in ModelCard(card(evaluation=undefined)).data.to_dict()


@pytest.mark.parametrize(
    ("license", "fields"),
    [
        ("MIT", {"license": "mit"}),
        ("Ask: me\n--- first", {"license": "other", "license_name": "ask-me-first"}),
        ("問", {"license": "other", "license_name": "custom"}),
        (None, {}),
        ("", {}),
    ],
)
def test_a_license_that_the_hub_does_not_know_is_named(license, fields):
    text = card(training={"license": license})
    data = ModelCard(text).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == fields
    assert ("not stated" in text) == (not fields)


def test_the_metrics_of_the_model_stand_beside_every_baseline_and_the_ceiling():
    text = card(evaluation=EVALUATION)
    head, _, *rows = rows_of(text, "Evaluation")
    assert head == ["method", "pearson_delta ↑", "energy_distance ↓", "variance_ratio → 1"]
    assert [row[0].strip("*") for row in rows] == ["PerturbDiff", "no change", "ridge", "ceiling"]
    for row in rows:
        expected = EVALUATION.mean[row[0].strip("*")]
        assert [None if cell.startswith("-") else float(cell.split()[0]) for cell in row[1:]] == [
            None if value is None else round(value, 3) for value in expected.values()
        ]
    assert rows[1][1] == "- (3 undefined)"
    assert "3 held-out conditions of kang.h5ad: IFN-beta:CD4T" in text
    assert "on energy_distance: ridge; on variance_ratio: no change, ridge." in text


def test_scores_stand_under_their_metric_in_whatever_order_a_method_has_them():
    turned = {method: dict(reversed(row.items())) for method, row in EVALUATION.mean.items()}
    mean = {**turned, "ridge": EVALUATION.mean["ridge"]}
    assert card(evaluation=replace(EVALUATION, mean=mean)) == card(evaluation=EVALUATION)


def test_a_model_that_nothing_beats_is_said_to_be():
    best = scored(pearson_delta=0.95, energy_distance=0.01, variance_ratio=1.0)
    assert "No baseline is better than the model" in card(evaluation=best)
    assert "was not evaluated" in card()


def test_the_training_data_are_named_with_their_revisions():
    atlases = (AtlasRecord("owner/atlas", "a" * 40, "b" * 64),)
    given = {"data": {"atlases": [{"path": "owner/atlas", "revision": "v1", "sets": "marginal", "weight": 3.0}]}}
    text = card(training={"screen": None, "atlases": atlases, "settings": given})
    (row,) = [row for row in rows_of(text, "Training data") if row[0] == "atlas"]
    for words in ("[owner/atlas](https://huggingface.co/datasets/owner/atlas)", "revision v1", "a" * 40, "marginal"):
        assert words in row[1]
    rows = dict(rows_of(card(), "Training data"))
    assert (rows["screen"], rows["steps"], rows["cells seen"]) == ("kang.h5ad", "300", "115,200")
    assert (rows["held out"], rows["seed"]) == ("IFN-beta:CD4T", "7")


@pytest.mark.parametrize("settings", [{}, {"data": 1, "training": "x", "split": []}, {"data": {"atlases": {"a": 1}}}])
def test_settings_of_no_known_form_are_left_out(settings):
    atlases = (AtlasRecord("owner/atlas", None, "b" * 64),)
    rows = rows_of(card(training={"settings": settings, "atlases": atlases}), "Training data")
    assert not {"seed", "validated on"} & {row[0] for row in rows}
    assert ["atlas", f"atlas, sha256 {'b' * 64}"] in rows


def test_no_path_of_the_trainers_machine_is_shown():
    training = {
        "screen": "/home/somebody/screen.h5ad",
        "atlases": (AtlasRecord("/home/somebody/atlas", None, "b" * 64),),
        "converted_from": ConversionRecord("C:\\somebody\\file.ckpt", "c" * 64, "ema", 7, None, None),
    }
    text = card(training=training, evaluation=replace(EVALUATION, data="/home/somebody/other.h5ad"))
    assert "somebody" not in text
    for name in ("screen.h5ad", "atlas", "file.ckpt", "other.h5ad"):
        assert name in text
    assert dict(rows_of(text, "Training data"))["global step"] == "7"


def test_what_the_model_expects_is_that_of_its_folder():
    rows = dict(rows_of(card(), "What it expects"))
    assert rows["genes"] == "2, matched by name: GAPDH, ACTB"
    assert rows["obs columns"].startswith("cell_type and donor")
    assert rows["combinations"].endswith("A+B")
    assert rows["cells of a set"] == "up to 8"
    assert "raw counts" in rows["`X` of the control cells"]
    with_ids = GeneVocab(MODEL.genes.names, ("E1", "E2"))
    other = dict(rows_of(card(preprocessing=Preprocessing("log1p", None, 10.0), genes=with_ids), "What it expects"))
    assert "counts are refused" in other["`X` of the control cells"]
    assert "or Ensembl id" in other["genes"]
    alone = card(labels={"combination_separator": None})
    assert dict(rows_of(alone, "What it expects"))["combinations"] == "none"
    assert "Combinations" not in alone.split("## Limits")[1]


def test_dose_is_a_limit_of_models_of_labels_only():
    assert "Dose and time are not inputs" in card()
    denoiser = replace(MODEL.config.denoiser, conditioning="reference")
    assert "Dose" not in card(config=replace(MODEL.config, denoiser=denoiser))


def test_a_model_that_does_not_know_how_batches_differ_says_that_its_populations_do_not_vary():
    said = "Its populations do not vary as batches of one condition do"
    assert said in card()  # as those of the reference preset, which keep no means
    two = MeansRecord(("TNF", "TNF"), ("B", "B"), ("b1", "b2"), (9, 9), noise=True)
    assert said not in card(trained=two)
    assert said in card(trained=replace(two, cell_type=("B", "CD4T")))
    assert said in card(trained=replace(two, noise=False))


def test_features_and_doses_are_told():
    names = ("IFN-beta", "TNF", "IL4")
    text = card(labels={"perturbations": names, "tables": (("esm2", 1280),), "dose_separator": "@", "n_by_features": 1})
    rows = dict(rows_of(text, "What it expects"))
    assert rows["features"] == "esm2 (1,280); 1 of the perturbations by them alone"
    assert rows["doses"] == "written behind the name, as A@0.5"
    limits = text.split("## Limits")[1]
    assert "no cell of the last one: judge" in limits
    assert "any other is an error without features" in limits
    assert "Dose and time are not inputs" not in limits
    assert "no notion of a similar one" not in limits
    assert "that no features describe" in text
    assert "that no features describe" not in card()


def test_tables_of_features_are_named_with_date_and_license_and_what_newer_ones_may_hold():
    about = {"kind": "GO", "date": "2022-Sep12", "license": "Artistic-2.0", "x|<b>": "<script>"}
    settings = {"features": {"go": about, "esm2": {}, "coexpression": {}, "odd": 7}}
    labels = {"tables": tuple((name, 3) for name in settings["features"])}
    text = card(training={"settings": settings}, labels=labels)
    rows = [row[1] for row in rows_of(text.replace("|<b>", ""), "Training data") if row[0] == "features"]
    assert rows[0].startswith("go: kind GO; date 2022-Sep12; license Artistic-2.0;")
    assert rows[1:] == [
        "esm2: origin, date and license are not stated", "coexpression: of the training cells",
        "odd: origin, date and license are not stated",
    ]  # fmt: skip
    assert "a table that is newer than a screen may hold what that screen found" in text
    check_card(text)
    assert "newer than a screen" not in card()
    assert "features" not in dict(rows_of(card(training={"settings": {"features": [1]}}), "Training data"))


@pytest.mark.parametrize(
    ("start", "on_hub"),
    [(START, True), (replace(START, revision=None), False), (replace(START, name="/home/x"), False)],
)
def test_a_card_names_the_checkpoint_that_training_started_from(start, on_hub):
    text = card(training={"init_from": start})
    row = dict(rows_of(text, "Training data"))["started from"]
    assert row.startswith(start.name)
    assert row.endswith("(adapt.method=lora)")
    assert (START.revision in row) == (start.revision is not None)
    data = ModelCard(text).data.to_dict()
    assert data.get("base_model") == ("owner/base" if on_hub else None)
    assert ("base_model_relation" in data) == on_hub


def test_long_lists_are_cut():
    many = tuple(f"drug {i}" * 50 for i in range(5000))
    text = card(labels={"perturbations": many}, training={"hold_out": ("x",) * 5000})
    assert len(text) < 20_000
    assert text.count("and 4,980 more") == 2
    check_card(text)


def test_a_model_without_perturbations_says_that_it_predicts_nothing():
    text = card(labels={"perturbations": (), "cell_types": (), "batches": ()})
    assert "it predicts no response" in text
    assert "predict(" not in text
    ast.parse(code_of(text))
    check_card(text)


@pytest.mark.parametrize("name", ["o'brien", 'a "b" c', "a\\b", "line\nbreak", "```", "é\u202eß", "'\"", "{x}"])
def test_the_code_of_a_card_names_exactly_this_model_and_perturbation(name):
    text = card(name, labels={"perturbations": (name,)})
    check_card(text)
    strings = [node.value for node in ast.walk(ast.parse(code_of(text))) if isinstance(node, ast.Constant)]
    assert strings.count(name) == 2


def test_a_card_runs_as_printed(tmp_path, monkeypatch):
    config = tiny_config(write_screen(tmp_path), tmp_path / "out")
    folder = fit(config).folder / "model"
    screen = anndata.read_h5ad(config.data.screen)
    controls = screen[screen.obs["perturbation"] == "control"][:12]
    controls.write_h5ad(tmp_path / "controls.h5ad")
    model = PerturbDiff.from_pretrained(folder, device="cpu")
    text = write_card(parse_metadata(read_folder(folder)), model.n_parameters, str(folder))
    check_card(text)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code_of(text), scope)  # noqa: S102
    assert scope["predicted"].n_obs == 12
    assert list(scope["predicted"].var_names) == list(model.genes.names)


# ---------------------------------------------------------------- names of strangers

ODD = [
    "<script>alert(1)</script>", "a|b", "`x`", "``` js", "x\n---\ny", "---", "{{7*7}}", "](javascript:alert(1))",
    "[a](data:text/html,x)", "<img src=x onerror=alert(1)>", "![x](javascript:x)", "<!--", "-->", "&lt;script&gt;",
    "https://evil.example", "www.evil.example", "_a_", "__b__", "*c*", "~~d~~", "# e", "$$f$$", "]: javascript:x",
    "<javascript:alert(1)>", "\\", "\\|", "|", "\u202e", "\ud800", "\x00", "\r\n\r\n<b>", "", " ", "x" * 5000, "&amp;",
    "@someone", "'", '"', ": ", "- x", "1. x", "!!python/object:x", "&a *a", "%", "\u2028", "é", "😀", "null", "1e9",
]  # fmt: skip
names = st.one_of(st.sampled_from(ODD), st.text(max_size=30), st.lists(st.sampled_from(ODD), max_size=4).map("".join))
lists = st.lists(names, min_size=1, max_size=4)


def shown(name):
    """A name as a reader may see it: one line, cut, with a sign for what cannot be printed."""
    letters = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in name)
    return " ".join(letters.split())[:60].strip()


def check_page(text, expected):
    """Only our own tags and https links, every name to be read letter by letter, tables with all their columns."""
    page = Page(MARKDOWN.render(body(text)))
    assert {tag for tag, _ in page.tags} <= OWN_TAGS
    for tag, attributes in page.tags:
        assert all(v.startswith("https://") for k, v in attributes.items() if k == "href"), attributes
        assert set(attributes) <= {"href", "class", "style"}, (tag, attributes)
    words = " ".join("".join(page.texts).split())
    for name in expected:
        assert " ".join(shown(name).split()) in words, name
    for table in re.findall(r"(?:^\|.*\n)+", body(text), re.MULTILINE):
        assert len({len(line.split("|")) for line in table.splitlines()}) == 1, table


@given(lists, lists, names, names, names)
@example(ODD[:4], ODD[4:8], ODD[7], ODD[4], ODD[0])
@example(ODD[20:24], ODD[24:28], ODD[11], ODD[29], ODD[30])
def test_cards_of_odd_names_are_safe_and_say_them_as_they_are(labels, others, license, method, name):
    method = (method or "x")[:200]
    mean, n_undefined = ({method: t["ridge"], **t} for t in (EVALUATION.mean, EVALUATION.n_undefined))
    evaluation = replace(
        EVALUATION,
        data=(license or "x")[:200],
        split=SplitRecord(tuple(others), None),
        mean=mean,
        n_undefined=n_undefined,
    )
    training = {
        "license": license, "hold_out": tuple(labels), "screen": name, "library_version": license,
        "converted_from": ConversionRecord(license, name, method, None, None, name),
        "init_from": StartRecord(name, method, name, license),
        "atlases": tuple(AtlasRecord(n, n, n) for n in others),
        "settings": {
            "split": {"validation": others}, "training": {"seed": name},
            "data": {"atlases": [{"revision": n, "sets": n, "weight": n} for n in labels]},
        },
    }  # fmt: skip
    text = card(
        name,
        training=training,
        evaluation=evaluation,
        labels={"perturbations": labels, "cell_types": others, "combination_separator": name},
        genes=GeneVocab(tuple(dict.fromkeys(labels))),
        preprocessing=Preprocessing("counts", 1e4, 10.0, name),
    )
    check_card(text)
    check_page(text, [*labels, *others, method])
    assert isinstance(ModelCard(text).data.to_dict(), dict)
    assert text.encode().decode() == text


def atlas_of(**changed):
    source = AtlasSource("kang", "kang.h5ad", "CC-BY-4.0", 9, 20, 18, "row sums")
    said = {
        "library_version": "0.1.0", "input_kind": "counts", "target_sum": None, "normalisation": "X are raw counts.",
        "n_cells": 9, "n_genes": 20, "n_conditions": 2, "n_perturbations": 1, "n_cell_types": 1, "n_batches": 1,
        "gene_type": "uint16", "value_type": "uint16", "control_label": "control", "dose_separator": None,
        "license": None, "seed": 0,
        "genes_rule": "union", "sources": (source,), "shards": (Shard("data/cells-00000.parquet", 9),),
    }  # fmt: skip
    return AtlasInfo(**{**said, **changed})


@given(names, names, names)
@example(ODD[0], ODD[4], ODD[7])
def test_data_set_cards_of_odd_names_are_safe(name, file, license):
    source = AtlasSource(name, file, license, 9, 20, 18, name)
    text = atlas_card(atlas_of(sources=(source,) * 3, license=license, normalisation=file, genes_rule=name))
    check_card(text)
    check_page(text, [name, file])
    data = DatasetCard(text).data.to_dict()
    assert [config["data_files"] for config in data["configs"]] == [
        "data/*.parquet", "genes.parquet", "conditions.parquet"
    ]  # fmt: skip
    assert atlas_card(atlas_of(sources=(source,) * 3, license=license, normalisation=file, genes_rule=name)) == text


def test_the_data_set_card_says_what_the_atlas_says(tmp_path):
    folder = write_atlas(tmp_path / "atlas", license="cc-by-4.0")
    info, text = read_info(folder), (folder / "README.md").read_text()
    check_card(text)
    data = DatasetCard(text).data.to_dict()
    assert (data["license"], data["size_categories"]) == ("cc-by-4.0", ["n<1K"])
    assert f"{info.n_cells} cells" in data["pretty_name"]
    (row,) = [row for row in rows_of(text, "Sources") if row[0] == info.sources[0].name]
    assert row[1:3] == [info.sources[0].file, f"{info.sources[0].n_cells:,}"]
    columns = {word for row in rows_of(text, "What is in it") for word in re.findall(r"`([a-z_]+)`", row[0])}
    assert set(info.schema.names) <= columns
    assert info.normalisation in html.unescape(text)
    rows = datasets.load_dataset(str(folder), split="train", streaming=True, cache_dir=str(tmp_path / "cache"))
    assert sum(1 for _ in rows) == info.n_cells
    for table, n in (("genes", info.n_genes), ("conditions", info.n_conditions)):
        rows = datasets.load_dataset(
            str(folder), table, split="train", streaming=True, cache_dir=str(tmp_path / "cache")
        )
        assert sum(1 for _ in rows) == n


def test_every_snippet_of_a_data_set_card_names_the_repo():
    code = re.findall(r"^```python\n(.*?)^```", atlas_card(atlas_of(), "lab/atlas"), re.DOTALL | re.MULTILINE)
    opened = [
        argument.value
        for snippet in code
        for call in ast.walk(ast.parse(snippet))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("open", "load_dataset")
        for argument in call.args[:1]
    ]
    assert opened == ["lab/atlas"] * 3
    assert "perturbdiff train --atlas lab/atlas`" in atlas_card(atlas_of(), "lab/atlas")


@pytest.mark.parametrize(
    ("whole", "sources", "expected"),
    [
        (None, ["mit", "mit"], {"license": "mit"}),
        (None, ["mit", "cc-by-4.0"], {"license": "other", "license_name": "mit-and-cc-by-4.0"}),
        (None, ["mit", None], {}),
        ("apache-2.0", ["mit", None], {"license": "apache-2.0"}),
    ],
)
def test_the_license_of_an_atlas_is_that_of_its_sources_where_nobody_says_another(whole, sources, expected):
    made = tuple(replace(atlas_of().sources[0], license=license) for license in sources)
    data = DatasetCard(atlas_card(atlas_of(license=whole, sources=made))).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected


def test_the_data_set_card_lists_each_source_up_to_a_limit():
    source = atlas_of().sources[0]
    text = atlas_card(atlas_of(sources=(source,) * 1000))
    assert len(text) < 40_000
    assert "and 800 more in `atlas.json`" in text


@pytest.mark.parametrize(
    ("n", "word"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6 - 1, "100K<n<1M"), (10**8, "100M<n<1B"),
     (10**12 - 1, "100B<n<1T"), (10**12, "n>1T"), (10**15, "n>1T")],
)  # fmt: skip
def test_sizes_are_the_hubs_words(n, word):
    assert size_category(n) == word


# ---------------------------------------------------------------- the guard before a push


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# no front matter\n", "must begin with front matter"),
        ("---\na: b\n", "must begin with front matter"),
        ("---\nlicense_name: <script>\n---\n", "<script>"),
        (HEAD + "x <script>alert(1)</script>", "<script>alert"),
        (HEAD + "<img src=x onerror=alert(1)>", "<img src"),
        (HEAD + "a <!-- b", "<!-- b"),
        (HEAD + "</b>", "</b>"),
        (HEAD + "<javascript:alert(1)>", "<javascript:"),
        (HEAD + "[x](javascript:alert(1))", r"\]\(javascript:"),
        (HEAD + "![x](http://x.org/a.png)", r"\]\(http:"),
        (HEAD + "```\n<b>\n```\n<b>", "<b>"),
        (HEAD + "a\x1bb", r"\\x1bb"),
    ],
    ids=range(12),
)
def test_what_no_card_of_ours_has_is_not_pushed(text, message):
    with pytest.raises(ValueError, match=message) as error:
        check_card(text)
    assert str(error.value).isprintable()


# ---------------------------------------------------------------- evaluations


def test_results_for_the_hub_are_what_its_client_parses():
    files = eval_results_files(EVALUATION, "owner/benchmark", "a" * 40, "https://huggingface.co/owner/model")
    (path,) = files
    assert path == ".eval_results/owner--benchmark.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(files[path]))
    assert {e.task_id: e.value for e in entries} == EVALUATION.mean["PerturbDiff"]
    assert {(e.dataset_id, e.dataset_revision) for e in entries} == {("owner/benchmark", "a" * 40)}
    assert {e.source_url for e in entries} == {"https://huggingface.co/owner/model"}


def test_there_are_no_results_for_the_hub_without_a_benchmark():
    assert eval_results_files(EVALUATION, None) == {}
    with pytest.raises(ValueError, match="no repo id"):
        eval_results_files(EVALUATION, "../x")
    assert eval_results_files(scored(**dict.fromkeys(EVALUATION.metrics)), "owner/benchmark") == {}


def test_a_card_of_one_perturbation_speaks_of_one():
    undefined = {name: dict.fromkeys(of, 0) for name, of in EVALUATION.n_undefined.items()}
    one = replace(EVALUATION, n_conditions=1, n_undefined=undefined)
    text = card(labels={"perturbations": ("IFN-beta",)}, evaluation=one)
    assert "- It knows IFN-beta; any other is an error.\n" in text
    assert "Scores of 1 held-out condition of kang" in text
    assert "- The scores are of 1 held-out condition of one screen" in text
    (row,) = [row for row in rows_of(text, "What it expects") if row[0] == "combinations"]
    assert row[1] == "none"
    several = card(labels={"perturbations": tuple(f"drug {i}" for i in range(1000))}, evaluation=EVALUATION)
    assert "- It knows the 1,000 perturbations of `perturbations.json`; any other is an error." in several
    assert "Mean over 3 held-out conditions" in several
    assert len(several) < 2 * len(text)
    by_features = {"perturbations": ("A", "B"), "tables": (("go", 5),)}
    assert "without features. Training saw no cell of the last one: judge" in card(
        labels={**by_features, "n_by_features": 1}
    )
    assert "Training saw no cell" not in card(labels=by_features)
