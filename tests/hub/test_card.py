import ast
import copy
import html
import json
import re
from html.parser import HTMLParser

import anndata
import datasets
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard, parse_eval_result_entries
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from perturbdiff.atlas.card import atlas_card, size_category
from perturbdiff.atlas.format import AtlasInfo, AtlasSource, Shard, read_info
from perturbdiff.data.screen import Screen
from perturbdiff.evaluation.metrics import METRICS
from perturbdiff.evaluation.report import Report, evaluate
from perturbdiff.hub.card import eval_results_files, write_card
from perturbdiff.hub.card_check import check_card, check_evaluation
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import train
from tests.atlases import write_atlas
from tests.simulated import tiny_config, write_screen

CONFIG = {
    "denoiser": {"width": 8, "depth": 1, "conditioning": "labels"},
    "diffusion": {"n_timesteps": 1000, "schedule": "linear"},
    "sampling": {"sampler": "ddim", "n_steps": 3},
    "obs": {"perturbation": "perturbation", "cell_type": "cell_type", "batch": "donor", "control_label": "control"},
    "set_size": 8,
}
FILES = {
    "genes.json": {"names": ["GAPDH", "ACTB"], "ensembl": []},
    "perturbations.json": {"names": ["IFN-beta", "TNF"], "combination_separator": "+"},
    "cell_types.json": {"names": ["CD4T", "B"]},
    "batches.json": {"names": ["b1"]},
    "preprocessing.json": {"input_kind": "counts", "target_sum": 1e4, "scale": 10.0, "library_size_col": None},
    "training.json": {
        "library_version": "0.1.0", "screen": "kang.h5ad", "atlases": [], "steps": 300, "cells_seen": 115200,
        "control_match": "batch", "hold_out": ["IFN-beta:CD4T"],
        "settings": {"split": {"validation": []}, "training": {"seed": 7}, "data": {"atlases": []}},
    },
}  # fmt: skip
EVALUATION = {
    "format_version": 1,
    "library_version": "0.1.0",
    "model": "PerturbDiff",
    "ceiling": "ceiling",
    "data": "kang.h5ad",
    "split": {"hold_out": ["IFN-beta:CD4T"], "sha256": "c" * 64},
    "n_conditions": 3,
    "metrics": {"pearson_delta": "higher", "energy_distance": "lower", "variance_ratio": "ideal 1"},
    "mean": {
        "no change": {"pearson_delta": None, "energy_distance": 1.25, "variance_ratio": 1.05},
        "PerturbDiff": {"pearson_delta": 0.92, "energy_distance": 0.25, "variance_ratio": 0.8},
        "ridge": {"pearson_delta": 0.883, "energy_distance": 0.125, "variance_ratio": 1.1},
        "ceiling": {"pearson_delta": 0.97, "energy_distance": 0.001, "variance_ratio": 1.0},
    },
    "n_undefined": {
        method: {"pearson_delta": 3 * (method == "no change"), "energy_distance": 0, "variance_ratio": 0}
        for method in ("no change", "PerturbDiff", "ridge", "ceiling")
    },
}
START = {"name": "owner/base", "revision": "e" * 40, "sha256": "f" * 64, "method": "lora"}
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


def files_with(training=None, evaluation=None, **changed):
    files = copy.deepcopy(FILES)
    files["training.json"].update(training or {})
    for name, content in changed.items():
        files[f"{name}.json"].update(content)
    if evaluation is not None:
        files["evaluation.json"] = evaluation
    return files


def card(name="owner/model", **changed):
    return write_card(CONFIG, files_with(**changed), 5928, name)


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
    atlases = [
        {"name": "owner/atlas", "commit": "a" * 40, "sha256": "b" * 64},
        {"name": "/home/me/atlases/own", "commit": None, "sha256": "d" * 64},
    ]
    text = card(training={"licence": "CC-BY-4.0", "init_from": START, "atlases": atlases}, evaluation=EVALUATION)
    data = ModelCard(text).data
    assert (data.license, data.library_name) == ("cc-by-4.0", "perturbdiff")
    assert (data.base_model, data.base_model_relation) == ("owner/base", "finetune")
    assert data.datasets == ["owner/atlas"]
    assert {"single-cell", "perturbation", "diffusion"} <= set(data.tags)
    assert data.model_name == "model"
    assert {r.metric_type: r.metric_value for r in data.eval_results} == EVALUATION["mean"]["PerturbDiff"]
    assert {(r.dataset_name, r.dataset_args["hold_out"][0]) for r in data.eval_results} == {
        ("kang.h5ad", "IFN-beta:CD4T")
    }


def test_metrics_that_are_undefined_are_not_in_the_front_matter():
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["mean"]["PerturbDiff"]["pearson_delta"] = None
    data = ModelCard(card(evaluation=evaluation)).data
    assert {r.metric_type for r in data.eval_results} == {"energy_distance", "variance_ratio"}
    for metric in evaluation["metrics"]:
        evaluation["mean"]["PerturbDiff"][metric] = None
    assert "model-index" not in ModelCard(card(evaluation=evaluation)).data.to_dict()


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ("MIT", {"license": "mit"}),
        ("Ask: me\n--- first", {"license": "other", "license_name": "ask-me-first"}),
        ("問", {"license": "other", "license_name": "custom"}),
        (None, {}),
        ("", {}),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_named(licence, fields):
    text = card(training={} if licence is None else {"licence": licence})
    data = ModelCard(text).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == fields
    assert ("not stated" in text) == (not fields)


def test_the_metrics_of_the_model_stand_beside_every_baseline_and_the_ceiling():
    text = card(evaluation=EVALUATION)
    head, _, *rows = rows_of(text, "Evaluation")
    assert head == ["method", "pearson_delta ↑", "energy_distance ↓", "variance_ratio → 1"]
    assert [row[0].strip("*") for row in rows] == ["PerturbDiff", "no change", "ridge", "ceiling"]
    for row in rows:
        expected = EVALUATION["mean"][row[0].strip("*")]
        assert [None if cell.startswith("-") else float(cell.split()[0]) for cell in row[1:]] == [
            None if value is None else round(value, 3) for value in expected.values()
        ]
    assert rows[1][1] == "- (3 undefined)"
    assert "3 held-out conditions of kang.h5ad: IFN-beta:CD4T" in text
    assert "on energy_distance: ridge; on variance_ratio: no change, ridge." in text


def test_a_model_that_nothing_beats_is_said_to_be():
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["mean"]["PerturbDiff"] = {"pearson_delta": 0.95, "energy_distance": 0.01, "variance_ratio": 1.0}
    assert "No baseline is better than the model" in card(evaluation=evaluation)
    assert "was not evaluated" in card()


def test_the_training_data_are_named_with_their_revisions():
    atlases = [{"name": "owner/atlas", "commit": "a" * 40, "sha256": "b" * 64}]
    given = {"data": {"atlases": [{"path": "owner/atlas", "revision": "v1", "sets": "marginal", "weight": 3.0}]}}
    text = card(training={"screen": None, "atlases": atlases, "settings": given})
    (row,) = [row for row in rows_of(text, "Training data") if row[0] == "atlas"]
    for words in ("[owner/atlas](https://huggingface.co/datasets/owner/atlas)", "revision v1", "a" * 40, "marginal"):
        assert words in row[1]
    rows = dict(rows_of(card(), "Training data"))
    assert (rows["screen"], rows["steps"], rows["cells seen"]) == ("kang.h5ad", "300", "115,200")
    assert (rows["held out"], rows["seed"]) == ("IFN-beta:CD4T", "7")


def test_no_path_of_the_trainers_machine_is_shown():
    training = {
        "screen": "/home/somebody/screen.h5ad",
        "atlases": [{"name": "/home/somebody/atlas", "commit": None, "sha256": "b" * 64}],
        "converted_from": "C:\\somebody\\file.ckpt",
    }
    text = card(training=training, evaluation={**EVALUATION, "data": "/home/somebody/other.h5ad"})
    assert "somebody" not in text
    for name in ("screen.h5ad", "atlas", "file.ckpt", "other.h5ad"):
        assert name in text


def test_what_the_model_expects_is_that_of_its_folder():
    rows = dict(rows_of(card(), "What it expects"))
    assert rows["genes"] == "2, matched by name: GAPDH, ACTB"
    assert rows["obs columns"].startswith("cell_type and donor")
    assert rows["combinations"].endswith("A+B")
    assert rows["cells of a set"] == "up to 8"
    assert "raw counts" in rows["`X` of the control cells"]
    other = dict(
        rows_of(card(preprocessing={"input_kind": "log1p"}, genes={"ensembl": ["E1", "E2"]}), "What it expects")
    )
    assert "counts are refused" in other["`X` of the control cells"]
    assert "or Ensembl id" in other["genes"]
    alone = card(perturbations={"combination_separator": None})
    assert dict(rows_of(alone, "What it expects"))["combinations"] == "none"
    assert "Combinations" not in alone.split("## Limits")[1]


def test_dose_is_a_limit_of_models_of_labels_only():
    assert "Dose and time are not inputs" in card()
    config = {**CONFIG, "denoiser": {**CONFIG["denoiser"], "conditioning": "reference"}}
    assert "Dose" not in write_card(config, files_with(), 1)


def test_features_and_doses_are_told():
    labels = {"names": ["IFN-beta", "TNF", "IL4"], "tables": [["esm2", 1280]], "n_described": 1, "dose_separator": "@"}
    text = card(perturbations=labels)
    rows = dict(rows_of(text, "What it expects"))
    assert rows["features"] == "esm2 (1,280); 1 of the perturbations by them alone"
    assert rows["doses"] == "written behind the name, as A@0.5"
    limits = text.split("## Limits")[1]
    assert "no cell of the last 1" in limits
    assert "any other is an error without features" in limits
    assert "Dose and time are not inputs" not in limits
    assert "no notion of a similar one" not in limits
    assert "that no features describe" in text
    assert "that no features describe" not in card()


@pytest.mark.parametrize(
    ("start", "on_hub"), [(START, True), ({**START, "revision": None}, False), ({**START, "name": "/home/x"}, False)]
)
def test_a_card_names_the_checkpoint_that_training_started_from(start, on_hub):
    text = card(training={"init_from": start})
    row = dict(rows_of(text, "Training data"))["started from"]
    assert row.startswith(start["name"])
    assert row.endswith("(adapt.method=lora)")
    assert (START["revision"] in row) == (start["revision"] is not None)
    data = ModelCard(text).data.to_dict()
    assert data.get("base_model") == ("owner/base" if on_hub else None)
    assert ("base_model_relation" in data) == on_hub


@pytest.mark.parametrize("odd", [5, "base", [1], {"name": 7}, {"name": "a/b", "revision": 3}])
def test_a_strangers_checkpoint_that_is_none_is_left_out(odd):
    assert "base_model" not in ModelCard(card(training={"init_from": odd})).data.to_dict()


def test_long_lists_are_cut():
    text = card(perturbations={"names": [f"drug {i}" * 50 for i in range(5000)]}, training={"hold_out": ["x"] * 5000})
    assert len(text) < 20_000
    assert text.count("and 4,980 more") == 2
    check_card(text)


def test_a_model_without_perturbations_says_that_it_predicts_nothing():
    text = card(perturbations={"names": []}, cell_types={"names": []}, batches={"names": []})
    assert "it predicts no response" in text
    assert "predict(" not in text
    ast.parse(code_of(text))
    check_card(text)


@pytest.mark.parametrize("name", ["o'brien", 'a "b" c', "a\\b", "line\nbreak", "```", "é\u202eß", "'\"", "{x}"])
def test_the_code_of_a_card_names_exactly_this_model_and_perturbation(name):
    text = card(name, perturbations={"names": [name]})
    check_card(text)
    strings = [node.value for node in ast.walk(ast.parse(code_of(text))) if isinstance(node, ast.Constant)]
    assert strings.count(name) == 2


def test_a_card_runs_as_printed(tmp_path, monkeypatch):
    config = tiny_config(write_screen(tmp_path), tmp_path / "out")
    folder = train(config).folder / "model"
    screen = anndata.read_h5ad(config.data.screen)
    controls = screen[screen.obs["perturbation"] == "control"][:12]
    controls.write_h5ad(tmp_path / "controls.h5ad")
    model = PerturbDiff.from_pretrained(folder, device="cpu")
    files = {p.name: json.loads(p.read_text()) for p in folder.glob("*.json")}
    text = write_card(files["config.json"], files, sum(p.numel() for p in model.denoiser.parameters()), str(folder))
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


@settings(max_examples=60)
@given(lists, lists, names, names, names)
@example(ODD[:4], ODD[4:8], ODD[7], ODD[4], ODD[0])
@example(ODD[20:24], ODD[24:28], ODD[11], ODD[29], ODD[30])
def test_cards_of_odd_names_are_safe_and_say_them_as_they_are(labels, others, licence, method, name):
    method = (method or "x")[:200]
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["split"]["hold_out"] = others
    evaluation["data"] = (licence or "x")[:200]
    for key in ("mean", "n_undefined"):
        evaluation[key][method] = evaluation[key].pop("ridge")
    training = {
        "licence": licence, "hold_out": labels, "screen": name, "converted_from": licence,
        "init_from": {"name": name, "revision": method, "sha256": name, "method": licence},
        "control_match": method, name: name, "library_version": licence,
        "atlases": [{"name": n, "commit": n, "sha256": n} for n in others],
        "settings": {
            "split": {"validation": others}, "training": {"seed": name},
            "data": {"atlases": [{"revision": n, "sets": n, "weight": n} for n in labels]},
        },
    }  # fmt: skip
    text = card(
        name,
        training=training,
        evaluation=evaluation,
        perturbations={"names": labels, "combination_separator": name},
        cell_types={"names": others},
        genes={"names": labels},
        preprocessing={"library_size_col": name},
    )
    check_card(text)
    check_page(text, [*labels, *others, method])
    assert isinstance(ModelCard(text).data.to_dict(), dict)
    assert text.encode().decode() == text


def atlas_of(**changed):
    source = AtlasSource("kang", "kang.h5ad", "CC-BY-4.0", 9, 20, 18, "row sums")
    said = {
        "library_version": "0.1.0", "input_kind": "counts", "normalisation": "X are raw counts.", "n_cells": 9,
        "n_genes": 20, "n_conditions": 2, "n_perturbations": 1, "n_cell_types": 1, "n_batches": 1,
        "gene_type": "uint16", "value_type": "uint16", "control_label": "control", "licence": None, "seed": 0,
        "genes_rule": "union", "sources": (source,), "shards": (Shard("data/cells-00000.parquet", 9),),
    }  # fmt: skip
    return AtlasInfo(**{**said, **changed})


@settings(max_examples=40)
@given(names, names, names)
@example(ODD[0], ODD[4], ODD[7])
def test_data_set_cards_of_odd_names_are_safe(name, file, licence):
    source = AtlasSource(name, file, licence, 9, 20, 18, name)
    text = atlas_card(atlas_of(sources=(source,) * 3, licence=licence, normalisation=file, genes_rule=name))
    check_card(text)
    check_page(text, [name, file])
    data = DatasetCard(text).data.to_dict()
    assert data["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    assert atlas_card(atlas_of(sources=(source,) * 3, licence=licence, normalisation=file, genes_rule=name)) == text


def test_the_data_set_card_says_what_the_atlas_says(tmp_path):
    folder = write_atlas(tmp_path / "atlas", licence="cc-by-4.0")
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


# ---------------------------------------------------------------- cards of strangers

HOSTILE = {
    "x <script>alert(1)</script>": "<script> tag",
    "<SCRIPT\nsrc=//x>": "<script> tag",
    "a\n\n<iframe src='https://x'></iframe>": "<iframe> tag",
    "<object data=x>": "<object> tag",
    "<embed src=x>": "<embed> tag",
    "<form action=x>": "<form> tag",
    "<style>body {display: none}</style>": "<style> tag",
    "<svg><script/href=x>": "<script> tag",
    "</plaintext>": "<plaintext> tag",
    "`<script>`": "<script> tag",
    "    <script>": "<script> tag",
    "<img src=x onerror=alert(1)>": "event handler onerror=",
    "<img/src/OnError = 'alert(1)'>": "event handler onerror=",
    "<div title='>' onload=\"x\">": "event handler onload=",
    "<b\nclass=x\nonclick\n=\nx>": "event handler onclick=",
    "> <img\n> onerror=x>": "event handler onerror=",
    "- > <img alt='\n  > ' onerror=x>": "event handler onerror=",
    "<a b<img onerror=x>": "event handler onerror=",
    "<!-- <img alt=--><img onerror=x>": "event handler onerror=",
    "[x](javascript:alert(1))": "javascript: link",
    "[x]( <JaVaScRiPt:alert(1)>)": "javascript: link",
    "[x](java&#115;cript:alert(1))": "javascript: link",
    "[x](javascript&colon;alert(1))": "javascript: link",
    "[x](&#x6A;avascript\\:alert(1))": "javascript: link",
    "[x](&Tab;java&NewLine;script:alert(1))": "javascript: link",
    "[x](<java\tscript:alert(1)>)": "javascript: link",
    "[x](\ndata:text/html;base64,xx)": "data: link",
    "> [x](\n> javascript:y)": "javascript: link",
    "![x](vbscript:y)": "vbscript: link",
    "[x]\n\n[x]: javascript:alert(1)": "javascript: link",
    "[x]\n\n[x]:\n  <data:text/html,x>": "data: link",
    "<javascript:alert(1)>": "javascript: link",
    "<a href='\u00a0javascript:x'>": "javascript: link in href=",
    "<a href=javascript:x>": "javascript: link in href=",
    "<a href=' &#106;ava\nscript:x'>": "javascript: link in href=",
    "<img src='data:image/svg+xml,x'>": "data: link in src=",
    "<img srcset='a.png 1x, data:image/png;base64,x 2x'>": "data: link in srcset=",
    "<div style='background: url(javascript:x)'>": "javascript: link in style=",
    "<svg><animate values='a;javascript:x'>": "javascript: link in values=",
    "```\nx\n```\n<script>": "<script> tag",
    "````\n```\n````\n<script>": "<script> tag",
    "~~~\n```\n~~~\n<script>": "<script> tag",
    "``` a`b\n<script>": "<script> tag",
    " ```\nx\n```\n<script>\n```": "<script> tag",
    "- a\n  ```\n<script>": "<script> tag",
    "<div>\n```\n<script>\n```": "<script> tag",
    "<!--\n\n```\n-->\n<script>\n```": "<script> tag",
    "<pre>\n\n```\n<script>\n```": "<script> tag",
    "a\x00b": "control character U+0000",
    "a\x1bb": "control character U+001B",
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_could_run_in_a_browser_is_refused_with_its_line(hostile):
    lead = f"{HEAD}# Title\n\nText.\n\n"
    with pytest.raises(ValueError, match=re.escape(HOSTILE[hostile])) as error:
        check_card(f"{lead}{hostile}\n")
    line = int(re.search(r"line (\d+)", str(error.value))[1])
    assert 8 <= line <= 8 + hostile.count("\n")
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


BENIGN = {
    "a table": "| a | b |\n|---|:-:|\n| `x` | **y** |",
    "badges": "[![License](https://img.shields.io/badge/l-MIT-green.svg)](https://opensource.org) ![x](plots/a.png)",
    "comments": "<!-- a note: data: x -->\n\n<!--\nlonger\n\n-->",
    "details": "<details>\n<summary>More: once = twice</summary>\n\n```python\nx = '<script>'\n```\n\n</details>",
    "breaks": "a<br>b<br/>c <sub>2</sub> <kbd>x</kbd>",
    "image": '<p align="center">\n  <img\n    src="https://x.org/a.png"\n    alt="Data: <b>"\n  >\nOnce = one.\n</p>',
    "code": "```html\n<script>alert(1)</script> <a href='javascript:x'>\n```\n\n~~~~\n<form onsubmit=x>\n~~~\n~~~~\n",
    "prose": "Training data: cells. a < b, c > d; once = never; see data:\n\n- onset=3; javascript: no\n- on = off",
    "links": "[a](#usage) [b](./file.md 'data: x') <https://x.org> [c]\n\n[c]: https://x.org/a:b",
    "formulas": "if a <b only once; $a<b$ and $$x_{on}=3$$ and \\(x\\)",
    "metadata words": "[x](https://x.org/?q=javascript:y) <a href='https://x.org/#data:x' title='data: y'>z</a>",
    "styles": "<div style='text-align: center'>x</div> <stylex> <once x=1>",
    "odd lines": "a\r\nb\rc\u2028d",
}


@pytest.mark.parametrize("text", BENIGN.values(), ids=BENIGN)
def test_cards_that_people_edit_by_hand_pass(text):
    check_card(f"{HEAD}# Title\n\n{text}\n")
    check_card(f"{HEAD}# Title\n\n{text}\n".replace("\n", "\r\n"))


PIECES = [
    "```", "~~~", "````", "```js", "<script>", "</script>", "<div>", "</div>", "<!--", "-->", "<pre>", "</pre>",
    "`", "``", "<img ", "onerror=x", ">", "'", "\"", "alt=", "\n", "\n", "\n\n", "  ", "    ", "> ", "- ", "1. ",
    "[x](", ")", "<", "a", "javascript:x", "JAVA&#115;CRIPT:", "data:x", "\\", "[x]: ", "[x]", "href=", "<a ", "/",
    "=", "\t", "&Tab;", "|", "<?", "?>", "<!x", "<![CDATA[", "]]>", "<textarea>", "---", "# ", "<b", "<https://x>",
]  # fmt: skip


def runs(text):
    """Whether a browser that gets the page of a renderer that checks nothing would run something of it."""
    for tag, attributes in Page(MARKDOWN.render(body(text))).tags:
        if tag in ("script", "iframe", "form", "style"):
            return True
        for name, value in attributes.items():
            link = re.sub(r"[\x00-\x20]", "", value).lower() if name in ("href", "src") else ""
            if name.startswith("on") or link.startswith(("javascript:", "data:")):
                return True
    return False


@settings(max_examples=1500)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example("- a\n  ```\n<script>")
@example("> [x](\n> javascript:x)")
def test_whatever_would_run_after_rendering_is_refused(text):
    try:
        check_card(HEAD + text)
    except ValueError:
        return
    assert not runs(HEAD + text)


@settings(max_examples=200)
@given(st.text())
def test_any_text_is_taken_or_refused_with_a_value_error(text):
    for whole in (text, HEAD + text, f"---\n{text}\n---\n"):
        try:
            check_card(whole)
        except UnicodeError:
            pytest.fail("a surrogate got through")
        except ValueError:
            pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# no front matter\n", "has no front matter"),
        ("text\n---\na: b\n---\n", "has no front matter"),
        ("---\na: b\n", "has no front matter"),
        ("---\n- a\n---\n", "must be a YAML mapping, not a list"),
        ("---\na: [b\nc: d\n---\n", r"not valid YAML in line 3"),
        ("---\na: &x [1]\nb: *x\n---\n", "anchor or alias in line 2"),
        ("---\na: !!python/object/apply:os.system [ls]\n---\n", "YAML tag .* in line 2"),
        ("---\nb: 1\na: !!binary x\n---\n", "YAML tag .* in line 3"),
        ("---\na: " + "[" * 5000 + "\n---\n", "nested deeper than 20"),
        ("---\na: 2026-13-99\n---\n", "cannot read .*quote it"),
        ("---\na: |\n " + "x" * 70_000 + "\n---\n", "front matter has 70,"),
        ("---\nlicense_link: 'JavaScript:x'\n---\n", "javascript: link in 'license_link'"),
        ("---\nmodel-index:\n- source:\n    url: data:text/html,x\n---\n", "data: link in 'url'"),
        ("---\nlicense_name: <script>\n---\n", "<script> tag in line 2"),
        (HEAD + "x" * 1_000_001, "at most 1,000,000"),
        (HEAD + "é" * 500_001, "at most 1,000,000"),
        (HEAD + "<a " * 300_000, "too much HTML"),
        (HEAD + "<a b='" * 150_000, "too much HTML"),
        (HEAD + "<a\n>" * 1000 + "<script>", "<script> tag"),
        (HEAD + "\ud800", r"control character U\+D800"),
    ],
    ids=range(20),
)
def test_front_matter_and_sizes_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        check_card(text)
    assert "\n" not in str(error.value)


def test_aliases_that_would_fill_the_memory_are_not_resolved():
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ValueError, match="anchor or alias"):
        check_card("---\na0: &a0 [x]\n" + "\n".join(levels) + "\n---\n")


# ---------------------------------------------------------------- evaluations


def test_the_scores_of_an_evaluation_make_a_card(tmp_path):
    config = tiny_config(write_screen(tmp_path), tmp_path / "out")
    screen = Screen.read(config.data.screen, config.data)
    rows = (~screen.is_control).nonzero()[0]
    truth = anndata.AnnData(screen.expression.log1p(rows), screen.obs.iloc[rows])
    truth.var_names = list(screen.expression.genes.names)
    report = evaluate(truth, screen, "batch")
    assert isinstance(report, Report)
    check_evaluation(report.as_json())
    _, path = report.save(tmp_path)
    content = json.loads(path.read_text())
    assert content == report.as_json()
    head, _, *rows = rows_of(card(evaluation=content), "Evaluation")
    assert [name.split()[0] for name in head[1:]] == list(METRICS)
    assert [row[0].strip("*") for row in rows] == list(report.means().index)
    assert float(rows[0][1]) == pytest.approx(1.0)


def changed(path, value):
    content = copy.deepcopy(EVALUATION)
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format_version"], 2), (["format_version"], True), (["format_version"], KeyError), (["mean"], KeyError),
        (["extra"], 1), (["library_version"], 1), (["model"], None), (["model"], "another"), (["model"], ["x"]),
        (["ceiling"], "x" * 201), (["data"], 3), (["data"], ""), (["split"], []), (["split"], {"hold_out": []}),
        (["split", "hold_out"], "abc"), (["split", "hold_out"], [1]), (["split", "sha256"], "C" * 64),
        (["split", "sha256"], 1), (["n_conditions"], 0), (["n_conditions"], 3.0), (["n_conditions"], True),
        (["n_conditions"], 1 << 50), (["metrics"], {}), (["metrics"], []), (["metrics", "pearson_delta"], "up"),
        (["metrics", "pearson_delta"], ["higher"]), (["metrics"], {f"m{i}": "higher" for i in range(65)}),
        (["mean"], []), (["mean", "PerturbDiff"], KeyError), (["mean", "ridge"], KeyError), (["mean", "ridge"], 1),
        (["mean", "ridge", "pearson_delta"], KeyError), (["mean", "ridge", "other"], 1),
        (["mean", "ridge", "pearson_delta"], float("nan")), (["mean", "ridge", "pearson_delta"], float("inf")),
        (["mean", "ridge", "pearson_delta"], 1e13), (["mean", "ridge", "pearson_delta"], 10**400),
        (["mean", "ridge", "pearson_delta"], "0.5"), (["mean", "ridge", "pearson_delta"], True),
        (["n_undefined", "ridge", "pearson_delta"], None), (["n_undefined", "ridge", "pearson_delta"], 4),
        (["n_undefined", "ridge", "pearson_delta"], -1), (["n_undefined", "ridge", "pearson_delta"], 1.0),
        (["n_undefined", "x"], {}),
    ],
)  # fmt: skip
def test_an_evaluation_that_cannot_be_is_refused_in_one_line(path, value):
    check_evaluation(EVALUATION)
    content = changed(path, value)
    with pytest.raises(ValueError, match=r"^evaluation\.json: ") as error:
        check_evaluation(content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    with pytest.raises(ValueError, match=r"^evaluation\.json: "):
        card(evaluation=content)


@pytest.mark.parametrize("content", [[], None, "x", {}])
def test_an_evaluation_of_another_kind_is_refused(content):
    with pytest.raises(ValueError, match=r"^evaluation\.json: "):
        check_evaluation(content)


def test_results_for_the_hub_are_what_its_client_parses():
    files = eval_results_files(EVALUATION, "owner/benchmark", "a" * 40, "https://huggingface.co/owner/model")
    (path,) = files
    assert path == ".eval_results/owner--benchmark.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(files[path]))
    assert {e.task_id: e.value for e in entries} == EVALUATION["mean"]["PerturbDiff"]
    assert {(e.dataset_id, e.dataset_revision) for e in entries} == {("owner/benchmark", "a" * 40)}
    assert {e.source_url for e in entries} == {"https://huggingface.co/owner/model"}


def test_there_are_no_results_for_the_hub_without_a_benchmark():
    assert eval_results_files(EVALUATION, None) == {}
    with pytest.raises(ValueError, match="no repo id"):
        eval_results_files(EVALUATION, "../x")
    with pytest.raises(ValueError, match=r"evaluation\.json"):
        eval_results_files({}, "owner/benchmark")
    undefined = changed(["mean", "PerturbDiff"], dict.fromkeys(EVALUATION["metrics"]))
    assert eval_results_files(undefined, "owner/benchmark") == {}
