"""The two-level distance against a double loop, the scorer of the variability protocol and its published figures."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict

import anndata
import numpy as np
import pytest

from perturbdiff.data.simulate import SimulationConfig, simulate
from perturbdiff.evaluation.populations import batch_means, population_scores, two_level_distance
from tests.screens import log1p_cp10k, read, screen_with_cells, shared


def populations(rng, n, cells=8, genes=5, vary=1.0):
    return [rng.normal(rng.normal(0, vary, genes), 1.0, (cells, genes)) for _ in range(n)]


def loop_distance(x, y):
    def mean(p, q):
        return math.fsum(math.dist(a, b) for a in p for b in q) / (len(p) * len(q))

    return math.sqrt(max(2 * mean(x, y) - mean(x, x) - mean(y, y), 0))


def loop_two_level(predicted, measured):
    def mean(p, q):
        pairs = [loop_distance(a, b) for i, a in enumerate(p) for j, b in enumerate(q) if p is not q or i != j]
        return math.fsum(pairs) / len(pairs)

    return 2 * mean(predicted, measured) - mean(predicted, predicted) - mean(measured, measured)


def test_it_is_that_of_a_double_loop_whatever_the_sizes():
    rng = np.random.default_rng()
    predicted = [rng.gamma(2.0, 1.0, (n, 4)) + 3 for n in (1, 5, 9)]
    measured = [rng.gamma(1.0, 1.0, (n, 4)) + 3 for n in (6, 2)]
    assert two_level_distance(predicted, measured) == pytest.approx(loop_two_level(predicted, measured), abs=1e-9)


def test_neither_the_order_of_populations_nor_that_of_cells_matters():
    rng = np.random.default_rng()
    sides = [populations(rng, 4, cells=510), populations(rng, 3, cells=20)]
    mixed = [[rng.permutation(side[i]) for i in rng.permutation(len(side))] for side in sides]
    assert two_level_distance(*mixed) == pytest.approx(two_level_distance(*sides), abs=1e-9)
    assert two_level_distance(*sides[::-1]) == pytest.approx(two_level_distance(*sides), abs=1e-9)


@pytest.mark.parametrize("vary", [0.0, 0.5, 2.0])
def test_clouds_of_one_law_are_at_0_in_the_mean(vary):
    rng = np.random.default_rng()
    found = [two_level_distance(populations(rng, 5, vary=vary), populations(rng, 7, vary=vary)) for _ in range(300)]
    assert abs(np.mean(found)) < 4.5 * np.std(found) / math.sqrt(300)
    assert min(found) < 0 < max(found)


def test_populations_that_do_not_vary_are_far_from_those_that_do_and_the_farther_the_less_they_do():
    rng = np.random.default_rng()
    measured = populations(rng, 30, cells=40)
    found = [two_level_distance(populations(rng, 30, 40, vary=vary), measured) for vary in (0.0, 0.4, 1.0)]
    assert found[0] > found[1] > found[2]
    # The cells of all populations together are the same: the distance of cells alone does not see it.
    pool = np.concatenate(measured)
    assert two_level_distance([rng.permutation(pool)[:40] for _ in range(30)], measured) > found[2] + 0.05


def test_illegal_populations_are_refused():
    rng = np.random.default_rng()
    good = populations(rng, 2)
    with pytest.raises(ValueError, match=r"predicted populations \(1\) must be two or more"):
        two_level_distance(good[:1], good)
    with pytest.raises(ValueError, match=r"measured populations \(0\) must be two or more"):
        two_level_distance(good, [])
    with pytest.raises(ValueError, match=r"measured population 1 \(\(0, 5\)\) must be a non-empty array"):
        two_level_distance(good, [good[0], good[1][:0]])
    with pytest.raises(ValueError, match=r"predicted population 0 \(1 NaN or infinite values\) must be finite"):
        two_level_distance([np.where(np.arange(40).reshape(8, 5) == 7, np.nan, good[0]), good[1]], good)
    with pytest.raises(ValueError, match=r"number of genes .*predicted population 1 4.* must agree"):
        two_level_distance([good[0], good[1][:, :4]], good)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The 60 populations of pert_0 of the protocol's screen, in the genes that respond."""
    path = tmp_path_factory.mktemp("variability") / "screen.h5ad"
    config = SimulationConfig(
        n_genes=60, n_cell_types=1, n_batches=60, n_perturbations=2, cells_per_condition=64, seed=3,
        control_cells_per_context=32, n_effect_genes=20, batch_variability=0.6, mean_library_size=1500.0,
    )  # fmt: skip
    truth = simulate(config, path)
    screen = anndata.read_h5ad(path)
    screen = screen[(screen.obs["perturbation"] == "pert_0").to_numpy()]
    values = log1p_cp10k(screen.X)[:, sorted(truth.effect_genes[0])]
    batches = screen.obs["batch"].astype(str).to_numpy()
    return [values[batches == batch] for batch in sorted(set(batches))]


def test_the_published_figures_of_no_variation_and_of_as_much_as_measured(measured):
    rng = np.random.default_rng(0)
    pool = np.concatenate(measured)
    collapsed = [[rng.permutation(pool)[:64] for _ in range(24)] for _ in range(5)]
    found = [two_level_distance(predicted, measured[:24]) for predicted in collapsed]
    assert np.mean(found) == pytest.approx(0.215, abs=0.03)  # cells of all batches mixed
    halves = [rng.permutation(60) for _ in range(5)]
    found = [two_level_distance(*([measured[i] for i in of] for of in (h[:30], h[30:]))) for h in halves]
    assert np.mean(found) == pytest.approx(0.024, abs=0.08)  # one half of the measured, the other one


def test_it_equals_the_scorer_of_the_protocol(measured):
    path = shared("PERTURBDIFF_VARIABILITY", "variability", "score.py")
    spec = importlib.util.spec_from_file_location("variability_score", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    halves = measured[:20], measured[40:]
    expected = theirs.score(*halves, np.arange(20))
    assert two_level_distance(*halves) == pytest.approx(expected["two_level"], abs=1e-6)
    names = {"variance_ratio": "var_ratio", "pc1_ratio": "pc1_ratio", "two_level": "two_level", "coverage": "cover90",
             "within": "within", "mean_error": "mean_error"}  # fmt: skip
    found = asdict(population_scores(*halves))
    assert found == pytest.approx({ours: expected[name] for ours, name in names.items()}, abs=1e-6)


def test_the_variance_of_means_is_without_that_of_finitely_many_cells():
    rng = np.random.default_rng()
    clouds = []
    for n_cells in (8, 60):
        centres = rng.normal(size=(80, 1, 5))
        clouds.append(list(centres + 3 * rng.normal(size=(80, n_cells, 5))))
    scores = population_scores(*clouds)
    assert scores.variance_ratio == pytest.approx(1, abs=0.6)  # 2 with the noise
    assert scores.within == pytest.approx(1, abs=0.2)
    with pytest.raises(ValueError, match="a population of one cell does not tell how its cells differ"):
        population_scores([cells[:1] for cells in clouds[0]], clouds[1])


def test_means_of_measured_batches_are_those_of_their_cells_and_small_ones_have_none():
    rows = [("A", "T", batch, n) for batch, n in (("b1", 12), ("b2", 9), ("b3", 10), ("b4", 15))]
    adata = screen_with_cells([*rows, ("A", "NK", "b1", 20), ("control", "T", "b1", 5)])
    found = batch_means(read(adata), "A", "T", "b4")
    assert list(found.index) == ["b1", "b3"]  # b2 has nine cells
    log1p = log1p_cp10k(adata.X)
    for batch in found.index:
        own = (adata.obs[["perturbation", "cell_type", "batch"]] == ["A", "T", batch]).all(axis=1).to_numpy()
        np.testing.assert_allclose(found.loc[batch, adata.var_names], log1p[own].mean(axis=0), rtol=1e-5)
    assert batch_means(read(adata), "A", "NK", "b1").empty
