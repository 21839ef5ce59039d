"""The report of a run: one harmless HTML file with everything in it, of whatever the run folder has."""
# ruff: noqa: F811 (fixtures)

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright

from perturbdiff import train
from perturbdiff.evaluation import report
from perturbdiff.evaluation.html import number, plain, text
from perturbdiff.evaluation.report import PAPER, Results, write_report
from tests.app.conftest import CHROMIUM, chromium  # noqa: F401 (fixture)
from tests.simulated import TINY, write_screen

HOSTILE = "<script>alert(1)</script>\"'&amp;$_a^{$" + "long" * 40
ESCAPED = "\x1b[31m"  # refused in the labels of a screen, but perhaps in the files of a run folder
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Parsed(HTMLParser):
    """Tags with attributes in order, text by section, and every tag closed by its own."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.texts, self.ids = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & {*self.open}:
            self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def within(self, tag):
        return [data for name, data in self.texts if name == tag]

    @property
    def text(self):
        return " ".join(data for _, data in self.texts)


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """Simulated cells; a perturbation and every gene have hostile names."""
    folder = tmp_path_factory.mktemp("screen")
    adata = anndata.read_h5ad(write_screen(folder))
    adata.obs["perturbation"] = [HOSTILE if p == "pert_2" else p for p in adata.obs["perturbation"].astype(str)]
    adata.var_names = [f"{HOSTILE[:60]}{i}" for i in range(adata.n_vars)]
    path = folder / "hostile.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def trained(screen, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    words = [*TINY, "training.trackers=[]", "training.n_steps=12", "split.validation=['*:type_1:batch_1']"]
    train(screen, out, hold_out="*:type_0", overrides=words)
    return out


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(trained, folder / "report.html", figures=folder / "figures")


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may change; without predicted cells, whose figures take seconds."""
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("predicted.h5ad", "states"))


def written(run, tmp_path, **settings):
    return write_report(run, tmp_path / "report.html", **settings).read_text(encoding="utf-8")


def headings(page):
    return Parsed(page).within("h2")


def many(run, n, label="pert_"):
    """Replace the scores of a run by those of n conditions."""
    rng = np.random.default_rng(0)
    old = pd.read_parquet(run / "scores.parquet")
    metrics = list(old.columns[4 : list(old.columns).index("n_pred")])
    methods = ["PerturbDiff", "no change", "ridge", "transplant", "ceiling (half predicts half)"]
    table = pd.DataFrame({"method": methods * n, "perturbation": [f"{label}{i}" for i in range(n) for _ in methods],
                          "cell_type": "type_0", "batch": "batch_0"})  # fmt: skip
    for metric in metrics:
        table[metric] = rng.normal(size=len(table))
    table[["n_pred", "n_real", "n_control"]] = 20
    table.to_parquet(run / "scores.parquet", index=False)
    summary = json.loads((run / "scores.json").read_text())
    summary["n_conditions"] = n
    (run / "scores.json").write_text(json.dumps(summary))
    return table


def test_sections_come_in_order_with_one_title(page, trained):
    page = page.read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert headings(page) == [
        "Verdict", "Scores", "Conditions, worst first", "Predicted beside measured", "Data and split", "Notes",
        "Training", "Calibration", "Provenance",
    ]  # fmt: skip
    assert len(parsed.all("h1")) == len(parsed.all("title")) == len(parsed.all("main")) == 1
    assert parsed.all("html") == [{"lang": "en"}]
    assert any("width=device-width" in meta.get("content", "") for meta in parsed.all("meta"))
    assert json.loads((trained / "scores.json").read_text())["verdict"] in parsed.text
    assert len(parsed.ids) == len(set(parsed.ids))


def test_every_figure_says_what_it_shows_and_reads_on_any_ground(page):
    parsed = Parsed(page.read_text(encoding="utf-8"))
    svgs = parsed.all("svg")
    assert len(svgs) >= 3 * 6 + 2
    assert len(svgs) == len(parsed.all("figcaption"))
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 10 for svg in svgs)
    assert "currentColor" in str(parsed.tags)
    assert "#010203" not in str(parsed.tags)
    for attributes in (a for _, a in parsed.tags):
        for reference in re.findall(r"#([\w-]+)\)", " ".join(map(str, attributes.values()))):
            assert reference in parsed.ids


def test_means_and_intervals_are_those_of_the_scores(page, trained):
    page = page.read_text(encoding="utf-8")
    summary = json.loads((trained / "scores.json").read_text())
    table = re.findall(r"<table>.*?</table>", page, re.DOTALL)[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]]
    assert [row[0] for row in rows] == list(summary["mean"])
    for name, *cells in rows:
        for metric, cell in zip(list(summary["metrics"])[:4], cells, strict=True):
            interval = summary["interval"][name][metric]
            beside = "" if interval is None else f"{number(interval[0])} to {number(interval[1])}"
            assert re.sub("<.*?>", "", cell) == number(summary["mean"][name][metric]) + beside


def test_conditions_are_worst_first_with_their_best_simple_method(run, tmp_path):
    table = many(run, 30)
    rows = re.findall(r'<td class="l">(pert_\d+)</td>.*?</tr>', written(run, tmp_path))
    own = table[table["method"] == "PerturbDiff"].set_index("perturbation")["pearson_delta"]
    assert rows == own.sort_values().index.tolist()
    row = re.search(rf'<td class="l">{rows[0]}</td>.*?</tr>', written(run, tmp_path)).group()
    others = table[(table["perturbation"] == rows[0]) & table["method"].isin(["no change", "ridge", "transplant"])]
    best = others.loc[others["pearson_delta"].idxmax()]
    assert f'<td>{best["method"]}</td><td class="n">{number(best["pearson_delta"])}</td>' in row


@pytest.mark.parametrize(
    ("direction", "worst"),
    [("higher", "pert_0"), ("lower", "pert_2"), ("ideal 1", "pert_2"), ("ideal 0", "pert_2"), ("ideal 0.5", "pert_2")],
)
def test_worst_is_by_the_direction_of_the_metric(run, tmp_path, direction, worst):
    table = many(run, 4)
    own = table["method"] == "PerturbDiff"
    table.loc[own, "pearson_delta"] = [0.1, 0.6, 4.0, np.nan]
    table.to_parquet(run / "scores.parquet", index=False)
    summary = json.loads((run / "scores.json").read_text())
    summary["metrics"]["pearson_delta"] = direction
    (run / "scores.json").write_text(json.dumps(summary))
    rows = re.findall(r'<td class="l">(pert_\d+)</td>', written(run, tmp_path))
    assert (rows[0], rows[-1]) == (worst, "pert_3")  # undefined is last


def test_nothing_is_fetched_and_only_its_own_script_runs(page):
    page = page.read_text(encoding="utf-8")
    parsed = Parsed(page)
    links = [
        value for _, a in parsed.tags for name, value in a.items() if name in ("src", "href", "xlink:href", "action")
    ]
    assert [link for link in links if not link.startswith(("#", "data:"))] == [PAPER]
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(parsed.all("script")) == 1
    assert any("default-src 'none'" in meta.get("content", "") for meta in parsed.all("meta"))


def test_hostile_labels_stay_text(page):
    figures, page = page.with_name("figures"), page.read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert not [attributes for _, attributes in parsed.tags if any(name.startswith("on") for name in attributes)]
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert all(len(data) <= 60 for tag, data in parsed.texts if tag == "td")
    for path in figures.iterdir():
        ET.parse(path)


@pytest.mark.parametrize(
    "value", ["\x1b[31mred\x1b[0m", "\x9b31mred", "\x1b]0;title\x07red", "r\x00e\u202ed", "red\x1b"]
)
def test_escape_codes_and_hidden_characters_are_left_out(value):
    assert plain(value) == "red"


def test_text_is_escaped_and_cut():
    assert text("<a href=\"x\" b='y'>&") == "&lt;a href=&quot;x&quot; b=&#x27;y&#x27;&gt;&amp;"
    assert text("x" * 99, 10) == "x" * 9 + "…"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.12345, "0.123"), (-2, "-2.000"), (0.00012, "1.2e-04"), (0, "0.000"), (float("nan"), "–"), (None, "–"),
     ("x", "–"), (True, "–"), (1e9, "1e+09"), (float("inf"), "inf"), (np.float64(0.5), "0.500")],
)  # fmt: skip
def test_numbers_are_short(value, shown):
    assert number(value) == shown


def test_the_same_run_gives_the_same_bytes(page, trained, tmp_path):
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 5}):  # as a matplotlibrc might say
        again = write_report(trained, tmp_path / "report.html", figures=tmp_path / "figures")
    assert again.read_bytes() == page.read_bytes()
    files = sorted(page.with_name("figures").iterdir())
    assert {"scores.svg", "01-embedding.svg", "01-violins.svg", "01-delta.svg", "loss.svg"} <= {f.name for f in files}
    for file in files:
        assert file.read_bytes() == (tmp_path / "figures" / file.name).read_bytes()


def test_two_thousand_conditions_fit_in_five_megabytes(run, tmp_path):
    many(run, 2000, ESCAPED + HOSTILE[:30])
    page = written(run, tmp_path)
    assert not [bad for bad in ("\x1b", "[31m", "<script>alert") if bad in page]
    assert len(page.encode()) < 5_000_000
    assert len(re.findall(r"<tr><td", page)) >= 2000
    assert "2,000 conditions" in page


def test_of_many_conditions_the_worst_median_and_best_are_pictured(page):
    assert re.findall(r"<h3>(.*?): ", page.read_text(encoding="utf-8")) == ["Worst", *["Between"] * 4, "Best"]
    some = report._some([(str(i), "", "") for i in range(11)], True)
    assert [(name, condition[0]) for name, condition in some] == [
        ("Worst", "0"), ("Second worst", "1"), ("Median", "5"), ("Next to the median", "6"), ("Second best", "9"),
        ("Best", "10"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        (["predicted.h5ad"], "the run has no predicted.h5ad"),
        (["split.json"], "the run has no predicted.h5ad and no split.json"),
        (["metrics.jsonl"], None),
        (["model"], None),
        (["scores.json"], None),
        (["scores.parquet"], "not in the run folder"),
        (["scores.parquet", "scores.json"], "There are no scores"),
        (
            ["predicted.h5ad", "scores.parquet", "scores.json", "split.json", "metrics.jsonl", "model"],
            "There are no scores",
        ),
    ],
)
def test_what_is_missing_is_left_out_and_said(run, tmp_path, gone, says):
    for name in gone:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    page = written(run, tmp_path)
    assert says is None or says in Parsed(page).text
    assert "Provenance" in headings(page)


def test_scores_without_all_that_may_be_absent(run, tmp_path):
    summary = json.loads((run / "scores.json").read_text())
    few = {name: summary[name] for name in ("mean", "metrics")}
    (run / "scores.json").write_text(json.dumps(few))
    own = number(summary["mean"]["PerturbDiff"]["pearson_delta"])
    assert f"PerturbDiff has {own} on 6 held-out conditions" in Parsed(written(run, tmp_path)).text


def test_an_older_csv_of_scores_is_read(run, tmp_path):
    table = pd.read_parquet(run / "scores.parquet")
    table["perturbation"] = table["perturbation"].where(table["perturbation"] != "pert_0", "NA")
    table.to_csv(run / "scores.csv", index=False)
    (run / "scores.parquet").unlink()
    assert '<td class="l">NA</td>' in written(run, tmp_path)


def test_a_moved_screen_is_said_and_may_be_given(trained, page, tmp_path, screen):
    run = shutil.copytree(trained, tmp_path / "run")
    config = (run / "config.yaml").read_text().replace(str(screen), str(tmp_path / "moved.h5ad"))
    (run / "config.yaml").write_text(config)
    assert "moved.h5ad is not there; --screen says where it is" in Parsed(written(run, tmp_path)).text
    given = written(run, tmp_path, screen=screen)
    assert re.findall("<svg.*?</svg>", given) == re.findall("<svg.*?</svg>", page.read_text(encoding="utf-8"))


def test_figures_need_matplotlib_and_the_rest_does_not(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    page = written(trained, tmp_path)
    assert "pip install 'perturbdiff[plot]'" in Parsed(page).text
    assert "<svg" not in page


def test_conditions_that_were_not_scored_are_named(run, tmp_path):
    table = pd.read_parquet(run / "scores.parquet")
    table[table["perturbation"] != "pert_0"].to_parquet(run / "scores.parquet", index=False)
    assert "2 held-out conditions were not scored: pert_0, type_0, batch_0" in Parsed(written(run, tmp_path)).text


def test_populations_are_drawn_apart_beside_measured_batches(page, run, tmp_path, trained):
    captions = [c for c in Parsed(page.read_text(encoding="utf-8")).within("figcaption") if "population" in c]
    assert len(captions) == 6  # of each condition that has figures
    drawn = [path.read_text() for path in sorted((page.parent / "figures").glob("*-populations.svg"))]
    assert len(drawn) == 6
    assert all("predicted populations (5)" in svg and "other measured batches (1)" in svg for svg in drawn)
    assert all("interval" in svg for svg in drawn)
    means = pd.read_parquet(trained / "means.parquet")
    assert set(means["cell_type"]) == {"type_0"}
    assert (means["upper"] > means["mean"]).all()
    said = written(run, tmp_path)
    coverage = json.loads((trained / "model" / "training.json").read_text())["calibration"]["coverage"]
    inside = (means["measured"] >= means["mean"] * 2 - means["upper"]) & (means["measured"] <= means["upper"])
    assert coverage["conditions"] == "test"
    assert coverage["of_all"] == pytest.approx(inside.mean(), abs=1e-6)
    assert f"hold {inside.mean():.0%} of means" in said
    (run / "means.parquet").write_bytes(b"x")
    shutil.copy(trained / "predicted.h5ad", run)
    with pytest.raises(ValueError, match=r"means\.parquet is not a whole table"):
        written(run, tmp_path)


def test_a_calibration_of_an_older_version_is_said(run, tmp_path):
    path = run / "model" / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "calibration": {"factor": 2.0}}))
    assert "calibrated by an older version" in written(run, tmp_path)


def test_log_lines_that_are_cut_or_empty_do_no_harm(run, tmp_path):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 13, "loss": null}\n\xff\xfe\n{"step": 14, "lo')
    assert "Loss by training step" in written(run, tmp_path)
    steps, values = report._series([{"step": i, "x": float(i)} for i in range(10_000)], "x")
    assert len(steps) == report.CURVE_POINTS
    np.testing.assert_allclose(steps, values)
    assert values[0] == np.mean(range(25))


def _half_calibrated(run):
    path = run / "model" / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "calibration": {"level": 0.9}}))


@pytest.mark.parametrize(
    ("break_it", "error", "says"),
    [
        (lambda run: (run / "config.yaml").unlink(), FileNotFoundError, "no config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: [b"), ValueError, "not yaml"),
        (lambda run: (run / "scores.json").write_text("{"), ValueError, "not valid JSON"),
        (lambda run: (run / "scores.parquet").write_bytes(b"x"), ValueError, "not a whole table"),
        (lambda run: pd.DataFrame({"method": []}).to_parquet(run / "scores.parquet"), ValueError, "lacks the columns"),
        (_half_calibrated, ValueError, "calibration lacks change, coverage"),
    ],
)
def test_damaged_runs_are_refused(run, tmp_path, break_it, error, says):
    break_it(run)
    with pytest.raises(error, match=says):
        written(run, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_another_screen_than_that_of_the_run_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="screen"):
        written(trained, tmp_path, screen=write_screen(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad"):
        written(trained, tmp_path, screen=tmp_path / "none.h5ad")


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens files; none may fetch anything, log an error or open a dialog."""
    contexts, wrong = [], []

    def open_file(path, size, **settings):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **settings)
        contexts.append(context)
        context.on("request", lambda r: r.url.startswith(("file:", "data:")) or wrong.append(r.url))
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [(390, 844), (1440, 900)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_screen_and_its_table_sorts_and_filters(run, page, tmp_path, opened, size, scheme):
    pictured, table = page, many(run, 50, "<b>pert</b>_")
    own = table[table["method"] == "PerturbDiff"].reset_index(drop=True)
    assert opened(pictured, size, color_scheme=scheme).evaluate("document.documentElement.scrollWidth") == size[0]
    page = opened(write_report(run, tmp_path / "report.html"), size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    rows = page.locator("table.sortable tbody tr")

    def shown():
        return rows.locator("td:first-child:visible").all_inner_texts()

    by_score = own.sort_values("pearson_delta")["perturbation"].tolist()
    assert shown() == by_score
    head = page.get_by_role("button", name="pearson_delta (higher)")
    head.click()
    head.click()
    assert shown() == by_score[::-1]
    assert (
        page.get_by_role("columnheader", name="pearson_delta (higher)").last.get_attribute("aria-sort") == "descending"
    )
    page.get_by_role("button", name="perturbation", exact=True).click()
    assert shown() == sorted(by_score)
    page.get_by_label("Filter").fill("PERT</b>_1")
    wanted = [name for name in sorted(by_score) if "_1" in name]
    assert shown() == wanted
    assert page.locator("output").inner_text() == f"{len(wanted)} of 50"
    page.get_by_label("Filter").fill("nothing of the kind")
    assert shown() == []
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    svg = page.locator("figure svg").first
    assert svg.locator("text").first.evaluate("t => getComputedStyle(t).fill") == ink


@pytest.mark.slow
def test_without_scripts_the_table_is_there_worst_first(page, opened):
    page = opened(page, (390, 844), java_script_enabled=False)
    assert page.locator("table.sortable tbody tr").count() == 6
    assert not page.get_by_label("Filter").is_visible()


def test_the_best_of_a_column_says_as_much_as_any(tmp_path):
    summary = {
        "mean": {"a": {"pearson_delta": 0.2}, "b": {"pearson_delta": 0.9}, "c": {"pearson_delta": 0.3}},
        "n_undefined": {"a": {"pearson_delta": 0}, "b": {"pearson_delta": 16}, "c": {"pearson_delta": 0}},
    }
    results = Results(tmp_path, {}, {}, {}, [], pd.DataFrame(), {"pearson_delta": "higher"}, summary)
    assert results.best("pearson_delta", ["a", "b", "c"]) == "c"
    assert results.best("pearson_delta", ["b"]) == "b"
