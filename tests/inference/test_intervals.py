"""What is said of the populations of one prediction: means, spread, intervals."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from perturbdiff.hub.records import Calibration, Coverage, Width
from perturbdiff.inference.intervals import calibration_for, certainty, latent_share, median_width, population_summary
from tests.untrained import untrained

COVERAGE = Coverage("test", 3, of_all=0.88, of_responding=0.86)
CALIBRATION = Calibration(0.9, 0.2, Width(2.0, 0.3), Width(3.0, 0.5), n_conditions=4, coverage=COVERAGE)


def predicted_of(values, populations):
    """An AnnData as predict returns it; values (cells, G)."""
    obs = pd.DataFrame({"population": populations}, index=[f"c{i}" for i in range(len(values))])
    var = pd.DataFrame(index=[f"g{i}" for i in range(values.shape[1])])
    return AnnData(sparse.csr_matrix(values.astype(np.float32)), obs=obs, var=var)


def test_the_summary_is_that_of_a_double_loop():
    rng = np.random.default_rng(0)
    values = rng.random((12, 4)).astype(np.float32)
    values[:, 2] = 0
    populations = np.array([0, 1, 2] * 4)
    control = pd.Series([0.1, 0.2, 0.0, 0.4], index=[f"g{i}" for i in range(4)])
    table = population_summary(predicted_of(values, populations), control, CALIBRATION)
    kinds = set()
    for gene in range(4):
        means = [np.mean([float(values[c, gene]) for c in range(12) if populations[c] == k]) for k in range(3)]
        centre = sum(means) / 3
        noise = 0.0  # of four cells in each
        for k in range(3):
            own = [float(values[c, gene]) for c in range(12) if populations[c] == k]
            noise += sum((value - means[k]) ** 2 for value in own) / 3 / 4 / 3
        spread = math.sqrt(max(sum((m - centre) ** 2 for m in means) / 2 - noise, 0))
        change = centre - control[f"g{gene}"]
        factor, floor = (3.0, 0.5) if abs(change) >= 0.2 else (2.0, 0.3)
        kinds.add(factor)
        half = factor * math.sqrt(spread**2 + floor**2)
        row = table.iloc[gene]
        assert row["gene"] == f"g{gene}"
        got = row[["mean", "control_mean", "delta", "spread", "lower", "upper"]].astype(float)
        own = control[f"g{gene}"]
        expected = [centre, own, centre - own, spread, max(centre - half, 0), centre + half]
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert kinds == {2.0, 3.0}


def test_the_spread_is_that_of_populations_and_not_of_finitely_many_cells():
    rng = np.random.default_rng()
    found = []
    for n_cells in (20, 2000):
        centres = np.repeat(rng.normal(5, [0.5] * 200, size=(40, 200)), n_cells, axis=0)
        values = centres + rng.normal(0, 2.0, size=centres.shape)
        table = population_summary(predicted_of(values, np.repeat(np.arange(40), n_cells)))
        found.append(np.sqrt(np.square(table["spread"]).mean()))
    np.testing.assert_allclose(found, 0.5, rtol=0.1)
    one_cell = population_summary(predicted_of(np.array([[1.0], [3.0]]), [0, 1]))
    assert one_cell["spread"].item() == pytest.approx(math.sqrt(2))


def test_one_population_and_no_calibration_say_nothing_of_uncertainty():
    values = np.random.default_rng(0).random((6, 3))
    alone = population_summary(predicted_of(values, [0] * 6), None, CALIBRATION)
    assert alone[["spread", "lower", "upper", "control_mean", "delta"]].isna().all(axis=None)
    uncalibrated = population_summary(predicted_of(values, [0, 1] * 3), pd.Series(0.0, index=["g0", "g1", "g2"]))
    assert uncalibrated["spread"].notna().all()
    assert uncalibrated[["lower", "upper"]].isna().all(axis=None)
    assert math.isnan(median_width(alone))
    assert math.isnan(median_width(uncalibrated))


def test_genes_that_the_controls_lack_are_listed_without_numbers():
    values = np.random.default_rng().random((6, 4)) + 0.1
    control = pd.Series([0.5, np.nan, 0.7, np.nan, 0.9], index=["g0", "lost", "g1", "g2", "g3"])
    predicted = predicted_of(values, [0, 1] * 3)
    predicted.var["measured"] = [True, True, False, True]  # "lost" was left out, g2 kept
    table = population_summary(predicted, control, CALIBRATION).set_index("gene")
    assert list(table.index) == list(control.index)
    assert table.loc[["lost", "g2"]].isna().all(axis=None)
    present = ["g0", "g1", "g3"]
    mean = values[:, [0, 1, 3]].mean(axis=0)
    np.testing.assert_allclose(table.loc[present, "mean"], mean, atol=1e-6)
    np.testing.assert_allclose(table.loc[present, "delta"], mean - control[present], atol=1e-6)
    width = (table["upper"] - table["lower"])[present].median()
    assert median_width(table) == pytest.approx(width)


def test_the_width_is_that_of_expressed_genes():
    table = pd.DataFrame(
        {"mean": [1.0, 0, 0, 2], "control_mean": [1.0, 0, 0.1, 0], "lower": [0.0] * 4, "upper": [1, 99, 2, 5]}
    )
    assert median_width(table) == 2.0  # of 1, 2 and 5


def test_how_much_of_the_variance_between_populations_is_not_of_finitely_many_cells():
    rng = np.random.default_rng(3)

    def cells(between: float, n: int) -> AnnData:
        level = np.repeat(9 + between * rng.normal(size=(1000, 8)), n, axis=0)
        return predicted_of(level + rng.normal(size=level.shape), np.repeat(np.arange(1000), n))

    for between, n in ((0.5, 4), (0.5, 20), (0.1, 10)):
        assert latent_share(cells(between, n)) == pytest.approx(between**2 / (between**2 + 1 / n), abs=0.05)
    alone = cells(0.5, 4)
    assert latent_share(alone[alone.obs["population"] == 0]) is None
    assert latent_share(predicted_of(np.zeros((4, 2)), [0, 0, 1, 1])) is None


def test_what_is_said_of_coverage_names_the_conditions_and_the_genes_that_respond():
    assert (
        "median width 0.5 (log1p); covered 88% of means, 86% of genes that respond, on 3 test conditions"
        in certainty(CALIBRATION, np.array([0.5]))
    )
    left_out = replace(CALIBRATION, coverage=Coverage("validation", 1, 0.9, None))
    assert "covered 90% of means on 1 validation condition, left out in turn" in certainty(left_out, np.array([np.nan]))
    assert certainty(None, np.array([0.5])).startswith("not calibrated")
    assert certainty(None, np.array([0.5]), otherwise=True).startswith("not known: intervals were calibrated for draws")


def test_intervals_are_those_of_the_sampling_that_was_calibrated():
    model = untrained()
    model.training = replace(model.training, calibration=CALIBRATION)
    own = model.config.sampling
    for same in ({}, {"steps": own.n_steps, "guidance_scale": own.guidance_scale}, {"sampler": own.sampler}):
        assert calibration_for(model, **same, all_genes=True) is CALIBRATION
    for other in ({"steps": own.n_steps + 1}, {"guidance_scale": own.guidance_scale + 1}, {"varied": False}):
        assert calibration_for(model, **other) is None
