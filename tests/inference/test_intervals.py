"""Intervals that cover what they say, on conditions they were not made from."""

import math

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from perturbdiff.hub.records import Calibration
from perturbdiff.inference.intervals import (
    calibrate,
    fit_calibration,
    latent_share,
    median_width,
    population_summary,
)
from tests.screens import counts_screen, log1p_cp10k, read
from tests.untrained import untrained

CALIBRATION = Calibration(level=0.9, factor=2.0, floor=0.3, coverage=0.88, n_conditions=4)


def predicted_of(values, populations):
    """An AnnData as predict returns it; values (cells, G)."""
    obs = pd.DataFrame({"population": populations}, index=[f"c{i}" for i in range(len(values))])
    var = pd.DataFrame(index=[f"g{i}" for i in range(values.shape[1])])
    return AnnData(sparse.csr_matrix(values.astype(np.float32)), obs=obs, var=var)


def gaussian(rng, n_conditions, n_genes, n_populations, own_sd, scale=1.0):
    """Measured means, and predictions whose populations scatter around the same truth; spread differs by gene."""
    sd = rng.lognormal(-1.5, 0.7, (n_conditions, n_genes))
    truth = rng.normal(5, 1, (n_conditions, n_genes))
    measured = truth + own_sd * scale * sd * rng.normal(size=sd.shape)
    drawn = truth[:, None] + sd[:, None] * rng.normal(size=(n_conditions, n_populations, n_genes))
    return measured, drawn.mean(axis=1), drawn.std(axis=1, ddof=1)


def test_the_summary_is_that_of_a_double_loop():
    rng = np.random.default_rng(0)
    values = rng.random((12, 4)).astype(np.float32)
    values[:, 2] = 0
    populations = np.array([0, 1, 2] * 4)
    control = pd.Series([0.1, 0.2, 0.0, 0.4], index=[f"g{i}" for i in range(4)])
    table = population_summary(predicted_of(values, populations), control, CALIBRATION)
    for gene in range(4):
        means = [np.mean([float(values[c, gene]) for c in range(12) if populations[c] == k]) for k in range(3)]
        centre = sum(means) / 3
        noise = 0.0  # of four cells in each
        for k in range(3):
            own = [float(values[c, gene]) for c in range(12) if populations[c] == k]
            noise += sum((value - means[k]) ** 2 for value in own) / 3 / 4 / 3
        spread = math.sqrt(max(sum((m - centre) ** 2 for m in means) / 2 - noise, 0))
        half = 2.0 * math.sqrt(spread**2 + 0.3**2)
        row = table.iloc[gene]
        assert row["gene"] == f"g{gene}"
        got = row[["mean", "control_mean", "delta", "spread", "lower", "upper"]].astype(float)
        own = control[f"g{gene}"]
        expected = [centre, own, centre - own, spread, max(centre - half, 0), centre + half]
        np.testing.assert_allclose(got, expected, rtol=1e-6)


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


@pytest.mark.parametrize("own_sd", [0.5, 1.0, 3.0])
def test_intervals_cover_fresh_conditions_as_often_as_they_say(own_sd):
    # All pairs are independent here. 40 x 200 calibration pairs and 100 x 200 fresh ones: the standard error of the
    # coverage is sqrt(0.09 / 8000 + 0.09 / 20000) = 0.004; four of them are 0.016.
    rng = np.random.default_rng(1)
    measured, mean, spread = gaussian(rng, 40, 200, 5, own_sd)
    found = fit_calibration(measured, mean, spread, np.ones(mean.shape, dtype=bool))
    measured, mean, spread = gaussian(rng, 100, 200, 5, own_sd)
    covered = (np.abs(measured - mean) <= found.half_width(spread)).mean()
    assert abs(covered - 0.9) < 0.016
    assert abs(found.coverage - 0.9) < 0.016
    assert found.n_conditions == 40


def test_coverage_is_measured_on_conditions_left_out_not_on_its_own():
    # One condition errs ten times as much: nothing that the others say covers it, and its own genes would.
    rng = np.random.default_rng(2)
    measured, mean, spread = gaussian(rng, 3, 400, 4, 1.0)
    measured[2] = mean[2] + 50
    used = np.ones(mean.shape, dtype=bool)
    found = fit_calibration(measured, mean, spread, used)
    inside = np.abs(measured - mean) <= found.half_width(spread)
    assert inside.mean() >= 0.9
    assert found.coverage == pytest.approx((1.0 + 1.0 + 0.0) / 3)


def test_the_factor_is_the_conformal_quantile_with_its_correction():
    error = np.arange(1, 20, dtype=float).reshape(1, -1).repeat(2, axis=0)  # 38 pairs, each score twice
    found = fit_calibration(error, np.zeros((2, 19)), np.zeros((2, 19)), np.ones((2, 19), dtype=bool))
    assert found.floor == 10.0  # the median error
    assert found.factor * found.floor == pytest.approx(18.0)  # the ceil(39 * 0.9) = 36th smallest


def test_the_floor_is_the_median_error_of_the_used_genes():
    rng = np.random.default_rng(4)
    measured, mean, spread = gaussian(rng, 3, 50, 3, 1.0)
    used = rng.random(mean.shape) < 0.5
    pairs = sorted(abs(measured[c, g] - mean[c, g]) for c in range(3) for g in range(50) if used[c, g])
    n = len(pairs)
    middle = (pairs[(n - 1) // 2] + pairs[n // 2]) / 2
    assert fit_calibration(measured, mean, spread, used).floor == pytest.approx(middle)


def test_genes_that_are_not_used_change_nothing():
    rng = np.random.default_rng(3)
    measured, mean, spread = gaussian(rng, 4, 60, 5, 1.0)
    used = np.ones(mean.shape, dtype=bool)
    plain = fit_calibration(measured, mean, spread, used)
    zeros = np.zeros((4, 500))
    padded = [np.hstack([values, zeros]) for values in (measured, mean, spread)]
    assert fit_calibration(*padded, np.hstack([used, zeros.astype(bool)])) == plain
    empty = np.vstack([used, np.zeros((1, 60), dtype=bool)])  # a condition without an expressed gene
    assert fit_calibration(*(np.vstack([v, v[:1]]) for v in (measured, mean, spread)), empty) == plain


@pytest.mark.parametrize(
    ("n_conditions", "n_genes", "level", "message"),
    [(1, 50, 0.9, "1 conditions are too few"), (2, 2, 0.9, "too few for intervals"),
     (3, 50, 1.0, "level \\(1.0\\)"), (3, 50, math.nan, "level \\(nan\\)")],
)  # fmt: skip
def test_too_little_to_calibrate_on_is_refused(n_conditions, n_genes, level, message):
    values = np.ones((n_conditions, n_genes))
    with pytest.raises(ValueError, match=message):
        fit_calibration(values, values, values, values > 0, level)


def test_spreads_of_one_population_are_refused():
    values = np.ones((3, 40))
    with pytest.raises(ValueError, match="not finite"):
        fit_calibration(values, values, values * np.nan, values > 0)


@pytest.mark.parametrize("match", ["batch", "cell_type"])
def test_a_model_is_calibrated_on_its_held_out_conditions(match):
    model, adata = untrained(std=0.1), counts_screen(n=6)
    if match == "cell_type":  # controls in a batch of their own
        adata.obs["batch"] = np.where(adata.obs["perturbation"] == "control", "c", adata.obs["batch"])
    screen = read(adata)
    held_out = (screen.obs["perturbation"] == "A+B").to_numpy()
    found = calibrate(model, screen, held_out, match, n_populations=3, seed=2)
    assert found.n_conditions == 4
    assert model.training.calibration == found
    log1p = pd.DataFrame(log1p_cp10k(adata.X), index=adata.obs_names)
    control = adata.obs["perturbation"] == "control"
    measured, mean, spread = [], [], []
    for cell_type in ("NK", "T"):
        for batch in ("b1", "b2"):
            here = (adata.obs["cell_type"] == cell_type) & ((adata.obs["batch"] == batch) | (match == "cell_type"))
            own = screen.obs.index[screen.obs.index.isin(adata.obs_names[control & here])]  # in the screen's order
            condition = (adata.obs["cell_type"] == cell_type) & (adata.obs["batch"] == batch)
            real = log1p[(condition & (adata.obs["perturbation"] == "A+B")).to_numpy()]
            predicted = model.generate(adata[own].copy(), "A+B", cell_type, batch, len(real), 3, seed=2)
            table = population_summary(predicted)
            measured.append(real.mean(0))
            mean.append(table["mean"])
            spread.append(table["spread"])
    expected = fit_calibration(*map(np.array, (measured, mean, spread)), np.ones((4, 12), dtype=bool))
    assert vars(found) == pytest.approx(vars(expected), rel=1e-4)


def test_genes_that_the_screen_lacks_do_not_count_in_a_calibration():
    adata = counts_screen(n=6)
    held_out = (read(adata).obs["perturbation"] == "A+B").to_numpy()
    found = [
        calibrate(untrained(std=0.1), read(cells), held_out, "batch", n_populations=3, seed=2)
        for cells in (adata[:, :10].copy(), with_zeros(adata))
    ]
    assert vars(found[0]) == pytest.approx(vars(found[1]), rel=1e-5)  # a gene that is zero everywhere is not used


def with_zeros(adata):
    adata = adata.copy()
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(12) < 10))
    return adata


def test_calibrating_needs_populations_and_conditions():
    model, screen = untrained(), read(counts_screen())
    everything = ~screen.is_control
    with pytest.raises(ValueError, match=r"n_populations \(1\)"):
        calibrate(model, screen, everything, "batch", n_populations=1)
    with pytest.raises(ValueError, match="0 conditions are too few to calibrate on"):
        calibrate(model, screen, screen.is_control, "batch")
    assert model.training.calibration is None


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
