"""simulate: the file that was asked for, and refusals that name the option's value."""

import anndata
import pytest

from perturbdiff.cli.main import main
from perturbdiff.cli.simulate import OPTIONS
from perturbdiff.data.simulate import SimulationConfig, simulate

SMALL = ["--genes", "50", "--effect-genes", "5", "--cells", "3", "--control-cells", "4", "--cell-types", "2"]


def test_the_defaults_of_the_options_are_those_of_a_simulation():
    assert SimulationConfig(**{field: default for _, field, default, _ in OPTIONS}) == SimulationConfig()


def test_it_writes_what_the_options_say(tmp_path, capsys):
    path = tmp_path / "new" / "screen.h5ad"
    words = ["--perturbations", "3", "--pairs", "1", "--doses", "0.5,2", "--seed", "7", "--counts", "800"]
    main(["simulate", str(path), *SMALL, *words])
    screen = anndata.read_h5ad(path)
    assert screen.shape == (2 * 2 * (4 * 2 * 3 + 4), 50)
    assert set(screen.obs["dose"]) == {0.0, 0.5, 2.0}
    assert f"{screen.n_obs} cells of 50 genes" in capsys.readouterr().out
    config = SimulationConfig(
        n_genes=50, n_effect_genes=5, cells_per_condition=3, control_cells_per_context=4, n_cell_types=2,
        n_perturbations=3, n_pairs=1, doses=(0.5, 2.0), seed=7, mean_library_size=800,
    )  # fmt: skip
    simulate(config, tmp_path / "same.h5ad")
    assert (anndata.read_h5ad(tmp_path / "same.h5ad").X != screen.X).nnz == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--genes", "10"], "n_effect_genes (40) must not exceed n_genes (10)"),
        (["--doses", "1,x"], "'1,x' must be numbers with commas between them"),
        (["--doses", "0"], "must be positive"),
        (["--seed", "-1"], "seed (-1) must be finite and not negative"),
        (["--cells", "0"], "cells_per_condition (0) must be at least 1"),
    ],
)
def test_a_screen_that_cannot_be_is_refused_and_nothing_is_written(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        main(["simulate", str(tmp_path / "screen.h5ad"), *words])
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
