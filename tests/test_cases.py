"""Small files of public bug reports, as the commands take them: the right value, or one clear line."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

from perturbdiff.atlas.store import Atlas
from perturbdiff.cli.main import main
from tests.screens import shared
from tests.simulated import DEFAULTS

TINY = (
    "denoiser.width=48", "denoiser.depth=1", "denoiser.n_heads=2", "training.n_steps=20", "data.set_size=16",
    "data.sets_per_batch=4", "training.trackers=[]",
)  # fmt: skip
SPACES = ("log1p_cp10k", "log1p_median", "log1p_cpm", "log2_cp10k", "log10_cp10k", "log1p_unnormalised")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # notes are looked for in what is printed


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Makes the files of a case here."""

    def make(kind, name):
        script = next(shared("PERTURBDIFF_CASES", "cases", kind).glob(f"{name}_*.py"))
        subprocess.run([sys.executable, script, tmp_path], check=True)
        monkeypatch.chdir(tmp_path)

    return make


@pytest.fixture
def run(capsys):
    """What a command prints."""

    def run(*words):
        main(list(words))
        said = capsys.readouterr()
        return said.out + said.err

    return run


@pytest.fixture
def refused(capsys):
    """The one line with which a command ends."""

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main(list(words))
        assert end.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1
        return lines[0]

    return run


def parsed(path):
    return json.loads(Path(path).read_text())


def conditions(folder, part):
    split = parsed(f"{folder}/split.json")
    return {row["perturbation"]: row["n_cells"] for row in split["conditions"][part]}


def column(path, name):
    with open(path) as file:
        return [row[name] for row in csv.DictReader(file)]


def values(path):
    return anndata.read_h5ad(path).X.toarray()


def test_labels_of_gears(case, run):
    case("screens", "c01")
    said = " ".join(run("screen", "info", "gears.h5ad").split())
    assert "columns as of GEARS: data.perturbation_col=condition data.control_label=ctrl" in said
    run("train", "--screen", "gears.h5ad", "--out", "run", "--hold-out", "FOSB+ctrl", "--no-score", *TINY)
    assert conditions("run", "test") == {"FOSB": 80}
    assert conditions("run", "train") == {"CEBPE": 40, "CEBPE+FOSB": 40}
    run("screen", "rank", "run/model", "--controls", "gears.h5ad", "--up", "G000", "--out", "rank.csv")
    assert set(column("rank.csv", "perturbation")) == {"FOSB", "CEBPE"}


def test_orders_of_a_combination(case, run):
    case("screens", "c02")
    said = run("train", "--screen", "order.h5ad", "--out", "run", "--hold-out", "CBL+CNN1", *TINY)
    assert conditions("run", "test") == {"CBL+CNN1": 80}
    assert conditions("run", "train") == {"CBL": 40, "CNN1": 40, "KLF1": 40}
    run("predict", "run/model", "--controls", "order.h5ad", "--perturbation", "CNN1+CBL", "--out", "o.h5ad")
    again = run("evaluate", "o.h5ad", "--screen", "order.h5ad", "--split", "run/split.json")
    ridge = [line for text in (said, again) for line in text.splitlines() if line.startswith("ridge")]
    assert len(ridge) == 2  # of one half of the controls, and of all that the prediction started from
    assert float(ridge[0].split()[1]) == pytest.approx(float(ridge[1].split()[1]), abs=0.05)
    assert all(any(line.startswith("additive") for line in text.splitlines()) for text in (said, again))


def test_controls_in_other_logarithms(case, run):
    case("screens", "c05")
    run("train", "--screen", "counts.h5ad", "--out", "run", *TINY)
    for name in (
        "counts",
        "log1p_cp10k",
        "log1p_median",
        "log1p_cpm",
        "log2_cp10k",
        "log10_cp10k",
        "log1p_unnormalised",
    ):
        run("predict", "run/model", "--controls", f"{name}.h5ad", "--perturbation", "A", "--out", f"{name}.out.h5ad")
        np.testing.assert_allclose(values(f"{name}.out.h5ad"), values("counts.out.h5ad"), atol=1e-4)


def test_guides_among_genes(case, run):
    case("screens", "c07")
    said = run("train", "--screen", "guides.h5ad", "--out", "run", "--hold-out", "batch=b2", "--no-score", *TINY)
    assert "4 columns of X are no genes" in said
    assert not [name for name in parsed("run/model/genes.json")["names"] if name.endswith("-guide")]
    guides = anndata.read_h5ad("guides.h5ad")
    del guides.var["feature_types"]
    guides.var_names = [name.removesuffix("-guide") for name in guides.var_names]
    guides.write_h5ad("untyped.h5ad")
    assert "IRF1, JAK2, STAT1 are counted in cells of their own" in run("screen", "info", "untyped.h5ad").replace(
        "STAT1, JAK2, IRF1", "IRF1, JAK2, STAT1"
    )


def test_controls_under_other_column_names(case, run, refused):
    case("screens", "c08")
    run("train", "--screen", "train.h5ad", "--out", "run", *TINY)
    predict = ("predict", "run/model", "--controls", "other_names.h5ad", "--perturbation", "A", "--out", "o.h5ad")
    predict += ("--overwrite",)
    assert "set data.perturbation_col=condition data.control_label=control" in refused(*predict)
    screen = anndata.read_h5ad("other_names.h5ad")
    named = ("data.perturbation_col=condition", "data.cell_type_col=celltype")
    assert "200 cells" in run("check", "run/model", "other_names.h5ad", *named)
    run(*predict, *named)
    predicted = anndata.read_h5ad("o.h5ad")
    assert predicted.n_obs == 120
    assert set(predicted.obs["cell_type"]) == {"K562"}
    assert "setting 'data.layer=x': what a file of control cells" in refused(*predict, "data.layer=x")
    del screen.obs["condition"]
    screen.write_h5ad("bare.h5ad")
    said = run(*[word.replace("other_names", "bare") for word in predict], "--cell-type", "K562")
    assert "all 200 cells are taken for controls" in said
    assert "all 200 cells are taken for cells of type 'K562'" in said


def test_genes_that_controls_lack(case, run, refused):
    case("screens", "c09")
    run("train", "--screen", "all_genes.h5ad", "--out", "run", *TINY)
    controls = ("--controls", "fewer_genes.h5ad")
    words = ("predict", "run/model", *controls, "--perturbation", "A", "--n-populations", "3", "--summary", "s.csv")
    assert "80 genes that the controls lack" in run(*words, "--out", "o.h5ad")
    assert anndata.read_h5ad("o.h5ad").shape[1] == 120
    assert sum(mean == "" for mean in column("s.csv", "mean")) == 80
    rank = ("screen", "rank", "run/model", *controls, "--out", "rank.csv")
    assert "the controls have none of the up genes (G150, G151)" in refused(*rank, "--up", "G150,G151")


def test_labels_that_are_no_perturbation(case, run):
    case("screens", "c10")
    said = run("screen", "info", "words.h5ad")
    assert "'', 'None', 'nan', 'unassigned' are taken for perturbations" in said
    words = ("data.drop=[nan, None, '', unassigned]", "data.other_control_labels=[non-targeting]")
    said = run("screen", "info", "words.h5ad", *words)
    assert "200: 40 perturbed, 160 'control'" in said
    assert "perturbations 1: A (40)" in said


def test_settings_on_the_command_line(case, run):
    case("screens", "c11")
    assert "Dabrafenib@0.5 (40)" in run("screen", "info", "tahoe.h5ad", "data.control_label=[('DMSO_TF', 0.0, 'uM')]")
    assert "40 perturbed, 120 'NO'" in run("screen", "info", "no.h5ad", "data.control_label=NO")
    for name, mark in (("hash", "#"), ("pipe", "|")):
        run("train", "--screen", f"{name}.h5ad", "--out", name, f"data.combination_separator={mark}", *TINY)
        assert parsed(f"{name}/model/perturbations.json")["names"] == ["JAK2", "STAT1"]


def test_names_of_genes(case, run, refused):
    case("screens", "c12")
    run("train", "--screen", "ensembl.h5ad", "--out", "run", *TINY)
    predict = ("predict", "run/model", "--perturbation", "A", "--out", "o.h5ad", "--controls")
    assert "200 of 200 matched" in run(*predict, "versions.h5ad")
    run("finetune", "--screen", "versions.h5ad", "--init-from", "run/model", "--out", "ft", "--dry-run")
    run("screen", "rank", "run/model", "--controls", "ensembl.h5ad", "--up", "G000", "--out", "r.csv")
    assert set(column("r.csv", "perturbation")) == {"A", "B"}
    assert "of the file are both ENSG" in refused(*predict, "twice.h5ad", "--overwrite")


def test_counts_with_fractions(case, run):
    case("screens", "c13")
    for name in ("soupx", "soupx_panel", "recovered"):
        assert "raw counts" in run("screen", "info", f"{name}.h5ad", "data.input_kind=counts")
    assert "raw counts" in run("screen", "info", "recovered.h5ad")
    assert "log1p values" not in run("screen", "info", "soupx_panel.h5ad")


def test_layers_and_columns_that_are_not_there(case, run, refused):
    case("screens", "c15")
    assert "data.layer=counts" in refused("screen", "info", "layers.h5ad")
    for layer in ("counts", "raw"):
        assert "raw counts" in run("screen", "info", "layers.h5ad", f"data.layer={layer}")
    assert "'cell_type', 'batch' not in bare.h5ad" in refused("screen", "info", "bare.h5ad")
    null = ("data.cell_type_col=null", "data.batch_col=null")
    assert "cell types  1: all (200)" in run("screen", "info", "bare.h5ad", *null)
    run("train", "--screen", "bare.h5ad", "--out", "run", *null, *TINY)
    run("predict", "run/model", "--controls", "bare.h5ad", "--perturbation", "A", "--out", "o.h5ad")
    obs = anndata.read_h5ad("o.h5ad").obs
    assert (obs["cell_type"] == "all").all()
    assert len(obs) == 120


def test_names_in_selectors_and_lists(case, run):
    case("screens", "c16")
    region = "chr8:128746000-128747000"
    run("train", "--screen", "names.h5ad", "--out", "held", "--hold-out", region, "--no-score", *TINY)
    assert conditions("held", "test") == {region: 40}
    run("train", "--screen", "names.h5ad", "--out", "run", *TINY)
    rank = ("screen", "rank", "run/model", "--controls", "names.h5ad", "--up", "G000", "--overwrite", "--out", "r.csv")
    run(*rank, "--candidates", "1,2-diol")
    assert column("r.csv", "perturbation") == ["1,2-diol"]
    run(*rank, "--candidates", "candidates.txt")
    assert set(column("r.csv", "perturbation")) == {"1,2-diol", "sgSTAT1#1", "sgSTAT1#2"}


def test_library_sizes_of_a_source(case, run, refused):
    case("atlas", "a01")
    run("atlas", "build", "panel.h5ad", "--out", "atlas", "source.library_size_col=total")
    words = ("data.n_hvg=null", "split.validation_fraction=0", *TINY)
    run("train", "--atlas", "atlas", "--out", "run", *words)
    assert parsed("run/model/preprocessing.json")["library_size_col"] == "total"
    run("predict", "run/model", "--controls", "panel.h5ad", "--perturbation", "A", "--out", "p.h5ad")
    controls = anndata.read_h5ad("panel.h5ad")
    controls = controls[controls.obs["perturbation"] == "control"]
    expected = np.log1p(controls.X.toarray() / controls.obs[["total"]].to_numpy() * 1e4).mean()
    assert 0.5 < values("p.h5ad").mean() / expected < 2
    assert "cannot honour" in refused("train", "--atlas", "atlas", "--out", "no", "data.library_size_col=none", *words)


def test_the_same_cells_under_two_labels(case, run, refused):
    case("atlas", "a02")
    assert "repeats" in run("atlas", "build", "study.h5ad", "integrated.h5ad", "--out", "atlas")
    words = (
        "train",
        "--atlas",
        "atlas",
        "--out",
        "run",
        "data.n_hvg=null",
        "--recipe",
        DEFAULTS,
        *TINY,
        "--hold-out",
        "A:T1",
    )
    assert "hold out A:T cell, type 1:b too" in refused(*words)
    run(*words, "--hold-out", "A:T cell, type 1")
    assert "study_v2" in refused("atlas", "build", "study.h5ad", "study_v2.h5ad", "--out", "twice")


def test_stray_parquet(case, run):
    case("atlas", "a03")
    for folder in ("hidden", "checkpoints", "temporary", "views", "fixed"):
        run("atlas", "build", folder, "--out", f"{folder}.atlas")
        assert len(Atlas.open(f"{folder}.atlas")) == 240
