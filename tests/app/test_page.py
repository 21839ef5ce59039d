"""The app as a person uses it: a real process, a real browser."""

import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from perturbdiff.data.screen import control_cells
from tests.app.conftest import CHROMIUM, HOSTILE, App
from tests.processes import PATIENCE
from tests.screens import ROOT

pytestmark = pytest.mark.slow
DEFAULT = {"n_cells": 100, "n_populations": 5}
OWN_SETTINGS = (
    ("Cells in a population", 30), ("Populations", 2), ("Emphasis of the perturbation", 1.5),
    ("Rounds of refinement", 2),
)  # fmt: skip
DESKTOP, PHONE = (1280, 900), (390, 844)
expect.set_options(timeout=PATIENCE * 1000)  # milliseconds


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens pages; none may ask another address for anything, log an error or open a dialog."""
    contexts, wrong = [], []

    def open_page(address, size=DESKTOP, scheme="light"):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        context.set_default_timeout(PATIENCE * 1000)
        contexts.append(context)
        context.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or wrong.append(r.url))
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        page.get_by_role("button", name="Predict", exact=True).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def choose(page, where, name):
    """Search an option of a dropdown by its text and take it."""
    field = page.locator(f"{where} input")
    field.focus()
    field.fill("")
    field.press_sequentially(name)
    expect(page.get_by_role("option")).to_have_count(1)
    expect(page.get_by_role("option")).to_contain_text(name)
    page.get_by_role("option").click()
    field.blur()
    chosen = page.locator(f"{where} .token") if page.locator(f"{where} .token").count() else None
    if chosen is None:
        expect(field).to_have_value(re.compile(re.escape(name)))
    else:
        expect(chosen.last).to_contain_text(name)


def predict(page, said="Predicted"):
    """Press the button; the file that can be downloaded then, when figures and table are there."""
    panels = page.locator("#panels").inner_html() if page.locator("#panels img").count() else ""
    page.get_by_role("button", name="Predict", exact=True).click()
    expect(page.locator("#status")).to_contain_text(said)
    page.wait_for_function("old => document.querySelector('#panels').innerHTML !== old", arg=panels)
    expect(page.locator("#panels img")).to_have_count(6)
    for image in page.locator("#panels img, #overview img").all():
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    with page.expect_download() as download:
        page.locator("#download").click()
    return anndata.read_h5ad(download.value.path())


def set_number(page, label, value):
    field = page.get_by_label(label, exact=True).and_(page.locator("input[type=number]")).first
    field.fill(str(value))
    field.press("Tab")


def assert_same_cells(actual, expected):
    assert list(actual.var_names) == list(expected.var_names)
    np.testing.assert_allclose(actual.X.toarray(), expected.X.toarray(), rtol=1e-4, atol=1e-5)
    for column in ("perturbation", "cell_type", "batch", "source_control", "population"):
        assert list(actual.obs[column]) == list(expected.obs[column])


def test_what_is_predicted_in_the_browser_is_what_the_model_predicts(app, visit, model, screen):
    page = visit(app.address)
    choose(page, "#perturbation", "pert_1")
    choose(page, "#cell-type", "type_0")
    predicted = predict(page)
    controls = control_cells(screen, model.config.obs, "type_0", None)
    assert_same_cells(predicted, model.predict(controls, perturbation="pert_1", cell_type="type_0", **DEFAULT))
    expect(page.locator("#status")).to_contain_text(
        "100 cells in each of 5 populations under pert_1 from 60 type_0 control cells. 40 of 40 genes"
    )
    expect(page.locator("#table tbody tr")).to_have_count(40)
    X = controls.X.toarray()
    mean = np.log1p(X * 1e4 / X.sum(axis=1, keepdims=True)).mean(axis=0)
    change = predicted.X.toarray().mean(axis=0) - mean
    largest = int(np.argmax(abs(change)))
    row = page.locator("#table tbody tr").first.locator("td").all_inner_texts()
    assert row[0] == predicted.var_names[largest]
    assert float(row[3]) == pytest.approx(change[largest], abs=1e-3)


def test_a_combination_with_settings(app, visit, model, screen):
    page = visit(app.address)
    choose(page, "#perturbation", "pert_0")
    choose(page, "#perturbation", "pert_1")
    choose(page, "#cell-type", "Every cell type")
    page.get_by_role("button", name="Advanced").click()
    predict(page)  # what is typed in the moment in which the panel opens can be lost
    for label, value in OWN_SETTINGS:
        set_number(page, f"number input for {label}", value)
    set_number(page, "Random seed", 7)
    predicted = predict(page, "Seed 7")
    controls = control_cells(screen, model.config.obs, None, None)
    expected = model.predict(
        controls, perturbation="pert_0+pert_1", n_cells=30, n_populations=2, guidance_scale=1.5, steps=2, seed=7
    )
    assert_same_cells(predicted, expected)
    expect(page.locator("#status")).to_contain_text("30 cells in each of 2 populations under pert_0+pert_1 from 120")


def test_any_gene_of_the_model_is_shown_without_predicting_again(app, visit, model):
    page = visit(app.address)
    choose(page, "#perturbation", "pert_1")
    choose(page, "#cell-type", "type_0")
    predict(page)
    said = page.locator("#status").inner_text()
    names = [model.gene_names[7], model.gene_names[23]]
    for name in names:
        field = page.locator("#genes input")
        field.focus()
        field.press_sequentially(name[:5])
        page.get_by_role("option").filter(has_text=name).first.click()
    expect(page.locator("#panels img")).to_have_count(2)
    shown = [image.get_attribute("alt") for image in page.locator("#panels img").all()]
    assert shown == [f"Distribution of {name}" for name in names]
    assert page.locator("#status").inner_text() == said


def test_measured_cells_scores_and_the_whole_table_are_there(app, visit, model):
    page = visit(app.address)
    expect(page.locator("#about")).to_contain_text("240 measured cells to compare with")
    expect(page.locator("#model")).to_contain_text("Nobody measured how well it predicts")
    expect(page.locator("#model summary")).to_have_text("Model card")
    choose(page, "#perturbation", "pert_1")
    choose(page, "#cell-type", "type_0")
    expect(page.locator("#outlook")).to_contain_text(re.compile("Training saw this|New in this"))
    predict(page)
    expect(page.locator("#panels")).to_contain_text("40 measured cells")
    expect(page.locator("#table th")).to_contain_text(["Gene", "Controls", "Predicted", "Change", "Measured change"])
    with page.expect_download() as download:
        page.locator("#download-table").click()
    table = pd.read_csv(download.value.path())
    assert list(table["gene"]) == list(model.gene_names)
    shown = page.locator("#table tbody tr").first.locator("td").all_inner_texts()
    row = table.loc[table["change"].abs().idxmax()]
    assert [float(text) for text in shown[1:5]] == pytest.approx(
        [row["controls"], row["predicted"], row["change"], row["measured_change"]], abs=1e-3
    )


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_in_the_dark_nothing_is_white(app, visit, size):
    page = visit(app.address, size, "dark")
    choose(page, "#perturbation", "pert_1")
    predict(page)
    pixels = np.asarray(Image.open(BytesIO(page.screenshot(full_page=True))).convert("L"))
    assert (pixels > 200).mean() < 0.1  # text and lines
    assert (pixels < 80).mean() > 0.7


def test_names_are_text_wherever_they_are_shown(app, visit):
    page = visit(app.address)
    choose(page, "#perturbation", HOSTILE)
    choose(page, "#cell-type", HOSTILE)
    predicted = predict(page)
    assert set(predicted.obs["perturbation"]) == {HOSTILE}
    expect(page.locator("#status")).to_contain_text(f"under {HOSTILE} from 60 {HOSTILE} control cells")
    assert page.locator("#table td").first.inner_text().startswith("<b>")
    assert page.locator("#table b, img[onerror], #perturbation img, #cell-type img").count() == 0


def test_uploaded_controls_are_used_and_their_file_is_removed(app, visit, model, screen, tmp_path):
    cells = anndata.read_h5ad(screen)[np.arange(0, 360, 2)].copy()
    cells.obs["cell_type"] = "a new type"
    mine = tmp_path / "mine.h5ad"
    cells.write_h5ad(mine)
    page = visit(app.address)
    page.get_by_label("My own file").check()
    page.locator("#upload input[type=file]").set_input_files(mine)
    n_controls = int((cells.obs["perturbation"] == "control").sum())
    expect(page.locator("#about")).to_contain_text(f"mine.h5ad: {n_controls} control cells of {cells.n_obs} cells")
    assert "mine.h5ad" not in app.kept()
    choose(page, "#perturbation", "pert_0")
    expect(page.locator("#cell-type input")).to_have_value(re.compile("a new type .*not seen in training"))
    expect(page.locator("#outlook .warning")).to_contain_text("Not seen in training: cell_type a new type")
    predicted = predict(page)
    controls = control_cells(mine, model.config.obs, "a new type", None)
    assert_same_cells(predicted, model.predict(controls, perturbation="pert_0", cell_type="a new type", **DEFAULT))
    expect(page.locator("#status")).to_contain_text("Not seen in training: cell_type a new type")
    page.get_by_label("bundled.h5ad").check()
    expect(page.locator("#about")).to_contain_text("bundled.h5ad: 120 control cells")


def bad_files(folder: Path, screen: Path):
    adata = anndata.read_h5ad(screen)
    text = folder / "text.h5ad"
    text.write_text("not an AnnData")
    genes = adata.copy()
    genes.var_names = [f"other_{i}" for i in range(adata.n_vars)]
    nan = adata.copy()
    nan.X = nan.X.astype(np.float32)
    nan.X.data[3] = np.nan
    treated = adata[adata.obs["perturbation"] != "control"].copy()
    many = anndata.concat([adata] * 3, index_unique="-")
    for name, bad in (("genes", genes), ("nan", nan), ("treated", treated), ("many", many)):
        bad.write_h5ad(folder / f"{name}.h5ad", compression="gzip")
    with h5py.File(folder / "bare.h5ad", "w") as file:
        file["X"] = np.zeros((3, 3))
    return {
        "text": "text.h5ad is not a readable .h5ad",
        "bare": "bare.h5ad is not an .h5ad: it has no obs, var",
        "genes": "only 0 of the model's 40 genes",
        "nan": "which is not finite",
        "treated": "treated.h5ad has no control cell with perturbation 'control'",
        "many": f"many.h5ad has {many.n_obs:,} cells; the app takes at most 1,000",
    }


def test_a_bad_upload_is_one_readable_line(app, visit, screen, tmp_path):
    page = visit(app.address)
    page.get_by_role("button", name="Predict", exact=True).click()
    expect(page.locator("#status [role=alert]")).to_have_text("No perturbation is chosen; choose one.")
    page.get_by_label("My own file").check()
    expect(page.locator("#about")).to_contain_text("No control cells yet.")
    choose(page, "#perturbation", "pert_0")
    page.get_by_role("button", name="Predict", exact=True).click()
    expect(page.locator("#status [role=alert]")).to_contain_text("There are no control cells; upload an .h5ad")
    for name, message in bad_files(tmp_path, screen).items():
        page.locator("#upload input[type=file]").set_input_files(tmp_path / f"{name}.h5ad")
        alert = page.locator("#about [role=alert]")
        expect(alert).to_contain_text(message)
        assert "Traceback" not in page.content()
        assert str(app.files) not in page.content()
        assert f"{name}.h5ad" not in app.kept()


def test_a_file_over_the_limit_is_refused_in_words(app, visit, tmp_path):
    large = tmp_path / "large.h5ad"
    large.write_bytes(bytes(2 << 20))
    page = visit(app.address)
    page.get_by_label("My own file").check()
    page.locator("#upload input[type=file]").set_input_files(large)
    expect(page.locator("body")).to_contain_text("maximum allowed size")
    assert "large.h5ad" not in app.kept()


def test_a_phone_shows_one_column_without_scrolling_sideways(app, visit):
    page = visit(app.address, PHONE)
    choose(page, "#perturbation", "pert_1")
    predict(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    boxes = [image.bounding_box() for image in page.locator("#panels img, #overview img").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0] and box["width"] > 280 for box in boxes)
    tops = [box["y"] for box in boxes]
    assert tops == sorted(set(tops))


@pytest.fixture
def bare_app(chromium, model_folder, tmp_path):
    app = App(tmp_path, str(model_folder))
    yield app
    app.stop()


def test_without_controls_of_its_own_the_app_asks_for_some(bare_app, visit, screen):
    page = visit(bare_app.address)
    expect(page.locator("#about")).to_contain_text("No control cells yet.")
    expect(page.locator("#origin")).to_be_hidden()
    page.locator("#upload input[type=file]").set_input_files(screen)
    expect(page.locator("#about")).to_contain_text("bundled.h5ad: 120 control cells")
    choose(page, "#perturbation", "pert_1")
    assert predict(page).n_obs == 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/folder/here"], "no/such/folder/here"),
        (["MODEL", "--controls", "missing.h5ad"], "missing.h5ad"),
    ],
    ids=["missing model", "missing controls"],
)
def test_an_app_that_cannot_start_says_why_in_one_line(words, message, model_folder, tmp_path):
    words = [str(model_folder) if word == "MODEL" else word for word in words]
    run = subprocess.run(
        [sys.executable, "-m", "perturbdiff", "app", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 2
    assert message in run.stderr
    assert run.stderr.startswith("perturbdiff: error: ")
    assert run.stderr.count("\n") == 1


def test_a_space_serves_what_its_variables_name(model_folder, tmp_path):
    start = [sys.executable, str(ROOT / "hub" / "space" / "app.py")]
    bare = {name: value for name, value in os.environ.items() if name not in ("MODEL", "CONTROLS")}
    run = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path, env=bare)
    assert (run.returncode, run.stderr) == (
        1, "app: error: no model; give the variable MODEL a model folder, a repo id or a known name.\n"
    )  # fmt: skip
    wrong = {**bare, "MODEL": str(model_folder), "CONTROLS": "missing.h5ad"}
    run = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path, env=wrong)
    assert run.returncode == 2
    assert "missing.h5ad" in run.stderr
