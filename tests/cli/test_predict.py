"""predict with requests, calibrate, and screen rank as they are typed, and one line where something is wrong."""
# ruff: noqa: F811 (fixtures)

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbdiff.cli.main import main
from perturbdiff.cli.rank import _shown
from perturbdiff.hub.records import Calibration, Coverage, Width
from perturbdiff.inference import candidates
from perturbdiff.inference.output import read_predicted
from perturbdiff.model import PerturbDiff
from tests.cli.test_main import assert_says, here, refused  # noqa: F401 (fixtures)
from tests.screens import counts_screen, log1p_cp10k, read, written
from tests.untrained import untrained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return written(counts_screen(n=8), tmp_path_factory.mktemp("screen") / "screen.h5ad")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    untrained(std=0.1).save_pretrained(folder)
    return folder


@pytest.fixture
def calibrated(here):
    model = untrained(std=0.1)
    width, coverage = Width(factor=3.0, floor=0.1), Coverage("test", 4, of_all=0.876, of_responding=0.86)
    calibration = Calibration(0.9, 0.0, width, width, n_conditions=3, coverage=coverage)
    model.training = replace(model.training, calibration=calibration)
    model.save_pretrained(here / "calibrated")
    return here / "calibrated"


@pytest.fixture
def requests(here):
    (here / "r.csv").write_text("perturbation,cell_type,n_cells\nA,NK,\nA+B,,5\n")
    return here / "r.csv"


def call(*words):
    main([str(word) for word in words])


@pytest.mark.parametrize(("name", "read_back"), [("p.h5ad", anndata.read_h5ad), ("p.parquet", read_predicted)])
def test_requests_go_into_one_file_with_the_options_as_defaults(here, capsys, model, screen, requests, name, read_back):
    call("predict", model, "--controls", screen, "--requests", requests, "--out", name, "--n-populations", 2)
    predicted = read_back(here / name)
    assert predicted.obs["request"].value_counts().to_dict() == {0: 44, 1: 10}
    said = capsys.readouterr().out
    for piece in ("requests    2", "12 of 12 matched by name", "not calibrated", f"{name}: 54 cells, 12 genes"):
        assert piece in said


def test_a_file_with_controls_is_what_cell_eval_takes(here, capsys, model, screen):
    pytest.importorskip("cell_eval")
    (here / "r.csv").write_text("perturbation\nA\nB\nA+B\n")
    words = ["--controls", screen, "--requests", "r.csv", "--cell-type", "NK", "--out", "p.h5ad", "--with-controls"]
    call("predict", model, *words)
    assert "66 cells and 22 control cells, 12 genes" in capsys.readouterr().out
    adata = anndata.read_h5ad(screen)
    measured = adata[adata.obs["cell_type"] == "NK"].copy()
    measured.X = sparse.csr_matrix(log1p_cp10k(measured.X).astype("float32"))
    measured.write_h5ad("r.h5ad")
    run = [sys.executable, "-m", "cell_eval"]
    names = ["--pert-col", "perturbation", "--control-pert", "control", "-o", "out"]
    done = subprocess.run([*run, "run", "-ap", "p.h5ad", "-ar", "r.h5ad", *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(pd.read_csv(here / "out/results.csv")["perturbation"]) == ["A", "A+B", "B"]
    if shutil.which("zstd") is None:
        return  # cell-eval prep calls it
    (here / "genes.csv").write_text("\n".join(measured.var_names) + "\n")
    names = ["-p", "perturbation", "-n", "control", "-o", "p.vcc", "--expected-gene-dim", "12"]
    done = subprocess.run([*run, "prep", "-i", "p.h5ad", "-g", "genes.csv", *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (here / "p.vcc").stat().st_size > 0


def test_one_prediction_may_be_parquet_and_says_how_sure_it_is(here, capsys, calibrated, screen):
    one = ["predict", calibrated, "--controls", screen, "--perturbation", "A", "--cell-type", "NK"]
    call(*one, "--out", "p.parquet", "--n-populations", "3", "--summary", "genes.csv")
    assert read_predicted(here / "p.parquet").n_obs == 66
    table = pd.read_csv(here / "genes.csv")
    width = (table["upper"] - table["lower"])[(table["mean"] > 0) | (table["control_mean"] > 0)].median()
    said = " ".join(capsys.readouterr().out.split())  # lines are broken where they are long
    assert f"90% intervals of gene means: median width {width:.3g} (log1p); covered 88% of means, 86% of genes" in said
    call(*one, "--out", "q.parquet")
    assert "unknown: intervals need --n-populations 2 or more" in capsys.readouterr().out


def test_what_is_unseen_is_said_by_request(here, capsys, model, screen):
    adata = anndata.read_h5ad(screen)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace("T", "Treg")
    (here / "r.csv").write_text("perturbation,cell_type\nA,NK\nA,Treg\n")
    new = written(adata, here / "new.h5ad")
    call("predict", model, "--controls", new, "--requests", "r.csv", "--out", "p.h5ad")
    assert "unseen      cell_type Treg, in 1 requests (number 1)" in capsys.readouterr().out


def test_genes_that_the_controls_lack_are_said_and_kept_on_request(refused, here, capsys, model, screen):
    fewer = written(anndata.read_h5ad(screen)[:, :9].copy(), here / "fewer.h5ad")
    predict = ["predict", model, "--controls", fewer, "--perturbation", "A", "--out"]
    call(*predict, "p.h5ad", "--summary", "genes.csv")
    said = capsys.readouterr().out
    for piece in ("9 of 12 matched by name", "3 genes that the controls lack, left out", "44 cells, 9 genes"):
        assert piece in said
    assert list(pd.read_csv(here / "genes.csv")["mean"].isna()) == [False] * 9 + [True] * 3
    call(*predict, "q.h5ad", "--all-genes")
    assert "44 cells, 12 genes" in capsys.readouterr().out
    assert list(anndata.read_h5ad(here / "q.h5ad").var["measured"]) == [True] * 9 + [False] * 3
    rank = ["screen", "rank", model, "--controls", fewer, "--out", "r.csv", "--up"]
    assert_says(refused(*rank, "gene_9,gene_10"), "the controls have none of the up genes (gene_9, gene_10)")
    assert not (here / "r.csv").exists()


BAD_REQUESTS = {  # more in tests/inference
    "unknown": ("perturbation\nA\na\n", ["line 3 of the requests: perturbation 'a'", "did you mean A?"]),
    "context": ("perturbation,batch\nA,b3\n", ["line 2", "no control cell has batch 'b3'", "did you mean b2, b1?"]),
    "number": ("perturbation,n_cells\nA,-1\n", ["line 2: n_cells (-1)", "at least 1"]),
}


@pytest.mark.parametrize(("text", "pieces"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_requests_are_refused_in_one_line(refused, here, model, screen, text, pieces):
    (here / "r.csv").write_text(text)
    line = refused("predict", model, "--controls", screen, "--requests", "r.csv", "--out", "p.h5ad")
    assert_says(line, *pieces)


def test_outputs_that_exist_or_cannot_be_written_are_refused(refused, here, model, screen, requests):
    start = ["predict", model, "--controls", screen, "--requests", requests, "--out"]
    (here / "p.h5ad").write_text("mine")
    assert_says(refused(*start, "p.h5ad"), "p.h5ad exists", "--overwrite")
    (here / "s.csv").write_text("mine")
    assert_says(refused(*start, "q.h5ad", "--summary", "s.csv"), "s.csv exists")
    assert_says(refused(*start, "q.h5ad", "--summary", "p.h5ad"), "p.h5ad must end in .csv")
    assert_says(refused(*start, "p.h5ad/q.h5ad"), "p.h5ad")
    (here / "folder.h5ad").mkdir()
    assert_says(refused(*start, "folder.h5ad", "--overwrite"), "folder.h5ad is a folder")
    assert_says(refused(*start[:-3], "--requests", "none.csv", "--out", "q.h5ad"), "none.csv does not exist")


@pytest.mark.parametrize("what", [["--perturbation", "A"], ["--requests", "r.csv"]])
def test_an_output_of_no_known_format_is_refused_before_the_model_is_looked_for(refused, what):
    line = refused("predict", "no_model", "--controls", "none.h5ad", *what, "--out", "q.csv")
    assert_says(line, "output q.csv must end in .h5ad or .parquet")


def split_of(screen, folder, **selectors):
    from perturbdiff.config import SplitConfig
    from perturbdiff.data.splits import make_split, write_split

    measured = read(anndata.read_h5ad(screen))
    write_split(make_split(measured, SplitConfig(**selectors), 0), measured, folder / "split.json")
    return folder / "split.json"


def test_calibrate_puts_intervals_into_the_folder(here, capsys, screen):
    untrained(std=0.1).save_pretrained(here / "model")
    split = split_of(screen, here, validation=["A+B"])
    call("calibrate", "model", "--screen", screen, "--split", split, "--n-populations", 3)
    said = capsys.readouterr().out
    found = PerturbDiff.from_pretrained(here / "model").training.calibration
    assert found.n_conditions == 4
    assert found.coverage.conditions == "validation"  # nothing is held out for test
    assert f"coverage    {found.coverage.of_all:.0%} of means" in said
    assert "on 4 validation conditions, left out in turn, of 90% wanted" in said


def test_calibrate_takes_the_split_of_the_folder(here, refused, screen):
    model = untrained(std=0.1)
    model.save_pretrained(here / "model")
    words = ("calibrate", "model", "--screen", screen, "--n-populations", 3)
    assert_says(refused(*words), "has no split.json")
    model.split = json.loads(split_of(screen, here, validation=["A+B"]).read_text())
    model.save_pretrained(here / "model")
    call(*words)
    assert PerturbDiff.from_pretrained(here / "model").training.calibration.n_conditions == 4


def test_coverage_is_of_the_conditions_that_are_held_out_for_test(here, capsys, screen):
    untrained(std=0.1).save_pretrained(here / "model")
    split = split_of(screen, here, validation=["A+B"], hold_out=["A:NK"])
    call("calibrate", "model", "--screen", screen, "--split", split, "--n-populations", 3)
    assert "on 2 test conditions, of 90% wanted" in capsys.readouterr().out
    found = PerturbDiff.from_pretrained(here / "model").training.calibration
    assert (found.n_conditions, found.coverage.conditions, found.coverage.n_conditions) == (4, "test", 2)


def test_conditions_that_were_trained_in_part_calibrate_nothing(here, capsys, refused, screen):
    untrained(std=0.1).save_pretrained(here / "model")
    words = ("calibrate", "model", "--screen", screen, "--split")
    both = split_of(screen, here, validation=["A+B"], validation_cells=0.5)
    call(*words, both)
    assert "conditions  4, held out for validation" in capsys.readouterr().out  # of twelve with validation cells
    parts = split_of(screen, here, validation_cells=0.5, validation_fraction=0.0)
    assert_says(refused(*words, parts), "0 conditions are too few to calibrate on")


def test_calibrate_needs_validation_conditions(refused, here, screen):
    untrained(std=0.1).save_pretrained(here / "model")
    split = split_of(screen, here, hold_out=["A:NK"])
    assert_says(
        refused("calibrate", "model", "--screen", screen, "--split", split), "1 conditions are too few to calibrate on"
    )


def test_rank_prints_the_best_and_writes_all(here, capsys, model, screen):
    (here / "up.txt").write_text("gene_1\n# a remark\ngene_4  # and another\nGENE#9\n\n")
    rank = ["screen", "rank", model, "--controls", screen, "--cell-type", "NK", "--n-cells", 5, "--n-populations", 2]
    call(*rank, "--up", "up.txt", "--down", "gene_2,gene_3", "--out", "out/ranking.csv")
    table = pd.read_csv(here / "out" / "ranking.csv")
    assert list(table["rank"]) == [1, 2]
    said = capsys.readouterr().out
    for piece in (
        "1 of the up genes are not in the model: GENE#9",
        "p_above     of the populations alone, which is too sure: the model is not",
        "2 perturbations; no change scores 0",
    ):
        assert piece in said
    call(*rank, "--up", "gene_1,gene_4", "--down", "gene_2,gene_3", "--out", "again.csv")
    assert (here / "again.csv").read_text() == (here / "out" / "ranking.csv").read_text()
    adata = anndata.read_h5ad(screen)
    reference = written(adata[(adata.obs["perturbation"] == "A") & (adata.obs["cell_type"] == "T")], here / "a.h5ad")
    call(*rank, "--towards", reference, "--candidates", "A+B,B", "--out", "towards.csv")
    assert set(pd.read_csv(here / "towards.csv")["perturbation"]) == {"A+B", "B"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_ranking_keeps_what_is_done_until_it_is_written(here, capsys, model, screen, monkeypatch, number):
    rank = ["screen", "rank", model, "--controls", screen, "--n-cells", 5, "--up", "gene_1,gene_4"]
    call(*rank, "--out", "whole.csv")
    score, seen = candidates._of_populations, []

    def ended(*given):
        seen.append(given)
        if len(seen) == 2:
            signal.raise_signal(number)
        return score(*given)

    monkeypatch.setattr(candidates, "_of_populations", ended)
    with pytest.raises(SystemExit) as stop:
        call(*rank, "--out", "r.csv")
    assert stop.value.code == 128 + number
    said = capsys.readouterr()
    assert "kept        1 of 2 candidates in r.csv.part; the same command goes on" in said.out
    assert said.err.endswith(f"perturbdiff: ended by {number.name}\n")

    monkeypatch.setattr(candidates, "KEPT_EVERY", -1.0)
    with monkeypatch.context() as full:
        full.setattr(pd.DataFrame, "to_csv", refuse)
        with pytest.raises(SystemExit):
            call(*rank, "--out", "r.csv")
    call(*rank, "--out", "r.csv")
    assert len(seen) == 2 + 1
    assert not (here / "r.csv.part").exists()
    pd.testing.assert_frame_equal(pd.read_csv("r.csv"), pd.read_csv("whole.csv"), rtol=1e-4)


def refuse(*given, **how):
    raise OSError("No space left on device")


BAD_RANKS = {  # more in tests/inference
    "nothing": ([], ["give genes (up, down) or a reference population"]),
    "missing list": (["--up", "genes.txt"], ["--up genes.txt does not exist"]),
    "empty list": (["--down", "none.txt"], ["--down none.txt names nothing"]),
    "binary list": (["--down", "binary.txt"], ["--down binary.txt is not a text file"]),
    "only commas": (["--up", ",,"], ["--up ,, names nothing"]),
    "reference": (["--towards", "none.txt"], ["none.txt is not a readable .h5ad"]),
    "no reference": (["--towards", "nowhere.h5ad"], ["nowhere.h5ad does not exist"]),
    "output": (["--up", "gene_1", "--out", "none.txt"], ["none.txt must end in .csv"]),
    "cell type": (["--up", "gene_1", "--cell-type", "nk"], ["no control cell with cell_type 'nk'"]),
}


@pytest.mark.parametrize(("words", "pieces"), BAD_RANKS.values(), ids=BAD_RANKS)
def test_bad_rankings_are_refused_in_one_line(refused, here, model, screen, words, pieces):
    (here / "none.txt").write_text("# nothing\n")
    (here / "binary.txt").write_bytes(b"\xff\xfe\x00")
    words = [str(screen) if word == "SCREEN" else word for word in words]
    assert_says(refused("screen", "rank", model, "--controls", screen, "--out", "r.csv", *words), *pieces)


def test_the_printed_ranking_fits_80_columns():
    n = 20
    table = pd.DataFrame({
        "rank": np.arange(1, n + 1), "perturbation": ["a name of a drug, which is very long @ 10 uM"] * n,
        "score": -12.3456, "sd": 0.5, "p_above": 1.0, "rank_low": 100, "rank_high": 200, "features_only": True,
        "verdict": "cannot tell", "expected_pearson": [-0.123] + [np.nan] * (n - 1),
    })  # fmt: skip
    text = _shown(table)
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[1].split()[-4:] == ["100-200", "cannot", "tell", "-0.123"]
