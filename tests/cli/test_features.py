"""Features of perturbations on the command line: made, trained with, added to a model."""
# ruff: noqa: F811 (fixtures)

import anndata
import pandas as pd
import pytest

from perturbdiff.cli.main import main
from perturbdiff.features.tables import read_table
from tests.cli.test_main import assert_says, here, refused  # noqa: F401 (fixtures)
from tests.features.sources import gaf
from tests.screens import counts_screen, written
from tests.simulated import TINY, write_screen

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A screen, features of its perturbations, and a model trained with them; pert_2 is held out."""
    folder = tmp_path_factory.mktemp("features")
    screen = write_screen(folder)
    table = pd.DataFrame({"name": ["pert_0", "pert_1", "pert_2"], "a": [0.1, 0.9, 0.5], "b": [1.0, 0.0, 0.3]})
    table.to_csv(folder / "drugs.csv", index=False)
    words = [f"data.perturbation_features=[{folder / 'drugs.csv'}]", "training.n_steps=3"]
    main(["demo", "--screen", str(screen), "--hold-out", "pert_2", "--out", str(folder / "run"), *TINY, *words])
    return folder


def test_a_perturbation_held_out_everywhere_is_scored_by_its_features(folder):
    scores = pd.read_parquet(folder / "run" / "scores.parquet")
    assert set(scores["perturbation"]) == {"pert_2"}
    assert scores.loc[scores["method"] == "PerturbDiff", "energy_distance"].notna().all()


def test_further_perturbations_are_given_to_predict_and_rank(folder, here, capsys):
    (here / "drugs.csv").write_text("name,a,b\nnew,0.2,0.8\npert_0,9,9\n")
    model, screen = str(folder / "run" / "model"), str(folder / "screen.h5ad")
    common = [model, "--controls", screen, "--features", "drugs.csv", "--n-cells", "6"]
    main(["predict", *common, "--perturbation", "new+pert_0", "--out", "p.h5ad"])
    said = capsys.readouterr().out
    assert "features    1 more perturbations known by drugs.csv" in said
    assert "unseen      perturbation new" in said
    assert anndata.read_h5ad(here / "p.h5ad").n_obs == 6
    rank = ["screen", "rank", *common, "--up", "gene_00", "--n-populations", "2"]
    main([*rank, "--out", "r.csv"])
    assert set(pd.read_csv(here / "r.csv")["perturbation"]) == {"pert_0", "pert_1"}
    main([*rank, "--candidates", "all", "--out", "all.csv"])
    assert set(pd.read_csv(here / "all.csv")["perturbation"]) == {"pert_0", "pert_1", "pert_2", "new"}


def test_features_of_another_kind_are_refused_in_one_line(folder, here, refused):
    (here / "other.csv").write_text("name,a,b\nnew,0.2,0.8\n")
    (here / "drugs.csv").write_text("name,a\nnew,0.2\n")
    model, screen = str(folder / "run" / "model"), str(folder / "screen.h5ad")
    for file, says in (("other.csv", "trained as 'drugs'"), ("drugs.csv", "of 1 features"), ("no.csv", "no.csv")):
        words = ["predict", model, "--controls", screen, "--perturbation", "new", "--out", "p.h5ad", "--features", file]
        assert_says(refused(*words), says)


def test_a_held_out_perturbation_without_features_is_refused_before_training(folder, here, refused):
    screen = str(folder / "screen.h5ad")
    words = ["demo", "--screen", screen, "--hold-out", "pert_2", "--out", "run", *TINY]
    assert_says(refused(*words), "'pert_2' is held out in every context", "data.perturbation_features")
    assert not (here / "run").exists()


def test_loadings_of_a_file_become_a_table(here, capsys, refused):
    written(counts_screen(n_genes=30), here / "ref.h5ad")
    main(["features", "build", "ref.h5ad", "--out", "ref.parquet", "--n-components", "5"])
    table = read_table(here / "ref.parquet")
    assert table.values.shape[1] == 5
    assert f"{len(table.names)} names, 5 features" in capsys.readouterr().out
    assert_says(refused("features", "build", "ref.h5ad", "--out", "ref.parquet"), "exists")
    assert_says(refused("features", "build", "ref.h5ad", "--out", "ref.csv"), "must end in .parquet")
    assert_says(refused("features", "build", "no.h5ad", "--out", "no.parquet"), "does not exist")


def test_a_table_of_annotations_says_where_it_comes_from_and_what_it_knows(here, capsys, refused):
    written(counts_screen(n_genes=30), here / "s.h5ad")  # perturbations A and B
    rows = [("A", "GO:1", "IDA"), ("B", "GO:1", "IEA"), ("C", "GO:1", "IDA"), ("D", "GO:2", "IC"), ("E", "GO:2", "IC")]
    (here / "go.gaf").write_text(gaf(rows))
    words = ["features", "build", "go.gaf", "--out", "go.parquet", "--max-share", "1", "--license", "CC BY 4.0"]
    main(words)
    said = capsys.readouterr().out
    assert "license     CC BY 4.0" in said
    assert "date        2024-01-17" in said
    assert read_table(here / "go.parquet").names == ("A", "C", "D", "E")
    main(["features", "info", "go.parquet", "--screen", "s.h5ad", "data.control_label=control"])
    said = capsys.readouterr().out
    assert "license     CC BY 4.0" in said
    assert "features    go: 1 of 2; lacks B" in said
    main([*words, "--overwrite", "--screen", "s.h5ad", "--without-evidence", "none"])
    assert read_table(here / "go.parquet").names == ("A", "B", "C")
    again = [*words, "--overwrite"]
    assert_says(refused(*again, "data.control_label=x"), "'data.control_label=x' is a setting of --screen")
    assert_says(refused(*again, "--pairs", "a"), "--pairs 'a' must be 2 words with commas between them")
    assert_says(refused(*again, "--min-genes", "9"), "go.gaf: of 2 terms none is that of 9 genes or more")
