"""check as it is typed: a table and 0 where a file fits, one line and 2 where not."""
# ruff: noqa: F811 (fixtures)

import anndata
import pytest

from perturbdiff.cli.main import main
from tests.cli.test_main import assert_says, here, refused  # noqa: F401 (fixtures)
from tests.screens import counts_screen, written
from tests.untrained import untrained


@pytest.fixture
def files(here):
    untrained().save_pretrained(here / "model")
    return "model", str(written(counts_screen(), here / "screen.h5ad"))


def test_a_file_that_fits_is_described(files, capsys):
    main(["check", *files])
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in said] == [
        "model", "file", "controls", "genes", "X", "library", "sums", "perturbed", "cell types", "batches", "fits",
    ]  # fmt: skip
    assert said[-1] == "fits        yes"


def test_a_file_that_does_not_fit_is_refused_in_one_line(files, refused, here):
    model, screen = files
    adata = anndata.read_h5ad(screen)
    fewer = written(adata[:, :4].copy(), here / "fewer.h5ad")
    assert_says(refused("check", model, fewer), "only 4 of the model's 12 genes (33%)", "min_gene_overlap (50%)")
    assert_says(refused("check", model, screen, "--layer", "raw"), "there is no layer 'raw'")
    assert_says(refused("check", model, "none.h5ad"), "none.h5ad does not exist")
    main(["check", model, str(fewer), "--min-gene-overlap", "0.3"])
